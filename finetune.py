"""Fine-tuning: higher resolution (sections 3, 4 and 6) and transfer to other pictures (section 5.4).

    python finetune.py                          # the last run of train.py, at 1.5 times its size
    torchrun finetune.py --checkpoint deit_base_distilled --data imagenet --data-path IMAGENET
    torchrun finetune.py --checkpoint deit_tiny_distilled --data folder --data-path PICTURES

It is train.py's loop with other starting weights and another recipe; stochastic depth is off, the
augmentation of training stays.

Higher resolution, of the checkpoint's own data: position embeddings are resized bicubically, and the true
label and a teacher at the new resolution supervise. Where the student's teacher knows only another
resolution, it is fine-tuned first in the same manner.

Transfer, to other data: new heads where the classes differ. A distillation token learns the true label like
the class token, unless --distill hard or soft asks for a teacher of the new classes. The authors advise to
keep the distillation signal; it costs the teacher's training.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from data import ArraySet, FolderSet, load_data
from distill import checkpoint_settings, create_teacher, read_checkpoint
from model import OFFICIAL, SIZES, DeiT, UsageError, load_weights
from train import (
    PAPER,
    TRAINED,
    Parser,
    Place,
    add_flag,
    begin,
    build_parser,
    check_order,
    complete,
    evaluate,
    finish,
    first_alone,
    headline,
    join,
    load_teacher,
    program,
    recall,
    restore,
    say,
    train,
    train_teacher,
)

# Table 7 has both. The rate is per 512 images.
OPTIMIZERS = {
    "adamw": dict(optimizer="adamw", lr=5e-4, weight_decay=1e-8),
    "sgd": dict(optimizer="sgd", lr=0.01, weight_decay=1e-4),
}
SHORT = dict(OPTIMIZERS["adamw"], epochs=30, drop_path=0.0)
# The authors' own, for ImageNet at 384 (section 6), at a constant learning rate, and for CIFAR and Cars.
HIGHER = dict(SHORT, img_size=384, batch_size=512, lr=5e-6, min_lr=5e-6, warmup_epochs=5.0)
TRANSFER = dict(OPTIMIZERS["sgd"], epochs=1000, batch_size=768, drop_path=0.0, erasing=0.0, repeats=3)

# What a fine-tuned network has from the run it starts from, and what only on that run's own data
KEPT = ("model", "patch_size", "augment", "mixup", "cutmix", "erasing", "repeats", "smoothing")
KEPT_ON_SAME_DATA = ("distill", "no_distill_token", "teacher", "tau", "lam")
SHOWN = PAPER | dict.fromkeys(("data", "data_path", *KEPT, *KEPT_ON_SAME_DATA), "the checkpoint's") | SHORT
SHOWN |= {
    "img_size": "the checkpoint's; on the checkpoint's own data 1.5 times that",
    "distill": "the checkpoint's; for other data label where it has a second token, else none",
    "teacher_epochs": "as --epochs for a teacher that is fine-tuned; else as in train.py",
    "epochs": "30; 2 for shapes",
    "batch_size": "as in train.py",
    "warmup_epochs": "5, but at most a tenth of the epochs",
}


def finetune_parser() -> Parser:
    """The flags of train.py with fine-tuning's own defaults, and three more."""
    listed = [", ".join(f"{name} {value}" for name, value in recipe.items()) for recipe in (HIGHER, TRANSFER)]
    note = (
        "The value in [brackets] is that of --recipe short. --recipe paper is, on the checkpoint's own data, "
    )
    note += "; on other data, ".join(listed)
    parser = build_parser("finetune.py", __doc__.splitlines()[0], SHOWN, note)
    group = parser.add_argument_group("fine-tuning")
    text = f"what to start from: a file of ours or the authors', a URL, or one of {', '.join(OFFICIAL)}"
    add_flag(group, "checkpoint", "the newest run of train.py below runs/", str, text)
    text = "short: some epochs of AdamW; paper: the authors' settings, below"
    add_flag(group, "recipe", "paper on ImageNet's own classes, else short", ("short", "paper"), text)
    text = "what learns: all; the heads alone; or the attention layers, position embeddings and heads"
    add_flag(group, "train", "all", tuple(TRAINED), text)
    return parser


