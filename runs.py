"""A run: its directory, and what it prints at its beginning and its end. A first reading can skip this file.

A directory has `last.pth`, `best.pth`, `log.jsonl` (one line an epoch) and `settings.json`. It belongs to one
running program at a time, and an earlier run in it is only replaced with --overwrite.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import devices
import flags
import launch
from checkpoint import atomic_save, read_checkpoint
from data import DataSet, steps_per_epoch
from flags import flag_of
from launch import UserError, print0, rank, world_size
from settings import Settings

# ---- The directory ----

# A run may move to other machines. (In parts of other sizes --accumulate draws other augmentations.)
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
        loss_sum = devices.all_reduce(loss_sum.clone()) / world_size()
        self.check_finite(step)
        progress = {"step": step, "log": log, "loss_sum": loss_sum.item(), "per_epoch": self.steps_per_epoch}
        self.write("last.pth", self.parts, progress)

    def end_epoch(self, step: int, log: list[dict], best: bool) -> None:
        """Writes the log and, if the epoch is the best so far, best.pth, which is not for resuming."""
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


# ---- What is printed ----


def accuracy_line(accuracy: dict[str, float]) -> str:
    """`class 71.20 %  distillation 73.15 %  fused 73.40 %`."""
    return "  ".join(f"{head} {percent:.2f} %" for head, percent in accuracy.items())


def top1(accuracy: dict[str, float]) -> float:
    """The accuracy by which checkpoints are compared: the fused prediction's where there is one."""
    return accuracy.get("fused", accuracy["class"])


def introduce(
    s: Settings, network: nn.Module, train_set: DataSet, val_set: DataSet, device: torch.device
) -> None:
    """Prints what is trained on what and how."""
    names = f"{train_set.names} + {val_set.names}"
    devices.check_equal("data set", f"{len(train_set)} + {len(val_set)} images ({names})")
    print0(
        f"{s.data}: {len(train_set)} training and {len(val_set)} validation images, "
        f"{len(train_set.classes)} classes; {device} × {world_size()}, torch {torch.__version__}"
    )
    counts = Counter(torch.as_tensor(train_set.labels).tolist())
    names = [f"{launch.printable(name)} {counts[label]}" for label, name in enumerate(train_set.classes)]
    print0(f"  {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}")
    flags.describe(s)
    size, peak = sum(p.numel() for p in network.parameters()), s.lr * s.batch_size / 512
    steps = s.epochs * steps_per_epoch(train_set, s)
    print0(f"{size:,} parameters, {steps} steps, learning rate {peak:.3g}; the run is in {s.out}")
    if s.ema and (memory := round(1 / (1 - s.ema))) > steps:
        text = f"--ema {s.ema} averages over {memory} steps, and the run has only {steps}"
        raise UserError(f"{text}; try --ema {max(0, 1 - 10 / steps):.3g}")


def report(s: Settings, accuracy: dict[str, float], started: float) -> None:
    """Prints what came out, where it is, and what to do next."""
    minutes, begin = (time.monotonic() - started) / 60, "--resume" if s.resume else "the start"
    best = max(read_log(s.out), key=lambda record: top1(record["accuracy"]))
    best = f"best.pth (epoch {best['epoch']}, {top1(best['accuracy']):.2f} %)"
    print0(f"\n{s.model} on {s.data}, {minutes:.1f} minutes after {begin}: {accuracy_line(accuracy)}")
    print0(f"The run is in {s.out}: last.pth, {best}, log.jsonl, settings.json.")
    print0(f"Next:  python evaluate.py accuracy {s.out}/last.pth")
