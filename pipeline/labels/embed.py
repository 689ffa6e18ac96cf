"""Stage 3: the captions of every shard become unit vectors of a frozen encoder.

An encoder that must be fitted is fitted first, on the train captions. The members of an ensemble
are made first, each in the folder of its own name.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.labels import encoders
from pipeline.labels.encoders import encoder_label, fitted, guards, sentences
from pipeline.sharding.sidecar import read_sidecar
from pipeline.storage import parquet, store
from pipeline.storage.piece_table import at, column, where
from pipeline.storage.plan import Piece, Plan
from pipeline.storage.run_folder import Files, RunFolder, contents_of, version
from pipeline.storage.vector_columns import vector_column, vector_matrix
from schemas.embedding import embedding_schema
from schemas.settings import EmbedSettings, Recipe

KIND = ("embed", parquet.VECTORS)  # in the fingerprint of every embedding
FITTED = "fitted"  # folder of an encoder's terms, in the encoder's own
OF_ONE_ENCODER = {"members", "revision", "prompt", "prompt_name"}  # settings


class Step(NamedTuple):
    """One plan of the stage, with what makes its pieces and what looks at them all."""

    plan: Plan
    make: Callable[[Piece], dict]
    check: Callable[[dict[str, dict]], None]
    gpu: bool


def steps(settings: EmbedSettings, root: str) -> Iterator[Step]:
    """The stage's plans in order; each is drawn up when those before it are finished."""
    for member, _ in encoders.members(settings):
        yield from steps(member, root)
    is_fitted = fitted.is_fitted(settings.encoder)
    if is_fitted:
        yield Step(_plan_fit(settings, root), write_terms, lambda made: None, gpu=False)
    plan = plan_of(settings, root)
    gpu = settings.device != "cpu" and not is_fitted and not settings.members
    yield Step(plan, write_embeddings, lambda made: check(plan, made, settings), gpu)


def plan(recipe: Recipe, root: str) -> Plan:
    """A piece for every shard, by the recipe's encoder."""
    return plan_of(recipe.embed, root)


def plan_of(settings: EmbedSettings, root: str) -> Plan:
    """A piece for every shard, by an encoder whose members and terms are there."""
    run = RunFolder(root)
    shards = run.index("shard")["pieces"]
    matters = depends_on(settings, root)
    members = []  # the folder of each, its pieces, its weight
    for member, weight in encoders.members(settings):
        index = run.index("embed", encoder_label(member.encoder))
        members.append((_folder(member, root), index["pieces"], weight))

    def draw() -> list[Piece]:
        return list(_pieces(settings, root, shards, members, matters))

    of_shards = [column(shards, "name"), column(shards, "split"), version(shards)]
    of_members = [[column(made, "name"), version(made)] for _, made, _ in members]
    follows = store.fingerprint(*KIND, matters, of_shards, of_members)
    return Plan.of("embed", _folder(settings, root), draw, matters, follows)


def _pieces(settings: EmbedSettings, root: str, shards, members, matters: dict) -> Iterator[Piece]:
    """A piece for every shard."""
    run = RunFolder(root)
    made = [dict(zip(column(m, "name"), column(m, "files"), strict=True)) for _, m, _ in members]
    reads = settings.members or fitted.is_fitted(settings.encoder)
    memory = 0 if reads else of_encoding(sentences.path(settings.encoder))
    names, splits = column(shards, "name"), column(shards, "split")
    for name, split, holds in zip(names, splits, contents_of(shards), strict=True):
        file = f"{name}.parquet"
        parts = [files.get(name) for files in made]
        inputs = {
            "sidecar": run.folder("shard", file),
            "split": split,
            "of": store.fingerprint(holds),
            "settings": settings,
            "weights": matters["weights"],
            "terms": _terms(settings, root),
            "members": [(store.join(folder, file), weight) for folder, _, weight in members],
        }
        output = store.join(_folder(settings, root), file)
        fingerprint = store.fingerprint(*KIND, matters, holds, parts)
        yield Piece(name, output, fingerprint, inputs, memory)


