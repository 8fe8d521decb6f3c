"""Training: the loop for students, teachers and fine-tuning (section 6, Table 9).

    torchrun train.py --model tiny --distill hard                       # minutes on a laptop
    torchrun train.py --data cifar10 --model tiny --distill hard        # one GPU
    torchrun --nproc_per_node 8 train.py --data imagenet --data-path IMAGENET --model base --distill hard

`python train.py` is the same on one process. The defaults of a data set are its recipe (settings.py). A run
that was stopped or killed anywhere goes on with --resume; on one or two processes of a CPU it ends bit for
bit as if it never was, but for the times in its log.
"""

import hashlib
import json
import math
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import launch
from augment import Augment, keyed_generator, normalize
from checkpoint import Run, holds_run, read_log
from data import DataSet, eval_batches, fingerprint, load_data, steps_per_epoch, train_batches
from distill import LOSSES, predict
from labels import RememberedLabels
from launch import Progress, StopSignals, UserError, all_gather, all_reduce, autocast, print0, rank
from model import SIZES, create_model, fuse
from networks import check_class_order, create_convnet, create_teacher
from settings import INCIDENTAL, Settings, build_parser, check, complete, describe, saved_run, start_run

DataSets = list[DataSet]  # training and validation

# ---- Network, optimizer, schedule ----


def build_network(s: Settings, num_classes: int) -> nn.Module:
    """The network to train, with fresh weights that depend on the seed alone."""
    torch.manual_seed(s.seed)
    if s.model not in SIZES:
        # the layout that torch recommends for convolutions
        return create_convnet(s.model, num_classes, s.img_size).to(memory_format=torch.channels_last)
    names = ("img_size", "patch_size", "depth", "distilled", "dropout", "drop_path")
    return create_model(s.model, num_classes=num_classes, **{name: getattr(s, name) for name in names})


def build_optimizer(network: nn.Module, s: Settings) -> torch.optim.Optimizer:
    """AdamW or SGD, of what is not frozen; weight decay on matrices and convolutions only."""
    decayed, spared = [], []
    for name, parameter in network.named_parameters():
        token = name in ("cls_token", "dist_token", "pos_embed")
        if parameter.requires_grad:
            (spared if token or parameter.ndim < 2 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": s.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    device = decayed[0].device.type
    if s.optimizer == "sgd":  # not fused: after a first step that a GradScaler skips its momentum is garbage
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=False)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=device != "mps")


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
        with autocast(s.precision, device):
            outputs = network(normalize(images))
        yield labels, [outputs] if isinstance(outputs, Tensor) else [*outputs, fuse(outputs)]


def evaluate(network: nn.Module, data: DataSet, s: Settings, device: torch.device) -> dict[str, float]:
    """Top-1 accuracy in percent by head: `class`, and for a pair also `distillation` and `fused`.

    Every image counts once, on any number of processes.
    """
    if launch.world_size() > 1:
        for buffer in network.buffers():  # BatchNorm's statistics differ by process: those of rank 0 count
            dist.broadcast(buffer, 0)
    heads = HEADS if getattr(network, "distilled", False) else HEADS[:1]
    counts = torch.zeros(1 + len(heads), device=device)  # all, and those that each head has right
    for labels, scores in predictions(network, data, s, device):
        counts += torch.stack([labels >= 0, *(head.argmax(dim=1) == labels for head in scores)]).sum(dim=1)
    seen, *right = all_reduce(counts).tolist()
    if seen == 0:
        raise UserError("none of the validation images can be read")
    return {head: 100 * count / seen for head, count in zip(heads, right, strict=True)}


def accuracy_line(accuracy: dict[str, float]) -> str:
    """`class 71.20 %  distillation 73.15 %  fused 73.40 %`."""
    return "  ".join(f"{head} {percent:.2f} %" for head, percent in accuracy.items())


