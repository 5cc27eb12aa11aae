"""The settings of a run: all flags of score.py and eval.py, and what a stage consists of.

All modules may import this one. It loads neither torch nor transformers, so that --help and a
mistyped flag are answered at once. Next to read: learner.py.
"""

import argparse
import contextlib
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from data import InputError
from tasks import ATTEMPT_FLAGS, TASKS, Wording, check_task, find_task, settings_of, wording_of

COLDEST = 0.01  # lowest temperature: logits divided by less may not be finite
VOTES_TEMPERATURE = 0.7  # section 6.2
LORA_LR = 10  # factor of the learning rate with --lora; NOT STATED, from "LoRA Without Regret"

# --- 1. Settings of a run ----------------------------------------------------------------------


def flag(default, words: str, none: str = "none"):
    """A setting with its default and its help text; none: what --help says for an empty default."""
    return field(default=default, metadata={"help": words, "none": none})


@dataclass(frozen=True)
class Config:
    """All settings of a run. Defaults are the built-in task's; other tasks set theirs in TASKS."""

    stage: str = flag(
        "1,2",
        "stages to train, in order: 1 and 2 are Stage I and Stage II of SCoRe, 1b is Stage I for "
        "a third attempt; for comparison: 0 (single-turn RL), star, star+, pair, pair+ (supervised "
        "learning); direct RL: see the examples",
    )
    model: str = flag(
        "builtin", "base model: builtin, a checkpoint folder, or a name on the Hugging Face hub"
    )
    init: str = flag("", "checkpoint that the policy starts from, instead of the base model")
    task: str = flag(
        "sums",
        "what to learn: sums (column addition), math (MATH), code (MBPP), answers (your own "
        "questions), or a Python file with TASK = Task(..)",
    )
    data: str = flag(
        "",
        "folder with the task's files; for --task answers also a name on the hub, such as "
        "openai/gsm8k:main",
        none="the task's data set on the hub",
    )
    columns: str = flag(
        "",
        "for --task answers: the columns of questions and of answers, such as problem,solution",
        none="question,answer",
    )
    prompt: str = flag(
        "",
        "text file with your own first prompt; the question replaces {question}, or comes at the "
        "end; for math and answers it must ask for \\boxed{..} or 'The final answer is $..$'",
        none="the task's",
    )
    correction: str = flag(
        "",
        "text file with your own words that ask for another attempt; they should name the form of "
        "the answer again",
        none="the task's",
    )
    thinking: int = flag(0, "1: let the chat template ask for thinking first, as Qwen3's can")
    date: str = flag(Wording.date, "fixed date for chat templates that print today's date")
    ids: str = flag(
        "",
        "for --task code: ids of MBPP's problems to train on, such as 601-974; the paper's are "
        "NOT STATED",
    )
    out: str = flag("runs/sums", "run folder, for checkpoints, logs and results")
    seed: int = flag(
        1,  # RESULTS.md ("Other machines, other digits") says why not 0
        "random seed of new weights, of the order of problems and of sampling",
    )
    steps1: int = flag(
        120,
        "updates in each of the stages 1, 1b and 0; Table 8 has 3000 in all for MATH, the split "
        "is NOT STATED",
    )
    steps2: int = flag(120, "updates in each of the stages 2, star, star+, pair and pair+")
    attempts: int = flag(
        2,
        "attempts at a problem, in Stage II and in the run's own evaluations; 3 goes with --stage "
        "1,1b,2",
    )
    batch: int = flag(
        128,
        "episodes in an update, k of each problem; Table 8 has 512 for MATH, the unit NOT STATED",
    )
    k: int = flag(
        8,
        "episodes of each problem in an update, which are compared with each other: at least 2, "
        "and --batch is a multiple of it; NOT STATED, RLOO (Ahmadian et al. 2024) has 2 and 4",
    )
    lr: float = flag(
        5e-4,
        "learning rate of Adam; with --lora the default is ten times as large; Table 8 has 5e-6 "
        "for MATH",
    )
    alpha: float = flag(10.0, "weight of the bonus on attempt 2 in Stage II; as in Table 8")
    beta1: float = flag(
        0.12,
        "weight of the KL penalty, except on attempt 1 in Stage I; Table 8 has 0.01 (why 0.12 for "
        "sums: TUTORIAL.md, section 7)",
    )
    beta2: float = flag(
        0.1, "weight of the KL penalty on attempt 1 in Stage I; as in Table 8 for MATH"
    )
    adaptive_beta2: bool = flag(
        False,
        "change beta2 at each step, so that beta2 times the KL of attempt 1 becomes as large as "
        "the mean advantage of attempt 2; the rule is NOT STATED",
    )
    temperature: float = flag(
        1.0, "temperature at which the policy is sampled and scored; as in Table 8"
    )
    offline: float = flag(
        0.0,
        "share of problems, 0 to 1, whose attempt 1 is sampled from the base model instead of the "
        "policy (section 5.3)",
    )
    clip: float = flag(1.0, "largest norm of a gradient; NOT STATED, 1 is usual")
    max_new_tokens: int = flag(
        10, "most tokens of an attempt; more cost time and memory; NOT STATED, a sum needs 9"
    )
    lora: int = flag(
        0,
        "rank of LoRA adapters, such as 16 (they need requirements-lora.txt); 0 trains all "
        "weights, as the paper does",
    )
    precision: str = flag(
        "float32",
        "precision of the weights: float32, which is faster on many CPUs, or bfloat16 (Adam then "
        "has a float32 copy)",
    )
    rows: int = flag(
        500,
        "episodes sampled at the same time; fewer need less memory and are slower",
    )
    micro_tokens: int = flag(
        16384,
        "tokens in a forward pass of training; fewer need less memory and are slower",
    )
    recompute: int = flag(
        0, "1: compute activations again in backward, instead of keeping them; it saves memory"
    )
    compile: int = flag(0, "1: use torch.compile, for speed; the first steps then take minutes")
    save_every: int = flag(
        25, "steps between two saves; the save with the best reward becomes the stage's checkpoint"
    )
    show_every: int = flag(25, "steps between transcripts in samples.txt")
    problems: int = flag(2000, "held-out problems to evaluate on")
    eval_every: int = flag(
        0, "steps between two evaluations on held-out problems; 0: none within a stage"
    )
    tensorboard: int = flag(0, "1: also write the metrics for TensorBoard")
    resume: bool = flag(
        False,
        "go on with the run in --out; all flags are the run's, only the steps of a stage that is "
        "unfinished, or the last, may be changed (--steps1, --steps2)",
    )


