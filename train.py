"""Training: the loop for students, teachers and fine-tuning (section 6, Table 9).

    python train.py --model tiny --distill hard      # minutes on a laptop
    torchrun --nproc_per_node 8 train.py --data imagenet --data-path IMAGENET --model base --distill hard

`train` is the loop, and `main` at the end is a run from its flags to its accuracy. A run that was stopped or
killed anywhere goes on with --resume; on one or two processes of a CPU it ends bit for bit as if it had not.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import devices
import flags
import launch
import networks
import runs
import settings
from augment import Augment, keyed_generator, normalize
from checkpoint import locate
from data import DataSet, eval_batches, load_data, steps_per_epoch, train_batches
from distill import LOSSES, Teacher
from labels import RememberedLabels
from launch import print0, rank, world_size
from model import create_model, fuse
from settings import Settings

# ---- Network, optimizer, schedule ----


def build_network(s: Settings, num_classes: int) -> nn.Module:
    """The network to train, with fresh weights that depend on the seed alone."""
    torch.manual_seed(s.seed)
    if s.model not in settings.TRANSFORMERS:
        return networks.create_convnet(s.model, num_classes, s.img_size)
    names = ("img_size", "patch_size", "depth", "distilled", "dropout", "drop_path")
    return create_model(s.model, num_classes=num_classes, **{name: getattr(s, name) for name in names})


def build_optimizer(network: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """AdamW or SGD, of what is not frozen; weight decay on matrices and convolutions only."""
    decay, no_decay = [], []
    for name, parameter in network.named_parameters():
        token = name in ("cls_token", "dist_token", "pos_embed")
        if parameter.requires_grad:
            (no_decay if token or parameter.ndim < 2 else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": s.weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    device = decay[0].device.type
    if s.optimizer == "sgd":  # not fused: after a first step that a GradScaler skips its momentum is garbage
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=False)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=device != "mps")


def build_ema(network: nn.Module, decay: float) -> AveragedModel:
    """The moving average of a network's weights and buffers, which starts from those that it has."""
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    ema.n_averaged += 1
    return ema


def learning_rate(step: int, steps: int, warmup: int, s: Settings) -> float:
    """A cosine from the peak at step 0 to min_lr at step `steps`; linear warm-up replaces its first steps.

    The cosine has fallen a little from the peak when it takes over, as in the authors' code.
    """
    peak = s.lr * s.batch_size / 512
    if step < warmup:
        return s.warmup_lr + (peak - s.warmup_lr) * step / warmup
    low = min(s.min_lr, peak)
    return low + (peak - low) * (1 + math.cos(math.pi * step / steps)) / 2


# ---- Evaluation ----

HEADS = ("class", "distillation", "fused")


