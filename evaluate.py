"""Everything that is measured or looked at after training, a command each.

    python evaluate.py accuracy runs/shapes-tiny-hard/last.pth --per-class
    torchrun --nproc_per_node 8 evaluate.py accuracy deit_small --data-path IMAGENET --real real.json
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
deit_base_distilled), or the name of a torchvision classifier, with its published ImageNet weights.
"""

import copy
import inspect
import itertools
import json
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import augment
import data
import devices
import launch
import networks
import pictures
import shapes
import speed
from distill import Teacher
from flags import Parser
from image_files import crop_file, find_images, read_image, to_tensor
from launch import UserError, print0, printable
from model import DeiT, fuse
from runs import accuracy_line, from_saved, read_log
from settings import COUNT, DEVICES, PIXELS, PRECISIONS, RECIPES, Settings, complete
from train import HEADS, build_network, predictions

# ---- Any network, and any validation set to look at it on ----


def open_network(source: str, arguments: Namespace) -> tuple[nn.Module, Settings]:
    """A frozen network on its device, and the settings it was trained with; `source` is a CKPT."""
    network, saved = networks.load_network(source)
    s = from_saved(saved, workers=-1, precision=arguments.precision)
    return network.to(arguments.device), s


def class_names(network: nn.Module) -> list[str]:
    """What to call a network's classes: as in training, but ImageNet's by words."""
    if networks.is_imagenet(network.classes, network.num_classes):
        return torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"]
    return network.classes or [f"class {number}" for number in range(network.num_classes)]


def class_indices(source: str, network: nn.Module, names: list[str]) -> list[int]:
    """The network's class for each class of a data set: by name, else by number (ImageNet-V2), else by place.

    Raises UserError for classes that the network does not know.
    """
    known, count = network.classes, network.num_classes
    if known and set(names) <= set(known):
        return [known.index(name) for name in names]
    numbers = all(name.isdecimal() and int(name) < count for name in names)
    if numbers and (known is None or networks.is_imagenet(known, count)):
        return [int(name) for name in names]
    if known is None and len(names) == count:
        networks.check_classes(source, None, names)
        return list(range(count))
    unknown = next(name for name in names if name not in (known or ()))
    raise UserError(f"{source} knows {count} other classes than {unknown!r}; name folders by class or number")


def open_val(source: str, network: nn.Module, s: Settings, arguments: Namespace) -> tuple:
    """The validation set, its labels int64 (n,) as the network numbers them, and its folder or name."""
    s, split = copy.copy(s), "val"
    s.img_size = network.img_size  # shapes are drawn at that size
    if arguments.val:
        s.data, split = "folder", os.path.abspath(arguments.val)  # which no root in front of it changes
        s.limit, s.skip_broken = 0, False
    else:
        s.limit = s.limit if arguments.data in (None, s.data) else 0
        s.data, s.data_path = arguments.data or s.data, arguments.data_path or s.data_path
    val_set = data.open_split(s, split, arguments.device)
    indices = torch.tensor(class_indices(source, network, val_set.classes))
    folder, held_out = data.split_folder(Path(s.data_path), split)
    origin = s.data if s.data not in ("imagenet", "folder") else s.data_path if held_out else folder
    return val_set, indices[torch.as_tensor(val_set.labels).cpu()], origin


def top_classes(network: nn.Module, val_set: data.DataSet, s: Settings, device: torch.device) -> tuple:
    """The indices (n,) of the readable images, and each head's first classes int64 (n, heads, min(5, C)).

    Of equal scores the class of lower index is first, as with argmax. Third the largest probability (n,) of
    the last head. The same on every process.
    """
    batches = []
    for _, scores in predictions(network, val_set, s, device):
        orders = [logits.argsort(dim=1, descending=True, stable=True)[:, :5] for logits in scores]
        last = fuse(scores[0]) if len(scores) == 1 else scores[-1]
        # heads × (B, 5) -> (B, heads, 5)
        batches.append((torch.stack(orders, dim=1).cpu(), last.amax(dim=1).cpu()))
    indices = list(range(launch.rank(), len(val_set), launch.world_size()))
    if isinstance(val_set, data.FolderSet):
        indices = [index for index in indices if val_set.paths[index] not in val_set.broken]
    shares = [share for share in devices.all_gather((indices, batches)) if share[1]]
    indices = torch.tensor([index for part, _ in shares for index in part])
    order = indices.argsort()
    top, probability = zip(*(batch for _, part in shares for batch in part), strict=True)
    return indices[order], torch.cat(top)[order], torch.cat(probability)[order]


