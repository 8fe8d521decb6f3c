"""Training: one flat loop for students, teachers and fine-tuning (section 6, Table 9).

    torchrun train.py --model tiny --distill hard                       # minutes on a laptop
    torchrun train.py --data cifar10 --model tiny --distill hard        # one GPU
    torchrun --nproc_per_node 8 train.py --data imagenet --data-path IMAGENET --model base --distill hard

`python train.py` is the same on one process. The defaults of a data set are its recipe, RECIPES below.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from augment import Augment, RepeatedAugmentSampler, keyed_generator, normalize
from data import DATA_NAMES, ArraySet, FolderSet, eval_batches, load_data, train_batches
from distill import (
    REGNETY,
    check_name,
    create_convnet,
    create_teacher,
    hard_distillation_loss,
    is_url,
    label_loss,
    published_url,
    read_checkpoint,
    soft_distillation_loss,
    teacher_logits,
    try_network,
)
from model import SIZES, UsageError, create_model, fuse, load_weights

# ---- Settings ----


def number(kind: type, low: float, high: float = math.inf, below: float = math.inf) -> Callable:
    """An argparse type: a number with low <= value <= high and value < below."""

    def convert(text: str):
        value = kind(text)
        if not (low <= value <= high and value < below):
            limit = f" and at most {high:g}" if high < math.inf else f" and below {below:g}"
            limit = limit if min(high, below) < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be at least {low:g}{limit}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


COUNT, POSITIVE, SHARE, RATE = (
    number(int, 1),
    number(float, 0),
    number(float, 0, 1),
    number(float, 0, below=1),
)
DEVICES = ("auto", "cuda", "mps", "cpu")

# Every setting is a flag: its value in the paper (Table 9), what it may be, what it means and in which unit.
SETTINGS = {
    "what to train on what": {
        "data": ("shapes", DATA_NAMES, "data set, with its recipe"),
        "data_path": ("data", str, "where downloads go, or a tree with train/CLASS/* and val/CLASS/*"),
        "model": ("tiny", str, "tiny, small, base, or a teacher: regnet_y_200mf, _4gf, _8gf, _12gf, _16gf or "
                               "any classifier of torchvision"),
        "img_size": (224, COUNT, "side of the square images, pixels"),
        "patch_size": (16, COUNT, "side of a patch, pixels; divides the image size"),
    },
    "distillation (section 4)": {
        "distill": ("none", ("none", "soft", "hard", "label"), "soft: equation 2; hard: equation 3; label: a "
                    "second token trained on the true label, the paper's control"),
        "no_distill_token": (False, bool, "distil into the class token alone (Table 3, rows 2 and 3)"),
        "teacher": ("regnet_y_16gf", str, "the teacher's network, as in --model"),
        "teacher_weights": ("", str, "'published' (torchvision's), or a checkpoint's path or URL; without it "
                            "a teacher is trained first on the same data and kept beside the run"),
        "teacher_epochs": (300, COUNT, "epochs of a teacher"),
        "tau": (3.0, number(float, 1e-6), "temperature τ of soft distillation"),
        "lam": (0.1, SHARE, "weight λ of the teacher's term in soft distillation"),
    },
    "augmentation and regularisation (Table 7)": {
        "augment": ("randaugment", ("randaugment", "autoaugment", "none", "off"), "besides crop and flip; "
                    "none: colour jitter instead; off: no crop and flip either"),
        "mixup": (0.8, POSITIVE, "Mixup's Beta parameter α, 0 is off"),
        "cutmix": (1.0, POSITIVE, "CutMix's Beta parameter α, 0 is off"),
        "erasing": (0.25, SHARE, "probability of random erasing"),
        "repeats": (3, COUNT, "times an image is repeated in a shuffle (repeated augmentation), 1 is off"),
        "smoothing": (0.1, RATE, "label smoothing ε of the true labels"),
        "dropout": (0.0, RATE, "dropout probability"),
        "drop_path": (0.1, RATE, "stochastic depth: the probability that drops the last block"),
        "ema": (0.0, RATE, "decay of the weights' moving average (the authors' 0.99996), which is then what "
                           "is evaluated; 0 is off"),
    },
    "optimisation (Table 9)": {
        "optimizer": ("adamw", ("adamw", "sgd"), "sgd has Nesterov momentum 0.9"),
        "lr": (5e-4, POSITIVE, "learning rate per 512 images: the one used is lr × batch size / 512"),
        "min_lr": (1e-5, POSITIVE, "learning rate at the end of the cosine, as it is"),
        "warmup_lr": (1e-6, POSITIVE, "learning rate at the start of the warm-up, as it is"),
        "warmup_epochs": (5.0, POSITIVE, "epochs of linear warm-up"),
        "weight_decay": (0.05, POSITIVE, "not for biases, norms, tokens and position embeddings"),
        "clip_grad": (0.0, POSITIVE, "largest norm of the gradient, 0 is no clipping"),
        "epochs": (300, COUNT, "epochs, each of about as many images as the data set has"),
        "batch_size": (1024, COUNT, "images a step, of all processes and accumulated parts together"),
        "accumulate": (1, COUNT, "parts into which each process cuts its share of a batch, to save memory"),
    },
    "running": {
        "precision": ("auto", ("auto", "fp32", "bf16", "fp16"), "auto: bf16 on a GPU that has it, else fp16; "
                      "fp32 elsewhere"),
        "compile": (False, bool, "use torch.compile"),
        "device": ("auto", DEVICES, "auto takes a GPU where there is one"),
        "workers": (-1, number(int, -1), "processes that read image files, -1 chooses"),
        "seed": (0, number(int, 0, 2**62), "of everything random; the data set shapes is always the same"),
        "out": ("", str, "the run's directory; else runs/DATA-MODEL-DISTILL"),
        "resume": (False, bool, "continue the run in --out, or start it if there is none"),
        "overwrite": (False, bool, "replace the run in --out"),
    },
}  # fmt: skip
PAPER = {name: default for group in SETTINGS.values() for name, (default, _, _) in group.items()}

# What each data set changes: its recipe.
SMALL = dict(teacher="regnet_y_200mf", teacher_epochs=30, repeats=1)
RECIPES = {
    "imagenet": dict(teacher_weights="published"),
    "cifar10": dict(SMALL, img_size=32, patch_size=4, epochs=100, batch_size=256, lr=1e-3),
    "cifar100": dict(SMALL, img_size=32, patch_size=4, epochs=100, batch_size=256, lr=1e-3),
    "folder": dict(SMALL, epochs=100, batch_size=64, lr=1e-3),
    "shapes": dict(SMALL, img_size=32, patch_size=8, epochs=8, batch_size=64, lr=4e-3, warmup_epochs=0.5,
                   drop_path=0.0, teacher_epochs=4),
}  # fmt: skip
# What a convnet changes: SGD. Teachers have "the same data and same data-augmentation" (section 5.2),
# but for shapes, where a teacher has one minute: too little for the whole of it.
CONVNET = dict(optimizer="sgd", lr=0.8, min_lr=0.0, weight_decay=5e-5, drop_path=0.0, distill="none")
CONVNET_RECIPES = {"shapes": dict(lr=0.4, augment="none", mixup=0.0, cutmix=0.0)}
# These do not change what a run computes: a resumed run may have others, a teacher serves for all of them.
INCIDENTAL = {"out", "workers", "device", "compile", "resume", "overwrite"}


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become the one line that all other mistakes are."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_flag(parser: argparse.ArgumentParser, name: str, default, kind, text: str) -> None:
    """The flag of one setting, which is parsed only if it was given: recipes have the defaults."""
    more = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
    if kind is bool:
        more = {"action": "store_true"}
    shown = "" if kind is bool or default == "" else f" [{default}]"
    parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text + shown, **more)


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags that train.py and finetune.py share."""
    note = "The value in [brackets] is the paper's for ImageNet; a data set's recipe may have another."
    parser = Parser(prog=prog, description=description, epilog=note, allow_abbrev=False)
    for title, settings in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, setting in settings.items():
            add_flag(group, name, *setting)
    return parser


