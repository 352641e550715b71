"""The command line: parse, call, print. Nothing else prints."""

from shearling.cli.verbs import main

__all__ = ["main"]
