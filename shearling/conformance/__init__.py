"""Conformance: what a family's table claims, tried on small random models of transformers' own classes."""
