"""What SCoRe is compared with, and its options: STaR, Pair-SFT, Self-Refine, three attempts."""

import copy
import itertools
import json
import zlib
from dataclasses import replace

import pytest
import torch
from gemma import FILES, gemma_model, gemma_tokenizer
from test_runs import SMALL, assert_equal, interrupt_at, run_score, signals, tree  # noqa: F401
from test_score import gradient, learner, with_rewards  # noqa: F401

import eval as evaluation
import learner as learners
import runs
import score
from baselines import traces
from data import Problem
from models import load_checkpoint, save_checkpoint
from sample import Attempt, Episode, Sampling, rollout, transcript
from score import Config, Scored, adapted, kl_divergence, leave_one_out
from sft import negative_log_likelihood
from tasks import CODE_FEEDBACK, MATH_FEEDBACK, MATH_REFINE, TASKS, load_problems, refining

# --- 1. The data of STaR and Pair-SFT ----------------------------------------------------------


def attempt(text, right):
    return Attempt([ord(text)], [0.0], text, True, float(right))


def episode(problem, one, two):
    return Episode(problem, [1], (one, two))


ONE, OTHER = Problem("1", "", "sums", "one"), Problem("2", "", "sums", "other")
SAMPLED = [
    episode(ONE, attempt("a", 0), attempt("b", 1)),
    episode(ONE, attempt("c", 1), attempt("d", 1)),
    episode(ONE, attempt("e", 1), attempt("f", 0)),
    episode(ONE, attempt("g", 0), attempt("h", 0)),
    episode(OTHER, attempt("i", 0), attempt("j", 0)),
    episode(OTHER, attempt("k", 0), attempt("l", 0)),
    episode(OTHER, attempt("m", 0), attempt("n", 0)),
    episode(OTHER, attempt("o", 0), attempt("p", 0)),
]


def texts(found):
    return ["".join(y.text for y in e.attempts) for e in found]


def test_star_takes_wrong_then_right_of_one_trajectory_and_with_plus_right_then_right_too():
    assert texts(traces("star", SAMPLED, 4, "0")) == ["ab"]
    assert texts(traces("star+", SAMPLED, 4, "0")) == ["ab", "cd"]


def test_pair_sft_joins_wrong_first_attempts_with_any_right_attempt_at_the_same_problem():
    drawn = [texts(traces("pair", SAMPLED, 4, str(seed))) for seed in range(200)]
    assert all([pair[0] for pair in found] == ["a", "g"] for found in drawn)
    counts = {c: sum(found[1][1] == c for found in drawn) for c in "bcde"}  # b, d: attempts 2
    assert sum(counts.values()) == 200 and all(30 < n < 70 for n in counts.values())
    plus = [texts(traces("pair+", SAMPLED, 4, str(seed))) for seed in range(20)]
    assert all([pair[0] for pair in found] == ["a", "c", "e", "g"] for found in plus)
    assert traces("pair", SAMPLED[4:], 4, "0") == []  # where no attempt is right


def test_the_pool_of_a_problem_is_its_own(chat):
    swapped = SAMPLED[4:] + SAMPLED[:4]
    assert texts(traces("pair", swapped, 4, "0"))[0][0] == "a"
    for found in traces("pair+", SAMPLED, 4, "0"):
        numbers = [number for _, number in transcript(found, chat)]
        assert 1 not in numbers and 2 in numbers  # y1 is in no loss


def test_an_update_of_sft_is_the_gradient_of_the_likelihood_of_y2(learner, problems):  # noqa: F811
    made = score.sample(learner, [p for p in problems for _ in range(4)], "star", "0")
    paid = [with_rewards(e, [0, number % 3 == 0]) for number, e in enumerate(made)]
    lessons = traces("star", paid, 4, "0")
    assert 3 < len(lessons) < len(made)
    found, metrics = gradient(learner, lessons, "star")
    policy = copy.deepcopy(learner.policy)
    rows = []
    for lesson in lessons:
        row = transcript(lesson, learner.chat)
        rows.append([(token, number == 2) for token, number in row])
    tokens = sum(taught for row in rows for _, taught in row)
    loss = negative_log_likelihood(policy, rows) * tokens / len(lessons)  # of an episode
    expected = torch.autograd.grad(loss, policy.parameters())
    scale = max(g.abs().max() for g in expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * float(scale))
    assert metrics["on_policy_gap"] == 0  # there is no policy to be on


