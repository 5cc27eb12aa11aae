"""Metrics, their intervals, and the command line of eval.py."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from gemma import FILES, gemma_model, gemma_tokenizer

import eval as evaluation
import score
from config import parse_eval_flags
from data import Problem
from eval import compare_votes, vote, votes_table
from models import load_checkpoint, save_checkpoint
from sample import Attempt, Episode, Sampling, rollout
from tasks import CODE_FEEDBACK, MATH_FEEDBACK, MATH_REFINE, load_problems, read_chat, refining


def run_eval(*flags):
    return evaluation.main(["--task", "sums", *map(str, flags)])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Work in tmp_path: an evaluation without a folder of its own is written to runs/eval."""
    monkeypatch.chdir(tmp_path)


def test_eval_writes_metrics_and_every_transcript(checkpoint, tmp_path, capsys):
    assert run_eval("--model", checkpoint, "--problems", 6, "--attempts", 3) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "eval" / checkpoint.name / "metrics.json").read_text())
    lines = (
        (tmp_path / "runs" / "eval" / checkpoint.name / "transcripts.jsonl")
        .read_text()
        .splitlines()
    )
    assert len(lines) == 6 and len(json.loads(lines[0])["attempts"]) == 3
    for name in ("acc_t1", "acc_t3", "delta", "delta_i_to_c", "copied", "edit_ratio", "cut_off"):
        assert name in printed and name in record["metrics"]
    assert run_eval("--model", checkpoint, "--problems", 6, "--attempts", 3) == 0  # again
    assert (
        json.loads((tmp_path / "runs" / "eval" / checkpoint.name / "metrics.json").read_text())
        == record
    )
    assert run_eval("--model", checkpoint, "--problems", 5) == 2  # does not overwrite the other
    assert "name another folder" in capsys.readouterr().err
    assert run_eval("--model", checkpoint, "--problems", 5, "--out", tmp_path / "other") == 0


def test_metrics_are_written_last_since_they_say_that_all_is_done(checkpoint, monkeypatch):
    written = []
    monkeypatch.setattr(evaluation, "write_atomically", lambda path, _: written.append(path.name))
    assert run_eval("--model", checkpoint, "--problems", 2) == 0
    assert written == ["transcripts.jsonl", "metrics.json"]


