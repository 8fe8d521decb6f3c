"""Every setting with its default, range, unit and meaning; the recipes; what is refused.

A first reading needs the table below and RECIPES. Each setting is a flag of train.py and finetune.py, and its
default is the paper's value for ImageNet (Table 9). A run's settings are the flags given, over its data set's
recipe, over these defaults; they are kept in the run's settings.json, and those that play a part are printed.
Half of the file refuses, resumes and prints; it is long so that a mistake ends in one line and early.
"""

import argparse
import json
import math
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from checkpoint import holds_run, is_url, make_directory, save_json
from data import DATA_NAMES
from distill import LOSSES
from launch import (
    UserError,
    choose_precision,
    device_type,
    did_you_mean,
    print0,
    rank,
    user_errors,
    world_size,
)
from model import SIZES, create_model
from networks import LOW_RESOLUTION, check_name, create_convnet, published_settings


def setting(default, allowed, meaning: str, group: str = ""):
    """A field of Settings: its default, its type or the values allowed, its meaning and unit.

    The first of a group of settings has the group's title in --help.
    """
    return field(default=default, metadata={"allowed": allowed, "meaning": meaning, "group": group})


def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a number from `low` to `high`."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be from {low:g} to {high:g}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


COUNT, POSITIVE = number(int, 1), number(float, 0)
SHARE, RATE = number(float, 0, 1), number(float, 0, 0.999999)
PIXELS = number(int, 1, 4096)
DEVICES = ("auto", "cuda", "mps", "cpu")


