"""Vectors and captions that no longer tell anything apart stop the stage."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.labels.encoders import guards
from schemas.settings import EmbedSettings


def vectors_of(count: int) -> tuple[np.ndarray, list[str]]:
    vectors = np.random.default_rng(1).normal(size=(count, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32), [f"caption {n}" for n in range(count)]


def test_vectors_that_tell_captions_apart_pass():
    guards.check_vectors(*vectors_of(50), EmbedSettings())
    guards.check_vectors(*vectors_of(0), EmbedSettings())


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (np.nan, "not finite for 1 of 50 captions, the first 'caption 7'; try embed.precision"),
        (np.inf, "not finite for 1 of 50 captions"),
        (0, "a vector of zeros for 1 of 50 captions, the first 'caption 7'"),
    ],
)
def test_a_vector_that_is_no_direction_stops(value, sentence):
    vectors, texts = vectors_of(50)
    vectors[7] = value
    with pytest.raises(InputError, match=sentence):
        guards.check_vectors(vectors, texts, EmbedSettings())


@pytest.mark.parametrize("spread", [0, 0.02])
def test_vectors_that_are_nearly_constant_stop(spread):
    vectors, texts = vectors_of(50)
    nearly = np.eye(16)[0] + spread * vectors
    nearly /= np.linalg.norm(nearly, axis=1, keepdims=True)
    with pytest.raises(InputError, match="50 different captions nearly the same vector"):
        guards.check_vectors(nearly, texts, EmbedSettings())
    guards.check_vectors(nearly, ["the same caption"] * 50, EmbedSettings())
    guards.check_vectors(nearly[:5], texts[:5], EmbedSettings())
    guards.check_vectors(nearly, texts, EmbedSettings(max_mean_cosine=1))


def test_the_mean_cosine_is_that_of_all_pairs():
    vectors, texts = vectors_of(12)
    gram = vectors @ vectors.T
    mean = (gram.sum() - np.trace(gram)) / (12 * 11)
    guards.check_vectors(vectors, texts, EmbedSettings(max_mean_cosine=mean + 1e-4))
    with pytest.raises(InputError, match=f"mean cosine {mean:.4f}"):
        guards.check_vectors(vectors, texts, EmbedSettings(max_mean_cosine=mean - 1e-4))


def entry(dim: int, captions: int, different: int) -> dict:
    return {"dim": dim, "captions": captions, "different": different}


def test_pieces_of_different_widths_stop():
    entries = {"train-000000": entry(8, 5, 5), "val-000000": entry(9, 5, 5)}
    with pytest.raises(InputError, match=r"different widths \(8 in train-000000, 9 in val-000000"):
        guards.check_stage(entries, EmbedSettings())


def test_too_many_repeated_captions_stop():
    entries = {"train-000000": entry(8, 10, 2), "val-000000": entry(8, 10, 7)}
    assert guards.duplicates(entries.values()) == pytest.approx(0.55)
    with pytest.raises(InputError, match="55% of the captions repeat another.*at most 50%"):
        guards.check_stage(entries, EmbedSettings())
    guards.check_stage(entries, EmbedSettings(max_duplicates=0.6))
    guards.check_stage({"train-000000": entry(8, 0, 0)}, EmbedSettings())
