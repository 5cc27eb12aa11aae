"""Votes at equal budgets: more samples against corrections."""

import json
from dataclasses import replace

import pytest

import eval as evaluation
import scaling
from data import InputError, Problem
from figures import draw
from sample import Attempt, Episode, Sampling
from scaling import vote

PROBLEM = Problem("1+1 =", "2", "sums", "p")


def attempt(text: str, right: str = "2") -> Attempt:
    return Attempt([1], [0.0], text, True, float(text == right))


@pytest.mark.parametrize(
    ("texts", "right"),
    [
        (["2"], 1.0),
        (["3"], 0.0),
        (["3", "2", "2"], 1.0),
        (["3", "3", "2"], 0.0),
        (["2", "3"], 1.0),  # as many: the first stated
        (["3", "2"], 0.0),
        (["?", "?", "?", "2"], 1.0),  # what states nothing has no vote
        (["?", "?"], 0.0),
        ([], 0.0),
    ],
)
def test_the_answer_of_most_attempts_wins(texts, right):
    assert vote([attempt(text) for text in texts], "sums") == right


def test_answers_that_are_equal_in_other_words_vote_together():
    ballots = [r"\boxed{3}", r"\boxed{0.5}", r"\boxed{\frac12}"]
    assert vote([attempt(text, ballots[1]) for text in ballots], "math") == 1.0


def test_both_get_the_same_budget_and_corrections_follow_the_first_attempts():
    calls = []

    def evaluate(problems, sampling, begun):
        calls.append((len(problems), sampling.attempts, len(begun)))
        if begun:  # the correction of "3" is right, that of "2" stays
            return [replace(e, attempts=(*e.attempts, attempt("2"))) for e in begun]
        return [
            Episode(p, [1], (attempt("3" if i % 4 < 3 else "2"),)) for i, p in enumerate(problems)
        ]

    problems = [PROBLEM, replace(PROBLEM, id="q")]
    lines = scaling.compare(evaluate, problems, 3, Sampling())
    assert calls == [(12, 1, 0), (6, 2, 6)]
    assert [line["budget"] for line in lines] == [2, 4, 6]
    assert [line["sequential"] for line in lines] == [1.0, 1.0, 1.0]
    # first attempts 3 3 3 2 3 3 and 3 2 3 3 3 2: the wrong one has the majority at every budget
    assert [line["parallel"] for line in lines] == [0.0, 0.0, 0.0]


def test_the_command_prints_what_it_writes_and_draws_it(checkpoint, tmp_path, capsys):
    asked = ["--model", checkpoint, "--problems", 4, "--samples", 3, "--out", tmp_path / "votes"]
    assert evaluation.main(list(map(str, asked))) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "votes" / "scaling.json").read_text())
    assert [line["budget"] for line in record["lines"]] == [2, 4, 6]
    assert record["settings"]["temperature"] == "0.7"
    assert scaling.as_votes(record["lines"]) in printed
    assert evaluation.main(["--plot", str(tmp_path / "votes")]) == 0
    assert (tmp_path / "votes" / "scaling.png").stat().st_size > 5000


def test_an_evaluation_is_drawn_with_its_levels_if_it_has_any(tmp_path):
    attempts = [{"tokens": [1, 2], "reward": 0.0}, {"tokens": [1, 3], "reward": 1.0}]
    rows = [json.dumps({"attempts": attempts}) for _ in range(5)]
    (tmp_path / "transcripts.jsonl").write_text("\n".join(rows))
    two = draw(tmp_path)
    assert two.name == "attempts.png"
    size = two.stat().st_size
    group = {"delta_i_to_c": 0.5, "delta_c_to_i": 0.1}
    (tmp_path / "metrics.json").write_text(json.dumps({"groups": {"level 1 (5)": group}}))
    assert draw(tmp_path).stat().st_size > size > 5000


def test_a_folder_that_holds_nothing_to_draw_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no run and no evaluation"):
        draw(tmp_path)
    (tmp_path / "transcripts.jsonl").write_text(json.dumps({"attempts": [{"reward": 1.0}]}))
    with pytest.raises(InputError, match="two attempts or more"):
        draw(tmp_path)


@pytest.mark.parametrize(
    "flags", [["--samples", "-1"], ["--samples", "2", "--attempts", "3"]], ids=str
)
def test_bad_samples_are_one_sentence(flags, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["--model", str(checkpoint), *flags]) == 2
    assert "eval.py: --samples must be 1 or more" in capsys.readouterr().err