def complete(given: dict) -> dict:
    """All settings of a run: the flags given, over the data set's recipe, over the paper's."""
    data = given.get("data", PAPER["data"])
    settings = PAPER | RECIPES[data]
    if given.get("model", settings["model"]) not in SIZES:
        settings |= CONVNET | CONVNET_RECIPES.get(data, {}) | {"epochs": settings["teacher_epochs"]}
    settings |= given
    if "warmup_epochs" not in given:  # a short run cannot spend the paper's 5 of 300 epochs on it
        settings["warmup_epochs"] = min(settings["warmup_epochs"], settings["epochs"] / 10)
    if not settings["out"]:
        settings["out"] = f"runs/{settings['data']}-{settings['model']}-{settings['distill']}"
    return settings


# ---- Processes and devices ----


class Place(NamedTuple):
    """Where this process stands among the others, and on what device it computes."""

    rank: int
    world: int
    device: torch.device


def join(device: str) -> Place:
    """Joins the processes that torchrun started, if it did."""
    if device == "auto":
        device = (
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no Apple GPU here; use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"{local + 1} processes on a machine of {torch.cuda.device_count()} GPUs; lower "
                "--nproc_per_node"
            )
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if world > 1:
        on_gpu = device.startswith("cuda")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(hours=1),  # the first process may download or decode that long
            device_id=torch.device(device) if on_gpu else None,
        )
    return Place(rank, world, torch.device(device))


