"""Stages 1 and 2, annotations to a manifest to shards: `ingest.py` and `shard.py` first."""
