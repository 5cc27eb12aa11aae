"""How a policy attempts a problem: twice or more, in one KV cache.

`rollout` samples attempt 1, asks again, samples attempt 2 ... or decodes greedily. The cache of an
attempt is kept for the next one, and finished rows leave the batch. Every draw has its own random
number, fixed by (seed, problem, sample, attempt, token), so that what a row becomes does not depend
on the rest of the batch. A model is any Hugging Face causal LM whose cache holds keys and values.
Next to read: eval.py.
"""

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from data import Chat, InputError, Problem
from rewards import reward

# --- 1. What flows ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One answer: its tokens (with the end token, if it was sampled) and their log-probs."""

    tokens: list[int]
    logp: list[float]
    text: str
    finished: bool
    reward: float


@dataclass(frozen=True)
class Episode:
    """One problem, its first prompt x1 and the attempts at it, in order."""

    problem: Problem
    x1: list[int]
    attempts: tuple[Attempt, ...]
    offline: bool = False  # attempt 1 was sampled by another policy


@dataclass(frozen=True)
class Sampling:
    """How to sample: from the softmax of logits / temperature, greedily at temperature 0.

    There is no top-k, top-p or penalty, and the checkpoint's generation_config is never read:
    on-policy means on-policy. rows: episodes decoded side by side; they bound the memory of the KV
    cache, and change nothing else but rounding.
    """

    attempts: int = 2
    max_new_tokens: int = 10
    temperature: float = 1.0
    seed: str = "0"
    rows: int = 500


# --- 2. Rollout ------------------------------------------------------------------------------
# Shapes: B rows (episodes), S columns held in the KV cache, V vocabulary.


def rollout(
    model, chat: Chat, problems: list[Problem], sampling: Sampling, begun: list[Episode] = ()
) -> list[Episode]:
    """Sample `sampling.attempts` attempts at each problem; a problem listed k times gets k samples.

    Attempt n + 1 is conditioned on the exact tokens of x1, y1 .. yn. `begun` holds episodes of the
    same problems with first attempts from another model; they are continued, and marked offline.
    """
    uniforms = draw_uniforms(problems, sampling)  # (B, attempts, max_new_tokens)
    episodes = []
    for start in range(0, len(problems), sampling.rows):
        part = slice(start, start + sampling.rows)
        drawn = uniforms[part].to(model.device)
        episodes += rollout_rows(model, chat, problems[part], sampling, begun[part], drawn)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # the KV cache is gone: training finds its memory free, and whole
    return episodes


def rollout_rows(model, chat: Chat, problems, sampling: Sampling, begun, uniforms):
    """`rollout` of as many rows as are decoded side by side; uniforms (B, attempts, tokens)."""
    x1 = {problem.id: chat.x1(problem) for problem in problems}
    prompts = [x1[problem.id] for problem in problems]
    attempts = [list(episode.attempts) for episode in begun] or [[] for _ in problems]
    held = torch.ones(len(problems), 0, dtype=torch.long, device=model.device)
    parked = [(DynamicCache(), held, torch.arange(len(problems), device=model.device))]
    first = len(attempts[0])
    with torch.inference_mode():
        for number in range(first, sampling.attempts):
            made = [segments(chat, *row) for row in zip(prompts, attempts, strict=True)]
            feed = [[token for tokens, _ in parts for token in tokens] for parts in made]
            if number > first:  # the cache holds all but the end token and the instruction
                feed = [row[-1 - len(chat.p1) :] for row in feed]
            drawn = uniforms[:, number]
            past = join(parked)
            parked.clear()  # its memory is needed
            answers, parked = decode(model, past, feed, drawn, sampling, chat.end_ids)
            for problem, row, answer in zip(problems, attempts, answers, strict=True):
                row.append(judge(chat, problem, *map(list, zip(*answer, strict=True))))
    return [
        Episode(problem, prompt, tuple(made), offline=bool(begun))
        for problem, prompt, made in zip(problems, prompts, attempts, strict=True)
    ]


def segments(chat: Chat, x1: list[int], attempts) -> list[tuple[list[int], int]]:
    """x1 y1 p1 y2 p1 ... as (token ids, number of the attempt, or 0); what comes next is sampled.

    An attempt that was cut off is closed with the chat's own end token. That token is in x2 but
    not in y1, so it is in no loss.
    """
    parts = [(x1, 0)]
    for number, attempt in enumerate(attempts, start=1):
        closing = [] if attempt.finished else [chat.close_id]
        parts += [(attempt.tokens, number), (closing + chat.p1, 0)]
    return parts


def judge(chat: Chat, problem: Problem, tokens: list[int], logp: list[float]) -> Attempt:
    text = chat.text(tokens)
    return Attempt(tokens, logp, text, tokens[-1] in chat.end_ids, reward(text, problem))


