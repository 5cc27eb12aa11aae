"""score.py with another built-in base model: one run of the map (landscape.py).

python experiments/cell.py --far 2 --right 0.05 --out runs/cell     other flags are score.py's

--far: how many columns away a slow first attempt sees a carry; this limits attempt 1. --right: the
share of right rewrites among the later attempts in the last phase of fitting the base model; the
share of rewrites with a slip changes in proportion.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ranks
import score
import sft

SLIPS = sft.PHASES[-1].slip / sft.PHASES[-1].right  # for each right rewrite


def main(argv: list[str] | None = None) -> int:
    """The command line; returns score.py's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--far", type=int, default=sft.FAR)
    parser.add_argument("--right", type=float, default=sft.PHASES[-1].right)
    args, given = parser.parse_known_args(argv)
    sft.FAR, (*skills, last) = args.far, sft.PHASES
    sft.PHASES = (*skills, replace(last, right=args.right, slip=SLIPS * args.right))
    return score.main(given)


if __name__ == "__main__":
    ranks.run_command(main)