def folder_of(recipe: Recipe, root: str) -> str:
    """Encoders live side by side, each in the folder of its name."""
    return _folder(recipe.embed, root)


def files(recipe: Recipe, root: str) -> Files:
    """The caption vectors of a recipe's encoder."""
    return RunFolder(root).files("embed", encoder_label(recipe.embed.encoder))


def of_shards(recipe: Recipe, root: str, split: str) -> tuple[Files, list[int]]:
    """The vectors of a split's shards that hold something, and how many images each has.

    Raises `InputError` where they were made of other captions than the shards' own.
    """
    every = files(recipe, root)
    place = {name: place for place, name in enumerate(every.names)}
    of = column(every.entries, "of")
    shards = where(RunFolder(root).files("shard").of_split(split).entries, "captions")
    places = []
    for name, holds in zip(column(shards, "name"), contents_of(shards), strict=True):
        if name not in place or of[place[name]] != store.fingerprint(holds):
            raise InputError(
                f"the embeddings in {every.folder} are not of the captions of shard "
                f"{name} as it is now; run `halftone embed` again"
            )
        places.append(place[name])
    found = Files.of(every.folder, at(every.entries, places))
    return found, column(shards, "samples")


def settings_of(encoder: str, recipe: Recipe) -> EmbedSettings:
    """The settings under which another encoder than the recipe's embeds."""
    own = EmbedSettings().model_dump(include=OF_ONE_ENCODER)
    return recipe.embed.model_copy(update={**own, "encoder": encoder})


def other_sentence_encoders(recipe: Recipe, root: str) -> list[str]:
    """Sentence models besides the recipe's own whose vectors of the shards are here, by folder."""
    run = RunFolder(root)
    shards = run.known("shard")
    own = {encoder_label(name) for name in (recipe.embed.encoder, *recipe.embed.members)}
    found = []
    for name in sorted(set(store.list_folders(run.folder("embed"))) - own):
        index = run.known("embed", name)
        if not shards or not index or "backend" not in index["settings"]:
            continue  # fitted, or an ensemble
        matters = index["settings"]
        of, pieces = ("name", "fingerprint"), shards["pieces"]
        made = dict(zip(*(column(index["pieces"], name) for name in of), strict=True))
        names = zip(column(pieces, "name"), contents_of(pieces), strict=True)
        if all(made.get(n) == store.fingerprint(*KIND, matters, c, []) for n, c in names):
            found.append(matters["encoder"])
    return found


