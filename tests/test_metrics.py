"""The metrics of the paper, their intervals and tables."""

import random
from dataclasses import replace

import pytest

from data import Problem
from metrics import (
    as_table,
    by_group,
    edit_ratio,
    evaluate,
    first_correction,
    intervals,
    measure,
)
from sample import Attempt, Episode, Sampling

PROBLEM = Problem("1+1 =", "2", "sums", "p")


def episode(first, second, r1, r2, finished=True):
    attempts = []
    for text, r in ((first, r1), (second, r2)):
        tokens = [int(digit) for digit in text.split()] + [99] * finished
        attempts.append(Attempt(tokens, [0.0] * len(tokens), text, text, finished, r))
    return Episode(PROBLEM, [1], tuple(attempts))


EPISODES = [
    episode("1", "2", 0.0, 1.0),  # wrong -> right
    episode("1", "1", 0.0, 0.0),
    episode("2", "2", 1.0, 1.0),
    episode("2", "1 3", 1.0, 0.0),  # right -> wrong
    episode("3", "2", 0.0, 1.0),
]


def test_the_five_metrics_by_hand():
    metrics = measure(EPISODES)
    assert metrics["acc_t1"] == 0.4 and metrics["acc_t2"] == 0.6
    assert metrics["delta_i_to_c"] == 0.4 and metrics["delta_c_to_i"] == 0.2  # of ALL problems
    assert metrics["delta"] == pytest.approx(0.2)
    assert metrics["copied"] == 0.4
    assert metrics["length_t1"] == 2 and metrics["length_t2"] == 2.2
    assert metrics["cut_off"] == 0
    assert measure([episode("1", "1", 0.0, 0.0, finished=False)])["cut_off"] == 1


def test_a_level_and_a_subject_have_metrics_of_their_own():
    levels = [("5", "Algebra"), ("1", "Algebra"), ("5", "Geometry"), ("5", "Algebra"), ("", "")]
    labelled = [
        replace(e, problem=replace(PROBLEM, level=level, subject=subject))
        for e, (level, subject) in zip(EPISODES, levels, strict=True)
    ]
    groups = by_group(labelled)
    assert list(groups) == ["Algebra (3)", "Geometry (1)", "level 1 (1)", "level 5 (3)"]
    assert groups["level 5 (3)"]["acc_t2"] == pytest.approx(2 / 3)  # EPISODES 0, 2 and 3
    assert groups["level 5 (3)"]["delta"] == pytest.approx(0)
    assert groups["Algebra (3)"]["delta"] == pytest.approx(0)
    assert by_group(EPISODES) == {}


def test_a_table_has_a_column_for_each_attempt_that_all_rows_have():
    two, three = EPISODES, [replace(e, attempts=(*e.attempts, e.attempts[0])) for e in EPISODES]
    head, row = as_table({"three": measure(three)}).splitlines()
    assert head.split() == ["acc@t1", "acc@t2", "acc@t3", "delta", "i->c", "c->i", "copied"]
    assert row.split() == ["three", "0.400", "0.600", "0.400", "0.200", "0.400", "0.200", "0.400"]
    both = as_table({"two": measure(two), "three": measure(three)}).splitlines()
    assert "acc@t3" not in both[0] and len(both[2].split()) == 7


def test_unreadable_is_the_share_of_attempts_without_an_answer():
    attempts = (EPISODES[0].attempts[0], Attempt([5], [0.0], "1 = 2", None, False, 0.0))
    assert measure([Episode(PROBLEM, [1], attempts), EPISODES[0]])["unreadable"] == 0.25


def test_equal_answers_in_other_words_are_copies():
    for one, two, copied in (
        ("0.5", r"\frac12", 1),
        ("5", "6", 0),
        (None, "6", 0),
        (None, None, 0),
    ):
        y1, y2 = (
            Attempt([1], [0.0], "so", one, True, 0.0),
            Attempt([2], [0.0], "thus", two, True, 0.0),
        )
        math = Episode(replace(PROBLEM, task="math"), [1], (y1, y2))
        assert measure([math])["copied"] == copied


