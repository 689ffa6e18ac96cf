"""What is computed: sources, shards, labels, training, evaluation, re-ranking, search.

For code of one's own: `formulas.losses`, `formulas.metrics`, `formulas.relevance`,
`sharding.reading`, `training.saved_model`, `evaluation.protocols`, `evaluation.intervals` and
`search.index`. Importing this package imports none of them.
"""
