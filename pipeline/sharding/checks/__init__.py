"""What is wrong with shards, and what mends them: `lint.py`, `audit.py`, `repair.py`."""
