"""The teacher's labels, kept in a file for the next student. A first reading can skip this file.

    torchrun train.py --model tiny --distill hard --remember-labels

Hard distillation needs no more of a teacher than one label for each sample. All that is random is keyed, so
runs that agree in what decides the inputs show a teacher the same batches in the same order: the second run
reads what it said to the first, and does not even load it. Students of any size, learning rate or stochastic
depth, with and without the token, share a file. Fast knowledge distillation (Shen & Xing, 2022) stores labels
beside the crops that they belong to; here the crops can be drawn again.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import DataSet, steps_per_epoch
from devices import all_gather
from distill import Teacher
from launch import hash_of, print0, rank, world_size
from settings import Settings

# What decides what a teacher sees and says, besides its weights, the data and the program
DECIDING = ("teacher", "img_size", "patch_size", "augment", "mixup", "cutmix", "erasing", "repeats")
DECIDING += ("batch_size", "accumulate", "precision", "seed")


class RememberedLabels:
    """A teacher that answers from a file with its label of every sample that this process trains on.

    `origin` names its checkpoint; `load` gives the teacher itself, and is called only if a label is missing.
    """

    def __init__(
        self, s: Settings, train_set: DataSet, origin: dict, load: Callable[[], Teacher], device: torch.device
    ):
        self.origin, self.num_classes = origin, len(train_set.classes)
        deciding = [getattr(s, name) for name in DECIDING]
        deciding += [train_set.fingerprint, origin["teacher_hash"], device.type, rank(), world_size()]
        deciding += [torch.__version__, np.__version__]  # other versions may draw otherwise, or an edit
        program = [Path(__file__).with_name(f"{name}.py") for name in ("augment", "image_files", "data")]
        deciding += [hash_of(path.read_bytes()) for path in program]
        path = Path(s.out).parent / f"labels-{hash_of(deciding)}"

        steps = s.epochs * steps_per_epoch(train_set, s)
        shape = (steps, s.accumulate, s.batch_size // world_size() // s.accumulate)
        # Counted from 1. What the file does not hold, because it ends or has a hole, reads as 0.
        self.labels = np.zeros(shape, np.uint8 if self.num_classes < 256 else np.uint16)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        stored = np.fromfile(path, self.labels.dtype, self.labels.size)
        self.labels.flat[: len(stored)] = stored
        self.on_device = torch.from_numpy(self.labels).to(device)
        self.file = open(path, "r+b", buffering=0)  # noqa: SIM115
        share, size = 100 * (self.labels > 0).mean(), self.labels.nbytes / 1e6
        print0(f"the teacher's labels: {path}, {size:.1f} MB for each process, {share:.0f} % are known")
        self.teacher = None if all(all_gather(bool(self.labels.all()))) else load()

    def logits(self, inputs: Tensor, key: tuple) -> Tensor:
        """The labels of the inputs of that key (seed, step, part, rank), as one-hot logits (B, C)."""
        _, step, part, _ = key
        if self.labels[step, part].all():
            labels = self.on_device[step, part].long() - 1
        else:
            labels = self.teacher.logits(inputs, key).argmax(dim=-1)
            self.labels[step, part] = labels.cpu() + 1
            self.file.seek(self.labels[:step].nbytes + self.labels[step, :part].nbytes)
            self.file.write(self.labels[step, part])
        return F.one_hot(labels, self.num_classes)
