"""Functions from tensors and logs to pictures: attention, curves, augmentations, disagreements.

python evaluate.py attention runs/shapes-tiny-hard/last.pth PHOTO.jpg --out attention.png
python evaluate.py curves runs/shapes-tiny-none runs/shapes-tiny-hard --out curves.png
python evaluate.py augmentations --out augmentations.png
"""

from collections.abc import Callable, Iterable

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

import augment
from augment import OPERATIONS, RANDAUGMENT_ARGUMENTS, keyed_generator, normalize
from data import crop_file
from launch import UserError, printable
from model import DeiT

Row = tuple[str, list[Image.Image], list[str]]  # a title, images, and a caption for each


def sheet(rows: list[Row], side: int) -> Image.Image:
    """A picture of rows of images `side` pixels wide."""
    titles = [row[0].split("\n") for row in rows]
    # Room for the titles on the left, and for the captions below
    left = max(80, 8 + 6 * max(len(line) for title in titles for line in title))
    captions = [caption.split("\n") for row in rows for caption in row[2]]
    step = side + 14 * max(map(len, titles + captions))
    page = Image.new("RGB", (left + max(len(row[1]) for row in rows) * (side + 4), len(rows) * step), "white")
    draw = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str) -> None:
        draw.text((x, y), text.encode("latin-1", "replace").decode("latin-1"), fill="black")

    for row, (title, images, captions) in enumerate(rows):
        write(4, row * step + side, title)
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x = left + column * (side + 4)
            page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, row * step))
            write(x, row * step + side, caption)
    return page


def save_picture(save: Callable[[str], None], path: str) -> None:
    """Calls save(path) and tells so."""
    try:
        save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"could not write the picture {path}: {error}") from error
    print(printable(f"wrote {path}"))


def to_pictures(images: Tensor) -> list[Image.Image]:
    """uint8 (n, 3, H, W) as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


# ---- Attention ----


@torch.no_grad()
def attention_maps(network: DeiT, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """How each prefix token's attention is spread over the patches: in a layer (from 1), and rolled out.

    Images float (B, 3, S, S), normalized. Returns the maps of that layer's heads (B, P, heads, G, G) and the
    rollout of the layers up to it (B, P, G, G), each of sum 1. Attention rollout (Abnar & Zuidema, 2020): the
    product of the layers' mean attention, each mixed half and half with the identity for the residual path.
    """
    weights, prefix = network.attention_weights(images)[:layer], network.num_prefix_tokens
    rollout = identity = torch.eye(weights[0].shape[-1], device=images.device)
    for each in weights:
        rollout = (each.mean(dim=1) + identity) / 2 @ rollout
    side = network.img_size // network.patch_embed.proj.kernel_size[0]

    def maps(rows: Tensor) -> Tensor:
        rows = rows[..., :prefix, prefix:]
        return (rows / rows.sum(dim=-1, keepdim=True)).unflatten(-1, (side, side))

    return maps(weights[-1]).transpose(1, 2), maps(rollout)


def overlay(picture: Image.Image, share: Tensor) -> Image.Image:
    """A map (G, G) in color over the picture in gray: dark blue is 0, yellow the largest value."""
    gray = Image.fromarray((255 * share / share.max()).round().byte().cpu().numpy())
    gray = gray.resize(picture.size, Image.Resampling.BILINEAR)
    heat = ImageOps.colorize(gray, (20, 11, 82), (253, 231, 37), mid=(204, 71, 120))
    return Image.blend(ImageOps.autocontrast(ImageOps.grayscale(picture)).convert("RGB"), heat, 0.55)


def attention_rows(network: DeiT, image: Image.Image, layer: int, heads: tuple, side: int) -> list[Row]:
    """A row for each token (`heads` are their names): the input, a map for each head, and the rollout."""
    size, device = network.img_size, network.pos_embed.device
    crop = crop_file(image, size, None)
    # The same crop, shown more finely than a network for small images sees it; whole images stay whole.
    whole = image.size in ((size, size), (side, side))
    (picture,) = to_pictures((crop if whole else crop_file(image, side, None))[None])
    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
    maps, rollout = attention_maps(network, normalize(crop[None].to(device)), layer)
    rows = []
    for token, own, rolled in zip(heads, maps[0], rollout[0], strict=False):
        named = {f"head {number}": share for number, share in enumerate(own, start=1)} | {"rollout": rolled}
        captions = [f"{title}, up to {100 * share.max():.0f} %" for title, share in named.items()]
        images = [picture, *(overlay(picture, share) for share in named.values())]
        rows.append((f"{token}\ntoken", images, ["input", *captions]))
    return rows


# ---- Curves ----

# Okabe and Ito's colors, which the color-blind can tell apart, without their yellow
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(logs: dict[str, list[dict]], heads: tuple, path: str) -> None:
    """The training loss and each head's accuracy in validation, by epoch, of several runs' logs by name."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = dict(zip(heads, ("-", "--", ":"), strict=True))
    marker = "o" if max(map(len, logs.values())) < 20 else ""
    for number, (name, log) in enumerate(logs.items()):
        look = dict(color=COLORS[number % len(COLORS)], marker=marker, markersize=3)
        epochs, label = [record["epoch"] for record in log], printable(name).replace("$", r"\$")
        left.plot(epochs, [record["loss"] for record in log], label=label, **look)
        for head in log[0]["accuracy"]:
            right.plot(epochs, [record["accuracy"][head] for record in log], ls=styles[head], **look)
    shown = [head for head in heads if any(head in log[0]["accuracy"] for log in logs.values())]
    left.set(xlabel="epoch", title="training loss")
    right.set(xlabel="epoch", title="top-1 accuracy in validation (%)")
    left.legend()
    right.legend(handles=[Line2D([], [], color="gray", ls=styles[head], label=head) for head in shown])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    save_picture(lambda out: figure.savefig(out, dpi=110), path)


