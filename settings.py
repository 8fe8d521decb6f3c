"""Every setting with its default, range, unit and meaning, and the recipes: every learning rate is here.

Each setting is a flag of train.py and finetune.py; its default is the paper's value for ImageNet (Table 9). A
run has the flags given, over its recipe, over these defaults: `complete` puts them together, before anything
else happens.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from os.path import expanduser
from typing import NamedTuple

from launch import choose_precision, device_type, world_size


class Distillation(NamedTuple):
    """What a choice of --distill needs; its loss is in distill.py."""

    teacher: bool  # the loss asks a teacher
    token: bool  # the student has a distillation token, unless --no-distill-token


DISTILLATION = {
    "none": Distillation(teacher=False, token=False),
    "soft": Distillation(teacher=True, token=True),
    "hard": Distillation(teacher=True, token=True),
    "label": Distillation(teacher=False, token=True),
}
TRANSFORMERS = ("tiny", "small", "base")  # the students; every other network is a convnet or torchvision's
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def number(kind: type, low: float, high: float = math.inf, auto: bool = False) -> Callable:
    """An argparse type: a number from `low` to `high`, or the word auto where that is allowed."""

    def convert(text: str):
        if auto and text == "auto":
            return text
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be from {low:g} to {high:g}")
        return value

    convert.__name__ = {int: "whole number", float: "number"}[kind]
    return convert


COUNT, POSITIVE = number(int, 1), number(float, 0)
SHARE, RATE = number(float, 0, 1), number(float, 0, 0.999999)
PIXELS = number(int, 1, 4096)


def absolute(path: str) -> str:
    return os.path.abspath(expanduser(path))


def setting(default, allowed, meaning: str, group: str = "", flag: str = ""):
    """A field of Settings: its default, its type or the values allowed, its meaning and unit.

    The first of a group has the group's title in --help. `flag` is for one that is not named after its field.
    """
    return field(
        default=default, metadata={"allowed": allowed, "meaning": meaning, "group": group, "flag": flag}
    )


# ---- Recipes: what a data set changes in the paper's settings ----

# fmt: off
CIFAR = dict(img_size=32, patch_size=4, epochs=100, batch_size=256, lr=2e-3, repeats=1)
PICTURES = dict(img_size=224, epochs=100, batch_size=64, lr=1e-3, repeats=1)
SHAPES = dict(img_size=24, patch_size=8, epochs=8, batch_size=128, lr=4e-3, repeats=1, warmup_epochs=0.5,
              drop_path=0.0)
# Convnets learn by SGD. Teachers have "the same data and same data-augmentation" (section 5.2), but for small
# images, where a teacher has minutes: too few for the whole of it. Their rates: results/teachers.md.
IMAGENET_CONVNET = dict(epochs=300, optimizer="sgd", lr=0.8, min_lr=0.0, weight_decay=5e-5)
PICTURES_CONVNET = dict(IMAGENET_CONVNET, img_size=224, epochs=30, batch_size=64, lr=0.2, repeats=1)
CIFAR_CONVNET = dict(img_size=32, epochs=30, batch_size=128, optimizer="sgd", lr=0.2, min_lr=0.0,
                     weight_decay=5e-4, repeats=1, augment="none", mixup=0.0, cutmix=0.0, erasing=0.0)
SHAPES_CONVNET = dict(img_size=24, epochs=2, batch_size=128, optimizer="sgd", lr=0.1, min_lr=0.0,
                      weight_decay=5e-5, repeats=1, augment="none", mixup=0.0, cutmix=0.0)
RECIPES = {  # of a transformer, and of a convnet: a teacher
    "imagenet": (dict(teacher="regnet_y_16gf", teacher_weights="published"), IMAGENET_CONVNET),
    "inat2018": (dict(teacher="regnet_y_16gf"), IMAGENET_CONVNET),
    "inat2019": (dict(teacher="regnet_y_16gf"), IMAGENET_CONVNET),
    "cifar10": (CIFAR, CIFAR_CONVNET),
    "cifar100": (CIFAR, CIFAR_CONVNET),
    "flowers102": (PICTURES, PICTURES_CONVNET),
    "cars": (PICTURES, PICTURES_CONVNET),
    "folder": (PICTURES, PICTURES_CONVNET),
    "shapes": (SHAPES, SHAPES_CONVNET),
}

# ---- Recipes of fine-tuning: what changes in the settings of the run that it starts from ----

# Table 7 has both optimizers.
ADAMW = dict(optimizer="adamw", lr=5e-4, weight_decay=1e-8)
SGD = dict(optimizer="sgd", lr=0.01, weight_decay=1e-4)
FINETUNED_CONVNET = dict(optimizer="sgd", lr=0.1, min_lr=0.0, weight_decay=5e-5, warmup_epochs=0.0)
SHORT = dict(ADAMW, epochs=30, drop_path=0.0)
# The authors' own, for ImageNet at 384 (section 6), at a constant learning rate, and for CIFAR and Cars
RESOLUTION = dict(SHORT, img_size=384, batch_size=512, lr=5e-6, min_lr=5e-6, warmup_epochs=5.0)
TRANSFER = dict(SGD, epochs=1000, batch_size=768, drop_path=0.0, erasing=0.0, repeats=3)
FINETUNING = {  # --recipe short by what learns, --recipe paper by purpose
    "all": SHORT,
    "head": dict(SHORT, lr=0.05),  # fewer weights want larger steps (results/head.md)
    "attention": dict(SHORT, lr=5e-3),
    "resolution": RESOLUTION,
    "transfer": TRANSFER,
}  # and on top, for a convnet, FINETUNED_CONVNET
# fmt: on


# fmt: off
@dataclass
class Settings:
    """The settings of a run. Rates are probabilities; `lr` is for 512 images."""

    data: str = setting("shapes", tuple(RECIPES), "data set, with its recipe", "what to train on what")
    data_path: str = setting("data", absolute, "where downloads go, or a tree with train/CLASS/* and "
                             "val/CLASS/*")
    limit: int = setting(0, number(int, 0), "use only so many training and validation images; 0: all")
    model: str = setting("tiny", str, "tiny, small, base, or a teacher's network: any of --teacher")
    img_size: int = setting(224, PIXELS, "side of the square images, pixels")
    patch_size: int = setting(16, PIXELS, "side of a patch, pixels; divides the image size")
    depth: int = setting(12, number(int, 1, 100), "blocks of a transformer; the paper's networks have 12")

    distill: str = setting("none", tuple(DISTILLATION), "soft: equation 2; hard: equation 3; label: a second "
                           "token trained on the true label, the paper's control", "distillation (section 4)")
    no_distill_token: bool = setting(False, bool, "distill into the class token alone (rows 2, 3 of Table 3)")
    teacher: str = setting("auto", str, "the teacher's network: regnet_y_200mf, _4gf, _8gf, _12gf, _16gf, "
                           "vgg8, any classifier of torchvision, or tiny, small, base; auto: vgg8 for images "
                           "of up to 64 pixels, regnet_y_200mf for larger ones")
    teacher_weights: str = setting("", expanduser, "'published' (torchvision's or the DeiT authors'), or a "
                                   "checkpoint's path or URL; without it one is trained first on the same "
                                   "data, beside the run")
    teacher_epochs: int = setting("auto", number(int, 1, auto=True), "epochs of a teacher that is trained "
                                  "first; auto: those of its own recipe")
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
    drop_path: float = setting(0.1, RATE, "stochastic depth: the last block's probability to drop a branch")
    ema: float = setting(0.0, RATE, "decay of the weights' moving average (the authors' 0.99996), "
                         "which is then what is evaluated; 0 is off")

    optimizer: str = setting("adamw", ("adamw", "sgd"), "sgd has Nesterov momentum 0.9",
                             "optimization (Table 9)")
    lr: float = setting(5e-4, POSITIVE, "learning rate per 512 images: the one used is lr × batch size / 512")
    min_lr: float = setting(1e-5, POSITIVE, "learning rate at the end of the cosine, at any batch size")
    warmup_lr: float = setting(1e-6, POSITIVE, "learning rate at the start of warm-up, at any batch size")
    warmup_epochs: float = setting("auto", number(float, 0, auto=True), "epochs of linear warm-up; auto: the "
                                   "paper's 5, but at most a tenth of the epochs")
    weight_decay: float = setting(0.05, POSITIVE, "not for biases, norms, tokens and position embeddings")
    clip_grad: float = setting(0.0, POSITIVE, "largest norm of the gradient, 0 is no clipping")
    epochs: int = setting(300, COUNT, "epochs, each of about as many images as the data set has")
    batch_size: int = setting(1024, COUNT, "images a step, of all processes and accumulated parts together; "
                              "unless it is given, few images have smaller ones: ten steps an epoch, "
                              "but 8 images at least")
    accumulate: int = setting(1, COUNT, "parts into which a process cuts its share of a batch; saves memory")

    precision: str = setting("auto", PRECISIONS, "of matrix products; auto: bf16 where the machine is faster "
                             "in it, fp16 on older CUDA GPUs, else fp32", "running")
    compile: bool = setting(False, bool, "use torch.compile")
    device: str = setting("auto", DEVICES, "auto takes a GPU where there is one")
    workers: int = setting(-1, number(int, -1, 256), "processes that read image files, -1 chooses")
    skip_broken: bool = setting(False, bool, "leave out image files that cannot be read, and count them")
    seed: int = setting(0, number(int, 0, 2**62), "of all randomness, but for the data set shapes and a "
                       "teacher trained first")
    out: str = setting("", expanduser, "the run's directory, else one below runs/ named after its settings")
    save_every: int = setting(0, number(int, 0), "steps between saves within an epoch; 0: only at its end")
    resume: bool = setting(False, bool, "continue the run in --out, or start it if there is none")
    overwrite: bool = setting(False, bool, "replace the run in --out; --resume takes precedence")

    @property
    def distilled(self) -> bool:
        """Whether the network has a distillation token."""
        return self.model in TRANSFORMERS and DISTILLATION[self.distill].token and not self.no_distill_token

    @property
    def needs_teacher(self) -> bool:
        return DISTILLATION[self.distill].teacher

    @property
    def inputs(self) -> list[str]:
        """The checkpoints that the run begins with."""
        return [self.teacher_weights]
# fmt: on


def recipe_of(data: str, model: str) -> dict:
    """What training a network on a data set changes in the paper's settings."""
    return RECIPES[data][model not in TRANSFORMERS]


