"""SCoRe: a language model learns to correct itself, by reinforcement on its own attempts.

    x1 ──▶ y1 ──▶ x2 = x1 y1 p1 ──▶ y2         p1: "there might be an error, rewrite the solution"
           │                        │
           r1 = r̂(y1, y*)           r2 = r̂(y2, y*)        1 if the answer is right, else 0

    the log-prob of a token is multiplied by   in y1     in y2               and KL costs
      Stage I   (Eq. 3)                        0         r2                  β2 on y1, β1 on y2
      Stage II  (Eq. 4 and the bonus)          r1        r2 + α (r2 - r1)    β1 on both
    each reward less its baseline, the mean of k - 1 siblings: samples of the same problem

    (Eq. 3)  max E[ r̂(y2, y*) - β2 KL(π(·|x1) ‖ π_ref(·|x1)) ]    and Eq. 2's β1 KL on y2
    (Eq. 4)  max E[ Σᵢ r̂(yᵢ, y*) - β1 KL(π(·|xᵢ) ‖ π_ref(·|xᵢ)) ]
    (bonus)  b̂(y2 | y1, y*) = α (r̂(y2, y*) - r̂(y1, y*)), added to r̂(y2, y*) of Eq. 4

π is the policy, π_ref the frozen base model, y* the true answer. Plain RL learns a better attempt 1
and then copies it. Stage I holds attempt 1 at the base model: reward can come only from what
attempt 2 changes. Stage II trains both; the bonus pays for wrong -> right and fines right -> wrong.
Credit is per attempt (γ = 0, appendix A.4): x2 is a given to y2, and y1 is never paid for r2 or the
bonus. With α = 10, a right y1 would be paid r1 - α r1 = -9.

    python score.py                 base model, Stage I and Stage II on column addition, on a CPU
    python score.py --stage 1       only Stage I; then --stage 2 goes on from there

Left out: a value model (siblings are the baseline), PPO's ratio and clipping (one update a batch,
so the ratio is 1), dividing by length or by the spread of rewards (it would cancel α). The loss is
no learning curve: only its gradient means something. Read data, rewards, sample and eval before.
"""

import argparse
import copy
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import runs
from data import Chat, InputError, Problem, load_problems, read_chat
from eval import as_table, as_text, evaluate, measure, reject
from runs import Progress, Run
from sample import Episode, Sampling, askable, rollout, seeded, segments
from sft import fit_builtin


def flag(default, words: str):
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Config:
    """All settings of a run. Defaults fit the built-in task; Table 8 is the paper's, for MATH."""

    stage: str = flag("1,2", "stages in order, such as 1 or 1,2,1,2")
    model: str = flag("builtin", "base model: builtin, a checkpoint folder or a hub name")
    init: str = flag("", "checkpoint folder to start the policy from (default: base, or Stage I)")
    task: str = flag("sums", "what to learn")
    out: str = flag("runs/sums", "run folder")
    seed: int = flag(0, "of base model, data order and sampling")
    steps1: int = flag(300, "updates in Stage I; split NOT STATED (Table 8: 3000 in all)")
    steps2: int = flag(50, "updates in Stage II")
    batch: int = flag(256, "episodes per step, k per problem (Table 8: 512 of NOT STATED)")
    k: int = flag(8, "samples per problem, at least 2; NOT STATED (RLOO's paper: 2 and 4)")
    lr: float = flag(2.5e-4, "Adam's learning rate (Table 8: 5e-6; a small model takes more)")
    alpha: float = flag(10.0, "weight of the bonus (Table 8: 10)")
    beta1: float = flag(0.01, "weight of the ordinary KL (Table 8: 0.01)")
    beta2: float = flag(0.1, "weight of Stage I's KL on attempt 1 (Table 8: 0.1)")
    offline: float = flag(0.0, "share of problems whose attempt 1 is the base's (section 5.3)")
    clip: float = flag(1.0, "largest gradient norm; NOT STATED, 1 is the custom")
    max_new_tokens: int = flag(10, "of one attempt; NOT STATED; a sum needs 9")
    micro_batch: int = flag(256, "episodes per forward pass; changes memory, not the result")
    save_every: int = flag(25, "steps between saves; the best of them is the stage's checkpoint")
    show_every: int = flag(25, "steps between transcripts in samples.txt")
    problems: int = flag(2000, "held-out problems in the table at the end")
    resume: bool = flag(False, "go on with the interrupted run in --out")


