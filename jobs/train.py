"""halftone train: a two-tower model is trained under Ray."""

from jobs.cli import main, scopes
from jobs.cli.command import Command
from jobs.cli.training import run

COMMAND = Command(scopes.each_model, run, ("train", "model", "label"))

if __name__ == "__main__":
    main.main("train")