def test_a_checkpoint_is_asked_as_in_its_run_unless_flags_are_given(checkpoint, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--model", checkpoint, "--out", out, "--batch", 4, "--k", 2, "--steps1", 1]
    flags += ["--stage", 1, "--problems", 6, "--max-new-tokens", 12]
    assert score.main([str(flag) for flag in flags]) == 0
    assert run_eval("--model", out / "stage1") == 0
    printed = capsys.readouterr()
    assert "asked as in the run: --problems 6 --max-new-tokens 12" in printed.err
    settings = json.loads((out / "eval" / "stage1" / "metrics.json").read_text())["settings"]
    assert settings["problems"] == "6" and settings["max_new_tokens"] == "12"
    given = (("--task", "sums", 6), ("--problems", "3", 3), ("--task", "math", 500))
    for flag, value, problems in given:
        args = parse_eval_flags("", ["--model", str(out / "base"), flag, value])
        assert args.problems == problems
    (out / "config.json").write_text("{damaged")
    assert evaluation.main(["--model", str(out / "stage2")]) == 2
    assert f"the run {out} has no stage2, only stage1: correct the name" in capsys.readouterr().err
    assert evaluation.main(["--model", str(out / "stage1")]) == 2
    assert "stage1 is in no run folder: name its --task" in capsys.readouterr().err
    assert evaluation.main(["--model", "runs/gone/stage2"]) == 2
    assert "there is no checkpoint folder runs/gone/stage2" in capsys.readouterr().err
    given = ["--model", str(out / "base"), "--task", "sums"]
    assert parse_eval_flags("", given).problems == 2000


def test_an_evaluation_is_not_written_to_a_folder_of_other_files(checkpoint, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    for out in (tmp_path / "notes", checkpoint):
        assert run_eval("--model", checkpoint, "--problems", 2, "--out", out) == 2
        assert f"--out {out} holds" in capsys.readouterr().err


def test_attempts_that_are_cut_off_or_state_nothing_are_told_with_a_remedy(checkpoint, capsys):
    assert run_eval("--model", checkpoint, "--problems", 4, "--max-new-tokens", 1) == 0
    printed = capsys.readouterr().out
    assert "cut_off is above .1: raise --max-new-tokens" in printed
    assert "unreadable is above .1: see in transcripts.jsonl" in printed


def test_too_many_tokens_are_answered_with_the_most_that_fit(checkpoint, tmp_path, capsys):
    flags = ["--model", checkpoint, "--problems", 2, "--attempts", 3, "--out", tmp_path / "out"]
    assert run_eval(*flags, "--max-new-tokens", 10**5) == 2
    message = capsys.readouterr().err
    most = int(re.search(r"give at most (\d+)", message)[1])
    assert "skipped" not in message
    assert run_eval(*flags, "--max-new-tokens", most + 1) == 2
    assert run_eval(*flags, "--max-new-tokens", most) == 0


def test_an_interval_is_never_minus_zero(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "intervals", lambda *_: {"delta": (-0.0001, 0.0004)})
    assert run_eval("--model", checkpoint, "--problems", 2) == 0
    assert "[0.000, 0.000]" in capsys.readouterr().out


def test_a_closed_pipe_ends_an_evaluation_quietly_after_it_is_written(checkpoint, tmp_path):
    command = [sys.executable, evaluation.__file__, "--model", checkpoint]
    command += ["--task", "sums", "--problems", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, said = process.communicate()
    assert process.returncode == 128 + signal.SIGPIPE and "Error" not in said
    assert (tmp_path / "runs" / "eval" / checkpoint.name / "metrics.json").exists()


def test_one_question_is_attempted_twice_and_not_judged(checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)
    question = load_problems("sums", "test", 1)[0].question
    assert run_eval("--model", checkpoint.name, "--ask", question) == 0
    printed = capsys.readouterr().out
    model, tokenizer = load_checkpoint(str(checkpoint))
    chat = read_chat(tokenizer, model, "sums")
    asked = [Problem(question, None, "sums", "x")]
    [episode] = rollout(model, chat, asked, Sampling(2, 10, 0.0))
    for number, attempt in enumerate(episode.attempts, start=1):
        assert f"attempt {number}" in printed and attempt.text in printed
    assert printed.count("(read as the answer: ") == 2
    assert ("cut off" in printed) == (not all(y.finished for y in episode.attempts))
    assert not (checkpoint.parent / "eval").exists()
    assert run_eval("--model", checkpoint.name, "--ask", " ") == 2
    assert "--ask ' ' cannot be used: give a question" in capsys.readouterr().err
    assert run_eval("--model", checkpoint.name, "--ask", question, "--refine") == 0
    assert "feedback" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problems", "0"], "--problems"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "1e-40"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--model", "."], "no config.json"),
        (["--plot", "no/such/run"], "no/such/run"),
        (["--report", "no/such/run"], "--report no/such/run holds no run and no evaluation"),
        (["--report", "a", "b", "c"], "--report compares two folders at most"),
        (["--attempts", "two"], "--attempts"),
        (["--rows", "0"], "--rows"),
        (["--task", "chess"], "--task chess"),
        (["--precision", "int4"], "--precision"),
        ([], "--model"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_2(
    flags, words, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = (
        []
        if not flags or flags[0] in ("--model", "--plot", "--report")
        else ["--model", checkpoint]
    )
    assert run_eval(*model, *flags) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and "Traceback" not in message
    assert not list(tmp_path.iterdir())


# --- 2. Votes ----------------------------------------------------------------------------------


PROBLEM = Problem("1+1 =", "2", "sums", "p")


def attempt(text: str, right: str = "2") -> Attempt:
    return Attempt([1], [0.0], text, None if text == "?" else text, True, float(text == right))


@pytest.mark.parametrize(
    ("texts", "right"),
    [
        (["2"], 1.0),
        (["3"], 0.0),
        (["3", "2", "2"], 1.0),
        (["3", "3", "2"], 0.0),
        (["2", "3"], 1.0),  # a tie: the answer that was stated first wins
        (["3", "2"], 0.0),
        (["?", "?", "?", "2"], 1.0),  # an attempt that states no answer has no vote
        (["?", "?"], 0.0),
        ([], 0.0),
    ],
)
def test_the_answer_of_most_attempts_wins(texts, right):
    assert vote([attempt(text) for text in texts], "sums") == right


def test_answers_that_are_equal_in_other_words_vote_together():
    ballots = ["3", "0.5", r"\frac12"]
    assert vote([attempt(text, ballots[1]) for text in ballots], "math") == 1.0


def test_both_kinds_of_votes_get_the_same_budget_and_corrections_follow_the_first_attempts():
    calls = []

    def evaluate(problems, sampling, begun):
        calls.append((len(problems), sampling.attempts, len(begun)))
        if begun:  # the correction of "3" is right, that of "2" stays
            return [replace(e, attempts=(*e.attempts, attempt("2"))) for e in begun], {}
        texts = ["3" if i % 4 < 3 else "2" for i in range(len(problems))]
        return [Episode(p, [1], (attempt(t),)) for p, t in zip(problems, texts, strict=True)], {}

    problems = [PROBLEM, replace(PROBLEM, id="q")]
    lines = compare_votes(evaluate, problems, 3, Sampling())
    assert calls == [(12, 1, 0), (6, 2, 6)]
    assert [line["budget"] for line in lines] == [2, 4, 6]
    assert [line["sequential"] for line in lines] == [1.0, 1.0, 1.0]
    # first attempts 3 3 3 2 3 3 and 3 2 3 3 3 2: the wrong one has the majority at every budget
    assert [line["parallel"] for line in lines] == [0.0, 0.0, 0.0]


def test_the_command_prints_what_it_writes_and_draws_it(checkpoint, tmp_path, capsys):
    asked = ["--model", checkpoint, "--problems", 4, "--samples", 3, "--out", tmp_path / "votes"]
    assert run_eval(*asked) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "votes" / "scaling.json").read_text())
    assert [line["budget"] for line in record["lines"]] == [2, 4, 6]
    assert record["settings"]["temperature"] == "0.7"
    assert votes_table(record["lines"]) in printed
    assert evaluation.main(["--plot", str(tmp_path / "votes")]) == 0
    assert (tmp_path / "votes" / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags", [["--samples", "-1"], ["--samples", "2", "--attempts", "3"]], ids=str
)
def test_bad_samples_give_one_sentence(flags, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_eval("--model", checkpoint, *flags) == 2
    assert f"eval.py: --samples {flags[1]} cannot be used: give 1" in capsys.readouterr().err


# --- 3. Self-Refine ----------------------------------------------------------------------------


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
    for made in episodes:  # each attempt follows all tokens before it, also those of the feedback
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
    folder = tmp_path / "runs" / "eval" / "model-refine"
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
        assert "--refine must be alone: leave out --attempts" in capsys.readouterr().err
