"""With a real pretrained model, if there is one: REAL_MODEL=FOLDER, and MATH's files in REAL_DATA.

Two cores take four minutes for Gemma 3 270M.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from test_runs import run_score
from transformers import AutoModelForCausalLM

import eval as evaluation
from models import load_checkpoint
from sample import Sampling, rollout, segments
from tasks import load_problems, read_chat

MODEL = os.environ.get("REAL_MODEL", "")
DATA = os.environ.get("REAL_DATA", "")
pytestmark = pytest.mark.skipif(
    not MODEL, reason="no real pretrained model: name a checkpoint folder in REAL_MODEL to use one"
)

FLAGS = ["--model", MODEL, "--task", "math", "--data", DATA, "--precision", "float32"]
FLAGS += ["--batch", "4", "--k", "2", "--max-new-tokens", "16", "--problems", "2", "--rows", "8"]
FLAGS += ["--steps1", "1", "--micro-tokens", "2048"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step of Stage I, and then of one step of Stage II in a second command."""
    out = tmp_path_factory.mktemp("runs") / "math"
    assert run_score("--stage", "1", "--out", out, *FLAGS) == 0
    assert run_score("--stage", "2", "--steps2", "1", "--out", out) == 0
    return out


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_step_of_each_stage_is_on_policy_and_begins_with_no_kl(trained):
    first, second = lines_of(trained)
    assert (first["stage"], second["stage"]) == ("1", "2")
    assert first["kl_t1"] == first["kl_t2"] == 0.0
    for line in (first, second):
        assert 0 <= line["on_policy_gap"] < 1e-3


def test_a_longer_run_goes_on_where_it_was(trained):
    assert run_score("--resume", "--out", trained, "--steps2", "2") == 0
    assert [line["step"] for line in lines_of(trained)] == [0, 1, 2]
    assert run_score("--resume", "--out", trained) == 0  # it is finished: nothing is added
    assert len(lines_of(trained)) == 3


def test_what_was_trained_loads_in_transformers_and_is_evaluated(trained):
    exported = AutoModelForCausalLM.from_pretrained(trained / "stage2")
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    moved = [
        (one - two).abs().max().item()
        for one, two in zip(exported.parameters(), base.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1e-3
    flags = ["--model", trained / "stage2", "--problems", 2, "--max-new-tokens", 16]
    assert evaluation.main(list(map(str, flags))) == 0
    assert (trained / "eval" / "stage2" / "metrics.json").exists()


def test_greedy_attempts_are_those_of_generate():
    model, tokenizer = load_checkpoint(MODEL)
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    chat = read_chat(tokenizer, model, "math")
    problems = load_problems("math", "test", 3, DATA)
    for episode in rollout(model, chat, problems, Sampling(2, 16, temperature=0.0)):
        for number, attempt in enumerate(episode.attempts):
            parts = segments(chat, episode.x1, episode.attempts[:number])
            ids = torch.tensor([[token for tokens, _ in parts for token in tokens]])
            made = plain.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=list(chat.end_ids),
            )
            assert made[0, ids.shape[1] :].tolist() == attempt.tokens
