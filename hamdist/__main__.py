"""`python -m hamdist` is the command `hamdist`."""

from hamdist.cli import main

main()
