"""Do two checkouts train alike, bit for bit? For changes that must not change any result.

    python experiments/compare.py OTHER         seed 3, 20 + 10 steps, one thread; some minutes

OTHER is another checkout of this repository, such as a `git worktree` of an earlier commit. Both
make the same runs. These are compared: the lines of metrics.jsonl without their seconds, the
transcripts, the results, and every tensor of every checkpoint and of the state to resume from.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ranks  # noqa: E402
from runs import read_log  # noqa: E402

SMALL = "--seed 3 --steps1 20 --steps2 10 --problems 200"
RUNS = {
    "SCoRe": "",
    "offline first attempts": "--offline 0.25",
    "STaR and Pair-SFT": "--stage star,pair",
    "STaR twice, Pair-SFT on D+": "--stage star,star,pair+ --steps2 3",
    "single-turn RL": "--stage 0",
    "three attempts": "--stage 1,1b,2 --attempts 3 --adaptive-beta2",
}


def train(checkout: Path, flags: str, out: Path) -> None:
    command = [sys.executable, "score.py", *SMALL.split(), *flags.split(), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True)


def contents(run: Path) -> dict:
    """All that a run has written, by name: texts and numbers as values, weights as tensors."""
    lines = read_log(run / "metrics.jsonl")
    found = {f"step {line['step']}": {**line, "seconds": 0} for line in lines}
    for name in ("samples.txt", "episodes.jsonl", "results.json"):
        found[name] = (run / name).read_text("utf-8")
    for path in sorted(run.glob("*/model.safetensors")):
        found |= {f"{path.parent.name}: {name}": x for name, x in load_file(path).items()}
    return found | {f"state: {name}": tensor for name, tensor in state_tensors(run).items()}


def state_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's state by name, however many processes wrote it."""
    saved = dcp.FileSystemReader(run / "state").read_metadata().state_dict_metadata
    tensors = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in saved.items()}
    ranks.load_sharded(tensors, run / "state")
    return tensors


def differences(one: dict, two: dict) -> list[str]:
    """The names of all that differs."""

    def same(a, b) -> bool:
        return torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else a == b

    return [
        n for n in sorted({*one, *two}) if n not in one or n not in two or not same(one[n], two[n])
    ]


def main() -> int:
    """Print a line for each run; the exit status is 1 if anything differs, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("other", type=Path, help="another checkout")
    other, status = parser.parse_args().other, 0
    if not (other / "score.py").exists():
        parser.error(f"{other} is no checkout, since it has no score.py: name another")
    for name, flags in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / side for side in ("one", "other")]
            for checkout, out in zip((ROOT, other), outs, strict=True):
                train(checkout, flags, out)
            found = contents(outs[0])
            different = differences(found, contents(outs[1]))
        print(f"{name}: {len(found)} compared, {len(different)} differ {different[:3]}", flush=True)
        status |= bool(different)
    return status


if __name__ == "__main__":
    sys.exit(main())
