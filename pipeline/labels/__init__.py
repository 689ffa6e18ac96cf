"""Stages 3 and 4, captions to vectors to relevance: `embed.py` and `label.py` first."""
