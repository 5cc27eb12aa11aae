"""How good is it, in numbers? The metrics of section 3 of the paper, over a model's episodes.

delta_i_to_c and delta_c_to_i are fractions of ALL problems, so that acc_t2 - acc_t1 =
delta_i_to_c - delta_c_to_i. Next to read: figures.py.
"""

from tqdm import tqdm

import ranks
from data import Problem
from sample import Episode, Sampling, askable, rollout
from tasks import Chat, agree

Z95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def evaluate(model, chat: Chat, problems: list[Problem], sampling: Sampling, begun=()):
    """Episodes and metrics of a model over `problems`; each rank attempts its share of them.

    begun: one episode for each problem, whose attempts are given and continued.
    """
    problems, _ = ranks.on_all_ranks(askable, problems, model, chat, sampling)
    asked = {problem.id for problem in problems}
    begun = [episode for episode in begun if episode.problem.id in asked]
    local, episodes = ranks.local_slice(len(problems)), []
    starts = range(local.start, local.stop, sampling.rows)
    for start in tqdm(starts, desc="eval", unit="batch", leave=False):
        part = slice(start, min(start + sampling.rows, local.stop))
        episodes += rollout(model, chat, problems, sampling, begun, part)
    episodes = ranks.all_gather(episodes)
    return episodes, measure(episodes)


def measure(episodes: list[Episode]) -> dict[str, float]:
    """The metrics above `kl_t1` in TUTORIAL.md's table, over all episodes; shares are in [0, 1]."""
    n, attempts = len(episodes), list(zip(*(e.attempts for e in episodes), strict=True))
    right = [[attempt.reward == 1.0 for attempt in column] for column in attempts]
    metrics = {f"acc_t{i}": sum(column) / n for i, column in enumerate(right, start=1)}
    if len(right) > 1:
        gained = sum(after > before for before, after in zip(*right[:2], strict=True)) / n
        lost = sum(after < before for before, after in zip(*right[:2], strict=True)) / n
        pairs = [e.attempts[:2] for e in episodes]
        metrics |= {"delta": metrics["acc_t2"] - metrics["acc_t1"]}
        metrics |= {"delta_i_to_c": gained, "delta_c_to_i": lost}
        metrics["copied"] = sum(same_statement(e) for e in episodes) / n
        metrics["edit_ratio"] = sum(edit_ratio(y1.tokens, y2.tokens) for y1, y2 in pairs) / n
    everything = [attempt for column in attempts for attempt in column]
    metrics["cut_off"] = sum(not attempt.finished for attempt in everything) / len(everything)
    metrics["unreadable"] = sum(y.stated is None for y in everything) / len(everything)
    for i, column in enumerate(attempts, start=1):
        metrics[f"length_t{i}"] = sum(len(attempt.tokens) for attempt in column) / n
    return metrics


def same_statement(episode: Episode) -> bool:
    """Does attempt 2 state the answer of attempt 1, or repeat its text to the letter?"""
    y1, y2, *_ = episode.attempts
    return y1.text == y2.text or agree(y1.stated, y2.stated, episode.problem.task)


def edit_ratio(one: list[int], two: list[int]) -> float:
    """Edit distance over the total length of both attempts, in tokens (Figure 3); in [0, 1].

    Levenshtein distance by Hyyrö's bit-parallel recurrence: bit i of `rise` (`fall`) says that the
    distance grows (shrinks) by one from row i to i + 1 of the current column.
    """
    full, top = (1 << len(one)) - 1, 1 << max(len(one) - 1, 0)
    where: dict[int, int] = {}
    for i, token in enumerate(one):
        where[token] = where.get(token, 0) | 1 << i
    rise, fall, distance = full, 0, len(one)
    for token in two:
        match = where.get(token, 0)
        diagonal = (((match & rise) + rise) ^ rise) | match | fall
        right_rise, right_fall = fall | (full & ~(diagonal | rise)), rise & diagonal
        distance += bool(right_rise & top) - bool(right_fall & top)
        right_rise = (right_rise << 1) | 1
        rise = ((right_fall << 1) | ~(diagonal | right_rise)) & full
        fall = right_rise & diagonal & full
    distance = distance if one else len(two)
    return distance / max(len(one) + len(two), 1)


