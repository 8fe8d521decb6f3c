"""Distillation: the losses of equations 2 and 3, and how a teacher is asked (section 4, Table 3).

The student's `outputs` are one tensor of logits (no distillation token: both terms of the loss act on the
class logits, "usual distillation") or the pair (class logits, distillation logits): the true label then
teaches the class token and the teacher teaches the distillation token.

    python train.py --model tiny --distill hard
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import upcast
from settings import Settings

Outputs = Tensor | tuple[Tensor, Tensor]


def soft_distillation_loss(
    outputs: Outputs, targets: Tensor, teacher_logits: Tensor, tau: float = 3.0, lam: float = 0.1
) -> Tensor:
    """Equation 2: (1 - λ) CE(ψ(Zs), y) + λ τ² KL(ψ(Zs/τ), ψ(Zt/τ)), the mean over the batch.

    ψ is the softmax, Zs and Zt are the student's and the teacher's logits; of a pair each term has its own.
    `outputs` (B, C) or a pair of them; `targets` are class probabilities float (B, C), smoothed by the
    caller, or labels int64 (B,); `teacher_logits` (B, C). KL is written as torch has it,
    student first: Σ teacher · log(teacher / student).
    """
    class_logits, dist_logits = split(outputs)
    student, teacher = (F.log_softmax(z / tau, dim=-1) for z in (dist_logits, upcast(teacher_logits)))
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return (1 - lam) * F.cross_entropy(class_logits, targets) + lam * tau**2 * divergence


def hard_distillation_loss(outputs: Outputs, targets: Tensor, teacher_logits: Tensor) -> Tensor:
    """Equation 3: ½ CE(ψ(Zs), y) + ½ CE(ψ(Zs), y_t), y_t = argmax Zt, the mean over the batch.

    Arguments as in `soft_distillation_loss`. The teacher's label is never smoothed (section 4).
    """
    class_logits, dist_logits = split(outputs)
    teacher_labels = teacher_logits.argmax(dim=-1)
    return (F.cross_entropy(class_logits, targets) + F.cross_entropy(dist_logits, teacher_labels)) / 2


def label_loss(outputs: Outputs, targets: Tensor) -> Tensor:
    """Cross-entropy with the true label; of a pair the mean of both, the paper's control (section 5.2)."""
    class_logits, dist_logits = split(outputs)
    if isinstance(outputs, Tensor):
        return F.cross_entropy(class_logits, targets)
    return (F.cross_entropy(class_logits, targets) + F.cross_entropy(dist_logits, targets)) / 2


def split(outputs: Outputs) -> tuple[Tensor, Tensor]:
    """The logits that learn from the label and those that learn from the teacher, in float32 at least."""
    class_logits, dist_logits = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
    return upcast(class_logits), upcast(dist_logits)


# The loss of each choice of --distill: of (outputs, targets, teacher logits or None, settings)
LOSSES: dict[str, Callable[[Outputs, Tensor, Tensor | None, Settings], Tensor]] = {
    "none": lambda outputs, y, z, s: label_loss(outputs, y),
    "soft": lambda outputs, y, z, s: soft_distillation_loss(outputs, y, z, s.tau, s.lam),
    "hard": lambda outputs, y, z, s: hard_distillation_loss(outputs, y, z),
    "label": lambda outputs, y, z, s: label_loss(outputs, y),
}


class Teacher:
    """A frozen network of `create_teacher`, in evaluation mode, and what it says of the student's inputs."""

    def __init__(self, network: nn.Module, origin: dict[str, str]):
        self.network, self.origin = network, origin  # teacher_weights, its checkpoint, and that one's hash

    @torch.no_grad()
    def logits(self, inputs: Tensor, key: tuple) -> Tensor:
        """Logits (B, C) of the inputs float (B, 3, S, S) of a training step, whose `key` labels.py needs.

        The inputs are resized if the network was made for another size. A network with two heads speaks
        through their fusion: the softmax of what is returned is the fused prediction.
        """
        size = (self.network.img_size, self.network.img_size)
        if inputs.shape[2:] != size:
            inputs = F.interpolate(inputs, size, mode="bicubic", antialias=True)
        outputs = self.network(inputs)
        if isinstance(outputs, Tensor):
            return outputs
        # log of the mean of the softmaxes, without the underflow of taking the mean first
        return torch.stack([z.float().log_softmax(dim=-1) for z in outputs]).logsumexp(dim=0) - math.log(2)


def __getattr__(name: str):
    """`create_teacher` and `load_network` are in networks.py; scripts may still import them from here."""
    if name in ("create_teacher", "load_network"):
        import networks

        return getattr(networks, name)
    raise AttributeError(f"module 'distill' has no attribute {name!r}")
