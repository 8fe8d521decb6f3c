"""The tests: the paper first, then the loop, then what survives, then what is refused, then tools and README.

Each compares with something independent of the code: Pillow, torch's own operation, a formula written out,
finite differences, a second way of computing. `python -m pytest -q` takes minutes on two cores.
"""

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin
from torch import nn
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import augment
import checkpoint
import data
import devices
import evaluate as measure
import finetune
import launch
import networks
import pictures
import runs
import settings
import speed
import train
from checkpoint import read_checkpoint, torchvision_layout
from data import ArraySet, FolderSet, crop_file, read_image, train_batches
from distill import LOSSES, Teacher, hard_distillation_loss
from flags import idle_settings
from labels import RememberedLabels
from launch import UserError
from model import SIZES, Attention, Block, DeiT, DropPath, attend, create_model, fuse, load_weights
from networks import REGNETY, create_teacher
from settings import DISTILLATION, RECIPES, TRANSFORMERS, Settings, complete
from shapes import SHAPES, draw_shape, draw_shapes
from train import build_network

CPU = torch.device("cpu")
torch.set_num_threads(1)  # on tensors as small as here more threads take longer


# ---- How the tests run a program ----

# A quick run: 55 images in 3 batches of 16 and a rest
QUICK = {"img_size": 16, "patch_size": 8, "depth": 2, "limit": 55, "epochs": 3, "batch_size": 16}
QUICK |= {"lr": 3e-3, "device": "cpu", "precision": "fp32"}  # auto differs from machine to machine
PLAIN = {"augment": "off", "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}


def flags(values: dict) -> list[str]:
    """The words of a command line: True is a flag without a value."""
    words = []
    for name, value in values.items():
        words += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return words


def run_script(script, main, monkeypatch, *words):
    """What `python SCRIPT WORDS` does, in this process; the exit code."""
    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    try:
        launch.run_program(main)
    except SystemExit as ended:
        return ended.code
    return 0


run_train = partial(run_script, "train.py", train.main)
run_finetune = partial(run_script, "finetune.py", finetune.main)
run_evaluate = partial(run_script, "evaluate.py", measure.main)


@pytest.fixture
def output(monkeypatch, capsys):
    """Runs a program, and gives what it printed; with code 2 the one line on standard error that ended it."""

    def output(run, *words, code=0):
        assert run(monkeypatch, *words) == code
        told, error = capsys.readouterr()
        assert code != 2 or error.startswith("error: ") and error.count("\n") == 1, error
        return error if code == 2 else told

    return output


CHECK_TEACHER, NO_CHECK = train.check_teacher, lambda *arguments: None


@pytest.fixture(autouse=True)
def teachers_of_a_few_steps_may_teach(monkeypatch):
    """They know nothing, as long as a test has time for; `check_teacher` has a test of its own."""
    monkeypatch.setattr("train.check_teacher", NO_CHECK)


# Runs that are to be killed, or of several processes, are forked from a server that has imported everything
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_all"])


def child(main, words, environment, told):
    """The body of a forked process: main() as a script with the arguments `words`, which tells a file."""
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader's workers, as in a program
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    sys.argv = ["script", *words]
    sys.stdout = sys.stderr = open(told, "w")  # noqa: SIM115
    train.check_teacher = NO_CHECK
    main()


def fork(main, words, environment=(), told=os.devnull):
    process = SERVER.Process(target=child, args=(main, list(map(str, words)), dict(environment), told))
    process.start()
    return process


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork_two(main, words, told=os.devnull):
    """The same in two processes, as torchrun starts them. Both end well; what the first one told."""
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    started = []
    for rank in "01":
        own = environment | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(fork(main, words, own, told if rank == "0" else os.devnull))
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    return Path(told).read_text()


def run_with(fault=None, main=train.main):
    """A program with a fault (what, when, signal): the signal comes at the when-th of all calls of what."""
    places = {"step": (train, "learning_rate"), "write": (os, "fsync"), "rename": (os, "replace")}
    places |= {"evaluation": (train, "fuse"), "teacher": (networks, "create_teacher")}
    if fault:
        (what, when, number), calls = fault, itertools.count(1)
        plain = getattr(*places[what])

        def hurt(*arguments, **options):
            if next(calls) == when:
                os.kill(os.getpid(), number)
            return plain(*arguments, **options)

        setattr(*places[what], hurt)
    launch.run_program(main)


def forked(words, fault=None, main=train.main):
    """Runs a program with that fault in a process of its own; its exit code."""
    process = fork(partial(run_with, fault, main), words)
    process.join(60)
    return process.exitcode


HELD, STREAMED = [(30, 30)], [(50, 40), (30, 60)]  # sizes of pictures


def write_folder(root, sizes, classes=("ant", "bee"), splits=("train", "val")):
    """A folder data set of random pictures: sizes[i % len(sizes)] is the size of picture i."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                width, height = sizes[i % len(sizes)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def saved(out, file="last.pth"):
    return read_checkpoint(Path(out) / file)


def equal(one, two):
    """Whether two dicts of tensors are equal bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def same_run(one, two):
    """Whether two runs ended with the same weights, average, optimizer, scaler and log, bit for bit.

    Only the times in their logs differ, as those of one computation on two days do.
    """
    first, second = saved(one), saved(two)
    logs = [runs.read_log(Path(out)) for out in (one, two)]
    for log in (*logs, first["progress"]["log"], second["progress"]["log"]):
        assert all(
            0 <= record.pop("seconds") < 300 and record.pop("images_per_second") >= 0 for record in log
        )
    assert logs[0] == logs[1]
    assert (first["progress"], first["scaler"]) == (second["progress"], second["scaler"])
    assert equal(first["model"], second["model"]) and equal(
        first.get("model_ema", {}), second.get("model_ema", {})
    )
    moments = [contents["optimizer"]["state"] for contents in (first, second)]
    return all(equal(state, moments[1][key]) for key, state in moments[0].items())


# ---- The paper: the transformer ----


def test_parameter_counts_are_the_official_ones():
    counts = {("tiny", 224): (5_717_416, 5_910_800), ("small", 224): (22_050_664, 22_436_432)}
    counts |= {("base", 224): (86_567_656, 87_338_192), ("base", 384): (86_859_496, 87_630_032)}
    for (name, size), expected in counts.items():
        with torch.device("meta"):
            models = [create_model(name, distilled=token, img_size=size) for token in (False, True)]
        assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == expected


def official_state(width=192, tokens=198, distilled=True, patch=16):
    """A state dict with the official checkpoints' keys and shapes, in their order, written out by hand."""
    shapes = {"cls_token": (1, 1, width)} | ({"dist_token": (1, 1, width)} if distilled else {})
    shapes |= {"pos_embed": (1, tokens, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    layers |= {"norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    layers = {f"blocks.{n}.{layer}": shape for n in range(12) for layer, shape in layers.items()}
    layers |= {"norm": (width,), "head": (1000, width)} | ({"head_dist": (1000, width)} if distilled else {})
    for layer, shape in layers.items():
        shapes |= {f"{layer}.weight": shape, f"{layer}.bias": shape[:1]}
    return {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("size", "patch", "patches"), [(224, 16, 196), (384, 16, 576), (32, 4, 64)])
def test_an_official_state_dict_loads_strictly_and_unchanged(size, patch, patches, distilled):
    state = official_state(192, patches + 1 + distilled, distilled, patch)
    model = create_model("tiny", img_size=size, patch_size=patch, distilled=distilled)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in state.items()]
    assert load_weights(model, state) == []
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_attention_is_equation_1():
    """One head and one query at a time, in float64."""
    torch.manual_seed(0)
    layer, x = Attention(dim=12, num_heads=3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    queries, keys, values = (x[1] @ layer.qkv.weight.T + layer.qkv.bias).split(12, dim=1)
    expected, shares = torch.zeros(5, 12, dtype=torch.float64), torch.zeros(3, 5, 5, dtype=torch.float64)
    for head, n in itertools.product(range(3), range(5)):
        part = slice(4 * head, 4 * head + 4)
        scores = torch.stack([queries[n, part] @ keys[m, part] / math.sqrt(4) for m in range(5)])
        shares[head, n] = scores.exp() / scores.exp().sum()
        expected[n, part] = sum(shares[head, n, m] * values[m, part] for m in range(5))
    torch.testing.assert_close(layer(x)[1], layer.proj(expected))
    outputs, weights = attend(*layer.split(x))
    torch.testing.assert_close(weights[1], shares)
    torch.testing.assert_close(outputs[1].transpose(0, 1).flatten(1), expected)


def test_a_block_agrees_with_torchs_pre_norm_encoder_layer():
    torch.manual_seed(0)
    ours = Block(12, 3)
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    pairs = [(theirs.norm1, ours.norm1), (theirs.norm2, ours.norm2), (theirs.linear1, ours.mlp.fc1)]
    pairs += [(theirs.linear2, ours.mlp.fc2), (theirs.self_attn.out_proj, ours.attn.proj)]
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    theirs.self_attn.in_proj_weight.data.copy_(ours.attn.qkv.weight)
    theirs.self_attn.in_proj_bias.data.copy_(ours.attn.qkv.bias)
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), theirs(x))


def test_gradients_are_finite_differences():
    torch.manual_seed(0)
    model = DeiT(6, 2, depth=2, num_classes=3, img_size=4, patch_size=2, distilled=True).double()
    named, images = dict(model.named_parameters()), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for parameter in named.values():
        nn.init.normal_(parameter, std=0.5)

    def loss(*values):
        outputs = torch.func.functional_call(model, dict(zip(named, values, strict=True)), images)
        return outputs[0].square().sum() + outputs[1].sin().sum()

    assert torch.autograd.gradcheck(loss, tuple(named.values()), fast_mode=True)


def test_tokens_are_class_distillation_patches_row_by_row():
    model = create_model("tiny", img_size=32, patch_size=8, distilled=True, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.embed(images)
    tokens = x - model.pos_embed
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0])
    torch.testing.assert_close(tokens[1, 1], model.dist_token[0, 0])
    patch = images[1, :, 8:16, 16:24].flatten()  # row 1, column 2
    weight, bias = model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
    torch.testing.assert_close(tokens[1, 2 + 1 * 4 + 2], weight @ patch + bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distilled", [False, True])
def test_features_are_a_loop_over_the_blocks_and_each_head_reads_its_own_prefix_token(distilled):
    model = create_model("tiny", img_size=32, patch_size=8, distilled=distilled, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.embed(images)  # (2, N, 192)
    for block, weights in zip(model.blocks, model.attention_weights(images), strict=True):
        outputs, expected = attend(*block.attn.split(block.norm1(x)))  # all tokens, as written in equation 1
        torch.testing.assert_close(weights, expected)
        x = x + block.attn.proj(outputs.transpose(1, 2).flatten(2))
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    features = model.forward_features(images)
    assert features.shape == (2, 16 + 1 + distilled, 192)
    expected = F.layer_norm(x, (192,), model.norm.weight, model.norm.bias, eps=1e-6)
    torch.testing.assert_close(features, expected)
    heads = [model.head, *([model.head_dist] if distilled else [])]
    logits = [features[:, n] @ head.weight.T + head.bias for n, head in enumerate(heads)]
    expected = tuple(logits) if distilled else logits[0]
    torch.testing.assert_close(model(images), expected)  # which computes only the tokens that are read
    torch.testing.assert_close(model.train()(images), expected)  # without dropout training is the same


def test_initialization_is_a_truncated_normal():
    torch.manual_seed(0)
    model = create_model("tiny", distilled=True)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    drawn = torch.cat([weights.flatten() for weights in (*[m.weight for m in linear], model.pos_embed)])
    assert abs(drawn.mean()) < 1e-4
    assert abs(drawn.std() - 0.02) < 1e-4
    assert min(model.cls_token.std(), model.dist_token.std()) > 0.01
    assert all((m.bias == 0).all() for m in linear)


def test_stochastic_depth_grows_linearly_and_keeps_the_expectation():
    rates = [block.drop_path.rate for block in create_model("tiny", drop_path=0.11).blocks]
    assert rates == pytest.approx([0.01 * n for n in range(12)])
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.randn(20_000, 3, 2)
    dropped = drop(x)
    kept = dropped.abs().sum(dim=(1, 2)) > 0  # whole samples
    assert abs(kept.float().mean() - 0.7) < 0.015
    torch.testing.assert_close(dropped[kept], x[kept] / 0.7)
    assert torch.equal(drop.eval()(x), x)
    block, x = Block(64, 1, drop_path=0.999999), torch.ones(2, 3, 64)
    assert torch.equal(block(x), x)  # both branches are dropped, the residual stays
    assert not torch.equal(block.eval()(x), x)


def test_an_exported_model_takes_batches_of_any_size():
    model = create_model("tiny", num_classes=5, img_size=16, patch_size=8, depth=2, distilled=True).eval()
    batch = {0: torch.export.Dim("batch", max=1024)}
    program = torch.export.export(model, (torch.randn(4, 3, 16, 16),), dynamic_shapes=(batch,)).module()
    for count in (1, 2, 7):
        images = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(program(images), model(images))


def test_fused_prediction_adds_the_two_softmaxes():
    class_logits, dist_logits = torch.randn(4, 5), torch.randn(4, 5)
    shares = [z.exp() / z.exp().sum(1, keepdim=True) for z in (class_logits, dist_logits)]
    torch.testing.assert_close(fuse((class_logits, dist_logits)), (shares[0] + shares[1]) / 2)
    torch.testing.assert_close(fuse(class_logits), shares[0])
    assert fuse((class_logits.bfloat16(), dist_logits.bfloat16())).dtype == torch.float32


def test_resizing_position_embeddings_is_torchs_bicubic_and_spares_the_prefix_tokens():
    state, model = official_state(), create_model("tiny", img_size=384, num_classes=10, distilled=True)
    fresh = model.head.weight.clone()
    heads = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert load_weights(model, state) == ["pos_embed", *heads]  # heads of other classes are left
    grid = state["pos_embed"][:, 2:].reshape(14, 14, 192)
    expected = F.interpolate(grid.permute(2, 0, 1)[None], size=(24, 24), mode="bicubic")[0].permute(1, 2, 0)
    assert torch.equal(model.pos_embed[:, :2], state["pos_embed"][:, :2])
    torch.testing.assert_close(model.pos_embed[0, 2:].reshape(24, 24, 192), expected)
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.norm.weight, state["norm.weight"])


# ---- The paper: distillation ----


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_soft_distillation_is_equation_2_and_hard_is_equation_3(name, token, smoothed):
    torch.manual_seed(0)
    class_logits, dist_logits, teacher = (3 * torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    labels, rows = torch.randint(5, (6,)), torch.arange(6)
    y = F.one_hot(labels, 5).double()
    y = 0.9 * y + 0.1 * y.flip(0) if smoothed else y

    def log_softmax(z):
        return z - z.exp().sum(1, keepdim=True).log()

    student = dist_logits if token else class_logits
    cross_entropy = -(y * log_softmax(class_logits)).sum(1).mean()
    tau, lam = 2.5, 0.3
    p, q = log_softmax(teacher / tau), log_softmax(student / tau)
    chosen = -log_softmax(student)[rows, teacher.argmax(1)].mean()  # the teacher's label is never smoothed
    control = (cross_entropy - (y * log_softmax(student)).sum(1).mean()) / 2
    expected = {
        "none": control,
        "soft": (1 - lam) * cross_entropy + lam * tau**2 * (p.exp() * (p - q)).sum(1).mean(),
        "hard": cross_entropy / 2 + chosen / 2,
        "label": control,
    }
    outputs, targets = (class_logits, dist_logits) if token else class_logits, y if smoothed else labels
    found = LOSSES[name](outputs, targets, teacher, Settings(tau=tau, lam=lam))
    assert found.item() == pytest.approx(expected[name].item(), rel=1e-12)


def test_the_tables_of_settings_are_those_of_the_code_below_them():
    assert tuple(SIZES) == TRANSFORMERS and set(RECIPES) == {"shapes", *data.OPENERS}
    assert DISTILLATION.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_for_transformers_and_for_the_convnets_that_teach_them(name):
    student, teacher = (complete({"data": name, "model": model}) for model in ("tiny", "vgg8"))
    assert (student.optimizer, teacher.optimizer, teacher.min_lr) == ("adamw", "sgd", 0.0)
    repeats = 3 if name in ("imagenet", "inat2018", "inat2019") else 1
    assert (student.repeats, teacher.repeats) == (repeats, repeats)
    assert (student.drop_path, student.warmup_epochs) == ((0.0, 0.5) if name == "shapes" else (0.1, 5.0))
    sizes = {"cifar10": (32, 100, 256, 2e-3), "shapes": (24, 8, 128, 4e-3), "folder": (224, 100, 64, 1e-3)}
    if name in sizes:
        assert (student.img_size, student.epochs, student.batch_size, student.lr) == sizes[name]
        assert teacher.img_size == student.img_size and teacher.batch_size == min(student.batch_size, 128)
    # results/teachers.md and shapes.md have how the rates were chosen
    rate, epochs = {3: (0.8, 300), 1: (0.1, 2) if name == "shapes" else (0.2, 30)}[repeats]
    assert (teacher.lr, teacher.epochs, student.teacher_epochs) == (rate, epochs, epochs)
    sees = {"cifar10": ("none", 0, 0, 0, 5e-4), "shapes": ("none", 0, 0, 0.25, 5e-5)}
    sees["cifar100"], paper = sees["cifar10"], ("randaugment", 0.8, 1.0, 0.25, 5e-5)
    own = (teacher.augment, teacher.mixup, teacher.cutmix, teacher.erasing, teacher.weight_decay)
    assert own == sees.get(name, paper) and student.patch_size == {32: 4, 24: 8}.get(student.img_size, 16)


def test_a_run_prints_the_settings_that_play_a_part_in_it_and_ten_of_its_classes(tmp_path, output):
    names = [f"c{n:02}" for n in range(12)]
    words = QUICK | {"data": "folder", "data_path": write_folder(tmp_path / "data", HELD, names)}
    told = output(run_train, *flags(words | {"epochs": 1, "limit": 0, "out": tmp_path / "run"}))
    assert f"  {', '.join(f'{name} 6' for name in names[:10])} and 2 more\n" in told
    assert "patch-size=8" in told and "teacher" not in told and "tau=" not in told
    taught = {"model": "resnet18", "teacher": "tiny", "img_size": 32, "distill": "soft"}
    idle = idle_settings(complete(taught))  # the teacher has patches
    assert {"depth", "no_distill_token", "workers"} <= set(idle) and not {"patch_size", "tau"} & set(idle)


def test_the_table_of_losses_decides_what_is_trained():
    table = {"none": (False, False), "soft": (True, True), "hard": (True, True), "label": (False, True)}
    assert {name: tuple(needs) for name, needs in DISTILLATION.items()} == table
    for name, (_, token) in table.items():
        for more in ({}, {"no_distill_token": True}, {"model": "resnet18"}):
            with torch.device("meta"):
                network = build_network(complete({"distill": name} | more), 5)
            assert hasattr(network, "dist_token") == (token and not more)
    network = build_network(complete({"dropout": 0.3, "drop_path": 0.4, "depth": 2}), 5)
    assert (network.dropout.p, network.blocks[1].drop_path.rate) == (0.3, 0.4)


def test_losses_of_logits_in_bfloat16_are_computed_in_float32():
    z, labels = 3 * torch.randn(3, 6, 5).bfloat16(), torch.randint(5, (6,))
    for loss in LOSSES.values():
        expected = loss((z[0].double(), z[1].double()), labels, z[2].double(), Settings())
        with torch.autocast("cpu", torch.bfloat16):
            found = loss((z[0], z[1]), labels, z[2], Settings())
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def test_gradient_reaches_each_token_from_its_own_label_and_never_the_teacher():
    student = create_model("tiny", num_classes=5, img_size=32, patch_size=16, distilled=True)
    teacher = create_teacher("regnet_y_200mf", 5, img_size=32)
    statistics = {key: value.clone() for key, value in teacher.state_dict().items()}
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    judged, outputs = Teacher(teacher, "").logits(images, ()), student(images)
    assert not judged.requires_grad
    hard_distillation_loss(outputs, labels, judged).backward()
    taught = ((student.head, outputs[0], labels), (student.head_dist, outputs[1], judged.argmax(1)))
    for head, logits, target in taught:  # the gradient of mean cross-entropy: (softmax - one-hot) / B, halved
        expected = (logits.detach().softmax(1) - F.one_hot(target, 5)).mean(0) / 2
        torch.testing.assert_close(head.bias.grad, expected)
    assert all(torch.equal(value, statistics[key]) for key, value in teacher.state_dict().items())


# ---- The paper: teachers ----


def test_a_teacher_with_two_heads_speaks_through_their_fusion_of_inputs_at_its_size(tmp_path):
    network = create_model("tiny", num_classes=5, img_size=48, patch_size=16, distilled=True).eval()
    nn.init.normal_(network.head.weight)
    torch.save(network.state_dict(), tmp_path / "plain.pth")  # says nothing of sizes: the weights tell
    teacher = create_teacher("tiny", 5, tmp_path / "plain.pth", img_size=32)
    inputs = torch.randn(2, 3, 32, 32)
    resized = F.interpolate(inputs, (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(Teacher(teacher, "").logits(inputs, ()).softmax(1), fuse(network(resized)))


def test_regnets_have_the_published_sizes_and_torchvisions_keys():
    counts = {"200mf": 3_162_996, "4gf": 20_646_656, "8gf": 39_381_472}
    counts |= {"12gf": 51_822_544, "16gf": 83_590_140}
    with torch.device("meta"):
        ours = {size: create_teacher(f"regnet_y_{size}", 1000) for size in counts}
    assert {size: sum(p.numel() for p in network.parameters()) for size, network in ours.items()} == counts
    for size in ("8gf", "16gf"):  # torchvision has these too
        theirs = torchvision.models.get_model(f"regnet_y_{size}").state_dict()
        shapes = [(key, value.shape) for key, value in ours[size].state_dict().items()]
        assert shapes == [(key, value.shape) for key, value in theirs.items()]


def test_small_images_keep_their_resolution_in_the_stem():
    for img_size, side in ((32, 4), (96, 2)):
        teacher = create_teacher("regnet_y_200mf", 5, img_size=img_size)
        assert teacher.trunk_output(teacher.stem(torch.zeros(1, 3, 64, 64))).shape[-1] == side
    with torch.device("meta"):
        assert create_teacher("resnet18", 5, img_size=32).conv1.stride == (1, 1)
        assert create_teacher("vit_b_16", 5, img_size=32).conv_proj.stride == (16, 16)  # its patches stay


@pytest.mark.parametrize("name", ["regnet_y_200mf", "resnet18", "tiny"])
def test_a_teachers_checkpoint_gives_the_same_logits_frozen(tmp_path, name):
    network = create_teacher(name, 5, img_size=32, patch_size=8).train()
    network(torch.randn(8, 3, 32, 32))  # moves BatchNorm's statistics off their initial values
    sizes, images = {"img_size": 32, "patch_size": 8}, torch.randn(4, 3, 32, 32)
    expected = network.eval()(images)
    torch.save({"model": network.state_dict(), "settings": {"model": name} | sizes}, tmp_path / "t.pth")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    for file, options in (("t.pth", {}), ("plain.pth", sizes)):
        teacher = create_teacher(name, 5, tmp_path / file, **options)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        torch.testing.assert_close(teacher(images), expected)


def regnet_in_the_papers_layout(depths, widths, group_width, classes, x):
    """A RegNetY that draws its weights as it computes: these, by the paper's names, and its logits."""
    state = {}

    def draw(name, *shape):
        state[name] = torch.rand(shape) + 0.5 if len(shape) == 1 else torch.randn(shape) / shape[1] ** 0.5
        return state[name]

    def convolve(x, name, width, kernel=1, stride=1, group=None):
        group = group or x.shape[1]
        weight = draw(f"{name}.conv.weight", width, group, kernel, kernel)
        x = F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=x.shape[1] // group)
        parts = [draw(f"{name}.bn.{p}", width) for p in ("running_mean", "running_var", "weight", "bias")]
        state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
        return F.batch_norm(x, *parts)

    def linear(x, name, width, *ones):
        weight, bias = draw(f"{name}.weight", width, x.shape[1], *ones), draw(f"{name}.bias", width)
        return F.linear(x, weight.flatten(1), bias)

    x = convolve(x, "stem", 32, 3).relu()  # without a stride: the image is small
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), 1):
        for block in range(1, depth + 1):
            name, stride = f"s{stage}.b{block}", 2 if block == 1 else 1
            y = convolve(x, f"{name}.conv1", width).relu()
            y = convolve(y, f"{name}.conv2", width, 3, stride, min(group_width, width)).relu()
            squeezed = linear(y.mean((2, 3)), f"{name}.se.fc1", round(x.shape[1] / 4), 1, 1).relu()
            excited = linear(squeezed, f"{name}.se.fc2", width, 1, 1).sigmoid()
            y = convolve(y * excited[:, :, None, None], f"{name}.conv3", width)
            x = (y + (convolve(x, f"{name}.downsample", width, 1, stride) if block == 1 else x)).relu()
    return state, linear(x.mean((2, 3)), "head.fc", classes)


def test_a_teacher_in_the_papers_key_layout_gives_that_networks_logits(tmp_path):
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    state, expected = regnet_in_the_papers_layout(*REGNETY["regnet_y_200mf"], 5, images)
    torch.save({"model": state}, tmp_path / "regnety.pth")
    teacher = create_teacher("regnet_y_200mf", 5, tmp_path / "regnety.pth", img_size=32)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):  # the paper's own
        state, _ = regnet_in_the_papers_layout(*REGNETY["regnet_y_16gf"], 1000, torch.empty(1, 3, 32, 32))
        ours = create_teacher("regnet_y_16gf", 1000).state_dict()
    shapes = {key: value.shape for key, value in torchvision_layout(state).items()}
    assert shapes == {key: value.shape for key, value in ours.items()}


# ---- The paper: augmentation ----

AFFINE, BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC
FILLED = dict(resample=BICUBIC, fillcolor=(124, 116, 104))
PILLOW = {  # (image, argument) -> image
    "AutoContrast": lambda im, v: ImageOps.autocontrast(im),
    "Equalize": lambda im, v: ImageOps.equalize(im),
    "Invert": lambda im, v: ImageOps.invert(im),
    "Rotate": lambda im, v: im.rotate(v, **FILLED),
    # Pillow 12 and later raise at 0 bits
    "Posterize": lambda im, v: ImageOps.posterize(im, int(v)) if v else Image.new("RGB", im.size),
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": lambda im, v: im.point([x + min(255 - x, int(v)) * (x < 128) for x in range(256)] * 3),
    "Color": lambda im, v: ImageEnhance.Color(im).enhance(v),
    "Contrast": lambda im, v: ImageEnhance.Contrast(im).enhance(v),
    "Brightness": lambda im, v: ImageEnhance.Brightness(im).enhance(v),
    "Sharpness": lambda im, v: ImageEnhance.Sharpness(im).enhance(v),
    "ShearX": lambda im, v: im.transform(im.size, AFFINE, (1, v, 0, 0, 1, 0), **FILLED),
    "ShearY": lambda im, v: im.transform(im.size, AFFINE, (1, 0, 0, v, 1, 0), **FILLED),
    "TranslateX": lambda im, v: im.transform(im.size, AFFINE, (1, 0, v * im.width, 0, 1, 0), **FILLED),
    "TranslateY": lambda im, v: im.transform(im.size, AFFINE, (1, 0, 0, 0, 1, v * im.height), **FILLED),
}
ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
RANGES = (  # all the arguments that the policies can draw, and more
    dict.fromkeys(("AutoContrast", "Equalize", "Invert"), [0.0])
    | {"Posterize": range(9), "Solarize": range(257), "SolarizeAdd": range(129)}
    | dict.fromkeys(ENHANCEMENTS, np.linspace(0.1, 1.9, 301))
    | {"Rotate": np.linspace(-30, 30, 301)}
    | dict.fromkeys(("ShearX", "ShearY"), np.linspace(-0.3, 0.3, 301))
    | dict.fromkeys(("TranslateX", "TranslateY"), np.linspace(-0.45, 0.45, 301))
)
NAMES = list(augment.OPERATIONS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def levels_apart(image, pillow):
    """|ours - Pillow's| (3, H, W) in whole levels."""
    return (image.int() - torch.from_numpy(np.array(pillow)).permute(2, 0, 1).int()).abs()


@pytest.fixture(scope="module")
def samples():
    """Batches uint8 (n, 3, H, W) of one size each: noise, gradients, low contrast, one color, two levels."""
    batches = []
    for height, width in [(1, 1), (2, 3), (3, 3), (1, 7), (9, 2), (32, 32), (31, 48), (48, 20), (97, 64)]:
        x = noise(8, 3, height, width)
        color, other = x[:, :, :1, :1], x[:, :, -1:, -1:]
        ramp = torch.linspace(0, 1, height)[:, None] * torch.linspace(1, 0.2, width)
        two = torch.where(x > 128, color, other)
        batch = [x, (color * ramp).byte(), 100 + x // 12, color.expand_as(x), two]
        batches.append(torch.cat([*batch, torch.zeros_like(x[:1]), torch.full_like(x[:1], 255)]))
    return [*batches, draw_shapes("train", 30, 32)[0], draw_shapes("train", 4, 100)[0]]


def away_from_pillow(name, samples):
    """|ours - Pillow's| of each image in turn: another argument for each image of a batch, all of RANGES."""
    values = iter(np.resize(np.random.default_rng(1).permutation(RANGES[name]), 1_000))
    for batch in samples * 2:
        before, arguments = batch.clone(), torch.tensor([next(values) for _ in batch]).float()
        ours = augment.OPERATIONS[name](batch, arguments)
        assert ours.dtype == torch.uint8 and ours.shape == batch.shape and torch.equal(batch, before)
        for image, result, argument in zip(batch, ours, arguments.tolist(), strict=True):
            yield levels_apart(result, PILLOW[name](to_pillow(image), argument))


@pytest.mark.parametrize("name", [n for n in PILLOW if n not in GEOMETRIC])
def test_operations_on_single_values_are_pillows_and_enhancements_are_within_one_level(name, samples):
    differences = list(away_from_pillow(name, samples))
    assert max(difference.max() for difference in differences) <= (name in ENHANCEMENTS)
    assert np.mean([difference.float().mean() for difference in differences]) < 0.01


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_are_pillows_bicubic_ones(name, samples):
    # Rounding may put a point on the border on its other side, and so a fill pixel where Pillow has none.
    differences = [difference.amax(dim=0).flatten() for difference in away_from_pillow(name, samples)]
    for small in (False, True):
        pixels = torch.cat([pixels for pixels in differences if (len(pixels) <= 100) == small])
        assert (pixels > 1).float().mean() < (0.02 if small else 2e-3)
        assert pixels[pixels <= 1].float().mean() < 0.05


@pytest.mark.parametrize("shape", [(31, 48), (32, 32), (97, 64)])  # the last ones are done in parts on a CPU
def test_each_image_of_a_batch_gets_its_own_operations_and_arguments(samples, shape):
    rng, batch = np.random.default_rng(2), next(b for b in samples if b.shape[2:] == shape)
    op = torch.from_numpy(rng.integers(-1, 15, (2, 400)))
    argument = [[rng.choice(RANGES[NAMES[k]]) if k >= 0 else 0 for k in row] for row in op]
    step = batch[torch.arange(400) % len(batch)], op, torch.tensor(argument).float()
    assert augment.OPERATIONS.keys() == PILLOW.keys() and len(PILLOW) == 15  # the paper's
    for image, ks, vs, result in zip(step[0], op.T, step[2].T, augment.apply_operations(*step), strict=True):
        for k, v in zip(ks, vs, strict=True):
            image = image if k < 0 else augment.OPERATIONS[NAMES[k]](image[None], v[None])[0]
        assert torch.equal(result, image)


def follows(draws, expected):
    """Whether draws have a distribution: {value: its share}, or a sample of it.

    Shares may be 5 standard errors away; two samples are compared as Kolmogorov and Smirnov do, at a chance
    of 1e-5. Seeds are fixed: no test fails by chance.
    """
    draws = np.asarray(draws)
    if isinstance(expected, dict):
        counts, n = Counter(draws.tolist()), len(draws)
        return all(abs(counts[k] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) for k, p in expected.items())
    draws, expected = np.sort(np.ravel(draws)), np.sort(np.ravel(expected))
    values = np.concatenate([draws, expected])
    below = [np.searchsorted(x, values, side="right") / len(x) for x in (draws, expected)]
    return np.abs(below[0] - below[1]).max() < 2.47 * math.sqrt(1 / len(draws) + 1 / len(expected))


def uncorrelated(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(a))


# What magnitude m = M / 10 stands for in the paper's RandAugment, for each side of the coin if there is one
RANDAUGMENT = {
    "Rotate": lambda m: [30 * m, -30 * m],
    "Posterize": lambda m: [4 - int(4 * m)],
    "Solarize": lambda m: [256 - min(256, int(256 * m))],
    "SolarizeAdd": lambda m: [min(128, int(110 * m))],
    **dict.fromkeys(ENHANCEMENTS, lambda m: [1 + 0.9 * m, max(0.1, 1 - 0.9 * m)]),
    **dict.fromkeys(("ShearX", "ShearY"), lambda m: [0.3 * m, -0.3 * m]),
    **dict.fromkeys(("TranslateX", "TranslateY"), lambda m: [0.45 * m, -0.45 * m]),
}
AUTOAUGMENT = RANDAUGMENT | {
    "Posterize": lambda m: [int(4 * m) + 4],
    "Solarize": lambda m: [min(256, int(256 * m))],
    **dict.fromkeys(("Color", "Contrast", "Sharpness"), lambda m: [0.1 + 1.8 * m]),
}


@pytest.mark.parametrize("magnitude", [0, 1, 2.5, 4, 5, 7.5, 9, 10])
@pytest.mark.parametrize("policy", ["RANDAUGMENT", "AUTOAUGMENT"])
def test_arguments_are_the_papers_table(policy, magnitude):
    m, sign = torch.full((2,), magnitude / 10, dtype=torch.float64), torch.tensor([1.0, -1.0])
    for name, sides in globals()[policy].items():
        ours = getattr(augment, f"{policy}_ARGUMENTS")[name](m, sign)
        torch.testing.assert_close(ours, torch.tensor(sides(magnitude / 10)).double().expand(2))


@pytest.fixture
def drawn(monkeypatch):
    """Calls a policy on `count` images and gives its draws (op, m), with the sign of RandAugment."""
    steps = []

    def record(images, op, argument):
        steps.extend(zip(op, argument, strict=True))
        return images

    monkeypatch.setattr(augment, "apply_operations", record)
    monkeypatch.setattr(augment, "RANDAUGMENT_ARGUMENTS", dict.fromkeys(NAMES, lambda m, sign: m * sign))
    monkeypatch.setattr(augment, "AUTOAUGMENT_ARGUMENTS", dict.fromkeys(NAMES, lambda m, sign: m))

    def drawn(policy, count):
        steps.clear()
        policy(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), generator())
        return list(steps)

    return drawn


def test_randaugment_applies_two_of_fifteen_by_half_at_normal_magnitudes_with_a_coins_sign(drawn):
    (first, one), (second, two) = drawn(augment.RandAugment(), 300_000)
    applied = (first >= 0) & (second >= 0)
    pairs = dict.fromkeys(range(225), 1 / 225)
    assert follows(applied, {True: 0.25}) and follows((15 * first + second)[applied], pairs)
    for op, signed in ((first, one), (second, two)):
        assert follows(op >= 0, {True: 0.5}) and follows(signed > 0, {True: 0.5})
        assert follows(10 * signed.abs(), np.random.default_rng(3).normal(9, 0.5, 200_000).clip(0, 10))
        assert uncorrelated(signed.abs(), signed.sign())
    # The two operations of an image are as strong, and point as far, as if the other were not there.
    assert uncorrelated(one.abs(), two.abs()) and uncorrelated(one.sign(), two.sign())
    (_, signed), *others = drawn(augment.RandAugment(num_ops=3, magnitude=0, magnitude_std=1), 50_000)
    assert follows(signed == 0, {True: 0.5}) and len(others) == 2


def test_autoaugment_draws_sub_policies_evenly_and_applies_each_operation_with_its_probability(drawn):
    theirs = torchvision.transforms.AutoAugment(torchvision.transforms.AutoAugmentPolicy.IMAGENET).policies
    # The first and the last of the 25 in the AutoAugment paper's Table 9
    assert len(theirs) == 25 and list(theirs[0]) == [("Posterize", 0.4, 8), ("Rotate", 0.6, 9)]
    assert list(theirs[-1]) == [("Equalize", 0.8, None), ("Equalize", 0.6, None)]
    expected = Counter()
    for pair in theirs:
        one, two = ([("none", 1 - p), (f"{name} {level or 0}", p)] for name, p, level in pair)
        for (first, p), (second, q) in itertools.product(one, two):
            expected[f"{first}, {second}"] += p * q / 25
    seen = []
    for op, m in drawn(augment.AutoAugment(), 400_000):
        pairs = zip(op, (10 * m).round().int().tolist(), strict=True)
        seen.append([f"{NAMES[k]} {level}" if k >= 0 else "none" for k, level in pairs])
    seen = [f"{first}, {second}" for first, second in zip(*seen, strict=True)]
    assert set(seen) == {pair for pair, p in expected.items() if p > 0}
    assert follows(seen, expected)


def test_color_jitter_does_its_three_operations_in_any_order_within_its_strength(drawn):
    order, factors = map(torch.stack, zip(*drawn(augment.color_jitter, 60_000), strict=True))
    orders = itertools.permutations([NAMES.index(name) for name in ("Brightness", "Contrast", "Color")])
    digits = {int(225 * a + 15 * b + c): 1 / 6 for a, b, c in orders}
    assert follows(225 * order[0] + 15 * order[1] + order[2], digits)
    assert all(follows(factor, np.random.default_rng(4).uniform(0.7, 1.3, 200_000)) for factor in factors)
    assert factors.min() >= 0.7 and factors.max() <= 1.3
    assert uncorrelated(factors[0], factors[1]) and uncorrelated(factors[1], factors[2])


def test_half_of_the_images_are_mirrored_and_small_ones_cut_out_of_their_own_padding_anywhere():
    images = noise(20_000, 3, 2, 4)
    flipped = augment.random_flip(images, generator())
    mirrored = (flipped == torch.from_numpy(images.numpy()[..., ::-1].copy())).flatten(1).all(dim=1)
    assert follows(mirrored, {True: 0.5}) and torch.equal(flipped[~mirrored], images[~mirrored])
    images = noise(10, 3, 5, 6) | 1  # no black but the padding's
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (4, 4), (4, 4)])
    cuts = {padded[i, :, y : y + 5, x : x + 6].tobytes(): (i, 9 * y + x) for i, y, x in np.ndindex(10, 9, 9)}
    which = torch.arange(40_000) % 10
    crops = augment.pad_and_crop(images[which], generator())
    found = torch.tensor([cuts[crop.tobytes()] for crop in crops.numpy()])
    assert torch.equal(found[:, 0], which) and follows(found[:, 1], dict.fromkeys(range(81), 1 / 81))


def check_boxes(ours, theirs, height, width):
    """That boxes (n, 4) are inside and drawn as the others: area, aspect (h/w), place."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert ours.min() >= 0 and (ours[:, :2] + ours[:, 2:] <= [height, width]).all()

    def measures(top, left, h, w):
        place = top / np.maximum(1, height - h), left / np.maximum(1, width - w)
        return [x.round(5) for x in (h * w / height / width, h / w, *place)]

    assert all(follows(*pair) for pair in zip(measures(*ours.T), measures(*theirs.T), strict=True))
    assert uncorrelated(*measures(*ours.T)[2:])


@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 400), (300, 200), (32, 32)])
def test_random_boxes_are_those_of_torchvisions_random_resized_crop(height, width):
    torch.manual_seed(0)
    limits, crop = ((0.08, 1), (3 / 4, 4 / 3)), torchvision.transforms.RandomResizedCrop.get_params
    theirs = [crop(torch.empty(3, height, width), *limits) for _ in range(6_000)]
    check_boxes(augment.random_boxes(60_000, height, width, generator()), theirs, height, width)
    for long in [(10, 200), (200, 10), (7, 300), (1, 40)]:  # no draw fits: the largest centered box
        largest = torch.tensor(crop(torch.empty(3, *long), *limits))
        assert (augment.random_boxes(50, *long, generator()) == largest).all()


def soft_pictures(count, height, width):
    """Pictures without overshoot to clip: Pillow clips between its two passes, whose order depends on it."""
    drawn = draw_shapes("val", count, max(height, width))[0]
    return (drawn[:, :, :height, :width] // 2 + 64).contiguous()


@pytest.mark.parametrize("size", [7, 24, 96])  # shrinks all, shrinks some, enlarges all
def test_random_crops_are_pillows_crop_and_antialiased_bicubic_resize_of_random_boxes(size):
    images, boxes = soft_pictures(60, 48, 64), augment.random_boxes(60, 48, 64, generator(1))
    cropped = augment.random_crop(images, size, generator(1))
    edges = torch.tensor([[0, 0, 48, 64], [47, 63, 1, 1]])  # all of it, one pixel
    cropped = torch.cat([cropped, augment.resize_boxes(images[:2], edges, size)])
    boxes, images = torch.cat([boxes, edges]), torch.cat([images, images[:2]])
    for image, (top, left, h, w), ours in zip(images, boxes.tolist(), cropped, strict=True):
        crop = to_pillow(image).crop((left, top, left + w, top + h))
        difference = levels_apart(ours, crop.resize((size, size), BICUBIC))
        assert difference.max() <= 2 and difference.float().mean() < 0.25


@pytest.mark.parametrize("shape", [(64, 64, 56), (128, 96, 42), (64, 96, 28), (16, 24, 56), (70, 100, 45)])
def test_evaluation_crops_are_torchvisions_of_pillows_pictures_to_the_bit_from_files(shape):
    height, width, size = shape
    images, short = soft_pictures(5, height, width), math.floor(size * 256 / 224)
    resize = torchvision.transforms.Resize(short, torchvision.transforms.InterpolationMode.BICUBIC)
    for image, ours in zip(images, augment.center_crop(images, size), strict=True):
        expected = torchvision.transforms.CenterCrop(size)(resize(to_pillow(image)))
        assert levels_apart(ours, expected).max() <= 1
        assert levels_apart(crop_file(to_pillow(image), size, None), expected).max() == 0
    assert torch.equal(augment.center_crop(noise(2, 3, size, size), size), noise(2, 3, size, size))


@pytest.mark.parametrize("probability", [0, 0.25, 0.6, 1.0])
def test_erasing_happens_with_its_probability_to_a_copy(probability):
    inputs = torch.randn(4_000, 3, 12, 10, generator=generator())
    before = inputs.clone()
    outputs = augment.RandomErasing(probability)(inputs, generator())
    assert torch.equal(inputs, before)
    assert follows((outputs != inputs).flatten(1).any(dim=1), {True: probability})
    assert augment.RandomErasing(probability).erase_(inputs, generator()) is inputs
    assert torch.equal(inputs, outputs)  # and the same generator gives the same noise


@pytest.mark.parametrize(("height", "width"), [(48, 64), (40, 24)])
def test_erased_boxes_are_torchvisions_random_erasings_full_of_normal_noise(height, width):
    torch.manual_seed(0)
    inputs, ours = torch.full((6_000, 3, height, width), 100.0), []
    outputs = augment.RandomErasing(1)(inputs, generator())
    changed = outputs != inputs
    assert torch.equal(changed.any(dim=1), changed.all(dim=1))  # all three channels
    for picture in changed[:, 0].numpy():
        rows, columns = np.flatnonzero(picture.any(axis=1)), np.flatnonzero(picture.any(axis=0))
        ours.append((rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1))
        assert picture.sum() == ours[-1][2] * ours[-1][3]  # one whole box
    erase = torchvision.transforms.RandomErasing.get_params
    theirs = [erase(inputs[0], (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])[:4] for _ in range(6_000)]
    check_boxes(ours, theirs, height, width)
    pixels = outputs.permute(0, 2, 3, 1)[changed[:, 0]][:100_000]  # (n, 3)
    for k in range(3):  # each channel its own
        assert follows(pixels[:, k], np.random.default_rng(5).normal(size=1_000_000))
        assert uncorrelated(pixels[:, k], pixels[:, k - 1]) and uncorrelated(pixels[1:, k], pixels[:-1, k])
    assert len(pixels.unique()) > 0.95 * pixels.numel()  # chance repeats a few float32 values


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (300, 800)])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75, 0.99])
def test_cutmixs_box_has_sides_of_the_square_root_and_a_uniform_center(height, width, lam):
    draws = generator()
    boxes = np.array([augment.Mixup.box(lam, height, width, draws) for _ in range(2_000)])
    for low, high, side in [(boxes[:, 0], boxes[:, 1], height), (boxes[:, 2], boxes[:, 3], width)]:
        half = math.sqrt(1 - lam) * side / 2
        center = np.random.default_rng(7).uniform(0, side, 50_000)
        assert follows(low, np.maximum(0, center - half).round())
        assert follows(high, np.minimum(side, center + half).round())
        whole = (low > 0) & (high < side)
        assert (np.abs(high - low - 2 * half)[whole] <= 2).all()
    assert uncorrelated(boxes[:, 0] + boxes[:, 1], boxes[:, 2] + boxes[:, 3])


def test_mixup_or_cutmix_is_a_fair_coin_and_lambda_is_beta_or_the_area_left():
    mix, draws, cuts, lams = augment.Mixup(0.8, 50, 2, 0), generator(), [], []
    inputs, labels = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, 40, 36), torch.tensor([0, 1])
    for _ in range(3_000):
        outputs, targets = mix(inputs, labels, draws)
        own, other = outputs[0, 0] == 1, outputs[0, 0] == 0
        cuts.append((own | other).all().item())
        lams.append(targets[0, 0].item())
        if cuts[-1]:
            rows, columns = other.any(dim=1), other.any(dim=0)
            assert torch.equal(other, rows[:, None] & columns)  # one box, not a ring
            assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2
        assert outputs[0].mean().item() == pytest.approx(lams[-1], abs=1e-5)
    cuts, lams = np.array(cuts), np.array(lams)
    assert follows(cuts, {True: 0.5}) and uncorrelated(cuts[1:], cuts[:-1])
    assert follows(lams[~cuts], np.random.default_rng(8).beta(0.8, 0.8, 50_000))  # each has its own α:
    assert lams[cuts].min() > 0.25  # Beta(50, 50) is narrow


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0), (0, 0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_partner_is_the_reversed_batch_and_targets_are_mixed_as_inputs(mixup, cutmix, smoothing):
    inputs, labels = torch.randn(7, 3, 6, 5, generator=generator()), torch.tensor([3, 0, 9, 9, 4, 1, 3])
    before, draws = inputs.clone(), generator(1)
    partner = torch.from_numpy(inputs.numpy()[::-1].copy())
    smoothed = np.full((7, 10), smoothing / 10)
    smoothed[np.arange(7), labels] = 1 - smoothing + smoothing / 10
    for _ in range(50):
        outputs, targets = augment.Mixup(mixup, cutmix, 10, smoothing)(inputs, labels, draws)
        lam = 1 if mixup == cutmix == 0 else ((targets[1, 0] - smoothing / 10) / (1 - smoothing)).item()
        mixed = torch.from_numpy(lam * smoothed + (1 - lam) * smoothed[::-1]).float()
        torch.testing.assert_close(targets, mixed)
        if not cutmix:
            torch.testing.assert_close(outputs, lam * inputs + (1 - lam) * partner, rtol=1e-4, atol=1e-5)
        elif not mixup:
            assert torch.equal(outputs, torch.where((outputs != inputs)[1], partner, inputs))
    assert torch.equal(inputs, before)


POLICIES = dict(
    randaugment=augment.RandAugment(), autoaugment=augment.AutoAugment(), none=augment.color_jitter
)


@pytest.mark.parametrize("policy", [*POLICIES, "off"])
def test_a_step_is_flip_policy_normalize_erase_mix_and_follows_its_generator(policy):
    images, labels = noise(16, 3, 20, 20), torch.arange(16) % 10
    theirs = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(images / 255)
    torch.testing.assert_close(augment.normalize(images), theirs, rtol=1e-5, atol=1e-6)
    step = augment.Augment(10, policy, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
    draws, mine, expected = generator(3), generator(3), images
    if policy != "off":
        expected = POLICIES[policy](augment.random_flip(images, draws), draws)
    expected = augment.RandomErasing(0.25)(augment.normalize(expected), draws)
    expected = augment.Mixup(0.8, 1.0, 10, 0.1)(expected, labels, draws)
    inputs, targets = step(images, labels, mine)
    assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    assert torch.equal(mine.get_state(), draws.get_state())
    assert not torch.equal(step(images, labels, mine)[0], inputs)  # the next draws are others
    with pytest.raises(ValueError, match="images must be uint8"):
        step(images / 255, labels, draws)
    for wrong in (torch.rand(2, 3, 8, 8), images[:, :1], images[0]) if policy != "off" else ():
        with pytest.raises(ValueError, match=r"images must be uint8 \(B, 3, H, W\), not torch"):
            POLICIES[policy](wrong, draws)


@pytest.mark.parametrize("policy", [*POLICIES, "off"])
@pytest.mark.parametrize("size", [24, 32])
def test_a_step_never_reads_its_pixels_to_decide(policy, size):
    # Tensors of the device `meta` have no values: whoever waited for one would fail, as torch raises there.
    step, draws, real = augment.Augment(10, policy), generator(), generator()
    for seed in range(4):
        images, labels = noise(40, 3, 24, 24, seed=seed), torch.arange(40) % 10
        inputs, targets = step(augment.random_crop(images, size, real), labels, real)
        hollow = step(augment.random_crop(images.to("meta"), size, draws), labels.to("meta"), draws)
        assert [x.shape for x in hollow] == [inputs.shape, targets.shape]
        assert torch.equal(draws.get_state(), real.get_state())  # and drew as many numbers on the CPU


class Calls(TorchDispatchMode):
    """Counts the operators that run: by name in all, and those whose result lies on `device`."""

    def __init__(self, device):
        super().__init__()
        self.device, self.all, self.launches, self.copies = device, Counter(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = next((x for x in tree_leaves(result) if isinstance(x, torch.Tensor)), None)
        if first is not None and not function.is_view:  # a view is a new way to see the same memory
            copied = isinstance(args[0], torch.Tensor) and args[0].device != first.device
            self.copies += copied
            self.launches += first.device == self.device
            self.all[function] += not copied
        return result


def test_a_step_launches_at_most_450_kernels_and_copies_what_it_draws_in_five_pieces():
    counts, step = {}, augment.Augment(10)
    for device in map(torch.device, ("cpu", "meta")):
        held = ArraySet(noise(1024, 3, 32, 32).to(device), (torch.arange(1024) % 10).to(device), [])
        s, draws = Settings(img_size=32, batch_size=256, workers=0), generator()
        batches = train_batches(held, s, 0, device)
        step(*next(batches), draws)  # the constants are copied once and for all
        with Calls(device) as counts[device.type]:
            for _ in range(6):
                step(*next(batches), draws)
    assert counts["meta"].launches <= 6 * 450
    assert counts["meta"].copies == 6 * 5  # which images, their crops, mirrors, operations, erased boxes
    assert counts["meta"].all == counts["cpu"].all  # what is counted is what runs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", [32, 40])
def test_a_gpu_gives_the_cpus_pixels_without_a_synchronization(policy, size):
    images, labels = soft_pictures(256, 32, 32), torch.arange(256) % 10
    step, erase = augment.Augment(10, policy, erasing=0), augment.RandomErasing(0.25)

    def results(images, labels, seed):
        inputs, targets = step(augment.random_crop(images, size, generator(seed)), labels, generator(seed))
        erased = erase(inputs, generator(seed))
        return inputs, targets, erased != inputs, erased  # the boxes are the same, their noise is not

    for seed in range(4):
        expected, there = results(images, labels, seed), (images.cuda(), labels.cuda(), seed)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            (inputs, targets, boxes, erased), again = results(*there), results(*there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        levels = (inputs.cpu() - expected[0]).abs() * 255 * 0.225  # before normalization
        assert (levels > 1.1).float().mean() < 0.01 and torch.equal(boxes.cpu(), expected[2])
        torch.testing.assert_close(targets.cpu(), expected[1])
        assert torch.equal(erased, again[3])


def deal(size, ranks, epoch=0, **settings):
    """The list that the ranks' shares of an epoch were dealt from."""
    shares = []
    for rank in range(ranks):
        sampler = augment.RepeatedAugmentSampler(size, ranks, rank, **settings)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return np.array(shares).T.ravel()  # rank r has number r, r + W, ...


@pytest.mark.parametrize("size", [5, 100, 255, 256, 1000, 1300])
@pytest.mark.parametrize(("ranks", "repeats"), [(1, 3), (2, 3), (3, 3), (1, 1), (3, 1)])
def test_repeated_augmentation_shows_a_third_of_the_images_three_times_in_a_row(size, ranks, repeats):
    dealt = deal(size, ranks, num_repeats=repeats)
    used = size // 256 * 256 if size >= 256 and repeats > 1 else size
    assert len(dealt) == used // ranks * ranks and dealt.min() >= 0 and dealt.max() < size
    shown = dealt[::repeats]
    assert np.array_equal(dealt, np.repeat(shown, repeats)[: len(dealt)])
    assert len(set(shown.tolist())) == len(shown) == math.ceil(len(dealt) / repeats)


def test_each_key_has_a_generator_and_each_epoch_and_seed_a_shuffle_of_its_own():
    keys = [(0, "crop", 1, 0), (0, "crop", 1, 1), (0, "crop", 2, 0), (1, "crop", 1, 0), (0, "mix", 1, 0)]
    draws = [torch.rand(50, generator=augment.keyed_generator(*key)) for key in [*keys, keys[2]]]
    assert len({draw.numpy().tobytes() for draw in draws}) == len(keys) and torch.equal(draws[5], draws[2])
    orders = [deal(600, 2, epoch, seed=seed) for epoch, seed in [(0, 0), (1, 0), (2, 0), (0, 1)]]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(deal(600, 2, 1), orders[1])
    assert follows(np.concatenate([deal(600, 1, epoch)[::3] for epoch in range(100)]), np.arange(600))


# ---- The paper: recipe ----


def test_the_imagenet_recipe_is_table_9():
    s = complete({"data": "imagenet"})
    table = dict(epochs=300, batch_size=1024, optimizer="adamw", lr=0.0005, weight_decay=0.05)
    table |= dict(warmup_epochs=5, smoothing=0.1, dropout=0, drop_path=0.1, repeats=3, clip_grad=0)
    table |= dict(augment="randaugment", mixup=0.8, cutmix=1.0, erasing=0.25)
    table |= dict(warmup_lr=1e-6, min_lr=1e-5, tau=3.0, lam=0.1, img_size=224, patch_size=16, depth=12)
    table |= dict(teacher="regnet_y_16gf", teacher_weights="published")
    off = "no_distill_token remember_labels compile skip_broken resume overwrite limit seed save_every ema"
    table |= dict.fromkeys(off.split(), 0) | dict(distill="none", model="tiny", accumulate=1, workers=-1)
    assert {name: getattr(s, name) for name in table} == table
    for given, expected in (({}, 2), ({"warmup_epochs": 7.0}, 7)):  # a short run: a tenth of it
        assert complete({"data": "imagenet", "epochs": 20} | given).warmup_epochs == expected


ALLOWED = dict.fromkeys(("img_size", "patch_size"), (1, 4096)) | {"depth": (1, 100), "workers": (-1, 256)}
ALLOWED |= dict.fromkeys(("dropout", "drop_path", "smoothing", "ema"), (0.0, 0.999999)) | {"tau": (1e-6, 1e6)}
ALLOWED |= dict.fromkeys(("lam", "erasing"), (0.0, 1.0)) | {"seed": (0, 2**62)}
ALLOWED |= dict.fromkeys(("limit", "save_every"), (0, None)) | dict.fromkeys(("epochs", "repeats"), (1, None))
ALLOWED |= dict.fromkeys(("batch_size", "accumulate", "teacher_epochs"), (1, None))
ALLOWED |= dict.fromkeys(("lr", "min_lr", "warmup_lr", "mixup", "cutmix", "clip_grad"), (0.0, None))
ALLOWED |= dict.fromkeys(("weight_decay", "warmup_epochs"), (0.0, None))


@pytest.mark.parametrize("name", ALLOWED)
def test_a_number_may_lie_anywhere_in_its_range_and_nowhere_else(name):
    low, high = ALLOWED[name]
    for limit, beyond in ((low, -1), (high, 1)):
        if limit is not None:
            step = 1 if isinstance(limit, int) else abs(limit) / 1e9 or 0.001
            inside, outside = flags({name: limit}), flags({name: limit + beyond * step})
            assert vars(train.train_parser().parse_args(inside)) == {name: limit}
            with pytest.raises(UserError, match="is not allowed"):
                train.train_parser().parse_args(outside)


def test_images_of_up_to_64_pixels_have_a_teacher_that_looks_at_them_at_full_resolution():
    small, large = [("shapes", 24), ("cifar10", 32), ("folder", 64)], [("folder", 65), ("cifar10", 224)]
    rows = [*((row, "vgg8") for row in small), *((row, "regnet_y_200mf") for row in large)]
    for (name, size), teacher in [*rows, (("imagenet", 64), "regnet_y_16gf")]:
        given = {"data": name, "img_size": size}
        assert complete(given).teacher == teacher
        assert complete(given | {"teacher": "resnet18"}).teacher == "resnet18"
    assert complete({"data": "shapes"}).teacher == complete({"data": "cifar10"}).teacher == "vgg8"


def test_the_rows_of_table_3_that_share_a_loss_have_directories_of_their_own():
    outs = [complete({"distill": "hard", "no_distill_token": single}).out for single in (False, True)]
    assert outs == ["runs/shapes-tiny-hard", "runs/shapes-tiny-hard-no-token"]


def test_learning_rate_is_torchs_cosine_from_step_0_whose_start_a_linear_warm_up_replaces():
    s = complete({"data": "imagenet"})
    peak = 0.0005 * 1024 / 512
    rates = [train.learning_rate(step, 100, 20, s) for step in range(101)]
    np.testing.assert_allclose(rates[:20], np.linspace(1e-6, peak, 21)[:20])
    assert train.learning_rate(100, 100, 0, Settings(lr=1e-6, batch_size=512)) == 1e-6  # it never rises
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-5)
    for step, rate in enumerate(rates):
        assert step < 20 or rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_weight_decay_spares_biases_norms_tokens_and_position_embeddings():
    model = build_network(Settings(distill="hard"), 10)
    optimizer = train.build_optimizer(model, Settings())
    decayed, spared = optimizer.param_groups
    assert optimizer.defaults["fused"]  # one call for all parameters
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-8, (0.9, 0.999))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    kept = {id(p) for p in spared["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in kept}
    every = dict(model.named_parameters())
    assert names == {n for n in every if re.search("norm|bias|_token$|^pos_embed$", n)}
    assert len(decayed["params"]) + len(names) == len(every)


@pytest.mark.parametrize("model", ["tiny", "vgg8"])  # the second has buffers
def test_the_moving_average_starts_from_the_initial_weights(tmp_path, monkeypatch, model):
    built, seen = [], []
    monkeypatch.setattr("train.build_network", lambda *of: built.append(build_network(*of)) or built[0])
    hook = register_optimizer_step_post_hook(lambda *_: seen.append(deepcopy(built[0].state_dict())))
    plain, judged = train.evaluate, []

    def watched(network, *more):
        judged.append(deepcopy(network.state_dict()))
        return plain(network, *more)

    monkeypatch.setattr("train.evaluate", watched)
    words = QUICK | {"model": model, "ema": 0.8, "warmup_epochs": 0}  # the first step is a long one
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "run"})) == 0
    hook.remove()
    average = build_network(complete(words), 10).state_dict()
    average = {key: value for key, value in average.items() if value.is_floating_point()}
    for weights in seen:
        average = {key: 0.8 * value + 0.2 * weights[key] for key, value in average.items()}
    found = saved(tmp_path / "run")["model_ema"]
    torch.testing.assert_close({key: found[key] for key in average}, average)
    assert equal(judged[-1], found)  # whose accuracy it is


