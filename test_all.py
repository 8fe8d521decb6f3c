"""The tests, in the order of the files they test. `python -m pytest -q` takes minutes on two cores.

Each compares with something independent of the code: Pillow, torch's own operation, a formula written out,
finite differences, a second way of computing.
"""

import ast
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import augment
import data
import evaluate as measure
import finetune
import train
from augment import RepeatedAugmentSampler
from data import (
    ArraySet,
    FolderSet,
    crop_file,
    draw_shape,
    draw_shapes,
    eval_batches,
    load_data,
    read_image,
    train_batches,
)
from distill import (
    REGNETY,
    checkpoint_settings,
    create_teacher,
    hard_distillation_loss,
    label_loss,
    read_checkpoint,
    soft_distillation_loss,
    teacher_logits,
    torchvision_layout,
)
from model import (
    SIZES,
    Attention,
    Block,
    DeiT,
    DropPath,
    UsageError,
    attend,
    create_model,
    fuse,
    load_weights,
)
from train import (
    Place,
    build_network,
    build_optimizer,
    complete,
    evaluate,
    headline,
    learning_rate,
    load_teacher,
    main,
    program,
    write_whole,
)

CPU = torch.device("cpu")
ALONE = Place(0, 1, CPU)
torch.set_num_threads(1)  # on tensors as small as here more threads take longer


# ---- model.py ----

OFFICIAL_COUNTS = {  # model, distilled, image size: parameters at 1000 classes
    ("tiny", False, 224): 5_717_416,
    ("small", False, 224): 22_050_664,
    ("base", False, 224): 86_567_656,
    ("tiny", True, 224): 5_910_800,
    ("small", True, 224): 22_436_432,
    ("base", True, 224): 87_338_192,
    ("base", False, 384): 86_859_496,
    ("base", True, 384): 87_630_032,
}


def official_state(width: int, tokens: int, distilled: bool, classes: int = 1000, patch: int = 16) -> dict:
    """A state dict with the official checkpoints' keys and shapes, in their order, written out by hand."""
    shapes = {"cls_token": (1, 1, width)}
    if distilled:
        shapes["dist_token"] = (1, 1, width)
    shapes |= {"pos_embed": (1, tokens, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    for n in range(12):
        block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        block |= {"norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in block.items():
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    for head in ["head", "head_dist"] if distilled else ["head"]:
        shapes |= {f"{head}.weight": (classes, width), f"{head}.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "distilled", "size"), OFFICIAL_COUNTS)
def test_parameter_counts_are_the_official_ones(name, distilled, size):
    with torch.device("meta"):
        model = create_model(name, distilled=distilled, img_size=size)
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL_COUNTS[name, distilled, size]


@pytest.mark.parametrize(("size", "patch", "tokens"), [(224, 16, 198), (384, 16, 578), (32, 4, 66)])
def test_an_official_state_dict_loads_strictly(size, patch, tokens):
    state = official_state(192, tokens, True, patch=patch)
    model = create_model("tiny", img_size=size, patch_size=patch, distilled=True)
    own = model.state_dict()
    assert [(k, v.shape) for k, v in own.items()] == [(k, v.shape) for k, v in state.items()]
    assert load_weights(model, state) == []
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_attention_is_equation_1():
    """One head at a time, one query at a time, in float64; and the fused kernel agrees."""
    torch.manual_seed(0)
    layer = Attention(dim=12, num_heads=3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected, weights = torch.zeros(2, 5, 12, dtype=torch.float64), layer.weights(x)
    w, b = layer.qkv.weight, layer.qkv.bias
    for image in range(2):
        for head in range(3):
            rows = slice(4 * head, 4 * head + 4)
            q, k, v = (
                x[image] @ w[12 * i : 12 * i + 12][rows].T + b[12 * i : 12 * i + 12][rows] for i in range(3)
            )
            for n in range(5):
                scores = torch.stack([q[n] @ k[m] / math.sqrt(4) for m in range(5)])
                share = scores.exp() / scores.exp().sum()
                torch.testing.assert_close(weights[image, head, n], share)
                expected[image, n, rows] = sum(share[m] * v[m] for m in range(5))
    torch.testing.assert_close(layer(x), layer.proj(expected))
    out, weights = attend(*layer.split(x))
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))


def test_attention_agrees_with_torchs_own_module():
    torch.manual_seed(0)
    ours, theirs = Attention(dim=12, num_heads=3), nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 7, 12)
    out, weights = theirs(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(ours(x), out)
    torch.testing.assert_close(ours.weights(x), weights)


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
    options = {"num_classes": 3, "img_size": 4, "patch_size": 2, "distilled": True}
    model = DeiT(6, 2, depth=2, **options).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    images, names = torch.randn(2, 3, 4, 4, dtype=torch.float64), [n for n, _ in model.named_parameters()]

    def loss(*values):
        class_logits, distillation_logits = torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), images
        )
        return class_logits.square().sum() + distillation_logits.sin().sum()

    assert torch.autograd.gradcheck(
        loss, tuple(p.detach().requires_grad_() for p in model.parameters()), fast_mode=True
    )


def test_patches_are_read_row_by_row_and_tokens_are_class_distillation_patches():
    model = create_model("tiny", img_size=32, patch_size=8, distilled=True)
    images = torch.randn(2, 3, 32, 32)
    tokens = model.embed(images) - model.pos_embed
    torch.testing.assert_close(tokens[0, 0], model.cls_token[0, 0])
    torch.testing.assert_close(tokens[1, 1], model.dist_token[0, 0])
    patch = images[1, :, 8:16, 16:24].flatten()  # row 1, column 2
    weight, bias = model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias
    torch.testing.assert_close(tokens[1, 2 + 1 * 4 + 2], weight @ patch + bias, rtol=1e-4, atol=1e-5)


def test_each_head_reads_its_own_token():
    model = create_model("tiny", img_size=32, patch_size=16, distilled=True, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    x = model.embed(images)
    for block in model.blocks:
        x = block(x)
    x = F.layer_norm(x, (192,), model.norm.weight, model.norm.bias, eps=1e-6)
    class_logits, distillation_logits = model(images)
    torch.testing.assert_close(class_logits, x[:, 0] @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(distillation_logits, x[:, 1] @ model.head_dist.weight.T + model.head_dist.bias)
    torch.testing.assert_close(
        model.train()(images), (class_logits, distillation_logits)
    )  # no dropout: the same
    assert create_model("tiny", num_classes=7)(torch.randn(2, 3, 224, 224)).shape == (2, 7)


def test_attention_weights_are_those_that_forward_applies():
    model = create_model("tiny", img_size=32, patch_size=8, distilled=True).eval()
    images = torch.randn(2, 3, 32, 32)
    weights = model.attention_weights(images)
    assert [w.shape for w in weights] == [(2, 3, 18, 18)] * 12
    x = model.embed(images)
    for block, w in zip(model.blocks, weights, strict=True):
        values = block.attn.split(block.norm1(x))[2]
        torch.testing.assert_close(
            block.attn(block.norm1(x)), block.attn.proj((w @ values).transpose(1, 2).flatten(2))
        )
        x = block(x)


def test_initialisation_is_a_truncated_normal():
    torch.manual_seed(0)
    model = create_model("tiny", distilled=True)
    drawn = [m.weight for m in model.modules() if isinstance(m, nn.Linear)] + [model.pos_embed]
    drawn = torch.cat([weights.flatten() for weights in drawn])
    assert abs(drawn.mean()) < 1e-4
    assert abs(drawn.std() - 0.02) < 1e-4
    assert model.cls_token.std() > 0.01
    assert model.dist_token.std() > 0.01
    assert all((m.bias == 0).all() for m in model.modules() if isinstance(m, nn.Linear))


def test_stochastic_depth_grows_linearly_and_keeps_the_expectation():
    model = create_model("tiny", drop_path=0.11)
    assert [round(block.drop_path.rate, 6) for block in model.blocks] == [
        round(0.01 * n, 6) for n in range(12)
    ]
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.randn(20_000, 3, 2, dtype=torch.float64)
    for front in (3, 2):
        added = drop(x, lambda x, front=front: x[:, :front] + 5, front) - x[:, :front]
        kept = added.abs().sum(dim=(1, 2)) > 0
        assert abs(kept.double().mean() - 0.7) < 0.015
        torch.testing.assert_close(added[kept], (x[kept, :front] + 5) / 0.7)
        torch.testing.assert_close(drop.eval()(x, torch.neg), x - x)
        drop.train()


def test_stochastic_depth_is_compiled_into_one_graph():
    model = DeiT(64, 1, depth=3, num_classes=5, img_size=16, patch_size=8, drop_path=0.5).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # refuses breaks
    images = torch.randn(8, 3, 16, 16)
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(images), expected)


def test_stochastic_depth_computes_nothing_of_what_it_drops():
    seen, drop, x = [], DropPath(0.5), torch.ones(100, 2, 3)
    drop(x, lambda x: seen.append(len(x)) or x)
    assert 30 < seen[0] < 70
    block = Block(64, 1, drop_path=0.999999)
    assert torch.equal(block(torch.ones(2, 3, 64)), torch.ones(2, 3, 64))  # no sample is kept


def test_resizing_position_embeddings_is_torchs_bicubic_and_spares_the_front_tokens():
    state = official_state(192, 198, True)
    model = create_model("tiny", img_size=384, distilled=True)
    assert load_weights(model, state) == ["pos_embed"]
    grid = state["pos_embed"][:, 2:].reshape(14, 14, 192)
    expected = F.interpolate(grid.permute(2, 0, 1)[None], size=(24, 24), mode="bicubic")[0].permute(1, 2, 0)
    assert torch.equal(model.pos_embed[:, :2], state["pos_embed"][:, :2])
    torch.testing.assert_close(model.pos_embed[0, 2:].reshape(24, 24, 192), expected)


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_at_their_own_resolution_give_the_same_logits_to_the_last_bit(distilled):
    settings = {"num_classes": 5, "img_size": 48, "patch_size": 8, "distilled": distilled}
    model, other = create_model("tiny", **settings).eval(), create_model("tiny", **settings).eval()
    assert load_weights(other, model.state_dict()) == []
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(fuse(model(images)), fuse(other(images)))


def test_bicubic_keeps_the_norm_of_position_embeddings_where_bilinear_loses_it():
    def lengths(grid, size):
        """Mean norm after resizing by `load_weights` and by torch's bilinear, as shares of that before."""
        state = official_state(192, 198, True)
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :2], grid.flatten(1).T[None]], dim=1)
        model = create_model("tiny", img_size=size, distilled=True)
        load_weights(model, state)
        bilinear = F.interpolate(grid[None], size=(size // 16, size // 16), mode="bilinear")
        before = grid.norm(dim=0).mean()
        return (model.pos_embed[0, 2:].norm(dim=1).mean() / before).item(), (
            bilinear.norm(dim=1).mean() / before
        ).item()

    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(14.0), torch.arange(14.0), indexing="ij")
    for wavelength, lost in ((4, 0.15), (6, 0.07)):  # patches; smooth, as trained embeddings are
        angle, phase = 2 * math.pi * torch.rand(2, 192, 1, 1, generator=generator)
        smooth = torch.cos((columns * angle.cos() + rows * angle.sin()) * 2 * math.pi / wavelength + phase)
        bicubic, bilinear = lengths(smooth, 384)
        assert abs(bicubic - 1) < 0.03
        assert bilinear < 1 - lost
    # What neighbours do not share, neither keeps: of independent numbers, weights w leave sqrt(sum of w²).
    bicubic, bilinear = lengths(torch.randn(192, 14, 14, generator=generator), 384)
    assert bicubic == pytest.approx(0.86, abs=0.02)
    assert bilinear == pytest.approx(0.68, abs=0.02)  # 2/3 in the limit: the mean of t² + (1 - t)², twice


def test_weights_for_other_classes_leave_the_heads_and_misfits_name_key_and_shapes():
    model = create_model("tiny", num_classes=10, distilled=True)
    fresh = model.head.weight.clone()
    expected = ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]
    assert load_weights(model, official_state(192, 198, True)) == expected
    assert torch.equal(model.head.weight, fresh)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    misfits = [(official_state(384, 198, True), r"cls_token is \(1, 1, 384\) .* \(1, 1, 192\)")]
    misfits += [(official_state(192, 197, False), "dist_token is absent"), ({}, "cls_token is absent")]
    misfits += [(official_state(192, 198, True, patch=8), r"patch_embed.proj.weight is \(192, 3, 8, 8\)")]
    misfits += [(official_state(192, 198, True) | {"fc_norm.weight": torch.ones(192)}, "fc_norm.weight")]
    misfits += [(official_state(192, 199, True), "pos_embed")]  # 197 patches are no square
    for state, message in misfits:
        with pytest.raises(ValueError, match=message):
            load_weights(model, state)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in before)


def test_fused_prediction_adds_the_two_softmaxes():
    class_logits, distillation_logits = torch.randn(4, 5), torch.randn(4, 5)
    shares = [z.exp() / z.exp().sum(1, keepdim=True) for z in (class_logits, distillation_logits)]
    torch.testing.assert_close(fuse((class_logits, distillation_logits)), (shares[0] + shares[1]) / 2)
    torch.testing.assert_close(fuse(class_logits), shares[0])
    assert fuse((class_logits.bfloat16(), distillation_logits.bfloat16())).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "huge"}, "unknown model 'huge'"),
        ({"img_size": 225}, "225 is not a multiple of patch size 16; try image size 224"),
        ({"img_size": 0}, "img_size"),
        ({"patch_size": -4}, "patch_size"),
        ({"img_size": 8}, "try image size 16"),
        ({"num_classes": 0}, "num_classes"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_impossible_models_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "tiny"} | arguments)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"takes images \(B, 3, 32, 32\), not \(2, 3, 48, 48\)"):
        create_model("tiny", img_size=32, patch_size=8)(torch.randn(2, 3, 48, 48))


# ---- distill.py ----


def log_softmax64(logits):
    z = logits.double().numpy()
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("soft_targets", [True, False])
@pytest.mark.parametrize("token", [True, False])
def test_soft_distillation_is_equation_2_and_hard_is_equation_3(token, soft_targets):
    torch.manual_seed(0)
    class_logits, distillation_logits, teacher = (
        3 * torch.randn(6, 5, dtype=torch.float64) for _ in range(3)
    )
    labels = torch.randint(5, (6,))
    y = F.one_hot(labels, 5).double()
    targets = 0.9 * y + 0.1 * y.flip(0) if soft_targets else labels
    y = (targets if soft_targets else y).numpy()
    outputs = (class_logits, distillation_logits) if token else class_logits
    student = distillation_logits if token else class_logits
    cross_entropy = -(y * log_softmax64(class_logits)).sum(1).mean()
    tau, lam = 2.5, 0.3
    p, q = log_softmax64(teacher / tau), log_softmax64(student / tau)
    expected = (1 - lam) * cross_entropy + lam * tau**2 * (np.exp(p) * (p - q)).sum(1).mean()
    assert soft_distillation_loss(outputs, targets, teacher, tau, lam).item() == pytest.approx(
        expected, rel=1e-12
    )
    chosen = -log_softmax64(student)[np.arange(6), teacher.numpy().argmax(1)].mean()
    expected = 0.5 * cross_entropy + 0.5 * chosen  # the teacher's label is not smoothed
    assert hard_distillation_loss(outputs, targets, teacher).item() == pytest.approx(expected, rel=1e-12)
    expected = cross_entropy - (y * log_softmax64(student)).sum(1).mean() if token else 2 * cross_entropy
    assert label_loss(outputs, targets).item() == pytest.approx(expected / 2, rel=1e-12)


@pytest.mark.parametrize("token", [True, False])
def test_losses_of_logits_in_bfloat16_are_computed_in_float32(token):
    torch.manual_seed(0)
    first, second, teacher = (3 * torch.randn(6, 5).bfloat16() for _ in range(3))
    targets = torch.randint(5, (6,))
    for loss in (label_loss, soft_distillation_loss, hard_distillation_loss):
        more = [] if loss is label_loss else [teacher]
        with torch.autocast("cpu", torch.bfloat16):
            value = loss((first, second) if token else first, targets, *more)
        exact = loss((first.double(), second.double()) if token else first.double(), targets, *more)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_papers_tau_and_lambda_are_the_defaults():
    z, labels, teacher = torch.randn(6, 5), torch.randint(5, (6,)), torch.randn(6, 5)
    assert torch.equal(
        soft_distillation_loss(z, labels, teacher), soft_distillation_loss(z, labels, teacher, 3.0, 0.1)
    )


def test_gradient_reaches_each_token_from_its_own_label_and_never_the_teacher():
    student = create_model("tiny", num_classes=5, img_size=32, patch_size=16, distilled=True)
    teacher = create_teacher("regnet_y_200mf", 5, img_size=32)
    statistics = {key: value.clone() for key, value in teacher.state_dict().items()}
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    judged = teacher_logits(teacher, images)
    assert not judged.requires_grad
    hard_distillation_loss(student(images), labels, judged).backward()
    for head, target in ((student.head, labels), (student.head_dist, judged.argmax(1))):
        error = F.one_hot(target, 5).float()  # of the mean cross-entropy: (softmax - one-hot) / B, halved
        logits = student(images)[0 if head is student.head else 1].detach()
        torch.testing.assert_close(head.bias.grad, (logits.softmax(1) - error).mean(0) / 2)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, statistics[key]) for key, value in teacher.state_dict().items())


def test_a_teacher_with_two_heads_speaks_through_their_fusion():
    teacher = create_model("tiny", num_classes=5, img_size=32, patch_size=16, distilled=True).eval()
    nn.init.normal_(teacher.head.weight)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(teacher_logits(teacher, images).softmax(1), fuse(teacher(images)))


def test_regnets_have_the_published_sizes_and_torchvisions_keys():
    counts = {"4gf": 20_646_656, "8gf": 39_381_472, "12gf": 51_822_544, "16gf": 83_590_140}
    with torch.device("meta"):
        ours = {size: create_teacher(f"regnet_y_{size}", 1000) for size in counts}
    assert {size: sum(p.numel() for p in network.parameters()) for size, network in ours.items()} == counts
    for size in ("8gf", "16gf"):  # torchvision has these too
        theirs = torchvision.models.get_model(f"regnet_y_{size}").state_dict()
        shapes = [(key, value.shape) for key, value in ours[size].state_dict().items()]
        assert shapes == [(key, value.shape) for key, value in theirs.items()]


def test_the_design_parameters_give_the_regnets_widths():
    """The quantised linear rule of Radosavovic et al., with FACTS' depth, w_0, w_a, w_m and group width."""
    design = {"4gf": (22, 96, 31.41, 2.24, 64), "8gf": (17, 192, 76.82, 2.19, 56)}
    design |= {"12gf": (19, 168, 73.36, 2.37, 112), "16gf": (18, 200, 106.23, 2.48, 112)}
    design |= {"200mf": (13, 24, 36.44, 2.49, 8)}
    for size, (depth, w_0, w_a, w_m, group) in design.items():
        power = np.round(np.log((w_0 + w_a * np.arange(depth)) / w_0) / np.log(w_m))
        widths = (np.round(w_0 * w_m**power / 8) * 8).astype(int)
        stages, depths = np.unique(widths, return_counts=True)
        stages = [int(round(w / min(group, w)) * min(group, w)) for w in stages]
        stages[0] = 224 if size == "8gf" else stages[0]  # as torchvision rounds it
        assert REGNETY[f"regnet_y_{size}"] == (tuple(depths), tuple(stages), group)


def test_small_images_keep_their_resolution_in_the_stem():
    small, large = (
        create_teacher("regnet_y_200mf", 5, img_size=32),
        create_teacher("regnet_y_200mf", 5, img_size=96),
    )
    grid = torch.zeros(1, 3, 64, 64)
    assert small.trunk_output(small.stem(grid)).shape[-1] == 4
    assert large.trunk_output(large.stem(grid)).shape[-1] == 2
    assert create_teacher("resnet18", 5, img_size=32).conv1.stride == (1, 1)
    assert create_teacher("vit_b_16", 5, img_size=32).conv_proj.stride == (16, 16)  # no convnet: patches stay


@pytest.mark.parametrize("name", ["regnet_y_200mf", "resnet18", "tiny"])
def test_a_teachers_checkpoint_gives_the_same_logits_frozen(tmp_path, name):
    torch.manual_seed(0)
    network = create_teacher(name, 5, img_size=32, patch_size=8).train()
    network.requires_grad_(True)
    network(torch.randn(8, 3, 32, 32))  # moves BatchNorm's statistics off their initial values
    settings = {"model": name, "img_size": 32, "patch_size": 8}
    torch.save({"model": network.state_dict(), "settings": settings}, tmp_path / "t.pth")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    images = torch.randn(4, 3, 32, 32)
    for file, options in (("t.pth", {}), ("plain.pth", {"img_size": 32, "patch_size": 8})):
        teacher = create_teacher(name, 5, tmp_path / file, **options)
        assert not teacher.training
        assert not any(p.requires_grad for p in teacher.parameters())
        torch.testing.assert_close(teacher(images), network.eval()(images))


