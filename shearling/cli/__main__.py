"""`python -m shearling.cli`."""

from shearling.cli import main

main()
