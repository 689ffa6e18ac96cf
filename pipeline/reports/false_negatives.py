"""False negatives: annotated negatives of a high relevance, with the evidence, to be decided.

A page to look at, and a table (`false-negatives.csv`) whose column `relevance` people fill in;
`label.overrides` reads it as it is. Lines that are filled in stay when the table is made again.

Legend of the shape suffixes: P pairs of an image and a caption.
"""

import csv
import functools
import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.labels import decisions, embed
from pipeline.labels.caption_vectors import Captions
from pipeline.labels.encoders import encoder_label
from pipeline.reports import render
from pipeline.reports.pictures import thumbnail
from pipeline.reports.render import Made, Page
from pipeline.sharding.reading import Shards
from pipeline.storage import csv_files, parquet, run_folder, store
from pipeline.storage.run_folder import Files, RunFolder
from schemas.settings import Recipe

LAYOUT = 2  # counts up when the page changes, so that it is made again
TABLE = "false-negatives.csv"
COLUMNS = ("image_id", "caption_id", "relevance", "label", "split", "caption", "image_captions")
OFTEN = 8  # pairs looked at for one that is shown: the same text may be there many times


@dataclass(frozen=True)
class Suspect:
    """An annotated negative that may be none."""

    split: str
    image_id: str
    caption_ids: tuple[str, ...]  # more than one where captions of other images say the same
    image_of: str  # the image that the first of them was written for
    label: float  # its relevance
    caption: str
    captions: list[str]  # of the image
    cosines: dict[str, float]  # by encoder


def page(recipe: Recipe, root: str) -> Page:
    """The suspects to be looked at, with the table to decide them in beside it."""
    folder = label_folder(recipe, root)

    def made(version: str) -> Made:
        found = suspects(recipe, root)
        beside = {TABLE: table(found, recipe, root)}
        return Made(html(found, recipe, root, version), files=beside)

    decided = store.fingerprint(sorted(_decided(recipe, root)))
    depends = [versions(recipe, root), decided, recipe.label.suspects]
    uri = store.join(folder, "false-negatives.html")
    return Page(uri, LAYOUT, depends, made, "false-negatives.html")


def versions(recipe: Recipe, root: str) -> list[str | None]:
    """Of the labels, and of all the caption vectors that are there."""
    labels = run_folder.read_index(label_folder(recipe, root)) or {}
    return [labels.get("version"), *(files.version for files in embeddings(root).values())]


def label_folder(recipe: Recipe, root: str) -> str:
    return RunFolder(root).folder("label", encoder_label(recipe.embed.encoder))


def labels_of(recipe: Recipe, root: str) -> Files:
    """The lists of relevance of a finished `halftone label`."""
    return RunFolder(root).files("label", encoder_label(recipe.embed.encoder))


def embeddings(root: str) -> dict[str, Files]:
    """The caption vectors that are there, by encoder."""
    run = RunFolder(root)
    names = [n for n in store.list_folders(run.folder("embed")) if run.known("embed", n)]
    return {name: run.files("embed", name) for name in names}


def html(found: list[Suspect], recipe: Recipe, root: str, version: str) -> str:
    """The page: of every split, the most relevant first."""
    shards = Shards(root)
    picture = functools.cache(lambda image_id: thumbnail(shards.sample(image_id)))
    splits: dict[str, list[dict]] = {}
    for suspect in found:
        pictures = {"picture": picture(suspect.image_id), "other": picture(suspect.image_of)}
        splits.setdefault(suspect.split, []).append({**vars(suspect), **pictures})
    return render.render(
        "false_negatives.html.j2",
        version=version,
        data=recipe.name,
        encoder=recipe.embed.encoder,
        map=recipe.label.map,
        splits=splits,
        table=store.join(label_folder(recipe, root), TABLE),
        root=root,
    )


def table(found: list[Suspect], recipe: Recipe, root: str) -> str:
    """The CSV: lines that people filled in, then the pairs that wait to be decided."""
    encoders = sorted({name for suspect in found for name in suspect.cosines})
    rows, header = _lines(recipe, root)
    names = [*COLUMNS, *(f"cosine {name}" for name in encoders)]
    names += [name for name in header if name not in names]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, restval="")
    writer.writeheader()
    writer.writerows(row for row in rows if row.get("relevance"))
    for suspect in found:
        for caption_id in suspect.caption_ids:
            row = {
                **{"image_id": suspect.image_id, "caption_id": caption_id},
                **{"label": f"{suspect.label:.4f}", "split": suspect.split},
                **{"caption": suspect.caption, "image_captions": " | ".join(suspect.captions)},
            }
            cosines = {f"cosine {name}": f"{c:.4f}" for name, c in suspect.cosines.items()}
            writer.writerow(row | cosines)
    return text.getvalue()


def _lines(recipe: Recipe, root: str) -> tuple[list[dict], list[str]]:
    """The lines of the table there is, and its columns."""
    uri = store.join(label_folder(recipe, root), TABLE)
    if not store.exists(uri):
        return [], []
    header, lines = csv_files.table(uri, "the table of false negatives")
    return [dict(zip(header, cells, strict=False)) for _, cells in lines], header


def undecided(recipe: Recipe, root: str) -> list[dict]:
    """The table's lines of the evaluated split that wait to be decided, the most relevant first.

    Of captions of one image that say the same, the first.
    """
    decided, found = _decided(recipe, root), {}
    for row in _lines(recipe, root)[0]:
        of_split = row.get("split") == recipe.evaluate.split
        if of_split and (row["image_id"], row["caption_id"]) not in decided:
            found.setdefault((row["image_id"], row["caption"]), row)
    return list(found.values())


