"""The stage embed: shards' captions become vectors, by one encoder, a fitted one or several."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from jobs.cli.main import main
from pipeline.errors import InputError, StageMissing
from pipeline.labels import embed
from pipeline.labels.encoders import sentences
from pipeline.storage import parquet, run_folder, store
from pipeline.storage.run_folder import RunFolder
from schemas.settings import EmbedSettings, Recipe
from tests.helpers.stages import SCENES, finish, sharded, without_the_second_shard


def run_all(settings: EmbedSettings, root: str) -> list[int]:
    """Makes and checks all the plans of an encoder; how many pieces each had to make."""
    made = []
    for step in embed.steps(settings, root):
        summaries = {piece.name: step.make(piece) for piece in step.plan.pending}
        step.check(summaries)
        step.plan.finish(summaries)
        made.append(len(summaries))
    return made


@pytest.fixture(scope="module")
def recipe(tiny_encoder) -> Recipe:
    return Recipe(name="t", source=SCENES, shard={"samples": 5}, embed={"encoder": tiny_encoder})


@pytest.fixture(scope="module")
def embedded(recipe, tmp_path_factory) -> str:
    """A run folder with embeddings; those of other encoders are added beside them."""
    root = str(tmp_path_factory.mktemp("embedded"))
    sharded(recipe, root)
    finish(embed.plan(recipe, root), embed.write_embeddings)
    return root


@pytest.fixture
def root(embedded, tmp_path) -> str:
    """A copy of that run folder, to change."""
    return str(shutil.copytree(embedded, tmp_path / "run"))


def rows_of(root, stage, name, *folders) -> list[dict]:
    return parquet.read_table(
        RunFolder(root).folder(stage, *folders, f"{name}.parquet")
    ).to_pylist()


def texts_of(root: str, split: str) -> list[str]:
    names = [
        e["name"] for e in run_folder.of_split(run_folder.read_index(f"{root}/2-shards"), split)
    ]
    return [c["text"] for n in names for s in rows_of(root, "shard", n) for c in s["captions"]]


def vectors_of(root: str, split: str, label: str) -> np.ndarray:
    index = run_folder.read_index(f"{root}/3-embeddings/{label}")
    names = [e["name"] for e in run_folder.of_split(index, split)]
    return np.array([row["vector"] for n in names for row in rows_of(root, "embed", n, label)])


def files_of(root: str, label: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(root, "3-embeddings", label).glob("*.*")}


# ---- one encoder -------------------------------------------------------------------------------


def test_embeddings_are_unit_vectors_in_the_order_of_the_sidecar(embedded):
    for entry in run_folder.read_index(f"{embedded}/2-shards")["pieces"]:
        samples = rows_of(embedded, "shard", entry["name"])
        expected = [(c["caption_id"], s["image_id"]) for s in samples for c in s["captions"]]
        found = rows_of(embedded, "embed", entry["name"], "tiny")
        assert [(row["caption_id"], row["image_id"]) for row in found] == expected
        norms = np.linalg.norm([row["vector"] for row in found], axis=1)
        assert np.abs(norms - 1).max() < 2e-3  # float16


def test_an_embedding_is_the_encoder_s_own_vector_of_the_caption(embedded, tiny_encoder):
    expected = SentenceTransformer(tiny_encoder, device="cpu").encode(texts_of(embedded, "test"))
    found = vectors_of(embedded, "test", "tiny")
    assert np.allclose(found, expected / np.linalg.norm(expected, axis=1)[:, None], atol=1e-3)


def test_embeddings_say_which_encoder_made_them(embedded, tiny_encoder):
    table = parquet.read_table(f"{embedded}/3-embeddings/tiny/val-000000.parquet")
    assert table.schema.metadata[b"halftone.encoder"].decode() == tiny_encoder
    weights = table.schema.metadata[b"halftone.weights"].decode()
    assert weights == sentences.fingerprint(tiny_encoder)


def test_finished_embeddings_are_not_made_again(embedded, recipe):
    plan = embed.plan(recipe, embedded)
    assert plan.complete
    files = list(Path(plan.folder).iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    for piece in plan.pieces:
        embed.write_embeddings(piece)
    assert [file.stat().st_mtime_ns for file in files] == before


def test_what_is_lost_is_made_again_with_the_same_bytes(root, recipe):
    before = files_of(root, "tiny")
    folder = Path(root, "3-embeddings", "tiny")
    (folder / "index.json").unlink()
    (folder / "train-000001.parquet").unlink()
    torn = folder / "val-000000.parquet"
    torn.write_bytes(torn.read_bytes()[:100])
    run_all(recipe.embed, root)
    assert files_of(root, "tiny") == before


def test_other_weights_are_other_embeddings(embedded, recipe, tiny_encoder, tmp_path):
    copy = tmp_path / "tiny"
    shutil.copytree(tiny_encoder, copy)
    other = recipe.model_copy(update={"embed": EmbedSettings(encoder=str(copy))})
    assert sentences.fingerprint(str(copy)) == sentences.fingerprint(tiny_encoder)
    sentences.fingerprint.cache_clear()
    weights = next(copy.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    plan = embed.plan(other, embedded)
    assert plan.folder == embed.plan(recipe, embedded).folder
    assert len(plan.pending) == len(plan.pieces)


@pytest.mark.parametrize(
    ("how", "again"),
    [
        ({"prompt": "a "}, True),
        ({"precision": "bf16"}, True),
        ({"device": "cpu"}, False),  # how fast, not what
        ({"batch_tokens": 7}, False),
        ({"fit_captions": 7}, False),
        ({"max_duplicates": 1}, False),
    ],
)
def test_settings_that_change_the_vectors_make_them_again(embedded, recipe, how, again):
    settings = EmbedSettings(encoder=recipe.embed.encoder, **how)
    assert bool(embed.plan_of(settings, embedded).pending) == again


def test_a_shard_of_which_nothing_was_accepted_has_no_embeddings(recipe, tmp_path):
    root = str(tmp_path)
    without_the_second_shard(recipe, root)
    tiny = recipe.embed.encoder
    ensemble = EmbedSettings(encoder="ensemble", members={tiny: 1, "lsa-8": 1, "trigrams-9": 1})
    run_all(ensemble, root)
    for label, dim in (("tiny", 32), ("lsa-8", 8), ("trigrams-9", 9), ("ensemble", 49)):
        pieces = run_folder.read_index(f"{root}/3-embeddings/{label}")["pieces"]
        assert [p["captions"] > 0 for p in pieces] == [True, False, True, True, True]
        assert {p["dim"] for p in pieces} == {dim}


# ---- fitted encoders ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["tfidf-16", "trigrams-16", "lsa-16"])
def test_a_fitted_encoder_is_fitted_first_and_once(root, encoder):
    settings = EmbedSettings(encoder=encoder)
    with pytest.raises(StageMissing, match="run `halftone embed` first"):
        embed.plan_of(settings, root)
    assert run_all(settings, root) == [1, 5]
    assert run_all(settings, root) == [0, 0]
    vectors = vectors_of(root, "test", encoder)
    assert vectors.shape[1] == 16
    assert np.allclose(vectors, embed.encode(texts_of(root, "test"), settings, root), atol=1e-3)
    before = files_of(root, encoder)
    shutil.rmtree(Path(root, "3-embeddings", encoder))
    run_all(settings, root)
    assert files_of(root, encoder) == before


def test_a_fitted_encoder_knows_the_train_captions_alone(root):
    run_all(EmbedSettings(encoder="tfidf-999"), root)
    terms = {row["term"] for row in rows_of(root, "embed", "terms", "tfidf-999", "fitted")}
    words = {w for t in texts_of(root, "train") for w in _words(t)}
    assert terms == words and {w for t in texts_of(root, "test") for w in _words(t)} - words


def _words(text: str) -> list[str]:
    return re.findall(r"\w\w+", text.lower())


def test_other_terms_make_its_embeddings_again(root):
    settings = EmbedSettings(encoder="tfidf-16")
    assert run_all(settings, root) == [1, 5]
    fewer = settings.model_copy(update={"fit_captions": 20})
    assert run_all(fewer, root) == [1, 5]
    [terms] = run_folder.read_index(f"{root}/3-embeddings/tfidf-16/fitted")["pieces"]
    assert terms["captions"] == 20


def test_without_train_captions_nothing_is_fitted(root):
    uri = f"{root}/2-shards/index.json"
    index = store.read_json(uri)
    index["pieces"] = run_folder.of_split(index, "test")
    store.write_json(uri, index)
    with pytest.raises(InputError, match="there is no train split"):
        run_all(EmbedSettings(encoder="lsa"), root)
    with pytest.raises(InputError, match="is fitted in a run folder; name one"):
        embed.encode(["a"], EmbedSettings(encoder="lsa"))


# ---- ensembles ---------------------------------------------------------------------------------


def test_an_ensemble_s_members_lie_beside_it_and_its_cosines_are_their_means(root, tiny_encoder):
    members = {tiny_encoder: 3, "trigrams-16": 1}
    settings = EmbedSettings(encoder="ensemble", members=members)
    assert run_all(settings, root) == [0, 1, 5, 5]  # tiny was there
    joined, tiny, trigrams = (
        vectors_of(root, "train", label).astype(np.float64)
        for label in ("ensemble", "tiny", "trigrams-16")
    )
    assert joined.shape[1] == 32 + 16
    mean = 0.75 * tiny @ tiny.T + 0.25 * trigrams @ trigrams.T
    assert np.allclose(joined @ joined.T, mean, atol=3e-3)  # float16
    found = embed.encode(texts_of(root, "train"), settings, root)
    assert np.allclose(found, joined, atol=1e-3)


def test_an_ensemble_is_made_again_where_its_members_or_weights_changed(root, tiny_encoder):
    settings = EmbedSettings(encoder="ensemble", members={tiny_encoder: 1, "tfidf-9": 1})
    assert run_all(settings, root) == [0, 1, 5, 5]
    same = settings.model_copy(update={"members": {tiny_encoder: 2, "tfidf-9": 2}})
    assert run_all(same, root) == [0, 0, 0, 0]
    other = settings.model_copy(update={"members": {tiny_encoder: 1, "tfidf-9": 2}})
    assert run_all(other, root) == [0, 0, 0, 5]
    member = Path(root, "3-embeddings", "tiny")
    index = json.loads((member / "index.json").read_text())
    index["pieces"][2]["files"]["train-000002.parquet"]["sha256"] = "other"
    (member / "index.json").write_text(json.dumps(index))
    assert [p.name for p in embed.plan_of(other, root).pending] == ["train-000002"]


def test_an_ensemble_without_its_members_names_the_command(root):
    settings = EmbedSettings(encoder="ensemble", members={"tfidf": 1, "lsa": 1})
    with pytest.raises(StageMissing, match="nothing in .*tfidf; run `halftone embed` first"):
        embed.plan_of(settings, root)


def test_the_command_makes_an_ensemble_and_keeps_it(root, tiny_encoder, ray_here, capsys):
    members = json.dumps({tiny_encoder: 0.7, "trigrams-16": 0.3})
    command = [
        *("--recipe", "drawn_tiny", "--root", root, "--json"),
        *("--embed.encoder", "ensemble-a", "--embed.members", members),
    ]
    for made in (6 + 5, 0):
        main("embed", command)
        found = json.loads(capsys.readouterr().out)["models"]["main"]["embed"]
        assert (found["made"], found["encoder"]) == (made, "ensemble-a")
        assert found["captions"] == sum(len(texts_of(root, s)) for s in ("train", "val", "test"))
        assert 0 <= found["duplicates"] < 0.5


KILLED = """
import os, signal, sys
from pipeline.labels import embed
from schemas.settings import EmbedSettings

