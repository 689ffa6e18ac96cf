"""What a recipe asks of a cluster: pieces, time, memory and storage by stage.

Times follow from the rates of rates.py, and there is none where none was measured; memory and
storage from the formats and, for a loss, from peaks that were measured.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from jobs.cluster import rates
from jobs.cluster.rates import GB, TASK
from jobs.cluster.rates import of as rate
from pipeline.errors import InputError
from pipeline.evaluation import task_memory
from pipeline.formulas.losses import loss_named
from pipeline.formulas.streaming import rows_of_block
from pipeline.labels import cells as by_cells
from pipeline.labels import label
from pipeline.labels.encoders import fitted
from pipeline.models.towers import build
from pipeline.retrieval import cells
from pipeline.sharding import ingest, shard
from pipeline.sharding.manifest import dealing, layout, spans
from pipeline.storage.piece_table import column, sizes
from pipeline.storage.run_folder import RunFolder
from schemas.settings import ClusterSettings, ModelSettings, Recipe, TrainSettings

DIM = 384  # of a caption's vector
WORDS, FEATURES = 30_000, 2048  # of a vocabulary, and numbers of a region, where none is known
FEWER = "lower shard.samples, so that a shard has fewer captions"


@dataclass(frozen=True)
class Collection:
    """Images and captions by split, and the bytes of an image."""

    images: dict[str, int]
    captions: dict[str, int]
    image_bytes: float
    known: str  # where that is from

    def held(self) -> str:
        """Its counts in words."""
        texts = {split: self.captions.get(split, 0) for split in self.images}
        each = (f"{s} {n:,} images, {texts[s]:,} captions" for s, n in self.images.items())
        return "; ".join(each)


@dataclass(frozen=True)
class StageEstimate:
    """What one stage takes on the cluster."""

    name: str
    pieces: int
    at_once: int  # pieces or workers that run together
    seconds: float | None  # None: nothing like it was measured
    memory: float  # bytes of a task, or of a training's worker beside its towers
    storage: float  # bytes it leaves
    note: str = ""


def collection(
    recipe: Recipe, root: str, samples: int | None, captions: float, image_bytes: float
) -> Collection:
    """That of the run folder; else of `samples` train images; else what the recipe would draw."""
    if samples is not None:
        counts = {"train": samples, "test": min(5000, samples)}
        texts = {split: round(n * captions) for split, n in counts.items()}
        return Collection(counts, texts, image_bytes, "assumed from --samples")
    if index := RunFolder(root).known("shard"):
        return _of_shards(index["pieces"])
    if RunFolder(root).known("ingest"):
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


def _of_shards(pieces: Sequence[dict]) -> Collection:
    images, texts = Counter(), Counter()
    counts = (column(pieces, name) for name in ("split", "samples", "captions"))
    for split, samples, captions in zip(*counts, strict=True):
        images[split] += samples
        texts[split] += captions
    stored = sum(size for name, size in sizes(pieces) if name.endswith(".tar"))
    each = stored / max(1, images.total()) - rates.SAMPLE_BYTES
    return Collection(dict(images), dict(texts), max(500.0, each), "counted in 2-shards")


def _of_manifest(recipe: Recipe, root: str, image_bytes: float) -> Collection:
    run, said = RunFolder(root), "counted in 1-manifest"
    if large := shard.large(recipe, run):
        counts, texts = dealing.counted(large)
        return Collection(dict(counts), dict(texts), image_bytes, said)
    manifest = ingest.images(run.folder("ingest")).combine_chunks()
    lengths = manifest["captions"].combine_chunks().value_lengths().to_numpy()
    splits = layout.splits(manifest, recipe.source)
    images = {split: len(order) for split, order in splits.items()}
    captions = {split: int(lengths[order].sum()) for split, order in splits.items()}
    return Collection(images, captions, image_bytes, said)


def stages(recipe: Recipe, data: Collection, trainings: dict[str, Recipe]) -> list[StageEstimate]:
    """All stages in order; a model has a training and an evaluation of its own."""
    images, captions = sum(data.images.values()), sum(data.captions.values())
    pieces, counts = sum(shards(recipe, data).values()), data.captions.values()
    packing = rate("shard") + recipe.shard.decode_check * rate("check") * data.image_bytes
    is_fitted = fitted.is_fitted(recipe.embed.encoder)
    gpus = 0 if is_fitted or recipe.embed.device == "cpu" else recipe.cluster.gpus
    embedding = None if gpus else captions * rate("fitted" if is_fitted else "embed")
    pair = rate("label_pair") * DIM
    labelling = sum(n * (rate("label_query") + pair * n) for n in counts)
    vectors, lists = captions * DIM * rates.EMBEDDING_BYTES, (images + captions) * rates.LIST_BYTES
    each = captions / max(1, images) * recipe.shard.samples  # captions of a shard
    kept = lists * recipe.label.top_k
    if large := _by_cells(recipe, data):
        labelling = None
        kept += sum(data.captions[split] for split in large) * _cell_bytes(recipe)
    tasks = partial(_tasks, recipe.cluster)
    out = [
        tasks("ingest", max(1, images // 100_000), None, images * rates.MANIFEST_BYTES),
        tasks("shard", pieces, images * packing, images * (data.image_bytes + rates.SAMPLE_BYTES)),
        tasks("embed", pieces, embedding, vectors, 0.3 * GB, slots=gpus),
        tasks("label", pieces, labelling, kept, of_label(recipe, data, each), too_large=FEWER),
    ]
    out[-1] = replace(out[-1], note="; ".join(filter(None, [out[-1].note, _fetched(recipe, data)])))
    _check_driver(recipe, images, captions, pieces)
    for name, own in trainings.items():
        split = own.evaluate.split
        towers = 4.0 * own.model.dim * (data.images.get(split, 0) + data.captions.get(split, 0))
        ranked, smaller = shards(own, data).get(split, 1), "evaluate a smaller split"
        seen = data.images.get(split, 0), data.captions.get(split, 0)
        held = task_memory.rankings(*seen, DIM * seen[1], own, scored=False)
        out.append(_train(own, data, name))
        out.append(tasks(f"evaluate {name}", ranked, None, towers, held, too_large=smaller))
        if own.rerank.method:
            held = task_memory.rankings(*seen, DIM * seen[1], own, scored=True)
            out.append(tasks(f"rerank {name}", ranked, None, 0.0, held, too_large=smaller))
        searched = rates.SEARCHED * seen[0] * max(1.0, own.model.dim / 256) + weights(own.model)
        smaller = "search a smaller split"
        out.append(tasks(f"search {name}", 1, None, 0.0, searched, too_large=smaller))
    return out


def driver_bytes(images: int, captions: int, pieces: int) -> float:
    """Bytes that the command itself holds at its peak: of the manifest, and what it plans."""
    share = min(1, spans.ROWS / max(1, images))  # above that its rows are tasks' alone
    rows = share * (rates.ROW * images + rates.CAPTION * captions)
    return TASK + rows + rates.SHARD * pieces


def _check_driver(recipe: Recipe, images: int, captions: int, pieces: int) -> None:
    """Refuses a node that cannot hold what the command plans."""
    needed, room = driver_bytes(images, captions, pieces) / GB, recipe.cluster.memory_gb
    if needed > room:
        raise InputError(
            f"the command that plans {pieces:,} shards takes {needed:,.1f} GB, and a node has "
            f"{room:g}; raise shard.samples, or run it on a node with more memory"
        )


def of_label(recipe: Recipe, data: Collection, captions: float) -> int:
    """Bytes of the largest of label's tasks beside Python and torch; `captions` are a shard's."""
    settings = recipe.label
    each = round(captions)
    held = [label.task_memory(settings, each, each, DIM, n) for n in data.captions.values()]
    if _by_cells(recipe, data):
        keys = settings.top_k * len({name[2] for name in settings.lists})
        held.append(by_cells.of_part(by_cells.PER_PART + each, DIM))
        held.append(by_cells.of_group(cells.PER_GROUP, DIM, keys))
    return max(held)


def _fetched(recipe: Recipe, data: Collection) -> str:
    """What label's tasks fetch of a remote store, in words."""
    exact = {s: n for s, n in data.captions.items() if s not in _by_cells(recipe, data)}
    largest = max(exact.values(), default=0) * DIM * rates.EMBEDDING_BYTES
    who = "each node" if largest <= recipe.train.cache_gb * GB else "each task, not each node"
    return f"{who} fetches up to {largest / GB:,.1f} GB of vectors" if largest > GB else ""


