"""Arrays of other programs: .npy and .npz, checked, and mapped into memory where they can be."""

import io

import numpy as np
from numpy.lib.npyio import NpzFile

from pipeline.errors import InputError
from pipeline.storage import store, text_files

NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
WHAT = "a .npy file of two axes"
OTHERS = {b"\x80": "a pickle", b"\x89HDF": "HDF5", b"PAR1": "Parquet, which --embeddings reads"}
LARGEST = float(np.finfo(np.float32).max)
EXACT = 2**24  # up to here float32 tells whole numbers apart
CELLS = 2**22  # looked at together


def array(uri: str, *, unscored: bool = False) -> np.ndarray:
    """Finite numbers on two axes, float32 or float64, of `FILE.npy`, `FILE.npz` or `FILE.npz:NAME`.

    A local file of such numbers is not read but mapped. `unscored`: -inf may stand where a pair has
    no score.
    """
    found = _opened(uri)
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiu":
        raise InputError(f"{uri} is {found.dtype} {found.shape}; give numbers on two axes")
    step = max(1, CELLS // found.shape[1])
    for start in range(0, len(found), step):
        part = found[start : start + step]
        bad = ~(np.abs(part, dtype=np.float64) <= LARGEST)
        bad &= ~(unscored & (part == -np.inf))
        if bad.any():
            row, column = np.argwhere(bad)[0] + (start, 0)
            rule = "a number, or -inf where a pair has no score" if unscored else "a number"
            raise InputError(
                f"{uri} holds {found[row, column]} in row {row}, column {column} (from 0); give "
                f"{rule}, of float32's size"
            )
    return found.astype(_width(found), copy=False)


def _width(found: np.ndarray) -> type:
    """float64 where float32 would lose the order."""
    wide = found.dtype.itemsize >= 8
    if found.dtype.kind in "iu":
        wide = max(int(found.max()), -int(found.min())) > EXACT
    return np.float64 if wide else np.float32


def _opened(uri: str) -> np.ndarray:
    path, cut, name = uri.partition(".npz:")
    path = path + cut.rstrip(":")
    here = store.is_local(path)
    found = text_files.data(path, WHAT, size=8 if here else None)
    for sign, kind in OTHERS.items():
        if found.startswith(sign):
            raise InputError(f"{path} is {kind}; give {WHAT}, written by numpy.save")
    if here and found.startswith(NPY):
        return _loaded(path, store.absolute(path), name)
    whole = text_files.data(path, WHAT) if here else found
    if whole.startswith(text_files.GZIP):
        whole = text_files.unpacked(path, whole)
    if not whole.startswith((NPY, ZIP)):
        raise InputError(f"{path} is no array: it begins with {whole[:8]!r}; give {WHAT}")
    return _loaded(path, io.BytesIO(whole), name)


def _loaded(path: str, source: str | io.BytesIO, name: str) -> np.ndarray:
    try:
        # "c": nothing is written, but torch wants arrays that could be.
        found = np.load(source, mmap_mode="c" if isinstance(source, str) else None)
        if isinstance(found, NpzFile):
            found = found[_member(path, found.files, name)]
    except InputError:
        raise
    except Exception as error:  # numpy's and zip's readers have no common base
        raise InputError(f"{path} is no array ({error}); give {WHAT}") from error
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path} holds no array {name!r}; give {WHAT}")
    return found


def _member(path: str, names: list[str], name: str) -> str:
    if any(member.endswith("data.pkl") for member in names):
        raise InputError(f"{path} is written by torch.save; give {WHAT}, written by numpy.save")
    name = name or (names[0] if len(names) == 1 else "")
    if name not in names:
        there = ", ".join(names) or "nothing"
        raise InputError(f"{path} holds {there}; name one array: {path}:{(names or ['NAME'])[0]}")
    return name
