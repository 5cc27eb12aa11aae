"""The page on a run: what is put into it, and what a browser makes of it."""

import json
import shutil
import subprocess

import pytest
import torch
from test_runs import SMALL, interrupt_at, run_score, signals  # noqa: F401

import eval as evaluation
import report
import score
from config import Config
from score import STAGES, leave_one_out


def run_report(*folders) -> int:
    return evaluation.main(["--report", *map(str, folders)])


def put_in(path) -> dict:
    """The data in a page."""
    page = path.read_text("utf-8")
    start = page.index('<script type="application/json" id="data">')
    return json.loads(page[page.index(">", start) + 1 : page.index("</script>", start)])


@pytest.fixture
def finished(checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--eval-every", 4]
    assert run_score(*flags) == 0
    return tmp_path / "run"


def test_a_run_is_shown_with_curves_results_and_episodes(finished, capsys):
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    marked = json.loads(lines[2]) | {"alarms": ["cut off: over 10 %"]}
    lines[2] = json.dumps(marked)
    # the last line is torn, as while the run still goes on
    (finished / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "torn')
    assert evaluation.main(["--model", str(finished / "stage2"), "--problems", "5"]) == 0
    assert run_report(finished) == 0
    assert f"wrote {finished}/report.html" in capsys.readouterr().out
    [run] = put_in(finished / "report.html")["runs"]
    assert run["steps"] == list(range(8)) and run["settings"]["steps1"] == 5
    assert run["stages"] == [{"title": "Stage I", "start": 0}, {"title": "Stage II", "start": 5}]
    assert run["curves"]["acc_t2"] == [json.loads(line)["acc_t2"] for line in lines]
    earlier = [{"step": 0, "text": text} for text in json.loads(lines[0])["alarms"]]
    assert run["alarms"] == [*earlier, {"step": 2, "text": "cut off: over 10 %"}]
    assert [point["step"] for point in run["held_out"]] == [3, 7]
    rows = {row["name"]: row for row in run["table"]}
    assert list(rows) == ["base", "stage1", "stage2", "eval/stage2"]
    assert rows["stage1"]["problems"] == 8 and rows["eval/stage2"]["problems"] == 5
    results = json.loads((finished / "results.json").read_text())
    assert rows["stage2"]["metrics"] == results["stage2"]
    low, high = rows["stage2"]["intervals"]["acc_t2"]
    assert low <= results["stage2"]["acc_t2"] <= high
    held_out = [one for one in run["episodes"] if one["source"] == "stage2, held out"]
    right = sum(one["attempts"][1]["reward"] for one in held_out)
    assert right / len(held_out) == results["stage2"]["acc_t2"] and len(held_out) == 8
    shown = [one for one in run["episodes"] if one["source"] == "training"]
    assert {one["step"] for one in shown} == {0, 2, 4, 6}
    assert {one["stage"] for one in shown} == {"Stage I", "Stage II"}


def test_an_evaluation_and_two_runs_are_shown(finished, checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    assert run_score("--model", checkpoint, "--out", other, *SMALL, "--stage", "1") == 0
    assert run_report(finished, other) == 0
    both = put_in(finished / "report-other.html")["runs"]
    assert [run["name"] for run in both] == [str(finished), str(other)]
    where = ["--model", str(finished / "stage1"), "--problems", "6"]
    assert evaluation.main(where) == 0
    assert run_report(finished / "eval" / "stage1") == 0
    [run] = put_in(finished / "eval" / "stage1" / "report.html")["runs"]
    assert run["kind"] == "evaluation" and len(run["episodes"]) == 6
    assert run["table"][0]["problems"] == 6
    assert sum(row["problems"] for row in run["table"][1:]) == 6  # levels
    assert run_report(tmp_path) == 2
    assert "holds no run and no evaluation" in capsys.readouterr().err


def test_a_run_that_has_just_begun_is_shown(checkpoint, tmp_path, monkeypatch):
    def look():
        assert run_report(tmp_path / "run") == 0

    interrupt_at(monkeypatch, 0, look)
    assert run_score("--model", checkpoint, "--out", tmp_path / "run", *SMALL) == 0
    [run] = put_in(tmp_path / "run" / "report.html")["runs"]
    assert run["steps"] == [0] and [row["name"] for row in run["table"]] == ["base"]


def test_the_factors_are_those_of_the_objectives():
    r = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    baseline = leave_one_out(r, 4)
    first = score.multipliers(STAGES["1"], r, baseline, Config())
    second = score.multipliers(STAGES["2"], r, baseline, Config(alpha=10.0))
    less_mean = torch.tensor([1.0, -1.0, 1.0, -1.0]) * 2 / 3  # r2 minus its siblings' mean
    assert torch.allclose(first[:, 1], less_mean) and not first[:, 0].any()
    assert torch.allclose(second[:, 1], 11 * less_mean)
    assert torch.allclose(second[:, 0], torch.tensor([-2.0, 2.0, 2.0, -2.0]) / 3)


def test_shown_episodes_have_the_factors_of_their_batch(checkpoint, tmp_path, monkeypatch):
    seen, show = [], score.show

    def watched(run, episodes, stage, cfg):
        seen.append((run.lines[-1]["step"], episodes, stage, cfg))
        show(run, episodes, stage, cfg)

    monkeypatch.setattr(score, "show", watched)
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--offline", "0.5"]
    assert run_score(*flags, "--batch", 16) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").open()]
    for step, episodes, stage, cfg in seen:
        shown = [row for row in rows if row.get("step") == step]
        assert [row["question"] for row in shown] == [e.problem.question for e in episodes[:8:2]]
        for number, row in enumerate(shown):
            one, sibling = episodes[2 * number : 2 * number + 2]
            factors = [one.attempts[i].reward - sibling.attempts[i].reward for i in range(2)]
            first, second = (y["weight"] for y in row["attempts"])
            if one.offline:
                assert first is None
            else:
                assert first == (factors[0] if stage.name == "2" else 0.0)
            assert second == pytest.approx(factors[1] * (11 if stage.name == "2" else 1))
            assert cfg.k == 2
    assert any(row["attempts"][0].get("weight", 0) is None for row in rows if "step" in row)


HOSTILE = "</script><script>document.title = 'run'</script><img src=x onerror=alert(1)>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture
def evaluated(tmp_path):
    """An evaluation of many episodes, some of them hostile."""
    attempt = {
        "text": "4",
        "stated": "4",
        "finished": True,
        "reward": 0.0,
        "tokens": [],
        "logp": [],
    }
    metrics = {"acc_t1": 0.0, "acc_t2": 1.0, "delta": 1.0, "delta_i_to_c": 1.0}
    metrics |= {"delta_c_to_i": 0.0}
    record = {"settings": {}, "metrics": metrics, "intervals": {}, "groups": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(record))
    lines = []
    for number in range(10_000):
        text = HOSTILE if number % 100 == 0 else rf"So ${{\frac{{{number}}}{{2}}}}$ it is."
        attempts = [attempt, attempt | {"text": text, "stated": None, "reward": 1.0}]
        row = {"question": f"{number}? {text}", "answer": "5", "level": "1", "subject": ""}
        lines.append(json.dumps(row | {"attempts": attempts}) + "\n")
    (tmp_path / "transcripts.jsonl").write_text("".join(lines))
    assert run_report(tmp_path) == 0
    return tmp_path / "report.html"


def test_what_a_model_wrote_cannot_end_the_data(evaluated):
    page = evaluated.read_text()
    assert page.count("<script") == report.TEMPLATE.read_text().count("<script") == 2
    assert HOSTILE in put_in(evaluated)["runs"][0]["episodes"][0]["question"]
    assert "://" not in page.replace("http://www.w3.org/", "")  # names of SVG and HTML alone


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page in")
def test_a_browser_shows_the_page_and_runs_nothing_that_a_model_wrote(evaluated, tmp_path):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", f"{evaluated.as_uri()}#episode=100"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    page = done.stdout
    assert "10,000 of 10,000 episodes found" in page and "<title>SCoRe report" in page
    assert "Episode 100" in page and "wrong to right" in page and "<img" not in page
    assert "document.title = 'run'" in page and "CONSOLE" not in done.stderr
    assert page.count('role="option"') < 100  # only the rows that are seen
