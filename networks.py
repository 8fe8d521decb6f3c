"""Networks that teach, and any trained network by name or file. A first reading can skip this file.

`create_convnet` makes `vgg8`, a RegNetY or one of torchvision's, with fresh weights. `create_teacher` makes a
frozen network, with weights from a file or published ones. `load_network` finds any trained network: ours,
the authors' checkpoints, torchvision's.
"""

import math
import os
from functools import cache

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet

from augment import MEAN
from checkpoint import OFFICIAL, checkpoint_weights, published_url, read_checkpoint, torchvision_layout
from launch import UserError, did_you_mean, print0, user_errors, world_size
from model import SIZES, check_fit, create_model
from settings import Settings

# ---- Convnets ----

# RegNetY (Radosavovic et al., 2020): blocks and widths of the four stages, group width. Table 2 has the last
# four; the first is for pictures on small machines. 8GF is as torchvision has it, so that its published
# weights fit: its first stage is 224 wide, not 168.
REGNETY = {
    "regnet_y_200mf": ((1, 1, 4, 7), (24, 56, 152, 368), 8),
    "regnet_y_4gf": ((2, 6, 12, 2), (128, 192, 512, 1088), 64),
    "regnet_y_8gf": ((2, 4, 10, 1), (224, 448, 896, 2016), 56),
    "regnet_y_12gf": ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
    "regnet_y_16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
}
CONVNETS = ("vgg8", *REGNETY, *torchvision.models.list_models(torchvision.models))


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


def check_name(name: str) -> None:
    """Raises UserError unless `name` is a network that can be trained or can teach."""
    if name not in (*SIZES, *CONVNETS):
        hint = did_you_mean(name, (*SIZES, *CONVNETS))
        raise UserError(f"unknown network {name!r}; take {', '.join(SIZES)}, regnet_y_4gf, resnet18{hint}")


def create_convnet(name: str, num_classes: int, img_size: int) -> nn.Module:
    """A RegNetY, `vgg8` or any torchvision classifier with fresh weights.

    Most shrink an image 32 times; one of 32 pixels would become a single point. For images of up to 64 pixels
    the first convolution has stride 1 instead of 2, which changes no weight's shape.
    """
    if name == "vgg8":
        network = vgg8(num_classes)
    elif name in REGNETY:
        depths, widths, group_width = REGNETY[name]
        params = BlockParams(depths, widths, [group_width] * 4, [1.0] * 4, strides=[2] * 4, se_ratio=0.25)
        network = RegNet(params, num_classes)
    else:
        check_name(name)
        options = {"image_size": img_size} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):  # no auxiliary heads: one network, one output
            options = {"aux_logits": False, "init_weights": True}
        network = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if img_size <= 64:
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        if first.stride != first.kernel_size:  # those of transformers cut patches
            first.stride = (1, 1)
    return network.to(memory_format=torch.channels_last)  # as torch recommends for convolutions


# ---- Trained networks ----

IMAGENET_RUN = {"data": "imagenet", "data_path": "data", "classes": None}  # no names: ImageNet's own order


def published_settings(name: str) -> dict:
    """How torchvision's published ImageNet weights of a network are to be used."""
    url = published_url(name)
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms.keywords
    if transform.get("mean", MEAN) != MEAN:
        raise UserError(f"the weights in {url} were trained on images that were normalized differently")
    return IMAGENET_RUN | {"num_classes": 1000, "model": name, "img_size": transform["crop_size"]}


def is_imagenet(classes: list[str] | None, num_classes: int) -> bool:
    """Whether classes are ImageNet's 1000, which files know as nothing or as `n01440764` and so on."""
    first_and_last = ["n01440764", "n15075141"]
    return num_classes == 1000 and (not classes or sorted(classes)[::999] == first_and_last)


def check_classes(source: str, names: list[str] | None, classes: list[str]) -> None:
    """Raises UserError unless a network's classes, None where its file has no names, are a data set's.

    A nameless file of 1000 classes knows ImageNet's, in their one order.
    """
    if names is None and len(classes) == 1000 and not is_imagenet(classes, 1000):
        raise UserError(f"{source} knows ImageNet's 1000 classes; the data set has others: {classes[0]!r}")
    for n, (there, here) in enumerate(zip(names or classes, classes, strict=False)):
        if there != here:
            text = f"{source} was trained on other classes than the student's: class {n} is"
            raise UserError(f"{text} {there!r} there and {here!r} here")


def num_blocks(state: dict[str, Tensor]) -> int:
    """How many transformer blocks there are in weights."""
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def official_settings(state: dict[str, Tensor]) -> dict:
    """What the weights of a DeiT or of the authors' RegNetY tell of it; {} if they are another network's."""
    if {"stem.conv.weight", "head.fc.weight"} <= state.keys():
        num_classes, width = state["head.fc.weight"].shape
        name = {3024: "regnet_y_16gf"}.get(width)
        return IMAGENET_RUN | {"model": name, "num_classes": num_classes, "distill": "none"}
    if not {"pos_embed", "patch_embed.proj.weight", "head.weight"} <= state.keys():
        return {}
    num_classes, width = state["head.weight"].shape
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    img_size = math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size  # 1 or 2 tokens more than a square
    model = {dim: name for name, (dim, _) in SIZES.items()}.get(width)
    sizes = {"model": model, "num_classes": num_classes, "img_size": img_size, "patch_size": patch_size}
    distill = {"distill": "hard" if "dist_token" in state else "none", "no_distill_token": False}
    return IMAGENET_RUN | sizes | distill | {"depth": num_blocks(state)}


