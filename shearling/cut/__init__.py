"""Cutting: one-shot scores, what folds into the weights, and the smaller checkpoint."""
