"""What one measures or looks at after training; a word for each.

python evaluate.py accuracy runs/shapes-tiny-hard/last.pth --per-class
torchrun --nproc_per_node 8 evaluate.py accuracy deit_small_distilled --data-path IMAGENET --real real.json
python evaluate.py accuracy deit_small --val imagenetv2-matched-frequency-format-val
python evaluate.py compare regnet_y_16gf deit_base deit_base_distilled --data-path IMAGENET
python evaluate.py tokens runs/shapes-tiny-hard/last.pth
python evaluate.py throughput --model regnet_y_16gf
python evaluate.py attention runs/shapes-tiny-hard/last.pth photo.jpg --out attention.png
python evaluate.py predict deit_base_distilled photo.jpg FOLDER --top 3
find FOLDER -name "*.jpg" | python evaluate.py predict runs/shapes-tiny-hard/last.pth - --json
python evaluate.py curves runs/shapes-tiny-none runs/shapes-tiny-hard --out curves.png
python evaluate.py augmentations --out augmentations.png

CKPT is a checkpoint of train.py or finetune.py, one of the authors' (a file, a URL, or a short name such as
deit_base_distilled), or the name of a torchvision classifier, with its published ImageNet weights.
"""

import argparse
import copy
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from augment import (
    MEAN,
    OPERATIONS,
    RANDAUGMENT_ARGUMENTS,
    STD,
    Augment,
    keyed_generator,
    normalize,
    random_crop,
)
from data import (
    DATA_NAMES,
    ArraySet,
    FolderSet,
    crop_file,
    draw_shapes,
    eval_batches,
    load_data,
    open_folder,
    read_image,
    to_tensor,
)
from distill import REGNETY, checkpoint_settings, create_teacher, label_loss, read_checkpoint, try_network
from model import DeiT, UsageError, fuse
from train import (
    COUNT,
    DEVICES,
    HEADS,
    PAPER,
    SETTINGS,
    Parser,
    Place,
    autocast,
    build_network,
    build_optimizer,
    check_order,
    complete,
    first_alone,
    head_scores,
    headline,
    is_imagenet,
    join,
    out_of_memory,
    precision,
    printable,
    program,
    published_settings,
    say,
    total,
    workers,
)

# ---- Any network, and any validation set to look at it on ----


def open_network(source: str, place: Place) -> tuple[nn.Module, dict]:
    """A frozen network, and the settings that it was made and trained with (where unknown, the paper's).

    `source` is what this file's head calls CKPT.
    """
    if source in (*REGNETY, *torchvision.models.list_models(torchvision.models)):
        settings, weights = first_alone(place, lambda: published_settings(source)), "published"
    else:
        settings = first_alone(place, lambda: checkpoint_settings(read_checkpoint(source)))
        weights = source
    if not settings.keys() >= {"model", "num_classes"}:
        raise UsageError(
            f"{source} does not say what it is; name a checkpoint of train.py or an official one"
        )
    sizes = {name: settings[name] for name in ("img_size", "patch_size") if name in settings}
    network = first_alone(
        place, lambda: create_teacher(settings["model"], settings["num_classes"], weights, **sizes)
    )
    return network.to(place.device), PAPER | settings | {"img_size": network.img_size, "workers": -1}


def class_names(network: nn.Module, num_classes: int) -> list[str]:
    """What to call a network's classes: as in training, but ImageNet's by words."""
    if is_imagenet(network.classes, num_classes):
        return torchvision.models.get_model_weights("resnet18").DEFAULT.meta["categories"]
    return network.classes or [f"class {number}" for number in range(num_classes)]


def class_indices(source: str, network: nn.Module, num_classes: int, names: list[str]) -> list[int]:
    """The network's class for each class of a data set: by name, else by number (ImageNet-V2), else by place.

    Raises UsageError for classes that the network does not know.
    """
    if network.classes and set(names) <= set(network.classes):
        return [network.classes.index(name) for name in names]
    unnamed = network.classes is None or is_imagenet(network.classes, num_classes)
    if unnamed and all(re.fullmatch("[0-9]+", name) for name in names) and max(map(int, names)) < num_classes:
        return [int(name) for name in names]
    if network.classes is None and len(names) == num_classes:
        check_order(source, names, num_classes)
        return list(range(num_classes))
    if network.classes is None:
        raise UsageError(f"{source} knows {num_classes} classes without names; the data set has {len(names)}")
    odd = next(name for name in names if name not in network.classes)
    raise UsageError(
        f"{source} knows other classes than the data set's: {odd!r} is not among its {num_classes}; choose "
        "the data set that it was trained on with --data and --data-path"
    )


