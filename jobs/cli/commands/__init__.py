"""The commands that are no stage of a run."""
