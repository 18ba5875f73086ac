"""`python -m trainer`: the same command line as `trainer`."""

from trainer.cli import main

main()
