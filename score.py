"""SCoRe: a language model learns to correct itself, by reinforcement on its own attempts.

    x1 ──▶ y1 ──▶ x2 = x1 y1 p1 ──▶ y2         p1: "there might be an error, rewrite the solution"
           │                        │
           r1 = r̂(y1, y*)           r2 = r̂(y2, y*)        1 if the answer is right, else 0

    the log-prob of a token is multiplied by   in y1     in y2               and KL costs
      Stage I   (Eq. 3)                        0         r2                  β2 on y1, β1 on y2
      Stage II  (Eq. 4 and the bonus)          r1        r2 + α (r2 - r1)    β1 on both
    each reward less its baseline: the mean r1, or r2, of k - 1 siblings, samples of that problem

    (Eq. 3)  max E[ r̂(y2, y*) - β2 KL(π(·|x1) ‖ π_ref(·|x1)) ]    and Eq. 2's β1 KL on y2
    (Eq. 4)  max E[ Σᵢ r̂(yᵢ, y*) - β1 KL(π(·|xᵢ) ‖ π_ref(·|xᵢ)) ]
    (bonus)  b̂(y2 | y1, y*) = α (r̂(y2, y*) - r̂(y1, y*)), added to r̂(y2, y*) of Eq. 4

π is the policy, π_ref the frozen base model, y* the true answer. Plain RL learns a better attempt 1
and then copies it. Stage I holds attempt 1 at the base model: reward can come only from what
attempt 2 changes. Stage II trains both; the bonus pays for wrong -> right and fines right -> wrong.
Credit is per attempt (γ = 0, appendix A.4): x2 is a given to y2, and y1 is never paid for r2 or the
bonus: with α = 10, it would be paid r1 - α r1 = -9 for being right.

    python score.py                 base model, Stage I and Stage II on column addition, on a CPU
    python score.py --stage 1       Stage I, then --stage 2; 1,1b,2: three attempts; or baselines.py
    python score.py --task math     Gemma 2 2B on MATH, or --task code: MBPP; one GPU of 80 GB
    torchrun --nproc_per_node=8 score.py ...     the same on many (ranks.py)

Left out: a value model (siblings are the baseline), PPO's ratio and clipping (one update a batch,
so the ratio is 1), dividing by length or by the spread of rewards (it would cancel α). The loss is
no learning curve: only its gradient means something. Next to read: runs.py.
"""

import signal
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import models
import ranks
import runs
from baselines import SFT, traces
from data import InputError, Problem
from eval import as_text
from learner import Learner, begin, enter_stage, leave_stage, resume, save
from metrics import as_table, measure
from runs import Progress, Run
from sample import Episode, Sampling, collate, micro_batches, pick, rollout, transcript
from tasks import settings_of


def flag(default, words: str):
    """A setting: its default, what it is and where it comes from."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Config:
    """All settings of a run. Defaults are the built-in task's; other tasks set theirs in TASKS."""

    stage: str = flag("1,2", "in order, such as 1 or 1,2,1,2; others: 0 1b star star+ pair pair+")
    model: str = flag("builtin", "base: builtin, folder or hub name")
    init: str = flag("", "checkpoint from which the policy starts (default: the base model)")
    task: str = flag("sums", "what to learn: sums, math or code")
    data: str = flag("", "folder of the task's JSONL files, not the Hugging Face hub")
    ids: str = flag("", "of MBPP's problems to train on; NOT STATED")
    out: str = flag("runs/sums", "run folder")
    seed: int = flag(0, "of base model, data order and sampling")
    steps1: int = flag(300, "updates in stages 0, 1, 1b; Table 8: 3000 in all, split NOT STATED")
    steps2: int = flag(50, "updates in Stage II, and in one of star or pair")
    attempts: int = flag(2, "attempts at a problem in Stage II; 3 goes with --stage 1,1b,2")
    batch: int = flag(256, "episodes per step, k per problem; Table 8 has 512, of NOT STATED")
    k: int = flag(8, "samples per problem, at least 2; NOT STATED, RLOO's paper: 2 and 4")
    lr: float = flag(2.5e-4, "Adam's rate; Table 8: 5e-6, a small model takes more")
    alpha: float = flag(10.0, "weight of the bonus; Table 8")
    beta1: float = flag(0.01, "weight of the ordinary KL; Table 8")
    beta2: float = flag(0.1, "weight of Stage I's KL on attempt 1; Table 8")
    adaptive_beta2: bool = flag(False, "beta2 follows the size of its KL; rule NOT STATED")
    temperature: float = flag(1.0, "of the policy, sampled and scored alike; Table 8")
    offline: float = flag(0.0, "share of problems whose attempt 1 is the base's (section 5.3)")
    clip: float = flag(1.0, "largest gradient norm; NOT STATED, 1 is the custom")
    max_new_tokens: int = flag(10, "of one attempt; NOT STATED, a sum needs 9")
    precision: str = flag("float32", "of the policy; bfloat16 has float32 masters")
    rows: int = flag(500, "episodes sampled side by side: memory, not the result")
    micro_tokens: int = flag(16384, "tokens per forward pass: memory, not the result")
    recompute: int = flag(0, "1: compute activations again in backward, to hold fewer")
    save_every: int = flag(25, "steps between saves; the best of them is the stage's checkpoint")
    show_every: int = flag(25, "steps between transcripts in samples.txt")
    problems: int = flag(2000, "held-out problems in the table at the end")
    resume: bool = flag(False, "go on with the interrupted run in --out")


