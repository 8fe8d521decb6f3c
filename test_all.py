"""The tests, in the order of the files they test. `python -m pytest -q` takes minutes on two cores.

Each compares with something independent of the code: Pillow, torch's own operation, a formula written out,
finite differences, a second way of computing.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter
from torch import nn

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
    create_teacher,
    hard_distillation_loss,
    label_loss,
    read_checkpoint,
    soft_distillation_loss,
    teacher_logits,
)
from model import Attention, Block, DeiT, DropPath, UsageError, attend, create_model, fuse, load_weights
from train import (
    Place,
    build_network,
    build_optimizer,
    complete,
    evaluate,
    headline,
    learning_rate,
    main,
    program,
    write_whole,
)

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
    drop = DropPath(0.3)
    out = drop(torch.ones(20_000, 2, 3))
    kept = out[:, 0, 0] > 0
    assert abs(kept.double().mean() - 0.7) < 0.015
    assert torch.equal(out, torch.where(kept, 1 / 0.7, 0.0)[:, None, None].expand_as(out))  # whole samples
    assert torch.equal(drop.eval()(out), out)


def test_resizing_position_embeddings_is_torchs_bicubic_and_spares_the_front_tokens():
    state = official_state(192, 198, True)
    model = create_model("tiny", img_size=384, distilled=True)
    assert load_weights(model, state) == ["pos_embed"]
    grid = state["pos_embed"][:, 2:].reshape(14, 14, 192)
    expected = F.interpolate(grid.permute(2, 0, 1)[None], size=(24, 24), mode="bicubic")[0].permute(1, 2, 0)
    assert torch.equal(model.pos_embed[:, :2], state["pos_embed"][:, :2])
    torch.testing.assert_close(model.pos_embed[0, 2:].reshape(24, 24, 192), expected)


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


# ---- data.py ----

CPU = torch.device("cpu")


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
    monkeypatch.setattr("data.read_image", lambda path: reads.append(path) or read_image(path))
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


def test_evaluation_crops_as_torchvisions_resize_and_centre_crop():
    pixels = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    expected = torchvision.transforms.Resize(64, bicubic)(image)
    expected = np.asarray(torchvision.transforms.CenterCrop(56)(expected)).transpose(2, 0, 1)
    assert np.array_equal(crop_file(image, 56, None), expected)


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


def test_a_broken_image_is_named_even_by_a_worker(tmp_path):
    data = load_data("folder", str(write_folder(tmp_path, [(50, 40), (30, 60)])), 24, CPU)[0]
    (tmp_path / "train/bee/3.png").write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(UsageError, match=r"bee/3\.png is not a readable image") as caught:
            collect(data, 0, 3, workers=workers)
        assert "\n" not in str(caught.value)


def test_folders_that_make_no_data_set_are_refused(tmp_path):
    write_folder(tmp_path / "a", [(8, 8)], splits=("train",))
    with pytest.raises(UsageError, match="there is no folder .*val"):
        load_data("folder", str(tmp_path / "a"), 8, CPU)
    write_folder(tmp_path / "a", [(8, 8)], ("ant", "cow"), ("val",))
    with pytest.raises(UsageError, match="different classes: 'bee'"):
        load_data("folder", str(tmp_path / "a"), 8, CPU)
    (tmp_path / "b/train/ant").mkdir(parents=True)
    (tmp_path / "b/val").mkdir()
    with pytest.raises(UsageError, match="no images in class folders below"):
        load_data("folder", str(tmp_path / "b"), 8, CPU)


# ---- train.py ----

ALONE = Place(0, 1, CPU)
QUICK = {"img_size": 16, "patch_size": 8, "epochs": 3, "batch_size": 16, "lr": 3e-3, "device": "cpu"}
PLAIN = {"augment": "off", "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "drop_path": 0.0}


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr("data.SHAPES_COUNT", {"train": 48, "val": 20})


def run_train(monkeypatch, *flags):
    """What `python train.py FLAGS` does, in this process; the exit code."""
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
    try:
        program(main)
    except SystemExit as ended:
        return ended.code
    return 0


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
    average = seen[1]
    for weights in seen[2:]:
        average = {key: 0.8 * average[key] + 0.2 * weights[key] for key in weights}
    for key, value in read_checkpoint(tmp_path / "run/last.pth")["ema"].items():
        torch.testing.assert_close(value, average[key])


DRIVER = """
import json, sys, torch, data, train
data.SHAPES_COUNT = {"train": 48, "val": 19}
losses, networks = [], []
make_loss, build = train.loss_function, train.build_network
def recording(settings, teacher):
    loss = make_loss(settings, teacher)
    def record(*arguments):
        value = loss(*arguments)
        mean = value.detach().clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        losses.append(mean.item())
        return value
    return record
def keeping(*arguments):
    networks.append(build(*arguments))
    return networks[-1]