def total(values: Tensor, place: Place) -> Tensor:
    """The sum of `values` over all processes."""
    if place.world > 1:
        dist.all_reduce(values)
    return values


def first_alone(place: Place, act: Callable):
    """act() in the first process, then in the others, which find what the first has downloaded."""
    if place.rank > 0:
        dist.barrier()
    result = act()
    if place.rank == 0 and place.world > 1:
        dist.barrier()
    return result


def say(place: Place, text: str) -> None:
    """Prints from the first process alone."""
    if place.rank == 0:
        print(text, flush=True)


def printable(text: str) -> str:
    """The text with line breaks and other control characters escaped, which a file's name may hold."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def precision(settings: dict, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; float32 off the GPU, where narrower ones are no faster."""
    name = settings["precision"]
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(settings: dict, device: torch.device):
    dtype = precision(settings, device)
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


# ---- What a run is made of ----


def build_network(settings: dict, num_classes: int) -> nn.Module:
    """The network to train, with fresh weights that depend on the seed alone."""
    torch.manual_seed(settings["seed"])
    if settings["model"] not in SIZES:
        return create_convnet(settings["model"], num_classes, settings["img_size"])
    distilled = settings["distill"] != "none" and not settings["no_distill_token"]
    return create_model(
        settings["model"],
        num_classes=num_classes,
        img_size=settings["img_size"],
        patch_size=settings["patch_size"],
        distilled=distilled,
        dropout=settings["dropout"],
        drop_path=settings["drop_path"],
    )