GROUPS = {  # of --help
    "what to learn": "stage model init task data columns prompt correction thinking date ids",
    "the algorithm": "steps1 steps2 batch k lr alpha beta1 beta2 adaptive_beta2 clip lora seed",
    "sampling": "attempts temperature max_new_tokens offline",
    "memory and speed": "precision rows micro_tokens recompute compile",
    "the run": "out resume save_every show_every problems eval_every tensorboard",
}
SOURCES = """Table 8 and the sections are those of the paper, arXiv 2409.12917 (ICLR version).
NOT STATED: the paper does not say it, so the default is our choice."""
EXAMPLES = """examples:
  python score.py                                  the built-in task, on a CPU
  python score.py --task math --lora 16 --rows 32 --batch 64 --steps1 50 --steps2 50
                                                   a try: Gemma 2 2B on one GPU of 24 GB
  python score.py --task answers --data D --model NAME --lora 16 --batch 64 --steps1 50 --steps2 50
  python score.py --resume --out runs/math         go on after a stop
  python score.py --stage 2 --alpha 0 --model runs/sums/base --init runs/sums/base --out runs/direct
                                                   direct RL, from the base model of runs/sums
"""
EVAL_EXAMPLES = """examples:
  python eval.py --model NAME --task answers --data FOLDER  a base model, on your own questions
  python eval.py --model runs/sums/stage2                   greedy, on held-out problems
  python eval.py --model runs/answers/stage2 --ask "What is half of 7?"
  python eval.py --report runs/sums                         a page on the run
  python eval.py --report runs/eval/NAME                    .. on an evaluation, to read attempts
It prints acc_t1, acc_t2, delta (acc_t2 - acc_t1), delta_i_to_c (corrected), delta_c_to_i (spoilt),
copied and others (TUTORIAL.md, section 10), with 95 % confidence intervals in brackets.
"""
SHARED = ("data", "columns", "prompt", "correction", "thinking", "date")  # eval.py has them, too
PATHS = ("model", "init", "data", "prompt", "correction")  # may name a file or a folder


def configure(typed: dict) -> Config:
    """The settings of a run: a task's defaults, replaced by the flags that were typed."""
    task = typed.get("task", Config.task)
    settings = {**settings_of(task), **typed}
    for name in sorted(set(settings) - {item.name for item in fields(Config)}):
        raise InputError(
            f"--task {task} sets {name!r} in training, which is no flag of score.py: take it out"
        )
    if settings.get("lora") and "lr" not in typed:
        settings["lr"] = LORA_LR * settings.get("lr", Config.lr)
    return Config(**settings)


