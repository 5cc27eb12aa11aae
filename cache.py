"""What the rows have read so far: a cache of keys and values that attempts are continued from.

Both kinds do the same, and sample.py's loop knows no difference:

    read(contexts)   take in what is new of each row's context; all rows are live again
    step(token)      take in one more token of each live row
    keep(going)      go on with these of the live rows only

Gemma2Cache is fast: a forward pass of Gemma 2 over memory that is there from the start. Rows stand
at their own positions, a prompt is read once for its k samples, and attempt 2 continues where
attempt 1 ended: the last token of attempt 1 was sampled but never fed, so it is read with p1.
AnyCache does it with what Hugging Face has for every causal LM. Next to read: tasks.py.
"""

import torch
from transformers import DynamicCache, Gemma2ForCausalLM
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from models import head


def cache_for(model, rows: int, columns: int):
    """An empty cache for so many rows of at most so many tokens."""
    fast = isinstance(model, Gemma2ForCausalLM)
    return Gemma2Cache(model, rows, columns) if fast else AnyCache(model)


# Shapes: B rows, n of them live, S new tokens, L columns in use, V vocabulary, D size of a head.
# --- 1. Gemma 2 ------------------------------------------------------------------------------


class Gemma2Cache:
    """Keys and values (B, heads, columns, D) of each layer. The live rows stand first."""

    def __init__(self, model, rows: int, columns: int):
        config, self.model = model.config, model
        shape = (rows, config.num_key_value_heads, columns, config.head_dim)
        options = {"dtype": model.dtype, "device": model.device}
        # Zeros, since what is masked has weight 0 but is multiplied all the same.
        pairs = [torch.zeros(2, *shape, **options) for _ in model.model.layers]
        self.layers = [pair.unbind() for pair in pairs]
        self.row_at = torch.arange(rows, device=model.device)  # which row stands where
        self.held = torch.zeros_like(self.row_at)  # tokens of each
        self.longest = 0  # of the live rows' tokens

    def read(self, contexts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The live rows (B,) in their order, and the logits (B, V) of what follows."""
        held = self.held.tolist()
        if any(held):
            places = zip(self.row_at.tolist(), held, strict=True)
            logits = self.extend([contexts[row][n:] for row, n in places])
            return self.row_at.clone(), logits
        place: dict[tuple, int] = {}  # the samples of a prompt are read as one
        owner = [place.setdefault(tuple(context), len(place)) for context in contexts]
        logits = self.extend(list(place))
        for keys, values in self.layers:
            keys[:, :, : self.longest] = keys[owner, :, : self.longest]
            values[:, :, : self.longest] = values[owner, :, : self.longest]
        self.held = self.held[owner]
        return self.row_at.clone(), logits[owner]

    def extend(self, new: list) -> torch.Tensor:
        """Read the `new` tokens of the first rows; returns the logits (n, V) of what follows."""
        counts = torch.tensor([len(tokens) for tokens in new], device=self.row_at.device)
        tokens = torch.tensor([t for row in new for t in row], device=counts.device)  # (N,)
        held, each = self.held[: len(new)], torch.arange(int(counts.max()), device=counts.device)
        rows, places = (each < counts[:, None]).nonzero(as_tuple=True)  # (N,), (N,)
        self.longest = int((held + counts).max())
        positions = held[:, None] + each.clamp(max=counts[:, None] - 1)  # (n, S)
        hidden = last_hidden(self.model, tokens, rows, places, positions, self.in_use(len(new)))
        self.held[: len(new)] += counts
        return head(self.model, hidden[counts.cumsum(dim=0) - 1])

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Token (n,) of each live row in their order; returns the next logits (n, V)."""
        rows, held = torch.arange(len(token), device=token.device), self.held[: len(token)]
        self.longest += 1
        first = torch.zeros_like(rows)
        hidden = last_hidden(self.model, token, rows, first, held[:, None], self.in_use(len(token)))
        self.held[: len(token)] += 1
        return head(self.model, hidden)

    def in_use(self, n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(k[:n, :, : self.longest], v[:n, :, : self.longest]) for k, v in self.layers]

    def keep(self, going: torch.Tensor) -> torch.Tensor:
        """Let the live rows that are `going` (n,) go on; returns which (n,), in their new order.

        A finished row changes places with a going one from the end, and stays there until the next
        attempt is asked for.
        """
        held = self.held[: len(going)]
        count, self.longest = torch.stack([going.sum(), (held * going).max()]).tolist()
        order = torch.arange(len(going), device=going.device)
        gaps = (~going[:count]).nonzero()[:, 0]
        if len(gaps):
            fillers = going[count:].nonzero()[:, 0] + count
            there, here = torch.cat([gaps, fillers]), torch.cat([fillers, gaps])
            caches = [tensor for pair in self.layers for tensor in pair]
            for tensor in (order, self.row_at, self.held, *caches):
                tensor[there] = tensor[here]
        return order[:count]


def last_hidden(model, tokens, rows, places, positions, layers) -> torch.Tensor:
    """Gemma 2's last hidden states (N, d) of the new tokens (N,) of n rows, up to S of each.

    rows, places: the row of each token, and which of its row's new ones it is; (N,) each.
    positions: where in their rows the new ones stand, (n, S). layers: the rows' key and value
    caches (n, heads, L, D), into which the tokens are written. A token sees its own column and
    those before it. No shape depends on what is in a tensor.
    """
    config, body, at = model.config, model.model, positions[rows, places]
    columns = torch.arange(layers[0][0].shape[2], device=tokens.device)
    back = positions[:, None, None, :, None] - columns  # (n, 1, 1, S, L)
    unseen = {"full_attention": back < 0}
    unseen["sliding_attention"] = unseen["full_attention"] | (back >= config.sliding_window)
    x = body.embed_tokens(tokens)  # (N, d)
    cos, sin = body.rotary_emb(x, at[None])  # (1, N, D)
    for layer, kind, (keys, values) in zip(body.layers, config.layer_types, layers, strict=True):
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(normed).view(len(tokens), -1, config.head_dim) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, cos[0], sin[0])  # (N, heads, D)
        keys[rows, :, at], values[rows, :, at] = k, v
        queries = q.new_zeros(*positions.shape, *q.shape[1:])  # padded for the product only
        queries[rows, places] = q
        seen = attend(queries, keys, values, unseen[kind], attention)[rows, places]
        x = x + layer.post_attention_layernorm(attention.o_proj(seen))
        widened = layer.mlp(layer.pre_feedforward_layernorm(x))
        x = x + layer.post_feedforward_layernorm(widened)
    return body.norm(x)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, unseen, attention):
    """Softcapped attention of queries (n, S, heads, D), one product for all that share a key.

    unseen (n, 1, 1, S, L) is where a query must not look. Returns (n, S, heads * D).
    """
    (n, size, heads, _), (shared, columns) = q.shape, keys.shape[1:3]
    q = q.transpose(1, 2).reshape(n, shared, -1, q.shape[-1])  # (n, kv heads, group * S, D)
    scores = (q @ keys.transpose(2, 3)).mul_(attention.scaling)
    cap = attention.attn_logit_softcapping
    if cap:
        scores.div_(cap).tanh_().mul_(cap)
    scores = scores.view(n, shared, -1, size, columns).masked_fill_(unseen, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    seen = weights.view(n, shared, -1, columns) @ values
    return seen.view(n, heads, size, -1).transpose(1, 2).reshape(n, size, -1)


# --- 2. Any causal LM --------------------------------------------------------------------------


class AnyCache:
    """A DynamicCache, begun anew for each attempt; pads are on the left."""

    def __init__(self, model):
        self.model = model

    def read(self, contexts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The live rows (B,), which are all, and the logits (B, V) of what follows."""
        width, device = max(map(len, contexts)), self.model.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in contexts], device=device)
        real = [[0] * (width - len(row)) + [1] * len(row) for row in contexts]
        self.cache, self.mask = DynamicCache(), torch.tensor(real, device=device)
        return torch.arange(len(contexts), device=device), self.extend(ids)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Token (n,) of each live row; returns the next logits (n, V)."""
        self.mask = torch.cat([self.mask, torch.ones_like(token)[:, None]], dim=1)
        return self.extend(token[:, None])

    def extend(self, ids: torch.Tensor) -> torch.Tensor:
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # not 1: a slice is slow
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            logits_to_keep=last,
        )
        return out.logits[:, 0].float()

    def keep(self, going: torch.Tensor) -> torch.Tensor:
        """Let the live rows that are `going` (n,) go on; returns which (n,)."""
        kept = going.nonzero()[:, 0]
        if len(kept) < len(going):
            self.cache.batch_select_indices(kept)
            self.mask = self.mask[kept]
        return kept