def build_optimizer(network: nn.Module, settings: dict) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and convolutions only."""
    decayed, spared = [], []
    for name, parameter in network.named_parameters():
        token = name in ("cls_token", "dist_token", "pos_embed")
        (spared if token or parameter.ndim < 2 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": spared, "weight_decay": 0.0},
    ]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=decayed[0].device.type != "mps"
    )


def learning_rate(step: int, steps: int, warmup: int, settings: dict) -> float:
    """Linear warm-up from warmup_lr over `warmup` steps, then a cosine down to min_lr at step `steps`."""
    peak = settings["lr"] * settings["batch_size"] / 512
    if step < warmup:
        return settings["warmup_lr"] + (peak - settings["warmup_lr"]) * step / warmup
    low = min(settings["min_lr"], peak)
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def loss_function(settings: dict, teacher: nn.Module | None) -> Callable[..., Tensor]:
    """loss(outputs, targets, inputs): the teacher sees exactly the inputs that the student saw."""

    def loss(outputs, targets: Tensor, inputs: Tensor) -> Tensor:
        if teacher is None:
            return label_loss(outputs, targets)
        judged = teacher_logits(teacher, inputs)
        if settings["distill"] == "soft":
            return soft_distillation_loss(outputs, targets, judged, settings["tau"], settings["lam"])
        return hard_distillation_loss(outputs, targets, judged)

    return loss


HEADS = ("class", "distillation", "fused")


@torch.no_grad()
def head_scores(
    network: nn.Module, data: ArraySet | FolderSet, settings: dict, place: Place
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Labels (B,) and each head's scores (B, C), batch by batch: every image once over all processes.

    The heads are the class head and, of a pair, the distillation head and the fused prediction. A process
    sees the images rank, rank + world, rank + 2 world and so on.
    """
    network.eval()
    batches = eval_batches(
        data,
        settings["img_size"],
        max(1, min(256, settings["batch_size"])),
        rank=place.rank,
        world=place.world,
        workers=workers(settings, place),
        device=place.device,
    )
    for images, labels in batches:
        with autocast(settings, place.device):
            outputs = network(normalize(images))
        yield labels, [outputs] if isinstance(outputs, Tensor) else [*outputs, fuse(outputs)]


def evaluate(
    network: nn.Module, data: ArraySet | FolderSet, settings: dict, place: Place
) -> dict[str, float]:
    """Top-1 accuracy in percent by head: `class`, and for a pair also `distillation` and `fused`.

    Every image counts once, on any number of processes.
    """
    if place.world > 1:
        for buffer in network.buffers():  # BatchNorm's statistics differ by process: the first one's are kept
            dist.broadcast(buffer, 0)
    heads = HEADS if getattr(network, "distilled", False) else HEADS[:1]
    correct = torch.zeros(len(heads), device=place.device)
    for labels, scores in head_scores(network, data, settings, place):
        correct += torch.stack([(head.argmax(dim=1) == labels).sum() for head in scores])
    return dict(zip(heads, (100 * total(correct, place) / len(data)).tolist(), strict=True))


def headline(accuracy: dict[str, float]) -> str:
    """Accuracies on one line: `class 71.20 %  distillation 73.15 %  fused 73.40 %`."""
    return "  ".join(f"{head} {share:.2f} %" for head, share in accuracy.items())


def chief(accuracy: dict[str, float]) -> float:
    """The accuracy by which checkpoints are compared: the fused prediction's where there is one."""
    return accuracy.get("fused", accuracy["class"])


def workers(settings: dict, place: Place) -> int:
    """How many processes read image files for this one."""
    if settings["workers"] >= 0:
        return settings["workers"]
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# ---- Files of a run ----


def write_whole(path: Path, write: Callable) -> None:
    """Calls `write` with a binary file that takes the name `path` only when it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f"could not write {path}: {error.strerror}; what was saved before is intact"
        ) from error


def restore(settings: dict, given: dict) -> tuple[dict, dict]:
    """The settings and the checkpoint to continue from: the run's own with --resume, else as they are and {}.

    Raises UsageError if a flag given differs from the run's, or if a run would be written over without leave.
    """
    out = Path(settings["out"])
    if not (out / "last.pth").exists():
        return settings, {}
    if not (settings["resume"] or settings["overwrite"]):
        raise UsageError(
            f"{out} holds a run; continue it with --resume, replace it with --overwrite, or choose "
            "another --out"
        )
    if not settings["resume"]:
        return settings, {}
    checkpoint = read_checkpoint(out / "last.pth")
    saved = {name: value for name, value in checkpoint["settings"].items() if name != "classes"}
    for name in sorted(given.keys() & saved.keys() - INCIDENTAL):
        if given[name] != saved[name]:
            raise UsageError(
                f"the run in {out} has --{name.replace('_', '-')} {saved[name]}, not {given[name]}; "
                "resume it with its own settings"
            )
    return saved | {name: settings[name] for name in INCIDENTAL}, checkpoint


def prepare_directory(out: Path) -> None:
    """Makes a run's directory and sees that it can be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the directory {out}: {error.strerror}; choose another --out"
        ) from error
    if not os.access(out, os.W_OK):
        raise UsageError(f"cannot write to {out}; choose another --out")


