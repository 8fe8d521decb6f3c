"""Training: one flat loop for students, teachers and fine-tuning; distributed, mixed precision, EMA, checkpoints.

    torchrun train.py --model tiny --distill hard                       # minutes on a laptop: draws its own data
    torchrun train.py --data cifar10 --model tiny --distill hard        # one GPU
    torchrun --nproc_per_node 8 train.py --data imagenet --data-path IMAGENET --model base --distill hard

`python train.py` is the same on one process. The defaults of a data set are its recipe, RECIPES below.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from augment import Augment, RepeatedAugmentSampler, keyed_generator, normalize
from data import DATA_NAMES, ArraySet, FolderSet, eval_batches, load_data, train_batches
from distill import (
    create_convnet,
    create_teacher,
    hard_distillation_loss,
    label_loss,
    read_checkpoint,
    soft_distillation_loss,
    teacher_logits,
)
from model import SIZES, UsageError, create_model, fuse, load_weights

# ---- Settings: the paper's (Table 9), then what each data set changes, then what a convnet changes ----

PAPER = dict(
    model="tiny", img_size=224, patch_size=16,
    epochs=300, batch_size=1024, optimizer="adamw", lr=5e-4, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=5.0,
    weight_decay=0.05, clip_grad=0.0, accumulate=1, ema=0.0,
    augment="randaugment", mixup=0.8, cutmix=1.0, erasing=0.25, repeats=3, smoothing=0.1, dropout=0.0, drop_path=0.1,
    distill="none", no_distill_token=False, teacher="regnet_y_16gf", teacher_weights="", teacher_epochs=0,
    tau=3.0, lam=0.1,
    precision="auto", compile=False, device="auto", workers=-1, seed=0,
)  # fmt: skip
SMALL = dict(img_size=32, patch_size=4, teacher="regnet_y_200mf", teacher_epochs=30)
RECIPES = {
    "imagenet": dict(teacher_weights="published"),
    "cifar10": dict(**SMALL, epochs=100, batch_size=256, lr=1e-3, repeats=1),
    "cifar100": dict(**SMALL, epochs=100, batch_size=256, lr=1e-3, repeats=1),
    "folder": dict(epochs=100, batch_size=64, lr=1e-3, repeats=1, teacher="regnet_y_200mf", teacher_epochs=30),
    "shapes": dict(SMALL, patch_size=8, epochs=6, batch_size=64, lr=5e-3, warmup_epochs=1.0, repeats=1,
                   teacher_epochs=5),
}  # fmt: skip
# Teachers are trained "with the same data and same data-augmentation", but with SGD (Table 2).
CONVNET = dict(optimizer="sgd", lr=0.8, min_lr=0.0, weight_decay=5e-5, drop_path=0.0, distill="none")
# These do not change what a run computes: a resumed run may have others, a trained teacher serves for all of them.
INCIDENTAL = {"out", "workers", "device", "compile", "teacher_epochs"}


def option(parser: argparse.ArgumentParser, name: str, kind: Callable, text: str, **more) -> None:
    """A flag with no default of its own (recipes have them): it is in the namespace only if it was given."""
    default = PAPER.get(name[2:].replace("-", "_"), "")
    shown = f" [{default}]" if default not in ("", False, 0.0) else ""
    parser.add_argument(name, type=kind, help=text + shown, default=argparse.SUPPRESS, **more)


def number(kind: type, low: float, high: float = math.inf, below: float = math.inf) -> Callable:
    """An argparse type: a number with low <= value <= high and value < below."""

    def convert(text: str):
        value = kind(text)
        if not (low <= value <= high and value < below):
            limit = f"below {below:g}" if below < math.inf else f"at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low:g}" + (f" and {limit}" if limit else ""))
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become the one line that all other mistakes are."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; see {self.prog} --help")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The flags that train.py and finetune.py share. Defaults in [brackets] are ImageNet's, the paper's Table 9."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    count, share, positive = number(int, 1), number(float, 0, high=1), number(float, 0)
    parser.add_argument("--data", choices=DATA_NAMES, default="shapes", help="data set, with its recipe [shapes]")
    parser.add_argument("--data-path", default="data", metavar="DIR",
                        help="where downloads go, or the tree with train/CLASS/* and val/CLASS/* [data]")
    option(parser, "--model", str, "tiny, small, base, or a teacher to train: regnet_y_200mf, _4gf, _8gf, _12gf, "
           "_16gf or any torchvision classifier")
    option(parser, "--img-size", count, "side of the square images, pixels")
    option(parser, "--patch-size", count, "side of a patch, pixels; divides the image size")

    group = parser.add_argument_group("distillation (section 4)")
    option(group, "--distill", str, "none; soft: equation 2; hard: equation 3; label: a second token trained on the "
           "true label, the paper's control", choices=("none", "soft", "hard", "label"))
    option(group, "--teacher", str, "the teacher's network, as in --model")
    option(group, "--teacher-weights", str, "'published' (torchvision's), or a checkpoint's path or URL; if not given, "
           "a teacher is trained first on the same data and kept", metavar="PATH|URL")
    option(group, "--teacher-epochs", count, "epochs of a teacher trained first")
    option(group, "--tau", number(float, 1e-6), "temperature τ of soft distillation")
    option(group, "--lam", share, "weight λ of the teacher's term in soft distillation, 0 to 1")
    group.add_argument("--no-distill-token", action="store_true", default=argparse.SUPPRESS,
                       help="distil into the class token alone (Table 3, 'usual' and 'hard' distillation)")

    group = parser.add_argument_group("augmentation and regularisation (Table 7)")
    option(group, "--augment", str, "none: crop, flip and colour jitter; off: nothing at all",
           choices=("randaugment", "autoaugment", "none", "off"))
    option(group, "--mixup", positive, "Mixup's Beta parameter α; 0 is off")
    option(group, "--cutmix", positive, "CutMix's Beta parameter α; 0 is off")
    option(group, "--erasing", share, "probability of random erasing")
    option(group, "--repeats", count, "times an image is repeated in an epoch; 1 is no repeated augmentation")
    option(group, "--smoothing", number(float, 0, below=1), "label smoothing ε of true labels")
    option(group, "--dropout", number(float, 0, below=1), "dropout probability")
    option(group, "--drop-path", number(float, 0, below=1), "stochastic depth: the last block's drop probability")
    option(group, "--ema", number(float, 0, below=1), "decay of the exponential moving average of the weights (the "
           "authors' 0.99996), which is then what is evaluated; 0 is off")

    group = parser.add_argument_group("optimisation (Table 9)")
    option(group, "--optimizer", str, "adamw, or sgd with Nesterov momentum 0.9", choices=("adamw", "sgd"))
    option(group, "--lr", positive, "learning rate per 512 images: the one used is lr × batch size / 512")
    option(group, "--min-lr", positive, "learning rate at the end of the cosine")
    option(group, "--warmup-lr", positive, "learning rate at the start of the warm-up")
    option(group, "--warmup-epochs", positive, "epochs of linear warm-up")
    option(group, "--weight-decay", positive, "not applied to biases, norms, tokens and position embeddings")
    option(group, "--clip-grad", positive, "largest norm of the gradient; 0 is no clipping")
    option(group, "--epochs", count, "epochs of about the data set's number of images each")
    option(group, "--batch-size", count, "images a step, of all processes and accumulated parts together")
    option(group, "--accumulate", count, "parts into which each process cuts its share of a batch, to save memory")

    group = parser.add_argument_group("running")
    option(group, "--precision", str, "auto: bf16 on GPUs that have it, else fp16; fp32 elsewhere",
           choices=("auto", "fp32", "bf16", "fp16"))
    group.add_argument("--compile", action="store_true", default=argparse.SUPPRESS, help="use torch.compile")
    option(group, "--device", str, "auto, cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"))
    option(group, "--workers", number(int, -1), "processes that read image files; -1 chooses")
    option(group, "--seed", number(int, 0), "of everything random; the data set `shapes` is always the same")
    group.add_argument("--out", metavar="DIR", default="", help="where the run is written [runs/DATA-MODEL-DISTILL]")
    group.add_argument("--resume", action="store_true", help="continue the run in --out, or start it if there is none")
    group.add_argument("--overwrite", action="store_true", help="replace a run in --out")
    return parser


def complete(given: dict) -> dict:
    """All settings of a run: the flags given, over the data set's recipe, over the paper's."""
    recipe = PAPER | RECIPES[given["data"]]
    if given.get("model", recipe["model"]) not in SIZES:
        recipe |= CONVNET
        recipe["epochs"] = recipe["teacher_epochs"] or recipe["epochs"]
    settings = recipe | given
    if not settings["out"]:
        settings["out"] = f"runs/{settings['data']}-{settings['model'].replace('/', '_')}-{settings['distill']}"
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
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: torch sees no Apple GPU here; use --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UsageError(f"{local + 1} processes on a machine of {torch.cuda.device_count()} GPUs; lower "
                             "--nproc_per_node")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    if world > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return Place(rank, world, torch.device(device))


def total(values: Tensor, place: Place) -> Tensor:
    """The sum of `values` over all processes."""
    if place.world > 1:
        dist.all_reduce(values)
    return values


def say(place: Place, text: str = "") -> None:
    if place.rank == 0:
        print(text, flush=True)


def precision(settings: dict, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; float32 off the GPU, where narrower ones are no faster."""
    name = settings["precision"]
    if name == "auto":
        name = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
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
    return create_model(settings["model"], num_classes=num_classes, img_size=settings["img_size"],
                        patch_size=settings["patch_size"], distilled=distilled, dropout=settings["dropout"],
                        drop_path=settings["drop_path"])


