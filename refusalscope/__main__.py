"""`python -m refusalscope` is the command line."""

from refusalscope.cli import main

main()