def top1(accuracy: dict[str, float]) -> float:
    """The accuracy by which checkpoints are compared: the fused prediction's where there is one."""
    return accuracy.get("fused", accuracy["class"])


# ---- The loop ----


def train(
    network: nn.Module, s: Settings, data: DataSets, device: torch.device, teacher: nn.Module | None = None
) -> dict[str, float]:
    """Trains a network from the weights that it has, or goes on where its run in s.out was stopped.

    Returns the accuracies at the end. A signal to stop ends the program, after a save.
    """
    train_set, val_set = data
    per_epoch, loss_function = steps_per_epoch(train_set, s), LOSSES[s.distill].function
    steps, warmup = s.epochs * per_epoch, round(s.warmup_epochs * per_epoch)

    network = network.to(device)
    ema = None
    if s.ema:
        ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(s.ema), use_buffers=True)
        ema.n_averaged += 1  # the average starts from the initial weights
    optimizer = build_optimizer(network, s)
    scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
    run = Run(network, optimizer, scaler, ema, asdict(s) | {"classes": train_set.classes}, per_epoch)
    if s.resume and holds_run(s.out):
        run.resume()
    launch.check_equal("step to go on from", run.step)
    start_run(s)  # a second time, now with the teacher's weights among the settings

    # `network` holds the weights; `model` is the same, compiled or with its gradients averaged
    model = torch.compile(network) if s.compile else network
    if launch.world_size() > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    batches = train_batches(train_set, s, run.step, device)
    augment = Augment(len(train_set.classes), s.augment, s.erasing, s.mixup, s.cutmix, s.smoothing)
    progress = Progress(steps, s.batch_size)
    signals = StopSignals()
    for epoch in range(len(run.log), s.epochs):
        network.train()
        first, started = run.step, time.monotonic()  # an epoch that is resumed has its rest's times
        while run.step < (epoch + 1) * per_epoch:
            lr = learning_rate(run.step, steps, warmup, s)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for part in range(s.accumulate):
                # What is random depends on these numbers alone, so a resumed run draws the same.
                key = (s.seed, run.step, part, rank())
                images, labels = next(batches)  # uint8 (B, 3, S, S), int64 (B,)
                inputs, targets = augment(images, labels, keyed_generator("augment", *key))
                torch.manual_seed(keyed_generator("model", *key).initial_seed())  # dropout, stochastic depth
                if launch.world_size() > 1:  # gradients are averaged over the processes after the last part
                    model.require_backward_grad_sync = part == s.accumulate - 1
                with autocast(s.precision, device):
                    # The teacher sees exactly the inputs that the student sees.
                    teacher_logits = predict(teacher, inputs, key) if teacher else None
                    outputs = model(inputs)
                    loss = loss_function(outputs, targets, teacher_logits, s) / s.accumulate
                scaler.scale(loss).backward()
                run.loss_sum += loss.detach()
            if s.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), s.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(network)
            run.step += 1

            if progress.due(run.step):
                run.check_finite(run.loss_sum)
                mean = run.loss_sum.item() / (run.step - epoch * per_epoch)
                text = f"epoch {epoch + 1}  step {run.step}/{steps}  loss {mean:.3f}  lr {lr:.2e}"
                progress.show(run.step, text)
            stop = signals.asked(run.step)
            if stop or (s.save_every and run.step % s.save_every == 0 and run.step % per_epoch):
                run.save()
            if stop:
                name = signal.Signals(stop).name
                text = (
                    f"stopped by {name} after step {run.step} of {steps}; all is saved; go on with --resume"
                )
                launch.end_program(text if rank() == 0 else "", 128 + stop)

        rate = (run.step - first) * s.batch_size / (time.monotonic() - started)
        run.save()  # before the evaluation: whoever is killed in it evaluates again
        loss = all_reduce(run.loss_sum.clone()).item() / launch.world_size() / per_epoch
        accuracy = evaluate(ema.module if ema else network, val_set, s, device)
        best = top1(accuracy) > max((top1(record["accuracy"]) for record in run.log), default=-1)
        lr = learning_rate(run.step - 1, steps, warmup, s)
        record = {"epoch": epoch + 1, "step": run.step, "lr": lr, "loss": loss, "accuracy": accuracy}
        record |= {"seconds": round(time.monotonic() - started, 1), "images_per_second": round(rate, 1)}
        run.end_epoch(record, best)
        broken = set().union(*all_gather(train_set.broken | val_set.broken))
        if broken:
            named = ", ".join(sorted(broken)[:3])
            print0(f"{len(broken)} image files cannot be read so far and are left out, such as {named}")
        print0(f"epoch {epoch + 1}/{s.epochs}  loss {loss:.3f}  val {accuracy_line(accuracy)}")
    signals.restore()
    return run.log[-1]["accuracy"]