def start_directory(out: Path, settings: dict, fresh: bool) -> None:
    """Writes a run's settings into its directory, empty of an earlier run if this is a fresh one."""
    prepare_directory(out)
    for stale in ("last.pth", "best.pth", "log.jsonl") if fresh else ():
        (out / stale).unlink(missing_ok=True)
    write_whole(out / "settings.json", lambda file: file.write(json.dumps(settings, indent=2).encode()))


# ---- The loop ----


CLEAR = "\r\033[K"  # rewrites the line on a terminal


class Progress:
    """One rewritten line on a terminal, a line now and then in a log."""

    def __init__(self, place: Place, first: int, steps: int, batch_size: int):
        self.place, self.first, self.steps, self.batch_size = place, first, steps, batch_size
        self.live = sys.stdout.isatty()
        self.started = self.shown = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.shown > (0.5 if self.live else 15)

    def line(self, text: str, end: str = "\n") -> None:
        if self.place.rank == 0:
            print(f"{CLEAR if self.live else ''}{text}", end=end, flush=True)

    def show(self, step: int, epoch: int, loss: float, lr: float) -> None:
        self.shown = time.monotonic()
        elapsed, done = self.shown - self.started, step - self.first
        rate, left = done * self.batch_size / elapsed, elapsed / done * (self.steps - step)
        text = (
            f"epoch {epoch + 1}  step {step}/{self.steps}  loss {loss:.3f}  lr {lr:.2e}  {rate:.0f} images/s"
        )
        self.line(f"{text}  {left // 60:.0f}:{left % 60:02.0f} left", end="" if self.live else "\n")


class Run:
    """All that changes while a network is trained, and that a checkpoint therefore holds."""

    def __init__(
        self, settings: dict, device: torch.device, initial: Callable[[nn.Module], None] | None = None
    ):
        self.settings = settings
        self.network = build_network(settings, len(settings["classes"])).to(device)
        if initial is not None:
            initial(self.network)
        if settings["model"] not in SIZES:  # convolutions are faster so
            self.network = self.network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.network, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision(settings, device) == torch.float16)
        self.average = copy.deepcopy(self.network).requires_grad_(False) if settings["ema"] else None
        self.blend = get_ema_multi_avg_fn(settings["ema"])
        self.step = 0  # steps done
        self.log: list[dict] = []  # one record an epoch

    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.network if self.average is None else self.average

    def update_average(self) -> None:
        """average <- decay · average + (1 - decay) · network; BatchNorm's counts are copied."""
        pairs = list(zip(self.average.state_dict().values(), self.network.state_dict().values(), strict=True))
        self.blend(*zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True), None)
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)

    def contents(self) -> dict:
        """The checkpoint."""
        return {
            "model": self.network.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {"step": self.step, "log": self.log},
            "settings": self.settings,
        }

    def restore(self, contents: dict) -> None:
        """Continues from a checkpoint."""
        self.network.load_state_dict(contents["model"])
        self.optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:  # empty where no fp16 was used
            self.scaler.load_state_dict(contents["scaler"])
        if self.average is not None:
            self.average.load_state_dict(contents["ema"])
        self.step, self.log = contents["progress"]["step"], contents["progress"]["log"]

    def save(self, out: Path) -> None:
        """Writes the log, best.pth if the newest epoch is the best so far, and last.pth."""
        contents, scores = self.contents(), [chief(record["accuracy"]) for record in self.log]
        text = "".join(json.dumps(record) + "\n" for record in self.log)
        write_whole(out / "log.jsonl", lambda file: file.write(text.encode()))
        for name in ["best.pth", "last.pth"] if scores[-1] > max(scores[:-1], default=-1) else ["last.pth"]:
            write_whole(out / name, lambda file: torch.save(contents, file))


