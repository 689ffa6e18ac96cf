"""Recalls on val while training goes on, the work shared out among its workers."""

import numpy as np
import torch

from pipeline._batches import Split
from pipeline._world import World
from pipeline.formulas.metrics import recall_at
from pipeline.models import TwoTower, Vocabulary

DEPTHS = (1, 5, 10)


def recalls(model: TwoTower, vocabulary: Vocabulary, split: Split, world: World, **settings):
    """R@K of both directions in percent and their sum, by the name of the metric."""
    images, texts, owners = encode_split(model, vocabulary, split, world, **settings)
    positive_MN = torch.arange(len(images))[:, None] == owners[None, :]
    scores_MN = (images @ texts.T).cpu()
    metrics = {}
    for direction, scores, positive in (
        ("i2t", scores_MN, positive_MN),
        ("t2i", scores_MN.T, positive_MN.T),
    ):
        for k in DEPTHS:
            name = f"val/{direction}_R_at_{k}"
            metrics[name] = 100 * float(recall_at(scores, positive, k).mean())
    return {**metrics, "val/rsum": sum(metrics.values())}


@torch.no_grad()
def encode_split(
    model: TwoTower,
    vocabulary: Vocabulary,
    split: Split,
    world: World,
    *,
    max_words: int,
    batch_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image vectors (M, D), caption vectors (N, D) and each caption's image row (N,)."""

    def share(count: int) -> np.ndarray:
        """This worker's rows; equally many on each, the last repeated where they run out."""
        each = -(-count // world.size)
        return np.minimum(np.arange(world.rank * each, (world.rank + 1) * each), count - 1)

    def together(parts: list[torch.Tensor], count: int) -> torch.Tensor:
        return world.gather(torch.cat(parts))[:count]

    images, texts = [], []
    rows = share(len(split))
    for start in range(0, len(rows), batch_size):
        payload = np.stack([split.image(row) for row in rows[start : start + batch_size]])
        images.append(model.encode_image(torch.from_numpy(payload).to(world.device)))
    rows = share(len(split.captions))
    for start in range(0, len(rows), batch_size):
        captions = [split.captions[row] for row in rows[start : start + batch_size]]
        words, lengths = vocabulary.encode(captions, max_words)
        texts.append(model.encode_text(words.to(world.device), lengths))
    owners = torch.from_numpy(np.repeat(np.arange(len(split)), split.caption_count))
    return together(images, len(split)), together(texts, len(split.captions)), owners
