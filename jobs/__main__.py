"""`python -m jobs COMMAND` is `halftone COMMAND`."""

from jobs.cli.main import main

if __name__ == "__main__":
    main()