def test_teachers_that_do_not_fit_are_told_at_once(tmp_path):
    network = create_teacher("regnet_y_200mf", 5, img_size=32)
    file = tmp_path / "t.pth"
    torch.save({"model": network.state_dict(), "settings": {"model": "regnet_y_200mf", "img_size": 32}}, file)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pth")
    mistakes = [
        ("regnet_y_200mf", 6, file, r"fc.weight is \(5, 368\)"),
        ("resnet18", 5, file, "not a resnet18"),
    ]
    mistakes += [("regnet_y_200mf", 5, tmp_path / "none.pth", "there is no file")]
    mistakes += [("regnet_y_200mf", 5, tmp_path / "text.pth", "is not a checkpoint")]
    mistakes += [("regnet_y_200mf", 5, tmp_path / "list.pth", "holds a list")]
    mistakes += [("regnet_z", 5, None, "unknown network 'regnet_z'")]
    mistakes += [("regnet_y_4gf", 1000, "published", "torchvision has no weights for regnet_y_4gf")]
    for name, classes, weights, message in mistakes:
        with pytest.raises(ValueError, match=message):
            create_teacher(name, classes, weights)


def paper_layout_logits(state, x, stages):
    """A RegNetY written as functions of a state dict in the paper's file's layout: a second network."""

    def norm(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def convolve(x, name, stride=1, groups=1):
        weight = state[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        return norm(x, f"{name}.bn")

    x = convolve(x, "stem", 1).relu()  # stride 1: the image is small
    for stage, depth in enumerate(stages, 1):
        for block in range(1, depth + 1):
            name, stride = f"s{stage}.b{block}", 2 if block == 1 else 1
            shortcut = convolve(x, f"{name}.downsample", stride) if block == 1 else x
            y = convolve(x, f"{name}.conv1").relu()
            groups = y.shape[1] // state[f"{name}.conv2.conv.weight"].shape[1]
            y = convolve(y, f"{name}.conv2", stride, groups).relu()
            s = y.mean((2, 3), keepdim=True)
            s = F.conv2d(s, state[f"{name}.se.fc1.weight"], state[f"{name}.se.fc1.bias"]).relu()
            y = y * F.conv2d(s, state[f"{name}.se.fc2.weight"], state[f"{name}.se.fc2.bias"]).sigmoid()
            x = (shortcut + convolve(y, f"{name}.conv3")).relu()
    return F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])


def paper_layout_shapes(stages, widths, group_width, classes):
    """The paper's file's keys and shapes, in its order."""

    def conv(name, rows, columns, kernel):
        found = {f"{name}.conv.weight": (rows, columns, kernel, kernel)}
        found |= {f"{name}.bn.{part}": (rows,) for part in ("weight", "bias", "running_mean", "running_var")}
        return found | {f"{name}.bn.num_batches_tracked": ()}

    shapes, before = conv("stem", 32, 3, 3), 32
    for stage, (depth, width) in enumerate(zip(stages, widths, strict=True), 1):
        for block in range(1, depth + 1):
            name, squeezed = f"s{stage}.b{block}", round(before / 4)
            shapes |= conv(f"{name}.conv1", width, before, 1)
            shapes |= conv(f"{name}.conv2", width, min(group_width, width), 3)
            shapes |= {f"{name}.se.fc1.weight": (squeezed, width, 1, 1), f"{name}.se.fc1.bias": (squeezed,)}
            shapes |= {f"{name}.se.fc2.weight": (width, squeezed, 1, 1), f"{name}.se.fc2.bias": (width,)}
            shapes |= conv(f"{name}.conv3", width, width, 1)
            if block == 1:
                shapes |= conv(f"{name}.downsample", width, before, 1)
            before = width
    return shapes | {"head.fc.weight": (classes, before), "head.fc.bias": (classes,)}


def test_a_teacher_in_the_papers_key_layout_gives_that_networks_logits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in paper_layout_shapes(*REGNETY["regnet_y_200mf"], classes=5).items():
        spread = 1 / math.sqrt(math.prod(shape[1:]) or 1)
        state[key] = torch.randn(shape, generator=generator) * spread + (0.0 if len(shape) > 1 else 0.5)
        if key.endswith("running_var"):
            state[key] = state[key].abs() + 0.5
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    torch.save({"model": state}, tmp_path / "regnety.pth")
    teacher = create_teacher("regnet_y_200mf", 5, tmp_path / "regnety.pth", img_size=32)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    expected = paper_layout_logits(state, images, REGNETY["regnet_y_200mf"][0])
    torch.testing.assert_close(teacher(images), expected, rtol=1e-4, atol=1e-4)


def test_the_papers_own_teacher_file_would_load():
    with torch.device("meta"):
        shapes = paper_layout_shapes(*REGNETY["regnet_y_16gf"], classes=1000)
        theirs = torchvision_layout({key: torch.empty(shape) for key, shape in shapes.items()})
        ours = create_teacher("regnet_y_16gf", 1000).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {
        key: value.shape for key, value in ours.items()
    }


