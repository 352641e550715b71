"""Which share of the data each domain gets: pure updates over plain numbers, and the losses that they aim at."""