# ---- The paper: resolution and transfer ----

OFFICIAL_TINY = {"data": "imagenet", "data_path": "data", "classes": None, "num_classes": 1000}
OFFICIAL_TINY |= {"model": "tiny", "img_size": 224, "patch_size": 16, "depth": 12, "distill": "hard"}
OFFICIAL_TINY |= {"no_distill_token": False}


def tuned(given, start=OFFICIAL_TINY):
    s = finetune.finetune_settings({"checkpoint": "deit_tiny_distilled"} | given, start)
    return {name: getattr(s, name) for name in s.__dataclass_fields__}


def test_higher_resolution_of_imagenet_is_the_papers_recipe():
    table = dict(img_size=384, epochs=30, batch_size=512, optimizer="adamw", lr=5e-6, min_lr=5e-6)
    table |= dict(weight_decay=1e-8, warmup_epochs=5, drop_path=0, distill="hard", teacher="regnet_y_16gf")
    table |= dict(augment="randaugment", mixup=0.8, cutmix=1.0, erasing=0.25, smoothing=0.1, repeats=3)
    assert tuned({}).items() >= table.items()
    own = dict(augment="none", mixup=0.1, cutmix=0.2, erasing=0.3, repeats=2, smoothing=0.4, tau=5.0, lam=0.6)
    own |= dict(limit=7, teacher="vgg8", teacher_weights="t.pth", no_distill_token=True, depth=3)
    assert tuned({}, OFFICIAL_TINY | own).items() >= own.items()
    assert not tuned({"distill": "hard"}, OFFICIAL_TINY | own)["no_distill_token"]
    shapes = OFFICIAL_TINY | {"data": "shapes", "img_size": 24, "patch_size": 8}
    assert tuned({}, shapes).items() >= {"epochs": 2, "img_size": 32, "lr": 5e-4}.items()
    convnets = {"optimizer": "sgd", "lr": 0.1, "min_lr": 0, "weight_decay": 5e-5, "warmup_epochs": 0}
    assert tuned({}, shapes | {"model": "vgg8"}).items() >= convnets.items()
    assert tuned({"data": "imagenet"}, shapes)["epochs"] == 30
    for teacher, weights in (("regnet_y_16gf", "published"), ("vgg8", "")):
        assert tuned({"teacher": teacher})["teacher_weights"] == weights
    assert tuned({"data_path": "/x"})["img_size"] == 384
    folder = OFFICIAL_TINY | {"data": "folder", "data_path": "/mine"}  # a folder is told by its path
    assert (tuned({}, folder)["img_size"], tuned({}, folder)["data_path"]) == (336, "/mine")
    assert tuned({"data_path": "/yours"}, folder)["img_size"] == 224
    rates = [train.learning_rate(step, 1000, 100, Settings(**table)) for step in range(100, 1001)]
    assert set(rates) == {5e-6}  # constant after the warm-up


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "cars", "inat2018", "folder"])
def test_transfer_has_the_authors_recipe_and_a_short_one(name):
    given = {"data": name, "recipe": "paper"}
    table = dict(img_size=224, epochs=1000, batch_size=768, optimizer="sgd", lr=0.01, weight_decay=1e-4)
    table |= dict(drop_path=0, erasing=0, mixup=0.8, cutmix=1.0, smoothing=0.1, augment="randaugment")
    table |= dict(distill="label", data_path="data", patch_size=16, repeats=3)
    assert tuned(given, OFFICIAL_TINY | {"data_path": "elsewhere"}).items() >= table.items()
    for no_second in ({"distill": "none"}, {"no_distill_token": True}):
        assert tuned(given, OFFICIAL_TINY | no_second)["distill"] == "none"
    assert tuned(given | {"optimizer": "adamw"})["lr"] == 5e-4
    short = given | {"recipe": "short"}
    table = dict(optimizer="adamw", epochs=30, img_size=224, lr=5e-4, repeats=1, augment="randaugment")
    table |= dict(mixup=0.8, cutmix=1.0, erasing=0.25, batch_size={"ci": 256, "in": 1024}.get(name[:2], 64))
    assert tuned(short).items() >= table.items()
    assert tuned(short | {"optimizer": "sgd"})["lr"] == 0.01
    assert [tuned(short | {"trainable": part})["lr"] for part in ("head", "attention")] == [0.05, 5e-3]
    assert tuned(short | {"optimizer": "sgd", "lr": 0.1})["lr"] == 0.1
    assert tuned({"data": "shapes", "recipe": "paper"})["epochs"] == 1000


