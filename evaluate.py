"""What one measures or looks at after training; a word for each.

python evaluate.py accuracy runs/shapes-tiny-hard/last.pth
python evaluate.py tokens runs/shapes-tiny-hard/last.pth
python evaluate.py augmentations --out augmentations.png
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from augment import (
    MEAN,
    OPERATIONS,
    RANDAUGMENT_ARGUMENTS,
    STD,
    Augment,
    keyed_generator,
    normalize,
    random_crop,
)
from data import DATA_NAMES, ArraySet, FolderSet, draw_shapes, eval_batches, load_data, read_image, to_tensor
from distill import create_teacher, read_checkpoint
from model import DeiT, UsageError
from train import DEVICES, Parser, Place, evaluate, headline, join, program, say

# ---- accuracy: Tables 3 and 5 ----


def open_checkpoint(
    path: str, arguments: argparse.Namespace, place: Place
) -> tuple[nn.Module, ArraySet | FolderSet, dict]:
    """A checkpoint's network, frozen, with the validation set to look at it on and its settings."""
    contents = read_checkpoint(path)
    if "settings" not in contents:
        raise UsageError(f"{path} says nothing of how it was trained; it is not a checkpoint of train.py")
    settings = contents["settings"] | {"workers": -1}
    settings |= {name: getattr(arguments, name) for name in ("data", "data_path") if getattr(arguments, name)}
    network = create_teacher(settings["model"], len(settings["classes"]), path).to(place.device)
    val_set = load_data(
        settings["data"], settings["data_path"], settings["img_size"], place.device, ("val",)
    )[0]
    if val_set.classes != network.classes:
        raise UsageError(f"{path} knows other classes than those of {settings['data']}")
    return network, val_set, settings


def accuracy(arguments: argparse.Namespace) -> None:
    """Top-1 accuracy of every head of every checkpoint, on one validation set."""
    place = join(arguments.device)
    for path in arguments.checkpoints:
        network, val_set, settings = open_checkpoint(path, arguments, place)
        say(place, f"{path}: {headline(evaluate(network, val_set, settings, place))}")


# ---- tokens: the analysis of the two tokens in section 5.2 ----


@torch.no_grad()
def layer_embeddings(network: DeiT, images: Tensor) -> Tensor:
    """The class and distillation embeddings after every block: (depth, B, 2, D)."""
    x, layers = network.embed(images), []
    for block in network.blocks:
        x = block(x)
        layers.append(x[:, :2])
    return torch.stack(layers)


def tokens(arguments: argparse.Namespace) -> None:
    """Cosine between the two token parameters, and between their embeddings after every layer."""
    place = join(arguments.device)
    for path in arguments.checkpoints:
        network, val_set, settings = open_checkpoint(path, arguments, place)
        if not getattr(network, "distilled", False):
            raise UsageError(f"{path} has no distillation token to compare with its class token")
        parameters = F.cosine_similarity(network.cls_token, network.dist_token, dim=-1).item()
        sums, size = 0.0, settings["img_size"]
        for images, _ in eval_batches(val_set, size, 256, rank=0, world=1, workers=0, device=place.device):
            first, second = layer_embeddings(network, normalize(images)).unbind(2)
            sums = sums + F.cosine_similarity(first, second, dim=-1).sum(dim=1)
        print(f"{path}: the two parameters {parameters:.3f}; after each layer")
        print("  " + " ".join(f"{cosine:.3f}" for cosine in (sums / len(val_set)).tolist()))


# ---- augmentations: the contact sheet ----

MAGNITUDES = (1, 3, 5, 7, 9, 10)
SIDE, MARGIN, TEXT = 72, 80, 26  # pixels: of a picture, of the titles on the left, of the captions below


