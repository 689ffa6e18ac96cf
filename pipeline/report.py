"""The report: one self-contained page about all the models of a run folder."""

import json
import random
from dataclasses import replace

import numpy as np

from pipeline import _pages, _plan, _ranking, _store, embed, evaluate
from pipeline._pictures import Pictures
from pipeline.search import Hit
from schemas.settings import Recipe

COLUMNS = {
    "i2t_R_at_1": "i2t R@1",
    "i2t_R_at_5": "R@5",
    "i2t_R_at_10": "R@10",
    "t2i_R_at_1": "t2i R@1",
    "t2i_R_at_5": "R@5",
    "t2i_R_at_10": "R@10",
    "rsum": "rSum",
    "i2t_MedR": "MedR i2t",
    "t2i_MedR": "t2i",
    "i2t_ndcg_truth": "true NDCG i2t",
    "t2i_ndcg_truth": "t2i",
    "i2t_ndcg_label": "label NDCG i2t",
    "t2i_ndcg_label": "t2i",
}
LOWER_IS_BETTER = {"i2t_MedR", "t2i_MedR"}
SHOWN = 8  # results in a row of the gallery
QUERIES = 4  # drawn at random, and as many again of those that fared worst
SUSPECTS = 8  # negatives that are nearly right


def results(root: str, names: list[str]) -> list[tuple[str, dict, dict]]:
    """(label, metrics, protocol) of every ranking there is: each model, then re-ranked."""
    out = []
    for name in names:
        for stage, label in (("evaluate", name), ("reranked", f"{name}, re-ranked")):
            uri = _plan.folder(root, stage, name, "metrics.json")
            if _store.exists(uri):
                result = _store.read_json(uri)
                out.append((label, result["metrics"], result["protocol"]))
    return out


def version(recipe: Recipe, root: str, names: list[str]) -> str:
    """What the page depends on."""
    return _store.fingerprint("report", results(root, names), recipe.about)


def protocol_line(protocol: dict) -> str:
    """The protocol in words: every table carries it."""
    p = protocol
    return (
        f"{p['data']} {p['split']}: {p['images']:,} images, {p['captions']:,} captions "
        f"({p['captions_per_image']:g} an image). R@K in percent; ties: {p['ties']}. "
        f"NDCG@{p['ndcg_at']}, gain {p['gain']}; label relevance by {p['label_encoder']}, "
        f"map {p['label_map']}. Re-ranking: {p.get('rerank', 'none')}"
        + (f", {p['pool']} (bank of {p['bank_images']:,} train images)." if "pool" in p else ".")
    )


def table(root: str, names: list[str]) -> tuple[list[str], list[list[dict]]]:
    """Column titles and rows of {text, best}; the best as trained, and the best re-ranked."""
    found = results(root, names)
    shown = [key for key in COLUMNS if any(key in metrics for _, metrics, _ in found)]
    rows = []
    for label, metrics, protocol in found:
        rivals = [m for _, m, p in found if p["rerank"] == protocol["rerank"]]
        row = [{"text": label, "best": False}]
        for key in shown:
            pick = min if key in LOWER_IS_BETTER else max
            best = pick(m[key] for m in rivals)
            digits = 3 if "ndcg" in key else 1
            is_best = len(rivals) > 1 and metrics[key] == best
            row.append({"text": f"{metrics[key]:.{digits}f}", "best": is_best})
        rows.append(row)
    return [""] + [COLUMNS[key] for key in shown], rows


