"""The command line: `main.py` parses and runs a command; `run.py` is what a command gets."""