# ---- Augmentations ----

MAGNITUDES = (1, 3, 5, 7, 9, 10)
SIX = ("Rotate", "ShearX", "Posterize", "Solarize", "Color", "Equalize")


def augmentation_rows(
    images: Tensor, labels: Tensor, classes: list[str], seed: int, names: Iterable[str]
) -> list[Row]:
    """Some of RandAugment's operations by magnitude on the last image, and whole batches with their targets.

    `images` uint8 (n, 3, S, S), `labels` int64 (n,).
    """
    rows, count = [], len(MAGNITUDES)
    m = torch.tensor(MAGNITUDES, dtype=torch.float64) / 10
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(count)[:count]
    for name in names:
        values = RANDAUGMENT_ARGUMENTS[name](m, sign).float()
        told = ["" if name in ("AutoContrast", "Equalize", "Invert") else f"{v:.3g}" for v in values.tolist()]
        captions = [f"magnitude {magnitude}\n{t}" for magnitude, t in zip(MAGNITUDES, told, strict=True)]
        changed = OPERATIONS[name](images[-1:].expand(count, -1, -1, -1), values)
        rows.append((name, to_pictures(changed), captions))

    batch = torch.arange(count) % len(images)
    for name, alphas in (("Mixup", {"mixup": 0.8, "cutmix": 0.0}), ("CutMix", {"mixup": 0.0, "cutmix": 1.0})):
        generator = keyed_generator("sheet", seed, name)
        cropped = augment.random_crop(images[batch], images.shape[3], generator)
        whole_path = augment.Augment(len(classes), smoothing=0.0, **alphas)
        inputs, targets = whole_path(cropped, labels[batch], generator)
        mean, std = torch.tensor([augment.MEAN, augment.STD]).view(2, 3, 1, 1)
        pixels = 255 * (inputs * std + mean)
        captions = []
        for target in targets.tolist():
            shares = [f"{100 * share:.0f}% {classes[n]}" for n, share in enumerate(target) if share > 0]
            captions.append("\n".join(shares))
        rows.append((f"whole path,\n{name}", to_pictures(pixels.round().clamp(0, 255).byte()), captions))
    return rows


# ---- Disagreements ----


def disagreement_rows(
    found: list[Image.Image], decisions: Tensor, rows: list[str], names: list[str]
) -> list[Row]:
    """Images, and below each the class that every classifier says: `decisions` int (len(rows), n).

    `rows` and `names` are the classifiers' and the classes' names.
    """
    captions = []
    for column in decisions.T.tolist():
        captions.append("\n".join(f"{number} {names[label]}" for number, label in enumerate(column)))
    return [("\n".join(f"{number} {row}" for number, row in enumerate(rows)), found, captions)]
