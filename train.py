"""Training: one flat loop for students, teachers and fine-tuning (section 6, Table 9).

    torchrun train.py --model tiny --distill hard                       # minutes on a laptop
    torchrun train.py --data cifar10 --model tiny --distill hard        # one GPU
    torchrun --nproc_per_node 8 train.py --data imagenet --data-path IMAGENET --model base --distill hard

`python train.py` is the same on one process. The defaults of a data set are its recipe, RECIPES below.
A run that was stopped or killed anywhere goes on with --resume; on a CPU it ends bit for bit as if it
never was.
"""

import argparse
import copy
import ctypes
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from augment import MEAN, Augment, RepeatedAugmentSampler, keyed_generator, normalize
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
from model import SIZES, UsageError, check_fit, create_model, fuse, load_weights, nearest

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


def choice(options: tuple[str, ...]) -> Callable:
    """An argparse type: one of the options."""

    def convert(text: str) -> str:
        if text not in options:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(options)}{nearest(text, options)}"
            )
        return text

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
        "img_size": (224, number(int, 1, 4096), "side of the square images, pixels"),
        "patch_size": (16, number(int, 1, 4096), "side of a patch, pixels; divides the image size"),
    },
    "distillation (section 4)": {
        "distill": ("none", ("none", "soft", "hard", "label"), "soft: equation 2; hard: equation 3; label: a "
                    "second token trained on the true label, the paper's control"),
        "no_distill_token": (False, bool, "distil into the class token alone (Table 3, rows 2 and 3)"),
        "teacher": ("regnet_y_16gf", str, "the teacher's network, as in --model"),
        "teacher_weights": ("", str, "'published' (torchvision's), or a checkpoint's path or URL; without it "
                            "a teacher is trained first on the same data and kept beside the run"),
        "teacher_epochs": (300, COUNT, "epochs of a teacher"),
        "tau": (3.0, number(float, 1e-6, 1e6), "temperature τ of soft distillation"),
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
        "workers": (-1, number(int, -1, 256), "processes that read image files, -1 chooses"),
        "skip_broken": (False, bool, "leave out image files that cannot be read, and count them"),
        "seed": (0, number(int, 0, 2**62), "of everything random; the data set shapes is always the same"),
        "out": ("", str, "the run's directory, else one below runs/ named after its settings"),
        "save_every": (0, number(int, 0), "steps between saves within an epoch; 0: at the end of each alone"),
        "resume": (False, bool, "continue the run in --out, or start it if there is none"),
        "overwrite": (False, bool, "replace the run in --out"),
    },
}  # fmt: skip
PAPER = {name: default for group in SETTINGS.values() for name, (default, _, _) in group.items()}

# What each data set changes: its recipe.
SMALL = dict(teacher="regnet_y_200mf", teacher_epochs=30, repeats=1)
PICTURES = dict(SMALL, epochs=100, batch_size=64, lr=1e-3)
RECIPES = {
    "imagenet": dict(teacher_weights="published"),
    "cifar10": dict(SMALL, img_size=32, patch_size=4, epochs=100, batch_size=256, lr=1e-3),
    "cifar100": dict(SMALL, img_size=32, patch_size=4, epochs=100, batch_size=256, lr=1e-3),
    "folder": PICTURES,
    "flowers102": PICTURES,
    "cars": PICTURES,
    "inat2018": {},  # of ImageNet's scale; its teacher is trained too
    "inat2019": {},
    "shapes": dict(SMALL, img_size=32, patch_size=8, epochs=8, batch_size=64, lr=4e-3, warmup_epochs=0.5,
                   drop_path=0.0, teacher_epochs=4),
}  # fmt: skip
# What a convnet changes: SGD. Teachers have "the same data and same data-augmentation" (section 5.2),
# but for shapes, where a teacher has one minute: too little for the whole of it.
CONVNET = dict(optimizer="sgd", lr=0.8, min_lr=0.0, weight_decay=5e-5, drop_path=0.0, distill="none")
CONVNET_RECIPES = {"shapes": dict(lr=0.4, augment="none", mixup=0.0, cutmix=0.0)}
# These do not change what a run computes: a resumed run may have others, a teacher serves for all of them.
INCIDENTAL = {"out", "workers", "device", "compile", "resume", "overwrite", "save_every", "skip_broken"}
# A resumed run may move to other machines.
ADJUSTABLE = {"accumulate", "data_path"}


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become the one line that all other mistakes are."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = re.findall(r"--[\w-]+", self.format_help())
            hint = nearest(unknown[0].partition("=")[0], flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def add_flag(parser: argparse.ArgumentParser, name: str, default, kind, text: str) -> None:
    """The flag of one setting, which is parsed only if it was given: recipes have the defaults."""
    more = {"type": kind}
    if isinstance(kind, tuple):
        more = {"type": choice(kind), "metavar": "{" + ",".join(kind) + "}"}
    if kind is bool:
        more = {"action": "store_true"}
    shown = "" if kind is bool or default == "" else f" [{default}]"
    parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text + shown, **more)


