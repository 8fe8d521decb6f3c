"""What happens to a batch of images before the model sees it (section 6, Tables 7 and 9).

    random_crop -> Augment: flip -> RandAugment | AutoAugment | colour jitter
                            -> normalise -> erasing -> Mixup | CutMix

Everything works on whole batches, on the device the batch is on: images are grouped by operation, and each
operation is a short function of (images, one argument an image) that does to the pixels what Pillow does.
Random choices are drawn on the CPU from the generator passed in, so that the same generator gives the same
pixels on every device and no step ever waits for the GPU. `RepeatedAugmentSampler` decides which images make
up an epoch.

    python evaluate.py augmentations --out augmentations.png      draws every operation below
"""

import hashlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Sampler

MEAN, STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, used for every data set as in the paper
SMALL_IMAGE = 64  # pixels: up to this side, images kept at their own size are padded and cropped
FILL = (124, 116, 104)  # the mean as a colour: what geometric operations show beyond the border


def keyed_generator(*key) -> Generator:
    """A CPU generator whose state depends on `key` (numbers and strings) alone: (seed, step, rank), say.

    A run that is stopped and resumed asks for the same keys and so draws the same numbers.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def to_device(choices: Tensor, images: Tensor) -> Tensor:
    """Moves what was drawn on the CPU to where the images are, without waiting for it."""
    return choices.to(images.device, non_blocking=True)


def choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where for uint8, in arithmetic: 12 ms on a CPU where torch 2.15 takes 54.

    python -m timeit -s "import torch; x = torch.randint(256, (64, 3, 224, 224)).byte(); c = x > 128"
        "torch.where(c, 255 - x, x)" or "c * (255 - x) + ~c * x", with OMP_NUM_THREADS=1
    """
    return condition * yes + ~condition * no


# ---- Operations: (images uint8 (n, 3, H, W), argument float (n,)) -> uint8 (n, 3, H, W) ----


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend: factor 0 gives `degenerate`, 1 the images, above 1 goes beyond them."""
    degenerate = degenerate.float()
    return (
        (degenerate + factor.float().view(-1, 1, 1, 1) * (images - degenerate)).clamp_(0, 255).to(torch.uint8)
    )


def grey(images: Tensor) -> Tensor:
    """Luma (n, 1, H, W) int32 in 0..255, in Pillow's fixed-point arithmetic."""
    red, green, blue = images.int().unbind(1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768 >> 16).unsqueeze(1)


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replaces each value by its entry in a table (n, 3, 256) of its own image and channel."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def auto_contrast(images: Tensor, argument: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a channel of one value stays as it is."""
    low, high = images.flatten(2).aminmax(dim=2, keepdim=True)
    # float64 because Pillow's truncation to whole levels depends on the last bit; mps has none
    number = torch.float32 if images.device.type == "mps" else torch.float64
    low, high = low.to(number), high.to(number)
    values = torch.arange(256, device=images.device, dtype=number)
    scale = torch.full_like(low, 255.0) / (high - low)  # `255.0 / tensor` would round twice
    stretched = (values * scale + -low * scale).clamp(0, 255)
    return look_up(images, torch.where(high > low, stretched, values))


