"""What a recipe asks of a cluster: pieces, time, memory, storage, network and cost by stage.

Times follow from the rates of `jobs/cluster/rates.py`; memory and storage from the formats and,
for a loss, from peaks that were measured.
"""

import math
from dataclasses import dataclass

from jobs.cluster import rates
from jobs.cluster.rates import of as rate
from jobs.cluster.tower_cost import Towers, towers
from pipeline.errors import InputError
from pipeline.formulas.losses import GRADED
from pipeline.labels.encoders import fitted
from pipeline.sharding import ingest
from pipeline.storage import run_folder
from schemas.settings import ClusterSettings, ModelSettings, Recipe, TrainSettings

GB = 1e9
WORDS = 10_000  # of a vocabulary, where it is not known
TOKENS = 13  # of a caption
ENCODER_DIM = 384


@dataclass(frozen=True)
class Collection:
    """Images and captions by split, and the bytes of an image."""

    images: dict[str, int]
    captions: dict[str, int]
    image_bytes: float
    known: str  # where that is from

    def held(self) -> str:
        """Its counts in words."""
        return "; ".join(
            f"{split} {images:,} images, {self.captions.get(split, 0):,} captions"
            for split, images in self.images.items()
        )


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes on the cluster."""

    name: str
    pieces: int
    at_once: int  # pieces or workers that run together
    piece_seconds: float
    seconds: float
    memory: float  # bytes of a task or a worker
    network: float  # bytes over the network, all nodes together
    storage: float  # bytes it leaves
    basis: str  # measured or assumed
    note: str = ""


# ---- the collection ----------------------------------------------------------------------------


def collection(
    recipe: Recipe, root: str, samples: int | None, captions: float, image_bytes: float
) -> Collection:
    """That of the run folder; else of `samples` train images; else what the recipe would draw."""
    if samples is not None:
        counts = {"train": samples, "test": min(5000, samples)}
        texts = {split: round(n * captions) for split, n in counts.items()}
        return Collection(counts, texts, image_bytes, "assumed from --samples")
    if index := run_folder.read_index(run_folder.folder(root, "shard")):
        return _of_shards(index["pieces"])
    if run_folder.read_index(run_folder.folder(root, "ingest")):
        return _of_manifest(recipe, root, image_bytes)
    if recipe.source.kind != "drawn":
        raise InputError(
            f"nothing is known of the collection: no manifest in {root}, and no --samples; run "
            "`halftone ingest` first or give the number of train images with --samples"
        )
    source = recipe.source
    counts = {s: getattr(source, f"{s}_images") for s in ("train", "val", "test")}
    texts = {split: 5 * n for split, n in counts.items()}
    return Collection(counts, texts, 0.4 * source.image_size**2, "assumed from source's settings")


def _of_shards(pieces: list[dict]) -> Collection:
    images: dict[str, int] = {}
    texts: dict[str, int] = {}
    for entry in pieces:
        images[entry["split"]] = images.get(entry["split"], 0) + entry["samples"]
        texts[entry["split"]] = texts.get(entry["split"], 0) + entry["captions"]
    stored = sum(entry["files"][f"{entry['name']}.tar"]["bytes"] for entry in pieces)
    each = stored / max(1, sum(images.values())) - rates.SAMPLE_BYTES
    return Collection(images, texts, max(500.0, each), "counted in 2-shards")


def _of_manifest(recipe: Recipe, root: str, image_bytes: float) -> Collection:
    manifest = ingest.read(run_folder.folder(root, "ingest")).combine_chunks()
    lengths = manifest["captions"].combine_chunks().value_lengths().to_numpy()
    splits = ingest.splits(manifest, recipe.source)
    counts = {split: len(order) for split, order in splits.items()}
    texts = {split: int(lengths[order].sum()) for split, order in splits.items()}
    return Collection(counts, texts, image_bytes, "counted in 1-manifest")


# ---- stages ------------------------------------------------------------------------------------


def stages(recipe: Recipe, data: Collection, trainings: dict[str, Recipe]) -> list[StageEstimate]:
    """All stages in order; a model has a training and an evaluation of its own."""
    out = [_ingest(recipe, data), _shard(recipe, data), _embed(recipe, data), _label(recipe, data)]
    for name, own in trainings.items():
        cost = towers(own.model, words=WORDS, tokens=TOKENS)
        out += [_train(own, data, cost, name), _evaluate(own, data, cost, name)]
    return out


def shards(recipe: Recipe, data: Collection) -> dict[str, int]:
    """Shards of every split."""
    return {s: math.ceil(n / recipe.shard.samples) for s, n in data.images.items() if n}


def _tasks(name: str, cluster: ClusterSettings, pieces: int, cpu: float, **takes) -> StageEstimate:
    """A stage of equal tasks: waves of as many as fit into CPUs and memory."""
    memory, moved = takes["memory"], takes["moved"]
    fit = int(cluster.memory_gb * GB // memory)
    if fit < 1:
        raise InputError(
            f"a task of {name} takes {memory / GB:,.0f} GB and a node has {cluster.memory_gb:g}; "
            f"{takes['too_large']}"
        )
    slots = takes.get("slots") or min(cluster.cpus, fit)
    at_once = min(pieces, slots * cluster.nodes)
    lines = cluster.bandwidth_gbit * 1e9 / 8 / min(slots, max(1, at_once // cluster.nodes))
    each = max(cpu, 1e-9) / pieces + moved / pieces / lines
    seconds = rate("start") + max(math.ceil(pieces / at_once) * each, pieces * rate("task"))
    few = 2 * at_once < cluster.nodes * slots and seconds > 60
    note = f"{pieces:,} pieces keep {at_once:,} of {cluster.nodes * slots:,} busy" if few else ""
    stored, basis = takes["storage"], takes["basis"]
    return StageEstimate(name, pieces, at_once, each, seconds, memory, moved, stored, basis, note)


def _ingest(recipe: Recipe, data: Collection) -> StageEstimate:
    rows = sum(data.images.values())
    stored = rows * rates.MANIFEST_BYTES
    takes = {"memory": rates.TASK_GB * GB, "moved": stored, "storage": stored, "basis": "assumed"}
    pieces = max(1, rows // 100_000)
    cpu = rows * rate("ingest")
    return _tasks("ingest", recipe.cluster, pieces, cpu, **takes, too_large="use larger nodes")


def _shard(recipe: Recipe, data: Collection) -> StageEstimate:
    samples, pieces = sum(data.images.values()), sum(shards(recipe, data).values())
    check = rate("check") * data.image_bytes if recipe.shard.decode_check else 0
    stored = samples * (data.image_bytes + rates.SAMPLE_BYTES)
    takes = {
        "memory": rates.TASK_GB * GB,
        "moved": samples * data.image_bytes + stored,
        "storage": stored,
        "basis": "measured",
        "too_large": "use larger nodes",
    }
    return _tasks("shard", recipe.cluster, pieces, samples * (rate("shard") + check), **takes)


def _embed(recipe: Recipe, data: Collection) -> StageEstimate:
    captions, pieces = sum(data.captions.values()), sum(shards(recipe, data).values())
    gpu = recipe.cluster.gpus if recipe.embed.device != "cpu" else 0
    kind = "fitted" if fitted.is_fitted(recipe.embed.encoder) else "embed_gpu" if gpu else "embed"
    takes = {
        "memory": (rates.TASK_GB + 0.3) * GB,
        "moved": captions * (100 + ENCODER_DIM * rates.EMBEDDING_BYTES),
        "storage": captions * ENCODER_DIM * rates.EMBEDDING_BYTES,
        "basis": "assumed" if kind == "embed_gpu" else "measured",
        "too_large": "use larger nodes",
        "slots": gpu if kind == "embed_gpu" else 0,
    }
    return _tasks("embed", recipe.cluster, pieces, captions * rate(kind), **takes)


def _label(recipe: Recipe, data: Collection) -> StageEstimate:
    """A task holds all captions of its split, and compares its own with them."""
    counts = shards(recipe, data)
    largest = max(data.captions.values())
    cpu = sum(
        n * (rate("label_query") + rate("label_pair") * ENCODER_DIM * n)
        for n in data.captions.values()
    )
    queries = sum(data.images.values()) + sum(data.captions.values())
    stored = queries * recipe.label.top_k * rates.LIST_BYTES
    read = sum(counts[s] * data.captions[s] for s in counts) * 2 * ENCODER_DIM
    takes = {
        "memory": rates.TASK_GB * GB + 4 * ENCODER_DIM * largest,
        "moved": read + stored,
        "storage": stored,
        "basis": "measured",
        "too_large": "cut the collection into splits that are labelled by themselves "
        "(source.split_column)",
    }
    return _tasks("label", recipe.cluster, sum(counts.values()), cpu, **takes)


# ---- training ----------------------------------------------------------------------------------


def loss_bytes(losses: list[str], rows: int, columns: int) -> float:
    """Peak bytes of forward and backward of a sum of losses, both directions of a worker's rows."""
    more = sum(rates.SCORES[name] - rates.SHARED for name in losses)
    return 4.0 * rows * columns * (rates.SHARED + more)


