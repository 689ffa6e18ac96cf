"""The label report: how relevance is spread, what its shades look like, and what encoders agree on.

Legend of the shape suffixes: M sampled images, N sampled captions, L entries of lists.
"""

import functools
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.labels import label
from pipeline.labels.agreement import of_encoders
from pipeline.labels.caption_vectors import Captions, relevance_of
from pipeline.labels.maps import cosine_map
from pipeline.reports import render
from pipeline.reports.false_negatives import embeddings, label_folder, labels_of, versions
from pipeline.reports.figures import shares, spread
from pipeline.reports.pictures import spaced, thumbnail
from pipeline.reports.render import Figure, Made, Page
from pipeline.sharding.reading import Shards
from pipeline.storage import parquet, store
from schemas.settings import LabelSettings, Recipe

LAYOUT = 2  # counts up when the page changes, so that it is made again
NEAR = 0.95  # cosine of a caption that says almost the same
IMAGES, CAPTIONS = 64, 5000  # sampled of a split, evenly spaced
EXAMPLES = 3  # of every tenth of relevance
TOP = 10  # captions of an image that encoders are asked to agree on
BINS = 50  # of the figure of best negatives


def page(recipe: Recipe, root: str) -> Page:
    """The label report, beside the labels."""

    def made(version: str) -> Made:
        report = Report(recipe, root)
        return Made(report.html(version), metrics=report.metrics())

    uri = store.join(label_folder(recipe, root), "labels.html")
    return Page(uri, LAYOUT, versions(recipe, root), made, "labels.html")


class Report:
    """What the page and MLflow tell of the labels of a run folder."""

    def __init__(self, recipe: Recipe, root: str):
        self.recipe, self.root = recipe, root
        self.files = labels_of(recipe, root)
        self.names = list(dict.fromkeys(e["split"] for e in self.files.entries if e["queries"]))
        self.lists = {name: self._lists(name) for name in self.names}
        self.samples = {name: Samples(name, root) for name in self.names}

    def _lists(self, split: str) -> list[dict]:
        """Of every direction: queries, entropy, best negatives, and the share of near ones."""
        found: dict = {}
        for uri in self.files.of_split(split).uris:
            lists = parquet.read_table(uri)
            for direction in self.recipe.label.lists:
                column = lists.filter(pc.equal(lists["direction"], direction))["relevance"]
                found.setdefault(direction, []).append(of_lists(column.combine_chunks()))
        out = []
        for direction, parts in found.items():
            entropy, best = (np.concatenate(column) for column in zip(*parts, strict=True))
            if not len(best):
                continue
            about = {"direction": direction, "queries": len(best), "entropy": float(entropy.mean())}
            about |= {"median": float(np.median(best)), "near": float((best >= self.near).mean())}
            out.append(about | {"best": np.histogram(best, bins=BINS, range=(0, 1))[0]})
        return out

    @functools.cached_property
    def near(self) -> float:
        """The relevance from which a negative is a near-duplicate."""
        return float(cosine_map(self.recipe.label)(torch.tensor([NEAR])))

    @functools.cached_property
    def agreement(self) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
        """Of every two encoders, by split: Spearman, and what their best captions share."""
        out: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for split, sample in self.samples.items():
            cosines = {name: sample.cosine(name, self.recipe.label) for name in sample.encoders}
            for one, other in itertools.combinations(cosines, 2):
                rho, overlap = of_encoders(cosines[one], cosines[other], sample.other_MN, TOP)
                out.setdefault((one, other), {})[split] = {"spearman": rho, "overlap": overlap}
        return out

    def metrics(self) -> dict[str, float]:
        """Numbers for MLflow."""
        out = {}
        for split, lists in self.lists.items():
            for found in lists:
                for name in ("entropy", "median", "near"):
                    out[f"{split}/{found['direction']}/{name}"] = found[name]
        for pair, splits in self.agreement.items():
            for split, found in splits.items():
                out |= {f"{split}/{'-'.join(pair)}/{name}": value for name, value in found.items()}
        return out

    def html(self, version: str) -> str:
        """The page; pictures are of the first split."""
        settings, shown = self.recipe.label, self.names[:1]
        return render.render(
            "labels.html.j2",
            version=version,
            data=self.recipe.name,
            encoder=self.recipe.embed.encoder,
            map=settings.map,
            reduce=settings.reduce,
            top_k=settings.top_k,
            near=self.near,
            sampled=IMAGES,
            splits=[
                {
                    "name": name,
                    "lists": self.lists[name],
                    "images": sample.image_count,
                    "captions": sample.caption_count,
                }
                for name, sample in self.samples.items()
            ],
            figures=[figure for name in shown for figure in self._figures(name)],
            agreement=self.agreement,
            shades={"split": shown[0] if shown else "", "tenths": self._tenths(*shown)},
        )

    def _figures(self, split: str) -> list[Figure]:
        histograms = label.histograms(list(self.files.entries))["splits"][split]
        best = {f"best of {found['direction']}": found["best"] for found in self.lists[split]}
        about = f"{split}: the most relevant negative of every query"
        return [
            spread(histograms, f"{split}: all pairs", "share"),
            Figure("relevance", render.figure(shares(best)), about),
        ]

    def _tenths(self, split: str = "") -> list[dict]:
        """Of every tenth of relevance its share of the negatives, and examples."""
        if not split:
            return []
        encoder = store.name_of(self.files.folder)
        histograms = label.histograms(list(self.files.entries))["splits"][split]
        counts = np.array(histograms["histogram_negatives"]).reshape(10, -1).sum(1)
        sample, shards = self.samples[split], Shards(self.root)
        r_MN = sample.relevance(encoder, self.recipe.label)
        out = []
        for n, count in enumerate(counts):
            low, high = n / 10, (n + 1) / 10
            inside_MN = sample.other_MN & (r_MN >= low) & ((r_MN < high) | (n == 9))
            pairs = torch.nonzero(inside_MN)
            some = pairs[spaced(len(pairs), EXAMPLES)]
            shown = [self._example(shards, sample, r_MN, m, n) for m, n in some]
            share = float(count / max(1, counts.sum()))
            about = {"low": low, "high": high, "middle": low + 0.05, "share": share}
            out.append({**about, "pairs": shown})
        return out[::-1]

    def _example(self, shards: Shards, sample: "Samples", r_MN, m, n) -> dict:
        image = shards.sample(sample.images[m])
        texts = {c["caption_id"]: c["text"] for c in shards.sample(sample.own[n]).captions}
        return {
            "picture": thumbnail(image),
            "relevance": float(r_MN[m, n]),
            "caption": texts[sample.captions[n]],
            "own": image.captions[0]["text"],
        }


