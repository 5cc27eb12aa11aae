"""The model's own arithmetic in fewer operations, with the same weights under the same names.

In decoding, a GPU needs more time to start an operation than to compute it. So `fuse` replaces
modules of the model families below, right after a model is loaded. transformers itself is not
changed, and checkpoints stay the same. Per layer of Gemma 2:

    norm            8 operations, now 2 (torch has one for RMSNorm)
    q, k, v         3 products, now 1; gate and up 2, now 1   (sampling only)
    rotation        10, now 3 for q and k together            (sampling only; 6 when scored)

Several products become one where their weights lie one behind the other in memory. `join` puts them
there. Next to read: ranks.py.
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED = "grouped"  # the attention that samples, and that scores where there is a softcap
FAMILIES = ("Gemma2", "Gemma3", "Llama", "Mistral", "Qwen2", "Qwen3")


def fuse(model):
    """Replace modules of a model. Shapes and weights stay, and results stay up to rounding."""
    parts = {"RMSNorm": Norm, "RotaryEmbedding": Rotary, "Attention": Attention, "MLP": GatedMlp}
    fresh = {f"{family}{part}": kind for family in FAMILIES for part, kind in parts.items()}
    fresh["Phi3RMSNorm"] = Norm
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ in fresh:
                setattr(parent, name, fresh[type(child).__name__](child))
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation(GROUPED)
    return model


# Shapes: n rows, S new tokens, L columns (positions) in use, d hidden size, D size of a head,
# H heads of queries, G heads of keys and values; H / G heads of queries share one of these.
# --- 1. Modules ----------------------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm over the last dimension; Gemma stores its weights less 1."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.weight, self.from_one = old.weight, type(old).__name__.startswith("Gemma")
        self.eps = old.eps if self.from_one else old.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape, weight = self.weight.shape, self.weight
        if self.from_one and x.dtype != torch.float32:  # 1 + weight would lose bits
            normed = F.rms_norm(x, shape, None, self.eps)
            return torch.addcmul(normed, normed, weight)
        return F.rms_norm(x, shape, 1 + weight if self.from_one else weight, self.eps)


class Rotary(nn.Module):
    """Cosine and sine of each position, the sine of the first half of a head negated."""

    def __init__(self, old: nn.Module):
        super().__init__()
        self.old = old

    def forward(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.old(*args, **kwargs)  # (n, S, D)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cos, sin


class Attention(nn.Module):
    """Attention with rotated queries and keys, which may be normed; some have a softcap."""

    def __init__(self, old: nn.Module):
        super().__init__()
        vars(self).update(vars(old))
        self.eager = sys.modules[type(old).__module__].eager_attention_forward
        self.joined = None

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs
    ):
        """(n, S, d) -> (n, S, d), and the attention weights if the implementation returns them."""
        angles = [x[:, :, None] for x in position_embeddings]  # (n, S, 1, D)
        joined, write = usable(self.joined), getattr(past_key_values, "write", None)
        if joined is None or write is None:
            query, key, value = (x.transpose(1, 2) for x in self.heads(hidden_states, *angles))
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        else:
            heads = joined(hidden_states).unflatten(-1, (-1, self.head_dim))
            query, shared = self.in_place(heads, *angles)
            key, value = write(shared, self.layer_idx)
        kind = self.config._attn_implementation
        attended, weights = ALL_ATTENTION_FUNCTIONS.get_interface(kind, self.eager)(
            self,
            query,  # (n, H, S, D)
            key,  # (n, G, L, D), as value
            value,
            attention_mask,
            scaling=self.scaling,
            softcap=getattr(self, "attn_logit_softcapping", None),
            **kwargs,
        )
        return self.o_proj(attended.flatten(-2)), weights

    def heads(self, hidden, cos, sin) -> list[torch.Tensor]:
        """Queries (n, S, H, D), keys and values (n, S, G, D) of new tokens."""
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (p(hidden).unflatten(-1, (-1, self.head_dim)) for p in projections)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        turned = [torch.addcmul(x * cos, half_turned(x), sin) for x in (query, key)]
        return [*turned, value]

    def in_place(self, heads, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
        """What `heads` does, in place, for all heads in one tensor (n, S, H + 2G, D).

        Returns queries (n, H, S, D), and keys and values in one tensor (n, S, 2, G, D).
        """
        groups = self.k_proj.out_features // self.head_dim
        sizes = [heads.shape[2] - 2 * groups, groups, groups]
        if hasattr(self, "q_norm"):
            query, key, _ = heads.split(sizes, dim=2)
            query.copy_(self.q_norm(query))
            key.copy_(self.k_norm(key))
        turned = heads[:, :, :-groups]
        half = half_turned(turned)
        turned.mul_(cos).addcmul_(half, sin)
        query, shared = heads.split([sizes[0], 2 * groups], dim=2)
        return query.transpose(1, 2), shared.unflatten(2, (2, groups))


def half_turned(x: torch.Tensor) -> torch.Tensor:
    """The two halves of each head, exchanged; the minus sign of a rotation is in Rotary's sine."""
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


