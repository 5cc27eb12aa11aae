"""The results as tables: every method, and every claim of the paper with our answer.

    python experiments/tables.py     those of README.md and RESULTS.md, from assets/results.json

The p values of the claims are of paired t-tests over seeds, with Holm's correction for many tests.
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from mpmath import betainc

ASSETS = Path(__file__).resolve().parent.parent / "assets"
ELSEWHERE = {
    "two-threads": "two threads",
    "micro-tokens": "`--micro-tokens 2048`",
    "avx2": "another processor (AVX2)",
}
FIRST_SEEDS = {  # what `python score.py` gives
    "seed-0-avx512": "AVX-512, two threads",
    "seeds-0-1-avx2": "AVX2, two threads",
    "seeds-0-1-one-thread": "AVX2, one thread",
    "seeds-0-1-no-avx": "no AVX, two threads",
}
ROWS = {  # by run; base and stage1 are checkpoints of SCoRe's run
    "base": "base model",
    "refine": "Self-Refine",
    "star": "STaR, D",
    "star+": "STaR, D+",
    "pair": "Pair-SFT, D",
    "pair+": "Pair-SFT, D+",
    "single": "single-turn RL (no multi-turn training)",
    "standard": "RL on y2 alone",
    "direct": "direct RL (y1 and y2)",
    "stage1": "SCoRe after Stage I",
    "score": "**SCoRe**",
    "no-stage1": "SCoRe without Stage I",
    "no-bonus": "SCoRe without the bonus",
    "star-stage2": "SCoRe with STaR in Stage II",
    "offline": "SCoRe without online first attempts",
}
SUMMARY = ("base", "pair", "direct", "stage1", "score")
ROOM = 0.005  # that is half a point
REWRITTEN = ("rewritten of right", "rewritten of wrong")  # first attempts
COLUMNS = {
    "acc_t1": "acc@t1",
    "acc_t2": "acc@t2",
    "delta": "delta",
    "delta_i_to_c": "i→c",
    "delta_c_to_i": "c→i",
    "copied": "copied",
}


# --- 1. Numbers ----------------------------------------------------------------------------------


def p_value(ours: list[float], theirs: list[float]) -> float | None:
    """Two-sided p of a paired t-test over seeds; None if there is too little to test.

    P(|T| >= t) = I_x(ν / 2, 1 / 2) with x = ν / (ν + t²) and ν = n - 1 degrees of freedom.
    """
    differences = [round(a - b, 9) for a, b in zip(ours, theirs, strict=True)]
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return None
    n, spread = len(differences), statistics.stdev(differences)
    t = statistics.mean(differences) / (spread / n**0.5)
    return float(betainc((n - 1) / 2, 0.5, 0, (n - 1) / (n - 1 + t * t), regularized=True))


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's correction for many tests: the smallest p times n, the next times n - 1 .."""
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected, highest = list(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        corrected[i] = highest
    return corrected


def short(value: float) -> str:
    """Three decimals, without the zero before them, and without a sign if all are zero."""
    return f"{round(value, 3) + 0.0:.3f}".replace("0.", ".")


def short_p(p: float | None) -> str:
    return "" if p is None else "< .001" if p < 0.001 else short(p)


def mean_and_range(values: list[float]) -> str:
    """The mean, and the lowest and highest value if they differ."""
    lowest, highest = short(min(values)), short(max(values))
    spread = f" ({lowest} to {highest})" if lowest != highest else ""
    return short(statistics.mean(values)) + spread


def mean_and_spread(values: list[float]) -> str:
    """The mean, and the standard deviation over seeds."""
    parts = [statistics.mean(values)] + ([statistics.stdev(values)] if len(values) > 1 else [])
    return " ± ".join(map(short, parts))


def as_markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# --- 2. All methods ------------------------------------------------------------------------------


def table(results: dict) -> str:
    """Mean ± standard deviation over seeds of each method."""
    rows = [
        [ROWS[name], *(mean_and_spread(metrics[column]) for column in COLUMNS)]
        for name, metrics in results["rows"].items()
    ]
    return as_markdown(["", *COLUMNS.values()], rows)


def summary(results: dict) -> str:
    """README's table: a few methods, with the range over seeds."""
    columns = ("acc_t1", "acc_t2", "delta")
    rows = {name: results["rows"][name] for name in SUMMARY}
    lines = [
        [ROWS[name], *(mean_and_range(row[column]) for column in columns)]
        for name, row in rows.items()
    ]
    return as_markdown(["", "acc@t1", "acc@t2", "delta"], lines)


def rewrites(results: dict) -> str:
    """How often attempt 2 rewrites right and wrong first attempts, and how often answers change."""
    lines = []
    for name, row in results["rows"].items():
        if set(REWRITTEN) <= set(row):
            changed = [1 - copied for copied in row["copied"]]
            parts = (*(row[column] for column in REWRITTEN), changed)
            lines.append([ROWS[name], *map(mean_and_range, parts)])
    heads = ["", "rewritten, of right y1", "rewritten, of wrong y1", "answers changed"]
    return as_markdown(heads, lines)


def rounding(results: dict, elsewhere: dict[str, dict]) -> str:
    """SCoRe's row for some seeds: as in the table, and computed in the ways in `elsewhere`."""
    columns, lines = ("acc_t1", "acc_t2", "delta"), []
    seeds = next(iter(elsewhere.values()))["seeds"]
    places = [results["seeds"].index(seed) for seed in seeds]
    usual = {c: [results["rows"]["score"][c][at] for at in places] for c in columns}
    ways = {"as above": usual}
    ways |= {words: other["rows"]["score"] for words, other in elsewhere.items()}
    for words, row in ways.items():
        moved = [abs(x - y) for c in columns for x, y in zip(row[c], usual[c], strict=True)]
        lines.append([words, *(mean_and_range(row[c]) for c in columns), short(max(moved))])
    heads = [f"seeds {seeds[0]} to {seeds[-1]}", "acc@t1", "acc@t2", "delta", "largest change"]
    return as_markdown(heads, lines)


def accuracies(results: dict, name: str, at: int) -> str:
    """acc@t1 / acc@t2 of a row, of the seed at that place."""
    row = results["rows"][name]
    return " / ".join(short(row[column][at]) for column in ("acc_t1", "acc_t2"))


def first_seeds(ways: dict[str, dict]) -> str:
    """Accuracies after both stages, of single runs by seed and by how they were computed."""
    lines = []
    for seed in sorted({seed for results in ways.values() for seed in results["seeds"]}):
        for words, results in ways.items():
            if seed in results["seeds"]:
                at = results["seeds"].index(seed)
                ends = (accuracies(results, name, at) for name in ("stage1", "score"))
                lines.append([f"{seed}", words, *ends])
    return as_markdown(["`--seed`", "computed with", "after Stage I", "SCoRe"], lines)


def longer(results: dict) -> str:
    """Direct RL with twice the steps beside SCoRe, by seed, on the same processor."""
    lines = [
        [f"{seed}", *(accuracies(results, name, at) for name in ("direct", "score"))]
        for at, seed in enumerate(results["seeds"])
    ]
    return as_markdown(["seed", "direct RL, 480 steps", "SCoRe, 240 steps"], lines)


# --- 3. Claims of the paper ----------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: `larger` is larger than `smaller`; each is a (row, column).

    It agrees with us if the difference of the means is above `least` and below `most`. Claims that
    nothing gets better, or that nothing changes, leave half a point of room, and need no test.
    """

    words: str
    larger: tuple[str, str]
    smaller: tuple[str, str]
    least: float = 0.0
    most: float = math.inf


def score_above(name: str, words: str) -> list[Claim]:
    """Claims that SCoRe is better than another method, in acc@t2 and in delta."""
    return [
        Claim(f"acc@t2: SCoRe > {words}", ("score", "acc_t2"), (name, "acc_t2")),
        Claim(f"delta: SCoRe > {words}", ("score", "delta"), (name, "delta")),
    ]


def copies(name: str, words: str) -> Claim:
    return Claim(f"copied: {words} > SCoRe", (name, "copied"), ("score", "copied"))


def gains_nothing(name: str, words: str) -> Claim:
    return Claim(f"{words}: acc@t1 ≥ acc@t2", (name, "acc_t1"), (name, "acc_t2"), -ROOM)


CLAIMS = [
    gains_nothing("base", "base model"),
    gains_nothing("refine", "Self-Refine"),
    Claim("acc@t2: SCoRe > STaR, D", ("score", "acc_t2"), ("star", "acc_t2")),
    Claim("acc@t2: SCoRe > Pair-SFT, D", ("score", "acc_t2"), ("pair", "acc_t2")),
    Claim("Pair-SFT, D corrects: given y1 > own y1", ("pair", "given"), ("pair", "own")),
    gains_nothing("single", "single-turn RL"),
    copies("direct", "direct RL"),
    *score_above("direct", "direct RL"),
    copies("standard", "RL on y2 alone"),
    *score_above("standard", "RL on y2 alone"),
    Claim("acc@t1: Stage I = base model", ("stage1", "acc_t1"), ("base", "acc_t1"), -ROOM, ROOM),
    Claim("delta: Stage I > base model", ("stage1", "delta"), ("base", "delta")),
    Claim("acc@t1: SCoRe > Stage I", ("score", "acc_t1"), ("stage1", "acc_t1")),
    Claim("acc@t2: SCoRe > Stage I", ("score", "acc_t2"), ("stage1", "acc_t2")),
    *score_above("no-stage1", "without Stage I"),
    *score_above("no-bonus", "without the bonus"),
    *score_above("star-stage2", "STaR in Stage II"),
    *score_above("offline", "no online first attempts"),
]


def claims(results: dict) -> str:
    """A row for each claim: both numbers, p, and whether our results agree."""
    pairs = [
        [results["rows"][row][column] for row, column in (c.larger, c.smaller)] for c in CLAIMS
    ]
    lines = []
    for claim, (large, small), p in zip(
        CLAIMS, pairs, holm([p_value(*pair) for pair in pairs]), strict=True
    ):
        difference = statistics.mean(large) - statistics.mean(small)
        agrees = claim.least < difference < claim.most
        sure = claim.least < 0 or (p is not None and p < 0.05)
        verdict = ("yes" if sure else "not sure") if agrees else "**no**"
        means = [short(statistics.mean(values)) for values in (large, small)]
        lines.append([claim.words, *means, "" if claim.least < 0 else short_p(p), verdict])
    heads = ["claim of the paper", "first", "second", "p-value", "does it hold here?"]
    return as_markdown(heads, lines)


def read(name: str) -> dict:
    return json.loads((ASSETS / f"{name}.json").read_text("utf-8"))


def main() -> None:
    """Print the tables of README.md and RESULTS.md."""
    results = read("results")
    elsewhere = {words: read(name) for name, words in ELSEWHERE.items()}
    single = {words: read(name) for name, words in FIRST_SEEDS.items()}
    tables = (summary(results), claims(results), table(results), rewrites(results))
    tables += (rounding(results, elsewhere), first_seeds(single), longer(read("direct-480")))
    print(*tables, sep="\n", end="")


if __name__ == "__main__":
    main()
