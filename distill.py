"""Distillation: the losses of equations 2 and 3, and the teachers (section 4, Tables 2 and 3).

The student's `outputs` are one tensor of logits (no distillation token: both terms of the loss act on the
class logits, "usual distillation") or the pair (class logits, distillation logits): the true label then
teaches the class token and the teacher teaches the distillation token.

    torchrun train.py --model tiny --distill hard
"""

import math
import pickle
import re
import urllib.error
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet

from model import OFFICIAL, SIZES, UsageError, check_fit, create_model, nearest, widened

Outputs = Tensor | tuple[Tensor, Tensor]


def both(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The logits that learn from the label and those that learn from the teacher, in float32 at least."""
    first, second = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
    return widened(first), widened(second)


def label_loss(outputs: Outputs, targets: Tensor) -> Tensor:
    """Cross-entropy with the true label; of a pair the mean of both, the paper's control."""
    first, second = both(outputs)
    if isinstance(outputs, Tensor):
        return F.cross_entropy(first, targets)
    return (F.cross_entropy(first, targets) + F.cross_entropy(second, targets)) / 2


def soft_distillation_loss(
    outputs: Outputs, targets: Tensor, teacher_logits: Tensor, tau: float = 3.0, lam: float = 0.1
) -> Tensor:
    """Equation 2: (1 - λ) CE(ψ(Zs), y) + λ τ² KL(ψ(Zs/τ), ψ(Zt/τ)), the mean over the batch.

    `outputs` (B, C) or a pair of them; `targets` are class probabilities float (B, C), smoothed by the
    caller, or labels int64 (B,); `teacher_logits` (B, C). KL is that of the teacher's softened distribution
    from the student's.
    """
    class_logits, student_logits = both(outputs)
    student, teacher = (F.log_softmax(z / tau, dim=-1) for z in (student_logits, widened(teacher_logits)))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - lam) * F.cross_entropy(class_logits, targets) + lam * tau**2 * divergence


def hard_distillation_loss(outputs: Outputs, targets: Tensor, teacher_logits: Tensor) -> Tensor:
    """Equation 3: ½ CE(ψ(Zs), y) + ½ CE(ψ(Zs), y_t), y_t = argmax Zt, the mean over the batch.

    Arguments as in `soft_distillation_loss`. The teacher's label is never smoothed (section 4).
    """
    class_logits, student_logits = both(outputs)
    teacher_labels = teacher_logits.argmax(dim=-1)
    return (F.cross_entropy(class_logits, targets) + F.cross_entropy(student_logits, teacher_labels)) / 2


# RegNetY (Radosavovic et al., 2020): blocks and widths of the four stages, group width. Table 2 has the last
# four; the first is for small images and small machines. 8GF is as torchvision has it, so that its published
# weights fit: its first stage is 224 wide, not 168.
REGNETY = {
    "regnet_y_200mf": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnet_y_4gf": ((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "regnet_y_8gf": ((2, 4, 10, 1), (224, 448, 896, 2016), 56),
    "regnet_y_12gf": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnet_y_16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
}
SMALL_IMAGE = 64  # pixels: up to here a convnet's first convolution keeps the resolution


def check_name(name: str) -> None:
    """Raises UsageError unless `name` is a network that can be trained or can teach."""
    names = (*SIZES, *REGNETY, *torchvision.models.list_models(torchvision.models))
    if name not in names:
        raise UsageError(
            f"unknown network {name!r}; choose {', '.join((*SIZES, *REGNETY))}, or a classifier "
            f"of torchvision such as resnet18{nearest(name, names)}"
        )


def try_network(name: str, img_size: int, training: bool = False) -> None:
    """Raises UsageError unless a convnet takes one image of this size, in training or in evaluation."""
    try:
        with torch.no_grad():
            create_convnet(name, 10, img_size).train(training)(torch.zeros(1, 3, img_size, img_size))
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        what = f"learn from single images of {img_size}" if training else f"be used on images of {img_size}"
        raise UsageError(f"{name} cannot {what} pixels: {reason}") from error


