"""Files that hold weights or runs. A first reading can skip this file.

A checkpoint is read without running any code in it. A run's directory has `last.pth`, `best.pth` (without the
optimizer, which nobody resumes from it), `log.jsonl` (one line an epoch) and `settings.json`. Every file is
written under a temporary name and renamed when it is whole, so what is killed leaves whole files.
"""

import hashlib
import json
import os
import pickle
import re
import urllib.parse
import zipfile
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from launch import UserError, all_reduce, main_process_first, print0, rank, world_size
from settings import Settings, flag_of

# ---- Reading ----

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


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def download(url: str) -> Path:
    """Where a URL's file is on this machine, after downloading it if it is not there yet."""
    folder = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(url.encode()).hexdigest()[:16])
    path = folder / Path(urllib.parse.urlparse(url).path).name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        main_process_first(lambda: path.exists() or torch.hub.download_url_to_file(url, str(path)))
    except OSError as error:  # no such address, no network, or one that broke off
        reason = getattr(error, "reason", error)
        raise UserError(f"could not download {url}: {reason}; check the address and the network") from None
    named = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if named and not file_hash(path).startswith(named[1]):
        raise UserError(f"{path} has not the SHA-256 that its name says; delete it")
    return path


def locate(source: str | Path) -> Path:
    """A checkpoint's file: itself, last.pth of a run's folder, or that of a URL or a name in OFFICIAL."""
    source = OFFICIAL.get(str(source), source)
    path = download(source) if is_url(source) else Path(source)
    return path / "last.pth" if path.is_dir() else path


def read_checkpoint(source: str | Path) -> dict:
    """The contents, on the CPU, of a checkpoint: a file, a run's folder, a URL, a name in OFFICIAL.

    No code in it is run. A URL is downloaded once; a file name that ends in -HASH.pth has its SHA-256 checked
    against it. Raises UserError if there is no such file or it is not a checkpoint.
    """
    path = locate(source)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as members:
                if bad := members.testzip():  # torch itself does not look at the checksums
                    raise UserError(f"{bad} in it is damaged")
        contents = torch.load(path, map_location="cpu", weights_only=True)
        for state in [contents.get(part) for part in ("model", "ema") if part in contents] or [contents]:
            if not all(isinstance(value, Tensor) for value in (state or {}).values()):
                raise UserError("its parts are not named weights")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = "it holds something else than weights and settings, or is damaged"
        if not isinstance(error, pickle.UnpicklingError):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source} is not a checkpoint that can be read safely: {reason}") from error
    return contents


def checkpoint_weights(contents: dict) -> dict[str, Tensor]:
    """The weights to use from a checkpoint: the moving average where there is one, else the model's."""
    return contents.get("ema") or contents.get("model") or contents


# ---- Writing ----


def atomic_save(path: Path, write: Callable) -> None:
    """Calls `write` with a binary file that takes the name `path` only when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
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


# ---- How a run starts ----

# These do not change what a run computes, so a resumed one may have others.
ADJUSTABLE = {"out", "workers", "device", "compile", "resume", "overwrite", "save_every", "skip_broken"}
ADJUSTABLE |= {"remember_labels", "accumulate", "data_path"}  # a run may move to other machines


def from_saved(saved: dict, kind: type = Settings, **changed):
    """The settings that a run or checkpoint was saved with; those it does not know have their defaults."""
    known = {one.name for one in fields(kind)}
    saved = (
        {"trainable": saved.get("train", "all")} | saved | changed
    )  # its name in older runs of finetune.py
    return kind(**{name: value for name, value in saved.items() if name in known})


def resumed_settings(given: dict, out: str, kind: type = Settings):
    """The settings of the run in `out` that --resume continues, with what may change; None if it starts one.

    A run starts anew; over an earlier one, with --overwrite; or where it was stopped, with --resume and its
    own settings; finetune.py gives a new one other weights. Raises UserError if a flag differs from the
    run's, or if a run would be written over without leave.
    """
    path = Path(out) / "settings.json"
    if not given.get("resume"):
        if given.get("overwrite") and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError("--overwrite would start anew at each of torchrun's restarts; use --resume")
        if not given.get("overwrite") and holds_run(out):
            raise UserError(f"{out} holds a run; --resume continues it, --overwrite replaces it")
        return None
    if not os.path.exists(path):
        if given.keys() <= ADJUSTABLE:
            raise UserError(f"there is no run in {out} to continue, and no flag that says what to start")
        return None
    saved = json.loads(path.read_text())
    if ("checkpoint" in saved) != (kind is not Settings):
        owner = "finetune.py" if "checkpoint" in saved else "train.py"
        raise UserError(f"{out} is a run of {owner}; continue it with {owner} --resume")
    # What `auto` means was decided when the run began.
    given = {"overwrite": False} | {name: value for name, value in given.items() if value != "auto"}
    before, s = from_saved(saved, kind), from_saved(saved, kind, **given)
    for name in sorted(given.keys() - ADJUSTABLE):
        if given[name] != getattr(before, name):
            flag, remedy = flag_of(kind, name), "leave the flag out"
            if name == "epochs":
                remedy += f", or train on from its end: finetune.py --checkpoint {out}"
            text = f"the run in {out} has {flag} {getattr(before, name)}, not {given[name]}"
            raise UserError(f"{text}; {remedy}")
    return s


def save_settings(s: Settings) -> None:
    """Writes a run's settings into its directory, from where --resume takes them."""
    if rank() == 0:
        text = json.dumps(asdict(s), indent=2)
        atomic_save(Path(s.out) / "settings.json", lambda file: file.write(text.encode()))
        for partial in Path(s.out).glob("*.partial"):  # of a process that was killed while it wrote
            partial.unlink()


