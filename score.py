"""SCoRe: a language model learns to correct itself, by reinforcement learning on its attempts.

    x1 ──▶ y1 ──▶ x2 = x1 y1 p1 ──▶ y2         p1: "there might be an error, rewrite the solution"
           │                        │
           r1 = r̂(y1, y*)           r2 = r̂(y2, y*)        1 if the answer is right, else 0

    what multiplies a token's log-prob   in y1          in y2                     KL penalty
      Stage I   (Eq. 3)                  0              r2 - mean r2              β2 on y1, β1 on y2
      Stage II  (Eq. 4 and the bonus)    r1 - mean r1   (1 + α) (r2 - mean r2)    β1 on both
    mean: over the k - 1 siblings, the other samples of the problem. In the paper y2 earns
    r2 + α (r2 - r1) in Stage II. The baseline subtracts the same -α r1, so r1 drops out.

    (Eq. 3)  max E[ r̂(y2, y*) - β2 KL(π(·|x1) ‖ π_ref(·|x1)) ]    and Eq. 2's β1 KL on y2
    (Eq. 4)  max E[ Σᵢ r̂(yᵢ, y*) - β1 KL(π(·|xᵢ) ‖ π_ref(·|xᵢ)) ]
    (bonus)  b̂(y2 | y1, y*) = α (r̂(y2, y*) - r̂(y1, y*)), added to r̂(y2, y*) of Eq. 4

π is the policy, π_ref the frozen base model, y* the true answer. Without Stage I and bonus, RL
improves attempt 1 and then copies it. Stage I holds attempt 1 at the base model, so reward can come
only from what attempt 2 changes. Stage II trains both; the bonus makes attempt 2 weigh 1 + α times
as much. Credit is per attempt (γ = 0, appendix A.4): y1 is never paid for r2. If it were paid for
the whole sum r1 + r2 + α (r2 - r1), a right y1 would earn 9 less than a wrong one at α = 10.

    python score.py                 base model, Stage I and Stage II on column addition, on a CPU
    python score.py --stage 1       Stage I alone; --stage 2 goes on from it; all: see STAGES
    python score.py --task math     Gemma 2 2B on MATH (--task code: on MBPP), on one GPU of 80 GB;
                                    with --lora 16 --rows 32 (lora.py), 24 GB are enough
    torchrun --nproc_per_node=8 score.py ...     the same on 8 GPUs (ranks.py)

Left out: a value model (siblings are the baseline), PPO's clipping (each batch is used once),
division by length (biases it) or by the advantages' spread (cancels α). Next: config.py.
"""

import json
import signal
import sys
import time

from config import Config, Stage, configure, exit_early, parse_train_flags

if __name__ == "__main__":  # --help, mistyped flags and Ctrl-C do not wait for torch
    exit_early("score.py", parse_train_flags, __doc__)

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

import models
import ranks
import runs
from data import InputError, Problem
from learner import (
    Learner,
    enter_stage,
    held_out,
    leave_stage,
    open_training,
    save_if_due,
    save_training,
    write_held_out,
)
from metrics import as_record, as_table, as_text, first_correction, measure
from runs import Progress, Run
from sample import Episode, Sampling, collate, pick, rollout, transcript
from sft import pair_traces, star_traces

# Shapes: B episodes (the k samples of a problem are adjacent), S tokens of a transcript, T = S - 1
# predicted tokens (all but the first), N of the B * T that are in a loss, V vocabulary.
# --- 1. Rewards and bonus --------------------------------------------------------------------


def bonus(r1: torch.Tensor, r2: torch.Tensor, alpha: float) -> torch.Tensor:
    """b̂(y2 | y1, y*) = α (r̂(y2, y*) - r̂(y1, y*)), the shaping of Stage II (section 5.2); (B,)."""
    assert r1.dim() == 1 and r1.shape == r2.shape
    return alpha * (r2 - r1)


# --- 2. Baseline -----------------------------------------------------------------------------


def leave_one_out(r: torch.Tensor, k: int) -> torch.Tensor:
    """Mean reward of an episode's k - 1 siblings (RLOO, Ahmadian et al. 2024); (B, ..) -> (B, ..).

    An episode's own reward is left out: a baseline that depends on the sample biases the gradient.
    """
    assert k >= 2 and len(r) % k == 0
    groups = r.unflatten(0, (-1, k))
    return ((groups.sum(dim=1, keepdim=True) - groups) / (k - 1)).flatten(0, 1)