def test_heads_of_imagenet_are_kept_for_imagenets_classes_alone(monkeypatch):
    network = create_model("tiny", img_size=16, patch_size=8)
    monkeypatch.setattr("networks.load_network", lambda source: (network, OFFICIAL_TINY))
    s = finetune.finetune_settings({"checkpoint": "deit_tiny_distilled"}, OFFICIAL_TINY)
    others = SimpleNamespace(classes=[f"n{number:08}" for number in range(1000)])
    with pytest.raises(
        UserError, match="deit_tiny_distilled knows ImageNet's 1000 classes; the data set has"
    ):
        finetune.start_from(s, network, others, others, CPU)
    finetune.start_from(replace(s, data="folder", recipe="short"), network, others, others, CPU)


def test_a_convnets_weights_that_do_not_fit_are_refused():
    with torch.device("meta"):
        vits = [networks.create_convnet("vit_b_32", 3, size) for size in (32, 64)]
    with pytest.raises(UserError, match="do not fit the model: encoder.pos_embedding is"):
        finetune.adapt(vits[0].state_dict(), vits[1], True)


def test_a_distillation_token_that_is_added_starts_as_the_class_token_and_one_can_be_dropped():
    sizes = {"num_classes": 3, "img_size": 16, "patch_size": 8, "depth": 2}
    plain, added, distilled = (create_model("tiny", distilled=n > 0, **sizes).eval() for n in range(3))
    images, fresh = torch.randn(4, 3, 16, 16), added.dist_token.detach().clone()
    assert finetune.adapt(plain.state_dict(), added, True)[0].startswith("a distillation token is added")
    torch.testing.assert_close(added.dist_token, plain.cls_token + fresh)  # or both would learn the same
    added.dist_token.data.copy_(added.cls_token)
    torch.testing.assert_close(*added(images))  # but for the draw, position and head are the class token's
    assert finetune.adapt(distilled.state_dict(), plain, True) == ["the distillation token is dropped"]
    tokens, theirs = [n for n in range(6) if n != 1], distilled.state_dict()
    torch.testing.assert_close(plain.embed(images), distilled.embed(images)[:, tokens])
    assert all(torch.equal(p, theirs[key]) for key, p in plain.state_dict().items() if key != "pos_embed")


def test_a_teacher_or_a_published_convnet_is_fine_tuned_by_the_same_program(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    words = QUICK | {"epochs": 1, "distill": "hard", "teacher": "resnet18", "teacher_epochs": 1}
    assert run_train(monkeypatch, *flags(words)) == 0
    own = {"precision": "fp32", "device": "cpu", "epochs": 1, "batch_size": 16}
    told = output(run_finetune, *flags(own | {"checkpoint": "runs/shapes-tiny-hard", "out": "low"}))
    ended = runs.accuracy_line(runs.read_log("runs/shapes-tiny-hard")[-1]["accuracy"])
    assert f"before, at 16 pixels: {ended}\n" in told
    (low,) = Path("runs").glob("teacher-shapes-16px-resnet18-*")
    assert "the teacher sees the images at its own 16 pixels" in told
    assert re.search(r", \d\.\d minutes after the start: class ", told)
    assert told.endswith("Next:  python evaluate.py accuracy low/last.pth\n")
    assert saved("low")["settings"]["batch_size"] == 16  # given, so not fitted to the 55 images
    words = {"img_size": 24, "epochs": 1, "limit": 55, "batch_size": 16}
    told = output(run_finetune, *flags(words | {"checkpoint": low / "last.pth", "out": "high"}))
    assert f"{low}/last.pth: taken as it is\n" in told
    torch.save(networks.create_convnet("resnet18", 1000, 224).state_dict(), "published.pth")
    monkeypatch.setattr("checkpoint.download", lambda url: Path("published.pth"))
    words |= {"checkpoint": "resnet18", "data": "shapes", "out": "own"}
    assert "resnet18: new heads for 10 classes" in output(run_finetune, *flags(words))
    words = {"teacher_weights": "high/last.pth", "batch_size": 16, "epochs": 1, "out": "."}
    words["checkpoint"] = "runs/shapes-tiny-hard"
    assert "sees the images at its own" not in output(run_finetune, *flags(words))
    assert saved(".")["settings"]["teacher_weights"] == "high/last.pth"
    before, after = (saved(out)["model"]["conv1.weight"] for out in (low, "high"))
    assert 0 < (after - before).norm() < 0.3 * before.norm()  # it did start there


def save_official(path, **options):
    """A file as the authors publish them."""
    torch.manual_seed(0)
    model = create_model("tiny", img_size=32, depth=2, **options)
    torch.save({"model": model.state_dict()}, path)
    return model.eval()


@pytest.mark.parametrize("distill", ["label", "none"])
def test_an_official_file_transfers_to_a_folder_of_pictures(tmp_path, monkeypatch, output, distill):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", STREAMED)
    write_folder(tmp_path / "pets", STREAMED, ("cat", "dog"))
    official = save_official("official.pth", distilled=distill == "label")  # 1000 classes
    words = {"data": "folder", "epochs": 1, "batch_size": 4, "workers": 0, "warmup_lr": 0, "lr": 1e-9}
    told = output(run_finetune, *flags(words | {"min_lr": 0, "checkpoint": "official.pth", "out": "run"}))
    tuned = saved("run")["model"]
    for key, value in official.state_dict().items():
        if key.startswith("head"):
            assert tuned[key].shape == (2, *value.shape[1:])
        else:
            torch.testing.assert_close(tuned[key], value, rtol=0, atol=1e-6)
    assert "official.pth: new heads for 2 classes\n" in told
    assert "before" not in told  # its heads say nothing of these classes
    # and goes on from there to as many other classes
    words |= {"checkpoint": "run/last.pth", "data_path": "pets", "recipe": "paper", "out": "other"}
    assert "run/last.pth: new heads for 2 classes\n" in output(run_finetune, *flags(words))
    for out, classes in (("run", ["ant", "bee"]), ("other", ["cat", "dog"])):
        known = {"classes": classes, "img_size": 32, "distill": distill, "model": "tiny", "patch_size": 16}
        assert saved(out)["settings"].items() >= known.items()


def test_imagenets_own_weights_keep_their_heads(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", [(50, 40), (30, 60)])
    official = save_official("two.pth", num_classes=2)
    save_official("three.pth", num_classes=3)
    words = {"data_path": "data", "epochs": 1, "batch_size": 4, "workers": 0, "img_size": 48, "out": "run"}
    printed = output(run_finetune, *flags(words | {"checkpoint": "two.pth"}))
    s = Settings(data="imagenet", img_size=32, workers=0)
    before = train.evaluate(official, data.open_split(s, "val", CPU), s, CPU)
    assert f"before, at 32 pixels: {runs.accuracy_line(before)}\n" in printed
    assert "two.pth: position embeddings are resized\nat the start, at 48 pixels: class" in printed
    words |= {"checkpoint": "three.pth", "out": "other"}
    refused = output(run_finetune, *flags(words), code=2)
    assert "this recipe is too gentle for new heads; use --recipe short" in refused
    told = output(run_finetune, *flags(words), "--recipe", "short")
    assert "three.pth: new heads for 2 classes; position embeddings are resized\n" in told
    # as many classes, which a file of the authors does not name, are others in a folder of other data
    words |= {"checkpoint": "two.pth", "data": "folder", "out": "third"}
    assert "two.pth: new heads for 2 classes" in output(run_finetune, *flags(words))


@pytest.mark.parametrize(
    ("trained", "pattern", "optimizer", "lr"),
    [("head", "^head", "sgd", 1.0), ("attention", r"^head|\.attn\.|^pos_embed$", "adamw", 0.02)],
)
def test_what_is_frozen_stays_to_the_last_bit(tmp_path, monkeypatch, trained, pattern, optimizer, lr):
    monkeypatch.chdir(tmp_path)
    assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1, "distill": "label"})) == 0
    words = PLAIN | {"img_size": 16, "epochs": 2, "batch_size": 16, "train": trained, "optimizer": optimizer}
    words["checkpoint"] = "runs/shapes-tiny-label"
    assert run_finetune(monkeypatch, *flags(words | {"ema": 0.8, "lr": lr, "out": "tuned"})) == 0
    before, tuned = saved("runs/shapes-tiny-label")["model"], saved("tuned")
    for after in (tuned["model"], tuned["model_ema"]):
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert changed == {key for key in before if re.search(pattern, key)}
    losses = [record["loss"] for record in runs.read_log(Path("tuned"))]
    assert losses[-1] < losses[0]


