"""The data sets, and the loader that brings uint8 batches to the device.

A set is either an `ArraySet`, small enough to be held whole as one uint8 tensor on the device and cropped
there, or a `FolderSet`, streamed from files by worker processes that only decode and crop. Both hand out
batches of images uint8 (B, 3, S, S) and labels int64 (B,).

    python data.py shapes.png       draws a sheet of the `shapes` data set
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augment import (
    RepeatedAugmentSampler,
    central_crop,
    keyed_generator,
    random_boxes,
    random_crop,
    shown_size,
)
from model import UsageError

# ---- shapes: ten classes drawn by the program itself ----

SHAPES = ("circle", "ring", "half", "triangle", "square", "bar", "plus", "star", "arrow", "ell")


def outline(shape: str) -> np.ndarray:
    """The corners (n, 2) of a shape centred on the origin, reaching to about 1."""
    if shape in ("circle", "ring", "half"):
        turn = np.pi if shape == "half" else 2 * np.pi
        angles = np.linspace(0, turn, 24)
        corners = np.stack([np.cos(angles), np.sin(angles) - (0.4 if shape == "half" else 0)], axis=1)
    elif shape in ("triangle", "square"):
        angles = np.arange(3 if shape == "triangle" else 4) / (3 if shape == "triangle" else 4) * 2 * np.pi
        corners = 1.1 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    elif shape == "star":
        angles, radii = np.arange(10) / 10 * 2 * np.pi, np.array([1.15, 0.45] * 5)[:, None]
        corners = radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    else:
        corners = np.array({
            "bar": [(-1.1, -0.35), (1.1, -0.35), (1.1, 0.35), (-1.1, 0.35)],
            "plus": [(-1, -0.3), (-0.3, -0.3), (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3),
                     (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3)],
            "arrow": [(-1.1, -0.25), (0.1, -0.25), (0.1, -0.85), (1.1, 0), (0.1, 0.85), (0.1, 0.25),
                      (-1.1, 0.25)],
            "ell": [(-0.8, -1), (-0.2, -1), (-0.2, 0.4), (0.8, 0.4), (0.8, 1), (-0.8, 1)],
        }[shape])  # fmt: skip
    return corners


OUTLINES = {shape: outline(shape) for shape in SHAPES}
CUES = 0.6  # the share of images in which a class wears its own colour; and, separately, its own texture


def draw_shape(seed: int, split: str, index: int, size: int) -> tuple[Image.Image, int]:
    """Image `index` of a split: RGB (size, size) and its label, index mod 10, always the same for the same
    arguments.

    Easy cues tell a class more often than not (its colour; its texture: solid, stripes or dots); otherwise
    colour and texture are anyone's. The outline always tells it, under shift, scale, rotation by up to 20
    degrees and clutter.
    """
    rng, label = random.Random(f"{seed}/{split}/{index}"), index % 10
    side = 3 * size  # drawn large and reduced, for smooth edges

    def colour(hue: float, value: tuple[float, float]) -> tuple[int, int, int]:
        image = Image.new(
            "HSV", (1, 1), (int(hue * 256) % 256, rng.randint(120, 255), int(255 * rng.uniform(*value)))
        )
        return image.convert("RGB").getpixel((0, 0))

    image = Image.new("RGB", (side, side), colour(rng.random(), (0.1, 0.45)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 5)):  # clutter: dim blobs and lines behind the shape
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.03, 0.12) * side
        shade = colour(rng.random(), (0.2, 0.8))
        if rng.random() < 0.5:
            draw.ellipse((x - r, y - r, x + r, y + r), fill=shade)
        else:
            draw.line(
                (x, y, rng.uniform(0, side), rng.uniform(0, side)), fill=shade, width=max(1, int(r / 3))
            )

    own_hue = (label + rng.gauss(0, 0.25)) / 10
    hue = own_hue if rng.random() < CUES else rng.random()
    texture = label % 3 if rng.random() < CUES else rng.randrange(3)
    fill = Image.new("RGB", (side, side), colour(hue, (0.65, 1.0)))
    pattern, second = ImageDraw.Draw(fill), colour(hue + 0.08, (0.3, 0.5))
    step = max(3, int(side * rng.uniform(0.09, 0.13)))
    for i in range(0, side, step):
        if texture == 1:
            pattern.rectangle((0, i, side, i + step // 2), fill=second)
        elif texture == 2:
            for j in range(0, side, step):
                pattern.ellipse((i, j, i + step // 2, j + step // 2), fill=second)

    angle, radius = rng.uniform(-1, 1) * np.pi / 9, rng.uniform(0.33, 0.43) * side
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([rng.uniform(0.42, 0.58) * side, rng.uniform(0.42, 0.58) * side])
    corners = OUTLINES[SHAPES[label]] @ turn
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([tuple(p) for p in corners * radius + centre], fill=255)
    if SHAPES[label] == "ring":
        ImageDraw.Draw(mask).polygon([tuple(p) for p in corners * radius * 0.55 + centre], fill=0)
    image.paste(fill, mask=mask)
    return image.reduce(3), label


# ---- Two kinds of data set ----


class ArraySet:
    """A data set held whole: images uint8 (N, 3, H, W) and labels int64 (N,), both on the training device.

    `broken` are the paths of image files that could not be read and were left out.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str], broken: Iterable[str] = ()):
        self.images, self.labels, self.classes, self.broken = images, labels, classes, set(broken)

    def __len__(self) -> int:
        return len(self.labels)


