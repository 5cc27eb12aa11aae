"""What fits on a GPU: the memory of a training step, counted without a GPU or measured on one.

python experiments/memory.py --all                  count all of BENCHMARKS.md's table: an hour
python experiments/memory.py                        the table, from assets/memory.json
python experiments/memory.py --model gemma-2-2b --lora 16 --rows 32 --micro-tokens 4096
python experiments/memory.py --measure --lora 16    seconds and peak of a real step on this GPU

Counting runs the project's own rollout and update on fake tensors, which have a shape and a size
but no numbers, and adds up the bytes of those that live at the same time. This is the worst case:
all prompts are as long as MATH's longest, and all attempts reach --max-new-tokens. Not counted are
the memory of CUDA itself (about 1 GB) and gaps between tensors.
"""

import argparse
import contextlib
import copy
import gc
import json
import sys
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402
import models  # noqa: E402
import ranks  # noqa: E402
import sample  # noqa: E402
import score  # noqa: E402
from cache import RowCache  # noqa: E402
from config import Config, configure  # noqa: E402
from data import Problem  # noqa: E402
from experiments.bench import RandomChat  # noqa: E402
from fused import fuse  # noqa: E402
from learner import Learner  # noqa: E402
from sample import Episode  # noqa: E402

LONGEST, AGAIN = 800, 90  # tokens of MATH's longest x1, and of p1
GB = 1e9
GPUS = {16: 14.5, 24: 22, 40: 37, 80: 75}  # GB of a GPU: GB of it that may be used
SETTINGS = [(64, 8192), (32, 4096), (8, 2048)]  # --rows, --micro-tokens; the defaults first
COUNTED = ROOT / "assets" / "memory.json"
TRIED = "_propagate_tensor_meta_non_cached"  # where DTensor finds out the shape of a result
CONFIGS = {  # published sizes, where they differ from the defaults of the class
    "gemma-2-2b": ("Gemma2", {}),
    "gemma-2-9b": (
        "Gemma2",
        {
            "hidden_size": 3584,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
        },
    ),
    "gemma-3-1b": (
        "Gemma3Text",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "sliding_window": 512,
        },
    ),
    "qwen2.5-1.5b": (
        "Qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.2-1b": (
        "Llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
}

JOBS = [(name, 16, 1) for name in CONFIGS]  # model, --lora, GPUs
JOBS += [(name, 0, 1) for name in CONFIGS if name != "gemma-2-9b"]
JOBS += [("gemma-2-2b", 0, 8), ("gemma-2-9b", 0, 8)]

# --- 1. Models without numbers -------------------------------------------------------------------


def make_config(name: str, **sizes: int):
    """The config of one of CONFIGS, with other sizes where they are given."""
    family, published = CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**{**published, **sizes})
    config._attn_implementation = "eager" if family == "Gemma2" else "sdpa"
    return config


def make_learner(config, cfg: Config, world: int = 1, prompt: int = LONGEST) -> Learner:
    """A Learner as learner.build makes it, with random weights (fake ones in FakeTensorMode).

    world: the number of processes; more than one are fake. models.distribute is not used, since
    fake weights cannot be moved to another device or precision.
    """
    here = ranks.device()
    with unset_fake_temporarily(), torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        ref = fuse(model).to(getattr(torch, cfg.precision)).eval().requires_grad_(False)
        whole = not cfg.lora and (cfg.precision == "bfloat16" or world > 1)
        full_copy = copy.deepcopy(ref) if whole else None
        policy = lora.with_adapters(ref, cfg.lora, 0) if cfg.lora else copy.deepcopy(ref)
        if not cfg.lora:
            policy.requires_grad_(True).float()
    materialize([policy, ref, full_copy], here)
    if cfg.recompute:
        models.recompute_activations(policy)
    if whole:
        ranks.shard(policy, cfg.precision, models.run_body)
        ranks.shard(ref, cfg.precision, models.run_body)
    chat = RandomChat((prompt, prompt + 1), p1=list(range(10, 10 + AGAIN)), end_ids=(10**9,))
    adam = models.adam(policy, cfg.lr)
    adam.param_groups[0]["fused"] = True  # as on a GPU
    return Learner(policy, ref, full_copy, adam, chat, [], cfg, base=ref)


def materialize(made: list, device) -> None:
    """Give models on the meta device weights on `device`; shared weights stay shared."""
    fresh: dict[int, torch.Tensor] = {}
    for module in (module for model in made if model for module in model.modules()):
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None and id(old) not in fresh:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    new = new.normal_(0, 0.02) if old.is_floating_point() else new.zero_()
                    is_weight = isinstance(old, torch.nn.Parameter)
                    fresh[id(old)] = (
                        torch.nn.Parameter(new, old.requires_grad) if is_weight else new
                    )
                if old is not None:
                    table[name] = fresh[id(old)]