def test_a_teacher_made_for_another_size_sees_resized_inputs(tmp_path):
    torch.manual_seed(0)
    network = create_model("tiny", num_classes=5, img_size=48, patch_size=16).eval()
    nn.init.normal_(network.head.weight)
    torch.save(network.state_dict(), tmp_path / "plain.pth")  # says nothing of sizes: the weights tell
    teacher = create_teacher("tiny", 5, tmp_path / "plain.pth", img_size=32, patch_size=8)
    inputs = torch.randn(2, 3, 32, 32)
    resized = F.interpolate(inputs, (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher_logits(teacher, inputs), network(resized))


def test_a_teacher_with_its_classes_in_another_order_is_refused(tmp_path):
    network = create_teacher("regnet_y_200mf", 10, img_size=32)
    data = [draw_shapes("train", 10, 32, CPU)] * 2
    swapped = [data[0].classes[n] for n in (0, 2, 1, *range(3, 10))]
    for classes in (data[0].classes, swapped):
        settings = {"model": "regnet_y_200mf", "img_size": 32, "classes": classes}
        torch.save({"model": network.state_dict(), "settings": settings}, tmp_path / "t.pth")
        student = complete({"teacher_weights": str(tmp_path / "t.pth")})
        if classes is swapped:
            with pytest.raises(UsageError, match="class 1 is 'half' there and 'ring' here"):
                load_teacher(student, data, ALONE)
        else:
            assert load_teacher(student, data, ALONE).classes == classes


def test_a_damaged_checkpoint_is_recognised_at_any_length_and_any_bit(tmp_path):
    torch.save({"model": {"weight": torch.arange(40.0)}}, tmp_path / "whole.pth")
    whole, rng = (tmp_path / "whole.pth").read_bytes(), np.random.default_rng(0)
    for length in range(0, len(whole) - 1, 7):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(UsageError, match="is not a checkpoint") as caught:
            read_checkpoint(tmp_path / "cut.pth")
        assert "\n" not in str(caught.value)
    for place in rng.integers(0, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.pth").write_bytes(flipped)
        try:
            contents = read_checkpoint(tmp_path / "flipped.pth")
        except UsageError:
            continue
        assert torch.equal(contents["model"]["weight"], torch.arange(40.0))  # a bit without meaning


class Mischief:
    """Unpickling this would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    torch.save({"model": Mischief(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read safely|is not a checkpoint"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


# ---- augment.py ----

# The operations as Pillow does them: (image, argument) -> image


def transform_in_pillow(image, matrix):
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)
    )


PILLOW = {
    "AutoContrast": lambda image, v: ImageOps.autocontrast(image),
    "Equalize": lambda image, v: ImageOps.equalize(image),
    "Invert": lambda image, v: ImageOps.invert(image),
    "Rotate": lambda image, v: image.rotate(v, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104)),
    "Posterize": lambda image, v: (  # Pillow 12 and later raise at 0 bits
        ImageOps.posterize(image, int(v)) if v else Image.new("RGB", image.size)
    ),
    "Solarize": ImageOps.solarize,
    "SolarizeAdd": lambda image, v: image.point(
        [min(255, x + int(v)) if x < 128 else x for x in range(256)] * 3
    ),
    "Color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "Contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "Brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "Sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "ShearX": lambda image, v: transform_in_pillow(image, (1, v, 0, 0, 1, 0)),
    "ShearY": lambda image, v: transform_in_pillow(image, (1, 0, 0, v, 1, 0)),
    "TranslateX": lambda image, v: transform_in_pillow(image, (1, 0, v * image.width, 0, 1, 0)),
    "TranslateY": lambda image, v: transform_in_pillow(image, (1, 0, 0, 0, 1, v * image.height)),
}
RANGES = (  # all the arguments that the policies can draw, and more
    dict.fromkeys(("AutoContrast", "Equalize", "Invert"), [0.0])
    | {"Posterize": range(9), "Solarize": range(257), "SolarizeAdd": range(129)}
    | dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), np.linspace(0.1, 1.9, 301))
    | {"Rotate": np.linspace(-30, 30, 301)}
    | dict.fromkeys(("ShearX", "ShearY"), np.linspace(-0.3, 0.3, 301))
    | dict.fromkeys(("TranslateX", "TranslateY"), np.linspace(-0.45, 0.45, 301))
)


@pytest.fixture(scope="module")
def pictures():
    """322 images in batches uint8 (n, 3, H, W) of one size each."""
    rng, batches = np.random.default_rng(0), []
    for height, width in [(1, 1), (2, 3), (3, 3), (1, 7), (9, 2), (32, 32), (31, 48), (48, 20), (97, 64)]:
        ramp = np.add.outer(np.linspace(-1, 1, height), np.linspace(-1, 1, width))
        batch = [np.zeros((3, height, width)), np.full((3, height, width), 255)]
        for _ in range(6):
            batch.append(rng.integers(0, 256, (3, height, width)))  # noise
            batch.append(128 + ramp * rng.uniform(-128, 128, (3, 1, 1)))  # a smooth gradient
            batch.append(rng.integers(100, 100 + rng.integers(2, 30), (3, height, width)))  # low contrast
            batch.append(np.broadcast_to(rng.integers(0, 256, (3, 1, 1)), (3, height, width)))  # one colour
            batch.append(rng.choice(rng.integers(0, 256, 2), (3, height, width)))  # two levels
        batches.append(torch.from_numpy(np.stack(batch).clip(0, 255).astype(np.uint8)))
    for size, count in [(32, 30), (100, 4)]:
        drawn = [np.asarray(draw_shape(0, "train", i, size)[0]) for i in range(count)]
        batches.append(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2))
    return batches


def to_pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def away_from_pillow(name, pictures, rounds=2):
    """|ours - Pillow's| of each image in turn: another argument for each image of a batch, all of RANGES."""
    count = rounds * sum(len(batch) for batch in pictures)
    assert count >= max(400, len(RANGES[name]))
    grid = np.random.default_rng(1).permutation(np.resize(np.asarray(RANGES[name], np.float32), count))
    for batch in pictures * rounds:
        arguments, grid = grid[: len(batch)], grid[len(batch) :]
        before = batch.clone()
        ours = augment.OPERATIONS[name](batch, torch.from_numpy(arguments))
        assert ours.dtype == torch.uint8 and ours.shape == batch.shape and torch.equal(batch, before)
        for image, result, argument in zip(batch, ours, arguments.tolist(), strict=True):
            pillow = np.array(PILLOW[name](to_pillow(image), argument))
            yield (result.int() - torch.from_numpy(pillow).permute(2, 0, 1).int()).abs()


def test_the_operations_are_the_papers_fifteen():
    assert augment.OPERATIONS.keys() == PILLOW.keys() and len(PILLOW) == 15


@pytest.mark.parametrize(
    "name", ["Invert", "Posterize", "Solarize", "SolarizeAdd", "AutoContrast", "Equalize"]
)
def test_operations_on_single_values_are_pillows_to_the_last_bit(name, pictures):
    assert all(not difference.any() for difference in away_from_pillow(name, pictures))


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_enhancements_are_pillows_within_one_level_everywhere(name, pictures):
    differences = list(away_from_pillow(name, pictures))
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean([difference.float().mean() for difference in differences]) < 0.01


@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"])
def test_geometric_operations_are_pillows_bicubic_ones(name, pictures):
    # Rounding may put a point on the border on its other side, and so a fill pixel where Pillow has none.
    by_size = {}
    for difference in away_from_pillow(name, pictures):
        by_size.setdefault(tuple(difference.shape), []).append(difference.amax(dim=0).flatten())
    for size, differences in by_size.items():
        pixels = torch.cat(differences)
        assert (pixels > 1).float().mean() < (2e-3 if size[1] * size[2] > 100 else 0.02), size
        assert pixels[pixels <= 1].float().mean() < 0.05, size


def test_geometric_operations_show_the_mean_colour_beyond_the_border():
    white = torch.full((1, 3, 40, 40), 255, dtype=torch.uint8)
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        moved = augment.OPERATIONS[name](white, torch.tensor([RANGES[name][-1]]))[0]
        assert moved[:, 39, 39].tolist() == [124, 116, 104]


def test_each_image_of_a_batch_gets_its_own_operation_and_argument(pictures):
    rng, (batch,) = np.random.default_rng(2), [b for b in pictures if b.shape[2:] == (31, 48)]
    names = list(augment.OPERATIONS)
    choice = rng.integers(-1, 15, 400)
    argument = np.array([rng.choice(RANGES[names[c]]) if c >= 0 else 0 for c in choice], np.float32)
    images = batch[torch.arange(400) % len(batch)]
    together = augment.apply_operations(images, torch.from_numpy(choice), torch.from_numpy(argument))
    for image, c, v, result in zip(images, choice, torch.from_numpy(argument), together, strict=True):
        alone = image if c < 0 else augment.OPERATIONS[names[c]](image[None], v[None])[0]
        assert torch.equal(result, alone)


# What is drawn: 5 standard errors away counts as wrong. Seeds are fixed: no test fails by chance.


def is_share(hits, expected):
    """Whether the share of `hits` (booleans) is `expected`."""
    hits = torch.as_tensor(hits)
    return abs(hits.double().mean() - expected) <= 5 * math.sqrt(expected * (1 - expected) / hits.numel())


def is_flat(numbers, count):
    """Whether whole numbers 0..count - 1 come equally often, by their chi-square."""
    seen = torch.bincount(torch.as_tensor(numbers).flatten(), minlength=count).double()
    chi_square = ((seen - seen.mean()) ** 2 / seen.mean()).sum()
    return len(seen) == count and abs(chi_square - (count - 1)) < 5 * math.sqrt(2 * (count - 1))


def is_like(sample, other):
    """Whether two samples have one distribution: Kolmogorov and Smirnov's test, at a chance of 1e-5."""
    sample, other = np.sort(np.ravel(sample)), np.sort(np.ravel(other))
    values = np.concatenate([sample, other])
    below = [np.searchsorted(x, values, side="right") / len(x) for x in (sample, other)]
    return np.abs(below[0] - below[1]).max() < 2.47 * math.sqrt(1 / len(sample) + 1 / len(other))


def uncorrelated(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(a))


def fair(m):
    return [m, -m]


# What magnitude m = M / 10 stands for in the paper's RandAugment, for each side of the coin if there is one
RANDAUGMENT = {
    "Rotate": lambda m: fair(30 * m),
    "Posterize": lambda m: [4 - int(4 * m)],
    "Solarize": lambda m: [256 - min(256, int(256 * m))],
    "SolarizeAdd": lambda m: [min(128, int(110 * m))],
    "Color": lambda m: [max(0.1, 1 + x) for x in fair(0.9 * m)],
    "Contrast": lambda m: [max(0.1, 1 + x) for x in fair(0.9 * m)],
    "Brightness": lambda m: [max(0.1, 1 + x) for x in fair(0.9 * m)],
    "Sharpness": lambda m: [max(0.1, 1 + x) for x in fair(0.9 * m)],
    "ShearX": lambda m: fair(0.3 * m),
    "ShearY": lambda m: fair(0.3 * m),
    "TranslateX": lambda m: fair(0.45 * m),
    "TranslateY": lambda m: fair(0.45 * m),
}
AUTOAUGMENT = RANDAUGMENT | {
    "Posterize": lambda m: [int(4 * m) + 4],
    "Solarize": lambda m: [min(256, int(256 * m))],
    "Color": lambda m: [0.1 + 1.8 * m],
    "Contrast": lambda m: [0.1 + 1.8 * m],
    "Sharpness": lambda m: [0.1 + 1.8 * m],
}
NAMES = list(augment.OPERATIONS)


@pytest.fixture
def choose(monkeypatch):
    """Calls a policy on `count` images and gives what it chose: (operations, arguments) of each draw."""
    drawn = []

    def recorder(images, choice, argument):
        drawn.append((choice, argument))
        return images

    def choose(policy, count, seed=0):
        drawn.clear()
        policy(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.Generator().manual_seed(seed))
        return list(drawn)

    monkeypatch.setattr(augment, "apply_operations", recorder)
    return choose


def test_randaugment_draws_two_of_fifteen_with_replacement_and_applies_half(choose):
    (first, _), (second, _) = choose(augment.RandAugment(), 300_000)
    applied = (first >= 0) & (second >= 0)
    assert is_share(first >= 0, 0.5) and is_share(second >= 0, 0.5) and is_share(applied, 0.25)
    assert is_flat(first[first >= 0], 15) and is_flat(second[second >= 0], 15)
    assert is_flat((15 * first + second)[applied], 225)
    assert len(choose(augment.RandAugment(num_ops=3), 1)) == 3


@pytest.mark.parametrize("magnitude", [0, 1, 2.5, 4, 5, 7.5, 9, 10])
def test_randaugments_arguments_are_the_table(choose, magnitude):
    draws = choose(augment.RandAugment(magnitude=magnitude, magnitude_std=0), 30_000)
    for k, name in enumerate(NAMES):
        argument = torch.cat([argument[choice == k] for choice, argument in draws])
        sides = RANDAUGMENT.get(name, lambda m: [])(magnitude / 10)
        if not sides:  # AutoContrast, Equalize and Invert have no argument
            continue
        assert torch.isclose(argument[:, None], torch.tensor(sides).float()).any(dim=1).all()
        if len(set(sides)) == 2:  # the coin is fair
            assert is_share(argument > sum(sides) / 2, 0.5)


def test_randaugments_magnitude_is_normal_about_9_and_clipped_to_10(choose):
    kinds = {"Rotate": (0, 30), "ShearX": (0, 0.3), "ShearY": (0, 0.3), "TranslateX": (0, 0.45)}
    kinds |= {"TranslateY": (0, 0.45), "Color": (1, 0.9), "Contrast": (1, 0.9), "Brightness": (1, 0.9)}
    normal = np.random.default_rng(3).normal(9, 0.5, 200_000).clip(0, 10).round(3)
    signed = []
    for choice, argument in choose(augment.RandAugment(), 400_000):
        magnitude = torch.full(choice.shape, torch.nan, dtype=torch.float64)
        for name, (centre, scale) in kinds.items():
            mine = choice == NAMES.index(name)
            magnitude[mine] = 10 * (argument[mine].double() - centre) / scale
            assert is_like(magnitude[mine].abs().numpy().round(3), normal), name
        assert is_share(magnitude[magnitude.isfinite()].abs() > 9.9999, 0.5 * math.erfc(2 / math.sqrt(2)))
        assert is_share(magnitude[magnitude.isfinite()] > 0, 0.5)
        signed.append(magnitude)
    # The two operations of an image are as strong, and point as far, as if the other were not there.
    one, two = (magnitude[signed[0].isfinite() & signed[1].isfinite()] for magnitude in signed)
    assert uncorrelated(one.abs(), two.abs()) and uncorrelated(one.sign(), two.sign())
    assert uncorrelated(one.abs(), one.sign())


def test_randaugments_magnitude_is_clipped_to_0(choose):
    for choice, argument in choose(augment.RandAugment(magnitude=0, magnitude_std=1), 50_000):
        assert is_share(argument[choice == NAMES.index("ShearX")] == 0, 0.5)


def test_autoaugments_policy_is_torchvisions():
    theirs = torchvision.transforms.AutoAugment(torchvision.transforms.AutoAugmentPolicy.IMAGENET).policies
    without = ("AutoContrast", "Equalize", "Invert")
    ours = [
        tuple((name, p, None if name in without else level) for name, p, level in pair)
        for pair in augment.AUTOAUGMENT_POLICY
    ]
    assert ours == [tuple(pair) for pair in theirs]


def test_autoaugment_chooses_sub_policies_evenly_and_applies_each_operation_with_its_probability(choose):
    count = 400_000
    theirs = torchvision.transforms.AutoAugment(torchvision.transforms.AutoAugmentPolicy.IMAGENET).policies
    expected = Counter()
    for pair in theirs:
        outcomes = []
        for name, p, level in pair:
            sides = [0.0] if level is None else AUTOAUGMENT[name](level / 10)
            outcomes.append([(1 - p, None)] + [(p / len(sides), (name, round(v, 4))) for v in sides])
        for p, first in outcomes[0]:
            for q, second in outcomes[1]:
                expected[first, second] += p * q / 25
    seen = []
    for choice, argument in choose(augment.AutoAugment(), count):
        pairs = zip(choice.tolist(), argument.tolist(), strict=True)
        seen.append([
            None if c < 0 else (NAMES[c], round(v, 4) if NAMES[c] in AUTOAUGMENT else 0.0) for c, v in pairs
        ])  # fmt: skip
    seen = Counter(zip(*seen, strict=True))
    assert seen.keys() == {pair for pair, p in expected.items() if p > 0}
    for pair, p in expected.items():
        assert abs(seen[pair] - count * p) <= 5 * math.sqrt(count * p * (1 - p)), pair


@pytest.mark.parametrize("strength", [0.3, 0.4])
def test_colour_jitter_does_its_three_operations_in_any_order_within_its_strength(choose, strength):
    draws = choose(augment.ColorJitter(strength), 60_000)
    order = torch.stack([choice for choice, _ in draws], dim=1)
    three = torch.tensor(sorted(NAMES.index(name) for name in ("Brightness", "Contrast", "Color")))
    assert torch.equal(order.sort(dim=1).values, three.expand(60_000, 3))
    seen = Counter(map(tuple, order.tolist()))
    assert len(seen) == 6 and is_flat(np.repeat(np.arange(6), list(seen.values())), 6)
    uniform = np.random.default_rng(4).uniform(1 - strength, 1 + strength, 200_000)
    factors = torch.stack([argument for _, argument in draws])
    assert all(is_like(factor, uniform) for factor in factors)
    assert factors.min() >= 1 - strength and factors.max() <= 1 + strength
    assert uncorrelated(factors[0], factors[1]) and uncorrelated(factors[1], factors[2])
    assert augment.ColorJitter().strength in (0.3, 0.4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def test_half_of_the_images_are_mirrored():
    images = noise(20_000, 3, 2, 4)
    flipped = augment.random_flip(images, generator())
    mirrored = (flipped == torch.from_numpy(images.numpy()[..., ::-1].copy())).flatten(1).all(dim=1)
    assert is_share(mirrored, 0.5)
    assert torch.equal(flipped[~mirrored], images[~mirrored])


def test_pad_and_crop_cuts_each_image_out_of_its_own_padding_at_any_offset():
    images = noise(10, 3, 5, 6) | 1  # no black but the padding's
    padded = np.pad(images.numpy(), [(0, 0), (0, 0), (4, 4), (4, 4)])
    windows = {
        padded[i, :, top : top + 5, left : left + 6].tobytes(): (i, 9 * top + left)
        for i in range(10)
        for top in range(9)
        for left in range(9)
    }
    which = torch.arange(40_000) % 10
    crops = augment.pad_and_crop(images[which], generator())
    found = torch.tensor([windows[crop.tobytes()] for crop in crops.numpy()])
    assert torch.equal(found[:, 0], which) and is_flat(found[:, 1], 81)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (100, 400), (300, 200), (32, 32)])
def test_random_boxes_are_those_of_torchvisions_random_resized_crop(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([theirs(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(6_000)])
    ours = augment.random_boxes(60_000, height, width, generator()).numpy()
    for boxes in (ours, theirs):
        top, left, high, wide = boxes.T
        assert boxes.min() >= 0 and (top + high).max() <= height and (left + wide).max() <= width
    area, aspect = ours[:, 2] * ours[:, 3] / height / width, ours[:, 3] / ours[:, 2]
    slack = 1 + 2 / ours[:, 2:].min()  # whole pixels
    assert 0.08 / slack <= area.min() and 3 / 4 / slack <= aspect.min() and aspect.max() <= 4 / 3 * slack
    for measured in (
        lambda top, left, high, wide: high * wide,
        lambda top, left, high, wide: (wide / high).round(5),
        lambda top, left, high, wide: (top / np.maximum(1, height - high)).round(5),
        lambda top, left, high, wide: (left / np.maximum(1, width - wide)).round(5),
    ):
        assert is_like(measured(*ours.T), measured(*theirs.T))
    top, left, high, wide = ours.T
    assert uncorrelated(top / np.maximum(1, height - high), left / np.maximum(1, width - wide))


@pytest.mark.parametrize(("height", "width"), [(10, 200), (200, 10), (7, 300), (1, 40)])
def test_an_image_too_long_for_any_draw_gets_the_largest_centred_box(height, width):
    theirs = torchvision.transforms.RandomResizedCrop.get_params(
        torch.empty(3, height, width), (0.08, 1), (3 / 4, 4 / 3)
    )
    assert (augment.random_boxes(50, height, width, generator()) == torch.tensor(theirs)).all()


def soft_pictures(count, height, width):
    """Pictures without overshoot to clip: Pillow clips between its two passes, whose order depends on it."""
    drawn = np.stack([np.asarray(draw_shape(0, "val", i, max(height, width))[0]) for i in range(count)])
    return torch.from_numpy(drawn[:, :height, :width] // 2 + 64).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize("size", [7, 24, 96])  # shrinks all, shrinks some, enlarges all
def test_resized_boxes_are_pillows_crop_and_antialiased_bicubic_resize(size):
    images = soft_pictures(60, 48, 64)
    boxes = augment.random_boxes(60, 48, 64, generator(1))
    boxes[:2] = torch.tensor([[0, 0, 48, 64], [47, 63, 1, 1]])  # all of it, one pixel
    resized = augment.resize_boxes(images, boxes, size)
    for image, (top, left, high, wide), ours in zip(images, boxes.tolist(), resized, strict=True):
        crop = to_pillow(image).crop((left, top, left + wide, top + high))
        pillow = np.array(crop.resize((size, size), Image.Resampling.BICUBIC), np.int32)
        difference = np.abs(ours.permute(1, 2, 0).numpy() - pillow)
        assert difference.max() <= 2 and difference.mean() < 0.25


def test_random_crop_pads_at_the_images_own_size_and_resizes_boxes_otherwise():
    images = noise(40, 3, 24, 24)
    cropped = augment.random_crop(images, 24, generator())
    assert torch.equal(cropped, augment.pad_and_crop(images, generator()))
    boxes = augment.random_boxes(40, 24, 24, generator())
    assert torch.equal(augment.random_crop(images, 56, generator()), augment.resize_boxes(images, boxes, 56))


@pytest.mark.parametrize(
    ("height", "width", "size"), [(64, 64, 56), (128, 96, 42), (64, 96, 28), (16, 24, 56), (70, 64, 48)]
)
def test_central_crop_is_pillows_resize_to_size_over_0875_and_crop(height, width, size):
    images = soft_pictures(5, height, width)
    short = math.floor(size * 256 / 224)
    scaled = width * short // min(height, width), height * short // min(height, width)
    left, top = (round((side - size) / 2) for side in scaled)
    for image, ours in zip(images, augment.central_crop(images, size), strict=True):
        pillow = to_pillow(image).resize(scaled, Image.Resampling.BICUBIC)
        pillow = np.array(pillow.crop((left, top, left + size, top + size)), np.int32)
        assert np.abs(ours.permute(1, 2, 0).numpy() - pillow).max() <= 1
    assert torch.equal(augment.central_crop(noise(2, 3, size, size), size), noise(2, 3, size, size))


def test_normalise_is_torchvisions():
    images = noise(4, 3, 9, 7)
    expected = torchvision.transforms.functional.normalize(
        images / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    torch.testing.assert_close(augment.normalize(images), expected, rtol=1e-5, atol=1e-6)


# ---- augment.py: random erasing ----


def is_normal(sample):
    """Whether mean, spread, tails and shape (Kolmogorov and Smirnov's test) are those of N(0, 1)."""
    x, n = sample.double().flatten(), sample.numel()
    moments = (abs(x.mean()) * math.sqrt(n), abs(x.var() - 1) * math.sqrt(n / 2))
    tails = abs((x**4).mean() - 3) * math.sqrt(n / 96)
    steps = torch.arange(n, dtype=torch.float64) / n
    away = (torch.special.ndtr(x.sort().values) - steps).abs().max() * math.sqrt(n)
    return max(*moments, tails) < 5 and away < 2.5


def erased_boxes(inputs, outputs):
    """The images that changed, (top, left, height, width) of the change in each; it must be one whole box."""
    changed = outputs != inputs
    assert torch.equal(changed.any(dim=1), changed.all(dim=1))  # all three channels
    changed = changed.all(dim=1).numpy()
    which, boxes = np.flatnonzero(changed.any(axis=(1, 2))), []
    for picture in changed[which]:
        rows, columns = np.flatnonzero(picture.any(axis=1)), np.flatnonzero(picture.any(axis=0))
        top, left, high, wide = rows[0], columns[0], np.ptp(rows) + 1, np.ptp(columns) + 1
        assert picture[top : top + high, left : left + wide].all() and picture.sum() == high * wide
        boxes.append((top, left, high, wide))
    return which, np.array(boxes)


@pytest.mark.parametrize("probability", [0.25, 0.6, 1.0])
def test_erasing_happens_with_its_probability_to_a_copy(probability):
    inputs = torch.randn(4_000, 3, 12, 10, generator=generator())
    before = inputs.clone()
    outputs = augment.RandomErasing(probability)(inputs, generator())
    assert torch.equal(inputs, before)
    assert is_share((outputs != inputs).flatten(1).any(dim=1), probability)


def test_erasing_nothing_leaves_the_inputs():
    inputs = torch.randn(100, 3, 12, 10)
    assert torch.equal(augment.RandomErasing(0)(inputs, generator()), inputs)
    tiny = torch.randn(100, 3, 1, 1)  # no box is smaller than one pixel
    assert torch.equal(augment.RandomErasing(1)(tiny, generator()), tiny)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (40, 24)])
def test_erased_boxes_are_those_of_torchvisions_random_erasing(height, width):
    torch.manual_seed(0)
    inputs, ours = torch.full((1_000, 3, height, width), 100.0), []
    for seed in range(6):
        which, boxes = erased_boxes(inputs, augment.RandomErasing(1)(inputs, generator(seed)))
        assert len(which) == len(inputs)
        ours.append(boxes)
    ours, theirs = np.concatenate(ours), torchvision.transforms.RandomErasing.get_params
    theirs = np.array([theirs(inputs[0], (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(5_000)])
    area, aspect = ours[:, 2] * ours[:, 3] / height / width, ours[:, 2] / ours[:, 3]
    slack = 1 + 2 / ours[:, 2:].min()  # whole pixels
    assert 0.02 / slack <= area.min() and area.max() <= 0.33 * slack
    assert 0.3 / slack <= aspect.min() and aspect.max() <= 3.3 * slack
    for measured in (
        lambda top, left, high, wide: high * wide,
        lambda top, left, high, wide: (high / wide).round(5),
        lambda top, left, high, wide: (top / (height - high)).round(5),
        lambda top, left, high, wide: (left / (width - wide)).round(5),
    ):
        assert is_like(measured(*ours.T), measured(*theirs.T))
    top, left, high, wide = ours.T
    assert uncorrelated(top / (height - high), left / (width - wide))


def test_erased_pixels_are_normal_each_channel_its_own():
    inputs = torch.full((600, 3, 32, 32), 100.0)
    outputs = augment.RandomErasing(1)(inputs, generator())
    pixels = outputs.permute(0, 2, 3, 1)[(outputs != inputs).all(dim=1)]  # (n, 3)
    assert len(pixels) > 0.1 * 600 * 1024 and is_normal(pixels)
    for k in range(3):
        assert is_normal(pixels[:, k])
        assert uncorrelated(pixels[:, k], pixels[:, k - 1]) and uncorrelated(pixels[1:, k], pixels[:-1, k])
    repeated = len(pixels[:5_000].flatten().unique())
    assert repeated > 0.995 * 15_000  # chance repeats a few of the float32 values, a pattern would many
    again = augment.RandomErasing(1)(inputs, generator(1))
    assert (outputs == again)[(outputs != inputs) & (again != inputs)].float().mean() < 1e-4


def test_hashed_draws_are_normal_finite_and_unrelated():
    device, extremes, squares = torch.device("cpu"), [], []
    for seed in range(10):  # 42 million draws: each value that the hash can give comes about five times
        x = augment.hashed_normal((seed * 0x19660D + 1) << 10, 1 << 22, device)
        extremes.append(x.aminmax())
        squares.append(x.square_().mean().item())
    low, high = min(e.min for e in extremes), max(e.max for e in extremes)
    assert low == -high and 5.1 < high < 5.5
    assert abs(np.mean(squares) - 1) < 5 * math.sqrt(2 / (10 << 22))
    assert torch.equal(augment.hashed_normal(7, 1000, device), augment.hashed_normal(7, 2000, device)[:1000])
    draws = {s: augment.hashed_normal(s, 200_000, device) for s in (0, 1, 12345, 2**31, 2**32 - 1)}
    for x in draws.values():
        assert is_normal(x)
        for lag in (1, 2, 3, 64, 224, 3 * 224, 1 << 16):
            assert uncorrelated(x[lag:], x[:-lag]) and uncorrelated(x[lag:].abs(), x[:-lag].abs())
    pairs = [(a, b) for a in draws for b in draws if a < b]
    assert all(uncorrelated(draws[a], draws[b]) for a, b in pairs)


# ---- augment.py: Mixup and CutMix ----


def mixes(mix, calls, height, width, seed=0):
    """What `calls` calls of `mix` do to ones and zeros: (image 0 of the result (H, W), λ in its target)."""
    inputs, draws = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1).expand(2, 3, height, width), generator(seed)
    for _ in range(calls):
        outputs, targets = mix(inputs, torch.tensor([0, 1]), draws)
        assert torch.equal(outputs[0, 0], outputs[0, 1]) and torch.equal(outputs[0, 1], outputs[0, 2])
        torch.testing.assert_close(outputs[1], 1 - outputs[0])
        yield outputs[0, 0], targets[0, 0].item()


@pytest.mark.parametrize("alpha", [0.8, 0.2])
def test_mixups_lambda_is_beta_and_in_pixels_and_targets_alike(alpha):
    lams = []
    for pixels, lam in mixes(augment.Mixup(alpha, 0, 2, 0), 4_000, 1, 2):
        assert torch.allclose(pixels, torch.tensor(lam), atol=1e-6)
        lams.append(lam)
    beta = np.random.default_rng(5).beta(alpha, alpha, 100_000)
    assert is_like(lams, beta)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(np.mean(lams) - 0.5) < 5 * math.sqrt(variance / 4_000)
    assert abs(np.var(lams) / variance - 1) < 5 * math.sqrt(2 / 4_000)


def test_cutmix_corrects_lambda_to_the_area_left():
    lams = []
    for pixels, lam in mixes(augment.Mixup(0, 1.0, 2, 0), 2_000, 64, 48):
        own = pixels == 1
        assert ((pixels == 0) | own).all() and abs(own.float().mean() - lam) < 1e-6
        rows, columns = (~own).any(dim=1), (~own).any(dim=0)
        assert torch.equal(~own, rows[:, None] & columns)  # one box, not a ring
        assert (rows.int().diff().abs().sum() <= 2) and (columns.int().diff().abs().sum() <= 2)
        lams.append(lam)
    # The same in real numbers: a box of sides √(1 - λ) about a uniform centre, cut at the border.
    rng = np.random.default_rng(6)
    half = np.sqrt(1 - rng.random(100_000)) / 2
    sides = [np.minimum(1, c + half) - np.maximum(0, c - half) for c in rng.random((2, 100_000))]
    real = 1 - sides[0] * sides[1]
    assert abs(np.mean(lams) - real.mean()) < 0.03 and abs(np.std(lams) - real.std()) < 0.02


@pytest.mark.parametrize(("height", "width"), [(1000, 1000), (300, 800)])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75, 0.99])
def test_cutmixs_box_has_sides_of_the_square_root_and_a_uniform_centre(height, width, lam):
    draws = generator()
    boxes = np.array([augment.Mixup.box(lam, height, width, draws) for _ in range(2_000)])
    for low, high, side in [(boxes[:, 0], boxes[:, 1], height), (boxes[:, 2], boxes[:, 3], width)]:
        assert low.min() >= 0 and high.max() <= side and (low <= high).all()
        half = math.sqrt(1 - lam) * side / 2
        whole = (low > 0) & (high < side)
        assert (np.abs(high - low - 2 * half)[whole] <= 2).all()
        # One end is not cut off, or the box would be larger than the image: it tells the centre.
        centre = np.where(high < side, high - half, low + half)
        uncut = (low > 0) | (high < side)
        uniform = np.random.default_rng(7).uniform(0, side, 50_000)
        reach = (uniform - half > 0) | (uniform + half < side)
        assert abs(uncut.mean() - reach.mean()) < 0.05 and is_like(centre[uncut], uniform[reach])
    assert uncorrelated(boxes[:, 0] + boxes[:, 1], boxes[:, 2] + boxes[:, 3])


def test_mixup_or_cutmix_is_a_fair_coin_and_never_neither():
    cuts, lams = [], []
    for pixels, lam in mixes(augment.Mixup(0.8, 50, 2, 0), 3_000, 40, 40):
        cuts.append(((pixels == 0) | (pixels == 1)).all().item())
        assert cuts[-1] or (pixels == pixels[0, 0]).all()
        lams.append(lam)
    cuts, lams = np.array(cuts), np.array(lams)
    assert is_share(cuts, 0.5) and uncorrelated(cuts[1:], cuts[:-1])
    assert is_like(lams[~cuts], np.random.default_rng(8).beta(0.8, 0.8, 50_000))  # each has its own α:
    assert lams[cuts].min() > 0.25  # Beta(50, 50) is narrow


def test_the_partner_is_the_reversed_batch_and_targets_are_mixed_as_inputs():
    inputs = torch.randn(7, 3, 6, 5, generator=generator())
    labels = torch.tensor([3, 0, 9, 9, 4, 1, 3])
    before, draws = inputs.clone(), generator(1)
    partner = torch.from_numpy(inputs.numpy()[::-1].copy())
    smoothed = np.full((7, 10), 0.1 / 10)
    smoothed[np.arange(7), labels] = 0.9 + 0.1 / 10
    for mix in [
        augment.Mixup(0.8, 0, 10, 0.1),
        augment.Mixup(0, 1.0, 10, 0.1),
        augment.Mixup(0.8, 1, 10, 0.1),
    ]:
        for _ in range(50):
            outputs, targets = mix(inputs, labels, draws)
            assert targets.shape == (7, 10) and targets.dtype == torch.float32
            torch.testing.assert_close(targets.sum(dim=1), torch.ones(7))
            lam = ((targets[1, 0] - 0.01) / 0.9).item()
            torch.testing.assert_close(
                targets, torch.from_numpy(lam * smoothed + (1 - lam) * smoothed[::-1]).float()
            )
            if mix.cutmix_alpha == 0:
                expected = lam * inputs + (1 - lam) * partner
                torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
            elif mix.mixup_alpha == 0:
                theirs = (outputs != inputs)[1]
                assert torch.equal(outputs, torch.where(theirs, partner, inputs))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixup_and_cutmix_targets_are_the_smoothed_labels(smoothing):
    inputs, labels = torch.randn(4, 3, 2, 2), torch.tensor([2, 0, 1, 2])
    outputs, targets = augment.Mixup(0, 0, 5, smoothing)(inputs, labels, generator())
    assert torch.equal(outputs, inputs)
    expected = torch.full((4, 5), smoothing / 5)
    expected[range(4), labels] = 1 - smoothing + smoothing / 5
    torch.testing.assert_close(targets, expected)


# ---- augment.py: the whole step, and the sampler ----


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "none", "off"])
def test_a_step_is_flip_policy_normalise_erase_mix_and_follows_its_generator(policy):
    images, labels = noise(16, 3, 20, 20), torch.arange(16) % 10
    step = augment.Augment(10, policy, erasing=0.25, mixup=0.8, cutmix=1.0, smoothing=0.1)
    draws = generator(3)
    expected = images
    if policy != "off":
        expected = augment.random_flip(expected, draws)
        kinds = {"randaugment": augment.RandAugment, "autoaugment": augment.AutoAugment}
        expected = kinds.get(policy, augment.ColorJitter)()(expected, draws)
    expected = augment.RandomErasing(0.25)(augment.normalize(expected), draws)
    expected = augment.Mixup(0.8, 1.0, 10, 0.1)(expected, labels, draws)
    mine = generator(3)
    inputs, targets = step(images, labels, mine)
    assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    assert torch.equal(mine.get_state(), draws.get_state())
    assert not torch.equal(step(images, labels, mine)[0], inputs)  # the next draws are others


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "none", "off"])
@pytest.mark.parametrize("size", [24, 32])
def test_a_step_never_reads_its_pixels_to_decide(policy, size):
    # Tensors of the device `meta` have no values: whoever waited for one would fail, as torch raises there.
    step, draws, real = augment.Augment(10, policy), generator(), generator()
    for seed in range(4):
        images, labels = noise(40, 3, 24, 24, seed=seed), torch.arange(40) % 10
        crops = augment.random_crop(images, size, real)
        inputs, targets = step(crops, labels, real)
        hollow = step(augment.random_crop(images.to("meta"), size, draws), labels.to("meta"), draws)
        assert [x.shape for x in hollow] == [inputs.shape, targets.shape]
        assert torch.equal(draws.get_state(), real.get_state())  # and drew as many numbers on the CPU


