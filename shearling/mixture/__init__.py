"""How much of each domain to train on, and the losses that decide it: pure mathematics."""
