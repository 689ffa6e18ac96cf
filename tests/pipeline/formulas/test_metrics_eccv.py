"""Recalls, mAP@R and R-Precision are those of `eccv_caption`, on its own annotations.

5,000 images and 25,000 captions of COCO with the matches that people added (CxC, ECCV Caption). Two
captions that ECCV Caption names are not among the 25,000: they can only be missed.
"""

import eccv_caption
import pytest
import torch

from pipeline.formulas import metrics_from_ranks
from pipeline.formulas.metrics import recall_at

torch.set_num_threads(1)
DEPTH = 50  # of the rankings that eccv_caption is given: no query has more positives


class Gallery:
    """Random vectors that know their matches a little, and the rankings that they give."""

    def __init__(self):
        self.truth = eccv_caption.Metrics()
        captions = self.truth.coco_gts["t2i"]
        self.ids = {"i2t": sorted(self.truth.coco_gts["i2t"]), "t2i": sorted(captions)}
        self.places = {way: {k: i for i, k in enumerate(ids)} for way, ids in self.ids.items()}
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(5000, 24, generator=generator)
        own = [self.places["i2t"][captions[caption][0]] for caption in self.ids["t2i"]]
        texts = images[own] + 0.7 * torch.randn(25000, 24, generator=generator)
        self.sides = {"i2t": (images, texts), "t2i": (texts, images)}
        self.ranked = {way: self.rankings(way) for way in self.sides}
        for matches in (
            self.truth.coco_gts,
            self.truth.cxc_gts,
        ):  # a tenth of their queries will do
            for way, of_query in matches.items():
                matches[way] = dict(list(of_query.items())[::10])

    def rankings(self, way):
        queries, gallery = self.sides[way]
        names = self.ids["t2i" if way == "i2t" else "i2t"]
        best = torch.cat([(some @ gallery.T).topk(DEPTH).indices for some in queries.split(500)])
        return {
            query: [names[place] for place in places]
            for query, places in zip(self.ids[way], best.tolist(), strict=True)
        }

    def measured(self, way, truth, metrics):
        """The mean of every metric(scores, positive, total) over the queries that `truth` has."""
        queries, gallery = self.sides[way]
        places = self.places["t2i" if way == "i2t" else "i2t"]
        names, values = list(truth), []
        for some in (names[start : start + 32] for start in range(0, len(names), 32)):
            positive = torch.zeros(len(some), len(gallery), dtype=torch.bool)
            for row, query in enumerate(some):
                positive[row, [places[match] for match in truth[query] if match in places]] = True
            total = torch.tensor([len(truth[query]) for query in some])
            scores = queries[[self.places[way][query] for query in some]] @ gallery.T
            values.append(torch.stack([metric(scores, positive, total) for metric in metrics]))
        return torch.cat(values, 1).mean(1).tolist()


@pytest.fixture(scope="module")
def gallery():
    return Gallery()


@pytest.mark.parametrize("name", ["coco_5k", "cxc", "eccv"])
def test_recalls(gallery, name):
    matches = getattr(gallery.truth, f"{name.removesuffix('_5k')}_gts")
    theirs = getattr(gallery.truth, f"{name}_recalls")
    ours = [lambda s, p, _, k=k: recall_at(s, p, k) for k in (1, 5, 10)]
    for way in matches:
        expected = [theirs(gallery.ranked, "all", K=k)[way] for k in (1, 5, 10)]
        assert expected == sorted(expected) and 0.1 < expected[0] < 0.9
        found = gallery.measured(way, matches[way], ours)
        assert found == pytest.approx(expected, abs=1e-12)


def of_ranks(scores, positive, total):
    """Metrics by name, from how many candidates are above each positive and tied with it."""
    query_P, place_P = positive.nonzero(as_tuple=True)
    rows, own = scores[query_P], scores[query_P, place_P][:, None]
    counts = (rows > own).sum(1), (rows == own).sum(1)
    return metrics_from_ranks.per_query(query_P, *counts, len(scores), total_Q=total)


def test_map_at_r_and_r_precision(gallery):
    """R counts all that people matched, the two captions that are in no gallery among them."""
    theirs = gallery.truth.eccv_metrics(gallery.ranked, "all")
    ours = [
        lambda s, p, total, name=name: of_ranks(s, p, total)[name]
        for name in ("map_at_r", "r_precision")
    ]
    for way, matches in gallery.truth.eccv_gts.items():
        expected = [theirs[name][way] for name in ("eccv_map_at_r", "eccv_rprecision")]
        assert gallery.measured(way, matches, ours) == pytest.approx(expected, abs=1e-12)
