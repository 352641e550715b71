"""From documents to token windows: reading, tokenising, the store, the sampler's exact position."""