# --- 3. Log-probs and KL ---------------------------------------------------------------------

LOGITS_AT_ONCE = 2**27  # half a GB in float32; about eight tensors of this size exist at once


@dataclass(frozen=True)
class AttemptBatch:
    """Attempt i of B episodes: r, baseline (B,); logp, kl (B, T), 0 outside of its tokens."""

    r: torch.Tensor
    baseline: torch.Tensor | None  # the siblings' mean r; traces have none
    logp: torch.Tensor
    kl: torch.Tensor


def kl_divergence(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ π_ref) of the next token, exact: Σ_v π(v) (log π(v) - log π_ref(v)); (.., V) -> (..).

    NOT IN PAPER: the estimator. A sum over the vocabulary has less variance than log π/π_ref of
    the sampled token alone.
    """
    assert log_probs.shape == ref_log_probs.shape
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=-1)


def reinforce(attempt: AttemptBatch, advantage: torch.Tensor) -> torch.Tensor:
    """Σ_t A log π(y_t): its gradient is REINFORCE's, every token of y credited with A; (B,)."""
    assert advantage.shape == attempt.r.shape and not advantage.requires_grad
    return advantage * attempt.logp.sum(dim=1)


def kl_penalty(attempt: AttemptBatch) -> torch.Tensor:
    """Σ_t KL_t, with the whole gradient of its expectation; (B,).

    ∇ E[Σ_t KL_t] = E[Σ_t ∇KL_t + ∇log π(y_t) Σ_{t' > t} KL_t']: a token pays for its own KL, and
    also for that of the tokens that it leads to in its attempt. The second part only adds a
    gradient, so the value is not the KL.
    """
    kl, logp = attempt.kl, attempt.logp  # (B, T)
    kl_to_come = (kl.sum(dim=1, keepdim=True) - kl.cumsum(dim=1)).detach()  # (B, T)
    return (kl + kl_to_come * logp).sum(dim=1)


# --- 4. The objectives -----------------------------------------------------------------------
# They are maximised. No gradient flows from y2's reward or KL to the tokens of y1 (γ = 0). The
# value means nothing: the loss is no learning curve. With three attempts (A.1), Stage II gives the
# bonus to (y1, y2) and to (y2, y3); Stage I(b) rewards y3, and holds y1 and y2.


def stage1_objective(y: list[AttemptBatch], beta1: float, beta2: float) -> torch.Tensor:
    """Eq. 3 (ICLR): E[ r̂(y2, y*) - β2 KL(π(·|x1) ‖ π_ref(·|x1)) ], and Eq. 2's β1 KL on y2; (B,).

    y1 earns nothing: it is only held at the base model.
    """
    *earlier, y2 = y  # in Stage I(b) y2 is the third attempt, and both earlier ones are held
    advantage2 = y2.r - y2.baseline
    return (
        reinforce(y2, advantage2)
        - beta2 * sum(map(kl_penalty, earlier))
        - beta1 * kl_penalty(y2)
    )  # fmt: skip


def stage2_objective(y: list[AttemptBatch], beta1: float, alpha: float) -> torch.Tensor:
    """Eq. 4 (ICLR): E[ Σᵢ r̂(yᵢ, y*) - β1 KL(π(·|xᵢ) ‖ π_ref(·|xᵢ)) ], r̂(y2) with the bonus; (B,).

    The baseline of y2 is the siblings' mean r2, with the bonus that it would bring after this y1.
    So -α r1, known before y2 is sampled, cancels: advantage2 = (1 + α) (r2 - siblings' mean r2).
    """
    advantages = [y[0].r - y[0].baseline]
    for y1, y2 in pairwise(y):  # with two attempts this is one pair
        earned = y2.r + bonus(y1.r, y2.r, alpha)
        expected = y2.baseline + bonus(y1.r, y2.baseline, alpha)
        advantages.append(earned - expected)
    return (
        sum(map(reinforce, y, advantages))
        - beta1 * sum(map(kl_penalty, y))
    )  # fmt: skip


