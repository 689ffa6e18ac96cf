"""halftone train: a two-tower model is trained under Ray."""

from jobs.cli import main, scopes, training
from jobs.cli.command import Command

COMMAND = Command(scopes.each_model, training.run, ("train", "model", "label"))

if __name__ == "__main__":
    main.main("train")
