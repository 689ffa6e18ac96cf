"""The pieces of an index as a table: what it says is what the list says, read by column."""

import pickle

import pytest

from pipeline.errors import InputError
from pipeline.storage import piece_table, run_folder, store
from pipeline.storage.piece_table import PieceTable, at, column, sizes, split_names, where
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files

COUNT = 6


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(piece_table, "ABOVE", 3)


def pieces(folder: str, salt: str = "") -> list[Piece]:
    names = [f"{'train' if n < 4 else 'val'}-{n}" for n in range(COUNT)]
    return [Piece(n, store.join(folder, f"{n}.bin"), f"{n}{salt}", {}) for n in names]


def finish(folder: str, follows: str = "all of it") -> dict:
    plan, made = Plan.of("stage", folder, pieces(folder), {"a": 1}, follows), {}
    for n, piece in enumerate(plan.pieces):
        store.write_bytes(piece.output, piece.name.encode())
        file = {"bytes": len(piece.name), "sha256": f"{n}" * 64}
        made[piece.name] = {
            "files": {store.name_of(piece.output): file},
            "split": piece.name.split("-")[0],
            **{"samples": n, "share": 0.5, "none": None, "yes": True, "contents": ["a", n]},
            **{"rejected": {"torn": n} if n else {}, "holds": {"jpg": 3}},
            **({"odd": [1, {"b": 2}]} if n == 2 else {}),
        }
    return plan.finish(made)


def drawn() -> list[Piece]:
    raise AssertionError("pieces were drawn up")


def test_a_table_says_what_the_list_says_row_by_row_and_by_column(folder):
    listed = finish(folder)["pieces"]
    index = run_folder.read_index(folder)
    table = index["pieces"]
    assert isinstance(table, PieceTable) and list(table) == listed
    assert (table[2], table[-1], table[1:4]) == (listed[2], listed[-1], listed[1:4])
    with pytest.raises(IndexError):
        table[COUNT]
    for name in (*listed[2], "nowhere"):
        assert column(table, name, "-") == column(listed, name, "-"), name
    assert split_names(table) == split_names(listed) == ["train", "val"]
    assert list(sizes(table)) == list(sizes(listed))
    assert list(where(table, "samples")) == where(listed, "samples") == listed[1:]
    assert list(at(table, [3, 1])) == at(listed, [3, 1])
    assert column(at(table, [3, 1]), "name") == ["train-3", "train-1"]
    for some in (table, run_folder.of_split(index, "val"), at(table, [3, 1])):
        assert run_folder.version(some) == run_folder.version(list(some))
        assert list(pickle.loads(pickle.dumps(some))) == list(some)
    files = Files.of(folder, table)
    assert files.of_split("val") == Files.of(folder, listed).of_split("val")


def test_only_the_columns_that_are_asked_for_are_read(tmp_path, monkeypatch):
    folder = f"memory://{tmp_path.name}/asked"
    finish(folder)
    asked = []
    read = store.read_bytes
    monkeypatch.setattr(
        store, "read_bytes", lambda uri, *part: asked.append(part) or read(uri, *part)
    )
    index = run_folder.read_index(folder)
    size = index["table"]["bytes"]
    assert column(index["pieces"], "samples") == list(range(COUNT))
    parts = [part for part in asked if part]
    assert parts and len(asked) == len(parts) + 1  # the index itself is read whole
    before = len(asked)
    assert column(index["pieces"], "samples") == list(range(COUNT)) and len(asked) == before
    assert all(length <= size for _, length in parts)


def test_where_all_is_as_it_was_no_piece_is_drawn_up(folder):
    made = finish(folder)
    again = Plan.of("stage", folder, drawn, {"a": 1}, "all of it")
    assert again.complete and again.pending == [] and len(again) == COUNT
    assert again.fingerprint == made["fingerprint"]
    assert again.names == [(p.name, p.fingerprint) for p in pieces(folder)]
    with pytest.raises(AssertionError, match="drawn up"):
        Plan.of("stage", folder, drawn, {"a": 1}, "something else").pending  # noqa: B018
    store.remove(pieces(folder)[1].output)
    with pytest.raises(AssertionError, match="drawn up"):
        Plan.of("stage", folder, drawn, {"a": 1}, "all of it").complete  # noqa: B018
    (piece,) = Plan.of("stage", folder, lambda: pieces(folder), {"a": 1}, "all of it").pending
    assert piece.name == "train-1"


def test_a_new_index_leaves_one_table_and_nothing_of_pieces_that_are_gone(folder):
    finish(folder)
    fewer = Plan.of("stage", folder, pieces(folder)[:4], {"a": 1}, "fewer")
    fewer.finish({})
    names = set(store.list_files(folder))
    kept = {store.name_of(piece.output) for piece in fewer.pieces}
    assert names == kept | {"index.json", run_folder.read_index(folder)["table"]["name"]}
    few = Plan.of("stage", folder, pieces(folder)[:2], {"a": 1}, "few")
    few.finish({})
    assert not any(piece_table.is_table(name) for name in store.list_files(folder))
    assert [entry["name"] for entry in run_folder.read_index(folder)["pieces"]] == [
        "train-0",
        "train-1",
    ]


def test_a_table_that_is_gone_is_told_and_its_pieces_are_looked_at_again(folder):
    finish(folder)
    index = run_folder.read_index(folder)
    store.remove(store.join(folder, index["table"]["name"]))
    piece_table._stored.cache_clear()
    with pytest.raises(InputError, match=r"which its folder's index names, is missing"):
        list(run_folder.read_index(folder)["pieces"])
    plan = Plan.of("stage", folder, lambda: pieces(folder), {"a": 1}, "all of it")
    assert len(plan.pending) == COUNT


def test_the_bytes_of_a_table_are_the_same_for_the_same_pieces(folder):
    finish(folder)
    name = run_folder.read_index(folder)["table"]["name"]
    data = store.read_bytes(store.join(folder, name))
    finish(folder, "another time")
    assert store.read_bytes(store.join(folder, name)) == data
