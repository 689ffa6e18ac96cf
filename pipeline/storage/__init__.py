"""Files at any URI, the pieces of a stage, and the run folder they lie in."""
