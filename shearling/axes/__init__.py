"""The algebra: named axes, tensors on them, and what follows. Standard library only."""