def single_turn_objective(y1: AttemptBatch, beta1: float) -> torch.Tensor:
    """Eq. 2 (ICLR) on y1 alone: single-turn RL, which SCoRe is compared with (Table 4); (B,)."""
    return reinforce(y1, y1.r - y1.baseline) - beta1 * kl_penalty(y1)


def likelihood_objective(y2: AttemptBatch) -> torch.Tensor:
    """log π(y2 | x2) of traces with a right y2: STaR and Pair-SFT (sft.py); (B,)."""
    return y2.logp.sum(dim=1)


def multipliers(stage: Stage, r: torch.Tensor, baseline: torch.Tensor, cfg: Config) -> torch.Tensor:
    """What multiplies the log-prob of each token in an attempt, without the KL; (B, attempts).

    It is the derivative of the objective, for episodes with these rewards and baselines. For logs
    and pictures: training does not need it.
    """
    assert r.dim() == 2 and r.shape == baseline.shape
    logp = [torch.zeros(len(r), 1, requires_grad=True) for _ in r[0]]
    columns = zip(r.unbind(dim=1), baseline.unbind(dim=1), logp, strict=True)
    y = [AttemptBatch(*column, kl=torch.zeros(len(r), 1)) for column in columns]
    stage.objective(y, cfg).sum().backward()
    return torch.cat([torch.zeros_like(x) if x.grad is None else x.grad for x in logp], dim=1)


# --- 5. The table of stages ----------------------------------------------------------------------
# config.py has the fields of a Stage, and their defaults.

SCORE = (
    Stage(
        name="1",
        title="Stage I",
        folder="stage1",
        objective=lambda y, cfg: stage1_objective(y, cfg.beta1, cfg.beta2),
        reference="base",
        sampler="policy",
        steps="steps1",
        attempts=2,
        has_beta2=True,
        allows=("attempts", "offline"),
    ),
    Stage(
        name="2",
        title="Stage II",
        folder="stage2",
        objective=lambda y, cfg: stage2_objective(y, cfg.beta1, cfg.alpha),
        reference="base",  # not the end of Stage I
        sampler="policy",
        steps="steps2",
        follows="1",
        allows=("attempts", "offline"),
    ),
    Stage(  # 1,1b,2 trains three attempts (appendix A.1)
        name="1b",
        title="Stage I(b)",
        folder="stage1b",
        objective=lambda y, cfg: stage1_objective(y, cfg.beta1, cfg.beta2),
        reference="before",  # NOT STATED: all of its KL is to the model of Stage I(a)
        sampler="policy",
        steps="steps1",
        attempts=3,
        follows="1",
        has_beta2=True,
        allows=("attempts",),
    ),
)


def sft_stage(name: str, title: str, traces: Callable) -> Stage:
    """A stage of maximum likelihood, on traces that the checkpoint before it samples."""
    return Stage(
        name=name,
        title=title,
        folder=name,
        objective=lambda y, cfg: likelihood_objective(y[1]),
        steps="steps2",
        sampler="before",
        learns_from=traces,
        selected_by=None,  # the rewards are another model's, and say nothing about the policy
        restarts=True,
    )


COMPARED = (  # direct RL is Stage II with --alpha 0, from the base model (--init)
    Stage(
        name="0",
        title="single-turn RL",
        folder="stage0",
        objective=lambda y, cfg: single_turn_objective(y[0], cfg.beta1),
        steps="steps1",
        selected_by=0,
    ),
    sft_stage("star", "STaR, D", star_traces),
    sft_stage("star+", "STaR, D+", partial(star_traces, keep_right=True)),
    sft_stage("pair", "Pair-SFT, D", pair_traces),
    sft_stage("pair+", "Pair-SFT, D+", partial(pair_traces, keep_right=True)),
)
STAGES = {stage.name: stage for stage in (*SCORE, *COMPARED)}


# --- 6. One update -------------------------------------------------------------------------------


def token_log_probs(learner: Learner, hidden, ref_hidden, chosen: torch.Tensor):
    """From last hidden states (N, d): logp of the chosen tokens, and the KL there; (N,) each."""
    temperature = learner.cfg.temperature
    log_probs = (models.head(learner.policy, hidden) / temperature).log_softmax(dim=-1)  # (N, V)
    with torch.no_grad():
        ref_log_probs = (models.head(learner.ref, ref_hidden) / temperature).log_softmax(dim=-1)
    logp = log_probs.gather(1, chosen[:, None])[:, 0]
    return logp, kl_divergence(log_probs, ref_log_probs)


