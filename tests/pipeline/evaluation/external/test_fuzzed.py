"""One system in every form that is read, as other programs would have saved it.

The figures are the same however it is written, or what is wrong is said with the file's name: never
a traceback, never silently other figures.
"""

import csv
import gzip
import io
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.evaluation import external, protocols, trec
from pipeline.evaluation.external import positives
from pipeline.retrieval.scores import Items, VectorScores, matrix_scores
from tests.helpers.fuzz import damaged, fuzzed, resaved

torch.set_num_threads(1)
LETTERS = st.characters(
    exclude_categories=["Cc", "Cs", "Cn", "Co"], include_characters="\x85\u2028"
)
WORDS = st.text(LETTERS, min_size=1, max_size=5).map(str.strip).filter(bool)
NAMES = st.one_of(WORDS, st.tuples(WORDS, WORDS).map(" ".join), st.integers(0, 99).map(str))


@pytest.fixture(autouse=True)
def quiet():
    """Who is not here is told in thousands of examples."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@st.composite
def systems(draw, low: int = -8):
    """Scores in steps, so that some tie, of 2 to 5 images with 1 to 3 texts each, and pairs."""
    count = draw(st.integers(2, 5))
    owners = [m for m in range(count) for _ in range(draw(st.integers(1, 3)))]
    texts = len(owners)
    ids = [draw(st.lists(NAMES, min_size=n, max_size=n, unique=True)) for n in (count, texts)]
    cells = draw(st.lists(st.integers(low, 8), min_size=count * texts, max_size=count * texts))
    matrix = np.array(cells, np.float32).reshape(count, texts) / 4
    matrix += np.eye(count, texts, dtype=np.float32) / 64  # no two rows are equal
    pairs = {(owners[n], n) for n in range(texts)}
    pairs |= draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, texts - 1))))
    items = Items(*ids, [ids[0][m] for m in owners])
    return items, matrix, sorted((ids[0][m], ids[1][n]) for m, n in pairs)


def figures(system, given) -> dict:
    return protocols.measure(system, ["given"], given, resamples=1)["given"].metrics


def expected(items: Items, matrix, pairs) -> dict:
    given = {"i2t": {}, "t2i": {}}
    for image, text in pairs:
        given["i2t"].setdefault(image, []).append(text)
        given["t2i"].setdefault(text, []).append(image)
    return figures(matrix_scores(items, torch.from_numpy(np.array(matrix))), given)


class Folder:
    """Files of an example, gone after it."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()

    def __enter__(self):
        self.path = Path(self.folder.__enter__())
        return self

    def __exit__(self, *error):
        self.folder.cleanup()

    def write(self, name: str, data: bytes) -> str:
        (self.path / name).write_bytes(data)
        return str(self.path / name)


