"""`python -m layerfold.cli`."""

from layerfold.cli import main

main()
