"""Better scores from the same vectors; open `rerank.py` first."""
