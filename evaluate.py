"""What one measures or looks at after training; a word for each.

python evaluate.py accuracy runs/shapes-tiny-hard/last.pth --per-class
torchrun --nproc_per_node 8 evaluate.py accuracy deit_small_distilled --data-path IMAGENET --real real.json
python evaluate.py accuracy deit_small --val imagenetv2-matched-frequency-format-val
python evaluate.py compare regnet_y_16gf deit_base deit_base_distilled --data-path IMAGENET
python evaluate.py tokens runs/shapes-tiny-hard/last.pth
python evaluate.py throughput --model regnet_y_16gf
python evaluate.py attention runs/shapes-tiny-hard/last.pth photo.jpg --out attention.png
python evaluate.py predict deit_base_distilled photo.jpg FOLDER --top 3
find FOLDER -iname "*.jpg" | python evaluate.py predict runs/shapes-tiny-hard/last.pth - --json
python evaluate.py curves runs/shapes-tiny-none runs/shapes-tiny-hard --out curves.png
python evaluate.py augmentations --out augmentations.png

CKPT is a checkpoint of train.py or finetune.py, one of the authors' (a file, a URL, or a short name such as
deit_base_distilled), or the name of a torchvision classifier, with its published ImageNet weights. The file
is long because it has a word for each table of the paper and each picture; none needs another to be read.
"""

import copy
import inspect
import json
import os
import re
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import launch
import pictures
from augment import OPERATIONS, Augment, keyed_generator, normalize
from data import (
    DataSet,
    FolderSet,
    crop_file,
    eval_batches,
    find_images,
    load_batches,
    open_split,
    read_image,
    subfolders,
    to_tensor,
)
from distill import label_loss
from launch import (
    UserError,
    all_gather,
    all_reduce,
    autocast,
    choose_precision,
    print0,
    printable,
    rank,
    world_size,
)
from model import DeiT, fuse
from networks import check_classes, check_sizes, is_imagenet, load_network
from settings import COUNT, DEVICES, PIXELS, PRECISIONS, RECIPES, Parser, Settings, complete
from shapes import SHAPES, draw_shapes
from train import HEADS, accuracy_line, build_network, build_optimizer, predictions

# ---- Any network, and any validation set to look at it on ----


def open_network(source: str, arguments: Namespace) -> tuple[nn.Module, Settings]:
    """A frozen network on its device, with `source` and `num_classes`, and the settings it was trained with.

    `source` is what this file's head calls CKPT; what it does not tell of its settings is the paper's.
    """
    network, saved = load_network(source)
    network.source = source
    precision = choose_precision(getattr(arguments, "precision", "auto"), arguments.device.type)
    s = checkpoint.from_saved(saved, workers=-1, precision=precision)
    s.img_size = network.img_size
    return network.to(arguments.device), s


def class_names(network: nn.Module) -> list[str]:
    """What to call a network's classes: as in training, but ImageNet's by words."""
    if is_imagenet(network.classes, network.num_classes):
        return torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"]
    return network.classes or [f"class {number}" for number in range(network.num_classes)]


def class_indices(source: str, network: nn.Module, num_classes: int, names: list[str]) -> list[int]:
    """The network's class for each class of a data set: by name, else by number (ImageNet-V2), else by place.

    Raises UserError for classes that the network does not know.
    """
    known = network.classes
    if known and set(names) <= set(known):
        return [known.index(name) for name in names]
    numbers = all(name.isdecimal() and int(name) < num_classes for name in names)
    if numbers and (known is None or is_imagenet(known, num_classes)):
        return [int(name) for name in names]
    if known is None and len(names) == num_classes:
        check_classes(source, None, names)
        return list(range(num_classes))
    odd = next(name for name in names if name not in (known or ()))
    raise UserError(f"{source} knows {num_classes} other classes; the data set has {odd!r}; see --data")