class FolderSet:
    """A data set left in its files: their paths, labels (whole numbers) and the class names.

    A file that cannot be read is an error or, with `skip_broken`, left out and put into `broken`.
    """

    def __init__(self, paths: list[str], labels: list[int], classes: list[str], skip_broken: bool = False):
        self.paths, self.labels, self.classes = paths, labels, classes
        self.skip_broken, self.broken = skip_broken, set()

    def __len__(self) -> int:
        return len(self.labels)


def draw_shapes(split: str, count: int, size: int, device: torch.device) -> ArraySet:
    """The first `count` shapes of a split, held on the device."""
    if count * 3 * size**2 > 2**33:
        raise UsageError(f"{count} shapes of {size} pixels are more than 8 GiB; choose a smaller --img-size")
    drawn = [draw_shape(0, split, index, size) for index in range(count)]
    images = torch.from_numpy(np.stack([np.asarray(image) for image, _ in drawn])).permute(0, 3, 1, 2)
    labels = torch.tensor([label for _, label in drawn])
    return ArraySet(images.contiguous().to(device), labels.to(device), list(SHAPES))


def download(kind: type, root: Path, **which) -> Dataset:
    """A data set through torchvision, downloaded to `root` where it is not there yet."""
    try:
        return kind(root, download=True, **which)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"could not get {kind.__name__} into {root}: {error}; check the network, or name "
            "the folder that has it with --data-path"
        ) from error


