"""MATH from end to end on a small Gemma 2: train, resume, evaluate, export, load."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_state
from gemma import FILES, fitted_checkpoint
from test_runs import assert_equal, interrupt_at, run_score, signals, tree  # noqa: F401
from test_score import assert_scored_as_sampled

import eval as evaluation
import models
import ranks
import score
from config import configure
from models import adam, load_checkpoint
from sample import Sampling, collate, rollout, transcript
from score import STAGES, Learner
from tasks import load_problems, read_chat

FAST = ["--task", "math", "--data", FILES, "--batch", "16", "--k", "4", "--max-new-tokens", "40"]
FAST += ["--steps1", "2", "--steps2", "2", "--problems", "6", "--rows", "8", "--lr", "1e-3"]
FAST += ["--micro-tokens", "1000", "--save-every", "2"]


@pytest.fixture(scope="module")
def small_gemma(tmp_path_factory):
    return fitted_checkpoint(tmp_path_factory.mktemp("models") / "small-gemma")


@pytest.fixture(scope="module")
def finished(small_gemma, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "math"
    assert run_score("--model", small_gemma, "--out", out, *FAST) == 0
    return out


def test_training_in_bfloat16_earns_rewards_and_moves_the_policy(finished, small_gemma):
    lines = tree(finished)["lines"]
    assert [line["stage"] for line in lines] == ["1", "1", "2", "2"]
    assert lines[0]["kl_t1"] == 0 == lines[0]["kl_t2"]  # rounded masters are the reference
    assert lines[-1]["kl_t1"] > 0 and all(line["on_policy_gap"] < 0.1 for line in lines)
    assert any(line["acc_t1"] + line["acc_t2"] > 0 for line in lines)
    base, _ = load_checkpoint(str(small_gemma), "bfloat16")
    policy, tokenizer = load_checkpoint(str(finished / "stage2"), "bfloat16")
    weights = json.loads((finished / "stage2" / "config.json").read_text())
    assert weights["dtype"] == "bfloat16" and weights["architectures"] == ["Gemma2ForCausalLM"]
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), policy.parameters(), strict=True)
    )
    assert read_chat(tokenizer, policy, "math").end_ids == (1, 107)
    state = read_state(finished)  # of the last step; the checkpoint holds its masters, rounded
    for name, weight in policy.named_parameters():
        master = state[f"weights.{name}"]
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight)


def test_the_last_line_names_the_command_that_evaluates(small_gemma, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_score("--model", small_gemma, "--out", out, *FAST, "--steps1", 1, "--steps2", 1) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.startswith(f"next: python eval.py --model {out}/stage2, or python eval.py")


def test_offline_first_attempts_come_from_the_reference_step_after_step(small_gemma, tmp_path):
    out = tmp_path / "offline"
    assert run_score("--model", small_gemma, "--out", out, *FAST, "--offline", "0.5") == 0
    lines = tree(out)["lines"]
    assert len(lines) == 4 and all(line["on_policy_gap"] < 0.1 for line in lines)


def test_an_interrupted_run_goes_on_bit_for_bit(finished, small_gemma, tmp_path, monkeypatch):
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_score("--model", small_gemma, "--out", out, *FAST) == 130
    assert run_score("--resume", "--out", out) == 0
    assert_equal(tree(out), tree(finished))


def test_evaluation_prints_levels_and_subjects_and_writes_every_transcript(finished, capsys):
    flags = ["--model", finished / "stage1", "--task", "math", "--data", FILES]
    assert evaluation.main([*map(str, flags), "--problems", "500"]) == 0
    printed = capsys.readouterr().out
    record = json.loads((finished / "eval" / "stage1" / "metrics.json").read_text())
    problems = load_problems("math", "test", data=str(FILES))
    assert len(problems) == 14
    for group in ("level 1", "level 5", "Algebra", "Counting & Probability"):
        count = sum(group in (f"level {p.level}", p.subject) for p in problems)
        assert f"{group} ({count})" in printed
        assert {"acc_t1", "acc_t2", "delta"} <= set(record["groups"][f"{group} ({count})"])
    assert 0 <= record["metrics"]["unreadable"] <= 1 and "unreadable" in printed
    transcripts = (finished / "eval" / "stage1" / "transcripts.jsonl").read_text().splitlines()
    line = json.loads(transcripts[0])
    assert len(transcripts) == 14 and len(line["attempts"]) == 2
    assert {"question", "answer", "subject", "level", "x1"} <= set(line)


def test_the_command_line_of_the_readme_works_in_its_own_process(small_gemma, tmp_path):
    command = [sys.executable, score.__file__, "--model", small_gemma, "--out", tmp_path / "run"]
    flags = [*FAST, "--stage", "1", "--steps1", "1"]
    done = subprocess.run(
        list(map(str, command + flags)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "python score.py --stage 2 --out" in done.stdout and "Traceback" not in done.stderr


def make_learner(small_gemma, precision, **settings):
    cfg = configure(
        {"task": "math", "k": 2, "precision": precision, "max_new_tokens": 24, **settings}
    )
    policy, tokenizer = load_checkpoint(str(small_gemma), precision)
    ref, _ = load_checkpoint(str(small_gemma), precision)
    if cfg.recompute:
        models.recompute_activations(policy)
    chat = read_chat(tokenizer, policy, "math")
    plain = models.distribute(policy, ref.requires_grad_(False), precision)
    return Learner(policy, ref, plain, adam(policy, cfg.lr), chat, [], cfg)


def episodes_of(learner):
    problems = load_problems("math", "train", 6, str(FILES))
    return score.sample_episodes(learner, [p for p in problems for _ in range(2)], STAGES["2"], "0")


@pytest.mark.parametrize(("precision", "gap"), [("float32", 1e-4), ("bfloat16", 0.15)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_equal_the_scored_ones(small_gemma, precision, gap, temperature):
    learner = make_learner(small_gemma, precision, temperature=temperature)
    episodes = episodes_of(learner)
    kl = assert_scored_as_sampled(learner, episodes, gap)
    assert kl.abs().max() == 0


def test_a_sharded_reference_that_has_computed_takes_all_weights_of_another_model(small_gemma):
    learner = make_learner(small_gemma, "bfloat16")
    rows = [transcript(episode, learner.chat) for episode in episodes_of(learner)]
    tokens, _, _, places = collate(rows, "cpu")
    score.log_probs_and_kl(learner, tokens, places)  # leaves weights of the reference gathered
    other = load_checkpoint(str(small_gemma), "bfloat16")[0]
    for weight in other.parameters():
        weight.data += 1
    ranks.copy_weights(learner.ref, other)
    found = ranks.unshard(learner.ref, learner.full_copy)
    for (name, one), two in zip(found.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize(("recompute", "calls"), [(0, 1), (1, 2)])
def test_recompute_runs_each_layer_again_in_backward(small_gemma, recompute, calls):
    learner = make_learner(small_gemma, "bfloat16", recompute=recompute)
    episodes, called = episodes_of(learner), []
    learner.policy.model.layers[0].mlp.register_forward_hook(lambda *_: called.append(1))
    score.update(learner, episodes, STAGES["1"], 0.1)
    assert len(called) == calls and not learner.policy.training


def test_chunks_of_the_head_change_nothing(small_gemma, monkeypatch):
    learner = make_learner(small_gemma, "float32")
    for weight in learner.policy.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    rows = [transcript(e, learner.chat) for e in episodes_of(learner)]
    tokens, _, _, places = collate(rows, "cpu")
    found = []
    for numbers in (2**27, 5000):  # all tokens at once, and five at a time
        monkeypatch.setattr(score, "LOGITS_AT_ONCE", numbers)
        logp, kl = score.log_probs_and_kl(learner, tokens, places)
        (logp.sum() + kl.sum()).backward()
        found.append((logp, kl, [weight.grad for weight in learner.policy.parameters()]))
        learner.optimizer.zero_grad()
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    for one, two in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert found[0][1].max() > 0.01


def test_rows_side_by_side_do_not_change_what_is_sampled(small_gemma):
    learner = make_learner(small_gemma, "float32")
    problems = [p for p in load_problems("math", "train", 5, str(FILES)) for _ in range(3)]
    whole, parts = (
        rollout(learner.policy, learner.chat, problems, Sampling(2, 24, seed="0", rows=rows))
        for rows in (500, 4)
    )
    assert [[y.tokens for y in e.attempts] for e in whole] == [
        [y.tokens for y in e.attempts] for e in parts
    ]
    assert len({tuple(e.attempts[0].tokens) for e in whole[:3]}) > 1  # samples differ


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "--data nowhere"),
        (
            ["--data", "empty"],
            "empty needs exactly one file (.jsonl, .jsonl.gz) with train in its name",
        ),
        (["--data", "torn"], "line 2"),
        (["--data", "clash"], "are in training, too"),
        ([], "name a folder of files with --data"),
        (["--model", "builtin"], "--model builtin can only add"),
        (["--model", "no/such"], "no/such"),
        (["--data", "numbers"], "numbers/train.jsonl, line 1"),
        (["--data", "void"], "void has no train problem with an answer: add some"),
        (["--data", "squashed"], "squashed/train.jsonl.gz cannot be read"),
        (["--rows", "0"], "--rows"),
        (["--micro-tokens", "0"], "--micro-tokens"),
    ],
)
def test_bad_input_gives_one_sentence_and_writes_nothing(
    flags, words, small_gemma, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "torn", "clash", "numbers", "void", "squashed"):
        Path(name).mkdir()
    train = (FILES / "train.jsonl").read_text()
    Path("torn/train.jsonl").write_text(train.splitlines()[0] + "\n{broken\n")
    Path("torn/test.jsonl").write_text(train)
    Path("clash/train.jsonl").write_text(train)
    Path("clash/test.jsonl").write_text(train.splitlines()[3])
    Path("numbers/train.jsonl").write_text('{"problem": "1+1?", "answer": [2]}\n')
    Path("void/train.jsonl").write_text("\n")
    Path("squashed/train.jsonl.gz").write_bytes(gzip.compress(train.encode())[:-300] + b"x" * 300)
    for name in ("numbers", "void", "squashed"):
        Path(name, "test.jsonl").write_text(train)
    before = sorted(tmp_path.rglob("*"))
    rest = FAST[4:] if not flags else FAST[2:]  # without --data: from the hub
    assert run_score("--task", "math", "--model", small_gemma, *rest, *flags, "--out", "run") == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    assert (
        len(
            [
                line
                for line in message.splitlines()
                if not line.startswith(("skipped", "no/such is no folder"))
            ]
        )
        == 1
    )
    assert sorted(tmp_path.rglob("*")) == before
    if not flags or flags[0] == "--data":
        assert evaluation.main(["--model", str(small_gemma), "--task", "math", *flags]) == 2
        assert words in capsys.readouterr().err