def test_a_batch_without_a_trace_changes_nothing(learner):  # noqa: F811
    before = copy.deepcopy(learner.policy.state_dict())
    metrics = score.update(learner, [], "star", 0.1)
    assert set(metrics.values()) == {0.0}
    after = learner.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- 2. Their runs -----------------------------------------------------------------------------


@pytest.fixture
def rewarding(monkeypatch):
    """Let the bits of an attempt decide what is right, so that a random model leaves traces."""
    sums = TASKS["sums"]
    fair = replace(sums, rewards=lambda texts, _: [zlib.crc32(t.encode()) % 2.0 for t in texts])
    monkeypatch.setitem(TASKS, "sums", fair)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_each_iteration_of_star_samples_the_one_before_and_learns_from_the_start_anew(
    checkpoint, tmp_path, monkeypatch, rewarding
):
    out, first = tmp_path / "run", tmp_path / "first"
    one_step, starts = score.one_step, {}

    def watched(its, run, progress, stage):
        if progress.step == 0 and run.folder == out:
            starts[progress.index] = weights(its.policy), weights(its.sampler)
        return one_step(its, run, progress, stage)

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, *SMALL, "--lr", "0.01"]
    assert run_score(*flags, "--stage", "1", "--steps1", 1, "--out", first) == 0
    init = first / "stage1"
    plan = "star,star,pair"
    assert run_score(*flags, "--init", init, "--stage", plan, "--out", out) == 0
    made = {name: weights(load_checkpoint(str(out / name))[0]) for name in ("star", "star-2")}
    begun = weights(load_checkpoint(str(init))[0])
    assert not equal(made["star"], begun) and not equal(made["star-2"], made["star"])
    assert equal(starts[0][0], begun) and equal(starts[0][1], begun)
    assert equal(starts[1][0], begun) and equal(starts[1][1], made["star"])
    assert equal(starts[2][0], made["star-2"]) and equal(starts[2][1], made["star-2"])
    lines = tree(out)["lines"]
    assert [line["stage"] for line in lines] == ["star"] * 6 + ["pair"] * 3  # steps2 of each
    assert all(0 < line["learned"] < 1 for line in lines)
    assert set(tree(out)["results"]) == {"base", "base, sampled", "star", "star-2", "pair"}


def test_the_last_checkpoint_of_sft_is_kept_even_off_the_saving_grid(
    checkpoint, tmp_path, monkeypatch, rewarding
):
    one_step, steps = score.one_step, []

    def watched(its, *rest):
        line = one_step(its, *rest)
        steps.append(weights(its.policy))
        return line

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, "--out", tmp_path, *SMALL, "--stage", "pair", "--lr", "0.01"]
    assert run_score(*flags) == 0  # 3 steps, saved every 2
    kept = weights(load_checkpoint(str(tmp_path / "pair"))[0])
    assert equal(kept, steps[2]) and not equal(kept, steps[1])


@pytest.mark.parametrize("plan", ["star,star", "1,1b,2"])
def test_an_interrupted_run_of_any_stages_goes_on_bit_for_bit(
    plan, checkpoint, tmp_path, monkeypatch, rewarding
):
    flags = ["--model", checkpoint, *SMALL, "--steps1", 3, "--steps2", 3, "--stage", plan]
    flags += ["--lr", "0.01"]
    flags += ["--attempts", 3] if "1b" in plan else []
    assert run_score(*flags, "--out", tmp_path / "whole") == 0
    for step in (2, 5):  # at the end of a stage, and after a save within the second
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:

            def interrupt():
                raise RuntimeError("a bug, or a full disk")

            interrupt_at(patch, step, interrupt)
            with pytest.raises(RuntimeError):
                run_score(*flags, "--out", out)
        assert run_score("--resume", "--out", out) == 0
        assert_equal(tree(out), tree(tmp_path / "whole"))


