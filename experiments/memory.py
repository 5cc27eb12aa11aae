"""What full fine-tuning takes on one GPU: the README's memory table, and a real step.

python experiments/memory.py              the table: computed, not measured
python experiments/memory.py --measure    a step of Gemma 2 2B with random weights on this GPU:
                                          batch 64, attempts of 512 tokens; seconds and peak
python experiments/memory.py --measure --layers 2 --width 64 --batch 4 --tokens 16    a trial
"""

import argparse
import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import score  # noqa: E402
from data import Problem  # noqa: E402
from models import make_masters, recompute_activations  # noqa: E402
from sample import Episode  # noqa: E402

PROMPT, AGAIN = 180, 90  # tokens of a usual x1 and of p1
GB = 1e9


def gemma_config(layers: int = 26, width: int = 2304) -> Gemma2Config:
    """google/gemma-2-2b, whose sizes are the defaults of Gemma2Config."""
    return Gemma2Config(num_hidden_layers=layers, hidden_size=width, attn_implementation="eager")


def table(cfg: score.Config) -> str:
    """Gigabytes by part, while sampling and while training, of Gemma 2 2B with given settings."""
    config = gemma_config()
    with torch.device("meta"):
        weights = Gemma2ForCausalLM(config).num_parameters()
    positions = PROMPT + AGAIN + 2 * cfg.max_new_tokens
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    longest = cfg.micro_tokens * positions * config.num_attention_heads  # attention scores
    parts = {
        "policy, bfloat16": (2 * weights, 2 * weights),
        "reference, bfloat16": (2 * weights, 2 * weights),
        "masters, float32": (4 * weights, 4 * weights),
        "Adam, two float32 each": (8 * weights, 8 * weights),
        "gradients, float32": (0, 4 * weights),
        f"KV cache, {cfg.rows} rows of {positions} tokens": (cfg.rows * positions * kv, 0),
        f"layer inputs, {cfg.micro_tokens} tokens": (
            0,
            2 * config.num_hidden_layers * cfg.micro_tokens * config.hidden_size,
        ),
        "one layer, computed again": (
            0,
            14 * longest + 10 * cfg.micro_tokens * config.intermediate_size,
        ),
        "logits of a chunk, eight float32 each": (0, 8 * 4 * score.LOGITS_AT_ONCE),
        "the embedding's gradient, twice in bfloat16 and once in float32": (
            0,
            8 * config.vocab_size * config.hidden_size,
        ),
    }
    lines = ["| GB, computed | sampling | training |", "| --- | --- | --- |"]
    for name, row in parts.items():
        lines.append(f"| {name} | " + " | ".join(f"{x / GB:.1f}" if x else "" for x in row) + " |")
    totals = [sum(column) / GB for column in zip(*parts.values(), strict=True)]
    lines.append(f"| **in all** | **{totals[0]:.1f}** | **{totals[1]:.1f}** |")
    disk = f"On disk a checkpoint takes {2 * weights / GB:.1f} GB and state.pt "
    return "\n".join([*lines, "", f"{disk}{12 * weights / GB:.1f} GB."])


@dataclass(frozen=True)
class RandomChat:
    """Prompts of random tokens, and attempts that all but never end."""

    p1: tuple[int, ...] = tuple(range(10, 10 + AGAIN))
    end_ids: tuple[int, ...] = (1,)
    close_id: int = 1

    def x1(self, problem: Problem) -> list[int]:
        return [(7 * i + len(problem.id)) % 1000 + 2 for i in range(PROMPT)]

    def text(self, tokens: list[int]) -> str:
        return ""


def measure(args: argparse.Namespace) -> str:
    """One step from sampling to Adam, after one that warms up; random rewards."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        policy = Gemma2ForCausalLM(gemma_config(args.layers, args.width)).to(torch.bfloat16).eval()
    ref = copy.deepcopy(policy).requires_grad_(False)
    recompute_activations(policy)
    masters = make_masters(policy)
    typed = {"task": "math", "batch": args.batch, "k": 4, "max_new_tokens": args.tokens}
    cfg = score.configure({**typed, "rows": args.rows})
    chat = RandomChat(list(RandomChat.p1))
    learner = score.Learner(policy, masters, ref, score.adam(masters, cfg), chat, [], cfg)
    problems = [Problem("", "", "math", "p" * n) for n in range(args.batch // 4) for _ in range(4)]
    for number in range(2):
        episodes, sampling = timed(lambda n=number: score.sample(learner, problems, str(n)))
        tossed = with_coins(episodes)
        _, training = timed(lambda made=tossed: score.update(learner, made, 2))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return (
        f"{policy.num_parameters():,} weights on {name}, batch {args.batch}, attempts of "
        f"{args.tokens} tokens: sampling {sampling}, training {training}"
    )


def timed(part):
    """What a part of the step returns, and its seconds and peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    made = part()
    if not torch.cuda.is_available():
        return made, f"{time.perf_counter() - began:.1f} s"
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / GB
    return made, f"{time.perf_counter() - began:.1f} s, peak {peak:.1f} GB"


def with_coins(episodes: list[Episode]) -> list[Episode]:
    """The same episodes with random rewards, so that every advantage is alive."""
    coin = torch.Generator().manual_seed(0)
    return [
        replace(e, attempts=tuple(replace(y, reward=float(toss(coin))) for y in e.attempts))
        for e in episodes
    ]


def toss(coin: torch.Generator) -> int:
    return int(torch.randint(2, (), generator=coin))


def main() -> None:
    """Print the table, or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="make a step on this machine")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--width", type=int, default=2304, help="hidden size")
    parser.add_argument("--batch", type=int, default=64, help="episodes, 4 a problem")
    parser.add_argument("--tokens", type=int, default=512, help="of an attempt")
    parser.add_argument("--rows", type=int, default=64, help="sampled side by side")
    args = parser.parse_args()
    print(measure(args) if args.measure else table(score.configure({"task": "math"})))


if __name__ == "__main__":
    main()