# ---- accuracy: Tables 3 and 5 ----


def percent(hits: Tensor) -> dict[str, float]:
    """Percent of images by head, from hits bool (n, heads)."""
    return dict(zip(HEADS, (100 * hits.double().mean(dim=0)).tolist(), strict=False))


def real_labels(path: str, val_set: data.DataSet, origin: str | Path) -> list[list[int]]:
    """ImageNet-Real's labels (Beyer et al., 2020) of the images of a data set.

    The file is a list of lists of class indices, one for each ILSVRC2012_val_00000001.JPEG and so on.
    """
    if not isinstance(val_set, data.FolderSet):
        raise UserError(f"--real is about ImageNet's validation files, not {origin}")
    try:
        real = json.loads(Path(path).read_bytes())
        numbers = [int(Path(file).stem.split("ILSVRC2012_val_")[1]) for file in val_set.paths]
        return [[int(label) for label in real[number - 1]] for number in numbers]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"{path} and ImageNet's validation files, ILSVRC2012_val_*, do not fit") from error


def print_matrix(titles: list[str], rows: list[list]) -> None:
    """A square table whose rows are numbered and named, and whose columns have the numbers."""
    width = max(map(len, titles)) + 4
    print0(" " * width + "".join(f"{number:>6}" for number in range(len(titles))))
    for number, (title, row) in enumerate(zip(titles, rows, strict=True)):
        print0(f"{f'{number} {printable(title)}':{width}}" + "".join(f"{cell:>6}" for cell in row))


def print_mistakes(labels: Tensor, predicted: Tensor, probability: Tensor, names: list, paths: list) -> None:
    """What is taken for what, for up to 20 classes, and the five most probable of the wrong predictions.

    Labels and predictions int64 (n,), and the predictions' probabilities; `paths` is empty of a held set.
    """
    if (count := len(names)) <= 20:
        print0("images of a class (row) that are taken for a class (column)")
        pairs = (count * labels + predicted).bincount(minlength=count**2)
        print_matrix(names, pairs.view(count, count).tolist())
    wrong = (predicted != labels).nonzero().flatten()
    for n in wrong[probability[wrong].argsort(descending=True, stable=True)[:5]] if paths else ():
        text = f"{100 * probability[n]:.1f} % {names[predicted[n]]}, and is {names[labels[n]]}"
        print0(printable(f"{text}: {paths[n]}"))