def configure(typed: dict) -> Config:
    """The settings of a task, with those that were typed."""
    return Config(**{**settings_of(typed.get("task", Config.task)), **typed})


# Shapes: B episodes (k samples of a problem adjacent), S tokens of a transcript, T = S - 1 that are
# predicted from what is before them, N of all of them that are in a loss, V vocabulary.
# --- 1. Rewards and bonus --------------------------------------------------------------------


def bonus(r1: torch.Tensor, r2: torch.Tensor, alpha: float) -> torch.Tensor:
    """b̂(y2 | y1, y*) = α (r̂(y2, y*) - r̂(y1, y*)), the shaping of Stage II (section 5.2); (B,)."""
    assert r1.dim() == 1 and r1.shape == r2.shape
    return alpha * (r2 - r1)


# --- 2. Baseline -----------------------------------------------------------------------------


def leave_one_out(r: torch.Tensor, k: int) -> torch.Tensor:
    """Mean reward of an episode's k - 1 siblings (RLOO, Ahmadian et al. 2024); (B,) -> (B,).

    An episode's own reward is left out: a baseline that knew the action would bias the gradient.
    """
    assert r.dim() == 1 and k >= 2 and len(r) % k == 0
    groups = r.view(-1, k)
    return ((groups.sum(dim=1, keepdim=True) - groups) / (k - 1)).view(-1)


# --- 3. Log-probs and KL ---------------------------------------------------------------------

LOGITS_AT_ONCE = 2**27  # half a GB in float32, and some eight of these


@dataclass(frozen=True)
class Scored:
    """One attempt of B episodes: r and the siblings' mean r (B,); logp and kl (B, T), 0 outside."""

    r: torch.Tensor
    siblings: torch.Tensor
    logp: torch.Tensor
    kl: torch.Tensor


