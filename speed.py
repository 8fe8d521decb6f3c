"""How fast a network is: its FLOPs, the peak of a device, and timed steps (Table 1, Figure 1).

python evaluate.py throughput --model tiny
"""

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import augment
import devices
from distill import label_loss
from settings import Settings
from train import build_optimizer


def count_flops(network: nn.Module, size: int) -> int:
    """Floating-point operations of one image's inference, a multiply-add counting two: torch's counter."""
    network = copy.deepcopy(network).eval().to("meta")  # where nothing is computed
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 3, size, size, device="meta"))
    return counter.get_total_flops()


def seconds(step: Callable[[], object], runs: int, device: torch.device) -> float:
    """The mean time of one step() over so many runs, after 3 that do not count."""
    wait = getattr(torch, device.type).synchronize
    for repeats in (3, runs):
        wait()
        started = time.perf_counter()
        for _ in range(repeats):
            step()
    wait()
    return (time.perf_counter() - started) / runs


def matmul_peak(dtype: torch.dtype, device: torch.device) -> tuple[float, int]:
    """FLOP/s of the best of several square matrix products, and their side."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / min(seconds(lambda: a @ b, 3, device) for _ in range(5)), side


def timed_steps(network: nn.Module, s: Settings, images: Tensor) -> tuple[Callable, Callable, Callable]:
    """A step of inference, one of training and one of augmentation, of images uint8 (B, 3, S, S)."""
    device, optimizer = images.device, build_optimizer(network, s)
    model = torch.compile(network) if s.compile else network
    scaler = torch.amp.GradScaler(device.type, enabled=s.precision == "fp16")
    inputs, labels = augment.normalize(images), torch.arange(len(images), device=device) % 1000
    policy, generator = augment.Augment(1000), augment.keyed_generator("throughput")

    def inference() -> None:
        with torch.no_grad(), devices.autocast(s.precision, device):
            model(inputs)

    def training() -> None:
        with devices.autocast(s.precision, device):
            loss = label_loss(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return inference, training, lambda: policy(images, labels, generator)
