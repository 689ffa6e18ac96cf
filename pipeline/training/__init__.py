"""Stage 5, two towers trained on the global batch: `train.py` first."""
