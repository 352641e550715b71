"""Weight files in and out: the only room that touches them."""