def open_val(
    source: str, network: nn.Module, settings: dict, arguments: argparse.Namespace, place: Place
) -> tuple[ArraySet | FolderSet, Tensor, str | Path]:
    """The validation set, its labels int64 (n,) as the network numbers them, and its name or folder."""
    if arguments.val:
        if arguments.data or arguments.data_path:
            raise UsageError("--val names the validation images itself; leave out --data and --data-path")
        called = Path(arguments.val)
        data = open_folder(called, place.device)
    else:
        called, path = arguments.data or settings["data"], arguments.data_path or settings["data_path"]
        data = first_alone(
            place, lambda: load_data(called, path, settings["img_size"], place.device, ("val",))[0]
        )
        called = Path(path) / "val" if called in ("imagenet", "folder") else called
    indices = class_indices(source, network, settings["num_classes"], data.classes)
    return data, torch.tensor(indices)[torch.as_tensor(data.labels).cpu()], called


def ranking(network: nn.Module, data: ArraySet | FolderSet, settings: dict, place: Place) -> Tensor:
    """Each head's first classes for every image: int64 (n, heads, min(5, C)), in the data's order.

    The same on every process. Of equal scores the class of lower index is first, as with argmax.
    """
    heads = len(HEADS) if getattr(network, "distilled", False) else 1
    first = torch.zeros(len(data), heads, min(5, settings["num_classes"]), dtype=torch.long)
    chunks = [
        torch.stack([head.argsort(dim=1, descending=True, stable=True)[:, :5] for head in scores], dim=1)
        for _, scores in head_scores(network, data, settings, place)
    ]
    if chunks:  # there may be fewer images than processes
        first[place.rank :: place.world] = torch.cat(chunks).cpu()
    return total(first.to(place.device), place).cpu()


# ---- accuracy: Tables 3 and 5 ----


def shares(hits: Tensor) -> dict[str, float]:
    """Percent of images by head, from hits bool (n, heads)."""
    return dict(zip(HEADS, (100 * hits.double().mean(dim=0)).tolist(), strict=False))


def real_labels(path: str, root: str | Path) -> list[list[int]]:
    """ImageNet-Real's labels (Beyer et al., 2020) of the images below root, in the order of a data set.

    The file is a list of lists of class indices, one for each ILSVRC2012_val_00000001.JPEG and so on.
    """
    if not isinstance(root, Path):
        raise UsageError(f"--real is about ImageNet's validation files, not {root}")
    files = [Path(file).name for file, _ in torchvision.datasets.ImageFolder(root, allow_empty=True).samples]
    try:
        labels = json.loads(Path(path).read_bytes())
        numbers = [int(re.fullmatch(r"ILSVRC2012_val_(\d+)\.\w+", file)[1]) for file in files]
        return [[int(label) for label in labels[number - 1]] for number in numbers]
    except OSError as error:
        raise UsageError(f"could not read {path}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(
            f"--real needs ImageNet's validation files, ILSVRC2012_val_*, and {path} to hold a list of "
            "labels for each of them"
        ) from error


def accuracy(arguments: argparse.Namespace) -> None:
    """Top-1 and top-5 accuracy of every head of every checkpoint, on one validation set.

    Of equal scores the class of lower index comes first. Top-5 is left out where there are five classes or
    fewer. With --real also ImageNet-Real: a prediction is right if it is one of the image's labels, and
    images without any do not count. Several processes (torchrun) share the images; each counts once.
    """
    place = join(arguments.device)
    for source in arguments.checkpoints:
        network, settings = open_network(source, place)
        data, labels, called = open_val(source, network, settings, arguments, place)
        real = real_labels(arguments.real, called) if arguments.real else []
        first = ranking(network, data, settings, place)
        hits = first == labels[:, None, None]
        say(place, printable(f"{source}: {len(data)} images of {called}"))
        say(place, f"  top-1  {headline(shares(hits[:, :, 0]))}")
        if settings["num_classes"] > 5:
            say(place, f"  top-5  {headline(shares(hits.any(dim=2)))}")
        if real:
            top = first[:, :, 0].tolist()
            right = [[p in own for p in heads] for heads, own in zip(top, real, strict=True) if own]
            say(place, f"  Real   {headline(shares(torch.tensor(right)))}  ({len(right)} images)")
        if arguments.per_class:
            names = class_names(network, settings["num_classes"])
            heads = HEADS[: hits.shape[1]]
            say(place, "".join(f"{word:>14}" for word in ("images", *heads)) + "  class")
            for label in labels.unique().tolist():
                own = hits[labels == label, :, 0]
                cells = f"{len(own):14}" + "".join(f"{share:14.2f}" for share in shares(own).values())
                say(place, f"{cells}  {printable(names[label])}")


