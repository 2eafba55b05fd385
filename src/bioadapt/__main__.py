"""``python -m bioadapt``: the command, for environments whose programs are not on the search path."""

from .cli import main

main()