def accuracy(arguments: Namespace) -> None:
    """Top-1 and top-5 accuracy of every head of every checkpoint, on one validation set.

    Of equal scores the class of lower index comes first. Top-5 is left out where there are five classes or
    fewer. With --real also ImageNet-Real: a prediction is right if it is one of the image's labels, and
    images without any do not count. Several processes (torchrun) share the images; each counts once. The mean
    of classes counts every class alike, however many images it has. --per-class ends with the confusion
    matrix and, of a streamed set, the images that are wrong with the most confidence, both of the last head.
    """
    for source in arguments.checkpoints:
        network, s = open_network(source, arguments)
        val_set, labels, origin = open_val(source, network, s, arguments)
        real = real_labels(arguments.real, val_set, origin) if arguments.real else None
        indices, top, probability = top_classes(network, val_set, s, arguments.device)
        labels = labels[indices]
        hits = top == labels[:, None, None]  # bool (n, heads, 5)
        print0(f"{source}: {len(labels)} images of {origin}, in {s.precision}")
        print0(f"  top-1  {accuracy_line(percent(hits[:, :, 0]))}")
        present = labels.unique().tolist()
        by_class = torch.stack([hits[labels == label, :, 0].double().mean(dim=0) for label in present])
        print0(f"  mean of classes  {accuracy_line(percent(by_class))}")
        if network.num_classes > 5:
            print0(f"  top-5  {accuracy_line(percent(hits.any(dim=2)))}")
        if real:
            pairs = zip(top[:, :, 0].tolist(), [real[index] for index in indices.tolist()], strict=True)
            right = [[label in valid for label in predicted] for predicted, valid in pairs if valid]
            print0(f"  Real   {accuracy_line(percent(torch.tensor(right)))}  ({len(right)} images)")
        if arguments.per_class:
            names = class_names(network)
            print0("".join(f"{title:>14}" for title in ("images", *HEADS[: hits.shape[1]])) + "  class")
            for label, shares in zip(present, by_class, strict=True):
                cells = "".join(f"{100 * share:14.2f}" for share in shares.tolist())
                print0(f"{(labels == label).sum():14}{cells}  {printable(names[label])}")
            paths = [val_set.paths[i] for i in indices] if isinstance(val_set, data.FolderSet) else []
            print_mistakes(labels, top[:, -1, 0], probability, names, paths)


# ---- compare: Table 4 ----


def short_names(sources: list[str]) -> list[str]:
    """The last part of each path, for `last.pth` its folder; the whole paths if two are the same."""
    short = [Path(source.removesuffix("/last.pth")).name or source for source in sources]
    return short if len(set(short)) == len(short) else sources


def compare(arguments: Namespace) -> None:
    """Percent of images classified differently by each pair of classifiers (Table 4).

    The classifiers are the ground truth and every head of every checkpoint. The validation set is the one
    that the first checkpoint was trained with, if none is named. With --out also a picture of the eight
    images that most pairs decide differently.
    """
    titles, decisions = ["ground truth"], []
    for source, name in zip(arguments.checkpoints, short_names(arguments.checkpoints), strict=True):
        network, s = open_network(source, arguments)
        if not decisions:
            first, classes = s, class_names(network)
        val_set, labels, origin = open_val(source, network, first, arguments)
        if class_names(network) != classes:
            raise UserError(f"{source} numbers its classes otherwise than {arguments.checkpoints[0]}")
        indices, top, _ = top_classes(network, val_set, s, arguments.device)
        heads = HEADS[: top.shape[1]]
        titles += [f"{name} {head}" if len(heads) > 1 else name for head in heads]
        decisions += top[:, :, 0].unbind(1)
    decisions = torch.stack([labels[indices], *decisions])  # (rows, n)
    differ = decisions[:, None] != decisions[None]  # (rows, rows, n)
    print0(f"percent of the {len(indices)} images of {origin} that are classified differently")
    shares = differ.double().mean(dim=2).tolist()
    print_matrix(titles, [[f"{100 * share:.1f}" for share in row] for row in shares])
    if arguments.out and launch.rank() == 0:
        disputed = differ.sum(dim=(0, 1)).argsort(descending=True, stable=True)[:8]
        plan = [(indices[disputed].tolist(), None)]
        images, _ = next(data.load_batches(val_set, plan, s, arguments.device))
        row = pictures.disagreement_row(images.cpu(), decisions[:, disputed], titles, classes)
        pictures.draw_sheet([row], 96, arguments.out)


# ---- tokens: the analysis of the two tokens in section 5.2 ----


def tokens(arguments: Namespace) -> None:
    """Cosine between the two token parameters, and the mean one of their embeddings after every layer."""
    for source in arguments.checkpoints:
        network, s = open_network(source, arguments)
        if not getattr(network, "distilled", False):
            raise UserError(f"{source} has no distillation token to compare with its class token")
        val_set, _, _ = open_val(source, network, s, arguments)
        parameters = F.cosine_similarity(network.cls_token, network.dist_token, dim=-1).item()
        sums = torch.zeros(1 + len(network.blocks), device=arguments.device)  # of images, then of cosines
        for images, _ in data.eval_batches(val_set, s, arguments.device):
            sums[0] += len(images)
            x = network.embed(augment.normalize(images))
            for layer, block in enumerate(network.blocks, start=1):
                x = block(x)
                sums[layer] += F.cosine_similarity(x[:, 0], x[:, 1], dim=-1).sum()
        count, *sums = devices.all_reduce(sums).tolist()
        cosines = " ".join(f"{total / count:.3f}" for total in sums)
        print0(f"{source}: the two parameters {parameters:.3f}; after each layer\n  {cosines}")