def test_keyed_generators_repeat_with_their_key_and_differ_between_keys():
    keys = [(0, "crop", 1, 0), (0, "crop", 1, 1), (0, "crop", 2, 0), (1, "crop", 1, 0), (0, "mix", 1, 0)]
    draws = [torch.rand(50, generator=augment.keyed_generator(*key)) for key in keys]
    assert len({draw.numpy().tobytes() for draw in draws}) == len(keys)
    assert torch.equal(torch.rand(50, generator=augment.keyed_generator(*keys[2])), draws[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "none"])
@pytest.mark.parametrize("size", [32, 40])
def test_a_gpu_gives_the_cpus_pixels_without_a_synchronisation(policy, size):
    images, labels = soft_pictures(256, 32, 32), torch.arange(256) % 10
    there = images.cuda(), labels.cuda()
    step = augment.Augment(10, policy, mixup=0.8, cutmix=1.0)
    for seed in range(4):
        expected = step(augment.random_crop(images, size, generator(seed)), labels, generator(seed + 10))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            inputs, targets = step(
                augment.random_crop(there[0], size, generator(seed)), there[1], generator(seed + 10)
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
        levels = (inputs.cpu() - expected[0]).abs() * 255 * 0.225  # before normalisation
        assert (levels > 1.1).float().mean() < 0.01
        torch.testing.assert_close(targets.cpu(), expected[1])


def deal(size, ranks, epoch=0, **settings):
    """The list that the ranks' shares of an epoch were dealt from."""
    samplers = [augment.RepeatedAugmentSampler(size, ranks, rank, **settings) for rank in range(ranks)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    shares = [list(sampler) for sampler in samplers]
    assert all(len(share) == len(sampler) for share, sampler in zip(shares, samplers, strict=True))
    return np.array(shares).T.ravel()  # rank r has number r, r + W, ...


@pytest.mark.parametrize("size", [5, 100, 255, 256, 1000, 1300])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_repeated_augmentation_shows_a_third_of_the_images_three_times_in_a_row(size, ranks):
    dealt = deal(size, ranks)
    kept = size // 256 * 256 // ranks if size >= 256 else size // ranks
    assert len(dealt) == kept * ranks and dealt.min() >= 0 and dealt.max() < size
    shown = dealt[::3]
    assert np.array_equal(dealt, np.repeat(shown, 3)[: len(dealt)])
    assert len(set(shown.tolist())) == len(shown) == math.ceil(len(dealt) / 3)


def test_each_epoch_and_seed_has_a_shuffle_of_its_own():
    orders = [deal(600, 2, epoch, seed=seed) for epoch, seed in [(0, 0), (1, 0), (2, 0), (0, 1)]]
    assert len({order.tobytes() for order in orders}) == 4
    assert np.array_equal(deal(600, 2, 1), orders[1])
    assert is_like(np.concatenate([deal(600, 1, epoch)[::3] for epoch in range(100)]), np.arange(600))


def test_a_single_repeat_is_a_plain_shuffle():
    for ranks in (1, 2, 3):
        dealt = deal(1000, ranks, num_repeats=1)
        assert len(set(dealt.tolist())) == len(dealt) == 1000 // ranks * ranks
    assert sorted(deal(256, 2, num_repeats=1)) == list(range(256))
    assert deal(256, 2, num_repeats=1).tolist() != list(range(256))


@pytest.mark.parametrize(("size", "ranks", "rank", "repeats"), [(0, 1, 0, 3), (9, 2, 2, 3), (9, 1, 0, 0)])
def test_samplers_that_cannot_be_are_refused(size, ranks, rank, repeats):
    with pytest.raises(ValueError, match=f"no sampler of {size} images"):
        augment.RepeatedAugmentSampler(size, ranks, rank, num_repeats=repeats)


# ---- data.py ----


def test_shapes_depend_on_seed_split_and_index_alone():
    image, label = draw_shape(0, "train", 13, 32)
    again, _ = draw_shape(0, "train", 13, 32)
    assert (image.size, image.mode, label) == ((32, 32), "RGB", 3)
    assert image.tobytes() == again.tobytes()
    others = [
        draw_shape(*key, 32)[0].tobytes() for key in ((1, "train", 13), (0, "val", 13), (0, "train", 23))
    ]
    assert len({image.tobytes(), *others}) == 4
    drawn = draw_shapes("val", 30, 48, CPU)
    assert (drawn.images.shape, drawn.images.dtype) == ((30, 3, 48, 48), torch.uint8)
    assert drawn.labels.bincount().tolist() == [3] * 10


def test_shapes_that_no_memory_holds_are_refused():
    with pytest.raises(UsageError, match="8000 shapes of 1024 pixels are more than 8 GiB"):
        draw_shapes("train", 8000, 1024, CPU)


def test_shapes_have_easy_cues_that_tell_half_of_the_images():
    """The hue of the brightest pixels is near the class's own much more often than by chance."""
    near = []
    for index in range(600):
        image, label = draw_shape(0, "train", index, 32)
        hue, saturation, value = np.asarray(image.convert("HSV")).reshape(-1, 3).T.astype(float)
        brightest = value * saturation >= np.quantile(value * saturation, 0.9)
        near.append(abs((np.median(hue[brightest]) / 256 - label / 10 + 0.5) % 1 - 0.5) < 0.08)
    assert 0.35 < np.mean(near) < 0.75  # by chance 0.16


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


def test_a_folder_of_equal_small_images_is_held_and_another_is_streamed(tmp_path):
    held = load_data("folder", str(write_folder(tmp_path / "a", [(20, 20)])), 20, CPU)[0]
    streamed = load_data("folder", str(write_folder(tmp_path / "b", [(50, 40), (30, 60)])), 20, CPU)[0]
    assert isinstance(held, ArraySet)
    assert isinstance(streamed, FolderSet)
    assert held.classes == streamed.classes == ["ant", "bee"]
    assert held.labels.tolist() == streamed.labels == [0] * 6 + [1] * 6
    with Image.open(tmp_path / "a/train/bee/2.png") as image:
        assert torch.equal(held.images[8], torch.from_numpy(np.array(image)).permute(2, 0, 1))


def collect(data, start, stop, *, repeats=1, crop=True, workers=0, world=1, rank=0, batch=4, size=24):
    sampler = RepeatedAugmentSampler(len(data), world, rank, repeats, seed=5)
    options = {"start": start, "stop": stop, "crop": crop, "workers": workers, "device": CPU}
    options["per_epoch"] = len(sampler) // batch
    return list(train_batches(data, size, batch, sampler, **options))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stream_of_batches_continues_from_anywhere_with_any_number_of_workers(tmp_path, streamed):
    sizes = [(50, 40), (30, 60)] if streamed else [(30, 30)]
    data = load_data("folder", str(write_folder(tmp_path, sizes)), 24, CPU)[0]
    whole = collect(data, 0, 8)  # 12 images, 3 batches an epoch
    assert all(images.shape == (4, 3, 24, 24) and images.dtype == torch.uint8 for images, _ in whole)
    for epoch in (0, 3):
        assert (
            sorted(torch.cat([labels for _, labels in whole[epoch : epoch + 3]]).tolist())
            == [0] * 6 + [1] * 6
        )
    assert not torch.equal(whole[0][0], whole[3][0])
    for start, workers in ((0, 2), (4, 0), (5, 2)):
        for (a, x), (b, y) in zip(whole[start:], collect(data, start, 8, workers=workers), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(x, y)


def test_the_processes_of_a_step_share_what_one_process_would_take(tmp_path):
    data = draw_shapes("train", 24, 24, CPU)
    one = collect(data, 0, 4, crop=False)
    two = [collect(data, 0, 4, crop=False, world=2, rank=rank, batch=2) for rank in (0, 1)]
    for step in range(4):
        both = [torch.stack([two[0][step][k], two[1][step][k]], dim=1).flatten(0, 1) for k in (0, 1)]
        assert torch.equal(one[step][0], both[0])
        assert torch.equal(one[step][1], both[1])


def test_an_images_repeats_are_decoded_once_and_cropped_differently(tmp_path, monkeypatch):
    data = load_data("folder", str(write_folder(tmp_path, [(50, 40), (30, 60)])), 24, CPU)[0]
    reads = []
    monkeypatch.setattr("data.read_image", lambda path, enough: reads.append(path) or read_image(path))
    images = collect(data, 0, 1, repeats=3, batch=12)[0][0]
    assert len(reads) == len(set(reads)) == 4
    assert len({image.numpy().tobytes() for image in images}) == 12


@pytest.mark.parametrize("streamed", [False, True])
def test_evaluation_sees_every_image_once_over_all_processes(tmp_path, streamed):
    sizes = [(50, 40), (30, 60)] if streamed else [(30, 30)]
    data = load_data("folder", str(write_folder(tmp_path, sizes)), 24, CPU)[1]
    options = {"world": 3, "workers": 0, "device": CPU}
    shares = [list(eval_batches(data, 24, 3, rank=rank, **options)) for rank in range(3)]
    images = torch.cat([images for share in shares for images, _ in share])
    whole = torch.cat([images for images, _ in eval_batches(data, 24, 5, rank=0, **options | {"world": 1})])
    assert len(images) == 12
    assert {i.numpy().tobytes() for i in images} == {i.numpy().tobytes() for i in whole}


@pytest.mark.parametrize(("size", "short"), [(56, 64), (48, 54), (45, 51)])
def test_evaluation_crops_as_torchvisions_resize_and_centre_crop(size, short):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    expected = torchvision.transforms.Resize(short, bicubic)(image)
    expected = np.asarray(torchvision.transforms.CenterCrop(size)(expected)).transpose(2, 0, 1)
    assert np.array_equal(crop_file(image, size, None), expected)


def test_pictures_of_every_kind_are_read_upright_and_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn it clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(pixels, -1))
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image.convert(mode).save(tmp_path / f"{mode}.tiff")
        assert (read_image(tmp_path / f"{mode}.tiff").mode, read_image(tmp_path / f"{mode}.tiff").size) == (
            "RGB",
            (12, 8),
        )


def test_16_bits_of_grey_are_scaled_and_transparent_pictures_lie_on_white(tmp_path):
    grey = np.arange(96, dtype=np.uint16).reshape(8, 12) * 690
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.int32)).save(tmp_path / "grey.tiff")
    for name in ("grey.png", "grey.tiff"):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.stack([grey // 256] * 3, axis=2))
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "RGBA.png")
    picture.quantize(4).save(tmp_path / "P.png")
    for name in ("RGBA.png", "P.png"):
        image = read_image(tmp_path / name)
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]
    Image.new("LA", (1, 1), (100, 102)).save(tmp_path / "LA.png")
    assert read_image(tmp_path / "LA.png").getpixel((0, 0)) == (193, 193, 193)  # 0.4 · 100 + 0.6 · 255
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "F.tiff")
    with pytest.raises(UsageError, match="no known range; save it with 8 or 16 bits"):
        read_image(tmp_path / "F.tiff")


def test_a_very_long_image_is_cropped_as_its_centre_is():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20_000, 3), dtype=np.uint8)
    centre = Image.fromarray(pixels[:, 9_976:10_024])
    for turn in (lambda image: image, lambda image: image.transpose(Image.Transpose.ROTATE_90)):
        assert torch.equal(
            crop_file(turn(Image.fromarray(pixels)), 16, None), crop_file(turn(centre), 16, None)
        )


def test_large_photographs_are_decoded_at_a_size_that_is_enough(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((1200, 800), Image.Resampling.BICUBIC)
    image.save(tmp_path / "photo.jpg", quality=95)
    sizes = [read_image(tmp_path / "photo.jpg", enough).size for enough in (None, 401, 400, 201, 200, 1)]
    assert sizes == [(1200, 800)] * 2 + [(600, 400)] * 2 + [(300, 200), (150, 100)]
    full, quarter = (read_image(tmp_path / "photo.jpg", enough) for enough in (None, 200))
    full = full.resize((300, 200), Image.Resampling.BOX)
    assert np.abs(np.asarray(full, int) - np.asarray(quarter, int)).mean() < 2


def test_a_broken_image_is_named_even_by_a_worker(tmp_path):
    data = load_data("folder", str(write_folder(tmp_path, [(50, 40), (30, 60)])), 24, CPU)[0]
    (tmp_path / "train/bee/3.png").write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(UsageError, match=r"bee/3\.png is not a readable image") as caught:
            collect(data, 0, 3, workers=workers)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streamed", [False, True])
def test_broken_images_can_be_left_out_and_are_counted(tmp_path, streamed):
    sizes = [(50, 40), (30, 60)] if streamed else [(30, 30)]
    write_folder(tmp_path, sizes)
    bad = {str(tmp_path / f"{split}/bee/{n}.png") for split in ("train", "val") for n in (2, 3)}
    for path in bad:
        Path(path).write_bytes(b"no picture")
    train_set, val_set = load_data("folder", str(tmp_path), 24, CPU, skip_broken=True)
    assert isinstance(train_set, FolderSet) == streamed
    batches = collect(train_set, 0, 2, crop=True, batch=5, workers=2 * streamed)
    assert all(images.shape == (5, 3, 24, 24) and labels.shape == (5,) for images, labels in batches)
    options = {"rank": 0, "world": 1, "workers": 0, "device": CPU}
    labels = torch.cat([labels for _, labels in eval_batches(val_set, 24, 3, **options)])
    assert labels.tolist() == [0] * 6 + [1] * 4
    assert train_set.broken | val_set.broken == bad


def test_a_batch_without_any_readable_image_is_an_error(tmp_path):
    data = load_data("folder", str(write_folder(tmp_path, [(50, 40), (30, 60)])), 24, CPU, skip_broken=True)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match="none of the images of a batch can be read"):
        collect(data[0], 0, 1)
    with pytest.raises(UsageError, match="none of the validation images can be read"):
        evaluate(nn.Flatten(), data[1], complete({"img_size": 24}), ALONE)


def test_folders_that_make_no_data_set_are_refused(tmp_path):
    write_folder(tmp_path / "a", [(8, 8)], splits=("train",))
    with pytest.raises(UsageError, match="there is no folder .*val"):
        load_data("folder", str(tmp_path / "a"), 8, CPU)
    write_folder(tmp_path / "a", [(8, 8)], ("ant", "cow"), ("val",))
    with pytest.raises(UsageError, match="the class 'cow', which train has not"):
        load_data("folder", str(tmp_path / "a"), 8, CPU)
    write_folder(tmp_path / "empty", [(8, 8)])
    (tmp_path / "empty/train/dog").mkdir()
    with pytest.raises(UsageError, match="there is no image in .*train/dog"):
        load_data("folder", str(tmp_path / "empty"), 8, CPU)
    (tmp_path / "b/train/ant").mkdir(parents=True)
    (tmp_path / "b/val").mkdir()
    with pytest.raises(UsageError, match="there is no images, in .*train"):
        load_data("folder", str(tmp_path / "b"), 8, CPU)
    (tmp_path / "b/train/ant").rmdir()
    with pytest.raises(UsageError, match="no images in class folders below"):
        load_data("folder", str(tmp_path / "b"), 8, CPU)
    write_folder(tmp_path / "c", [(8, 8)], splits=("train",))
    (tmp_path / "c/val/ant").mkdir(parents=True)
    with pytest.raises(UsageError, match="there is no images, in .*val"):
        load_data("folder", str(tmp_path / "c"), 8, CPU)


@pytest.mark.parametrize("size", [(8, 8), (2000, 8)])
def test_a_validation_set_may_lack_a_class_and_keeps_trains_labels(tmp_path, size):
    write_folder(tmp_path, [size], ("ant", "bee", "cow"), ("train",))
    write_folder(tmp_path, [size], ("ant", "cow"), ("val",))
    (tmp_path / "val/bee").mkdir()
    for splits in (("train", "val"), ("val",)):
        val_set = load_data("folder", str(tmp_path), 8, CPU, splits)[-1]
        assert list(val_set.labels) == [0] * 6 + [2] * 6
        assert val_set.classes == ["ant", "bee", "cow"]


@pytest.fixture
def matlab(tmp_path, monkeypatch):
    """A stand-in for scipy, which the tests do without: it reads the .mat files that `matlab` writes.

    They hold what scipy finds in the true ones: arrays by name, a structure as an array of records.
    """
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy/__init__.py").touch()
    loader = "import numpy\ndef loadmat(path, squeeze_me):\n    return numpy.load(path, allow_pickle=True)\n"
    (tmp_path / "scipy/io.py").write_text(loader)
    monkeypatch.syspath_prepend(tmp_path)

    def write(path, **arrays):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    yield write
    for name in ("scipy.io", "scipy"):
        sys.modules.pop(name, None)


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)


def names_of(data):
    return [
        (Path(path).name, data.classes[label]) for path, label in zip(data.paths, data.labels, strict=True)
    ]


def test_flowers_train_on_the_train_and_val_splits_and_are_tested_on_the_test_split(
    tmp_path, monkeypatch, matlab
):
    base = tmp_path / "flowers-102"
    for n in range(1, 8):
        write_picture(base / f"jpg/image_{n:05d}.jpg")
    matlab(base / "imagelabels.mat", labels=np.array([1, 102, 3, 1, 2, 2, 3], dtype=np.uint8))
    splits = {"trnid": [4, 2], "valid": [7], "tstid": [1, 3, 5, 6]}
    matlab(base / "setid.mat", **{name: np.array(ids, dtype=np.uint16) for name, ids in splits.items()})
    with monkeypatch.context() as patch:  # torchvision knows the true files' MD5
        patch.setattr(
            "torchvision.datasets.flowers102.check_integrity", lambda path, md5: path.endswith(".mat")
        )
        train_set, val_set = load_data("flowers102", str(tmp_path), 8, CPU)
    assert len(train_set.classes) == 102
    first, second, third, last = (train_set.classes[n] for n in (0, 1, 2, 101))
    assert names_of(train_set) == [
        ("image_00004.jpg", first), ("image_00002.jpg", last), ("image_00007.jpg", third)
    ]  # fmt: skip
    assert [name for _, name in names_of(val_set)] == [first, third, second, second]
    images, labels = collect(val_set, 0, 1, batch=4, size=8)[0]
    assert (images.shape, sorted(labels.tolist())) == ((4, 3, 8, 8), [0, 1, 1, 2])


def test_cars_are_read_from_the_files_that_one_has(tmp_path, matlab):
    base, records = tmp_path / "stanford_cars", [("fname", "O"), ("class", "u1")]
    with pytest.raises(
        UsageError, match="no .*/stanford_cars/cars_train; .* put cars_train, cars_test, devkit"
    ):
        load_data("cars", str(tmp_path), 8, CPU)
    for split, count in (("train", 3), ("test", 2)):
        for n in range(1, count + 1):
            write_picture(base / f"cars_{split}/{n:05d}.jpg")
    matlab(base / "devkit/cars_meta.mat", class_names=np.array(["AM General Hummer", "Acura RL"], dtype="O"))
    annotations = np.array([("00002.jpg", 2), ("00003.jpg", 1), ("00001.jpg", 1)], dtype=records)
    matlab(base / "devkit/cars_train_annos.mat", annotations=annotations)
    with pytest.raises(UsageError, match="no .*/stanford_cars/cars_test_annos_withlabels.mat"):
        load_data("cars", str(tmp_path), 8, CPU)
    annotations = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=records)
    matlab(base / "cars_test_annos_withlabels.mat", annotations=annotations)
    train_set, val_set = load_data("cars", str(tmp_path), 8, CPU)
    hummer, acura = "AM General Hummer", "Acura RL"
    assert names_of(train_set) == [("00002.jpg", acura), ("00003.jpg", hummer), ("00001.jpg", hummer)]
    assert names_of(val_set) == [("00001.jpg", acura), ("00002.jpg", hummer)]
    assert read_image(val_set.paths[0]).size == (20, 20)
    (base / "devkit/cars_meta.mat").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="the labels in .*stanford_cars cannot be read"):
        load_data("cars", str(tmp_path), 8, CPU)


