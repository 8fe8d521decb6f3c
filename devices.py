"""Where it is computed: a device for each process, its precision, and what the processes tell each other.

A first reading can skip this file. Without torchrun there is one process, and nothing is to be told.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch import UserError, choose_precision, device_type, rank, world_size


def init(name: str) -> torch.device:
    """The device called `name` (auto, cuda, mps or cpu), after joining the other processes, if any."""
    name = device_type(name)
    device, cuda = torch.device(name), name == "cuda"
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # --precision fp32 means it, in convolutions too
        torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest convolution is looked for
    if world_size() > 1:
        hour = timedelta(hours=1)  # rank 0 may download that long
        backend, device_id = ("nccl", device) if cuda else ("gloo", None)
        dist.init_process_group(backend, timeout=hour, device_id=device_id)
    return device


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """The context in which a network computes its matrix products at this --precision."""
    precision = choose_precision(precision, device.type)
    if precision == "fp32":
        yield
        return
    # On a CPU the backward of the fused attention is the slowest part of a step in bf16 (results/speed.md).
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, DTYPES[precision]), attention:
        yield


def all_reduce(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value) -> list:
    """The values, of any type, that all processes have, by rank; that of rank 0 is the first."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def check_equal(what: str, value) -> None:
    """Raises UserError unless all processes have the same value."""
    for other, theirs in enumerate(all_gather(value)):
        if theirs != value:
            raise UserError(f"process {other} has another {what}: {theirs}, not {value}")


def main_process_first(act: Callable):
    """What act() returns: rank 0 calls it first, then one process of each other machine, then the rest.

    So whoever comes later finds what was downloaded, on a disk that machines share or one of their own.
    """
    mine = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for turn in range(3):
        if turn == mine:
            result = act()
        all_gather(None)  # waits for all
    return result
