"""Random views of images, and batches of neighbours."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.models import Vocabulary
from pipeline.models.preprocessing import Preprocessing
from pipeline.sharding.decoding import decode
from pipeline.training.loading.augmentation import Augment
from pipeline.training.loading.loader import Loader
from pipeline.training.sampler import Sampler
from schemas.settings import TrainSettings
from tests.pipeline.training.test_sampler import Counts

SQUARE = Preprocessing.squash(32)


def jpeg(width=200, height=100) -> bytes:
    """Red rises from left to right, green from top to bottom."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def augment(**changed) -> Augment | None:
    return Augment.of(TrainSettings(**changed))


def test_without_settings_nothing_is_drawn():
    assert augment() is None
    assert augment(flip=True) == Augment(1.0, True, 0.0)


@pytest.mark.parametrize("changed", [{"crop": 0.2}, {"flip": True}, {"colour": 0.4}])
def test_a_view_is_a_function_of_what_it_is_drawn_with(changed):
    view = augment(**changed)
    drawn = [view(jpeg(), SQUARE, [0, 1, k]) for k in range(12)]
    assert all(x.shape == (3, 32, 32) and x.dtype == np.uint8 for x in drawn)
    assert np.array_equal(drawn[5], view(jpeg(), SQUARE, [0, 1, 5]))
    assert len({x.tobytes() for x in drawn}) > 1


def test_crops_keep_at_least_their_share_and_lie_everywhere():
    view = augment(crop=0.25)
    widths, heights, lefts = [], [], []
    for k in range(300):
        image = view(jpeg(), SQUARE, [k]).astype(float)
        red, green = image[0].mean(0), image[1].mean(1)
        widths.append((red[-1] - red[0]) / 255)
        heights.append((green[-1] - green[0]) / 255)
        lefts.append(red[0] / 255)
    areas = np.array(widths) * np.array(heights)
    assert 0.2 < areas.min() < 0.35 and areas.max() > 0.7  # edges of a crop blur a little
    assert min(lefts) < 0.03 and max(lefts) > 0.4


def test_a_mirror_turns_half_of_the_images():
    view = augment(flip=True)
    mirrored = [view(jpeg(), SQUARE, [k])[0, 0, 0] > 128 for k in range(200)]
    assert 70 < sum(mirrored) < 130


def test_without_a_crop_a_view_is_the_image_itself():
    view = Augment(crop=1.0, flip=False, colour=0.0)
    found, plain = view(jpeg(), SQUARE, [0]).astype(int), decode(jpeg(), SQUARE).astype(int)
    assert np.abs(found - plain).max() <= 6


def test_features_have_no_views():
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3)))
    with pytest.raises(InputError, match="these hold features"):
        augment(crop=0.5)(file.getvalue(), SQUARE, [0])


def test_the_loader_shows_another_view_every_epoch_and_the_same_one_again(split):
    order = Sampler(split, batch_size=8, lanes=2, pairs="image", seed=0)
    words = Vocabulary.of(split.captions, min_count=1)

    def images(epoch: int, size: int = 1, rank: int = 0):
        given = {"rank": rank, "size": size, "max_words": 8, "augment": augment(crop=0.3)}
        loader = Loader(order, words, workers=0 if size == 1 else 2, **given)
        found = {
            int(row): image.numpy().tobytes()
            for batch in loader.epoch(epoch)
            for row, image in zip(batch.image_rows, batch.images, strict=True)
        }
        loader.close()
        return found

    assert images(0) == images(0) == images(0, 2, 0) | images(0, 2, 1)
    both = images(0).keys() & images(1).keys()
    assert both and all(images(0)[row] != images(1)[row] for row in both)


def near(images: int, seed: int, k: int = 4) -> np.ndarray:
    """Random neighbours, some of them missing."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, images, (images, k))
    return np.where(rng.random((images, k)) < 0.2, -1, found)


@settings(max_examples=40, deadline=None)
@given(st.integers(16, 80), st.sampled_from([2, 4]), st.integers(0, 5))
def test_batches_of_neighbours_show_every_image_at_most_once_a_round(images, group, seed):
    order = Sampler(
        Counts([1] * images, 9),
        batch_size=16,
        lanes=4,
        pairs="image",
        seed=seed,
        group=group,
        neighbours=near(images, seed),
    )
    rows = np.concatenate([rows.reshape(-1) for rows, _ in order.epoch(0)])
    assert len(rows) == images // 16 * 16 == len(set(rows.tolist()))


def test_neighbours_meet_in_a_lane_and_from_any_step_on():
    images = 64
    pairs = np.arange(images)[:, None] ^ 1  # 0 and 1, 2 and 3, …
    order = Sampler(
        Counts([1] * images, 9),
        batch_size=16,
        lanes=4,
        pairs="image",
        seed=0,
        group=2,
        neighbours=pairs,
    )
    steps = [rows for rows, _ in order.epoch(3)]
    for rows in steps:
        for lane in rows:
            assert set(lane.tolist()) == {row ^ 1 for row in lane.tolist()}
    later = [rows for rows, _ in order.epoch(3, start=2)]
    assert all(np.array_equal(a, b) for a, b in zip(steps[2:], later, strict=True))
