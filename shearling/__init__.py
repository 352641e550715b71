"""Shearling: a pretrained language model and a shape in, a smaller model of exactly that shape out."""

__version__ = "0.1.0"