NOTE = "The value in [brackets] is the paper's for ImageNet; a data set's recipe may have another."


def build_parser(prog: str, description: str, shown: dict = PAPER, note: str = NOTE) -> Parser:
    """The flags that train.py and finetune.py share, each with its value in `shown`."""
    parser = Parser(prog=prog, description=description, epilog=note, allow_abbrev=False)
    for title, settings in SETTINGS.items():
        group = parser.add_argument_group(title)
        for name, (_, kind, text) in settings.items():
            add_flag(group, name, shown[name], kind, text)
    return parser


def complete(given: dict, recipe: dict | None = None) -> dict:
    """All settings of a run: the flags given, over `recipe`, over the data set's, over the paper's."""
    data = given.get("data", PAPER["data"])
    recipe = recipe or {}
    settings = PAPER | RECIPES[data] | recipe
    if given.get("model", settings["model"]) not in SIZES:
        settings |= CONVNET | CONVNET_RECIPES.get(data, {}) | {"epochs": settings["teacher_epochs"]}
    settings |= given
    if "warmup_epochs" not in given | recipe:  # a short run cannot spend the paper's 5 of 300 epochs on it
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


def keep_memory() -> None:
    """Has the C library keep freed memory for the next step, which else costs a page fault every 4 KiB."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):  # of glibc
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block apart, which goes back at once


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
    if device == "cpu":
        keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"{local + 1} processes on a machine of {torch.cuda.device_count()} GPUs; lower "
                "--nproc_per_node"
            )
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means it, in convolutions too
        device = f"cuda:{local}"
    if world > 1:
        on_gpu = device.startswith("cuda")
        store, _, _ = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            # After torchrun --max-restarts the store of one machine still has the addresses of the dead.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(hours=1),  # the first process may download or decode that long
            device_id=torch.device(device) if on_gpu else None,
        )
    return Place(rank, world, torch.device(device))


def total(values: Tensor, place: Place) -> Tensor:
    """The sum of `values` over all processes."""
    if place.world > 1:
        dist.all_reduce(values)
    return values


def gather(value: Tensor, place: Place) -> list[float]:
    """The scalars that all processes have, by rank."""
    values = [torch.zeros_like(value) for _ in range(place.world)] if place.world > 1 else [value]
    if place.world > 1:
        dist.all_gather(values, value)
    return [value.item() for value in values]


def first_alone(place: Place, act: Callable):
    """act() in the first process, then in the first of each machine, then in the others.

    So those who come later find what was downloaded, whether or not the machines share a disk.
    """
    mine = 0 if place.rank == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for turn in range(3):
        if turn == mine:
            result = act()
        if place.world > 1:
            dist.barrier()
    return result


def of_first(place: Place, find: Callable):
    """What find() returns in the first process, in all of them."""
    box = [find() if place.rank == 0 else None]
    if place.world > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def printable(text: str) -> str:
    """Text in which no name of a file or class can move the cursor, add lines or fail to be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(place: Place, text: str) -> None:
    """Prints from the first process alone."""
    if place.rank == 0:
        print("\n".join(printable(line) for line in text.split("\n")), flush=True)


class Interrupted(Exception):
    """A signal asked the run to stop: what was saved, and the signal's number."""


class Signals:
    """Notes SIGINT and SIGTERM, to be looked at between two steps."""

    def __init__(self, place: Place):
        self.got = 0  # the signal's number
        self.group = dist.new_group(backend="gloo") if place.world > 1 else None

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        if not self.got:  # torchrun sends a second one, which would end the end
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        self.got = number

    def answer(self) -> None:
        """Raises Interrupted if this process got a signal, whatever the others got."""
        if self.got:
            raise Interrupted

    def asked(self) -> int:
        """The signal any process got, or 0: the same answer for all, and no GPU waits for it."""
        flag = torch.tensor(self.got)
        if self.group is not None:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return flag.item()


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


# What --train of finetune.py lets learn: parameters with one of these in their names. With the attention go
# the position embeddings, which may just have been resized; they also move the tokens they are added to.
TRAINED = {"all": ("",), "head": ("head",), "attention": ("head", "attn", "pos_embed")}


