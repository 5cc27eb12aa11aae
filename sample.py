"""How a policy attempts a problem: twice or more, in one KV cache.

`rollout` samples attempt 1, asks again, samples attempt 2 and so on, or decodes greedily. Finished
rows leave the batch. cache.py keeps what was read, so a later attempt goes on from there. Each draw
has its own random number, fixed by (seed, problem, sample, attempt, token). So an episode does not
depend on the other rows of its batch. Next to read: cache.py.
"""

import hashlib
import math
import sys
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cache import RowCache
from data import InputError, Problem, first_line
from models import head, last_hidden
from tasks import Chat, judge

# --- 1. What flows ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One answer: its tokens (with the end token, if it was sampled) and their log-probs.

    stated: the answer in its text, None if none is found. finished: it was not cut off.
    """

    tokens: list[int]
    logp: list[float]
    text: str
    stated: str | None
    finished: bool
    reward: float


@dataclass(frozen=True)
class Episode:
    """One problem, its first prompt x1 and the attempts at it, in order."""

    problem: Problem
    x1: list[int]
    attempts: tuple[Attempt, ...]
    offline: bool = False  # attempt 1 is in no loss, as if another policy sampled it


@dataclass(frozen=True)
class Sampling:
    """How to sample: from the softmax of logits / temperature, greedily at temperature 0.

    There is no top-k, top-p or penalty, and the sampling settings of the checkpoint's
    generation_config are not used: training must be on-policy. rows: how many episodes are decoded
    at the same time; it bounds the memory of the KV cache, and changes nothing else but rounding.
    """

    attempts: int = 2
    max_new_tokens: int = 10
    temperature: float = 1.0
    seed: str = "rollout"
    rows: int = 500


# --- 2. Rollout ------------------------------------------------------------------------------
# Shapes: B rows (episodes), n of them live, V vocabulary.


def rollout(
    model,
    chat: Chat,
    problems: list[Problem],
    sampling: Sampling,
    begun: list[Episode] = (),
    part: slice = slice(None),
) -> list[Episode]:
    """Sample `sampling.attempts` attempts at each problem; a problem listed k times gets k samples.

    Attempt n + 1 is conditioned on the exact tokens of x1, y1 .. yn. `begun` holds episodes of the
    same problems with first attempts from another model; they are continued, and marked offline.
    part: the episodes that this process makes, if other processes make the others.
    """
    uniforms = draw_uniforms(problems, sampling, part)  # (B, attempts, max_new_tokens)
    problems, begun, episodes = problems[part], begun[part], []
    for start in range(0, len(problems), sampling.rows):
        rows = slice(start, start + sampling.rows)
        drawn = uniforms[rows].to(model.device)
        episodes += rollout_rows(model, chat, problems[rows], sampling, begun[rows], drawn)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # frees the memory of the KV cache for training
    return episodes


def rollout_rows(model, chat: Chat, problems, sampling: Sampling, begun, uniforms):
    """`rollout` of rows that are decoded at the same time; uniforms (B, attempts, tokens)."""
    each = {problem.id: problem for problem in problems}
    x1 = dict(zip(each, chat.x1s(list(each.values())), strict=True))
    prompts = [x1[problem.id] for problem in problems]
    attempts = [list(episode.attempts) for episode in begun] or [[] for _ in problems]
    longest = max(map(len, prompts))
    columns = longest + chat.room(sampling.attempts, sampling.max_new_tokens)
    cache = RowCache(model, len(problems), columns)
    with torch.inference_mode():
        for number in range(len(attempts[0]), sampling.attempts):
            made = [segments(chat, *row) for row in zip(prompts, attempts, strict=True)]
            contexts = [[token for tokens, _ in parts for token in tokens] for parts in made]
            answers = decode(cache, contexts, uniforms[:, number], sampling, chat.end_ids)
            before = [row[-1].stated if row else None for row in attempts]
            judged = rewarded(chat, problems, answers, before)
            for row, attempt in zip(attempts, judged, strict=True):
                row.append(attempt)
    return [
        Episode(problem, prompt, tuple(made), offline=bool(begun))
        for problem, prompt, made in zip(problems, prompts, attempts, strict=True)
    ]


def segments(chat: Chat, x1: list[int], attempts) -> list[tuple[list[int], int]]:
    """x1 y1 p1 y2 p1 ... as (token ids, number of the attempt; 0: a prompt). The last is a prompt.

    An attempt that was cut off is closed with the chat's own end token. That token is in x2 but
    not in y1, so it is in no loss.
    """
    parts = [(x1, 0)]
    for number, attempt in enumerate(attempts, start=1):
        closing = [] if attempt.finished else [chat.close_id]
        parts += [(attempt.tokens, number), (closing + chat.after(number), 0)]
    return parts


def rewarded(chat: Chat, problems, answers, before) -> list[Attempt]:
    """Judged attempts, made of the (token, log-prob)s of each; before: answers of those before."""
    pairs = [tuple(map(list, zip(*answer, strict=True))) for answer in answers]
    texts = [chat.text(tokens) for tokens, _ in pairs]
    stated, rewards = judge(texts, before, problems)
    return [
        Attempt(tokens, logp, text, says, tokens[-1] in chat.end_ids, reward)
        for (tokens, logp), text, says, reward in zip(pairs, texts, stated, rewards, strict=True)
    ]


def decode(cache, contexts, uniforms, sampling: Sampling, end_ids):
    """Continue every row by one attempt; returns the (token, log-prob)s of each row.

    contexts: the token ids of all that comes before; uniforms: (B, max_new_tokens).
    """
    tokens = torch.full(uniforms.shape, -1, device=uniforms.device)  # -1 after the end
    logps, ends = torch.zeros_like(uniforms), torch.tensor(end_ids, device=uniforms.device)
    live, logits = cache.read(contexts)  # n rows, (n, V)
    for step in range(sampling.max_new_tokens):
        rows = torch.tensor(live, device=uniforms.device)  # (n,)
        token, logp = draw(logits, uniforms[rows, step], sampling.temperature)  # (n,), (n,)
        tokens[rows, step], logps[rows, step] = token, logp
        kept = cache.keep(~torch.isin(token, ends))
        if not kept or step + 1 == sampling.max_new_tokens:
            break
        live, logits = [live[i] for i in kept], cache.step(token[kept])
    if not logps.isfinite().all():
        raise InputError(
            "a logit of the model is not a number: its weights are damaged, name another checkpoint"
        )
    pairs = zip(tokens.tolist(), logps.tolist(), strict=True)
    return [[x for x in zip(*pair, strict=True) if x[0] >= 0] for pair in pairs]


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float):
    """One token per row by inverse CDF, and its log-prob; greedy at temperature 0.

    Shapes: logits (B, V), uniform (B,) in [0, 1). Returns (B,), (B,). 1 - uniform lies in (0, 1],
    so the first token whose CDF reaches it always has a positive probability.
    """
    probabilities = (logits if temperature in (0, 1) else logits / temperature).softmax(dim=-1)
    if temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        cdf = probabilities.cumsum(dim=-1)
        token = torch.searchsorted(cdf, (1 - uniform)[:, None] * cdf[:, -1:])[:, 0]
        token = token.clamp(max=logits.shape[1] - 1)  # NaN gives a larger one; `decode` reports it
    return token, probabilities.gather(1, token[:, None])[:, 0].log()


def draw_uniforms(problems: list[Problem], sampling: Sampling, part: slice) -> torch.Tensor:
    """(B, attempts, max_new_tokens) random numbers in [0, 1), fixed by (seed, problem, sample)."""
    shape, samples, keys = (sampling.attempts, sampling.max_new_tokens), Counter(), []
    for problem in problems:
        samples[problem.id] += 1
        keys.append(f"{sampling.seed}|{problem.id}|{samples[problem.id]}")
    rows = [torch.rand(shape, generator=seeded(key)) for key in keys[part]]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def seeded(key: str) -> torch.Generator:
    """A random generator fixed by a text, the same on every machine."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big", signed=True))