@pytest.mark.parametrize("name", ["flowers102", "cars"])
def test_labels_in_matlab_files_ask_for_scipy_before_anything_is_downloaded(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"the labels of {name} are MATLAB files.*: pip install scipy"):
        load_data(name, str(tmp_path), 8, CPU)


@pytest.mark.parametrize("year", ["2018", "2019"])
def test_inaturalist_is_split_by_the_competitions_lists(tmp_path, year):
    def load():
        return load_data(f"inat{year}", str(tmp_path), 8, CPU)

    with pytest.raises(UsageError, match=f"no folder .*/{year}; .*INaturalist.*'{year}', download=True"):
        load()
    pictures = {"train": ["Aves/1/a.jpg", "Plantae/0/b.jpg", "Aves/2/c.jpg"], "val": ["Aves/2/d.jpg"]}
    for name in sum(pictures.values(), []):
        write_picture(tmp_path / year / name)  # torchvision renames train_val2018 so
    for split, names in pictures.items():
        with pytest.raises(
            UsageError, match=f"no .*/{split}{year}.json, which tells the split; unpack .*tar.gz"
        ):
            load()
        images = [{"id": n, "file_name": f"train_val{year}/{name}"} for n, name in enumerate(names)]
        (tmp_path / f"{split}{year}.json").write_text(json.dumps({"images": images}))
    train_set, val_set = load()
    assert train_set.classes == val_set.classes == ["Plantae/0", "Aves/1", "Aves/2"]  # by their numbers
    assert names_of(train_set) == [("a.jpg", "Aves/1"), ("b.jpg", "Plantae/0"), ("c.jpg", "Aves/2")]
    assert names_of(val_set) == [("d.jpg", "Aves/2")]
    assert read_image(val_set.paths[0]).size == (20, 20)
    for damage in ("{", '{"images": [{"file_name": "x/Fungi/9/e.jpg"}]}', "[]"):
        (tmp_path / f"val{year}.json").write_text(damage)
        with pytest.raises(UsageError, match=f"{year} and .*val{year}.json do not go together"):
            load()


# ---- train.py ----

QUICK = {"img_size": 16, "patch_size": 8, "epochs": 3, "batch_size": 16, "lr": 3e-3, "device": "cpu"}
PLAIN = {"augment": "off", "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}


SHALLOW = partialmethod(DeiT.__init__, depth=2)


@pytest.fixture
def small(monkeypatch):
    """A transformer that is quick to compute and to write."""
    monkeypatch.setitem(SIZES, "tiny", (64, 1))
    monkeypatch.setattr(DeiT, "__init__", SHALLOW)


@pytest.fixture
def few_shapes(monkeypatch, small):
    monkeypatch.setattr("data.SHAPES_COUNT", {"train": 54, "val": 20})  # 3 batches of 16 and a rest


# Runs that are to be killed, or of several processes, are forked from a server that has imported everything
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_all"])


def child(act, words, environment, count, told):
    """The body of a forked process: act() as a script with the arguments `words`, which tells a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    data.SHAPES_COUNT = {"train": count, "val": 19}
    SIZES["tiny"], DeiT.__init__ = (64, 1), SHALLOW
    sys.argv = ["script", *words]
    sys.stdout = sys.stderr = open(told, "w")  # noqa: SIM115
    act()


def fork(act, words, environment=(), count=54, told=os.devnull):
    process = SERVER.Process(target=child, args=(act, words, dict(environment), count, told))
    process.start()
    return process


def fork_many(act, words, told=os.devnull, count=54, world=2, machines=1):
    """The same in several processes, as torchrun starts them. All end well; what the first one told."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    local = world // machines
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    common["LOCAL_WORLD_SIZE"] = str(local)
    started = []
    for rank in range(world):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank % local)}
        started.append(fork(act, words, own, count, os.devnull if rank else told))
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * world
    return Path(told).read_text()


def run_script(script, act, monkeypatch, *words):
    """What `python SCRIPT WORDS` does, in this process; the exit code."""
    monkeypatch.setattr("sys.argv", [script, *map(str, words)])
    try:
        program(act)
    except SystemExit as ended:
        return ended.code
    return 0


run_train = partial(run_script, "train.py", main)
run_finetune = partial(run_script, "finetune.py", finetune.main)
run_evaluate = partial(run_script, "evaluate.py", measure.main)


def flags(settings):
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]


def test_the_imagenet_recipe_is_table_9():
    settings = complete({"data": "imagenet"})
    table = dict(
        epochs=300, batch_size=1024, optimizer="adamw", lr=0.0005, weight_decay=0.05, warmup_epochs=5
    )
    table |= dict(smoothing=0.1, dropout=0, drop_path=0.1, repeats=3, clip_grad=0, augment="randaugment")
    table |= dict(mixup=0.8, cutmix=1.0, erasing=0.25)
    table |= dict(
        warmup_lr=1e-6, min_lr=1e-5, tau=3.0, lam=0.1, img_size=224, patch_size=16, teacher="regnet_y_16gf"
    )
    assert {name: settings[name] for name in table} == table


def test_learning_rate_warms_up_linearly_and_falls_as_torchs_cosine():
    settings = complete({"data": "imagenet"})
    peak = 0.0005 * 1024 / 512
    rates = [learning_rate(step, 100, 20, settings) for step in range(101)]
    np.testing.assert_allclose(rates[:21], np.linspace(1e-6, peak, 21))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80, eta_min=1e-5)
    for rate in rates[20:]:
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        schedule.step()


def test_weight_decay_spares_biases_norms_tokens_and_position_embeddings():
    model = create_model("tiny", distilled=True)
    decayed, spared = build_optimizer(model, complete({})).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    kept = {id(p) for p in spared["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in kept}
    every = dict(model.named_parameters())
    assert names == {n for n in every if re.search("norm|bias|_token$|^pos_embed$", n)}
    assert len(decayed["params"]) + len(names) == len(list(model.parameters()))


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights_of(out):
    return read_checkpoint(out / "last.pth")["model"]


def test_accumulated_parts_give_the_step_of_the_whole_batch(tmp_path, monkeypatch, few_shapes):
    for parts in (1, 4):
        assert (
            run_train(
                monkeypatch, *flags(QUICK | PLAIN | {"accumulate": parts, "out": tmp_path / str(parts)})
            )
            == 0
        )
    logs = [read_log(tmp_path / str(parts)) for parts in (1, 4)]
    assert [r["loss"] for r in logs[0]] == pytest.approx([r["loss"] for r in logs[1]], rel=1e-4)
    for a, b in zip(weights_of(tmp_path / "1").values(), weights_of(tmp_path / "4").values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    "extra", [{}, {"ema": 0.9, "drop_path": 0.2, "dropout": 0.1, "repeats": 3, "optimizer": "sgd"}]
)
def test_a_run_that_is_cut_off_and_resumed_ends_bit_for_bit_as_if_it_never_was(
    tmp_path, monkeypatch, few_shapes, extra
):
    assert run_train(monkeypatch, *flags(QUICK | extra | {"out": tmp_path / "whole"})) == 0

    class Cut(Exception):
        pass

    def evaluate_twice(*arguments):
        if (tmp_path / "cut/last.pth").exists():
            raise Cut
        return evaluate(*arguments)

    monkeypatch.setattr("train.evaluate", evaluate_twice)
    with pytest.raises(Cut):
        run_train(monkeypatch, *flags(QUICK | extra | {"out": tmp_path / "cut"}))
    monkeypatch.setattr("train.evaluate", evaluate)
    assert (
        run_train(monkeypatch, "--out", tmp_path / "cut", "--resume") == 0
    )  # the other settings are the run's own
    whole, cut = (read_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "cut"))
    for part in ("model", "ema") if extra else ("model",):
        assert all(torch.equal(value, cut[part][key]) for key, value in whole[part].items())
    assert (tmp_path / "whole/log.jsonl").read_text() == (tmp_path / "cut/log.jsonl").read_text()
    assert whole["progress"] == cut["progress"]


def test_a_streamed_run_that_is_cut_off_resumes_bit_for_bit_too(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", [(30, 24), (20, 26)])
    words = {
        "data": "folder",
        "data_path": data,
        "img_size": 16,
        "patch_size": 8,
        "epochs": 2,
        "batch_size": 6,
    }
    words |= {"drop_path": 0.5, "lr": 0.01, "device": "cpu", "workers": 1}
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "whole"})) == 0

    def evaluate_once(*arguments):
        if (tmp_path / "cut/last.pth").exists():
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr("train.evaluate", evaluate_once)
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "cut"})) == 130
    monkeypatch.setattr("train.evaluate", evaluate)
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "cut"}), "--resume") == 0
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())


def test_a_streamed_run_stops_for_a_signal_to_all_its_processes(tmp_path):
    write_folder(tmp_path / "data", [(300, 240), (200, 260)])
    words = QUICK | {"data": "folder", "data_path": tmp_path / "data", "epochs": 10_000, "workers": 2}
    command = [sys.executable, "train.py", *flags(words | {"batch_size": 4, "out": tmp_path / "run"})]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "run/last.pth").exists():
        time.sleep(0.2)
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGTERM)  # which reaches its workers too
    error = run.communicate(timeout=60)[1].decode()
    assert run.returncode == 128 + signal.SIGTERM, error
    assert re.fullmatch(r"stopped by SIGTERM after step .*\n", error)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_trains_with_clipping_accumulation_and_average(
    tmp_path, monkeypatch, few_shapes, precision
):
    words = QUICK | {
        "precision": precision,
        "clip_grad": 1.0,
        "accumulate": 2,
        "ema": 0.9,
        "distill": "label",
    }
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "run"})) == 0
    contents = read_checkpoint(tmp_path / "run/last.pth")
    assert bool(contents["scaler"]) == (precision == "fp16")
    assert all(
        value.dtype == torch.float32 and value.isfinite().all() for value in contents["model"].values()
    )
    assert read_log(tmp_path / "run")[-1]["loss"] < 2.5


def test_a_short_run_warms_up_for_a_tenth_of_it_unless_told_otherwise():
    assert complete({"data": "imagenet"})["warmup_epochs"] == 5
    assert complete({"data": "imagenet", "epochs": 20})["warmup_epochs"] == 2
    assert complete({"data": "imagenet", "epochs": 20, "warmup_epochs": 7.0})["warmup_epochs"] == 7


def test_the_moving_average_is_one_of_the_weights(tmp_path, monkeypatch, few_shapes):
    seen = []
    plain = nn.Module.state_dict

    def build(settings, classes):
        network = build_network(settings, classes)
        seen.append(network)
        return network

    class Watched(torch.optim.AdamW):
        def step(self, *arguments):
            super().step(*arguments)
            seen.append({key: value.clone() for key, value in plain(seen[0]).items()})

    monkeypatch.setattr("train.build_network", build)
    monkeypatch.setattr("torch.optim.AdamW", Watched)
    assert run_train(monkeypatch, *flags(QUICK | {"ema": 0.8, "out": tmp_path / "run"})) == 0
    torch.manual_seed(0)
    average = create_model(
        "tiny", num_classes=10, img_size=16, patch_size=8
    ).state_dict()  # the initial weights
    for weights in seen[1:]:
        average = {key: 0.8 * average[key] + 0.2 * weights[key] for key in weights}
    for key, value in read_checkpoint(tmp_path / "run/last.pth")["ema"].items():
        torch.testing.assert_close(value, average[key])


def record():
    """A training run that leaves each process's losses and the sums of its weights in OUT/rankN.json."""
    losses, networks = [], []

    def recorded_loss(settings, teacher):
        loss = plain_loss(settings, teacher)

        def recorded(*arguments):
            value = loss(*arguments)
            mean = value.detach().clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)
                mean /= torch.distributed.get_world_size()
            losses.append(mean.item())
            return value

        return recorded

    def kept(*arguments):
        networks.append(build_network(*arguments))
        return networks[-1]

    plain_loss, train.loss_function, train.build_network = train.loss_function, recorded_loss, kept
    main()
    digest = {key: value.double().sum().item() for key, value in networks[-1].state_dict().items()}
    rank, out = os.environ.get("RANK", "0"), Path(sys.argv[sys.argv.index("--out") + 1])
    (out / f"rank{rank}.json").write_text(json.dumps({"losses": losses, "digest": digest}))


def test_two_processes_follow_one_and_end_with_identical_weights(tmp_path):
    words = flags(QUICK | PLAIN)
    fork(record, [*words, "--out", str(tmp_path / "one")], count=48).join()
    fork_many(record, [*words, "--out", str(tmp_path / "two")], count=48)
    one, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("one/rank0.json", "two/rank0.json", "two/rank1.json")
    )
    assert len(one["losses"]) == 9
    assert one["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert first == second
    ends = [read_log(tmp_path / name)[-1]["accuracy"]["class"] for name in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], abs=0.01)  # 19 images: they do not divide evenly


def test_two_processes_keep_one_teacher_with_one_set_of_batchnorm_statistics(tmp_path):
    fork_many(record, flags(QUICK | {"model": "regnet_y_200mf", "epochs": 1, "out": tmp_path / "run"}))
    first, second = (json.loads((tmp_path / f"run/rank{rank}.json").read_text()) for rank in (0, 1))
    assert any("running_var" in key for key in first["digest"])
    assert first == second


def test_evaluation_scores_each_head_and_their_fusion():
    scores = (
        torch.tensor([[3.0, 0, 0], [0, 0, 2], [0, 4, 0]]),
        torch.tensor([[0, 5.0, 0], [0, 0, 1], [3, 0, 0]]),
    )
    images, labels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 0])

    class Student(nn.Module):
        distilled = True

        def forward(self, inputs):
            return scores

    settings = complete(QUICK | {"img_size": 8})
    accuracy = evaluate(Student(), ArraySet(images, labels, ["a", "b", "c"]), settings, ALONE)
    # class: right, right, wrong; distillation: wrong, right, right; fused: 0.91 + 0.01 < 0.05 + 0.99 wrong,
    # the second right, and 0.02 + 0.91 < 0.96 + 0.05 wrong
    assert accuracy == pytest.approx({"class": 200 / 3, "distillation": 200 / 3, "fused": 100 / 3}, rel=1e-5)


def test_a_teacher_is_trained_once_and_reused_by_every_student(tmp_path, monkeypatch, few_shapes, capsys):
    common = QUICK | {"teacher": "resnet18", "teacher_epochs": 1, "distill": "hard", "epochs": 1}
    for seed in (0, 1):
        assert run_train(monkeypatch, *flags(common | {"seed": seed, "out": tmp_path / f"s{seed}"})) == 0
        assert ("trained earlier" in capsys.readouterr().out) == (seed == 1)
    teachers = list(tmp_path.glob("teacher-shapes-16px-resnet18-*/last.pth"))
    assert len(teachers) == 1
    student = read_checkpoint(tmp_path / "s1/last.pth")
    assert student["settings"]["teacher_weights"] == str(teachers[0])
    assert not list(tmp_path.glob("s?/teacher-*"))
    assert set(student["model"]) == set(
        create_model("tiny", img_size=16, patch_size=8, distilled=True).state_dict()
    )


MISTAKES = {
    "--epoch 3": "unrecognized arguments: --epoch 3; did you mean --epochs?",
    "--learning-rate 1": "unrecognized arguments: --learning-rate 1; see train.py --help",
    "tiny": "unrecognized arguments: tiny",
    "--model": "argument --model: expected one argument",
    "--lr -1": "argument --lr: -1 is not allowed: it must be at least 0",
    "--lr nan": "nan is not allowed: it must be at least 0",
    "--lr fast": "invalid number value: 'fast'",
    "--epochs 0": "0 is not allowed: it must be at least 1",
    "--epochs 1.5": "invalid whole number value: '1.5'",
    "--batch-size 0": "argument --batch-size: 0 is not allowed",
    "--smoothing 1": "1 is not allowed: it must be at least 0 and below 1",
    "--drop-path 1": "argument --drop-path: 1 is not allowed",
    "--dropout -0.1": "argument --dropout: -0.1 is not allowed",
    "--erasing 2": "2 is not allowed: it must be at least 0 and at most 1",
    "--tau 0": "argument --tau: 0 is not allowed",
    "--lam 1.5": "argument --lam: 1.5 is not allowed",
    "--repeats 0": "argument --repeats: 0 is not allowed",
    "--seed -1": "argument --seed: -1 is not allowed",
    "--workers -2": "argument --workers: -2 is not allowed",
    "--save-every -1": "argument --save-every: -1 is not allowed",
    "--data cifar": "'cifar' is not one of shapes, cifar10",
    "--data cifar-10": "; did you mean cifar10?",
    "--distill strong": "'strong' is not one of none, soft, hard, label",
    "--augment randaug": "; did you mean randaugment?",
    "--optimizer adam": "; did you mean adamw?",
    "--precision fp8": "'fp8' is not one of auto, fp32, bf16, fp16",
    "--device tpu": "'tpu' is not one of auto, cuda, mps, cpu",
    "--device mps": "no Apple GPU",
    "--model huge": "unknown network 'huge'",
    "--model regnet_y_16g": "; did you mean regnet_y_16gf?",
    "--distill hard --teacher resnet": "unknown network 'resnet'",
    "--img-size 30 --patch-size 8": "30 is not a multiple of patch size 8; try image size 32",
    "--patch-size 64": "32 is not a multiple of patch size 64; try image size 64",
    "--img-size 1000000": "1000000 is not allowed: it must be at least 1 and at most 4096",
    "--img-size 1024 --patch-size 2": "512×512 patches are more than 256×256; raise --patch-size",
    "--batch-size 30 --accumulate 4": "does not divide into 1 processes × 4 parts; try 32",
    "--batch-size 65": "is more than an epoch's 64 images",
    "--epochs 3 --warmup-epochs 3": "--warmup-epochs must be less than --epochs, 3",
    "--data folder --data-path nowhere": "there is no folder nowhere; name the data set's with --data-path",
    "--data folder --data-path notes.txt": "there is no folder notes.txt",
    "--data folder --data-path empty": "there is no folder empty/train; --data-path must hold train/CLASS/*",
    "--distill label --no-distill-token": "needs a transformer and no --no-distill-token",
    "--distill label --model resnet18": "it needs a transformer",
    "--distill hard --teacher-weights none.pth": "there is no file none.pth; --teacher-weights takes",
    "--distill hard --teacher-weights notes.txt": "notes.txt is not a checkpoint that can be read safely",
    "--distill hard --teacher-weights evil.pth": "evil.pth is not a checkpoint that can be read safely",
    "--distill hard --teacher tiny --teacher-weights seven.pth": "does not fit a tiny for 10 classes",
    "--distill hard --teacher small --teacher-weights seven.pth": "seven.pth holds a tiny, not a small",
    "--distill hard --teacher-weights http://127.0.0.1:9/teacher.pth": "could not download http://127.0.0.1:9",
    "--distill hard --teacher regnet_y_4gf --teacher-weights published": "torchvision has no weights",
    "--model maxvit_t": "maxvit_t cannot be used on images of 32 pixels",
    "--model regnet_y_200mf --img-size 4 --batch-size 1": "cannot learn from single images of 4 pixels",
    "--out /proc/nowhere": "choose another --out",
    "--out notes.txt/run": "cannot make the directory notes.txt/run: Not a directory; choose another --out",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_end_with_one_line_and_exit_code_2(tmp_path, monkeypatch, small, capsys, words):
    monkeypatch.setattr("data.SHAPES_COUNT", {"train": 64, "val": 20})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    torch.save({"model": Mischief(tmp_path / "made")}, tmp_path / "evil.pth")
    seven = create_model("tiny", num_classes=7, img_size=32, patch_size=8).state_dict()
    torch.save({"model": seven}, tmp_path / "seven.pth")
    before = set(tmp_path.rglob("*.pth"))
    assert run_train(monkeypatch, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert MISTAKES[words] in error
    assert error.count("\n") == 1
    assert set(tmp_path.rglob("*.pth")) == before
    assert not (tmp_path / "made").exists()


def random_words(rng):
    """Flags at random: most of their values are sensible, some are not."""
    values = {
        "data": ["shapes", "folder", "cifar"],
        "data_path": ["pictures", "broken", "nowhere", "notes.txt"],
        "model": ["tiny", "small", "resnet18", "regnet_y_200mf", "vit_b_16", "tinny"],
        "img_size": [1, 4, 8, 16, 20, 32, 0, 10**6],
        "patch_size": [1, 2, 4, 8, 16, 3, 10**6],
        "distill": ["none", "soft", "hard", "label", "x"],
        "teacher": ["tiny", "regnet_y_200mf", "resnet18", "mobilenet_v2"],
        "teacher_weights": ["", "tiny.pth", "notes.txt", "none.pth"],
        "augment": ["randaugment", "autoaugment", "none", "off"],
        "mixup": [0, 0.8, 1e-9, 1e9, -1],
        "cutmix": [0, 1.0, 1e-9, 1e9],
        "erasing": [0, 0.25, 1, 1.5],
        "repeats": [1, 2, 3, 1000],
        "smoothing": [0, 0.1, 0.999, 1],
        "dropout": [0, 0.5, 0.999],
        "drop_path": [0, 0.1, 0.999],
        "ema": [0, 0.5, 0.99996],
        "tau": [1, 3, 1e-6, 1e6],
        "lam": [0, 0.1, 1],
        "optimizer": ["adamw", "sgd"],
        "lr": [0, 1e-3, 1, 1e3, 1e30],
        "min_lr": [0, 1e-5, 10],
        "warmup_lr": [0, 1e-6, 10],
        "warmup_epochs": [0, 0.5, 5],
        "weight_decay": [0, 0.05, 100],
        "clip_grad": [0, 1e-9, 1],
        "epochs": [1],
        "teacher_epochs": [1],
        "batch_size": [1, 2, 4, 8, 7, 100],
        "accumulate": [1, 2, 3],
        "precision": ["auto", "fp32", "fp16"],
        "seed": [0, 2**62, -1],
        "workers": [-1, 0],
        "save_every": [0, 1, 100],
        "out": ["run", "notes.txt/run"],
    }
    switches = ["no_distill_token", "resume", "overwrite", "skip_broken"]
    words = {
        name: choices[rng.integers(len(choices))] for name, choices in values.items() if rng.random() < 0.3
    }
    words = {"epochs": 1, "teacher_epochs": 1, "batch_size": 4, "device": "cpu"} | words
    return flags(words) + ["--" + name.replace("_", "-") for name in switches if rng.random() < 0.2]


def test_flags_at_random_either_train_or_give_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.SHAPES_COUNT", {"train": 8, "val": 4})
    for name in ("tiny", "small"):
        monkeypatch.setitem(SIZES, name, (16, 2))
    monkeypatch.setattr(DeiT, "__init__", SHALLOW)
    write_folder(tmp_path / "pictures", [(20, 30)])
    write_folder(tmp_path / "broken", [(20, 30), (30, 20)])
    (tmp_path / "broken/train/ant/0.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("notes")
    torch.save(create_model("tiny", num_classes=10, img_size=16, patch_size=8).state_dict(), "tiny.pth")
    first, ended = int(os.environ.get("FUZZ_FROM", 0)), Counter()
    for seed in range(first, first + int(os.environ.get("FUZZ_RUNS", 8))):
        words = random_words(np.random.default_rng(seed))
        try:
            code = run_train(monkeypatch, *words)
        except Exception as error:
            raise AssertionError(f"seed {seed}: train.py {' '.join(words)}") from error
        error = capsys.readouterr().err
        assert (code, error.count("\n")) == ((2, 1) if code else (0, 0)), (seed, code, words, error)
        ended[code] += 1
        shutil.rmtree("run", ignore_errors=True)
        for teacher in Path("runs").glob("*") if Path("runs").exists() else ():
            shutil.rmtree(teacher)
    print(ended)
    assert min(ended[0], ended[2]) > sum(ended.values()) / 10


def test_a_run_is_not_written_over_unless_told_to(tmp_path, monkeypatch, few_shapes, capsys):
    words = flags(QUICK | {"epochs": 1, "out": tmp_path / "run"})
    assert run_train(monkeypatch, *words) == 0
    before = (tmp_path / "run/last.pth").read_bytes()
    assert run_train(monkeypatch, *words) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_train(monkeypatch, *words, "--resume", "--lr", "0.5") == 2
    assert "has --lr 0.003, not 0.5" in capsys.readouterr().err
    assert (tmp_path / "run/last.pth").read_bytes() == before
    assert run_train(monkeypatch, *words, "--overwrite", "--seed", "1") == 0
    assert (tmp_path / "run/last.pth").read_bytes() != before
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 1


class Cut(Exception):
    pass


def cut(*arguments):
    raise Cut


def test_a_run_cut_off_in_its_teacher_goes_on_by_its_directory_alone(
    tmp_path, monkeypatch, few_shapes, capsys
):
    words = QUICK | {"seed": 3, "epochs": 1, "distill": "hard", "teacher": "tiny", "teacher_epochs": 2}
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "a/whole"})) == 0
    monkeypatch.setattr("train.evaluate", cut)
    with pytest.raises(Cut):
        run_train(monkeypatch, *flags(words | {"out": tmp_path / "b/cut"}))
    monkeypatch.setattr("train.evaluate", evaluate)
    again = ["--out", tmp_path / "b/cut", "--resume"]
    assert run_finetune(monkeypatch, *again) == 2
    assert "cut is a run of train.py; continue it with train.py --resume" in capsys.readouterr().err
    for more in (["--seed", 4], ["--lr", 0.1], ["--erasing", 0.5]):
        assert run_train(monkeypatch, *again, *more) == 2
        assert f"cut has {more[0]} " in capsys.readouterr().err
    assert run_train(monkeypatch, *again) == 0
    assert "resuming" in capsys.readouterr().out  # the teacher
    assert all(
        torch.equal(v, weights_of(tmp_path / "b/cut")[k]) for k, v in weights_of(tmp_path / "a/whole").items()
    )
    assert read_log(tmp_path / "a/whole") == read_log(tmp_path / "b/cut")