def decode(model, past, feed, uniforms, sampling: Sampling, end_ids):
    """Continue every row by one attempt.

    Args: past, the (cache, held) of the rows so far, held (B, S) being 1 where a column is real
    (pads are on the left); feed, the new token ids of each row; uniforms, (B, max_new_tokens).
    Returns the (token, log-prob)s of each row, and the parked caches that `join` makes a past of.
    """
    cache, held = past
    ids, fed = left_pad(feed, held.device)  # (B, new)
    held = torch.cat([held, fed], dim=1)  # (B, S)
    live = torch.arange(len(feed), device=ids.device)
    answers, parked, ends = [[] for _ in feed], [], torch.tensor(end_ids, device=ids.device)
    for step in range(sampling.max_new_tokens + 1):
        logits = next_logits(model, cache, ids, held)  # (B live, V)
        if step == sampling.max_new_tokens:
            break  # the last token of a cut-off attempt is in the cache now, as attempt 2 needs it
        token, logp = draw(logits, uniforms[live, step], sampling.temperature)
        for row, *sampled in zip(live.tolist(), token.tolist(), logp.tolist(), strict=True):
            answers[row].append(sampled)
        ended = torch.isin(token, ends)
        if ended.any():
            parked.append((copy_rows(cache, ended), held[ended], live[ended]))
            cache.batch_select_indices(~ended)
            held, live, token = held[~ended], live[~ended], token[~ended]
        if not len(live):
            break
        ids, held = token[:, None], F.pad(held, (0, 1), value=1)
    return answers, [*parked, (cache, held, live)]


def next_logits(model, cache, ids, held):
    """Feed ids (B, new) behind the cache; returns float32 logits (B, V) of the next token."""
    position_ids = (held.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # an index, so the slice is a copy
    return (
        model(
            input_ids=ids,
            attention_mask=held,
            position_ids=position_ids,
            past_key_values=cache,
            logits_to_keep=last,
        )
        .logits[:, 0]
        .float()
    )


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float):
    """One token a row by inverse CDF, and its log-prob; greedy at temperature 0.

    Shapes: logits (B, V), uniform (B,) in [0, 1). Returns (B,), (B,). 1 - uniform lies in (0, 1],
    so the first token whose CDF reaches it always has a positive probability.
    """
    logp = (logits / (temperature or 1.0)).log_softmax(dim=-1)
    if temperature == 0:
        token = logp.argmax(dim=-1)
    else:
        cdf = logp.exp().cumsum(dim=-1)
        token = torch.searchsorted(cdf, (1 - uniform)[:, None] * cdf[:, -1:])[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]


def draw_uniforms(problems: list[Problem], sampling: Sampling) -> torch.Tensor:
    """(B, attempts, max_new_tokens) random numbers in [0, 1), fixed by (seed, problem, sample)."""
    shape, samples, rows = (sampling.attempts, sampling.max_new_tokens), Counter(), []
    for problem in problems:
        samples[problem.id] += 1
        generator = seeded(f"{sampling.seed}|{problem.id}|{samples[problem.id]}")
        rows.append(torch.rand(shape, generator=generator))
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def seeded(key: str) -> torch.Generator:
    """A random generator fixed by a text, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def askable(problems, model, chat: Chat, sampling: Sampling) -> list[Problem]:
    """The problems that leave room for all attempts; the others are counted, never cut."""
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    room = positions - sampling.attempts * (sampling.max_new_tokens + 1 + len(chat.p1))
    kept = [problem for problem in problems if len(chat.x1(problem)) <= room]
    if len(kept) < len(problems):
        skipped = len(problems) - len(kept)
        print(f"skipped {skipped} of {len(problems)} problems: too long a prompt", file=sys.stderr)
    if not kept:
        raise InputError("no problem leaves room for the attempts: lower --max-new-tokens")
    return kept


def left_pad(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) with the pads on the left, and 1 where a token is real (B, S)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, real


def copy_rows(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    copied = DynamicCache()
    for index, layer in enumerate(cache.layers):
        copied.update(layer.keys[rows], layer.values[rows], index)
    return copied


def join(parked: list) -> tuple[DynamicCache, torch.Tensor]:
    """One past of all rows again, in their first order: pads are on the left, without holes."""
    width = max(int(held.sum(dim=1).max()) for _, held, rows in parked if len(rows))
    order = torch.cat([rows for _, _, rows in parked]).argsort()

    def fit(tensors, column):  # crop or pad the columns on the left to `width`
        pads = [[0, 0] * (t.dim() - 1 - column) + [width - t.shape[column], 0] for t in tensors]
        return torch.cat([F.pad(t, pad) for t, pad in zip(tensors, pads, strict=True)])[order]

    cache = DynamicCache()
    for index in range(len(parked[0][0].layers)):
        layers = [piece.layers[index] for piece, _, _ in parked]
        keys, values = [x.keys for x in layers], [x.values for x in layers]
        cache.update(fit(keys, 2), fit(values, 2), index)
    return cache, fit([held for _, held, _ in parked], 1)


# --- 3. Transcripts, for training ---------------------------------------------------------------


def transcript(episode: Episode, chat: Chat) -> list[tuple[int, int]]:
    """(token, number of its attempt) of x1 y1 p1 y2; the number is 0 for tokens in no loss.

    Those are prompts, instructions, a forced end token and a y1 that another policy sampled.
    """
    parts = segments(chat, episode.x1, episode.attempts)[:-1]  # no prompt after the last
    own = {1: 0} if episode.offline else {}
    return [(token, own.get(n, n)) for tokens, n in parts for token in tokens]


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows of similar lengths, longest first, in rectangles of at most `budget` tokens each."""
    batches = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows: list, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and attempt numbers of transcripts, padded on the right; (B, S) each.

    Under causal attention nothing looks to the right, so the pads need no attention mask.
    """
    width = max(map(len, rows))
    pairs = torch.tensor([row + [(0, 0)] * (width - len(row)) for row in rows], device=device)
    return pairs[..., 0], pairs[..., 1]
