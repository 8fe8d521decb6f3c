"""The transformer: attention, block, DeiT, its three sizes, the loading of weights (sections 3 and 5.1).

An image is cut into patches, each patch becomes one token, a class token (and, when distilled, a distillation
token) is put before them, and twelve blocks of self-attention and MLP mix them. One linear head reads each of
the prefix tokens. The parameters have the names, shapes and order of the official checkpoints.

    python -c "from model import create_model; print(create_model('tiny', distilled=True))"
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Table 1: depth (12 blocks) and head width (64) are shared by all sizes; embedding width and heads vary.
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


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

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or only what the first `num_queries` tokens get: (B, num_queries, D)."""
        q, k, v = self.split(x)
        # Equation 1, as a rule in a fused kernel, which never stores the (N, N) weights
        out = F.scaled_dot_product_attention(q[:, :, :num_queries], k, v)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))  # (B, heads, N, D/heads) -> (B, N, D)


class MLP(nn.Module):
    """The feed-forward network of a block (section 3): D -> 4D -> D with an exact (erf) GELU between."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): zeroes a residual branch for whole samples at random.

    What is kept is scaled by 1/(1 - rate), so that its expectation stays what it is in evaluation.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """One transformer block (section 3): pre-norm residual attention, then pre-norm residual MLP."""

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or only the first `num_queries` tokens of it: (B, num_queries, D)."""
        x = x[:, :num_queries] + self.drop_path(self.attn(self.norm1(x), num_queries))
        return x + self.drop_path(self.mlp(self.norm2(x)))


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
        self.num_prefix_tokens = 2 if distilled else 1
        num_patches = (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + num_patches, dim))
        self.patch_embed = PatchEmbed(dim, patch_size)
        self.dropout = nn.Dropout(dropout)
        # Stochastic depth grows linearly from 0 in the first block to its full rate in the last.
        rates = [drop_path * n / max(1, depth - 1) for n in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, num_heads, dropout, rate) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)
        self.apply(self._init_weights)
        for embedding in (self.cls_token, self.pos_embed, *([self.dist_token] if distilled else [])):
            nn.init.trunc_normal_(embedding, std=0.02)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # Truncated normal after Hanin & Rolnick (section 6). The patch convolution keeps torch's own
        # initialization, as in the authors' code.
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images float (B, 3, S, S), normalized -> the tokens (B, N, D) that enter the first block."""
        size = self.img_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"the model takes images (B, 3, {size}, {size}), not {tuple(images.shape)}")
        tokens = (self.cls_token, self.dist_token) if self.distilled else (self.cls_token,)
        tokens = [token.expand(images.shape[0], -1, -1) for token in tokens]
        return self.dropout(torch.cat([*tokens, self.patch_embed(images)], dim=1) + self.pos_embed)

    def forward_features(self, images: Tensor, num_queries: int | None = None) -> Tensor:
        """Images as in `forward` -> the normalized tokens (B, N, D) of the last block, prefix tokens first.

        Prefix tokens embed the images, the others patches; `num_queries` asks for the first so many alone.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, num_queries))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images float (B, 3, S, S), normalized -> class logits (B, C).

        When distilled: the pair (class logits, distillation logits), in training and in evaluation alike.
        """
        # The heads read the prefix tokens alone: 6 % fewer FLOPs at 224 than for all tokens in the last block
        x = self.forward_features(images, num_queries=self.num_prefix_tokens)
        return (self.head(x[:, 0]), self.head_dist(x[:, 1])) if self.distilled else self.head(x[:, 0])

    def attention_weights(self, images: Tensor) -> list[Tensor]:
        """The attention weights (B, heads, N, N) of every block, which `forward` never stores."""
        x, weights = self.embed(images), []
        for block in self.blocks:
            weights.append(attend(*block.attn.split(block.norm1(x)))[1])
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
    depth: int = 12,
) -> DeiT:
    """A DeiT with fresh weights: `tiny`, `small` or `base` (Table 1).

    `img_size` and `patch_size` are in pixels, images are square; `dropout` and `drop_path` are probabilities.
    The paper's depth is 12 blocks. Raises ValueError for an unknown name or a size that makes no model.
    """
    if name not in SIZES:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(SIZES)}")
    sizes = dict(num_classes=num_classes, img_size=img_size, patch_size=patch_size, depth=depth)
    for setting, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{setting} must be a whole number of at least 1, not {value!r}")
    if img_size % patch_size:
        fitting = max(1, round(img_size / patch_size)) * patch_size
        raise ValueError(
            f"image size {img_size} is not a multiple of patch size {patch_size}; try image size {fitting}"
        )
    for setting, rate in (("dropout", dropout), ("drop_path", drop_path)):
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"{setting} must be at least 0 and below 1, not {rate!r}")
    dim, num_heads = SIZES[name]
    return DeiT(dim, num_heads, distilled=distilled, dropout=dropout, drop_path=drop_path, **sizes)


def upcast(logits: Tensor) -> Tensor:
    """Logits in float32 at least: softmax and losses need more digits than autocast leaves them."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def fuse(outputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Class probabilities (B, C) from a model's output logits: late fusion (section 4).

    The softmax of one tensor, or the mean of the two softmaxes of a pair; the paper adds them, which ranks
    classes the same and does not sum to 1. Computed in float32 at least.
    """
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    return torch.stack([upcast(logits).softmax(dim=-1) for logits in outputs]).mean(dim=0)


def resize_pos_embed(pos_embed: Tensor, grid: int, num_prefix_tokens: int) -> Tensor:
    """Position embeddings (1, P + g², D) resized bicubically to (1, P + grid², D) (section 3).

    Bicubic, because bilinear would shrink the vectors' norm (section 6). The P prefix tokens do not change.
    """
    prefix, patches = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    old_grid = math.isqrt(patches.shape[1])
    patches = patches.reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2)  # (1, g², D) -> (1, D, g, g)
    patches = F.interpolate(patches.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([prefix, patches.to(prefix.dtype).flatten(2).transpose(1, 2)], dim=1)


def check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], message: str) -> None:
    """Raises ValueError unless `state` has the keys and shapes of `expected`; names a key and both shapes."""
    for key in {**expected, **state}:
        given, needed = (tuple(d[key].shape) if key in d else "absent" for d in (state, expected))
        if given != needed:
            raise ValueError(f"{message}: {key} is {given} in the weights and {needed} in the model")


def load_weights(model: DeiT, state_dict: dict[str, Tensor]) -> list[str]:
    """Loads a state dict, ours or an official one, into `model`, strictly.

    `pos_embed` is resized to the model's grid; heads for another number of classes keep their initial values.
    Returns the names of the parameters that were resized or kept. Any other mismatch raises ValueError and
    names the key and both shapes; the model is then unchanged.
    """
    expected, state, changed = model.state_dict(), dict(state_dict), []
    prefix = model.num_prefix_tokens
    for key, value in expected.items():
        if key not in state or state[key].shape == value.shape:
            continue
        if key == "pos_embed" and state[key].shape[::2] == value.shape[::2]:  # (1, N, D) of another N
            num_patches = state[key].shape[1] - prefix
            if num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches:
                state[key] = resize_pos_embed(state[key], math.isqrt(value.shape[1] - prefix), prefix)
                changed.append(key)
        elif key.startswith("head") and state[key].shape[1:] == value.shape[1:]:
            state[key] = value
            changed.append(key)
    check_fit(expected, state, "weights do not fit the model")
    model.load_state_dict(state)
    return changed
