"""What one measures or looks at after training; a word for each.

python evaluate.py accuracy runs/shapes-tiny-hard/last.pth
python evaluate.py augmentations --out augmentations.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from augment import MEAN, OPERATIONS, RANDAUGMENT_ARGUMENTS, STD, Augment, keyed_generator, random_crop
from data import DATA_NAMES, draw_shapes, load_data, read_image, to_tensor
from distill import create_teacher, read_checkpoint
from model import UsageError
from train import PAPER, Parser, evaluate, headline, join, program, say

# ---- accuracy: Tables 3 and 5 ----


def accuracy(arguments: argparse.Namespace) -> None:
    """Top-1 of every head of every checkpoint, on one validation set."""
    place = join(arguments.device)
    for path in arguments.checkpoints:
        contents = read_checkpoint(path)
        if "settings" not in contents:
            raise UsageError(f"{path} says nothing of how it was trained; it is not a checkpoint of train.py")
        settings = contents["settings"] | {"workers": -1, "device": arguments.device}
        settings |= {
            name: getattr(arguments, name) for name in ("data", "data_path") if getattr(arguments, name)
        }
        classes = settings["classes"]
        network = create_teacher(settings["model"], len(classes), path).to(place.device)
        val_set = load_data(settings["data"], settings["data_path"], settings["img_size"], place.device)[1]
        if val_set.classes != classes:
            raise UsageError(f"{path} knows other classes than those of {settings['data']}")
        say(place, f"{path}: {headline(evaluate(network, val_set, settings, place))}")


# ---- augmentations: the contact sheet ----

MAGNITUDES = (1, 3, 5, 7, 9, 10)
SIDE = 96  # pixels of a picture on the sheet


def picture(image: Tensor) -> Image.Image:
    """uint8 (3, H, W) as a picture of the sheet's size."""
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def augmentations(arguments: argparse.Namespace) -> None:
    """A labelled sheet: every operation of RandAugment at several magnitudes, then whole batches with their
    targets."""
    if arguments.images:
        sources = [read_image(path).resize((224, 224), Image.Resampling.BICUBIC) for path in arguments.images]
        images, names = (
            torch.stack([to_tensor(image) for image in sources]),
            [Path(p).stem for p in arguments.images],
        )
    else:
        drawn = draw_shapes("val", 10, 64, torch.device("cpu"))
        images, names = drawn.images, drawn.classes
    first, margin, text = images[:1], 100, 14
    mixed = [("Mixup", {"mixup": 0.8, "cutmix": 0.0}), ("CutMix", {"mixup": 0.0, "cutmix": 1.0})]
    sheet = Image.new(
        "RGB", (margin + len(MAGNITUDES) * SIDE, text + len(OPERATIONS) * SIDE + 2 * (SIDE + text)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, magnitude in enumerate(MAGNITUDES):
        draw.text((margin + column * SIDE + 4, 1), f"magnitude {magnitude}", fill="black")
    for row, (name, operation) in enumerate(OPERATIONS.items()):
        top = text + row * SIDE
        draw.text((4, top + SIDE // 2), name, fill="black")
        for column, magnitude in enumerate(MAGNITUDES):
            sign = torch.tensor([1.0 if column % 2 else -1.0], dtype=torch.float64)
            argument = RANDAUGMENT_ARGUMENTS[name](torch.tensor([magnitude / 10], dtype=torch.float64), sign)
            sheet.paste(picture(operation(first, argument.float())[0]), (margin + column * SIDE, top))
    for row, (name, alphas) in enumerate(mixed):
        top = text + len(OPERATIONS) * SIDE + row * (SIDE + text)
        draw.text((4, top + SIDE // 2), f"whole path,\n{name}", fill="black")
        generator = keyed_generator("sheet", arguments.seed, name)
        batch = torch.arange(len(MAGNITUDES)) % len(images)
        cropped = random_crop(images[batch], images.shape[3], generator)
        inputs, targets = Augment(len(images), smoothing=0.0, **alphas)(cropped, batch, generator)
        shown = inputs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        for column, (image, target) in enumerate(
            zip((shown * 255).clamp(0, 255).byte(), targets, strict=True)
        ):
            sheet.paste(picture(image), (margin + column * SIDE, top))
            parts = [
                f"{100 * share:.0f}% {names[label]}"
                for label, share in enumerate(target.tolist())
                if share > 0.005
            ]
            draw.text((margin + column * SIDE + 2, top + SIDE), " ".join(parts), fill="black", font_size=9)
    sheet.save(arguments.out)
    print(f"wrote {arguments.out}")


# ---- The program ----


def main() -> None:
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")

    word = words.add_parser(
        "accuracy", help="top-1 accuracy of each head", description=accuracy.__doc__, allow_abbrev=False
    )
    word.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of train.py or finetune.py")
    word.add_argument("--data", choices=DATA_NAMES, help="data set [the one each was trained on]")
    word.add_argument("--data-path", metavar="DIR", help="where it is [where it was in training]")
    word.add_argument(
        "--device", choices=("auto", "cuda", "mps", "cpu"), default=PAPER["device"], help="[auto]"
    )
    word.set_defaults(act=accuracy)

    word = words.add_parser(
        "augmentations",
        help="a picture of every augmentation",
        description=augmentations.__doc__,
        allow_abbrev=False,
    )
    word.add_argument(
        "images", nargs="*", metavar="IMAGE", help="image files, one class each [ten drawn shapes]"
    )
    word.add_argument("--out", metavar="PNG", default="augmentations.png", help="[augmentations.png]")
    word.add_argument("--seed", type=int, default=0, help="of the whole batches [0]")
    word.set_defaults(act=augmentations)

    arguments = parser.parse_args()
    arguments.act(arguments)


if __name__ == "__main__":
    program(main)
