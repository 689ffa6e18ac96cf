"""Hashes by which copies are found, and which rows have equal or nearly equal ones.

Shapes: N rows, P pairs. A pair is (i, j) with i < j.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 32  # of the grey picture whose lowest 8 × 8 frequencies are hashed
FLAT = 2.0  # a picture whose grey values spread less has no shapes to compare (of 255)
BITS = 64
_COSINES = np.cos(np.pi * (np.arange(SIDE) + 0.5) * np.arange(8)[:, None] / SIDE)


class Picture(NamedTuple):
    """What is compared of a picture."""

    pixels: bytes  # sha256 of the size and the RGB values
    perceptual: int | None  # 64 bits; None where there is too little to see
    colours: bytes  # 4 × 4 RGB


def of_picture(image: Image.Image) -> Picture:
    """The hashes of a picture, from one decode.

    The perceptual one has a bit for each of the lowest 8 × 8 frequencies of the discrete cosine
    transform: whether it is above the median of all but the first, which is the mean brightness.
    """
    image = image.convert("RGB")
    pixels = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).digest()
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    colours = image.resize((4, 4), Image.Resampling.BOX).tobytes()
    if grey.std() < FLAT:
        return Picture(pixels, None, colours)
    # Rounded, so that the last bit of a sum never decides.
    frequencies = np.round(_COSINES @ grey @ _COSINES.T, 1).ravel()[1:]
    bits = np.packbits(np.concatenate([[False], frequencies > np.median(frequencies)]))
    return Picture(pixels, int.from_bytes(bits.tobytes(), "big"), colours)


def normalised(text: str) -> str:
    """The text without case, punctuation and spacing, by which captions are compared."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", plain).strip() or " ".join(plain.split())


def codes(values) -> np.ndarray:
    """A number (N,) for every value of an Arrow column, the same for equal values."""
    return values.combine_chunks().dictionary_encode().indices.to_numpy()


def first_of(keys_N: np.ndarray, splits_N: np.ndarray) -> np.ndarray:
    """For every row the first row of its split that has its key (N,)."""
    both = keys_N.astype(np.int64) * (int(splits_N.max(initial=0)) + 1) + splits_N
    _, first, group = np.unique(both, return_index=True, return_inverse=True)
    return first[group]


def equal_pairs(keys_N: np.ndarray, first_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (P,), (P,) of rows with equal keys.

    Each row with the first of its split, and the firsts of different splits with one another. So a
    thousand copies are a thousand pairs.
    """
    rows = np.arange(len(keys_N))
    copies, firsts = rows[first_N != rows], rows[first_N == rows]
    firsts = firsts[np.argsort(keys_N[firsts], kind="stable")]
    across = [(firsts[a], firsts[b]) for a, b in _runs(keys_N[firsts])]
    return _joined([(first_N[copies], copies), *across])


def near_pairs(hashes_N: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (P,), (P,) of rows whose 64-bit hashes differ in at most `distance` bits.

    Cut into m bands, such hashes agree in at least m - distance of them (pigeonholes): every choice
    of so many bands is a key, and only rows with an equal key are compared. Exact, and for hashes
    that are spread out far from N² (m is chosen so that the work is least).
    """
    unique, group, count = np.unique(hashes_N, return_inverse=True, return_counts=True)
    found = []
    for mask in _masks(len(unique), distance):
        order = np.argsort(unique & mask, kind="stable")
        ordered = unique[order]
        for a, b in _runs(ordered & mask):
            near = np.bitwise_count(ordered[a] ^ ordered[b]) <= distance
            found.append((order[a[near]], order[b[near]]))
    u, v = _joined(found)
    if len(u):
        u, v = np.unique(np.sort(np.stack([u, v]), axis=0), axis=1)
    same = np.flatnonzero(count > 1)
    u, v = np.concatenate([u, same]), np.concatenate([v, same])
    # Every row of hash u with every row of hash v.
    rows, start = np.argsort(group, kind="stable"), np.cumsum(count) - count
    pairs = count[u] * count[v]
    p = np.repeat(np.arange(len(u)), pairs)
    k = np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    i = rows[start[u[p]] + k // count[v[p]]]
    j = rows[start[v[p]] + k % count[v[p]]]
    once = (u[p] != v[p]) | (i < j)
    return np.minimum(i, j)[once], np.maximum(i, j)[once]


def _masks(rows: int, distance: int) -> list[np.uint64]:
    """The bits of every choice of bands, for the number of bands that costs least."""

    def cost(bands: int) -> float:
        keys, bits = math.comb(bands, distance), BITS * (bands - distance) / bands
        return keys * rows * (20 + rows / 2 ** (bits + 1))  # a sort is like 20 comparisons a row

    bands = min(range(distance + 1, distance + 5), key=cost)
    edges = [BITS * b // bands for b in range(bands + 1)]
    parts = [(1 << end) - (1 << start) for start, end in pairwise(edges)]
    return [np.uint64(sum(some)) for some in combinations(parts, bands - distance)]


def _runs(sorted_keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places with equal keys, as blocks (a, b): neighbours, then next but one, …"""
    step, a = 1, np.flatnonzero(sorted_keys[1:] == sorted_keys[:-1])
    while len(a):
        yield a, a + step
        step += 1
        a = a[a + step < len(sorted_keys)]
        a = a[sorted_keys[a] == sorted_keys[a + step]]


def _joined(pairs: list) -> tuple[np.ndarray, np.ndarray]:
    empty = np.zeros(0, np.int64)
    left, right = zip((empty, empty), *pairs, strict=True)
    return np.concatenate(left), np.concatenate(right)


def originals(rows: int, i_P: np.ndarray, j_P: np.ndarray) -> np.ndarray:
    """For every row the earlier row that it is left out for (N,), -1 where it stays.

    Rows are looked at in order: one stays unless a row that stays is paired with it.
    """
    like = np.full(rows, -1)
    for p in np.lexsort((i_P, j_P)):
        if like[j_P[p]] < 0 and like[i_P[p]] < 0:
            like[j_P[p]] = i_P[p]
    return like
