"""A trained model in one's own code: a picture has the vector that it has in the gallery."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.evaluation import tower_vectors
from pipeline.sharding.given import bytes_of
from pipeline.sharding.images import Rejected
from pipeline.storage import store
from pipeline.training import saved_model, train
from pipeline.training.saved_model import SavedModel
from schemas.settings import Recipe
from tests.helpers import datasets, odd_pictures
from tests.helpers.stages import finish, sharded

RESIZES = ["keep", "center_crop", "border", "shorter"]
FILES = odd_pictures.files()


def trained(folder: Path, resize: str) -> tuple[str, Recipe]:
    """A run of odd pictures whose shards were made so, and that was trained with other words."""
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    rows = []
    for split in ("train", "test"):  # every picture in both, under two names
        for name, data in FILES.items():
            (folder / f"{split}-{name}").write_bytes(data)
            rows.append((f"{split}-{name}", f"the picture {name} of {split}", split))
    recipe = Recipe(
        name="odd",
        source=datasets.table_of(folder, rows).source,
        shard={"resize": resize, "size": 48},
        model={"image_size": 48, "width": 4, "dim": 16, "word_dim": 8},
        train={"epochs": 1, "batch_size": 8, "lanes": 1},
    )
    root = str(folder / "run")
    sharded(recipe, root)
    told = recipe.model_copy(update={"shard": recipe.shard.model_copy(update={"resize": "longer"})})
    plan = train.plan(told, root, "main")
    train.fit(plan.pieces[0], lambda records: None)
    plan.finish({"model": saved_model.summary(plan.pieces[0])})
    return root, recipe


@pytest.fixture(scope="module", params=RESIZES)
def gallery(request, tmp_path_factory) -> tuple[SavedModel, Path, torch.Tensor]:
    """A model, the folder of the pictures' files, and the vector of each in the gallery."""
    folder = tmp_path_factory.mktemp(request.param)
    root, recipe = trained(folder, request.param)
    finish(tower_vectors.plan_vectors(recipe, root, "main"), tower_vectors.write_vectors)
    scores = tower_vectors.read(tower_vectors.evaluated(recipe, root, "main"))
    assert len(scores.items.image_ids) == len(FILES)  # in the table's order
    return saved_model.load_model(f"{root}/5-model/main"), folder, scores.images


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> SavedModel:
    root, _ = trained(tmp_path_factory.mktemp("model"), "keep")
    return saved_model.load_model(f"{root}/5-model/main")


def as_bytes(path: Path):
    return path.read_bytes()


def as_data_uri(path: Path) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()


WAYS = [as_bytes, as_data_uri, str, Path, Image.open]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_file_has_the_vector_that_its_shard_has(gallery, way):
    model, folder, expected = gallery
    found = model.embed_images([way(folder / name) for name in FILES])
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=0)


def test_a_picture_in_memory_has_nearly_the_vector_of_its_file(gallery):
    """A JPEG of its own is shrunk by the decoder, pixels are not."""
    model, folder, expected = gallery
    pictures = [Image.open(folder / name) for name in FILES]
    for picture in pictures:
        picture.load()
    found = model.embed_images(pictures)
    assert (found * expected).sum(1).min() > 0.999
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    upright = [n for n, name in enumerate(FILES) if not name.startswith(("turned", "clear", "web"))]
    upright = [n for n in upright if not list(FILES)[n].startswith("sixteen")]
    found = model.embed_images([arrays[n] for n in upright])
    assert (found * expected[upright]).sum(1).min() > 0.999


def test_batches_change_nothing(gallery):
    model, folder, _ = gallery
    pictures = [folder / name for name in FILES]
    torch.testing.assert_close(model.embed_images(pictures, 3), model.embed_images(pictures))
    assert model.embed_images([]).shape == (0, 16)


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (b"nonsense", "not an image: begins with b'nonsense'"),
        (FILES["plain.jpg"][:-200], "image does not decode"),
        ("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E", "not an image.*<svg"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "not an image: begins with b'<svg/>'"),
        ("data:image/jpeg;base64,/9j/4AA", "base64 does not decode"),
        ("data:image/jpeg;base64,狗", "base64 does not decode"),
        ("data:image/jpeg;base64", "data URI is torn"),
        ("data: a chart of sales", "data URI is torn"),
        ("https://example.org/dog.jpg", "web address.*not fetched; give the picture's bytes"),
        ("/nowhere/dog.jpg", "file does not open: '/nowhere/dog.jpg'"),
        ("a\0b", "file does not open"),
        ("nope://bucket/dog.jpg", "file does not open"),
        (np.ones((3, 8), np.float32), r"features of shape \[3, 8\], and the model takes images"),
        (np.array(["dog"]), "not features: an array of <U3"),
        (Image.new("I", (3, 3)), "numbers of unknown range: an image of mode I"),
        (None, "not a picture: NoneType"),
        (7, "not a picture: int"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_place(model, picture, reason):
    with pytest.raises(Rejected, match=reason):
        model.payload(picture)
    with pytest.raises(Rejected, match=f"picture 2 of 2: .*{reason}"):
        model.embed_images([FILES["plain.jpg"], picture])


def test_pixels_of_every_mode_are_a_picture():
    """What PNG cannot hold is converted."""
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        image = Image.new("RGB", (4, 2), (200, 30, 60))
        middle = {"PA": "P", "RGBa": "RGBA", "LAB": None}.get(mode, "RGB")
        image = Image.new(mode, (4, 2)) if middle is None else image.convert(middle).convert(mode)
        with Image.open(io.BytesIO(bytes_of(image))) as again:
            assert again.size == (4, 2), mode
            again.load()


def test_a_model_of_regions_takes_arrays_of_any_count_and_no_pictures(tmp_path):
    for n in range(12):
        np.save(tmp_path / f"{n}.npy", np.random.default_rng(n).normal(size=(3, 7)).astype("f4"))
    rows = [(f"{n}.npy", f"thing number {n}", "train") for n in range(12)]
    source = datasets.table_of(tmp_path, rows).source
    recipe = Recipe(
        name="regions",
        source=source,
        model={"image": "regions", "dim": 8, "word_dim": 4},
        train={"epochs": 1, "batch_size": 4, "lanes": 1},
    )
    root = str(tmp_path / "run")
    sharded(recipe, root)
    plan = train.plan(recipe, root, "main")
    train.fit(plan.pieces[0], lambda records: None)
    plan.finish({"model": saved_model.summary(plan.pieces[0])})
    model = saved_model.load_model(f"{root}/5-model/main")
    arrays = [np.load(tmp_path / f"{n}.npy") for n in range(3)]
    longer = [*arrays, np.ones((5, 7), np.float32)]
    torch.testing.assert_close(model.embed_images(longer)[:3], model.embed_images(arrays))
    for wrong in (np.ones((3, 8), np.float32), odd_pictures.scene()):
        with pytest.raises(Rejected, match="takes region features .* 7 wide"):
            model.payload(wrong)


def test_a_model_of_before_takes_the_settings_it_was_trained_with(tmp_path):
    root, _ = trained(tmp_path, "border")
    uri = f"{root}/5-model/main/index.json"
    index = store.read_json(uri)
    assert saved_model.load_model(f"{root}/5-model/main").shard.resize == "border"
    del index["pieces"][0]["shard"]
    store.write_json(uri, index)
    assert saved_model.load_model(f"{root}/5-model/main").shard.resize == "longer"
