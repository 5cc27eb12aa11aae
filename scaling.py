"""Is it better to sample more, or to correct? Majority votes at equal budgets (section 6.2).

At a budget of 2k samples of a problem,

    parallel      a vote of 2k first attempts
    sequential    a vote of k corrections, each of one of the first k attempts

NOT STATED: who votes in the second; here corrections only. Next to read: repair.py.
"""

from dataclasses import replace

from sample import Attempt, Sampling
from tasks import agree, stated_answer

TEMPERATURE = 0.7  # section 6.2


def vote(attempts: list[Attempt], task: str) -> float:
    """Is the answer that most attempts state the right one? Of equally many, the first stated."""
    groups: list[list[Attempt]] = []
    for attempt in attempts:
        same = (group for group in groups if agree(group[0].text, attempt.text, task))
        group = next(same, None)
        if group is not None:
            group.append(attempt)
        elif stated_answer(attempt.text, task) is not None:
            groups.append([attempt])
    return max(groups, key=len)[0].reward if groups else 0.0


def compare(evaluate, problems: list, samples: int, sampling: Sampling) -> list[dict]:
    """Accuracies of both at budgets of 2, 4, 8 .. 2 `samples`; a line each.

    evaluate(problems, sampling, begun): the episodes of a model, as eval.py makes them.
    """
    asked = [problem for problem in problems for _ in range(2 * samples)]
    first = evaluate(asked, replace(sampling, attempts=1), ())
    rows = [first[i : i + 2 * samples] for i in range(0, len(first), 2 * samples)]
    begun = [episode for row in rows for episode in row[:samples]]
    second = evaluate([e.problem for e in begun], replace(sampling, attempts=2), begun)
    corrected = [second[i : i + samples] for i in range(0, len(second), samples)]
    sizes = sorted({samples} | {2**n for n in range(samples.bit_length())})
    lines = []
    for k in sizes:
        votes = {
            "parallel": [[e.attempts[0] for e in row[: 2 * k]] for row in rows],
            "sequential": [[e.attempts[1] for e in row[:k]] for row in corrected],
        }
        line = {"budget": 2 * k, "problems": len(rows)}
        for name, ballots in votes.items():
            task = rows[0][0].problem.task
            line[name] = sum(vote(ballot, task) for ballot in ballots) / len(rows)
        lines.append(line)
    return lines


def as_votes(lines: list[dict]) -> str:
    """A table of `compare`'s lines."""
    rows = [f"{x['budget']:8}{x['parallel']:10.3f}{x['sequential']:12.3f}" for x in lines]
    return "\n".join([f"{'budget':>8}{'parallel':>10}{'sequential':>12}", *rows])
