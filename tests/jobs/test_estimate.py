"""The plan: its figures against what runs and losses really take, and what it refuses."""

import json
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.cli import main, recipes
from jobs.cluster import estimate, rates, tower_cost
from pipeline.errors import InputError
from pipeline.formulas.losses import LOSSES, WeightedSum
from pipeline.sharding import ingest
from pipeline.storage import run_folder, store
from pipeline.training.data import Split
from pipeline.training.sampler import Sampler
from schemas.settings import ClusterSettings, ModelSettings, Recipe, TrainSettings
from tests.helpers.paths import ROOT
from tests.helpers.stages import sharded

COCO = ["--recipe", "coco_clip", "--samples", "100000"]
MANY = ["--workers", "32", "--train.lanes", "32", "--batch-size", "4096"]
GPUS = ["--cluster.nodes", "4", "--cluster.gpus", "8"]


class Peak(TorchDispatchMode):
    """Most bytes of the tensors that lived at once while it was entered."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.alive.pop(key)


@pytest.fixture
def torch_alone(monkeypatch):
    """As on a GPU: nothing is done by numba."""
    for module in ("sort", "pairs"):
        monkeypatch.setattr(f"pipeline.formulas.kernels.{module}.compiled", lambda: None)


def peak(names: list[str], size: int) -> int:
    """Bytes at the peak of forward and backward of both directions."""
    generator = torch.manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(size, 16, generator=generator)).requires_grad_()
        for _ in range(2)
    )
    same, relevance = torch.eye(size, dtype=torch.bool), torch.rand(size, size, generator=generator)
    loss = WeightedSum({name: {} for name in names})
    with Peak() as measured:
        i2t = loss.terms(images @ texts.T, same, relevance, time=5.0)
        t2i = loss.terms(texts @ images.T, same, relevance.T, time=5.0)
        sum(i2t[name].mean() + t2i[name].mean() for name in names).backward()
    return measured.most


@pytest.mark.parametrize(
    "names", [["info_nce"], ["smooth_ndcg"], ["triplet", "smooth_ndcg"]], ids="+".join
)
def test_the_memory_of_a_loss_is_what_it_takes(names, torch_alone):
    assert peak(names, 1024) == pytest.approx(estimate.loss_bytes(names, 1024, 1024), rel=0.2)


def test_every_loss_has_its_memory():
    assert set(rates.SCORES) == set(LOSSES)


def test_a_rate_that_was_measured_names_where():
    for name, rate in rates.RATES.items():
        if rate.measured.startswith("bench."):
            assert (ROOT / f"{rate.measured.replace('.', '/')}.py").exists(), name
        if rate.measured.endswith(".md"):
            assert (ROOT / rate.measured).exists(), name
        assert rate.value > 0 and ("s a" in rate.unit or rate.unit.startswith("s "))


# ---- towers ------------------------------------------------------------------------------------


def test_the_towers_are_counted_on_themselves():
    settings = ModelSettings(image="regions", dim=32, word_dim=8)
    cost = tower_cost.towers(settings, words=100, tokens=5)
    model = 100 * 8 + 3 * 32 * (8 + 32 + 2) + 2048 * 32 + 32  # words, GRU, regions
    assert cost.counted and cost.parameters == pytest.approx(model, rel=0.02)
    arithmetic = 2 * (36 * 2048 * 32 + 5 * 3 * 32 * (8 + 32))
    assert cost.flops == pytest.approx(arithmetic, rel=0.1)
    deeper = tower_cost.towers(ModelSettings(image="regions", dim=64), words=100, tokens=5)
    assert deeper.activations > cost.activations > 36 * 32 * 4


def test_clip_costs_what_is_published():
    settings = ModelSettings(
        image="pretrained", text="pretrained", pretrained="openai/clip-vit-base-patch32"
    )
    cost = tower_cost.towers(settings, words=1, tokens=1)
    assert cost.parameters == 151_277_312 and not cost.counted
    assert 14e9 < cost.flops < 15.5e9  # 4.4 and 3 G multiply-adds
    saving = settings.model_copy(update={"gradient_checkpointing": True})
    assert 15 * tower_cost.towers(saving, words=1, tokens=1).activations < cost.activations


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
    index = run_folder.need_index(run_folder.folder(root, "shard"), "shard")
    assert found["shard"].pieces == len(index["pieces"]) == 4 + 1 + 2
    stored = sum(store.list_files(run_folder.folder(root, "shard")).values())
    assert found["shard"].storage == pytest.approx(stored, rel=0.5)
    order = Sampler(
        Split(root, "train", image_size=32), batch_size=8, lanes=8, pairs="caption", seed=0
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
    plan = planned(capsys, *COCO, *MANY, *GPUS, *at, "--cluster.price_per_hour", "30")
    stages = {stage["name"]: stage for stage in plan["stages"]}
    assert list(stages) == ["ingest", "shard", "embed", "label", "train main", "evaluate main"]
    assert plan["hours"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]) / 3600)
    assert plan["cost"] == pytest.approx(plan["hours"] * 4 * 30)
    assert stages["shard"]["pieces"] == 105 and stages["embed"]["at_once"] == 32
    assert stages["shard"]["basis"] == "measured" and stages["train main"]["basis"] == "assumed"
    main.main("plan", [*COCO, *MANY, *GPUS, *at])
    table = capsys.readouterr().out
    assert "coco_clip on 4 nodes of 8 cores, 32 GB, 8 GPUs of 80 GB" in table
    assert "train main" in table and "hours" in table
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
        times.append(estimate._embed(some, data).seconds - rates.of("start"))
    assert times[0] / times[1] == pytest.approx(2, rel=0.05)
    assert times == sorted(times, reverse=True)


def test_pictures_that_hold_up_a_gpu_are_told(capsys, tmp_path):
    at = ["--root", str(tmp_path / "none")]
    stages = planned(capsys, *COCO, *MANY, *GPUS, *at, "--train.decode_threads", "1")["stages"]
    fast = planned(capsys, *COCO, *MANY, *GPUS, *at, "--train.decode_threads", "16")["stages"]
    assert "raise train.decode_threads" in stages[4]["note"]
    assert "decode_threads" not in fast[4]["note"] and fast[4]["seconds"] < stages[4]["seconds"]


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
            [*COCO, "--batch-size", "65536", "--cluster.gpus", "1"],
            "of them loss, and has 80; lower train.batch_size or take more train.workers",
        ),
        ([*COCO, "--cluster.gpus", "1", "--cluster.gpu_memory_gb", "2"], "set train.sharding fsdp"),
        (
            [*COCO, "--train.chunk", "0", "--model.gradient_checkpointing", "false"]
            + ["--cluster.gpus", "1", "--cluster.gpu_memory_gb", "16"],
            "of them activations, and has 16; set train.chunk",
        ),
        ([*COCO, "--cluster.gpus", "1", "--cluster.storage_gb", "10"], "and 10 are free"),
        (["--recipe", "coco_clip"], "give the number of train images with --samples"),
        (["--recipe", "coco_clip", "--samples", "400000000"], "source.split_column"),
        ([*COCO, "--model.pretrained", "google/siglip"], "is not known here"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(argv, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main.main("plan", [*argv, "--root", str(tmp_path / "none")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said and len(said.splitlines()) == 1


def test_fewer_shards_than_lanes_are_refused_among_nodes_and_told_on_one(capsys, tmp_path):
    at = ["--root", str(tmp_path / "none")]
    with pytest.raises(SystemExit):
        main.main("plan", ["--recipe", "drawn_tiny", "--cluster.nodes", "2", *at])
    said = capsys.readouterr().err
    assert "4 train shards for 8 lanes, and 2 nodes would fetch the same shards" in said
    assert any("4 train shards for 8 lanes" in w for w in _warned(capsys, "drawn_tiny", at))
    assert not any("lanes" in w for w in _warned(capsys, "drawn", at))


def _warned(capsys, recipe: str, at: list[str]) -> list[str]:
    return planned(capsys, "--recipe", recipe, *at)["warnings"]


def test_a_worker_needs_less_with_fsdp_and_more_with_averages():
    cost = tower_cost.Towers(10**8, 1e9, 1e6, True)
    model = ModelSettings()

    def weights(**settings) -> float:
        given = TrainSettings(**{"workers": 4, **settings})
        return estimate.worker_bytes(given, model, cost)["weights"]

    assert weights() == 4 * 4e8 and weights(sharding="fsdp") == 4e8
    assert weights(ema=0.9) == 5 * 4e8 and weights(optimizer="sgd") == 3 * 4e8


def test_workers_on_the_fullest_node():
    cluster = ClusterSettings(nodes=3, cpus=4)
    assert estimate.check_workers(TrainSettings(workers=8), cluster) == 3
    with pytest.raises(InputError, match="more than the cluster's 12"):
        estimate.check_workers(TrainSettings(workers=16, lanes=16), cluster)