@st.composite
def pairs_written(draw, pairs, items) -> tuple[str, str]:
    """A name, and a text that says the pairs."""
    pairs = draw(st.permutations(pairs))
    kind = draw(st.sampled_from(["csv", "json", "flat", "i2t.qrels", "t2i.qrels"]))
    if kind == "csv":
        out, gap = io.StringIO(), draw(st.sampled_from(list(",;\t| ")))
        writer = csv.writer(out, delimiter=gap, lineterminator="\n")
        turned = draw(st.booleans())
        names = ["image_id", "caption_id"]
        for row in [draw(st.sampled_from([names, [name.upper() for name in names]])), *pairs]:
            writer.writerow(row[::-1] if turned else row)
        return "pairs.csv", out.getvalue()
    if kind.endswith("qrels"):
        turn = 1 if kind == "i2t.qrels" else -1
        lines = ["\t".join([a, "0", b, "1"]) for a, b in (pair[::turn] for pair in pairs)]
        return kind, "\n".join(lines) + "\n"
    given = {"i2t": {}, "t2i": {}}
    for image, text in pairs:
        given["i2t"].setdefault(image, []).append(text)
        given["t2i"].setdefault(text, []).append(image)
    of = given["i2t"] if kind == "flat" else given
    if kind == "flat" and not set(items.image_ids).isdisjoint(items.text_ids):
        of = given
    text = json.dumps(of, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    return "pairs.json", text


def lines(ids: list[str]) -> str:
    return "".join(f"{id_}\n" for id_ in ids)


@st.composite
def arrays_written(draw, matrix) -> tuple[str, bytes]:
    """A name, and the bytes of a .npy or .npz of any kind of numbers."""
    kinds = ["<f4", ">f4", "<f8", ">f8", "f2"]
    kind = draw(st.sampled_from(kinds))
    array = np.array(matrix, kind, order=draw(st.sampled_from("CF")))
    buffer = io.BytesIO()
    if draw(st.booleans()):
        np.save(buffer, array)
        data = buffer.getvalue()
        return "m.npy", gzip.compress(data, mtime=0) if draw(st.booleans()) else data
    draw(st.sampled_from([np.savez, np.savez_compressed]))(buffer, array)
    return "m.npz", buffer.getvalue()


def read_matrix(folder, written, ids, given):
    """Figures of a matrix with ids in three files, and of pairs in another."""
    uri = folder.write(*written)
    named = [folder.write(f"{n}.ids", data) for n, data in enumerate(ids)]
    system = external.of_matrix(uri, *named)
    return figures(system, positives.matches(folder.write(*given), system.items))


@fuzzed
@given(st.data())
def test_a_matrix_gives_the_same_figures_however_it_is_saved(data):
    items, matrix, pairs = data.draw(systems())
    turned = matrix.shape[0] != matrix.shape[1] and data.draw(st.booleans())
    written = data.draw(arrays_written(matrix.T if turned else matrix))
    files = (items.image_ids, items.text_ids, items.text_image_ids)
    ids = [data.draw(resaved(lines(of))) for of in files]
    name, text = data.draw(pairs_written(pairs, items))
    given_ = name, data.draw(resaved(text))
    with Folder() as folder:
        found = read_matrix(folder, written, ids, given_)
    assert found == pytest.approx(expected(items, matrix, pairs), abs=1e-9)


@fuzzed
@given(st.data())
def test_vectors_in_parquet_give_the_same_figures_however_they_are_written(data):
    items, matrix, pairs = data.draw(systems())
    inner = data.draw(st.sampled_from([pa.float16(), pa.float32(), pa.float64()]))
    width = len(items.image_ids)
    kind = data.draw(
        st.sampled_from([pa.list_(inner), pa.large_list(inner), pa.list_(inner, width)])
    )
    rows = [
        *(
            (id_, id_, "image", row)
            for id_, row in zip(items.image_ids, np.eye(width), strict=True)
        ),
        *zip(items.text_ids, items.text_image_ids, ["Text"] * len(matrix.T), matrix.T, strict=True),
    ]
    rows = data.draw(st.permutations(rows))
    *columns, vectors = (list(column) for column in zip(*rows, strict=True))
    names = data.draw(
        st.sampled_from([("id", "image_id", "modality"), ("ID", "Image_Id", "Modality")])
    )
    halves = [np.asarray(vector, np.float16).tolist() for vector in vectors]
    table = pa.table([*columns, pa.array(halves, kind)], names=[*names, "vector"])
    name, text = data.draw(pairs_written(pairs, items))
    given_ = name, data.draw(resaved(text))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=data.draw(st.integers(1, 9)))
    with Folder() as folder:
        system = external.of_table(folder.write("t.parquet", buffer.getvalue()))
        found = figures(system, positives.matches(folder.write(*given_), system.items))
    assert found == pytest.approx(expected(items, matrix, pairs), abs=1e-9)


@st.composite
def runs_written(draw, items: Items, matrix, direction: str) -> tuple[str, dict]:
    """A TREC run's text, of lists in any order, some queries left out, and what it says."""
    queries, candidates = items.ids(direction)
    scores = matrix if direction == "i2t" else matrix.T
    gap = draw(st.sampled_from(["\t", "\t", ",", ";", " ", "   "]))
    every = [*queries, *candidates]
    if gap in ",;" and any(gap in id_ for id_ in every):
        gap = "\t"
    if gap.isspace() and any(any(c.isspace() for c in id_) for id_ in every):
        gap = "\t"
    said, rows = {}, []
    for query, row in zip(queries, scores, strict=True):
        if draw(st.integers(0, 5)):
            said[query] = {c: float(s) for c, s in zip(candidates, row, strict=True) if s > -np.inf}
            words = [
                (query, "Q0", c, "1", repr(float(s))) for c, s in zip(candidates, row, strict=True)
            ]
            rows += [gap.join([*line, "me"]) for line in words]
    return "\n".join(draw(st.permutations(rows))), said


def slow_recall(said: dict, pairs, direction: str, k: int) -> float:
    """The mean chance over queries of the pairs that a positive is among the first k."""
    given = {}
    for pair in pairs:
        query, match = pair if direction == "i2t" else pair[::-1]
        given.setdefault(query, set()).add(match)
    total = 0.0
    for query, matches in given.items():
        scored = said.get(query, {})
        best = max((scored[m] for m in matches if m in scored), default=None)
        if best is None:
            continue
        above = sum(score > best for score in scored.values())
        tied = [c for c, score in scored.items() if score == best]
        misses = sum(c not in matches for c in tied)
        chance = 1.0
        for place in range(max(0, min(k - above, len(tied)))):  # none of them in any place
            chance *= max(0, misses - place) / (len(tied) - place)
        total += 1 - chance
    return 100 * total / len(given)