def create_convnet(name: str, num_classes: int, img_size: int) -> nn.Module:
    """A RegNetY or any torchvision classifier with fresh weights.

    Convnets shrink an image 32 times; one of 32 pixels would become a single point. For images of up to 64
    pixels the first convolution has stride 1 instead of 2, which changes no weight's shape.
    """
    if name in REGNETY:
        depths, widths, group_width = REGNETY[name]
        params = BlockParams(depths, widths, [group_width] * 4, [1.0] * 4, strides=[2] * 4, se_ratio=0.25)
        network = RegNet(params, num_classes)
    else:
        check_name(name)
        more = {"image_size": img_size} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):  # no auxiliary heads: one network, one output
            more = {"aux_logits": False, "init_weights": True}
        network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **more)
    if img_size <= SMALL_IMAGE:
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        if first.stride != first.kernel_size:  # those of transformers cut patches
            first.stride = (1, 1)
    return network


def read_checkpoint(source: str | Path) -> dict:
    """The contents, on the CPU, of a checkpoint: a file, a URL, a name in OFFICIAL. No code in it is run.

    A URL is downloaded once; a file name that ends in -HASH.pth has its SHA-256 checked against it. Raises
    UsageError if there is no such file or it is not a checkpoint.
    """
    source = OFFICIAL.get(str(source), source)
    try:
        if is_url(source):
            contents = torch.hub.load_state_dict_from_url(
                source, map_location="cpu", check_hash=True, weights_only=True
            )
        else:
            if zipfile.is_zipfile(source) and (bad := zipfile.ZipFile(source).testzip()):
                raise UsageError(f"{bad} in it is damaged")  # torch itself does not look at the checksums
            contents = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no file {source}") from None
    except IsADirectoryError:
        raise UsageError(
            f"{source} is a folder; name a checkpoint in it, such as {source}/last.pth"
        ) from None
    except urllib.error.URLError as error:
        reason = getattr(error, "reason", error)
        raise UsageError(
            f"could not download {source}: {reason}; check the address and the network"
        ) from None
    except pickle.UnpicklingError:
        raise UsageError(
            f"{source} is not a checkpoint that can be read safely: it holds something else than weights and "
            "settings, or is damaged"
        ) from None
    except Exception as error:  # a damaged file can make the reader raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{source} is not a checkpoint that can be read safely: {reason}") from error
    if not isinstance(contents, dict):
        raise UsageError(
            f"{source} is not a checkpoint: it holds a {type(contents).__name__}, not named weights"
        )
    parts = [part for part in ("model", "ema", "settings") if contents.get(part)]
    weights = [contents[part] for part in parts if part != "settings"] or [{} if parts else contents]
    sound = all(isinstance(contents[part], dict) for part in parts) and all(
        isinstance(key, str) and (isinstance(value, Tensor) or key in ("model", "ema", "settings"))
        for state in weights
        for key, value in state.items()
    )
    if not sound or ("settings" in parts and not isinstance(contents["settings"].get("classes", []), list)):
        raise UsageError(f"{source} is not a checkpoint: its parts are not named weights and settings")
    return contents


def is_url(source: str | Path) -> bool:
    return str(source).startswith(("http://", "https://"))


def published_url(name: str) -> str:
    """Where a network's ImageNet weights are: the DeiT authors', or the best of torchvision's."""
    if name in SIZES:
        return OFFICIAL[f"deit_{name}"]
    try:
        return torchvision.models.get_model_weights(name).DEFAULT.url
    except ValueError:
        raise UsageError(
            f"torchvision has no weights for {name}; train them (train.py --model {name}) or name a "
            "file or URL that has them"
        ) from None


def checkpoint_weights(contents: dict) -> dict[str, Tensor]:
    """The weights to use from a checkpoint: the moving average where there is one, else the model's."""
    return contents.get("ema") or contents.get("model") or contents


def checkpoint_settings(contents: dict) -> dict:
    """How the network in a checkpoint was made and trained; {} if the checkpoint does not tell.

    Ours hold their settings, to which `num_classes` is added. The weights of the authors' files, DeiT or
    teacher, tell enough: model, sizes, distillation, the number of classes; the class names are None.
    """
    if settings := contents.get("settings"):
        return settings | ({"num_classes": len(settings["classes"])} if "classes" in settings else {})
    state, known = checkpoint_weights(contents), {"data": "imagenet", "data_path": "data", "classes": None}
    dims = {name: getattr(value, "ndim", None) for name, value in state.items()}
    if {"stem.conv.weight": 4, "head.fc.weight": 2}.items() <= dims.items():
        names = {widths[-1]: name for name, (_, widths, _) in REGNETY.items()}
        num_classes, width = state["head.fc.weight"].shape
        known |= {"distill": "none"}
    elif {"pos_embed": 3, "patch_embed.proj.weight": 4, "head.weight": 2}.items() <= dims.items():
        names = {dim: name for name, (dim, _) in SIZES.items()}
        num_classes, width = state["head.weight"].shape
        patch_size = state["patch_embed.proj.weight"].shape[-1]
        img_size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size  # 1 or 2 more than a square
        known |= {"distill": "hard" if "dist_token" in state else "none"}
        known |= {"img_size": img_size, "patch_size": patch_size}
    else:
        return {}
    return known | {"model": names.get(width), "num_classes": num_classes, "no_distill_token": False}