# fmt: off
@dataclass
class Settings:
    """The settings of a run. Rates are probabilities; `lr` is for 512 images."""

    data: str = setting("shapes", DATA_NAMES, "data set, with its recipe", "what to train on what")
    data_path: str = setting("data", str, "where downloads go, or a tree with train/CLASS/* and val/CLASS/*")
    limit: int = setting(0, number(int, 0), "use only so many training and validation images; 0: all")
    model: str = setting("tiny", str, "tiny, small, base, or a teacher's network: any of --teacher")
    img_size: int = setting(224, PIXELS, "side of the square images, pixels")
    patch_size: int = setting(16, PIXELS, "side of a patch, pixels; divides the image size")
    depth: int = setting(12, number(int, 1, 100), "blocks of a transformer; the paper's networks have 12")

    distill: str = setting("none", tuple(LOSSES), "soft: equation 2; hard: equation 3; label: a second "
                           "token trained on the true label, the paper's control", "distillation (section 4)")
    no_distill_token: bool = setting(False, bool, "distill into the class token alone (rows 2, 3 of Table 3)")
    teacher: str = setting("regnet_y_16gf", str, "the teacher's network: regnet_y_200mf, _4gf, _8gf, _12gf, "
                           "_16gf, vgg8, any classifier of torchvision, or tiny, small, base")
    teacher_weights: str = setting("", str, "'published' (torchvision's), or a checkpoint's path or URL; "
                                   "without it a teacher is trained first on the same data, beside the run")
    teacher_epochs: int = setting(300, COUNT, "epochs of a teacher")
    remember_labels: bool = setting(False, bool, "hard: keep the teacher's labels beside the run, for "
                                    "other students of the same data, augmentation, batch and seed")
    tau: float = setting(3.0, number(float, 1e-6, 1e6), "temperature τ of soft distillation")
    lam: float = setting(0.1, SHARE, "weight λ of the teacher's term in soft distillation")

    augment: str = setting("randaugment", ("randaugment", "autoaugment", "none", "off"), "besides crop and "
                           "flip; none: color jitter instead; off: no crop and flip either",
                           "augmentation and regularization (Table 7)")
    mixup: float = setting(0.8, POSITIVE, "Mixup's Beta parameter α, 0 is off")
    cutmix: float = setting(1.0, POSITIVE, "CutMix's Beta parameter α, 0 is off")
    erasing: float = setting(0.25, SHARE, "probability of random erasing")
    repeats: int = setting(3, COUNT, "repeated augmentation: times an image comes in a shuffle, 1 is off")
    smoothing: float = setting(0.1, RATE, "label smoothing ε of the true labels")
    dropout: float = setting(0.0, RATE, "dropout probability")
    drop_path: float = setting(0.1, RATE, "stochastic depth: the probability that drops the last block")
    ema: float = setting(0.0, RATE, "decay of the weights' moving average (the authors' 0.99996), "
                         "which is then what is evaluated; 0 is off")

    optimizer: str = setting("adamw", ("adamw", "sgd"), "sgd has Nesterov momentum 0.9",
                             "optimization (Table 9)")
    lr: float = setting(5e-4, POSITIVE, "learning rate per 512 images: the one used is lr × batch size / 512")
    min_lr: float = setting(1e-5, POSITIVE, "learning rate at the end of the cosine, as it is")
    warmup_lr: float = setting(1e-6, POSITIVE, "learning rate at the start of the warm-up, as it is")
    warmup_epochs: float = setting(5.0, POSITIVE, "epochs of linear warm-up")
    weight_decay: float = setting(0.05, POSITIVE, "not for biases, norms, tokens and position embeddings")
    clip_grad: float = setting(0.0, POSITIVE, "largest norm of the gradient, 0 is no clipping")
    epochs: int = setting(300, COUNT, "epochs, each of about as many images as the data set has")
    batch_size: int = setting(1024, COUNT, "images a step, of all processes and accumulated parts together")
    accumulate: int = setting(1, COUNT, "parts into which a process cuts its share of a batch; saves memory")

    precision: str = setting("auto", ("auto", "fp32", "bf16", "fp16"), "of matrix products; auto: bf16 on a "
                             "GPU that has it, else fp16; bf16 on a CPU that is faster in it, else fp32",
                             "running")
    compile: bool = setting(False, bool, "use torch.compile")
    device: str = setting("auto", DEVICES, "auto takes a GPU where there is one")
    workers: int = setting(-1, number(int, -1, 256), "processes that read image files, -1 chooses")
    skip_broken: bool = setting(False, bool, "leave out image files that cannot be read, and count them")
    seed: int = setting(0, number(int, 0, 2**62), "of everything random; the data set shapes stays the same")
    out: str = setting("", str, "the run's directory, else one below runs/ named after its settings")
    save_every: int = setting(0, number(int, 0), "steps between saves within an epoch; 0: only at its end")
    resume: bool = setting(False, bool, "continue the run in --out, or start it if there is none")
    overwrite: bool = setting(False, bool, "replace the run in --out")

    @property
    def distilled(self) -> bool:
        """Whether the network has a distillation token."""
        return self.model in SIZES and LOSSES[self.distill].token and not self.no_distill_token

    def workers_here(self) -> int:
        """How many processes read image files for this one."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return self.workers if self.workers >= 0 else max(1, min(8, (os.cpu_count() or 1) // local))
# fmt: on

# What each data set changes in the paper's settings: its recipe. Others are trained as ImageNet is.
# `complete` makes the teacher vgg8 for images of up to 64 pixels, so for cifar10, cifar100 and shapes.
SMALL = dict(teacher="regnet_y_200mf", teacher_epochs=30, repeats=1, img_size=224)
PICTURES = dict(SMALL, epochs=100, batch_size=64, lr=1e-3)
CIFAR = dict(SMALL, img_size=32, patch_size=4, epochs=100, batch_size=256, lr=1e-3)
RECIPES = {
    "imagenet": dict(teacher_weights="published"),
    "cifar10": CIFAR,
    "cifar100": CIFAR,
    "folder": PICTURES,
    "flowers102": PICTURES,
    "cars": PICTURES,
    "shapes": dict(SMALL, teacher_epochs=2, img_size=24, patch_size=8, epochs=8, batch_size=128, lr=4e-3,
                   warmup_epochs=0.5, drop_path=0.0),
}  # fmt: skip
# What a convnet changes: SGD. Teachers have "the same data and same data-augmentation" (section 5.2), but
# for small images, where a teacher has minutes: too few for the whole of it (results/teachers.md).
CONVNET = dict(optimizer="sgd", lr=0.8, min_lr=0.0, weight_decay=5e-5, drop_path=0.0, distill="none")
LIGHT = dict(augment="none", mixup=0.0, cutmix=0.0)
CIFAR_CONVNET = dict(LIGHT, erasing=0.0, batch_size=128, weight_decay=5e-4, warmup_epochs=1.0)
CONVNET_RECIPES = {"shapes": dict(LIGHT, lr=0.1), "cifar10": CIFAR_CONVNET, "cifar100": CIFAR_CONVNET}


def complete(given: dict, recipe: dict | None = None, kind: type = Settings):
    """All settings of a run: the flags given, over `recipe`, over the data set's, over the paper's."""
    data, recipe = given.get("data", Settings.data), recipe or {}
    values = dict(RECIPES.get(data, {}))
    if "teacher" in values and (values | recipe | given)["img_size"] <= LOW_RESOLUTION:
        values["teacher"] = "vgg8"  # results/teachers.md
    if (recipe | given).get("model", Settings.model) not in SIZES:
        values |= CONVNET | CONVNET_RECIPES.get(data, {})
        values["epochs"] = values.get("teacher_epochs", Settings.teacher_epochs)
    s = kind(**values | recipe | given)
    if "warmup_epochs" not in recipe | given:  # a short run cannot spend the paper's 5 of 300 epochs on it
        s.warmup_epochs = min(s.warmup_epochs, s.epochs / 10)
    s.out = s.out or f"runs/{s.data}-{s.model}-{s.distill}" + "-no-token" * s.no_distill_token
    s.precision = choose_precision(s.precision, device_type(s.device))
    return s


# ---- Flags ----

PAPER, BARE = asdict(Settings()), asdict(complete({})) | {"precision": "auto"}
NOTE = "[Values in brackets] are those of bare `python train.py`, the recipe of shapes; other data sets have "
NOTE += "other recipes (RECIPES in settings.py), --data imagenet the paper's."


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become the one line that all other mistakes are."""

    def error(self, message: str) -> None:
        # argparse quotes a wrong choice and names a wrong flag, and then lists what there is
        wrong = re.search(r"invalid choice: '(.*?)'|unrecognized arguments: ([\w-]+)", message)
        known = [*self._option_string_actions, *re.findall(r"[\w-]+", message.partition("(")[2])]
        hint = did_you_mean(wrong[1] or wrong[2], known) if wrong else ""
        if "--data:" in message and wrong and os.path.isdir(wrong[1] or ""):
            hint = f"; for pictures in a folder: --data folder --data-path {wrong[1]}"
        raise UserError(f"{message}{hint}; see {self.prog} --help")