# ---- compare: Table 4 ----


def short_names(sources: list[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart; `last.pth` goes by its folder's name."""
    parts = [[part for part in Path(source).parts if part != "last.pth"] or [source] for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def disagreement(decisions: Tensor) -> Tensor:
    """The share of images that each pair decides differently: int (rows, n) -> float (rows, rows)."""
    return (decisions[:, None] != decisions[None]).double().mean(dim=2)


def compare(arguments: argparse.Namespace) -> None:
    """Percent of images classified differently by each pair of classifiers (Table 4).

    The classifiers are the ground truth and every head of every checkpoint. The validation set is the one
    that the first checkpoint was trained with, if none is named.
    """
    place, rows, decisions, classes, shared = join(arguments.device), ["ground truth"], [], [], {}
    for source, name in zip(arguments.checkpoints, short_names(arguments.checkpoints), strict=True):
        network, settings = open_network(source, place)
        shared = shared or {key: settings[key] for key in ("data", "data_path")}
        data, labels, called = open_val(source, network, settings | shared, arguments, place)
        classes.append(class_names(network, settings["num_classes"]))
        if classes[-1] != classes[0]:
            raise UsageError(f"{source} numbers its classes otherwise than {arguments.checkpoints[0]}")
        first = ranking(network, data, settings, place)[:, :, 0]
        decisions += [*([] if decisions else [labels]), *first.unbind(1)]
        rows += [f"{name} {head}" if first.shape[1] > 1 else name for head in HEADS[: first.shape[1]]]
    width = max(map(len, rows)) + 3
    say(
        place,
        f"percent of the {len(data)} images of {printable(str(called))} that are classified differently",
    )
    say(place, " " * width + "".join(f"{number:>6}" for number in range(len(rows))))
    for number, (row, values) in enumerate(zip(rows, disagreement(torch.stack(decisions)), strict=True)):
        cells = "".join(f"{100 * value:6.1f}" for value in values.tolist())
        say(place, f"{f'{number} {printable(row)}':{width}}{cells}")


# ---- tokens: the analysis of the two tokens in section 5.2 ----


@torch.no_grad()
def layer_embeddings(network: DeiT, images: Tensor) -> Tensor:
    """The class and distillation embeddings after every block: (depth, B, 2, D)."""
    x, layers = network.embed(images), []
    for block in network.blocks:
        x = block(x)
        layers.append(x[:, :2])
    return torch.stack(layers)


def tokens(arguments: argparse.Namespace) -> None:
    """Cosine between the two token parameters, and the mean one of their embeddings after every layer."""
    place = join(arguments.device)
    for source in arguments.checkpoints:
        network, settings = open_network(source, place)
        if not getattr(network, "distilled", False):
            raise UsageError(f"{source} has no distillation token to compare with its class token")
        data, _, _ = open_val(source, network, settings, arguments, place)
        parameters = F.cosine_similarity(network.cls_token, network.dist_token, dim=-1).item()
        sums = torch.zeros(len(network.blocks), device=place.device)
        for images, _ in eval_batches(
            data,
            settings["img_size"],
            256,
            rank=place.rank,
            world=place.world,
            workers=workers(settings, place),
            device=place.device,
        ):
            first, second = layer_embeddings(network, normalize(images)).unbind(2)
            sums += F.cosine_similarity(first, second, dim=-1).sum(dim=1)
        say(place, printable(f"{source}: the two parameters {parameters:.3f}; after each layer"))
        cosines = (total(sums, place) / len(data)).tolist()
        say(place, "  " + " ".join(f"{cosine:.3f}" for cosine in cosines))


# ---- throughput: Table 1 and Figure 1 ----


def alone(device: str) -> Place:
    """Where this process is, which must be the only one."""
    place = join(device)
    if place.world > 1:
        raise UsageError("this word is for one process; start it with python instead of torchrun")
    return place


def count_flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of one image's inference, a multiply-add counting two.

    Of a DeiT the matrix products by formula, in the last block only what the front tokens need; of other
    networks what torch's own counter sees.
    """
    if not isinstance(network, DeiT):
        network = copy.deepcopy(network).eval().to("meta")  # where nothing is computed
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            network(torch.zeros(1, 3, size, size, device="meta"))
        return counter.get_total_flops()
    front, tokens, dim = 2 if network.distilled else 1, *network.pos_embed.shape[1:]

    def block(queries: int) -> int:
        # queries, projection and MLP (1 + 1 + 8 squares) of some tokens, keys and values of all; then QKᵀ, AV
        return 2 * dim**2 * (10 * queries + 2 * tokens) + 2 * 2 * queries * tokens * dim

    patches = 2 * (tokens - front) * network.patch_embed.proj.weight.numel()
    heads = 2 * front * network.head.weight.numel()
    return patches + (len(network.blocks) - 1) * block(tokens) + block(front) + heads


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(act: Callable[[], object], runs: int, device: torch.device) -> float:
    """The mean time of one act() over so many runs, after up to 3 that do not count."""
    for _ in range(min(3, runs)):
        act()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(runs):
        act()
    synchronize(device)
    return (time.perf_counter() - started) / runs


def matmul_peak(dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """FLOP/s of the best of several square matrix products, and their side."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ b, 3, device) for _ in range(5)), side


def largest_batch(ready: Callable[[int], Callable], device: torch.device) -> int:
    """The largest power of two up to 4096 for which ready(batch)() fits the GPU's memory; elsewhere 16."""
    batch = 4096 if device.type == "cuda" else 16
    while device.type == "cuda" and batch > 1:
        torch.compiler.reset()  # a graph of its own for each size, not one for any size
        try:
            ready(batch)()
            synchronize(device)
            break
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            batch //= 2
        torch.cuda.empty_cache()
    return batch


def peak_memory(device: torch.device) -> str:
    """The most memory used: of a GPU by tensors since the last reset, else by the process since its start."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB at its peak"
    import resource  # which Windows lacks

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{used / 1e9:.2f} GB, the process's high-water mark"


def network_to_time(arguments: argparse.Namespace, place: Place) -> tuple[nn.Module, dict]:
    """A checkpoint's network, or a fresh one of the named model for 1000 classes, and its settings."""
    running = {name: getattr(arguments, name) for name in ("precision", "device", "compile")}
    chosen = {name: getattr(arguments, name) for name in ("model", "img_size", "patch_size")}
    chosen = {name: value for name, value in chosen.items() if value}
    if arguments.checkpoint:
        if chosen or arguments.distilled:
            raise UsageError("a checkpoint has its own model and sizes; leave out their flags")
        network, settings = open_network(arguments.checkpoint, place)
        settings |= running
    else:
        distill = "label" if arguments.distilled else "none"
        settings = complete({"data": "imagenet", "distill": distill} | chosen | running)
        settings["num_classes"] = 1000
        network = build_network(settings, 1000).to(place.device)
    if not isinstance(network, DeiT):
        if arguments.distilled:
            raise UsageError("--distilled is about a second token, which only tiny, small and base have")
        try_network(settings["model"], settings["img_size"])
        network = network.to(memory_format=torch.channels_last)  # as in training
    return network.requires_grad_(True), settings


def throughput(arguments: argparse.Namespace) -> None:
    """Images/s of inference and of training steps, and the share of the device's own peak that they reach.

    The paper's protocol: the largest batch that fits (on a GPU the largest power of two up to 4096, elsewhere
    16), the mean of 30 runs. A training step is forward, loss, backward and optimizer, without data, teacher
    and augmentation (which has a line of its own); it counts three times the FLOPs of inference. The peak is
    the best of several large matrix products of the same precision.
    """
    place = alone(arguments.device)
    network, settings = network_to_time(arguments, place)
    device, size, runs = place.device, settings["img_size"], arguments.runs
    dtype = precision(settings, device)
    model = torch.compile(network) if settings["compile"] else network
    optimizer = build_optimizer(network, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    augment, generator = Augment(settings["num_classes"]), keyed_generator("throughput")

    def infer(inputs: Tensor, labels: Tensor) -> None:
        with torch.no_grad(), autocast(settings, device):
            model(inputs)

    def learn(inputs: Tensor, labels: Tensor) -> None:
        with autocast(settings, device):
            loss = label_loss(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def batch(count: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
        return pixels, torch.arange(count, device=device) % settings["num_classes"]

    def ready(act: Callable, count: int) -> Callable:
        pixels, labels = batch(count)
        return partial(act, normalize(pixels), labels)

    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    flops, parameters = count_flops(network, size), sum(p.numel() for p in network.parameters())
    print(
        f"{settings['model']} at {size} pixels: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOP "
        f"an image; {str(dtype).removeprefix('torch.')} on {device} ({name}), torch {torch.__version__}"
    )
    peak, side = matmul_peak(dtype, device)
    print(f"peak          {peak / 1e12:.3g} TFLOP/s, the best of 5 products of {side} × {side} matrices")
    for word, act, cost in (("inference", infer, flops), ("training", learn, 3 * flops)):
        model.train(act is learn)
        count = arguments.batch_size or largest_batch(partial(ready, act), device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rate = count / seconds(ready(act, count), runs, device)
        print(
            f"{word:12}  {rate:.1f} images/s, batch {count}, mean of {runs} runs; {rate * cost / 1e12:.3g} "
            f"TFLOP/s, {100 * rate * cost / peak:.1f} % of the peak; {peak_memory(device)}",
            flush=True,
        )
    rate = count / seconds(partial(augment, *batch(count), generator), runs, device)
    print(f"augmentation  {rate:.1f} images/s, batch {count}, mean of {runs} runs")


# ---- Pictures ----


def sheet(rows: list[tuple[str, list[Image.Image], list[str]]], side: int) -> Image.Image:
    """A picture of rows of images `side` pixels wide: each row has a title, and each image a caption."""
    left, step = 80, side + 26  # room for the titles on the left, and for the captions below
    page = Image.new("RGB", (left + max(len(row[1]) for row in rows) * (side + 4), len(rows) * step), "white")
    draw = ImageDraw.Draw(page)

    def write(x: int, y: int, text: str) -> None:
        draw.text((x, y), text.encode("latin-1", "replace").decode("latin-1"), fill="black")

    for row, (title, images, captions) in enumerate(rows):
        write(4, row * step + side // 2, title)
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
        raise UsageError(f"could not write the picture {path}: {error}") from error
    print(printable(f"wrote {path}"))


# ---- attention: where the two tokens look ----


def attention_maps(network: DeiT, images: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """How each front token's attention is spread over the patches: in layer `layer` (from 1), and rolled out.

    Images float (B, 3, S, S), normalised. Returns the maps of that layer's heads (B, F, heads, G, G) and the
    rollout of the layers up to it (B, F, G, G), each of sum 1. Attention rollout (Abnar & Zuidema, 2020):
    the product of all layers' mean attention, each mixed half and half with the identity for the residual
    connection.
    """
    with torch.no_grad():
        weights = network.attention_weights(images)[:layer]
    front, rollout = 2 if network.distilled else 1, torch.eye(weights[0].shape[-1], device=images.device)
    for each in weights:
        rollout = (each.mean(dim=1) + torch.eye(each.shape[-1], device=images.device)) / 2 @ rollout
    side = network.img_size // network.patch_embed.proj.kernel_size[0]

    def maps(rows: Tensor) -> Tensor:
        rows = rows[..., :front, front:]
        return (rows / rows.sum(dim=-1, keepdim=True)).unflatten(-1, (side, side))

    return maps(weights[-1]).transpose(1, 2), maps(rollout)


def overlay(picture: Image.Image, share: Tensor) -> Image.Image:
    """A map (G, G) in colour over the picture in grey: dark blue is 0, yellow the largest value."""
    grey = Image.fromarray((255 * share / share.max()).round().byte().cpu().numpy())
    grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
    heat = ImageOps.colorize(grey, (20, 11, 82), (253, 231, 37), mid=(204, 71, 120))
    return Image.blend(ImageOps.autocontrast(ImageOps.grayscale(picture)).convert("RGB"), heat, 0.55)


def attention(arguments: argparse.Namespace) -> None:
    """A picture of what each head of a layer attends to from the class and from the distillation token.

    Beside them the attention rollout of the layers up to that one. Yellow is a map's own largest share of the
    attention paid to patches, which is told below it; attention to the tokens themselves is not shown.
    """
    place, side, rows = alone(arguments.device), 112, []
    network, settings = open_network(arguments.checkpoint, place)
    if not isinstance(network, DeiT):
        raise UsageError(f"{arguments.checkpoint} is no transformer of ours; it has no tokens that attend")
    layer = arguments.layer or len(network.blocks)
    if layer > len(network.blocks):
        raise UsageError(f"--layer {layer}: the network has {len(network.blocks)} layers")
    for path in arguments.images:
        image = read_image(path)
        crop = crop_file(image, settings["img_size"], None)
        # The same crop, shown more finely than a network for small images sees it; whole images stay whole.
        whole = image.size in ((settings["img_size"],) * 2, (side, side))
        picture = to_pictures((crop if whole else crop_file(image, side, None))[None])[0]
        picture = picture.resize((side, side), Image.Resampling.BICUBIC)
        heads, rollout = attention_maps(network, normalize(crop[None].to(place.device)), layer)
        for token, own, rolled in zip(HEADS, heads[0], rollout[0], strict=False):
            shown = [*own, rolled]
            titles = [*(f"head {number + 1}" for number in range(len(own))), "rollout"]
            most = [f"up to {100 * share.max():.0f} %" for share in shown]
            captions = [", ".join(pair) for pair in zip(titles, most, strict=True)]
            images = [picture, *(overlay(picture, share) for share in shown)]
            rows.append((f"{token}\ntoken", images, ["input", *captions]))
    save_picture(lambda out: sheet(rows, side).save(out, optimize=True), arguments.out)


# ---- predict: names and probabilities ----


def image_paths(words: list[str]) -> Iterator[str]:
    """The images that the words name: files, folders (all images below, sorted), `-` for paths on stdin."""
    for word in words:
        if word == "-":
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        elif Path(word).is_dir():
            endings = torchvision.datasets.folder.IMG_EXTENSIONS
            found = sorted(str(path) for path in Path(word).rglob("*") if path.suffix.lower() in endings)
            if not found:
                raise UsageError(f"there are no images below {word}")
            yield from found
        else:
            yield word


def predict(arguments: argparse.Namespace) -> None:
    """The most probable classes of images, by each head and fused.

    An image that cannot be read is told on standard error; the others go on, and the exit code is 2 at the
    end. With --json a line of JSON an image: {"image": path, head: [{"name": class, "probability": p}, ...]}.
    """
    place, failed = alone(arguments.device), False
    network, settings = open_network(arguments.checkpoint, place)
    names = class_names(network, settings["num_classes"])
    for path in image_paths(arguments.images):
        try:
            crop = crop_file(read_image(path), settings["img_size"], None)
        except UsageError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
            failed = True
            continue
        with torch.no_grad(), autocast(settings, place.device):
            outputs = network(normalize(crop[None].to(place.device)))
        heads = [outputs] if isinstance(outputs, Tensor) else [*outputs, outputs]
        found = {}
        for head, logits in zip(HEADS, heads, strict=False):
            top = fuse(logits)[0].topk(min(arguments.top, len(names)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            found[head] = [{"name": names[label], "probability": share} for label, share in pairs]
        if arguments.json:
            print(json.dumps({"image": path} | found), flush=True)
            continue
        print(printable(path))
        for head, top in found.items():
            told = (f"{each['name']} {100 * each['probability']:.1f} %" for each in top)
            print(f"  {head:14}{printable('   '.join(told))}", flush=True)
    if failed:
        sys.exit(2)


# ---- curves: how runs went ----

# Okabe and Ito's colours, which the colour-blind can tell apart, without their yellow
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def read_log(run: str) -> list[dict]:
    """The records of a run's log.jsonl, one an epoch."""
    path = Path(run) if Path(run).is_file() else Path(run) / "log.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        curves = [(record["epoch"], record["loss"], record["accuracy"]["class"]) for record in records]
    except OSError as error:
        raise UsageError(f"could not read {path}: {error.strerror}; name a run's directory") from error
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(f"{path} is not the log of a run") from error
    if not curves:
        raise UsageError(f"{path} has no epoch yet")
    return records


def curves(arguments: argparse.Namespace) -> None:
    """A picture of the training loss and of each head's accuracy in validation, by epoch, of several runs."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UsageError("curves needs matplotlib, which is not installed; pip install matplotlib") from None
    logs, names = [read_log(run) for run in arguments.runs], short_names(arguments.runs)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles, marker = dict(zip(HEADS, ("-", "--", ":"), strict=True)), "o" if max(map(len, logs)) < 20 else ""
    for number, (name, log) in enumerate(zip(names, logs, strict=True)):
        look = dict(color=COLOURS[number % len(COLOURS)], marker=marker, markersize=3)
        epochs = [record["epoch"] for record in log]
        left.plot(
            epochs, [record["loss"] for record in log], label=printable(name).replace("$", r"\$"), **look
        )
        for head in log[0]["accuracy"]:
            right.plot(epochs, [record["accuracy"][head] for record in log], ls=styles[head], **look)
    heads = [head for head in HEADS if any(head in log[0]["accuracy"] for log in logs)]
    left.set(xlabel="epoch", title="training loss")
    right.set(xlabel="epoch", title="top-1 accuracy in validation (%)")
    left.legend()
    right.legend(handles=[Line2D([], [], color="gray", ls=styles[head], label=head) for head in heads])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    save_picture(lambda out: figure.savefig(out, dpi=110), arguments.out)


# ---- augmentations: the contact sheet ----

MAGNITUDES = (1, 3, 5, 7, 9, 10)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """uint8 (n, 3, H, W) as pictures."""
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def augmentations(arguments: argparse.Namespace) -> None:
    """A labelled sheet: RandAugment's operations by magnitude, and whole batches with their targets."""
    if arguments.images:
        size = (224, 224)
        images = [
            to_tensor(read_image(path).resize(size, Image.Resampling.BICUBIC)) for path in arguments.images
        ]
        folders = [Path(path).absolute().parent.name for path in arguments.images]
        images, classes = torch.stack(images), sorted(set(folders))
        labels = torch.tensor([classes.index(folder) for folder in folders])
    else:
        drawn = draw_shapes("val", 10, 64, torch.device("cpu"))
        images, labels, classes = drawn.images, drawn.labels, drawn.classes

    rows, count = [], len(MAGNITUDES)
    m = torch.tensor(MAGNITUDES, dtype=torch.float64) / 10
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(count)[:count]
    for name, operation in OPERATIONS.items():
        values = RANDAUGMENT_ARGUMENTS[name](m, sign).float()
        captions = [f"magnitude {magnitude}" for magnitude in MAGNITUDES]
        if name not in ("AutoContrast", "Equalize", "Invert"):
            captions = [
                f"{caption}\n{value:.3g}" for caption, value in zip(captions, values.tolist(), strict=True)
            ]
        rows.append((name, to_pictures(operation(images[-1:].expand(count, -1, -1, -1), values)), captions))

    batch = torch.arange(count) % len(images)
    for name, alphas in (("Mixup", {"mixup": 0.8, "cutmix": 0.0}), ("CutMix", {"mixup": 0.0, "cutmix": 1.0})):
        generator = keyed_generator("sheet", arguments.seed, name)
        cropped = random_crop(images[batch], images.shape[3], generator)
        augment = Augment(len(classes), smoothing=0.0, **alphas)
        inputs, targets = augment(cropped, labels[batch], generator)
        shown = 255 * (inputs * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))
        shares = [
            [(share, label) for label, share in enumerate(target) if share > 0] for target in targets.tolist()
        ]
        captions = [
            "\n".join(f"{100 * share:.0f}% {classes[label]}" for share, label in parts) for parts in shares
        ]
        rows.append((f"whole path,\n{name}", to_pictures(shown.round().clamp(0, 255).byte()), captions))
    save_picture(lambda out: sheet(rows, 72).save(out, optimize=True), arguments.out)


# ---- The program ----


def main() -> None:
    head, _, tail = __doc__.partition("\n")
    raw = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(prog="evaluate.py", description=head, epilog=f"examples:{tail}", **raw)
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")

    def add(act: Callable, text: str) -> argparse.ArgumentParser:
        examples = [line for line in tail.splitlines() if f"evaluate.py {act.__name__} " in line]
        more = dict(description=inspect.cleandoc(act.__doc__), epilog="\n".join(["examples:", *examples]))
        word = words.add_parser(act.__name__, help=text, **more, **raw)
        word.set_defaults(act=act)
        if act not in (curves, augmentations):
            word.add_argument("--device", choices=DEVICES, default="auto", help="[auto]")
        return word

    ckpt = dict(
        metavar="CKPT", help="a checkpoint, an official one's short name, or a torchvision classifier"
    )
    for act, text in (
        (accuracy, "top-1 and top-5 accuracy of each head; ImageNet-Real and ImageNet-V2"),
        (compare, "how often heads, networks and the truth disagree"),
        (tokens, "how alike the two tokens are"),
    ):
        word = add(act, text)
        word.add_argument("checkpoints", nargs="+", **ckpt)
        word.add_argument("--data", choices=DATA_NAMES, help="data set [the one each was trained on]")
        word.add_argument("--data-path", metavar="DIR", help="where it is [where it was in training]")
        word.add_argument(
            "--val", metavar="DIR", help="instead: images in DIR/CLASS/*, classes by name or number"
        )
        if act is accuracy:
            word.add_argument("--per-class", action="store_true", help="top-1 of every class too")
            word.add_argument("--real", metavar="JSON", help="ImageNet-Real's label file, real.json")

    word = add(throughput, "images/s of inference and training, FLOPs, memory")
    word.add_argument("checkpoint", nargs="?", **ckpt)
    for flag in ("--model", "--img-size", "--patch-size"):
        default, kind, text = SETTINGS["what to train on what"][flag[2:].replace("-", "_")]
        word.add_argument(flag, type=kind, help=f"{text} [{default}]")
    word.add_argument("--distilled", action="store_true", help="with a distillation token")
    word.add_argument("--batch-size", type=COUNT, help="images [the most that fit; 16 without a GPU]")
    word.add_argument("--runs", type=COUNT, default=30, help="how many to take the mean of [30]")
    _, kind, text = SETTINGS["running"]["precision"]
    word.add_argument("--precision", choices=kind, default="auto", help=f"{text} [auto]")
    word.add_argument("--compile", action="store_true", help=SETTINGS["running"]["compile"][2])

    word = add(attention, "a picture of where the two tokens look")
    word.add_argument("checkpoint", **ckpt)
    word.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    word.add_argument("--layer", type=COUNT, help="from 1 [the last]")
    word.add_argument("--out", metavar="PNG", default="attention.png", help="[attention.png]")

    word = add(predict, "class names and probabilities of images")
    word.add_argument("checkpoint", **ckpt)
    more = dict(nargs="+", metavar="IMAGE", help="files, folders, or - for a list of files on standard input")
    word.add_argument("images", **more)
    word.add_argument("--json", action="store_true", help="a line of JSON an image")
    word.add_argument("--top", type=COUNT, default=5, metavar="K", help="how many classes [5]")

    word = add(curves, "a picture of runs' losses and accuracies")
    word.add_argument("runs", nargs="+", metavar="RUN", help="directories of runs, or their log.jsonl")
    word.add_argument("--out", metavar="PNG", default="curves.png", help="[curves.png]")

    word = add(augmentations, "a picture of every augmentation")
    more = dict(nargs="*", metavar="IMAGE", help="files; their folders name their classes [ten drawn shapes]")
    word.add_argument("images", **more)
    word.add_argument("--out", metavar="PNG", default="augmentations.png", help="[augmentations.png]")
    word.add_argument("--seed", type=int, default=0, help="of the whole batches [0]")

    arguments = parser.parse_args()
    for name in ("val", "real"):  # before anything is downloaded or computed
        path = getattr(arguments, name, None)
        if path and not os.path.exists(path):
            raise UsageError(f"there is no {path}, which --{name} names")
    arguments.act(arguments)


if __name__ == "__main__":
    program(main)
