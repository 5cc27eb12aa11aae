"""Pictures of what was measured, by `python eval.py --plot FOLDER`; they need matplotlib.

    a run folder           curve.png     what happened in training
    an evaluation          attempts.png  accuracy of each attempt (Figure 8), how much of an answer
                                         attempt 2 changes (Figure 3), gains by level (Figure 7)
    votes, by --samples    scaling.png   samples against corrections (Figure 1, right)

Next to read: report.py.
"""

import json
from pathlib import Path
from statistics import mean

from data import InputError, read_jsonl
from metrics import edit_ratio, wilson
from runs import read_json, read_log
from score import STAGES

SHARES = {"acc_t1": "acc@t1", "acc_t2": "acc@t2", "delta": "delta", "copied": "answers copied"}
KLS = {"kl_t1": "of attempt 1", "kl_t2": "of attempt 2"}
PANELS = {"share of sampled episodes": SHARES, "KL to the reference, nats": KLS}
BINS = [n / 20 for n in range(21)]  # of the histogram of edit_ratio


def draw(folder: Path) -> Path:
    """Draw what a folder holds; InputError if that is neither a run nor an evaluation."""
    painters = {"metrics.jsonl": draw_curve, "transcripts.jsonl": draw_attempts}
    for name, painter in (painters | {"scaling.json": draw_votes}).items():
        if (folder / name).exists():
            return painter(folder)
    raise InputError(f"--plot {folder} holds no run and no evaluation: name a folder that does")


def canvas(rows: int, columns: int, size: tuple[float, float], **settings):
    """A figure of matplotlib and its axes, which have no line above and to the right."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("pictures need matplotlib: pip install -r requirements-dev.txt") from error
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **settings)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def write_picture(figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def draw_curve(folder: Path) -> Path:
    """Draw metrics.jsonl of a run; each point is the mean of the last 10 steps."""
    lines = read_log(folder / "metrics.jsonl")
    if not lines:
        raise InputError(f"--plot {folder} has no step to draw yet: wait for the first ones")
    steps = [line["step"] for line in lines]
    starts = [i for i, line in enumerate(lines) if i == 0 or line["stage"] != lines[i - 1]["stage"]]
    figure, axes = canvas(len(PANELS), 1, (8, 5.6), sharex=True, height_ratios=[3, 2])
    for axis, (title, curves) in zip(axes, PANELS.items(), strict=True):
        for name, label in curves.items():
            axis.plot(steps, smoothed([line[name] for line in lines]), label=label)
        for start in starts:
            axis.axvline(steps[start], color="0.85", zorder=0)
        axis.set_ylabel(title)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for start in starts:
        label = STAGES[lines[start]["stage"]].title
        axes[0].text(steps[start], 1.02, f" {label}", transform=axes[0].get_xaxis_transform())
    axes[-1].set_xlabel("step")
    return write_picture(figure, folder / "curve.png")


def smoothed(values: list[float], window: int = 10) -> list[float]:
    """Each value replaced by the mean of the last `window` values up to it, fewer at the start."""
    windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in windows]


def levels_of(folder: Path) -> dict[str, dict]:
    """Metrics of an evaluation by "level N (count)"; {} if its problems have no level."""
    groups = read_json(folder / "metrics.json").get("groups", {})
    return {name: group for name, group in groups.items() if name.startswith("level ")}


def draw_attempts(folder: Path) -> Path:
    """Draw transcripts.jsonl of an evaluation, and its metrics by level if there are any."""
    rows = [row["attempts"] for row in read_jsonl(folder / "transcripts.jsonl")]
    if not rows or len(rows[0]) < 2:
        raise InputError(f"--plot {folder} needs an evaluation of two attempts or more")
    levels = levels_of(folder)
    panels = 3 if levels else 2
    figure, axes = canvas(1, panels, (4.5 * panels, 3.6))
    numbers = list(range(1, len(rows[0]) + 1))
    shares = [sum(y["reward"] for y in column) / len(rows) for column in zip(*rows, strict=True)]
    bounds = [wilson(share, len(rows)) for share in shares]
    axes[0].plot(numbers, shares, marker="o")
    axes[0].fill_between(numbers, *zip(*bounds, strict=True), alpha=0.15)
    axes[0].set_xticks(numbers)
    axes[0].set_xlabel("attempt")
    axes[0].set_ylabel("accuracy, with 95 % intervals")
    ratios = [edit_ratio(one["tokens"], two["tokens"]) for one, two, *_ in rows]
    axes[1].hist(ratios, BINS, weights=[1 / len(rows)] * len(rows))
    axes[1].set_xlabel("edit distance of attempts 1 and 2 over their length")
    axes[1].set_ylabel("share of problems")
    if levels:
        draw_levels(axes[2], [levels])
    return write_picture(figure, folder / "attempts.png")


def draw_levels(axis, evaluations: list[dict]) -> None:
    """Draw i→c and c→i of each level; each evaluation has its metrics by "level N (count)"."""
    names = list(evaluations[0])
    for shift, metric, label, color in (
        (-0.2, "delta_i_to_c", "i→c: corrections", "#009E73"),
        (0.2, "delta_c_to_i", "c→i: spoilt answers", "#CC79A7"),
    ):
        heights = [mean(levels[name][metric] for levels in evaluations) for name in names]
        places = [i + shift for i in range(len(names))]
        axis.bar(places, heights, width=0.4, label=label, color=color)
    axis.set_xticks(range(len(names)), [name.split()[1] for name in names])
    axis.set_xlabel("level")
    axis.set_ylabel("share of its problems")
    axis.legend(frameon=False)


def draw_votes(folder: Path) -> Path:
    """Draw scaling.json: the accuracy of both votes over their budget, with 95 % intervals."""
    lines = json.loads((folder / "scaling.json").read_text("utf-8"))["lines"]
    figure, (axis,) = canvas(1, 1, (6, 4))
    budgets = [line["budget"] for line in lines]
    for name in ("parallel", "sequential"):
        bounds = [wilson(line[name], line["problems"]) for line in lines]
        axis.plot(budgets, [line[name] for line in lines], marker="o", label=name)
        axis.fill_between(budgets, *zip(*bounds, strict=True), alpha=0.15)
    label_votes(axis, budgets)
    return write_picture(figure, folder / "scaling.png")


def label_votes(axis, budgets: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(budgets, budgets)
    axis.set_xlabel("samples of a problem")
    axis.set_ylabel("accuracy of the majority's answer")
    axis.legend(frameon=False)