def build_optimizer(network: nn.Module, settings: dict) -> torch.optim.Optimizer:
    """AdamW or SGD; weight decay on matrices and convolutions only."""
    decayed, spared = [], []
    for name, parameter in network.named_parameters():
        token = name in ("cls_token", "dist_token", "pos_embed")
        (spared if token or parameter.ndim < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings["weight_decay"]}, {"params": spared, "weight_decay": 0.0}]
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=decayed[0].device.type != "mps")


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


@torch.no_grad()
def evaluate(network: nn.Module, data: ArraySet | FolderSet, settings: dict, place: Place) -> dict[str, float]:
    """Top-1 accuracy in percent by head: `class`, and for a pair also `distillation` and `fused`.

    Every image counts once, on any number of processes.
    """
    network.eval()
    batch = max(1, min(256, settings["batch_size"]))
    correct = torch.zeros(3, device=place.device)
    batches = eval_batches(data, settings["img_size"], batch, rank=place.rank, world=place.world,
                           workers=workers(settings, place), device=place.device)
    for images, labels in batches:
        with autocast(settings, place.device):
            outputs = network(normalize(images))
        pair = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        for head, scores in enumerate((*pair, fuse(outputs))):
            correct[head] += (scores.argmax(dim=1) == labels).sum()
    shares = (100 * total(correct, place) / len(data)).tolist()
    names = ("class", "distillation", "fused") if not isinstance(outputs, Tensor) else ("class",)
    return dict(zip(names, shares, strict=False))