def open_cifar(kind: type, root: Path, split: str, device: torch.device) -> ArraySet:
    """CIFAR-10 or CIFAR-100."""
    found = download(kind, root, train=split == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return ArraySet(images.to(device), torch.tensor(found.targets, device=device), found.classes)


def need_scipy(name: str) -> None:
    """Raises UsageError unless scipy, which reads the labels of two data sets alone, is installed."""
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(f"the labels of {name} are MATLAB files, read by scipy: pip install scipy")


def open_flowers(root: Path, split: str) -> FolderSet:
    """Oxford Flowers-102. Table 8 trains on its train and val splits together, and tests on its test."""
    need_scipy("flowers102")
    kind = torchvision.datasets.Flowers102
    splits = ("train", "val") if split == "train" else ("test",)
    parts = [download(kind, root, split=part) for part in splits]
    classes = getattr(kind, "classes", [f"flower {n}" for n in range(1, 103)])  # torchvision 0.22 names them
    paths = [str(path) for part in parts for path in part._image_files]
    return FolderSet(paths, [label for part in parts for label in part._labels], list(classes))


CARS = ("cars_train", "cars_test", "devkit/cars_meta.mat", "devkit/cars_train_annos.mat",
        "cars_test_annos_withlabels.mat")  # fmt: skip


def open_cars(root: Path, split: str) -> FolderSet:
    """Stanford Cars, which nobody offers for download any more: torchvision reads what one has of it."""
    need_scipy("cars")
    for name in CARS:
        if not (root / "stanford_cars" / name).exists():
            raise UsageError(
                f"there is no {root}/stanford_cars/{name}; Stanford Cars cannot be downloaded any more: put "
                f"{', '.join(CARS)} into {root}/stanford_cars, or name another parent with --data-path"
            )
    try:
        found = torchvision.datasets.StanfordCars(root, "train" if split == "train" else "test")
    except Exception as error:  # a damaged file can make scipy raise anything
        raise UsageError(f"the labels in {root}/stanford_cars cannot be read: {error}") from error
    paths, labels = zip(*found._samples, strict=True)
    return FolderSet(list(paths), [int(label) for label in labels], [str(name) for name in found.classes])


def open_inat(year: str, root: Path, split: str) -> FolderSet:
    """iNaturalist 2018 or 2019: torchvision's tree of all pictures, cut by the competition's two lists.

    A hundred gigabytes are not downloaded unasked. Classes are named as in the tree, SUPERCATEGORY/NUMBER.
    """
    lists, tree = root / f"{split}{year}.json", root / year
    if not tree.is_dir():
        raise UsageError(
            f'there is no folder {tree}; download it once with: python -c "from torchvision.datasets import '
            f"INaturalist; INaturalist('{root}', '{year}', download=True)\", or name another with --data-path"
        )
    if not lists.is_file():
        raise UsageError(
            f"there is no {lists}, which tells the split; unpack {lists.name}.tar.gz there, which is at "
            f"https://ml-inat-competition-datasets.s3.amazonaws.com/{year}/{lists.name}.tar.gz"
        )
    try:
        classes = torchvision.datasets.INaturalist(root, year).all_categories
        labels = {name: label for label, name in enumerate(classes)}
        # "train_val2018/Aves/2761/x.jpg": the tree is renamed by torchvision
        names = [image["file_name"].split("/", 1)[1] for image in json.loads(lists.read_text())["images"]]
        return FolderSet(
            [str(tree / name) for name in names], [labels[name.rsplit("/", 1)[0]] for name in names], classes
        )
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{tree} and {lists} do not go together: {type(error).__name__}: {error}") from error


def read_image(path: str | Path, enough: int | None = None) -> Image.Image:
    """The picture in a file, upright and RGB with 8 bits; transparent parts lie on white, as on a page.

    Of 16 bits the upper 8 are kept. A JPEG of 2, 4 or 8 times `enough` pixels a side is decoded at a half, a
    quarter or an eighth of its size, which takes less time. Raises UsageError naming the file if it cannot be
    read.
    """
    try:
        with Image.open(path) as opened:
            if enough is not None:
                opened.draft("RGB", (enough, enough))
            image = opened
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in "IF":  # grey of more than 8 bits, whose values above 255 convert would clip
                values = np.asarray(image)
                if image.mode == "F" or values.min() < 0 or values.max() > 65535:
                    raise ValueError("its values have no known range; save it with 8 or 16 bits")
                image = Image.fromarray((values >> 8).astype(np.uint8))
            if image.getbands()[-1] in ("A", "a") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # a damaged file can make the reader raise anything
        raise UsageError(f"{path} is not a readable image: {' '.join(str(error).split())}") from error


HELD_BYTES = 2**30  # a set of equally large images that needs less than this is held whole


def open_folder(
    folder: Path, device: torch.device, skip_broken: bool = False, train: Path | None = None
) -> ArraySet | FolderSet:
    """The images in FOLDER/CLASS/*: held if they are all of one size and small together, else streamed.

    With `train` the classes are those of that folder, of which this one may lack some; there none is empty.
    """
    try:
        found = torchvision.datasets.ImageFolder(folder, allow_empty=True)
        classes = torchvision.datasets.folder.find_classes(train)[0] if train else found.classes
    except OSError as error:
        raise UsageError(
            f"no images in class folders below {folder}: {' '.join(str(error).split())}"
        ) from error
    odd = sorted(set(found.classes) - set(classes))
    if odd or not found.samples:
        reason = f"the class {odd[0]!r}, which train has not" if odd else "no images"
        raise UsageError(f"there is {reason}, in {folder}")
    paths = [path for path, _ in found.samples]
    index = {name: number for number, name in enumerate(classes)}
    labels = [index[found.classes[label]] for _, label in found.samples]
    if folder == train and (empty := sorted(set(range(len(classes))) - set(labels))):
        raise UsageError(f"there is no image in {folder / classes[empty[0]]}")
    streamed = FolderSet(paths, labels, classes, skip_broken)
    images, kept, broken = None, [], []
    for path, label in zip(paths, labels, strict=True):
        try:
            image = to_tensor(read_image(path))
        except UsageError:
            if not skip_broken:
                raise
            broken.append(path)
            continue
        if images is None:
            if len(paths) * image.numel() > HELD_BYTES:
                return streamed
            images = image.new_empty(len(paths), *image.shape)
        if image.shape != images.shape[1:]:
            return streamed
        images[len(kept)] = image
        kept.append(label)
    if images is None:
        raise UsageError(f"none of the images in {folder} can be read")
    return ArraySet(images[: len(kept)].to(device), torch.tensor(kept, device=device), classes, broken)


SHAPES_COUNT = {"train": 8000, "val": 2000}
DATA_NAMES = (
    "shapes", "cifar10", "cifar100", "flowers102", "cars", "inat2018", "inat2019", "imagenet", "folder"
)  # fmt: skip


def load_data(
    name: str,
    path: str,
    img_size: int,
    device: torch.device,
    splits: tuple[str, ...] = ("train", "val"),
    skip_broken: bool = False,
) -> list[ArraySet | FolderSet]:
    """The named splits of the data set called `name`, one of DATA_NAMES.

    `path` is where downloads go and, for `folder` and `imagenet`, the tree with train/CLASS/* and
    val/CLASS/*. What the paper tests on (Table 8) is `val`. Raises UsageError for what is missing or does
    not fit together.
    """
    if name == "shapes":
        return [draw_shapes(split, SHAPES_COUNT[split], img_size, device) for split in splits]
    if name in ("cifar10", "cifar100"):
        kind = torchvision.datasets.CIFAR10 if name == "cifar10" else torchvision.datasets.CIFAR100
        return [open_cifar(kind, Path(path), split, device) for split in splits]
    if name in ("flowers102", "cars", "inat2018", "inat2019"):
        year = name.removeprefix("inat")
        opener = {"flowers102": open_flowers, "cars": open_cars}.get(name, partial(open_inat, year))
        found = [opener(Path(path), split) for split in splits]
        for part in found:
            part.skip_broken = skip_broken
        return found
    for split in splits:
        if not (Path(path) / split).is_dir():
            raise UsageError(
                f"there is no folder {Path(path) / split}; --data-path must hold train/CLASS/*, val/CLASS/*"
            )
    train = Path(path) / "train" if (Path(path) / "train").is_dir() else None
    return [open_folder(Path(path) / split, device, skip_broken, train) for split in splits]


# ---- Batches ----


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_file(image: Image.Image, size: int, key: tuple | None) -> Tensor:
    """`random_crop` (with a key) or `central_crop` (without), done by Pillow: uint8 (3, size, size)."""
    if key is not None:
        top, left, high, wide = random_boxes(1, image.height, image.width, keyed_generator(*key))[0].tolist()
        image = image.crop((left, top, left + wide, top + high))
        return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
    if image.size == (size, size):
        return to_tensor(image)
    if max(image.size) > 16 * min(image.size):  # of a very long image the far ends, which need much memory
        left, top = (max(0, (a - 16 * b) // 2) for a, b in (image.size, image.size[::-1]))
        image = image.crop((left, top, image.width - left, image.height - top))
    image = image.resize(shown_size(*image.size, size=size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))


class Crops(Dataset):
    """Whole batches read from files: item (indices, key) is images uint8 (B, 3, S, S), labels int64 (B,) and
    the files that were left out.

    A batch of training has others of its images in their place, one of evaluation is smaller. Where none may
    be left out the item is the UsageError itself, which would lose its one line if a worker raised it.
    """

    def __init__(self, data: FolderSet, size: int):
        self.data, self.size = data, size

    def __getitem__(self, item: tuple[list[int], tuple | None]) -> tuple[Tensor, Tensor, list] | UsageError:
        indices, key = item
        crops, labels, broken, last, image = [], [], [], None, None
        for place, index in enumerate(indices):
            if index != last:  # repeated augmentation puts an image's repeats side by side: decode it once
                last, image = index, None
                try:
                    # The smallest crop, 8 % of the area, has a quarter of a side or more: it fills the output
                    enough = None if key is None else 4 * self.size
                    image = read_image(self.data.paths[index], enough)
                except UsageError as error:
                    if not self.data.skip_broken:
                        return error
                    broken.append(self.data.paths[index])
            if image is not None:
                crops.append(crop_file(image, self.size, None if key is None else (*key, place)))
                labels.append(self.data.labels[index])
        if key is not None and broken:
            if not crops:
                return UsageError(f"none of the images of a batch can be read; one is {broken[0]}")
            crops, labels = ((part * len(indices))[: len(indices)] for part in (crops, labels))
        images = torch.stack(crops) if crops else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        return images, torch.tensor(labels, dtype=torch.int64), broken


def out_of_reach(loader: DataLoader) -> Iterator:
    """iter(loader), whose processes and threads are not reached by SIGINT and SIGTERM.

    Terminals and schedulers send these to all processes of a job, of which the main one is to answer.
    """
    if not hasattr(signal, "sigwaitinfo"):  # which Linux has
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent(worker: int) -> None:
    """Lets a worker process out of reach of signals be ended by its parent process, which may have to."""

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=wait, daemon=True).start()


def stream(
    data: FolderSet, size: int, plan, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches that `plan` (an iterable of items of Crops) asks for, read ahead by worker processes."""
    loader = DataLoader(
        Crops(data, size),
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=obey_parent,
    )
    for batch in out_of_reach(loader):
        if isinstance(batch, UsageError):
            raise batch
        images, labels, broken = batch
        data.broken.update(broken)
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def train_batches(
    data: ArraySet | FolderSet,
    size: int,
    batch_size: int,
    sampler: RepeatedAugmentSampler,
    *,
    per_epoch: int,
    start: int,
    stop: int,
    crop: bool,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches number `start` to `stop` of this process: uint8 (B, 3, S, S) and labels int64 (B,), across
    epochs.

    An epoch has `per_epoch` batches. `crop` cuts at random, else in the centre. What is drawn
    depends on the sampler's seed and rank and on the batch's number alone, so any `start` continues the same
    stream.
    """

    def plan() -> Iterator[tuple[list[int], tuple | None]]:
        order = []
        for number in range(start, stop):
            epoch, place = divmod(number, per_epoch)
            if place == 0 or not order:
                sampler.set_epoch(epoch)
                order = list(sampler)
            key = (sampler.seed, "crop", number, sampler.rank) if crop else None
            yield order[place * batch_size : (place + 1) * batch_size], key

    if isinstance(data, FolderSet):
        yield from stream(data, size, plan(), workers, device)
        return
    for indices, key in plan():
        index = torch.tensor(indices).to(device, non_blocking=True)
        images = data.images[index]
        images = random_crop(images, size, keyed_generator(*key)) if crop else central_crop(images, size)
        yield images, data.labels[index]


def eval_batches(
    data: ArraySet | FolderSet,
    size: int,
    batch_size: int,
    *,
    rank: int,
    world: int,
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of a data set, uint8 (B, 3, S, S) and labels (B,): every image once over all."""
    if isinstance(data, FolderSet):
        mine = list(range(rank, len(data), world))
        plan = [(mine[i : i + batch_size], None) for i in range(0, len(mine), batch_size)]
        yield from stream(data, size, plan, workers, device)
        return
    images, labels = data.images[rank::world], data.labels[rank::world]
    for i in range(0, len(labels), batch_size):
        yield central_crop(images[i : i + batch_size], size), labels[i : i + batch_size]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws a sheet of the `shapes` data set.")
    parser.add_argument("path", nargs="?", default="shapes.png", help="the picture to write [shapes.png]")
    path = parser.parse_args().path
    sheet = Image.new("RGB", (12 * 36, 10 * 36), "white")
    for i in range(120):
        sheet.paste(draw_shape(0, "train", i, 32)[0], (i // 10 * 36 + 2, i % 10 * 36 + 2))
    try:
        sheet.resize((864, 720), Image.Resampling.NEAREST).save(path)
    except (OSError, ValueError) as error:
        print(f"error: could not write the picture {path}: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {path}")