def open_val(network: nn.Module, s: Settings, arguments: Namespace) -> tuple[DataSet, Tensor, str | Path]:
    """The validation set, its labels int64 (n,) as the network numbers them, and its name or folder."""
    split = "val"
    if arguments.val:
        if arguments.data or arguments.data_path:
            raise UserError("--val names the validation images itself; leave out --data and --data-path")
        folder, split = Path(arguments.val).parent, Path(arguments.val).name
        s.data, s.data_path, s.limit, s.skip_broken = "folder", folder, 0, False
    else:
        s.limit = s.limit if arguments.data in (None, s.data) else 0
        s.data, s.data_path = arguments.data or s.data, arguments.data_path or s.data_path
    data = open_split(s, split, arguments.device)
    indices = torch.tensor(class_indices(network.source, network, network.num_classes, data.classes))
    called = Path(s.data_path) / split
    called = called if s.data in ("imagenet", "folder") and called.is_dir() else s.data
    return data, indices[torch.as_tensor(data.labels).cpu()], called


def ranking(network: nn.Module, data: DataSet, s: Settings, device: torch.device) -> Tensor:
    """Each head's first classes for every image: int64 (n, heads, min(5, C)), in the data's order.

    The same on every process. Of equal scores the class of lower index is first, as with argmax. Images that
    cannot be read, and were left out, have -1.
    """
    chunks = []
    for _, scores in predictions(network, data, s, device):
        orders = [head.argsort(dim=1, descending=True, stable=True)[:, :5] for head in scores]
        chunks.append(torch.stack(orders, dim=1).cpu())
    own = range(rank(), len(data), world_size())
    if isinstance(data, FolderSet):
        own = [index for index in own if data.paths[index] not in data.broken]
    shares = [(own, torch.cat(parts)) for own, parts in all_gather((list(own), chunks)) if parts]
    first = torch.full((len(data), *shares[0][1].shape[1:]), -1)
    for indices, share in shares:
        first[indices] = share
    return first


# ---- accuracy: Tables 3 and 5 ----


def percent(hits: Tensor) -> dict[str, float]:
    """Percent of images by head, from hits bool (n, heads)."""
    return dict(zip(HEADS, (100 * hits.double().mean(dim=0)).tolist(), strict=False))


def real_labels(path: str, root: str | Path) -> list[list[int]]:
    """ImageNet-Real's labels (Beyer et al., 2020) of the images below root, in the order of a data set.

    The file is a list of lists of class indices, one for each ILSVRC2012_val_00000001.JPEG and so on.
    """
    if not isinstance(root, Path):
        raise UserError(f"--real is about ImageNet's validation files, not {root}")
    files = [path for name in subfolders(root) for path in find_images(root / name)[0]]
    try:
        labels = json.loads(Path(path).read_bytes())
        numbers = [int(re.fullmatch(r"ILSVRC2012_val_(\d+)", Path(file).stem)[1]) for file in files]
        return [[int(label) for label in labels[number - 1]] for number in numbers]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} and ImageNet's validation files, ILSVRC2012_val_*, do not fit") from error


def accuracy(arguments: Namespace) -> None:
    """Top-1 and top-5 accuracy of every head of every checkpoint, on one validation set.

    Of equal scores the class of lower index comes first. Top-5 is left out where there are five classes or
    fewer. With --real also ImageNet-Real: a prediction is right if it is one of the image's labels, and
    images without any do not count. Several processes (torchrun) share the images; each counts once.
    """
    for source in arguments.checkpoints:
        network, s = open_network(source, arguments)
        data, labels, called = open_val(network, s, arguments)
        real = real_labels(arguments.real, called) if arguments.real else []
        first = ranking(network, data, s, arguments.device)
        seen = first[:, 0, 0] >= 0
        real = [own for own, kept in zip(real, seen.tolist(), strict=False) if kept]
        first, labels = first[seen], labels[seen]
        hits = first == labels[:, None, None]
        print0(f"{source}: {len(labels)} images of {called}")
        print0(f"  top-1  {accuracy_line(percent(hits[:, :, 0]))}")
        if network.num_classes > 5:
            print0(f"  top-5  {accuracy_line(percent(hits.any(dim=2)))}")
        if real:
            top = first[:, :, 0].tolist()
            right = [[p in own for p in heads] for heads, own in zip(top, real, strict=True) if own]
            print0(f"  Real   {accuracy_line(percent(torch.tensor(right)))}  ({len(right)} images)")
        if arguments.per_class:
            names = class_names(network)
            print0("".join(f"{word:>14}" for word in ("images", *HEADS[: hits.shape[1]])) + "  class")
            for label in labels.unique().tolist():
                own = hits[labels == label, :, 0]
                cells = "".join(f"{share:14.2f}" for share in percent(own).values())
                print0(f"{len(own):14}{cells}  {names[label]}")


