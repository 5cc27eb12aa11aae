"""When does SCoRe help? Its gain over direct RL, for other base models of the same task.

Two things change. --far of cell.py: how far a slow first attempt sees, which limits acc@t1.
--right: how often the base model, asked again, gives a right rewrite. `python
experiments/reproduce.py --map` makes the runs, and writes results.json, table.md and map.png.
"""

import math
from functools import cache
from pathlib import Path
from statistics import mean

import runs
from config import configure
from experiments.jobs import Job
from experiments.tables import as_markdown, mean_and_spread, read, short
from figures import canvas, write_picture
from sft import FAR, PHASES, add_shortsightedly, columns_of
from tasks import load_problems

FARS = (1, 2, 3, 5)
RIGHTS = (0.003, 0.009, 0.027, 0.081)


def cells() -> list[tuple[int, float]]:
    return [(far, right) for far in FARS for right in RIGHTS]


def folder_of(out: Path, far: int, right: float, seed: int) -> Path:
    return out / f"far-{far}-right-{right}" / f"seed-{seed}"


def plan(out: Path, seeds: list[int], typed: dict, given: list[str]) -> list[list[Job]]:
    """Two waves: SCoRe in each cell, then direct RL from the same base models."""
    cfg = configure(typed)
    waves = [[], []]
    for seed in seeds:
        for far, right in cells():
            folder, name = folder_of(out, far, right, seed), f"{far} {right} {seed}"
            base = f"{folder}/score/base"
            score = f"--far {far} --right {right}"
            direct = f"--stage 2 --alpha 0 --model {base} --init {base}"
            direct += f" --steps2 {cfg.steps1 + cfg.steps2}"
            for wave, method, flags, script in (
                (waves[0], "score", score, "experiments/cell.py"),
                (waves[1], "direct", direct, "score.py"),
            ):
                words = [*given, *flags.split(), "--seed", str(seed)]
                where = folder / method
                job = Job(f"{method} {name}", where, script, words, "results.json", "stage2")
                wave.append(job)
    return waves


@cache
def ceiling(far: int) -> float:
    """Share of held-out sums that are right if a carry is seen at most `far` columns away."""
    problems = load_problems("sums", "test", 2000)
    return mean(add_shortsightedly(columns_of(p), far) == p.answer for p in problems)


def collect(out: Path, seeds: list[int], settings: dict) -> dict:
    """For each cell: i→c of the sampled base model, and the metrics of both methods by seed."""
    found = []
    for far, right in cells():
        folders = [folder_of(out, far, right, seed) for seed in seeds]
        of_score, of_direct = (
            [runs.read_json(folder / name / "results.json") for folder in folders]
            for name in ("score", "direct")
        )
        sampled = mean(results["base, sampled"]["delta_i_to_c"] for results in of_score)
        cell = {"far": far, "right": right, "ceiling": ceiling(far), "sampled i_to_c": sampled}
        for name, results in (("score", of_score), ("direct", of_direct)):
            for column in ("acc_t1", "acc_t2", "delta"):
                cell[f"{name} {column}"] = [one["stage2"][column] for one in results]
        found.append(cell)
    return {"settings": settings, "seeds": seeds, "cells": found}


def gains(cell: dict, column: str) -> list[float]:
    """SCoRe minus direct RL, by seed."""
    pairs = zip(cell[f"score {column}"], cell[f"direct {column}"], strict=True)
    return [ours - theirs for ours, theirs in pairs]


def gains_of_builtin(column: str) -> list[float]:
    """SCoRe minus direct RL in assets/results.json, by seed: the built-in task."""
    rows = read("results")["rows"]
    return [a - b for a, b in zip(rows["score"][column], rows["direct"][column], strict=True)]


def table(results: dict) -> str:
    """A row for each cell: both methods, and the gain with its standard deviation over seeds."""
    rows = []
    for cell in results["cells"]:
        both = [short(mean(cell[f"{name} acc_t2"])) for name in ("direct", "score")]
        gained = [mean_and_spread(gains(cell, column)) for column in ("acc_t2", "delta")]
        seen = [short(cell["ceiling"]), f"{cell['right']:g}", short(cell["sampled i_to_c"])]
        rows.append([*seen, *both, *gained])
    heads = ["ceiling of attempt 1", "right rewrites", "i→c, sampled base", "direct RL: acc@t2"]
    return as_markdown([*heads, "SCoRe: acc@t2", "gain in acc@t2", "gain in delta"], rows)


def draw(out: Path, results: dict) -> Path:
    """Draw map.png: the gains in acc@t2 and in delta, over --right and the ceiling of attempt 1."""
    figure, axes = canvas(1, 2, (10, 4))
    by_place = {(cell["far"], cell["right"]): cell for cell in results["cells"]}
    for axis, column, title in zip(axes, ("acc_t2", "delta"), ("acc@t2", "delta"), strict=True):
        rows = [[mean(gains(by_place[far, right], column)) for right in RIGHTS] for far in FARS]
        most = max(abs(value) for row in rows for value in row)
        axis.imshow(rows, cmap="PuOr_r", vmin=-most, vmax=most, origin="lower", aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                color = "white" if abs(value) > 0.6 * most else "black"
                words = f"{value:+.2f}" if round(value, 2) else "0.00"
                axis.text(x, y, words, ha="center", va="center", color=color)
        axis.set_xticks(range(len(RIGHTS)), [f"{100 * right:g} %" for right in RIGHTS])
        labels = [f"{by_place[far, RIGHTS[0]]['ceiling']:.2f}" for far in FARS]
        axis.set_yticks(range(len(FARS)), labels)
        axis.set_xlabel("right rewrites among later attempts of the base model's data")
        axis.set_ylabel("accuracy of a slow attempt 1")
        axis.set_title(f"{title} of SCoRe minus that of direct RL", fontsize=11)
        axis.tick_params(length=0)
        if FAR in FARS:  # the built-in task; columns are a factor apart, so it is between two
            x = math.log(PHASES[-1].right / RIGHTS[0]) / math.log(RIGHTS[1] / RIGHTS[0])
            y = FARS.index(FAR) - 0.3
            axis.plot(x, y, "*", color="white", markersize=8)
            words = f"built-in: {mean(gains_of_builtin(column)):+.2f}"
            axis.text(x + 0.1, y, words, color="white", fontsize=8, va="center")
    return write_picture(figure, out / "map.png")