def freeze(network: nn.Module, trained: str) -> None:
    """Lets only the parameters of TRAINED[trained] learn."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[trained]))


def build_optimizer(network: nn.Module, settings: dict) -> torch.optim.Optimizer:
    """AdamW or SGD, of what is not frozen; weight decay on matrices and convolutions only."""
    decayed, spared = [], []
    for name, parameter in network.named_parameters():
        token = name in ("cls_token", "dist_token", "pos_embed")
        if parameter.requires_grad:
            (spared if token or parameter.ndim < 2 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings["weight_decay"]},
        {"params": spared, "weight_decay": 0.0},
    ]
    kind = decayed[0].device.type
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=kind == "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=kind != "mps")


def learning_rate(step: int, steps: int, warmup: int, settings: dict) -> float:
    """Linear warm-up from warmup_lr over `warmup` steps, then a cosine down to min_lr at step `steps`."""
    peak = settings["lr"] * settings["batch_size"] / 512
    if step < warmup:
        return settings["warmup_lr"] + (peak - settings["warmup_lr"]) * step / warmup
    low = min(settings["min_lr"], peak)
    return low + (peak - low) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def loss_function(settings: dict, teacher: nn.Module | None) -> Callable[..., Tensor]:
    """loss(network, inputs, targets): the teacher sees exactly the inputs that the network sees."""

    def loss(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if teacher is None:
            return label_loss(network(inputs), targets)
        judged = teacher_logits(teacher, inputs)  # first, while no activations wait for the backward pass
        outputs = network(inputs)
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
    network: nn.Module,
    data: ArraySet | FolderSet,
    settings: dict,
    place: Place,
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Top-1 accuracy in percent by head: `class`, and for a pair also `distillation` and `fused`.

    Every image counts once, on any number of processes.
    """
    if place.world > 1:
        for buffer in network.buffers():  # BatchNorm's statistics differ by process: the first one's are kept
            dist.broadcast(buffer, 0)
    heads = HEADS if getattr(network, "distilled", False) else HEADS[:1]
    counts = torch.zeros(1 + len(heads), device=place.device)  # all, and those that each head has right
    for labels, scores in head_scores(network, data, settings, place):
        counts += torch.stack([labels >= 0, *(head.argmax(dim=1) == labels for head in scores)]).sum(dim=1)
        after_batch()
    seen, *right = total(counts, place).tolist()
    if seen == 0:
        raise UsageError("none of the validation images can be read")
    return {head: 100 * count / seen for head, count in zip(heads, right, strict=True)}


def count_broken(data: list[ArraySet | FolderSet], place: Place) -> int:
    """How many image files have been left out so far, by any process."""
    found = [set().union(*(part.broken for part in data))] * place.world
    if place.world > 1:
        dist.all_gather_object(found, found[0])
    return len(set().union(*found))


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


def write_whole(path: Path, write: Callable, previous: Path | None = None) -> None:
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
        if "DataLoader worker" in str(error):  # which may be raised anywhere
            raise
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UsageError(f"could not write {path}: {reason}; what was saved before is intact") from error


def write_json(path: Path, contents: dict) -> None:
    write_whole(path, lambda file: file.write(json.dumps(contents, indent=2).encode()))


CHECKPOINTS = ("last.pth", "previous.pth", "best.pth")  # of a run, in the order in which one is continued


def newest(out: Path) -> dict:
    """The checkpoint to continue from: the last one, or the newest before it if that is damaged.

    Damaged ones are renamed, so that no save puts them in the place of a whole one.
    """
    damaged = {}
    for path in (out / name for name in CHECKPOINTS if (out / name).exists()):
        try:
            checkpoint = read_checkpoint(path)
            if not {"model", "ema", "optimizer", "scaler", "progress", "settings"} <= checkpoint.keys():
                raise UsageError(f"{path} is not the checkpoint of a run")
        except UsageError as error:
            damaged[path] = str(error)
            continue
        if damaged and os.environ.get("RANK", "0") == "0":
            print(printable(f"{'; '.join(damaged.values())}; continuing from {path}"), flush=True)
            for bad in damaged:
                os.replace(bad, f"{bad}.damaged")
        return checkpoint
    raise UsageError(f"{'; '.join(damaged.values())}; delete {out} to start anew")


def check_same(given: dict, saved: dict, out: Path) -> None:
    """Raises UsageError if a flag given is not what the run in `out` has."""
    for name in sorted(given.keys() - INCIDENTAL - ADJUSTABLE):
        if given[name] != saved.get(name):
            flag, own = "--" + name.replace("_", "-"), saved.get(name, "as its recipe says")
            raise UsageError(
                f"the run in {out} has {flag} {own}, not {given[name]}; resume it with its own settings"
            )