# --- 2. The counter ------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Adds up the bytes of all living storages; `peak` is their maximum since it was last set."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on local shares come here
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not self.paused:
                self.add(leaf)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = 0
            weakref.finalize(storage, self.free, id(storage))
        self.set_size(storage)

    def set_size(self, storage) -> None:
        if id(storage) in self.sizes:
            self.live += storage.nbytes() - self.sizes[id(storage)]
            self.sizes[id(storage)] = storage.nbytes()
            self.peak = max(self.peak, self.live)

    def free(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    @contextlib.contextmanager
    def watching(self, learner: Learner):
        """Count from a learner's weights and Adam's state on, with all that FSDP resizes."""
        made = filter(None, (learner.policy, learner.ref, learner.full_copy))
        tensors = [x for model in made for x in (*model.parameters(), *model.buffers())]
        tensors += [x for state in learner.optimizer.state.values() for x in state.values()]
        for tensor in tensors:
            self.add(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        resize, tried = torch.UntypedStorage.resize_, getattr(ShardingPropagator, TRIED)

        def resized(storage, size):
            resize(storage, size)
            self.set_size(storage)

        def unseen(*args):  # DTensor tries operations on fake tensors: not counted
            self.paused = True
            try:
                return tried(*args)
            finally:
                self.paused = False

        with (
            mock.patch.object(torch.UntypedStorage, "resize_", resized),
            mock.patch.object(ShardingPropagator, TRIED, unseen),
            self,
        ):
            yield


@contextlib.contextmanager
def fake_tensors(world: int):
    """In here tensors have no numbers: whoever reads one gets 1. The ranks are fake, too."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = init_device_mesh("cpu", (world,))

    def ones(tensor):
        return [ones(row) for row in tensor] if tensor.dim() else 1

    answers = {"__bool__": lambda self: True, "item": lambda self: 1, "tolist": ones}
    answers["__deepcopy__"] = lambda self, memo: self.clone()
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(FakeTensor, name, answer, create=True))
        stack.enter_context(mock.patch.object(ranks, "all_gather", lambda items: items * world))
        stack.enter_context(mock.patch.object(ranks, "init_device_mesh", return_value=mesh))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextlib.contextmanager
def few_steps(every: int):
    """Let decoding compute only some steps: the later a step is, the more memory it takes."""
    read, step, draw, kept = RowCache.read, RowCache.step, sample.draw, {}

    def begun(cache, contexts):
        kept.clear()
        return read(cache, contexts)

    def sometimes(cache, token):
        if (cache.longest + 1) % every:
            cache.held[: len(token)] = [n + 1 for n in cache.held[: len(token)]]
            cache.longest += 1
        else:
            kept["drawn"], kept["logits"] = None, step(cache, token)
        return kept["logits"]

    def drawn(logits, *args):
        if kept.get("drawn") is None or logits is not kept["logits"]:
            kept["drawn"], kept["logits"] = draw(logits, *args), logits
        return kept["drawn"]

    with (
        mock.patch.object(RowCache, "read", begun),
        mock.patch.object(RowCache, "step", sometimes),
        mock.patch.object(sample, "draw", drawn),
    ):
        yield


def count(config, cfg: Config, world=1, prompt=LONGEST, every=256) -> tuple[float, float]:
    """Bytes at the peak of sampling and of an update, on one of `world` GPUs."""
    counter = Counter()
    with fake_tensors(world):
        learner = make_learner(config, cfg, world, prompt)
        with few_steps(every), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about fake tensors, which have no address
            return peaks(counter, learner, world)


def peaks(counter: Counter, learner: Learner, world: int = 1) -> tuple[float, float]:
    """The peak of sampling cfg.rows on each rank, and of an update on two micro-batches."""
    cfg, stage, found = learner.cfg, score.STAGES["2"], []
    problems = [Problem("", "", "math", str(n // cfg.k)) for n in range(cfg.rows * world)]
    with counter.watching(learner):
        episodes = score.sample_episodes(learner, problems, stage, "0")
        found.append(counter.peak)
        length = learner.chat.lengths[0] + AGAIN + 2 * cfg.max_new_tokens
        some = 2 * max(1, cfg.micro_tokens // length) * world
        some = min(len(episodes), -(-some // cfg.k) * cfg.k)
        gc.collect()
        counter.peak = counter.live
        score.update(learner, episodes[:some], stage, cfg.beta2)
        found.append(counter.peak)
    return tuple(found)


# --- 3. Tables -----------------------------------------------------------------------------------


def count_all() -> None:
    """Count what memory.json lacks, and add it; all of it takes an hour."""
    counted = json.loads(COUNTED.read_text()) if COUNTED.exists() else {}
    for name, rank, world in JOBS:
        key = f"{name}, {f'--lora {rank}' if rank else 'full'}, {world} GPU{'s' * (world > 1)}"
        found = counted.setdefault(key, {"sampling": {}, "training": {}})
        for rows, micro_tokens in SETTINGS:
            if str(rows) not in found["sampling"]:
                given = {"lora": rank, "rows": rows, "micro_tokens": micro_tokens}
                sizes = count(make_config(name), configure({"task": "math", **given}), world)
                found["sampling"][str(rows)], found["training"][str(micro_tokens)] = sizes
                COUNTED.write_text(json.dumps(counted, indent=1) + "\n")
                print(key, rows, micro_tokens, *(f"{size / GB:.1f}" for size in sizes), flush=True)


def table() -> str:
    """GB for each model with the defaults of --task math, and the flags for each size of GPU."""
    lines = ["| | sampling | training | " + " | ".join(f"{size} GB" for size in GPUS) + " |"]
    lines.append("| --- " * (3 + len(GPUS)) + "|")
    for name, found in json.loads(COUNTED.read_text()).items():
        usual = [next(iter(found[part].values())) / GB for part in ("sampling", "training")]
        cells = [f"{size:.1f}" for size in usual]
        for usable in GPUS.values():
            flags = [largest(found[part], usable * GB) for part in ("sampling", "training")]
            cells.append(as_flags(*flags))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def largest(sizes: dict[str, float], usable: float) -> int:
    """The largest setting that takes no more than is usable; 0 if there is none."""
    return max((int(setting) for setting, size in sizes.items() if size <= usable), default=0)


def as_flags(rows: int, micro_tokens: int) -> str:
    """The flags that a GPU needs: "yes" for the defaults, "no" if none are enough."""
    if not rows or not micro_tokens:
        return "no"
    flags = [f"--rows {rows}"] * (rows < SETTINGS[0][0])
    flags += [f"--micro-tokens {micro_tokens}"] * (micro_tokens < SETTINGS[0][1])
    return f"`{' '.join(flags)}`" if flags else "yes"


# --- 4. A real step ------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> str:
    """Measure a step from sampling to Adam, after a warm-up step; rewards are random."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": args.layers, "hidden_size": args.width}
    name = args.model or "gemma-2-2b"
    config = make_config(name, **{name: x for name, x in sizes.items() if x})
    learner = make_learner(config, settings(args), prompt=args.prompt)
    if learner.cfg.compile:
        for model in filter(None, (learner.policy, learner.ref, learner.full_copy)):
            models.compile_body(model)
    stage, k = score.STAGES["2"], learner.cfg.k
    problems = [Problem("", "", "math", str(n // k)) for n in range(learner.cfg.batch)]
    for number in range(2):
        episodes, sampling = timed(
            lambda n=number: score.sample_episodes(learner, problems, stage, str(n))
        )
        tossed = with_coins(episodes)
        _, training = timed(lambda made=tossed: score.update(learner, made, stage, 0.1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cfg, weights = learner.cfg, learner.policy.num_parameters()
    return (
        f"{name}, {weights:,} weights on {device}, --lora {cfg.lora}, --compile {cfg.compile}, "
        f"{cfg.batch} episodes of 2 x {cfg.max_new_tokens} tokens, {cfg.rows} rows: "
        f"sampling {sampling}, training {training}"
    )


def timed(part):
    """What a part of the step returns, and a text with its seconds and peak memory."""
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
    """The same episodes with random rewards, so that advantages are not 0."""
    coin = torch.Generator().manual_seed(0)
    return [
        replace(e, attempts=tuple(replace(y, reward=float(toss(coin))) for y in e.attempts))
        for e in episodes
    ]


def toss(coin: torch.Generator) -> int:
    return int(torch.randint(2, (), generator=coin))


def settings(args: argparse.Namespace) -> Config:
    """The settings of --task math, changed by the flags that were given."""
    names = ("lora", "rows", "micro_tokens", "batch", "compile")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {"max_new_tokens": args.tokens} if args.tokens else {}
    return configure({"task": "math", **given})


def main() -> None:
    """Print the table, a line for one setting, or the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=CONFIGS, help="count this model")
    parser.add_argument("--all", action="store_true", help="count what is not yet in memory.json")
    parser.add_argument("--measure", action="store_true", help="measure a step on this machine")
    parser.add_argument("--layers", type=int, help="number of layers, for a trial")
    parser.add_argument("--width", type=int, help="hidden size, for a trial")
    parser.add_argument("--tokens", type=int, help="tokens of an attempt")
    parser.add_argument("--prompt", type=int, default=LONGEST, help="tokens of x1")
    parser.add_argument("--world", type=int, default=1, help="number of GPUs")
    for name in ("lora", "rows", "micro-tokens", "batch", "compile"):
        parser.add_argument(f"--{name}", type=int, help="the same flag as score.py's")
    args = parser.parse_args()
    if args.measure:
        print(measure(args))
    elif args.model:
        sizes = count(make_config(args.model), settings(args), args.world, args.prompt)
        print("sampling {:.1f} GB, training {:.1f} GB".format(*(size / GB for size in sizes)))
    else:
        if args.all:
            count_all()
        print(table())


if __name__ == "__main__":
    main()
