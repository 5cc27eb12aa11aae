"""The built-in base model."""

import copy
import random

import pytest
import torch
from conftest import make_model
from test_score import gradient, learner, with_rewards  # noqa: F401

import score
import sft
from data import COLUMNS, Problem, add_columns
from sample import Attempt, Episode, transcript
from score import STAGES
from sft import add_shortsightedly, builtin_tokenizer, draw, fit_builtin, negative_log_likelihood
from tasks import load_problems, read_chat


@pytest.fixture
def builtin_chat():
    return read_chat(builtin_tokenizer(), make_model(0), "sums")


@pytest.mark.parametrize(
    ("reach", "digits"),
    [(0, "3 9 9 2"), (1, "3 9 0 2"), (2, "3 0 0 2"), (3, "4 0 0 2"), (8, "4 0 0 2")],
)
def test_a_carry_is_seen_from_so_many_columns_away(reach, digits):
    assert add_shortsightedly([(1, 2), (4, 5), (9, 0), (4, 8)], reach) == digits


def test_an_attempt_that_sees_all_columns_is_right():
    for problem in load_problems("sums", "train", 50):
        columns = [tuple(map(int, c.split("+"))) for c in problem.question.split()[:-1]]
        assert add_shortsightedly(columns, COLUMNS) == problem.answer == add_columns(columns)


def test_transcripts_are_laid_out_as_the_chat_does_and_only_attempts_are_taught(builtin_chat):
    chat, rng = builtin_chat, random.Random(0)
    problem = load_problems("sums", "train", 1)[0]
    for attempts in (1, 4):
        transcript = draw(chat, problem, attempts, rng)
        tokens = [token for token, _ in transcript]
        x1 = chat.x1(problem)
        assert tokens[: len(x1)] == x1
        block = [False] * len(chat.p1) + [True] * (COLUMNS + 1)
        taught = [taught for _, taught in transcript]
        assert taught == [False] * len(x1) + block[len(chat.p1) :] + block * (attempts - 1)
        assert tokens.count(chat.close_id) == attempts


def test_later_attempts_copy_correct_or_slip_in_the_shares_of_the_mixture(builtin_chat):
    problem, rng, copies = load_problems("sums", "train", 1)[0], random.Random(0), 0
    wide = Problem(
        problem.question, "0 0 0 0 0 0 0 0", "sums", "p"
    )  # its "right" gives itself away
    rights = 0
    for _ in range(2000):
        tokens = [token for token, taught in draw(builtin_chat, wide, 2, rng) if taught]
        first, second = tokens[: COLUMNS + 1], tokens[COLUMNS + 1 :]
        copies += first == second
        rights += builtin_chat.text(second) == wide.answer
    assert copies / 2000 == pytest.approx(sft.MIXTURE["copy"], abs=0.04)
    assert rights / 2000 == pytest.approx(sft.MIXTURE["right"], abs=0.04)


def test_fitting_learns_and_is_the_same_for_the_same_seed(monkeypatch):
    monkeypatch.setattr(sft, "FIT_PHASES", ((12, 8, 2), (2, 8, 4)))
    losses, plain = [], sft.negative_log_likelihood

    def recorded(model, rows):
        losses.append(plain(model, rows))
        return losses[-1]

    monkeypatch.setattr(sft, "negative_log_likelihood", recorded)
    one, _ = fit_builtin(seed=7)
    assert losses[-1] < 0.9 * losses[0]
    two, _ = fit_builtin(seed=7)
    other, _ = fit_builtin(seed=8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


ONE, OTHER = Problem("1", "", "sums", "one"), Problem("2", "", "sums", "other")

# --- 1. The data of STaR and Pair-SFT ----------------------------------------------------------


def attempt(text, right):
    return Attempt([ord(text)], [0.0], text, True, float(right))


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


def test_star_takes_wrong_then_right_of_one_trajectory_and_with_plus_right_then_right_too():
    assert texts(STAGES["star"].learns_from(SAMPLED, 4, "0")) == ["ab"]
    assert texts(STAGES["star+"].learns_from(SAMPLED, 4, "0")) == ["ab", "cd"]


def test_pair_sft_joins_wrong_first_attempts_with_any_right_attempt_at_the_same_problem():
    drawn = [texts(STAGES["pair"].learns_from(SAMPLED, 4, str(seed))) for seed in range(200)]
    assert all([pair[0] for pair in found] == ["a", "g"] for found in drawn)
    counts = {c: sum(found[1][1] == c for found in drawn) for c in "bcde"}  # b, d: attempts 2
    assert sum(counts.values()) == 200 and all(30 < n < 70 for n in counts.values())
    plus = [texts(STAGES["pair+"].learns_from(SAMPLED, 4, str(seed))) for seed in range(20)]
    assert all([pair[0] for pair in found] == ["a", "c", "e", "g"] for found in plus)
    assert STAGES["pair"].learns_from(SAMPLED[4:], 4, "0") == []  # where no attempt is right


def test_the_pool_of_a_problem_is_its_own(chat):
    swapped = SAMPLED[4:] + SAMPLED[:4]
    assert texts(STAGES["pair"].learns_from(swapped, 4, "0"))[0][0] == "a"
    for found in STAGES["pair+"].learns_from(SAMPLED, 4, "0"):
        numbers = [number for _, number in transcript(found, chat)]
        assert 1 not in numbers and 2 in numbers  # y1 is in no loss


def test_an_update_of_sft_is_the_gradient_of_the_likelihood_of_y2(learner, problems):  # noqa: F811
    made = score.sample(learner, [p for p in problems for _ in range(4)], STAGES["star"], "0")
    paid = [with_rewards(e, [0, number % 3 == 0]) for number, e in enumerate(made)]
    lessons = STAGES["star"].learns_from(paid, 4, "0")
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
    metrics = score.update(learner, [], STAGES["star"], 0.1)
    assert set(metrics.values()) == {0.0}
    after = learner.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
