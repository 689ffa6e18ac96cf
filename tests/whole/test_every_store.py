"""The stages in every kind of store: the same pieces, the same bytes, resumed in the same way."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from jobs.cli.main import main
from pipeline.evaluation import tower_vectors
from pipeline.labels import embed, label
from pipeline.models.preprocessing import Preprocessing
from pipeline.sharding import ingest, shard
from pipeline.storage import parquet, store
from pipeline.storage.run_folder import RunFolder
from pipeline.training import saved_model, train
from pipeline.training.data import Split
from schemas.settings import Recipe
from tests.helpers.stages import TINY

STAGES = {
    "1-manifest": (ingest.plan, ingest.write_part),
    "2-shards": (shard.plan, shard.write_shard),
    "3-embeddings/tiny": (embed.plan, embed.write_embeddings),
    "4-relevance/tiny": (label.plan, label.write_relevance),
}
KINDS = ("disk", "file", "memory", "s3")


def small(encoder: str, **sections) -> Recipe:
    counts = {"train_images": 20, "val_images": 4, "test_images": 6, "image_size": 32}
    training = {"epochs": 2, "batch_size": 8, "workers": 1, "lanes": 2}
    return Recipe(
        name="t",
        source={"kind": "drawn", **counts},
        shard={"samples": 8} | sections.get("shard", {}),
        embed={"encoder": encoder},
        model={"dim": 8, "width": 4, "image_size": 32, "word_dim": 8, "min_word_count": 1},
        train={"losses": {"info_nce": {"weight": 1.0}}, **training},
    )


def run(recipe: Recipe, root: str, stages=tuple(STAGES)) -> dict[str, list[str]]:
    """The names of the pieces that were made, by stage."""
    made = {}
    for stage in stages:
        plan_of, make = STAGES[stage]
        plan = plan_of(recipe, root)
        made[stage] = [piece.name for piece in plan.pending]
        if not plan.complete:
            plan.finish({piece.name: make(piece) for piece in plan.pending})
    return made


def files(root: str, stages=tuple(STAGES)) -> dict[str, str]:
    """Hash of every file of the stages, by name."""
    return {
        f"{stage}/{name}": store.sha256(store.read_bytes(store.join(root, stage, name)))
        for stage in stages
        for name in store.list_files(store.join(root, stage))
    }


@pytest.fixture(scope="module")
def roots(tmp_path_factory, bucket, tiny_encoder) -> dict[str, str]:
    """The run folder of the same run in every kind of store."""
    at = tmp_path_factory.mktemp("storage")
    roots = {
        "disk": f"{at}/disk",
        "file": f"file://{at}/file",
        "memory": f"memory://{at.name}",
        "s3": f"{bucket}/{at.name}",
    }
    for root in roots.values():
        run(small(tiny_encoder), root)
    return roots


@pytest.fixture
def copy(roots, folder) -> str:
    """A copy of the finished run, in the same kind of store as `folder`."""
    for stage in STAGES:
        for name in store.list_files(store.join(roots["disk"], stage)):
            data = store.read_bytes(store.join(roots["disk"], stage, name))
            store.write_bytes(store.join(folder, stage, name), data)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_store_holds_the_same_bytes(roots, kind):
    here = files(roots[kind])
    assert here == files(roots["disk"])
    assert len([name for name in here if name.endswith(".tar")]) == 5


def test_a_run_moved_to_another_store_has_nothing_to_do(copy, tiny_encoder):
    assert set(map(tuple, run(small(tiny_encoder), copy).values())) == {()}


def test_what_is_lost_is_made_again_with_the_same_bytes(copy, roots, tiny_encoder):
    folder = store.join(copy, "2-shards")
    store.remove(store.join(folder, "train-000001.tar"))
    store.remove(store.join(folder, "val-000000.parquet"))
    store.remove(store.join(copy, "4-relevance/tiny/test-000000.parquet"))
    made = run(small(tiny_encoder), copy)
    assert made["2-shards"] == ["train-000001", "val-000000"]
    assert made["3-embeddings/tiny"] == [] and made["4-relevance/tiny"] == ["test-000000"]
    assert files(copy) == files(roots["disk"])


@pytest.mark.parametrize("share", [0, 0.5])
def test_what_is_torn_is_made_again_with_the_same_bytes(copy, roots, tiny_encoder, share):
    torn = ("2-shards/train-000000.tar", "2-shards/test-000000.parquet")
    for name in torn:
        uri = store.join(copy, name)
        data = store.read_bytes(uri)
        store.write_bytes(uri, data[: int(share * len(data))])
    made = run(small(tiny_encoder), copy)
    assert made["2-shards"] == ["train-000000", "test-000000"]
    assert files(copy) == files(roots["disk"])


def test_without_its_index_a_stage_finds_its_pieces_done(copy, roots, tiny_encoder):
    tar = store.join(copy, "2-shards", "train-000000.tar")
    before = store.stamp(tar)
    store.remove(store.join(copy, "2-shards", "index.json"))
    run(small(tiny_encoder), copy)
    assert store.stamp(tar) == before
    assert files(copy) == files(roots["disk"])


def test_several_drivers_at_once_leave_what_one_leaves(roots, tiny_encoder, folder):
    """Each plans, makes what it finds undone in an order of its own, and writes the index."""
    recipe = small(tiny_encoder)
    run(recipe, folder, ["1-manifest"])
    together = threading.Barrier(4)

    def drive(number: int) -> None:
        together.wait()
        plan = shard.plan(recipe, folder)
        pieces = random.Random(number).sample(plan.pending, len(plan.pending))
        plan.finish({piece.name: shard.write_shard(piece) for piece in pieces})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(drive, range(4)))
    assert files(folder, ["2-shards"]) == files(roots["disk"], ["2-shards"])


def test_files_that_nobody_names_any_more_are_removed(copy, tiny_encoder):
    run(small(tiny_encoder, shard={"samples": 30}), copy)
    tars = sorted(n for n in files(copy, ["2-shards"]) if n.endswith(".tar"))
    assert tars == [f"2-shards/{split}-000000.tar" for split in ("test", "train", "val")]


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_read_by_offset(roots, kind):
    here, there = (
        Split(roots[k], "train", preprocessing=Preprocessing.squash(16)) for k in (kind, "disk")
    )
    for row in (0, 7, 8, 19):
        assert (here.image(row) == there.image(row)).all()


def test_a_model_trained_and_evaluated_from_any_store_is_the_same(copy, roots, tiny_encoder):
    def trained(root: str) -> tuple[dict, dict]:
        recipe = small(tiny_encoder)
        plan = train.plan(recipe, root, "main")
        train.fit(plan.pieces[0], lambda records: None)
        plan.finish({"model": saved_model.summary(plan.pieces[0])})
        vectors = tower_vectors.plan_vectors(recipe, root, "main")
        vectors.finish({p.name: tower_vectors.write_vectors(p) for p in vectors.pending})
        model = saved_model.load_model(RunFolder(root).folder("train", "main"))
        folder = store.join(root, "6-rankings", "main", "vectors")
        tables = {
            n: parquet.read_table(store.join(folder, n))
            for n in store.list_files(folder)
            if n.endswith(".parquet")
        }
        return model.towers.state_dict(), {n: t["vector"].to_pylist() for n, t in tables.items()}

    (here, vectors), (there, others) = trained(copy), trained(roots["disk"])
    assert all(torch.equal(here[name], there[name]) for name in there)
    assert vectors == others and len(vectors) > 0


def test_the_whole_command_gives_the_same_tars_and_numbers_on_s3(
    finished_run, ray_here, bucket, tiny_encoder, tmp_path, monkeypatch
):
    root = f"{bucket}/{tmp_path.name}"
    monkeypatch.setenv("HOME", str(tmp_path))  # where MLflow's database is
    main("run", [*TINY, "--root", root, "--encoder", tiny_encoder])
    shards = files(root, ["2-shards"])
    assert len(shards) == 11 and shards == files(finished_run, ["2-shards"])
    for stage in ("6-rankings", "8-reranked"):
        here, there = (
            store.read_json(store.join(at, stage, "main", "metrics.json"))["metrics"]
            for at in (root, finished_run)
        )
        assert here == there
    assert store.exists(store.join(root, "report.html"))
