"""What learns: policy, reference and optimizer; how they are built, and what each stage changes.

The table of stages in score.py says what the reference of a stage is, and which model samples. The
policy of the first stage starts from the base model or --init. That of a later stage goes on from
the checkpoint of the stage before. Next to read: eval.py.
"""

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import lora
import models
import ranks
import runs
from config import Config, Stage
from data import InputError, Problem
from metrics import as_record, evaluate
from runs import Progress, Run
from sample import Episode, Sampling, askable, check_sampling
from sft import fit_builtin
from tasks import Chat, load_problems, read_chat, wording_of


@dataclass
class Learner:
    """All that training works with: models, Adam, prompts, problems, settings and stages."""

    policy: torch.nn.Module
    ref: torch.nn.Module  # frozen
    full_copy: torch.nn.Module | None  # a whole model that samples for both, if they are sharded
    optimizer: torch.optim.Optimizer
    chat: Chat
    problems: list[Problem]
    cfg: Config
    plan: list[Stage] = field(default_factory=list)
    sampler: torch.nn.Module | None = None  # the model that attempts, if not the policy
    base: torch.nn.Module | None = None  # with --lora, all models share its weights


def open_training(typed: dict, stages: dict[str, Stage]) -> tuple[Learner, Run, Progress]:
    """The run that the flags ask for: a new one, or with --resume an earlier one."""
    return (resume_training if "resume" in typed else start_training)(typed, stages)


def start_training(typed: dict, stages: dict[str, Stage]) -> tuple[Learner, Run, Progress]:
    """A new run, or Stage II in the folder and with the settings of a finished Stage I."""
    cfg, plan, run, init, reuse_base = ranks.on_all_ranks(runs.prepare_run, typed, stages)
    learner, base = build(cfg, plan, init, reuse_base)
    ranks.on_all_ranks(check_space, learner, 0, 2)
    if not run.results:
        episodes, metrics = held_out(learner, learner.ref, 0.0)
        write_held_out(run, "base", episodes)
        run.write_results("base", metrics)
        run.write_results("base, sampled", held_out(learner, learner.ref, cfg.temperature)[1])
        run.append(runs.SAMPLES, as_asked(learner))
    progress = Progress(beta2=cfg.beta2)
    save_training(learner, run, progress)
    runs.write_config(run, cfg, typed, base)
    return learner, run, progress


def resume_training(typed: dict, stages: dict[str, Stage]) -> tuple[Learner, Run, Progress]:
    """The run in --out as it was last saved; the flags may give it more steps.

    If all steps are done, its Progress is past the last stage.
    """
    cfg, plan, run, where, base = ranks.on_all_ranks(runs.reopen_run, typed, stages)
    progress = Progress(**where["progress"])
    learner, found = build(cfg, plan, "", reuse_base=True)
    if found != base:
        ranks.abort(
            f"--model {cfg.model} has other weights than the base of the run in {cfg.out}: "
            "restore them, or begin a new run"
        )
    ranks.on_all_ranks(check_space, learner, progress.index, 1)
    if runs.is_finished(cfg, plan, run, progress):
        progress.index += 1
        return learner, run, progress
    runs.read_state(run, models.state_of(learner.policy, learner.optimizer), where)
    print(f"going on with {plan[progress.index].folder} after {progress.step} saved steps")
    if typed.keys() - {"resume", "out"}:
        runs.write_config(run, cfg, typed, base)
    return learner, run, progress


def as_asked(learner: Learner) -> str:
    """The prompts of the first problem, as the model gets them."""
    first, chat = learner.problems[0], learner.chat
    again = chat.tokenizer.decode(chat.p1)
    return f"attempt 1 is asked for by\n{chat.first_text(first)}\n\nand attempt 2 by\n{again}\n\n"


def check_space(learner: Learner, index: int, states: int) -> None:
    """Raise InputError if the disk has no room for the stages from `index` on and these states."""
    weights = sum(weight.numel() for weight in models.trained(learner.policy).values())
    precision = "float32" if learner.cfg.lora else learner.cfg.precision
    size, left = getattr(torch, precision).itemsize, len(learner.plan) - index
    runs.check_space(Path(learner.cfg.out), weights, size, left, states)