def recall(given: dict, out: Path, tuned: bool) -> dict:
    """The flags of the run in `out` if it is to go on and was stopped before its first save, else `given`.

    `tuned` tells the runs of finetune.py, which alone goes on with them, from those of train.py.
    """
    if not given.get("resume") or any((out / name).exists() for name in CHECKPOINTS):
        return given
    if (out / "flags.json").exists():
        saved = json.loads((out / "flags.json").read_bytes())
        if ("checkpoint" in saved) != tuned:
            owner = "train.py" if tuned else "finetune.py"
            raise UsageError(f"{out} is a run of {owner}; continue it with {owner} --resume")
        check_same(given, saved, out)
        return saved | {name: given[name] for name in (INCIDENTAL | ADJUSTABLE) & given.keys()}
    if given.keys() <= INCIDENTAL:
        raise UsageError(f"there is no run in {out} to continue, and no flag that says what to start")
    return given


def restore(settings: dict, given: dict) -> tuple[dict, dict]:
    """The settings and the checkpoint to continue from: the run's own with --resume, else as they are and {}.

    Raises UsageError if a flag given differs from the run's, or if a run would be written over without leave.
    """
    out = Path(settings["out"])
    if not any((out / name).exists() for name in CHECKPOINTS):
        return settings, {}
    if not (settings["resume"] or settings["overwrite"]):
        raise UsageError(
            f"{out} holds a run; continue it with --resume, replace it with --overwrite, or choose "
            "another --out"
        )
    if not settings["resume"]:
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UsageError(
                f"--overwrite would replace the run in {out} again at each of torchrun's restarts; delete it "
                "and use --resume"
            )
        return settings, {}
    checkpoint = newest(out)
    saved = {name: value for name, value in checkpoint["settings"].items() if name != "classes"}
    check_same(given, saved, out)
    adjusted = {name: given[name] for name in ADJUSTABLE & given.keys()}
    return saved | adjusted | {name: settings[name] for name in INCIDENTAL}, checkpoint


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
    for partial in out.glob("*.partial"):  # of a process that was killed while it wrote
        partial.unlink(missing_ok=True)
    for stale in (*CHECKPOINTS, "log.jsonl") if fresh else ():
        (out / stale).unlink(missing_ok=True)
    write_json(out / "settings.json", settings)


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
            print(f"{CLEAR if self.live else ''}{printable(text)}", end=end, flush=True)

    def show(self, run: "Run", epoch: int) -> None:
        self.shown = time.monotonic()
        elapsed, done = self.shown - self.started, run.step - self.first
        rate, left = done * self.batch_size / elapsed, elapsed / done * (self.steps - run.step)
        loss = run.loss_sum.item() / ((run.step - 1) % run.per_epoch + 1)
        text = f"epoch {epoch}  step {run.step}/{self.steps}  loss {loss:.3f}"
        text += f"  lr {run.learning_rate(run.step - 1):.2e}  {rate:.0f} images/s"
        self.line(f"{text}  {left // 60:.0f}:{left % 60:02.0f} left", end="" if self.live else "\n")


NEVER = 2**62


