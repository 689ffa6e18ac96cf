"""What the report shows of one model: its queries, failures and suspicious negatives."""

import functools
import random

from pipeline.evaluation.graded_relevance import GradedRelevance
from pipeline.reports.pictures import Hit, Pictures
from schemas.settings import ReportSettings

# Thumbnails of a page are embedded once each; of many, smaller ones keep it within 5 MB.
SIDES = ((150, 128), (400, 96), (10**9, 64))  # up to so many pictures: pixels of the longer side
QUALITY = 60


class Examples:
    """Queries with their results, and the thumbnails they need, each under a short name.

    `rankings` hold a row a caption, under `as trained` and, where there is one, `re-ranked`.
    """

    def __init__(
        self,
        settings: ReportSettings,
        rankings: dict[str, list[dict]],
        relevance: GradedRelevance,
        pictures: Pictures,
    ):
        self.settings, self.relevance, self.pictures = settings, relevance, pictures
        of = rankings.items()
        self.rankings = {label: {row["query_id"]: row for row in rows} for label, rows in of}
        captions = relevance.captions
        self.column = {image_id: n for n, image_id in enumerate(captions.image_ids)}
        self.image_of = dict(zip(captions.caption_ids, captions.caption_image, strict=True))
        self.named: dict[str, str] = {}

    @functools.cached_property
    def ranks(self) -> dict[str, dict[str, float]]:
        """By ranking and caption, the rank of the caption's own image."""
        of = self.rankings.items()
        return {label: {id_: row["rank"] for id_, row in rows.items()} for label, rows in of}

    def drawn(self) -> list[dict]:
        """A few captions drawn at random."""
        ranked = sorted(self.rankings["as trained"])
        count = min(self.settings.queries, len(ranked))
        return self._queries(random.Random(self.settings.seed).sample(ranked, count))

    def worst(self) -> list[dict]:
        """Captions whose own image came last, one an image."""
        ranks = self.ranks["as trained"]
        last: dict[str, str] = {}
        for caption_id in sorted(ranks, key=lambda c: (-ranks[c], c)):
            last.setdefault(self.image_of[caption_id], caption_id)
        return self._queries(list(last.values())[: self.settings.worst], with_own=True)

    def moved(self) -> list[tuple[str, list[dict]]]:
        """The captions that re-ranking helped most, and those that it hurt most."""
        if "re-ranked" not in self.ranks:
            return []
        before, after = self.ranks["as trained"], self.ranks["re-ranked"]
        # From 60 to 30 is less of a help than from 3 to 1: ratios, not differences.
        gain = {c: before[c] / after[c] for c in before if c in after}
        helped = sorted((c for c in gain if gain[c] > 1), key=lambda c: (-gain[c], c))
        hurt = sorted((c for c in gain if gain[c] < 1), key=lambda c: (gain[c], c))
        count = self.settings.moved
        return [
            (f"{title} ({len(ids):,} of {len(gain):,} captions)", self._queries(ids[:count]))
            for title, ids in (("Helped", helped), ("Hurt", hurt))
        ]

    def shown(self, undecided: list[dict]) -> dict:
        """All that the report shows, likely false negatives among it, and its thumbnails."""
        parts = {"drawn": self.drawn(), "worst": self.worst(), "moved": self.moved()}
        suspects = [
            {
                "text": row["caption"],
                "hit": self._hit(row["image_id"], float("nan"), float(row["label"])),
                "captions": self.pictures.caption_texts(row["image_id"]),
            }
            for row in undecided
        ]
        return {**parts, "suspects": suspects, "thumbnails": self.thumbnails()}

    def thumbnails(self) -> dict[str, str]:
        """Data URIs of the pictures shown so far, by their short names."""
        side = next(side for most, side in SIDES if len(self.named) <= most)
        made = ((name, self.pictures.thumbnail(i, side, QUALITY)) for i, name in self.named.items())
        return {name: uri for name, uri in made if uri}

    def _queries(self, caption_ids: list[str], with_own: bool = False) -> list[dict]:
        return [self._query(caption_id, with_own) for caption_id in caption_ids]

    def _query(self, caption_id: str, with_own: bool) -> dict:
        own = self.image_of[caption_id]
        relevance_N = self.relevance.best_known("t2i", [caption_id])[0].tolist()
        shown: list[dict] = []
        places: dict[str, int] = {}
        for label, rows in self.rankings.items():
            row = rows[caption_id]
            best = zip(row["candidate_id"], row["score"], strict=True)
            hits = [
                self._hit(image_id, score, relevance_N[self.column[image_id]], own)
                for image_id, score in list(best)[: self.settings.results]
            ]
            before = [places.get(hit.id) if label == "re-ranked" else None for hit in hits]
            places = {image_id: n for n, image_id in enumerate(row["candidate_id"], 1)}
            shown.append({"label": label, "rank": row["rank"], "hits": hits, "before": before})
        query = {"text": self.pictures.captions[caption_id], "rankings": shown, "own": None}
        if with_own:
            query["own"] = self._hit(own, float("nan"), relevance_N[self.column[own]], own)
        return query

    def _hit(self, image_id: str, score: float, relevance: float, own: str = "") -> Hit:
        name = self.named.setdefault(image_id, f"p{len(self.named)}")
        text = self.pictures.caption_texts(image_id)[0]
        return Hit(image_id, image_id, text, score, image_id == own, relevance, name)
