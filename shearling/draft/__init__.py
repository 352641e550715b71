"""A table for a model type that has none: proposed by probing transformers' own class, then proved or refused."""