def remove_run(out: str) -> None:
    """Removes an earlier run's files."""
    if rank() == 0:
        for name in ("last.pth", "best.pth", "log.jsonl"):
            Path(out, name).unlink(missing_ok=True)


# ---- A run's files ----


def holds_run(out: str | Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return os.path.exists(Path(out) / "last.pth")


def read_log(out: str | Path) -> list[dict]:
    """The records of a run's log.jsonl, one an epoch; none if there is no log yet."""
    path = Path(out) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Run:
    """A training's checkpoints in its directory, which rank 0 writes and all processes read."""

    def __init__(self, settings: dict, steps_per_epoch: int, network: nn.Module, optimizer, scaler, ema):
        self.out, self.settings, self.steps_per_epoch = Path(settings["out"]), settings, steps_per_epoch
        self.network, self.optimizer, self.scaler, self.ema = network, optimizer, scaler, ema

    def check_finite(self, step: int, *values: Tensor) -> None:
        """Raises UserError if a value is not finite; waits for the device."""
        if not all(value.isfinite().all() for value in values):
            kept = "last.pth is from before it" if holds_run(self.out) else "nothing was saved"
            raise UserError(f"the loss became infinite or NaN by step {step}; {kept}; try a lower --lr")

    def weights(self) -> dict:
        """All that is not for resuming alone."""
        ema = None if self.ema is None else self.ema.module.state_dict()
        return {"model": self.network.state_dict(), "ema": ema, "settings": self.settings}

    def save(self, step: int, log: list[dict], loss_sum: Tensor) -> None:
        """Writes last.pth: all that is needed to go on, if it is finite.

        `loss_sum` is the sum of the losses of the epoch so far, of this process; its mean over all is kept.
        """
        loss_sum = all_reduce(loss_sum.clone()) / world_size()
        self.check_finite(step, loss_sum, *self.network.parameters())
        progress = {"step": step, "log": log, "loss_sum": loss_sum.item(), "per_epoch": self.steps_per_epoch}
        if rank() == 0:
            parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            contents = self.weights() | parts | {"progress": progress}
            atomic_save(self.out / "last.pth", lambda file: torch.save(contents, file))

    def end_epoch(self, step: int, log: list[dict], best: bool) -> None:
        """Writes the log and, if the epoch is the best so far, best.pth."""
        if rank() > 0:
            return
        if best:  # before the log says so
            contents = self.weights() | {"progress": {"step": step, "log": log}}
            atomic_save(self.out / "best.pth", lambda file: torch.save(contents, file))
        text = "".join(json.dumps(record) + "\n" for record in log)
        atomic_save(self.out / "log.jsonl", lambda file: file.write(text.encode()))

    def load(self) -> tuple[int, list[dict], float]:
        """Takes up last.pth; returns the steps done, the log, and the epoch's losses so far, as saved."""
        contents = read_checkpoint(self.out / "last.pth")
        progress, settings = contents["progress"], contents["settings"]
        now = self.steps_per_epoch, self.settings["classes"]
        if (progress["per_epoch"], settings["classes"]) != now:
            raise UserError(f"the data of the run in {self.out} have changed; start it anew with --overwrite")
        self.network.load_state_dict(contents["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(contents["ema"])
        for group in contents["optimizer"]["param_groups"]:  # as this device does it, not the one before
            group["fused"] = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:  # empty where no fp16 was used
            self.scaler.load_state_dict(contents["scaler"])
        # The log may be one epoch further than the checkpoint: an epoch is evaluated after its save.
        step, log = progress["step"], progress["log"]
        log += [record for record in read_log(self.out)[len(log) :] if record["step"] <= step]
        print0(f"resuming {self.out} after step {step}, {len(log)} epochs")
        within = step > len(log) * self.steps_per_epoch
        return step, log, progress.get("loss_sum", sum(progress.get("loss_sums", []))) if within else 0.0