def checkpoint_settings(contents: dict) -> dict:
    """How the network in a checkpoint was made and trained, and `num_classes`; {} if it does not tell."""
    if settings := contents.get("settings"):
        return settings | ({"num_classes": len(settings["classes"])} if settings.get("classes") else {})
    return official_settings(checkpoint_weights(contents))


def assemble(saved: dict, contents: dict, source: str) -> nn.Module:
    """A network of the settings `saved` with the weights of a checkpoint, called `source` in messages.

    It is frozen and in evaluation mode; without contents it is untrained. It has `num_classes`, `img_size`,
    the pixels a side that it was made for, and `classes`, their names or None.
    """
    name, num_classes, state = saved["model"], saved["num_classes"], checkpoint_weights(contents)
    if name in SIZES:
        sizes = {size: saved[size] for size in ("num_classes", "img_size", "patch_size")}
        sizes |= {"distilled": "dist_token" in state, "depth": num_blocks(state) or 12}
        with user_errors(), torch.device("meta" if contents else "cpu"):  # no memory before it is seen to fit
            network = create_model(name, **sizes)
    else:
        network, state = create_convnet(name, num_classes, saved["img_size"]), torchvision_layout(state)
    if contents:
        with user_errors():
            misfit = f"{source} does not fit a {name} for {num_classes} classes"
            check_fit(network.state_dict(), state, misfit)
        if not all(value.isfinite().all() for value in state.values()):
            raise UserError(f"{source} holds weights that are infinite or NaN")
        network.load_state_dict(state, assign=True)
        network.float()
    if name not in SIZES:
        network = network.to(memory_format=torch.channels_last)  # a file may have another layout
    network.num_classes, network.img_size, network.classes = num_classes, saved["img_size"], saved["classes"]
    return network.eval().requires_grad_(False)


def create_teacher(
    name: str, num_classes: int, weights: str | None = None, *, img_size: int = 224, patch_size: int = 16
) -> nn.Module:
    """A teacher, frozen and in evaluation mode: images float (B, 3, S, S), normalized -> logits.

    `name` is `regnet_y_4gf`, `_8gf`, `_12gf`, `_16gf` (Table 2) or `_200mf`, `vgg8`, any torchvision
    classifier, or `tiny`, `small`, `base` (a DeiT; a distilled one returns its pair of logits). `weights` is
    None (untrained), "published" (torchvision's or the DeiT authors'), or a path or URL of a file with one of
    our checkpoints, a plain state dict or, for regnet_y_16gf, one in the key layout of the paper's own
    teacher file. The two sizes count where the file does not tell them. Raises ValueError for misfits.
    """
    source = published_url(name) if weights == "published" else weights
    contents = read_checkpoint(source) if weights else {}
    saved = {"img_size": img_size, "patch_size": patch_size, "classes": None} | checkpoint_settings(contents)
    if weights in ("published", *CONVNETS) and name in CONVNETS:
        saved |= published_settings(name if weights == "published" else weights)
    if saved.get("model") not in (name, None):
        raise UserError(f"{weights} holds a {saved['model']}, not a {name}")
    return assemble(saved | {"model": name, "num_classes": num_classes}, contents, weights)


say_once = cache(print0)  # a program may load a file twice


def load_network(source: str) -> tuple[nn.Module, dict]:
    """A trained network, frozen and in evaluation mode, and the settings that it was trained with.

    `source` is a run's folder, a checkpoint of ours or the authors' (a file, a URL, a short name), or the
    name of a torchvision classifier, with its published weights. The network has `img_size`, `num_classes`
    and `classes`, their names or None. Raises UserError for anything else.
    """
    published = source in CONVNETS
    contents = read_checkpoint(published_url(source) if published else source)
    saved = published_settings(source) if published else checkpoint_settings(contents)
    if not saved.get("model") or "num_classes" not in saved:
        raise UserError(f"{source} does not say what it is; docs/elsewhere.md has what such a file lacks")
    saved = {"img_size": 224, "patch_size": 16} | saved
    network = assemble(saved, contents, source)
    if not published and "settings" not in contents:
        text = f"{source} is read as a {saved['model']} of {network.num_classes} classes"
        say_once(f"{text}, {network.img_size} pixels, normalized as the authors' networks are")
    return network, saved


def check_sizes(name: str, s: Settings, micro_batch_size: int) -> None:
    """Raises UserError unless there is such a network and it can be trained at these sizes."""
    check_name(name)
    if name in SIZES and (grid := s.img_size // s.patch_size) > 256:
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
            batch = f"batches of {micro_batch_size} images of {s.img_size} pixels"
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name} cannot learn from {batch}: {reason}") from error


def check_networks(s: Settings) -> None:
    """Raises UserError for a network, or a teacher's weights, that a run could not use, before it begins."""
    source = s.teacher_weights
    names = ("", "published", *OFFICIAL, *CONVNETS)
    if source in ("published", s.teacher) and s.needs_teacher and s.teacher not in SIZES:
        published_settings(s.teacher)
    elif source not in names and "://" not in source and not os.path.exists(source):
        raise UserError(f"there is no file {source}; --teacher-weights takes a path, a URL or a name")
    for name in (s.model, s.teacher) if s.needs_teacher else (s.model,):
        check_sizes(name, s, s.batch_size // (world_size() * s.accumulate))
