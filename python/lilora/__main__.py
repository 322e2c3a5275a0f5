"""`python -m lilora` is the `lilora` command; launchers of several processes want a module."""

from lilora.cli import main

main()