def relevance_bytes(rows: int, columns: int, workers: int) -> float:
    """Bytes of the relevance of a worker's rows; among workers each gathers the whole matrix."""
    return 4.0 * columns * (3 * rows + (2 * columns if workers > 1 else 0))


def worker_bytes(settings: TrainSettings, model: ModelSettings, cost: Towers) -> dict[str, float]:
    """Bytes of one training worker, by what they are for."""
    rows, columns = settings.batch_size // settings.workers, settings.batch_size
    states = {"sgd": 3, "adam": 4, "adamw": 4}[settings.optimizer] + (1 if settings.ema else 0)
    weights = 4.0 * cost.parameters * states
    if settings.sharding == "fsdp":
        weights /= settings.workers
    encoded = min(settings.chunk or rows, rows)
    losses = list(settings.losses)
    graded = any(name in GRADED for name in losses)
    return {
        "weights": weights,
        "activations": cost.activations * encoded,
        "vectors": 4.0 * model.dim * (4 * columns + 4 * rows),
        "loss": loss_bytes(losses, rows, columns),
        "relevance": relevance_bytes(rows, columns, settings.workers) if graded else 0.0,
    }


def steps(settings: TrainSettings, data: Collection) -> int:
    """Steps of an epoch: whole batches of each round, in which an image is seen once."""
    images, captions = data.images.get("train", 0), data.captions.get("train", 0)
    rounds = max(1, round(captions / max(1, images))) if settings.pairs == "caption" else 1
    if images < settings.batch_size:
        raise InputError(
            f"{images} train images do not fill one batch of {settings.batch_size}; lower "
            "--train.batch_size"
        )
    return rounds * (images // settings.batch_size)


def _train(recipe: Recipe, data: Collection, cost: Towers, name: str) -> StageEstimate:
    settings, cluster = recipe.train, recipe.cluster
    together = check_workers(settings, cluster)
    check_lanes(recipe, data)
    count = settings.epochs * steps(settings, data)
    parts = worker_bytes(settings, recipe.model, cost)
    memory = sum(parts.values()) + (0 if cluster.gpus else rates.TASK_GB * GB)
    room = cluster.gpu_memory_gb if cluster.gpus else cluster.memory_gb / together
    if memory > room * GB:
        largest = max(parts, key=lambda part: parts[part])
        raise InputError(
            f"a training worker of {name} needs {memory / GB:,.1f} GB, {parts[largest] / GB:,.1f} "
            f"of them {largest}, and has {room:g}; "
            + {
                "weights": "set train.sharding fsdp",
                "activations": "set train.chunk, or model.gradient_checkpointing",
            }.get(largest, "lower train.batch_size or take more train.workers")
        )
    moved = step_bytes(settings, recipe.model, cost) if cluster.nodes > 1 else 0.0
    line = cluster.bandwidth_gbit * 1e9 / 8  # a ring passes every node's line once
    compute, waits = step_seconds(settings, cluster, cost, recipe.model)
    each = max(compute, waits) + moved / line
    read = count * settings.batch_size * data.image_bytes
    note = f"{count:,} steps of {each:.3g} s"
    note += ", waits for pictures: raise train.decode_threads" if waits > compute else ""
    return StageEstimate(
        name=f"train {name}",
        pieces=1,
        at_once=settings.workers,
        piece_seconds=each,
        seconds=rate("start_train") + count * each,
        memory=memory,
        network=count * moved * cluster.nodes + read,
        storage=4.0 * cost.parameters * 3 * 2,
        basis="assumed" if cluster.gpus or not cost.counted else "measured",
        note=note,
    )


def check_workers(settings: TrainSettings, cluster: ClusterSettings) -> int:
    """Workers of the fullest node; refuses more workers than there are places for."""
    each = cluster.gpus or cluster.cpus
    what = "GPUs" if cluster.gpus else "CPUs"
    if settings.workers > each * cluster.nodes:
        raise InputError(
            f"train.workers {settings.workers} is more than the cluster's {each * cluster.nodes} "
            f"{what}; lower it or take more nodes"
        )
    return math.ceil(settings.workers / cluster.nodes)


def check_lanes(recipe: Recipe, data: Collection) -> None:
    """Refuses fewer train shards than lanes among nodes: several would fetch the same shard."""
    if recipe.cluster.nodes > 1 and (few := _too_few(recipe, data)):
        raise InputError(
            f"{few}, and {recipe.cluster.nodes} nodes would fetch the same shards; lower "
            "shard.samples or train.lanes"
        )


def _too_few(recipe: Recipe, data: Collection) -> str:
    """The train shards and the lanes, where there are fewer shards than lanes."""
    count = shards(recipe, data).get("train", 0)
    return f"{count} train shards for {recipe.train.lanes} lanes" * (count < recipe.train.lanes)


def step_bytes(settings: TrainSettings, model: ModelSettings, cost: Towers) -> float:
    """Bytes a worker gets in a step: gradients, vectors and their gradients, relevance."""
    others = (settings.workers - 1) / settings.workers
    graded = any(name in GRADED for name in settings.losses)
    vectors = settings.batch_size * model.dim * 2
    relevance = settings.batch_size * (settings.batch_size + ENCODER_DIM) if graded else 0
    return 4.0 * others * (2 * cost.parameters + 3 * vectors + relevance)


def step_seconds(
    settings: TrainSettings, cluster: ClusterSettings, cost: Towers, model: ModelSettings
) -> tuple[float, float]:
    """(seconds of a step's arithmetic, seconds until its pictures are decoded) of a worker."""
    rows = settings.batch_size // settings.workers
    passes = 3 + bool(settings.chunk) + bool(model.gradient_checkpointing)
    flop = 1 / (cluster.gpu_tflops * 1e12) if cluster.gpus else rate("towers")
    pair = rate("loss_gpu") if cluster.gpus else rate("loss")
    compute = rows * cost.flops * passes * flop
    compute += len(settings.losses) * rows * settings.batch_size * pair
    if model.image == "regions":
        return compute, 0.0
    share = (model.image_size / 224) ** 2
    return compute, rows * rate("decode") * min(1.0, share) / settings.decode_threads


def _evaluate(recipe: Recipe, data: Collection, cost: Towers, name: str) -> StageEstimate:
    cluster, split = recipe.cluster, recipe.evaluate.split
    images, captions = data.images.get(split, 0), data.captions.get(split, 0)
    pieces = max(1, shards(recipe, data).get(split, 0))
    flop = 1 / (cluster.gpu_tflops * 1e12) if cluster.gpus else rate("towers")
    busy = captions * cost.flops * flop + images * captions * recipe.model.dim * rate("rank")
    stored = 4.0 * (images + captions) * recipe.model.dim
    takes = {
        "memory": rates.TASK_GB * GB + stored,
        "moved": images * data.image_bytes + stored * pieces,
        "storage": stored,
        "basis": "assumed" if cluster.gpus else "measured",
        "too_large": "evaluate a smaller split",
    }
    return _tasks(f"evaluate {name}", cluster, pieces, busy, **takes)


# ---- the whole ---------------------------------------------------------------------------------


def check_storage(found: list[StageEstimate], cluster: ClusterSettings) -> None:
    """Refuses storage that the run folder does not fit into."""
    needed = sum(stage.storage for stage in found) / GB
    if cluster.storage_gb and needed > cluster.storage_gb:
        largest = max(found, key=lambda stage: stage.storage)
        raise InputError(
            f"the run folder takes {needed:,.1f} GB, {largest.storage / GB:,.1f} of them "
            f"{largest.name}, and {cluster.storage_gb:g} are free; give it more room, or make "
            "pictures smaller with shard.resize"
        )


def described(cluster: ClusterSettings) -> str:
    """The cluster in words."""
    gpus = f", {cluster.gpus} GPUs of {cluster.gpu_memory_gb:g} GB" if cluster.gpus else ""
    node = f"{cluster.cpus} cores, {cluster.memory_gb:g} GB{gpus}"
    many = "s" * (cluster.nodes > 1)
    return f"{cluster.nodes} node{many} of {node}, {cluster.bandwidth_gbit:g} Gbit/s"


def warnings(recipe: Recipe, data: Collection, found: list[StageEstimate]) -> list[str]:
    """What works, but not well."""
    out = [f"{stage.name}: {stage.note}" for stage in found if " busy" in stage.note]
    if few := _too_few(recipe, data):
        out.append(f"{few}: several lanes read one shard; lower shard.samples")
    return out
