"""Fine-tuning: higher resolution (sections 3, 4 and 6) and transfer to other pictures (section 5.4).

    python finetune.py --checkpoint runs/shapes-tiny-hard/last.pth       # at about 1.5 times its size
    python finetune.py --checkpoint deit_tiny_distilled --data folder --data-path PICTURES

It is train.py's loop with other starting weights and another recipe; stochastic depth is off, most of the
augmentation stays. Higher resolution, of the checkpoint's own data: position embeddings are
resized bicubically, and the true label and a teacher supervise. Transfer, to other data: new heads where the
classes differ, and a distillation token learns the true label, unless --distill asks for a teacher.
"""

import time
from dataclasses import asdict, dataclass, replace
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor, nn

import networks
import settings
from checkpoint import OFFICIAL
from data import DataSet, load_data, open_split
from devices import init
from flags import Parser, build_parser, check, flag_of
from launch import UserError, print0, run_program, user_errors, world_size
from model import SIZES, DeiT, check_fit, load_weights
from runs import accuracy_line, holds_run, introduce, lock_run, report, resumed_settings
from settings import Settings, complete, setting
from train import build_network, evaluate, load_teacher, train

# What --train lets learn: parameters with one of these in their names. With the attention go the position
# embeddings, which may just have been resized; they also move the tokens they are added to.
TRAINED = {"all": ("",), "head": ("head",), "attention": ("head", "attn", "pos_embed")}


# fmt: off
@dataclass
class FinetuneSettings(Settings):
    """The settings of training, and three more."""

    checkpoint: str = setting("", expanduser, f"a file, a URL or one of {', '.join(OFFICIAL)}", "fine-tuning")
    recipe: str = setting("", ("short", "paper"), "a few epochs of AdamW, or the authors' settings: above")
    trainable: str = setting("all", tuple(TRAINED), "what learns; attention: with position embeddings and "
                             "heads", flag="--train")

    @property
    def inputs(self) -> list[str]:
        return [*super().inputs, self.checkpoint]
# fmt: on


# What a fine-tuned network has from the run it starts from, and what only on that run's own data
KEPT = ("model", "patch_size", "depth", "augment", "mixup", "cutmix", "erasing", "repeats", "smoothing")
KEPT_ON_ITS_DATA = ("distill", "no_distill_token", "teacher", "teacher_weights", "tau", "lam", "limit")

ABOUT = """Fine-tunes a trained network, at a higher resolution or on other pictures, such as
  python finetune.py --checkpoint deit_tiny_distilled --data folder --data-path PICTURES

[Values in brackets] are --recipe short's. --recipe paper is, on the checkpoint's own data, {};
on other data, {}."""
SHOWN = asdict(FinetuneSettings()) | settings.SHORT
SHOWN |= dict.fromkeys(("data", *KEPT), "the checkpoint's")
SHOWN |= dict.fromkeys(("data_path", *KEPT_ON_ITS_DATA), "the checkpoint's on its own data")
SHOWN |= {
    "img_size": "the checkpoint's; on the checkpoint's own data 1.5 times that, in whole patches",
    "repeats": "the checkpoint's; 1 for other data",
    "limit": "the checkpoint's; 0 for other data",
    "distill": "the checkpoint's; for other data label where it has a second token, else none",
    "epochs": "30; 2 for shapes",
    "lr": "0.0005; 0.05 for --train head, 0.005 for --train attention; a convnet 0.1 (by sgd)",
    "batch_size": "as in train.py",
    "recipe": "paper on ImageNet's own classes, else short",
}


def finetune_parser() -> Parser:
    """The flags of train.py with fine-tuning's own defaults, and three more."""
    listed = [", ".join(f"{k} {v}" for k, v in r.items()) for r in (settings.RESOLUTION, settings.TRANSFER)]
    return build_parser("finetune.py", ABOUT.format(*listed), SHOWN, FinetuneSettings)


def same_data(given: dict, saved: dict) -> bool:
    """Whether the data is what the checkpoint was trained on; a folder is told by its path."""
    paths = (given.get("data_path", saved["data_path"]), saved["data_path"])
    same_path = len({Path(path).resolve() for path in paths}) == 1
    return given.get("data", saved["data"]) == saved["data"] and (saved["data"] != "folder" or same_path)