def log_probs_and_kl(learner: Learner, tokens: torch.Tensor, places: torch.Tensor):
    """logp and kl of the tokens of attempts, 0 elsewhere, in one forward; (B, S) -> (B, T) each.

    places (N,): indices of those tokens among the B * T. Logits are large, so they are computed for
    these places only, in chunks, and once more in backward.
    """
    chosen = tokens[:, 1:]  # (B, T); the hidden state before a token predicts it
    hidden = models.last_hidden(learner.policy, tokens)[:, :-1].flatten(0, 1)[places]  # (N, d)
    with torch.no_grad():
        ref_hidden = models.last_hidden(learner.ref, tokens)[:, :-1].flatten(0, 1)[places]
    size = max(1, LOGITS_AT_ONCE // learner.policy.config.vocab_size)
    chunks = (part.split(size) for part in (hidden, ref_hidden, chosen.flatten()[places]))
    found = [
        recompute_in_backward(token_log_probs, learner, *chunk, use_reentrant=False)
        for chunk in zip(*chunks, strict=True)
    ]
    logp, kl = (torch.cat(parts) for parts in zip(*found, strict=True))  # (N,)
    empty = torch.zeros(chosen.numel(), device=tokens.device)
    logp, kl = (empty.index_copy(0, places, x).view_as(chosen) for x in (logp, kl))
    return logp, kl


def update(learner: Learner, episodes: list[Episode], stage: Stage, beta2: float) -> dict:
    """One Adam step on a batch of episodes; returns KL, advantage, gradient norm, on-policy gap."""
    if not episodes:  # SFT found no trace in this batch
        return dict.fromkeys(("kl_t1", "kl_t2", "advantage", "grad_norm", "on_policy_gap"), 0.0)
    device = learner.policy.device
    r = torch.tensor([[a.reward for a in episode.attempts] for episode in episodes], device=device)
    baseline, size = None, 0.0
    if stage.learns_from is None:  # else they are traces, no longer in groups of k
        baseline = leave_one_out(r, learner.cfg.k)
        size = (r - baseline)[:, -1].abs().mean().item()  # for the log
    kls, gap = accumulate_gradients(learner, episodes, r, baseline, stage, beta2)
    norm = adam_step(learner)
    sums = map(sum, zip(*ranks.all_gather(kls), strict=True))
    metrics = {f"kl_t{i}": total / len(episodes) for i, total in enumerate(sums, start=1)}
    gap = max(ranks.all_gather([gap]))
    return metrics | {"advantage": size, "grad_norm": norm, "on_policy_gap": gap}


def accumulate_gradients(learner: Learner, episodes: list[Episode], r, baseline, stage, beta2):
    """Backward of loss = -objective, its mean over all B episodes, in micro-batches.

    r, baseline: (B, attempts); traces have no baseline. Returns, of this rank's episodes, the KL of
    each attempt (rows), and the largest difference of a sampled and a scored log-prob.
    """
    cfg, policy = replace(learner.cfg, beta2=beta2), learner.policy
    rows = [transcript(episode, learner.chat) for episode in episodes]
    kls, gap = [], 0.0
    policy.train(bool(cfg.recompute))  # switches recomputation on; dropout is 0
    # weight: FSDP averages gradients over the ranks, but we want the sum, so it is their number. A
    # rank without rows left repeats one with weight 0: all ranks must call backward equally often
    for batch, weight in ranks.local_micro_batches(list(map(len, rows)), cfg.micro_tokens):
        tokens, attempt_ids, sampled, places = collate([rows[i] for i in batch], policy.device)
        logp, kl = log_probs_and_kl(learner, tokens, places)  # (B, T) each
        y = []
        for i in range(r.shape[1]):
            mask = attempt_ids == i + 1  # (B, T)
            expected = None if baseline is None else baseline[batch, i]
            y.append(AttemptBatch(r[batch, i], expected, logp * mask, kl * mask))
        loss = -weight * stage.objective(y, cfg).sum() / len(episodes)  # mean over all B episodes
        loss.backward()
        if weight:
            kls += torch.stack([attempt.kl.sum(dim=1) for attempt in y], dim=1).tolist()
        if weight and stage.sampler == "policy":
            difference = (logp.detach() - sampled) * (attempt_ids > 0)
            gap = max(gap, difference.abs().max().item())
    policy.eval()
    return kls, gap


def adam_step(learner: Learner) -> float:
    """Clip the gradient, and take a step of Adam; returns the norm before clipping."""
    ranks.average_gradients(learner.policy)
    clipped = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), learner.cfg.clip)
    norm = ranks.full_tensor(clipped)
    if not norm.isfinite():
        ranks.abort("the gradient is no longer finite: begin a new run with a lower --lr")
    learner.optimizer.step()
    learner.optimizer.zero_grad()  # sampling needs the memory of the gradients
    return norm.item()


