"""The data sets, and the loader that brings uint8 batches to the device.

A set is either an `ArraySet`, small enough to be held whole as one uint8 tensor on the device and cropped
there, or a `FolderSet`, streamed from files by worker processes that only decode and crop. Both hand out
batches of images uint8 (B, 3, S, S) and labels int64 (B,).
"""

import itertools
import json
import os
import signal
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

import augment
from augment import center_crop, keyed_generator, random_crop, to_device
from devices import all_gather, main_process_first
from image_files import HIDDEN, crop_file, find_images, read_image, to_tensor
from launch import STOP_SIGNALS, UserError, hash_of, print0, rank, world_size
from settings import Settings
from shapes import SHAPES, draw_shapes

# ---- Data sets ----


@dataclass
class ArraySet:
    """A data set held whole, on the training device."""

    images: Tensor  # uint8 (N, 3, H, W)
    labels: Tensor  # int64 (N,)
    classes: list[str]
    broken: set[str] = field(default_factory=set)  # the files that could not be read and were left out

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the images and their labels."""
        return hash_of(self.images.cpu().numpy(), self.labels.tolist(), self.classes)

    @property
    def names(self) -> str:
        """The same, which is all that processes can compare."""
        return self.fingerprint


@dataclass
class FolderSet:
    """A data set left in its files."""

    paths: list[str]
    labels: list[int]
    classes: list[str]
    skip_broken: bool  # a file that cannot be read is left out, and put into `broken`
    broken: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def names(self) -> str:
        """A hash of the files' paths below their common folder, and of their labels."""
        root = len(os.path.commonpath(self.paths))
        return hash_of([path[root:] for path in self.paths], self.labels, self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names and of the files' sizes and times of change, as rank 0 has them."""
        stats = [os.stat(path) for path in self.paths if os.path.exists(path)] if rank() == 0 else []
        return all_gather(hash_of(self.names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]))[0]

    def read(self, index: int, enough: int | None = None) -> Image.Image | None:
        """A picture as `read_image` gives it; None for one that is left out, and then in `broken`."""
        try:
            return read_image(self.paths[index], enough)
        except UserError as error:
            if not self.skip_broken:
                raise UserError(f"{error}; training with --skip-broken leaves such files out") from error
            self.broken.add(self.paths[index])

    def __getitem__(self, item: tuple) -> tuple[Tensor, list[int], set[str]] | UserError:
        """Of (indices, key, size): crops uint8 (B, 3, size, size), their labels, all `broken` so far."""
        indices, key, size = item
        crops = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
        readable = []  # places in the batch
        # Repeated augmentation puts an image's repeats side by side: decode it once
        for index, places in itertools.groupby(range(len(indices)), indices.__getitem__):
            try:  # the smallest crop, 8 % of the area, has a quarter of a side or more: it fills the output
                image = self.read(index, None if key is None else 4 * size)
            except UserError as error:
                return error  # raised in a worker, it would lose its one line and delay the program's end
            for place in places if image else ():
                crops[place] = crop_file(image, size, None if key is None else (*key, place))
                readable.append(place)
        if key is not None:  # in training others of the batch take the places of the broken ones
            if not readable:
                return UserError(f"none of the images of a batch can be read; one is {min(self.broken)}")
            readable = [readable[place % len(readable)] for place in range(len(indices))]
        crops, labels = crops[readable], [self.labels[indices[place]] for place in readable]
        try:
            if get_worker_info():  # the workers' queue does the same, but an error there has no answer
                crops.share_memory_()
        except RuntimeError as error:
            remedy = "give it more, as with docker run --shm-size 8g, or add --workers 0"
            return UserError(f"there is no shared memory for a batch: {error}; {remedy}")
        return crops, labels, self.broken


DataSet = ArraySet | FolderSet


HELD_BYTES = 2**30  # a set of equally large images that needs less than this is held whole


def subfolders(folder: Path) -> list[str]:
    """The class folders in a folder, sorted; a link to the folder itself or one above it is none."""
    paths = [path for path in folder.glob("*") if path.is_dir() and not HIDDEN.match(f"/{path.name}")]
    return sorted(path.name for path in paths if not folder.resolve().is_relative_to(path.resolve()))