def askable(problems, model, chat: Chat, sampling: Sampling) -> tuple[list[Problem], int]:
    """The problems that leave room for all attempts, and the most tokens of an episode of these.

    The others are skipped and counted. No prompt is ever cut.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    room = chat.room(sampling.attempts, sampling.max_new_tokens)
    lengths = list(map(len, chat.x1s(problems)))
    fits = [length + room <= positions for length in lengths]
    kept = [problem for problem, fit in zip(problems, fits, strict=True) if fit]
    if not kept:
        needed = min(lengths) + room
        most = sampling.max_new_tokens - math.ceil((needed - positions) / sampling.attempts)
        raise InputError(
            f"--max-new-tokens {sampling.max_new_tokens} is too many: the shortest prompt and "
            f"{sampling.attempts} attempts are {needed} tokens, but the model takes {positions}: "
            + (f"give at most {most}" if most > 0 else "choose another model, or shorter prompts")
        )
    if len(kept) < len(problems):
        skipped = len(problems) - len(kept)
        words = f"problems, whose attempts may need more than the model's {positions} tokens"
        print(f"skipped {skipped} of {len(problems)} {words}", file=sys.stderr)
    return kept, room + max(n for n, fit in zip(lengths, fits, strict=True) if fit)


# The largest KL between scored and sampled next tokens, in nats, that rounding may cause
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check_sampling(model, longest: int, training: bool = False) -> None:
    """Raise InputError for a model that does not sample from the distribution it is scored by.

    Two random rows are read and continued as in `rollout`, and scored by the model's own forward,
    in training mode if `training`: both must give the same distributions. The first tokens of a row
    of `longest` tokens must get the same distributions as in a short row.
    """
    rows = torch.randint(model.get_input_embeddings().num_embeddings, (2, 24), generator=seeded(""))
    a, b = rows.tolist()
    sampled, tokens = {}, rows.to(model.device)  # logits by row and position
    try:
        with torch.inference_mode():
            cache = RowCache(model, 2, 32)
            live, logits = cache.read([a[:9], b[:5]])
            sampled |= {(row, (8, 4)[row]): logits[i] for i, row in enumerate(live)}
            logits = cache.step(tokens[[0, 1], [9, 5]][live])
            sampled |= {(row, (9, 5)[row]): logits[i] for i, row in enumerate(live)}
            cache.keep(torch.tensor([row == 1 for row in live]))
            sampled[1, 6] = cache.step(tokens[1, 6:7])[0]
            live, logits = cache.read([a[:16], b[:21]])
            sampled |= {(row, (15, 20)[row]): logits[i] for i, row in enumerate(live)}
            model.train(training)
            scored = model(tokens, use_cache=False).logits.float().log_softmax(dim=-1)  # (2, 24, V)
            found = {place: found.log_softmax(dim=-1) for place, found in sampled.items()}
            pairs = [(scored[place], logp) for place, logp in found.items()]
            if longest > 24:
                long = tokens[:1].repeat(1, -(-longest // 24))[:, :longest]
                begun = head(model, last_hidden(model, long)[0, :24]).log_softmax(dim=-1)
                pairs += zip(begun, scored[0], strict=True)
            # F.kl_div(two, one) is KL(one ‖ two)
            kls = [F.kl_div(two, one, log_target=True, reduction="sum") for one, two in pairs]
            gap = torch.stack(kls).max().item()
    except Exception as error:  # whatever another architecture raises
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"--model {model.name_or_path} cannot be sampled ({reason}): choose a decoder "
            "with attention in all layers"
        ) from error
    finally:
        model.eval()
    if not gap <= ROUNDING[model.dtype]:
        raise InputError(
            f"--model {model.name_or_path} samples and scores differently (by {gap:.2g} nats "
            "a token), so training would be off-policy: choose another model"
        )


# --- 3. For training: problems of a step, and transcripts of the attempts ------------------------


def pick(problems: list[Problem], count: int, number: int, seed: int) -> list[Problem]:
    """The `count` problems of step `number`: every epoch is a new shuffle of all problems."""
    picked, orders = [], {}
    for position in range(number * count, (number + 1) * count):
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(problems), generator=seeded(f"{seed}/{epoch}"))
        picked.append(problems[int(orders[epoch][index])])
    return picked


def transcript(episode: Episode, chat: Chat) -> list[tuple[int, int, float]]:
    """(token, attempt id, log-prob) of x1 y1 p1 y2; the id is 0 for a token that is in no loss.

    These are the prompts, the end token of an attempt that was cut off, and an offline y1.
    """
    row = []
    for tokens, n in segments(chat, episode.x1, episode.attempts)[:-1]:  # without the last prompt
        if n == 0 or (n == 1 and episode.offline):
            row += [(token, 0, 0.0) for token in tokens]
        else:
            sampled = zip(tokens, episode.attempts[n - 1].logp, strict=True)
            row += [(token, n, logp) for token, logp in sampled]
    return row


def collate(rows: list, device) -> tuple[torch.Tensor, ...]:
    """Tokens (B, S) of transcripts; attempt ids, log-probs (B, T) and places of predicted tokens.

    places (N,): the indices of attempt tokens among all B * T. Rows are padded on the right: causal
    attention never looks there, so the pads need no attention mask.
    """
    width = max(map(len, rows))
    padded = [row + [(0, 0, 0.0)] * (width - len(row)) for row in rows]
    columns = [list(zip(*row, strict=True)) for row in padded]
    tokens, ids, logp = zip(*columns, strict=True)
    predicted = [n for row in ids for n in row[1:]]
    places = [place for place, n in enumerate(predicted) if n]
    tokens, ids, logp, places = (
        torch.tensor(x, device=device) for x in (tokens, ids, logp, places)
    )
    return tokens, ids[:, 1:], logp[:, 1:], places
