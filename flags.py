"""Settings on the command line: their flags, what is refused, what is printed.

A first reading can skip this file.

    python train.py --help
"""

import argparse
import math
import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from launch import UserError, did_you_mean, print0, world_size
from settings import DISTILLATION, TRANSFORMERS, Settings


def flag_of(kind: type, name: str) -> str:
    """The flag of a setting of this class."""
    return kind.__dataclass_fields__[name].metadata["flag"] or "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become the one line that all other mistakes are."""

    def error(self, message: str) -> None:
        # argparse quotes a wrong choice and names a wrong flag, and then lists what there is
        wrong = re.search(r"invalid choice: '(.*?)'|unrecognized arguments: ([\w-]+)", message)
        known = [*self._option_string_actions, *re.findall(r"[\w-]+", message.partition("(")[2])]
        hint = did_you_mean(wrong[1] or wrong[2], known) if wrong else ""
        if re.search("unrecognized arguments: --(train|checkpoint|recipe)", message):
            hint = "; it is a flag of finetune.py"
        if "--local-rank" in message:
            hint = "; start several processes with torchrun"
        if "--data:" in message and wrong and os.path.isdir(wrong[1] or ""):
            hint = f"; for pictures in a folder: --data folder --data-path {wrong[1]}"
        raise UserError(f"{message}{hint}; see {self.prog} --help")


def build_parser(prog: str, about: str, shown: dict, kind: type = Settings) -> Parser:
    """The flags of a class of settings, its own first, each with its value in `shown`; `about` goes in front.

    Only those given are parsed.
    """
    raw = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = group = Parser(prog=prog, description=about, usage="%(prog)s [--FLAG VALUE ...]", **raw)
    inherited = {one.name for one in fields(Settings)}
    for one in sorted(fields(kind), key=lambda one: kind is not Settings and one.name in inherited):
        allowed, text = one.metadata["allowed"], one.metadata["meaning"]
        if one.metadata["group"]:
            group = parser.add_argument_group(one.metadata["group"])
        options = {"choices": allowed} if isinstance(allowed, tuple) else {"type": allowed}
        if allowed is bool:
            options = {"action": "store_true"}
        elif shown.get(one.name, "") != "":
            text += f" [{shown[one.name]}]"
        group.add_argument(
            flag_of(kind, one.name), dest=one.name, default=argparse.SUPPRESS, help=text, **options
        )
    return parser


def idle_settings(s: Settings) -> list[str]:
    """The settings that play no part in a run."""
    parts = {
        "teacher teacher_weights teacher_epochs remember_labels": s.needs_teacher,
        "tau lam": s.distill == "soft",
        "no_distill_token": DISTILLATION[s.distill].token and s.model in TRANSFORMERS,
        "depth dropout drop_path": s.model in TRANSFORMERS,
        "patch_size": {s.model, s.teacher} & set(TRANSFORMERS),
        "warmup_lr": s.warmup_epochs,
        "data_path skip_broken workers": s.data != "shapes",
    }
    return " ".join(names for names, part in parts.items() if not part).split()


def check(s: Settings, given: Iterable[str] = ()) -> None:
    """Refuses early what contradicts itself, and distillation flags among those `given` that play no part.

    networks.py and data.py refuse what does not fit them.
    """
    distillation = {"teacher", "teacher_weights", "teacher_epochs", "tau", "lam", "no_distill_token"}
    for name in sorted(distillation & set(given) & set(idle_settings(s))):
        raise UserError(f"{flag_of(type(s), name)} plays no part in this run; leave it out")
    parts = world_size() * s.accumulate
    if s.batch_size % parts:
        text = f"--batch-size {s.batch_size} does not divide into processes × --accumulate = {parts} parts"
        raise UserError(f"{text}; try {math.ceil(s.batch_size / parts) * parts}")
    if s.remember_labels and s.distill != "hard":
        raise UserError("--remember-labels is for --distill hard alone, which needs only a teacher's labels")
    if s.warmup_epochs >= s.epochs:
        raise UserError(f"--warmup-epochs must be less than --epochs, {s.epochs}")
    if s.distill == "label" and not s.distilled:
        raise UserError("--distill label needs a transformer and no --no-distill-token")
    for path in filter(None, s.inputs) if s.overwrite else ():  # a file, or the directory of a last.pth
        if Path(s.out).resolve() in Path(path, "last.pth").resolve().parents:
            raise UserError(f"{path} is in --out, where --overwrite would remove it; choose another --out")
    if s.data == "shapes" and s.data_path != Settings.data_path:
        raise UserError("--data-path has no use for shapes; for pictures of your own add --data folder")


def describe(s: Settings) -> None:
    """Prints the settings that play a part in a run; settings.json in its directory has all of them."""
    idle = idle_settings(s)
    shown = {flag_of(type(s), name)[2:]: value for name, value in asdict(s).items() if name not in idle}
    text = "  ".join(f"{flag}={value}" for flag, value in shown.items())
    options = dict(break_long_words=False, break_on_hyphens=False, initial_indent="  ")
    print0(textwrap.fill(text, 110, subsequent_indent="  ", **options))
