"""The plan: its figures against what runs and losses really take, and what it refuses."""

import functools
import json

import pytest
import torch

from jobs.cli import main, recipes
from jobs.cluster import estimate, rates
from pipeline.formulas.kernels import rows as kernel_rows
from pipeline.formulas.losses import WeightedSum
from pipeline.formulas.streaming import lists_streamed
from pipeline.labels import label
from pipeline.models import towers
from pipeline.models.preprocessing import Preprocessing
from pipeline.sharding import ingest
from pipeline.storage import store
from pipeline.storage.run_folder import RunFolder
from pipeline.training.data import Split
from pipeline.training.loading import loader
from pipeline.training.sampler import Sampler
from schemas.settings import ClusterSettings, LabelSettings, ModelSettings, Recipe, TrainSettings
from tests.helpers.live_bytes import Peak
from tests.helpers.paths import ROOT
from tests.helpers.relevance_lists import embeddings
from tests.helpers.stages import sharded

COCO = ["--recipe", "coco_clip", "--samples", "100000"]
MANY = ["--workers", "32", "--train.lanes", "32", "--batch-size", "4096"]
GPUS = ["--cluster.nodes", "4", "--cluster.gpus", "8"]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Nothing is done by numba, and a block of lists at once."""
    for module in ("sort", "pairs", "smooth_rank"):
        monkeypatch.setattr(f"pipeline.formulas.kernels.{module}.compiled", lambda: None)
    monkeypatch.setitem(kernel_rows.CACHE, "cpu", kernel_rows.CACHE["cuda"])


def peak(names: list[str], rows: int, columns: int) -> int:
    """Bytes at the peak of forward and backward of a block of lists."""
    generator = torch.manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, 8, generator=generator)).requires_grad_()
        for n in (rows, columns)
    )
    same = torch.eye(rows, columns, dtype=torch.bool)
    relevance = torch.rand(rows, columns, generator=generator)
    loss = WeightedSum({name: {} for name in names})
    each = functools.partial(loss.each, time=5.0, scored=True)
    with Peak() as measured:
        total, _ = lists_streamed(each, images, texts, lambda some: (same, relevance))
        total.backward()
    return measured.most


@pytest.mark.parametrize(
    "names",
    [["info_nce"], ["smooth_ndcg"], ["triplet", "smooth_ndcg"], ["smooth_ndcg", "info_nce"]],
    ids="+".join,
)
def test_the_memory_of_a_loss_is_what_it_takes(names, as_on_a_gpu):
    settings = TrainSettings(losses={name: {} for name in names}, batch_size=2048, workers=8)
    assert peak(names, 256, 2048) == pytest.approx(estimate.loss_bytes(settings), rel=0.2)


def test_a_rate_that_was_measured_names_where():
    for name, rate in rates.RATES.items():
        if rate.measured.startswith("bench."):
            assert (ROOT / f"{rate.measured.replace('.', '/')}.py").exists(), name
        if rate.measured.endswith(".md"):
            assert (ROOT / rate.measured).exists(), name
        assert (
            rate.measured and rate.value > 0 and ("s a" in rate.unit or rate.unit.startswith("s "))
        )


# ---- against a run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Recipe, str]:
    root = str(tmp_path_factory.mktemp("plan") / "run")
    source = {"kind": "drawn", "train_images": 60, "val_images": 10, "test_images": 20}
    recipe = Recipe(
        name="t", source=source, shard={"samples": 16}, train={"batch_size": 8, "epochs": 3}
    )
    sharded(recipe, root)
    return recipe, root


def test_a_run_folder_is_counted_and_planned_as_it_is(run):
    recipe, root = run
    data = estimate.collection(recipe, root, None, 5, 1e5)
    assert data.images == {"train": 60, "val": 10, "test": 20} and "2-shards" in data.known
    found = {stage.name: stage for stage in estimate.stages(recipe, data, {"main": recipe})}
    index = RunFolder(root).index("shard")
    assert found["shard"].pieces == len(index["pieces"]) == 4 + 1 + 2
    stored = sum(store.list_files(RunFolder(root).folder("shard")).values())
    assert found["shard"].storage == pytest.approx(stored, rel=0.5)
    order = Sampler(
        Split(root, "train", preprocessing=Preprocessing.squash(32)),
        batch_size=8,
        lanes=8,
        pairs="caption",
        seed=0,
    )
    assert estimate.steps(recipe.train, data) == order.steps
    assert f"{3 * order.steps:,} steps" in found["train main"].note


def test_the_manifest_alone_is_counted_too(run, tmp_path):
    recipe, _ = run
    plan = ingest.plan(recipe, str(tmp_path))
    plan.finish({piece.name: ingest.write_part(piece) for piece in plan.pieces})
    data = estimate.collection(recipe, str(tmp_path), None, 5, 1e5)
    assert data.images == {"train": 60, "val": 10, "test": 20} and "1-manifest" in data.known
    assert data.captions == {"train": 300, "val": 50, "test": 100}


def planned(capsys, *argv) -> dict:
    main.main("plan", [*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_plan_is_a_document_and_a_table(capsys, tmp_path):
    at = ["--root", str(tmp_path / "none")]
    plan = planned(capsys, *COCO, *MANY, *GPUS, *at)
    stages = {stage["name"]: stage for stage in plan["stages"]}
    of_model = [f"{stage} main" for stage in ("train", "evaluate", "rerank", "search")]
    assert list(stages) == ["ingest", "shard", "embed", "label", *of_model]
    measured = {name: s["seconds"] for name, s in stages.items() if s["seconds"] is not None}
    assert set(measured) == {"shard", "label"}  # embed runs on GPUs here
    assert plan["hours"] == pytest.approx(sum(measured.values()) / 3600)
    on_cpus = planned(capsys, *COCO, *MANY, *GPUS, *at, "--embed.device", "cpu")["stages"][2]
    assert 30 < on_cpus["seconds"] < 120
    assert stages["shard"]["pieces"] == 105 and stages["embed"]["at_once"] == 32
    main.main("plan", [*COCO, *MANY, *GPUS, *at])
    table = capsys.readouterr().out
    assert "coco_clip on 4 nodes of 8 cores, 32 GB, 8 GPUs of 80 GB" in table
    assert "train main" in table and "hours" in table and "not measured" in table
    assert "`halftone train --dry-run` measures" in " ".join(table.split())
    assert not (tmp_path / "none").exists()


def test_variants_are_trained_each_and_the_data_is_made_once(capsys, tmp_path):
    names = [s["name"] for s in planned(capsys, "--root", str(tmp_path / "none"))["stages"]]
    assert names.count("shard") == 1
    assert [n for n in names if n.startswith("train")] == [
        f"train {name}" for name, _ in recipes.resolve("drawn", {}, None)
    ]


def test_more_nodes_help_until_the_pieces_are_used_up(run):
    recipe, _ = run
    data = estimate.Collection({"train": 64_000}, {"train": 320_000}, 1e5, "")
    times = []
    for nodes in (1, 2, 4, 8, 1000):
        cluster = recipe.cluster.model_copy(update={"nodes": nodes})
        some = recipe.model_copy(update={"cluster": cluster})
        times.append(estimate.stages(some, data, {})[2].seconds)
    assert times[0] / times[1] == pytest.approx(2, rel=0.05)
    assert times == sorted(times, reverse=True)


# ---- what cannot work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*COCO, "--workers", "16", "--train.lanes", "16"], "16 is more than the cluster's 8 CPUs"),
        ([*COCO, *MANY, "--cluster.gpus", "8"], "32 is more than the cluster's 8 GPUs"),
        ([*COCO, "--batch-size", "100"], "batch_size 100 does not divide into 8 lanes"),
        ([*COCO, "--train.lanes", "16", "--workers", "3"], "do not share out among 3 workers"),
        ([*COCO, "--batch-size", "131072", "--cluster.gpus", "1"], "do not fill one batch"),
        (
            [*COCO, "--batch-size", "65536", "--cluster.gpus", "1", "--cluster.gpu_memory_gb", "1"],
            "of them relevance, and has 1; lower train.batch_size or take more train.workers",
        ),
        ([*COCO, "--cluster.gpus", "1", "--cluster.storage_gb", "10"], "and 10 are free"),
        (["--recipe", "coco_clip"], "give the number of train images with --samples"),
        (
            [*COCO, "--samples", "40000000000"],
            "GB, and a node has 32; raise shard.samples",
        ),
        (
            [*COCO, *MANY, *GPUS, "--cluster.memory_gb", "8"],
            "8 training workers of main take",
        ),
        (
            [*COCO, *MANY, *GPUS, "--train.decode_workers", "99"],
            "GB of their node's memory, 79.2 of them decoding processes, and it has 32; lower",
        ),
        ([*COCO, "--shard.samples", "2000000"], "lower shard.samples, so that a shard has fewer"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(argv, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main("plan", [*argv, "--root", str(tmp_path / "none")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said and len(said.splitlines()) == 1


def test_what_is_planned_for_a_task_is_what_ray_is_told(run, tmp_path):
    """One formula: of a shard's lists, and of a ranking."""
    recipe, _ = run
    counts = {"train-000000": [5] * 40, "train-000001": [5] * 40}
    embeddings(str(tmp_path), counts, dim=estimate.DIM)
    of_hand = recipe.model_copy(
        update={"embed": recipe.embed.model_copy(update={"encoder": "hand"})}
    )
    told = {piece.memory for piece in label.plan(of_hand, str(tmp_path)).pieces}
    data = estimate.Collection({"train": 80}, {"train": 400}, 1e5, "")
    assert told == {estimate.of_label(of_hand, data, 200)}