def train(
    settings: dict,
    data: list[ArraySet | FolderSet],
    teacher: nn.Module | None,
    place: Place,
    checkpoint: dict,
    initial: Callable[[nn.Module], None] | None = None,
) -> dict[str, float]:
    """Trains one network and leaves its run in settings["out"]. Returns the accuracies at the end.

    `checkpoint` is what to continue from, {} for a fresh run; `initial` may change a fresh network's weights.
    """
    (train_set, val_set), out, device, seed = data, Path(settings["out"]), place.device, settings["seed"]
    settings = settings | {"classes": train_set.classes}
    part_size = settings["batch_size"] // (place.world * settings["accumulate"])  # images a forward pass
    sampler = RepeatedAugmentSampler(len(train_set), place.world, place.rank, settings["repeats"], seed)
    per_epoch = len(sampler) // (part_size * settings["accumulate"])
    if per_epoch == 0:
        epoch_size = len(sampler) * place.world
        raise UsageError(
            f"--batch-size {settings['batch_size']} is more than an epoch's {epoch_size} images; lower it"
        )
    steps, warmup = settings["epochs"] * per_epoch, round(settings["warmup_epochs"] * per_epoch)

    run = Run(settings, device, None if checkpoint else initial)
    if checkpoint:
        if checkpoint["settings"]["classes"] != train_set.classes:
            raise UsageError(f"the classes of {settings['data']} are no longer those of the run in {out}")
        run.restore(checkpoint)
        say(place, f"resuming {out} after epoch {run.step // per_epoch}")
    if place.rank == 0:
        start_directory(out, settings, fresh=not checkpoint)
    model = torch.compile(run.network) if settings["compile"] else run.network
    if place.world > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    batches = train_batches(
        train_set,
        settings["img_size"],
        part_size,
        sampler,
        per_epoch=per_epoch * settings["accumulate"],
        start=run.step * settings["accumulate"],
        stop=steps * settings["accumulate"],
        crop=settings["augment"] != "off",
        workers=workers(settings, place),
        device=device,
    )
    augment = Augment(
        len(train_set.classes),
        *(settings[name] for name in ("augment", "erasing", "mixup", "cutmix", "smoothing")),
    )
    loss_of = loss_function(settings, teacher)
    loss_sum = torch.zeros((), device=device)  # over the epoch so far; read only now and then
    progress = Progress(place, run.step, steps, settings["batch_size"])
    model.train()
    while run.step < steps:
        lr = learning_rate(run.step, steps, warmup, settings)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        for part in range(settings["accumulate"]):
            key = (seed, run.step, part, place.rank)
            images, labels = next(batches)
            inputs, targets = augment(images, labels, keyed_generator("augment", *key))
            torch.manual_seed(keyed_generator("model", *key).initial_seed())  # dropout and stochastic depth
            last_part = part == settings["accumulate"] - 1
            with nullcontext() if last_part or place.world == 1 else model.no_sync():
                with autocast(settings, device):
                    loss = loss_of(model(inputs), targets, inputs) / settings["accumulate"]
                run.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if settings["clip_grad"]:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.network.parameters(), settings["clip_grad"])
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.update_average()
        run.step += 1

        epoch, done = (run.step - 1) // per_epoch, (run.step - 1) % per_epoch + 1
        if progress.due() or done == per_epoch:
            mean_loss = loss_sum.item() / done
            if not math.isfinite(mean_loss):
                kept = f"{out / 'last.pth'} is from before" if run.log else "nothing was saved"
                raise UsageError(
                    f"the loss is {mean_loss} after step {run.step} at learning rate {lr:.2e}; {kept}; try a "
                    "lower --lr or --precision fp32"
                )
            progress.show(run.step, epoch, mean_loss, lr)
        if done == per_epoch:
            mean_loss = total(loss_sum, place).item() / place.world / per_epoch
            accuracy = evaluate(run.evaluated(), val_set, settings, place)
            run.log.append(
                {"epoch": epoch + 1, "step": run.step, "lr": lr, "loss": mean_loss, "accuracy": accuracy}
            )
            if place.rank == 0:
                run.save(out)
            progress.line(
                f"epoch {epoch + 1}/{settings['epochs']}  loss {mean_loss:.3f}  val {headline(accuracy)}"
            )
            loss_sum.zero_()
            model.train()
    return run.log[-1]["accuracy"]