def test_a_fine_tuning_cut_off_in_its_teacher_keeps_its_checkpoint(tmp_path, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    words = QUICK | {"epochs": 1, "distill": "hard", "teacher": "tiny", "teacher_epochs": 1}
    assert run_train(monkeypatch, *flags(words | {"out": "runs/first"})) == 0
    monkeypatch.setattr("train.evaluate", cut)
    with pytest.raises(Cut):
        run_finetune(monkeypatch, "--epochs", 1, "--batch-size", 16, "--out", "runs/tuned")
    monkeypatch.setattr("train.evaluate", evaluate)
    assert run_train(monkeypatch, "--out", "runs/tuned", "--resume") == 2
    assert run_train(monkeypatch, *flags(words | {"distill": "none", "out": "runs/second"})) == 0
    assert run_finetune(monkeypatch, "--out", "runs/tuned", "--resume") == 0
    tuned = read_checkpoint("runs/tuned/last.pth")["settings"]
    assert (tuned["checkpoint"], tuned["distill"], tuned["epochs"]) == ("runs/first/last.pth", "hard", 1)
    assert "teacher-shapes-24px-tiny" in tuned["teacher_weights"]


@pytest.mark.parametrize("run", [run_train, run_finetune])
def test_where_there_is_nothing_to_continue_a_directory_alone_starts_nothing(
    tmp_path, monkeypatch, capsys, run
):
    assert run(monkeypatch, "--out", tmp_path / "none", "--resume", "--workers", "1") == 2
    assert f"there is no run in {tmp_path}/none to continue" in capsys.readouterr().err


def test_a_file_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left on device; what was saved before is intact"):
        write_whole(path, fail)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, lambda file: file.write(b"second"), tmp_path / "previous")
    assert (path.read_bytes(), (tmp_path / "previous").read_bytes()) == (b"second", b"first")


# ---- train.py: a run survives anything ----

TEACHER = {"distill": "hard", "teacher": "regnet_y_200mf", "teacher_epochs": 1, "ema": 0.9, "repeats": 3}
SURVIVOR = QUICK | TEACHER | {"save_every": 2, "drop_path": 0.2}


def train_with(fault):
    """`train.py` with a fault (what, when, signal): the signal comes at the when-th of all calls of what."""
    what, when, number = fault or (None, 0, 0)
    calls = Counter()

    def hurt(module, name):
        plain = getattr(module, name)

        def wrapped(*arguments, **options):
            calls[what] += 1
            if calls[what] == when:
                os.kill(os.getpid(), number)
            return plain(*arguments, **options)

        setattr(module, name, wrapped)

    places = {"step": (train, "keyed_generator"), "write": (os, "fsync")}
    places |= {"rename": (os, "replace"), "evaluation": (train, "fuse"), "teacher": (train, "create_teacher")}
    if what:
        hurt(*places[what])
    program(main)


def forked(words, fault=None, kill_after=None):
    """Runs that in a process of its own, killed after so many seconds if it lives so long; its exit code."""
    process = fork(partial(train_with, fault), words)
    process.join(60 if kill_after is None else kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def same_run(one, two):
    """Whether two runs ended with the same weights, average, log and all, bit for bit."""
    first, second = (read_checkpoint(out / "last.pth") for out in (one, two))
    assert first["progress"] == second["progress"]
    assert (one / "log.jsonl").read_bytes() == (two / "log.jsonl").read_bytes()
    for part in ("model", "ema"):
        assert (first[part] is None) == (second[part] is None)
        for key, value in (first[part] or {}).items():
            assert torch.equal(value, second[part][key]), key
    moments = [contents["optimizer"]["state"] for contents in (first, second)]
    for key, state in moments[0].items():
        assert all(torch.equal(value, moments[1][key][name]) for name, value in state.items())
    return True


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """The run that was never stopped, to compare with."""
    out = tmp_path_factory.mktemp("unhurt")
    assert forked(flags(SURVIVOR | {"out": out / "run"})) == 0
    return out / "run"


KILLS = [("step", 1), ("step", 17), ("write", 3), ("write", 14), ("rename", 6)]
KILLS += [("evaluation", 2), ("teacher", 1)]
FAULTS = [(*kill, signal.SIGKILL) for kill in KILLS]
FAULTS += [("step", 14, signal.SIGTERM), ("evaluation", 1, signal.SIGINT)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}-{fault[2].name}")
def test_a_run_that_is_killed_anywhere_ends_as_if_it_never_was(tmp_path, unhurt, fault):
    words = flags(SURVIVOR | {"out": tmp_path / "run"})
    code = forked(words, fault)
    assert code == (-fault[2] if fault[2] == signal.SIGKILL else 128 + fault[2])
    assert forked([*words, "--resume"]) == 0
    assert same_run(unhurt, tmp_path / "run")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_that_is_killed_again_and_again_at_random_ends_as_if_it_never_was(tmp_path, unhurt):
    rng, words = np.random.default_rng(0), flags(SURVIVOR | {"out": tmp_path / "run", "resume": True})
    words = [word for word in words if word != "True"]
    kills = sum(forked(words, kill_after=rng.uniform(0.3, 2)) == -signal.SIGKILL for _ in range(4))
    assert kills > 0
    assert forked(words) == 0
    assert same_run(unhurt, tmp_path / "run")


def test_a_signal_is_answered_within_a_step_and_loses_nothing(tmp_path):
    words = flags(QUICK | {"out": tmp_path / "run"})
    assert forked(words, ("step", 9, signal.SIGTERM)) == 128 + signal.SIGTERM  # two draws a step
    assert read_checkpoint(tmp_path / "run/last.pth")["progress"]["step"] == 5


def test_fp16_survives_a_kill_with_its_scaler(tmp_path):
    words = flags(QUICK | {"precision": "fp16", "epochs": 2, "save_every": 1, "batch_size": 8})
    for out, fault in (("whole", None), ("cut", ("step", 9, signal.SIGKILL))):
        forked([*words, "--out", str(tmp_path / out)], fault)
    assert forked([*words, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert same_run(tmp_path / "whole", tmp_path / "cut")
    scalers = [read_checkpoint(tmp_path / name / "last.pth")["scaler"] for name in ("whole", "cut")]
    assert scalers[0] == scalers[1] != {}


def test_the_older_checkpoint_serves_when_the_last_is_damaged(tmp_path, unhurt, capsys):
    shutil.copytree(unhurt, tmp_path / "run")
    last, rng = tmp_path / "run/last.pth", np.random.default_rng(0)
    whole = last.read_bytes()
    for length in (0, 1, 1000, len(whole) // 2, len(whole) - 1):
        last.write_bytes(whole[:length])
        assert train.newest(tmp_path / "run")["progress"]["step"] == 9
        told = capsys.readouterr().out
        assert "last.pth is not a checkpoint" in told
        assert told.endswith(f"continuing from {tmp_path}/run/previous.pth\n")
        assert told.count("\n") == 1
        assert (tmp_path / "run/last.pth.damaged").read_bytes() == whole[:length]
        assert not last.exists()
    for place in rng.integers(0, len(whole), 20):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        last.write_bytes(flipped)
        assert train.newest(tmp_path / "run")["progress"]["step"] == 9
    torch.save({"model": {}}, last)
    assert train.newest(tmp_path / "run")["progress"]["step"] == 9
    assert "is not the checkpoint of a run" in capsys.readouterr().out
    assert forked(["--out", str(tmp_path / "run"), "--resume"]) == 0
    assert same_run(unhurt, tmp_path / "run")
    for path in (tmp_path / "run").glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"last\.pth .*best\.pth .*; delete .*run to start anew") as caught:
        train.newest(tmp_path / "run")
    assert "\n" not in str(caught.value)


CUT = """
import os, signal, sys, data, model, train
from functools import partialmethod
data.SHAPES_COUNT, model.SIZES["tiny"] = {"train": 54, "val": 19}, (64, 1)
model.DeiT.__init__ = partialmethod(model.DeiT.__init__, depth=2)
plain = train.Run.note
def note(run, loss):
    plain(run, loss)
    dead = sys.argv[2] + "/dead"
    if run.step == 4 and os.environ["RANK"] == "1" and not os.path.exists(dead):
        open(dead, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
train.Run.note = note
train.program(train.main)
"""


def keep_step_4(copy):
    plain = train.Run.save

    def save(run, *arguments, **more):
        plain(run, *arguments, **more)
        if run.step == 4 and run.place.rank == 0:
            shutil.copytree(run.settings["out"], copy, dirs_exist_ok=True)

    train.Run.save = save
    program(main)


def test_three_processes_go_on_bit_for_bit(tmp_path):
    words = flags(QUICK | {"batch_size": 18, "save_every": 1, "epochs": 2, "drop_path": 0.1})
    fork_many(partial(keep_step_4, tmp_path / "cut"), ["--out", str(tmp_path / "whole"), *words], world=3)
    assert read_checkpoint(tmp_path / "cut/last.pth")["progress"]["step"] == 4
    fork_many(partial(train_with, None), ["--out", str(tmp_path / "cut"), "--resume"], world=3)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_two_processes_survive_a_kill_and_torchrun_restarts_them(tmp_path):
    words = flags(QUICK | {"save_every": 1, "epochs": 2, "ema": 0.9})
    fork_many(partial(train_with, None), ["--out", str(tmp_path / "whole"), *words])
    (tmp_path / "driver.py").write_text(CUT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*launch, str(tmp_path / "driver.py"), "--out", str(tmp_path / "cut"), *words, "--resume"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    assert (tmp_path / "cut/dead").exists()
    assert same_run(tmp_path / "whole", tmp_path / "cut")


def test_students_started_at_once_do_not_disturb_each_others_teacher(tmp_path, monkeypatch, few_shapes):
    words = QUICK | {"teacher": "tiny", "teacher_epochs": 1, "distill": "hard", "epochs": 1}
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "first"})) == 0
    (teacher,) = tmp_path.glob("teacher-*")
    late, before = teacher.rename(tmp_path / "late"), weights_of(tmp_path / "late")

    def evaluate_meanwhile(*arguments):  # the other student's teacher is finished while ours learns
        if late.exists():
            late.rename(teacher)
        return evaluate(*arguments)

    monkeypatch.setattr("train.evaluate", evaluate_meanwhile)
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "second"})) == 0
    own = tmp_path / "second" / teacher.name
    assert read_checkpoint(tmp_path / "second/last.pth")["settings"]["teacher_weights"] == f"{own}/last.pth"
    for place in (own, teacher):
        assert all(torch.equal(value, before[key]) for key, value in weights_of(place).items())


def log_turn(path):
    place = train.join("cpu")

    def act():
        time.sleep(0.2 * (3 - place.rank))
        with open(path, "a") as file:
            file.write(str(place.rank))

    train.first_alone(place, act)


def test_downloads_come_to_the_first_process_then_to_the_first_of_each_machine(tmp_path):
    fork_many(partial(log_turn, tmp_path / "order"), [], world=4, machines=2)
    order = (tmp_path / "order").read_text()
    assert order[:2] == "02"
    assert sorted(order[2:]) == ["1", "3"]


def check_from_own_directory(path):
    place = train.join("cpu")
    (path / str(place.rank)).mkdir()
    os.chdir(path / str(place.rank))
    train.prepare_directory(Path("run"))
    if place.rank == 0:
        train.check_shared(Path("run"), place)
    else:
        with pytest.raises(UsageError, match="process 1 sees another run than the first"):
            train.check_shared(Path("run"), place)
    train.prepare_directory(path / "run")
    train.check_shared(path / "run", place)


def test_a_directory_that_not_all_processes_share_is_refused_early(tmp_path):
    fork_many(partial(check_from_own_directory, tmp_path), [])
    assert not list(tmp_path.rglob("*.partial"))


def test_overwrite_and_torchruns_restarts_are_refused_together(tmp_path, monkeypatch, few_shapes, capsys):
    words = flags(QUICK | {"epochs": 1, "out": tmp_path / "run"})
    assert run_train(monkeypatch, *words) == 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert run_train(monkeypatch, *words, "--overwrite") == 2
    assert "at each of torchrun's restarts" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert run_train(monkeypatch, *words, "--overwrite") == 0


def test_another_number_of_processes_may_go_on_and_is_told_of_the_difference(tmp_path):
    words = flags(QUICK | {"save_every": 1, "accumulate": 2, "out": tmp_path / "run"})
    assert forked(words, ("step", 9, signal.SIGTERM)) == 128 + signal.SIGTERM
    words = ["--out", str(tmp_path / "run"), "--resume", "--accumulate", "1"]
    told = fork_many(partial(train_with, None), words, tmp_path / "told")
    assert "the run was made on 1 × cpu, 2 parts" in told
    assert "will differ a little" in told
    assert len(read_log(tmp_path / "run")) == 3


def test_a_run_is_not_resumed_on_data_of_another_size(tmp_path, monkeypatch, few_shapes, capsys):
    assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1, "out": tmp_path / "run"})) == 0
    monkeypatch.setattr("data.SHAPES_COUNT", {"train": 32, "val": 19})
    assert run_train(monkeypatch, "--out", tmp_path / "run", "--resume") == 2
    assert "has 3 steps, now 2: the data have changed" in capsys.readouterr().err


ODD = [{"model": "x"}, {"ema": [1]}, {"settings": "x"}, {1: torch.zeros(2)}, {"a": 1}]
ODD += [{"settings": {"classes": 3}, "model": {"a": torch.zeros(2)}}, {"model": {"a": "b"}}]


@pytest.mark.parametrize("contents", ODD, ids=repr)
def test_a_checkpoint_of_other_parts_is_refused(tmp_path, contents):
    torch.save(contents, tmp_path / "odd.pth")
    with pytest.raises(UsageError, match="its parts are not named weights and settings"):
        read_checkpoint(tmp_path / "odd.pth")


def test_weights_of_other_dimensions_tell_no_settings():
    names = ("pos_embed", "patch_embed.proj.weight", "head.weight")
    assert checkpoint_settings({name: torch.zeros(3) for name in names}) == {}
    assert checkpoint_settings({"model": {}}) == {}


def test_a_name_too_long_for_the_disk_is_one_line(monkeypatch, capsys):
    assert run_train(monkeypatch, "--out", "x" * 300) == 2
    error = capsys.readouterr().err
    assert "File name too long" in error
    assert error.count("\n") == 1


def test_a_checkpoint_without_weights_is_no_teacher(tmp_path):
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UsageError, match="does not fit a tiny"):
        create_teacher("tiny", 10, tmp_path / "empty.pth")