class GatedMlp(nn.Module):
    """A gated feed-forward layer."""

    def __init__(self, old: nn.Module):
        super().__init__()
        vars(self).update(vars(old))
        self.joined = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = usable(self.joined)
        if joined is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = joined(x).split(joined.sizes, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


def grouped_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs
):
    """Attention of queries (n, H, S, D), softcapped or not; one product for all that share a key.

    attention_mask (n, 1, S, L) is added to the scores: 0, or -inf where a query must not look.
    Returns (n, S, H, D). transformers' own attention would copy the keys for each head of queries.
    """
    (n, heads, size, width), (groups, columns) = query.shape, key.shape[1:3]
    scale = (width**-0.5 if scaling is None else scaling) / (softcap or 1)
    query = query.reshape(n * groups, -1, width)  # (n * G, H / G * S, D)
    key, value = key.flatten(0, 1), value.flatten(0, 1)  # (n * G, L, D)
    ignored = query.detach()[:1, :1, :1]  # since beta=0
    scores = torch.baddbmm(ignored, query, key.transpose(1, 2), beta=0, alpha=scale)
    if softcap:
        scores.tanh_()
    scores = scores.view(n, groups, -1, size, columns)
    scores = torch.add(attention_mask[:, None], scores, alpha=softcap or 1)
    weights = scores.softmax(dim=-1).view(n * groups, -1, columns)
    return (weights @ value).view(n, heads, size, -1).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, grouped_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED, eager_mask)

# --- 2. Products of one input --------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """Linear layers with the same input as one layer: a view of their weights (and biases)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: list[int]
    first: nn.Parameter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)

    def __deepcopy__(self, _memo: dict) -> None:
        """None for a copied layer: a copy would hold its weights twice. `join` makes a new one."""


@torch.inference_mode(False)  # weights moved in inference mode could not be trained
def join(model) -> None:
    """Make one product of plain layers with the same input, for sampling.

    This moves their weights one behind the other in memory. It is called before each rollout, since
    the model may have been moved or copied, or may have got adapters.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            module.joined = as_one(module.q_proj, module.k_proj, module.v_proj)
        elif isinstance(module, GatedMlp):
            module.joined = as_one(module.gate_proj, module.up_proj)


def as_one(*linears: nn.Module) -> Joined | None:
    """The layers as one, or None if one of them is not a plain nn.Linear, as with adapters."""
    if not all(type(linear) is nn.Linear for linear in linears):
        return None
    weights, biases = zip(*((linear.weight, linear.bias) for linear in linears), strict=True)
    sizes = [linear.out_features for linear in linears]
    bias = None if biases[0] is None else side_by_side(biases)
    return Joined(side_by_side(weights), bias, sizes, weights[0])


def side_by_side(tensors: tuple[nn.Parameter, ...]) -> torch.Tensor:
    """A view of tensors as one, (sum of rows, ...); if they lie apart, they are moved together."""
    first, rows = tensors[0].data, [len(tensor) for tensor in tensors]
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    same = len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    if not same or [tensor.data_ptr() for tensor in tensors[1:]] != ends[:-1]:
        whole = torch.cat([tensor.data for tensor in tensors])
        for tensor, part in zip(tensors, whole.split(rows), strict=True):
            tensor.data = part
        return whole
    return first.as_strided((sum(rows), *first.shape[1:]), first.stride())


def usable(joined: Joined | None) -> Joined | None:
    """`joined` in sampling, if the weights have not moved since `join`; else None.

    Training needs the weights one by one, since each has a gradient of its own.
    """
    if torch.compiler.is_compiling() or joined is None or not torch.is_inference_mode_enabled():
        return None
    return joined if joined.weight.data_ptr() == joined.first.data_ptr() else None
