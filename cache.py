"""What the rows have read so far: keys and values that attempts are continued from.

    read(contexts)   take in what is new of each row's context; all rows are live again
    step(token)      take in one more token of each live row
    keep(going)      go on with these of the live rows only

It works for every causal LM of transformers that takes a Cache, through the model's own forward.
Rows stand at their own positions in memory that is there from the start, a prompt is read once for
its k samples, and attempt 2 continues where attempt 1 ended: the last token of attempt 1 was
sampled but never fed, so it is read with p1. Next to read: tasks.py.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from fused import GROUPED, join
from models import head

# Shapes: B rows, n of them live, S new tokens, L columns in use, V vocabulary, D size of a head.


class RowCache(Cache):
    """Keys and values of B rows in up to `columns` columns. The live rows stand first."""

    def __init__(self, model, rows: int, columns: int):
        config = model.config.get_text_config()
        join(model)
        super().__init__(layers=[Layer(self) for _ in range(config.num_hidden_layers)])
        self.model, self.rows, self.columns = model, rows, columns
        self.window = getattr(config, "sliding_window", None)
        usual = "sliding_attention" if self.window else "full_attention"
        self.kinds = sorted(set(getattr(config, "layer_types", None) or [usual]))
        self.numbers = torch.arange(max(rows, columns), device=model.device)
        self.mask = torch.tensor([-torch.inf, 0], dtype=model.dtype, device=model.device)
        self.row_at = self.numbers[:rows].clone()  # which row stands where
        self.held = torch.zeros_like(self.row_at)  # tokens of each
        self.longest = 0  # of the live rows' tokens
        self.places = None  # rows (n, 1) and columns (n, S) of the new tokens

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
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:, :, : self.longest] = tensor[owner, :, : self.longest]
        self.held = self.held[owner]
        return self.row_at.clone(), logits[owner]

    def extend(self, new: list) -> torch.Tensor:
        """Read the `new` tokens of the first rows; returns the logits (n, V) of what follows."""
        counts, width = [len(tokens) for tokens in new], max(map(len, new))
        padded = [[*row, *row[-1:] * (width - len(row))] for row in new]
        tokens, counts = (torch.tensor(x, device=self.held.device) for x in (padded, counts))
        each, held = torch.arange(width, device=counts.device), self.held[: len(new)]
        self.longest = int((held + counts).max())
        positions = held[:, None] + each.clamp(max=counts[:, None] - 1)  # (n, S)
        # pads are written where nobody looks, into one more column
        columns = positions.where(each < counts[:, None], self.columns)
        hidden = self.forward(tokens, positions, columns)
        held += counts
        return head(self.model, hidden[torch.arange(len(new), device=counts.device), counts - 1])

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Token (n,) of each live row in their order; returns the next logits (n, V)."""
        held = self.held[: len(token)]
        self.longest += 1
        hidden = self.forward(token[:, None], held[:, None], held[:, None])
        held += 1
        return head(self.model, hidden[:, 0])

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
            caches = [tensor for layer in self.layers for tensor in (layer.keys, layer.values)]
            for tensor in (order, self.row_at, self.held, *caches):
                tensor[there] = tensor[here]
        return order[:count]

    def write(self, new: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` of a layer from keys and values in one tensor, (n, S, 2, G, D)."""
        return self.layers[layer].write(new)

    def forward(self, tokens, positions, columns) -> torch.Tensor:
        """Last hidden states (n, S, d) of tokens at these positions, written to these columns."""
        self.places = self.numbers[: len(tokens), None], columns
        used, newest = self.numbers[: self.longest], positions[:, None, :, None]
        full = torch.where(used > newest, *self.mask)  # (n, 1, S, L)
        masks = {"full_attention": full, "sliding_attention": full}
        if self.window and self.longest > self.window:
            unseen = (used > newest) | (used <= newest - self.window)
            masks["sliding_attention"] = torch.where(unseen, *self.mask)
        masks = {kind: masks[kind] for kind in self.kinds}
        config = self.model.config
        usual, config._attn_implementation = config._attn_implementation, GROUPED
        try:
            return self.model.base_model(
                input_ids=tokens,
                attention_mask=masks if len(masks) > 1 else masks[self.kinds[0]],
                position_ids=positions,
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state
        finally:
            config._attn_implementation = usual


class Layer(CacheLayerMixin):
    """Keys and values (B, G, columns, D) of one layer, made when the first come."""

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Zeros, since what is masked has weight 0 but is multiplied all the same."""
        rows, columns = self.cache.rows, self.cache.columns + 1
        shapes = [(rows, x.shape[1], columns, x.shape[3]) for x in (key_states, value_states)]
        if shapes[0] == shapes[1]:
            self.both = key_states.new_zeros(2, *shapes[0])
            self.keys, self.values = self.both
        else:
            self.keys, self.values = map(key_states.new_zeros, shapes)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Write what is new (n, G, S, D); returns all that is in use, (n, G, L, D) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, columns = self.cache.places
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        return self.in_use(len(key_states))

    def write(self, new: torch.Tensor):
        """`update` from keys and values in one tensor, (n, S, 2, G, D)."""
        if not self.is_initialized:
            self.lazy_initialization(*new.permute(2, 0, 3, 1, 4))
        rows, columns = self.cache.places
        self.both[:, rows, :, columns] = new
        return self.in_use(len(new))

    def in_use(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first n rows, (n, G, L, D) each."""
        longest = self.cache.longest
        return self.keys[:n, :, :longest], self.values[:n, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.longest, 0

    def get_seq_length(self) -> int:
        return self.cache.longest

    def get_max_length(self) -> int:
        return self.cache.columns