def _decided(recipe: Recipe, root: str) -> set[tuple[str, str]]:
    """(image id, caption id) of the pairs that people decided, applied to the labels or not."""
    rows = [row for row in _lines(recipe, root)[0] if row.get("relevance")]
    decided = {(row["image_id"], row["caption_id"]) for row in rows}
    if recipe.label.overrides:
        decided |= {pair[:2] for pair in decisions.overrides(recipe.label.overrides)}
    return decided


def suspects(recipe: Recipe, root: str) -> list[Suspect]:
    """The most relevant annotated negatives of every split that nobody has decided."""
    lists = labels_of(recipe, root)
    decided, shards = _decided(recipe, root), Shards(root)
    out: list[Suspect] = []
    for split in dict.fromkeys(entry["split"] for entry in lists.entries):
        pairs = _pairs(recipe, root, lists.of_split(split), decided)
        out += _shown(pairs, split, shards, recipe, root)
    return out


def _pairs(recipe: Recipe, root: str, lists: Files, decided: set) -> list[tuple]:
    """(relevance, image id, caption id, the caption's own image) of a split's best candidates."""
    captions_of = embed.files(recipe, root).only(lists.names)
    ids = parquet.read_tables(captions_of.uris, ["caption_id", "image_id"])
    own = ids["image_id"].to_pylist()
    images = list(dict.fromkeys(own))
    best_P, image_P, caption_P = _best(lists, OFTEN * recipe.label.suspects + len(decided))
    captions = ids["caption_id"].take(caption_P).to_pylist()
    found = zip(best_P.tolist(), image_P.tolist(), caption_P.tolist(), captions, strict=True)
    return [
        (value, images[image], caption_id, own[caption])
        for value, image, caption, caption_id in found
        if (images[image], caption_id) not in decided
    ]


def _best(files: Files, keep: int) -> tuple[np.ndarray, ...]:
    """Relevance, image row and caption row of the most relevant pairs in a split's lists."""
    best: list[np.ndarray] = [np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)]
    seen = {"i2t": 0, "t2i": 0}  # queries of the shards before
    for uri in files.uris:
        lists = parquet.read_table(uri)
        for direction in seen:
            rows = lists.filter(pc.equal(lists["direction"], direction))
            candidates = rows["candidate"].combine_chunks()
            query_P = pc.list_parent_indices(candidates).to_numpy() + seen[direction]
            candidate_P = candidates.flatten().to_numpy().astype(np.int64)
            value_P = rows["relevance"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            pair = (query_P, candidate_P) if direction == "i2t" else (candidate_P, query_P)
            best = _merged(best, [value_P.astype(np.float32), *pair], keep)
            seen[direction] += len(rows)
    return tuple(best)


def _merged(best: list[np.ndarray], more: list[np.ndarray], keep: int) -> list[np.ndarray]:
    """The first `keep` of two lots of pairs by falling relevance, each pair once."""
    value, image, caption = (np.concatenate(both) for both in zip(best, more, strict=True))
    if len(value) > 4 * keep:
        least = np.partition(value, len(value) - 2 * keep)[len(value) - 2 * keep]
        value, image, caption = (part[value >= least] for part in (value, image, caption))
    order = np.lexsort((caption, image, -value))
    _, first = np.unique((image << 32 | caption)[order], return_index=True)
    order = order[np.sort(first)[:keep]]
    return [part[order] for part in (value, image, caption)]


def _shown(pairs: list[tuple], split: str, shards: Shards, recipe: Recipe, root: str):
    """The first pairs as suspects, captions of one image that say the same together."""
    groups: dict[tuple[str, str], list[tuple]] = {}
    for pair in pairs:
        _, image_id, caption_id, own = pair
        text = next(c["text"] for c in shards.sample(own).captions if c["caption_id"] == caption_id)
        if (image_id, text) in groups or len(groups) < recipe.label.suspects:
            groups.setdefault((image_id, text), []).append(pair)
    firsts = [(image_id, group[0][2], group[0][3]) for (image_id, _), group in groups.items()]
    cosines = _cosines(firsts, split, recipe, root)
    return [
        Suspect(
            split=split,
            image_id=image_id,
            caption_ids=tuple(pair[2] for pair in group),
            image_of=group[0][3],
            label=group[0][0],
            caption=text,
            captions=[c["text"] for c in shards.sample(image_id).captions],
            cosines={name: by_pair[image_id, group[0][2]] for name, by_pair in cosines.items()},
        )
        for (image_id, text), group in groups.items()
    ]


def _cosines(pairs: list[tuple[str, str, str]], split: str, recipe: Recipe, root: str) -> dict:
    """By encoder, the cosine of every (image, caption): max or mean over the image's captions."""
    wanted = pa.array(list({image for image_id, _, own in pairs for image in (image_id, own)}))
    out: dict[str, dict[tuple[str, str], float]] = {}
    for name, files in embeddings(root).items():
        keep = pc.field("image_id").isin(wanted)
        captions = Captions(parquet.read_tables(files.of_split(split).uris, keep=keep))
        row = {caption_id: n for n, caption_id in enumerate(captions.caption_ids)}
        out[name] = {}
        for image_id, caption_id, _ in pairs:
            rows, _ = captions.captions_of([image_id])
            cosine_C = captions.vectors[rows[0]] @ captions.vectors[row[caption_id]]
            best = cosine_C.max() if recipe.label.reduce == "max" else cosine_C.mean()
            out[name][image_id, caption_id] = float(best)
    return out
