"""Fine-tuning at a higher resolution (sections 3, 4 and 6): other weights and recipes for train.py's loop.

    python finetune.py                          # the last run of train.py, at 1.5 times its size
    torchrun finetune.py --checkpoint RUN/last.pth --img-size 48

Position embeddings are resized bicubically, stochastic depth is off, the augmentation of training is kept,
and both the true label and a teacher at the new resolution supervise. Where the student's teacher knows only
the lower resolution, it is fine-tuned first in the same manner.
"""

import time
from pathlib import Path

from torch import nn

from data import load_data
from distill import checkpoint_weights, create_teacher, read_checkpoint
from model import SIZES, UsageError, load_weights
from train import (
    begin,
    build_parser,
    complete,
    evaluate,
    finish,
    headline,
    load_teacher,
    program,
    restore,
    say,
    train,
    train_teacher,
)

# What fine-tuning changes in a data set's recipe; ImageNet's is the paper's, at a constant learning rate.
PAPER = dict(
    img_size=384, epochs=30, batch_size=512, lr=5e-6, min_lr=5e-6, warmup_epochs=5.0, weight_decay=1e-8,
    drop_path=0.0, teacher_weights="", teacher_epochs=30,
)  # fmt: skip
SHORT = dict(epochs=10, lr=5e-4, warmup_epochs=0.5, weight_decay=1e-8, drop_path=0.0, teacher_epochs=5)
RECIPES = {
    "imagenet": PAPER,
    "cifar10": SHORT,
    "cifar100": SHORT,
    "folder": SHORT,
    "shapes": SHORT | dict(epochs=2, teacher_epochs=2),
}
# What a fine-tuned network keeps from the run it starts from
KEPT = ("data", "data_path", "model", "patch_size", "distill", "no_distill_token", "teacher", "tau", "lam",
        "augment", "mixup", "cutmix", "erasing", "repeats", "smoothing")  # fmt: skip


def last_run() -> str:
    """The newest run of train.py below runs/ that trained a transformer."""
    found = sorted(Path("runs").glob("*/last.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        settings = read_checkpoint(path)["settings"]
        if settings["model"] in SIZES and not settings.get("checkpoint"):  # which fine-tuned runs have
            return str(path)
    raise UsageError(
        "no run below runs/ to start from; make one with: torchrun train.py --model tiny --distill hard"
    )


def finetune_settings(given: dict, saved: dict) -> dict:
    """The settings of fine-tuning: flags given, over the recipe, over the earlier run's own."""
    inherited = {name: saved[name] for name in KEPT}
    recipe = RECIPES[given.get("data", saved["data"])]
    size = saved["img_size"] * 3 // 2 // saved["patch_size"] * saved["patch_size"]
    settings = complete(inherited | {"img_size": size} | recipe | given)
    if not given.get("out"):
        settings["out"] = (
            f"runs/{settings['data']}-{settings['model']}-{settings['distill']}-{settings['img_size']}px"
        )
    return settings


def main() -> None:
    started = time.monotonic()
    parser = build_parser("finetune.py", __doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", default="", help="the run to start from: its last.pth [the newest below runs/]"
    )
    given = vars(parser.parse_args())
    earlier = Path(given.get("out", "")) / "last.pth"
    if given.get("resume") and not given["checkpoint"] and given.get("out") and earlier.is_file():
        given["checkpoint"] = read_checkpoint(earlier)["settings"].get("checkpoint", "")
    source = given["checkpoint"] = given["checkpoint"] or last_run()
    contents = read_checkpoint(source)
    saved = contents.get("settings")
    if not saved or saved["model"] not in SIZES:
        raise UsageError(f"{source} is not the checkpoint of a transformer trained by train.py")
    settings, checkpoint = restore(finetune_settings(given, saved), given)
    place, data = begin(settings)
    if data[0].classes != saved["classes"]:
        raise UsageError(f"{source} was trained on other classes than those of {settings['data']}")

    original = create_teacher(saved["model"], len(saved["classes"]), source).to(place.device)
    val_set = load_data(settings["data"], settings["data_path"], saved["img_size"], place.device, ("val",))[0]
    before = evaluate(original, val_set, settings | {"img_size": saved["img_size"]}, place)
    say(place, f"before, at {saved['img_size']} pixels: {headline(before)}")

    def start_from(network: nn.Module) -> None:
        changed = load_weights(network, checkpoint_weights(contents))
        resized = evaluate(network, data[1], settings, place)
        say(
            place,
            f"resized to {settings['img_size']} pixels ({', '.join(changed) or 'nothing changed'}): "
            f"{headline(resized)}",
        )

    teacher = None
    if settings["distill"] in ("soft", "hard"):
        if not settings["teacher_weights"]:
            # The student's teacher knows the lower resolution: it is fine-tuned to the higher one likewise.
            recipe, low = dict(lr=0.1, warmup_epochs=0.0), saved["teacher_weights"]
            settings["teacher_weights"] = train_teacher(settings, data, place, recipe, low)
        teacher = load_teacher(settings, data, place)
    accuracy = train(settings, data, teacher, place, checkpoint, start_from)
    finish(settings, accuracy, started, place)


if __name__ == "__main__":
    program(main)
