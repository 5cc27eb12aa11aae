"""The built-in base model, and the data and updates of STaR and Pair-SFT."""

import copy
import random
from collections import Counter

import pytest
import torch
from conftest import make_model
from test_score import gradient, learner, with_rewards  # noqa: F401

import score
import sft
from data import COLUMNS, Problem, add_columns
from sample import Attempt, Episode, transcript
from score import STAGES
from sft import (
    PHASES,
    Phase,
    add_shortsightedly,
    builtin_tokenizer,
    columns_of,
    draw,
    draw_later,
    fit_builtin,
    negative_log_likelihood,
)
from tasks import load_problems, read_chat


@pytest.fixture
def builtin_chat():
    return read_chat(builtin_tokenizer(), make_model(0), "sums")


@pytest.mark.parametrize(
    ("reach", "digits"),
    [(0, "3 9 9 2"), (1, "3 9 0 2"), (2, "3 0 0 2"), (3, "4 0 0 2"), (9, "4 0 0 2")],
)
def test_only_carries_that_start_within_reach_are_seen(reach, digits):
    assert add_shortsightedly([(1, 2), (4, 5), (9, 0), (4, 8)], reach) == digits


def test_an_attempt_that_sees_all_columns_is_right():
    for problem in load_problems("sums", "train", 50):
        columns = columns_of(problem)
        assert add_shortsightedly(columns, COLUMNS) == problem.answer == add_columns(columns)


def test_transcripts_are_laid_out_as_the_chat_does_and_only_attempts_are_taught(builtin_chat):
    chat, rng = builtin_chat, random.Random(0)
    problem = load_problems("sums", "train", 1)[0]
    for rewrites, length in ((0.0, 2), (1.0, COLUMNS + 2)):  # all `ok`, or all `no` and digits
        drawn = draw(chat, problem, Phase(1, (4,), slow=0.5, right=0.0, slip=rewrites), 4, rng)
        tokens, taught = map(list, zip(*drawn, strict=True))
        x1 = chat.x1(problem)
        assert tokens[: len(x1)] == x1
        again = [False] * len(chat.p1) + [True] * length
        first = [False] * len(x1) + [True] * (COLUMNS + 2)
        assert taught == first + again * 3
        assert tokens.count(chat.close_id) == 4


@pytest.mark.parametrize("phase", PHASES)
def test_attempts_are_drawn_in_the_shares_of_the_phase(phase, builtin_chat):
    rng, n = random.Random(0), 4000
    problems = [p for p in load_problems("sums", "train", 400) if int(p.level) > 1]
    later = [draw_later(p, phase, rng) == f"no {p.answer}" for p in rng.choices(problems, k=n)]
    assert sum(later) / n == pytest.approx(phase.right, abs=0.02)
    words = Counter()
    for problem in rng.choices(problems, k=n):
        drawn = draw(builtin_chat, problem, phase, 3, rng)
        attempts = builtin_chat.tokenizer.decode([token for token, taught in drawn if taught])
        first, *others = attempts.split(" <end>")[:3]
        words.update([first.split()[0], *(other.split()[0] for other in others)])
        carries_lost = first.split()[1:] != problem.answer.split()
        assert carries_lost or first.startswith("slow")  # `fast` loses every carry
    assert words["slow"] / n == pytest.approx(phase.slow, abs=0.03)
    rewritten = words["no"] / n / 2
    assert rewritten == pytest.approx(phase.right + phase.slip, abs=0.03)
    assert set(words) == {"fast", "slow", "no", "ok"}


def test_a_slip_is_a_wrong_carry_into_one_column():
    rng, slips = random.Random(0), set()
    problem = load_problems("sums", "train", 1)[0]
    for _ in range(300):
        slips.add(draw_later(problem, Phase(1, (2,), slow=0.0, right=0.0, slip=1.0), rng))
    columns = columns_of(problem)
    assert slips == {f"no {add_columns(columns, flipped=i)}" for i in range(COLUMNS)}
    assert f"no {problem.answer}" not in slips