def save_training(learner: Learner, run: Run, progress: Progress) -> None:
    """Write all that resume_training needs."""
    tensors = models.state_of(learner.policy, learner.optimizer)
    runs.write_state(run, tensors, {"progress": asdict(progress), "stage": learner.cfg.stage})


def save_if_due(learner: Learner, run: Run, progress: Progress, stage: Stage, stop: int) -> None:
    """Save every `save_every` steps, at the end of a stage, and if a signal says stop.

    The first two may also write the checkpoint of the stage.
    """
    steps, every = getattr(learner.cfg, stage.steps), learner.cfg.save_every
    window_full, last = progress.step % every == 0, progress.step == steps
    # the reward of a short last window is too noisy to choose by
    if window_full or (last and (steps < every or stage.selected_by is None)):
        keep_best(learner, run, progress, stage)
    if window_full or last or stop:
        save_training(learner, run, progress)


def keep_best(learner: Learner, run: Run, progress: Progress, stage: Stage) -> None:
    """Write the policy as the stage's checkpoint, if its rewards are the best so far.

    They are those of attempt `selected_by` (None: no choice, it is always written), averaged over
    the steps since the last save. NOT IN PAPER: the averaging.
    """
    since, reward = min(progress.step, learner.cfg.save_every), 0.0
    if stage.selected_by is not None:
        attempts = range(1, 1 + (stage.attempts or learner.cfg.attempts))
        accuracy = f"acc_t{attempts[stage.selected_by]}"
        reward = sum(line[accuracy] for line in run.lines[-since:]) / since
    if reward >= progress.best:
        progress.best, policy = reward, ranks.unshard(learner.policy, learner.full_copy)
        if ranks.rank() == 0:
            models.save_checkpoint(run.folder / stage.folder, policy, learner.chat.tokenizer)


def build(cfg: Config, plan: list[Stage], init: str, reuse_base: bool) -> tuple[Learner, str]:
    """The Learner of a run, and the fingerprint of its base model.

    The frozen base model is the reference. The policy is the checkpoint `init`, or else a copy of
    the base model. reuse_base: if the run folder holds a built-in base model, it is this run's.
    """
    if cfg.lora:
        ranks.on_all_ranks(lora.import_peft)
    policy = None
    if init and not cfg.lora:
        policy = ranks.on_all_ranks(models.load_model, init, cfg.precision)
    ranks.on_all_ranks(fit_base, cfg, reuse_base)
    policy, ref, tokenizer = ranks.on_all_ranks(add_reference, policy, cfg, init)
    chat, problems, longest = ranks.on_all_ranks(chat_and_problems, cfg, ref, tokenizer)
    base = models.fingerprint(ref)
    full_copy = None if cfg.lora else models.distribute(policy, ref, cfg.precision)
    if cfg.compile:
        for model in filter(None, (policy, ref, full_copy)):
            ranks.on_all_ranks(models.compile_body, model)
    whole = ranks.unshard(policy if cfg.lora else ref, full_copy)
    ranks.on_all_ranks(check_sampling, whole, longest, bool(cfg.recompute))
    adam = models.adam(policy, cfg.lr)
    learner = Learner(policy, ref, full_copy, adam, chat, problems, cfg, plan, base=ref)
    return learner, base


def fit_base(cfg: Config, reuse_base: bool) -> None:
    """Fit the built-in base model; with reuse_base, use that of the run folder if there is one."""
    folder = Path(cfg.out) / "base"
    wanted = cfg.model == "builtin" and not (reuse_base and folder.exists())
    if wanted and ranks.rank() == 0:
        print("making the base model (supervised); then its training by SCoRe begins")
        models.save_checkpoint(folder, *fit_builtin(cfg.seed))