class Run:
    """All that changes while a network is trained, and that a checkpoint therefore holds."""

    def __init__(
        self, settings: dict, place: Place, per_epoch: int, initial: Callable[[nn.Module], None] | None = None
    ):
        device, number = place.device, precision(settings, place.device)
        self.settings, self.place, self.per_epoch = settings, place, per_epoch
        self.network = build_network(settings, len(settings["classes"])).to(device)
        if initial is not None:
            initial(self.network)
        freeze(self.network, settings.get("train", "all"))
        if settings["model"] not in SIZES:  # the layout that torch recommends for convolutions
            self.network = self.network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.network, settings)
        self.scaler = torch.amp.GradScaler(device.type, enabled=number == torch.float16)
        self.average = copy.deepcopy(self.network).requires_grad_(False) if settings["ema"] else None
        if self.average is not None:
            self.blend = get_ema_multi_avg_fn(settings["ema"])
            states = self.average.state_dict(), self.network.state_dict()
            pairs = list(zip(*(state.values() for state in states), strict=True))
            self.averaged = list(zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True))
            self.counted = [pair for pair in pairs if not pair[0].is_floating_point()]
        self.step = 0  # steps done
        self.log: list[dict] = []  # one record an epoch
        # The loss of this epoch's steps so far: their sum here, and as last gathered from all processes
        self.loss_sum, self.loss_sums = torch.zeros((), device=device), [0.0]
        self.bad_step = torch.tensor(NEVER, device=device)  # the first whose loss was not finite
        # With another of these, the same run has other rounding errors
        self.made_on = f"{place.world} × {device.type}, {settings['accumulate']} parts, {number}"
        self.made_on += f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        self.made_on += f"{', compiled' if settings['compile'] else ''}, {torch.__version__}"

    def learning_rate(self, step: int) -> float:
        """The one that takes the network from `step` to the next."""
        steps, warmup = (round(self.settings[name] * self.per_epoch) for name in ("epochs", "warmup_epochs"))
        return learning_rate(step, steps, warmup, self.settings)

    def note(self, loss: Tensor) -> None:
        """Keeps account of a step's loss without waiting for the device."""
        self.loss_sum += loss
        self.bad_step = torch.where(loss.isfinite(), self.bad_step, self.bad_step.clamp(max=self.step))

    def check_finite(self) -> None:
        """Raises UsageError if any loss so far was not finite; waits for the device."""
        step = self.bad_step.item()
        if step < NEVER:
            last = Path(self.settings["out"]) / "last.pth"
            kept = f"{last} is from before it" if last.exists() else "nothing was saved before it"
            raise UsageError(
                f"the loss of step {step + 1} is not a finite number, at learning rate "
                f"{self.learning_rate(step):.2e}; {kept}; try a lower --lr or --precision fp32"
            )

    def settle(self) -> None:
        """What all processes do together before a save: gather their losses, refuse what is not finite."""
        self.loss_sums = gather(self.loss_sum, self.place)
        values = [value for value in self.network.state_dict().values() if value.is_floating_point()]
        finite = torch.stack([value.isfinite().all() for value in values]).all()
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=self.step - 1))
        if self.place.world > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        self.check_finite()

    def end_epoch(self, accuracy: dict[str, float]) -> None:
        """Writes the epoch's line into the log."""
        loss = sum(self.loss_sums) / self.place.world / self.per_epoch
        record = {"epoch": len(self.log) + 1, "step": self.step, "lr": self.learning_rate(self.step - 1)}
        self.log.append(record | {"loss": loss, "accuracy": accuracy})
        self.loss_sum.zero_()
        self.loss_sums = [0.0] * self.place.world

    def evaluated(self) -> nn.Module:
        """The network whose accuracy counts."""
        return self.network if self.average is None else self.average

    def update_average(self) -> None:
        """average <- decay · average + (1 - decay) · network; BatchNorm's counts are copied."""
        self.blend(*self.averaged, None)
        for average, current in self.counted:
            average.copy_(current)

    def save(self, best: bool = False) -> None:
        """Writes the log, then last.pth and, if told to, before it best.pth: the work of one process."""
        if self.place.rank > 0:
            return
        contents = {
            "model": self.network.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": {
                "step": self.step,
                "log": self.log,
                "per_epoch": self.per_epoch,
                "loss_sums": self.loss_sums,
                "made_on": self.made_on,
            },
            "settings": self.settings,
        }
        out, text = Path(self.settings["out"]), "".join(json.dumps(record) + "\n" for record in self.log)
        write_whole(out / "log.jsonl", lambda file: file.write(text.encode()))
        if best:
            write_whole(out / "best.pth", lambda file: torch.save(contents, file))
        write_whole(out / "last.pth", lambda file: torch.save(contents, file), out / "previous.pth")

    def restore(self, contents: dict) -> None:
        """Continues from a checkpoint."""
        self.network.load_state_dict(contents["model"])
        for group in contents["optimizer"]["param_groups"]:  # this device's way, not that of the one before
            group["fused"] = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(contents["optimizer"])
        if contents["scaler"]:  # empty where no fp16 was used
            self.scaler.load_state_dict(contents["scaler"])
        if self.average is not None:
            self.average.load_state_dict(contents["ema"])
        progress, rank = contents["progress"], self.place.rank
        self.step, self.log = progress["step"], progress["log"]
        same = len(progress["loss_sums"]) == self.place.world
        mean = sum(progress["loss_sums"]) / len(progress["loss_sums"])
        self.loss_sum.fill_(progress["loss_sums"][rank] if same else mean)
        if progress["per_epoch"] != self.per_epoch:
            raise UsageError(
                f"an epoch of the run in {self.settings['out']} has {progress['per_epoch']} steps, now "
                f"{self.per_epoch}: the data have changed; start the run anew with --overwrite"
            )
        say(self.place, f"resuming {self.settings['out']} after step {self.step}, {len(self.log)} epochs")
        if progress["made_on"] != self.made_on:
            say(
                self.place,
                f"the run was made on {progress['made_on']} and goes on on {self.made_on}: its numbers "
                "will differ a little from those of a run that was never stopped",
            )