def with_absolute_paths(settings: dict) -> dict:
    """The settings with absolute paths, so that they hold in any working directory."""
    named = {name: settings.get(name, "") for name in PATHS}
    paths = [name for name in named if named[name] != "builtin" and os.path.exists(named[name])]
    paths += ["task"] * settings.get("task", "").endswith(".py")
    return settings | {name: os.path.abspath(settings[name]) for name in paths}


# --- 2. Stages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """All that tells one stage from another; score.py has a table of all stages.

    objective(y, cfg): what is maximised, for the attempts y of B episodes and the settings; (B,).
    reference, sampler: "before" is the checkpoint that the stage goes on from: that of the stage
    before it, in the first stage --init or the base model.
    learns_from(episodes, k, seed): makes traces to learn from; traces have no baseline.
    selected_by: index of the attempt whose accuracy selects the checkpoint; None: it is the policy
    after the last step.
    """

    name: str  # in --stage
    folder: str  # of its checkpoint
    title: str  # in pictures
    objective: Callable
    steps: str  # the flag that says how many updates it makes
    attempts: int | None = None  # in an episode; None: --attempts
    reference: str = "base"  # the frozen model of the KL: "base" or "before"
    sampler: str = "policy"  # the model that attempts: "policy" or "before"
    learns_from: Callable | None = None
    selected_by: int | None = -1
    restarts: bool = False  # if repeated, the policy starts where the first one did
    follows: str = ""  # the stage that must come before it
    has_beta2: bool = False  # its objective has β2, which --adaptive-beta2 changes
    allows: tuple[str, ...] = ()  # "attempts": more than 2 may be given; "offline": --offline may


def plan_of(names: str, stages: dict[str, Stage]) -> list[Stage]:
    """The stages of "1,2,1" in order; a repeated one has a folder of its own, stage1-2."""
    plan: list[Stage] = []
    for name in map(str.strip, names.split(",")):
        if name not in stages:
            raise InputError(f"--stage {names} is unknown: choose from {', '.join(stages)}")
        repeated = sum(stage.name == name for stage in plan)
        suffix = f"-{repeated + 1}" if repeated else ""
        plan.append(replace(stages[name], folder=stages[name].folder + suffix))
    return plan


# --- 3. Checks ---------------------------------------------------------------------------------


def check_settings(cfg: Config, plan: list[Stage]) -> None:
    """Raise InputError for a setting that cannot work, before anything is written."""
    check_task(cfg.task, data=cfg.data, ids=cfg.ids, columns=cfg.columns)
    wording_of(cfg)
    check_plan(cfg, plan)
    positive = ("steps1", "steps2", "batch", "lr", "clip", "max_new_tokens", "temperature")
    for name in (*positive, "rows", "micro_tokens", "save_every", "show_every", "problems"):
        if not 0 < getattr(cfg, name) < math.inf:
            raise InputError(
                f"{as_flag(name)} {getattr(cfg, name)} is out of range: give a finite number, "
                "above 0"
            )
    if cfg.temperature < COLDEST:
        raise InputError(f"--temperature {cfg.temperature} is too low: give {COLDEST} or more")
    if abs(cfg.seed) >= 2**63:
        raise InputError(f"--seed {cfg.seed} is too large: give less than 2**63")
    for name in ("alpha", "beta1", "beta2"):
        if not 0 <= getattr(cfg, name) < math.inf:
            raise InputError(
                f"{as_flag(name)} {getattr(cfg, name)} is out of range: give a finite number, "
                "0 or more"
            )
    if cfg.k < 2:
        raise InputError(f"--k {cfg.k} leaves no sibling for the baseline: give 2 or more")
    if cfg.batch % cfg.k:
        raise InputError(f"--batch {cfg.batch} is not divisible by --k {cfg.k}: change one of them")
    if not 0 <= cfg.offline <= 1:
        raise InputError(f"--offline {cfg.offline} is no share of the problems: give 0 to 1")
    check_precision(cfg.precision)
    for name in ("recompute", "compile", "tensorboard", "thinking"):
        if getattr(cfg, name) not in (0, 1):
            raise InputError(f"--{name} {getattr(cfg, name)} is neither 0 nor 1: give one of them")
    for name in ("eval_every", "lora"):
        if getattr(cfg, name) < 0:
            raise InputError(f"{as_flag(name)} {getattr(cfg, name)} is negative: give 0 or more")
    if cfg.model == "builtin" and cfg.task != "sums":
        raise InputError(f"--model builtin can only add: name a model for --task {cfg.task}")


def check_plan(cfg: Config, plan: list[Stage]) -> None:
    """Raise InputError for a setting that does not go with the stages."""
    least = max(stage.attempts or 2 for stage in plan)
    if cfg.attempts < least:
        raise InputError(
            f"--attempts {cfg.attempts} is too few for --stage {cfg.stage}: give {least} or more"
        )
    for name, given in (("attempts", cfg.attempts > 2), ("offline", cfg.offline > 0)):
        others = [stage.name for stage in plan if given and name not in stage.allows]
        if others:
            value = getattr(cfg, name)
            raise InputError(f"--{name} {value} is not for --stage {others[0]}: leave it out")
    if cfg.adaptive_beta2 and not (cfg.beta2 and any(stage.has_beta2 for stage in plan)):
        raise InputError("--adaptive-beta2 needs Stage I and a --beta2 above 0: leave it out")


def check_precision(precision: str) -> None:
    """Raise InputError for an unknown precision."""
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"--precision {precision} is unknown: choose float32 or bfloat16")


# --- 4. Command lines --------------------------------------------------------------------------


def exit_early(script: str, parse: Callable, words: str) -> None:
    """Answer --help and mistyped flags, and let Ctrl-C end the imports without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    first = "TORCHELASTIC_RUN_ID" not in os.environ or not int(os.environ["RANK"])  # prints
    try:
        with contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
            parse(words)
    except InputError as error:
        if first:
            print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def raise_input_error(message: str) -> None:
    """Raise argparse's errors as InputError, so that they are one sentence."""
    raise InputError(f"{message}; see --help")