def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_spoilt(
    tmp_path, monkeypatch, few_shapes, capsys
):
    def explode(settings, teacher):
        loss, calls = plain(settings, teacher), iter(range(100))
        return lambda *arguments: loss(*arguments) * (math.nan if next(calls) == 4 else 1)

    plain = train.loss_function
    monkeypatch.setattr("train.loss_function", explode)
    assert run_train(monkeypatch, *flags(QUICK | {"out": tmp_path / "run", "save_every": 2})) == 2
    error = capsys.readouterr().err
    rate = learning_rate(4, 9, round(0.3 * 3), complete(QUICK))
    assert f"the loss of step 5 is not a finite number, at learning rate {rate:.2e}" in error
    assert f"{tmp_path}/run/last.pth is from before it" in error
    contents = read_checkpoint(tmp_path / "run/last.pth")
    assert contents["progress"]["step"] == 4
    assert all(value.isfinite().all() for value in contents["model"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, few_shapes, capsys):
    class Exploding(torch.optim.AdamW):
        def step(self, *arguments):
            super().step(*arguments)
            self.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr("torch.optim.AdamW", Exploding)
    assert run_train(monkeypatch, *flags(QUICK | {"out": tmp_path / "run", "save_every": 1})) == 2
    assert "the loss of step 1 is not a finite number" in capsys.readouterr().err
    assert not (tmp_path / "run/last.pth").exists()


def full_disk(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # files end there, as on a full disk
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    program(main)


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path):
    words = flags(QUICK | {"epochs": 2, "out": tmp_path / "run"})
    assert forked(words, ("step", 9, signal.SIGTERM)) == 128 + signal.SIGTERM
    before = (tmp_path / "run/last.pth").read_bytes()
    process = fork(partial(full_disk, 2**20), [*words, "--resume"], told=tmp_path / "told")
    process.join(60)
    assert process.exitcode == 2
    *_, error = (tmp_path / "told").read_text().splitlines()
    assert error.startswith(f"error: could not write {tmp_path}/run/")
    assert error.endswith("; what was saved before is intact")
    assert (tmp_path / "run/last.pth").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


def test_names_with_odd_characters_break_neither_terminal_nor_log(tmp_path, monkeypatch, capsys):
    names = ("a\nnewline", "b\x1b[31mred", "c\udcff", "δ 日本")
    write_folder(tmp_path / "da\x1b[2Jta", [(16, 16)], names)
    words = QUICK | {"data": "folder", "data_path": tmp_path / "da\x1b[2Jta", "batch_size": 8, "epochs": 1}
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "run\x07"})) == 0
    assert run_train(monkeypatch, *flags(words | {"out": tmp_path / "run\x07"})) == 2
    for told in capsys.readouterr():
        assert all(c.isprintable() or c == "\n" for c in told)
    assert read_checkpoint(tmp_path / "run\x07/last.pth")["settings"]["classes"] == list(names)
    assert len(read_log(tmp_path / "run\x07")) == 1


# ---- finetune.py and evaluate.py ----


def test_fine_tuning_starts_from_the_runs_weights_at_the_new_size(tmp_path, monkeypatch, few_shapes, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1})) == 0
    before = weights_of(tmp_path / "runs/shapes-tiny-none")
    # without --checkpoint: the newest run; at a learning rate of (nearly) 0 the weights stay
    words = {"epochs": 1, "lr": 0, "batch_size": 16, "device": "cpu"}
    assert run_finetune(monkeypatch, *flags(words)) == 0
    after = weights_of(tmp_path / "runs/shapes-tiny-none-24px")
    assert after.pop("pos_embed").shape == (1, 10, 64)
    assert before.pop("pos_embed").shape == (1, 5, 64)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-4)
    printed = capsys.readouterr().out
    assert "before, at 16 pixels: class" in printed
    assert "position embeddings are resized\nat the start, at 24 pixels: class" in printed


@pytest.mark.parametrize("teacher", ["resnet18", "tiny"])
def test_fine_tuning_brings_the_teacher_to_the_new_size_first(
    tmp_path, monkeypatch, few_shapes, capsys, teacher
):
    monkeypatch.chdir(tmp_path)
    words = QUICK | {"epochs": 1, "distill": "hard", "teacher": teacher, "teacher_epochs": 1}
    assert run_train(monkeypatch, *flags(words)) == 0
    words = {"epochs": 1, "teacher_epochs": 1, "batch_size": 16}
    assert run_finetune(monkeypatch, *flags(words)) == 0
    student = read_checkpoint("runs/shapes-tiny-hard-24px/last.pth")["settings"]
    assert student["checkpoint"] == "runs/shapes-tiny-hard/last.pth"
    tuned = read_checkpoint(student["teacher_weights"])
    (scratch,) = Path("runs").glob("teacher-shapes-16px-*/last.pth")
    assert (tuned["settings"]["model"], tuned["settings"]["img_size"]) == (teacher, 24)
    name = "conv1.weight" if teacher == "resnet18" else "patch_embed.proj.weight"
    before, after = read_checkpoint(scratch)["model"][name], tuned["model"][name]
    assert 0 < (after - before).norm() < 0.3 * before.norm()  # it did start there
    assert "before, at 16 pixels: class" in capsys.readouterr().out


OFFICIAL_TINY = {
    "data": "imagenet",
    "data_path": "data",
    "classes": None,
    "num_classes": 1000,
    "model": "tiny",
}
OFFICIAL_TINY |= {"img_size": 224, "patch_size": 16, "distill": "hard", "no_distill_token": False}


def test_higher_resolution_of_imagenet_is_the_papers_recipe_with_a_teacher_brought_there_first():
    settings, lower = finetune.finetune_settings({"checkpoint": "deit_tiny_distilled"}, OFFICIAL_TINY)
    table = dict(img_size=384, epochs=30, batch_size=512, optimizer="adamw", lr=5e-6, min_lr=5e-6)
    table |= dict(weight_decay=1e-8, warmup_epochs=5, drop_path=0, distill="hard", teacher="regnet_y_16gf")
    table |= dict(
        teacher_weights="published", teacher_epochs=30, augment="randaugment", mixup=0.8, cutmix=1.0
    )
    table |= dict(erasing=0.25, smoothing=0.1, repeats=3)  # the augmentation of training is kept
    assert {name: settings[name] for name in table} == table
    assert lower
    steps = [learning_rate(step, 1000, 100, settings) for step in range(100, 1001)]
    assert set(steps) == {5e-6}  # constant after the warm-up
    few = {"checkpoint": "deit_tiny_distilled", "epochs": 3}
    assert finetune.finetune_settings(few, OFFICIAL_TINY)[0]["warmup_epochs"] == pytest.approx(0.3)
    same_size = {"checkpoint": "deit_tiny_distilled", "img_size": 224}
    assert not finetune.finetune_settings(same_size, OFFICIAL_TINY)[1]


@pytest.mark.parametrize(
    "data", ["cifar10", "cifar100", "flowers102", "cars", "inat2018", "inat2019", "folder"]
)
def test_transfer_has_the_authors_recipe_and_a_short_one(data):
    given = {"checkpoint": "deit_tiny_distilled", "data": data, "recipe": "paper"}
    settings, lower = finetune.finetune_settings(given, OFFICIAL_TINY)
    table = dict(img_size=224, epochs=1000, batch_size=768, optimizer="sgd", lr=0.01, weight_decay=1e-4)
    table |= dict(drop_path=0, erasing=0, mixup=0.8, cutmix=1.0, smoothing=0.1, augment="randaugment")
    table |= dict(distill="label", data_path="data", patch_size=16)
    assert {name: settings[name] for name in table} == table
    assert not lower
    short, _ = finetune.finetune_settings(given | {"recipe": "short"}, OFFICIAL_TINY)
    assert (short["optimizer"], short["epochs"], short["img_size"]) == ("adamw", 30, 224)
    plain, _ = finetune.finetune_settings(given, OFFICIAL_TINY | {"distill": "none"})
    assert plain["distill"] == "none"


def test_each_optimizer_brings_its_own_learning_rate_unless_told():
    given = {"checkpoint": "deit_tiny", "data": "cars"}
    for more, lr in (({}, 5e-4), ({"optimizer": "sgd"}, 0.01), ({"optimizer": "sgd", "lr": 0.1}, 0.1)):
        assert finetune.finetune_settings(given | more, OFFICIAL_TINY)[0]["lr"] == lr


def test_fine_tunings_help_shows_its_own_defaults(capsys):
    settings, _ = finetune.finetune_settings({"checkpoint": "x", "data": "folder"}, OFFICIAL_TINY)
    text = " ".join(finetune.finetune_parser().format_help().split())
    numbers = {name: value for name, value in finetune.SHOWN.items() if not isinstance(value, (str, bool))}
    assert len(numbers) > 10
    for name, value in numbers.items():
        assert settings[name] == value, name
        flag = name.replace("_", "-")
        assert re.search(rf"--{flag} {name.upper()} [^\[]*\[{re.escape(str(value))}\]", text), name
    assert "--optimizer {adamw,sgd} sgd has Nesterov momentum 0.9 [adamw]" in text
    assert all(f"{name} {value}" in text for name, value in finetune.TRANSFER.items())


def test_a_distillation_token_that_is_added_starts_as_the_class_token():
    sizes = {"num_classes": 3, "img_size": 16, "patch_size": 8}
    plain, network = create_model("tiny", **sizes), create_model("tiny", **sizes, distilled=True)
    fresh = network.dist_token.detach().clone()
    assert finetune.adapt(plain.state_dict(), network, True)[0].startswith("a distillation token is added")
    torch.testing.assert_close(network.dist_token, plain.cls_token + fresh)
    assert not torch.equal(network.dist_token, network.cls_token)  # or they would learn the same for ever
    with torch.no_grad():
        network.dist_token.copy_(network.cls_token)
    first, second = network.eval()(torch.randn(4, 3, 16, 16))
    torch.testing.assert_close(
        first, second
    )  # but for the draw, its position and its head are the class token's


def test_a_distillation_token_that_is_dropped_leaves_the_rest_as_it_was():
    sizes = {"num_classes": 3, "img_size": 16, "patch_size": 8}
    network, distilled = create_model("tiny", **sizes), create_model("tiny", **sizes, distilled=True)
    assert finetune.adapt(distilled.state_dict(), network, True) == ["the distillation token is dropped"]
    images = torch.randn(2, 3, 16, 16)
    tokens = [n for n in range(6) if n != 1]
    torch.testing.assert_close(network.embed(images), distilled.embed(images)[:, tokens])
    theirs = distilled.state_dict()
    assert all(torch.equal(p, theirs[key]) for key, p in network.state_dict().items() if key != "pos_embed")


def save_official(path, **settings):
    """A file as the authors publish them."""
    torch.manual_seed(0)
    model = create_model("tiny", img_size=32, **settings)
    torch.save({"model": model.state_dict()}, path)
    return model.eval()


@pytest.mark.parametrize("distill", ["label", "none"])
def test_an_official_file_transfers_to_a_folder_of_pictures(tmp_path, monkeypatch, capsys, distill):
    write_folder(tmp_path / "data", [(50, 40), (30, 60)])
    official = save_official(tmp_path / "official.pth", distilled=distill == "label")  # 1000 classes
    words = {"checkpoint": tmp_path / "official.pth", "data": "folder", "data_path": tmp_path / "data"}
    words |= {"epochs": 1, "batch_size": 4, "lr": 1e-9, "min_lr": 0, "warmup_lr": 0, "workers": 0}
    assert run_finetune(monkeypatch, *flags(words | {"device": "cpu", "out": tmp_path / "run"})) == 0
    done = read_checkpoint(tmp_path / "run/last.pth")
    names = ("classes", "img_size", "distill", "model", "patch_size")
    assert [done["settings"][name] for name in names] == [["ant", "bee"], 32, distill, "tiny", 16]
    for key, value in official.state_dict().items():
        if key.startswith("head"):
            assert done["model"][key].shape == (2, *value.shape[1:])
        else:
            torch.testing.assert_close(done["model"][key], value, rtol=0, atol=1e-6)
    printed = capsys.readouterr().out
    assert "official.pth: new heads for 2 classes\n" in printed
    assert "before" not in printed  # its heads say nothing of these classes
    # and goes on from there: to as many other classes, or at another resolution with its own
    write_folder(tmp_path / "pets", [(50, 40), (30, 60)], ("cat", "dog"))
    words |= {"checkpoint": tmp_path / "run/last.pth", "data_path": tmp_path / "pets", "device": "cpu"}
    words |= {"recipe": "paper", "out": tmp_path / "other"}  # that of transfer, since the folder is another
    assert run_finetune(monkeypatch, *flags(words)) == 0
    assert "run/last.pth: new heads for 2 classes\n" in capsys.readouterr().out
    again = read_checkpoint(tmp_path / "other/last.pth")["settings"]
    assert [again[name] for name in names] == [["cat", "dog"], 32, distill, "tiny", 16]
    words = {"checkpoint": tmp_path / "run/last.pth", "epochs": 1, "batch_size": 4, "workers": 0}
    assert run_finetune(monkeypatch, *flags(words | {"device": "cpu", "out": tmp_path / "higher"})) == 0
    assert "before, at 32 pixels: class" in capsys.readouterr().out
    again = read_checkpoint(tmp_path / "higher/last.pth")["settings"]
    assert [again[name] for name in names] == [["ant", "bee"], 48, distill, "tiny", 16]


def test_imagenets_own_weights_keep_their_heads_and_another_number_of_classes_is_refused(
    tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "data", [(50, 40), (30, 60)])
    official = save_official(tmp_path / "two.pth", num_classes=2)
    save_official(tmp_path / "three.pth", num_classes=3)
    words = {"data_path": tmp_path / "data", "epochs": 1, "batch_size": 4, "workers": 0, "img_size": 48}
    words |= {"device": "cpu", "out": tmp_path / "run"}
    assert run_finetune(monkeypatch, *flags(words | {"checkpoint": tmp_path / "two.pth"})) == 0
    val_set = load_data("imagenet", str(tmp_path / "data"), 32, CPU, ("val",))[0]
    before = evaluate(official, val_set, complete({"img_size": 32, "workers": 0}), ALONE)
    printed = capsys.readouterr().out
    assert f"before, at 32 pixels: {headline(before)}\n" in printed
    assert "two.pth: position embeddings are resized\nat the start, at 48 pixels: class" in printed
    words |= {"checkpoint": tmp_path / "three.pth", "out": tmp_path / "other"}
    assert run_finetune(monkeypatch, *flags(words)) == 2
    assert "use --data folder or --recipe short" in capsys.readouterr().err
    assert run_finetune(monkeypatch, *flags(words), "--recipe", "short") == 0
    assert "three.pth: new heads for 2 classes; position embeddings are resized\n" in capsys.readouterr().out


@pytest.mark.parametrize(("trained", "optimizer"), [("head", "sgd"), ("attention", "adamw")])
def test_what_is_frozen_stays_to_the_last_bit_and_a_resumed_run_ends_the_same(
    tmp_path, monkeypatch, few_shapes, capsys, trained, optimizer
):
    monkeypatch.chdir(tmp_path)
    assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1, "distill": "label"})) == 0
    before = weights_of(tmp_path / "runs/shapes-tiny-label")
    words = PLAIN | {"img_size": 16, "epochs": 2, "batch_size": 16, "train": trained, "optimizer": optimizer}
    words = flags(words | {"ema": 0.9, "lr": 0.02 if optimizer == "adamw" else 1.0, "device": "cpu"})
    assert run_finetune(monkeypatch, *words, "--out", "whole") == 0

    class Cut(Exception):
        pass

    def evaluate_twice(*arguments):
        if Path("cut/last.pth").exists():
            raise Cut
        return evaluate(*arguments)

    monkeypatch.setattr("train.evaluate", evaluate_twice)
    with pytest.raises(Cut):
        run_finetune(monkeypatch, *words, "--out", "cut")
    monkeypatch.setattr("train.evaluate", evaluate)
    Path("runs").rename("elsewhere")  # the run has all that it needs
    assert run_finetune(monkeypatch, "--out", "cut", "--resume") == 0
    whole, cut = (read_checkpoint(Path(name) / "last.pth") for name in ("whole", "cut"))
    pattern = {"head": "^head", "attention": r"^head|\.attn\.|^pos_embed$"}[trained]
    for part in ("model", "ema"):
        assert all(torch.equal(value, cut[part][key]) for key, value in whole[part].items())
        changed = {key for key, value in before.items() if not torch.equal(value, whole[part][key])}
        assert changed == {key for key in before if re.search(pattern, key)}
    assert Path("whole/log.jsonl").read_text() == Path("cut/log.jsonl").read_text()
    losses = [record["loss"] for record in read_log(Path("whole"))]
    assert losses[-1] < losses[0]
    assert run_finetune(monkeypatch, "--out", "cut", "--resume", "--train", "all") == 2
    assert f"has --train {trained}, not all" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--checkpoint none.pth", "there is no file none.pth"),
        ("--checkpoint convnet.pth", "does not hold a trained tiny, small, base transformer"),
        ("--model small", "run/last.pth has --model tiny, not small; fine-tuning keeps it"),
        ("--patch-size 4", "run/last.pth has --patch-size 8, not 4; fine-tuning keeps it"),
        ("--img-size 22", "22 is not a multiple of patch size 8; try image size 24"),
        ("--distill hard --teacher-weights none.pth", "there is no file none.pth"),
        ("--data folder", "there is no folder data"),
        (
            "--checkpoint deep.pth --data folder --data-path .",
            "blocks.2.norm1.weight is (64,) in the weights",
        ),
        ("--out runs/run --resume", "is a run of train.py; continue it with train.py --resume"),
        ("--train norm", "'norm' is not one of all, head, attention"),
    ],
)
def test_mistakes_of_fine_tuning_end_with_one_line_and_exit_code_2(
    tmp_path, monkeypatch, few_shapes, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    Path("runs/run").mkdir(parents=True)
    settings = complete(QUICK) | {"classes": ["a"]}
    model = create_model("tiny", num_classes=1, img_size=16, patch_size=8)
    contents = dict.fromkeys(("ema", "optimizer", "scaler", "progress")) | {"model": model.state_dict()}
    torch.save(contents | {"settings": settings}, "runs/run/last.pth")
    torch.save({"fc.weight": torch.zeros(1)}, "convnet.pth")
    torch.save({"model": DeiT(64, 1, depth=3, img_size=32).state_dict()}, "deep.pth")
    assert run_finetune(monkeypatch, *words.split(), "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_without_a_run_to_start_from_fine_tuning_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_finetune(monkeypatch) == 2
    assert "make one with: torchrun train.py --model tiny --distill hard" in capsys.readouterr().err


def save_network(path, classes, distilled=True, **changed):
    """A checkpoint of a network whose heads are large enough to decide differently on different images."""
    settings = complete(QUICK | {"distill": "label" if distilled else "none"} | changed)
    torch.manual_seed(len(str(changed)))
    model = build_network(settings, len(classes)).eval()
    for head in (model.head, model.head_dist) if distilled else (model.head,):
        head.weight.data.normal_()
    torch.save({"model": model.state_dict(), "settings": settings | {"classes": classes}}, path)
    return model


def inputs_of(path, size=16):
    return train.normalize(crop_file(read_image(path), size, None)[None])


def test_evaluate_repeats_the_accuracy_that_training_ended_with(tmp_path, monkeypatch, few_shapes, capsys):
    assert run_train(monkeypatch, *flags(QUICK | {"distill": "label", "out": tmp_path / "run"})) == 0
    ended = read_checkpoint(tmp_path / "run/last.pth")["progress"]["log"][-1]["accuracy"]
    capsys.readouterr()
    assert run_evaluate(monkeypatch, "accuracy", tmp_path / "run/last.pth", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"{tmp_path}/run/last.pth: 20 images of shapes", f"  top-1  {headline(ended)}"]


def test_of_equal_scores_the_class_of_lower_index_comes_first(monkeypatch):
    scores = torch.tensor([[0, 1, 1, 0, 0, 0, 0.0], [2, 2, 2, 2, 2, 2, 2], [7, 6, 5, 4, 3, 2, 1]])
    network, data = nn.Identity(), ArraySet(torch.zeros(3, 3, 8, 8), torch.zeros(3), [])
    monkeypatch.setattr(measure, "head_scores", lambda *_: iter([(None, [scores[:2]]), (None, [scores[2:]])]))
    first = measure.ranking(network, data, {"num_classes": 7}, ALONE)
    assert first[:, 0].tolist() == [[1, 2, 0, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    hits = first == torch.tensor([3, 5, 4])[:, None, None]  # 4th, then 6th and last but one, then 5th
    assert measure.shares(hits.any(dim=2)) == pytest.approx({"class": 200 / 3})


@pytest.fixture
def odd_folder(tmp_path, small):
    """A network of 7 classes and 11 images of two of them."""
    classes = ["wasp", "ant", "fly", "bee", "moth", "bug", "tick"]
    model = save_network(tmp_path / "net.pth", classes)
    write_folder(tmp_path / "images", [(50, 40), (30, 60)], splits=("val",))
    (tmp_path / "images/val/bee/2.png").unlink()
    return tmp_path, model


def test_accuracy_is_the_share_of_right_images_on_one_process_and_on_two(odd_folder, monkeypatch, capsys):
    path, model = odd_folder
    files = sorted((path / "images/val").rglob("*.png"))
    labels = torch.tensor([{"ant": 1, "bee": 3}[file.parent.name] for file in files])
    with torch.no_grad():
        pairs = [model(inputs_of(file)) for file in files]
    heads = {"class": torch.cat([a for a, _ in pairs]), "distillation": torch.cat([b for _, b in pairs])}
    heads["fused"] = heads["class"].softmax(1) + heads["distillation"].softmax(1)
    told = ["", ""]
    for head, scores in heads.items():
        order = scores.topk(5).indices == labels[:, None]
        told[0] += f"  {head} {100 * order[:, 0].float().mean():.2f} %"
        told[1] += f"  {head} {100 * order.any(1).float().mean():.2f} %"
    words = ["accuracy", str(path / "net.pth"), "--val", str(path / "images/val"), "--per-class"]
    assert run_evaluate(monkeypatch, *words) == 0
    alone = capsys.readouterr().out
    lines = alone.splitlines()
    assert lines[0].endswith(f"net.pth: 11 images of {path}/images/val")
    assert lines[1:3] == [f"  top-1{told[0]}", f"  top-5{told[1]}"]
    assert [line.split()[0] for line in lines[4:]] == ["6", "5"]
    assert [line.split()[-1] for line in lines[4:]] == ["ant", "bee"]
    right = (heads["fused"].argmax(1) == labels)[labels == 3].double().mean()
    assert lines[5].split()[3] == f"{100 * right:.2f}"
    assert fork_many(partial(program, measure.main), words, path / "told") == alone


def test_classes_go_by_name_then_by_number_then_by_place():
    network = nn.Identity()

    def indices(classes, count, names):
        network.classes = classes
        return measure.class_indices("net.pth", network, count, names)

    assert indices(["a", "b", "c"], 3, ["c", "a"]) == [2, 0]
    assert indices(["1", "10", "2"], 3, ["1", "10", "2"]) == [0, 1, 2]  # a data set whose names are numbers
    assert indices(None, 12, ["0", "1", "10", "11", "2"]) == [0, 1, 10, 11, 2]  # ImageNet-V2
    assert indices([f"n{i:08}" for i in range(1000)], 1000, ["1", "999", "5"]) == [1, 999, 5]
    assert indices(None, 2, ["x", "y"]) == [0, 1]
    assert indices(None, 1000, [f"n{i:08}" for i in range(1000)]) == list(range(1000))
    with pytest.raises(UsageError, match="net.pth knows ImageNet's 1000 classes .* others: 'x0'"):
        indices(None, 1000, [f"x{i}" for i in range(1000)])
    for classes, count, names in ((["a", "b"], 2, ["0", "1"]), (None, 3, ["3"]), (["a", "b"], 2, ["a", "z"])):
        with pytest.raises(UsageError, match="net.pth knows"):
            indices(classes, count, names)


def test_imagenet_real_takes_any_of_an_images_labels_and_skips_images_without(
    odd_folder, monkeypatch, capsys
):
    path, model = odd_folder
    files = [path / "images/val/ant" / f"ILSVRC2012_val_0000000{n}.png" for n in (4, 1, 3)]
    for number, file in enumerate(files):
        (path / "images/val/ant" / f"{number}.png").rename(file)
    for other in (path / "images/val").rglob("?.png"):
        other.unlink()
    (path / "images/val/bee").rmdir()
    with torch.no_grad():
        four, one, three = (int(model(inputs_of(file))[0].argmax()) for file in files)
    # image 1 is wrong, 2 is not there, 3 has no label, 4 has two and one is what the class head says
    real = [[(one + 1) % 7], [0], [], [(four + 1) % 7, four]]
    (path / "real.json").write_text(json.dumps(real))
    words = ["accuracy", path / "net.pth", "--val", path / "images/val", "--real", path / "real.json"]
    assert run_evaluate(monkeypatch, *words) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "Real" in line)
    assert line.startswith("  Real   class 50.00 %")
    assert line.endswith("(2 images)")
    (path / "real.json").write_text("[[1]]")
    assert run_evaluate(monkeypatch, *words) == 2
    assert "ILSVRC2012_val_*" in capsys.readouterr().err


def test_disagreement_is_the_share_of_images_decided_differently():
    truth, first, second = [0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0], [1, 1, 2, 0, 2, 0]
    expected = torch.tensor([[0, 2, 3], [2, 0, 2], [3, 2, 0]]) / 6
    torch.testing.assert_close(measure.disagreement(torch.tensor([truth, first, second])).float(), expected)


def test_compare_has_a_row_for_the_truth_and_each_head(tmp_path, monkeypatch, few_shapes, capsys):
    for name, distilled in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        save_network(tmp_path / name / "last.pth", list(draw_shapes("val", 1, 8, CPU).classes), distilled)
    words = [tmp_path / "a/last.pth", tmp_path / "b/last.pth", "--device", "cpu"]
    assert run_evaluate(monkeypatch, "compare", *words) == run_evaluate(monkeypatch, "accuracy", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.fullmatch(r"(\d) (.*?)  +([\d. ]+)", line).groups() for line in lines[2:7]]
    assert [row[1] for row in rows] == ["ground truth", "a", "b class", "b distillation", "b fused"]
    matrix = np.array([row[2].split() for row in rows], dtype=float)
    assert np.array_equal(matrix, matrix.T)
    assert not matrix.diagonal().any()
    right = [
        float(share) for line in lines[7:] if "top-1" in line for share in re.findall(r"([\d.]+) %", line)
    ]
    assert matrix[0, 1:].tolist() == pytest.approx([100 - share for share in right])
    save_network(tmp_path / "c.pth", ["x", "y"])
    assert run_evaluate(monkeypatch, "compare", words[0], tmp_path / "c.pth") == 2
    assert "knows other classes than the data set's: 'circle'" in capsys.readouterr().err


def test_names_are_the_shortest_that_tell_paths_apart():
    names = measure.short_names(["runs/a/last.pth", "runs/b/last.pth", "deit_tiny", "x/a/best.pth"])
    assert names == ["a", "b", "deit_tiny", "best.pth"]
    assert measure.short_names(["x/a/last.pth", "y/a/last.pth"]) == ["x/a", "y/a"]


def test_token_cosines_are_those_of_the_embeddings_after_each_block(
    tmp_path, monkeypatch, few_shapes, capsys
):
    assert (
        run_train(monkeypatch, *flags(QUICK | {"distill": "label", "epochs": 1, "out": tmp_path / "run"}))
        == 0
    )
    model = create_model("tiny", num_classes=10, img_size=16, patch_size=8, distilled=True).eval()
    model.load_state_dict(weights_of(tmp_path / "run"))
    seen = []
    for block in model.blocks[:-1]:
        block.register_forward_hook(lambda module, arguments, output: seen.append(output))
    model(train.normalize(draw_shapes("val", 20, 16, CPU).images))
    pairs = [x[:, :2].detach().numpy() for x in seen]
    expected = [np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in x]) for x in pairs]
    capsys.readouterr()
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "tokens", str(tmp_path / "run/last.pth"), "--device", "cpu"]
    )
    with torch.no_grad():
        measure.main()
    printed = [float(word) for word in capsys.readouterr().out.splitlines()[-1].split()]
    assert len(printed) == 2
    np.testing.assert_allclose(printed[:-1], expected, atol=6e-4)


