"""What learns: policy, reference and optimizer, how they are built, and what each stage changes.

    stage      starts from                  reference π_ref       who samples
    the first  the base model, or --init
    0, 1, 2    the stage before             the base model        the policy
    1b         the stage before             the stage before      the policy
    star       what came before the first   -                     the iteration before
    pair       the stage before             -                     the stage before

Next to read: score.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import models
import ranks
import runs
from baselines import SFT
from data import Problem
from eval import evaluate
from runs import Progress, Run
from sample import Sampling, asked
from tasks import Chat, load_problems


@dataclass
class Learner:
    """Policy, frozen reference, the plain copy that samples for both, Adam, and what is asked."""

    policy: torch.nn.Module
    ref: torch.nn.Module
    plain: torch.nn.Module | None
    optimizer: torch.optim.Optimizer
    chat: Chat
    problems: list[Problem]
    cfg: object  # score.Config
    sampler: torch.nn.Module | None = None  # who attempts, if not the policy


def build(cfg, init: str, same_base: bool) -> Learner:
    """The frozen base model as reference, and the policy, which begins as `init` or as its copy."""
    policy, ref, tokenizer = models.load_pair(cfg, init, same_base)
    chat, problems = ranks.together(asked, cfg, ref, tokenizer)
    plain = models.spread(policy, ref, cfg.precision)
    return Learner(policy, ref, plain, models.adam(policy, cfg.lr), chat, problems, cfg)


def save(learner: Learner, run: Run, progress: Progress) -> None:
    tensors = models.state_of(learner.policy, learner.optimizer)
    runs.save_state(run, tensors, {"progress": asdict(progress), "stage": learner.cfg.stage})


def begin(typed: dict, configure) -> tuple[Learner, Run, Progress]:
    """A new run, or Stage II after a finished Stage I with its settings; nothing is overwritten."""
    cfg, run, init, same_base = ranks.together(runs.begin, typed, configure)
    learner = build(cfg, init, same_base)
    if not run.results:
        for name, temperature in (("base", 0.0), ("base, sampled", cfg.temperature)):
            run.write_results(name, held_out(learner, learner.ref, temperature))
    progress = Progress(beta2=cfg.beta2)
    save(learner, run, progress)
    runs.write_config(run, asdict(cfg))
    return learner, run, progress


def resume(typed: dict, configure) -> tuple[Learner, Run, Progress]:
    """The run in --out as it was last saved; its own settings hold, so no other flag may differ."""
    cfg, run, where = ranks.together(runs.resume, typed, configure)
    learner = build(cfg, "", same_base=True)
    runs.load_state(run, models.state_of(learner.policy, learner.optimizer), where)
    return learner, run, Progress(**where["progress"])


def enter_stage(learner: Learner, folder: Path, index: int, step: int) -> None:
    """Set up what a stage changes, at its start and again on resuming at a later `step`."""
    plan = runs.plan_of(learner.cfg.stage)
    stage = plan[index][0]
    learner.sampler = None
    before = checkpoint_before(learner.cfg, folder, index)
    if stage == "1b":  # NOT STATED: all of its KL is to the model of Stage 1(a)
        ranks.load_into(learner.ref, load(learner, before))
    elif index and plan[index - 1][0] == "1b":
        ranks.load_into(learner.ref, load(learner, runs.base_in(folder, learner.cfg.model)))
    if stage in SFT:
        learner.sampler = load(learner, before).to(ranks.device())
        first = index
        while first and plan[first - 1][0] == stage:
            first -= 1
        if first < index and not step:  # each iteration of STaR begins anew
            origin = checkpoint_before(learner.cfg, folder, first)
            ranks.load_into(learner.policy, load(learner, origin))


def checkpoint_before(cfg, folder: Path, index: int) -> str:
    """What the stage of that index goes on from."""
    if index:
        return str(folder / runs.plan_of(cfg.stage)[index - 1][1])
    return cfg.init or runs.base_in(folder, cfg.model)


def load(learner: Learner, checkpoint: str):
    return ranks.together(models.load_checkpoint, checkpoint, learner.cfg.precision)[0]


def leave_stage(learner: Learner, folder: Path, name: str) -> dict[str, float]:
    """Go back to the stage's best checkpoint, with a new Adam; returns its held-out metrics."""
    learner.sampler = None
    ranks.load_into(learner.policy, load(learner, str(folder / name)))
    learner.optimizer.state.clear()  # the new one needs its memory
    learner.optimizer = models.adam(learner.policy, learner.cfg.lr)
    return held_out(learner, learner.policy, temperature=0.0)


def held_out(learner: Learner, model, temperature: float) -> dict[str, float]:
    """Metrics of a model on held-out problems."""
    cfg, plain = learner.cfg, ranks.plain(model, learner.plain)
    sampling = Sampling(cfg.attempts, cfg.max_new_tokens, temperature, "held out", cfg.rows)
    problems = load_problems(cfg.task, "test", cfg.problems, cfg.data)
    return evaluate(plain, learner.chat, problems, sampling)[1]