def test_the_memory_of_lists_does_not_grow_with_the_split():
    recipe = Recipe(name="t")
    small, large = (
        estimate.Collection({"train": n}, {"train": n}, 1e5, "") for n in (10**6, 10**9)
    )
    assert estimate.of_label(recipe, small, 1000) == estimate.of_label(recipe, large, 1000) < 1e9
    tiny = estimate.Collection({"train": 10**4}, {"train": 10**4}, 1e5, "")  # kept by its process
    kept = estimate.of_label(recipe, tiny, 1000) - estimate.of_label(recipe, large, 1000)
    assert kept > 4 * estimate.DIM * 10**4
    cells = recipe.model_copy(update={"label": LabelSettings(approximate_above=10**6)})
    assert estimate.of_label(cells, small, 1000) == estimate.of_label(recipe, small, 1000)
    assert 5e8 < estimate.of_label(cells, large, 1000) < 1e9


def test_what_label_fetches_is_told_where_it_is_much():
    def note(captions: int, **how) -> str:
        recipe = Recipe(name="t", cluster={"memory_gb": 1000}, **how)
        data = estimate.Collection({"train": captions}, {"train": captions}, 1e5, "")
        return {s.name: s for s in estimate.stages(recipe, data, {})}["label"].note

    assert note(10**5) == ""
    assert "each node fetches up to 4.0 GB of vectors" in note(5 * 10**6)
    assert "each task, not each node" in note(5 * 10**7)
    assert "fetches" not in note(5 * 10**7, label={"approximate_above": 10**6})