def write_embeddings(piece: Piece) -> dict:
    """Write the caption vectors of one shard; a summary with their number."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    settings: EmbedSettings = piece.inputs["settings"]
    captions = _captions(piece.inputs["sidecar"])
    texts = [text for _, _, text in captions]
    if members := piece.inputs["members"]:
        columns = [parquet.read_table(uri, ["vector"])["vector"] for uri, _ in members]
        weights = [weight for _, weight in members]
        vectors = encoders.join([vector_matrix(column) for column in columns], weights)
    elif fitted.is_fitted(settings.encoder):
        terms = parquet.read_table(piece.inputs["terms"])
        vectors = fitted.encode(texts, settings.encoder, terms)
    else:
        vectors = sentences.encode(texts, settings)
    guards.check_vectors(vectors, texts, settings)
    table = pa.table(
        {
            "caption_id": [caption_id for caption_id, _, _ in captions],
            "image_id": [image_id for _, image_id, _ in captions],
            "vector": vector_column(vectors.astype(np.float16)),
        },
        schema=embedding_schema(vectors.shape[1]),
    )
    summary = {name: piece.inputs[name] for name in ("split", "of")} | {"captions": len(captions)}
    summary |= {"different": len(set(texts)), "dim": vectors.shape[1]}
    about = {"encoder": settings.encoder, "weights": piece.inputs["weights"]}
    return parquet.write_table(piece.output, table, piece.fingerprint, summary, **about)


def write_terms(piece: Piece) -> dict:
    """Write the terms of an encoder that is fitted on the train captions; a summary."""
    if summary := parquet.finished(piece.output, piece.fingerprint):
        return summary
    settings: EmbedSettings = piece.inputs["settings"]
    texts: list[str] = []
    for uri in piece.inputs["sidecars"]:
        texts += [text for _, _, text in _captions(uri)]
        if len(texts) >= settings.fit_captions:
            break
    texts = texts[: settings.fit_captions]
    terms = fitted.fit(settings.encoder, texts)
    summary = {"captions": len(texts), "terms": terms.num_rows}
    about: dict = {"encoder": settings.encoder}
    return parquet.write_table(piece.output, terms, piece.fingerprint, summary, **about)


def check(plan: Plan, made: dict[str, dict], settings: EmbedSettings) -> None:
    """Stops where pieces do not fit together, or too many captions are the same."""
    guards.check_stage({**plan.done, **made}, settings)


def encode(texts: list[str], settings: EmbedSettings, root: str | None = None) -> np.ndarray:
    """Unit vectors (N, D) float32 of any N texts; fitted encoders are those of the run folder."""
    if settings.members:
        members = encoders.members(settings)
        vectors = [encode(texts, member, root) for member, _ in members]
        return encoders.join(vectors, [weight for _, weight in members])
    if not fitted.is_fitted(settings.encoder):
        return sentences.encode(texts, settings)
    if root is None:
        raise InputError(f"encoder {settings.encoder} is fitted in a run folder; name one")
    _index_of_terms(settings, root)
    terms = parquet.read_table(_terms(settings, root))
    return fitted.encode(texts, settings.encoder, terms)


def depends_on(settings: EmbedSettings, root: str) -> dict:
    """What an encoder's vectors depend on besides the captions."""
    if settings.members:
        shares = {member.encoder: weight for member, weight in encoders.members(settings)}
        return {"encoder": settings.encoder, "weights": shares}
    if fitted.is_fitted(settings.encoder):
        version = _index_of_terms(settings, root)["version"]
        return {"encoder": settings.encoder, "weights": version}
    weights = sentences.fingerprint(settings.encoder, settings.revision)
    return {**settings.relevant(), "weights": weights}


def _plan_fit(settings: EmbedSettings, root: str) -> Plan:
    """One piece: the terms of the train captions."""
    train = RunFolder(root).files("shard").of_split("train")
    if not train:
        raise InputError(
            f"encoder {settings.encoder} is fitted on train captions and there is no train split; "
            "choose an encoder that is not fitted"
        )
    matters = {"encoder": settings.encoder, "fit_captions": settings.fit_captions}
    output = _terms(settings, root)
    fingerprint = store.fingerprint("fit", parquet.VECTORS, matters, contents_of(train.entries))
    piece = Piece("terms", output, fingerprint, {"sidecars": train.uris, "settings": settings})
    return Plan.of("embed", output.rpartition("/")[0], [piece], matters)


def _folder(settings: EmbedSettings, root: str) -> str:
    return RunFolder(root).folder("embed", encoder_label(settings.encoder))


def _terms(settings: EmbedSettings, root: str) -> str:
    return store.join(_folder(settings, root), FITTED, "terms.parquet")


def _index_of_terms(settings: EmbedSettings, root: str) -> dict:
    return RunFolder(root).index("embed", encoder_label(settings.encoder), FITTED)


def _captions(sidecar: str) -> list[tuple[str, str, str]]:
    """(caption id, image id, text) of every caption of a shard, in the sidecar's order."""
    samples = read_sidecar(sidecar, ["image_id", "captions"]).to_pylist()
    return [(c["caption_id"], s["image_id"], c["text"]) for s in samples for c in s["captions"]]


def of_encoding(folder: Path | None) -> int:
    """Of embedding a shard: the sentence model's files; 0 where a hub will send them."""
    if folder is None:
        return 0
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