def kl_divergence(log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """KL(π ‖ π_ref) of the next token, exact: Σ_v π(v) (log π(v) - log π_ref(v)); (.., V) -> (..).

    NOT IN PAPER: the estimator. A sum over the vocabulary has less variance than log π/π_ref of
    the sampled token alone.
    """
    assert log_probs.shape == ref_log_probs.shape
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(dim=-1)


def reinforce(y: Scored, advantage: torch.Tensor) -> torch.Tensor:
    """Σ_t A log π(y_t): its gradient is REINFORCE's, every token of y credited with A; (B,)."""
    assert advantage.shape == y.r.shape and not advantage.requires_grad
    return advantage * y.logp.sum(dim=1)


def kl_penalty(y: Scored) -> torch.Tensor:
    """Σ_t KL_t, with the whole gradient of its expectation; (B,).

    ∇ E[Σ_t KL_t] = E[Σ_t ∇KL_t + ∇log π(y_t) Σ_{t' > t} KL_t']: a token answers for its own KL and,
    since it decides where the attempt goes on, for the KL to come.
    """
    to_come = (y.kl.sum(dim=1, keepdim=True) - y.kl.cumsum(dim=1)).detach()  # (B, T)
    return (y.kl + to_come * y.logp).sum(dim=1)


# --- 4. The objectives -----------------------------------------------------------------------
# To be maximised. Only their gradient means something: the equation's, y1 held constant for y2.


# y: attempts 1 and 2; a third is treated as the second, after the one before it (appendix A.1).


def stage1_objective(y: list[Scored], beta1: float, beta2: float) -> torch.Tensor:
    """Eq. 3 (ICLR): E[ r̂(y2, y*) - β2 KL(π(·|x1) ‖ π_ref(·|x1)) ], and Eq. 2's β1 KL on y2; (B,).

    y1 earns nothing: it is only held at the base model.
    """
    *held, last = y
    advantage = last.r - last.siblings
    return (
        reinforce(last, advantage)
        - beta2 * sum(map(kl_penalty, held))
        - beta1 * kl_penalty(last)
    )  # fmt: skip


def stage2_objective(y: list[Scored], beta1: float, alpha: float) -> torch.Tensor:
    """Eq. 4 (ICLR): E[ Σᵢ r̂(yᵢ, y*) - β1 KL(π(·|xᵢ) ‖ π_ref(·|xᵢ)) ], r̂(y2) with the bonus; (B,).

    The baseline of y2 is the siblings' r2 with the bonus it would bring after this y1: -α r1 is
    known before y2 is sampled, and cancels. So advantage2 = (1 + α) (r2 - siblings' mean r2).
    """
    advantages = [y[0].r - y[0].siblings]
    for one, two in pairwise(y):
        earned = two.r + bonus(one.r, two.r, alpha)
        expected = two.siblings + bonus(one.r, two.siblings, alpha)
        advantages.append(earned - expected)
    return (
        sum(map(reinforce, y, advantages))
        - beta1 * sum(map(kl_penalty, y))
    )  # fmt: skip


def single_turn_objective(y1: Scored, beta1: float) -> torch.Tensor:
    """Eq. 2 (ICLR) on y1 alone, with which SCoRe is compared (Table 4): --stage 0; (B,)."""
    return reinforce(y1, y1.r - y1.siblings) - beta1 * kl_penalty(y1)


def likelihood_objective(y2: Scored) -> torch.Tensor:
    """log π(y2 | x2) of traces with a right y2: STaR and Pair-SFT (baselines.py); (B,)."""
    return y2.logp.sum(dim=1)


def objective_of(stage: str, y: list[Scored], cfg: Config, beta2: float) -> torch.Tensor:
    """The objective of a stage; (B,)."""
    if stage == "2":
        return stage2_objective(y, cfg.beta1, cfg.alpha)
    if stage == "0":
        return single_turn_objective(y[0], cfg.beta1)
    if stage in SFT:
        return likelihood_objective(y[1])
    return stage1_objective(y, cfg.beta1, beta2)


# --- 5. One update ---------------------------------------------------------------------------


def next_log_probs(model, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
    """log π(· | all before) in float32, from last hidden states; (N, d) -> (N, V)."""
    return (models.head(model, hidden) / temperature).log_softmax(dim=-1)


def score_tokens(learner: Learner, hidden, ref_hidden, chosen: torch.Tensor):
    """logp of the chosen tokens (N,) and the KL where they were chosen; (N,) each."""
    temperature = learner.cfg.temperature
    log_probs = next_log_probs(learner.policy, hidden, temperature)
    with torch.no_grad():
        ref_log_probs = next_log_probs(learner.ref, ref_hidden, temperature)
    logp = log_probs.gather(1, chosen[:, None])[:, 0]
    return logp, kl_divergence(log_probs, ref_log_probs)


def score(learner: Learner, tokens: torch.Tensor, numbers: torch.Tensor):
    """logp, kl (0 outside attempts) and attempt number of each token, in one forward; (B, T) each.

    The vocabulary is spread out for attempt tokens only, a chunk at a time, and again in backward.
    """
    own, chosen = numbers[:, 1:], tokens[:, 1:]  # (B, T)
    counts = own > 0
    hidden = models.last_hidden(learner.policy, tokens)[:, :-1][counts]  # (N, d)
    with torch.no_grad():
        ref_hidden = models.last_hidden(learner.ref, tokens)[:, :-1][counts]
    size = max(1, LOGITS_AT_ONCE // learner.policy.config.vocab_size)
    chunks = (part.split(size) for part in (hidden, ref_hidden, chosen[counts]))
    score_chunk = partial(checkpoint, score_tokens, learner, use_reentrant=False)
    scores = list(map(score_chunk, *chunks))
    logp, kl = (torch.cat(parts) for parts in zip(*scores, strict=True))  # (N,)
    empty = torch.zeros(counts.shape, device=tokens.device)
    return empty.masked_scatter(counts, logp), empty.masked_scatter(counts, kl), own


def update(learner: Learner, episodes: list[Episode], stage: str, beta2: float) -> dict[str, float]:
    """One Adam step on a batch of fresh episodes; returns KL, gradient norm and on-policy gap."""
    if not episodes:  # no trace of repair in this batch
        return dict.fromkeys(("kl_t1", "kl_t2", "advantage", "grad_norm", "on_policy_gap"), 0.0)
    cfg, policy, device = learner.cfg, learner.policy, learner.policy.device
    rows = [transcript(episode, learner.chat) for episode in episodes]
    r = torch.tensor([[y.reward for y in episode.attempts] for episode in episodes], device=device)
    siblings = r  # likelihood has no baseline
    if stage not in SFT:
        siblings = torch.stack([leave_one_out(column, cfg.k) for column in r.unbind(dim=1)], dim=1)
    kls, gaps = [], []  # of this rank's episodes
    policy.train(bool(cfg.recompute))  # recomputes in training mode only; there is no dropout
    for batch, weight in ranks.deal(list(map(len, rows)), cfg.micro_tokens, micro_batches):
        logp, kl, own = score(learner, *collate([rows[i] for i in batch], device))
        y = [
            Scored(r[batch, i], siblings[batch, i], logp * (own == i + 1), kl * (own == i + 1))
            for i in range(r.shape[1])
        ]
        loss = -weight * objective_of(stage, y, cfg, beta2).sum() / len(episodes)
        loss.backward()
        if weight:
            kls += torch.stack([one.kl.sum(dim=1) for one in y], dim=1).tolist()  # B rows
        if weight and stage not in SFT:
            sampled = torch.tensor([x for i in batch for x in episodes[i].attempts[-1].logp])
            gaps.append((logp[own == len(y)].cpu() - sampled).abs().max().item())
    policy.eval()
    norm = ranks.whole(torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.clip))
    if not norm.isfinite():
        ranks.refuse("the gradient is no longer finite: begin anew with a lower --lr")
    learner.optimizer.step()
    learner.optimizer.zero_grad()  # sampling needs the memory
    sums = map(sum, zip(*ranks.gather(kls), strict=True))
    metrics = {f"kl_t{i}": total / len(episodes) for i, total in enumerate(sums, start=1)}
    metrics["advantage"] = (r - siblings)[:, -1].abs().mean().item()
    gap = max(ranks.gather(gaps), default=0.0)
    return metrics | {"grad_norm": norm.item(), "on_policy_gap": gap}


# --- 6. The loop -----------------------------------------------------------------------------


def train(learner: Learner, run: Run, progress: Progress) -> None:
    """Go through the stages from where `progress` stands; returns early if a signal came."""
    cfg, plan = learner.cfg, runs.plan_of(learner.cfg.stage)
    while progress.index < len(plan):
        stage, name = plan[progress.index]
        steps = cfg.steps2 if stage in ("2", *SFT) else cfg.steps1
        enter_stage(learner, run.folder, progress.index, progress.step)
        with tqdm(total=steps, initial=progress.step, desc=name, unit="step") as bar:
            while progress.step < steps:
                line = one_step(learner, run, progress, stage)
                run.signal = max(ranks.gather([run.signal]))  # for all, if one was told to stop
                bar.update()
                bar.set_postfix({key: f"{line[key]:.2f}" for key in ("acc_t1", "acc_t2", "copied")})
                window_full, last = progress.step % cfg.save_every == 0, progress.step == steps
                # the reward of a short last window is too noisy to choose by
                if window_full or (last and (steps < cfg.save_every or stage in SFT)):
                    keep_best(learner, run, progress, stage, name)
                if window_full or last or run.signal:
                    save(learner, run, progress)
                if run.signal:
                    return
        run.write_results(name, leave_stage(learner, run.folder, name))
        progress.index, progress.step, progress.best = progress.index + 1, 0, -1.0
        progress.beta2 = cfg.beta2
        save(learner, run, progress)


def one_step(learner: Learner, run: Run, progress: Progress, stage: str) -> dict:
    """Sample, judge, learn and log, once; returns the line of metrics.jsonl."""
    began, cfg, number = time.perf_counter(), learner.cfg, len(run.lines)
    batch = pick(learner.problems, cfg.batch // cfg.k, number, cfg.seed)
    name = f"{cfg.seed}/{number}"
    episodes = sample(learner, [p for p in batch for _ in range(cfg.k)], stage, name)
    lessons = traces(stage, episodes, cfg.k, name) if stage in SFT else episodes
    line = {"step": number, "stage": stage, **measure(episodes)}
    line |= {"learned": len(lessons) / len(episodes), "beta2": progress.beta2}
    line |= update(learner, lessons, stage, progress.beta2)
    if cfg.adaptive_beta2 and stage in ("1", "1b"):
        progress.beta2 = adapted(progress.beta2, line, cfg)
    progress.step += 1
    base = run.results["base, sampled"]
    line["alarms"] = runs.raise_alarms([*run.lines, line], base, progress, fresh=not cfg.init)
    line["seconds"] = time.perf_counter() - began
    shown = episodes[:: cfg.k][:4] if number % cfg.show_every == 0 else []
    title = f"step {number}, stage {stage}\n\n" if shown else ""
    run.log(line, title + "".join(map(as_text, shown)))
    return line


def sample(learner: Learner, problems: list[Problem], stage: str, seed: str) -> list[Episode]:
    """Fresh episodes of the policy; a share begins with the base's attempt 1."""
    cfg, attempts = learner.cfg, attempts_in(stage, learner.cfg)
    sampling = Sampling(attempts, cfg.max_new_tokens, cfg.temperature, seed, cfg.rows)
    split = round(cfg.offline * len(problems) / cfg.k) * cfg.k

    def attempt(model, problems, sampling, begun=()):
        part = ranks.share(len(problems), cfg.k)
        return ranks.gather(rollout(model, learner.chat, problems, sampling, begun, part))

    begun = []
    if split:
        ref = ranks.plain(learner.ref, learner.plain)
        begun = attempt(ref, problems[:split], replace(sampling, attempts=1))
    # after ref: there is one copy for both
    policy = learner.sampler or ranks.plain(learner.policy, learner.plain)
    continued = attempt(policy, problems[:split], sampling, begun) if split else []
    return continued + attempt(policy, problems[split:], sampling)


def keep_best(learner: Learner, run: Run, progress: Progress, stage: str, name: str) -> None:
    """Export the policy if its reward, over the steps since the last save, is the stage's best.

    NOT IN PAPER: "highest training reward" is read as that of the last attempt, smoothed over
    those steps; in single-turn RL as attempt 1's. SFT keeps the last: its sampler is another.
    """
    since = min(progress.step, learner.cfg.save_every)
    paid = "acc_t1" if stage == "0" else f"acc_t{attempts_in(stage, learner.cfg)}"
    reward = 0.0 if stage in SFT else sum(line[paid] for line in run.lines[-since:]) / since
    if reward >= progress.best:
        progress.best, policy = reward, ranks.plain(learner.policy, learner.plain)
        if ranks.rank() == 0:
            models.save_checkpoint(run.folder / name, policy, learner.chat.tokenizer)


def attempts_in(stage: str, cfg: Config) -> int:
    """How many attempts an episode of a stage has."""
    return {"1": 2, "1b": 3}.get(stage, cfg.attempts)


def adapted(beta2: float, line: dict, cfg: Config) -> float:
    """β2 of the next step: β2 KL(y1) is to become as large as the mean |advantage| of y2.

    Section 5.3 has an adaptive β2 "to balance the magnitudes" of both; the rule is NOT STATED. Here
    β2 changes by a tenth a step at most, and stays within a tenth and 10 times the flag's.
    """
    held = sum(line[f"kl_t{i}"] for i in range(1, attempts_in(line["stage"], cfg)))
    wanted = line["advantage"] / max(held, 1e-9)
    beta2 *= min(max(wanted / beta2, 1 / 1.1), 1.1)
    return min(max(beta2, cfg.beta2 / 10), cfg.beta2 * 10)


# --- 7. Main ---------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done or preempted, 2 bad input, 130 Ctrl-C."""
    try:
        with ranks.joined():
            typed = ranks.together(runs.parse_flags, Config, __doc__, argv)
            with runs.alone_in(Path(configure(typed).out)):
                return go(typed)
    except InputError as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before a step was made: nothing is lost", file=sys.stderr)
        return 130


def go(typed: dict) -> int:
    """Begin or resume a run, train, and say how it ended; returns the exit status."""
    began = time.perf_counter()
    learner, run, progress = (resume if "resume" in typed else begin)(typed, configure)
    run.stop_on_signals()
    train(learner, run, progress)
    cfg = learner.cfg
    if progress.index < len(runs.plan_of(cfg.stage)):
        print(f"stopped and saved after {len(run.lines)} steps; {runs.command(cfg, '--resume')}")
        return 0 if run.signal == signal.SIGTERM else 130
    table = as_table({name: row for name, row in run.results.items() if name != "base, sampled"})
    print(f"done in {time.perf_counter() - began:.0f} s; greedy on held-out problems:\n{table}")
    only_stage_1 = set(run.results) == {"base", "base, sampled", "stage1"}
    print("next:", runs.command(cfg, "--stage 2") if only_stage_1 else runs.evaluating(cfg))
    return 0


if __name__ == "__main__":
    ranks.leave(main())