def build_parser(prog: str, doc: str, kind: type = Settings, shown: dict = BARE, note: str = NOTE):
    """The flags of a class of settings, its own first, each with its value in `shown`.

    Only those given are parsed. In front are two paragraphs of a program's `doc`: what it is, and examples.
    """
    text = "\n\n".join([*doc.split("\n\n")[:2], textwrap.fill(note, 110)])
    raw = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = group = Parser(prog=prog, description=text, usage="%(prog)s [--FLAG VALUE ...]", **raw)
    for one in sorted(fields(kind), key=lambda one: one.name in PAPER):
        allowed, text = one.metadata["allowed"], one.metadata["meaning"]
        if one.metadata["group"]:
            group = parser.add_argument_group(one.metadata["group"])
        options = {"choices": allowed} if isinstance(allowed, tuple) else {"type": allowed}
        if allowed is bool:
            options = {"action": "store_true"}
        elif shown.get(one.name, "") != "":
            text += f" [{shown[one.name]}]"
        flag = "--" + one.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **options)
    return parser


# ---- A run's settings ----

# These do not change what a run computes: a resumed run may have others, a teacher serves for all of them.
INCIDENTAL = {"out", "workers", "device", "compile", "resume", "overwrite", "save_every", "skip_broken"}
INCIDENTAL |= {"remember_labels"}
# A resumed run may move to other machines.
ADJUSTABLE = INCIDENTAL | {"accumulate", "data_path"}


def from_saved(saved: dict, kind: type = Settings, **changed):
    """The settings that a run or checkpoint was saved with; those it does not know are the paper's."""
    known = {one.name for one in fields(kind)}
    return kind(**{name: value for name, value in (saved | changed).items() if name in known})


def saved_run(given: dict, out: str, kind: type = Settings):
    """The settings of the run in `out` where --resume continues it, with what may change; None to start one.

    Raises UserError if a flag given differs from the run's, or if a run would be written over without leave.
    """
    path = Path(out) / "settings.json"
    if not given.get("resume"):
        if given.get("overwrite") and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise UserError("--overwrite would start anew at each of torchrun's restarts; use --resume")
        if not given.get("overwrite") and holds_run(out):
            raise UserError(f"{out} holds a run; --resume continues it, --overwrite replaces it")
        return None
    if not os.path.exists(path):
        if given.keys() <= INCIDENTAL:
            raise UserError(f"there is no run in {out} to continue, and no flag that says what to start")
        return None
    saved = json.loads(path.read_text())
    if ("checkpoint" in saved) != (kind is not Settings):
        owner = "finetune.py" if "checkpoint" in saved else "train.py"
        raise UserError(f"{out} is a run of {owner}; continue it with {owner} --resume")
    if given.get("precision") == "auto":  # it was chosen when the run began
        given = {name: value for name, value in given.items() if name != "precision"}
    for name in sorted(given.keys() - ADJUSTABLE):
        own = saved.get(name, getattr(kind, name))
        if given[name] != own:
            more = f", or train on from its end: finetune.py --checkpoint {out}" if name == "epochs" else ""
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run in {out} has {flag} {own}, not {given[name]}; leave the flag out{more}")
    s = from_saved(saved, kind, **{"overwrite": False} | given)
    s.precision = choose_precision(s.precision, device_type(s.device))  # a run of an older version: auto
    return s


