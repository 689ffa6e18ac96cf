"""Any model's scores from its files: vectors or a matrix (TREC runs: `trec.py`)."""

import io
from typing import Literal

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.errors import InputError
from pipeline.retrieval.scores import Items, Matches, MatrixScores, VectorScores, matrix_scores
from pipeline.storage import csv_files, parquet, store, text_files

JSON_MATCHES = TypeAdapter(dict[Literal["i2t", "t2i"], dict[str, list[str | int]]])


def of_table(uri: str) -> VectorScores:
    """Vectors in a Parquet file, or in a folder's: id, image_id, modality (image, text), vector."""
    files = sorted(name for name in store.list_files(uri) if name.endswith(".parquet"))
    return VectorScores.of(parquet.read_tables([store.join(uri, name) for name in files] or [uri]))


def of_arrays(images: str, texts: str, image_ids: str | None, text_ids: str | None) -> VectorScores:
    """Vectors in two .npy files, compared by cosine; texts are in the order of their images."""
    a_MD, b_ND = (torch.from_numpy(array(uri)).float() for uri in (images, texts))
    if a_MD.shape[1] != b_ND.shape[1]:
        raise InputError(f"images are {a_MD.shape[1]} wide, texts {b_ND.shape[1]}; give one space")
    a_MD, b_ND = (torch.nn.functional.normalize(v, dim=1) for v in (a_MD, b_ND))
    return VectorScores(_items(len(a_MD), len(b_ND), image_ids, text_ids), a_MD, b_ND)


def of_matrix(uri: str, image_ids: str | None, text_ids: str | None) -> MatrixScores:
    """A similarity matrix in .npy, images down and texts across, in the order of their images."""
    matrix = torch.from_numpy(array(uri))
    return matrix_scores(_items(len(matrix), matrix.shape[1], image_ids, text_ids), matrix)


def array(uri: str) -> np.ndarray:
    here = store.is_local(uri)
    try:
        found = np.load(uri.removeprefix("file://") if here else io.BytesIO(store.read_bytes(uri)))
    except (OSError, ValueError) as error:
        raise InputError(f"{uri} is no array ({error}); give a .npy file of two axes") from error
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise InputError(f"{uri} is {found.dtype} {found.shape}; give numbers on two axes")
    return found.astype(np.float32, copy=False)


def _items(images: int, texts: int, image_ids: str | None, text_ids: str | None) -> Items:
    """Ids from files of a line each, else numbers; every image has as many texts."""
    ids = []
    for uri, count in ((image_ids, images), (text_ids, texts)):
        lines = (
            text_files.text(uri, "a list of ids").splitlines() if uri else map(str, range(count))
        )
        ids.append([line.strip() for line in lines if line.strip()])  # file names may hold spaces
        if len(ids[-1]) != count or len(set(ids[-1])) != count:
            raise InputError(f"{uri} must hold {count:,} different ids, one a line")
    if not images or texts % images:
        do = "write Parquet with id, image_id, modality and vector instead"
        raise InputError(f"{texts:,} texts do not share out equally over {images:,} images; {do}")
    return Items(ids[0], ids[1], [ids[0][n // (texts // images)] for n in range(texts)])


def matches(uri: str) -> Matches:
    """Positives from CSV (image_id, caption_id) or JSON ({i2t: {image: [caption]}, t2i: …})."""
    out: Matches = {"i2t": {}, "t2i": {}}
    if uri.endswith(".json"):
        text = text_files.text(uri, "a JSON object of i2t and t2i")
        try:
            found = JSON_MATCHES.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(
                f"{uri} must be a JSON object of i2t and t2i, each query's id with a list of ids; "
                f"{place}: {first['msg']}"
            ) from error
        for direction, of in found.items():
            out[direction] = {query: [*map(str, ids)] for query, ids in of.items()}
        return out
    for _, row in csv_files.rows(uri, ("image_id", "caption_id"), "a list of pairs that match"):
        out["i2t"].setdefault(row["image_id"], []).append(row["caption_id"])
        out["t2i"].setdefault(row["caption_id"], []).append(row["image_id"])
    return out