# ---- The paper: analyses ----

CLASSES = ["wasp", "ant", "fly", "bee", "moth", "bug", "tick"]


def save_network(path, classes, distilled=True):
    """A checkpoint of a network whose heads are large enough to decide differently on different images."""
    s = complete(QUICK | {"distill": "label" if distilled else "none"})
    torch.manual_seed(len(classes) + distilled)
    model = build_network(s, len(classes)).eval()
    for head in (model.head, model.head_dist) if distilled else (model.head,):
        head.weight.data.normal_()
    path.parent.mkdir(exist_ok=True, parents=True)
    torch.save({"model": model.state_dict(), "settings": vars(s) | {"classes": classes}}, path)
    return model


def inputs_of(path, size=16):
    return augment.normalize(crop_file(read_image(path), size, None)[None])


@pytest.fixture
def insects(tmp_path):
    """A network of 7 classes and 11 images of two of them."""
    model = save_network(tmp_path / "net.pth", CLASSES)
    write_folder(tmp_path / "images", [(50, 40), (30, 60)], splits=("val",))
    (tmp_path / "images/val/bee/2.png").unlink()
    return tmp_path, model


def test_accuracy_is_the_share_of_right_images_on_one_process_and_on_two(insects, output):
    path, model = insects
    files = sorted((path / "images/val").rglob("*.png"))
    labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
    with torch.no_grad():
        pairs = [model(inputs_of(file)) for file in files]
    heads = {"class": torch.cat([a for a, _ in pairs]), "distillation": torch.cat([b for _, b in pairs])}
    heads["fused"] = heads["class"].softmax(1) + heads["distillation"].softmax(1)
    told = {1: "  top-1", 5: "  top-5"}
    for (head, scores), k in itertools.product(heads.items(), told):
        right = (scores.topk(k).indices == labels[:, None]).any(1)
        told[k] += f"  {head} {100 * right.float().mean():.2f} %"
    (path / "images/train/elk").mkdir(parents=True)  # what lies beside the folder has no say
    (path / "images/val").rename(path / "images/shots")
    words = ["accuracy", path / "net.pth", "--val", path / "images/shots", "--per-class", "--device", "cpu"]
    words += ["--precision", "fp32"]
    alone = output(run_evaluate, *words)
    lines = alone.splitlines()
    assert f"net.pth: 11 images of {path}/images/shots, in " in lines[0]
    assert [lines[1], lines[3]] == list(told.values())
    decided = {head: scores.argmax(1) for head, scores in heads.items()}
    right = [(decided["fused"] == labels)[labels == label].double().mean() for label in (1, 3)]
    assert lines[2].startswith("  mean of classes  class ")
    assert lines[2].endswith(f"fused {50 * sum(right):.2f} %")  # of 6 ants and 5 bees
    rows = {words[-1]: words[:4] for words in map(str.split, lines[5:7])}
    assert (rows["ant"][0], rows["bee"][0]) == ("6", "5")
    assert [rows[name][3] for name in ("ant", "bee")] == [f"{100 * share:.2f}" for share in right]
    pairs = Counter(zip(labels.tolist(), decided["fused"].tolist(), strict=True))  # (true, said)
    table = [line.split()[-7:] for line in lines[9:16]]
    assert table == [[str(pairs[row, column]) for column in range(7)] for row in range(7)]
    sure, wrong = heads["fused"].amax(1) / 2, decided["fused"] != labels
    worst = sorted(wrong.nonzero().flatten().tolist(), key=lambda n: -sure[n])[:5]
    for line, n in zip(lines[16:], worst, strict=True):
        told = f"{100 * sure[n]:.1f} % {CLASSES[decided['fused'][n]]}, and is {files[n].parent.name}: "
        assert line == told + f"{path}/images/shots/{files[n].parent.name}/{files[n].name}"
    assert fork_two(partial(launch.run_program, measure.main), words, path / "told") == alone
    (path / "alone").mkdir()
    (path / "images/shots").rename(path / "alone/train")  # of which nothing is held out
    told = output(run_evaluate, "accuracy", path / "net.pth", "--val", path / "alone/train")
    assert f": 11 images of {path}/alone/train, in " in told


@pytest.mark.parametrize("sizes", [[(20, 20)], [(20, 30), (30, 20)]], ids=["held", "streamed"])
@pytest.mark.parametrize("split", ["val", "train"])
def test_evaluate_repeats_the_accuracy_that_training_ended_with(tmp_path, monkeypatch, capsys, sizes, split):
    write_folder(tmp_path / "data", sizes, splits={"train", split})
    (tmp_path / f"data/{split}/bee/3.png").write_bytes(b"no picture")
    words = QUICK | {"data": "folder", "data_path": tmp_path / "data", "limit": 11, "batch_size": 4}
    words |= {"distill": "label", "skip_broken": True, "workers": 0, "out": tmp_path / "run"}
    assert run_train(monkeypatch, *flags(words)) == 0
    ended = runs.read_log(tmp_path / "run")[-1]["accuracy"]
    assert f"are left out, such as {tmp_path}/data/{split}/bee/3.png\n" in capsys.readouterr().out
    for word, run in (("accuracy", "run"), ("compare", "run/last.pth")):  # a run's folder is its checkpoint
        assert run_evaluate(monkeypatch, word, tmp_path / run, "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert f"  top-1  {runs.accuracy_line(ended)}\n" in told
    if split == "train":  # without val a tenth of each class is held out, one image at least
        assert told.count(f"there is no {tmp_path}/data/val: 2 images are held out of training") == 2
        place = f"2 images of {tmp_path}/data"
        assert told.count(f"{place}, in ") == told.count(f"{place} that") == 1
    else:
        assert told.count(f"{10 if len(sizes) > 1 else 11} images of") == 2


def test_imagenet_real_takes_any_of_an_images_labels_and_skips_images_without(insects, output):
    path, model = insects
    shutil.rmtree(path / "images/val/bee")
    files = [path / "images/val/ant" / f"ILSVRC2012_val_0000000{n}.png" for n in range(1, 7)]
    for number, file in enumerate(files):
        (path / "images/val/ant" / f"{number}.png").rename(file)
    with torch.no_grad():
        first, _, _, fourth, *_ = (int(model(inputs_of(file))[0].argmax()) for file in files)
    # image 1 is wrong, 4 has two labels of which one is what the class head says, the others have none
    real = [[(first + 1) % 7], [], [], [(fourth + 1) % 7, fourth], [], []]
    (path / "real.json").write_text(json.dumps(real))
    words = ["accuracy", path / "net.pth", "--val", path / "images/val", "--real", path / "real.json"]
    assert re.search(r"\n  Real   class 50\.00 % .*\(2 images\)\n", output(run_evaluate, *words))
    (path / "real.json").write_text("[[1]]")
    assert "ILSVRC2012_val_*" in output(run_evaluate, *words, code=2)


def test_classes_go_by_name_then_by_number_then_by_place():
    network, imagenet = nn.Identity(), [f"n{i:08}" for i in (1440764, *range(1440765, 1441763), 15075141)]

    def indices(classes, count, names):
        network.classes, network.num_classes = classes, count
        return measure.class_indices("net.pth", network, names)

    assert indices(["a", "b", "c"], 3, ["c", "a"]) == [2, 0]
    assert indices(["1", "10", "2"], 3, ["1", "10", "2"]) == [0, 1, 2]  # a data set whose names are numbers
    assert indices(None, 12, ["0", "1", "10", "11", "2"]) == [0, 1, 10, 11, 2]  # ImageNet-V2
    assert indices(imagenet, 1000, ["1", "999", "5"]) == [1, 999, 5]
    assert indices(None, 1000, imagenet) == list(range(1000))
    others = [(["a", "b"], 2, ["0", "1"]), (None, 3, ["3"]), (["a", "b"], 2, ["a", "z"])]
    others += [(None, 1000, [f"n{i:08}" for i in range(1000)])]  # named like ImageNet's, but others
    for classes, count, names in others:
        with pytest.raises(UserError, match="net.pth knows"):
            indices(classes, count, names)


def test_compare_is_table_4_with_a_row_for_the_truth_and_each_head(tmp_path, output):
    words = [tmp_path / f"{name}/last.pth" for name in "ab"] + ["--device", "cpu", "--precision", "fp32"]
    plain, pair = (save_network(words[n], list(SHAPES), distilled=n == 1) for n in (0, 1))
    lines = output(run_evaluate, "compare", *words, "--out", tmp_path / "odd.png").splitlines()
    rows = [re.fullmatch(r"(\d) (.*?)  +([\d. ]+)", line).groups() for line in lines[2:7]]
    assert [row[1] for row in rows] == ["ground truth", "a", "b class", "b distillation", "b fused"]
    matrix = np.array([row[2].split() for row in rows], dtype=float)
    assert np.array_equal(matrix, matrix.T) and not matrix.diagonal().any()
    top1 = re.findall("top-1.*", output(run_evaluate, "accuracy", *words))
    right = re.findall(r"([\d.]+) %", "".join(top1))
    assert matrix[0, 1:].tolist() == pytest.approx([100 - float(share) for share in right], abs=0.06)

    images, labels = draw_shapes("val", 55, 16)  # the picture begins with the most disputed
    inputs = augment.normalize(images)
    outputs = [plain(inputs), *pair(inputs), fuse(pair(inputs))]
    decisions = [labels.tolist(), *(scores.argmax(dim=1).tolist() for scores in outputs)]
    expected = [[100 * np.not_equal(a, b).mean() for b in decisions] for a in decisions]
    np.testing.assert_allclose(matrix, expected, atol=0.051)
    odd = [sum(a != b for a, b in itertools.combinations(said, 2)) for said in zip(*decisions, strict=True)]
    first = Image.fromarray(images[odd.index(max(odd))].permute(1, 2, 0).numpy())
    page = Image.open(tmp_path / "odd.png")
    left = page.width - 8 * (96 + 6)
    shown = page.crop((left, 0, left + 96, 96))
    assert shown.tobytes() == first.resize((96, 96), Image.Resampling.BICUBIC).tobytes()
    row = pictures.disagreement_row([], torch.tensor([[0, 1], [1, 1]]), ["truth", "a"], ["x", "y"])
    assert row == ("truth\na", [], ["x\n× y", "y\ny"])


def test_token_cosines_are_those_of_the_embeddings_after_each_block(tmp_path, output):
    model, seen = save_network(tmp_path / "net.pth", list(SHAPES)), []
    model.blocks[0].register_forward_hook(lambda module, arguments, output: seen.append(output))
    model(augment.normalize(draw_shapes("val", 55, 16)[0]))
    pairs = seen[0][:, :2].detach().numpy()
    expected = np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])
    told = output(run_evaluate, "tokens", tmp_path / "net.pth", "--device", "cpu")
    printed = [float(word) for word in told.splitlines()[-1].split()]
    assert len(printed) == 2 and printed[0] == pytest.approx(expected, abs=6e-4)


def test_flops_are_those_of_the_matrix_products():
    for name, giga in (("resnet18", 1.814), ("vit_b_32", 4.409)):  # multiply-adds at 224, torchvision's table
        with torch.device("meta"):
            network = torchvision.models.get_model(name)
        assert speed.count_flops(network, 224) == pytest.approx(2e9 * giga, rel=0.01)
    with torch.device("meta"):
        network = create_model("small", distilled=True)

    def block(queries):  # keys, queries and values of all tokens; the rest for those that ask
        return 2 * 384**2 * (3 * 198 + 9 * queries) + 2 * 2 * queries * 198 * 384

    products = 2 * 196 * 768 * 384 + 11 * block(198) + block(2) + 2 * 2 * 384 * 1000
    assert speed.count_flops(network, 224) == products


@pytest.mark.parametrize("model", ["tiny", "resnet18"])
def test_throughput_tells_rates_and_the_share_of_the_peak(monkeypatch, output, model):
    timed = []
    monkeypatch.setattr(speed, "seconds", lambda act, runs, _: act() and 0 or timed.append(runs) or 0.5)
    monkeypatch.setattr(speed, "matmul_peak", lambda dtype, device: (1e10, 1024))
    words = {"model": model, "img_size": 32, "batch_size": 4, "runs": 7, "device": "cpu"}
    *_, inference, training, augmentation = output(run_evaluate, "throughput", *flags(words)).splitlines()
    assert timed == [7, 7, 7]
    flops = speed.count_flops(build_network(Settings(model=model, img_size=32), 1000), 32)
    for line, cost in ((inference, flops), (training, 3 * flops)):
        assert "  8.0 images/s, batch 4, mean of 7 runs" in line
        assert f"{8 * cost / 1e12:.3g} TFLOP/s, {100 * 8 * cost / 1e10:.1f} % of the peak" in line
    assert augmentation.startswith("augmentation  8.0 images/s")


@pytest.mark.parametrize("distilled", [False, True])
def test_attention_maps_are_the_prefix_tokens_softmax_over_the_patches_and_their_rollout(distilled):
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 8, "depth": 6, "num_classes": 3}
    model = create_model("tiny", distilled=distilled, **sizes).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(8)
    inputs, prefix, rollout = torch.randn(2, 3, 24, 24), 1 + distilled, torch.eye(10 + distilled)
    rows = model.attention_weights(inputs)
    for row in rows[:5]:  # later layers multiply from the left
        rollout = torch.matmul(0.5 * row.mean(1) + 0.5 * torch.eye(9 + prefix), rollout)
    heads = rows[4].transpose(1, 2)
    for found, weights in zip(pictures.attention_maps(model, inputs, layer=5), (heads, rollout), strict=True):
        patches = weights[:, :prefix, ..., prefix:]
        patches = (patches / patches.sum(-1, keepdim=True)).unflatten(-1, (3, 3))
        torch.testing.assert_close(found, patches, rtol=1e-4, atol=1e-6)


# ---- The loop ----


def test_bf16_on_a_cpu_leaves_out_the_fused_attention_which_is_slow_there():
    q = torch.randn(2, 3, 5, 64, requires_grad=True)
    expected = (q @ q.transpose(2, 3) / 8).softmax(dim=-1) @ q
    for precision in ("bf16", "fp32"):
        with devices.autocast(precision, torch.device("cpu")):
            found = F.scaled_dot_product_attention(q, q, q)
        assert ("Flash" in found.grad_fn.name()) == (precision == "fp32"), found.grad_fn
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_with_clipping_accumulation_and_average(tmp_path, monkeypatch, precision):
    words = QUICK | {"precision": precision, "clip_grad": 1.0, "accumulate": 2, "ema": 0.8}
    assert run_train(monkeypatch, *flags(words | {"distill": "label", "out": tmp_path / "run"})) == 0
    contents = saved(tmp_path / "run")
    assert bool(contents["scaler"]) == (precision == "fp16")
    weights = contents["model"].values()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights)
    assert runs.read_log(tmp_path / "run")[-1]["loss"] < 2.5


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_steps_gradient_is_clipped_to_its_norm_whatever_the_losss_scale(tmp_path, monkeypatch, precision):
    words = QUICK | {"limit": 16, "epochs": 1, "warmup_epochs": 0, "optimizer": "sgd", "lr": 32.0}
    words |= {"weight_decay": 0.0, "clip_grad": 0.01, "precision": precision}
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "run"})) == 0
    before, after = build_network(complete(words), 10).state_dict(), saved(tmp_path / "run")["model"]
    moved = torch.cat([(after[key] - value).flatten() for key, value in before.items()]).norm()
    assert moved.item() == pytest.approx(1.9 * 0.01, rel=1e-3)  # of rate 1: Nesterov's first step is 1.9


def recorded():
    """A training run that leaves its weights' sums and its generators' seeds in OUT/rankN.json."""
    built, build, seeds, keyed = [], train.build_network, [], train.keyed_generator
    train.build_network = lambda *arguments: built.append(build(*arguments)) or built[-1]
    train.keyed_generator = lambda *key: seeds.append(keyed(*key).initial_seed()) or keyed(*key)
    train.main()
    digest = {key: value.double().sum().item() for key, value in built[-1].state_dict().items()}
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    (out / f"rank{launch.rank()}.json").write_text(json.dumps([digest, seeds]))


def test_accumulated_parts_and_two_processes_give_the_steps_of_the_whole_batch(tmp_path):
    words = flags(QUICK | PLAIN)
    for out, parts in (("whole", 1), ("parts", 4)):
        fork(recorded, [*words, "--accumulate", parts, "--out", tmp_path / out]).join()
    for out, parts in (("two", 1), ("both", 2)):
        fork_two(recorded, [*words, "--accumulate", parts, "--out", tmp_path / out])
        told = [json.loads((tmp_path / f"{out}/rank{rank}.json").read_text()) for rank in (0, 1)]
        (first, one), (second, two) = told
        assert first == second
        assert len({*one, *two}) == 2 * 9 * parts * 2  # each part of a step draws for itself
    whole, record = saved(tmp_path / "whole"), runs.read_log(tmp_path / "whole")[-1]
    for out in ("parts", "two", "both"):
        torch.testing.assert_close(saved(tmp_path / out)["model"], whole["model"], rtol=1e-3, atol=4e-4)
        ended = runs.read_log(tmp_path / out)[-1]
        assert ended["loss"] == pytest.approx(record["loss"], rel=1e-4)
        assert ended["accuracy"] == pytest.approx(record["accuracy"], abs=0.01)  # of 55 images, an odd number


def test_two_processes_keep_one_set_of_batchnorm_statistics(tmp_path):
    fork_two(recorded, flags(QUICK | {"model": "regnet_y_200mf", "epochs": 1, "out": tmp_path / "run"}))
    first, second = (json.loads((tmp_path / f"run/rank{rank}.json").read_text())[0] for rank in (0, 1))
    assert first == second and any("running_var" in key for key in first)


def test_progress_tells_rate_and_time_left_from_the_end_of_the_first_step_on(monkeypatch, capsys):
    now = iter([100.0, 100.0, 106.0, 120.0, 120.0])  # step 8 may have compiled: what it took does not count
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = launch.Progress(1008, batch_size=64)
    assert [progress.due(8), progress.due(11), progress.due(18)] == [False, False, True]
    progress.show(18, "step 18")
    assert capsys.readouterr().out == "step 18  32 images/s  0:33:00 left\n"


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_commands_teacher_learns_whatever_the_seed(tmp_path, monkeypatch, seed):
    words = {"model": "vgg8", "seed": seed, "limit": 2000, "img_size": 16, "out": tmp_path / "run"}
    assert run_train(monkeypatch, *flags(words)) == 0
    assert runs.read_log(tmp_path / "run")[1]["accuracy"]["class"] > 50  # at four times the rate 17


def test_a_teacher_that_knows_no_more_than_the_largest_class_is_refused(tmp_path, monkeypatch, output):
    val = ArraySet(torch.zeros(8, 3, 1, 1), torch.tensor([0, 0, 0, 1, 2, 2, 1, 0]), list("abc"))
    CHECK_TEACHER(50.1, val)
    with pytest.raises(UserError, match="has 50.00 %, where naming the largest class alone has 50.00 %"):
        CHECK_TEACHER(50.0, val)
    monkeypatch.setattr("train.check_teacher", CHECK_TEACHER)
    words = QUICK | {"distill": "hard", "teacher": "resnet18", "teacher_epochs": 1, "limit": 16}
    words = flags(words | {"out": tmp_path / "run"})
    for _ in range(2):  # trained now, and found
        assert "raise --teacher-epochs" in output(run_train, *words, code=2)
        assert not (tmp_path / "run/last.pth").exists()


def test_an_epochs_line_says_what_the_log_keeps(tmp_path, monkeypatch, output):
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(
        "launch.Progress.due", lambda self, step: setattr(self, "started", 0) or step % 3 == 0
    )
    told = output(run_train, *flags(QUICK | {"epochs": 2, "out": tmp_path / "run"}))
    lines = [
        f"epoch {record['epoch']}/2  loss {record['loss']:.3f}  val class "
        f"{record['accuracy']['class']:.2f} %\n"
        for record in runs.read_log(tmp_path / "run")
    ]
    assert len(lines) == 2 and "".join(lines) in re.sub(r"epoch \d  step .*\n", "", told)
    for record in runs.read_log(tmp_path / "run"):  # progress is shown at the end of each epoch
        shown = f"epoch {record['epoch']}  step {record['step']}/6  loss {record['loss']:.3f}  lr "
        assert shown in told and 1 < record["images_per_second"] * record["seconds"] / 48 < 2


def test_compile_is_for_the_network_that_is_trained_and_for_its_teacher(tmp_path, monkeypatch, output):
    compiled = []
    monkeypatch.setattr("torch.compile", lambda network: compiled.append(type(network).__name__) or network)
    monkeypatch.setattr("torch.nn.Module.compile", lambda network: compiled.append("teacher"))
    output(
        run_train,
        *flags(QUICK | {"distill": "hard", "teacher_epochs": 1, "compile": True, "out": tmp_path / "run"}),
    )
    assert compiled == ["Sequential", "teacher", "DeiT"]  # vgg8 is a Sequential


def test_auto_is_bf16_where_the_device_is_faster_in_it(tmp_path, monkeypatch, output):
    amd, intel = {"cpu_name": "AMD EPYC"}, {"cpu_name": "Intel Xeon"}
    rows = [(amd | {"avx512_bf16": True}, "bf16"), (amd | {"avx512_bf16": False}, "fp32"), ({}, "fp32")]
    rows += [(intel | {"avx512_bf16": True}, "fp32"), (intel | {"amx_bf16": True}, "bf16")]
    rows += [({"architecture": "aarch64", "bf16": True}, "bf16"), ({"neon": True, "bf16": False}, "fp32")]
    for has, expected in rows:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda has=has: has, raising=False)
        assert launch.choose_precision("auto", "cpu") == expected, has
        assert launch.choose_precision("fp16", "cpu") == "fp16"
        assert launch.choose_precision("auto", "mps") == "fp32"
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: rows[0][0], raising=False)
    told = output(run_train, *flags(QUICK | {"epochs": 1, "precision": "auto", "out": tmp_path / "run"}))
    assert "precision=bf16" in told
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)  # as in an older torch
    assert launch.choose_precision("auto", "cpu") == "fp32"
    for more in ({}, {"precision": "auto"}):  # a run keeps the precision that it began with
        told = output(run_train, *flags({"out": tmp_path / "run", "resume": True} | more))
        assert "precision=bf16" in told and saved(tmp_path / "run")["settings"]["precision"] == "bf16"


def test_a_teacher_is_trained_once_and_reused_by_every_student(tmp_path, output):
    words = QUICK | {"teacher": "resnet18", "teacher_epochs": 1, "distill": "hard", "epochs": 1}
    same = {}, {"seed": 1}, {"patch_size": 4}, {"accumulate": 2}, {"batch_size": 18, "distill": "soft"}
    other = {"teacher_epochs": 2}, {"img_size": 24}, {"limit": 50}
    odd = dict(workers=3, accumulate=2, save_every=5, data_path="/x", limit=7, compile=True, img_size=40)
    odd |= dict(device="cpu", patch_size=5, data="folder", precision="fp16")
    shared = [
        train.teacher_settings(complete(odd | {"teacher": "tiny"} | more), load("shapes", "", 8, limit=7)[0])
        for more in ({}, {"precision": "fp32"})
    ]
    assert vars(shared[0]).items() >= odd.items() and shared[0].out == shared[1].out
    for n, more in enumerate(same + other):  # the others decide what the teacher becomes
        told = output(run_train, *flags(words | more | {"out": tmp_path / f"s{n}"}))
        assert re.search(r"\nteacher: \d+\.\d\d % top-1\n", told)
        assert "teacher: a resnet18 of " in told and ("has ended" in told) == (0 < n < 5)
    assert len(list(tmp_path.glob("teacher-shapes-*-resnet18-*"))) == 4
    student = saved(tmp_path / "s4")
    teacher = Path(student["settings"]["teacher_weights"])
    assert teacher.parent.parent == tmp_path and not list(tmp_path.glob("s?/teacher-*"))
    assert "dist_token" in student["model"] and saved(teacher.parent)["settings"]["batch_size"] == 8


