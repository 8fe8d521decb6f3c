"""Distillation: the losses of equations 2 and 3, and the teachers (section 4, Tables 2 and 3).

The student's `outputs` are one tensor of logits (no distillation token: both terms of the loss act on the
class logits, "usual distillation") or the pair (class logits, distillation logits): the true label then
teaches the class token and the teacher teaches the distillation token.

    torchrun train.py --model tiny --distill hard

The losses come first and are a third of it; the rest makes and loads networks that teach.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet

import checkpoint
from launch import UserError, did_you_mean, user_errors
from model import SIZES, check_fit, create_model, upcast

Outputs = Tensor | tuple[Tensor, Tensor]


def soft_distillation_loss(
    outputs: Outputs, targets: Tensor, teacher_logits: Tensor, tau: float = 3.0, lam: float = 0.1
) -> Tensor:
    """Equation 2: (1 - λ) CE(ψ(Zs), y) + λ τ² KL(ψ(Zs/τ), ψ(Zt/τ)), the mean over the batch.

    `outputs` (B, C) or a pair of them; `targets` are class probabilities float (B, C), smoothed by the
    caller, or labels int64 (B,); `teacher_logits` (B, C). KL is written as torch has it,
    student first: Σ teacher · log(teacher / student).
    """
    class_logits, dist_logits = split(outputs)
    student, teacher = (F.log_softmax(z / tau, dim=-1) for z in (dist_logits, upcast(teacher_logits)))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - lam) * F.cross_entropy(class_logits, targets) + lam * tau**2 * divergence


def hard_distillation_loss(outputs: Outputs, targets: Tensor, teacher_logits: Tensor) -> Tensor:
    """Equation 3: ½ CE(ψ(Zs), y) + ½ CE(ψ(Zs), y_t), y_t = argmax Zt, the mean over the batch.

    Arguments as in `soft_distillation_loss`. The teacher's label is never smoothed (section 4).
    """
    class_logits, dist_logits = split(outputs)
    teacher_labels = teacher_logits.argmax(dim=-1)
    return (F.cross_entropy(class_logits, targets) + F.cross_entropy(dist_logits, teacher_labels)) / 2


def label_loss(outputs: Outputs, targets: Tensor) -> Tensor:
    """Cross-entropy with the true label; of a pair the mean of both, the paper's control (section 5.2)."""
    class_logits, dist_logits = split(outputs)
    if isinstance(outputs, Tensor):
        return F.cross_entropy(class_logits, targets)
    return (F.cross_entropy(class_logits, targets) + F.cross_entropy(dist_logits, targets)) / 2