def equalize(images: Tensor, argument: Tensor) -> Tensor:
    """Makes each channel's histogram as flat as whole levels allow."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, values, torch.ones((), dtype=torch.int32, device=images.device).expand_as(values))
    last = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - last).div(255, rounding_mode="floor")
    before = counts.cumsum(2, dtype=torch.int32) - counts
    flat = (
        (step.div(2, rounding_mode="floor") + before)
        .div(step.clamp(min=1), rounding_mode="floor")
        .clamp(max=255)
    )
    return look_up(images, torch.where(step > 0, flat, torch.arange(256, device=images.device)))


def invert(images: Tensor, argument: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keeps the `bits` highest bits of each value; 0 bits is a black image, 8 changes nothing."""
    return images & (256 - 2 ** (8 - bits.int())).to(torch.uint8).view(-1, 1, 1, 1)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Inverts the values at or above the threshold (0..256)."""
    return choose(images >= threshold.int().view(-1, 1, 1, 1), 255 - images, images)


def solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    """Adds to the values below 128, up to 255."""
    addend = addend.to(torch.uint8).view(-1, 1, 1, 1)
    return images + torch.minimum(addend, 255 - images) * (images < 128)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Saturation: factor 0 is grey."""
    return blend(grey(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Factor 0 is the image's mean luma everywhere, rounded to a whole level."""
    pixels = images[0, 0].numel()
    mean = (2 * grey(images).sum(dim=(2, 3), keepdim=True) + pixels).div(2 * pixels, rounding_mode="floor")
    return blend(mean, images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Factor 0 is black."""
    return blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Factor 0 is the image smoothed by (1 1 1; 1 5 1; 1 1 1)/13, its outermost pixels left as they are."""
    smooth = images.float()
    if min(images.shape[2:]) > 2:
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        centre = smooth[:, :, 1:-1, 1:-1]
        centre.copy_((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * centre).div_(13).round_())
    return blend(smooth, images, factor)


def cubic_taps(offset: Tensor, a: float = -1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the four neighbours at -1, 0, 1, 2 for a point `offset` (0..1) to the right of neighbour 0.

    Keys' cubic kernel (1981), whose four weights sum to 1, in factored form. Pillow's Image.transform has
    a = -1, where its resize has a = -0.5 and torch a = -0.75.
    """
    rest = 1 - offset
    outer = a * offset * rest
    first, fourth = outer * rest, outer * offset
    second = rest * (1 + offset * (1 - (a + 2) * offset))
    return first, second, 1 - first - second - fourth, fourth


def fill_outside(sampled: Tensor, inside: Tensor) -> Tensor:
    """Whole levels where the source point lies in the image, the fill colour elsewhere."""
    fill = torch.tensor(FILL, dtype=torch.uint8).to(sampled.device, non_blocking=True).view(1, 3, 1, 1)
    # Four float32 weights may sum to a hair less than 1; cut to whole levels, flat areas would darken by one.
    return choose(inside, (sampled + 1e-3).clamp_(0, 255).to(torch.uint8), fill)


def shift_rows(images: Tensor, shift: Tensor) -> Tensor:
    """Pixel x of row y becomes the one at x + shift[y], interpolated; shift float (n, H) or (n, 1)."""
    height, width = images.shape[2:]
    whole = shift.floor()
    taps = cubic_taps((shift - whole)[:, None, :, None])
    columns = torch.arange(-1, width + 2, device=images.device) + whole.long()[..., None]  # (n, H, W + 3)
    columns = columns.clamp_(0, width - 1)[:, None].expand(len(images), 3, height, width + 3)
    source = images.gather(3, columns).float()
    sampled = taps[0] * source[..., :width]
    for k in (1, 2, 3):
        sampled.addcmul_(taps[k], source[..., k : k + width])
    centres = torch.arange(width, device=images.device) + 0.5 + shift[..., None]
    return fill_outside(sampled, ((centres >= 0) & (centres < width))[:, None])


def shear_x(images: Tensor, shear: Tensor) -> Tensor:
    """Shifts each row by `shear` times its distance from the top."""
    rows = torch.arange(images.shape[2], device=images.device) + 0.5
    return shift_rows(images, shear.float()[:, None] * rows)


def shear_y(images: Tensor, shear: Tensor) -> Tensor:
    return shear_x(images.transpose(2, 3), shear).transpose(2, 3)


def translate_x(images: Tensor, share: Tensor) -> Tensor:
    """Moves the content left by `share` of the width."""
    return shift_rows(images, (share.float() * images.shape[3])[:, None])


def translate_y(images: Tensor, share: Tensor) -> Tensor:
    return translate_x(images.transpose(2, 3), share).transpose(2, 3)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turns the content counter-clockwise about the centre, by bicubic interpolation."""
    height, width = images.shape[2:]
    angle = torch.deg2rad(degrees.float()).view(-1, 1, 1)
    x = torch.arange(width, device=images.device) + 0.5 - width / 2  # pixel centres, from the image's centre
    y = (torch.arange(height, device=images.device) + 0.5 - height / 2)[:, None]
    source_x = angle.cos() * x - angle.sin() * y + width / 2  # (n, H, W)
    source_y = angle.sin() * x + angle.cos() * y + height / 2
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    left, top = (source_x - 0.5).floor(), (source_y - 0.5).floor()
    taps_x = torch.stack(cubic_taps(source_x - 0.5 - left))
    taps_y = torch.stack(cubic_taps(source_y - 0.5 - top))
    weights = (taps_y[:, None] * taps_x).flatten(0, 1)  # (16, n, H, W)
    padded = F.pad(images.float(), [2] * 4, mode="replicate").flatten(2)
    row, column = top.long().clamp_(-1, height - 1) + 1, left.long().clamp_(-1, width - 1) + 1
    first = (row * (width + 4) + column).flatten(1)  # in `padded`: the first of 4x4 neighbours
    four = torch.arange(4, device=images.device)
    neighbours = first + ((width + 4) * four[:, None] + four).view(16, 1, 1)  # (16, n, H * W)
    sampled = torch.zeros(images.shape, device=images.device)
    for weight, neighbour in zip(weights, neighbours, strict=True):
        values = padded.gather(2, neighbour[:, None].expand(-1, 3, -1))
        sampled.addcmul_(weight[:, None], values.view_as(images))
    return fill_outside(sampled, inside[:, None])


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": auto_contrast, "Equalize": equalize, "Invert": invert, "Rotate": rotate,
    "Posterize": posterize, "Solarize": solarize, "SolarizeAdd": solarize_add, "Color": color,
    "Contrast": contrast, "Brightness": brightness, "Sharpness": sharpness, "ShearX": shear_x,
    "ShearY": shear_y, "TranslateX": translate_x, "TranslateY": translate_y,
}  # fmt: skip


def apply_operations(images: Tensor, choice: Tensor, argument: Tensor) -> Tensor:
    """Applies to image i the operation number choice[i] of OPERATIONS with argument[i]; choice -1 leaves it
    alone.

    `choice` int64 (B,) and `argument` float (B,) are on the CPU, the images anywhere.
    """
    order = choice.argsort()
    # One selection puts the images of each operation side by side, another puts them back.
    counts = torch.bincount(choice + 1, minlength=len(OPERATIONS) + 1).tolist()
    grouped = images.index_select(0, to_device(order, images))
    argument = to_device(argument[order], images)
    end = counts[0]
    for operation, count in zip(OPERATIONS.values(), counts[1:], strict=True):
        start, end = end, end + count
        if count:
            grouped[start:end] = operation(grouped[start:end], argument[start:end])
    return grouped.index_select(0, to_device(order.argsort(), images))


# ---- Policies: which operation, how strong ----


def signed(m: Tensor, sign: Tensor) -> Tensor:
    return torch.clamp(1 + 0.9 * m * sign, min=0.1)


# RandAugment's argument of each operation, from magnitude m = M/10 (0..1) and a sign (±1), both float64 (n,)
RANDAUGMENT_ARGUMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda m, sign: m,  # these three have no argument
    "Equalize": lambda m, sign: m,
    "Invert": lambda m, sign: m,
    "Rotate": lambda m, sign: 30 * m * sign,
    "Posterize": lambda m, sign: 4 - (4 * m).floor(),
    "Solarize": lambda m, sign: 256 - (256 * m).floor(),
    "SolarizeAdd": lambda m, sign: (110 * m).floor(),
    "Color": signed, "Contrast": signed, "Brightness": signed, "Sharpness": signed,
    "ShearX": lambda m, sign: 0.3 * m * sign,
    "ShearY": lambda m, sign: 0.3 * m * sign,
    "TranslateX": lambda m, sign: 0.45 * m * sign,
    "TranslateY": lambda m, sign: 0.45 * m * sign,
}  # fmt: skip
AUTOAUGMENT_ARGUMENTS = RANDAUGMENT_ARGUMENTS | {
    "Posterize": lambda m, sign: 4 + (4 * m).floor(),
    "Solarize": lambda m, sign: (256 * m).floor(),
    "Color": lambda m, sign: 0.1 + 1.8 * m,
    "Contrast": lambda m, sign: 0.1 + 1.8 * m,
    "Sharpness": lambda m, sign: 0.1 + 1.8 * m,
}
NAMES = list(OPERATIONS)


def arguments(table: dict, choice: Tensor, m: Tensor, generator: Generator) -> Tensor:
    """The argument (B,) of each image's operation; draws the signs, a fair coin each."""
    sign = torch.randint(2, choice.shape, generator=generator).double() * 2 - 1
    every = torch.stack([table[name](m, sign) for name in NAMES])  # (15, B): all, then the one that counts
    return every.gather(0, choice[None])[0].float()


class RandAugment:
    """RandAugment (Cubuk et al., 2020) as the paper used it: uint8 (B, 3, H, W) in and out.

    `num_ops` draws an image, uniform over OPERATIONS, each applied with probability 0.5 at a magnitude drawn
    from N(magnitude, magnitude_std) and clipped to 0..10.
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 9, magnitude_std: float = 0.5):
        self.num_ops, self.magnitude, self.magnitude_std = num_ops, magnitude, magnitude_std

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        for _ in range(self.num_ops):
            choice = torch.randint(len(NAMES), (len(images),), generator=generator)
            noise = torch.randn(len(images), generator=generator, dtype=torch.float64)
            m = (self.magnitude + self.magnitude_std * noise).clamp(0, 10) / 10
            argument = arguments(RANDAUGMENT_ARGUMENTS, choice, m, generator)
            applied = torch.rand(len(images), generator=generator) < 0.5
            images = apply_operations(images, torch.where(applied, choice, -1), argument)
        return images


# The 25 sub-policies found on ImageNet (Cubuk et al., 2019, Table 9): two of (operation, probability, level
# 0..10)
AUTOAUGMENT_POLICY = [
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)), (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)), (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)), (("Equalize", 0.4, 4), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 7)), (("Posterize", 0.8, 5), ("Equalize", 1.0, 2)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)), (("Equalize", 0.6, 8), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)), (("Rotate", 0.4, 9), ("Equalize", 0.6, 2)),
    (("Equalize", 0.0, 7), ("Equalize", 0.8, 8)), (("Invert", 0.6, 4), ("Equalize", 1.0, 8)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)), (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)), (("Sharpness", 0.4, 7), ("Invert", 0.6, 8)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 9)), (("Color", 0.4, 0), ("Equalize", 0.6, 3)),
    (("Equalize", 0.4, 7), ("Solarize", 0.2, 4)), (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 5)),
    (("Invert", 0.6, 4), ("Equalize", 1.0, 8)), (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 8), ("Equalize", 0.6, 3)),
]  # fmt: skip


class AutoAugment:
    """AutoAugment's ImageNet policy (Cubuk et al., 2019): uint8 (B, 3, H, W) in and out.

    Each image gets one of the 25 sub-policies, all equally likely.
    """

    def __init__(self):
        self.choice = torch.tensor(
            [[NAMES.index(name) for name, _, _ in pair] for pair in AUTOAUGMENT_POLICY]
        )
        self.probability = torch.tensor([[p for _, p, _ in pair] for pair in AUTOAUGMENT_POLICY])
        self.level = torch.tensor(
            [[v for _, _, v in pair] for pair in AUTOAUGMENT_POLICY], dtype=torch.float64
        )

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        policy = torch.randint(len(AUTOAUGMENT_POLICY), (len(images),), generator=generator)
        for k in (0, 1):
            choice = self.choice[policy, k]
            argument = arguments(AUTOAUGMENT_ARGUMENTS, choice, self.level[policy, k] / 10, generator)
            applied = torch.rand(len(images), generator=generator) < self.probability[policy, k]
            images = apply_operations(images, torch.where(applied, choice, -1), argument)
        return images


class ColorJitter:
    """What takes a policy's place when there is none: brightness, contrast and saturation in a random order.

    Each is multiplied by a factor uniform in 1 ± strength. uint8 (B, 3, H, W) in and out.
    """

    def __init__(self, strength: float = 0.3):
        self.strength = strength

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        three = torch.tensor([NAMES.index(name) for name in ("Brightness", "Contrast", "Color")])
        order = three[torch.rand(len(images), 3, generator=generator).argsort(dim=1)]
        for k in range(3):
            factor = 1 + self.strength * (2 * torch.rand(len(images), generator=generator) - 1)
            images = apply_operations(images, order[:, k], factor)
        return images


# ---- Crops and flips ----


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirrors each image left to right with probability 0.5."""
    flipped = to_device(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images)
    return choose(flipped, images.flip(3), images)


def pad_and_crop(images: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """Pads with black and cuts the old size out again at a random place."""
    height, width = images.shape[2:]
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, len(images)), generator=generator)
    every = torch.arange(len(images), device=images.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (B, 3, tops, lefts, H, W)
    return windows[every, :, to_device(top, images), to_device(left, images)]


def random_boxes(
    count: int,
    height: int,
    width: int,
    generator: Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Boxes (top, left, height, width) int64 (count, 4) of random area (share of the image) and aspect (w/h).

    The first of 10 draws that fits into the image, else the largest centred box of an allowed aspect.
    """
    sides = torch.tensor([height, width])
    area = height * width * torch.empty(count, 10).uniform_(*scale, generator=generator)
    aspect = torch.empty(count, 10).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator)
    boxes = (area[..., None] * torch.stack([-aspect, aspect], dim=2).exp()).sqrt().round()  # (count, 10, 2)
    fits = ((boxes >= 1) & (boxes <= sides)).all(dim=2)
    boxes = boxes[torch.arange(count), fits.int().argmax(dim=1)]
    place = (torch.rand(2, count, generator=generator).T * (sides - boxes + 1)).floor()
    largest = torch.tensor([round(min(height, width / ratio[0])), round(min(width, height * ratio[1]))])
    centred = torch.cat([(sides - largest) // 2, largest])
    found = fits.any(dim=1, keepdim=True)
    return torch.where(found, torch.cat([place, boxes], dim=1), centred).long()


def resize_columns(images: Tensor, start: Tensor, length: Tensor, size: int) -> Tensor:
    """Bicubically resizes a stretch of each column of image i to `size` pixels: float (B, 3, size, W).

    `start` and `length`, float (B,) on the CPU, give the stretch in pixels of float images (B, 3, H, W). As
    in Pillow's resize, shrinking widens the kernel, and pixels beyond the stretch count for nothing.
    """
    count, channels, height, width = images.shape
    taps = math.ceil(4 * max(1.0, length.max().item() / size)) + 1
    start, length = (to_device(values, images)[:, None, None] for values in (start, length))
    scale = length / size
    reach = scale.clamp(min=1)
    centres = start + (torch.arange(size, device=images.device)[:, None] + 0.5) * scale
    rows = (centres - 2 * reach).floor() + torch.arange(taps, device=images.device)  # (B, size, taps)
    distance = ((rows + 0.5 - centres) / reach).abs()
    far, near, _, _ = cubic_taps(torch.where(distance < 1, distance, distance - 1).clamp(max=1), a=-0.5)
    weights = torch.where(distance < 1, near, far) * ((rows >= start) & (rows < start + length))
    weights = weights / weights.sum(dim=2, keepdim=True)
    # Each row of the result is a weighted sum of `taps` rows of the image: a bag of embeddings.
    planes = torch.arange(count * channels, device=images.device).view(count, channels, 1, 1)
    rows = (rows.clamp(0, height - 1).long()[:, None] + planes * height).view(-1, taps)
    weights = weights[:, None].expand(-1, channels, -1, -1).reshape(-1, taps)
    lines = images.reshape(-1, width)
    resized = F.embedding_bag(rows, lines, per_sample_weights=weights, mode="sum")
    return resized.view(count, channels, size, width)


def resize_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cuts box i = (top, left, height, width) out of image i and resizes it: uint8 (B, 3, size, size).

    `boxes` (B, 4) are on the CPU.
    """
    if images.device.type == "cpu" and len(images) > 16:
        # A few at a time stay in a CPU's cache.
        parts = zip(images.split(16), boxes.split(16), strict=True)
        return torch.cat([resize_boxes(some, theirs, size) for some, theirs in parts])
    top, left, high, wide = boxes.float().T
    rows = resize_columns(images.transpose(2, 3).float(), left, wide, size).round_().clamp_(0, 255)
    resized = resize_columns(
        rows.transpose(2, 3), top, high, size
    )  # from whole levels, as Pillow's second pass
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def random_crop(images: Tensor, size: int, generator: Generator) -> Tensor:
    """Training crop uint8 (B, 3, size, size): random resized crop; small images of that size are padded."""
    height, width = images.shape[2:]
    if height == width == size <= SMALL_IMAGE:
        return pad_and_crop(images, generator)
    return resize_boxes(images, random_boxes(len(images), height, width, generator), size)


def shown_size(*sides: int, size: int) -> list[int]:
    """The sides to resize to before the evaluation crop: the short one to size / 0.875, rounded down.

    So do the authors: 438 pixels at 384.
    """
    short = int(size / 0.875)
    return [short * side // min(sides) for side in sides]


def central_crop(images: Tensor, size: int) -> Tensor:
    """Evaluation crop uint8 (B, 3, size, size): short side to size / 0.875, then the centre.

    Images of their own size stay as they are.
    """
    height, width = images.shape[2:]
    if (height, width) == (size, size):
        return images
    sides = shown_size(height, width, size=size)
    resized = F.interpolate(images.float(), sides, mode="bicubic", antialias=True)
    top, left = (round((side - size) / 2) for side in sides)
    return resized[:, :, top : top + size, left : left + size].round().clamp_(0, 255).to(torch.uint8)


# ---- After the pixels are numbers: normalise, erase, mix ----


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 with ImageNet's mean 0 and standard deviation 1 in each channel."""
    mean, std = (
        torch.tensor(v).mul(255).view(1, 3, 1, 1).to(images.device, non_blocking=True) for v in (MEAN, STD)
    )
    return images.float().sub_(mean).div_(std)


def hashed_normal(seed: int, count: int, device: torch.device) -> Tensor:
    """`count` draws of N(0, 1), float32, the same on every device: draw i is made from a hash of seed + i."""
    x = (
        torch.arange(count, device=device) + seed
    )  # seed < 2³²; two rounds of multiply and xor-shift mix 32 bits
    for multiplier in (0x7FEB352D, 0x846CA68B):
        x = ((x ^ (x >> 16)) * multiplier) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) >> 9  # 23 bits: with the half between them they still fit float32, never reaching ±1
    return torch.erfinv((x.float() + 0.5) / 2**22 - 1) * math.sqrt(2)


class RandomErasing:
    """Random erasing (Zhong et al., 2020) of normalised images: float (B, 3, H, W) in and out.

    With the given probability, one box of 2 % to 33 % of the area and log-uniform aspect 0.3 to 3.3 is filled
    with N(0, 1), a draw of its own for every pixel and channel; an image in which none of 10 boxes fits is
    left alone.
    """

    def __init__(self, probability: float = 0.25):
        self.probability = probability

    def __call__(self, inputs: Tensor, generator: Generator) -> Tensor:
        return self.erase_(inputs.clone(), generator)

    def erase_(self, inputs: Tensor, generator: Generator) -> Tensor:
        """The same in place."""
        count, _, height, width = inputs.shape
        area = height * width * torch.empty(count, 10).uniform_(0.02, 0.33, generator=generator)
        aspect = torch.empty(count, 10).uniform_(math.log(0.3), math.log(3.3), generator=generator).exp()
        high, wide = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = (high >= 1) & (high < height) & (wide >= 1) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)
        chosen = (torch.rand(count, generator=generator) < self.probability) & fits.any(dim=1)
        place = torch.rand(2, count, generator=generator)
        seed = torch.randint(2**32, (), generator=generator).item()
        image = chosen.nonzero()[:, 0]
        if not len(image):
            return inputs
        high, wide = high.gather(1, first)[image, 0], wide.gather(1, first)[image, 0]
        top = (place[0, image] * (height - high + 1)).long()
        left = (place[1, image] * (width - wide + 1)).long()
        # Name every erased pixel: its box, then its row and column in that box. The total is known here on
        # the CPU.
        sizes = high * wide
        starts, total = sizes.cumsum(0) - sizes, int(sizes.sum())
        table = to_device(torch.stack([image, top, left, wide, starts, sizes]), inputs)
        box = torch.repeat_interleave(table[5], output_size=total)
        image, top, left, wide, starts = table[:5, box]
        offset = torch.arange(total, device=inputs.device) - starts
        row, column = top + offset.div(wide, rounding_mode="floor"), left + offset % wide
        noise = hashed_normal(seed, 3 * total, inputs.device).view(total, 3).to(inputs.dtype)
        inputs[image, :, row, column] = noise
        return inputs


class Mixup:
    """Mixup (Zhang et al., 2018), CutMix (Yun et al., 2019) and label smoothing, one decision a batch.

    `mixup_alpha` and `cutmix_alpha` are the Beta distribution's parameter, 0 switches one off; with both on,
    a fair coin picks. Called with inputs float (B, 3, H, W) and labels int64 (B,), it returns the mixed
    inputs and targets float32 (B, C) that sum to 1. Image i is mixed with image B-1-i.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int, smoothing: float):
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.num_classes, self.smoothing = num_classes, smoothing

    def one_hot(self, labels: Tensor) -> Tensor:
        """Smoothed targets (B, C): ε/C everywhere and 1 - ε more at the label."""
        off = self.smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), off, device=labels.device)
        return targets.scatter_(1, labels[:, None], 1 - self.smoothing + off)

    def __call__(self, inputs: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        targets = self.one_hot(labels)
        coin = torch.rand((), generator=generator).item() < 0.5
        cut = self.cutmix_alpha > 0 and (coin or self.mixup_alpha == 0)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        if alpha == 0:
            return inputs, targets
        seed = torch.randint(2**62, (), generator=generator).item()
        lam = float(np.random.default_rng(seed).beta(alpha, alpha))  # torch's Beta takes no generator
        if cut:
            top, bottom, left, right = self.box(lam, *inputs.shape[2:], generator)
            mixed = inputs.clone()
            mixed[:, :, top:bottom, left:right] = inputs.flip(0)[:, :, top:bottom, left:right]
            lam = 1 - (bottom - top) * (right - left) / (
                inputs.shape[2] * inputs.shape[3]
            )  # what the border left
        else:
            mixed = torch.lerp(inputs.flip(0), inputs, lam)
        return mixed, torch.lerp(targets.flip(0), targets, lam)

    @staticmethod
    def box(lam: float, height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
        """CutMix's box (top, bottom, left, right): sides √(1-λ) of the image's, centre uniform, clipped."""
        high, wide = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
        y, x = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
        return (
            max(0, y - high // 2),
            min(height, y + high // 2),
            max(0, x - wide // 2),
            min(width, x + wide // 2),
        )


POLICIES = {"randaugment": RandAugment, "autoaugment": AutoAugment, "none": ColorJitter}


class Augment:
    """The whole path of a training batch: uint8 (B, 3, S, S) and labels int64 (B,) to inputs and targets.

    `policy` is `randaugment`, `autoaugment`, `none` (colour jitter in their place) or `off` (no flip either).
    Returns inputs float32 (B, 3, S, S), normalised, and targets float32 (B, C).
    """

    def __init__(
        self,
        num_classes: int,
        policy: str = "randaugment",
        erasing: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        smoothing: float = 0.1,
    ):
        self.policy = None if policy == "off" else POLICIES[policy]()
        self.erase = RandomErasing(erasing)
        self.mix = Mixup(mixup, cutmix, num_classes, smoothing)

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        if self.policy is not None:
            images = self.policy(random_flip(images, generator), generator)
        inputs = self.erase.erase_(normalize(images), generator)
        return self.mix(inputs, labels, generator)


class RepeatedAugmentSampler(Sampler[int]):
    """Repeated augmentation (Hoffer et al., 2020; Table 7): each image several times in a row, in a shuffled
    list.

    The list is dealt to the replicas in turn, so that one image's repeats meet in one step. An epoch keeps
    about `dataset_size` samples of it, that is 1/num_repeats of the images: each rank (N // 256 · 256) / W of
    them, or N / W where N < 256, rounded down. On one process it is the same. With num_repeats = 1 it is a
    plain shuffle of all images, N / W for each rank.
    """

    def __init__(self, dataset_size: int, num_replicas: int, rank: int, num_repeats: int = 3, seed: int = 0):
        if dataset_size < 1 or num_repeats < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"no sampler of {dataset_size} images, {num_repeats} repeats, rank {rank} of {num_replicas}"
            )
        self.dataset_size, self.num_replicas, self.rank = dataset_size, num_replicas, rank
        self.num_repeats, self.seed, self.epoch = num_repeats, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the shuffle; without it every epoch is epoch 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        kept = self.dataset_size // 256 * 256 if self.num_repeats > 1 else 0
        return (kept or self.dataset_size) // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.dataset_size, generator=keyed_generator(self.seed, "sampler", self.epoch))
        order = order.repeat_interleave(self.num_repeats)
        return iter(order[self.rank :: self.num_replicas][: len(self)].tolist())