def help_parser(words: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose --help begins with the first line of `words` and ends with `examples`."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=words.partition("\n")[0],
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = raise_input_error
    return parser


def parse_train_flags(words: str, argv: list[str] | None = None) -> dict:
    """The flags of score.py that were given, by name; defaults are left to Config."""
    parser = help_parser(words, EXAMPLES)
    parser.description += f"\n\n{SOURCES}"
    known = {item.name: item for item in fields(Config)}
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for item in map(known.pop, names.split()):
            text = f"{item.metadata['help']} (default: {defaults_of(item)})"
            kind = {"help": text.replace("%", "%%"), **kind_of(item)}
            if item.default is False:
                kind = {"help": item.metadata["help"], "action": "store_true"}
            group.add_argument(as_flag(item.name), default=argparse.SUPPRESS, **kind)
    assert not known, f"in no group: {known}"
    return parsed(parser, argv)


def defaults_of(item) -> str:
    """The default of a setting, for tasks that differ with their names."""
    tasks: dict[object, list[str]] = {}
    for task in TASKS:
        tasks.setdefault(settings_of(task).get(item.name, item.default), []).append(task)
    texts = {default: item.metadata["none"] if default == "" else f"{default}" for default in tasks}
    if len(tasks) == 1:
        return texts[item.default]
    return "; ".join(f"{', '.join(tasks[default])} {texts[default]}" for default in tasks)


def kind_of(item) -> dict:
    """The type of a setting, and what stands for its value in --help."""
    switch = item.metadata["help"].startswith("1:")
    values = {int: "0|1" if switch else "N", float: "X"}
    return {"type": type(item.default), "metavar": values.get(type(item.default))}


def folder(name: str) -> Path:
    """The type of a flag that names a folder; Path("") would be the current one."""
    if not name:
        raise argparse.ArgumentTypeError("it is empty: name a folder")
    return Path(name)


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """Flags by name; InputError for an empty text, such as of an unset shell variable."""
    typed = vars(parser.parse_args(argv))
    for name in (name for name, value in typed.items() if value == "" and name != "repair"):
        raise InputError(f"{as_flag(name)} is empty: give it a value, or leave it out")
    return typed


def eval_parser(words: str) -> argparse.ArgumentParser:
    """The parser of eval.py's flags; SHARED and ATTEMPT_FLAGS are left out if not typed."""
    parser = help_parser(words, EVAL_EXAMPLES)
    asked = parser.add_argument_group(
        "what the model is asked; by default the same as in the checkpoint's run"
    )
    how = parser.add_argument_group("attempts")
    other = parser.add_argument_group("instead of two attempts at each problem")
    files = parser.add_argument_group("files")
    asked.add_argument(
        "--model",
        help="checkpoint folder (adapters, too), or name on the Hugging Face hub; outside of a run "
        "folder it needs --task",
    )
    words = f"{', '.join(TASKS)}, or a Python file with TASK = Task(..) (default: as in the run)"
    asked.add_argument("--task", default=argparse.SUPPRESS, help=words)
    for item in fields(Config):
        if item.name in (*SHARED, *ATTEMPT_FLAGS):
            words = ATTEMPT_FLAGS.get(item.name, item.metadata["help"])
            kind = {"default": argparse.SUPPRESS, **kind_of(item)}
            usual = "as in the run"
            if item.name in ATTEMPT_FLAGS:
                usual += f"; without a run {defaults_of(item)}"
            group = how if item.name in ATTEMPT_FLAGS else asked
            group.add_argument(as_flag(item.name), help=f"{words} (default: {usual})", **kind)
    words = "which problems: test, or mbpp with --task code (default: test)"
    asked.add_argument("--split", default="test", help=words)
    how.add_argument(
        "--attempts",
        type=int,
        default=2,
        metavar="N",
        help="attempts at a problem (default: 2, whatever the run had)",
    )
    words = (
        "temperature of sampling; 1 is that of training (default: 0, greedy; with --samples "
        f"{VOTES_TEMPERATURE})"
    )
    how.add_argument("--temperature", type=float, metavar="X", help=words)
    words = "random seed of sampling at a temperature above 0: a number or any word (default: eval)"
    how.add_argument("--seed", default="eval", help=words)
    other.add_argument("--ask", metavar="QUESTION", help="print greedy attempts at this question")
    words = (
        "only attempt 2, after wrong first attempts of others: those in a JSONL FILE (id and "
        "attempts as in transcripts.jsonl, or task_id and program), or those of the base model"
    )
    other.add_argument("--repair", nargs="?", const="", metavar="FILE", help=words)
    words = (
        "compare two majority votes of equal cost: of 2n first attempts (parallel), and of n "
        "second attempts, each after its own first one (sequential); for n = 1, 2, 4 .. N"
    )
    other.add_argument("--samples", type=int, default=0, metavar="N", help=words)
    words = "Self-Refine: ask for feedback on attempt 1, and then for attempt 2"
    other.add_argument("--refine", action="store_true", help=words)
    words = "folder to write to (default: RUN/eval/STAGE for RUN/STAGE, else runs/eval/NAME)"
    files.add_argument("--out", type=folder, help=words)
    words = (
        "one FOLDER: write report.html there, on this run or evaluation with its transcripts; two: "
        "a page that compares them"
    )
    files.add_argument("--report", type=folder, nargs="+", metavar="FOLDER", help=words)
    words = "draw the pictures of a run or an evaluation, into that folder"
    files.add_argument("--plot", type=folder, metavar="FOLDER", help=words)
    return parser


def parse_eval_flags(words: str, argv: list[str] | None = None) -> argparse.Namespace:
    """All flags of eval.py; those that score.py has, too, are by default as in the model's run."""
    typed = parsed(eval_parser(words), argv)
    of_run = settings_of_run(typed["model"], typed.get("task"))
    known = find_task(typed.get("task") or of_run.get("task", Config.task))
    usual = {name: getattr(Config, name) for name in ("task", *SHARED)}
    usual |= {name: getattr(known, name) for name in ATTEMPT_FLAGS}
    args = argparse.Namespace(**{**usual, **of_run, **typed})
    args.task_known = "task" in typed or "task" in of_run
    args.as_in_run = {
        name: x for name, x in of_run.items() if x != usual[name] and name not in typed
    }
    if args.temperature is None:
        args.temperature = VOTES_TEMPERATURE if args.samples else 0.0
    return args


def settings_of_run(model: str | None, task: str | None) -> dict:
    """The settings of a checkpoint's run that eval.py shares; {} if it has no run, or another task.

    No torch is needed, so a mistyped flag is answered at once.
    """
    record = Path(model or "").absolute().parent / "config.json"
    try:
        settings = dict(json.loads(record.read_text("utf-8"))["settings"]) if model else {}
    except (OSError, ValueError, KeyError, TypeError):  # no run
        return {}
    if task and with_absolute_paths({"task": task})["task"] != settings.get("task"):
        return {}
    return {n: settings[n] for n in ("task", *SHARED, *ATTEMPT_FLAGS) if n in settings}
