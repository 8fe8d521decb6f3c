"""The transformer: attention, block, DeiT, its three sizes, the loading of weights (sections 3 and 5.1).

An image is cut into patches, each patch becomes one token, a class token (and, when distilled, a distillation
token) is put in front, and twelve blocks of self-attention and MLP mix them. One linear head reads each of
the front tokens. The parameters have the names, shapes and order of the official checkpoints.

    python -c "from model import create_model; print(create_model('tiny', distilled=True))"
"""

import difflib
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Table 1: depth (12 blocks) and head width (64) are shared by all sizes; embedding width and heads vary.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
# The authors' ImageNet checkpoints. A file's name ends in the first digits of its SHA-256.
OFFICIAL = {
    name: f"https://dl.fbaipublicfiles.com/deit/{file}.pth"
    for name, file in {
        "deit_tiny": "deit_tiny_patch16_224-a1311bcf",
        "deit_small": "deit_small_patch16_224-cd65a155",
        "deit_base": "deit_base_patch16_224-b5f2ef4d",
        "deit_tiny_distilled": "deit_tiny_distilled_patch16_224-b40b3cf7",
        "deit_small_distilled": "deit_small_distilled_patch16_224-649709d9",
        "deit_base_distilled": "deit_base_distilled_patch16_224-df68dfff",
        "deit_base_384": "deit_base_patch16_384-8de9b5d1",
        "deit_base_distilled_384": "deit_base_distilled_patch16_384-d0272ac0",
    }.items()
}


class UsageError(ValueError):
    """A person's mistake: its text says what is wrong and what to do. Programs end on it with exit code 2."""


def nearest(word: str, options: Iterable[str]) -> str:
    """The hint that ends a message about an unknown word: the option most like it, if one is."""
    found = difflib.get_close_matches(word, options, 1)
    return f"; did you mean {found[0]}?" if found else ""


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 1, written out: Softmax(QKᵀ/√d) V.

    q (B, heads, M, d), k and v (B, heads, N, d). Returns the output (B, heads, M, d) and the
    weights (B, heads, M, N), whose rows sum to 1.
    """
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return weights @ v, weights


class Attention(nn.Module):
    """Multi-head self-attention (section 3): tokens (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head."""
        # (B, N, 3·D) -> (B, N, 3, heads, D/heads) -> 3 × (B, heads, N, D/heads)
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def split_front(self, x: Tensor, front: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same with the queries of the first `front` tokens alone."""
        dim = x.shape[-1]
        (w_q, w_kv), (b_q, b_kv) = (p.split((dim, 2 * dim)) for p in (self.qkv.weight, self.qkv.bias))
        q = F.linear(x[:, :front], w_q, b_q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = F.linear(x, w_kv, b_kv).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor, front: int | None = None) -> Tensor:
        """All tokens attend, or with `front` only the first so many: (B, N, D) -> (B, front or N, D)."""
        q, k, v = self.split(x) if front is None else self.split_front(x, front)
        # Equation 1 in a fused kernel, which computes the same without ever storing the (N, N) weights
        out = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))  # (B, heads, N, D/heads) -> (B, N, D)

    def weights(self, x: Tensor) -> Tensor:
        """The attention weights (B, heads, N, N) that forward applies but does not keep."""
        return attend(*self.split(x))[1]


class MLP(nn.Module):
    """The feed-forward network of a block (section 3): D -> 4D -> D with an exact (erf) GELU between."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """A residual branch with stochastic depth (Huang et al., 2016): left out for whole samples at random.

    A kept branch is scaled by 1/(1 - rate), so that its expectation stays what it is in evaluation.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], front: int | None = None) -> Tensor:
        """x + branch(x), both of the first `front` tokens if it is given: (B, N, D) -> (B, front or N, D)."""
        if not self.training or self.rate == 0.0:
            return x[:, :front] + branch(x)
        scale, keep = 1 / (1 - self.rate), torch.rand(len(x), 1, 1, device=x.device) >= self.rate
        if x.device.type != "cpu" or torch.compiler.is_compiling() or keep.all():
            return x[:, :front].add(branch(x) * keep, alpha=scale)
        # A CPU computes only what is kept. On a GPU that would wait for the draw, and cut a compiled graph.
        kept = keep.flatten().nonzero().flatten()
        return x[:, :front].index_add(0, kept, branch(x.index_select(0, kept)).to(x.dtype), alpha=scale)


class Block(nn.Module):
    """One transformer block (section 3): pre-norm residual attention, then pre-norm residual MLP."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, front: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `front` the first so many tokens of it: (B, front, D)."""
        x = self.drop_path(x, lambda x: self.attn(self.norm1(x), front), front)
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cuts images (B, 3, G·P, G·P) into G² patches and projects each linearly: (B, G², D)."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        # A convolution whose stride is its kernel is one linear layer on every patch.
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, D, G, G) -> (B, G², D)