# --- 3. Three attempts, and β2 that adapts -----------------------------------------------------

R = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)  # of one-token attempts
ROLLOUTS = torch.tensor(list(itertools.product(range(3), repeat=3)))  # 27


def three_attempts(stage, k=2):
    """Expected gradients of equation and surrogate for 3 tokens, 1 token an attempt, 3 attempts."""
    make = torch.Generator().manual_seed(5)
    shapes = [(3,), (3, 3), (3, 3, 3)]
    policy, ref = (
        [torch.randn(s, generator=make, dtype=torch.float64, requires_grad=True) for s in shapes]
        for _ in range(2)
    )
    ours, its = ([logits.log_softmax(-1) for logits in one] for one in (policy, ref))
    its = [table.detach() for table in its]
    p1, p2, p3 = (table.exp() for table in ours)
    kl1, kl2, kl3 = ((a.exp() * (a - b)).sum(-1) for a, b in zip(ours, its, strict=True))
    before2, before3 = p1.detach(), (p1[:, None] * p2).detach()  # y1, and y1 y2, as givens
    beta1, beta2, alpha = 0.3, 0.7, 10.0
    if stage == "1b":
        value = (before3 * (p3 @ R - beta1 * kl3)).sum() - beta2 * (before2 @ kl2 + kl1)
    else:
        paid2 = R[None, :] + alpha * (R[None, :] - R[:, None])  # (y1, y2), and (y2, y3)
        value = p1 @ R - beta1 * kl1 + before2 @ ((p2 * paid2).sum(1) - beta1 * kl2)
        value = value + (before3 * ((p3 * paid2[None]).sum(2) - beta1 * kl3)).sum()
    expected = torch.autograd.grad(value, policy, retain_graph=True)

    a, b, c = ROLLOUTS.T
    logp = [ours[0][a], ours[1][a, b], ours[2][a, b, c]]
    kl = [
        kl_divergence(ours[0], its[0]).expand(27),
        kl_divergence(ours[1], its[1])[a],
        kl_divergence(ours[2], its[2])[a, b],
    ]
    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    rows, probability = pairs.flatten(), sum(logp).exp().detach()[pairs].prod(dim=1)
    y = []
    for i in range(3):
        r = R[ROLLOUTS[rows, i]]
        y.append(Scored(r, leave_one_out(r, k), logp[i][rows, None], kl[i][rows, None]))
    cfg = Config(beta1=beta1, alpha=alpha)
    objective = score.objective_of(stage, y, cfg, beta2)
    actual = torch.autograd.grad(probability @ objective.view(-1, k).mean(dim=1), policy)
    return expected, actual


@pytest.mark.parametrize("stage", ["1b", "2"])
def test_the_gradient_with_three_attempts_is_that_of_the_equations(stage):
    for one, two in zip(*three_attempts(stage), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)
        assert one.abs().max() > 1e-3