def steps_per_epoch(settings: dict, train_set: ArraySet | FolderSet, place: Place) -> int:
    """How many steps an epoch has; raises UsageError if not even one."""
    sampler = RepeatedAugmentSampler(len(train_set), place.world, place.rank, settings["repeats"])
    epoch, batch = len(sampler) * place.world, settings["batch_size"]
    if epoch < batch:
        raise UsageError(f"--batch-size {batch} is more than an epoch's {epoch} images; lower it")
    return epoch // batch


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
    A signal to stop raises Interrupted, after a save.
    """
    (train_set, val_set), device, seed = data, place.device, settings["seed"]
    settings = settings | {"classes": train_set.classes}
    part_size = settings["batch_size"] // (place.world * settings["accumulate"])  # images a forward pass
    sampler = RepeatedAugmentSampler(len(train_set), place.world, place.rank, settings["repeats"], seed)
    per_epoch = steps_per_epoch(settings, train_set, place)
    steps = settings["epochs"] * per_epoch

    run = Run(settings, place, per_epoch, None if checkpoint else initial)
    model = torch.compile(run.network) if settings["compile"] else run.network
    if place.world > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if checkpoint:
        if place.world > 1:
            # After its first backward pass DDP sums gradients in another order, as it did before the stop.
            blank = torch.zeros(part_size, 3, settings["img_size"], settings["img_size"], device=device)
            with autocast(settings, device):
                loss = label_loss(model(blank), torch.zeros(part_size, dtype=torch.int64, device=device))
            loss.backward()
            run.optimizer.zero_grad()
        if checkpoint["settings"]["classes"] != train_set.classes:
            raise UsageError(
                f"the classes of {settings['data']} are no longer those of the run in {settings['out']}"
            )
        run.restore(checkpoint)
    if place.rank == 0:
        start_directory(Path(settings["out"]), settings, fresh=not checkpoint)
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
    progress = Progress(place, run.step, steps, settings["batch_size"])

    def step() -> None:
        """One step of the optimizer, over all the parts of its batch."""
        if not run.network.training:  # since an evaluation
            run.network.train()
        lr = run.learning_rate(run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        losses = 0.0
        for part in range(settings["accumulate"]):
            key = (seed, run.step, part, place.rank)
            images, labels = next(batches)
            inputs, targets = augment(images, labels, keyed_generator("augment", *key))
            torch.manual_seed(keyed_generator("model", *key).initial_seed())  # dropout and stochastic depth
            last_part = part == settings["accumulate"] - 1
            with nullcontext() if last_part or place.world == 1 else model.no_sync():
                with autocast(settings, device):
                    loss = loss_of(model, inputs, targets) / settings["accumulate"]
                run.scaler.scale(loss).backward()
            losses += loss.detach()
        if settings["clip_grad"]:
            run.scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.network.parameters(), settings["clip_grad"])
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.update_average()
        run.note(losses)
        run.step += 1

    with Signals(place) as signals:
        try:
            while not (asked := signals.asked()) and len(run.log) < settings["epochs"]:
                epoch = len(run.log) + 1
                if run.step < epoch * per_epoch:
                    step()
                    if progress.due():
                        run.check_finite()
                        progress.show(run, epoch)
                    if settings["save_every"] and run.step % settings["save_every"] == 0:
                        run.settle()
                        run.save()
                else:
                    run.settle()
                    run.save()  # a signal may reach one process of several while they evaluate
                    accuracy = evaluate(run.evaluated(), val_set, settings, place, signals.answer)
                    run.end_epoch(accuracy)
                    best = max((chief(record["accuracy"]) for record in run.log[:-1]), default=-1)
                    run.save(best=chief(accuracy) > best)
                    left_out = count_broken(data, place)
                    if left_out:
                        progress.line(f"{left_out} image files cannot be read so far and are left out")
                    progress.line(
                        f"epoch {epoch}/{settings['epochs']}  loss {run.log[-1]['loss']:.3f}  "
                        f"val {headline(accuracy)}"
                    )
            if asked:
                run.settle()
                raise Interrupted
        except Interrupted:
            run.save()
            number = asked or signals.got
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name} after step {run.step} of {steps}; all is saved; go on with "
                f"--out {settings['out']} --resume",
                number,
            ) from None
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
        grid = settings["img_size"] // settings["patch_size"]
        if grid > 256:
            raise UsageError(f"{grid}×{grid} patches are more than 256×256; raise --patch-size")
    weights, distils = settings["teacher_weights"], settings["distill"] in ("soft", "hard")
    if weights == "published":
        if distils and settings["teacher"] not in SIZES:
            published_settings(settings["teacher"])
    elif weights and not is_url(weights) and not Path(weights).is_file():
        raise UsageError(f"there is no file {weights}; --teacher-weights takes a checkpoint's path or URL")
    if settings["distill"] == "label" and (settings["no_distill_token"] or settings["model"] not in SIZES):
        raise UsageError(
            "--distill label is about a second token; it needs a transformer and no --no-distill-token"
        )
    if settings["warmup_epochs"] >= settings["epochs"]:
        raise UsageError(f"--warmup-epochs must be less than --epochs, {settings['epochs']}")
    trained = {settings["model"]} | ({settings["teacher"]} if distils and not weights else set())
    for name in (trained | ({settings["teacher"]} if distils else set())) - {*SIZES, *REGNETY}:
        try_network(name, settings["img_size"])
    single = settings["batch_size"] == parts  # images a forward pass: BatchNorm may not know what to do
    for name in trained - {*SIZES} if single else ():
        try_network(name, settings["img_size"], training=True)
    if settings["data"] in ("folder", "imagenet") and not Path(settings["data_path"]).is_dir():
        raise UsageError(f"there is no folder {settings['data_path']}; name the data set's with --data-path")
    prepare_directory(Path(settings["out"]))
    check_shared(Path(settings["out"]), place)


def check_shared(out: Path, place: Place) -> None:
    """Raises UsageError if another process's directory of this name is not the first one's."""
    mark = out / f"{of_first(place, os.getpid)}.partial"
    if not first_alone(place, lambda: mark.touch() if place.rank == 0 else mark.exists()) and place.rank > 0:
        raise UsageError(f"process {place.rank} sees another {out} than the first; all must share its disk")
    if place.rank == 0:
        mark.unlink()


# ---- The teacher ----


def published_settings(name: str) -> dict:
    """How torchvision's published ImageNet weights of a network are to be used."""
    url = published_url(name)
    chosen = torchvision.models.get_model_weights(name).DEFAULT.transforms.keywords
    if chosen.get("mean", MEAN) != MEAN:
        raise UsageError(f"the weights in {url} were trained on images normalised otherwise")
    known = {"data": "imagenet", "num_classes": 1000, "classes": None}
    return known | {"model": name, "img_size": chosen["crop_size"]}