# Shapes: B episodes (k samples of a problem adjacent), T attempt columns, V vocabulary.
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


def stage1_objective(y1: Scored, y2: Scored, beta1: float, beta2: float) -> torch.Tensor:
    """Eq. 3 (ICLR): E[ r̂(y2, y*) - β2 KL(π(·|x1) ‖ π_ref(·|x1)) ], and Eq. 2's β1 KL on y2; (B,).

    y1 earns nothing: it is only held at the base model.
    """
    advantage2 = y2.r - y2.siblings
    return (
        reinforce(y2, advantage2)
        - beta2 * kl_penalty(y1)
        - beta1 * kl_penalty(y2)
    )  # fmt: skip


def stage2_objective(y1: Scored, y2: Scored, beta1: float, alpha: float) -> torch.Tensor:
    """Eq. 4 (ICLR): E[ Σᵢ r̂(yᵢ, y*) - β1 KL(π(·|xᵢ) ‖ π_ref(·|xᵢ)) ], r̂(y2) with the bonus; (B,).

    The baseline of y2 is the siblings' r2 with the bonus it would bring after this y1: -α r1 is
    known before y2 is sampled, and cancels. So advantage2 = (1 + α) (r2 - siblings' mean r2).
    """
    advantage1 = y1.r - y1.siblings
    advantage2 = (y2.r + bonus(y1.r, y2.r, alpha)) - (y2.siblings + bonus(y1.r, y2.siblings, alpha))
    return (
        reinforce(y1, advantage1) + reinforce(y2, advantage2)
        - beta1 * kl_penalty(y1)
        - beta1 * kl_penalty(y2)
    )  # fmt: skip


# --- 5. One update ---------------------------------------------------------------------------


@dataclass
class Learner:
    """The policy that learns, the frozen reference, Adam, the prompts' ids and the settings."""

    policy: torch.nn.Module
    ref: torch.nn.Module
    optimizer: torch.optim.Optimizer
    chat: Chat
    cfg: Config


