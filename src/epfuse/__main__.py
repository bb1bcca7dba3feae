"""``python -m epfuse``: the command line, where the package is on the path but not installed."""

from epfuse.cli.main import main

main()
