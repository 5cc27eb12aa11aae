"""What full fine-tuning takes on GPUs of 80 GB: the README's tables, and a real step.

python experiments/memory.py              the tables: computed, not measured
python experiments/memory.py --measure    a step of Gemma 2 2B with random weights on this GPU:
                                          batch 64, attempts of 512 tokens; seconds and peak
python experiments/memory.py --measure --layers 2 --width 64 --batch 4 --tokens 16    a trial
"""

import argparse
import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import score  # noqa: E402
from config import Config, configure  # noqa: E402
from data import Problem  # noqa: E402
from experiments.bench import RandomChat  # noqa: E402
from fused import fuse  # noqa: E402
from learner import Learner  # noqa: E402
from sample import Episode  # noqa: E402

PROMPT, AGAIN, LONGEST = 180, 90, 800  # tokens of a usual x1, of p1, and of the longest x1
GB = 1e9
USABLE = 76 * GB  # of 80: the rest goes to CUDA, NCCL and fragments
SIZES = {  # the configs of google/gemma-2-2b, -9b and -27b, where they differ from Gemma2Config
    "2b": {},
    "9b": {
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "27b": {
        "hidden_size": 4608,
        "num_hidden_layers": 46,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 36864,
    },
}


def gemma_config(**sizes: int) -> Gemma2Config:
    """google/gemma-2-2b, whose sizes are the defaults of Gemma2Config, or another one."""
    return Gemma2Config(**sizes, attn_implementation="eager")


def weights_of(config: Gemma2Config) -> int:
    with torch.device("meta"):
        return Gemma2ForCausalLM(config).num_parameters()


def columns_of(cfg: Config) -> int:
    return PROMPT + AGAIN + 2 * cfg.max_new_tokens


def kv_per_token(config: Gemma2Config) -> int:
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2


def parts_of(config: Gemma2Config, cfg: Config, gpus: int) -> dict[str, tuple[float, float]]:
    """Bytes by part on one of the GPUs, sampling and training; the KV cache comes on top."""
    weights, embedding = weights_of(config), config.vocab_size * config.hidden_size
    share, tokens = weights / gpus, cfg.micro_tokens
    longest = tokens * columns_of(cfg) * config.num_attention_heads  # attention scores
    layer = (weights - embedding) / config.num_hidden_layers
    return {
        "masters, float32": (4 * share, 4 * share),
        "Adam, two float32 each": (8 * share, 8 * share),
        "reference, bfloat16": (2 * share, 2 * share),
        "full copy, bfloat16": (2 * weights, 2 * weights),
        "embeddings of policy and reference, gathered": (2 * embedding, 4 * embedding),
        "two layers of each, gathered": (0, 8 * layer),
        "gradients, float32": (0, 4 * share),
        "the embedding's gradient, twice in bfloat16 and once in float32": (0, 8 * embedding),
        f"layer inputs, {tokens} tokens": (
            0,
            2 * config.num_hidden_layers * tokens * config.hidden_size,
        ),
        "one layer, computed again": (0, 14 * longest + 10 * tokens * config.intermediate_size),
        "logits of a chunk, eight float32 each": (0, 8 * 4 * score.LOGITS_AT_ONCE),
    }


def totals(parts: dict[str, tuple[float, float]]) -> list[float]:
    return [sum(column) for column in zip(*parts.values(), strict=True)]


def table(cfg: Config) -> str:
    """Gigabytes by part, while sampling and while training, of Gemma 2 2B on one GPU."""
    config = gemma_config()
    parts = parts_of(config, cfg, gpus=1)
    cache = f"KV cache, {cfg.rows} rows of {columns_of(cfg)} tokens"
    parts[cache] = (cfg.rows * columns_of(cfg) * kv_per_token(config), 0)
    lines = ["| GB, computed | sampling | training |", "| --- | --- | --- |"]
    for name, row in parts.items():
        lines.append(f"| {name} | " + " | ".join(f"{x / GB:.1f}" if x else "" for x in row) + " |")
    sampling, training = (total / GB for total in totals(parts))
    lines.append(f"| **in all** | **{sampling:.1f}** | **{training:.1f}** |")
    weights = weights_of(config)
    disk = f"On disk a checkpoint takes {2 * weights / GB:.1f} GB and state/ "
    disk += f"{12 * weights / GB:.1f} GB; while it is written, twice that and as much RAM."
    return "\n".join([*lines, "", disk])


def what_fits(cfg: Config) -> str:
    """Each size on 1, 4 and 8 GPUs: the most GB without the KV cache, and the rows that it leaves.

    No more rows than a step has episodes on a GPU. A row takes the columns of the longest prompt
    of those beside it, and three float32 for each word of the vocabulary.
    """
    counts = (1, 4, 8)
    lines = ["| computed | " + " | ".join(f"{n} x 80 GB" for n in counts) + " |"]
    lines.append("| --- " * (len(counts) + 1) + "|")
    for name, sizes in SIZES.items():
        config, cells = gemma_config(**sizes), []
        for gpus in counts:
            sampling, training = totals(parts_of(config, cfg, gpus))
            columns = columns_of(cfg) - PROMPT + LONGEST
            row = columns * kv_per_token(config) + 12 * config.vocab_size
            rows = min(int((USABLE - sampling) / row), cfg.batch // gpus)
            fits = training <= USABLE and rows >= 1
            most = max(sampling, training) / GB
            cells.append(f"{most:.0f} GB, --rows {rows}" if fits else f"no: {most:.0f} GB")
        billions = weights_of(config) / 1e9
        lines.append(f"| gemma-2-{name}, {billions:.2f} billion | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> str:
    """One step from sampling to Adam, after one that warms up; random rewards."""
    torch.manual_seed(0)
    config = gemma_config(num_hidden_layers=args.layers, hidden_size=args.width)
    ref = fuse(Gemma2ForCausalLM(config)).to(torch.bfloat16).eval()
    policy = copy.deepcopy(ref)
    models.recompute_activations(policy)
    full_copy = models.distribute(policy, ref.requires_grad_(False), "bfloat16")
    typed = {"task": "math", "batch": args.batch, "k": 4, "max_new_tokens": args.tokens}
    cfg = configure({**typed, "rows": args.rows})
    chat = RandomChat((PROMPT, PROMPT + 1), p1=list(range(10, 10 + AGAIN)))
    adam = models.adam(policy, cfg.lr)
    learner = Learner(policy, ref, full_copy, adam, chat, [], cfg)
    problems = [Problem("", "", "math", "p" * n) for n in range(args.batch // 4) for _ in range(4)]
    for number in range(2):
        episodes, sampling = timed(
            lambda n=number: score.sample(learner, problems, score.STAGES["2"], str(n))
        )
        tossed = with_coins(episodes)
        _, training = timed(lambda made=tossed: score.update(learner, made, score.STAGES["2"], 0.1))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
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
    """Print the tables, or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", action="store_true", help="make a step on this machine")
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--width", type=int, default=2304, help="hidden size")
    parser.add_argument("--batch", type=int, default=64, help="episodes, 4 a problem")
    parser.add_argument("--tokens", type=int, default=512, help="of an attempt")
    parser.add_argument("--rows", type=int, default=64, help="sampled side by side")
    args = parser.parse_args()
    cfg = configure({"task": "math"})
    print(measure(args) if args.measure else f"{table(cfg)}\n\n{what_fits(cfg)}")


if __name__ == "__main__":
    main()