# ---- throughput: Table 1 and Figure 1 ----


def throughput(arguments: Namespace) -> None:
    """Images/s of inference and of training steps, and the share of the device's own peak that they reach.

    The mean of 30 runs, as in the paper, which takes the largest batch that fits: raise --batch-size until
    one does not. A training step is forward, loss, backward and optimizer, without data, teacher and
    augmentation (which has a line of its own); it counts three times the FLOPs of inference. The peak is the
    best of several large matrix products of the same precision.
    """
    device, size, runs = arguments.device, arguments.img_size, arguments.runs
    given = {n: getattr(arguments, n) for n in ("model", "img_size", "patch_size", "precision", "compile")}
    s = complete({"data": "imagenet", "distill": "label" if arguments.distilled else "none"} | given)
    if s.distilled != arguments.distilled:
        raise UserError("--distilled is about a second token, which only tiny, small and base have")
    networks.check_sizes(s.model, s, 2)
    network = build_network(s, 1000).to(device)
    flops, weights = speed.count_flops(network, size), sum(p.numel() for p in network.parameters()) / 1e6
    print(f"{s.model} at {size} pixels: {weights:.1f} M parameters, {flops / 1e9:.2f} GFLOP an image")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = devices.DTYPES[s.precision]
    print(f"{str(dtype).removeprefix('torch.')} on {device} ({name}), torch {torch.__version__}")
    peak, side = speed.matmul_peak(dtype, device)
    print(f"peak          {peak / 1e12:.3g} TFLOP/s, the best of 5 products of {side} × {side} matrices")
    count = arguments.batch_size or (512 if device.type == "cuda" else 16)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=device)
    steps, names = speed.timed_steps(network, s, images), ("inference", "training", "augmentation")
    for name, step, cost in zip(names, steps, (flops, 3 * flops, 0), strict=True):
        network.train(name == "training")
        rate = count / speed.seconds(step, runs, device)
        text = f"{name:12}  {rate:.1f} images/s, batch {count}, mean of {runs} runs"
        if cost:
            text += f"; {rate * cost / 1e12:.3g} TFLOP/s, {100 * rate * cost / peak:.1f} % of the peak"
        print(text, flush=True)


# ---- Pictures ----


def image_paths(sources: list[str]) -> Iterator[str]:
    """The images of files, of folders (all images below, sorted), and of `-`: paths on standard input.

    What a folder has of other files is told on standard error. Raises UserError for one without images.
    """
    found = []
    for source in sources:
        images = [source]
        if "://" in source:
            raise UserError(f"{source} is an address; download the picture and name its file")
        if source == "-":
            images = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        elif Path(source).is_dir():
            images, others = find_images(Path(source))
            if not images:
                raise UserError(f"there are no images below {source}")
            if others:
                text = f"left out of {source}: {len(others)} files that are no images by their ending"
                print(printable(text), file=sys.stderr)
        found.append(images)
    return itertools.chain.from_iterable(found)


def attention(arguments: Namespace) -> None:
    """A picture of what each attention head of a layer attends to from the class and the distillation token.

    Beside them the attention rollout of the layers up to that one. Yellow is a map's own largest share of the
    attention paid to patches, which is told below it; attention to the tokens themselves is not shown.
    """
    network, _ = open_network(arguments.checkpoint, arguments)
    if not isinstance(network, DeiT):
        raise UserError(f"{arguments.checkpoint} is no transformer of ours; it has no tokens that attend")
    layer = arguments.layer or len(network.blocks)
    if layer > len(network.blocks):
        raise UserError(f"--layer {layer}: the network has {len(network.blocks)} layers")
    rows, side = [], 128  # pixels
    for image in map(read_image, image_paths(arguments.images)):
        rows += pictures.attention_rows(network, image, layer, HEADS[:2], side)
    pictures.draw_sheet(rows, side, arguments.out)