@fuzzed
@given(st.data())
def test_runs_give_the_figures_of_their_lists_however_they_are_written(data):
    items, matrix, pairs = data.draw(systems())
    matrix[
        np.array(
            data.draw(st.lists(st.booleans(), min_size=matrix.size, max_size=matrix.size))
        ).reshape(matrix.shape)
    ] = -np.inf
    runs = {d: data.draw(runs_written(items, matrix, d)) for d in ("i2t", "t2i")}
    name, text = data.draw(pairs_written(pairs, items))
    with Folder() as folder:
        uris = [folder.write(f"{d}.run", data.draw(resaved(text))) for d, (text, _) in runs.items()]
        given_ = folder.write(name, data.draw(resaved(text)))
        try:
            system = trec.read(*uris)
            found = figures(system, positives.matches(given_, system.items))
        except InputError as error:
            empty = [d for d, (_, said) in runs.items() if not said]
            assert empty and f"{empty[0]}.run holds no line" in str(error)
            return
    for direction, (_, said) in runs.items():
        for k in (1, 5, 10):
            slow = slow_recall(said, pairs, direction, k)
            assert found[f"{direction}_R_at_{k}"] == pytest.approx(slow, abs=1e-6)


@fuzzed
@given(st.data())
def test_what_is_written_is_read_again(data):
    items, matrix, pairs = data.draw(systems())
    hidden = data.draw(st.lists(st.booleans(), min_size=matrix.size, max_size=matrix.size))
    matrix[np.array(hidden).reshape(matrix.shape)] = -np.inf
    system = matrix_scores(items, torch.from_numpy(matrix))
    with Folder() as folder:
        path = str(folder.path)
        trec.write(path, system)
        if any((matrix == -np.inf).all(axis).all() for axis in (0, 1)):
            with pytest.raises(InputError, match="holds no line"):
                trec.read(f"{path}/i2t.run", f"{path}/t2i.run")
            return
        again = trec.read(f"{path}/i2t.run", f"{path}/t2i.run")
        given_ = positives.matches(f"{path}/i2t.qrels,{path}/t2i.qrels", again.items)
        assert given_ == items.matches()
        found = figures(again, given_)
    assert found == pytest.approx(figures(system, items.matches()), abs=1e-6)


@fuzzed
@given(st.data())
def test_a_damaged_file_is_never_a_traceback(data):
    """And one that is packed says so: what is read of it is what was written."""
    items, matrix, pairs = data.draw(systems())
    name, text = data.draw(pairs_written(pairs, items))
    array = data.draw(arrays_written(matrix))
    files = {
        "matrix": array,
        "given": (name, data.draw(resaved(text))),
        "image": ("i", data.draw(resaved(lines(items.image_ids)))),
        "text": ("t", data.draw(resaved(lines(items.text_ids)))),
        "owner": ("o", data.draw(resaved(lines(items.text_image_ids)))),
    }
    victim = data.draw(st.sampled_from(sorted(files)))
    kept = files[victim][1]
    files[victim] = files[victim][0], data.draw(damaged(kept))
    with Folder() as folder:
        ids = [files[of][1] for of in ("image", "text", "owner")]
        try:
            found = read_matrix(folder, files["matrix"], ids, files["given"])
        except InputError as error:
            assert len(str(error)) > 20
            return
    if kept.startswith(b"\x1f\x8b"):
        assert found == pytest.approx(expected(items, matrix, pairs), abs=1e-9)


@fuzzed
@given(st.data())
def test_damaged_runs_and_tables_are_never_a_traceback(data):
    items, matrix, pairs = data.draw(systems())
    run = data.draw(resaved(data.draw(runs_written(items, matrix, "t2i"))[0]))
    table = {
        "id": [*items.image_ids, *items.text_ids],
        "image_id": [*items.image_ids, *items.text_image_ids],
        "modality": ["image"] * len(matrix) + ["text"] * len(matrix.T),
        "vector": [*np.eye(len(matrix)).tolist(), *matrix.T.tolist()],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(table), buffer)
    with Folder() as folder:
        for name, whole in (("t2i.run", run), ("t.parquet", buffer.getvalue())):
            uri = folder.write(name, data.draw(damaged(whole)))
            try:
                if name == "t2i.run":
                    system = trec.read(None, uri)
                    pairs_uri = folder.write(
                        *(
                            part if n == 0 else part.encode()
                            for n, part in enumerate(data.draw(pairs_written(pairs, items)))
                        )
                    )
                    figures(system, positives.matches(pairs_uri, system.items))
                else:
                    found = external.of_table(uri)
                    assert isinstance(found, VectorScores)
            except InputError as error:
                assert str(folder.path) in str(error) or "none of the queries" in str(error)
