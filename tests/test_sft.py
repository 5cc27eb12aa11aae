"""The built-in base model."""

import random

import pytest
import torch
from conftest import make_model

import sft
from data import COLUMNS, Problem, add_columns
from sft import add_shortsightedly, builtin_tokenizer, draw, fit_builtin
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
