"""The processes of a run: what they agree on, and models that they share out among them."""
