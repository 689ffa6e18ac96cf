"""sentence-transformers models: where they lie, what stands for their weights, how they encode."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from pipeline.errors import InputError, did_you_mean
from pipeline.models.backbones import packaged
from pipeline.storage import store
from schemas.settings import EmbedSettings

TOKENS = {"cpu": 512, "cuda": 65_536}  # per forward pass: more are slower on a CPU
CLOSE = 0.998  # the least cosine between a vector of bf16 and its vector of fp32
PROBES = [
    "A man riding a wave on top of a surfboard.",
    "Two cats.",
    "A kitchen with a stove, a sink, and a window that looks out on a snowy garden.",
    "The red bus is parked next to an old brick building.",
    "Nobody is there",
    "A close-up of a plate of food: 3 eggs, toast & half a grapefruit.",
    "Several people stand around a market stall while a boy in a striped shirt, seen from behind, "
    "points at a crate of oranges and his mother counts out the coins on the wooden table.",
    "dog",
]


def encode(texts: list[str], settings: EmbedSettings) -> np.ndarray:
    """Unit vectors (N, D) float32 of N texts; a text that occurs twice is encoded once."""
    encoder = load(settings.encoder, settings.revision, settings.backend, device(settings))
    if settings.prompt_name and settings.prompt_name not in encoder.prompts:
        raise InputError(
            f"encoder {settings.encoder} has no prompt {settings.prompt_name!r}"
            f"{did_you_mean(settings.prompt_name, encoder.prompts)}"
        )
    unique = list(dict.fromkeys(texts)) or [""]  # of no text the width is still wanted
    vectors = _encode(encoder, unique, settings, precision(settings))
    position = {text: row for row, text in enumerate(unique)}
    return vectors[np.array([position[text] for text in texts], int)]


def precision(settings: EmbedSettings) -> str:
    """`fp32` or `bf16`: what `auto` comes to on this machine, for this model."""
    if settings.precision != "auto":
        return settings.precision
    if settings.backend != "torch" or not _has_bf16(device(settings)):
        return "fp32"
    close = _bf16_cosine(settings.encoder, settings.revision, device(settings)) >= CLOSE
    return "bf16" if close else "fp32"


@functools.lru_cache(maxsize=8)
def _bf16_cosine(encoder: str, revision: str | None, device: str) -> float:
    """The least cosine of a probe's vector in bf16 to its vector in fp32."""
    settings = EmbedSettings(encoder=encoder)
    model = load(encoder, revision, "torch", device)
    full, fast = (_encode(model, PROBES, settings, name) for name in ("fp32", "bf16"))
    return float((full * fast).sum(1).min())


def _encode(encoder, texts: list[str], settings: EmbedSettings, precision: str) -> np.ndarray:
    """Unit vectors (N, D) float32 of N different texts, in batches of texts of one length."""
    import torch

    kind = encoder.device.type
    out = None
    with torch.autocast(kind, torch.bfloat16) if precision == "bf16" else nullcontext():
        for rows in _batches(_lengths(encoder, texts), settings.batch_tokens or TOKENS[kind]):
            vectors = encoder.encode(
                [texts[row] for row in rows],
                batch_size=len(rows),
                prompt=settings.prompt,
                prompt_name=settings.prompt_name,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
            vectors = torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()
            if out is None:
                out = np.empty((len(texts), vectors.shape[1]), np.float32)
            out[rows] = vectors
    return out


def _lengths(encoder, texts: list[str]) -> np.ndarray:
    """Tokens (N,) of each text, guessed from its letters where the tokenizer is not a model's."""
    from transformers import PreTrainedTokenizerBase

    tokenizer = getattr(encoder, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return np.array([len(text) // 4 + 1 for text in texts])
    limit = encoder.max_seq_length
    tokens = tokenizer(texts, truncation=limit is not None, max_length=limit)["input_ids"]
    return np.array([max(1, len(ids)) for ids in tokens])


def _batches(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Rows of texts of about the same length, the longest first, within so many tokens a batch."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, tokens // int(lengths[order[start]]))
        yield order[start : start + size]
        start += size


def device(settings: EmbedSettings) -> str:
    """`cuda` or `cpu`: where the model runs on this machine."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("embed.device is cuda and there is no GPU here; choose auto or cpu")
    return "cuda" if torch.cuda.is_available() and settings.device != "cpu" else "cpu"


def _has_bf16(device: str) -> bool:
    """Whether the processor multiplies in bf16 by itself; where it is emulated it is slow."""
    import torch

    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.lru_cache(maxsize=2)
def load(encoder: str, revision: str | None = None, backend: str = "torch", device: str = "cpu"):
    """The sentence-transformers model, loaded once per process."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    if backend == "onnx" and importlib.util.find_spec("optimum") is None:
        raise InputError(
            "embed.backend is onnx and the package optimum is not installed; install "
            "sentence-transformers[onnx], or choose torch"
        )
    disable_progress_bar()  # of weights that load in a moment
    found = path(encoder)
    if found is not None:  # a folder on this disk: nothing may be asked of a hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        how: dict = {"device": device, "revision": revision, "backend": backend}
        return SentenceTransformer(str(found or encoder), **how)
    except Exception as error:  # hub, cache and format errors have no common base
        raise not_there("sentence encoder", encoder, error) from error


def not_there(kind: str, name: str, error: Exception) -> InputError:
    """The sentence for a model that cannot be loaded."""
    from pipeline.models.vocabulary import not_installed

    if isinstance(error, ImportError) or "sentencepiece" in str(error):
        return InputError(not_installed(f"{kind} {name!r}", error))
    return InputError(
        f"no {kind} {name!r}: {str(error).splitlines()[0]} (give a model folder, "
        f"a name the model hub knows, or install halftone-itr[minilm] for all-MiniLM-L6-v2)"
    )


def path(encoder: str) -> Path | None:
    """The encoder's folder on this disk, if it is one or comes with the package."""
    if Path(encoder).is_dir():
        return Path(encoder)
    name = packaged.known(encoder)
    file = packaged.file_of(name) if name else None
    return file.parent if file else None


@functools.lru_cache(maxsize=8)
def fingerprint(encoder: str, revision: str | None = None) -> str:
    """Hash of a model's files on this disk, or of name and revision where a hub will send it."""
    folder = path(encoder)
    if folder is None:
        return store.fingerprint(encoder, revision)
    digests = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(".") and file.suffix != ".md":
            with file.open("rb") as data:
                digests[name] = hashlib.file_digest(data, "sha256").hexdigest()
    if not Path(encoder).is_dir():
        try:
            packaged.checked(packaged.known(encoder) or encoder)
        except ValueError as error:
            raise InputError(str(error)) from error
    return store.fingerprint(digests)
