"""`python -m sfwatch` is the command `sfwatch`."""

from sfwatch.cli import main

main()