def sheet(rows: list[tuple[str, Tensor, list[str]]]) -> Image.Image:
    """A picture of rows of images: each row has a title, images uint8 (n, 3, H, W) and a caption for each."""
    step = SIDE + TEXT
    page = Image.new(
        "RGB", (MARGIN + max(len(images) for _, images, _ in rows) * (SIDE + 4), len(rows) * step), "white"
    )
    draw = ImageDraw.Draw(page)
    for row, (title, images, captions) in enumerate(rows):
        draw.text((4, row * step + SIDE // 2), title, fill="black")
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            left = MARGIN + column * (SIDE + 4)
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (left, row * step))
            draw.text((left, row * step + SIDE), caption, fill="black", font_size=9)
    return page


def augmentations(arguments: argparse.Namespace) -> None:
    """A labelled sheet: RandAugment's operations by magnitude, and whole batches with their targets."""
    if arguments.images:
        size = (224, 224)
        images = [
            to_tensor(read_image(path).resize(size, Image.Resampling.BICUBIC)) for path in arguments.images
        ]
        folders = [Path(path).absolute().parent.name for path in arguments.images]
        images, classes = torch.stack(images), sorted(set(folders))
        labels = torch.tensor([classes.index(folder) for folder in folders])
    else:
        drawn = draw_shapes("val", 10, 64, torch.device("cpu"))
        images, labels, classes = drawn.images, drawn.labels, drawn.classes

    rows, count = [], len(MAGNITUDES)
    m = torch.tensor(MAGNITUDES, dtype=torch.float64) / 10
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(count)[:count]
    for name, operation in OPERATIONS.items():
        values = RANDAUGMENT_ARGUMENTS[name](m, sign).float()
        captions = [f"magnitude {magnitude}" for magnitude in MAGNITUDES]
        if name not in ("AutoContrast", "Equalize", "Invert"):
            captions = [
                f"{caption}\n{value:.3g}" for caption, value in zip(captions, values.tolist(), strict=True)
            ]
        rows.append((name, operation(images[-1:].expand(count, -1, -1, -1), values), captions))

    batch = torch.arange(count) % len(images)
    for name, alphas in (("Mixup", {"mixup": 0.8, "cutmix": 0.0}), ("CutMix", {"mixup": 0.0, "cutmix": 1.0})):
        generator = keyed_generator("sheet", arguments.seed, name)
        cropped = random_crop(images[batch], images.shape[3], generator)
        augment = Augment(len(classes), smoothing=0.0, **alphas)
        inputs, targets = augment(cropped, labels[batch], generator)
        shown = 255 * (inputs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
        shares = [
            [(share, label) for label, share in enumerate(target) if share > 0] for target in targets.tolist()
        ]
        captions = [
            "\n".join(f"{100 * share:.0f}% {classes[label]}" for share, label in parts) for parts in shares
        ]
        rows.append((f"whole path,\n{name}", shown.round().clamp(0, 255).byte(), captions))
    try:
        sheet(rows).save(arguments.out, optimize=True)
    except (OSError, ValueError) as error:
        raise UsageError(f"could not write the picture {arguments.out}: {error}") from error
    print(f"wrote {arguments.out}")


# ---- The program ----


def main() -> None:
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")

    for act, text in ((accuracy, "top-1 accuracy of each head"), (tokens, "how alike the two tokens are")):
        word = words.add_parser(act.__name__, help=text, description=act.__doc__, allow_abbrev=False)
        word.add_argument(
            "checkpoints", nargs="+", metavar="CKPT", help="checkpoints of train.py or finetune.py"
        )
        word.add_argument("--data", choices=DATA_NAMES, help="data set [the one each was trained on]")
        word.add_argument("--data-path", metavar="DIR", help="where it is [where it was in training]")
        word.add_argument("--device", choices=DEVICES, default="auto", help="[auto]")
        word.set_defaults(act=act)

    word = words.add_parser(
        "augmentations",
        help="a picture of every augmentation",
        description=augmentations.__doc__,
        allow_abbrev=False,
    )
    word.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files; their folders name their classes [ten drawn shapes]",
    )
    word.add_argument("--out", metavar="PNG", default="augmentations.png", help="[augmentations.png]")
    word.add_argument("--seed", type=int, default=0, help="of the whole batches [0]")
    word.set_defaults(act=augmentations)

    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    program(main)