def check(settings: dict, place: Place) -> None:
    """Refuses early what cannot work."""
    parts = place.world * settings["accumulate"]
    if settings["batch_size"] % parts:
        raise UsageError(
            f"--batch-size {settings['batch_size']} does not divide into {place.world} processes × "
            f"{settings['accumulate']} parts; try {math.ceil(settings['batch_size'] / parts) * parts}"
        )
    for name in (settings["model"], settings["teacher"]):
        check_name(name)
    if settings["model"] in SIZES:
        with torch.device("meta"):  # refuses impossible sizes without building anything
            create_model(settings["model"], img_size=settings["img_size"], patch_size=settings["patch_size"])
    weights, distils = settings["teacher_weights"], settings["distill"] in ("soft", "hard")
    if weights == "published" and distils:
        published_url(settings["teacher"])
    elif weights not in ("", "published") and not is_url(weights) and not Path(weights).is_file():
        raise UsageError(f"there is no file {weights}; --teacher-weights takes a checkpoint's path or URL")
    if settings["distill"] == "label" and (settings["no_distill_token"] or settings["model"] not in SIZES):
        raise UsageError(
            "--distill label is about a second token; it needs a transformer and no --no-distill-token"
        )
    if settings["warmup_epochs"] >= settings["epochs"]:
        raise UsageError(f"--warmup-epochs must be less than --epochs, {settings['epochs']}")
    for name in {settings["model"], settings["teacher"] if distils else "tiny"} - {*SIZES, *REGNETY}:
        try_network(name, settings["img_size"])
    prepare_directory(Path(settings["out"]))
    if settings["data"] in ("folder", "imagenet") and not Path(settings["data_path"]).is_dir():
        raise UsageError(f"there is no folder {settings['data_path']}; name the data set's with --data-path")


# ---- The teacher that is trained first ----


def train_teacher(
    settings: dict,
    data: list[ArraySet | FolderSet],
    place: Place,
    recipe: dict | None = None,
    start: str = "",
) -> str:
    """The checkpoint of a teacher trained on the same data, from an earlier run or from now.

    It has the data set's recipe, whatever the student's flags, and what `recipe` changes in it; `start` are
    the weights it begins with, if not fresh ones. It is kept beside the student's run. The directory's name
    ends in a hash of all that decides what the teacher becomes, so that students of any settings and seeds
    share one, and another data set never does.
    """
    shared = ("data", "data_path", "img_size", "patch_size", "batch_size", "accumulate")
    shared += ("precision", "device", "workers")
    own = {name: settings[name] for name in shared} | {"model": settings["teacher"], "distill": "none"}
    own = complete(own | {"epochs": settings["teacher_epochs"], "resume": True} | (recipe or {}))
    identity = {name: value for name, value in own.items() if name not in INCIDENTAL}
    identity |= {"classes": data[0].classes, "images": len(data[0]), "start": start}
    identity |= {"data_path": str(Path(own["data_path"]).resolve())}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = f"teacher-{own['data']}-{own['img_size']}px-{own['model'].replace('/', '_')}-{digest}"
    own["out"] = str(Path(settings["out"]).parent / name)
    last = Path(own["out"]) / "last.pth"
    own, checkpoint = restore(own, given={})
    log = checkpoint["progress"]["log"] if checkpoint else []
    if len(log) == own["epochs"]:
        say(place, f"teacher: {last}, trained earlier, {chief(log[-1]['accuracy']):.2f} % top-1")
        return str(last)
    say(
        place, f"teacher: training a {own['model']} first, {own['epochs']} epochs; it is kept in {own['out']}"
    )

    def begin_with(network: nn.Module) -> None:
        sizes = {name: settings[name] for name in ("img_size", "patch_size")}
        low = create_teacher(own["model"], len(data[0].classes), start, **sizes)
        if own["model"] in SIZES:
            load_weights(network, low.state_dict())
        else:
            network.load_state_dict(low.state_dict())

    accuracy = train(own, data, None, place, checkpoint, begin_with if start else None)
    say(place, f"teacher: {chief(accuracy):.2f} % top-1")
    if place.world > 1:
        dist.barrier()  # the file is whole before anyone reads it
    return str(last)


