"""What happens to a batch of images before the model sees it (section 6, Tables 7 and 9).

    random_crop -> Augment: flip -> RandAugment | AutoAugment | color jitter
                            -> normalize -> erasing -> Mixup | CutMix

The file follows that path; `Augment` near its end is the whole of it. Everything works on whole batches, on
the batch's device, image by image what Pillow does. Random choices are drawn on the CPU from the generator
passed in, so that they are the same on every device and no step waits for the GPU.

    python evaluate.py augmentations --all --out augmentations.png      draws every operation below
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Generator, Tensor
from torch.utils.data import Sampler

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, used for every data set as in the paper
STD = (0.229, 0.224, 0.225)
LEVELS = tuple(map(float, range(256)))  # all values that a pixel can have
FILL = (124.0, 116.0, 104.0)  # the mean as a color: what geometric operations show beyond the border
SMALL_IMAGE = 32  # pixels: up to this side, images kept at their own size are padded and cropped


def keyed_generator(*key) -> Generator:
    """A CPU generator whose state depends on `key` (numbers, strings) alone: a resumed run draws the same."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


kept_constant = functools.cache(lambda values, device: torch.tensor(values).to(device))


def constant(values: tuple, device: torch.device) -> Tensor:
    """The tensor of some constants, copied to a device once. One that torch.export traces is not kept."""
    make = kept_constant.__wrapped__ if torch.compiler.is_compiling() else kept_constant
    return make(values, device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Moves what was drawn on the CPU to the device, without waiting for it where that is CUDA."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def cubic_weights(offset: Tensor, a: float = -1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the neighbors at -1, 0, 1 and 2 for a point at `offset` (0..1): they sum to 1.

    Keys' cubic kernel (1981). Pillow's Image.transform has a = -1, its resize a = -0.5, and torch a = -0.75.
    """
    rest = 1 - offset
    outer = a * offset * rest
    first, fourth = outer * rest, outer * offset
    second = rest * (1 + offset * (1 - (a + 2) * offset))
    return first, second, 1 - first - second - fourth, fourth


# ---- Crops and flips: uint8 (B, 3, H, W) in and out ----


def draw_boxes(
    count: int, sides: Tensor, largest: Tensor, scale: tuple, ratio: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Boxes (top, left, height, width) int64 (count, 4), and whether they fit, bool (count,).

    The area is uniform in `scale`, as a share of an image with these `sides` (height, width), the aspect
    log-uniform in ratio..1/ratio. Of 10 draws the first whose sides are 1..largest is taken.
    """
    area = sides.prod() * torch.empty(count, 10, 1).uniform_(*scale, generator=generator)
    log_aspect = torch.empty(count, 10, 1).uniform_(math.log(ratio), -math.log(ratio), generator=generator)
    sizes = (area * torch.cat([-log_aspect, log_aspect], dim=2).exp()).sqrt().round()  # (count, 10, 2)
    fits = ((sizes >= 1) & (sizes <= largest)).all(dim=2)
    size = sizes[torch.arange(count), fits.int().argmax(dim=1)]  # (count, 2)
    corner = (torch.rand(count, 2, generator=generator) * (sides - size + 1)).floor()
    return torch.cat([corner, size], dim=1).long(), fits.any(dim=1)


def random_boxes(count: int, height: int, width: int, generator: Generator) -> Tensor:
    """Random resized crop's boxes (top, left, height, width) int64 (count, 4): 8 % to 100 % of the area."""
    sides = torch.tensor([height, width])
    boxes, fits = draw_boxes(count, sides, sides, (0.08, 1), 3 / 4, generator)
    # Where none of the draws fits: the largest centered box of an aspect (w/h) from 3/4 to 4/3
    largest = torch.tensor([round(min(height, width * 4 / 3)), round(min(width, height * 4 / 3))])
    return torch.where(fits[:, None], boxes, torch.cat([(sides - largest) // 2, largest]))


def resize_lines(lines: Tensor, start: Tensor, length: Tensor, size: int) -> Tensor:
    """Resizes lines start..start + length of each image as Pillow does: float (B, L, D) -> (B, size, D).

    `start` and `length` float (B,) are on the CPU. As in Pillow's resize, shrinking widens the kernel.
    """
    (count, total, _), device = lines.shape, lines.device
    taps = math.ceil(4 * max(1.0, length.max().item() / size)) + 1
    start, length = to_device(torch.stack([start, length]), device)[:, :, None, None]
    scale = length / size
    stretch = scale.clamp(min=1)  # of the kernel, which then reaches 2 · stretch lines to each side
    centers = start + (torch.arange(size, device=device)[:, None] + 0.5) * scale
    index = (centers - 2 * stretch).floor() + torch.arange(taps, device=device)  # (B, size, taps)
    distance = ((index + 0.5 - centers) / stretch).abs()
    far, near, _, _ = cubic_weights(torch.where(distance < 1, distance, distance - 1).clamp(max=1), a=-0.5)
    weights = torch.where(distance < 1, near, far) * ((index >= start) & (index < start + length))
    weights = weights / weights.sum(dim=2, keepdim=True)
    # Each new line is a weighted sum of `taps` old ones: on a CPU faster than a product with a dense matrix.
    index = index.clamp(0, total - 1).long() + total * torch.arange(count, device=device)[:, None, None]
    index, weights = index.view(-1, taps), weights.view(-1, taps)
    resized = F.embedding_bag(index, lines.flatten(0, 1), per_sample_weights=weights, mode="sum")
    return resized.view(count, size, -1)


def resize_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cuts box i of `random_boxes`, which are on the CPU, out of image i: uint8 (B, 3, size, size)."""
    if images.device.type == "cpu" and len(images) > 16:  # a few at a time stay in a CPU's cache
        parts = zip(images.split(16), boxes.split(16), strict=True)
        return torch.cat([resize_boxes(*part, size) for part in parts])
    top, left, h, w = boxes.float().T
    lines = images.permute(0, 3, 1, 2).flatten(2).float()  # the columns, (B, W, 3·H)
    lines = resize_lines(lines, left, w, size).round_().clamp_(0, 255)  # Pillow too rounds between its passes
    lines = lines.unflatten(2, (3, -1)).permute(0, 3, 2, 1).flatten(2)  # the rows, (B, H, 3·size)
    lines = resize_lines(lines, top, h, size).round_().clamp_(0, 255).to(torch.uint8)
    return lines.unflatten(2, (3, -1)).transpose(1, 2).contiguous()


def pad_and_crop(images: Tensor, generator: Generator) -> Tensor:
    """Pads with 4 black pixels on each side and cuts the old size out again at a random place."""
    height, width = images.shape[2:]
    corner = torch.randint(2 * 4 + 1, (2, len(images)), generator=generator)
    top, left = to_device(corner, images.device)
    windows = F.pad(images, [4] * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
    index = torch.arange(len(images), device=images.device)
    return windows[index, :, top, left]  # (B, 3, tops, lefts, H, W) -> (B, 3, H, W)


def random_crop(images: Tensor, size: int, generator: Generator) -> Tensor:
    """Training crop uint8 (B, 3, size, size): random resized crop; small images of that size are padded."""
    if images.shape[2:] == (size, size) and size <= SMALL_IMAGE:
        return pad_and_crop(images, generator)
    return resize_boxes(images, random_boxes(len(images), *images.shape[2:], generator), size)


def resize_size(*sides: int, size: int) -> list[int]:
    """The sides before the evaluation crop: the short one is size / 0.875, rounded down as the authors do."""
    short = int(size / 0.875)
    return [short * side // min(sides) for side in sides]


def center_crop(images: Tensor, size: int) -> Tensor:
    """Evaluation crop uint8 (B, 3, size, size): the center after `resize_size`; images of that size stay."""
    if images.shape[2:] == (size, size):
        return images
    sides = resize_size(*images.shape[2:], size=size)
    resized = F.interpolate(images.float(), sides, mode="bicubic", antialias=True)
    top, left = (round((side - size) / 2) for side in sides)
    return resized[:, :, top : top + size, left : left + size].round().clamp_(0, 255).to(torch.uint8)


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirrors each image left to right with probability 0.5."""
    flipped = to_device(torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5, images.device)
    return flipped * images.flip(3) + ~flipped * images  # torch.where is slower on uint8


# ---- Operations: uint8 (n, 3, H, W) and an argument float (n,) for each image -> uint8 (n, 3, H, W) ----
# The fifteen operations are of four kinds: `look_up` (a table of 256 levels), `blend` (with another image),
# `shift_rows` (or columns) and `rotate`. An operation is a kind and what this kind needs besides the images.


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replaces each value by its entry in the table of its image and channel; tables float (n, 3, 256)."""
    return tables.clamp(0, 255).to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def by_level(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """The inputs of `look_up` for a function of (level, argument), the same for all channels."""
    return lambda images, argument: [
        function(constant(LEVELS, images.device), argument.view(-1, 1, 1)).expand(len(images), 3, 256)
    ]


def autocontrast(images: Tensor) -> Tensor:
    """Tables that stretch each channel to 0..255; a channel of one value stays as it is."""
    # float64, which mps lacks, because Pillow's truncation to whole levels depends on the last bit
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    low, high = torch.stack(images.flatten(2).aminmax(dim=2, keepdim=True)).to(dtype)
    levels = constant(LEVELS, images.device)
    scale = torch.full_like(low, 255.0) / (high - low)  # `255.0 / tensor` would round twice
    return torch.where(high > low, levels * scale - low * scale, levels).trunc().float()


def equalize(images: Tensor) -> Tensor:
    """Tables that make each channel's histogram as flat as whole levels allow."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, values, torch.ones((), dtype=torch.int32, device=images.device).expand_as(values))
    step = (values.shape[2] - counts.gather(2, values.amax(dim=2, keepdim=True))) // 255
    flat = (step // 2 + counts.cumsum(2, dtype=torch.int32) - counts) // step.clamp(min=1)
    return torch.where(step > 0, flat, constant(LEVELS, images.device))


def blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    """Pillow's Image.blend: factor 0 gives the others, 1 the images, above 1 goes beyond them."""
    return (others + factor.view(-1, 1, 1, 1) * (images - others)).clamp_(0, 255).to(torch.uint8)


def grayscale(images: Tensor) -> Tensor:
    """For Color: the images in gray, as Pillow's fixed-point arithmetic computes the luma."""
    weighted = images * constant((19595, 38470, 7471), images.device).view(3, 1, 1)
    return (weighted.sum(dim=1, keepdim=True) + 32768 >> 16).float().expand_as(images)


def mean_luma(images: Tensor) -> Tensor:
    """For Contrast: each image's mean luma everywhere, rounded to a whole level."""
    pixels = images.shape[2] * images.shape[3]
    total = grayscale(images)[:, :1].sum(dim=(2, 3), keepdim=True, dtype=torch.int64)
    return ((2 * total + pixels) // (2 * pixels)).float().expand_as(images)


def smooth(images: Tensor) -> Tensor:
    """For Sharpness: the images filtered by (1 1 1; 1 5 1; 1 1 1)/13, their outermost pixels unchanged."""
    smoothed = images.float()
    rows = smoothed[:, :, :-2] + smoothed[:, :, 1:-1] + smoothed[:, :, 2:]
    center = smoothed[:, :, 1:-1, 1:-1]
    center.copy_((rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * center).div_(13).round_())
    return smoothed


def fill_outside(sampled: Tensor, inside: Tensor) -> Tensor:
    """The sampled values as uint8 where the source point lies in the image, the fill color elsewhere."""
    # Four float32 weights may sum to slightly less than 1; truncated, a flat area would be one level darker.
    filled = torch.where(inside, sampled.add_(1e-3), constant(FILL, sampled.device).view(3, 1, 1))
    return filled.clamp_(0, 255).to(torch.uint8)


def shift_rows(images: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Pixel (x, y) becomes the one at (x + slope·y + offset·width, y), by cubic interpolation."""
    (height, width), device = images.shape[2:], images.device
    shift = slope[:, None] * torch.arange(0.5, height, device=device) + offset[:, None] * width
    shift = shift[:, None, :, None]  # (n, 1, H, 1)
    whole = shift.floor()
    columns = torch.arange(-1, width + 2, device=device) + whole.long()  # (n, 1, H, W + 3)
    source = images.gather(3, columns.clamp_(0, width - 1).expand(-1, 3, -1, -1)).float()
    sampled = torch.zeros(images.shape, device=device)
    for k, weight in enumerate(cubic_weights(shift - whole)):
        sampled.addcmul_(weight, source[..., k : k + width])
    centers = torch.arange(0.5, width, device=device) + shift
    return fill_outside(sampled, (centers >= 0) & (centers < width))


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Turns counter-clockwise about the center by angle float (n,), in radians, by bicubic interpolation."""
    (height, width), device = images.shape[2:], images.device
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    x = torch.arange(0.5 - width / 2, width / 2, device=device)  # pixel centers, from the image's center
    y = torch.arange(0.5 - height / 2, height / 2, device=device)[:, None]
    source = torch.stack([cos * x - sin * y + width / 2, sin * x + cos * y + height / 2])  # (2, n, H, W)
    sides, last = constant(((width, height), (width - 1, height - 1)), device).view(2, 2, 1, 1, 1)
    inside = ((source >= 0) & (source < sides)).all(dim=0)[:, None]
    first = (source - 0.5).floor()
    weights_x, weights_y = torch.stack(cubic_weights(source - 0.5 - first), dim=2).unbind()  # (n, 4, H, W)
    neighbors = first.long()[:, :, None] + torch.arange(-1, 3, device=device).view(4, 1, 1)
    columns, rows = torch.minimum(neighbors.clamp_(min=0), last[:, None]).unbind()  # (n, 4, H, W)
    pixels = images.flatten(2).float()
    # Each pixel's 4 × 4 neighbors: summed over the 4 rows in each of the 4 columns, then over the columns
    sums = torch.zeros(len(images), 3, 4, height, width, device=device)
    for row, weight in zip((rows * width).split(1, dim=1), weights_y.unbind(1), strict=True):
        index = (row + columns).flatten(1)[:, None].expand(-1, 3, -1)
        sums.addcmul_(weight[:, None, None], pixels.gather(2, index).view_as(sums))
    return fill_outside((sums * weights_x[:, None]).sum(dim=2), inside)


class Operation(NamedTuple):
    """A function of (images, argument): its kind, applied to the images and what it needs besides them."""

    kind: Callable[..., Tensor]
    inputs: Callable[[Tensor, Tensor], list[Tensor]]  # (images, argument) -> what the kind needs
    transposed: bool = False  # does to columns what it would do to rows

    def __call__(self, images: Tensor, argument: Tensor) -> Tensor:
        images = images.mT if self.transposed else images
        changed = self.kind(images, *self.inputs(images, argument.float()))
        return changed.mT if self.transposed else changed


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": Operation(look_up, lambda images, _: [autocontrast(images)]),
    "Equalize": Operation(look_up, lambda images, _: [equalize(images)]),
    "Invert": Operation(look_up, by_level(lambda v, _: 255 - v)),
    "Rotate": Operation(rotate, lambda _, degrees: [torch.deg2rad(degrees)]),
    "Posterize": Operation(look_up, by_level(lambda v, bits: v - v % 2 ** (8 - bits.int()))),  # 0 bits: black
    "Solarize": Operation(look_up, by_level(lambda v, threshold: torch.where(v < threshold, v, 255 - v))),
    "SolarizeAdd": Operation(look_up, by_level(lambda v, addend: v + addend * (v < 128))),
    "Color": Operation(blend, lambda images, factor: [grayscale(images), factor]),
    "Contrast": Operation(blend, lambda images, factor: [mean_luma(images), factor]),
    "Brightness": Operation(look_up, by_level(lambda v, factor: v * factor)),
    "Sharpness": Operation(blend, lambda images, factor: [smooth(images), factor]),
    "ShearX": Operation(shift_rows, lambda _, share: [share, 0 * share]),  # slope, offset
    "ShearY": Operation(shift_rows, lambda _, share: [share, 0 * share], transposed=True),
    "TranslateX": Operation(shift_rows, lambda _, share: [0 * share, share]),
    "TranslateY": Operation(shift_rows, lambda _, share: [0 * share, share], transposed=True),
}
NAMES = list(OPERATIONS)


# ---- Each image its own operation, in few calls: this is about speed, and a first reading can skip it ----


def group_by_operation(ops: Tensor, arguments: Tensor, device: torch.device) -> Iterator[tuple]:
    """For each row of `ops` (num_ops, B): how to put each operation's images side by side, and back."""
    counts = [torch.bincount(op + 1, minlength=1 + len(NAMES)).tolist() for op in ops]
    order = ops.argsort(dim=1)
    # One copy to the device, in float32, which holds all whole numbers up to 2^24
    packed = to_device(torch.stack([order, order.argsort(dim=1), arguments.gather(1, order)]), device)
    order, back = packed[:2].long()
    return zip(counts, order, back, packed[2], strict=True)


def apply_by_kind(groups: list[Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """Applies OPERATIONS number i to the images groups[i] with arguments[i], for all i."""
    operations, calls = list(OPERATIONS.values()), {}
    groups = [x.mT if operation.transposed else x for x, operation in zip(groups, operations, strict=True)]
    for i, images in enumerate(groups):
        if len(images):
            calls.setdefault((operations[i].kind, images.shape[1:]), []).append(i)
    # All groups of a kind in one call: a GPU changes a few images in less time than it takes to start a call.
    for (kind, _), members in calls.items():
        inputs = [[groups[i], *operations[i].inputs(groups[i], arguments[i])] for i in members]
        changed = kind(*map(torch.cat, zip(*inputs, strict=True))).split([len(groups[i]) for i in members])
        for i, images in zip(members, changed, strict=True):
            groups[i] = images
    return [x.mT if operation.transposed else x for x, operation in zip(groups, operations, strict=True)]


def apply_operations(images: Tensor, ops: Tensor, arguments: Tensor) -> Tensor:
    """Applies several operations to each image, one after the other: uint8 (B, 3, H, W) in and out.

    Image i gets ops[0, i] with arguments[0, i], then ops[1, i], and so on. `ops` int64 (num_ops, B), places
    in NAMES or -1 for none, and `arguments` float (num_ops, B) are on the CPU, the images anywhere.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    if images.device.type == "cpu" and images.numel() > 2**21 and len(images) > 1:  # what stays in its cache
        halves = zip(images.chunk(2), ops.chunk(2, dim=1), arguments.chunk(2, dim=1), strict=True)
        return torch.cat([apply_operations(*half) for half in halves])
    for counts, order, back, argument in group_by_operation(ops, arguments, images.device):
        unchanged, *groups = images.index_select(0, order).split(counts)
        groups = apply_by_kind(groups, argument.split(counts)[1:])
        images = torch.cat([unchanged, *groups]).index_select(0, back)
    return images


# ---- Policies: which operation, how strong ----

ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
# RandAugment's argument of each operation, from magnitude m = M/10 (0..1) and a sign (±1), both float64 (n,)
RANDAUGMENT_ARGUMENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), lambda m, sign: m),  # they have no argument
    "Rotate": lambda m, sign: 30 * m * sign,
    "Posterize": lambda m, sign: 4 - (4 * m).floor(),
    "Solarize": lambda m, sign: 256 - (256 * m).floor(),
    "SolarizeAdd": lambda m, sign: (110 * m).floor(),
    **dict.fromkeys(ENHANCEMENTS, lambda m, sign: (1 + 0.9 * m * sign).clamp(min=0.1)),
    **dict.fromkeys(("ShearX", "ShearY"), lambda m, sign: 0.3 * m * sign),
    **dict.fromkeys(("TranslateX", "TranslateY"), lambda m, sign: 0.45 * m * sign),
}
AUTOAUGMENT_ARGUMENTS = RANDAUGMENT_ARGUMENTS | {
    "Posterize": lambda m, sign: 4 + (4 * m).floor(),
    "Solarize": lambda m, sign: (256 * m).floor(),
    **dict.fromkeys(("Color", "Contrast", "Sharpness"), lambda m, sign: 0.1 + 1.8 * m),
}


def draw_step(op: Tensor, m: Tensor, p: float | Tensor, table: dict, generator: Generator) -> tuple:
    """Operation op[i] with probability p, else -1 for none, and its argument in `table` at magnitude m[i]."""
    sign = torch.randint(2, op.shape, generator=generator).double() * 2 - 1
    arguments = torch.stack([table[name](m, sign) for name in NAMES])  # (15, B), of which one an image counts
    applied = torch.rand(len(op), generator=generator) < p
    return torch.where(applied, op, -1), arguments.gather(0, op[None])[0].float()


class RandAugment:
    """RandAugment (Cubuk et al., 2020) as the paper used it: uint8 (B, 3, H, W) in and out.

    `num_ops` draws an image, uniform over OPERATIONS, each applied with probability 0.5 at a magnitude drawn
    from N(magnitude, magnitude_std) and clipped to 0..10.
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 9, magnitude_std: float = 0.5):
        self.num_ops, self.magnitude, self.magnitude_std = num_ops, magnitude, magnitude_std

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        steps = []
        for _ in range(self.num_ops):
            op = torch.randint(len(NAMES), (len(images),), generator=generator)
            noise = torch.randn(len(images), generator=generator, dtype=torch.float64)
            m = (self.magnitude + self.magnitude_std * noise).clamp(0, 10) / 10
            steps.append(draw_step(op, m, 0.5, RANDAUGMENT_ARGUMENTS, generator))
        return apply_operations(images, *map(torch.stack, zip(*steps, strict=True)))


class AutoAugment:
    """AutoAugment's ImageNet policy (Cubuk et al., 2019, their Table 9): uint8 (B, 3, H, W) in and out.

    Each image gets one of 25 pairs of operations, each operation with its probability and its level 0..10.
    """

    def __init__(self):
        policies = torchvision.transforms.AutoAugment().policies  # 25 pairs of (name, probability, level)
        self.op = torch.tensor([[NAMES.index(name) for name, _, _ in pair] for pair in policies])  # (25, 2)
        self.p = torch.tensor([[p for _, p, _ in pair] for pair in policies])
        self.m = torch.tensor([[level or 0 for _, _, level in pair] for pair in policies]).double() / 10

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        i = torch.randint(len(self.op), (len(images),), generator=generator)
        steps = zip(self.op[i].T, self.m[i].T, self.p[i].T, strict=True)  # (B,) each, first and second
        steps = [draw_step(op, m, p, AUTOAUGMENT_ARGUMENTS, generator) for op, m, p in steps]
        return apply_operations(images, *map(torch.stack, zip(*steps, strict=True)))


def color_jitter(images: Tensor, generator: Generator) -> Tensor:
    """In place of a policy: brightness, contrast and saturation times 0.7..1.3, in a random order."""
    ops = torch.tensor([NAMES.index(name) for name in ("Brightness", "Contrast", "Color")])
    order = torch.rand(3, len(images), generator=generator).argsort(dim=0)  # (3, B)
    factor = 1 + 0.3 * (2 * torch.rand(order.shape, generator=generator) - 1)
    return apply_operations(images, ops[order], factor)


# ---- After the pixels are numbers: normalize, erase, mix ----


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 with ImageNet's mean 0 and standard deviation 1 in each channel."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, not {images.dtype}")
    mean, std = (255 * constant((MEAN, STD), images.device)).view(2, 1, 3, 1, 1)
    return images.float().sub_(mean).div_(std)


class RandomErasing:
    """Random erasing (Zhong et al., 2020) of normalized images: float (B, 3, H, W) in and out.

    With the given probability, a box of 2 % to 1/3 of the area and log-uniform aspect 0.3 to 1/0.3 is filled
    with N(0, 1), drawn for every pixel and channel; an image in which none of 10 boxes fits stays as it is.
    The boxes are the same on every device, the noise is not.
    """

    def __init__(self, probability: float = 0.25):
        self.probability = probability

    def __call__(self, inputs: Tensor, generator: Generator) -> Tensor:
        return self.erase_(inputs.clone(), generator)

    def erase_(self, inputs: Tensor, generator: Generator) -> Tensor:
        """The same in place: a copy would be 4 % of the time that `Augment` takes at 224 pixels on a CPU."""
        count, channels, height, width = inputs.shape
        sides, device = torch.tensor([height, width]), inputs.device
        boxes, fits = draw_boxes(count, sides, sides - 1, (0.02, 1 / 3), 0.3, generator)
        erased = (torch.rand(count, generator=generator) < self.probability) & fits
        seed = torch.randint(2**62, (), generator=generator).item()
        boxes = torch.cat([boxes[erased], erased.nonzero()], dim=1)  # with the image's number
        # The noise is drawn where it is needed. How much of it is known on the CPU: nothing waits.
        total = channels * boxes[:, 2:4].prod(dim=1).sum().item()
        device_generator = Generator("cpu" if inputs.is_meta else device).manual_seed(seed)
        noise = torch.randn(total, generator=device_generator, device=device, dtype=inputs.dtype)
        *box, index = to_device(boxes, device).T
        top, left, h, w = (side[:, None] for side in box)  # (k, 1) each, of the k erased images
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        rows, columns = (y >= top) & (y < top + h), (x >= left) & (x < left + w)  # (k, H), (k, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]  # (k, 1, H, W)
        return inputs.index_copy_(0, index, inputs.index_select(0, index).masked_scatter_(inside, noise))


class Mixup:
    """Mixup (Zhang et al., 2018), CutMix (Yun et al., 2019) and label smoothing, one decision a batch.

    `mixup_alpha` and `cutmix_alpha` are the Beta distribution's parameter, 0 switches one off; with both on,
    a fair coin picks. Called with inputs float (B, 3, H, W) and labels int64 (B,), it returns the mixed
    inputs and targets float32 (B, C) that sum to 1. Image i is mixed with image B-1-i.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int, smoothing: float):
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.num_classes, self.smoothing = num_classes, smoothing

    @staticmethod
    def box(lam: float, height: int, width: int, generator: Generator) -> tuple[int, int, int, int]:
        """CutMix's box (top, bottom, left, right): sides √(1-λ) of the image's, center uniform, clipped."""
        h, w = int(height * math.sqrt(1 - lam)), int(width * math.sqrt(1 - lam))
        y, x = (int(torch.randint(side, (), generator=generator)) for side in (height, width))
        return max(0, y - h // 2), min(height, y + h // 2), max(0, x - w // 2), min(width, x + w // 2)

    def __call__(self, inputs: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        height, width = inputs.shape[2:]
        one_hot = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        targets = one_hot * (1 - self.smoothing) + self.smoothing / self.num_classes
        coin = torch.rand((), generator=generator).item() < 0.5
        cut = self.cutmix_alpha > 0 and (coin or self.mixup_alpha == 0)
        alpha = self.cutmix_alpha if cut else self.mixup_alpha
        if alpha == 0:
            return inputs, targets
        seed = torch.randint(2**62, (), generator=generator).item()
        lam = float(np.random.default_rng(seed).beta(alpha, alpha))  # torch's Beta takes no generator
        if cut:
            top, bottom, left, right = self.box(lam, height, width, generator)
            mixed = inputs.clone()
            mixed[:, :, top:bottom, left:right] = inputs[:, :, top:bottom, left:right].flip(0)
            lam = 1 - (bottom - top) * (right - left) / (height * width)  # the share that is not pasted
        else:
            mixed = inputs.flip(0).lerp_(inputs, lam)
        return mixed, torch.lerp(targets.flip(0), targets, lam)


class Augment:
    """The whole path of a training batch: uint8 (B, 3, S, S) and labels int64 (B,) to inputs and targets.

    `policy` is `randaugment`, `autoaugment`, `none` (color jitter in their place) or `off` (no flip either).
    Returns inputs float32 (B, 3, S, S), normalized, and targets float32 (B, C).
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
        policies = {"randaugment": RandAugment(), "autoaugment": AutoAugment(), "none": color_jitter}
        self.policy = None if policy == "off" else policies[policy]
        self.erasing = RandomErasing(erasing)
        self.mix = Mixup(mixup, cutmix, num_classes, smoothing)

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        if self.policy is not None:
            images = self.policy(random_flip(images, generator), generator)
        inputs = self.erasing.erase_(normalize(images), generator)
        return self.mix(inputs, labels, generator)


class RepeatedAugmentSampler(Sampler[int]):
    """Repeated augmentation (Hoffer et al., 2020; Table 7): a shuffle with each image several times in a row.

    The ranks take turns, so that the repeats of an image are in one step. For N images each of W ranks has
    N // 256 · 256 / W samples an epoch, as in the authors' code, or N / W where N < 256 or num_repeats = 1.
    """

    def __init__(self, dataset_size: int, num_replicas: int, rank: int, num_repeats: int = 3, seed: int = 0):
        if dataset_size < 1 or num_repeats < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"no sampler of {dataset_size} images: {num_repeats=}, {rank=}, {num_replicas=}")
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