def complete(given: dict, recipe: dict | None = None, kind: type = Settings):
    """All settings of a run: those given, over a recipe (its data set's), over the paper's.

    No `auto` is left but the device's; what it means stands in the help of each flag.
    """
    if recipe is None:
        recipe = recipe_of(given.get("data", kind.data), given.get("model", kind.model))
    s = kind(**recipe | given)
    if "batch_size" not in given:
        parts = world_size() * s.accumulate
        s.batch_size = max(1, s.batch_size // parts) * parts
    if s.warmup_epochs == "auto":
        s.warmup_epochs = min(5.0, s.epochs / 10)
    if s.teacher == "auto":
        s.teacher = "vgg8" if s.img_size <= 64 else "regnet_y_200mf"
    if s.teacher_epochs == "auto":
        s.teacher_epochs = recipe_of(s.data, s.teacher).get("epochs", kind.epochs)
    s.precision = choose_precision(s.precision, device_type(s.device))
    s.out = s.out or f"runs/{s.data}-{s.model}-{s.distill}" + "-no-token" * s.no_distill_token
    return s


def fit_batch_size(batch_size: int, images: int, parts: int) -> int:
    """A batch of that size, or smaller so that an epoch has ten steps, but not below 8; in whole parts."""
    return max(1, min(batch_size, max(images // 10, 8), images) // parts) * parts
