"""The command line: parse, call, print. Nothing else prints."""

from shearling.cli.verbs import app, main

__all__ = ["app", "main"]