def test_fitting_learns_and_is_the_same_for_the_same_seed(monkeypatch):
    phases = (Phase(12, (2, 3), 0.5, 0.2, 0.4), Phase(2, (2,), 0.2, 0.0, 0.0))
    monkeypatch.setattr(sft, "PHASES", phases)
    monkeypatch.setattr(sft, "FIT_BATCH", 24)
    losses, sizes, plain = [], set(), sft.negative_log_likelihood

    def recorded(model, rows):
        sizes.add(len(rows))
        losses.append(plain(model, rows))
        return losses[-1]

    monkeypatch.setattr(sft, "negative_log_likelihood", recorded)
    one, _ = fit_builtin(seed=7)
    assert losses[-1] < 0.9 * losses[0]
    assert sizes == {8, 12}  # 24 attempts, two or three in a transcript
    two, _ = fit_builtin(seed=7)
    other, _ = fit_builtin(seed=8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


ONE, OTHER = Problem("1", "", "sums", "one"), Problem("2", "", "sums", "other")

# --- 1. The data of STaR and Pair-SFT ----------------------------------------------------------


def attempt(text, right):
    return Attempt([ord(text)], [0.0], text, text, True, float(right))


def episode(problem, one, two):
    return Episode(problem, [1], (one, two))


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


def test_star_takes_episodes_of_wrong_then_right_and_star_plus_right_then_right_too():
    assert texts(STAGES["star"].learns_from(SAMPLED, 4, "0")) == ["ab"]
    assert texts(STAGES["star+"].learns_from(SAMPLED, 4, "0")) == ["ab", "cd"]


def test_pair_sft_joins_wrong_first_attempts_with_any_right_attempt_at_the_same_problem():
    drawn = [texts(STAGES["pair"].learns_from(SAMPLED, 4, str(seed))) for seed in range(200)]
    assert all([pair[0] for pair in found] == ["a", "g"] for found in drawn)
    counts = {c: sum(found[1][1] == c for found in drawn) for c in "bcde"}  # b and d were y2
    assert sum(counts.values()) == 200 and all(30 < n < 70 for n in counts.values())
    plus = [texts(STAGES["pair+"].learns_from(SAMPLED, 4, str(seed))) for seed in range(20)]
    assert all([pair[0] for pair in found] == ["a", "c", "e", "g"] for found in plus)
    assert STAGES["pair"].learns_from(SAMPLED[4:], 4, "0") == []  # where no attempt is right


def test_pair_sft_moves_no_reply_that_keeps_the_answer_of_another_attempt():
    ok = Attempt([1], [0.0], "ok", "c", True, 1.0)  # right after "c", but not after "a"
    sampled = [
        episode(ONE, attempt("a", 0), attempt("b", 0)),
        episode(ONE, attempt("c", 1), ok),
    ]
    for seed in range(20):
        assert texts(STAGES["pair"].learns_from(sampled, 2, str(seed))) == ["ac"]


def test_pairs_hold_attempts_at_one_problem_and_only_y2_is_learned(chat):
    swapped = SAMPLED[4:] + SAMPLED[:4]
    assert texts(STAGES["pair"].learns_from(swapped, 4, "0"))[0][0] == "a"
    for found in STAGES["pair+"].learns_from(SAMPLED, 4, "0"):
        numbers = [number for _, number, _ in transcript(found, chat)]
        assert 1 not in numbers and 2 in numbers  # y1 is in no loss


def test_an_update_of_sft_is_the_gradient_of_the_likelihood_of_y2(learner, problems):  # noqa: F811
    made = score.sample_episodes(
        learner, [p for p in problems for _ in range(4)], STAGES["star"], "0"
    )
    paid = [with_rewards(e, [0, number % 3 == 0]) for number, e in enumerate(made)]
    lessons = STAGES["star"].learns_from(paid, 4, "0")
    assert 3 < len(lessons) < len(made)
    found, metrics = gradient(learner, lessons, "star")
    policy = copy.deepcopy(learner.policy)
    rows = []
    for lesson in lessons:
        row = transcript(lesson, learner.chat)
        rows.append([(token, number == 2) for token, number, _ in row])
    tokens = sum(taught for row in rows for _, taught in row)
    loss = negative_log_likelihood(policy, rows) * tokens / len(lessons)  # of an episode
    expected = torch.autograd.grad(loss, policy.parameters())
    scale = max(g.abs().max() for g in expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * float(scale))
    assert metrics["on_policy_gap"] == 0  # SFT is never on-policy: it has no gap to report


def test_a_batch_without_a_trace_changes_nothing(learner):  # noqa: F811
    before = copy.deepcopy(learner.policy.state_dict())
    metrics = score.update(learner, [], STAGES["star"], 0.1)
    assert set(metrics.values()) == {0.0}
    after = learner.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
