"""The table of the README: SCoRe and its control on the built-in task, five seeds.

    python experiments/seeds.py          12 minutes on two cores; finished runs are kept

One thread a run and one run a core, so that the numbers do not depend on the number of cores.

The control is direct multi-turn RL: both attempts rewarded, no Stage I, no bonus, from the same
base model, with as many updates.
"""

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runs import read_json  # noqa: E402
from score import Config  # noqa: E402

RUNS, SEEDS = Path("runs/seeds"), range(5)
COLUMNS = {
    "acc_t1": "acc@t1",
    "acc_t2": "acc@t2",
    "delta": "delta",
    "delta_i_to_c": "i->c",
    "delta_c_to_i": "c->i",
    "copied": "copied",
}


def run(name: str, *flags: str) -> dict:
    """The results of a run of score.py, which is begun, resumed or just read."""
    out = RUNS / name
    if "stage2" not in read_json(out / "results.json"):
        again = ["--resume"] if (out / "metrics.jsonl").exists() else flags
        command = [sys.executable, ROOT / "score.py", "--out", out, *again]
        print("running", name, flush=True)
        with (RUNS / f"{name}.log").open("a") as log:
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, env=one_thread, stdout=log, stderr=log)
    return read_json(out / "results.json")


def compare(seed: str) -> tuple[dict, ...]:
    """Metrics of base, Stage I, Stage II and the control of one seed."""
    base = str(RUNS / f"score-{seed}" / "base")
    ours = run(f"score-{seed}", "--seed", seed)
    control = ["--seed", seed, "--model", base, "--init", base, "--stage", "2", "--alpha", "0"]
    steps = str(Config.steps1 + Config.steps2)
    theirs = run(f"control-{seed}", *control, "--steps2", steps)
    return ours["base"], ours["stage1"], ours["stage2"], theirs["stage2"]


def main() -> None:
    """Do all runs, then print mean and standard deviation over the seeds, and each delta."""
    RUNS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(compare, map(str, SEEDS)))
    names = ("base", "after Stage I", "after Stage II", "control")
    rows = dict(zip(names, zip(*found, strict=True), strict=True))
    print(" " * 14 + "".join(f"{head:>13}" for head in COLUMNS.values()))
    for name, results in rows.items():
        columns = [[metrics[column] for metrics in results] for column in COLUMNS]
        cells = [f"{statistics.mean(c):.3f} ± {statistics.stdev(c):.3f}" for c in columns]
        print(f"{name:14}" + "".join(f"{cell:>15}" for cell in cells))
    print("delta, by seed")
    for name, results in rows.items():
        print(f"{name:14}" + "".join(f"{metrics['delta']:+8.3f}" for metrics in results))


if __name__ == "__main__":
    main()
