"""Functions from tensors and logs to pictures: attention, curves, augmentations, disagreements.

python evaluate.py augmentations --out augmentations.png
"""

from collections.abc import Callable

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import augment
from distill import Teacher
from image_files import crop_file
from launch import UserError, printable
from model import DeiT

Row = tuple[str, list[Image.Image], list[str]]  # a title, images, and a caption for each


def save_picture(save: Callable, path: str, **options) -> None:
    """Calls save(path, **options) and says so; raises UserError if the picture could not be written."""
    try:
        save(path, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"could not write the picture {path}: {error}") from error
    print(printable(f"wrote {path}"))


def draw_sheet(rows: list[Row], side: int, path: str) -> None:
    """Writes rows of images, `side` pixels wide, with titles and captions; lines with × in front are red."""
    font, line_height = ImageFont.load_default(13), 17
    left = 12 + round(max(font.getlength(line) for title, _, _ in rows for line in title.split("\n")))
    texts = [text for title, _, captions in rows for text in (title, *captions)]
    step = side + 8 + line_height * max(text.count("\n") + 1 for text in texts)
    width = left + (side + 6) * max(len(images) for _, images, _ in rows)
    page = Image.new("RGB", (width, step * len(rows)), "white")
    draw = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str) -> None:
        for n, line in enumerate(text.split("\n")):
            color = "#c02020" if line[:1] == "×" else "black"
            draw.text((x, y + n * line_height), line.replace("×", "x"), color, font)

    for row, (title, images, captions) in enumerate(rows):
        write(4, row * step + side, title)
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x = left + column * (side + 6)
            page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x, row * step))
            write(x, row * step + side, caption)
    save_picture(page.save, path, optimize=True)


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
    for layer_weights in weights:  # (B, heads, N, N)
        rollout = (layer_weights.mean(dim=1) + identity) / 2 @ rollout
    side = network.img_size // network.patch_embed.proj.kernel_size[0]

    def maps(rows: Tensor) -> Tensor:
        rows = rows[..., :prefix, prefix:]
        return (rows / rows.sum(dim=-1, keepdim=True)).unflatten(-1, (side, side))

    return maps(weights[-1]).transpose(1, 2), maps(rollout)


def overlay(picture: Image.Image, attention: Tensor) -> Image.Image:
    """A map (G, G) in color over the picture in gray: dark blue is 0, yellow the largest value."""
    gray = Image.fromarray((255 * attention / attention.max()).round().byte().cpu().numpy())
    gray = gray.resize(picture.size, Image.Resampling.BILINEAR)
    heat = ImageOps.colorize(gray, (20, 11, 82), (253, 231, 37), mid=(204, 71, 120))
    return Image.blend(ImageOps.autocontrast(ImageOps.grayscale(picture)).convert("RGB"), heat, 0.55)


def attention_rows(network: DeiT, image: Image.Image, layer: int, tokens: tuple, side: int) -> list[Row]:
    """A row for each token, named in `tokens`: the input, a map of each attention head, and the rollout."""
    crop = crop_file(image, network.img_size, None)[None]  # what the network sees is shown, at any size
    picture = to_pictures(crop)[0].resize((side, side), Image.Resampling.BICUBIC)
    maps, rollout = attention_maps(network, augment.normalize(crop.to(network.pos_embed.device)), layer)
    rows = []
    for token, head_maps, rolled_out in zip(tokens, maps[0], rollout[0], strict=False):
        named = {f"head {n}": one for n, one in enumerate(head_maps, start=1)} | {"rollout": rolled_out}
        captions = [f"{name}, up to {100 * attention.max():.0f} %" for name, attention in named.items()]
        images = [overlay(picture, attention) for attention in named.values()]
        rows.append((f"{token}\ntoken", [picture, *images], ["input", *captions]))
    return rows


# ---- Curves ----