def check(s: Settings) -> None:
    """Refuses early what cannot work."""
    loss, parts = LOSSES[s.distill], world_size() * s.accumulate
    if s.batch_size % parts:
        text = f"--batch-size {s.batch_size} does not divide into processes × --accumulate = {parts} parts"
        raise UserError(f"{text}; try {math.ceil(s.batch_size / parts) * parts}")
    if s.remember_labels and s.distill != "hard":
        raise UserError("--remember-labels is for --distill hard alone, which needs only a teacher's labels")
    if s.warmup_epochs >= s.epochs:
        raise UserError(f"--warmup-epochs must be less than --epochs, {s.epochs}")
    if loss.token and not loss.teacher and not s.distilled:
        raise UserError(f"--distill {s.distill} needs a transformer and no --no-distill-token")
    if s.data == "shapes" and s.data_path != Settings.data_path:
        raise UserError("--data-path has no use for shapes; for pictures of your own add --data folder")
    if s.data in ("folder", "imagenet") and not Path(s.data_path).is_dir():
        raise UserError(f"there is no folder {s.data_path}; name the data set's with --data-path")
    source = s.teacher_weights
    if source == "published" and loss.teacher and s.teacher not in SIZES:
        published_settings(s.teacher)
    elif source not in ("", "published") and not is_url(source) and not os.path.exists(source):
        raise UserError(f"there is no file {source}; --teacher-weights takes a checkpoint's path or URL")
    for name in (s.model, s.teacher):
        check_name(name)
    for name in {s.model} | ({s.teacher} if loss.teacher else set()):
        check_sizes(name, s, s.batch_size // parts)
    make_directory(Path(s.out))


def check_sizes(name: str, s: Settings, micro_batch_size: int) -> None:
    """Raises UserError unless a network can be trained at these sizes."""
    if name in SIZES and s.img_size // s.patch_size > 256:
        grid = s.img_size // s.patch_size
        raise UserError(f"{grid}×{grid} patches are more than 256×256; raise --patch-size")
    with torch.device("meta"):  # where nothing is computed, but shapes that do not fit are found
        if name in SIZES:
            with user_errors():
                create_model(name, img_size=s.img_size, patch_size=s.patch_size)
            return
        try:
            network = create_convnet(name, 10, s.img_size).train()
            network(torch.zeros(micro_batch_size, 3, s.img_size, s.img_size))
        except NotImplementedError:  # torchvision computes the widths of its RegNets from values
            return
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            size, reason = s.img_size, (str(error).strip().splitlines() or [""])[0]
            batch = f"batches of {micro_batch_size} images of {size} pixels"
            raise UserError(f"{name} cannot learn from {batch}: {reason}") from error


def start_run(s: Settings) -> None:
    """Writes a run's settings into its directory, from which an earlier run is removed unless it goes on."""
    if rank() > 0:
        return
    out = Path(s.out)
    stale = [*out.glob("*.partial")]  # of a process that was killed while it wrote
    if not s.resume:
        stale += [out / name for name in ("last.pth", "previous.pth", "best.pth", "log.jsonl")]
    for path in stale:
        path.unlink(missing_ok=True)
    save_json(out / "settings.json", asdict(s))


def describe(s: Settings) -> None:
    """Prints the settings that play a part in a run; `start_run` keeps all of them."""
    parts = {
        "teacher teacher_weights teacher_epochs": LOSSES[s.distill].teacher,
        "tau lam": LOSSES[s.distill].teacher and s.distill != "hard",
        "no_distill_token": LOSSES[s.distill].token and s.model in SIZES,
        "depth dropout drop_path": s.model in SIZES,
        "patch_size": SIZES.keys() & {s.model, s.teacher},
        "warmup_lr": s.warmup_epochs,
        "data_path skip_broken workers": s.data != "shapes",
    }
    idle = " ".join(names for names, part in parts.items() if not part).split()
    text = "  ".join(f"{name}={value}" for name, value in asdict(s).items() if name not in idle)
    options = dict(break_long_words=False, break_on_hyphens=False, initial_indent="  ")
    print0(textwrap.fill(text, 110, subsequent_indent="  ", **options))
