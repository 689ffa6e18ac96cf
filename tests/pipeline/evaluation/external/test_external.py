"""Other people's systems by their files: which way a matrix lies, who is there several times."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.evaluation import external, protocols

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(20, 6)).astype(np.float32)
TEXTS = np.repeat(IMAGES, 5, 0) + RNG.normal(size=(100, 6)).astype(np.float32)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A function that saves arrays, or lines of ids, by name."""
    monkeypatch.chdir(tmp_path)

    def save(**files) -> None:
        for name, content in files.items():
            if isinstance(content, np.ndarray):
                np.save(f"{name}.npy", content)
            else:
                (tmp_path / f"{name}.txt").write_text("\n".join(map(str, content)))

    save(images=IMAGES, texts=TEXTS, matrix=cosines(IMAGES, TEXTS))
    return save


def cosines(images, texts):
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (images, texts))
    return (a @ b.T).astype(np.float32)


def figures(system) -> dict:
    return protocols.measure(system, ["own"], resamples=20)["own"].metrics


def test_images_that_are_there_once_a_caption_are_taken_once(saved, caplog):
    expected = figures(external.of_arrays("images.npy", "texts.npy"))
    five = np.repeat(IMAGES, 5, 0)
    order = RNG.permutation(100)
    saved(
        five=five,
        rounded=five + RNG.normal(size=five.shape).astype(np.float32) * 1e-6,
        matrix5=cosines(five, TEXTS),
        turned5=cosines(five, TEXTS).T,
        mixed=five[order],
        mixed_texts=TEXTS[order],
        rounds=np.tile(IMAGES, (5, 1)),
        rounds_texts=TEXTS.reshape(20, 5, 6).swapaxes(0, 1).reshape(100, 6),
        ids=[f"i{n}" for n in range(20)],
        ids5=[f"i{n // 5}" for n in range(100)],
    )
    assert figures(external.of_arrays("five.npy", "texts.npy")) == expected
    assert "five.npy: 100 rows are 20 images, each there once for every text" in caplog.text
    for images, texts in (
        *(("rounded.npy", "texts.npy"), ("mixed.npy", "mixed_texts.npy")),
        ("rounds.npy", "rounds_texts.npy"),
    ):
        assert figures(external.of_arrays(images, texts)) == pytest.approx(expected)
    for matrix in ("matrix5.npy", "turned5.npy"):
        assert figures(external.of_matrix(matrix)) == pytest.approx(expected)
    for named in ("ids.txt", "ids5.txt"):
        found = external.of_arrays("five.npy", "texts.npy", named)
        assert found.items.image_ids == [f"i{n}" for n in range(20)]
        assert found.items.text_image_ids[7] == "i1"


def test_images_that_are_there_unequally_often_are_refused(saved):
    saved(some=IMAGES[np.repeat([0, 1, 2, 3], [1, 7, 4, 8])], few=TEXTS[:20])
    with pytest.raises(InputError, match="of 20 rows 4 are different, some 8 times there; give ea"):
        external.of_arrays("some.npy", "few.npy")


def test_one_caption_an_image_and_a_picture_twice_are_left_as_they_are(saved, caplog):
    images = IMAGES.copy()
    images[7] = images[6]
    saved(images=images, texts=TEXTS[::5])
    assert len(external.of_arrays("images.npy", "texts.npy").items.image_ids) == 20
    assert not caplog.messages


def test_a_matrix_of_texts_by_images_is_turned_where_its_shape_says_so(saved, caplog):
    expected = figures(external.of_matrix("matrix.npy"))
    assert not caplog.messages
    saved(turned=cosines(TEXTS, IMAGES), ids=range(20))
    assert figures(external.of_matrix("turned.npy")) == pytest.approx(expected)
    assert "100 rows are texts, 20 columns images" in caplog.text
    assert figures(external.of_matrix("turned.npy", rows="texts")) == pytest.approx(expected)
    with pytest.raises(InputError, match="20 texts do not share out equally over 100 images"):
        external.of_matrix("turned.npy", rows="images")
    with pytest.raises(InputError, match="--rows 'captions': the rows of .* images or texts"):
        external.of_matrix("turned.npy", rows="captions")


