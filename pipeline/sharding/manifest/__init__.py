"""The manifest in parts: who is there twice, and which row goes into which shard, as tasks."""
