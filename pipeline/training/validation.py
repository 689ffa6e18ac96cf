"""Recalls and NDCG on val while training goes on, the work shared out among its workers."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pipeline.formulas.metrics import ndcg
from pipeline.formulas.metrics_from_ranks import per_query
from pipeline.labels.caption_vectors import Captions
from pipeline.models import TwoTower, Vocabulary
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.retrieval import ranks
from pipeline.retrieval.scores import NONE
from pipeline.training.data import Split
from pipeline.training.distributed import ProcessGroup
from schemas.settings import LabelSettings

DEPTHS = (1, 5, 10)
NDCG_AT = 10
CELLS = 2**24  # relevances held at a time


def recalls(images: Tensor, texts: Tensor, owners: Tensor, world: ProcessGroup) -> dict[str, float]:
    """R@K of both directions in percent and their sum, by the name of the metric.

    By exact places, as evaluation has them; each worker counts for its share of the queries.
    """
    text_P, image_P = np.arange(len(texts)), owners.numpy()
    sides = {
        "i2t": (images, texts, ranks.Pairs(image_P, text_P)),
        "t2i": (texts, images, ranks.Pairs(text_P, image_P)),
    }
    metrics = {}
    for direction, side in sides.items():
        found = _shared_out(len(side[0]), len(DEPTHS), partial(_recalls, *side), world)
        for k, value in zip(DEPTHS, found.mean(0), strict=True):
            metrics[f"val/{direction}_R_at_{k}"] = 100 * float(value)
    return {**metrics, "val/rsum": sum(metrics.values())}


def _recalls(queries: Tensor, candidates: Tensor, pairs: ranks.Pairs, rows: range) -> Tensor:
    """R@K (len(rows), K) of some queries, as a fraction."""
    mine_P = (pairs.query_P >= rows.start) & (pairs.query_P < rows.stop)
    mine = ranks.Pairs(pairs.query_P[mine_P] - rows.start, pairs.candidate_P[mine_P])
    places, _ = ranks.of_vectors(queries[rows.start : rows.stop], candidates, mine, NONE)
    query_P, above_P, tied_P = (torch.from_numpy(x) for x in (mine.query_P, *places))
    found = per_query(query_P, above_P, tied_P, len(rows), ks=DEPTHS)
    return torch.stack([found[f"R_at_{k}"] for k in DEPTHS], 1)


def ndcg_on_val(
    images: Tensor, texts: Tensor, captions: Captions, settings: LabelSettings, world: ProcessGroup
) -> dict[str, float]:
    """NDCG@10 of both directions against the labels, and their mean, by the name of the metric.

    Each worker has it of its share of the queries.
    """
    images, texts = images.cpu(), texts.cpu()

    def i2t(rows: range) -> Tensor:
        relevance = captions.relevance([captions.image_ids[row] for row in rows], settings)
        return ndcg(images[rows.start : rows.stop] @ texts.T, relevance, k=NDCG_AT)

    def t2i(rows: range) -> Tensor:
        relevance = captions.relevance_of_texts([*rows], settings)
        return ndcg(texts[rows.start : rows.stop] @ images.T, relevance, k=NDCG_AT)

    metrics = {}
    sides = {"i2t": (i2t, len(images), len(texts)), "t2i": (t2i, len(texts), len(images))}
    for name, (of_block, count, others) in sides.items():
        found = _shared_out(count, 1, partial(_by_blocks, of_block, CELLS // others), world)
        metrics[f"val/{name}_ndcg_label"] = float(found.nanmean())
    return {**metrics, "val/ndcg_label": sum(metrics.values()) / 2}


def _by_blocks(of_block: Callable[[range], Tensor], size: int, rows: range) -> Tensor:
    starts = range(0, len(rows), max(1, size))
    return torch.cat([of_block(rows[start : start + max(1, size)]) for start in starts])[:, None]


def _shared_out(
    count: int, columns: int, of_rows: Callable[[range], Tensor], world: ProcessGroup
) -> Tensor:
    """Values (count, columns) of queries, in float64 on the CPU, made by each worker of a share."""
    each = -(-count // world.size)
    rows = range(count)[each * world.rank : each * (world.rank + 1)]
    # As many of each: the last workers may have fewer, or none.
    values = torch.zeros(each, columns, dtype=torch.float64)
    if rows:
        values[: len(rows)] = of_rows(rows)
    return world.gather(values.to(world.device)).cpu()[:count]


@torch.no_grad()
def encode_split(
    model: TwoTower,
    vocabulary: Vocabulary | PretrainedTokens,
    split: Split,
    world: ProcessGroup,
    *,
    max_words: int | None,
    batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image vectors (M, D), caption vectors (N, D) and each caption's image row (N,)."""

    def batches(count: int) -> list[np.ndarray]:
        """This worker's rows; equally many on each, the last repeated where they run out."""
        each = -(-count // world.size)
        rows = np.minimum(np.arange(world.rank * each, (world.rank + 1) * each), count - 1)
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    images, texts = [], []
    for rows in batches(len(split)):
        payload = np.stack([split.image(row) for row in rows])
        images.append(model.encode_image(torch.from_numpy(payload).to(world.device)))
    for rows in batches(len(split.captions)):
        words, lengths = vocabulary.encode(split.texts(rows), max_words)
        texts.append(model.encode_text(words.to(world.device), lengths))
    owners = torch.from_numpy(np.repeat(np.arange(len(split)), split.caption_count))
    images_MD, texts_ND = world.gather(torch.cat(images)), world.gather(torch.cat(texts))
    return images_MD[: len(split)], texts_ND[: len(split.captions)], owners