def short_table(root: str, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """The table for a terminal: recalls of a direction in one cell."""
    found = results(root, names)
    truth = any("i2t_ndcg_truth" in metrics for _, metrics, _ in found)
    graded = "truth" if truth else "label"
    title = f"{'true' if truth else 'label'} NDCG@{found[0][2]['ndcg_at']}"
    columns = ["", "i2t R@1   5    10", "t2i R@1   5    10", "rSum", f"{title} i2t", "t2i"]
    rows = []
    for label, m, _ in found:
        recalls = [
            " ".join(f"{m[f'{direction}_R_at_{k}']:4.1f}" for k in (1, 5, 10))
            for direction in ("i2t", "t2i")
        ]
        ndcg = [f"{m[f'{direction}_ndcg_{graded}']:.3f}" for direction in ("i2t", "t2i")]
        rows.append([label, *recalls, f"{m['rsum']:.1f}", *ndcg])
    return columns, rows


def build(recipe: Recipe, root: str, names: list[str]) -> str:
    """The page; pictures and gallery are of the last model named."""
    columns, rows = table(root, names)
    protocol = results(root, names)[-1][2]
    gallery = Showcase(recipe, root, names[-1])
    truth = any("true" in column for column in columns)
    shade = "the true relevance" if truth else "the sentence encoder's relevance"
    return _pages.render(
        "report.html.j2",
        version=version(recipe, root, names),
        data=recipe.name,
        about=recipe.about or "A Halftone run.",
        protocol=protocol,
        protocol_line=protocol_line(protocol),
        columns=columns,
        rows=rows,
        figures=figures(recipe, root, names),
        model=names[-1],
        shade=f"{shade}: the fuller, the more relevant",
        queries=gallery.queries(),
        suspects=gallery.suspects(),
        facts=_facts(recipe, root),
    )


def figures(recipe: Recipe, root: str, names: list[str]) -> list[dict]:
    """{name, svg, caption} of every figure."""
    return [*_curves(root, names), _histogram(recipe, root)]


class Showcase:
    """Queries, results and suspicious negatives of one model, as the page shows them."""

    def __init__(self, recipe: Recipe, root: str, name: str):
        self.recipe, self.root, self.name = recipe, root, name
        self.pictures = Pictures(root, recipe.evaluate.split)
        plan = evaluate.plan(recipe, root, name)
        self.graded = _ranking.Graded(plan.pieces[0].inputs)
        self.rankings = {"as trained": self._rows("evaluate"), "re-ranked": self._rows("reranked")}

    def _rows(self, stage: str) -> dict[str, dict]:
        folder = _plan.folder(self.root, stage, self.name)
        index = _plan.read_index(folder)
        rows = {}
        for entry in index["pieces"] if index else []:
            table = _store.read_table(_store.join(folder, f"{entry['name']}.parquet"))
            for row in table.to_pylist():
                if row["direction"] == "t2i":
                    rows[row["query_id"]] = row
        return rows

    def queries(self) -> list[dict]:
        """A few captions drawn at random, then those whose image came last."""
        ranked = self.rankings["as trained"]
        drawn = random.Random(0).sample(sorted(ranked), min(QUERIES, len(ranked)))
        worst = sorted(ranked, key=lambda q: -ranked[q]["rank"])[:QUERIES]
        return [self._query(caption_id) for caption_id in dict.fromkeys([*drawn, *worst])]

    def _query(self, caption_id: str) -> dict:
        relevance = self.relevance(caption_id)
        rankings = []
        for label, rows in self.rankings.items():
            if caption_id in rows:
                row = rows[caption_id]
                hits = [
                    self._hit(image_id, score, relevance, caption_id)
                    for image_id, score in zip(
                        row["candidate_id"][:SHOWN], row["score"][:SHOWN], strict=True
                    )
                ]
                rankings.append({"label": f"{label}, own at {row['rank']:.0f}", "hits": hits})
        return {"text": self.pictures.captions[caption_id], "rankings": rankings}

    def relevance(self, caption_id: str) -> dict[str, float]:
        """Of a caption to every image: the true one where it is known."""
        graded = self.graded("t2i", [caption_id])
        values = graded.get("ndcg_truth", graded["ndcg_label"])[0].tolist()
        return dict(zip(self.graded.captions.image_ids, values, strict=True))

    def _hit(self, image_id: str, score: float, relevance: dict, caption_id: str) -> Hit:
        own = any(
            c["caption_id"] == caption_id for c in self.pictures.samples[image_id]["captions"]
        )
        text = self.pictures.caption_texts(image_id)[0]
        picture = self.pictures.thumbnail(image_id)
        return Hit(image_id, image_id, text, score, own, relevance[image_id], picture)

    def suspects(self) -> list[dict]:
        """The annotated negatives with the highest label relevance, one a caption text."""
        encoder = embed.encoder_label(self.recipe.embed.encoder)
        folder = _plan.folder(self.root, "label", encoder)
        found: dict[str, tuple[float, str, int]] = {}
        for entry in _plan.of_split(_plan.need_index(folder, "label"), self.recipe.evaluate.split):
            table = _store.read_table(_store.join(folder, f"{entry['name']}.parquet"))
            for row in table.to_pylist():
                if row["direction"] == "t2i" and row["candidate"]:
                    text = self.pictures.captions[row["query_id"]]
                    found[text] = (row["relevance"][0], row["query_id"], row["candidate"][0])
        images = self.graded.captions.image_ids
        pairs = []
        for relevance, caption_id, row in sorted(found.values(), reverse=True)[:SUSPECTS]:
            hit = self._hit(images[row], relevance, {images[row]: relevance}, caption_id)
            pairs.append(
                {
                    "text": self.pictures.captions[caption_id],
                    "hit": replace(hit, own=False),
                    "captions": self.pictures.caption_texts(images[row]),
                }
            )
        return pairs


def _curves(root: str, names: list[str]) -> list[dict]:
    """Loss and validation by step, a line a model."""
    history = {
        name: _store.read_json(_plan.folder(root, "train", name, "history.json"))["records"]
        for name in names
    }

    def lines(key: str, label: str):
        def draw(axes) -> None:
            for name, records in history.items():
                points = [(r["step"], r[key]) for r in records if key in r]
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
            axes.set_xlabel("optimizer step")
            axes.set_ylabel(label)
            axes.legend(frameon=False, fontsize=8)

        return draw

    svg = _pages.figure(lines("train/loss", "loss"))
    found = [{"name": "loss", "svg": svg, "caption": "Training loss"}]
    if all(any("val/rsum" in record for record in records) for records in history.values()):
        svg = _pages.figure(lines("val/rsum", "rSum"))
        found.append({"name": "val", "svg": svg, "caption": "rSum on val after every epoch"})
    return found


def _histogram(recipe: Recipe, root: str) -> dict:
    """How label relevance is spread, over negatives and over held-out positives."""
    folder = _plan.folder(root, "label", embed.encoder_label(recipe.embed.encoder))
    found = _store.read_json(_store.join(folder, "calibration.json"))
    split = found["splits"].get("train") or found["splits"][recipe.evaluate.split]

    def draw(axes) -> None:
        edges = np.array(found["edges"])
        for key, label in (
            ("histogram_negatives", "annotated negatives"),
            ("histogram_positives", "positives (a caption against its siblings)"),
        ):
            counts = np.array(split[key], float)
            if counts.sum():
                axes.stairs(counts / counts.sum(), edges, label=label, fill=True, alpha=0.55)
        axes.set_xlabel("relevance")
        axes.set_ylabel("share of pairs")
        axes.legend(frameon=False, fontsize=8)

    caption = f"Relevance by {recipe.embed.encoder}, map {recipe.label.map}"
    return {"name": "relevance", "svg": _pages.figure(draw), "caption": caption}


def _facts(recipe: Recipe, root: str) -> list[tuple[str, str]]:
    shards = _plan.need_index(_plan.folder(root, "shard"), "shard")
    counts: dict[str, int] = {}
    for entry in shards["pieces"]:
        counts[entry["split"]] = counts.get(entry["split"], 0) + entry["samples"]
    sections = recipe.model_dump(mode="json")
    return [
        ("data version", shards["version"]),
        ("images", ", ".join(f"{split} {count:,}" for split, count in counts.items())),
        ("seed", str(recipe.train.seed)),
        *((name, json.dumps(sections[name])) for name in ("embed", "label", "model", "train")),
    ]
