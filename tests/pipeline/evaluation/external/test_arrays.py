"""Arrays of other programs: read whatever numbers they hold, or refused with the place."""

import gzip
import io
import pickle

import numpy as np
import pytest
import torch

from pipeline.errors import InputError
from pipeline.evaluation.external.arrays import array
from pipeline.storage import store

NUMBERS = np.arange(12.0).reshape(3, 4) - 5


def saved(path, value, **named) -> str:
    if named:
        np.savez(path, **named)
    else:
        np.save(path, value)
    return str(path)


@pytest.mark.parametrize(
    "kind",
    ["float16", "<f4", ">f4", "float64", ">f8", "longdouble", "int8", ">i2", "int64"],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_any_kind_are_read(tmp_path, kind, order):
    found = array(saved(tmp_path / "a.npy", np.array(NUMBERS, kind, order=order)))
    assert (found == NUMBERS).all() and torch.from_numpy(found).shape == (3, 4)
    assert found.dtype == (np.float64 if kind in ("float64", ">f8", "longdouble") else np.float32)


def test_they_are_read_wherever_they_lie_and_however_they_are_packed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = saved(tmp_path / "a.npy", NUMBERS)
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy.gz").write_bytes(gzip.compress(data, mtime=0))
    store.write_bytes(f"memory://{tmp_path.name}/a.npy", data)
    saved(tmp_path / "one.npz", None, scores=NUMBERS)
    np.savez_compressed(tmp_path / "two.npz", scores=NUMBERS, images=NUMBERS + 1)
    for uri in (here, f"file://{here}", f"memory://{tmp_path.name}/a.npy", "a.npy", "a.npy.gz"):
        assert (array(uri) == NUMBERS).all()
    assert (array("one.npz") == NUMBERS).all() and (array("two.npz:scores") == NUMBERS).all()
    assert (array(f"{tmp_path}/two.npz:images") == NUMBERS + 1).all()
    with pytest.raises(InputError, match="holds scores, images; name one array: .*two.npz:scores"):
        array("two.npz")
    with pytest.raises(InputError, match="two.npz holds scores, images"):
        array("two.npz:texts")


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_ones_stay_mapped(tmp_path, kind, order):
    uri = saved(tmp_path / "a.npy", np.array(NUMBERS, kind, order=order))
    found = array(uri)
    assert isinstance(found, np.memmap)
    found[0, 0] = 77  # of this process alone
    assert np.load(uri)[0, 0] == -5


def test_whole_numbers_that_float32_does_not_tell_apart_stay_apart(tmp_path):
    found = array(saved(tmp_path / "a.npy", np.array([[2**24, 2**24 + 1], [-(2**40), 3]])))
    assert found[0, 0] < found[0, 1] and found[1, 0] == -(2**40)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.array([[1, np.nan]]), "a.npy holds nan in row 0, column 1 .from 0.; give a number"),
        (np.array([[1], [np.inf]], ">f4"), "holds inf in row 1, column 0"),
        (np.array([[-np.inf]]), "holds -inf in row 0"),
        (np.array([[1e300]]), r"holds 1e\+300 in row 0.* float32's size"),
        (np.ones(3), r"is float64 \(3,\); give numbers on two axes"),
        (np.ones((2, 3, 4)), r"is float64 \(2, 3, 4\)"),
        (np.ones((0, 4)), r"is float64 \(0, 4\)"),
        (np.ones((2, 2), bool), "is bool"),
        (np.ones((2, 2), complex), "is complex128"),
        (np.array([["a"]]), "is <U1"),
        (np.array([[{}]]), "is no array .*Python objects"),
    ],
)
def test_what_orders_nothing_is_refused(tmp_path, value, sentence):
    np.save(tmp_path / "a.npy", value, allow_pickle=True)
    with pytest.raises(InputError, match=sentence):
        array(str(tmp_path / "a.npy"))


def test_only_scores_may_be_minus_infinity(tmp_path):
    uri = saved(tmp_path / "a.npy", np.array([[-np.inf, 1]]))
    assert (array(uri, unscored=True) == [[-np.inf, 1]]).all()
    uri = saved(tmp_path / "b.npy", np.array([[-np.inf, np.nan]]))
    with pytest.raises(InputError, match="holds nan in row 0, column 1.*or -inf where a pair"):
        array(uri, unscored=True)


def of_torch() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.ones(2, 2), buffer)
    return buffer.getvalue()


def of_numpy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((40, 4)))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            pickle.dumps(np.ones((2, 2))),
            "is a pickle; give a .npy file of two axes",
        ),
        (of_torch(), "is written by torch.save"),
        (b"\x89HDF\r\n\x1a\n", "is HDF5"),
        (b"PAR1...", "is Parquet, which --embeddings reads"),
        (b"0.5,0.1\n", r"is no array: it begins with b'0.5,0.1\\n'"),
        (b"", "is no array: it begins with b''"),
        (of_numpy()[:300], "is no array"),
        (of_numpy()[:20], "is no array"),
        (of_numpy().replace(b"(40, 4)", b"(4e, 4)"), "is no array"),
        (of_numpy().replace(b"<f8", b"<q9"), "is no array"),
        (b"PK\x03\x04 and no more", "is no array"),
        (gzip.compress(of_numpy(), mtime=0)[:100], "is not gzip, or torn"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, data, sentence):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        array(str(tmp_path / "a.npy"))


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match="there is no file .*gone.npy; give a .npy file"):
        array(str(tmp_path / "gone.npy"))
    with pytest.raises(InputError, match="there is no file memory://nowhere.npy"):
        array("memory://nowhere.npy")
    with pytest.raises(InputError, match="is a folder"):
        array(str(tmp_path))