class DeiT(nn.Module):
    """Data-efficient image transformer (sections 3 to 5.1); `create_model` builds the paper's sizes.

    Tokens are ordered class, distillation (when distilled), patches; `pos_embed` covers all of them.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        depth: int = 12,
        *,
        num_classes: int = 1000,
        img_size: int = 224,
        patch_size: int = 16,
        distilled: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.img_size = img_size
        self.distilled = distilled
        num_tokens = (2 if distilled else 1) + (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim))
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.dropout = nn.Dropout(dropout)
        # Stochastic depth grows linearly from 0 in the first block to its full rate in the last.
        rates = [drop_path * n / max(1, depth - 1) for n in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)
        self.apply(self._initialise)
        for token in (self.cls_token, self.pos_embed, *([self.dist_token] if distilled else [])):
            nn.init.trunc_normal_(token, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        # Truncated normal after Hanin & Rolnick (section 6). The patch convolution keeps torch's own
        # initialisation, as in the authors' code.
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images float (B, 3, S, S), normalised -> the tokens (B, N, D) that enter the first block."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.img_size, self.img_size):
            raise ValueError(
                f"the model takes images (B, 3, {self.img_size}, {self.img_size}), not {tuple(images.shape)}"
            )
        front = (self.cls_token, self.dist_token) if self.distilled else (self.cls_token,)
        front = [token.expand(len(images), -1, -1) for token in front]
        return self.dropout(torch.cat([*front, self.patch_embed(images)], dim=1) + self.pos_embed)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images float (B, 3, S, S), normalised -> class logits (B, C).

        When distilled: the pair (class logits, distillation logits), in training and in evaluation alike.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        # The heads read the front tokens alone, so the last block computes nothing else of its output.
        x = self.norm(self.blocks[-1](x, front=2 if self.distilled else 1))
        return (self.head(x[:, 0]), self.head_dist(x[:, 1])) if self.distilled else self.head(x[:, 0])

    def attention_weights(self, images: Tensor) -> list[Tensor]:
        """The attention weights (B, heads, N, N) of every block, first to last."""
        x, weights = self.embed(images), []
        for block in self.blocks:
            weights.append(block.attn.weights(block.norm1(x)))
            x = block(x)
        return weights


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: int = 224,
    patch_size: int = 16,
    distilled: bool = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> DeiT:
    """A DeiT with fresh weights: `tiny`, `small` or `base` (Table 1).

    `img_size` and `patch_size` are in pixels, images are square; `dropout` and `drop_path` are probabilities.
    Raises ValueError for an unknown name or a size that makes no model.
    """
    if name not in SIZES:
        raise UsageError(f"unknown model {name!r}; choose one of {', '.join(SIZES)}{nearest(name, SIZES)}")
    for what, number in (("num_classes", num_classes), ("img_size", img_size), ("patch_size", patch_size)):
        if not isinstance(number, int) or number < 1:
            raise UsageError(f"{what} must be a whole number of at least 1, not {number!r}")
    if img_size % patch_size:
        raise UsageError(
            f"image size {img_size} is not a multiple of patch size {patch_size}; "
            f"try image size {max(1, round(img_size / patch_size)) * patch_size}"
        )
    for what, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0.0 <= rate < 1.0:
            raise UsageError(f"{what} must be at least 0 and below 1, not {rate!r}")
    dim, num_heads = SIZES[name]
    return DeiT(
        dim,
        num_heads,
        num_classes=num_classes,
        img_size=img_size,
        patch_size=patch_size,
        distilled=distilled,
        dropout=dropout,
        drop_path=drop_path,
    )


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 at least: softmax and losses need more digits than autocast leaves them."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def fuse(outputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Class probabilities (B, C) from a model's output logits: late fusion (section 4).

    The softmax of one tensor, or the mean of the two softmaxes of a pair; the paper adds them, which ranks
    classes the same and does not sum to 1. Computed in float32 at least.
    """
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    probabilities = [torch.softmax(widened(logits), dim=-1) for logits in outputs]
    return torch.stack(probabilities).mean(dim=0)


def resize_pos_embed(pos_embed: Tensor, grid: int, num_front: int) -> Tensor:
    """Position embeddings (1, F + g², D) resized bicubically to (1, F + grid², D) (section 3).

    Bicubic, because bilinear interpolation would shrink the vectors' norm (section 6). The F = `num_front`
    embeddings of the class and distillation tokens are returned as they are, and an equal grid changes
    nothing.
    """
    front, patches = pos_embed[:, :num_front], pos_embed[:, num_front:]
    old = math.isqrt(patches.shape[1])
    if old == grid:
        return pos_embed
    patches = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, g², D) -> (1, D, g, g)
    patches = F.interpolate(patches.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([front, patches.to(front.dtype).flatten(2).transpose(1, 2)], dim=1)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Raises UsageError if `state` does not fit a network's `own`; it names the first key and both shapes."""
    odd = [key for key in {**own, **state} if key not in own or key not in state]
    odd += [key for key in own if key in state and own[key].shape != state[key].shape]
    if odd:
        theirs, ours = (
            str(tuple(tensors[odd[0]].shape)) if odd[0] in tensors else "absent" for tensors in (state, own)
        )
        raise UsageError(f"{what}: {odd[0]} is {theirs} in the weights and {ours} in the model")


def load_weights(model: DeiT, state_dict: dict[str, Tensor]) -> list[str]:
    """Loads an official or own state dict into `model`, strictly.

    `pos_embed` is resized to the model's grid; heads for another number of classes keep their initial values.
    Returns the names of the parameters that were resized or left. Any other mismatch raises ValueError and
    names the key and both shapes; the model is then unchanged.
    """
    own, state, changed = model.state_dict(), dict(state_dict), []
    num_front = 2 if model.distilled else 1
    for key in own:
        if key not in state or state[key].shape == own[key].shape:
            continue
        if key == "pos_embed" and state[key].shape[2] == own[key].shape[2]:
            patches = state[key].shape[1] - num_front
            if patches > 0 and math.isqrt(patches) ** 2 == patches:
                grid = math.isqrt(own[key].shape[1] - num_front)
                state[key] = resize_pos_embed(state[key], grid, num_front)
                changed.append(key)
        elif key.startswith("head") and state[key].shape[1:] == own[key].shape[1:]:
            state[key] = own[key]
            changed.append(key)
    check_fit(own, state, "weights do not fit the model")
    model.load_state_dict(state)
    return changed