def test_stage_1b_teaches_attempt_3_and_is_held_at_the_model_of_stage_1a(
    checkpoint, tmp_path, monkeypatch, capsys
):
    one_step, refs = score.one_step, {}

    def watched(its, run, progress, stage):
        refs.setdefault(stage, weights(its.ref))
        line = one_step(its, run, progress, stage)
        assert ("acc_t3" in line) == (stage != "1") == ("kl_t3" in line)
        return line

    monkeypatch.setattr(score, "one_step", watched)
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--lr", "0.01"]
    assert run_score(*flags, "--stage", "1,1b,2", "--attempts", 3, "--steps1", 2) == 0
    base = weights(load_checkpoint(str(checkpoint))[0])
    taught = weights(load_checkpoint(str(tmp_path / "run" / "stage1"))[0])
    assert equal(refs["1"], base) and equal(refs["2"], base) and equal(refs["1b"], taught)
    assert not equal(base, taught)
    assert "acc@t1  acc@t2  acc@t3   delta" in capsys.readouterr().out
    results = tree(tmp_path / "run")["results"]
    assert list(results) == ["base", "base, sampled", "stage1", "stage1b", "stage2"]
    assert all("acc_t3" in metrics for metrics in results.values())


def test_beta2_follows_the_ratio_of_reward_and_kl_by_a_tenth_a_step_within_bounds():
    cfg = Config(beta2=0.1)
    for beta2, advantage, kl, expected in (
        (0.1, 0.21, 2.0, 0.105),  # 0.105 x 2.0 = 0.21: of one size
        (0.1, 0.5, 2.0, 0.11),  # wanted 0.25: a tenth more
        (0.1, 0.1, 2.0, 0.1 / 1.1),  # wanted 0.05
        (0.1, 0.3, 0.0, 0.11),  # a policy that is still the base
        (0.99, 0.5, 0.01, 1.0),  # ten times the flag's
        (0.0105, 0.0, 2.0, 0.01),
    ):
        line = {"stage": "1", "advantage": advantage, "kl_t1": kl, "kl_t2": 99.0}
        assert adapted(beta2, line, cfg) == pytest.approx(expected)
        both = {**line, "stage": "1b", "kl_t1": kl / 4, "kl_t2": 3 * kl / 4, "kl_t3": 99.0}
        assert adapted(beta2, both, cfg) == pytest.approx(expected)


def test_an_adaptive_beta2_is_logged_used_and_resumed(checkpoint, tmp_path, monkeypatch):
    flags = ["--model", checkpoint, *SMALL, "--stage", "1,1,2", "--adaptive-beta2"]
    used, objective = [], score.stage1_objective

    def watched(y, beta1, beta2):
        used.append(beta2)
        return objective(y, beta1, beta2)

    monkeypatch.setattr(score, "stage1_objective", watched)
    assert run_score(*flags, "--out", tmp_path / "whole") == 0
    logged = [line["beta2"] for line in tree(tmp_path / "whole")["lines"]]
    assert logged[0] == 0.1 == logged[5] and len(set(logged)) > 2 and used == logged[:10]
    assert logged[10:] == [0.1] * 3  # Stage II has none
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, lambda: (_ for _ in ()).throw(RuntimeError()))
        with pytest.raises(RuntimeError):
            run_score(*flags, "--out", tmp_path / "two")
    assert run_score("--resume", "--out", tmp_path / "two") == 0
    assert [line["beta2"] for line in tree(tmp_path / "two")["lines"]] == logged


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage", "1,1b,2"], "--attempts 2 is too few"),
        (["--attempts", "1"], "--attempts 1 is too few"),
        (["--stage", "star", "--attempts", "3"], "--attempts 3 is for stages 1, 1b and 2"),
        (["--stage", "0", "--offline", "0.5"], "--offline 0.5 is for stages 1 and 2"),
        (["--stage", "1,1b", "--attempts", "3", "--offline", "1"], "is for stages 1 and 2"),
        (["--adaptive-beta2", "--beta2", "0"], "--adaptive-beta2 is for Stage I with a --beta2"),
        (["--adaptive-beta2", "--stage", "pair"], "--adaptive-beta2 is for Stage I"),
        (["--stage", "1b", "--attempts", "3"], "needs a Stage I"),
        (["--stage", "stars"], "--stage stars is unknown"),
    ],
)
def test_stages_that_cannot_work_are_one_sentence(flags, words, checkpoint, tmp_path, capsys):
    assert run_score("--model", checkpoint, "--out", tmp_path / "run", *SMALL, *flags) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_stage_2_goes_on_from_the_last_stage_of_a_run_in_parts(
    checkpoint, tmp_path, monkeypatch, rewarding
):
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--lr", "0.01"]
    assert run_score(*flags, "--stage", "1,1b", "--attempts", 3) == 0
    one_step, begun = score.one_step, []

    def watched(its, *rest):
        begun.append(weights(its.policy))
        return one_step(its, *rest)

    monkeypatch.setattr(score, "one_step", watched)
    assert run_score("--stage", "2", "--out", tmp_path / "run") == 0
    assert equal(begun[0], weights(load_checkpoint(str(tmp_path / "run" / "stage1b"))[0]))
    assert not equal(begun[0], weights(load_checkpoint(str(tmp_path / "run" / "stage1"))[0]))
    assert "acc_t3" in tree(tmp_path / "run")["results"]["stage2"]
    cfg, run, init, _ = runs.begin(
        {"out": str(tmp_path / "other"), "stage": "star", "model": str(checkpoint)}, score.configure
    )
    assert init == "" and learners.checkpoint_before(cfg, run.folder, 0) == str(checkpoint)