# Okabe and Ito's colors, which the color-blind can tell apart, without their yellow
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_curves(logs: dict[str, list[dict]], path: str) -> None:
    """Writes a picture of each head's accuracy in validation, by epoch, of runs' logs by name."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UserError("curves needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    heads = dict.fromkeys(head for log in logs.values() for head in log[0]["accuracy"])
    styles = dict(zip(heads, ("-", "--", ":"), strict=False))
    marker, runs = "o" if max(map(len, logs.values())) < 20 else "", []
    for number, (name, log) in enumerate(logs.items()):
        options = dict(color=COLORS[number % len(COLORS)], marker=marker, markersize=3)
        epochs, label = [record["epoch"] for record in log], printable(name).replace("$", r"\$")
        for head in log[0]["accuracy"]:
            axes.plot(epochs, [record["accuracy"][head] for record in log], ls=styles[head], **options)
        runs.append(Line2D([], [], label=label, **options))
    runs += [Line2D([], [], color="gray", ls=styles[head], label=head) for head in heads]
    axes.legend(handles=runs)
    axes.set(xlabel="epoch", ylabel="top-1 accuracy in validation (%)")
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    save_picture(figure.savefig, path, dpi=110)


# ---- Augmentations ----

MAGNITUDES = (1, 3, 5, 7, 9, 10)
SIX_OPERATIONS = ("Rotate", "ShearX", "Posterize", "Solarize", "Color", "Equalize")
NO_ARGUMENT = ("AutoContrast", "Equalize", "Invert")
UNITS = {"Rotate": "°", "Posterize": " bits"}


def operation_rows(image: Tensor, every: bool) -> list[Row]:
    """Six of RandAugment's operations, or every one, by magnitude, on an image uint8 (3, S, S)."""
    m = torch.tensor(MAGNITUDES, dtype=torch.float64) / 10
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(len(m) // 2)
    rows = []
    for name in augment.OPERATIONS if every else SIX_OPERATIONS:
        arguments = augment.RANDAUGMENT_ARGUMENTS[name](m, sign).float()
        texts = ["" if name in NO_ARGUMENT else f"{x:.3g}{UNITS.get(name, '')}" for x in arguments.tolist()]
        texts = ["0 bits: black" if text == "0 bits" else text for text in texts]
        captions = [f"magnitude {n}\n{text}" for n, text in zip(MAGNITUDES, texts, strict=True)]
        changed = augment.OPERATIONS[name](image.expand(len(m), -1, -1, -1), arguments)
        rows.append((name, to_pictures(changed), captions))
    return rows


def batch_rows(
    images: Tensor, labels: Tensor, classes: list[str], seed: int, teacher: Teacher | None = None
) -> list[Row]:
    """Images uint8 (n, 3, S, S), labels int64 (n,) as training augments them.

    Beneath stand the label in the file, the target and, with a teacher, its label.
    """
    rows, batch = [], torch.arange(len(MAGNITUDES)) % len(images)
    mean, std = torch.tensor([augment.MEAN, augment.STD]).view(2, 3, 1, 1)
    for name, mixup, cutmix in (("Mixup", 0.8, 0.0), ("CutMix", 0.0, 1.0)):
        generator = augment.keyed_generator("sheet", seed, name)
        cropped = augment.random_crop(images[batch], images.shape[3], generator)
        whole_path = augment.Augment(len(classes), mixup=mixup, cutmix=cutmix, smoothing=0.0)
        inputs, targets = whole_path(cropped, labels[batch], generator)
        pixels = (255 * (inputs * std + mean)).round().clamp(0, 255).byte()
        captions = []
        for label, target in zip(labels[batch].tolist(), targets.tolist(), strict=True):
            shares = [f"{100 * share:.0f} % {classes[n]}" for n, share in enumerate(target) if share > 0]
            captions.append("\n".join([classes[label], *(shares + [""])[:2]]))
        title = f"{name}\nlabel in the file\ntarget"
        if teacher:
            title += "\n\nteacher's label"
            taught = teacher.logits(inputs, ()).argmax(dim=1).tolist()
            captions = [f"{caption}\n{classes[n]}" for caption, n in zip(captions, taught, strict=True)]
        rows.append((title, to_pictures(pixels), [f"\n{caption}" for caption in captions]))
    return rows


# ---- Disagreements ----


def disagreement_row(images: Tensor, decisions: Tensor, classifiers: list[str], classes: list[str]) -> Row:
    """Images uint8 (n, 3, S, S), captioned with the classifiers' decisions int (classifiers, n).

    The first is the truth; × marks what differs from it.
    """
    captions = []
    for truth, *others in decisions.T.tolist():
        marked = [("× " if label != truth else "") + classes[label] for label in (truth, *others)]
        captions.append("\n".join(marked))
    return "\n".join(classifiers), to_pictures(images), captions
