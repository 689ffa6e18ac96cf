"""LeaPRR, the learnable pillar-based re-ranker: `model.py` first."""
