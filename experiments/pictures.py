"""The results in pictures, drawn by reproduce.py from its runs, anew each time.

curve.png         SCoRe learns to correct, direct RL to copy: accuracy of both attempts
multipliers.png   what each token is multiplied by, computed by the objectives themselves
sft.png           why SFT fails: how much of an answer it changes (Figure 3), and how often it
                  corrects given and own first attempts (Figure 4)
collapse.png      when correcting is lost: changed answers in training (Figure 5), and whether
                  a changed answer is better than the one before
attempts.png      ten attempts in a row (Figure 8), by level (Figure 7), votes (Figure 1)

Lines are means over seeds. Bands go from the lowest seed to the highest.
"""

from pathlib import Path
from statistics import mean

import torch

import score
from config import Config
from data import read_jsonl
from figures import BINS, canvas, draw_levels, label_votes, levels_of, smoothed, write_picture
from metrics import edit_ratio
from runs import read_json, read_log
from score import STAGES

NAMES = {
    "base": "base",
    "star+": "STaR, D+",
    "pair": "Pair-SFT, D",
    "pair+": "Pair-SFT, D+",
    "standard": "RL on y2 alone",
    "direct": "direct RL (y1 and y2)",
    "no-stage1": "SCoRe without Stage I",
    "no-bonus": "SCoRe without the bonus",
    "score": "SCoRe",
}
STYLES = {  # colours that everyone can tell apart (Okabe and Ito), and dashes
    "base": ("0.55", "-"),
    "star+": ("#E69F00", "-"),
    "pair": ("#009E73", "-"),
    "pair+": ("#009E73", ":"),
    "standard": ("#56B4E9", "--"),
    "direct": ("#D55E00", "-"),
    "no-stage1": ("#CC79A7", "-."),
    "no-bonus": ("0.1", ":"),
    "score": ("#0072B2", "-"),
}


def draw(out: Path, seeds: list[int]) -> list[Path]:
    """All pictures, into `out`; returns their paths."""
    folders = [out / f"seed-{seed}" for seed in seeds]
    painters = {"curve": draw_curves, "sft": draw_sft}
    painters |= {"collapse": draw_collapse, "attempts": draw_attempts}
    paths = [write_picture(draw_multipliers(), out / "multipliers.png")]
    return paths + [
        write_picture(paint(folders), out / f"{name}.png") for name, paint in painters.items()
    ]


def over_seeds(axis, x, curves: list[list[float]], label: str, color: str, line="-", **style):
    """Draw the mean of the curves, one for each seed, and a band from the lowest to the highest."""
    columns = list(zip(*curves, strict=True))
    axis.plot(x, list(map(mean, columns)), line, label=label, color=color, **style)
    if len(curves) > 1:
        low, high = list(map(min, columns)), list(map(max, columns))
        axis.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)


def in_training(folders: list[Path], name: str) -> tuple[list[int], list[list[dict]], int]:
    """Steps and metrics of a method in training, by seed, and where its last stage begins."""
    lines = [read_log(folder / name / "metrics.jsonl") for folder in folders]
    start = next(i for i, line in enumerate(lines[0]) if line["stage"] == lines[0][-1]["stage"])
    return [line["step"] for line in lines[0]], lines, start


def beside(axis, **settings) -> None:
    """Put the legend to the right of the axes."""
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), **settings)


# --- 0. What happens -----------------------------------------------------------------------------


def draw_curves(folders: list[Path]):
    """Accuracy of both attempts in training: SCoRe's, and that of direct RL."""
    figure, axes = canvas(1, 2, (9, 3.4), sharey=True)
    for axis, name in zip(axes, ("direct", "score"), strict=True):
        steps, lines, start = in_training(folders, name)
        for column, label in (("acc_t2", "attempt 2"), ("acc_t1", "attempt 1")):
            curves = [smoothed([line[column] for line in one]) for one in lines]
            second = column == "acc_t2"
            color, line = STYLES["score" if second else "direct"][0], "-" if second else "--"
            over_seeds(axis, steps, curves, label, color, line, linewidth=2)
        if start:
            axis.axvline(start, color="0.8", zorder=0)
            for at, words in ((0, "Stage I"), (start, "Stage II")):
                axis.text(at, 1.02, f" {words}", color="0.4", fontsize=9)
        axis.set_title(NAMES[name], fontsize=11)
        axis.set_xlabel("step")
    axes[0].set_ylim(0, 1.08)
    axes[0].set_ylabel("accuracy of samples")
    beside(axes[1])
    return figure