# ---- compare: Table 4 ----


def short_names(sources: list[str]) -> list[str]:
    """The last part of each path, for `last.pth` its folder; the whole paths if two are the same."""
    short = [Path(source.removesuffix("/last.pth")).name or source for source in sources]
    return short if len(set(short)) == len(short) else sources


def disagreement(decisions: Tensor) -> Tensor:
    """The share of images that each pair decides differently: int (rows, n) -> float (rows, rows)."""
    return (decisions[:, None] != decisions[None]).double().mean(dim=2)


def compare(arguments: Namespace) -> None:
    """Percent of images classified differently by each pair of classifiers (Table 4).

    The classifiers are the ground truth and every head of every checkpoint. The validation set is the one
    that the first checkpoint was trained with, if none is named. With --out also a picture of the eight
    images that most pairs decide differently.
    """
    rows, decisions, classes, shared = ["ground truth"], [], None, None
    for source, name in zip(arguments.checkpoints, short_names(arguments.checkpoints), strict=True):
        network, s = open_network(source, arguments)
        shared = shared or {key: getattr(s, key) for key in ("data", "data_path", "limit", "skip_broken")}
        vars(s).update(shared)
        data, labels, called = open_val(network, s, arguments)
        classes = classes or class_names(network)
        if class_names(network) != classes:
            raise UserError(f"{source} numbers its classes otherwise than {arguments.checkpoints[0]}")
        first = ranking(network, data, s, arguments.device)[:, :, 0]
        decisions += [*([] if decisions else [labels]), *first.unbind(1)]
        rows += [f"{name} {head}" if first.shape[1] > 1 else name for head in HEADS[: first.shape[1]]]
    decisions = torch.stack(decisions)
    readable = (decisions >= 0).all(dim=0).nonzero().squeeze(1)
    decisions = decisions[:, readable]
    width = max(map(len, rows)) + 3
    print0(f"percent of the {decisions.shape[1]} images of {called} that are classified differently")
    print0(" " * width + "".join(f"{number:>6}" for number in range(len(rows))))
    for number, (row, values) in enumerate(zip(rows, disagreement(decisions), strict=True)):
        cells = "".join(f"{100 * value:6.1f}" for value in values.tolist())
        print0(f"{f'{number} {printable(row)}':{width}}{cells}")
    if arguments.out and rank() == 0:
        pairs = (decisions[:, None] != decisions[None]).sum(dim=(0, 1))
        odd = pairs.argsort(descending=True, stable=True)[:8]
        ((images, _),) = load_batches(data, [(readable[odd].tolist(), None)], s, arguments.device)
        found = pictures.to_pictures(images.cpu())
        sheet = pictures.sheet(pictures.disagreement_rows(found, decisions[:, odd], rows, classes), 96)
        pictures.save_picture(lambda out: sheet.save(out, optimize=True), arguments.out)


# ---- tokens: the analysis of the two tokens in section 5.2 ----


def tokens(arguments: Namespace) -> None:
    """Cosine between the two token parameters, and the mean one of their embeddings after every layer."""
    for source in arguments.checkpoints:
        network, s = open_network(source, arguments)
        if not getattr(network, "distilled", False):
            raise UserError(f"{source} has no distillation token to compare with its class token")
        data, _, _ = open_val(network, s, arguments)
        parameters = F.cosine_similarity(network.cls_token, network.dist_token, dim=-1).item()
        sums = torch.zeros(len(network.blocks), device=arguments.device)
        for images, _ in eval_batches(data, s, arguments.device):
            x = network.embed(normalize(images))
            for layer, block in enumerate(network.blocks):
                x = block(x)
                sums[layer] += F.cosine_similarity(x[:, 0], x[:, 1], dim=-1).sum()
        cosines = " ".join(f"{cosine:.3f}" for cosine in (all_reduce(sums) / len(data)).tolist())
        print0(f"{source}: the two parameters {parameters:.3f}; after each layer\n  {cosines}")