def held_out_tenth(paths: list[str], folder: Path) -> list[str]:
    """The images of a class that take the place of a validation set: one at least if there are two or more.

    Which they are depends on the hash of each one's own path, so that new files seldom move another one.
    """
    places = {path: zlib.crc32(os.fsencode(os.path.relpath(path, folder))) / 2**32 for path in paths}
    tenth = sum(place < 0.1 for place in places.values())
    return sorted(places, key=places.get)[: min(max(tenth, 1), len(paths) // 2)]


def split_folder(root: Path, split: str) -> tuple[Path, bool]:
    """The folder of a split in a tree of pictures, and whether `val` is held out of the training images.

    Class folders directly in the root are training images; a `test` is never taken for validation.
    """
    val = next((root / name for name in ("val", "valid", "validation") if (root / name).is_dir()), None)
    classes = {name.lower() for name in subfolders(root)}
    direct = classes and not classes & {"train", "val", "valid", "validation", "test"}
    train = root if direct else root / "train"
    held_out = val is None and split in ("train", "val")
    return {"train": train, "val": val or train}.get(split, root / split), held_out


def list_folder(s: Settings, split: str) -> tuple[FolderSet, Path]:
    """The images of a split, from `open_folder`'s tree, and the folder that they are in."""
    root = Path(s.data_path)
    folder, held_out = split_folder(root, split)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; --data-path must hold train/CLASS/*, val/CLASS/*")
    known = subfolders(split_folder(root, "train")[0]) if split == "val" else []
    classes = known or subfolders(folder)
    data, others = FolderSet([], [], classes, s.skip_broken), []
    for name in subfolders(folder):
        if name not in classes:
            raise UserError(f"there is the class {name!r}, which train has not, in {folder}")
        images, no_images = find_images(folder / name)
        if held_out:
            val = held_out_tenth(images, folder)
            images = val if split == "val" else sorted(set(images) - set(val))
        data.paths += images
        data.labels += [classes.index(name)] * len(images)
        others += no_images
    if held_out and split == "val":
        print0(f"there is no {root / 'val'}: {len(data)} images are held out of training and take its place")
    elif others:
        endings = ", ".join(sorted({os.path.splitext(path)[1].lower() or "none" for path in others}))
        print0(f"left out of {folder}: {len(others)} files that are no images by their ending ({endings})")
    return data, folder


def hold(data: FolderSet) -> DataSet:
    """The images as one tensor if they are all of one size and small together, else as they are."""
    images, labels = None, []
    for index, label in enumerate(data.labels):
        if (image := data.read(index)) is None:
            continue
        image = to_tensor(image)
        if images is None and len(data) * image.numel() <= HELD_BYTES:
            images = torch.empty(len(data), *image.shape, dtype=torch.uint8)
        if images is None or image.shape != images.shape[1:]:
            return data
        images[len(labels)] = image
        labels.append(label)
    count = len(labels)
    return ArraySet(images[:count], torch.tensor(labels), data.classes, data.broken) if count else data


def open_folder(s: Settings, split: str) -> DataSet:
    """The images in ROOT/SPLIT/CLASS/*, where ROOT is s.data_path and SPLIT may be any folder's name.

    The classes of `val` (or `valid`, `validation`) are those of `train`; it may lack some. In `train` none is
    empty. Without it a tenth of the training images takes its place, by their names.
    """
    data, folder = list_folder(s, split)
    if not data.paths:
        raise UserError(f"there are no images for {split} in class folders below {folder}")
    empty = [data.classes[label] for label in sorted(set(range(len(data.classes))) - set(data.labels))]
    if empty and split == "train":
        raise UserError(f"there is no image in {folder / empty[0]}")
    if empty and split == "val":
        print0(f"{len(empty)} of {len(data.classes)} classes have no validation images, such as {empty[0]!r}")
    if split == "train" and len(data.classes) == 1:
        raise UserError(f"a network of one class learns nothing, and {folder} has only {data.classes[0]!r}")
    return hold(data)


def open_shapes(s: Settings, split: str) -> ArraySet:
    """The program's own toy data set, at s.img_size pixels."""
    count = {"train": 8000, "val": 2000}[split]
    return ArraySet(*draw_shapes(split, min(count, s.limit or count), s.img_size), list(SHAPES))


def from_torchvision(kind: type, s: Settings, **options):
    """A data set of torchvision in s.data_path."""
    try:
        return main_process_first(lambda: kind(s.data_path, **options))
    except Exception as error:  # a damaged file can make its reader raise anything
        text = f"could not get {kind.__name__} into {s.data_path}: {error}"
        raise UserError(f"{text}; name the folder that has it with --data-path") from error


def open_cifar(s: Settings, split: str) -> ArraySet:
    """CIFAR-10 or CIFAR-100."""
    kind = getattr(torchvision.datasets, s.data.upper())
    cifar = from_torchvision(kind, s, train=split == "train", download=True)
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return ArraySet(images, torch.tensor(cifar.targets), cifar.classes)


def open_flowers(s: Settings, split: str) -> FolderSet:
    """Oxford Flowers-102. Table 8 trains on its train and val splits together, and tests on its test."""
    kind, names = torchvision.datasets.Flowers102, ["train", "val"] if split == "train" else ["test"]
    parts = [from_torchvision(kind, s, split=name, download=True) for name in names]
    paths = [str(path) for part in parts for path in part._image_files]
    labels = [label for part in parts for label in part._labels]
    classes = getattr(kind, "classes", [f"flower {n}" for n in range(1, 103)])  # torchvision 0.22 names them
    return FolderSet(paths, labels, list(classes), s.skip_broken)


def open_cars(s: Settings, split: str) -> FolderSet:
    """Stanford Cars, which nobody offers for download any more: torchvision reads what one has of it."""
    name = "train" if split == "train" else "test"
    cars = from_torchvision(torchvision.datasets.StanfordCars, s, split=name)
    paths, labels = zip(*cars._samples, strict=True)
    return FolderSet(list(paths), list(map(int, labels)), list(map(str, cars.classes)), s.skip_broken)


def open_inat(s: Settings, split: str) -> FolderSet:
    """iNaturalist 2018 or 2019: torchvision's tree of all pictures, cut by the competition's two lists."""
    year = s.data.removeprefix("inat")
    tree, listed = Path(s.data_path, year), Path(s.data_path, f"{split}{year}.json")
    if not (tree.is_dir() and listed.is_file()):
        raise UserError(f"there is no {listed} or no folder {tree}; docs/finetune.md tells how to get them")
    classes = torchvision.datasets.INaturalist(s.data_path, year).all_categories  # SUPERCATEGORY/NUMBER
    numbers = {name: number for number, name in enumerate(classes)}
    # "train_val2018/Aves/2761/x.jpg": torchvision renames the tree
    files = [image["file_name"].split("/", 1)[1] for image in json.loads(listed.read_text())["images"]]
    labels = [numbers[file.rsplit("/", 1)[0]] for file in files]
    return FolderSet([str(tree / file) for file in files], labels, classes, s.skip_broken)


OPENERS = {
    "shapes": open_shapes,
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "flowers102": open_flowers,
    "cars": open_cars,
    "inat2018": open_inat,
    "inat2019": open_inat,
    "imagenet": open_folder,
    "folder": open_folder,
}


def open_split(s: Settings, split: str, device: torch.device) -> DataSet:
    """A split of s.data, or s.limit of its images, evenly spread. Raises UserError for what is missing."""
    data = OPENERS[s.data](s, split)
    count = min(s.limit or len(data), len(data))
    kept = [i * len(data) // count for i in range(count)]
    if isinstance(data, ArraySet):
        data.images, data.labels = data.images[kept].to(device), data.labels[kept].to(device)
    else:
        data.paths, data.labels = [data.paths[i] for i in kept], [data.labels[i] for i in kept]
    return data


def load_data(s: Settings, device: torch.device) -> tuple[DataSet, DataSet]:
    """The training and the validation images of the data set s.data. What the paper tests on is `val`."""
    return open_split(s, "train", device), open_split(s, "val", device)


# ---- Batches ----


def ignore_signals(worker: int) -> None:
    """A signal to all processes of a run is the main process's to answer; its end also ends the workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def load_batches(data: DataSet, plan: Iterable, s: Settings, device: torch.device) -> Iterator:
    """Batches uint8 (B, 3, S, S) and labels int64 (B,) on the device. `plan`: indices and the crops' keys."""
    if isinstance(data, ArraySet):
        for indices, key in plan:
            index, size = to_device(torch.tensor(indices), device), s.img_size
            images = data.images[index]
            crops = random_crop(images, size, keyed_generator(*key)) if key else center_crop(images, size)
            yield crops, data.labels[index]
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = s.workers if s.workers >= 0 else max(1, min(8, cores // processes))
    options = dict(num_workers=workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    items = ((indices, key, s.img_size) for indices, key in plan)
    for batch in DataLoader(data, sampler=items, batch_size=None, **options):
        if isinstance(batch, UserError):
            raise batch
        images, labels, broken = batch
        data.broken.update(broken)
        yield to_device(images, device), to_device(torch.tensor(labels), device)


def steps_per_epoch(data: DataSet, s: Settings) -> int:
    """How many steps an epoch has; raises UserError if not even one."""
    images = len(augment.RepeatedAugmentSampler(len(data), world_size(), rank(), s.repeats)) * world_size()
    if images < s.batch_size:
        raise UserError(f"--batch-size {s.batch_size} is more than an epoch's {images} images; lower it")
    return images // s.batch_size


def train_batches(data: DataSet, s: Settings, step: int, device: torch.device) -> Iterator:
    """The endless stream of this process's batches from a step on; where it starts changes none of them."""
    sampler = augment.RepeatedAugmentSampler(len(data), world_size(), rank(), s.repeats, s.seed)
    per_epoch = steps_per_epoch(data, s)
    micro_batch_size = s.batch_size // (world_size() * s.accumulate)  # images a forward pass

    def plan() -> Iterator[tuple[list[int], tuple | None]]:
        for epoch in itertools.count(step // per_epoch):
            sampler.set_epoch(epoch)
            order = iter(sampler)
            for number in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                for part in range(s.accumulate):
                    indices = list(itertools.islice(order, micro_batch_size))
                    key = None if s.augment == "off" else ("crop", s.seed, number, part, rank())
                    if number >= step:
                        yield indices, key

    return load_batches(data, plan(), s, device)


def eval_batches(data: DataSet, s: Settings, device: torch.device) -> Iterator:
    """This process's share of a data set: over all processes every image once."""
    share, size = list(range(rank(), len(data), world_size())), min(256, s.batch_size)
    return load_batches(data, [(share[i : i + size], None) for i in range(0, len(share), size)], s, device)
