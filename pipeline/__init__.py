"""What is computed: stages, formulas, models. Meant for one's own code are

    from pipeline.formulas.losses import smooth_ndcg, both_directions, LOSSES
    from pipeline.formulas import metrics, metrics_from_ranks, relevance
    from pipeline.sharding.reading import Shards
    from pipeline.training.saved_model import load_model
    from pipeline.retrieval.scores import Items, MatrixScores, VectorScores
    from pipeline.evaluation import intervals, protocols
    from pipeline.reranking.external import rerank
    from pipeline.search.index import SearchIndex

docs/library.md shows each at work. All else may change without a word. Importing `pipeline` imports
nothing: every import above brings what it needs.
"""


def __getattr__(name: str) -> str:
    """`__version__`, of the installed package."""
    if name == "__version__":
        from importlib.metadata import version

        return version("halftone-itr")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