def last_run() -> str:
    """The newest run of train.py below runs/ that trained a transformer."""
    found = sorted(Path("runs").glob("*/last.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        settings = checkpoint_settings(read_checkpoint(path))
        tuned, teacher = "checkpoint" in settings, path.parent.name.startswith("teacher-")
        if settings.get("model") in SIZES and not tuned and not teacher:
            return str(path)
    raise UsageError(
        "no run below runs/ to start from; make one with: torchrun train.py --model tiny --distill hard"
    )


def on_own_data(given: dict, saved: dict) -> bool:
    """Whether the data is what the checkpoint was trained on; a folder is told by its path."""
    if given.get("data", saved["data"]) != saved["data"]:
        return False
    paths = {
        Path(path).resolve() for path in (given.get("data_path", saved["data_path"]), saved["data_path"])
    }
    return saved["data"] != "folder" or len(paths) == 1


def finetune_settings(given: dict, saved: dict) -> tuple[dict, bool]:
    """The settings of fine-tuning, and whether it has to fine-tune a teacher of another resolution first.

    They are the flags given, over the recipe, over what `checkpoint_settings` says of the run it starts from.
    """
    data, same = given.get("data", saved["data"]), on_own_data(given, saved)
    path = given.get("data_path", (saved if data == saved["data"] else PAPER)["data_path"])
    word = given.get("recipe", "paper" if same and data == "imagenet" else "short")
    recipe = SHORT if word == "short" else HIGHER if same else TRANSFER
    if data == "shapes" and word == "short":
        recipe = recipe | {"epochs": 2}
    if given.get("optimizer", recipe["optimizer"]) != recipe["optimizer"]:
        recipe = recipe | OPTIMIZERS[given["optimizer"]]
    if "epochs" in given:  # the recipe's warm-up is for its own epochs
        recipe = {name: value for name, value in recipe.items() if name != "warmup_epochs"}

    start = {name: saved[name] for name in KEPT + (KEPT_ON_SAME_DATA if same else ()) if name in saved}
    start |= {"checkpoint": given["checkpoint"], "recipe": word, "train": "all"}
    if same:
        start["img_size"] = saved["img_size"] * 3 // 2 // saved["patch_size"] * saved["patch_size"]
        start["no_distill_token"] &= "distill" not in given
    else:
        second = saved["distill"] != "none" and not saved["no_distill_token"]
        start |= {"img_size": saved["img_size"], "distill": "label" if second else "none"}
    settings = complete(given | {"data": data, "data_path": path}, start | recipe)
    for name in ("model", "patch_size"):
        if settings[name] != saved[name]:
            raise UsageError(
                f"{given['checkpoint']} has --{name.replace('_', '-')} {saved[name]}, not {settings[name]}; "
                "fine-tuning keeps it"
            )
    if not given.get("out"):
        settings["out"] = f"runs/{data}-{settings['model']}-{settings['distill']}-{settings['img_size']}px"

    lower = False
    if same and settings["distill"] in ("soft", "hard") and not given.get("teacher_weights"):
        if saved.get("teacher") == settings["teacher"]:
            settings["teacher_weights"] = saved["teacher_weights"]
        size = 224 if settings["teacher_weights"] == "published" else saved["img_size"]
        lower = settings["teacher_weights"] != "" and settings["img_size"] != size
        if lower:
            settings["teacher_epochs"] = given.get("teacher_epochs", recipe["epochs"])
    return settings, lower


def adapt(state: dict[str, Tensor], network: DeiT, keep_heads: bool) -> list[str]:
    """Loads weights that may lack the network's distillation token, or have one too many, or other classes.

    Returns what was done to them, in words.
    """
    fresh, state, done = network.state_dict(), dict(state), []
    position = state["pos_embed"]
    if network.distilled and "dist_token" not in state:
        # It starts as a good reader of the image, the class token. The fresh draw (std 0.02) on top keeps the
        # two from staying the same for ever where both learn the true label.
        state["dist_token"] = state["cls_token"] + fresh["dist_token"]
        state["pos_embed"] = torch.cat([position[:, :1], position], dim=1)
        state |= {f"head_dist.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
        done.append("a distillation token is added, a copy of the class token")
    elif not network.distilled and "dist_token" in state:
        state["pos_embed"] = torch.cat([position[:, :1], position[:, 2:]], dim=1)
        state = {key: value for key, value in state.items() if not key.startswith(("dist_", "head_dist"))}
        done.append("the distillation token is dropped")
    if not keep_heads:
        state |= {key: value for key, value in fresh.items() if key.startswith("head")}
        done.append(f"new heads for {len(fresh['head.bias'])} classes")
    if load_weights(network, state):
        done.append("position embeddings are resized")
    return done


def starting(
    original: DeiT, saved: dict, settings: dict, data: list[ArraySet | FolderSet], place: Place
) -> Callable[[DeiT], None]:
    """Measures the network to start from, and returns the function that gives its weights to a new one."""
    source, size, classes = settings["checkpoint"], saved["img_size"], data[0].classes
    same = on_own_data(settings, saved)
    keep_heads = classes == saved["classes"]
    if saved["classes"] is None:  # the authors' files do not name them, but ImageNet's have one order
        keep_heads = same and len(classes) == saved["num_classes"]
        if keep_heads:
            check_order(source, classes, len(classes))
    if not keep_heads and same and settings["recipe"] == "paper":
        raise UsageError(
            f"{source} knows other classes than {settings['data_path']}, and --recipe paper at a higher "
            "resolution is too gentle for new heads; use --data folder or --recipe short"
        )
    if keep_heads:
        which = [
            settings["data"],
            settings["data_path"],
            size,
            place.device,
            ("val",),
            settings["skip_broken"],
        ]
        val_set = load_data(*which)[0]
        before = evaluate(original, val_set, settings | {"img_size": size}, place)
        say(place, f"before, at {size} pixels: {headline(before)}")

    def start_from(network: DeiT) -> None:
        done = adapt(original.state_dict(), network, keep_heads)
        say(place, f"{source}: {'; '.join(done) or 'taken as it is'}")
        if keep_heads:
            resized = evaluate(network, data[1], settings, place)
            say(place, f"at the start, at {settings['img_size']} pixels: {headline(resized)}")

    return start_from


def main() -> None:
    started = time.monotonic()
    given = vars(finetune_parser().parse_args())
    place = join(given.get("device", "auto"))
    checkpoint, lower = {}, False
    if given.get("resume") and given.get("out"):  # a run knows how to go on
        given = recall(given, Path(given["out"]), tuned=True)
        settings, checkpoint = restore(PAPER | given, given)
        if checkpoint and "checkpoint" not in settings:
            raise UsageError(f"{given['out']} is a run of train.py; continue it with train.py --resume")
    if not checkpoint:
        source = given["checkpoint"] = given.get("checkpoint") or last_run()
        saved = checkpoint_settings(first_alone(place, lambda: read_checkpoint(source)))
        if saved.get("model") not in SIZES or "num_classes" not in saved:
            raise UsageError(f"{source} does not hold a trained {', '.join(SIZES)} transformer")
        settings, lower = finetune_settings(given, saved)
        settings, checkpoint = restore(settings, given)
        original = create_teacher(saved["model"], saved["num_classes"], source).to(place.device)
    data = begin(settings, place, None if checkpoint else given)
    start_from = None if checkpoint else starting(original, saved, settings, data, place)

    teacher = None
    if settings["distill"] in ("soft", "hard"):
        if not checkpoint and (lower or not settings["teacher_weights"]):
            rate = SHORT["lr"] if settings["teacher"] in SIZES else 0.1
            recipe = dict(lr=rate, warmup_epochs=0.0, drop_path=0.0) if lower else None
            low = settings["teacher_weights"]
            settings["teacher_weights"] = train_teacher(settings, data, place, recipe, low)
        teacher = load_teacher(settings, data, place)
    accuracy = train(settings, data, teacher, place, checkpoint, start_from)
    finish(settings, accuracy, started, place)


if __name__ == "__main__":
    program(main)
