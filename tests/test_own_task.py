"""The worked example of a task of one's own, with a small model."""

import json
import runpy
from pathlib import Path

import pytest
from gemma import gemma_model, gemma_tokenizer

import score
from models import save_checkpoint
from tasks import TASKS, load_problems

EXAMPLE = Path(score.__file__).parent / "experiments" / "backwards.py"


@pytest.fixture
def task(monkeypatch):
    """The example's task, which is forgotten again."""
    monkeypatch.setitem(TASKS, "backwards", None)
    runpy.run_path(str(EXAMPLE))  # not as __main__
    return TASKS["backwards"]


def test_the_example_trains(task, tmp_path, monkeypatch, capsys):
    tokenizer = gemma_tokenizer()
    save_checkpoint(tmp_path / "small", gemma_model(tokenizer), tokenizer)
    flags = ["--task", "backwards", "--model", tmp_path / "small", "--out", tmp_path / "run"]
    flags += ["--batch", 4, "--k", 2, "--steps1", 1, "--steps2", 1, "--problems", 4, "--rows", 4]
    assert score.main(list(map(str, flags))) == 0
    cfg = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (cfg["max_new_tokens"], cfg["precision"], cfg["lr"]) == (32, "bfloat16", 5e-6)
    assert "stage2" in json.loads((tmp_path / "run" / "results.json").read_text())
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert any(p.answer in samples for p in load_problems("backwards", "train"))
    monkeypatch.delitem(TASKS, "backwards")  # as score.py alone, which does not know it
    assert score.main(["--resume", "--out", str(tmp_path / "run")]) == 2
    assert "--task backwards is unknown" in capsys.readouterr().err


def test_its_reward_is_the_words_in_reverse_order_and_its_splits_share_nothing(task):
    train, test = (load_problems("backwards", split) for split in ("train", "test"))
    assert len(train) == len(test) == 3000 and not {p.id for p in train} & {p.id for p in test}
    problem = test[0]
    assert problem.answer.split() == problem.question.split()[::-1]
    assert load_problems("backwards", "test", 1) == (problem,)
    answers = [problem.answer, f" {problem.answer}\n", problem.question, None]
    assert task.rewards(answers, [problem] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert [task.states(attempt, problem) for attempt in ("", "ant")] == [None, "ant"]


def test_it_is_thirty_lines():
    code = EXAMPLE.read_text().partition('"""')[2].partition('"""')[2]
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 30