def no_teacher(*arguments, **options):
    raise AssertionError("the teacher was asked")


def test_a_second_student_reads_the_labels_that_the_first_ones_teacher_gave(tmp_path, monkeypatch):
    words = QUICK | {"distill": "hard", "teacher_epochs": 1, "accumulate": 2, "out": tmp_path / "plain"}
    assert forked(flags(words)) == 0
    words |= {"remember_labels": True, "save_every": 2}
    again = flags(words | {"out": tmp_path / "first", "resume": True})
    assert forked(again, ("step", 6, signal.SIGKILL)) == -signal.SIGKILL
    assert forked(again) == 0
    assert forked(flags(words | {"epochs": 4, "out": tmp_path / "longer"})) == 0
    monkeypatch.setattr("networks.create_teacher", no_teacher)
    for out, more in (("second", {}), ("again", {"epochs": 4})):
        assert run_train(monkeypatch, *flags(words | more | {"out": tmp_path / out})) == 0
    for one, two in (("plain", "first"), ("plain", "second"), ("longer", "again")):
        assert same_run(tmp_path / one, tmp_path / two)
    (labels,) = tmp_path.glob("labels-*")
    assert labels.stat().st_size == 4 * 3 * 16 and min(labels.read_bytes()) > 0
    words["epochs"] = 1
    others = {"lr": 1e-3}, {"no_distill_token": True}, {"drop_path": 0.2}, {"smoothing": 0.0}, {"depth": 1}
    for n, more in enumerate(others):
        assert run_train(monkeypatch, *flags(words | more | {"out": tmp_path / f"s{n}"})) == 0
    contents = saved(saved(tmp_path / "plain")["settings"]["teacher_weights"], "")
    next(iter(contents["model"].values())).neg_()
    torch.save(contents, tmp_path / "other.pth")
    inputs = {"seed": 1}, {"batch_size": 8}, {"accumulate": 1}, {"mixup": 0.0}, {"erasing": 0.0}
    inputs += {"cutmix": 0.0}, {"precision": "bf16"}, {"patch_size": 4}
    inputs += ({"teacher_weights": tmp_path / "other.pth"},)
    for n, more in enumerate((*inputs, {"limit": 50}, {"augment": "none"}, {"repeats": 3})):
        with pytest.raises(AssertionError, match="the teacher was asked"):
            run_train(monkeypatch, *flags(words | more | {"out": tmp_path / f"t{n}"}))
    whole, plain = labels.read_bytes(), Path.read_bytes
    labels.write_bytes(whole[:5])  # half a batch is known: the teacher is asked for the whole of it
    assert forked(flags(words | {"epochs": 3, "out": tmp_path / "half"})) == 0
    assert same_run(tmp_path / "plain", tmp_path / "half")
    labels.write_bytes(whole)
    for edited in ("augment.py", "image_files.py", "data.py"):
        read = lambda path, edited=edited: plain(path) + b"#" * (path.name == edited)  # noqa: E731
        monkeypatch.setattr(Path, "read_bytes", read)
        with pytest.raises(AssertionError, match="the teacher was asked"):
            run_train(monkeypatch, *flags(words | {"out": tmp_path / edited}))
    monkeypatch.setattr(Path, "read_bytes", plain)
    for module in (torch, np):
        with monkeypatch.context() as newer, pytest.raises(AssertionError, match="the teacher was asked"):
            newer.setattr(module, "__version__", "9")
            run_train(monkeypatch, *flags(words | {"out": tmp_path / module.__name__}))


def test_each_of_two_processes_remembers_its_own_labels(tmp_path, output):
    words = QUICK | {"distill": "hard", "teacher_epochs": 1, "epochs": 2}
    fork_two(train.main, flags(words | {"out": tmp_path / "plain"}))
    words["remember_labels"] = True
    for out, known in (("first", " 0 %"), ("second", " 100 %")):
        told = fork_two(train.main, flags(words | {"out": tmp_path / out}), tmp_path / "told")
        assert f", 0.0 MB for each process,{known} are known" in told
        assert same_run(tmp_path / "plain", tmp_path / out)
    assert ", 0 % are known" in output(run_train, *flags(words | {"out": tmp_path / "alone"}))
    assert len(list(tmp_path.glob("labels-*"))) == 3


def test_the_last_of_256_classes_is_remembered_too(tmp_path):
    s = Settings(img_size=8, batch_size=4, epochs=1, repeats=1, out=str(tmp_path / "new/run"))
    part = ArraySet(noise(4, 3, 8, 8), torch.zeros(4).long(), [str(n) for n in range(256)])
    said = F.one_hot(torch.tensor([255, 0, 254, 255]), 256)
    for load in (lambda: SimpleNamespace(logits=lambda *_: said), no_teacher):
        remembered = RememberedLabels(s, part, {"teacher_hash": ""}, load, CPU)
        assert torch.equal(remembered.logits(None, (0, 0, 0, 0)), said)
    others = (replace(s, img_size=16), part, CPU), (s, replace(part, images=noise(4, 3, 8, 8, seed=1)), CPU)
    for other, images, device in (*others, (s, part, torch.device("meta"))):
        with pytest.raises(AssertionError, match="the teacher was asked"):
            RememberedLabels(other, images, {"teacher_hash": ""}, no_teacher, device)


# ---- The loop: the data ----


def load(name, path, size, splits=("train", "val"), **more):
    s = Settings(data=name, data_path=str(path), img_size=size, **more)
    return [data.open_split(s, split, CPU) for split in splits]


@pytest.fixture(params=[HELD, STREAMED], ids=["held", "streamed"])
def folder(tmp_path, request):
    return write_folder(tmp_path / "folder", request.param)


def test_shapes_depend_on_seed_split_and_index_alone(monkeypatch):
    keys = ((0, "train", 13), (1, "train", 13), (0, "val", 13), (0, "train", 23), (0, "train", 13))
    drawn = [draw_shape(*key, 32) for key in keys]
    assert [label for _, label in drawn] == [3] * 5
    assert len({image.tobytes() for image, _ in drawn}) == 4
    assert drawn[0][0].tobytes() == drawn[4][0].tobytes()
    images, labels = draw_shapes("val", 30, 48)
    assert (images.shape, images.dtype) == ((30, 3, 48, 48), torch.uint8)
    assert labels.bincount().tolist() == [3] * 10
    monkeypatch.setattr(
        "data.draw_shapes", lambda split, count, size: (torch.zeros(count), torch.zeros(count))
    )
    assert [len(part) for part in load("shapes", "", 24)] == [8000, 2000]


def test_a_folder_of_equal_small_images_is_held_and_another_is_streamed(tmp_path, monkeypatch):
    held = load("folder", write_folder(tmp_path / "a", HELD), 24)[0]
    streamed = load("folder", write_folder(tmp_path / "b", STREAMED), 24)[0]
    assert (type(held), type(streamed)) == (ArraySet, FolderSet)
    assert held.classes == streamed.classes == ["ant", "bee"]
    assert held.labels.tolist() == streamed.labels == [0] * 6 + [1] * 6
    assert np.array_equal(held.images[8].permute(1, 2, 0), Image.open(tmp_path / "a/train/bee/2.png"))
    for bytes_less, kind in ((0, ArraySet), (1, FolderSet)):
        monkeypatch.setattr("data.HELD_BYTES", 12 * 3 * 30 * 30 - bytes_less)
        assert type(load("folder", tmp_path / "a", 24)[0]) is kind
    few, _ = load("folder", tmp_path / "b", 24, limit=4)  # evenly spread, so of all classes
    assert few.paths == streamed.paths[::3] and few.labels == [0, 0, 1, 1]


def collect(part, count, start=0, **changed):
    """`count` batches from step `start` on: of 4 images of 24 pixels, unless `changed` says otherwise."""
    s = Settings(**{"img_size": 24, "batch_size": 4, "repeats": 1, "workers": 0, "seed": 5} | changed)
    return list(itertools.islice(train_batches(part, s, start, CPU), count))


def test_a_stream_of_batches_continues_from_anywhere_with_any_number_of_workers(folder):
    part = load("folder", folder, 24)[0]
    whole = collect(part, 8)  # 12 images, 3 batches an epoch
    assert all(images.shape == (4, 3, 24, 24) and images.dtype == torch.uint8 for images, _ in whole)
    for epoch in (0, 3):
        assert torch.cat([labels for _, labels in whole[epoch : epoch + 3]]).bincount().tolist() == [6, 6]
    assert not torch.equal(whole[0][0], whole[3][0])
    for start, workers in ((0, 2), (4, 0), (5, 2)):
        again = collect(part, 8 - start, start, workers=workers)
        for (a, x), (b, y) in zip(whole[start:], again, strict=True):
            assert torch.equal(a, b) and torch.equal(x, y)


def test_the_processes_of_a_step_share_what_one_process_would_take(folder, monkeypatch):
    train_set, val_set = load("folder", folder, 24)

    def batches():
        s = Settings(img_size=24, batch_size=3, workers=0)
        shown = zip(*data.eval_batches(val_set, s, CPU), strict=True)
        return collect(train_set, 4, augment="off"), [torch.cat(each) for each in shown]

    (one, whole), shares, crops = batches(), [], set()
    shuffles = [one[0], one[3], *collect(train_set, 1, augment="off", seed=6)]  # of epoch 0, 1, and a seed
    assert len({images.numpy().tobytes() for images, _ in shuffles}) == 3
    alike = ArraySet(noise(1, 3, 48, 48).expand(12, -1, -1, -1), torch.zeros(12).long(), ["a"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        shares.append(batches())
        parts = [*collect(alike, 6, accumulate=2), *collect(alike, 6, accumulate=2, seed=6)]
        crops |= {images.numpy().tobytes() for images, _ in parts}
    assert len(crops) == 2 * 12  # each part of a step has crops of its own
    for (images, labels), *both in zip(one, *(taught for taught, _ in shares), strict=True):
        assert torch.equal(images, torch.stack([share[0] for share in both], dim=1).flatten(0, 1))
        assert torch.equal(labels, torch.stack([share[1] for share in both], dim=1).flatten(0, 1))
    for rank, (_, share) in enumerate(shares):  # evaluation sees every image once over all processes
        assert all(torch.equal(part, each[rank::2]) for part, each in zip(share, whole, strict=True))


def test_an_images_repeats_are_decoded_once_and_cropped_differently(tmp_path, monkeypatch):
    part, reads = load("folder", write_folder(tmp_path, STREAMED), 24)[0], []
    monkeypatch.setattr("data.read_image", lambda *given: reads.append(given) or read_image(*given))
    images = collect(part, 1, repeats=3, batch_size=12)[0][0]
    assert len(reads) == len(set(reads)) == 4
    assert {enough for _, enough in reads} == {4 * 24}  # the smallest crop is a quarter of a side
    assert len({image.numpy().tobytes() for image in images}) == 12


@pytest.mark.parametrize("size", [32, 48])
def test_a_crop_does_not_depend_on_whether_a_set_is_held_or_streamed(tmp_path, monkeypatch, size):
    write_folder(tmp_path, [(size, size)])
    s, shown = Settings(img_size=size, workers=0), []
    for held_bytes in (data.HELD_BYTES, 0):
        monkeypatch.setattr("data.HELD_BYTES", held_bytes)
        train_set, val_set = load("folder", tmp_path, size)
        images = collect(train_set, 3, img_size=size)[0][0]
        # up to 32 pixels padded and cropped: three in four crops show the padding's black border
        assert (images[:, :, [0, -1]].sum(dim=(1, 3)) == 0).any() == (size == 32)
        shown.append(torch.cat([images for images, _ in data.eval_batches(val_set, s, CPU)]))
    assert torch.equal(*shown)


def read_back(path, image, **options):
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_pictures_of_every_kind_are_read_upright_on_white_and_large_ones_at_a_size_that_is_enough(
    tmp_path, monkeypatch
):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn it clockwise
    assert np.array_equal(read_back(tmp_path / "turned.png", image, exif=exif), np.rot90(pixels, -1))
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert read_back(tmp_path / f"{mode}.tiff", image.convert(mode)).shape == (8, 12, 3)
    kinds = [(np.uint16, "png"), (np.uint16, "tiff"), (np.int32, "tiff")]
    for bits, (kind, ending) in itertools.product((8, 12, 16), kinds):  # scaled by what the largest needs
        gray = np.linspace(0, 2**bits - 1, 96).astype(kind).reshape(8, 12)
        found = read_back(tmp_path / f"{bits}.{ending}", Image.fromarray(gray))
        assert np.array_equal(found, np.stack([gray // 2 ** (bits - 8)] * 3, axis=2))
    for least in (2**8, 2**12):  # that 8 and 12 bits do not hold
        assert read_back(tmp_path / "least.png", Image.new("I;16", (1, 1), least)).max() == 16
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "x" * 2**21, zip=True)
    for options in ({"exif": b"Exif\0\0damaged"}, {"pnginfo": notes}):
        assert np.array_equal(read_back(tmp_path / "odd.png", image, **options), pixels)
    with monkeypatch.context() as small:
        small.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40)
        with pytest.raises(UserError, match="odd.png has more pixels than .*; reduce it, or raise PIL"):
            read_image(tmp_path / "odd.png")
    for value in (-1, 65536, 0.5):  # of 32 bits
        with pytest.raises(UserError, match="its values have no known range"):
            read_back(tmp_path / "deep.tiff", Image.new("F" if value == 0.5 else "I", (1, 1), value))
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    for name, image in (("RGBA.png", picture), ("P.png", picture.quantize(4))):
        assert read_back(tmp_path / name, image).tolist() == [[[200, 0, 0], [255, 255, 255]]]
    kinds = [("a.jpe", "JPEG"), ("b.JFIF", "JPEG"), ("c.gif", "GIF"), ("d.avif", "AVIF")]
    kinds = [(name, kind) for name, kind in kinds if kind in Image.SAVE]  # AVIF since Pillow 11.3
    for name, kind in kinds:
        (tmp_path / "few").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "few" / name, kind)
    found, others = data.find_images(tmp_path / "few")
    assert len(found) == len(kinds) and not others
    assert all(read_image(path).getpixel((4, 4))[0] > 190 for path in found)
    Image.new("RGB", (1200, 800)).save(tmp_path / "photo.jpg")
    read = [read_image(tmp_path / "photo.jpg", enough) for enough in (None, 401, 400, 201, 200, 1)]
    assert [image.width for image in read] == [1200, 1200, 600, 600, 300, 150]
    path = str(tmp_path / "noise.jpg")
    Image.fromarray(noise(1, 800, 1200, 3)[0].numpy()).save(path)
    crops, _, _ = FolderSet([path], [0], ["a"], False)[([0], None, 100)]
    assert torch.equal(crops[0], crop_file(read_image(path), 100, None))  # the evaluation has the whole of it


def test_a_damaged_exif_block_is_no_warning_and_a_truncated_file_a_mistake(tmp_path):
    path, image = str(tmp_path / "a.jpg"), Image.effect_noise((40, 40), 90).convert("RGB")
    image.save(path)
    Path(path).write_bytes(Path(path).read_bytes()[:-90])
    with pytest.raises(UserError, match="a.jpg is not a readable image: image file is truncated"):
        read_image(path)
    image.save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\x01garbage")
    lines = "from image_files import read_image; from PIL import Image; Image.MAX_IMAGE_PIXELS = 1000"
    program = [sys.executable, "-c", f"{lines}; read_image({path!r})"]  # nor is a large picture
    assert subprocess.run(program, capture_output=True, check=True).stderr == b""


def test_broken_images_are_named_or_left_out_and_counted(folder):
    bad = {str(folder / f"{split}/bee/{n}.png") for split in ("train", "val") for n in (2, 3)}
    for path in bad:
        Path(path).write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"bee/[23]\.png is not a readable image: [^\n]*--skip-broken"):
            collect(load("folder", folder, 24)[0], 3, workers=workers)
    train_set, val_set = load("folder", folder, 24, skip_broken=True)
    batches = collect(train_set, 2, batch_size=5, workers=2)
    assert all(images.shape == (5, 3, 24, 24) and labels.shape == (5,) for images, labels in batches)
    shown = data.eval_batches(val_set, Settings(img_size=24, workers=0, batch_size=3), CPU)
    assert torch.cat([labels for _, labels in shown]).tolist() == [0] * 6 + [1] * 4
    assert train_set.broken | val_set.broken == bad
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the images of a batch can be read; one is .*/train/"):
        collect(load("folder", folder, 24, skip_broken=True)[0], 1)
    s, network = Settings(img_size=24, workers=0), create_model("tiny", img_size=24, patch_size=8, depth=1)
    with pytest.raises(UserError, match="none of the validation images can be read"):
        train.evaluate(network, load("folder", folder, 24, skip_broken=True)[1], s, CPU)


def test_folders_that_make_no_data_set_are_refused(tmp_path):
    train, val = write_folder(tmp_path, HELD) / "train", tmp_path / "val"
    steps = {
        "the class 'cow', which train has not": lambda: (val / "cow").mkdir(),
        "there is no image in .*train/cow": lambda: (val / "cow").rename(train / "cow"),
        "there are no images for train in class": lambda: [path.unlink() for path in tmp_path.rglob("*.png")],
        "no images for train in class folders below": lambda: [path.rmdir() for path in train.iterdir()],
        "there is no folder .*train; --data-path": lambda: (train.rmdir(), shutil.rmtree(val)),
    }
    for message, change in steps.items():
        change()
        with pytest.raises(UserError, match=message):
            load("folder", tmp_path, 8)
    for name in ("val", "valid", "validation", "test"):  # which is no class
        touch(tmp_path, f"{name}/ant/1.png")
        with pytest.raises(UserError, match="there is no folder .*train; --data-path"):
            load("folder", tmp_path, 8)
        shutil.rmtree(tmp_path / name)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_other_files_are_left_out_loudly_and_without_val_a_tenth_of_train_is_held_out(
    tmp_path, monkeypatch, capsys, name
):
    tmp_path = tmp_path / ".cache"  # what lies below a hidden folder is not hidden
    train_path, val = write_folder(tmp_path, HELD) / "train", tmp_path / "val"
    touch(
        train_path,
        "notes.txt",
        "ant/README",
        "ant/1.HEIC",
        "ant/deep/2.svg",
        "ant/.DS_Store",
        "ant/._1.png",
        "__MACOSX/ant/1.png",
    )
    touch(train_path, ".ipynb_checkpoints/1.png", "bee/.ipynb_checkpoints/1.png")
    (train_set, _), told = load(name, tmp_path, 24), capsys.readouterr().out
    assert (train_set.classes, len(train_set)) == (["ant", "bee"], 12)
    text = f"left out of {train_path}: 3 files that are no images by their ending (.heic, .svg, none)\n"
    assert told == text
    val.rename(tmp_path / "test")  # another name is not taken for val
    assert len(data.held_out_tenth(["b.png", os.fsdecode(b"caf\xe9.png")], Path())) == 1
    for n in range(6, 200):
        shutil.copy(train_path / "bee/0.png", train_path / f"bee/{n}.png")
    for path in list(train_path.glob("ant/?.png"))[1:]:
        path.unlink()
    monkeypatch.setattr("data.HELD_BYTES", 0)
    train_set, before = load(name, tmp_path, 24)
    text = f"there is no {val}: {len(before)} images are held out of training"
    told = capsys.readouterr().out
    assert (
        text in told and told.count("held out") == 1 and train_set.labels.count(0) == 1
    )  # the only ant stays
    assert 10 < len(before) < 30 and not set(before.paths) & set(train_set.paths)
    for n in range(3):  # new files move none of the others from one to the other
        shutil.copy(train_path / "bee/0.png", train_path / f"bee/0{n}.png")
    train_set, after = load(name, tmp_path, 24)
    assert set(before.paths) <= set(after.paths) and len(train_set) + len(after) == 204
    paths = [str(train_path / f"bee/{n}.png") for n in range(3)]
    assert [len(data.held_out_tenth(paths[:n], train_path)) for n in range(4)] == [0, 0, 1, 1]
    shutil.rmtree(train_path / "bee")
    with pytest.raises(UserError, match="a network of one class learns nothing, and .*train has only 'ant'"):
        load(name, tmp_path, 24)


def test_a_validation_set_may_lack_a_class_and_keeps_trains_labels(folder, capsys):
    for path in (folder / "val/ant").iterdir():
        path.unlink()
    for splits in (("train", "val"), ("val",)):
        val_set = load("folder", folder, 24, splits)[-1]
        assert capsys.readouterr().out == "1 of 2 classes have no validation images, such as 'ant'\n"
        assert (list(val_set.labels), val_set.classes) == ([1] * 6, ["ant", "bee"])
    shutil.copytree(folder / "val", folder / "test")
    assert len(load("folder", folder, 24, ("test",))[0]) == 6 and not capsys.readouterr().out


def touch(folder, *names):
    for path in (folder / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.fixture
def matlab(monkeypatch):
    """A stand-in for scipy, which the tests do without: JSON stands in the .mat files."""

    def loadmat(path, squeeze_me):
        return {name: np.array(values) for name, values in json.loads(Path(path).read_text()).items()}

    reader = SimpleNamespace(loadmat=loadmat)
    monkeypatch.setitem(sys.modules, "scipy.io", reader)
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace(io=reader, __spec__="a module's"))


def names_of(part):
    paths = [Path(path).resolve(strict=True) for path in part.paths]  # they exist
    return [(path.name, part.classes[n]) for path, n in zip(paths, part.labels, strict=True)]


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_upright_in_color_with_its_names_and_its_own_test_images(tmp_path, monkeypatch, name, key):
    kind, images = getattr(torchvision.datasets, name.upper()), noise(3, 3, 32, 32)
    names = {kind.meta["key"]: ["ant", "bee", "cow"]}
    (tmp_path / kind.base_folder).mkdir()
    for file, *_ in (*kind.train_list, *kind.test_list, (kind.meta["filename"],)):
        shown = images[2:] if file.startswith("test") else images[:2]
        contents = names | {"data": shown.flatten(1).numpy(), key: [2] if len(shown) == 1 else [0, 1]}
        (tmp_path / kind.base_folder / file).write_bytes(pickle.dumps(contents))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    asked = []
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: asked.append(1))
    train_set, val_set = load(name, tmp_path, 32)
    assert len(asked) == 2
    assert train_set.classes == val_set.classes == ["ant", "bee", "cow"]
    assert torch.equal(train_set.images[:2], images[:2]) and train_set.labels[:2].tolist() == [0, 1]
    assert torch.equal(val_set.images, images[2:]) and val_set.labels.tolist() == [2]


def test_flowers_train_on_train_and_val_and_are_tested_on_test(tmp_path, monkeypatch, matlab):
    base = tmp_path / "flowers-102"
    touch(base / "jpg", *[f"image_{n:05d}.jpg" for n in range(1, 8)])
    (base / "imagelabels.mat").write_text(json.dumps({"labels": [1, 102, 3, 1, 2, 2, 3]}))
    parts = {"trnid": [4, 2], "valid": [7], "tstid": [1, 3, 5, 6]}
    (base / "setid.mat").write_text(json.dumps(parts))
    check = "torchvision.datasets.flowers102.check_integrity"  # torchvision knows the true files' MD5
    monkeypatch.setattr(check, lambda *_: True)
    asked = []
    monkeypatch.setattr(torchvision.datasets.Flowers102, "download", lambda self: asked.append(1))
    train_set, val_set = load("flowers102", tmp_path, 8)
    assert len(asked) == 3
    names = train_set.classes
    assert len(names) == 102
    assert names_of(train_set) == [(f"image_{n:05d}.jpg", names[c]) for n, c in ((4, 0), (2, 101), (7, 2))]
    assert [name for _, name in names_of(val_set)] == [names[c] for c in (0, 2, 1, 1)]
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="could not get Flowers102 into .*scipy"):
        load("flowers102", tmp_path, 8)


