"""The data sets, and the loader that brings uint8 batches to the device.

A set is either an `ArraySet`, small enough to be held whole as one uint8 tensor on the device and cropped
there, or a `FolderSet`, streamed from files by worker processes that only decode and crop. Both hand out
batches of images uint8 (B, 3, S, S) and labels int64 (B,).
"""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import augment
from augment import center_crop, keyed_generator, pad_and_crop, random_boxes, random_crop, to_device
from launch import UserError, main_process_first, print0, rank, world_size
from settings import Settings
from shapes import SHAPES, draw_shapes

# ---- Two kinds of data set ----


@dataclass
class ArraySet:
    """A data set held whole, on the training device."""

    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,)
    classes: list[str]
    broken: set[str] = field(default_factory=set)  # the files that could not be read and were left out

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, indices: list[int]) -> None:
        self.images, self.labels = self.images[indices], self.labels[indices]


@dataclass
class FolderSet:
    """A data set left in its files."""

    paths: list[str]
    labels: list[int]
    classes: list[str]
    skip_broken: bool = False  # a file that cannot be read is left out, and put into `broken`
    broken: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.labels)

    def keep(self, indices: list[int]) -> None:
        self.paths, self.labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]

    def read(self, index: int, enough: int | None = None) -> Image.Image | None:
        """A picture as `read_image` gives it; None for one that is left out, and then in `broken`."""
        try:
            return read_image(self.paths[index], enough)
        except UserError as error:
            if not self.skip_broken:
                raise UserError(f"{error}; training with --skip-broken leaves such files out") from error
            self.broken.add(self.paths[index])

    def __getitem__(self, item: tuple) -> tuple[Tensor, Tensor, set] | UserError:
        """A batch: of (indices, key, size) the crops (B, 3, S, S), labels (B,), and all `broken` so far.

        A batch of training has others of its images in place of broken ones, one of evaluation is smaller.
        Where none may be left out it is the UserError, which would lose its one line if a worker raised it.
        """
        (indices, key, size), crops, labels = item, [], []
        # The smallest crop, 8 % of the area, has a quarter of a side or more: it fills the output
        enough = None if key is None else 4 * size
        # Repeated augmentation puts an image's repeats side by side: decode it once
        for index, places in itertools.groupby(range(len(indices)), indices.__getitem__):
            try:
                image = self.read(index, enough)
            except UserError as error:
                return error
            for place in places if image else ():
                crops.append(crop_file(image, size, None if key is None else (*key, place)))
                labels.append(self.labels[index])
        if key is not None and len(crops) < len(indices):
            if not crops:
                return UserError(f"none of the images of a batch can be read; one is {min(self.broken)}")
            crops, labels = ((part * len(indices))[: len(indices)] for part in (crops, labels))
        images = torch.stack(crops) if crops else torch.empty(0, 3, size, size, dtype=torch.uint8)
        return images, torch.tensor(labels, dtype=torch.int64), self.broken


DataSet = ArraySet | FolderSet


def fingerprint(data: DataSet) -> str:
    """A hash of a data set: of its classes, labels, and the pixels held or the names of the files."""
    held = isinstance(data, ArraySet)
    images = data.images.cpu().numpy().tobytes() if held else repr([Path(path).name for path in data.paths])
    labels = data.labels.tolist() if held else data.labels
    digest = hashlib.sha256(images if held else images.encode())
    digest.update(repr((data.classes, labels)).encode())
    return digest.hexdigest()[:16]


def download(kind: type, root: Path, **which) -> Dataset:
    """A data set through torchvision, downloaded to `root` where it is not there yet."""
    try:
        return main_process_first(lambda: kind(root, download=True, **which))
    except (OSError, RuntimeError) as error:
        text = f"could not get {kind.__name__} into {root}: {error}"
        raise UserError(f"{text}; name the folder that has it with --data-path") from error