@torch.no_grad()
def predictions(
    network: nn.Module, data: DataSet, s: Settings, device: torch.device
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Labels (B,) and each head's scores (B, C), batch by batch: every image once over all processes.

    The heads are the class head and, of a pair, the distillation head and the fused prediction. A process
    sees the images rank, rank + world_size, rank + 2 world_size and so on.
    """
    network.eval()
    for images, labels in eval_batches(data, s, device):
        with devices.autocast(s.precision, device):
            outputs = network(normalize(images))
        yield labels, [outputs] if isinstance(outputs, Tensor) else [*outputs, fuse(outputs)]


def evaluate(network: nn.Module, data: DataSet, s: Settings, device: torch.device) -> dict[str, float]:
    """Top-1 accuracy in percent by head: `class`, and for a pair also `distillation` and `fused`.

    Every image counts once, on any number of processes.
    """
    if world_size() > 1:
        for buffer in network.buffers():  # BatchNorm's statistics differ by process: those of rank 0 count
            dist.broadcast(buffer, 0)
    names = HEADS if getattr(network, "distilled", False) else HEADS[:1]
    counts = torch.zeros(1 + len(names), device=device)  # of images, and of those that each head has right
    for labels, scores in predictions(network, data, s, device):
        counts[0] += len(labels)
        counts[1:] += torch.stack([(head.argmax(dim=1) == labels).sum() for head in scores])
    seen, *right = devices.all_reduce(counts).tolist()
    if seen == 0:
        raise launch.UserError("none of the validation images can be read")
    return {name: 100 * count / seen for name, count in zip(names, right, strict=True)}


# ---- The loop ----


def train(
    network: nn.Module,
    s: Settings,
    train_set: DataSet,
    val_set: DataSet,
    device: torch.device,
    teacher: Teacher | RememberedLabels | None = None,
) -> dict[str, float]:
    """Trains a network from the weights that it has, or goes on where its run in s.out was stopped.

    Returns the accuracies at the end. A signal to stop ends the program, after a save.
    """
    per_epoch = steps_per_epoch(train_set, s)
    steps, warmup = s.epochs * per_epoch, round(s.warmup_epochs * per_epoch)
    network = network.to(device)
    ema = build_ema(network, s.ema) if s.ema else None
    optimizer = build_optimizer(network, s)
    scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
    used = {"classes": train_set.classes, "fingerprint": train_set.fingerprint + val_set.fingerprint}
    used |= teacher.origin if teacher else {}
    run = runs.Run(asdict(s) | used, per_epoch, network, optimizer, scaler, ema)
    step, log, loss_so_far = 0, [], 0.0
    if s.resume and runs.holds_run(s.out):
        step, log, loss_so_far = run.load()
    else:
        runs.remove_run(s)
    devices.check_equal("step to go on from", step)
    if len(log) < s.epochs:
        runs.save_settings(s)
    # The sum of the epoch's losses in this process. In float64 the order of adding hardly matters.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    loss_sum = torch.tensor(loss_so_far, device=device, dtype=dtype)

    # `network` holds the weights; `model` wraps it to compile it and to average gradients over processes
    model = torch.compile(network) if s.compile else network
    if world_size() > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    batches = train_batches(train_set, s, step, device)
    augment = Augment(len(train_set.classes), s.augment, s.erasing, s.mixup, s.cutmix, s.smoothing)
    loss_function = LOSSES[s.distill]
    progress, signals = launch.Progress(steps, s.batch_size), launch.StopSignals()
    for epoch in range(len(log), s.epochs):
        network.train()
        first, started = step, time.monotonic()
        while step < (epoch + 1) * per_epoch:
            lr = learning_rate(step, steps, warmup, s)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for part in range(s.accumulate):
                # What is random depends on these numbers alone, so a resumed run draws the same.
                key = (s.seed, step, part, rank())
                images, labels = next(batches)  # uint8 (B, 3, S, S), int64 (B,)
                inputs, targets = augment(images, labels, keyed_generator("augment", *key))
                torch.manual_seed(keyed_generator("model", *key).initial_seed())  # dropout, stochastic depth
                if world_size() > 1:  # gradients are averaged over the processes after the last part
                    model.require_backward_grad_sync = part == s.accumulate - 1
                with devices.autocast(s.precision, device):
                    # The teacher sees exactly the inputs that the student sees.
                    teacher_logits = teacher.logits(inputs, key) if teacher else None
                    outputs = model(inputs)
                    loss = loss_function(outputs, targets, teacher_logits, s) / s.accumulate
                scaler.scale(loss).backward()
                loss_sum += loss.detach()
            if s.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), s.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(network)
            step += 1

            if signals.asked() or (s.save_every and step % s.save_every == 0 and step % per_epoch):
                run.save(step, log, loss_sum)
                signals.end_if_asked(step, steps)
            if progress.due(step):
                run.check_finite(step)
                mean = loss_sum.item() / (step - epoch * per_epoch)
                progress.show(step, f"epoch {epoch + 1}  step {step}/{steps}  loss {mean:.3f}  lr {lr:.2e}")

        rate = (step - first) * s.batch_size / (time.monotonic() - started)
        run.save(step, log, loss_sum)  # a run that is killed in its evaluation then only evaluates again
        accuracy = evaluate(ema.module if ema else network, val_set, s, device)
        best = runs.top1(accuracy) > max((runs.top1(record["accuracy"]) for record in log), default=-1)
        loss = devices.all_reduce(loss_sum).item() / world_size() / per_epoch
        lr = learning_rate(step - 1, steps, warmup, s)
        record = {"epoch": epoch + 1, "step": step, "lr": lr, "loss": loss, "accuracy": accuracy}
        record |= {"seconds": round(time.monotonic() - started, 1), "images_per_second": round(rate, 1)}
        log.append(record)
        run.end_epoch(step, log, best)
        loss_sum.zero_()
        print0(f"epoch {epoch + 1}/{s.epochs}  loss {loss:.3f}  val {runs.accuracy_line(accuracy)}")
        if broken := set().union(*devices.all_gather(train_set.broken | val_set.broken)):
            print0(f"{len(broken)} image files cannot be read so far and are left out, such as {min(broken)}")
        signals.end_if_asked(step, steps)  # one that came during the evaluation
    signals.restore()
    return log[-1]["accuracy"]


# ---- The teacher ----


def teacher_settings(s: Settings, train_set: DataSet) -> Settings:
    """How the teacher of a run is trained: by its data set's recipe, whatever the student's other settings.

    Its directory stands beside the student's. Its name ends in a hash of its recipe and of the training
    images, so that students of any settings and seeds share one, and other data never do.
    """
    shared = ["data", "data_path", "limit", "img_size", "precision", "device", "workers", "compile"]
    shared += ["accumulate", "save_every"] + ["patch_size"] * (s.teacher in settings.TRANSFORMERS)
    given = {name: getattr(s, name) for name in shared} | {"model": s.teacher, "epochs": s.teacher_epochs}
    t = settings.complete(given | {"resume": True})
    t.batch_size = settings.fit_batch_size(t.batch_size, len(train_set), world_size() * s.accumulate)
    deciding = [item for item in asdict(t).items() if item[0] not in runs.WITHOUT_EFFECT | {"precision"}]
    digits = launch.hash_of(deciding, train_set.fingerprint)[:8]
    t.out = str(Path(s.out).parent / f"teacher-{s.data}-{s.img_size}px-{s.teacher}-{digits}")
    return t


def train_teacher(s: Settings, train_set: DataSet, val_set: DataSet, device: torch.device) -> str:
    """The checkpoint of a teacher of the same data: a run like any other, and one that has ended is read."""
    t = teacher_settings(s, train_set)
    runs.lock_run(s.out)
    if not runs.holds_run(s.out):
        runs.save_settings(s)  # --resume finds them if the teacher's training is stopped
    elif s.resume and not runs.holds_run(t.out):
        raise launch.UserError(f"{t.out} holds no teacher; name that of the run with --teacher-weights")
    if len(runs.read_log(t.out)) < t.epochs:
        runs.lock_run(t.out)
    print0(f"teacher: a {t.model} of {t.epochs} epochs, in {t.out}")
    accuracy = runs.top1(train(build_network(t, len(train_set.classes)), t, train_set, val_set, device))
    print0(f"teacher: {accuracy:.2f} % top-1")
    check_teacher(accuracy, val_set)
    return f"{t.out}/last.pth"


def check_teacher(accuracy: float, val_set: DataSet) -> None:
    """Raises UserError where a teacher is no better than to name the largest class of every image."""
    largest = 100 * torch.as_tensor(val_set.labels).bincount().max().item() / len(val_set)
    if accuracy <= largest:
        text = f"the teacher has {accuracy:.2f} %, where naming the largest class alone has {largest:.2f} %"
        remedy = "raise --teacher-epochs, name a better one with --teacher-weights, or use --distill none"
        raise launch.UserError(f"{text}; {remedy}")


def load_teacher(
    s: Settings, train_set: DataSet, val_set: DataSet, device: torch.device
) -> Teacher | RememberedLabels:
    """The teacher in s.teacher_weights, on the device; it is trained first if there are none."""
    classes = train_set.classes
    if s.teacher_weights == "published" and not networks.is_imagenet(classes, len(classes)):
        raise launch.UserError(f"published knows ImageNet's classes; the data set has others: {classes[0]!r}")
    weights = s.teacher_weights or train_teacher(s, train_set, val_set, device)
    file = locate(networks.published_url(s.teacher) if weights == "published" else weights)
    origin = {"teacher_weights": str(weights), "teacher_hash": launch.hash_of(file.read_bytes())}

    def load() -> Teacher:
        sizes = dict(img_size=s.img_size, patch_size=s.patch_size)
        network = networks.create_teacher(s.teacher, len(classes), weights, **sizes).to(device)
        networks.check_classes(weights, network.classes, classes)
        if network.img_size != s.img_size:  # docs/finetune.md has how to bring it along
            print0(f"the teacher sees the images at its own {network.img_size} pixels")
        if s.compile:
            network.compile()
        return Teacher(network, origin)

    return RememberedLabels(s, train_set, origin, load, device) if s.remember_labels else load()


# ---- The program ----

ABOUT = """Trains a DeiT, or a convnet that teaches one, such as:  python train.py --model tiny --distill hard

[Values in brackets] are those of bare `python train.py`, the recipe of shapes. Other data sets have other
recipes, which RECIPES in settings.py shows; --data imagenet has the paper's."""


def train_parser() -> flags.Parser:
    """The flags, and their values for bare `python train.py`."""
    return flags.build_parser("train.py", ABOUT, asdict(settings.complete({})) | {"precision": "auto"})


def main() -> None:
    started = time.monotonic()
    given = vars(train_parser().parse_args())
    s = settings.complete(given)
    resumed = runs.resumed_settings(given, s.out)
    s = resumed or s
    flags.check(s, given)
    networks.check_networks(s)
    device = devices.init(s.device)
    train_set, val_set = load_data(s, device)
    if "batch_size" not in given and not resumed:
        s.batch_size = settings.fit_batch_size(s.batch_size, len(train_set), world_size() * s.accumulate)
    network = build_network(s, len(train_set.classes))
    runs.introduce(s, network, train_set, val_set, device)
    teacher = load_teacher(s, train_set, val_set, device) if s.needs_teacher else None
    runs.lock_run(s.out)
    runs.report(s, train(network, s, train_set, val_set, device, teacher), started)


if __name__ == "__main__":
    launch.run_program(main)