def of_lists(relevance: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Entropy and highest relevance of every list that has a candidate.

    Entropy is of the list's relevance as shares of its sum, over that of equal shares: 1 where the
    list says nothing. A list of one candidate, or of zeros, has 1.
    """
    value_L = relevance.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    query_L = pc.list_parent_indices(relevance).to_numpy()
    count = np.bincount(query_L, minlength=len(relevance))
    starts = np.flatnonzero(np.diff(query_L, prepend=-1))
    if not len(starts):
        return np.empty(0), np.empty(0)
    total, count = np.add.reduceat(value_L, starts), count[count > 0]
    logs = np.add.reduceat(value_L * np.log(np.maximum(value_L, 1e-30)), starts)
    known = (total > 0) & (count > 1)
    some = np.where(known, total, 1)
    entropy = (np.log(some) - logs / some) / np.log(np.maximum(count, 2))
    return np.where(known, entropy, 1), np.maximum.reduceat(value_L, starts)


class Samples:
    """Evenly spaced images and captions of a split, and how any encoder compares them."""

    def __init__(self, split: str, root: str):
        self.encoders = {name: f.of_split(split) for name, f in embeddings(root).items()}
        files = next(iter(self.encoders.values()))
        ids = parquet.read_tables(files.uris, ["caption_id", "image_id"])
        images = ids["image_id"].unique()
        self.image_count, self.caption_count = len(images), len(ids)
        self.images: list[str] = images.take(spaced(len(images), IMAGES)).to_pylist()
        sampled = ids.take(spaced(len(ids), CAPTIONS))
        self.captions: list[str] = sampled["caption_id"].to_pylist()
        self.own: list[str] = sampled["image_id"].to_pylist()
        image_M1 = np.array(self.images)[:, None]
        self.other_MN = torch.from_numpy(image_M1 != np.array(self.own)[None, :])

    def relevance(self, encoder: str, settings: LabelSettings) -> torch.Tensor:
        """Relevance (M, N) of the sampled images to the sampled captions."""
        mine = pc.field("image_id").isin(self.images)
        wanted = mine | pc.field("caption_id").isin(self.captions)
        captions = Captions(parquet.read_tables(self.encoders[encoder].uris, keep=wanted))
        row = {caption_id: n for n, caption_id in enumerate(captions.caption_ids)}
        rows_MC, mask_MC = captions.captions_of(self.images)
        texts_ND = captions.vectors[[row[caption_id] for caption_id in self.captions]]
        return relevance_of(captions.vectors[rows_MC], texts_ND, settings, mask_MC=mask_MC)

    def cosine(self, encoder: str, settings: LabelSettings) -> torch.Tensor:
        """Cosine (M, N), as (1 + c) / 2, of the sampled images and captions."""
        return self.relevance(encoder, LabelSettings(map="half", reduce=settings.reduce))