def test_fewer_shards_than_lanes_are_refused_among_nodes_and_told_on_one(capsys, tmp_path):
    at = ["--root", str(tmp_path / "none")]
    with pytest.raises(SystemExit):
        main.main("plan", ["--recipe", "drawn_tiny", "--cluster.nodes", "2", *at])
    said = capsys.readouterr().err
    assert "4 train shards for 8 lanes, and 2 nodes would fetch the same shards" in said
    assert any("4 train shards for 8 lanes" in w for w in _warned(capsys, "drawn_tiny", at))
    assert not any("lanes" in w for w in _warned(capsys, "drawn", at))


def _warned(capsys, recipe: str, at: list[str]) -> list[str]:
    return [stage["note"] for stage in planned(capsys, "--recipe", recipe, *at)["stages"]]


def test_a_worker_needs_less_among_others_and_relevance_only_where_a_loss_is_graded():
    def needs(**settings) -> dict[str, float]:
        given = {"batch_size": 64, "losses": {"smooth_ndcg": {}}, **settings}
        return estimate.worker_bytes(TrainSettings(**given), ModelSettings(dim=32), 4.2)

    assert needs(workers=4)["loss"] == needs()["loss"] / 4
    assert needs(workers=4, list_rows=4)["loss"] == needs()["loss"] / 16
    captions = estimate.DIM * (64 + 16 * 5)  # of all pairs, and of own images
    assert needs(workers=4)["relevance"] == 4 * (captions + 16 * 64)
    assert needs(losses={"info_nce": {}})["relevance"] == 0
    # Long lists: a block of them, however many there are, which is as long as they are.
    assert needs(batch_size=65536)["loss"] == 2 * needs(batch_size=32768)["loss"]


def test_memory_is_that_of_the_fullest_node(capsys, tmp_path):
    """Eight workers on three nodes: three on one of them, of 2.8 GB."""
    data = ["--samples", "100000", "--batch-size", "65536", "--workers", "8"]
    nodes = ["--cluster.nodes", "3", "--cluster.cpus", "4", "--root", str(tmp_path / "none")]
    planned(capsys, *data, *nodes, "--cluster.memory_gb", "32", "--name", "info_nce")
    with pytest.raises(SystemExit):
        planned(capsys, *data, *nodes, "--cluster.memory_gb", "2.8", "--name", "info_nce")
    assert "and has 0.933333; lower train.batch_size" in capsys.readouterr().err


def test_settings_of_clusters_that_are_gone_are_let_by_in_old_run_folders():
    assert ClusterSettings(**{"nodes": 2, "gpu_tflops": 100.0}) == ClusterSettings(nodes=2)


def test_the_memory_of_a_worker_on_its_node_does_not_grow_with_the_collection():
    """What it was measured to take of its data, and what a model of its size has."""
    recipe = Recipe(name="t", shard={"samples": 10_000}, model={"image_size": 224})
    few, many = (
        estimate.host_bytes(
            recipe, estimate.Collection({"train": n}, {"train": n}, 1e5, ""), here=1
        )
        for n in (10**6, 10**7)
    )
    assert sum(few.values()) < sum(many.values()) < 1.01 * sum(few.values())
    assert few["captions and vectors"] > 178e6  # docs/scale.md
    built = towers.build(recipe.model, vocabulary=range(estimate.WORDS), features=None)
    held = sum(p.numel() * p.element_size() for p in built.parameters())
    assert estimate.weights(recipe.model) == held and few["the model"] == 4 * held


def test_what_is_planned_of_the_loader_is_what_it_does():
    names = ("AHEAD", "AHEAD_BYTES", "READY", "KEPT_BYTES", "MOST_WORKERS")
    assert all(getattr(rates, name) == getattr(loader, name) for name in names)