def collate(episodes: list[Episode], chat: Chat, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the attempt each belongs to, 0 for those in no loss, padded right; (B, S) each.

    In no loss are prompts, instructions, a forced end token and a y1 that another policy sampled.
    Under causal attention nothing looks to the right, so the pads need no attention mask.
    """
    rows = []
    for episode in episodes:
        parts = segments(chat, episode.x1, episode.attempts)[:-1]  # no prompt after the last
        own = {1: 0} if episode.offline else {}
        rows.append([(token, own.get(n, n)) for tokens, n in parts for token in tokens])
    width = max(map(len, rows))
    pairs = torch.tensor([row + [(0, 0)] * (width - len(row)) for row in rows], device=device)
    return pairs[..., 0], pairs[..., 1]


def next_log_probs(model, tokens: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """float32 log-probs of the tokens at `columns` (T,) given all before them; (B, T, V)."""
    logits = model(input_ids=tokens, use_cache=False, logits_to_keep=columns - 1).logits
    return logits.float().log_softmax(dim=-1)


def score(learner: Learner, tokens: torch.Tensor, numbers: torch.Tensor):
    """logp and kl (B, T), and the attempt number of each (B, T): one forward for both attempts."""
    columns = (numbers > 0).any(dim=0).nonzero()[:, 0]  # (T,)
    log_probs = next_log_probs(learner.policy, tokens, columns)  # (B, T, V)
    with torch.no_grad():
        ref_log_probs = next_log_probs(learner.ref, tokens, columns)
    logp = log_probs.gather(2, tokens[:, columns, None])[..., 0]
    return logp, kl_divergence(log_probs, ref_log_probs), numbers[:, columns]


def update(learner: Learner, episodes: list[Episode], stage: int) -> dict[str, float]:
    """One Adam step on a batch of fresh episodes; returns KL, gradient norm and on-policy gap."""
    cfg, device = learner.cfg, learner.policy.device
    tokens, numbers = collate(episodes, learner.chat, device)  # (B, S)
    r = torch.tensor([[y.reward for y in episode.attempts] for episode in episodes], device=device)
    siblings = torch.stack([leave_one_out(column, cfg.k) for column in r.unbind(dim=1)], dim=1)
    learner.optimizer.zero_grad()
    kls, logps = [], []
    for rows in torch.arange(len(episodes), device=device).split(cfg.micro_batch):
        logp, kl, own = score(learner, tokens[rows], numbers[rows])
        y1, y2 = (
            Scored(r[rows, i], siblings[rows, i], logp * (own == i + 1), kl * (own == i + 1))
            for i in range(2)
        )
        if stage == 1:
            objective = stage1_objective(y1, y2, cfg.beta1, cfg.beta2)
        else:
            objective = stage2_objective(y1, y2, cfg.beta1, cfg.alpha)
        loss = -objective.sum() / len(episodes)
        loss.backward()
        kls.append(torch.stack([y1.kl.sum(dim=1), y2.kl.sum(dim=1)]).detach())  # (2, B)
        logps.append(y2.logp.detach().sum(dim=1))  # (B,)
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), cfg.clip)
    learner.optimizer.step()
    kl_t1, kl_t2 = torch.cat(kls, dim=1).mean(dim=1).tolist()
    sampled = torch.tensor([sum(episode.attempts[1].logp) for episode in episodes], device=device)
    gap = (torch.cat(logps) - sampled).abs().max().item()
    return {"kl_t1": kl_t1, "kl_t2": kl_t2, "grad_norm": norm.item(), "on_policy_gap": gap}


# --- 6. The loop -----------------------------------------------------------------------------


def train(learner: Learner, run: Run, progress: Progress) -> None:
    """Go through the stages from where `progress` stands; returns early if a signal came."""
    cfg, plan = learner.cfg, runs.plan_of(learner.cfg.stage)
    sampling = Sampling(2, cfg.max_new_tokens)
    problems = askable(load_problems(cfg.task, "train"), learner.policy, learner.chat, sampling)
    while progress.index < len(plan):
        stage, name = plan[progress.index]
        steps = cfg.steps1 if stage == 1 else cfg.steps2
        with tqdm(total=steps, initial=progress.step, desc=name, unit="step") as bar:
            while progress.step < steps:
                line = one_step(learner, run, progress, problems, stage)
                bar.update()
                bar.set_postfix({key: f"{line[key]:.2f}" for key in ("acc_t1", "acc_t2", "copied")})
                window_full, last = progress.step % cfg.save_every == 0, progress.step == steps
                if window_full or (last and steps < cfg.save_every):
                    keep_best(learner, run, progress, name)
                if window_full or last or run.stopping:
                    save(learner, run, progress)
                if run.stopping:
                    return
        finish_stage(learner, run, progress, name)


def one_step(learner: Learner, run: Run, progress: Progress, problems, stage: int) -> dict:
    """Sample, judge, learn and log, once; returns the line of metrics.jsonl."""
    began, cfg, number = time.perf_counter(), learner.cfg, len(run.lines)
    batch = pick(problems, cfg.batch // cfg.k, number, cfg.seed)
    episodes = sample(learner, [p for p in batch for _ in range(cfg.k)], f"{cfg.seed}/{number}")
    line = {"step": number, "stage": stage, **measure(episodes), **update(learner, episodes, stage)}
    progress.step += 1
    base = run.results["base, sampled"]
    line["alarms"] = runs.raise_alarms([*run.lines, line], base, progress, fresh=not cfg.init)
    line["seconds"] = time.perf_counter() - began
    shown = episodes[:: cfg.k][:4] if number % cfg.show_every == 0 else []
    title = f"step {number}, stage {stage}\n\n" if shown else ""
    run.log(line, title + "".join(map(as_text, shown)))
    return line


def pick(problems: list[Problem], count: int, number: int, seed: int) -> list[Problem]:
    """The `count` problems of step `number`: every epoch is a new shuffle of all problems."""
    picked, orders = [], {}
    for position in range(number * count, (number + 1) * count):
        epoch, index = divmod(position, len(problems))
        if epoch not in orders:
            orders[epoch] = torch.randperm(len(problems), generator=seeded(f"{seed}/{epoch}"))
        picked.append(problems[int(orders[epoch][index])])
    return picked


def sample(learner: Learner, problems: list[Problem], seed: str) -> list[Episode]:
    """Fresh episodes of the policy, at temperature 1; a share begins with the base's attempt 1."""
    cfg, chat = learner.cfg, learner.chat
    sampling = Sampling(2, cfg.max_new_tokens, temperature=1.0, seed=seed)
    split = round(cfg.offline * len(problems) / cfg.k) * cfg.k
    begun = rollout(learner.ref, chat, problems[:split], replace(sampling, attempts=1))
    continued = rollout(learner.policy, chat, problems[:split], sampling, begun)
    return continued + rollout(learner.policy, chat, problems[split:], sampling)


def keep_best(learner: Learner, run: Run, progress: Progress, name: str) -> None:
    """Export the policy if acc@t2, over the steps since the last save, is the stage's best.

    NOT IN PAPER: "highest training reward" is read as attempt 2's, smoothed over those steps.
    """
    since = min(progress.step, learner.cfg.save_every)
    reward = sum(line["acc_t2"] for line in run.lines[-since:]) / since
    if reward >= progress.best:
        progress.best = reward
        runs.save_checkpoint(run.folder / name, learner.policy, learner.chat.tokenizer)


def finish_stage(learner: Learner, run: Run, progress: Progress, name: str) -> None:
    """Go back to the stage's best checkpoint, evaluate it, and let the next stage begin from it."""
    best, _ = runs.load_checkpoint(str(run.folder / name))
    learner.policy.load_state_dict(best.state_dict())
    learner.optimizer = adam(learner.policy, learner.cfg)
    run.write_results(name, held_out(learner.policy, learner.chat, learner.cfg, temperature=0.0))
    progress.index, progress.step, progress.best = progress.index + 1, 0, -1.0
    save(learner, run, progress)


# --- 7. Begin, resume, main ------------------------------------------------------------------


def adam(policy, cfg: Config) -> torch.optim.Adam:
    return torch.optim.Adam(policy.parameters(), lr=cfg.lr)


def held_out(model, chat: Chat, cfg: Config, temperature: float) -> dict[str, float]:
    sampling = Sampling(2, cfg.max_new_tokens, temperature, seed="held out")
    return evaluate(model, chat, load_problems(cfg.task, "test", cfg.problems), sampling)[1]


def save(learner: Learner, run: Run, progress: Progress) -> None:
    weights = {"policy": learner.policy.state_dict(), "optimizer": learner.optimizer.state_dict()}
    runs.save_state(run, {**weights, "progress": asdict(progress), "stage": learner.cfg.stage})


def begin(typed: dict) -> tuple[Learner, Run, Progress]:
    """A new run, or Stage II after a finished Stage I with its settings; nothing is overwritten."""
    folder = Path(typed.get("out", Config.out))
    followed = runs.settings_to_follow(folder, typed)
    cfg, run, init = Config(**{**followed, **typed}), Run(folder), typed.get("init", "")
    runs.check_settings(cfg)
    record = runs.read_json(folder / "config.json")
    if followed:
        run.lines = runs.read_metrics(folder / "metrics.jsonl")
        run.results = runs.read_json(folder / "results.json")
        init = init or str(folder / "stage1")
    elif runs.plan_of(cfg.stage)[0][0] == 2 and not init:
        raise InputError(
            f"--stage 2 needs a Stage I, and --out {cfg.out} has none: run --stage 1 first, "
            "or name a checkpoint with --init"
        )
    policy = runs.load_checkpoint(init)[0] if init else None
    same_base = bool(followed) or record.get("settings", {}).get("seed") == cfg.seed
    learner = build(cfg, policy, same_base)
    if not run.results:
        for name, temperature in (("base", 0.0), ("base, sampled", 1.0)):
            run.write_results(name, held_out(learner.ref, learner.chat, cfg, temperature))
    save(learner, run, Progress())
    runs.write_atomically(folder / "config.json", runs.describe(asdict(cfg), record))
    return learner, run, Progress()


def resume(typed: dict) -> tuple[Learner, Run, Progress]:
    """The run in --out as it was last saved; its own settings hold, so no other flag may differ."""
    folder = Path(typed.get("out", Config.out))
    cfg = Config(**{**runs.read_settings(folder, typed), "out": str(folder)})
    run, state = runs.load_state(folder)
    if state["stage"] != cfg.stage:
        raise InputError(f"the run in {folder} was killed before --stage 2 began: type that again")
    learner = build(cfg, None, same_base=True)
    learner.policy.load_state_dict(state["policy"])
    learner.optimizer.load_state_dict(state["optimizer"])
    return learner, run, Progress(**state["progress"])


def build(cfg: Config, policy, same_base: bool) -> Learner:
    """Load (or fit) the base model as reference, and the policy, which begins as its copy."""
    base = Path(cfg.out) / "base"
    if cfg.model != "builtin":
        ref, tokenizer = runs.load_checkpoint(cfg.model)
    elif same_base and base.exists():
        ref, tokenizer = runs.load_checkpoint(str(base))
    else:
        ref, tokenizer = fit_builtin(cfg.seed)
        runs.save_checkpoint(base, ref, tokenizer)
    shapes = [[p.shape for p in model.parameters()] for model in (policy or ref, ref)]
    if shapes[0] != shapes[1]:
        raise InputError(f"--init {cfg.init} has another architecture than the base {cfg.model}")
    chat = read_chat(tokenizer, ref, cfg.task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ref = ref.to(device).eval().requires_grad_(False)
    policy = (policy or copy.deepcopy(ref)).to(device).eval().requires_grad_(True)
    return Learner(policy, ref, adam(policy, cfg), chat, cfg)


def parse_flags(argv: list[str] | None) -> dict:
    """The flags that were given, by name; defaults are left to Config."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = reject
    for item in fields(Config):
        words = f"{item.metadata['help']} (default: {item.default})".replace("%", "%%")
        kind = {"action": "store_true"} if item.default is False else {"type": type(item.default)}
        parser.add_argument(runs.as_flag(item.name), default=argparse.SUPPRESS, help=words, **kind)
    return vars(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 bad input, 130 stopped by a signal."""
    began = time.perf_counter()
    try:
        typed = parse_flags(argv)
        learner, run, progress = resume(typed) if "resume" in typed else begin(typed)
        run.stop_on_signals()
        train(learner, run, progress)
    except InputError as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before a step was made: nothing is lost, nothing was saved", file=sys.stderr)
        return 130
    plan = runs.plan_of(learner.cfg.stage)
    where = "" if learner.cfg.out == Config.out else f" --out {learner.cfg.out}"
    if progress.index < len(plan):
        print(f"stopped and saved after {len(run.lines)} steps; python score.py --resume{where}")
        return 130
    table = as_table({name: row for name, row in run.results.items() if name != "base, sampled"})
    print(f"done in {time.perf_counter() - began:.0f} s; greedy on held-out problems:\n{table}")
    evaluating = f"python eval.py --model {run.folder}/{plan[-1][1]}, or --plot {run.folder}"
    print("next:", evaluating if "stage2" in run.results else f"python score.py --stage 2{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