# --- 1. What each token is multiplied by ---------------------------------------------------------


def multipliers(stage: str, r1: float, r2: float, tokens: int = 3) -> list[list[float]]:
    """score.multipliers for each token of y1 and y2; half of the siblings are right in each."""
    r = torch.tensor([[r1, r2]])
    of_y = score.multipliers(STAGES[stage], r, torch.full_like(r, 0.5), Config())[0]
    return [[factor] * tokens for factor in of_y.tolist()]


def draw_multipliers():
    figure, axes = canvas(2, 1, (8, 4.6))
    words = {1.0: "right", 0.0: "wrong"}
    cases = [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)]
    for axis, stage, title in zip(axes, ("1", "2"), ("Stage I", "Stage II, α = 10"), strict=True):
        rows = []
        for r1, r2 in cases:
            y1, y2 = multipliers(stage, r1, r2)
            rows.append([0.0] * 3 + y1 + [0.0] * 2 + y2)
        axis.imshow(rows, cmap="PiYG", vmin=-9, vmax=9, aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:+g}" if value else "0", ha="center", va="center")
        labels = ["x1"] * 3 + ["y1"] * 3 + ["p1"] * 2 + ["y2"] * 3
        axis.set_xticks(range(len(labels)), labels)
        axis.set_yticks(range(4), [f"y1 {words[r1]}, y2 {words[r2]}" for r1, r2 in cases])
        axis.set_title(f"{title}: what multiplies ∇ log π of each token", fontsize=10)
        axis.tick_params(length=0)
    return figure


# --- 2. SFT, direct RL, many attempts -------------------------------------------------------------


def draw_sft(folders: list[Path]):
    figure, axes = canvas(1, 2, (11, 3.8), width_ratios=[1, 1.2])
    for name in ("base", "star+", "pair", "score"):
        ratios = []
        for folder in folders:
            rows = read_jsonl(folder / f"eval-attempts-{name}" / "transcripts.jsonl")
            pairs = ([(y["stated"] or "").split() for y in row["attempts"][:2]] for row in rows)
            ratios += [edit_ratio(*pair) for pair in pairs]
        weights = [1 / len(ratios)] * len(ratios)
        style = {"histtype": "step", "linewidth": 2, "color": STYLES[name][0]}
        axes[0].hist(ratios, BINS, weights=weights, label=NAMES[name], **style)
    axes[0].set_xlabel("edit distance of both answers, over their length")
    axes[0].set_ylabel("share of problems")
    axes[0].legend(frameon=False, loc="upper right")
    names = ("star+", "pair", "pair+", "direct", "score")
    for shift, label, rates, color in (
        (-0.2, "the base model's", given, "#56B4E9"),
        (0.2, "its own", own, "#D55E00"),
    ):
        found = [[rates(folder, name) for folder in folders] for name in names]
        middle = list(map(mean, found))
        places = [x + shift for x in range(len(names))]
        ends = [[m - min(one) for m, one in zip(middle, found, strict=True)]]
        ends.append([max(one) - m for m, one in zip(middle, found, strict=True)])
        axes[1].bar(places, middle, 0.4, yerr=ends, label=label, color=color, ecolor="0.3")
    short = [NAMES[name].partition(" (")[0].replace(" ", "\n", 1) for name in names]
    axes[1].set_xticks(range(len(names)), short)
    axes[1].set_ylabel("share of wrong y1 that y2 corrects")
    beside(axes[1], title="attempt 1 (y1)")
    return figure


def given(folder: Path, name: str) -> float:
    """Share of the base model's wrong first attempts that a model corrects."""
    return read_json(folder / f"eval-repair-{name}" / "metrics.json")["metrics"]["acc_t2"]