def test_cars_are_read_from_the_files_that_one_has(tmp_path, matlab):
    base = tmp_path / "stanford_cars"
    touch(base, "cars_train/1.jpg", "cars_train/2.jpg", "cars_test/1.jpg", "devkit/README")
    names = {"class_names": ["AM General Hummer", "Acura RL"]}
    (base / "devkit/cars_meta.mat").write_text(json.dumps(names))
    rows = [{"fname": "2.jpg", "class": 2}, {"fname": "1.jpg", "class": 1}]
    (base / "devkit/cars_train_annos.mat").write_text(json.dumps({"annotations": rows}))
    with pytest.raises(UserError, match="could not get StanfordCars into .*--data-path"):
        load("cars", tmp_path, 8)
    rows = [{"fname": "1.jpg", "class": 2}]
    (base / "cars_test_annos_withlabels.mat").write_text(json.dumps({"annotations": rows}))
    train_set, val_set = load("cars", tmp_path, 8)
    assert names_of(train_set) == [("2.jpg", "Acura RL"), ("1.jpg", "AM General Hummer")]
    assert names_of(val_set) == [("1.jpg", "Acura RL")]


@pytest.mark.parametrize("year", ["2018", "2019"])
def test_inaturalist_is_split_by_the_competitions_lists(tmp_path, year):
    lists = {"train": ["Aves/1/a.jpg", "Plantae/0/b.jpg", "Aves/2/c.jpg"], "val": ["Aves/2/d.jpg"]}
    for split, names in lists.items():
        with pytest.raises(UserError, match=f"there is no .*/{split}{year}.json .*; docs/finetune.md"):
            load(f"inat{year}", tmp_path, 8)
        images = [{"file_name": f"train_val{year}/{name}"} for name in names]
        (tmp_path / f"{split}{year}.json").write_text(json.dumps({"images": images}))
        if split == "train":
            with pytest.raises(UserError, match="there is no .*; docs/finetune.md"):
                load(f"inat{year}", tmp_path, 8)
        touch(tmp_path / year, *names)  # torchvision renames train_val2018 so
    train_set, val_set = load(f"inat{year}", tmp_path, 8)
    assert train_set.classes == val_set.classes == ["Plantae/0", "Aves/1", "Aves/2"]  # by their numbers
    assert names_of(train_set) == [("a.jpg", "Aves/1"), ("b.jpg", "Plantae/0"), ("c.jpg", "Aves/2")]
    assert names_of(val_set) == [("d.jpg", "Aves/2")]


# ---- What survives ----

TEACHER = {"distill": "hard", "teacher": "regnet_y_200mf", "teacher_epochs": 2}
SURVIVOR = QUICK | TEACHER | {"ema": 0.8, "repeats": 3, "save_every": 2, "drop_path": 0.2, "dropout": 0.1}


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """The run that was never stopped, to compare with: 2 steps of the teacher, then 3 × 3 of the student."""
    out = tmp_path_factory.mktemp("unhurt")
    assert forked(flags(SURVIVOR | {"out": out / "run"})) == 0
    return out / "run"


KILLS = {"step": (3, 8, 14), "write": (4, 21, 24), "rename": (6, 7, 9), "evaluation": (2,)}
FAULTS = [(what, when, signal.SIGKILL) for what, times in KILLS.items() for when in times]
FAULTS += [("step", 11, signal.SIGTERM), ("evaluation", 1, signal.SIGINT), ("teacher", 1, signal.SIGKILL)]
FAULTS += [("step", 2, signal.SIGHUP)]  # of the teacher's two steps the last


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}-{fault[2].name}")
def test_a_run_that_is_killed_anywhere_ends_as_if_it_never_was(tmp_path, unhurt, fault):
    code = forked(flags(SURVIVOR | {"out": tmp_path / "run"}), fault)
    assert code == (-fault[2] if fault[2] == signal.SIGKILL else 128 + fault[2])
    assert forked(flags({"out": tmp_path / "run", "resume": True})) == 0
    assert same_run(unhurt, tmp_path / "run")
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("more", [{"workers": 1}, {"precision": "fp16", "workers": 0}])
def test_a_streamed_run_and_one_in_fp16_resume_bit_for_bit_too(tmp_path, more):
    write_folder(tmp_path / "data", [(30, 24), (20, 26)])
    words = QUICK | {"data": "folder", "data_path": tmp_path / "data", "limit": 12, "batch_size": 6}
    words |= {"epochs": 2, "optimizer": "sgd", "drop_path": 0.5, "save_every": 1} | more
    assert forked(flags(words | {"out": tmp_path / "whole"})) == 0
    assert forked(flags(words | {"out": tmp_path / "cut"}), ("step", 4, signal.SIGKILL)) == -signal.SIGKILL
    assert forked(flags({"out": tmp_path / "cut", "resume": True})) == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_streamed_run_stops_for_a_signal_to_all_its_processes(tmp_path):
    write_folder(tmp_path / "data", [(300, 240), (200, 260)])
    words = QUICK | {"data": "folder", "data_path": tmp_path / "data", "epochs": 10_000, "workers": 2}
    command = [sys.executable, "train.py", *flags(words | {"batch_size": 1, "out": tmp_path / "run"})]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "run/log.jsonl").exists():  # the evaluation has ended; its workers took no signal
        time.sleep(0.05)
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGTERM)  # which reaches its workers too
    error = run.communicate(timeout=60)[1].decode()
    assert run.returncode == 128 + signal.SIGTERM, error
    assert re.fullmatch(r"stopped by SIGTERM after step .*\n", error)


def test_a_fine_tuning_that_is_killed_needs_nothing_but_its_directory(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    output(run_train, *flags(QUICK | {"distill": "label", "out": "runs/first"}))
    words = {"img_size": 24, "epochs": 2, "batch_size": 16, "train": "head", "save_every": 1, "device": "cpu"}
    words |= {"checkpoint": "runs/first", "recipe": "short"}
    again = ["--out", "runs/tuned", "--resume"]
    assert forked(flags(words | {"out": "whole"}), None, finetune.main) == 0
    for step, command in ((1, flags(words | {"out": "runs/tuned"})), (3, again)):
        assert forked(command, ("step", step, signal.SIGKILL), finetune.main) == -signal.SIGKILL
    told = output(run_train, *again, code=2)
    assert "is a run of finetune.py; continue it with finetune.py --resume" in told
    Path("runs/first").rename("elsewhere")  # the run has all that it needs
    assert forked(again, None, finetune.main) == 0
    assert same_run("whole", "runs/tuned")
    assert "has --train head, not all" in output(run_finetune, *again, "--train", "all", code=2)
    told = output(run_finetune, *again)
    assert "  train=head" in told and "save-every=1" in told  # as the flags are called
    assert "minutes after --resume: class " in told
    words |= {"checkpoint": "elsewhere", "out": "runs/tuned", "overwrite": True}
    assert "before, at 16 pixels: class " in output(run_finetune, *flags(words))


def test_a_run_that_an_older_version_stopped_within_an_epoch_goes_on(tmp_path, output):
    output(run_train, *flags(QUICK | {"epochs": 1, "out": tmp_path / "first"}))
    words = {"checkpoint": tmp_path / "first", "img_size": 24, "epochs": 2, "batch_size": 16, "train": "head"}
    words |= {"device": "cpu", "precision": "fp32", "distill": "hard", "teacher": "tiny"}
    words["teacher_weights"] = tmp_path / "first"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert forked(flags(words | {"out": whole}), None, finetune.main) == 0
    stopped = forked(flags(words | {"out": cut}), ("step", 2, signal.SIGTERM), finetune.main)
    assert stopped == 128 + signal.SIGTERM
    settings = json.loads((cut / "settings.json").read_text()) | {"precision": "auto"}
    settings["train"] = settings.pop("trainable")
    (cut / "settings.json").write_text(json.dumps(settings))
    contents = saved(cut)
    contents["progress"]["loss_sums"] = [contents["progress"].pop("loss_sum")]
    del contents["settings"]["teacher_hash"]
    torch.save(contents, cut / "last.pth")
    assert forked(flags({"out": cut, "resume": True}), None, finetune.main) == 0
    assert same_run(whole, cut)


def test_a_run_goes_on_with_its_own_settings_or_is_written_over_when_told_to(tmp_path, monkeypatch, output):
    own = {"save_every": 2, "workers": 1, "skip_broken": True, "seed": 3, "epochs": 1}
    words, last = flags(QUICK | own | {"out": tmp_path / "run"}), tmp_path / "run/last.pth"
    again = {"out": tmp_path / "run", "resume": True}
    with monkeypatch.context() as torchrun:
        torchrun.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        output(run_train, *words)
        before = last.read_bytes()
        refused = output(run_train, *words, "--overwrite", code=2)
        assert "at each of torchrun's restarts" in refused and last.read_bytes() == before
        output(run_train, *flags(again), "--overwrite")  # which goes on
    for more in ((), ("--distill", "hard")):
        assert "--resume" in output(run_train, *words, *more, code=2)
    assert not list(tmp_path.glob("teacher-*"))  # before it is trained
    for changed in ({}, {"lr": 1.0}):  # what a run that has ended does not use is not recorded as used
        assert "has ended" in output(run_train, *flags(again | changed))
        kept = json.loads((tmp_path / "run/settings.json").read_text())
        assert kept.items() >= (own | {"device": "cpu", "lr": QUICK["lr"]}).items()
    for name, value in (("seed", 4), ("smoothing", 0.2), ("erasing", 0.5), ("epochs", 2)):
        told = output(run_train, *flags(again | {name: value}), code=2)
        assert f"run has --{name} {kept[name]}, not {value}" in told
        assert f"or train on with finetune.py --checkpoint {tmp_path}" in told
    for call, kept in ((0, set()), (2, {"last.pth"})):  # in step 1, and after a save
        with monkeypatch.context() as broken:
            multiply_loss(broken, call, math.nan)
            output(run_train, *words, "--overwrite", "--seed", "1", code=2)
        assert {path.name for path in last.parent.iterdir()} == {".lock", "settings.json"} | kept
    changed = {"workers": 0, "accumulate": 2}
    output(run_train, *flags(again | changed))
    kept = json.loads((tmp_path / "run/settings.json").read_text())
    assert kept.items() >= (own | {"seed": 1, "overwrite": False} | changed).items()
    assert saved(tmp_path / "run")["settings"]["seed"] == 1 and last.read_bytes() != before
    assert len(runs.read_log(tmp_path / "run")) == 1


def test_a_resumed_run_may_have_other_values_of_these_settings_alone(tmp_path):
    s = finetune.FinetuneSettings(out=str(tmp_path))
    assert runs.resumed_settings({}, str(tmp_path)) is None  # a new run, by no flag
    runs.save_settings(s)
    taken = set()
    for name, value in vars(s).items():
        other = "cpu" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
        with contextlib.suppress(UserError):
            given = {"resume": True} | {name: other}
            found = runs.resumed_settings(given, str(tmp_path), finetune.FinetuneSettings)
            assert getattr(found, name) == other
            taken.add(name)
    free = {"out", "data_path", "device", "workers", "compile", "resume", "overwrite", "save_every"}
    free |= {"skip_broken", "remember_labels", "accumulate"}  # these do not change what it computes
    assert taken == free | {"teacher_weights", "lr", "clip_grad", "precision"}


def test_the_best_checkpoint_is_the_epochs_with_the_highest_fused_accuracy(tmp_path, monkeypatch, capsys):
    accuracies = iter([40.0, 60.0, 50.0])
    heads = {"class": 1.0, "distillation": 2.0}
    monkeypatch.setattr("train.evaluate", lambda *arguments: heads | {"fused": next(accuracies)})
    words = QUICK | {"distill": "label", "warmup_epochs": 1.5, "out": tmp_path / "run"}
    assert run_train(monkeypatch, *flags(words)) == 0
    assert saved(tmp_path / "run", "best.pth")["progress"]["step"] == 6
    log, peak = runs.read_log(tmp_path / "run"), 3e-3 * 16 / 512
    assert [record["accuracy"]["fused"] for record in log] == [40, 60, 50]
    cosine = [1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi * step / 9)) / 2 for step in (5, 8)]
    rates = [1e-6 + (peak - 1e-6) * 2 / 4, *cosine]  # of each epoch's last step
    assert [record["lr"] for record in log] == pytest.approx(rates)
    told = capsys.readouterr().out  # the first screen and the last
    assert "\n  circle 6, ring 6, half 6, triangle 6, " in told and "best.pth (epoch 2, 60.00 %)" in told
    assert " more\n" not in told  # than ten classes
    size = sum(value.numel() for value in saved(tmp_path / "run")["model"].values())
    assert f"{size:,} parameters, 9 steps, learning rate 9.38e-05; the run is in {tmp_path}/run\n" in told
    assert "no-distill-token=" in told and not re.search("teacher|tau|lam=|data-path|workers", told)