def workers(settings: dict, place: Place) -> int:
    if settings["workers"] >= 0:
        return settings["workers"]
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


# ---- Files of a run ----


def write_whole(path: Path, write: Callable) -> None:
    """Calls `write` with an open binary file that takes the name `path` only when it is complete and on the disk."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UsageError(f"could not write {path}: {error.strerror}; what was saved before is intact") from error


def prepare_directory(out: Path, settings: dict, given: dict) -> tuple[dict, dict]:
    """Makes the run's directory. Returns the settings and, when a run is resumed, its checkpoint (else {})."""
    checkpoint = {}
    if (out / "last.pth").exists() and settings["resume"]:
        checkpoint = read_checkpoint(out / "last.pth")
        saved = checkpoint["settings"]
        for name in sorted(given.keys() & saved.keys() - INCIDENTAL):
            if given[name] != saved[name]:
                raise UsageError(f"the run in {out} has --{name.replace('_', '-')} {saved[name]}, not {given[name]}; "
                                 "resume it with its own settings")
        settings = saved | {name: settings[name] for name in (INCIDENTAL | {"resume", "overwrite"}) & settings.keys()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in () if checkpoint else ("last.pth", "best.pth", "log.jsonl"):
            (out / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    return settings, checkpoint


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

    def show(self, step: int, epoch: int, loss: float, lr: float) -> None:
        self.shown = time.monotonic()
        elapsed, done = self.shown - self.started, step - self.first
        left = elapsed / done * (self.steps - step)
        line = (f"epoch {epoch + 1}  step {step}/{self.steps}  loss {loss:.3f}  lr {lr:.2e}  "
                f"{done * self.batch_size / elapsed:.0f} images/s  {left / 60:.0f}:{left % 60:02.0f} left")
        if self.place.rank == 0:
            print(f"{CLEAR}{line}" if self.live else line, end="" if self.live else "\n", flush=True)


def train(settings: dict, data: list[ArraySet | FolderSet], teacher: nn.Module | None, place: Place,
          given: dict, initial: Callable[[nn.Module], None] | None = None) -> dict[str, float]:
    """Trains one network and leaves its run in settings["out"]. Returns the accuracies at the end.

    `given` are the settings that a resumed run must agree with. `initial` may change the fresh network's weights.
    """
    out = Path(settings["out"])
    settings, checkpoint = prepare_directory(out, settings, given)
    if place.world > 1:
        dist.barrier()  # nobody writes before everybody has looked
    train_set, val_set = data
    parts = place.world * settings["accumulate"]
    part_size = settings["batch_size"] // parts  # images in one forward pass of one process
    seed, device = settings["seed"], place.device

    network = build_network(settings, len(train_set.classes)).to(device)
    if initial is not None:
        initial(network)
    if settings["model"] not in SIZES:
        network = network.to(memory_format=torch.channels_last)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(settings["ema"]), use_buffers=True) \
        if settings["ema"] else None
    optimizer = build_optimizer(network, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(settings, device) == torch.float16)
    augment = Augment(len(train_set.classes), settings["augment"], settings["erasing"], settings["mixup"],
                      settings["cutmix"], settings["smoothing"])
    sampler = RepeatedAugmentSampler(len(train_set), place.world, place.rank, settings["repeats"], seed)
    per_epoch = len(sampler) // (part_size * settings["accumulate"])
    if per_epoch == 0:
        raise UsageError(f"--batch-size {settings['batch_size']} is more than the {len(sampler) * place.world} images "
                         "of an epoch; lower it")
    steps, warmup = settings["epochs"] * per_epoch, round(settings["warmup_epochs"] * per_epoch)

    first, losses, best = 0, 0.0, -1.0
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if average is not None:
            average.module.load_state_dict(checkpoint["ema"])
            average.n_averaged.fill_(1)
        first, best = checkpoint["progress"]["step"], checkpoint["progress"]["best"]
        say(place, f"resuming {out} after epoch {first // per_epoch}")
    elif place.rank == 0:
        text = json.dumps(settings | {"classes": train_set.classes}, indent=2)
        write_whole(out / "settings.json", lambda file: file.write(text.encode()))

    model = torch.compile(network) if settings["compile"] else network
    if place.world > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    evaluated = average.module if average is not None else network
    loss_of = loss_function(settings, teacher)
    batches = train_batches(train_set, settings["img_size"], part_size, sampler, start=first * settings["accumulate"],
                            stop=steps * settings["accumulate"], crop=settings["augment"] != "off",
                            workers=workers(settings, place), device=device)
    accuracy = {}
    progress = Progress(place, first, steps, settings["batch_size"])
    loss_sum = torch.zeros((), device=device)
    model.train()
    for step in range(first, steps):
        lr = learning_rate(step, steps, warmup, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for part in range(settings["accumulate"]):
            key = (seed, step, part, place.rank)
            torch.manual_seed(keyed_generator("model", *key).initial_seed())  # dropout and stochastic depth
            images, labels = next(batches)
            inputs, targets = augment(images, labels, keyed_generator("augment", *key))
            last_part = part == settings["accumulate"] - 1
            with nullcontext() if last_part or place.world == 1 else model.no_sync():
                with autocast(settings, device):
                    loss = loss_of(model(inputs), targets, inputs) / settings["accumulate"]
                scaler.scale(loss).backward()
            loss_sum += loss.detach()
        if settings["clip_grad"]:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), settings["clip_grad"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(network)

        epoch, place_in_epoch = divmod(step, per_epoch)
        epoch_ends = place_in_epoch == per_epoch - 1
        if progress.due() or epoch_ends:
            mean_loss = loss_sum.item() / (place_in_epoch + 1)
            if not math.isfinite(mean_loss):
                raise UsageError(f"the loss is {mean_loss} in step {step} at learning rate {lr:.2e}; try a lower --lr "
                                 f"or --precision fp32. The last good checkpoint is {out / 'last.pth'}")
            progress.show(step + 1, epoch, mean_loss, lr)
        if epoch_ends:
            losses = total(loss_sum / per_epoch, place).item() / place.world
            accuracy = evaluate(evaluated, val_set, settings, place)
            model.train()
            loss_sum.zero_()
            record = {"epoch": epoch + 1, "step": step + 1, "lr": lr, "loss": losses, "accuracy": accuracy}
            chief = accuracy.get("fused", accuracy["class"])
            contents = {"model": network.state_dict(), "optimizer": optimizer.state_dict(),
                        "scaler": scaler.state_dict(), "settings": settings | {"classes": train_set.classes},
                        "progress": {"step": step + 1, "epochs_left": settings["epochs"] - epoch - 1,
                                     "best": max(best, chief), "accuracy": accuracy}}
            if average is not None:
                contents["ema"] = average.module.state_dict()
            if place.rank == 0:
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(record) + "\n")
                if chief > best:
                    write_whole(out / "best.pth", lambda file, contents=contents: torch.save(contents, file))
                write_whole(out / "last.pth", lambda file, contents=contents: torch.save(contents, file))
                heads = "  ".join(f"{head} {share:.2f} %" for head, share in accuracy.items())
                print(f"{CLEAR if progress.live else ''}epoch {epoch + 1}/{settings['epochs']}  loss {losses:.3f}"
                      f"  val {heads}", flush=True)
            best = max(best, chief)
    return accuracy or checkpoint["progress"]["accuracy"]


def check(settings: dict, place: Place) -> None:
    """Refuses early what cannot work."""
    parts = place.world * settings["accumulate"]
    if settings["batch_size"] % parts:
        raise UsageError(f"--batch-size {settings['batch_size']} does not divide into {place.world} processes × "
                         f"{settings['accumulate']} accumulated parts; try {math.ceil(settings['batch_size'] / parts) * parts}")
    if settings["model"] in SIZES:
        create_model(settings["model"], img_size=settings["img_size"], patch_size=settings["patch_size"])
    if settings["distill"] == "label" and (settings["no_distill_token"] or settings["model"] not in SIZES):
        raise UsageError("--distill label is about a second token; it needs a transformer and no --no-distill-token")
    if settings["data"] in ("folder", "imagenet") and not Path(settings["data_path"]).is_dir():
        raise UsageError(f"there is no folder {settings['data_path']}; name the data set's with --data-path")
    if (Path(settings["out"]) / "last.pth").exists() and not (settings["resume"] or settings["overwrite"]):
        raise UsageError(f"{settings['out']} holds a run; continue it with --resume, replace it with --overwrite, or "
                         "choose another --out")


# ---- The teacher that is trained first ----


def train_teacher(settings: dict, data: list[ArraySet | FolderSet], place: Place) -> str:
    """The checkpoint of a teacher trained on the same data with its own recipe, from an earlier run or from now.

    It is kept beside the student's run. The directory's name ends in a hash of all that decides what the teacher
    becomes, so that students of any settings and seeds share one, and another data set never does.
    """
    shared = ("data", "data_path", "img_size", "patch_size", "precision", "device", "workers")
    own = {name: settings[name] for name in shared} | {"model": settings["teacher"], "distill": "none", "resume": True}
    own["epochs"] = settings["teacher_epochs"] or settings["epochs"]
    own = complete(own | {"overwrite": False, "out": ""})
    identity = {name: value for name, value in own.items() if name not in INCIDENTAL}
    identity |= {"classes": data[0].classes, "images": len(data[0])}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = f"teacher-{own['data']}-{own['img_size']}px-{own['model'].replace('/', '_')}-{digest}"
    own["out"] = str(Path(settings["out"]).parent / name)
    last = Path(own["out"]) / "last.pth"
    progress = read_checkpoint(last)["progress"] if last.exists() else {}
    if progress.get("epochs_left") == 0:
        say(place, f"teacher: {last}, trained earlier, {progress['accuracy']['class']:.2f} % top-1")
        return str(last)
    say(place, f"teacher: training a {own['model']} first, {own['epochs']} epochs; it is kept in {own['out']}")
    accuracy = train(own, data, None, place, given={})
    say(place, f"teacher: {accuracy['class']:.2f} % top-1")
    if place.world > 1:
        dist.barrier()  # the file is whole before anyone reads it
    return str(last)


def find_teacher(settings: dict, data: list[ArraySet | FolderSet], place: Place) -> nn.Module | None:
    """The teacher that `--distill soft|hard` asks for, on the device."""
    if settings["distill"] not in ("soft", "hard"):
        return None
    weights = settings["teacher_weights"] or train_teacher(settings, data, place)
    teacher = create_teacher(settings["teacher"], len(data[0].classes), weights, img_size=settings["img_size"],
                             patch_size=settings["patch_size"]).to(place.device)
    return teacher if settings["teacher"] in SIZES else teacher.to(memory_format=torch.channels_last)


# ---- The program ----


def describe(settings: dict, data: list[ArraySet | FolderSet], place: Place) -> None:
    """Prints the settings a run uses, all of them, and what it runs on."""
    train_set, val_set = data
    say(place, f"{settings['data']}: {len(train_set)} training and {len(val_set)} validation images, "
               f"{len(train_set.classes)} classes; {place.world} process{'es' * (place.world > 1)} on {place.device}, "
               f"torch {torch.__version__}")
    line = ""
    for name, value in settings.items():
        word = f"{name}={value}"
        if len(line) + len(word) > 108:
            say(place, line)
            line = ""
        line += f"  {word}"
    say(place, line)


def run(settings: dict, given: dict) -> None:
    """Everything train.py does, with the settings of its command line."""
    place = join(settings["device"])
    check(settings, place)
    if place.rank > 0:
        dist.barrier()  # the first process downloads, the others find the files
    data = load_data(settings["data"], settings["data_path"], settings["img_size"], place.device)
    if place.world > 1 and place.rank == 0:
        dist.barrier()
    describe(settings, data, place)
    teacher = find_teacher(settings, data, place)
    started = time.monotonic()
    accuracy = train(settings, data, teacher, place, given)
    minutes = (time.monotonic() - started) / 60
    say(place, f"\n{settings['model']} on {settings['data']}, top-1 of the validation set after {minutes:.1f} minutes:")
    for head, share in accuracy.items():
        say(place, f"  {head:12} {share:6.2f} %")
    say(place, f"The run is in {settings['out']}: last.pth, best.pth, log.jsonl, settings.json.\nNext:  "
               f"python evaluate.py accuracy {settings['out']}/last.pth")
    if place.world > 1:
        dist.destroy_process_group()


def program(main: Callable[[], None]) -> None:
    """Runs a script's main function; a person's mistake ends it with one line and exit code 2."""
    try:
        main()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def main() -> None:
    given = vars(build_parser("train.py", __doc__.splitlines()[0]).parse_args())
    run(complete(given), given)


if __name__ == "__main__":
    program(main)
