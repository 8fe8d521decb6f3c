"""Files that hold weights or runs. A first reading can skip this file.

A checkpoint is read without running any code in it. A run's directory has `last.pth`, `best.pth`, `log.jsonl`
(one line an epoch) and `settings.json`. A file gets its name when it is whole: no kill leaves half of one.
"""

import json
import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

import launch
from launch import UserError, print0, rank, world_size
from settings import Settings, flag_of

# ---- Files ----

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
        launch.main_process_first(
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


# What others' checkpoints hold beside weights: the flags of a training, paths, numbers of numpy. None is on
# torch.load's own list of what runs no code. Older numpys call the module numpy.core.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
SAFE = [Namespace, type(Path()), np.dtype]
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


def save_settings(s: Settings) -> None:
    """Writes a run's settings into its directory, from where --resume takes them."""
    text = json.dumps(asdict(s), indent=2)
    atomic_save(Path(s.out) / "settings.json", lambda file: file.write(text.encode()))


def lock_run(out: str) -> None:
    """Keeps a run's directory for this program until it ends; raises UserError if another one has it."""
    if rank() == 0 and os.name == "posix":
        import fcntl

        try:
            Path(out).mkdir(parents=True, exist_ok=True)
            file = os.open(Path(out) / ".lock", os.O_RDWR | os.O_CREAT)  # is never closed
        except OSError as error:
            raise UserError(f"could not write into {out}: {error.strerror}; choose another --out") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another program trains in {out} now; wait, or choose another --out") from None
        except OSError:  # some network file systems have no locks
            pass


def remove_run(s: Settings) -> None:
    """Removes an earlier run's files; raises UserError if it can go on and --overwrite is not given."""
    check_unused(s.out, s.overwrite)
    for name in ("last.pth", "best.pth", "log.jsonl"):
        Path(s.out, name).unlink(missing_ok=True)


# ---- Runs ----

# These do not change what a run computes; a run may move to other machines
WITHOUT_EFFECT = {"out", "workers", "device", "compile", "resume", "overwrite", "save_every", "skip_broken"}
WITHOUT_EFFECT |= {"remember_labels", "accumulate", "data_path"}
# What a resumed run may have otherwise: also the place of its teacher, and what helps after a NaN
ADJUSTABLE = WITHOUT_EFFECT | {"teacher_weights", "lr", "clip_grad", "precision"}


def holds_run(out: str | Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return os.path.exists(Path(out) / "last.pth")


def check_unused(out: str, overwrite: bool) -> None:
    """Raises UserError if a run would be written over without leave."""
    if holds_run(out) and not overwrite:
        raise UserError(f"{out} holds a run; --resume continues it, --overwrite replaces it")


def read_log(out: str | Path) -> list[dict]:
    """The records of a run's log.jsonl, one an epoch; none if there is no log yet."""
    path = Path(out) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def from_saved(saved: dict, kind: type = Settings, **changed):
    """The settings that a run or checkpoint was saved with; those it does not know have their defaults."""
    values = {"trainable": saved.get("train", "all")} | saved | changed  # `train` in older files
    return kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})


def resumed_settings(given: dict, out: str, kind: type = Settings):
    """The settings of the run in `out` that --resume continues, with the flags `given`; None if one starts.

    Raises UserError if a flag differs from the run's, or if a run would be written over without leave.
    """
    path, resume, overwrite = Path(out) / "settings.json", given.get("resume"), given.get("overwrite")
    exists = os.path.exists(path) or holds_run(out)
    if not resume:
        check_unused(out, overwrite)
    if not resume and overwrite and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError("--overwrite would start anew at each of torchrun's restarts; use --resume")
    if resume and not exists and given.keys() <= ADJUSTABLE:
        raise UserError(f"there is no run in {out} to continue, and no flag that says what to start")
    if not resume or not exists:
        return None
    saved = json.loads(path.read_text()) if path.exists() else read_checkpoint(out)["settings"]
    if ("checkpoint" in saved) != (kind is not Settings):
        owner = "finetune.py" if "checkpoint" in saved else "train.py"
        raise UserError(f"{out} is a run of {owner}; continue it with {owner} --resume")
    s = from_saved(saved, kind)
    # What `auto` means was decided when the run began.
    given = {"overwrite": False} | {name: value for name, value in given.items() if value != "auto"}
    for name in sorted(given.keys() - ADJUSTABLE):
        if given[name] != getattr(s, name):
            text = f"the run in {out} has {flag_of(kind, name)} {getattr(s, name)}, not {given[name]}"
            raise UserError(f"{text}; leave the flag out, or train on with finetune.py --checkpoint {out}")
    s = replace(s, **given)
    if s.precision == "auto":  # a run of an older version, in which a CPU computed in fp32
        device = launch.device_type(s.device)
        s.precision = "fp32" if device == "cpu" else launch.choose_precision("auto", device)
    return s