def curves(arguments: Namespace) -> None:
    """A picture of each head's accuracy in validation, by epoch, of several runs."""
    logs = {}
    for run, name in zip(arguments.runs, short_names(arguments.runs), strict=True):
        try:
            logs[name] = read_log(Path(run))
            [(record["epoch"], record["loss"], record["accuracy"]["class"]) for record in logs[name]]
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{run}/log.jsonl is not the log of a run") from error
        if not logs[name]:
            raise UserError(f"{run} holds no run with an epoch in its log.jsonl")
    pictures.draw_curves(logs, arguments.out)


def augmentations(arguments: Namespace) -> None:
    """A labeled sheet: six of RandAugment's operations by magnitude, and whole batches with their targets.

    With --teacher instead the batches alone, and beneath each image what the teacher says it is.
    """
    if arguments.images:
        paths = list(image_paths(arguments.images))
        folders = [Path(path).absolute().parent.name for path in paths]
        turns = sorted(range(len(paths)), key=lambda n: folders[:n].count(folders[n]))[:6]  # classes in turn
        files = [read_image(paths[n]).resize((224, 224)) for n in turns]
        images, classes = torch.stack([to_tensor(file) for file in files]), sorted(set(folders))
        labels = torch.tensor([classes.index(folders[n]) for n in turns])
    else:
        (images, labels), classes = shapes.draw_shapes("val", 10, 64), list(shapes.SHAPES)
    teacher = None
    if arguments.teacher:
        network, _ = networks.load_network(arguments.teacher)
        networks.check_classes(arguments.teacher, network.classes, classes)
        teacher = Teacher(network, {})
    rows = [] if teacher else pictures.operation_rows(images[-1], arguments.all)
    rows += pictures.batch_rows(images, labels, classes, arguments.seed, teacher)
    pictures.draw_sheet(rows, 100, arguments.out)


# ---- predict: names and probabilities ----


def most_probable(probabilities: Tensor, names: list[str], count: int) -> list[dict]:
    """The first classes of one image, from probabilities (C,)."""
    first, labels = probabilities.topk(min(count, len(names)))
    pairs = zip(labels.tolist(), first.tolist(), strict=True)
    return [{"name": names[label], "probability": probability} for label, probability in pairs]


def predict(arguments: Namespace) -> None:
    """The most probable classes of images, by each head and by late fusion of the two.

    An image that cannot be read is told on standard error; the others go on, and the exit code is 2 at the
    end. With --json a line of JSON an image: {"image": path, head: [{"name": class, "probability": p}, ...]}.
    `fused` is always among the heads; of a network with one head it is that one's. Images are answered 64 at
    a time, in their order; those of a list on standard input one by one.
    """
    with redirect_stdout(sys.stderr):  # standard output is for predictions alone
        network, _ = open_network(arguments.checkpoint, arguments)
    names, failed, paths = class_names(network), False, image_paths(arguments.images)

    def read(path: str) -> tuple[Tensor, str]:
        """The crop uint8 (3, S, S), black if there is an error, and the error."""
        try:
            return crop_file(read_image(path), network.img_size, None), ""
        except UserError as error:
            return torch.zeros(3, network.img_size, network.img_size, dtype=torch.uint8), str(error)

    # who feeds paths through a pipe gets each answer at once
    while batch := list(itertools.islice(paths, 1 if "-" in arguments.images else 64)):
        crops, errors = zip(*map(read, batch), strict=True)
        with devices.autocast(arguments.precision, arguments.device):
            outputs = network(augment.normalize(torch.stack(crops).to(arguments.device)))
        heads = [outputs] if isinstance(outputs, Tensor) else [*outputs, outputs]
        probabilities = [fuse(head).cpu() for head in heads]  # heads × (B, C)
        for path, error, *image in zip(batch, errors, *probabilities, strict=True):
            if error:
                print(f"error: {printable(error)}", file=sys.stderr, flush=True)
                failed = True
                continue
            by_head = zip(HEADS, image, strict=False)
            top = {head: most_probable(p, names, arguments.top) for head, p in by_head}
            if arguments.json:
                print(json.dumps({"image": path, "fused": top["class"]} | top), flush=True)
                continue
            print(printable(path))
            for head, classes in top.items():
                text = "   ".join(f"{one['name']} {100 * one['probability']:.1f} %" for one in classes)
                print(f"  {head:14}{printable(text)}", flush=True)
    if failed:
        sys.exit(2)