def intervals(metrics: dict[str, float], n: int) -> dict[str, tuple[float, float]]:
    """95 % intervals: Wilson's for shares, Agresti and Min's for delta (paired: same problems)."""
    shares = [name for name in metrics if name.startswith(("acc_", "delta_", "copied"))]
    result = {name: wilson(metrics[name], n) for name in shares}
    if "delta" in metrics:
        gained, lost = metrics["delta_i_to_c"] * n + 0.5, metrics["delta_c_to_i"] * n + 0.5
        middle = (gained - lost) / (n + 2)
        spread = Z95 * ((gained + lost - (gained - lost) ** 2 / (n + 2)) ** 0.5) / (n + 2)
        result["delta"] = (middle - spread, middle + spread)
    return result


def wilson(share: float, n: int) -> tuple[float, float]:
    middle = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    spread = Z95 * (share * (1 - share) / n + Z95**2 / (4 * n**2)) ** 0.5 / (1 + Z95**2 / n)
    return min(middle - spread, share), max(middle + spread, share)  # rounding may exclude 0 or 1


def by_group(episodes: list[Episode]) -> dict[str, dict[str, float]]:
    """`measure` for each level and each subject, if the problems have them."""
    groups: dict[str, list[Episode]] = {}
    for episode in episodes:
        level, subject = episode.problem.level, episode.problem.subject
        for name in (f"level {level}" if level else "", subject):
            groups.setdefault(name, []).append(episode)
    names = sorted(filter(None, groups))
    return {f"{name} ({len(groups[name])})": measure(groups[name]) for name in names}


def as_text(episode: Episode) -> str:
    """An episode as lines to read."""
    lines = [f"  problem    {episode.problem.question}   (answer: {episode.problem.answer})"]
    for number, attempt in enumerate(episode.attempts, start=1):
        verdict = "right" if attempt.reward else "wrong"
        lines.append(f"  attempt {number}  {attempt.text}   {verdict}")
    return "\n".join(lines) + "\n\n"


def first_correction(episodes: list[Episode], metrics: dict, name: str) -> str:
    """The first episode whose attempt 1 is wrong and attempt 2 right, as lines to read."""
    found = (e for e in episodes if e.attempts[1].reward > e.attempts[0].reward)
    corrected = next(found, None)
    if corrected is None:
        right, cut_off, silent = (metrics[key] for key in ("acc_t1", "cut_off", "unreadable"))
        shares = f"{cut_off:.0%} of all attempts are cut off, {silent:.0%} state no answer"
        return f"{name} corrects no held-out problem; attempt 1 is right in {right:.0%}, {shares}"
    return f"{name} corrects, on a held-out problem:\n{as_text(corrected).rstrip()}"


def as_record(episode: Episode, source: str, weights=(), **where) -> dict:
    """An episode as a line of episodes.jsonl; weights: what multiplies each attempt's log-prob."""
    problem, kept = episode.problem, ("text", "stated", "finished", "reward")
    attempts = [{name: getattr(attempt, name) for name in kept} for attempt in episode.attempts]
    for attempt, weight in zip(attempts, weights, strict=False):
        attempt["weight"] = weight
    asked = {name: getattr(problem, name) for name in ("question", "answer", "level", "subject")}
    return {"source": source, **where, **asked, "attempts": attempts}


def as_table(rows: dict[str, dict[str, float]]) -> str:
    """A table to print: a line for each row, with all accuracies, delta, i->c, c->i and copied."""
    count = min(sum(name.startswith("acc_t") for name in metrics) for metrics in rows.values())
    heads = {f"acc_t{i}": f"acc@t{i}" for i in range(1, count + 1)} | {"delta": "delta"}
    heads |= {"delta_i_to_c": "i->c", "delta_c_to_i": "c->i", "copied": "copied"}
    width = max(16, *(len(row) + 1 for row in rows))
    lines = [" " * width + "".join(f"{head:>8}" for head in heads.values())]
    for row, metrics in rows.items():
        lines.append(f"{row:{width}}" + "".join(f"{metrics[name]:8.3f}" for name in heads))
    return "\n".join(lines)