# ---- The teacher ----


def train_teacher(s: Settings, data: DataSets, device: torch.device) -> str:
    """The checkpoint of a teacher trained on the same data, from an earlier run or from now.

    It has its data set's recipe, whatever the student's flags. It is trained in a directory within the
    student's run and then moved beside that. The directory's name ends in a hash of all that decides what the
    teacher becomes, so that students of any settings and seeds share one, and another data set never does.
    """
    names = ("data", "data_path", "limit", "img_size", *(("patch_size",) if s.teacher in SIZES else ()))
    given = {name: getattr(s, name) for name in names}
    t = complete(given | {"model": s.teacher, "epochs": s.teacher_epochs})
    identity = {name: value for name, value in asdict(t).items() if name not in INCIDENTAL}
    identity |= {"classes": data[0].classes, "images": len(data[0])}
    identity |= {"data_path": "" if s.data == "shapes" else str(Path(s.data_path).resolve())}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    name = f"teacher-{t.data}-{t.img_size}px-{t.model}-{digest}"
    own, shared = Path(s.out) / name, Path(s.out).parent / name
    for out in (shared, own):
        log = all_gather(read_log(out))[0]
        if len(log) == t.epochs:
            print0(f"teacher: {out}/last.pth, trained earlier, {top1(log[-1]['accuracy']):.2f} % top-1")
            check_teacher(top1(log[-1]["accuracy"]), data[1])
            return str(out / "last.pth")

    print0(f"teacher: training a {t.model} first, {t.epochs} epochs; it is kept in {shared}")
    t.out, t.resume = str(own), True
    t.precision, t.device, t.workers, t.compile = s.precision, s.device, s.workers, s.compile
    t.accumulate, parts = s.accumulate, launch.world_size() * s.accumulate
    t.batch_size = max(1, min(t.batch_size, len(data[0])) // parts) * parts
    own.mkdir(parents=True, exist_ok=True)
    accuracy = train(build_network(t, len(data[0].classes)), t, data, device)
    print0(f"teacher: {top1(accuracy):.2f} % top-1")
    if rank() == 0 and not shared.exists():  # or another run has put one there, which stays
        own.rename(shared)
    check_teacher(top1(accuracy), data[1])
    return str(all_gather(own if own.exists() else shared)[0] / "last.pth")


def check_teacher(accuracy: float, val_set: DataSet) -> None:
    """Raises UserError where a teacher is no better than to name the largest class of every image."""
    counts = torch.as_tensor(val_set.labels).bincount()
    largest = 100 * counts.max().item() / len(val_set)
    if accuracy <= largest:
        text = f"the teacher has {accuracy:.2f} %, where naming the largest class alone has {largest:.2f} %"
        remedy = "raise --teacher-epochs, name a better one with --teacher-weights, or use --distill none"
        raise UserError(f"{text}; {remedy}")


def load_teacher(s: Settings, data: DataSets, device: torch.device) -> nn.Module | RememberedLabels:
    """The teacher in s.teacher_weights, on the device; it is trained first if there are none."""
    s.teacher_weights = s.teacher_weights or train_teacher(s, data, device)
    labels = RememberedLabels(s, data[0], device) if s.remember_labels else None
    if labels and labels.complete:
        return labels
    classes = data[0].classes
    sizes = dict(img_size=s.img_size, patch_size=s.patch_size)
    teacher = create_teacher(s.teacher, len(classes), s.teacher_weights, **sizes).to(device)
    if teacher.classes is None:
        check_class_order(s.teacher_weights, classes, len(classes))
    elif teacher.classes != classes:
        odd = next(n for n in range(len(classes)) if teacher.classes[n] != classes[n])
        names = f"class {odd} is {teacher.classes[odd]!r} there and {classes[odd]!r} here"
        raise UserError(f"{s.teacher_weights} was trained on other classes than the student's: {names}")
    if s.compile:
        teacher.compile()
    if s.teacher not in SIZES:
        teacher = teacher.to(memory_format=torch.channels_last)
    return labels.of(teacher) if labels else teacher


# ---- The program ----


def begin(s: Settings, device: torch.device) -> tuple[DataSets, nn.Module]:
    """Refuses what cannot work, loads the data, makes the network, and prints and keeps the settings."""
    check(s)
    data = load_data(s, device)
    train_set, val_set = data
    digests = " + ".join(map(fingerprint, data))
    launch.check_equal("data set", f"{len(train_set)} + {len(val_set)} images ({digests})")
    if LOSSES[s.distill].teacher and s.teacher_weights == "published":
        check_class_order("published", train_set.classes, 1000)
    steps = steps_per_epoch(train_set, s)
    print0(
        f"{s.data}: {len(train_set)} training and {len(val_set)} validation images, "
        f"{len(train_set.classes)} classes; {device} × {launch.world_size()}, torch {torch.__version__}"
    )
    counts = Counter(torch.as_tensor(train_set.labels).tolist())
    names = [f"{name} {counts[label]}" for label, name in enumerate(train_set.classes)]
    print0(f"  {', '.join(names[:10])}{f' and {len(names) - 10} more' if len(names) > 10 else ''}")
    describe(s)
    network = build_network(s, len(names))
    size, peak = sum(p.numel() for p in network.parameters()), s.lr * s.batch_size / 512
    print0(f"{size:,} parameters, {s.epochs * steps} steps, learning rate {peak:.3g}; the run is in {s.out}")
    if steps < 10 and getattr(s, "train", "all") == "all":  # not of the heads alone: results/head.md
        print0(f"an epoch has only {steps} steps: of so few images a smaller --batch-size learns more")
    start_run(s)
    return data, network


def finish(s: Settings, accuracy: dict[str, float], started: float) -> None:
    """Tells what came out, where it is, and what to do next."""
    if rank() > 0:
        return
    minutes, begin = (time.monotonic() - started) / 60, "--resume" if s.resume else "the start"
    print0(f"\n{s.model} on {s.data}, top-1 in validation, {minutes:.1f} minutes after {begin}:")
    for head, percent in accuracy.items():
        print0(f"  {head:12} {percent:6.2f} %")
    best = max(read_log(Path(s.out)), key=lambda record: top1(record["accuracy"]))
    told = f"best.pth (epoch {best['epoch']}, {top1(best['accuracy']):.2f} %)"
    print0(f"The run is in {s.out}: last.pth, {told}, log.jsonl, settings.json.")
    print0(f"Next:  python evaluate.py accuracy {s.out}/last.pth")


def main() -> None:
    started = time.monotonic()
    given = vars(build_parser("train.py", __doc__).parse_args())
    s = complete(given)
    s = saved_run(given, s.out) or s
    device = launch.init(s.device)
    data, network = begin(s, device)
    teacher = load_teacher(s, data, device) if LOSSES[s.distill].teacher else None
    accuracy = train(network, s, data, device, teacher)
    finish(s, accuracy, started)


if __name__ == "__main__":
    launch.run_program(main)