# --- 7. The loop ---------------------------------------------------------------------------------


def train(learner: Learner, run: Run, progress: Progress) -> None:
    """Go through the stages from where `progress` stands; returns early if a signal came."""
    cfg = learner.cfg
    while progress.index < len(learner.plan):
        stage = learner.plan[progress.index]
        steps = getattr(cfg, stage.steps)
        enter_stage(learner, run.folder, progress.index, progress.step)
        with tqdm(total=steps, initial=progress.step, desc=stage.folder, unit="step") as bar:
            while progress.step < steps:
                line = one_step(learner, run, progress, stage)
                stop = max(ranks.all_gather([run.signal]))  # a signal to one rank stops all
                bar.update()
                bar.set_postfix({key: f"{line[key]:.2f}" for key in ("acc_t1", "acc_t2", "copied")})
                save_if_due(learner, run, progress, stage, stop)
                if stop:
                    run.signal = stop
                    return
        episodes, metrics = leave_stage(learner, run.folder / stage.folder)
        write_held_out(run, stage.folder, episodes)
        run.write_results(stage.folder, metrics)
        print(first_correction(episodes, metrics, stage.folder))
        progress.index, progress.step, progress.best = progress.index + 1, 0, -1.0
        progress.beta2 = cfg.beta2
        if progress.index < len(learner.plan):  # else the last step stays saved, to add steps later
            save_training(learner, run, progress)


