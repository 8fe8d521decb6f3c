"""Files that hold weights: finding, reading, writing. A first reading can skip this file.

A checkpoint is read without running any code in it. It gets its name when it is whole: no kill leaves half.
"""

import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

import devices
import launch
from launch import UserError, rank

# The authors' ImageNet checkpoints, by short name. A file's name ends in the first digits of its SHA-256.
OFFICIAL = {
    "deit_tiny": "deit_tiny_patch16_224-a1311bcf",
    "deit_small": "deit_small_patch16_224-cd65a155",
    "deit_base": "deit_base_patch16_224-b5f2ef4d",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224-b40b3cf7",
    "deit_small_distilled": "deit_small_distilled_patch16_224-649709d9",
    "deit_base_distilled": "deit_base_distilled_patch16_224-df68dfff",
    "deit_base_384": "deit_base_patch16_384-8de9b5d1",
    "deit_base_distilled_384": "deit_base_distilled_patch16_384-d0272ac0",
}
OFFICIAL = {name: f"https://dl.fbaipublicfiles.com/deit/{file}.pth" for name, file in OFFICIAL.items()}


def published_url(name: str) -> str:
    """Where a network's ImageNet weights are: the DeiT authors', or the best of torchvision's."""
    if url := OFFICIAL.get(name) or OFFICIAL.get(f"deit_{name}"):
        return url
    try:
        return torchvision.models.get_model_weights(name).DEFAULT.url
    except ValueError:
        raise UserError(f"torchvision has no weights for {name}; run train.py --model {name}") from None


def download(url: str) -> Path:
    """Where a URL's file is on this machine; downloaded once, and checked if its name ends in -HASH.pth.

    Such a file lies where torch.hub puts it too; of others many are called last.pth.
    """
    name = Path(url.partition("?")[0]).name
    digits = re.search(r"-(?=\d*[a-f])([0-9a-f]{8,})\.|$", name)[1]  # without a letter it is a date
    path = Path(torch.hub.get_dir(), "checkpoints", "" if digits else launch.hash_of(url), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        devices.main_process_first(
            lambda: path.exists() or torch.hub.download_url_to_file(url, str(path), digits)
        )
    except (OSError, RuntimeError) as error:  # no such address, no network, or another hash
        raise UserError(f"could not download {url}: {error}; without a network name a file") from None
    return path


def locate(source: str | Path) -> Path:
    """A checkpoint's file: itself, last.pth of a run's folder, or that of a URL or a published name."""
    if source in (*OFFICIAL, *torchvision.models.list_models(torchvision.models)):
        source = published_url(source)
    path = download(source) if "://" in str(source) else Path(source)
    return path / "last.pth" if path.is_dir() else path


def checkpoint_weights(contents: dict) -> dict[str, Tensor]:
    """The weights to use from a checkpoint: the moving average where there is one, else the model's.

    Also from Lightning and timm, compiled, or wrapped for several GPUs.
    """
    keys = ("model_ema", "state_dict_ema", "model", "state_dict")
    state = next((contents[key] for key in keys if contents.get(key)), contents)
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


# The paper's teacher, regnety_160-a5fe301d.pth, names its modules otherwise: (its pattern, torchvision's).
PAPER_LAYOUT = (
    (r"^s(\d)\.b(\d+)", lambda m: f"trunk_output.block{m[1]}.block{m[1]}-{int(m[2]) - 1}"),
    (r"\.conv(\d)", lambda m: f".f.{'abc'[int(m[1]) - 1]}"),
    (r"\.se\.", ".f.se."),
    (r"\.downsample", ".proj"),
    (r"\.conv\.", ".0."),
    (r"\.bn\.", ".1."),
    (r"^head\.fc", "fc"),
)


def torchvision_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A RegNetY's weights with torchvision's names, whichever of the two layouts they come in."""
    for pattern, replacement in PAPER_LAYOUT if "stem.conv.weight" in state else ():
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return state


# What others' checkpoints hold beside weights: the flags of a training, paths, numbers of numpy. None is on
# torch.load's own list of what runs no code. Older numpys call the module numpy.core;
# Python 3.13 has paths in pathlib._local.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
SAFE = [Namespace, np.dtype]
SAFE += [(type(Path()), f"pathlib{module}.{type(Path()).__name__}") for module in ("", "._local")]
SAFE += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]
SAFE += [(NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read_checkpoint(source: str | Path) -> dict:
    """The contents, on the CPU, of the checkpoint that `locate` finds; raises UserError if it is none."""
    path = locate(source)
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch looks at no checksums
            raise ValueError("a checksum differs")
        with torch.serialization.safe_globals(SAFE):
            contents = torch.load(path, map_location="cpu", weights_only=True)  # runs no code in it
        if "ema" in contents:  # as older runs call it
            contents["model_ema"] = contents.pop("ema")
        weights = checkpoint_weights(contents)
        if not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("its parts are not named weights")
    except (FileNotFoundError, PermissionError):
        hint = launch.did_you_mean(str(source), OFFICIAL)
        raise UserError(f"there is no file {path} that may be read{hint}") from None
    except Exception as error:  # a damaged file can make the reader raise anything
        if path.suffix == ".safetensors":  # a newer torch reads them, where the package is installed
            raise UserError(f"{source} is of safetensors; install it, or see docs/elsewhere.md") from error
        raise UserError(f"{source} is not a checkpoint that can be read safely, or it is damaged") from error
    if any(key.endswith("embeddings.cls_token") for key in weights):
        raise UserError(f"{source} has Hugging Face's names of the weights; docs/elsewhere.md renames them")
    return contents


def atomic_save(path: Path, write: Callable) -> None:
    """On rank 0 calls `write` with a binary file that is named `path` only when it is whole on the disk."""
    if rank() > 0:
        return
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":  # the new name too is to survive a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        if os.path.exists(partial):
            os.remove(partial)
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"could not write {path}: {reason}; what was saved before is intact") from error