def finetune_settings(given: dict, saved: dict) -> FinetuneSettings:
    """The flags given, over the recipe, over what `checkpoint_settings` says of the run it starts from."""
    saved = asdict(Settings()) | settings.RECIPES[saved["data"]][0] | saved
    data, same = given.get("data", saved["data"]), same_data(given, saved)
    name = given.get("recipe", "paper" if same and data == "imagenet" else "short")
    entry = ("resolution" if same else "transfer") if name == "paper" else given.get("trainable", "all")
    convnet = saved["model"] not in SIZES
    recipe = settings.FINETUNING[entry] | (settings.FINETUNED_CONVNET if convnet else {})
    if given.get("optimizer", recipe["optimizer"]) != recipe["optimizer"]:
        recipe |= settings.ADAMW if given["optimizer"] == "adamw" else settings.SGD
    if name == "short" and data == "shapes":
        recipe["epochs"] = 2
    if "epochs" in given:  # the recipe's warm-up is for its own epochs
        recipe["warmup_epochs"] = "auto"

    kept = KEPT + (KEPT_ON_ITS_DATA if same else ())
    start = settings.RECIPES[data][0] | {name: saved[name] for name in kept}
    start |= {"warmup_epochs": "auto", "teacher_epochs": "auto", "img_size": saved["img_size"], "data": data}
    start["data_path"] = saved["data_path"] if data == saved["data"] else Settings.data_path
    if same:
        start["img_size"] = saved["img_size"] * 3 // 2 // saved["patch_size"] * saved["patch_size"]
        start["no_distill_token"] &= "distill" not in given  # a loss that is named brings its token back
        if given.get("teacher", saved["teacher"]) != saved["teacher"]:
            start["teacher_weights"] = ""
    else:
        second = settings.DISTILLATION[saved["distill"]].token and not saved["no_distill_token"]
        start["distill"] = "label" if second else "none"
        start["repeats"] = 1  # an epoch shows each picture; the paper's recipe has its own
    s = complete(given, start | recipe | {"recipe": name}, FinetuneSettings)
    for name in ("model", "patch_size", "depth"):
        if getattr(s, name) != saved[name]:
            text = f"{s.checkpoint} has {flag_of(Settings, name)} {saved[name]}, not {getattr(s, name)}"
            raise UserError(f"{text}; fine-tuning keeps it")
    if s.trainable != "all" and convnet:
        raise UserError(f"--train {s.trainable} is about transformers; a {s.model} learns as a whole")
    s.out = given.get("out") or f"runs/{data}-{s.model}-{s.distill}-{s.img_size}px"
    return s


def adapt(state: dict[str, Tensor], network: nn.Module, keep_heads: bool) -> list[str]:
    """Loads weights that may have a distillation token less or more, or other classes; says what was done."""
    fresh, state, done = network.state_dict(), dict(state), []
    heads = "head" if isinstance(network, DeiT) else list(fresh)[-1].removesuffix("bias")
    if isinstance(network, DeiT) and network.distilled and "dist_token" not in state:
        # It starts as a good reader of the image, the class token. The fresh draw (std 0.02) on top keeps the
        # two from staying the same for ever where both learn the true label.
        state["dist_token"] = state["cls_token"] + fresh["dist_token"]
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"]], dim=1)
        state |= {f"head_dist.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
        done.append("a distillation token is added, a copy of the class token")
    elif isinstance(network, DeiT) and not network.distilled and "dist_token" in state:
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], dim=1)
        state = {key: value for key, value in state.items() if not key.startswith(("dist_", "head_dist"))}
        done.append("the distillation token is dropped")
    if not keep_heads:
        state |= {key: value for key, value in fresh.items() if key.startswith(heads)}
        done.append(f"new heads for {len(list(fresh.values())[-1])} classes")
    with user_errors():
        if isinstance(network, DeiT):
            if load_weights(network, state):
                done.append("position embeddings are resized")
        else:
            check_fit(fresh, state, "weights do not fit the model")
            network.load_state_dict(state)
    return done


def start_from(
    s: FinetuneSettings, network: nn.Module, train_set: DataSet, val_set: DataSet, device: torch.device
) -> None:
    """Gives a network the weights of s.checkpoint, and shows the accuracy before and after."""
    (original, saved), classes = networks.load_network(s.checkpoint), train_set.classes
    original = original.to(device)
    same, keep_heads = same_data(asdict(s), saved), classes == saved["classes"]
    if saved["classes"] is None:  # the authors' files do not name them, but ImageNet's have one order
        keep_heads = same and len(classes) == saved["num_classes"]
        if keep_heads:
            networks.check_classes(s.checkpoint, None, classes)
    if not keep_heads and same and s.recipe == "paper":
        text = f"{s.checkpoint} knows other classes than {s.data_path}"
        raise UserError(f"{text}, and this recipe is too gentle for new heads; use --recipe short")
    if keep_heads:
        low = replace(s, img_size=original.img_size)
        val = open_split(low, "val", device) if s.data == "shapes" else val_set  # shapes are drawn at a size
        print0(f"before, at {low.img_size} pixels: {accuracy_line(evaluate(original, val, low, device))}")
    done = adapt(original.state_dict(), network, keep_heads)
    print0(f"{s.checkpoint}: {'; '.join(done) or 'taken as it is'}")
    if keep_heads:
        resized = evaluate(network.to(device), val_set, s, device)
        print0(f"at the start, at {s.img_size} pixels: {accuracy_line(resized)}")


def main() -> None:
    started = time.monotonic()
    given = vars(finetune_parser().parse_args())
    resumed = s = resumed_settings(given, given["out"], FinetuneSettings) if "out" in given else None
    if not resumed and "checkpoint" not in given:
        raise UserError("name the network to start from with --checkpoint, such as a run's last.pth")
    if not resumed:
        s = finetune_settings(given, networks.load_network(given["checkpoint"])[1])
        resumed = resumed_settings(given, s.out, FinetuneSettings)
        s = resumed or s
    check(s, given)
    networks.check_networks(s)
    device = init(s.device)
    train_set, val_set = load_data(s, device)
    if "batch_size" not in given and not resumed:
        s.batch_size = settings.fit_batch_size(s.batch_size, len(train_set), world_size() * s.accumulate)
    network = build_network(s, len(train_set.classes))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[s.trainable]))
    introduce(s, network, train_set, val_set, device)
    teacher = load_teacher(s, train_set, val_set, device) if s.needs_teacher else None
    if not (s.resume and holds_run(s.out)):
        start_from(s, network, train_set, val_set, device)
    lock_run(s.out)
    report(s, train(network, s, train_set, val_set, device, teacher), started)


if __name__ == "__main__":
    run_program(main)
