"""One training loop, for pruning and healing alike."""