def train_teacher(
    settings: dict,
    data: list[ArraySet | FolderSet],
    place: Place,
    recipe: dict | None = None,
    start: str = "",
) -> str:
    """The checkpoint of a teacher trained on the same data, from an earlier run or from now.

    It has the data set's recipe, whatever the student's flags, and what `recipe` changes in it; `start` are
    the weights it begins with, if not fresh ones. It is trained in a directory within the student's run and
    then moved beside that. The directory's name ends in a hash of all that decides what the teacher becomes,
    so that students of any settings and seeds share one, and another data set never does.
    """
    common = ("data", "data_path", "img_size", "patch_size", "batch_size", "accumulate")
    common += ("precision", "device", "workers", "compile")
    own = {name: settings[name] for name in common} | {"model": settings["teacher"], "distill": "none"}
    own = complete(own | {"epochs": settings["teacher_epochs"], "resume": True} | (recipe or {}))
    identity = {name: value for name, value in own.items() if name not in INCIDENTAL}
    identity |= {"classes": data[0].classes, "images": len(data[0]), "start": start}
    identity |= {"data_path": "" if own["data"] == "shapes" else str(Path(own["data_path"]).resolve())}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = f"teacher-{own['data']}-{own['img_size']}px-{own['model'].replace('/', '_')}-{digest}"
    mine, shared = Path(settings["out"]) / name, Path(settings["out"]).parent / name
    for last in (shared / "last.pth", mine / "last.pth"):
        log = newest(last.parent)["progress"]["log"] if of_first(place, last.exists) else []
        if len(log) == own["epochs"]:
            say(place, f"teacher: {last}, trained earlier, {chief(log[-1]['accuracy']):.2f} % top-1")
            return str(last)
    own, checkpoint = restore(own | {"out": str(mine)}, given={})
    say(
        place,
        f"teacher: {'fine-tuning' if start else 'training'} a {own['model']} first, {own['epochs']} epochs; "
        f"it is kept in {shared}",
    )

    def begin_with(network: nn.Module) -> None:
        sizes = {name: settings[name] for name in ("img_size", "patch_size")}
        low = create_teacher(own["model"], len(data[0].classes), start, **sizes)
        if own["model"] in SIZES:
            load_weights(network, low.state_dict())
        else:
            state, size = low.state_dict(), own["img_size"]
            check_fit(network.state_dict(), state, f"{start} does not fit a {own['model']} of {size} pixels")
            network.load_state_dict(state)

    try:
        accuracy = train(own, data, None, place, checkpoint, begin_with if start else None)
    except Interrupted as stop:  # what goes on is the student's run
        text, number = stop.args
        raise Interrupted(text.replace(f" {mine} ", f" {settings['out']} "), number) from None
    say(place, f"teacher: {chief(accuracy):.2f} % top-1")

    def keep() -> Path:
        try:
            return mine.rename(shared)
        except OSError:  # another run has put one there, which stays
            return mine

    return str(of_first(place, keep) / "last.pth")