def open_cifar(kind: type, root: Path, split: str, skip_broken: bool) -> ArraySet:
    """CIFAR-10 or CIFAR-100."""
    found = download(kind, root, train=split == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return ArraySet(images, torch.tensor(found.targets), found.classes)


def open_flowers(root: Path, split: str, skip_broken: bool) -> FolderSet:
    """Oxford Flowers-102. Table 8 trains on its train and val splits together, and tests on its test."""
    kind = torchvision.datasets.Flowers102
    parts = [download(kind, root, split=p) for p in (["train", "val"] if split == "train" else ["test"])]
    classes = getattr(kind, "classes", [f"flower {n}" for n in range(1, 103)])  # torchvision 0.22 names them
    paths = [str(path) for part in parts for path in part._image_files]
    return FolderSet(paths, [label for part in parts for label in part._labels], list(classes), skip_broken)


def open_cars(root: Path, split: str, skip_broken: bool) -> FolderSet:
    """Stanford Cars, which nobody offers for download any more: torchvision reads what one has of it."""
    try:
        found = torchvision.datasets.StanfordCars(root, "train" if split == "train" else "test")
    except Exception as error:  # a damaged file can make scipy raise anything
        text = "must hold cars_train, cars_test, devkit and cars_test_annos_withlabels.mat"
        raise UserError(f"{root}/stanford_cars {text}: {error}") from error
    paths, labels = zip(*found._samples, strict=True)
    return FolderSet(list(paths), list(map(int, labels)), list(map(str, found.classes)), skip_broken)


def open_inat(year: str, root: Path, split: str, skip_broken: bool) -> FolderSet:
    """iNaturalist 2018 or 2019: torchvision's tree of all pictures, cut by the competition's two lists.

    A hundred gigabytes are not downloaded unasked. Classes are named as in the tree, SUPERCATEGORY/NUMBER.
    """
    names, tree = root / f"{split}{year}.json", root / year
    if not (tree.is_dir() and names.is_file()):
        raise UserError(f"there is no {names} or no folder {tree}; docs/finetune.md tells how to get them")
    classes = torchvision.datasets.INaturalist(root, year).all_categories
    numbers = {name: number for number, name in enumerate(classes)}
    # "train_val2018/Aves/2761/x.jpg": torchvision renames the tree
    files = [image["file_name"].split("/", 1)[1] for image in json.loads(names.read_text())["images"]]
    labels = [numbers[file.rsplit("/", 1)[0]] for file in files]
    return FolderSet([str(tree / file) for file in files], labels, classes, skip_broken)


def read_image(path: str | Path, enough: int | None = None) -> Image.Image:
    """The picture in a file, upright and RGB with 8 bits; transparent parts lie on white, as on a page.

    Of 16 bits the upper 8 are kept. A JPEG of 2, 4 or 8 times `enough` pixels a side is decoded at a half, a
    quarter or an eighth of its size, in less time. Raises UserError for a file that cannot be read.
    """
    try:
        with Image.open(path) as image:
            if enough is not None:
                image.draft("RGB", (enough, enough))
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
        raise UserError(f"{path} is not a readable image: {' '.join(str(error).split())}") from error


HIDDEN = re.compile(r"[/\\](\.|__MACOSX)")  # .DS_Store, .ipynb_checkpoints, ._cat.jpg and the like


def subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*") if p.is_dir() and not HIDDEN.match(f"/{p.name}"))


def find_images(folder: Path) -> tuple[list[str], list[str]]:
    """All images below a folder, sorted, and the other files there; their endings tell them apart."""
    found = (os.path.join(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
    files = sorted(path for path in found if not HIDDEN.search(path, len(str(folder))))
    images = [path for path in files if path.lower().endswith(torchvision.datasets.folder.IMG_EXTENSIONS)]
    return images, sorted(set(files) - set(images))


HELD_BYTES = 2**30  # a set of equally large images that needs less than this is held whole
LIKE = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}


def open_folder(root: Path, split: str, skip_broken: bool = False) -> DataSet:
    """The images in ROOT/SPLIT/CLASS/*: held if they are all of one size and small together, else streamed.

    The classes of `val` are those of ROOT/train, if there is one; it may lack some. In `train` none is empty.
    Without a ROOT/val a tenth of `train` takes its place, which depends on nothing but the files' names.
    """
    there, held_out = subfolders(root), split in LIKE and not (root / "val").is_dir()
    folder = root / ("train" if held_out else split)
    like = [root / name for name in there if name.lower() in LIKE.get(split, ())]
    if not (root / split).is_dir() and (like or "train" not in there):
        remedy = f"rename {like[0]}" if like else "--data-path must hold train/CLASS/*, val/CLASS/*"
        if there and not like and split == "train":
            remedy = f"move the class folders {', '.join(there[:9])} into it"
        raise UserError(f"there is no folder {root / split}; {remedy}")
    names = subfolders(folder)
    classes = (split == "val" and subfolders(root / "train")) or names
    if odd := sorted(set(names) - set(classes)):
        raise UserError(f"there is the class {odd[0]!r}, which train has not, in {folder}")
    data, others = FolderSet([], [], classes, skip_broken), []
    for name in names:
        images, rest = find_images(folder / name)
        if held_out:  # the 2nd, 12th, 22nd and so on: one at least of every class that can spare it
            images = [path for i, path in enumerate(images) if (i % 10 == 1) == (split == "val")]
        data.paths += images
        data.labels += [classes.index(name)] * len(images)
        others += rest
    if held_out and split == "val":
        print0(f"there is no {root / 'val'}: {len(data)} images of train are held out and take its place")
    elif others:
        endings = ", ".join(sorted({os.path.splitext(path)[1].lower() or "none" for path in others}))
        print0(f"left out of {folder}: {len(others)} files that are no images by their ending ({endings})")
    if not data.paths:
        raise UserError(f"there are no images for {split} in class folders below {folder}")
    if split == "train" and (empty := set(range(len(classes))) - set(data.labels)):
        raise UserError(f"there is no image in {folder / classes[min(empty)]}")
    if split == "train" and len(classes) == 1:
        raise UserError(f"a network of one class learns nothing, and {folder} has only {classes[0]!r}")
    images, kept = [], []
    for index, label in enumerate(data.labels):
        if image := data.read(index):
            images.append(to_tensor(image))
            kept.append(label)
            if len(data) * images[0].numel() > HELD_BYTES or images[-1].shape != images[0].shape:
                return data
    if not images:
        raise UserError(f"none of the images in {folder} can be read")
    return ArraySet(torch.stack(images), torch.tensor(kept), classes, data.broken)


SHAPES_COUNT = {"train": 8000, "val": 2000}
# How the data sets are opened: functions of (root, "train" or "val", skip_broken)
OPENERS = {
    "cifar10": partial(open_cifar, torchvision.datasets.CIFAR10),
    "cifar100": partial(open_cifar, torchvision.datasets.CIFAR100),
    "flowers102": open_flowers,
    "cars": open_cars,
    "inat2018": partial(open_inat, "2018"),
    "inat2019": partial(open_inat, "2019"),
    "imagenet": open_folder,
    "folder": open_folder,
}


def load_data(s: Settings, device: torch.device) -> tuple[DataSet, DataSet]:
    """The training and the validation images of the data set s.data. What the paper tests on is `val`."""
    return open_split(s, "train", device), open_split(s, "val", device)


def open_split(s: Settings, split: str, device: torch.device) -> DataSet:
    """A split of the data set s.data, with at most s.limit images, evenly spread (0: all).

    Raises UserError for what is missing or does not fit together.
    """
    if s.data in ("flowers102", "cars") and importlib.util.find_spec("scipy") is None:
        raise UserError(f"the labels of {s.data} are MATLAB files, read by scipy: pip install scipy")
    if s.data in ("folder", "imagenet") and not Path(s.data_path).is_dir():
        raise UserError(f"there is no folder {s.data_path}; name the data set's with --data-path")
    if s.data == "shapes":
        count = min(SHAPES_COUNT[split], s.limit or SHAPES_COUNT[split])
        if count * 3 * s.img_size**2 > 2**33:
            raise UserError(f"{count} shapes of {s.img_size} pixels are more than 8 GiB; lower --img-size")
        data = ArraySet(*draw_shapes(split, count, s.img_size), list(SHAPES))
    else:
        data = OPENERS[s.data](Path(s.data_path), split, s.skip_broken)
    if 0 < s.limit < len(data):
        data.keep([i * len(data) // s.limit for i in range(s.limit)])
    if isinstance(data, ArraySet):
        data.images, data.labels = data.images.to(device), data.labels.to(device)
    return data


# ---- Batches ----


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def crop_file(image: Image.Image, size: int, key: tuple | None) -> Tensor:
    """`random_crop` (with a key) or `center_crop` (without), done by Pillow: uint8 (3, size, size)."""
    if key is not None and image.size == (size, size) and size <= augment.SMALL_IMAGE:
        return pad_and_crop(to_tensor(image)[None], keyed_generator(*key))[0]
    if key is not None:
        top, left, high, wide = random_boxes(1, image.height, image.width, keyed_generator(*key))[0].tolist()
        image = image.crop((left, top, left + wide, top + high))
        return to_tensor(image.resize((size, size), Image.Resampling.BICUBIC))
    if image.size == (size, size):
        return to_tensor(image)
    if max(image.size) > 16 * min(image.size):  # of a very long image the far ends, which need much memory
        left, top = (max(0, (a - 16 * b) // 2) for a, b in (image.size, image.size[::-1]))
        image = image.crop((left, top, image.width - left, image.height - top))
    image = image.resize(augment.resize_size(*image.size, size=size), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a run is the main process's to answer; its end also ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def num_workers(s: Settings) -> int:
    """How many processes read image files for this one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return s.workers if s.workers >= 0 else max(1, min(8, (os.cpu_count() or 1) // local))


def load_batches(data: DataSet, plan: Iterable, s: Settings, device: torch.device) -> Iterator:
    """Batches uint8 (B, 3, S, S) and labels (B,) on the device, as `plan` asks for them: (indices, key).

    With a key of `keyed_generator` images are cropped at random, else in the center. `s` are the settings.
    """
    if isinstance(data, ArraySet):
        for indices, key in plan:
            index, size = to_device(torch.tensor(indices), device), s.img_size
            images = data.images[index]
            images = random_crop(images, size, keyed_generator(*key)) if key else center_crop(images, size)
            yield images, data.labels[index]
        return
    options = dict(
        num_workers=num_workers(s), worker_init_fn=ignore_signals, pin_memory=device.type == "cuda"
    )
    items = ((indices, key, s.img_size) for indices, key in plan)
    for batch in DataLoader(data, sampler=items, batch_size=None, **options):
        if isinstance(batch, UserError):
            raise batch
        images, labels, broken = batch
        data.broken.update(broken)
        yield to_device(images, device), to_device(labels, device)


def steps_per_epoch(data: DataSet, s: Settings) -> int:
    """How many steps an epoch has; raises UserError if not even one."""
    images = len(augment.RepeatedAugmentSampler(len(data), world_size(), rank(), s.repeats)) * world_size()
    if images < s.batch_size:
        raise UserError(f"--batch-size {s.batch_size} is more than an epoch's {images} images; lower it")
    return images // s.batch_size


def train_batches(data: DataSet, s: Settings, step: int, device: torch.device) -> Iterator:
    """The endless stream of this process's batches, across epochs, from step number `step` on.

    What is drawn depends on the seed, the rank and the batch's number alone: any step continues the stream.
    """
    sampler = augment.RepeatedAugmentSampler(len(data), world_size(), rank(), s.repeats, s.seed)
    per_epoch = steps_per_epoch(data, s) * s.accumulate
    micro_batch_size = s.batch_size // (world_size() * s.accumulate)  # images a forward pass

    def plan() -> Iterator[tuple[list[int], tuple | None]]:
        order = []
        for number in itertools.count(step * s.accumulate):
            epoch, place = divmod(number, per_epoch)
            if place == 0 or not order:
                sampler.set_epoch(epoch)
                order = list(sampler)
            key = None if s.augment == "off" else ("crop", s.seed, *divmod(number, s.accumulate), rank())
            yield order[place * micro_batch_size : (place + 1) * micro_batch_size], key

    return load_batches(data, plan(), s, device)


def eval_batches(data: DataSet, s: Settings, device: torch.device) -> Iterator:
    """This process's share of a data set: over all processes every image once."""
    share, size = list(range(rank(), len(data), world_size())), min(256, s.batch_size)
    return load_batches(data, [(share[i : i + size], None) for i in range(0, len(share), size)], s, device)