# --- 4. Self-Refine ----------------------------------------------------------------------------


def test_self_refine_asks_for_feedback_and_then_for_attempt_2():
    tokenizer = gemma_tokenizer()
    chat = refining(tokenizer, gemma_model(tokenizer), "math")
    turn = "\n<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
    code = refining(tokenizer, gemma_model(tokenizer), "code")
    for asked, words in (
        (chat.after(1), MATH_FEEDBACK),
        (chat.after(2), MATH_REFINE),
        (code.after(1), CODE_FEEDBACK),
    ):
        assert asked == tokenizer(turn.format(words), add_special_tokens=False).input_ids
    problems = load_problems("math", "train", 2, str(FILES))
    model = gemma_model(tokenizer).eval()
    episodes = rollout(model, chat, problems, Sampling(3, 4, 0.0))
    for made in episodes:  # the third answer follows all that was said, token for token
        context = list(made.x1)
        for number, answer in enumerate(made.attempts, start=1):
            with torch.no_grad():
                logits = model(torch.tensor([context]), use_cache=False).logits
            assert answer.tokens[0] == logits[0, -1].argmax().item()
            closing = [] if answer.finished else [chat.close_id]
            context += answer.tokens + closing + chat.after(number)


def test_self_refine_measures_both_attempts_and_keeps_the_feedback(tmp_path, capsys):
    model, small = tmp_path / "model", gemma_tokenizer()
    save_checkpoint(model, gemma_model(small), small)
    asked = ["--model", model, "--task", "math", "--data", FILES, "--max-new-tokens", 40]
    asked += ["--problems", 4, "--precision", "float32"]
    assert evaluation.main([*map(str, asked), "--refine"]) == 0
    folder = tmp_path / "model" / "eval-refine"
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").open()]
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert len(rows) == 4 and all(row["feedback"] and len(row["attempts"]) == 2 for row in rows)
    assert metrics["acc_t2"] == sum(row["attempts"][1]["reward"] for row in rows) / 4
    loaded, tokenizer = load_checkpoint(str(model))
    problems = load_problems("math", "test", 4, str(FILES))
    chat = refining(tokenizer, loaded, "math")
    for row, made in zip(rows, rollout(loaded, chat, problems, Sampling(3, 40, 0.0)), strict=True):
        one, said, two = made.attempts
        assert [y["tokens"] for y in row["attempts"]] == [one.tokens, two.tokens]
        assert row["feedback"] == said.text and said.tokens != two.tokens
    assert "acc_t3" not in metrics
    for wrong in (["--attempts", "3"], ["--samples", "2"], ["--repair"]):
        assert evaluation.main([*map(str, asked), "--refine", *wrong]) == 2
        assert "--refine goes with neither" in capsys.readouterr().err
