"""Stage 6, tower vectors to rankings to figures: `evaluate.py` first."""