def add_reference(policy, cfg: Config, init: str):
    """Policy (a copy of the base model if it is None), reference and tokenizer, on the CPU.

    With --lora, both models are on the device, and share the weights of the base model.
    """
    base = runs.base_of_run(Path(cfg.out), cfg.model)
    ref, tokenizer = models.load_checkpoint(base, cfg.precision)
    ref.requires_grad_(False)
    if cfg.lora:
        if init:
            lora.check_init(init, cfg.lora, ref)
        policy = lora.with_adapters(ref.to(ranks.device()), cfg.lora, cfg.seed, init)
    else:
        policy = (policy or copy.deepcopy(ref)).requires_grad_(True)
        shapes = [[weight.shape for weight in model.parameters()] for model in (policy, ref)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"--init {init} has another architecture than the base model {cfg.model}: name a "
                "checkpoint that was trained from it"
            )
    if cfg.recompute:
        models.recompute_activations(policy)
    return policy, ref, tokenizer


def chat_and_problems(cfg: Config, model, tokenizer) -> tuple[Chat, list[Problem], int]:
    """The Chat of a model, `askable` problems to train on, and the most tokens of an episode."""
    chat = read_chat(tokenizer, model, cfg.task, wording_of(cfg))
    problems = load_problems(cfg.task, "train", None, cfg.data, cfg.ids, cfg.columns)
    return chat, *askable(problems, model, chat, Sampling(cfg.attempts, cfg.max_new_tokens))


def enter_stage(learner: Learner, folder: Path, index: int, step: int) -> None:
    """Set up what a stage changes: at its start, and again when a run is resumed within it."""
    plan, stage = learner.plan, learner.plan[index]
    before = checkpoint_before(learner, folder, index)
    learner.sampler = None
    if stage.reference == "before":
        set_reference(learner, before)
    elif index and plan[index - 1].reference == "before":
        set_reference(learner, runs.base_of_run(folder, learner.cfg.model))
    if stage.sampler == "before":
        learner.sampler = read_model(learner, before).to(ranks.device())
    first = index
    while stage.restarts and first and plan[first - 1].name == stage.name:
        first -= 1
    if first < index and not step:
        origin = checkpoint_before(learner, folder, first)
        ranks.copy_weights(learner.policy, read_model(learner, origin))


def checkpoint_before(learner: Learner, folder: Path, index: int) -> str:
    """The checkpoint that the stage of that index goes on from."""
    if index:
        return str(folder / learner.plan[index - 1].folder)
    return learner.cfg.init or runs.base_of_run(folder, learner.cfg.model)


def set_reference(learner: Learner, checkpoint: str) -> None:
    """Make a checkpoint the reference of the KL."""
    model = read_model(learner, checkpoint)
    if learner.cfg.lora:
        learner.ref = model.requires_grad_(False)
    else:
        ranks.copy_weights(learner.ref, model)


def read_model(learner: Learner, checkpoint: str):
    """The model of a checkpoint of this run; with --lora, it shares the weights of the base."""
    cfg = learner.cfg
    if cfg.lora:
        settings = learner.base, cfg.lora, cfg.seed, checkpoint
        return ranks.on_all_ranks(lora.with_adapters, *settings)
    return ranks.on_all_ranks(models.load_model, checkpoint, cfg.precision)


def leave_stage(learner: Learner, checkpoint: Path) -> tuple[list[Episode], dict[str, float]]:
    """Go back to the stage's best checkpoint, with a new Adam; returns `held_out` of it."""
    learner.sampler = None
    ranks.copy_weights(learner.policy, read_model(learner, str(checkpoint)))
    learner.optimizer.state.clear()  # the new Adam needs its memory
    learner.optimizer = models.adam(learner.policy, learner.cfg.lr)
    return held_out(learner, learner.policy, temperature=0.0)


def held_out(learner: Learner, model, temperature: float):
    """A model's episodes on held-out problems, and their metrics."""
    cfg, model = learner.cfg, ranks.unshard(model, learner.full_copy)
    sampling = Sampling(cfg.attempts, cfg.max_new_tokens, temperature, "held out", cfg.rows)
    problems = load_problems(cfg.task, "test", cfg.problems, cfg.data, columns=cfg.columns)
    return evaluate(model, learner.chat, problems, sampling)


def write_held_out(run: Run, model: str, episodes: list[Episode]) -> None:
    """Add a model's episodes on held-out problems to episodes.jsonl of the run."""
    lines = (as_record(episode, source=f"{model}, held out") for episode in episodes)
    run.append(runs.EPISODES, "".join(json.dumps(line) + "\n" for line in lines))