# The paper's teacher file, regnety_160-a5fe301d.pth, names its modules otherwise: (its pattern,
# torchvision's).
PAPER_LAYOUT = (
    (r"^stem\.conv", "stem.0"),
    (r"^stem\.bn", "stem.1"),
    (r"^s(\d)\.b(\d+)", lambda m: f"trunk_output.block{m[1]}.block{m[1]}-{int(m[2]) - 1}"),
    (r"\.conv(\d)\.conv", lambda m: f".f.{'abc'[int(m[1]) - 1]}.0"),
    (r"\.conv(\d)\.bn", lambda m: f".f.{'abc'[int(m[1]) - 1]}.1"),
    (r"\.se\.", ".f.se."),
    (r"\.downsample\.conv", ".proj.0"),
    (r"\.downsample\.bn", ".proj.1"),
    (r"^head\.fc", "fc"),
)


def torchvision_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A RegNetY's weights with torchvision's names, whichever of the two layouts they come in."""

    def renamed(key: str) -> str:
        for pattern, ours in PAPER_LAYOUT:
            key = re.sub(pattern, ours, key)
        return key

    return {renamed(key): value for key, value in state.items()} if "stem.conv.weight" in state else state


def create_teacher(
    name: str, num_classes: int, weights: str | None = None, *, img_size: int = 224, patch_size: int = 16
) -> nn.Module:
    """A teacher, frozen and in evaluation mode: images float (B, 3, S, S), normalised -> logits.

    `name` is `regnet_y_4gf`, `_8gf`, `_12gf`, `_16gf` (Table 2) or `_200mf`, any torchvision classifier, or
    `tiny`, `small`, `base` (a DeiT; a distilled one returns its pair of logits). `weights` is None
    (untrained), "published" (torchvision's or the DeiT authors'), or a path or URL of a file with one of our
    checkpoints, a plain state dict or, for a RegNetY, one in the key layout of the paper's own teacher file.
    The teacher has `img_size`, the pixels a side that it was made for, and `classes`, their names or None:
    the file's own where it says them, else `img_size` and `patch_size` as given. Raises ValueError for
    misfits.
    """
    check_name(name)
    source = published_url(name) if weights == "published" else weights
    contents = read_checkpoint(source) if source else {}
    settings, state = checkpoint_settings(contents), checkpoint_weights(contents)
    if settings.get("model") not in (None, name):
        raise UsageError(f"{weights} holds a {settings['model']}, not a {name}")
    img_size, patch_size = settings.get("img_size", img_size), settings.get("patch_size", patch_size)
    if name in SIZES:
        distilled = "dist_token" in state
        teacher = create_model(
            name, num_classes=num_classes, img_size=img_size, patch_size=patch_size, distilled=distilled
        )
    else:
        teacher = create_convnet(name, num_classes, img_size)
        state = torchvision_layout(state)
    if source:
        check_fit(teacher.state_dict(), state, f"{weights} does not fit a {name} for {num_classes} classes")
        teacher.load_state_dict(state)
    teacher.img_size, teacher.classes = img_size, settings.get("classes")
    return teacher.eval().requires_grad_(False)


def teacher_logits(teacher: nn.Module, inputs: Tensor) -> Tensor:
    """What a teacher of `create_teacher` says of the student's inputs: logits (B, C), without gradient.

    The inputs are resized if the teacher was made for another size. A teacher with two heads speaks through
    their fusion: the softmax of what is returned is the fused prediction.
    """
    size = (teacher.img_size, teacher.img_size)
    if inputs.shape[2:] != size:
        inputs = F.interpolate(inputs, size, mode="bicubic", antialias=True)
    with torch.no_grad():
        outputs = teacher(inputs)
    if isinstance(outputs, Tensor):
        return outputs
    # log of the mean of the softmaxes, without the underflow of taking the mean first
    return torch.stack([z.float().log_softmax(dim=-1) for z in outputs]).logsumexp(dim=0) - math.log(2)
