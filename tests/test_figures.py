"""Pictures of runs and evaluations."""

import json

import pytest

from data import InputError
from figures import draw


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


def test_an_empty_run_has_no_curve(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no step"):
        draw(tmp_path)