def own(folder: Path, name: str) -> float:
    """Share of a model's own wrong first attempts that it corrects."""
    metrics = list(read_json(folder / name / "results.json").values())[-1]  # last checkpoint
    return metrics["delta_i_to_c"] / max(1 - metrics["acc_t1"], 1e-9)


def draw_collapse(folders: list[Path]):
    figure, axes = canvas(1, 2, (12, 4))
    stage2 = in_training(folders, "score")[2]
    for name in ("score", "standard", "no-stage1", "no-bonus", "direct"):
        steps, lines, _ = in_training(folders, name)
        if name == "no-bonus":  # it goes on from SCoRe's Stage I
            steps = [step + stage2 for step in steps]
        changed = [[1 - line["copied"] for line in one] for one in lines]
        color, line = STYLES[name]
        curves = list(map(smoothed, changed))
        over_seeds(axes[0], steps, curves, NAMES[name], color, line, linewidth=2)
        gain = gain_of_a_change(changed, [[line["delta"] for line in one] for one in lines])
        axes[1].plot(steps, gain, line, color=color, label=NAMES[name], linewidth=2)
    axes[1].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[0].set_ylabel("share of changed answers")
    axes[1].set_ylabel("(i→c - c→i) / share of changed answers")
    axes[0].set_title("how many answers attempt 2 changes", fontsize=11)
    axes[1].set_title("what a changed answer gains", fontsize=11)
    for axis in axes:
        axis.axvline(stage2, color="0.8", zorder=0)
        axis.set_xlabel("step (Stage II begins at the grey line)")
    beside(axes[1])
    return figure


def gain_of_a_change(changed: list[list[float]], delta: list[list[float]]) -> list[float]:
    """(i→c - c→i) over the share of changed answers, for 20 steps and all seeds together."""
    sums = ([sum(column) for column in zip(*curves, strict=True)] for curves in (delta, changed))
    gained, count = (smoothed(one, window=20) for one in sums)
    return [g / max(n, 1e-9) for g, n in zip(gained, count, strict=True)]


def draw_attempts(folders: list[Path]):
    figure, axes = canvas(1, 3, (15, 3.8))
    for name in ("base", "star+", "pair", "direct", "score"):
        files = [folder / f"eval-attempts-{name}" / "metrics.json" for folder in folders]
        found = [read_json(file)["metrics"] for file in files]
        numbers = range(1, 1 + sum(key.startswith("acc_t") for key in found[0]))
        curves = [[metrics[f"acc_t{i}"] for i in numbers] for metrics in found]
        means = list(map(mean, zip(*curves, strict=True)))
        axes[0].plot(numbers, means, color=STYLES[name][0], marker="o", markersize=3)
        label = NAMES[name].partition(" (")[0]
        axes[0].text(numbers[-1] + 0.3, means[-1], label, color=STYLES[name][0], va="center")
    axes[0].set_title("attempts in a row, of models trained for two", fontsize=11)
    axes[0].set_xticks(numbers)
    axes[0].set_xlabel("attempt")
    axes[0].set_ylabel("accuracy")
    axes[0].set_ylim(0, 1.02)
    draw_levels(axes[1], [levels_of(folder / "eval-attempts-score") for folder in folders])
    axes[1].set_title("SCoRe: what attempt 2 changes", fontsize=11)
    axes[1].set_xlabel("level (of a sum: columns that a carry runs)")
    files = [folder / "eval-samples-score" / "scaling.json" for folder in folders]
    lines = [read_json(file)["lines"] for file in files]
    budgets = [line["budget"] for line in lines[0]]
    votes = {
        "parallel": ("first attempts alone", "0.6"),
        "sequential": ("second attempts (half as many)", "0.1"),
    }
    for vote, (label, color) in votes.items():
        means = [mean(line[vote] for line in row) for row in zip(*lines, strict=True)]
        axes[2].plot(budgets, means, marker="o", label=label, color=color)
    label_votes(axes[2], budgets)
    axes[2].set_title("SCoRe: votes at equal cost", fontsize=11)
    axes[2].set_xlabel("attempts at a problem, all counted")
    return figure