def is_imagenet(classes: list[str] | None, num_classes: int) -> bool:
    """Whether classes are ImageNet's 1000, which files know as nothing or as `n01440764` and so on."""
    return num_classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes or ())


def check_order(source: str, names: list[str], num_classes: int) -> None:
    """Raises UsageError if a network of so many nameless classes knows ImageNet's, and these are others."""
    if num_classes == 1000 and not is_imagenet(names, len(names)):
        raise UsageError(
            f"{source} knows ImageNet's 1000 classes in the order of their numbers, n01440764 and so on; the "
            f"data set's {len(names)} are others: {names[0]!r}"
        )


def load_teacher(settings: dict, data: list[ArraySet | FolderSet], place: Place) -> nn.Module:
    """The teacher in settings["teacher_weights"], on the device."""
    classes, weights = data[0].classes, settings["teacher_weights"]
    sizes = {name: settings[name] for name in ("img_size", "patch_size")}
    teacher = first_alone(place, lambda: create_teacher(settings["teacher"], len(classes), weights, **sizes))
    teacher = teacher.to(place.device)
    if teacher.classes is None:
        check_order(weights, classes, len(classes))
    elif teacher.classes != classes:
        odd = next(n for n in range(len(classes)) if teacher.classes[n] != classes[n])
        raise UsageError(
            f"{weights} knows other classes, or in another order: class {odd} is {teacher.classes[odd]!r} "
            f"there and {classes[odd]!r} here; a teacher must have been trained on the student's classes"
        )
    if settings["compile"]:
        teacher.compile()
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


def begin(settings: dict, place: Place, given: dict | None) -> list[ArraySet | FolderSet]:
    """Refuses what cannot work, and loads the data. A fresh run's flags are `given`, and written down."""
    check(settings, place)
    source = [settings[name] for name in ("data", "data_path", "img_size")]
    source += [place.device, ("train", "val"), settings["skip_broken"]]
    data = first_alone(place, lambda: load_data(*source))
    steps = steps_per_epoch(settings, data[0], place)
    describe(settings, data, place)
    if steps < 10:
        say(place, f"an epoch has only {steps} steps: of so few images a smaller --batch-size learns more")
    if settings["distill"] in ("soft", "hard") and settings["teacher_weights"] == "published":
        check_order("published", data[0].classes, 1000)
    if given is not None and place.rank == 0:
        start_directory(Path(settings["out"]), settings, fresh=True)
        write_json(Path(settings["out"]) / "flags.json", given)
    return data


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


def out_of_memory(error: Exception) -> bool:
    """Whether an error says so; cuDNN then finds no engine for a convolution."""
    said = any(sign in str(error) for sign in ("can't allocate memory", "unable to find an engine"))
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def program(main: Callable[[], None]) -> None:
    """Runs a script's main function; a person's mistake ends it with one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without × and τ shows their codes
    first = os.environ.get("RANK", "0") == "0"

    def end(text: str, code: int) -> None:
        if sys.stdout.isatty():
            print(CLEAR, end="", flush=True)  # the line of progress
        print(printable(text), file=sys.stderr, flush=True)
        sys.exit(code)

    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except UsageError as error:
        if not first:
            time.sleep(2)  # what all processes find is told by the first, whose end stops the others
        end(f"error: {error}", 2)
    except Interrupted as error:
        text, number = error.args
        end(text, 128 + number) if first else sys.exit(128 + number)
    except KeyboardInterrupt:
        end("error: interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a path too long, a folder that may not be read: its text names it
        end(f"error: {error}", 2)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            end("error: out of memory; lower --batch-size or raise --accumulate", 2)
        if "DataLoader worker" in str(error):
            end(f"error: {error} If memory or /dev/shm is short, lower --workers", 2)
        if dist.is_initialized() and (isinstance(error, dist.DistError) or "onnection" in str(error)):
            reason = " ".join(str(error).partition(". ")[0].split())[:300]
            end(f"error: another process has ended, and says why, or is out of reach: {reason}", 1)
        raise


def main() -> None:
    started = time.monotonic()
    given = vars(build_parser("train.py", __doc__.splitlines()[0]).parse_args())
    given = recall(given, Path(complete(given)["out"]), tuned=False)
    settings, checkpoint = restore(complete(given), given)
    place = join(settings["device"])
    data = begin(settings, place, None if checkpoint else given)
    teacher = None
    if settings["distill"] in ("soft", "hard"):
        settings["teacher_weights"] = settings["teacher_weights"] or train_teacher(settings, data, place)
        teacher = load_teacher(settings, data, place)
    accuracy = train(settings, data, teacher, place, checkpoint)
    finish(settings, accuracy, started, place)


if __name__ == "__main__":
    program(main)