moves = int(sys.argv[1])
replace = os.replace

def killed(source, target):
    global moves
    moves -= 1
    if moves < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = killed
for step in embed.steps(EmbedSettings.model_validate_json(sys.argv[2]), sys.argv[3]):
    step.plan.finish({piece.name: step.make(piece) for piece in step.plan.pending})
"""


def test_killed_on_its_way_it_ends_with_the_same_bytes(embedded, root, tiny_encoder):
    settings = EmbedSettings(encoder="ensemble", members={tiny_encoder: 1, "trigrams-16": 1})
    undisturbed = f"{root}-undisturbed"
    shutil.copytree(embedded, undisturbed)
    run_all(settings, undisturbed)
    for moves in (0, 3, 6):  # the terms; their embeddings; the ensemble's
        command = [sys.executable, "-c", KILLED, str(moves), settings.model_dump_json(), root]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    run_all(settings, root)
    for label in ("trigrams-16/fitted", "trigrams-16", "ensemble"):
        assert files_of(root, label) == files_of(undisturbed, label)


# ---- guards ------------------------------------------------------------------------------------


def test_an_encoder_that_tells_nothing_apart_stops_the_stage(root, recipe, monkeypatch):
    monkeypatch.setattr(sentences, "encode", lambda texts, how: np.ones((len(texts), 4)) / 2)
    settings = EmbedSettings(encoder=recipe.embed.encoder, prompt="other")
    with pytest.raises(InputError, match="nearly the same vector"):
        run_all(settings, root)
    assert embed.plan_of(settings, root).pending


def test_captions_that_repeat_stop_the_stage(root, recipe):
    uri = f"{root}/2-shards/train-000000.parquet"
    table = parquet.read_table(uri)
    captions = table["captions"].to_pylist()
    for caption in captions[0]:
        caption["text"] = "again"
    place = table.schema.get_field_index("captions")
    table = table.set_column(place, table.schema.field(place), [captions])
    parquet.write_table(uri, table, "changed", {})
    settings = EmbedSettings(encoder=recipe.embed.encoder, max_duplicates=0, prompt="other")
    with pytest.raises(InputError, match="of the captions repeat another of their shard"):
        run_all(settings, root)
