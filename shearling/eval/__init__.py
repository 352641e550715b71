"""What a model does, beside its loss."""