class Run:
    """A training's checkpoints in its directory, which rank 0 writes and all processes read."""

    def __init__(self, settings: dict, steps_per_epoch: int, network: nn.Module, optimizer, scaler, ema):
        self.out, self.settings, self.steps_per_epoch = Path(settings["out"]), settings, steps_per_epoch
        self.weights = {"model": network} | ({"model_ema": ema.module} if ema else {})
        self.parts = self.weights | {"optimizer": optimizer, "scaler": scaler}

    def check_finite(self, step: int) -> None:
        """Raises UserError if the weights are not finite; waits for the device.

        A single loss may be infinite in fp16: its step is left out. If it stays so the scale falls below 1.
        """
        finite = all(value.isfinite().all() for value in self.parts["model"].parameters())
        if not finite or self.parts["scaler"].get_scale() < 1:
            kept = "--resume goes on from before it" if holds_run(self.out) else "nothing was saved"
            remedy = "try a lower --lr, --clip-grad 1 or --precision fp32"
            raise UserError(f"the loss became infinite or NaN by step {step}; {kept}; {remedy}")

    def write(self, name: str, parts: dict, progress: dict) -> None:
        """Writes a checkpoint of that name with the states of these parts."""
        contents = {"settings": self.settings, "progress": progress}
        contents |= {key: part.state_dict() for key, part in parts.items()}
        atomic_save(self.out / name, lambda file: torch.save(contents, file))

    def save(self, step: int, log: list[dict], loss_sum: Tensor) -> None:
        """Writes last.pth if it is finite. `loss_sum` is the epoch's in this process; the mean is kept."""
        loss_sum = launch.all_reduce(loss_sum.clone()) / world_size()
        self.check_finite(step)
        progress = {"step": step, "log": log, "loss_sum": loss_sum.item(), "per_epoch": self.steps_per_epoch}
        self.write("last.pth", self.parts, progress)

    def end_epoch(self, step: int, log: list[dict], best: bool) -> None:
        """Writes the log and, if the epoch is the best so far, best.pth, from which nobody resumes."""
        if best:  # before the log says so
            self.write("best.pth", self.weights, {"step": step, "log": log})
        text = "".join(json.dumps(record) + "\n" for record in log)
        atomic_save(self.out / "log.jsonl", lambda file: file.write(text.encode()))

    def load(self) -> tuple[int, list[dict], float]:
        """Takes up last.pth; returns the steps done, the log, and the epoch's losses so far, as saved."""
        contents = read_checkpoint(self.out / "last.pth")
        progress, saved, now = contents["progress"], contents["settings"], self.settings
        if (progress["per_epoch"], saved["classes"]) != (self.steps_per_epoch, now["classes"]):
            raise UserError(f"the data of the run in {self.out} have changed; start it anew with --overwrite")
        if saved.get("fingerprint", now["fingerprint"]) != now["fingerprint"]:
            print0(f"files of the data are others, or newer, than when the run in {self.out} began")
        if saved.get("teacher_hash") not in (None, now.get("teacher_hash")):
            raise UserError(f"the run in {self.out} has another teacher; name it with --teacher-weights")
        for group in contents["optimizer"]["param_groups"]:  # as this device does it, not the one before
            group["fused"] = self.parts["optimizer"].defaults["fused"]
        for name, part in self.parts.items():
            if contents[name]:  # a scaler's is empty where no fp16 was used
                part.load_state_dict(contents[name])
        # The log may be one epoch further than the checkpoint: an epoch is evaluated after its save.
        step, log = progress["step"], progress["log"]
        log += [record for record in read_log(self.out)[len(log) :] if record["step"] <= step]
        state = "has ended" if len(log) == now["epochs"] else "goes on"
        print0(f"the run in {self.out} {state} after step {step}, {len(log)} epochs")
        within = step > len(log) * self.steps_per_epoch
        return step, log, progress.get("loss_sum", sum(progress.get("loss_sums", []))) if within else 0.0
