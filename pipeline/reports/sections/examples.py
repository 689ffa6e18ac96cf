"""What the report shows of each model: its queries, failures, and what re-ranking moved."""

import random

import numpy as np

from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.reports.pictures import Hit, Pictures
from pipeline.reports.sections.systems import STAGES, System
from schemas.settings import ReportSettings

# Thumbnails of a page are embedded once each; of many, smaller ones keep it within 5 MB.
SIDES = ((150, 128), (400, 96), (10**9, 64))  # up to so many pictures: pixels of the longer side
QUALITY = 60


class Thumbnails:
    """The pictures of a page: each embedded once, under a short name."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures
        self.named: dict[str, str] = {}

    def name(self, image_id: str) -> str:
        return self.named.setdefault(image_id, f"p{len(self.named)}")

    def uris(self) -> dict[str, str]:
        """Data URIs of the pictures named so far, by their names."""
        side = next(side for most, side in SIDES if len(self.named) <= most)
        made = ((name, self.pictures.thumbnail(i, side, QUALITY)) for i, name in self.named.items())
        return {name: uri for name, uri in made if uri}


class Examples:
    """Queries of one model with their results.

    `systems` are its rankings as trained and, where there is one, re-ranked.
    """

    def __init__(
        self,
        settings: ReportSettings,
        systems: list[System],
        relevance: GradedRelevance,
        thumbnails: Thumbnails,
    ):
        self.settings, self.relevance, self.thumbnails = settings, relevance, thumbnails
        self.pictures, self.systems = thumbnails.pictures, systems
        self.ranks = [_ranks(system) for system in systems]
        queries = systems[0].measured.queries["t2i"]
        self.owners = queries.image_ids[np.argsort(queries.query_ids)]  # of the sorted captions

    def drawn(self) -> list[str]:
        """A few captions drawn at random."""
        ids = self.ranks[0][0].tolist()
        count = min(self.settings.queries, len(ids))
        return random.Random(self.settings.seed).sample(ids, count)

    def worst(self) -> list[str]:
        """Captions whose own image came last, one an image."""
        ids, rank = self.ranks[0]
        last: dict[str, str] = {}
        for row in np.lexsort((ids, -rank)):
            if len(last) == self.settings.worst:
                break
            last.setdefault(self._image_of(ids[row]), str(ids[row]))
        return list(last.values())

    def _image_of(self, caption_id: str) -> str:
        """The image that a caption was written for."""
        return str(self.owners[np.searchsorted(self.ranks[0][0], caption_id)])

    def moved(self) -> list[tuple[str, list[str]]]:
        """The captions that re-ranking helped most, and those that it hurt most."""
        if len(self.ranks) < 2:
            return []
        (ids, before), (others, after) = self.ranks
        ids, of_before, of_after = np.intersect1d(ids, others, return_indices=True)
        # From 60 to 30 is less of a help than from 3 to 1: ratios, not differences.
        gain = before[of_before] / after[of_after]
        helped, hurt = np.lexsort((ids, -gain)), np.lexsort((ids, gain))
        count = self.settings.moved
        return [
            (
                f"{title} ({some.sum():,} of {len(ids):,} captions)",
                ids[order][: min(count, some.sum())].tolist(),
            )
            for title, some, order in (("Helped", gain > 1, helped), ("Hurt", gain < 1, hurt))
        ]

    def shown(self) -> dict:
        """All of the model's queries that the page shows."""
        drawn, worst, moved = self.drawn(), self.worst(), self.moved()
        wanted = {*drawn, *worst, *(query_id for _, ids in moved for query_id in ids)}
        self.lists = [system.lists("t2i", wanted) for system in self.systems]
        self.graded = self._graded(sorted(wanted))
        return {
            "drawn": [self._query(query_id) for query_id in drawn],
            "worst": [self._query(query_id, with_own=True) for query_id in worst],
            "moved": [(title, [self._query(i) for i in ids]) for title, ids in moved],
        }

    def _graded(self, ids: list[str]) -> dict[str, dict[str, float]]:
        """The relevance of queries to all images that the page shows with any of them."""
        shown = {self._image_of(query_id) for query_id in ids}
        for row in (row for of_system in self.lists for row in of_system.values()):
            shown.update(row["candidate_id"][: self.settings.results])
        items = self.relevance.items
        texts, images = items.find("text", ids), items.find("image", shown)
        rows = np.array([texts[query_id] for query_id in ids], np.int64)
        found = self.relevance.best_known("t2i", rows, np.array(list(images.values()), np.int64))
        return {
            query_id: dict(zip(images, relevance, strict=True))
            for query_id, relevance in zip(ids, found.tolist(), strict=True)
        }

    def _query(self, caption_id: str, with_own: bool = False) -> dict:
        own, relevance = self._image_of(caption_id), self.graded[caption_id]
        shown: list[dict] = []
        places: dict[str, int] = {}
        for system, rows in zip(self.systems, self.lists, strict=True):
            row, label = rows[caption_id], STAGES[system.stage]
            best = zip(row["candidate_id"], row["score"], strict=True)
            hits = [
                self._hit(image_id, score, relevance[image_id], own)
                for image_id, score in list(best)[: self.settings.results]
            ]
            before = [places.get(hit.id) if shown else None for hit in hits]
            places = {image_id: n for n, image_id in enumerate(row["candidate_id"], 1)}
            shown.append({"label": label, "rank": row["rank"], "hits": hits, "before": before})
        written = {c["caption_id"]: c["text"] for c in self.pictures.sample(own).captions}
        query = {"text": written[caption_id], "rankings": shown, "own": None}
        if with_own:
            query["own"] = self._hit(own, float("nan"), relevance[own], own)
        return query

    def _hit(self, image_id: str, score: float, relevance: float, own: str) -> Hit:
        return hit(self.thumbnails, image_id, score, relevance, own)


def hit(
    thumbnails: Thumbnails, image_id: str, score: float, relevance: float, own: str = ""
) -> Hit:
    """An image as a result, its picture among the page's thumbnails."""
    text = thumbnails.pictures.caption_texts(image_id)[0]
    name = thumbnails.name(image_id)
    return Hit(image_id, image_id, text, score, image_id == own, relevance, name)


def suspects(undecided: list[dict], thumbnails: Thumbnails) -> list[dict]:
    """Likely false negatives: a caption, the image that it may fit, and what was said of that."""
    return [
        {
            "text": row["caption"],
            "hit": hit(thumbnails, row["image_id"], float("nan"), float(row["label"])),
            "captions": thumbnails.pictures.caption_texts(row["image_id"]),
        }
        for row in undecided
    ]


def _ranks(system: System) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the captions, sorted, and the rank of each one's own image."""
    queries = system.measured.queries["t2i"]
    order = np.argsort(queries.query_ids)
    return queries.query_ids[order], queries.values["rank"][order]
