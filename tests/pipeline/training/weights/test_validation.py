"""Figures on val: shared out among workers, and those of the whole matrix."""

import pytest
import torch
from torch.nn import functional as F

from bench.lists import captions_of
from pipeline.formulas.metrics import ndcg, recall_at
from pipeline.training.distributed import ProcessGroup
from pipeline.training.weights import validation
from schemas.settings import LabelSettings
from tests.helpers import gloo

IMAGES, EACH, WIDTH = 5, 3, 4


def vectors():
    """Images and texts, two texts of different images alike, and each text's image."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(IMAGES, WIDTH, generator=generator), dim=1)
    owners = torch.arange(IMAGES).repeat_interleave(EACH)
    noise = torch.randn(IMAGES * EACH, WIDTH, generator=generator)
    texts = F.normalize(images[owners] + noise, dim=1)
    texts[4] = texts[0]
    return images, texts, owners


def worker(rank: int, size: int, folder: str) -> None:
    def work() -> None:
        images, texts, owners = vectors()
        world, captions = ProcessGroup(), captions_of([EACH] * IMAGES, 6)
        found = validation.recalls(images, texts, owners, world)
        found |= validation.ndcg_on_val(images, texts, captions, LabelSettings(), world)
        torch.save(found, f"{folder}/{rank}.pt")

    gloo.meet(rank, size, folder, work)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_figures_on_val_are_those_of_the_whole_matrix_on_any_number_of_workers(size, tmp_path):
    """Four workers have two images each; the last of them has none."""
    gloo.together(size, worker, str(tmp_path))
    images, texts, owners = vectors()
    scores, positive = images @ texts.T, torch.arange(IMAGES)[:, None] == owners
    captions = captions_of([EACH] * IMAGES, 6)
    relevance = captions.relevance(captions.image_ids, LabelSettings())
    expected = {}
    for name, turned in (("i2t", lambda x: x), ("t2i", lambda x: x.T)):
        for k in validation.DEPTHS:
            found = recall_at(turned(scores), turned(positive), k).mean()
            expected[f"val/{name}_R_at_{k}"] = 100 * float(found)
        graded = ndcg(turned(scores), turned(relevance), k=validation.NDCG_AT)
        expected[f"val/{name}_ndcg_label"] = float(graded.mean())
    recalls = [value for name, value in expected.items() if "_R_at_" in name]
    expected |= {"val/rsum": sum(recalls)}
    expected["val/ndcg_label"] = (
        expected["val/i2t_ndcg_label"] + expected["val/t2i_ndcg_label"]
    ) / 2
    assert 100 < expected["val/rsum"] < 600
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    assert all(of_one == found[0] for of_one in found)
    assert found[0] == pytest.approx(expected, rel=1e-6)
