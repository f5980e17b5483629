"""`python -m cmdgen`."""

from cmdgen.cli.app import main

main()
