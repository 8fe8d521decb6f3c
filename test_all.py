"""The tests, in the order of the files they test. `python -m pytest -q` runs them all in a few minutes on two cores.

Each compares with something independent of the code: Pillow, torch's own operation, a formula written out,
finite differences, a second way of computing.
"""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from distill import (
    REGNETY,
    create_teacher,
    hard_distillation_loss,
    label_loss,
    read_checkpoint,
    soft_distillation_loss,
    teacher_logits,
)
from model import Attention, Block, DeiT, DropPath, attend, create_model, fuse, load_weights

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
            q, k, v = (x[image] @ w[12 * i : 12 * i + 12][rows].T + b[12 * i : 12 * i + 12][rows] for i in range(3))
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
        class_logits, distillation_logits = torch.func.functional_call(model, dict(zip(names, values, strict=True)), images)
        return class_logits.square().sum() + distillation_logits.sin().sum()

    assert torch.autograd.gradcheck(loss, tuple(p.detach().requires_grad_() for p in model.parameters()), fast_mode=True)


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
    torch.testing.assert_close(model.train()(images), (class_logits, distillation_logits))  # no dropout: the same
    assert create_model("tiny", num_classes=7)(torch.randn(2, 3, 224, 224)).shape == (2, 7)


def test_attention_weights_are_those_that_forward_applies():
    model = create_model("tiny", img_size=32, patch_size=8, distilled=True).eval()
    images = torch.randn(2, 3, 32, 32)
    weights = model.attention_weights(images)
    assert [w.shape for w in weights] == [(2, 3, 18, 18)] * 12
    x = model.embed(images)
    for block, w in zip(model.blocks, weights, strict=True):
        values = block.attn.split(block.norm1(x))[2]
        torch.testing.assert_close(block.attn(block.norm1(x)), block.attn.proj((w @ values).transpose(1, 2).flatten(2)))
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
    assert [round(block.drop_path.rate, 6) for block in model.blocks] == [round(0.01 * n, 6) for n in range(12)]
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
    class_logits, distillation_logits, teacher = (3 * torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
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
    assert soft_distillation_loss(outputs, targets, teacher, tau, lam).item() == pytest.approx(expected, rel=1e-12)
    chosen = -log_softmax64(student)[np.arange(6), teacher.numpy().argmax(1)].mean()
    expected = 0.5 * cross_entropy + 0.5 * chosen  # the teacher's label is not smoothed
    assert hard_distillation_loss(outputs, targets, teacher).item() == pytest.approx(expected, rel=1e-12)
    expected = cross_entropy - (y * log_softmax64(student)).sum(1).mean() if token else 2 * cross_entropy
    assert label_loss(outputs, targets).item() == pytest.approx(expected / 2, rel=1e-12)


def test_the_papers_tau_and_lambda_are_the_defaults():
    z, labels, teacher = torch.randn(6, 5), torch.randint(5, (6,)), torch.randn(6, 5)
    assert torch.equal(soft_distillation_loss(z, labels, teacher), soft_distillation_loss(z, labels, teacher, 3.0, 0.1))


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
    small, large = create_teacher("regnet_y_200mf", 5, img_size=32), create_teacher("regnet_y_200mf", 5, img_size=96)
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
    mistakes = [("regnet_y_200mf", 6, file, r"fc.weight is \(5, 368\)"), ("resnet18", 5, file, "not a resnet18")]
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