# ---- throughput: Table 1 and Figure 1 ----


def count_flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of one image's inference, a multiply-add counting two: torch's counter."""
    network = copy.deepcopy(network).eval().to("meta")  # where nothing is computed
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def seconds(act: Callable[[], object], runs: int, device: torch.device) -> float:
    """The mean time of one act() over so many runs, after 3 that do not count."""
    wait = getattr(torch, device.type).synchronize
    for run in range(-3, runs):
        if run == 0:
            wait()
            started = time.perf_counter()
        act()
    wait()
    return (time.perf_counter() - started) / runs


def matmul_peak(dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """FLOP/s of the best of several square matrix products, and their side."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ b, 3, device) for _ in range(5)), side


def throughput(arguments: Namespace) -> None:
    """Images/s of inference and of training steps, and the share of the device's own peak that they reach.

    The mean of 30 runs, as in the paper, which takes the largest batch that fits: raise --batch-size until
    one does not. A training step is forward, loss, backward and optimizer, without data, teacher and
    augmentation (which has a line of its own); it counts three times the FLOPs of inference. The peak is the
    best of several large matrix products of the same precision.
    """
    device, runs = arguments.device, arguments.runs
    precision = choose_precision(arguments.precision, device.type)
    sizes = {name: getattr(arguments, name) for name in ("model", "img_size", "patch_size")}
    s = complete({"data": "imagenet", "distill": "label" if arguments.distilled else "none"} | sizes)
    if s.distilled != arguments.distilled:
        raise UserError("--distilled is about a second token, which only tiny, small and base have")
    check_sizes(s.model, s, 2)
    network = build_network(s, 1000).to(device)
    model = torch.compile(network) if arguments.compile else network
    optimizer, dtype = build_optimizer(network, s), launch.DTYPES[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    count = arguments.batch_size or (512 if device.type == "cuda" else 16)
    images = torch.randint(256, (count, 3, s.img_size, s.img_size), dtype=torch.uint8, device=device)
    inputs, labels = normalize(images), torch.arange(count, device=device) % 1000

    @torch.no_grad()
    def inference() -> None:
        with autocast(precision, device):
            model(inputs)

    def training() -> None:
        with autocast(precision, device):
            loss = label_loss(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    flops, weights = count_flops(network, s.img_size), sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{s.model} at {s.img_size} pixels: {weights:.1f} M parameters, {flops / 1e9:.2f} GFLOP an image")
    print(f"{str(dtype).removeprefix('torch.')} on {device} ({name}), torch {torch.__version__}")
    peak, side = matmul_peak(dtype, device)
    print(f"peak          {peak / 1e12:.3g} TFLOP/s, the best of 5 products of {side} × {side} matrices")
    for step, cost in ((inference, flops), (training, 3 * flops)):
        model.train(step is training)
        rate = count / seconds(step, runs, device)
        print(f"{step.__name__:12}  {rate:.1f} images/s, batch {count}, mean of {runs} runs; ", end="")
        print(f"{rate * cost / 1e12:.3g} TFLOP/s, {100 * rate * cost / peak:.1f} % of the peak", flush=True)
    augment, generator = Augment(1000), keyed_generator("throughput")
    rate = count / seconds(lambda: augment(images, labels, generator), runs, device)
    print(f"augmentation  {rate:.1f} images/s, batch {count}, mean of {runs} runs")


# ---- Pictures ----


def attention(arguments: Namespace) -> None:
    """A picture of what each head of a layer attends to from the class and from the distillation token.

    Beside them the attention rollout of the layers up to that one. Yellow is a map's own largest share of the
    attention paid to patches, which is told below it; attention to the tokens themselves is not shown.
    """
    network, _ = open_network(arguments.checkpoint, arguments)
    if not isinstance(network, DeiT):
        raise UserError(f"{arguments.checkpoint} is no transformer of ours; it has no tokens that attend")
    layer = arguments.layer or len(network.blocks)
    if layer > len(network.blocks):
        raise UserError(f"--layer {layer}: the network has {len(network.blocks)} layers")
    images = [read_image(path) for path in arguments.images]
    rows = [row for image in images for row in pictures.attention_rows(network, image, layer, HEADS, 112)]
    pictures.save_picture(lambda out: pictures.sheet(rows, 112).save(out, optimize=True), arguments.out)


def curves(arguments: Namespace) -> None:
    """A picture of the training loss and of each head's accuracy in validation, by epoch, of several runs."""
    logs = {}
    for run, name in zip(arguments.runs, short_names(arguments.runs), strict=True):
        try:
            logs[name] = checkpoint.read_log(Path(run))
            [(record["epoch"], record["loss"], record["accuracy"]["class"]) for record in logs[name]]
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{run}/log.jsonl is not the log of a run") from error
        if not logs[name]:
            raise UserError(f"{run} holds no run with an epoch in its log.jsonl")
    pictures.draw_curves(logs, HEADS, arguments.out)


def augmentations(arguments: Namespace) -> None:
    """A labeled sheet: six of RandAugment's operations by magnitude, and whole batches with their targets."""
    if arguments.images:
        whole = [read_image(path).resize((224, 224), Image.Resampling.BICUBIC) for path in arguments.images]
        folders = [Path(path).absolute().parent.name for path in arguments.images]
        images, classes = torch.stack([to_tensor(image) for image in whole]), sorted(set(folders))
        labels = torch.tensor([classes.index(folder) for folder in folders])
    else:
        (images, labels), classes = draw_shapes("val", 10, 64), list(SHAPES)
    names = OPERATIONS if arguments.all else pictures.SIX
    rows = pictures.augmentation_rows(images, labels, classes, arguments.seed, names)
    pictures.save_picture(lambda out: pictures.sheet(rows, 72).save(out, optimize=True), arguments.out)


# ---- predict: names and probabilities ----


def image_paths(words: list[str]) -> Iterator[str]:
    """The images that the words name: files, folders (all images below, sorted), `-` for paths on stdin."""
    for word in words:
        if word == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        elif Path(word).is_dir():
            if not (found := find_images(Path(word))[0]):
                raise UserError(f"there are no images below {word}")
            yield from found
        else:
            yield word


def predict(arguments: Namespace) -> None:
    """The most probable classes of images, by each head and fused.

    An image that cannot be read is told on standard error; the others go on, and the exit code is 2 at the
    end. With --json a line of JSON an image: {"image": path, head: [{"name": class, "probability": p}, ...]}.
    `fused` is always among the heads; of a network with one head it is that one's.
    """
    network, s = open_network(arguments.checkpoint, arguments)
    names, failed = class_names(network), False
    for path in image_paths(arguments.images):
        try:
            crop = crop_file(read_image(path), s.img_size, None)
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            failed = True
            continue
        with autocast(s.precision, arguments.device):
            outputs = network(normalize(crop[None].to(arguments.device)))
        found = {}
        heads = [outputs] if isinstance(outputs, Tensor) else [*outputs, outputs]
        for head, logits in zip(HEADS, heads, strict=False):
            top = fuse(logits)[0].topk(min(arguments.top, len(names)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            found[head] = [{"name": names[label], "probability": share} for label, share in pairs]
        if arguments.json:
            print(json.dumps({"image": path, "fused": found["class"]} | found), flush=True)
            continue
        print(printable(path))
        for head, top in found.items():
            told = (f"{each['name']} {100 * each['probability']:.1f} %" for each in top)
            print(f"  {head:14}{printable('   '.join(told))}", flush=True)
    if failed:
        sys.exit(2)


# ---- The program ----

CKPT = dict(metavar="CKPT", help="a checkpoint, an official one's short name, or a torchvision classifier")
VAL = {
    "checkpoints": CKPT | {"nargs": "+"},
    "--data": dict(choices=tuple(RECIPES), help="data set [the one each was trained on]"),
    "--data-path": dict(metavar="DIR", help="where it is [where it was in training]"),
    "--val": dict(metavar="DIR", help="instead: DIR/CLASS/*, classes by name or number (ImageNet-V2)"),
}
PRECISION = {"--precision": dict(choices=PRECISIONS, default="auto", help="[auto]")}
# Each word's function and its arguments; the first line of its docstring is its line in --help
WORDS = {
    accuracy: VAL | PRECISION | {
        "--per-class": dict(action="store_true", help="top-1 of every class too"),
        "--real": dict(metavar="JSON", help="ImageNet-Real's label file, real.json"),
    },
    compare: VAL | PRECISION | {
        "--out": dict(metavar="PNG", help="a picture of images that they decide differently"),
    },
    tokens: VAL,
    throughput: PRECISION | {
        "--model": dict(default="tiny", help="a network, as in train.py [tiny]"),
        "--img-size": dict(type=PIXELS, default=224, help="side of the images, pixels [224]"),
        "--patch-size": dict(type=PIXELS, default=16, help="side of a patch, pixels [16]"),
        "--distilled": dict(action="store_true", help="with a distillation token"),
        "--batch-size": dict(type=COUNT, help="images [512; 16 without a GPU]"),
        "--runs": dict(type=COUNT, default=30, help="how many to take the mean of [30]"),
        "--compile": dict(action="store_true", help="use torch.compile"),
    },
    attention: {
        "checkpoint": CKPT,
        "images": dict(nargs="+", metavar="IMAGE", help="image files"),
        "--layer": dict(type=COUNT, help="from 1 [the last]"),
        "--out": dict(metavar="PNG", default="attention.png", help="[attention.png]"),
    },
    predict: {
        "checkpoint": CKPT,
        "images": dict(nargs="+", metavar="IMAGE", help="files, folders, or - for a list on standard input"),
        "--json": dict(action="store_true", help="a line of JSON an image"),
        "--top": dict(type=COUNT, default=5, metavar="K", help="how many classes [5]"),
    },
    curves: {
        "runs": dict(nargs="+", metavar="RUN", help="directories of runs"),
        "--out": dict(metavar="PNG", default="curves.png", help="[curves.png]"),
    },
    augmentations: {
        "images": dict(nargs="*", metavar="IMAGE", help="files; their folders name classes [ten shapes]"),
        "--out": dict(metavar="PNG", default="augmentations.png", help="[augmentations.png]"),
        "--all": dict(action="store_true", help="every operation instead of six"),
        "--seed": dict(type=int, default=0, help="of the whole batches [0]"),
    },
}  # fmt: skip


def main() -> None:
    raw = dict(allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser = Parser(prog="evaluate.py", description=__doc__, **raw)
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for act, options in WORDS.items():
        examples = [line for line in __doc__.splitlines() if f"evaluate.py {act.__name__} " in line]
        text, about = inspect.getdoc(act), "\n".join(["examples:", *examples, "", inspect.getdoc(act)])
        word = words.add_parser(act.__name__, help=text.splitlines()[0], description=about, **raw)
        word.set_defaults(act=act)
        word.add_argument("--device", choices=DEVICES, default="auto", help="[auto]")
        for name, option in options.items():
            word.add_argument(name, **option)
    arguments = parser.parse_args()
    for name in ("val", "real"):  # before anything is downloaded or computed
        path = getattr(arguments, name, None)
        if path and not os.path.exists(path):
            raise UserError(f"there is no {path}, which --{name} names")
    if world_size() > 1 and arguments.act not in (accuracy, compare, tokens):
        raise UserError("this word is for one process; start it with python instead of torchrun")
    arguments.device = launch.init(arguments.device)
    arguments.act(arguments)


if __name__ == "__main__":
    launch.run_program(main)
