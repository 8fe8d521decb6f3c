"""How a program starts, prints and stops. A first reading can skip this file.

Which of torchrun's processes this is and what the machine offers, printing from one of them, signals to stop,
and mistakes of the user, which end a program with one line and exit code 2.
"""

import difflib
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

# ---- Processes and devices ----


def rank() -> int:
    """The number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device_type(name: str) -> str:
    """cuda, mps or cpu: `name` itself if there is such a device, and for `auto` the first there is."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in available if available[device]) if name == "auto" else name
    if not available[name]:
        raise UserError(f"--device {name}: torch sees no such GPU here; use --device cpu")
    return name


def choose_precision(precision: str, device: str) -> str:
    """fp32, bf16 or fp16: what `auto` means on a type of device; any other precision is itself."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    return "bf16" if device == "cpu" and cpu_is_faster_in_bf16() else "fp32"


def cpu_is_faster_in_bf16() -> bool:
    """Whether this CPU has instructions for bf16 that are faster than those for fp32.

    Without any bf16 is hundreds of times slower. Intel's CPUs need AMX for it: their AVX-512 alone computes
    bf16 at half the rate of fp32 (results/speed.md). An older torch does not tell what a CPU has.
    """
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    avx512 = has.get("avx512_bf16") and "Intel" not in has.get("cpu_name", "")
    return bool(avx512 or has.get("amx_bf16") or has.get("bf16"))  # ARM calls it bf16


def hash_of(*values) -> str:
    """Sixteen hexadecimal digits that tell values apart: bytes, arrays, or anything with a repr."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes | np.ndarray) else repr(value).encode())
    return digest.hexdigest()[:16]


# ---- Printing ----


def printable(text: str) -> str:
    """Text in which no name of a file or class can move the cursor, add lines or fail to be encoded."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def on_terminal() -> bool:
    """Whether standard output is there, and can rewrite a line."""
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def print0(text: str, end: str = "\n") -> None:
    """Prints from rank 0 alone; on a terminal over the line of progress."""
    if rank() == 0:
        clear = "\r\033[K" if on_terminal() else ""
        print(clear + "\n".join(map(printable, text.split("\n"))), end=end, flush=True)


class Progress:
    """A line of progress: rewritten twice a second on a terminal, one every 15 seconds in a log."""

    def __init__(self, steps: int, batch_size: int):
        self.steps, self.batch_size, self.first_step = steps, batch_size, 0

    def due(self, step: int) -> bool:
        """Whether to show the line after this step; the first, which may compile, starts the clock."""
        if not self.first_step:
            self.first_step, self.started = step, time.monotonic()
            self.shown = self.started
        return rank() == 0 and time.monotonic() - self.shown > (0.5 if on_terminal() else 15)

    def show(self, step: int, text: str) -> None:
        self.shown = time.monotonic()
        seconds = (self.shown - self.started) / (step - self.first_step)  # a step
        left = timedelta(seconds=int(seconds * (self.steps - step)))
        rate = f"{self.batch_size / seconds:.0f} images/s"
        print0(f"{text}  {rate}  {left} left", end="" if on_terminal() else "\n")


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The end of a message about an unknown word: the option most like it, if one is."""
    found = difflib.get_close_matches(word, options, 1)
    return f"; did you mean {found[0]}?" if found else ""


# ---- Stopping ----


class UserError(ValueError):
    """A mistake of the user: its text says what is wrong and what to do."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns what model.py refuses, which knows no command line, into mistakes of the user."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


# Ctrl-C, a scheduler, and a terminal that is closed
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopSignals:
    """Notes a signal to stop, for the loop to look at between two steps.

    One that comes ten seconds after the first ends the program at once: a disk may never answer.
    """

    def __init__(self):
        self.received, self.since = 0, 0.0  # the signal's number, and when it came first
        # a group of its own, so that no GPU waits for the answer
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        numbers = set(STOP_SIGNALS) if threading.current_thread() is threading.main_thread() else set()
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # by nohup
            numbers -= {signal.SIGHUP}
        self.handlers = {number: signal.signal(number, self.note) for number in numbers}

    def note(self, number: int, frame) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > 10:
            os.write(2, b"stopped within a step; --resume goes on from the last save\n")
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)

    def asked(self) -> int:
        """The signal that any process received, or 0; all processes ask together."""
        received = torch.tensor(self.received)
        if self.group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self.group)
        return received.item()

    def end_if_asked(self, step: int, steps: int) -> None:
        """Ends the program if a signal has come; all that is to be kept is saved by then."""
        if number := self.asked():
            name = signal.Signals(number).name
            text = f"stopped by {name} after step {step} of {steps}; all is saved; go on with --resume"
            end_program(text if rank() == 0 else "", 128 + number)

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def end_program(text: str, code: int) -> NoReturn:
    """Ends the program with a line on standard error, over the line of progress, and an exit code."""
    print0("", end="")
    print(printable(text), end="\n" if text else "", file=sys.stderr, flush=True)
    sys.exit(code)


def run_program(main: Callable[[], None]) -> None:
    """Runs a script's main function. A user's mistake ends it with one line; a bug keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without × and τ shows their codes
    try:
        main()
        if dist.is_initialized():
            time.sleep(0.2)  # gloo's threads let go of their tensors, or torch 2.6 waits for them forever
            dist.destroy_process_group()
    except UserError as error:
        end_program(f"error: {error}", 2)
    except KeyboardInterrupt:
        end_program("error: interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (RuntimeError, MemoryError) as error:
        # A CPU says it one way, cuDNN by finding no engine for a convolution.
        if str(error).startswith("DataLoader worker (pid"):
            end_program("error: a worker was killed, as for want of memory; lower --workers or --resume", 2)
        signs = any(text in str(error) for text in ("can't allocate memory", "unable to find an engine"))
        if not signs and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        end_program("error: out of memory; lower --batch-size or raise --accumulate", 2)
