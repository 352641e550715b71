"""Losses of a causal model without its logits in memory."""