# Kills process 1 before its fifth step, once
DRIVER = """
import os, signal, sys, launch, train
plain = train.learning_rate
def learning_rate(step, *arguments):
    dead = sys.argv[2] + "/dead"
    if step == 4 and os.environ["RANK"] == "1" and not os.path.exists(dead):
        open(dead, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(step, *arguments)
train.learning_rate = learning_rate
launch.run_program(train.main)
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_survive_a_kill_and_torchrun_restarts_them(tmp_path, nodes):
    words = flags(QUICK | {"save_every": 1, "epochs": 2, "ema": 0.8, "drop_path": 0.1})
    fork_two(run_with, ["--out", tmp_path / "whole", *words])
    (tmp_path / "driver.py").write_text(DRIVER)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--max-restarts=2"]
    launcher += [f"--nproc_per_node={2 // nodes}", "--rdzv_backend=c10d"]
    launcher += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", tmp_path / "driver.py"]
    environment = {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [*launcher, "--out", tmp_path / "cut", *words, "--resume"]
    agents = [subprocess.Popen(command, **options) for _ in range(nodes)]  # one on each node
    told = [agent.communicate(timeout=180)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * nodes, told
    assert (tmp_path / "cut/dead").exists()
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_is_answered_within_a_step_and_another_number_of_processes_may_go_on(tmp_path):
    words = flags(QUICK | {"save_every": 1, "accumulate": 2, "out": tmp_path / "run"})
    assert forked(words, ("step", 5, signal.SIGTERM)) == 128 + signal.SIGTERM
    assert saved(tmp_path / "run")["progress"]["step"] == 4
    words = ["--out", tmp_path / "run", "--resume", "--accumulate", "1"]
    fork_two(run_with, words)
    assert len(runs.read_log(tmp_path / "run")) == 3
    words = flags(QUICK | {"distill": "label", "epochs": 1, "out": tmp_path / "ended"})
    assert forked(words, ("evaluation", 1, signal.SIGTERM)) == 128 + signal.SIGTERM


def multiply_loss(monkeypatch, call, factor):
    """Multiplies the loss of the `call`-th part of a batch."""
    plain, calls = LOSSES["none"], itertools.count()

    def multiplied(*arguments):
        return plain(*arguments) * (factor if next(calls) == call else 1)

    monkeypatch.setitem(LOSSES, "none", multiplied)


def test_fp16s_first_step_may_overflow_without_harm_to_sgds_momentum(tmp_path, monkeypatch):
    multiply_loss(monkeypatch, 0, 1e8)
    words = QUICK | {"precision": "fp16", "model": "regnet_y_200mf", "epochs": 6, "out": tmp_path / "run"}
    assert run_train(monkeypatch, *flags(words)) == 0
    optimizer = saved(tmp_path / "run")["optimizer"]
    assert saved(tmp_path / "run")["scaler"]["scale"] < 65536  # the first step was skipped
    momenta = [state["momentum_buffer"] for state in optimizer["state"].values()]
    assert momenta and all(momentum.abs().max() < 1e3 for momentum in momenta)


def test_files_of_one_name_are_told_by_their_addresses_and_a_hash_in_a_name_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "cache"))
    for n, name in enumerate(("1/last.pth", "2/last.pth", "net-01234567ab.pth", "net-20240131.pth")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"weight": torch.tensor(n)}, tmp_path / name)
    shutil.copy(tmp_path / "2/last.pth", tmp_path / "1/last.pth?version=2")
    urls = [f"file://{tmp_path}/{name}" for name in ("1/last.pth", "2/last.pth", "1/last.pth?version=2")]
    assert [read_checkpoint(url)["weight"].item() for url in (*urls, urls[0])] == [0, 1, 1, 0]
    for _ in range(2):  # a file with another hash is not kept
        with pytest.raises(UserError, match="could not download .*: invalid hash value"):
            read_checkpoint(f"file://{tmp_path}/net-01234567ab.pth")
    assert read_checkpoint(f"file://{tmp_path}/net-20240131.pth")["weight"] == 3  # a date is no hash
    cached = tmp_path / "cache/checkpoints/net-76543210fe.pth"  # as torch.hub left it; there is no network
    torch.save({"weight": torch.tensor(7)}, cached)
    assert read_checkpoint("https://nowhere.invalid/net-76543210fe.pth")["weight"] == 7
    with pytest.raises(UserError, match="could not download .*; without a network name a file"):
        read_checkpoint("file:///nowhere/net.pth")


@pytest.mark.parametrize(("rank", "local_rank", "turn"), [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)])
def test_one_process_of_each_machine_downloads_and_rank_0_before_all(monkeypatch, rank, local_rank, turn):
    waits = []
    monkeypatch.setattr(devices, "all_gather", waits.append)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert devices.main_process_first(lambda: len(waits)) == turn and len(waits) == 3


OTHERS = {  # what others write beside and around weights
    "DistributedDataParallel": lambda state: {"module." + key: value for key, value in state.items()},
    "torch.compile": lambda state: {"model": {"module._orig_mod." + key: state[key] for key in state}},
    "Lightning": lambda state: {"state_dict": state, "epoch": 3},
    "timm": lambda state: {"state_dict": {key: 0 * state[key] for key in state}, "state_dict_ema": state},
    "the authors": lambda state: {"model": state, "args": Namespace(lr=5e-4, output_dir=Path("x"))},
    "numpy": lambda state: {
        "model": state,
        "best": np.float64(81.3),
        "epoch": np.int64(3),
        "loss": np.float32(1),
    },
}


@pytest.mark.parametrize("origin", OTHERS)
def test_the_checkpoints_of_others_are_read_and_what_they_do_not_tell_is_said_once(tmp_path, capsys, origin):
    plain = create_model("tiny", num_classes=5, img_size=32, patch_size=8, depth=1).eval()
    file = str(tmp_path / "net.pth")
    torch.save(OTHERS[origin](plain.state_dict()), file)
    network, inputs = networks.load_network(file)[0], torch.randn(2, 3, 32, 32)
    assert torch.equal(network(inputs), plain(inputs))
    networks.load_network(file)
    text = f"{file} is read as a tiny of 5 classes, 32 pixels, normalized as the authors' networks are\n"
    assert capsys.readouterr().out == text
    assert torch.equal(create_teacher("tiny", 5, file)(inputs), plain(inputs))


MODULES = {rb"numpy\._?core": (b"numpy.core", b"numpy._core")}
MODULES |= {rb"pathlib(\._local)?": (b"pathlib", b"pathlib._local")}


@pytest.mark.parametrize("module", MODULES)
def test_what_older_and_newer_versions_of_numpy_and_python_wrote_is_read(tmp_path, module):
    contents, file = {"model": {"head.weight": torch.ones(2)}, "best": np.float64(81.3)}, tmp_path / "net.pth"
    torch.save(contents | {"path": Path("x")}, file, _use_new_zipfile_serialization=False)
    pickled = file.read_bytes()
    for name in MODULES[module]:
        file.write_bytes(re.sub(module, name, pickled))
        assert read_checkpoint(file)["best"] == 81.3


def test_safetensors_and_hugging_faces_names_are_told_by_name(tmp_path):
    (tmp_path / "net.safetensors").touch()
    with pytest.raises(UserError, match="net.safetensors is of safetensors; install it, or see docs/els"):
        read_checkpoint(tmp_path / "net.safetensors")
    for name in ("vit.embeddings.cls_token", "deit.embeddings.cls_token", "embeddings.cls_token"):
        torch.save({name: torch.zeros(1, 1, 192)}, tmp_path / "net.bin")
        with pytest.raises(UserError, match="net.bin has Hugging Face's names of the weights; docs/els"):
            read_checkpoint(tmp_path / "net.bin")


def test_a_teachers_weights_may_be_a_published_name(tmp_path, monkeypatch):
    states = {"resnet18": torchvision.models.resnet18(), "deit_tiny": create_model("tiny")}
    for name, network in states.items():
        torch.save(network.state_dict(), tmp_path / name[:8])
    monkeypatch.setattr("checkpoint.download", lambda url: tmp_path / Path(url).name[:8])
    for source, name in (("resnet18", "resnet18"), ("deit_tiny", "tiny")):
        networks.check_networks(Settings(distill="hard", teacher=name, teacher_weights=source))
        state = create_teacher(name, 1000, source).state_dict()
        assert equal(state, states[source].state_dict())
        part = SimpleNamespace(classes=["n01440764", *(f"n1{n:07}" for n in range(998)), "n15075141"])
        s = Settings(data="imagenet", teacher=name, teacher_weights="published")
        assert equal(train.load_teacher(s, part, part, CPU).network.state_dict(), state)
    with pytest.raises(UserError, match="resnet18 holds a resnet18, not a resnet34"):
        create_teacher("resnet34", 1000, "resnet18")


def test_only_a_cuda_device_is_copied_to_without_waiting():
    # an Apple GPU may read memory that was released meanwhile
    values = SimpleNamespace(to=lambda device, non_blocking=False: (device.type, non_blocking))
    values.pin_memory = lambda: values
    copies = [augment.to_device(values, torch.device(name)) for name in ("cpu", "mps", "cuda")]
    assert copies == [("cpu", False), ("mps", False), ("cuda", True)]


def no_access(*arguments, **options):
    raise PermissionError


def test_an_epoch_is_saved_once_and_the_best_has_no_optimizer(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="could not write .*/file/x: File exists; what was saved before is"):
        checkpoint.atomic_save(tmp_path / "file/x", lambda file: None)
    synced, files = [], len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_ino, os.fstat(file).st_size)))
        checkpoint.atomic_save(tmp_path / "whole", lambda file: file.write(b"weights"))
        disk.setattr("torch.load", no_access)
        with pytest.raises(UserError, match="there is no file .*/whole that may be read"):
            read_checkpoint(tmp_path / "whole")
    whole, folder = (tmp_path / "whole").stat(), tmp_path.stat()
    assert [inode for inode, _ in synced] == [whole.st_ino, folder.st_ino]  # its name too
    assert synced[0][1] == 7 and len(os.listdir("/proc/self/fd")) == files
    written, plain = Counter(), checkpoint.atomic_save

    def counted(path, *arguments, **options):
        written[path.name] += 1
        plain(path, *arguments, **options)

    monkeypatch.setattr("runs.atomic_save", counted)
    monkeypatch.setattr("train.evaluate", lambda *_: {"class": 0.0})
    assert run_train(monkeypatch, *flags(QUICK | {"out": tmp_path / "run"})) == 0
    assert written == {"settings.json": 1, "last.pth": 3, "best.pth": 1, "log.jsonl": 3}
    assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1, "ema": 0.5, "out": tmp_path / "one"})) == 0
    best, last = (saved(tmp_path / "one", file) for file in ("best.pth", "last.pth"))
    assert last.keys() - best.keys() == {"optimizer", "scaler"} and best["settings"] == last["settings"]
    assert equal(best["model"], last["model"]) and equal(best["model_ema"], last["model_ema"])


# ---- What is refused ----


def test_impossible_models_and_images_of_another_size_are_refused():
    mistakes = [("name", "huge", "unknown model 'huge'"), ("img_size", 0, "img_size"), ("depth", 0, "depth")]
    mistakes += [("img_size", 225, "225 is not a multiple of patch size 16; try image size 224")]
    mistakes += [("patch_size", -4, "patch_size"), ("num_classes", 0, "num_classes")]
    mistakes += [("drop_path", 1.0, "drop_path"), ("dropout", -0.1, "dropout")]
    for argument, value, message in mistakes:
        with pytest.raises(ValueError, match=message):
            create_model(**{"name": "tiny", argument: value})
    with pytest.raises(ValueError, match=r"takes images \(B, 3, 32, 32\), not \(2, 3, 48, 48\)"):
        create_model("tiny", img_size=32, patch_size=8)(torch.randn(2, 3, 48, 48))


def test_weights_that_do_not_fit_are_refused_by_key_and_shapes():
    model = create_model("tiny", distilled=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    misfits = [(official_state(384), r"cls_token is \(1, 1, 384\) .* \(1, 1, 192\)")]
    misfits += [(official_state(tokens=197, distilled=False), "dist_token is absent")]
    misfits += [(official_state() | {"fc_norm.bias": torch.ones(5)}, r"fc_norm.bias is \(5,\) .* absent")]
    misfits += [(official_state(tokens=199), "pos_embed")]  # 197 patches are no square
    for state, message in misfits:
        with pytest.raises(ValueError, match=message):
            load_weights(model, state)
    assert equal(model.state_dict(), before)


def test_a_damaged_checkpoint_is_recognized_at_any_length_and_any_bit(tmp_path):
    file, weight, rng = tmp_path / "t.pth", torch.arange(40.0), np.random.default_rng(0)
    torch.save({"model": {"weight": weight}}, file)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"^[^\n]* is not a checkpoint [^\n]*$"):
            read_checkpoint(file)
    for place in rng.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        with contextlib.suppress(UserError):  # it is told, or a bit without meaning
            assert torch.equal(read_checkpoint(file)["model"]["weight"], weight)


class Mischief:
    """Unpickling this would make a file."""

    def __reduce__(self):
        return open, ("made", "w")


MISTAKES = {
    "--ema 0.9999": "averages over 10000 steps, and the run has only 80; try --ema 0.875",
    "--epoch 3": "unrecognized arguments: --epoch 3; did you mean --epochs?",
    "--learning-rate 1": "unrecognized arguments: --learning-rate 1; see train.py --help",
    "tiny": "unrecognized arguments: tiny",
    "--model": "argument --model: expected one argument",
    "--data": "argument --data: expected one argument",
    "--epochs auto": "argument --epochs: invalid whole number value: 'auto'",
    "--lr auto": "argument --lr: invalid number value: 'auto'",
    "--no-distill-token": "--no-distill-token plays no part in this run; leave it out",
    "--teacher vgg8": "--teacher plays no part in this run",
    "--teacher-weights x": "--teacher-weights plays no part in this run",
    "--teacher-epochs 1": "--teacher-epochs plays no part in this run",
    "--lam 0.5": "--lam plays no part in this run",
    "--distill hard --teacher-weights number.pth": "number.pth is not a checkpoint that can be read safely",
    "--lr -1": "argument --lr: -1 is not allowed: it must be from 0 to inf",
    "--lr nan": "nan is not allowed: it must be from 0 to inf",
    "--lr fast": "invalid number value: 'fast'",
    "--epochs 0": "argument --epochs: 0 is not allowed: it must be from 1 to inf",
    "--epochs 1.5": "invalid whole number value: '1.5'",
    "--batch-size 0": "argument --batch-size: 0 is not allowed",
    "--smoothing 1": "1 is not allowed: it must be from 0 to 0.999999",
    "--drop-path 1": "argument --drop-path: 1 is not allowed",
    "--dropout -0.1": "argument --dropout: -0.1 is not allowed",
    "--erasing 2": "2 is not allowed: it must be from 0 to 1",
    "--tau 0": "argument --tau: 0 is not allowed",
    "--tau 2": "--tau plays no part in this run; leave it out",
    "--train head": "unrecognized arguments: --train head; it is a flag of finetune.py",
    "--local-rank=0": "; start several processes with torchrun",
    "--lam 1.5": "argument --lam: 1.5 is not allowed",
    "--repeats 0": "argument --repeats: 0 is not allowed",
    "--seed -1": "argument --seed: -1 is not allowed",
    "--workers -2": "argument --workers: -2 is not allowed",
    "--save-every -1": "argument --save-every: -1 is not allowed",
    "--data cifar": "invalid choice: 'cifar' (choose from ",
    "--data empty": "for pictures in a folder: --data folder --data-path empty; see",
    "--data cifar-10": "; did you mean cifar10?",
    "--distill strong": "invalid choice: 'strong' (choose from ",
    "--augment randaug": "; did you mean randaugment?",
    "--optimizer adam": "; did you mean adamw?",
    "--precision fp8": "invalid choice: 'fp8'",
    "--device tpu": "invalid choice: 'tpu'",
    "--device mps": "--device mps: torch sees no such GPU here; use --device cpu",
    "--model huge": "unknown network 'huge'",
    "--model regnet_y_16g": "; did you mean regnet_y_16gf?",
    "--distill hard --teacher resnet": "unknown network 'resnet'",
    "--distill hard --teacher resnet18 --teacher-weights published": "published knows ImageNet's classes",
    "--img-size 30 --patch-size 8": "30 is not a multiple of patch size 8; try image size 32",
    "--patch-size 64": "24 is not a multiple of patch size 64; try image size 64",
    "--img-size 1000000": "1000000 is not allowed: it must be from 1 to 4096",
    "--img-size 1024 --patch-size 2": "512×512 patches are more than 256×256; raise --patch-size",
    "--batch-size 30 --accumulate 4": "does not divide into processes × --accumulate = 4 parts; try 32",
    "--batch-size 129": "is more than an epoch's 128 images",
    "--epochs 3 --warmup-epochs 3": "--warmup-epochs must be less than --epochs, 3",
    "--data folder --data-path nowhere": "nowhere/train; --data-path must hold train/CLASS/*",
    "--data-path empty": "has no use for shapes; for pictures of your own add --data folder",
    "--data folder --data-path notes.txt": "notes.txt/train; --data-path must hold",
    "--data folder --data-path empty": "empty/train; --data-path must hold train/CLASS/*",
    "--distill label --no-distill-token": "needs a transformer and no --no-distill-token",
    "--distill label --model resnet18": "needs a transformer",
    "--distill soft --remember-labels": "--remember-labels is for --distill hard alone",
    "--depth 0": "argument --depth: 0 is not allowed: it must be from 1 to 100",
    "--limit -1": "argument --limit: -1 is not allowed",
    "--distill hard --teacher-weights none.pth": "there is no file none.pth; --teacher-weights takes",
    "--distill hard --teacher-weights notes.txt": "notes.txt is not a checkpoint that can be read safely",
    "--distill hard --teacher-weights list.pth": "list.pth is not a checkpoint that can be read safely",
    "--distill hard --teacher-weights evil.pth": "evil.pth is not a checkpoint that can be read safely",
    "--distill hard --teacher tiny --teacher-weights huge.pth": "pos_embed is (1, 17, 192) in the weights",
    "--distill hard --teacher tiny --teacher-weights sorted.pth": "class 0 is 'arrow' there and 'circle'",
    "--distill hard --teacher tiny --teacher-weights seven.pth": "does not fit a tiny for 10 classes",
    "--distill hard --teacher small --teacher-weights seven.pth": "seven.pth holds a tiny, not a small",
    "--distill hard --teacher-weights http://127.0.0.1:9/teacher.pth": "could not download http://127.0.0.1:9",
    "--distill hard --teacher regnet_y_4gf --teacher-weights published": "torchvision has no weights",
    "--distill hard --teacher efficientnet_v2_l --teacher-weights published": "were normalized differently",
    "--model maxvit_t": "maxvit_t cannot learn from batches of 128 images of 24 pixels",
    "--model regnet_y_200mf --img-size 4 --batch-size 1": "cannot learn from batches of 1 images of 4 pixels",
    "--out /proc/nowhere": "could not write into /proc/nowhere: No such file or directory",
    "--out " + 300 * "x": "File name too long",
    "--out notes.txt/run": "could not write into notes.txt/run: Not a directory",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path, monkeypatch, output, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], "list.pth")
    torch.save({"epoch": 3}, "number.pth")
    torch.save({"model": Mischief()}, "evil.pth")
    ten = create_model("tiny", num_classes=10, img_size=32, patch_size=8, depth=1).state_dict()
    seven = {key: value[:7] if key.startswith("head") else value for key, value in ten.items()}
    torch.save({"model": seven}, "seven.pth")
    # the first needs position embeddings of 2^34 patches, which no memory holds
    known = {"model": "tiny", "img_size": 2**20, "patch_size": 8, "classes": list(SHAPES)}
    torch.save({"model": ten, "settings": known}, "huge.pth")
    known |= {"img_size": 32, "classes": sorted(SHAPES)}
    torch.save({"model": ten, "settings": known}, "sorted.pth")
    before = set(tmp_path.rglob("*"))
    assert MISTAKES[words] in output(run_train, "--limit", "128", *words.split(), code=2)
    assert set(tmp_path.rglob("*")) == before  # no folder is left behind


@pytest.mark.parametrize("name", ["train.py", "finetune.py", "evaluate.py"])
def test_each_program_is_a_script(monkeypatch, capsys, name):
    monkeypatch.setattr("sys.argv", [name, "--nothing"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(name, run_name="__main__")
    assert capsys.readouterr().err.startswith("error: ")


TUNING_MISTAKES = {
    "--checkpoint none.pth": "there is no file none.pth",
    "--checkpoint deit_tinny": "there is no file deit_tinny that may be read; did you mean deit_tiny?",
    "--checkpoint plain.pth": "plain.pth does not say what it is",
    "--model small": "run/last.pth has --model tiny, not small; fine-tuning keeps it",
    "--patch-size 4": "run/last.pth has --patch-size 8, not 4; fine-tuning keeps it",
    "--depth 4": "run/last.pth has --depth 2, not 4; fine-tuning keeps it",
    "--img-size 22": "22 is not a multiple of patch size 8; try image size 24",
    "--distill hard --teacher-weights none.pth": "there is no file none.pth",
    "--data folder": "there is no folder data",
    "--out runs/run --resume": "is a run of train.py; continue it with train.py --resume",
    "--out none --resume --workers 1": "there is no run in none to continue",
    "--checkpoint runs/run --out runs/run --overwrite": "runs/run is in --out, where --overwrite would",
    "--out runs/run --overwrite": "runs/run/last.pth is in --out, where --overwrite would remove it",
    "--checkpoint convnet.pth --distill hard --teacher-weights runs/run --out runs --overwrite": "in --out",
    "--train norm": "invalid choice: 'norm'",
    "--recipe long": "invalid choice: 'long'",
    "--checkpoint convnet.pth --train head": "--train head is about transformers",
}


def test_mistakes_of_fine_tuning_end_with_one_line_and_exit_code_2(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    assert "name the network to start from with --checkpoint" in output(run_finetune, code=2)
    output(run_train, *flags(QUICK | {"epochs": 1, "out": "runs/run"}))
    torch.save({"fc.weight": torch.zeros(1)}, "plain.pth")
    known = {"model": "resnet18", "classes": list("abcdefghij"), "data": "shapes", "data_path": "data"}
    known |= {"img_size": 32, "patch_size": 8}
    state = networks.create_convnet("resnet18", 10, 32).state_dict()
    torch.save({"model": state, "settings": known}, "convnet.pth")
    for words, message in TUNING_MISTAKES.items():
        start = (
            [] if "--checkpoint" in words or "--resume" in words else ["--checkpoint", "runs/run/last.pth"]
        )
        assert message in output(run_finetune, *words.split(), *start, "--device", "cpu", code=2)


def test_a_run_is_not_resumed_on_other_data(tmp_path, output):
    bee = write_folder(tmp_path / "data", [(16, 16)]) / "train/bee"
    words = QUICK | {"data": "folder", "data_path": tmp_path / "data", "epochs": 1, "batch_size": 4}
    output(run_train, *flags(words | {"out": tmp_path / "run"}))
    shutil.rmtree(tmp_path / "data/val/bee")
    cow = bee.with_name("cow")
    # another class; then fewer pictures
    for change in (lambda: bee.rename(cow), lambda: (cow.rename(bee) / "0.png").unlink()):
        change()
        refused = output(run_train, "--out", tmp_path / "run", "--resume", code=2)
        assert "have changed; start it anew with --overwrite" in refused


def differing(flag, value):
    """Process 1 has another folder, as on a disk of its own."""
    if launch.rank() == 1:
        sys.argv[sys.argv.index(flag) + 1] = str(value)
    launch.run_program(train.main)


def test_processes_that_see_different_data_or_checkpoints_are_refused(tmp_path):
    for rank in "01":
        write_folder(tmp_path / rank, [(16, 16)])
    (tmp_path / "1/train/bee/3.png").unlink()
    words = QUICK | {"data": "folder", "data_path": tmp_path / "0", "batch_size": 4, "out": tmp_path / "run"}
    assert forked(flags(words), ("step", 3, signal.SIGTERM)) == 128 + signal.SIGTERM
    refused = {("--data-path", "1"): r"data set: 11 \+ 12 images .* not 12 \+ 12"}
    refused |= {("--out", "other"): "step to go on from: 0, not 3"}
    for (flag, other), message in refused.items():
        with pytest.raises(AssertionError, match=r"\[2, 2\] == \[0, 0\]"):
            main = partial(differing, flag, tmp_path / other)
            fork_two(main, flags(words | {"resume": True}), tmp_path / "told")
        assert re.search(f"error: process 1 has another {message}", (tmp_path / "told").read_text())


def test_a_loss_or_a_weight_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, monkeypatch, output):
    multiply_loss(monkeypatch, 4, math.nan)
    told = output(run_train, *flags(QUICK | {"out": tmp_path / "run", "save_every": 2}), code=2)
    assert "became infinite or NaN by step 6; --resume goes on from before it; try a lower --lr" in told
    contents = saved(tmp_path / "run")
    assert contents["progress"]["step"] == 4
    assert all(value.isfinite().all() for value in contents["model"].values())

    def explode(optimizer, *_):
        optimizer.param_groups[0]["params"][0].data[0] = math.inf

    hook = register_optimizer_step_post_hook(explode)
    told = output(run_train, *flags(QUICK | {"out": tmp_path / "new", "save_every": 1}), code=2)
    hook.remove()
    assert "by step 1; nothing was saved" in told and not (tmp_path / "new/last.pth").exists()
    multiply_loss(monkeypatch, 1, math.nan)
    monkeypatch.setattr("launch.Progress.due", lambda self, step: step == 2)  # nor is it shown
    assert "by step 2; nothing" in output(run_train, *flags(QUICK | {"out": tmp_path / "due"}), code=2)


def hold_lock(out):
    """A program that trains in this directory, until it is killed."""
    runs.lock_run(out)
    Path(out, "held").touch()
    time.sleep(60)


def test_a_directory_belongs_to_one_running_program(tmp_path, output):
    out = tmp_path / "run"
    other = fork(partial(hold_lock, out), [])
    while not (out / "held").exists():
        assert other.is_alive() and not time.sleep(0.05)
    words = flags(QUICK | {"epochs": 1, "out": out})
    for more in ([], ["--resume"], ["--overwrite"], ["--distill", "hard"]):
        assert f"another program trains in {out} now" in output(run_train, *words, *more, code=2)
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "held", ".lock"}  # no teacher is trained
    other.kill()  # the system releases the lock
    other.join()
    output(run_train, *words)
    other = fork(partial(hold_lock, tmp_path / "tuned"), [])
    while not (tmp_path / "tuned/held").exists():
        assert other.is_alive() and not time.sleep(0.05)
    told = output(run_finetune, *flags({"checkpoint": out, "out": tmp_path / "tuned", "epochs": 1}), code=2)
    assert f"another program trains in {tmp_path}/tuned now" in told
    other.kill()


def test_a_teacher_in_training_belongs_to_one_running_program_too(tmp_path, output):
    words = QUICK | {"epochs": 1, "teacher_epochs": 1, "distill": "hard"}
    assert forked(flags(words | {"out": tmp_path / "first"})) == 0
    (teacher,) = tmp_path.glob("teacher-*")
    other = fork(partial(hold_lock, teacher), [])
    while not (teacher / "held").exists():
        assert other.is_alive() and not time.sleep(0.05)
    output(run_train, *flags(words | {"out": tmp_path / "second"}))  # one that has ended is only read
    (teacher / "log.jsonl").unlink()
    told = output(run_train, *flags(words | {"out": tmp_path / "third"}), code=2)
    assert f"another program trains in {teacher} now; wait" in told
    other.kill()


def test_an_interrupted_teacher_goes_on_with_other_processes_and_parts(tmp_path, output):
    words = QUICK | {"distill": "hard", "teacher_epochs": 2, "batch_size": 18, "out": tmp_path / "run"}
    assert forked(flags(words), ("evaluation", 1, signal.SIGKILL)) == -signal.SIGKILL
    told = output(run_train, *flags(words | {"accumulate": 2, "resume": True}))
    assert "goes on" in told and len(list(tmp_path.glob("teacher-*"))) == 1


def test_after_a_nan_a_run_goes_on_with_what_the_error_advises(tmp_path, monkeypatch, output):
    words = {"out": tmp_path / "run", "resume": True}
    with monkeypatch.context() as broken:
        multiply_loss(broken, 4, math.nan)
        output(run_train, *flags(QUICK | {"out": tmp_path / "run", "save_every": 2}), code=2)
    told = output(run_train, *flags(words | {"lr": 1e-4, "clip_grad": 1.0, "precision": "fp16"}))
    assert "lr=0.0001" in told and "clip-grad=1.0" in told and "precision=fp16" in told
    assert saved(tmp_path / "run")["settings"]["lr"] == 1e-4
    (tmp_path / "run/settings.json").unlink()  # the checkpoint has the settings too
    refused = output(run_train, *flags(words | {"seed": 7}), code=2)
    assert f"the run in {tmp_path / 'run'} has --seed 0, not 7" in refused


def test_a_run_finds_its_teacher_at_another_place_and_takes_no_other(tmp_path, output):
    for n in (1, 2):
        output(
            run_train, *flags(QUICK | {"model": "vgg8", "epochs": 1, "seed": n, "out": tmp_path / f"t{n}"})
        )
    words = QUICK | {"distill": "hard", "teacher": "vgg8", "out": tmp_path / "run"}
    weights = {"teacher_weights": tmp_path / "t1/last.pth"}
    assert forked(flags(words | weights), ("step", 5, signal.SIGTERM)) == 128 + signal.SIGTERM
    (tmp_path / "t1").rename(tmp_path / "moved")
    for place, code in (("t1", 2), ("t2", 2), ("moved", 0)):
        weights = {"teacher_weights": tmp_path / place / "last.pth"}
        told = output(run_train, *flags(weights | {"out": tmp_path / "run", "resume": True}), code=code)
        assert ("has another teacher" in told) == (place == "t2")
    refused = output(run_train, *flags(words | weights | {"overwrite": True, "out": tmp_path}), code=2)
    assert "moved/last.pth is in --out, where --overwrite would remove it" in refused
    own = flags(words | {"out": tmp_path / "own", "teacher_epochs": 1})
    output(run_train, *own)
    next(tmp_path.glob("teacher-*")).rename(tmp_path / "away")
    assert "holds no teacher; name that of the run" in output(run_train, *own, "--resume", code=2)
    assert "\nteacher: " in output(run_train, *own, "--overwrite")


def test_a_resumed_run_says_that_validation_images_are_others(tmp_path, output):
    path = write_folder(tmp_path / "data", STREAMED)
    words = flags(QUICK | {"data": "folder", "data_path": path, "epochs": 1, "workers": 0, "batch_size": 4})
    output(run_train, *words, "--out", tmp_path / "run")
    again = ("--out", tmp_path / "run", "--resume")
    assert "files of the data" not in output(run_train, *again)
    os.utime(path / "val/ant/1.png", (1, 1))
    assert "files of the data are others, or newer" in output(run_train, *again)


def test_the_directory_above_all_may_be_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1, "out": ".", "overwrite": True})) == 0


def test_nohup_keeps_its_word_and_a_stop_is_saved_before_a_line_is_printed(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = launch.StopSignals()
    kept, caught = (signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM))
    signals.restore()
    signal.signal(signal.SIGHUP, before)
    assert kept == signal.SIG_IGN and caught == signals.note
    monkeypatch.setattr(launch.Progress, "due", lambda *_: True)
    monkeypatch.setattr(launch.Progress, "show", no_teacher)  # as where Ctrl-C has ended `tee` too
    monkeypatch.setattr(launch.StopSignals, "asked", lambda self: signal.SIGINT)
    assert run_train(monkeypatch, *flags(QUICK | {"out": tmp_path / "run"})) == 128 + signal.SIGINT
    assert saved(tmp_path / "run")["progress"]["step"] == 1


SWAP = [("ant", "swap"), ("bee", "ant"), ("swap", "bee")]  # of two classes: all names stay the same


def test_a_fingerprint_changes_with_any_picture(tmp_path, monkeypatch):
    monkeypatch.setattr("data.HELD_BYTES", 0)  # streamed
    path = write_folder(tmp_path / "a", [(16, 16)]) / "train"
    fingerprints = [load("folder", tmp_path / "a", 16)[0].fingerprint]

    def changed():
        fingerprints.append(load("folder", tmp_path / "a", 16)[0].fingerprint)
        return len(set(fingerprints)) == len(fingerprints)

    for name in ("1.png", "2.png"):
        os.utime(path / "ant" / name, (1, 1))  # replaced by one of the same size
        assert changed()
    (path / "ant/1.png").rename(path / "ant/9.png")  # moved
    assert changed()
    Image.new("RGB", (9, 9)).save(path / "ant/2.png")  # resized
    os.utime(path / "ant/2.png", (1, 1))
    assert changed()
    for one, two in SWAP:
        (path / one).rename(path / two)
    assert changed()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy2)
    assert load("folder", tmp_path / "b", 16)[0].fingerprint == fingerprints[-1]  # wherever it lies
    names = set()
    for labels, classes in (([0, 1], ["x", "y"]), ([1, 0], ["x", "y"]), ([0, 1], ["y", "x"])):
        held = ArraySet(noise(2, 3, 4, 4), torch.tensor(labels), classes)
        names |= {held.names, FolderSet(["a/1.png", "a/2.png"], labels, classes, False).names}
    names |= {ArraySet(noise(2, 3, 4, 4, seed=1), held.labels, held.classes).names}
    names |= {FolderSet(["a/1.png", "b/2.png"], labels, classes, False).names}
    assert len(names) == 2 * 4  # labels and classes count too
    part = load("folder", tmp_path / "b", 16)[0]
    Path(part.paths[0]).unlink()
    assert part.fingerprint not in fingerprints


def test_a_teacher_and_its_labels_are_of_the_very_data(tmp_path, output):
    path = write_folder(tmp_path / "data", STREAMED) / "train"
    words = {"data": "folder", "data_path": tmp_path / "data", "img_size": 16, "patch_size": 8, "depth": 1}
    words |= {"distill": "hard", "teacher_epochs": 1, "remember_labels": True, "batch_size": 4, "epochs": 1}
    words |= {"workers": 0, "save_every": 1}
    output(run_train, *flags(words | {"out": tmp_path / "one"}))
    assert "100 % are known" in output(run_train, *flags(words | {"out": tmp_path / "two"}))
    assert forked(flags(words | {"out": tmp_path / "cut"}), ("step", 2, signal.SIGTERM)) == 143
    for one, two in SWAP:
        (path / one).rename(path / two)
    told = output(run_train, *flags(words | {"out": tmp_path / "three"}))
    assert ", 0 % are known" in told and len(list(tmp_path.glob("teacher-*"))) == 2
    teacher = saved(tmp_path / "one")["settings"]["teacher_weights"]
    again = {"out": tmp_path / "cut", "resume": True, "teacher_weights": teacher}
    assert f"files of the data are others, or newer, than when the run in {tmp_path / 'cut'} began" in output(
        run_train, *flags(again)
    )


def test_links_bring_no_picture_twice_or_under_another_class(tmp_path):
    path = write_folder(tmp_path / "data", [(16, 16)]) / "train"
    (path / "ant/up").symlink_to(path / "ant")
    (path / "ant/dogs").symlink_to(path / "bee")
    (path / "all").symlink_to(path)
    (path / "bee/link.png").symlink_to(path / "bee/0.png")  # a link to a file is a file
    train_set = load("folder", tmp_path / "data", 16)[0]
    assert train_set.labels.tolist() == [0] * 6 + [1] * 7


def test_class_folders_without_train_and_validation_by_other_names_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("data.HELD_BYTES", 0)
    root = write_folder(tmp_path / "data", [(16, 16)], splits=("train", "valid", "test"))
    train_set, val_set = load("folder", root, 16)
    assert {Path(path).parts[-3] for path in val_set.paths} == {"valid"}
    (root / "valid").rename(root / "validation")
    assert {Path(path).parts[-3] for path in load("folder", root, 16)[1].paths} == {"validation"}
    shutil.rmtree(root / "validation")
    assert {Path(path).parts[-3] for path in load("folder", root, 16)[1].paths} == {"train"}
    train_set, val_set = load("folder", root / "train", 16)
    assert train_set.classes == ["ant", "bee"] and len(train_set) + len(val_set) == 12 > len(train_set)


def test_shared_memory_that_is_full_and_a_worker_that_is_killed_are_one_line_each(
    folder, monkeypatch, output
):
    monkeypatch.setattr("data.HELD_BYTES", 0)

    def full(tensor):
        raise RuntimeError("No space left on device")

    words = QUICK | {"data": "folder", "data_path": folder, "workers": 1, "batch_size": 4, "limit": 8}
    words |= {"out": folder / "run", "overwrite": True}
    with monkeypatch.context() as broken:
        broken.setattr(torch.Tensor, "share_memory_", full)
        told = output(run_train, *flags(words), code=2)
    assert "there is no shared memory for a batch: No space left on device; give it more" in told

    def kill(*arguments):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("data.crop_file", kill)
    assert "a worker was killed" in output(run_train, *flags(words), code=2)


def wait_for_ever():
    signals = launch.StopSignals()
    now = time.monotonic()
    signals.note(signal.SIGINT, None)
    signals.note(signal.SIGINT, None)  # one Ctrl-C may come twice: from the terminal, and from torchrun
    time.monotonic = lambda: now + 11
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def test_a_second_signal_ends_a_program_that_never_comes_to_the_next_step():
    process = fork(wait_for_ever, [])
    process.join(20)
    assert process.exitcode == 128 + signal.SIGTERM


def test_in_fp16_one_overflow_is_left_out_and_one_that_stays_ends_the_run(tmp_path, monkeypatch, output):
    words = QUICK | {"precision": "fp16", "out": tmp_path / "run"}
    with monkeypatch.context() as once:
        multiply_loss(once, 4, math.inf)
        output(run_train, *flags(words))
    assert saved(tmp_path / "run")["progress"]["step"] == 9
    monkeypatch.setitem(LOSSES, "none", lambda outputs, *_: outputs.sum() * math.inf)
    refused = output(run_train, *flags(words | {"epochs": 12, "out": tmp_path / "new"}), code=2)
    assert "the loss became infinite or NaN by step" in refused


def test_weights_that_are_not_finite_are_refused(tmp_path, output):
    save_network(tmp_path / "net.pth", ["a", "b"])
    contents = read_checkpoint(tmp_path / "net.pth")
    contents["model"]["head.bias"][0] = math.nan
    torch.save(contents, tmp_path / "net.pth")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    told = output(run_evaluate, "predict", tmp_path / "net.pth", tmp_path / "a.png", code=2)
    assert f"{tmp_path / 'net.pth'} holds weights that are infinite or NaN" in told


def test_the_average_has_timms_key_and_that_of_older_runs_is_read(tmp_path, monkeypatch, output):
    output(run_train, *flags(QUICK | {"ema": 0.889, "out": tmp_path / "run"}))  # over all of the 9 steps
    contents = torch.load(tmp_path / "run/last.pth", weights_only=True)
    average = contents.pop("model_ema")
    torch.save(contents | {"ema": average}, tmp_path / "run/last.pth")
    network, _ = networks.load_network(str(tmp_path / "run"))
    assert equal(network.state_dict(), average)


def test_a_published_teacher_sees_the_images_at_its_own_size(monkeypatch):
    fresh = networks.create_convnet("efficientnet_b4", 1000, 64)
    monkeypatch.setattr("networks.read_checkpoint", lambda url: fresh.state_dict())
    assert create_teacher("efficientnet_b4", 1000, "published", img_size=224).img_size == 380


def test_new_heads_of_a_convnet_are_its_last_layer_alone():
    old, new = (networks.create_convnet("maxvit_t", classes, 224) for classes in (3, 5))
    old.classifier[3].bias.data.fill_(1.0)  # of a layer that stays, and starts as 0
    finetune.adapt(old.state_dict(), new, keep_heads=False)
    before, after = old.state_dict(), new.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"classifier.5.weight"}


def test_few_images_make_ten_steps_an_epoch_unless_a_batch_size_is_given(tmp_path, monkeypatch, output):
    sizes = [
        settings.fit_batch_size(64, *case)
        for case in ((5000, 1), (200, 1), (200, 3), (40, 1), (5, 1), (3, 2))
    ]
    assert sizes == [64, 20, 18, 8, 5, 2]
    assert complete({"accumulate": 3}).batch_size == 126  # the recipe's 128 in whole parts
    monkeypatch.chdir(write_folder(tmp_path / "pets", STREAMED))
    words = {"data": "folder", "data_path": ".", "img_size": 32, "patch_size": 16, "depth": 1, "epochs": 1}
    words |= {"workers": 0, "accumulate": 3, "out": tmp_path / "run"}
    output(run_train, *flags(words))
    own = {"checkpoint": tmp_path / "run", "img_size": 32, "epochs": 1, "workers": 0, "accumulate": 3}
    output(run_finetune, *flags(own | {"out": tmp_path / "tuned"}))
    assert saved(tmp_path / "tuned")["settings"]["batch_size"] == 6
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # from where --data-path is found too
    output(run_train, *flags({"out": tmp_path / "run", "resume": True}))
    contents = saved(tmp_path / "run")
    assert (contents["settings"]["batch_size"], contents["progress"]["step"]) == (6, 2)


def test_a_program_runs_with_its_output_closed_and_training_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    words = flags(QUICK | {"epochs": 1, "out": tmp_path / "run"})
    ended = []
    thread = threading.Thread(target=lambda: ended.append(run_train(monkeypatch, *words)))
    thread.start()
    thread.join()
    assert ended == [0] and saved(tmp_path / "run")["progress"]["step"] == 3


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path, output):
    words, last = flags(QUICK | {"epochs": 2, "out": tmp_path / "run"}), tmp_path / "run/last.pth"
    assert forked(words, ("step", 5, signal.SIGTERM)) == 128 + signal.SIGTERM
    before, limits = last.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # files end there, as on a full disk
    try:
        error = output(run_train, *words, "--resume", code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = "(the disk may be full|File too large)"  # torch's writer does not say
    assert re.fullmatch(
        rf"error: could not write .*/run/.*: {reason}; what was saved before is intact\n", error
    )
    assert last.read_bytes() == before and not list(tmp_path.rglob("*.partial"))


# ---- Tools ----


def test_attention_is_drawn_by_token_and_head_and_augmentations_by_operation(tmp_path, monkeypatch, output):
    save_network(tmp_path / "net.pth", ["a", "b"])
    Image.new("RGB", (300, 200), (10, 200, 30)).save(tmp_path / "photo.png")
    words = ["attention", tmp_path / "net.pth", tmp_path / "photo.png", "--out", tmp_path / "out.png"]
    output(run_evaluate, *words)
    page = Image.open(tmp_path / "out.png")
    assert page.height == 2 * (128 + 8 + 2 * 17) and page.width > 5 * 134
    assert "--layer 13: the network has 2 layers" in output(run_evaluate, *words, "--layer", "13", code=2)
    (tmp_path / "photos").mkdir()
    for n in range(2):  # a folder is all of its images
        Image.new("RGB", (30, 20), (90 * n, 200, 30)).save(tmp_path / f"photos/{n}.png")
    output(run_evaluate, *words[:2], tmp_path / "photos", *words[3:])
    assert Image.open(tmp_path / "out.png").size == (page.width, 2 * page.height)
    for n, name in enumerate(("ant", "bee")):  # ten red ants, then ten green bees, which come in turn
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (30, 20), [(200, 0, 0), (0, 200, 0)][n]).save(tmp_path / f"pets/{name}/{i}.png")
    rows = []
    with monkeypatch.context() as caught:
        caught.setattr("pictures.draw_sheet", lambda drawn, *_: rows.extend(drawn))
        output(run_evaluate, "augmentations", tmp_path / "pets", "--out", tmp_path / "sheet.png")
    assert [caption.split()[0] for caption in rows[-1][2]] == 3 * ["ant", "bee"]
    for rows, more in ((6, []), (15, ["--all"])):
        output(run_evaluate, "augmentations", "--out", tmp_path / "sheet.png", *more)
        pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
        step = len(pixels) // (rows + 2)
        left = pixels.shape[1] - 6 * (100 + 6)
        assert len({pixels[step * row :][:100, left:].tobytes() for row in range(rows)}) == rows


def test_predictions_are_each_heads_softmax_and_their_mean(tmp_path, monkeypatch, capsys, output):
    model = save_network(tmp_path / "net.pth", ["a", "b", "c"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    (tmp_path / "deep/a").mkdir(parents=True)
    files = [str(tmp_path / name) for name in ("deep/a/2.png", "deep/b.JPG", "3.png")]
    for file in files:
        picture.save(file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{tmp_path}/3.png\n\n".encode())))
    words = ["predict", tmp_path / "net.pth", "--precision", "fp32"]
    touch(tmp_path / "deep", "notes.txt", "a/sheet.csv")
    assert run_evaluate(monkeypatch, *words, tmp_path / "deep", "-", "--json") == 0
    told, beside = capsys.readouterr()
    assert beside == f"left out of {tmp_path}/deep: 2 files that are no images by their ending\n"
    records = [json.loads(line) for line in told.splitlines()]
    assert [record["image"] for record in records] == files
    with torch.no_grad():
        first, second = (logits[0].softmax(0) for logits in model(inputs_of(tmp_path / "3.png")))
    for head, expected in (("class", first), ("distillation", second), ("fused", (first + second) / 2)):
        told = [(each["name"], each["probability"]) for each in records[2][head]]
        assert [name for name, _ in told] == ["abc"[i] for i in expected.argsort(descending=True)]
        assert [p for _, p in told] == pytest.approx(expected.sort(descending=True)[0].tolist(), rel=1e-4)
    lines = output(run_evaluate, *words, tmp_path / "3.png", "--top", "1").splitlines()
    assert lines[0] == files[2] and f"{'abc'[first.argmax()]} {100 * first.max():.1f} %" in lines[1]
    (tmp_path / "empty").mkdir()
    assert "no images below" in output(run_evaluate, *words, tmp_path / "empty", code=2)


@pytest.mark.parametrize("distilled", [True, False])
def test_many_images_are_predicted_in_batches_as_one_by_one_and_in_order(
    tmp_path, monkeypatch, capsys, distilled
):
    plain = create_model("tiny", num_classes=3, img_size=16, patch_size=8, depth=1, distilled=distilled)
    torch.save(plain.state_dict(), tmp_path / "net.pth")  # without settings: its names are numbers
    rng, files = np.random.default_rng(0), [str(tmp_path / f"{n:03}.png") for n in range(150)]
    for n, file in enumerate(files):
        size = (16 + n % 3, 16 + n % 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    broken = [files[0], files[70], *files[128:]]  # the last batch has none that can be read
    for file in broken:
        Path(file).write_bytes(b"no picture")
    words = ["predict", tmp_path / "net.pth", tmp_path, "--json", "--precision", "fp32", "--device", "cpu"]
    assert run_evaluate(monkeypatch, *words) == 2
    told, errors = capsys.readouterr()
    read_as, _, *errors = errors.splitlines()  # the second names net.pth as left out
    assert " is read as a tiny of 3 classes" in read_as
    assert [line.split(" is ")[0] for line in errors] == [f"error: {file}" for file in broken]
    records = [json.loads(line) for line in told.splitlines()]
    assert [record["image"] for record in records] == [file for file in files if file not in broken]
    for record in records[::9]:
        expected = fuse(plain.eval()(inputs_of(record["image"])))[0].tolist()
        shares = {each["name"]: each["probability"] for each in record["fused"]}
        assert [shares[f"class {n}"] for n in range(3)] == pytest.approx(expected, abs=1e-6)


def test_odd_images_are_predicted_or_told_in_one_line_each(tmp_path, monkeypatch, capsys, output):
    save_network(tmp_path / "net.pth", ["a", "b"], distilled=False)
    (tmp_path / "text.jpg").write_text("no picture")
    files = [tmp_path / name for name in ("text.jpg", "missing.png", "new\nline é\x1b.png")]
    Image.new("L", (20_000, 2)).save(files[2])
    assert run_evaluate(monkeypatch, "predict", tmp_path / "net.pth", "https://x.org/a.jpg") == 2
    assert capsys.readouterr().err.startswith("error: https://x.org/a.jpg is an address; download the")
    assert run_evaluate(monkeypatch, "predict", tmp_path / "net.pth", *files) == 2
    out, errors = capsys.readouterr()
    assert [line.split(" is ")[0] for line in errors.splitlines()] == [f"error: {file}" for file in files[:2]]
    assert r"new\nline é\x1b.png" in out and len(out.splitlines()) == 2
    record = json.loads(output(run_evaluate, "predict", tmp_path / "net.pth", files[2], "--json"))
    assert record["fused"] == record["class"]  # also one head is fused


def test_curves_are_drawn_from_the_logs_of_runs(tmp_path, monkeypatch, output):
    from matplotlib.figure import Figure

    for name, epochs in (("first", 3), ("sec$nd", 5)):
        (tmp_path / name).mkdir()
        accuracy = {"class": 10.0, "distillation": 12.0, "fused": 13.0}
        log = [{"epoch": n, "loss": 2.0, "accuracy": accuracy} for n in range(1, epochs + 1)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    output(run_evaluate, "curves", tmp_path / "first", tmp_path / "sec$nd", "--out", tmp_path / "curves.png")
    (axes,) = figures[0].axes
    assert [line.get_ydata().tolist() for line in axes.lines[3:]] == [[10] * 5, [12] * 5, [13] * 5]
    assert [line.get_ydata()[0] for line in axes.lines] == [10, 12, 13] * 2
    assert "holds no run with an epoch" in output(run_evaluate, "curves", tmp_path / "nowhere", code=2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in output(run_evaluate, "curves", tmp_path / "sec$nd", code=2)


def test_every_command_has_an_example_in_its_help_and_on_a_page(output):
    text = "".join(page.read_text() for page in PAGES)
    for name in COMMANDS:
        assert f"evaluate.py {name} " in output(run_evaluate, name, "--help").partition("examples:")[2]
        assert f"evaluate.py {name} " in text
    runs, firsts = (run_train, run_finetune, run_evaluate), ("--data {", "--checkpoint C", "COMMAND\n")
    for run, first, script in zip(runs, firsts, PROGRAMS, strict=True):
        told = output(run, "--help").partition("\n")[2]  # behind the usage
        examples, _, flags = told.partition("\n  " + first)
        assert f" {script} " in examples and flags and "\n  --" not in examples
        assert run is not run_train or "[8]" in flags  # the epochs of shapes
        if run is run_finetune:
            flags = " ".join(flags.split())
            assert [flags.count(f"[the checkpoint's{end}") for end in ("]", " on its own data]", ";")] == [
                9,
                5,
                4,
            ]
        assert run is run_evaluate or "distillation (section 4):\n" in told and "[]" not in told


# ---- README, docs/ and results/ ----

PAGES = [Path("README.md"), *sorted(Path("docs").glob("*.md")), *sorted(Path("results").glob("*.md"))]
PROGRAMS = ("train.py", "finetune.py", "evaluate.py")
COMMANDS = [function.__name__ for function in measure.COMMANDS]


def parser_of(script: str):
    return train.train_parser() if script == "train.py" else finetune.finetune_parser()


def flags_of(script: str) -> set[str]:
    """Every flag that a program reads."""
    if script == "evaluate.py":  # a parser for each command
        return {"--help", "--device", *re.findall(r'"(--[a-z][a-z-]+)"', Path(script).read_text())}
    return {flag for action in parser_of(script)._actions for flag in action.option_strings}


LAUNCHER = {flag for action in torchrun_parser()._actions for flag in action.option_strings}


def test_the_commands_on_the_pages_are_ones_that_the_programs_take():
    seen = set()
    for page in PAGES:
        text = re.sub(r"\$\w+", "1", page.read_text().replace("\\\n", " "))  # a shell variable
        pattern = re.compile(r"^```(\w*)\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
        for language, block, inline in pattern.findall(text):
            for line in (inline or block).splitlines() if not language else ():
                words = shlex.split(line.partition(" ||")[0], comments=True) if ".py" in line else []
                for n in [n for n, word in enumerate(words) if word in PROGRAMS and len(words) > 1]:
                    script, before, after = words[n], words[:n], words[n + 1 :]
                    seen.add(script)
                    assert {word for word in before if word.startswith("--")} <= LAUNCHER, before
                    assert {word for word in after if word.startswith("--")} <= flags_of(script), after
                    if script == "evaluate.py":
                        assert not after or after[0] in COMMANDS, after
                    elif "--help" not in after:
                        parser_of(script).parse_args(after)
    assert seen == set(PROGRAMS)


def test_every_flag_file_and_name_on_the_pages_exists():
    known = {
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--cpus-per-task",
        "--time",
        "--requeue",
        "--shm-size",
    }
    known |= LAUNCHER.union(*(flags_of(script) for script in PROGRAMS))
    sources = {path: path.read_text() for path in Path().glob("*.py")}
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text)) <= known, page
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
            assert (page.parent / path).exists(), (page, path)
        for path in re.findall(r"(?<![\w/])(\w+\.py)\b", text):
            assert Path(path).exists(), (page, path)
        # `name` in [file.py](file.py), [file.py](file.py), `name` and file.py: `name`
        named = re.findall(r"`([\w.]+)` in \[(\w+\.py)\]", text)
        named += [pair[::-1] for pair in re.findall(r"(\w+\.py)(?:\]\([^)]+\),|:) `([\w.]+)`", text)]
        for name, path in named:
            name = name.rpartition(".")[2]
            assert re.search(rf"^( *(def|class) )?{name}\b", sources[Path(path)], re.MULTILINE), name


def hugging_faces_keys(depth, distilled):
    """Written out, as transformers has them."""
    block = [f"{part}.{end}" for part in HUGGING_FACES_BLOCK for end in ("weight", "bias")]
    ends = [f"{head}_classifier" for head in ("cls", "distillation")] if distilled else ["classifier"]
    base = "deit" if distilled else "vit"
    keys = ["cls_token", "position_embeddings", *(["distillation_token"] if distilled else [])]
    keys += [f"patch_embeddings.projection.{end}" for end in ("weight", "bias")]
    keys = [f"embeddings.{key}" for key in keys]
    keys += [f"encoder.layer.{n}.{key}" for n in range(depth) for key in block]
    keys = [f"{base}.{key}" for key in (*keys, "layernorm.weight", "layernorm.bias")]
    return {*keys, *(f"{head}.{end}" for head in ends for end in ("weight", "bias"))}


HUGGING_FACES_BLOCK = ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
HUGGING_FACES_BLOCK += ["attention.output.dense", "intermediate.dense", "output.dense"]
HUGGING_FACES_BLOCK += ["layernorm_before", "layernorm_after"]


def test_the_python_that_takes_a_network_elsewhere_works_as_printed(tmp_path, monkeypatch, output):
    blocks = re.findall(r"```py\n(.*?)```", Path("docs/elsewhere.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model, paths = save_network(tmp_path / "runs/pets/last.pth", ["cat", "dog"]), []
    for n in range(3):
        Image.new("RGB", (30, 20), (10, 90 * n, 30)).save(f"{n}.jpg")
        paths.append(f"{n}.jpg")
    # a stand-in for safetensors, which the tests do without: torch's own file
    reader = SimpleNamespace(
        load_file=lambda path: torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)
    )
    monkeypatch.setitem(sys.modules, "safetensors.torch", reader)
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace(torch=reader))
    names = {"paths": paths}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch will move elsewhere
        for block in blocks:
            if "load_file" in block:
                torch.save(names["theirs"], "model.safetensors")
            if "backbone" in block:
                state = create_model("tiny", depth=2).state_dict()
                torch.save({key: state[key] for key in state if "head" not in key}, "backbone.pth")
                torch.save(networks.create_convnet("resnet18", 1000, 224).state_dict(), "resnet18.pth")
            exec(block, names)
    with pytest.raises(UserError, match="runs/python holds a run"):
        exec(block, names)  # the last one trains
    inputs = torch.cat([inputs_of(path) for path in paths])
    with torch.no_grad():
        features, expected = model.forward_features(inputs), fuse(model(inputs))
    torch.testing.assert_close(names["embeddings"], features[:, 0])
    torch.testing.assert_close(names["patches"], features[:, 2:])
    assert names["predicted"] == [["cat", "dog"][label] for label in expected.argmax(dim=1)]
    program = torch.export.load("pets.pt2").module()
    torch.testing.assert_close(program(names["images"]), expected)
    assert (fuse(names["quantized"](inputs)) - expected).abs().max() < 0.1
    for network in (model, create_model("tiny", num_classes=2, depth=3)):
        state = network.state_dict()
        theirs = names["to_hugging_face"](state)
        assert theirs.keys() == hugging_faces_keys(len(network.blocks), network.distilled)
        assert equal(names["from_hugging_face"](dict(sorted(theirs.items()))), dict(sorted(state.items())))
    key = "deit.encoder.layer.1.attention.attention.key.bias"  # query, key, value
    assert torch.equal(names["theirs"][key], model.blocks[1].attn.qkv.bias[192:384])
    words = {"data": "shapes", "limit": 20, "epochs": 1, "img_size": 32, "batch_size": 10}
    for file in ("with-head.pth", "resnet18-ours.pth"):
        output(run_finetune, *flags(words | {"checkpoint": file}))
    read = networks.load_network("ours.pth")[0]
    assert equal(read.state_dict(), model.state_dict())
    assert runs.read_log("runs/python")[-1]["accuracy"] == pytest.approx(names["accuracy"])


def test_the_loop_augments_by_its_settings_and_gives_the_signals_back(tmp_path, monkeypatch, output):
    made, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(train, "Augment", lambda *given: made.append(augment.Augment(*given)) or made[0])
    words = {"augment": "off", "erasing": 0.1, "mixup": 0.2, "cutmix": 0.3, "smoothing": 0.4, "epochs": 1}
    output(run_train, *flags(QUICK | words | {"out": tmp_path / "run"}))
    mix = made[0].mix
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.num_classes, mix.smoothing) == (0.2, 0.3, 10, 0.4)
    assert made[0].policy is None and made[0].erasing.probability == 0.1
    assert signal.getsignal(signal.SIGTERM) is before


def test_0_switches_off_what_can_be_switched_off():
    off = "limit mixup cutmix erasing smoothing dropout drop-path ema clip-grad warmup-epochs save-every"
    given = train.train_parser().parse_args([f"--{name}=0" for name in off.split()])
    assert set(vars(given).values()) == {0}


def test_each_choice_of_a_flag_is_taken():
    choices = {"device": "auto cuda mps cpu", "augment": "randaugment autoaugment none off"}
    choices |= {"teacher-epochs": "auto", "warmup-epochs": "auto", "precision": "auto fp32 bf16 fp16"}
    for flag, values in choices.items():
        for value in values.split():
            assert list(vars(train.train_parser().parse_args([f"--{flag}={value}"])).values()) == [value]


def test_a_tilde_in_a_path_is_the_home_folder():
    words = [f"--{name}=~/x" for name in ("out", "data-path", "teacher-weights", "checkpoint")]
    given = vars(finetune.finetune_parser().parse_args(words))
    assert set(given.values()) == {str(Path.home() / "x")}


def test_normalization_is_the_same_before_within_and_after_an_export():
    augment.kept_constant.cache_clear()

    class Normalized(nn.Module):
        def forward(self, images):
            return augment.normalize(images)

    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    exported = torch.export.export(Normalized(), (images,)).module()(images)
    expected = torchvision.transforms.Normalize(augment.MEAN, augment.STD)(images / 255)
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(augment.normalize(images), expected, rtol=1e-5, atol=1e-6)


def test_the_python_on_the_pages_is_the_code_itself():
    def stripped(text):
        return "\n".join(["", *(line.strip() for line in text.strip().splitlines()), ""])

    sources = [stripped(path.read_text()) for path in Path().glob("*.py")]
    pieces = re.findall(r"```python\n(.*?)```", "".join(page.read_text() for page in PAGES), re.DOTALL)
    assert len(pieces) >= 6
    for piece in pieces:
        assert any(stripped(piece) in source for source in sources), piece
