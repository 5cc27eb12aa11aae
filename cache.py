"""The KV cache of a rollout: keys and values of all tokens that the rows have read so far.

    read(contexts)   read what is new in each row's context; all rows are live again
    step(token)      read one more token of each live row
    keep(going)      go on with some of the live rows only

It works for every causal LM of transformers that takes a Cache, through the model's own forward.
Its memory is allocated once, and each row has its own length in it. A prompt is read once for its k
samples. Attempt 2 continues where attempt 1 ended: the last token of attempt 1 was sampled but not
yet read, so it is read with p1. The CPU knows the place and the length of each row. So a step waits
for the GPU only once, to learn which rows go on. Next to read: tasks.py.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from fused import GROUPED, join
from models import head

# Shapes: B rows, n of them live, S new tokens, L columns (positions) in use, V vocabulary, G heads
# of keys and values, D size of a head.


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
        self.row_at = list(range(rows))  # the row at each place
        self.held = [0] * rows  # tokens of the row at each place
        self.longest = 0  # most tokens of a live row
        self.places = None  # rows (n, 1) and columns (n, S) of the new tokens

    def read(self, contexts: list[list[int]]) -> tuple[list[int], torch.Tensor]:
        """Read contexts; returns all B rows in their order, and the logits (B, V) that follow."""
        if any(self.held):
            places = zip(self.row_at, self.held, strict=True)
            return [*self.row_at], self.extend([contexts[row][n:] for row, n in places])
        place: dict[tuple, int] = {}  # samples of one prompt share a place
        owner = [place.setdefault(tuple(context), len(place)) for context in contexts]
        logits = self.extend(list(place))
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:, :, : self.longest] = tensor[owner, :, : self.longest]
        self.held = [self.held[i] for i in owner]
        return [*self.row_at], logits[owner]

    def extend(self, new: list[list[int]]) -> torch.Tensor:
        """Read the `new` tokens of the first rows; returns the logits (n, V) of the next tokens."""
        rows, width = range(len(new)), max(map(len, new))
        padded = [[*row, *row[-1:] * (width - len(row))] for row in new]
        tokens, counts, held = map(self.tensor, (padded, map(len, new), self.held[: len(new)]))
        self.held[: len(new)] = [self.held[i] + len(new[i]) for i in rows]
        self.longest, each = max(self.held[: len(new)]), self.numbers[:width]
        positions = held[:, None] + each.clamp(max=counts[:, None] - 1)  # (n, S)
        # pads are written into one extra column, which no row looks at
        columns = positions.where(each < counts[:, None], self.columns)
        hidden = self.forward(tokens, positions, columns)
        return head(self.model, hidden[self.numbers[: len(new)], counts - 1])

    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Read one token (n,) of each live row in their order; returns the next logits (n, V)."""
        held = self.tensor(self.held[: len(token)])
        self.held[: len(token)] = [n + 1 for n in self.held[: len(token)]]
        self.longest += 1
        return head(self.model, self.forward(token[:, None], held[:, None], held[:, None])[:, 0])

    def keep(self, going: torch.Tensor) -> list[int]:
        """Go on with the live rows for which `going` (n,) is true; returns their old places.

        They are in the new order: a finished row changes places with a live one from the end. It
        stays there until the next attempt is asked for.
        """
        flags = going.tolist()  # waits for the GPU
        count, order = sum(flags), list(range(len(flags)))
        gaps = [i for i in order[:count] if not flags[i]]
        fillers = [i for i in order[count:] if flags[i]]
        for state in (order, self.row_at, self.held):
            for one, two in zip(gaps, fillers, strict=True):
                state[one], state[two] = state[two], state[one]
        if gaps:
            there, here = self.tensor(gaps + fillers), self.tensor(fillers + gaps)
            for layer in self.layers:
                for tensor in (layer.keys, layer.values):
                    tensor[there] = tensor[here]
        self.longest = max(self.held[:count], default=0)
        return order[:count]

    def tensor(self, numbers) -> torch.Tensor:
        """A tensor of numbers, on the model's device."""
        return torch.tensor(list(numbers), device=self.numbers.device)

    def write(self, new: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`update` of a layer, given keys and values in one tensor, (n, S, 2, G, D)."""
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
    """Keys and values (B, G, columns, D) of one layer, allocated when the first are written."""

    def __init__(self, cache: RowCache):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeros: masked values are multiplied by 0, which must not give NaN."""
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
        """`update`, given keys and values in one tensor, (n, S, 2, G, D)."""
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