def test_delta_is_gained_minus_lost_for_any_episodes():
    rng = random.Random(0)
    coins = [[float(rng.random() < 0.5) for _ in range(2)] for _ in range(50)]
    metrics = measure([episode("1", "2", *pair) for pair in coins])
    difference = metrics["delta_i_to_c"] - metrics["delta_c_to_i"]
    assert metrics["delta"] == pytest.approx(metrics["acc_t2"] - metrics["acc_t1"])
    assert metrics["delta"] == pytest.approx(difference)


def test_a_reward_below_1_does_not_count_as_right():
    assert measure([episode("1", "2", 0.5, 0.9)])["acc_t2"] == 0


def test_unreadable_attempts_are_copied_only_if_their_texts_are():
    same, other = episode("1", "1", 0.0, 0.0), episode("1", "1", 0.0, 0.0)
    for e, texts in ((same, ("= 1", "= 1")), (other, ("= 1", "= 2"))):
        for attempt, text in zip(e.attempts, texts, strict=True):
            object.__setattr__(attempt, "text", text)
            object.__setattr__(attempt, "stated", None)
    assert measure([same])["copied"] == 1 and measure([other])["copied"] == 0


def by_the_book(one, two):
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def test_the_edit_ratio_is_levenshtein_over_both_lengths():
    rng = random.Random(1)
    for _ in range(300):
        one, two = ([rng.randrange(4) for _ in range(rng.randrange(12))] for _ in range(2))
        expected = by_the_book(one, two) / max(len(one) + len(two), 1)
        assert edit_ratio(one, two) == pytest.approx(expected)
    assert edit_ratio([1, 2, 3], [1, 2, 3]) == 0 and edit_ratio([1], [2]) == 0.5


def test_intervals_hold_the_estimate_and_shrink_with_the_number_of_problems():
    metrics = measure(EPISODES)
    narrow, wide = intervals(metrics, 2000), intervals(metrics, 5)
    for name, (low, high) in narrow.items():
        assert low <= metrics[name] <= high and high - low < wide[name][1] - wide[name][0]
    assert narrow["acc_t1"] == pytest.approx((0.37874, 0.42166), abs=1e-4)  # Wilson, by hand
    # Agresti and Min: (800.5 - 400.5) / 2002 -+ 1.96 sqrt(1201 - 400 ** 2 / 2002) / 2002
    assert narrow["delta"] == pytest.approx((0.16707, 0.23253), abs=1e-4)


def test_no_change_at_all_still_has_an_interval():
    low, high = intervals(measure(EPISODES[1:3]), 2)["delta"]
    assert low < 0 < high


def test_samples_of_one_problem_differ_and_do_not_depend_on_the_rows(model, chat, problems):
    asked = [problems[0]] * 4
    found = []
    for rows in (1, 3, 4):
        sampling = Sampling(2, 10, 1.0, "seed", rows)
        episodes, _ = evaluate(model, chat, asked, sampling)
        found.append([[attempt.tokens for attempt in e.attempts] for e in episodes])
    assert found[0] == found[1] == found[2]
    assert len({str(attempts) for attempts in found[0]}) > 1


def test_the_episode_that_is_shown_as_a_correction_is_a_correction():
    problem = Problem("2+5 9+0 3+8 =", "8 0 1", "sums", "p")
    wrong = Attempt([1], [0.0], "fast 7 9 1", "7 9 1", True, 0.0)
    right = Attempt([1], [0.0], "no 8 0 1", "8 0 1", True, 1.0)
    kinds = [(wrong, wrong), (right, right), (right, wrong)]
    others = [Episode(problem, [1], pair) for pair in kinds]
    shares = {"acc_t1": 1 / 3, "cut_off": 0.25, "unreadable": 0.02}
    corrected = Episode(problem, [1], (wrong, right))
    shown = first_correction([*others, corrected], shares, "stage2")
    assert shown.splitlines() == [
        "stage2 corrects, on a held-out problem:",
        "  problem    2+5 9+0 3+8 =   (answer: 8 0 1)",
        "  attempt 1  fast 7 9 1   wrong",
        "  attempt 2  no 8 0 1   right",
    ]
    assert first_correction(others, shares, "stage2") == (
        "stage2 corrects no held-out problem; attempt 1 is right in 33%, "
        "25% of all attempts are cut off, 2% state no answer"
    )