def test_a_square_matrix_is_not_guessed_at(saved):
    square = cosines(IMAGES, TEXTS[::5])
    saved(square=square, turned=square.T, ids=range(20))
    with pytest.raises(InputError, match="is 20 × 20, which does not say what its rows are; add"):
        external.of_matrix("square.npy")
    first = figures(external.of_matrix("square.npy", rows="images"))
    assert figures(external.of_matrix("turned.npy", rows="texts")) == first
    assert figures(external.of_matrix("square.npy", "ids.txt")) == first  # who names ids looked


def test_any_number_of_captions_in_any_order(saved, caplog):
    owners = RNG.integers(0, 20, 93)
    owners[:20] = np.arange(20)
    owners = owners.tolist()
    texts = IMAGES[owners] + RNG.normal(size=(93, 6)).astype(np.float32)
    saved(texts=texts, matrix=cosines(IMAGES, texts), owners=owners, more=[*owners, 3])
    with pytest.raises(InputError, match="93 texts do not share out .*--text-image-ids FILE"):
        external.of_matrix("matrix.npy")
    found = external.of_matrix("matrix.npy", None, None, "owners.txt")
    assert found.items.text_image_ids == [*map(str, owners)]
    other = external.of_arrays("images.npy", "texts.npy", None, None, "owners.txt")
    assert figures(other) == pytest.approx(figures(found))
    saved(ids=[f"i{n}" for n in range(20)], strange=[*owners[:-1], 99])
    with pytest.raises(InputError, match="20 of 20 listed ids are not here, the first '0'"):
        external.of_matrix("matrix.npy", "ids.txt", None, "owners.txt")
    with pytest.raises(InputError, match="no image here is '99'"):
        external.of_matrix("matrix.npy", None, None, "strange.txt")
    with pytest.raises(InputError, match="94 images of texts are listed, 93 are there"):
        external.of_matrix("matrix.npy", None, None, "more.txt")


def test_texts_in_rounds_and_distances_are_told(saved, caplog):
    rounds = TEXTS.reshape(20, 5, 6).swapaxes(0, 1).reshape(100, 6)
    saved(rounds=rounds, apart=1 - cosines(IMAGES, TEXTS), owners=[*range(20)] * 5)
    external.of_arrays("images.npy", "rounds.npy", None, None, "owners.txt")
    external.of_arrays("images.npy", "texts.npy")
    assert not caplog.messages
    external.of_arrays("images.npy", "rounds.npy")
    assert "rounds.npy: texts would match far better in rounds" in caplog.text
    caplog.clear()
    external.of_matrix("apart.npy")
    assert "pairs that match score less than others; larger must be nearer" in caplog.text


def test_ids_are_a_line_each_and_none_is_there_twice(saved, tmp_path):
    (tmp_path / "ids.txt").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(["a dog\u2028.jpg ", *map(str, range(19))]).encode()
    )
    found = external.of_matrix("matrix.npy", "ids.txt", None)
    assert found.items.image_ids[:2] == ["a dog\u2028.jpg", "0"]
    saved(twice=[0, *range(19)], few=range(3))
    with pytest.raises(InputError, match="--image-ids: 1 ids are there twice, the first '0' in"):
        external.of_matrix("matrix.npy", "twice.txt")
    with pytest.raises(InputError, match="3 image ids are listed, 20 are there"):
        external.of_matrix("matrix.npy", "few.txt")
    with pytest.raises(InputError, match="there is no file gone.txt; give a list of ids"):
        external.of_matrix("matrix.npy", None, "gone.txt")


def test_a_pair_without_a_score_is_never_found(saved):
    matrix = cosines(IMAGES, TEXTS)
    matrix[3], matrix[:, 50] = -np.inf, -np.inf
    saved(matrix=matrix)
    found = protocols.measure(external.of_matrix("matrix.npy"), ["own"], resamples=20)["own"]
    texts = [n for n in range(100) if n // 5 != 3 and n != 50]
    best = [matrix[:, n].argmax() == n // 5 for n in texts]
    assert found.metrics["t2i_R_at_1"] == pytest.approx(sum(best))
    images = [n for n in range(20) if n != 3]
    assert found.metrics["i2t_R_at_1"] == pytest.approx(
        100 * sum(matrix[n].argmax() // 5 == n for n in images) / 20
    )
    for value, name in ((np.nan, "nan"), (np.inf, "inf")):
        matrix[7, 9] = value
        saved(matrix=matrix)
        with pytest.raises(InputError, match=f"holds {name} in row 7, column 9 .from 0.*or -inf"):
            external.of_matrix("matrix.npy")
