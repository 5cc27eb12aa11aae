"""How fast is it? Both sides are timed in turn; medians, and the ratio with its spread.

python experiments/bench.py                   all parts, 15 minutes on two cores
python experiments/bench.py rollout --k 1     some parts: rollout, operations, step, growth ...

On a CPU it counts the CPU seconds of one thread, since other programs may share the cores. On a GPU
it counts seconds. Models have random weights, prompts are random tokens, and attempts end after a
given number of tokens, so that both sides do the same work. The parts with TRL need `pip install
trl==1.16.0`; without it they are left out.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import ranks  # noqa: E402
import sample  # noqa: E402
import score  # noqa: E402
from cache import RowCache  # noqa: E402
from checkers import sandbox  # noqa: E402
from config import Config, configure  # noqa: E402
from data import Problem  # noqa: E402
from fused import fuse  # noqa: E402
from learner import Learner  # noqa: E402
from rewards import math_reward  # noqa: E402
from tasks import Chat, load_problems  # noqa: E402

REPEATS, TOKENS = 5, 24  # timed rounds; tokens of an attempt
MICRO_TOKENS = 32 * 74  # 32 transcripts of two attempts: more is slower on a CPU
SIZES = {  # layers, hidden size, heads, vocabulary, rows
    "tiny": (4, 128, 4, 64, 256),
    "small": (8, 512, 8, 32_000, 64),
}


FAMILIES = "Gemma2 Gemma3Text Llama Qwen2 Qwen3 Mistral Phi3 GPT2".split()


def make_model(layers: int, hidden: int, heads: int, vocabulary: int, family: str = "Gemma2"):
    """A random model of a family of transformers, in eval mode; its modules are not yet fused."""
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if family == "GPT2":
        sizes = {"n_layer": layers, "n_embd": hidden, "n_head": heads, "n_positions": 2048}
    else:
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        sizes |= {"num_key_value_heads": heads // 2, "intermediate_size": 4 * hidden}
        sizes |= {"head_dim": hidden // heads, "max_position_embeddings": 2048}
    if family.startswith("Gemma"):
        sizes |= {"query_pre_attn_scalar": hidden // heads}
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **sizes, **ends)
    config._attn_implementation = "eager" if family == "Gemma2" else "sdpa"  # Gemma 2: softcap
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@dataclass(frozen=True)
class RandomChat:
    """A Chat with prompts of random tokens, of lengths in a range; 1 ends an attempt."""

    lengths: tuple[int, int] = (14, 21)
    p1: list[int] = field(default_factory=lambda: [5, 6, 7, 8, 9, 10])
    end_ids: tuple[int, ...] = (1,)
    close_id: int = 1
    p2: None = None
    after, room = Chat.after, Chat.room

    def x1s(self, problems: list[Problem]) -> list[list[int]]:
        draws = [random.Random(problem.id) for problem in problems]
        widths = [draw.randrange(*self.lengths) - 1 for draw in draws]
        words = [[d.randrange(3, 64) for _ in range(n)] for d, n in zip(draws, widths, strict=True)]
        return [[2, *row] for row in words]

    def text(self, tokens: list[int]) -> str:
        return ""


CHAT = RandomChat()


# --- 1. Clocks -----------------------------------------------------------------------------------


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(job) -> float:
    began = clock()
    job()
    return clock() - began


def interleave(timers: dict) -> dict[str, list[float]]:
    """Seconds of each timer, REPEATS times after a warm-up; every second round in reverse order."""
    found = {name: [] for name in timers}
    for number in range(REPEATS + 1):
        for name in list(timers)[:: 1 if number % 2 else -1]:
            found[name].append(timers[name]())
    return {name: seconds[1:] for name, seconds in found.items()}


def compare(title: str, seconds: dict[str, list[float]], base: str) -> None:
    """Print a line for each: its median, and its ratio to `base` in the same round."""
    print(f"\n{title}")
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, seconds[base], strict=True)]
        middle = statistics.median(times)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"  {name:34}{middle:9.3f} s   x {spread}   {1 / statistics.median(ratios):.2f} as fast"
        )


# --- 2. Rollout against generate -----------------------------------------------------------------


def force(lengths: list[list[int]]) -> None:
    """Let every sampled attempt end where `lengths` says: a uniform of 2 draws the end token."""
    draw_uniforms, draw = sample.draw_uniforms, sample.draw

    def uniforms_with_ends(problems, sampling, part):
        uniforms = draw_uniforms(problems, sampling, part)
        for row, ends in zip(uniforms, lengths, strict=False):
            for attempt, end in zip(row, ends, strict=True):
                attempt[end - 1] = 2.0
        return uniforms

    def draw_with_ends(logits, uniform, temperature):
        token, logp = draw(logits, uniform.clamp(max=0.5), temperature)
        return torch.where(uniform == 2.0, 1, token.clamp(min=3)), logp

    sample.draw_uniforms, sample.draw = uniforms_with_ends, draw_with_ends


class EndAt(transformers.LogitsProcessor):
    """Does for `generate` what `force` does for the rollout."""

    def __init__(self, width: int, lengths: list[int], device):
        self.width, self.lengths = width, torch.tensor(lengths, device=device)

    def __call__(self, ids, scores):
        due = self.lengths == ids.shape[1] - self.width + 1
        scores[:, 1] = torch.where(due, 1e4, -1e4).to(scores.dtype)
        return scores


def generate(model, prompts: list[list[int]], lengths: list[list[int]]) -> None:
    """Two attempts by model.generate; the second prompt is the whole transcript so far."""
    rows = prompts
    for attempt in range(2):
        width, due = max(map(len, rows)), [ends[attempt] for ends in lengths]
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
        made = model.generate(
            ids,
            attention_mask=(ids != 0).long(),
            max_new_tokens=TOKENS,
            do_sample=True,
            top_k=0,
            logits_processor=[EndAt(width, due, model.device)],
        )[:, width:].tolist()
        rows = [[*x, *y[:n], *CHAT.p1] for x, y, n in zip(rows, made, due, strict=True)]


def bench_rollout(k: int) -> None:
    """Time two attempts of 24 tokens, or of lognormal lengths; k samples of each prompt."""
    bench_family("small", "Gemma2", k)
    for family in FAMILIES:
        bench_family("tiny", family, k)


def bench_family(size: str, family: str, k: int) -> None:
    """Compare `generate` and the rollout of one model, with full and with varied lengths."""
    *shape, rows = SIZES[size]
    own = make_model(*shape, family).to(ranks.device())
    model = fuse(copy.deepcopy(own))
    problems = [Problem("", "", "sums", str(i // k)) for i in range(rows)]
    prompts = CHAT.x1s(problems)
    draw = random.Random(0)
    pairs = [[draw.lognormvariate(2.2, 0.6) for _ in range(2)] for _ in prompts]
    varied = [[min(TOKENS, 1 + int(length)) for length in pair] for pair in pairs]
    for kind, lengths in {"full": [[TOKENS] * 2] * rows, "varied": varied}.items():
        before = sample.draw_uniforms, sample.draw
        force(lengths)
        sampling = sample.Sampling(2, TOKENS, rows=rows)
        ours = partial(sample.rollout, model, CHAT, problems, sampling)
        made = [[len(y.tokens) for y in episode.attempts] for episode in ours()]
        assert made == lengths, "attempts did not end where they were told to"
        theirs = partial(generate, own, prompts, lengths)
        timers = {"model.generate": partial(timed, theirs), "rollout": partial(timed, ours)}
        title = f"rollout, {family} {size}, {rows} rows, {k} a prompt, {kind}"
        compare(f"{title}: {sum(map(sum, lengths))} tokens", interleave(timers), "model.generate")
        sample.draw_uniforms, sample.draw = before


# --- 3. One training step against TRL ------------------------------------------------------------


def make_learner(precision: str, **settings) -> Learner:
    ref = fuse(make_model(*SIZES["tiny"][:-1])).to(getattr(torch, precision))
    policy = copy.deepcopy(ref)
    full_copy = models.distribute(policy, ref.requires_grad_(False), precision)
    cfg = configure({"precision": precision, "micro_tokens": MICRO_TOKENS, **settings})
    return Learner(policy, ref, full_copy, models.adam(policy, cfg.lr), CHAT, [], cfg)


def one_step(learner: Learner) -> None:
    """Sample, reward at random, and learn: Stage II."""
    problems = range(learner.cfg.batch // learner.cfg.k)
    asked = [Problem("", "", "sums", str(i)) for i in problems for _ in range(learner.cfg.k)]
    score.update(
        learner,
        score.sample_episodes(learner, asked, score.STAGES["2"], "0"),
        score.STAGES["2"],
        0.1,
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "<bos>", *map(str, range(3, 64))]
    core = tokenizer_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    core = Tokenizer(core)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def trl_timer(kind: str, count: int, length: int):
    """A timer of a TRL step: `count` prompts of `length` tokens, 8 samples of 24 tokens each."""
    from trl_step import trl_steps

    draw = random.Random(0)
    words = [[str(draw.randrange(3, 64)) for _ in range(length - 1)] for _ in range(count)]
    prompts = [" ".join(["<bos>", *row]) for row in words]
    steps = trl_steps(kind, make_model(*SIZES["tiny"][:-1]), word_tokenizer(), prompts)
    return lambda: next(steps)[1]


def bench_step() -> None:
    """Time 12,288 sampled tokens: ours in 256 episodes of two attempts, TRL's in 512 completions.

    To be fair, TRL makes two steps: 256 completions after prompts of 20 tokens, as first attempts
    have, and 256 after prompts of 50, as second ones have. "first attempts only" is easier: one
    step, in which all 512 completions follow prompts of 20 tokens.
    """
    toss_coins()
    force([[TOKENS] * 2] * 256)
    settings = {"batch": 256, "k": 8, "max_new_tokens": TOKENS}
    timers = {
        f"score.py, {precision}": partial(
            timed, partial(one_step, make_learner(precision, **settings))
        )
        for precision in ("float32", "bfloat16")
    }
    base = "score.py, float32"
    if importlib.util.find_spec("trl"):
        os.environ["HF_HUB_OFFLINE"] = "1"  # no telemetry
        for kind in ("rloo", "grpo"):
            timers[f"TRL {kind}, first attempts only"] = trl_timer(kind, 64, 20)
            first, second = trl_timer(kind, 32, 20), trl_timer(kind, 32, 50)
            timers[f"TRL {kind}"] = lambda first=first, second=second: first() + second()
        base = "TRL rloo"
    compare("one step, tiny, 12288 sampled tokens", interleave(timers), base)


# --- 4. Memory and growth ------------------------------------------------------------------------


def in_child(job, *args):
    """What job(*args) returns, run in a new process, so that its memory peak is its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def peak() -> float:
    """This process's peak in GB; ru_maxrss could be the peak of the process that started it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM"))


def log_probs(everywhere: bool, rows: int) -> tuple[float, float]:
    """Seconds and GB of the log-probs and exact KL of rows x 64 tokens, vocabulary 256,000.

    Half of the tokens are attempts. everywhere: log_softmax of the model's logits at all tokens.
    """
    torch.set_num_threads(1)
    ref = fuse(make_model(1, 256, 4, 256_000))
    policy = copy.deepcopy(ref)
    tokens = torch.randint(3, 64, (rows, 64))
    own = (torch.arange(1, 64) >= 32).expand(rows, 63)  # half of the tokens
    places = own.flatten().nonzero()[:, 0]
    learner = Learner(policy, ref.requires_grad_(False), None, None, CHAT, [], Config())

    def full():
        logs = [model(tokens).logits.log_softmax(dim=-1)[:, :-1] for model in (policy, ref)]
        logp = logs[0].gather(2, tokens[:, 1:, None])[..., 0]
        ((logp + score.kl_divergence(*logs)) * own).sum().backward()

    def ours():
        logp, kl = score.log_probs_and_kl(learner, tokens, places)
        (logp + kl).sum().backward()

    before = peak()
    return timed(full if everywhere else ours), peak() - before


def bench_log_probs() -> None:
    """score.log_probs_and_kl against log_softmax everywhere, each in a process of its own."""
    for rows in (4, 8, 16):
        names = {"log_softmax at all tokens": True, "score, attempt tokens only": False}
        memory = dict.fromkeys(names, 0.0)

        def once(name, rows=rows, memory=memory, names=names):
            seconds, memory[name] = in_child(log_probs, names[name], rows)
            return seconds

        seconds = interleave({name: partial(once, name) for name in names})
        compare(f"log-probs and KL of {rows} x 64 tokens", seconds, "log_softmax at all tokens")
        print("  peak above the weights: " + ", ".join(f"{x:.1f} GB" for x in memory.values()))


# --- 5. Operations -------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts the operations that a GPU starts, by name; views are not counted.

    Composite operations are taken apart, except RMSNorm, which is one operation on a GPU.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        if name != "rms_norm":
            with self:
                parts = operation.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        view = operation.is_view or name in ("_unsafe_view", "detach")
        self.counts[name] += not view
        return operation(*args, **kwargs)


def operations(dtype: torch.dtype, fused: bool, scoring: bool) -> Counter:
    """Counts for a step of decoding 64 rows, or for scoring them; 26 layers, as Gemma 2 2B has."""
    model = make_model(26, 64, 8, 64).to(dtype)
    if fused:
        fuse(model)
    with torch.inference_mode():
        rows = RowCache(model, 64, 48)
        rows.read([[2, 5, 6 + row % 50] for row in range(64)])
        with Operations() as found:
            if scoring:
                models.last_hidden(model, torch.full((64, 48), 5))
            else:
                rows.step(torch.arange(64))
    return found.counts


def bench_operations() -> None:
    """Count the operations of a decoding step and of a scoring pass, before and after `fuse`."""
    print("\noperations that are no views, Gemma 2 with 26 layers: own modules, fused")
    for scoring in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            counts = [operations(dtype, fused, scoring).total() for fused in (False, True)]
            what = "scoring" if scoring else "a step of decoding"
            print(f"  {what:20}{str(dtype).removeprefix('torch.'):10}{counts[0]:6}{counts[1]:6}")


def toss_coins() -> None:
    """Make rewards random, since attempts of random models are never right."""
    coins = lambda attempts, _: [float(random.random() < 0.5) for _ in attempts]  # noqa: E731
    sample.TASKS["sums"] = replace(sample.TASKS["sums"], rewards=coins)


def grown(batch: int, tokens: int) -> tuple[float, float, float]:
    """Seconds of sampling and of learning in one step, and its GB above the weights."""
    torch.set_num_threads(1)
    toss_coins()
    force([[tokens] * 2] * batch)
    learner = make_learner("float32", batch=batch, k=8, max_new_tokens=tokens)
    asked = [Problem("", "", "sums", str(i // 8)) for i in range(batch)]
    before, episodes = peak(), []
    sampling = [
        timed(
            lambda: episodes.append(score.sample_episodes(learner, asked, score.STAGES["2"], "0"))
        )
        for _ in range(4)
    ]
    learning = [
        timed(lambda: score.update(learner, episodes[0], score.STAGES["2"], 0.1)) for _ in range(4)
    ]
    return statistics.median(sampling[1:]), statistics.median(learning[1:]), peak() - before


def bench_growth() -> None:
    """Time a step of the tiny model, for three batches and for three lengths."""
    print(f"\ngrowth of a step, tiny, micro-batches of {MICRO_TOKENS} tokens")
    for batch, tokens in ((128, 24), (256, 24), (512, 24), (128, 48), (128, 96)):
        sampling, learning, memory = in_child(grown, batch, tokens)
        print(
            f"  {batch:4} episodes x 2 x {tokens:3} tokens: sampling {sampling:6.2f} s, "
            f"learning {learning:6.2f} s, {memory:.2f} GB above the weights"
        )


def bench_programs() -> None:
    """Count programs in a second, on one core beside a large trainer; time a batch with loops."""
    problems = load_problems("code", "mbpp", data=str(ROOT / "tests" / "code"))
    jobs = [(problem.answer, list(problem.tests)) for problem in problems] * 200
    trainer = torch.zeros(2**28)  # 1 GB, which no judge may copy
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # holds for judges that start now, too
    sandbox.run_many(jobs[: 4 * sandbox.WORKERS])
    seconds = wall(lambda: sandbox.run_many(jobs))
    each = statistics.median(wall(lambda job=job: sandbox.run_many([job])) for job in jobs[:400])
    os.sched_setaffinity(0, cores)
    sandbox.close()
    loop = "def f(x):\n    while True: pass"
    mixed = [(loop, ["assert f(1) == 1"])] * 25 + jobs[:487]
    sandbox.run_many(mixed[25:89])
    looping = wall(lambda: sandbox.run_many(mixed))
    print(
        f"\nprograms: {len(jobs) / seconds:.0f} a second on one core beside "
        f"{trainer.nbytes / 2**30:.0f} GB, one alone {1e3 * each:.1f} ms; 512 with 25 endless "
        f"loops on {len(cores)} cores: {looping:.1f} s"
    )


def wall(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench_checker() -> None:
    """Count answers of MATH that are judged in a second."""
    file = ROOT / "tests" / "math" / "pairs.jsonl"
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [(f"so it is \\boxed{{{pair['prediction']}}}", pair["gold"]) for pair in pairs]
    each = [timed(partial(math_reward, *text)) for text in texts]
    print(
        f"\nchecker: {len(each) / sum(each):.0f} answers a second, median "
        f"{1e3 * statistics.median(each):.2f} ms, slowest {1e3 * max(each):.1f} ms"
    )


def main() -> None:
    """Run the named parts."""
    parts = ("rollout", "operations", "step", "log_probs", "growth", "checker", "programs")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--k", type=int, default=8, help="samples of each prompt, in rollout")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}")
    jobs = {"rollout": partial(bench_rollout, args.k), "step": bench_step}
    jobs |= {"log_probs": bench_log_probs, "growth": bench_growth, "checker": bench_checker}
    jobs |= {"programs": bench_programs, "operations": bench_operations}
    for part in args.parts or parts:
        jobs[part]()


if __name__ == "__main__":
    main()