def one_step(learner: Learner, run: Run, progress: Progress, stage: Stage) -> dict:
    """Pick problems, roll out and judge, score and update; returns the line of metrics.jsonl."""
    began, cfg, number = time.perf_counter(), learner.cfg, len(run.lines)
    batch = pick(learner.problems, cfg.batch // cfg.k, number, cfg.seed)
    seed = f"{cfg.seed}/{number}"
    episodes = sample_episodes(learner, [p for p in batch for _ in range(cfg.k)], stage, seed)
    trained_on = stage.learns_from(episodes, cfg.k, seed) if stage.learns_from else episodes
    line = {"step": number, "stage": stage.name, **measure(episodes)}
    line |= {"learned": len(trained_on) / len(episodes), "beta2": progress.beta2}
    line |= update(learner, trained_on, stage, progress.beta2)
    if cfg.adaptive_beta2 and stage.has_beta2:
        progress.beta2 = adapted_beta2(progress.beta2, line, cfg)
    progress.step += 1
    line["alarms"] = []
    if stage.sampler == "policy":  # alarms are about the policy, not about another sampler
        lines, base = [*run.lines, line], run.results["base, sampled"]
        line["alarms"] = runs.raise_alarms(lines, base, progress, fresh=not cfg.init)
    if cfg.eval_every and (number + 1) % cfg.eval_every == 0:
        line["held_out"] = held_out(learner, learner.policy, temperature=0.0)[1]
    line["seconds"] = time.perf_counter() - began
    run.log(line)
    if number % cfg.show_every == 0:
        show(run, episodes, stage, cfg)
    return line


def show(run: Run, episodes: list[Episode], stage: Stage, cfg: Config) -> None:
    """Add the first episode of four problems to samples.txt and episodes.jsonl."""
    step, shown = run.lines[-1]["step"], range(0, min(len(episodes), 4 * cfg.k), cfg.k)
    texts = [as_text(episodes[i]) for i in shown]
    run.append(runs.SAMPLES, f"step {step}, stage {stage.name}\n\n{''.join(texts)}")
    weights = [()] * len(episodes)
    if stage.learns_from is None:
        r = torch.tensor([[y.reward for y in episode.attempts] for episode in episodes])
        weights = multipliers(stage, r, leave_one_out(r, cfg.k), cfg).tolist()
    for i in shown:
        of_row = [None, *weights[i][1:]] if episodes[i].offline else weights[i]
        record = as_record(episodes[i], "training", of_row, stage=stage.title, step=step)
        run.append(runs.EPISODES, json.dumps(record) + "\n")


def sample_episodes(
    learner: Learner, problems: list[Problem], stage: Stage, seed: str
) -> list[Episode]:
    """Episodes of the model that samples in this stage; a share has the base model's attempt 1."""
    cfg, attempts = learner.cfg, stage.attempts or learner.cfg.attempts
    sampling = Sampling(attempts, cfg.max_new_tokens, cfg.temperature, seed, cfg.rows)
    split = round(cfg.offline * len(problems) / cfg.k) * cfg.k

    def attempt(model, problems, sampling, begun=()):
        part = ranks.local_slice(len(problems), cfg.k)
        return ranks.all_gather(rollout(model, learner.chat, problems, sampling, begun, part))

    begun = []
    if split:
        ref = ranks.unshard(learner.ref, learner.full_copy)
        begun = attempt(ref, problems[:split], replace(sampling, attempts=1))
    # only after ref has attempted: both use the same full copy
    policy = learner.sampler or ranks.unshard(learner.policy, learner.full_copy)
    continued = attempt(policy, problems[:split], sampling, begun) if split else []
    return continued + attempt(policy, problems[split:], sampling)


def adapted_beta2(beta2: float, line: dict, cfg: Config) -> float:
    """β2 of the next step: over time, β2 KL(y1) becomes as large as the mean |advantage| of y2.

    Section 5.3 has an adaptive β2 "to balance the magnitudes" of both; the rule is NOT STATED. Here
    a step changes β2 by a factor of at most 1.1, and β2 stays between --beta2 / 10 and 10 --beta2.
    """
    *held, _last = (value for key, value in line.items() if key.startswith("kl_t"))
    wanted = line["advantage"] / max(sum(held), 1e-9)
    beta2 *= min(max(wanted / beta2, 1 / 1.1), 1.1)
    return min(max(beta2, cfg.beta2 / 10), cfg.beta2 * 10)


# --- 8. Main -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done or preempted, 2 bad input, 130 Ctrl-C."""
    try:
        with ranks.process_group():
            typed = ranks.on_all_ranks(parse_train_flags, __doc__, argv)
            cfg = ranks.on_all_ranks(configure, typed)
            with runs.locked(Path(cfg.out)), runs.disk_errors_explained():
                return start_or_resume(typed)
    except InputError as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the first step: type the same command again", file=sys.stderr)
        return 130


def start_or_resume(typed: dict) -> int:
    """Begin or resume a run, train, and say how it ended; returns the exit status."""
    began = time.perf_counter()
    learner, run, progress = open_training(typed, STAGES)
    run.stop_on_signals()
    if learner.cfg.tensorboard:
        run.open_board()
    train(learner, run, progress)
    cfg, plan = learner.cfg, learner.plan
    if progress.index < len(plan):
        command = runs.train_command(cfg, "--resume")
        print(f"stopped and saved after {len(run.lines)} steps; to go on: {command}")
        return 0 if run.signal == signal.SIGTERM else 130
    table = as_table({name: row for name, row in run.results.items() if name != "base, sampled"})
    print(f"done in {time.perf_counter() - began:.0f} s; greedy on held-out problems:\n{table}")
    command = runs.eval_command(cfg, plan[-1].folder)
    command += f", or python eval.py{runs.as_words({'report': cfg.out})}"
    if len(plan) == 1:  # is there a stage that goes on from it?
        following = [stage.name for stage in STAGES.values() if stage.follows == plan[0].name]
        command = runs.train_command(cfg, f"--stage {following[0]}") if following else command
    print("next:", command)
    return 0


if __name__ == "__main__":
    ranks.run_command(main)