def _by_cells(recipe: Recipe, data: Collection) -> list[str]:
    """The splits whose neighbours are looked for in near cells alone."""
    above = recipe.label.approximate_above
    return [s for s, n in data.captions.items() if above is not None and n > above]


def _cell_bytes(recipe: Recipe) -> float:
    """Stored a caption: its record, and the keys of its neighbours."""
    kinds = len({name[2] for name in recipe.label.lists})
    return 2 * DIM + 8 + 4 + 8 * kinds * recipe.label.top_k


def shards(recipe: Recipe, data: Collection) -> dict[str, int]:
    """Shards of every split."""
    return {s: math.ceil(n / recipe.shard.samples) for s, n in data.images.items() if n}


def _tasks(
    cluster: ClusterSettings,
    name: str,
    pieces: int,
    cpu: float | None,  # seconds of one core for all pieces
    storage: float,
    held: float = 0.0,  # bytes of a task beside Python, torch and a small model
    slots: int = 0,  # tasks that a node runs at once; 0: as many as fit
    too_large: str = "use larger nodes",
) -> StageEstimate:
    """A stage of equal tasks: waves of as many as fit into CPUs and memory."""
    memory = TASK + held
    fit = int(cluster.memory_gb * GB // memory)
    if fit < 1:
        said = f"a task of {name} takes {memory / GB:,.0f} GB and a node has {cluster.memory_gb:g}"
        raise InputError(f"{said}; {too_large}")
    places = cluster.nodes * (slots or min(cluster.cpus, fit))
    at_once, seconds, note = min(pieces, places), None, ""
    if cpu is not None:
        seconds = max(math.ceil(pieces / at_once) * cpu / pieces, pieces * rate("task"))
        if 2 * at_once < places and seconds > 60:
            note = f"{pieces:,} pieces keep {at_once:,} of {places:,} busy"
    return StageEstimate(name, pieces, at_once, seconds, memory, storage, note)


def loss_bytes(settings: TrainSettings) -> float:
    """Peak bytes of the scores of a training's block of lists and of all that is made of them.

    One loss comes after the other, beside the gradient of those before.
    """
    largest = max(loss_named(name).score_matrices for name in settings.losses)
    matrices = largest + (len(settings.losses) > 1)
    return 4.0 * _rows_of_block(settings) * settings.batch_size * matrices


def _rows_of_block(settings: TrainSettings) -> int:
    """Own lists that a worker has at a time."""
    own = settings.batch_size // settings.workers
    return min(own, settings.list_rows or rows_of_block(settings.batch_size))


def worker_bytes(
    settings: TrainSettings, model: ModelSettings, captions: float
) -> dict[str, float]:
    """Bytes of a training's worker beside its towers, by what they are for.

    `captions` of an image, of which its relevance is made.
    """
    own, everything = settings.batch_size // settings.workers, settings.batch_size
    # The gathered vectors of a side, their gradient, and that of the other; own ones of both.
    parts = {
        "vectors": 4.0 * model.dim * (3 * everything + 6 * own),
        "loss": loss_bytes(settings),
        "relevance": 0.0,
    }
    if any(loss_named(name).graded for name in settings.losses):
        block = _rows_of_block(settings) * everything
        parts["relevance"] = 4.0 * (DIM * (everything + own * math.ceil(captions)) + block)
    return parts


def weights(model: ModelSettings) -> float:
    """Bytes of a model's weights in float32; of a pretrained one that is not here CLIP's."""
    if "pretrained" in (model.image, model.text):
        folder = Path(model.pretrained or "")
        files = list(folder.glob("*.safetensors")) if model.pretrained else []
        return sum(file.stat().st_size for file in files) or rates.PRETRAINED
    if ":" in model.image + model.text:
        return 0.0  # of one's own code
    features, words = FEATURES if model.image == "regions" else None, range(WORDS)
    with torch.device("meta"):
        made = build(model, vocabulary=words, features=features)  # type: ignore[arg-type]
    return 4.0 * sum(parameter.numel() for parameter in made.parameters())


def host_bytes(recipe: Recipe, data: Collection, here: int) -> dict[str, float]:
    """Bytes that one of `here` training workers takes of its node's memory, by what they are for.

    What the loss takes is not among them.
    """
    s, cluster = recipe.train, recipe.cluster
    side = recipe.model.image_size or rates.SIDE  # a pretrained model's own is in its folder
    picture = 3.0 * side**2 if recipe.model.image != "regions" else 0.0
    batch = s.batch_size // s.workers * picture
    ahead = rates.AHEAD if rates.AHEAD * batch <= rates.AHEAD_BYTES else 2
    images, count = data.images.get("train", 0), shards(recipe, data).get("train", 0)
    kept = images * picture if images * picture <= rates.KEPT_BYTES else 0.0
    decoders = s.decode_workers or min(rates.MOST_WORKERS, max(1, cluster.cpus // here - 1))
    model = weights(recipe.model)
    on_cpu = 4 + (s.ema > 0)  # weights, their gradient, the optimizer's two moments
    return {
        "Python and torch": TASK,
        "captions and vectors": rates.DRAWN + rates.SHARD_KNOWN * count,
        "neighbours": float(rates.NEAR * images) if s.neighbours > 1 else 0.0,
        "decoded images": kept,
        "batches": batch * (ahead + rates.READY),
        "decoding processes": rates.DECODER * decoders if picture else 0.0,
        "the model": model * (0 if cluster.gpus else on_cpu),
        "a checkpoint": model * (3 + (s.ema > 0)),  # a copy, while it is written
    }


def _check_host(recipe: Recipe, name: str, parts: dict[str, float], here: int) -> None:
    """Refuses a node that cannot hold the workers it has."""
    needed, room = here * sum(parts.values()) / GB, recipe.cluster.memory_gb
    if needed > room:
        largest = max(parts, key=lambda part: parts[part])
        raise InputError(
            f"{here} training workers of {name} take {needed:,.1f} GB of their node's memory, "
            f"{here * parts[largest] / GB:,.1f} of them {largest}, and it has {room:g}; lower "
            "train.batch_size or train.decode_workers, or take more nodes"
        )


def steps(settings: TrainSettings, data: Collection) -> int:
    """Steps of an epoch: whole batches of each round, in which an image is seen once."""
    images, captions = data.images.get("train", 0), data.captions.get("train", 0)
    rounds = max(1, round(captions / max(1, images))) if settings.pairs == "caption" else 1
    if images < settings.batch_size:
        said = f"{images} train images do not fill one batch of {settings.batch_size}"
        raise InputError(f"{said}; lower --train.batch_size")
    return rounds * (images // settings.batch_size)


def _train(recipe: Recipe, data: Collection, name: str) -> StageEstimate:
    settings, cluster = recipe.train, recipe.cluster
    places = cluster.nodes * (cluster.gpus or cluster.cpus)
    if settings.workers > places:
        said = f"more than the cluster's {places} {'GPUs' if cluster.gpus else 'CPUs'}"
        raise InputError(f"train.workers {settings.workers} is {said}; lower it or take more nodes")
    note = f"{settings.epochs * steps(settings, data):,} steps"
    if (count := shards(recipe, data).get("train", 0)) < settings.lanes:
        few = f"{count} train shards for {settings.lanes} lanes"
        if cluster.nodes > 1:
            said = f"{few}, and {cluster.nodes} nodes would fetch the same shards"
            raise InputError(f"{said}; lower shard.samples or train.lanes")
        note += f"; {few}: several read one shard, lower shard.samples"
    images, captions = data.images.get("train", 0), data.captions.get("train", 0)
    parts = worker_bytes(settings, recipe.model, captions / max(1, images))
    memory = sum(parts.values()) + (0 if cluster.gpus else TASK)
    fullest = math.ceil(settings.workers / cluster.nodes)  # workers of a node
    room = cluster.gpu_memory_gb if cluster.gpus else cluster.memory_gb / fullest
    if memory > room * GB:
        largest = max(parts, key=lambda part: parts[part])
        raise InputError(
            f"a training worker of {name} needs {memory / GB:,.1f} GB beside its towers, "
            f"{parts[largest] / GB:,.1f} of them {largest}, and has {room:g}; lower "
            "train.batch_size or take more train.workers"
        )
    host = host_bytes(recipe, data, fullest)
    _check_host(recipe, name, host if cluster.gpus else host | parts, fullest)
    cached = rates.CACHED * captions / GB
    held = f"{sum(host.values()) / GB:,.1f} GB of its node's memory a worker"
    note += f"; {held}" + (f", and {cached:,.1f} GB of files it draws from" if cached > 1 else "")
    memory = memory if cluster.gpus else sum((host | parts).values())
    return StageEstimate(f"train {name}", 1, settings.workers, None, memory, 0.0, note)


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
