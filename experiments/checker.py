"""How often is the checker of MATH answers right, and how long does it take?

python experiments/checker.py                  on hand-made pairs and on attacks (tests/math)
python experiments/checker.py --data FOLDER    and on MATH's own golds and solutions
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import InputError, last_box, math_rows  # noqa: E402
from rewards import math_reward, same_answer  # noqa: E402


def rows(name: str) -> list[dict]:
    """Examples of one kind that were judged by hand."""
    lines = (ROOT / "tests" / "math" / f"{name}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def report(name: str, judged: list[tuple[bool, bool]]) -> None:
    """Print a line about pairs (was it accepted?, is it right?)."""
    accepted = sum(found and not right for found, right in judged)
    rejected = sum(right and not found for found, right in judged)
    print(f"{name}: {len(judged)}, wrong accepts {accepted}, wrong rejects {rejected}")


def on_judged() -> None:
    """Pairs and full answers that were judged by hand, and what once fooled the checker."""
    pairs = rows("pairs")
    report("pairs", [(same_answer(p["prediction"], p["gold"]), p["equal"]) for p in pairs])
    full = rows("answers")
    report("full answers", [(math_reward(a["text"], a["gold"]) > 0, a["right"]) for a in full])
    report("attacks", [(same_answer(**attack), False) for attack in rows("attacks")])
    copies = rows("copies")
    paid = [math_reward(c["attempt"], c["gold"], c["question"]) > 0 for c in copies]
    report("copies of the question, and hedges", [(one, False) for one in paid])


def on_math(folder: Path) -> None:
    """Each gold against itself, and against the last box of its solution."""
    for split, rows in math_rows(str(folder)).items():
        golds = [row.get("answer") or last_box(row["solution"]) or "" for row in rows]
        times = []
        for gold in golds:
            began = time.perf_counter()
            same_answer(gold, gold)
            times.append(1e3 * (time.perf_counter() - began))
        times.sort()
        itself = sum(same_answer(f"${gold}$", gold) for gold in golds)
        boxes = sum(math_reward(row["solution"], g) for row, g in zip(rows, golds, strict=True))
        print(
            f"MATH {split}: {len(golds)} golds, {itself} equal themselves, {boxes:.0f} their "
            f"solution's box; median {times[len(times) // 2]:.2f} ms, "
            f"99 % under {times[int(0.99 * len(times))]:.1f} ms"
        )


def main() -> None:
    """Print one line for each set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of MATH's JSONL files")
    args = parser.parse_args()
    on_judged()
    try:
        if args.data:
            on_math(args.data)
    except InputError as error:
        print(f"checker.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