@pytest.mark.parametrize("size", [224, 384])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_flops_are_those_that_torch_counts(name, distilled, size):
    with torch.device("meta"):
        model = create_model(name, distilled=distilled, img_size=size, num_classes=100)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, 3, size, size))
    assert measure.count_flops(model, size) == counter.get_total_flops()


def test_flops_of_convnets_and_fused_transformers_are_the_published_ones():
    for name, giga in (("resnet18", 1.814), ("vit_b_32", 4.409)):  # multiply-adds at 224, torchvision's table
        with torch.device("meta"):
            network = torchvision.models.get_model(name)
        assert measure.count_flops(network, 224) == pytest.approx(2e9 * giga, rel=0.01)


@pytest.mark.parametrize("model", ["tiny", "resnet18"])
def test_throughput_tells_rates_and_the_share_of_the_peak(monkeypatch, capsys, model):
    timed = []
    monkeypatch.setattr(
        measure, "seconds", lambda act, runs, device: act() and 0 or timed.append(runs) or 0.5
    )
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype, device: (1e10, 1024))
    words = ["--model", model, "--img-size", "32", "--batch-size", "4", "--runs", "7", "--device", "cpu"]
    assert run_evaluate(monkeypatch, "throughput", *words) == 0
    inference, training, augmentation = capsys.readouterr().out.splitlines()[2:]
    assert timed == [7, 7, 7]
    fresh = create_model("tiny", img_size=32) if model == "tiny" else train.create_convnet(model, 1000, 32)
    flops = measure.count_flops(fresh, 32)
    for line, cost in ((inference, flops), (training, 3 * flops)):
        assert "  8.0 images/s, batch 4, mean of 7 runs" in line
        assert f"{8 * cost / 1e12:.3g} TFLOP/s, {100 * 8 * cost / 1e10:.1f} % of the peak" in line
        assert "high-water mark" in line
    assert augmentation.startswith("augmentation  8.0 images/s")


def test_the_largest_batch_is_the_largest_power_of_two_that_fits(monkeypatch):
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    def ready(batch):
        def act():
            if batch > 200:
                raise torch.OutOfMemoryError

        return act

    assert measure.largest_batch(ready, torch.device("cuda")) == 128
    assert measure.largest_batch(ready, CPU) == 16


@pytest.mark.parametrize("distilled", [False, True])
def test_attention_maps_are_the_front_tokens_softmax_over_the_patches_and_their_rollout(distilled):
    torch.manual_seed(0)
    model = create_model("tiny", img_size=24, patch_size=8, distilled=distilled, num_classes=3).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(8)
    inputs, rows, front = torch.randn(2, 3, 24, 24), [], 2 if distilled else 1
    x = model.embed(inputs)
    for block in model.blocks:
        q, k = block.attn.qkv(block.norm1(x)).reshape(2, -1, 3, 3, 64)[:, :, :2].permute(2, 0, 3, 1, 4)
        rows.append(torch.exp(q @ k.mT / 8) / torch.exp(q @ k.mT / 8).sum(-1, keepdim=True))
        x = block(x)
    heads, rollout = measure.attention_maps(model, inputs, layer=5)
    assert heads.shape == (2, front, 3, 3, 3)
    assert rollout.shape == (2, front, 3, 3)
    for maps in (heads, rollout):
        torch.testing.assert_close(maps.sum(dim=(-1, -2)), torch.ones(maps.shape[:-2]))
    patches = rows[4][:, :, :front, front:]
    patches = (patches / patches.sum(-1, keepdim=True)).transpose(1, 2).unflatten(-1, (3, 3))
    torch.testing.assert_close(heads, patches, rtol=1e-4, atol=1e-6)
    product = torch.eye(9 + front)
    for row in rows[:5]:  # later layers multiply from the left
        product = torch.matmul(0.5 * row.mean(1) + 0.5 * torch.eye(9 + front), product)
    rolled = product[:, :front, front:]
    rolled = (rolled / rolled.sum(-1, keepdim=True)).unflatten(-1, (3, 3))
    torch.testing.assert_close(rollout, rolled, rtol=1e-4, atol=1e-6)


def test_the_attention_picture_has_a_row_for_each_token_and_a_column_for_each_head(
    tmp_path, monkeypatch, capsys
):
    save_network(tmp_path / "net.pth", ["a", "b"])
    Image.new("RGB", (300, 200), (10, 200, 30)).save(tmp_path / "photo.png")
    words = [tmp_path / "net.pth", tmp_path / "photo.png", "--out", tmp_path / "out.png"]
    assert run_evaluate(monkeypatch, "attention", *words) == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (80 + 5 * 116, 2 * 138)
        assert picture.getpixel((100, 50)) == picture.getpixel((100, 188)) == (10, 200, 30)
    heat = measure.overlay(Image.new("RGB", (40, 40)), torch.tensor([[0.0, 0.3], [0.3, 0.4]]))
    low, high = (np.array(heat.getpixel(at)) for at in ((2, 2), (37, 37)))
    assert high[:2].min() > 2 * low[2]  # yellow where most is, dark blue where nothing is
    assert run_evaluate(monkeypatch, "attention", *words, "--layer", "13") == 2
    assert "the network has 12 layers" in capsys.readouterr().err


def test_predictions_are_each_heads_softmax_and_their_mean(tmp_path, monkeypatch, capsys):
    model = save_network(tmp_path / "net.pth", ["a", "b", "c"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    (tmp_path / "deep/a").mkdir(parents=True)
    for name in ("deep/a/2.png", "deep/b.JPG", "3.png"):
        picture.save(tmp_path / name)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{tmp_path}/3.png\n\n".encode())))
    assert run_evaluate(monkeypatch, "predict", tmp_path / "net.pth", tmp_path / "deep", "-", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["image"] for r in records] == [
        f"{tmp_path}/{n}" for n in ("deep/a/2.png", "deep/b.JPG", "3.png")
    ]
    with torch.no_grad():
        first, second = (logits[0].softmax(0) for logits in model(inputs_of(tmp_path / "3.png")))
    for head, expected in (("class", first), ("distillation", second), ("fused", (first + second) / 2)):
        told = records[2][head]
        assert [each["name"] for each in told] == ["abc"[i] for i in expected.argsort(descending=True)]
        assert [each["probability"] for each in told] == pytest.approx(
            expected.sort(descending=True)[0].tolist()
        )
    assert run_evaluate(monkeypatch, "predict", tmp_path / "net.pth", tmp_path / "3.png", "--top", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(tmp_path / "3.png")
    assert lines[1].split() == ["class", "abc"[first.argmax()], f"{100 * first.max():.1f}", "%"]


def test_odd_images_are_predicted_or_told_in_one_line_each(tmp_path, monkeypatch, capsys):
    save_network(tmp_path / "net.pth", ["a", "tab\there"], distilled=False)
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    pictures = {"1x1.png": ("RGB", (1, 1)), "wide.png": ("L", (20_000, 2)), "cmyk.jpg": ("CMYK", (9, 9))}
    pictures |= {"new\nline é\x1b.png": ("P", (9, 9)), "16.png": ("I;16", (9, 9)), "la.png": ("LA", (9, 9))}
    for name, (mode, size) in pictures.items():
        Image.new(mode, size).save(tmp_path / name)
    files = [tmp_path / name for name in ("text.jpg", "missing.png", *pictures)]
    assert run_evaluate(monkeypatch, "predict", tmp_path / "net.pth", *files) == 2
    out, errors = capsys.readouterr()
    assert [line.split(" is ")[0] for line in errors.splitlines()] == [f"error: {file}" for file in files[:2]]
    assert len(out.splitlines()) == 2 * len(pictures)
    assert r"new\nline é\x1b.png" in out
    assert r"tab\there" in out
    assert run_evaluate(monkeypatch, "predict", tmp_path / "net.pth", tmp_path / "empty") == 2
    assert capsys.readouterr().err == f"error: there are no images below {tmp_path}/empty\n"


def write_log(run, epochs):
    run.mkdir()
    accuracies = ({"class": 10.0 + n, "distillation": 12.0 + n, "fused": 13.0 + n} for n in range(epochs))
    records = [{"epoch": n + 1, "loss": 2.0 / (n + 1), "accuracy": each} for n, each in enumerate(accuracies)]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_are_drawn_from_the_logs_of_runs(tmp_path, monkeypatch, capsys):
    from matplotlib.figure import Figure

    write_log(tmp_path / "first", 3)
    write_log(tmp_path / "sec$nd", 5)
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    words = [tmp_path / "first", tmp_path / "sec$nd", "--out", tmp_path / "curves.png"]
    assert run_evaluate(monkeypatch, "curves", *words) == 0
    left, right = figures[0].axes
    assert left.lines[1].get_ydata().tolist() == pytest.approx([2, 1, 2 / 3, 1 / 2, 2 / 5])
    assert [line.get_ydata()[0] for line in right.lines] == [10, 12, 13] * 2
    assert {len(line.get_xdata()) for line in right.lines[:3]} == {3}
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2 * picture.height
    (tmp_path / "first/log.jsonl").write_text("{}\n")
    for run, message in (("first", "is not the log of a run"), ("nowhere", "name a run's directory")):
        assert run_evaluate(monkeypatch, "curves", tmp_path / run) == 2
        assert message in capsys.readouterr().err


def test_curves_without_matplotlib_are_one_clear_line(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "run", 3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run_evaluate(monkeypatch, "curves", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        "error: curves needs matplotlib, which is not installed; pip install matplotlib\n"
    )


def test_every_word_has_an_example_in_its_help_and_in_the_readme(monkeypatch, capsys):
    words = ["accuracy", "compare", "tokens", "throughput", "attention", "predict", "curves", "augmentations"]
    readme = Path("README.md").read_text()
    for word in words:
        assert run_evaluate(monkeypatch, word, "--help") == 0
        examples = capsys.readouterr().out.partition("examples:")[2]
        assert f"evaluate.py {word} " in examples
        assert f"evaluate.py {word} " in readme


def test_the_contact_sheet_shows_every_operation(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "augmentations", "--out", str(tmp_path / "sheet.png")])
    measure.main()
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    rows = [pixels[98 * row : 98 * row + 72, 80:] for row in range(15)]
    assert len({row.tobytes() for row in rows}) == 15


# ---- README.md and results/ ----

PAGES = [Path("README.md"), *sorted(Path("results").glob("*.md"))]
PROGRAMS = ("train.py", "finetune.py", "evaluate.py")


def parser_of(script: str):
    return train.build_parser(script, "") if script == "train.py" else finetune.finetune_parser()


def flags_of(script: str) -> set[str]:
    """Every flag that a program reads."""
    if script == "evaluate.py":  # a parser for each word
        return {"--help", *re.findall(r'"(--[a-z][a-z-]+)"', Path(script).read_text())}
    return {flag for action in parser_of(script)._actions for flag in action.option_strings}


def commands() -> list[tuple[str, list[str], list[str]]]:
    """The commands on the pages: (program, the words before it, the words after it)."""
    found = []
    for page in PAGES:
        text = re.sub(r"\$\w+", "1", page.read_text().replace("\\\n", " "))  # a shell variable
        for block, inline in re.findall(r"^```\w*\n(.*?)^```|`([^`\n]+)`", text, re.MULTILINE | re.DOTALL):
            lines = [line for line in (block or inline).splitlines() if ".py" in line]
            for words in (shlex.split(line.partition(" ||")[0], comments=True) for line in lines):
                places = [n for n, word in enumerate(words) if word in PROGRAMS and len(words) > 1]
                found += [(words[n], words[:n], words[n + 1 :]) for n in places]
    return found


def test_the_readmes_commands_are_ones_that_the_programs_take():
    launcher = {flag for action in torchrun_parser()._actions for flag in action.option_strings}
    assert {script for script, _, _ in commands()} == set(PROGRAMS)
    for script, before, after in commands():
        given = {word for word in after if word.startswith("--")}
        assert given <= flags_of(script), (script, given - flags_of(script))
        assert {word for word in before if word.startswith("--")} <= launcher, before
        if script != "evaluate.py" and "--help" not in after:
            parser_of(script).parse_args(after)
        if script == "evaluate.py" and after:
            assert callable(getattr(measure, after[0], None)), after[0]


def test_every_flag_file_and_test_that_the_readme_names_exists():
    slurm = "--nodes --ntasks-per-node --gpus-per-node --cpus-per-task --time --requeue"
    known = set(slurm.split())
    known |= {flag for action in torchrun_parser()._actions for flag in action.option_strings}
    known |= set().union(*(flags_of(script) for script in PROGRAMS))
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
        assert named <= known, (page, named - known)
        for path in re.findall(r"\]\(([^)#:]+)(?:#L\d+)?\)", text):
            assert (page.parent / path).exists(), (page, path)
        for path in re.findall(r"\b(\w+\.py)\b", text):
            assert os.path.exists(path), (page, path)
        for name in re.findall(r"\btest_(?!all\b)\w+", text):
            assert name in globals(), (page, name)
        for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, anchor


def definitions(path: str) -> dict[str, int]:
    """The line of each class, function, method (as Class.method) and constant of a file."""
    lines = {}
    for node in ast.parse(Path(path).read_text()).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lines |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
            inner = node.body if isinstance(node, ast.ClassDef) else []
            lines |= {f"{node.name}.{n.name}": n.lineno for n in inner if isinstance(n, ast.FunctionDef)}
    return lines


def test_every_line_link_of_the_readme_points_at_the_definition_it_names():
    for page in PAGES:
        links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", page.read_text())
        assert len(links) == len(re.findall(r"\.py#", page.read_text())), f"{page}: a link names nothing"
        right = [(name, path, definitions(path).get(name)) for name, path, _ in links]
        stale = [
            f"[`{name}`]({path}#L{line}) should be #L{now}" if now else f"{path} defines no {name}"
            for (name, path, now), (_, _, line) in zip(right, links, strict=True)
            if str(now) != line
        ]
        assert not stale, "\n".join((f"{page}:", *stale))