train.loss_function, train.build_network = recording, keeping
train.main()
rank = int(__import__("os").environ.get("RANK", 0))
digest = {key: value.double().sum().item() for key, value in networks[-1].state_dict().items()}
with open(f"{sys.argv[sys.argv.index('--out') + 1]}/rank{rank}.json", "w") as file:
    json.dump({"losses": losses, "digest": digest}, file)
"""


def test_two_processes_follow_one_and_end_with_identical_weights(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    words = flags(QUICK | PLAIN)
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        command = [*start, str(tmp_path / "driver.py"), *words, "--out", str(tmp_path / name)]
        subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    one, first, second = (
        json.loads((tmp_path / name).read_text())
        for name in ("one/rank0.json", "two/rank0.json", "two/rank1.json")
    )
    assert len(one["losses"]) == 9
    assert one["losses"] == pytest.approx(first["losses"], rel=1e-4)
    assert first == second
    ends = [read_log(tmp_path / name)[-1]["accuracy"]["class"] for name in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], abs=0.01)  # 19 images: they do not divide evenly


def test_evaluation_scores_each_head_and_their_fusion():
    scores = (
        torch.tensor([[3.0, 0, 0], [0, 0, 2], [0, 4, 0]]),
        torch.tensor([[0, 5.0, 0], [0, 0, 1], [3, 0, 0]]),
    )
    images, labels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 0])

    class Student(nn.Module):
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
    assert set(student["model"]) == set(
        create_model("tiny", img_size=16, patch_size=8, distilled=True).state_dict()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epoch 3", "unrecognized arguments"),
        ("--lr -1", "must be at least 0"),
        ("--model huge", "unknown network 'huge'"),
        ("--img-size 30 --patch-size 8", "30 is not a multiple of patch size 8; try image size 32"),
        ("--batch-size 30 --accumulate 4", "does not divide into 1 processes × 4 parts; try 32"),
        ("--batch-size 64", "is more than an epoch's 48 images"),
        ("--data folder --data-path nowhere", "there is no folder nowhere"),
        ("--distill label --no-distill-token", "needs a transformer and no --no-distill-token"),
        ("--distill hard --teacher-weights none.pth", "there is no file none.pth"),
        ("--device mps", "no Apple GPU"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(
    tmp_path, monkeypatch, few_shapes, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    assert run_train(monkeypatch, *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.rglob("*.pth"))


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


def test_a_file_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"first"))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left on device; what was saved before is intact"):
        write_whole(path, fail)
    assert path.read_bytes() == b"first"


# ---- finetune.py and evaluate.py ----


def test_fine_tuning_starts_from_the_runs_weights_at_the_new_size(tmp_path, monkeypatch, few_shapes, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_train(monkeypatch, *flags(QUICK | {"epochs": 1})) == 0
    before = weights_of(tmp_path / "runs/shapes-tiny-none")
    monkeypatch.setattr(
        "sys.argv", ["finetune.py", "--epochs", "1", "--lr", "0", "--batch-size", "16", "--device", "cpu"]
    )
    finetune.main()  # without --checkpoint: the newest run; at a learning rate of (nearly) 0 the weights stay
    after = weights_of(tmp_path / "runs/shapes-tiny-none-24px")
    assert after.pop("pos_embed").shape == (1, 10, 192)
    assert before.pop("pos_embed").shape == (1, 5, 192)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-4)
    printed = capsys.readouterr().out
    assert "before, at 16 pixels: class" in printed
    assert "resized to 24 pixels (pos_embed): class" in printed


def test_evaluate_repeats_the_accuracy_that_training_ended_with(tmp_path, monkeypatch, few_shapes, capsys):
    assert run_train(monkeypatch, *flags(QUICK | {"distill": "label", "out": tmp_path / "run"})) == 0
    ended = read_checkpoint(tmp_path / "run/last.pth")["progress"]["log"][-1]["accuracy"]
    capsys.readouterr()
    monkeypatch.setattr(
        "sys.argv", ["evaluate.py", "accuracy", str(tmp_path / "run/last.pth"), "--device", "cpu"]
    )
    measure.main()
    assert capsys.readouterr().out == f"{tmp_path}/run/last.pth: {headline(ended)}\n"


def test_the_contact_sheet_shows_every_operation(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "augmentations", "--out", str(tmp_path / "sheet.png")])
    measure.main()
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    rows = [pixels[98 * row : 98 * row + 72, 80:] for row in range(15)]
    assert len({row.tobytes() for row in rows}) == 15


# ---- README.md ----


def test_every_flag_and_file_that_the_readme_names_exists():
    text = Path("README.md").read_text()
    known = {
        "--nproc_per_node",
        "--nnodes",
        "--node_rank",
        "--rdzv_endpoint",
        "--master_addr",
        "--standalone",
    }
    known |= {flag for action in train.build_parser("", "")._actions for flag in action.option_strings}
    known |= {"--checkpoint"} | set(re.findall(r'"(--[a-z-]+)"', Path("evaluate.py").read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", text))
    assert named
    assert named <= known, named - known
    for path in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(r"\b(\w+\.py)\b", text):
        assert os.path.exists(path), path