def load_teacher(settings: dict, data: list[ArraySet | FolderSet], place: Place) -> nn.Module:
    """The teacher in settings["teacher_weights"], on the device."""
    classes, weights = data[0].classes, settings["teacher_weights"]
    sizes = {name: settings[name] for name in ("img_size", "patch_size")}
    teacher = first_alone(place, lambda: create_teacher(settings["teacher"], len(classes), weights, **sizes))
    teacher = teacher.to(place.device)
    if teacher.classes is not None and teacher.classes != classes:
        odd = next(n for n in range(len(classes)) if teacher.classes[n] != classes[n])
        raise UsageError(
            f"{weights} knows other classes, or in another order: class {odd} is {teacher.classes[odd]!r} "
            f"there and {classes[odd]!r} here; a teacher must have been trained on the student's classes"
        )
    return teacher if settings["teacher"] in SIZES else teacher.to(memory_format=torch.channels_last)


# ---- The program ----


def describe(settings: dict, data: list[ArraySet | FolderSet], place: Place) -> None:
    """Prints the settings a run uses, all of them, and what it runs on."""
    train_set, val_set = data
    say(
        place,
        f"{settings['data']}: {len(train_set)} training and {len(val_set)} validation images, "
        f"{len(train_set.classes)} classes; {place.device} × {place.world}, torch {torch.__version__}",
    )
    line = ""
    for name, value in settings.items():
        word = f"{name}={value}"
        if len(line) + len(word) > 108:
            say(place, line)
            line = ""
        line += f"  {word}"
    say(place, line)


def begin(settings: dict) -> tuple[Place, list[ArraySet | FolderSet]]:
    """Joins the other processes, refuses what cannot work, and loads the data."""
    place = join(settings["device"])
    check(settings, place)
    source = [settings[name] for name in ("data", "data_path", "img_size")]
    data = first_alone(place, lambda: load_data(*source, place.device))
    describe(settings, data, place)
    return place, data


def finish(settings: dict, accuracy: dict[str, float], started: float, place: Place) -> None:
    """Tells what came out, where it is, and what to do next."""
    minutes = (time.monotonic() - started) / 60
    say(
        place,
        f"\n{settings['model']} on {settings['data']}, top-1 in validation, after {minutes:.1f} minutes:",
    )
    for head, share in accuracy.items():
        say(place, f"  {head:12} {share:6.2f} %")
    say(
        place,
        f"The run is in {settings['out']}: last.pth, best.pth, log.jsonl, settings.json.\nNext:  "
        f"python evaluate.py accuracy {settings['out']}/last.pth",
    )


def program(main: Callable[[], None]) -> None:
    """Runs a script's main function; a person's mistake ends it with one line and exit code 2."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # what all processes find is told by the first, whose end stops the others
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; lower --batch-size or raise --accumulate", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def main() -> None:
    started = time.monotonic()
    given = vars(build_parser("train.py", __doc__.splitlines()[0]).parse_args())
    settings, checkpoint = restore(complete(given), given)
    place, data = begin(settings)
    teacher = None
    if settings["distill"] in ("soft", "hard"):
        settings["teacher_weights"] = settings["teacher_weights"] or train_teacher(settings, data, place)
        teacher = load_teacher(settings, data, place)
    accuracy = train(settings, data, teacher, place, checkpoint)
    finish(settings, accuracy, started, place)


if __name__ == "__main__":
    program(main)
