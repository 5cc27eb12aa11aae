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

from data import last_box, math_rows  # noqa: E402
from rewards import math_reward, same_answer  # noqa: E402


def on_pairs() -> None:
    """Pairs whose equality was judged by hand, and answers that once fooled the checker."""
    path = ROOT / "tests" / "math" / "pairs.jsonl"
    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(same_answer(pair["prediction"], pair["gold"]), pair["equal"]) for pair in pairs]
    accepted = sum(one and not two for one, two in found)
    rejected = sum(two and not one for one, two in found)
    print(f"hand-made pairs: {len(pairs)}, wrong accepts {accepted}, wrong rejects {rejected}")
    attacks = (ROOT / "tests" / "math" / "attacks.jsonl").read_text().splitlines()
    fooled = sum(same_answer(**json.loads(line)) for line in attacks)
    print(f"attacks: {len(attacks)}, accepted {fooled}")


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
    on_pairs()
    if args.data:
        on_math(args.data)


if __name__ == "__main__":
    main()
