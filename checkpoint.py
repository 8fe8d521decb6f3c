"""Files that hold weights or runs. A first reading can skip this file.

A checkpoint is read without running any code in it. A run's directory has `last.pth`, the one before it as
`previous.pth`, `best.pth` (without the optimizer, which nobody resumes from it), `log.jsonl` (one line an
epoch) and `settings.json`. Every file is written under a temporary name and renamed when it is whole, so a
program killed at any time leaves whole files.
"""

import hashlib
import json
import os
import pickle
import re
import urllib.parse
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from launch import UserError, all_reduce, main_process_first, print0, rank

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
                if any(member.compress_type for member in members.infolist()):
                    raise UserError("it is compressed, as no checkpoint is")  # and may unpack to any size
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


def atomic_save(path: Path, write: Callable, previous: Path | None = None) -> None:
    """Calls `write` with a binary file that takes the name `path` only when it is whole and on the disk.

    The file that had the name till then takes the name `previous`, if one is given.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's writer turns the one into the other
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"could not write {path}: {reason}; what was saved before is intact") from error


def save_json(path: Path, contents: dict) -> None:
    atomic_save(path, lambda file: file.write(json.dumps(contents, indent=2).encode()))


def make_directory(out: Path) -> None:
    """Makes a run's directory and sees that it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {out}: {error.strerror}; choose another --out") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {out}; choose another --out")


# ---- A run ----


def holds_run(out: str | Path) -> bool:
    """Whether there is a checkpoint to continue from; between two renames there is no last.pth."""
    return any(os.path.exists(Path(out) / name) for name in ("last.pth", "previous.pth"))


def latest_checkpoint(out: Path) -> dict:
    """The checkpoint to continue from: last.pth or, if that is damaged, previous.pth, which is said."""
    try:
        return read_checkpoint(out / "last.pth")
    except UserError as error:
        contents = read_checkpoint(out / "previous.pth")
        print0(f"{error}; continuing from {out / 'previous.pth'}")
        return contents


def read_log(out: Path) -> list[dict]:
    """The records of a run's log.jsonl, one an epoch; none if there is no log yet."""
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Run:
    """What changes while a network is trained, and what else a checkpoint holds."""

    def __init__(self, network: nn.Module, optimizer, scaler, ema, settings: dict, steps_per_epoch: int):
        self.network, self.optimizer, self.scaler, self.ema = network, optimizer, scaler, ema
        self.settings, self.steps_per_epoch, self.out = settings, steps_per_epoch, Path(settings["out"])
        self.step = self.checked = 0  # steps done, and those after which all was seen to be finite
        self.log: list[dict] = []  # one record an epoch
        # The sum of this epoch's losses in this process. In float64 the order of adding does not matter.
        device = next(network.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), device=device, dtype=dtype)

    def check_finite(self, *values: Tensor) -> None:
        """Raises UserError if a value is not finite; waits for the device."""
        if not all(value.isfinite().all() for value in values):
            kept = "last.pth is from before it" if holds_run(self.out) else "nothing was saved"
            steps = f"between steps {self.checked} and {self.step}"
            raise UserError(f"the loss became infinite or NaN {steps}; {kept}; try a lower --lr")
        self.checked = self.step

    def weights(self) -> dict:
        """All that is not for resuming alone."""
        ema = None if self.ema is None else self.ema.module.state_dict()
        return {"model": self.network.state_dict(), "ema": ema, "settings": self.settings}

    def save(self) -> None:
        """Writes last.pth from rank 0, after all processes have seen that all is finite."""
        loss_sum = all_reduce(self.loss_sum.clone())
        self.check_finite(loss_sum, *self.network.parameters())
        progress = {"step": self.step, "log": self.log, "per_epoch": self.steps_per_epoch}
        progress["loss_sums"] = [loss_sum.item()]
        parts = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        contents = self.weights() | parts | {"progress": progress}
        if rank() == 0:
            last = self.out / "last.pth"
            atomic_save(last, lambda file: torch.save(contents, file), previous=self.out / "previous.pth")

    def end_epoch(self, record: dict, best: bool) -> None:
        """Adds the epoch's record to the log; writes best.pth if it is the best so far."""
        self.log.append(record)
        self.loss_sum.zero_()
        if rank() > 0:
            return
        if best:  # before the log says so
            contents = self.weights() | {"progress": {"step": self.step, "log": self.log}}
            atomic_save(self.out / "best.pth", lambda file: torch.save(contents, file))
        text = "".join(json.dumps(record) + "\n" for record in self.log)
        atomic_save(self.out / "log.jsonl", lambda file: file.write(text.encode()))

    def resume(self) -> None:
        """Continues from the run's latest checkpoint."""
        contents = latest_checkpoint(self.out)
        progress = contents["progress"]
        now = self.steps_per_epoch, self.settings["classes"]
        if (progress["per_epoch"], contents["settings"]["classes"]) != now:
            raise UserError(f"the data of the run in {self.out} have changed; start it anew with --overwrite")
        self.network.load_state_dict(contents["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(contents["ema"])
        for group in contents["optimizer"]["param_groups"]:  # as this device does it, not the one before
            group["fused"] = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:  # empty where no fp16 was used
            self.scaler.load_state_dict(contents["scaler"])
        self.step = self.checked = progress["step"]
        # The log may be one epoch further than the checkpoint: an epoch is evaluated after its save.
        later = read_log(self.out)[len(progress["log"]) :]
        self.log = progress["log"] + [record for record in later if record["step"] <= self.step]
        if rank() == 0 and self.step > len(self.log) * self.steps_per_epoch:
            self.loss_sum.fill_(sum(progress["loss_sums"]))
        print0(f"resuming {self.out} after step {self.step}, {len(self.log)} epochs")