def split(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The logits that learn from the label and those that learn from the teacher, in float32 at least."""
    class_logits, dist_logits = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
    return upcast(class_logits), upcast(dist_logits)


class Loss(NamedTuple):
    """A choice of --distill."""

    function: Callable[..., Tensor]  # of (outputs, targets, teacher_logits or None, settings)
    teacher: bool  # it needs a teacher
    token: bool  # the student has a distillation token, unless --no-distill-token


LOSSES = {
    "none": Loss(lambda outputs, y, z, s: label_loss(outputs, y), False, False),
    "soft": Loss(lambda outputs, y, z, s: soft_distillation_loss(outputs, y, z, s.tau, s.lam), True, True),
    "hard": Loss(lambda outputs, y, z, s: hard_distillation_loss(outputs, y, z), True, True),
    "label": Loss(lambda outputs, y, z, s: label_loss(outputs, y), False, True),
}


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


def vgg8(num_classes: int) -> nn.Module:
    """A plain convnet for images of up to 64 pixels: seven 3×3 convolutions and a linear layer.

    It looks at them at full resolution first; a RegNetY's last stage sees one of 32 pixels as 2×2 points.
    """

    def conv(inputs: int, outputs: int, *pool: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, *pool, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    layers = conv(3, 32)
    for width in (32, 64, 128):
        layers += conv(width, 2 * width, nn.MaxPool2d(2)) + conv(2 * width, 2 * width)
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, num_classes))


LOW_RESOLUTION = 64  # pixels: up to here the first convolution of a convnet has stride 1


def check_name(name: str) -> None:
    """Raises UserError unless `name` is a network that can be trained or can teach."""
    names = (*SIZES, "vgg8", *REGNETY, *torchvision.models.list_models(torchvision.models))
    if name not in names:
        hint = did_you_mean(name, names)
        raise UserError(f"unknown network {name!r}; take {', '.join(SIZES)}, regnet_y_4gf, resnet18{hint}")


def create_convnet(name: str, num_classes: int, img_size: int) -> nn.Module:
    """A RegNetY, `vgg8` or any torchvision classifier with fresh weights.

    Most shrink an image 32 times; one of 32 pixels would become a single point. For images of up to 64 pixels
    the first convolution has stride 1 instead of 2, which changes no weight's shape.
    """
    if name == "vgg8":
        return vgg8(num_classes)
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
    if img_size <= LOW_RESOLUTION:
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        if first.stride != first.kernel_size:  # those of transformers cut patches
            first.stride = (1, 1)
    return network


def create_teacher(
    name: str, num_classes: int, weights: str | None = None, *, img_size: int = 224, patch_size: int = 16
) -> nn.Module:
    """A teacher, frozen and in evaluation mode: images float (B, 3, S, S), normalized -> logits.

    `name` is `regnet_y_4gf`, `_8gf`, `_12gf`, `_16gf` (Table 2) or `_200mf`, `vgg8`, any torchvision
    classifier, or `tiny`, `small`, `base` (a DeiT; a distilled one returns its pair of logits). `weights` is
    None (untrained), "published" (torchvision's or the DeiT authors'), or a path or URL of a file with one of
    our checkpoints, a plain state dict or, for regnet_y_16gf, one in the key layout of the paper's own
    teacher file. The teacher has `img_size`, the pixels a side that it was made for, and `classes`, their
    names or None: the file's own where it says them, else `img_size` and `patch_size` as given. Raises
    ValueError for misfits.
    """
    check_name(name)
    source = checkpoint.published_url(name) if weights == "published" else weights
    contents = checkpoint.read_checkpoint(source) if source else {}
    saved, state = checkpoint.checkpoint_settings(contents), checkpoint.checkpoint_weights(contents)
    if saved.get("model") not in (None, name):
        raise UserError(f"{weights} holds a {saved['model']}, not a {name}")
    img_size, patch_size = saved.get("img_size", img_size), saved.get("patch_size", patch_size)
    if name in SIZES:
        sizes = dict(num_classes=num_classes, img_size=img_size, patch_size=patch_size)
        more = dict(distilled="dist_token" in state, depth=checkpoint.num_blocks(state) or 12)
        with user_errors(), torch.device("meta" if source else "cpu"):  # no memory before it is seen to fit
            teacher = create_model(name, **sizes, **more)
    else:
        teacher = create_convnet(name, num_classes, img_size)
        state = checkpoint.torchvision_layout(state)
    if source:
        with user_errors():
            check_fit(
                teacher.state_dict(), state, f"{weights} does not fit a {name} for {num_classes} classes"
            )
        teacher.load_state_dict(state, assign=True)
        teacher.float()
    teacher.img_size, teacher.classes = img_size, saved.get("classes")
    return teacher.eval().requires_grad_(False)


def load_network(source: str) -> tuple[nn.Module, dict]:
    """A trained network, frozen and in evaluation mode, and the settings that it was trained with.

    `source` is a checkpoint of ours or the authors' (a file, a URL, a short name), or the name of a
    torchvision classifier, with its published weights. The network has `img_size`, `num_classes` and
    `classes`, their names or None. Raises UserError for anything else.
    """
    if source in (*REGNETY, *torchvision.models.list_models(torchvision.models)):
        saved, weights = checkpoint.published_settings(source), "published"
    else:
        saved, weights = checkpoint.checkpoint_settings(checkpoint.read_checkpoint(source)), source
    if not saved.get("model") or "num_classes" not in saved:
        raise UserError(f"{source} does not say what it is; name a checkpoint of train.py or an official one")
    sizes = {name: saved[name] for name in ("img_size", "patch_size") if name in saved}
    network = create_teacher(saved["model"], saved["num_classes"], weights, **sizes)
    network.num_classes = saved["num_classes"]
    return network, saved


@torch.no_grad()
def predict(teacher: nn.Module, inputs: Tensor, key: tuple = ()) -> Tensor:
    """What a teacher of `create_teacher` says of the student's inputs: logits (B, C), without gradient.

    The inputs are resized if the teacher was made for another size. A teacher with two heads speaks through
    their fusion: the softmax of what is returned is the fused prediction. With --remember-labels the teacher
    is the file of its labels (labels.py), which finds those of these inputs by their key in the run.
    """
    if not isinstance(teacher, nn.Module):
        return teacher.predict(inputs, key)
    size = (teacher.img_size, teacher.img_size)
    if inputs.shape[2:] != size:
        inputs = F.interpolate(inputs, size, mode="bicubic", antialias=True)
    outputs = teacher(inputs)
    if isinstance(outputs, Tensor):
        return outputs
    # log of the mean of the softmaxes, without the underflow of taking the mean first
    return torch.stack([z.float().log_softmax(dim=-1) for z in outputs]).logsumexp(dim=0) - math.log(2)
