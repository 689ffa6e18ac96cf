"""Recalls and NDCG on val while training goes on, the work shared out among its workers."""

import numpy as np
import torch

from pipeline.formulas.metrics import ndcg, recall_at
from pipeline.labels.caption_vectors import Captions
from pipeline.models import TwoTower, Vocabulary
from pipeline.models.vocabulary import PretrainedTokens
from pipeline.training.data import Split
from pipeline.training.distributed import ProcessGroup
from schemas.settings import LabelSettings

DEPTHS = (1, 5, 10)
NDCG_AT = 10
CELLS = 2**24  # relevances held at a time


def recalls(images: torch.Tensor, texts: torch.Tensor, owners: torch.Tensor) -> dict[str, float]:
    """R@K of both directions in percent and their sum, by the name of the metric."""
    positive_MN = torch.arange(len(images))[:, None] == owners[None, :]
    scores_MN = (images @ texts.T).cpu()
    metrics = {}
    of_both = {"i2t": (scores_MN, positive_MN), "t2i": (scores_MN.T, positive_MN.T)}
    for direction, matrices in of_both.items():
        for k in DEPTHS:
            metrics[f"val/{direction}_R_at_{k}"] = 100 * float(recall_at(*matrices, k).mean())
    return {**metrics, "val/rsum": sum(metrics.values())}


def ndcg_on_val(
    images: torch.Tensor, texts: torch.Tensor, captions: Captions, settings: LabelSettings
) -> dict[str, float]:
    """NDCG@10 of both directions against the labels, and their mean, by the name of the metric."""
    images, texts = images.cpu(), texts.cpu()

    def i2t(rows: list[int]) -> torch.Tensor:
        relevance = captions.relevance([captions.image_ids[row] for row in rows], settings)
        return ndcg(images[rows] @ texts.T, relevance, k=NDCG_AT)

    def t2i(rows: list[int]) -> torch.Tensor:
        relevance = captions.relevance_of_texts(rows, settings)
        return ndcg(texts[rows] @ images.T, relevance, k=NDCG_AT)

    metrics = {}
    counts = len(images), len(texts)
    for name, of_rows, (count, others) in (("i2t", i2t, counts), ("t2i", t2i, counts[::-1])):
        rows = torch.arange(count).split(max(1, CELLS // others))
        values = torch.cat([of_rows(part.tolist()) for part in rows])
        metrics[f"val/{name}_ndcg_label"] = float(values.nanmean())
    return {**metrics, "val/ndcg_label": sum(metrics.values()) / 2}


@torch.no_grad()
def encode_split(
    model: TwoTower,
    vocabulary: Vocabulary | PretrainedTokens,
    split: Split,
    world: ProcessGroup,
    *,
    max_words: int,
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