# ---- The program ----

CKPT = dict(metavar="CKPT", help="a checkpoint, an official one's short name, or a torchvision classifier")
VAL = {
    "checkpoints": CKPT | {"nargs": "+"},
    "--data": dict(choices=tuple(RECIPES), help="data set [the checkpoint's; compare: the first one's]"),
    "--data-path": dict(metavar="DIR", help="where it is [where it was in training]"),
    "--val": dict(metavar="DIR", help="instead: DIR/CLASS/*, classes by name or number (ImageNet-V2)"),
}
PRECISION = {"--precision": dict(choices=PRECISIONS, default="auto", help="[auto]")}
COMMANDS = {
    accuracy: VAL | PRECISION | {
        "--per-class": dict(action="store_true", help="by class, what is taken for what, worst mistakes"),
        "--real": dict(metavar="JSON", help="ImageNet-Real's label file, real.json"),
    },
    compare: VAL | PRECISION | {"--out": dict(metavar="PNG", help="a picture of the most disputed images")},
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
        "images": dict(nargs="+", metavar="IMAGE", help="files, folders, or - for a list on standard input"),
        "--layer": dict(type=COUNT, help="from 1 [the last]"),
        "--out": dict(metavar="PNG", default="attention.png", help="[attention.png]"),
    },
    predict: PRECISION | {
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
        "images": dict(nargs="*", metavar="IMAGE", help="files, folders; folders name classes [ten shapes]"),
        "--out": dict(metavar="PNG", default="augmentations.png", help="[augmentations.png]"),
        "--all": dict(action="store_true", help="every operation instead of six"),
        "--teacher": dict(metavar="CKPT", help="a network of the same classes, whose labels are shown"),
        "--seed": dict(type=int, default=0, help="of the whole batches [0]"),
    },
}  # fmt: skip


def evaluate_parser() -> Parser:
    """The commands, with their functions' docstrings as help and this file's examples below."""
    raw = dict(allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    parser = Parser(prog="evaluate.py", description=__doc__, **raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, options in COMMANDS.items():
        name, text = function.__name__, inspect.getdoc(function)
        examples = [line for line in __doc__.splitlines() if f"evaluate.py {name} " in line]
        about = dict(help=text.splitlines()[0], description=text, epilog="\n".join(["examples:", *examples]))
        command = commands.add_parser(name, **about, **raw)
        command.set_defaults(function=function, precision="auto")
        command.add_argument("--device", choices=DEVICES, default="auto", help="[auto]")
        for flag, option in options.items():
            command.add_argument(flag, **option)
    return parser


def main() -> None:
    arguments = evaluate_parser().parse_args()
    for name in ("val", "real"):  # before anything is downloaded or computed
        if (path := getattr(arguments, name, None)) and not os.path.exists(path):
            raise UserError(f"there is no {path}, which --{name} names")
    if getattr(arguments, "val", None) and (arguments.data or arguments.data_path):
        raise UserError("--val names the validation images itself; leave out --data and --data-path")
    if launch.world_size() > 1 and arguments.function not in (accuracy, compare, tokens):
        raise UserError("this command is for one process; start it with python instead of torchrun")
    arguments.device = devices.init(arguments.device)
    arguments.precision = launch.choose_precision(arguments.precision, arguments.device.type)
    arguments.function(arguments)


if __name__ == "__main__":
    launch.run_program(main)
