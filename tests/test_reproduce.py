"""The grid of experiments: its commands, its table, its significance, and going on after a stop."""

import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from gemma import FILES, gemma_model, gemma_tokenizer

import eval as evaluation
import learner
import score
import sft
from config import Config, check_settings, configure, parse_eval_flags, parse_train_flags, plan_of
from data import InputError
from experiments import cell, landscape, pictures, reproduce, tables
from experiments import jobs as jobs_module
from models import save_checkpoint
from runs import Run, locked
from score import STAGES

TINY = ["--steps1", "3", "--steps2", "2", "--batch", "8", "--k", "2", "--problems", "6"]


def jobs(*flags):
    args, typed, given = reproduce.parse_flags(list(map(str, flags)))
    waves = reproduce.plan(args.out, args.seeds, typed, given, 10, args.only)
    return [job for wave in waves for job in wave]


@pytest.mark.parametrize(
    "given", [[], ["--task", "math", "--model", "google/gemma-2-2b-it", "--data", FILES]], ids=str
)
def test_every_command_of_the_grid_is_one_that_its_script_takes(given):
    found = jobs("--seeds", "3,7", *given)
    kinds = {job.name.rsplit(" ", 1)[0] for job in found}
    assert len(found) == 2 * (len(reproduce.TRAINED) + 13) and set(reproduce.TRAINED) <= kinds
    for job in found:
        if job.script == "eval.py":
            assert parse_eval_flags("", job.flags)
            continue
        cfg = configure(parse_train_flags("", job.flags))
        plan = plan_of(cfg.stage, STAGES)
        check_settings(cfg, plan)
        assert plan[-1].folder == job.key
        usual = configure(parse_train_flags("", list(map(str, given))))
        stages = {"score": 1, "offline": 1, "no-bonus": 0, "star-stage2": 0}
        if job.name.split()[0] not in stages:  # as many updates as SCoRe, but for rounding up
            steps = sum(getattr(cfg, stage.steps) for stage in plan)
            assert 0 <= steps - (usual.steps1 + usual.steps2) <= 2


def test_the_grid_for_gemma_starts_from_gemma():
    found = jobs("--seeds", 0, "--task", "math", "--model", "google/gemma-2-2b-it")
    flags = {job.name: job.flags for job in found}
    assert flags["direct 0"][-4:] == ["--steps2", "3000", "--model", "google/gemma-2-2b-it"]
    assert "google/gemma-2-2b-it" in flags["refine base 0"]
    assert flags["attempts score 0"] == [
        "--model", "runs/reproduce/seed-0/score/stage2", "--attempts", "10", "--task", "math",
    ]  # fmt: skip
    assert flags["no-bonus 0"][-3] == "runs/reproduce/seed-0/score/stage1"
    assert jobs("--seeds", 0)[1].flags[-1] == "runs/reproduce/seed-0/score/base"


def test_runs_and_seeds_can_be_chosen():
    assert reproduce.read_seeds("10-12,3") == [10, 11, 12, 3]
    assert len(jobs()) == 10 * len(jobs("--seeds", "4"))
    few = jobs("--seeds", "4", "--only", "direct")
    assert [job.name for job in few] == ["score 4", "direct 4"]


def test_p_is_that_of_a_paired_t_test():
    ours = [1.0, 2.0, 3.0, 4.0, 5.0]
    # differences 1 2 3 4 5: t = 3 / (sqrt(2.5) / sqrt(5)) = 4.2426 with 4 degrees of freedom
    assert tables.p_value(ours, [0.0] * 5) == pytest.approx(0.0132, abs=5e-5)
    # two seeds: Cauchy; t = 1.5 / (sqrt(0.5) / sqrt(2)) = 3, p = 1 - 2 atan(3) / pi
    assert tables.p_value([1.0, 2.0], [0.0, 0.0]) == pytest.approx(0.20483, abs=1e-5)
    assert tables.p_value([0.0, 0.0], [1.0, 2.0]) == pytest.approx(0.20483, abs=1e-5)
    assert tables.p_value([1.0], [0.0]) is None
    assert tables.p_value([1.0, 1.0], [0.5, 0.5]) is None
    assert tables.p_value([0.3, 0.4], [0.2, 0.3]) is None  # equal but for rounding


def test_the_table_has_means_and_spreads():
    usual = {name: [0.5, 0.6] for name in tables.COLUMNS}
    rows = dict.fromkeys(tables.ROWS, usual)
    rows["base"] = {**usual, "delta": [0.0, 0.01], "acc_t2": [-0.5, -0.7]}
    lines = tables.table({"rows": rows}).splitlines()
    assert len(lines) == 2 + len(rows)
    base = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert base[:4] == ["base model", ".550 ± .071", "-.600 ± .141", ".005 ± .007"]
    alone = {"rows": {name: {c: v[:1] for c, v in rows[name].items()} for name in rows}}
    assert "±" not in tables.table(alone)
    assert tables.mean_and_spread([-1e-5, 0.0]) == ".000 ± .000"
    ranges = tables.summary({"rows": rows}).splitlines()
    assert len(ranges) == 2 + len(tables.SUMMARY)
    assert ranges[-1].startswith("| **SCoRe** |") and ranges[-1].count(".550 (.500 to .600)") == 3


def test_runs_with_other_rounding_are_compared_with_the_usual_ones_of_their_seeds():
    row = {"acc_t1": [0.5, 0.6], "acc_t2": [0.7, 0.9], "delta": [0.2, 0.3]}
    results = {"seeds": [4, 5], "rows": dict.fromkeys(tables.ROWS, row)}
    other = {"acc_t1": [0.65], "acc_t2": [0.88], "delta": [0.23]}
    elsewhere = {"two threads": {"seeds": [5], "rows": {"score": other}}}
    first, second = tables.rounding(results, elsewhere).splitlines()[2:]
    assert first == "| as above | .600 | .900 | .300 | .000 |"
    assert second == "| two threads | .650 | .880 | .230 | .070 |"
    both = {"seeds": [5, 9], "rows": {"stage1": row, "score": row}}
    one = {"seeds": [9], "rows": dict.fromkeys(("stage1", "score"), other)}
    lines = tables.first_seeds({"here": both, "there": one}).splitlines()[2:]
    assert lines == [
        "| 5 | here | .500 / .700 | .500 / .700 |",
        "| 9 | here | .600 / .900 | .600 / .900 |",
        "| 9 | there | .650 / .880 | .650 / .880 |",
    ]


def test_holm_multiplies_by_the_number_of_claims_left_and_never_falls():
    # sorted: .01 * 4, .02 * 3, .03 * 2, .5; the third is not below the second
    assert tables.holm([0.03, None, 0.01, 0.5, 0.02]) == [0.06, None, 0.04, 0.5, 0.06]


def test_a_claim_is_confirmed_only_if_the_numbers_show_it():
    usual = {name: [0.50, 0.61, 0.72] for name in (*tables.COLUMNS, "given", "own")}
    rows = {name: dict(usual) for name in tables.ROWS}
    rows["direct"]["acc_t2"] = [0.30, 0.40, 0.53]
    rows["direct"]["delta"] = [0.80, 0.90, 1.03]
    rows["base"]["acc_t2"] = [0.52, 0.63, 0.73]  # gains more than half a point
    verdicts = {}
    for line in tables.claims({"rows": rows}).splitlines()[2:]:
        words, *_, verdict = (cell.strip() for cell in line.split("|")[1:-1])
        verdicts[words] = verdict
    assert len(verdicts) == len(tables.CLAIMS)
    assert verdicts["acc@t2: SCoRe > direct RL"] == "yes"
    assert verdicts["delta: SCoRe > direct RL"] == "**no**"
    assert verdicts["base model: acc@t1 ≥ acc@t2"] == "**no**"
    assert verdicts["Self-Refine: acc@t1 ≥ acc@t2"] == "yes"
    assert verdicts["delta: Stage I > base model"] == "**no**"  # no difference at all
    rows["base"]["acc_t2"] = [0.30, 0.40, 0.50]  # clearly worse, as in the paper: no better
    assert "| base model: acc@t1 ≥ acc@t2 | .610 | .400 |  | yes |" in tables.claims({"rows": rows})
    for moved in (0.02, -0.02):  # attempt 1 is held neither if it improves nor if it gets worse
        rows["stage1"] = {**usual, "acc_t1": [x + moved for x in usual["acc_t1"]]}
        line = next(x for x in tables.claims({"rows": rows}).splitlines() if "Stage I = base" in x)
        assert line.endswith("| **no** |")
    rows["direct"]["acc_t2"] = [0.30, 0.61, 0.72]  # better in one seed of three
    assert "not sure" in tables.claims({"rows": rows})


class InProcess:
    """Runs a job's command in this process; notes it in `calls`, and raises `stop` at `stop_at`."""

    calls, stop_at, stop = None, 0, None

    def __init__(self, command, *, env, stdout, stderr):
        self.command = command

    def wait(self):
        self.calls.append(self.command)
        if len(self.calls) == self.stop_at:
            raise self.stop
        mains = {"score.py": score.main, "eval.py": evaluation.main, "cell.py": cell.main}
        main = mains[Path(self.command[1]).name]
        return main(self.command[2:])

    def terminate(self):
        pass


@pytest.fixture
def calls(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(jobs_module, "subprocess", SimpleNamespace(Popen=InProcess))
    monkeypatch.setattr(Run, "stop_on_signals", lambda run: None)  # jobs are threads here
    monkeypatch.setattr(InProcess, "calls", [])
    return InProcess.calls


def test_the_whole_grid_runs_and_goes_on_after_a_stop(
    checkpoint, tmp_path, monkeypatch, calls, capsys
):
    flags = ["--seeds", "0", "--out", "grid", "--model", str(checkpoint), *TINY]
    monkeypatch.setattr(InProcess, "stop_at", 5)
    monkeypatch.setattr(InProcess, "stop", KeyboardInterrupt())
    assert reproduce.main(flags) == 130
    assert "the same command goes on" in capsys.readouterr().err
    one_step, steps = score.one_step, []

    def breaking(*what):
        steps.append(what)
        if len(steps) == 2:
            raise InputError("no space left")
        return one_step(*what)

    with monkeypatch.context() as patch:
        patch.setattr(score, "one_step", breaking)  # within a run, which is then resumed
        assert reproduce.main(flags) == 2
        assert "no space left" in capsys.readouterr().err
    before = len(calls)
    assert reproduce.main(flags) == 0
    assert [call[-1] for call in calls[before:]].count("--resume") == 1
    every = jobs("--seeds", 0, "--model", checkpoint)
    begun = len(calls)
    assert begun <= len(every) + 4  # interrupted jobs begin again, finished ones do not
    printed = capsys.readouterr().out
    out = tmp_path / "grid"
    results = json.loads((out / "results.json").read_text())
    assert tables.table(results) == (out / "table.md").read_text()
    assert tables.table(results) in printed and tables.summary(results) in printed
    for name in ("multipliers", "sft", "collapse", "attempts"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    star = json.loads((out / "seed-0" / "star" / "results.json").read_text())["star-3"]
    assert results["rows"]["star"]["acc_t2"] == [star["acc_t2"]]
    refined = json.loads((out / "seed-0" / "eval-refine-base" / "metrics.json").read_text())
    assert results["rows"]["refine"]["acc_t2"] == [refined["metrics"]["acc_t2"]]
    assert reproduce.main(flags) == 0 and len(calls) == begun
    assert reproduce.main([*flags, "--lr", "0.1"]) == 2
    assert "--problems 6: name another" in capsys.readouterr().err
    with locked(out):
        assert reproduce.main(flags) == 2
    assert "--out grid is in use" in capsys.readouterr().err


def test_settings_are_kept_once_a_run_has_begun_and_not_before(
    checkpoint, monkeypatch, calls, capsys
):
    out = ["--seeds", "0", "--out", "grid", *TINY]
    assert reproduce.main([*out, "--model", "./mistyped"]) == 2
    assert not calls and "--model ./mistyped cannot be loaded" in capsys.readouterr().err
    monkeypatch.setattr(InProcess, "stop", InputError("stop"))
    monkeypatch.setattr(InProcess, "stop_at", 1)  # before the first run has written anything
    assert reproduce.main([*out, "--model", str(checkpoint), "--clip", "2"]) == 2
    monkeypatch.setattr(InProcess, "stop_at", 3)
    assert reproduce.main([*out, "--model", str(checkpoint)]) == 2
    begun = len(calls)
    assert begun >= 3 and reproduce.main([*out, "--model", str(checkpoint), "--lr", "0.1"]) == 2
    assert "holds runs with" in capsys.readouterr().err and len(calls) == begun


def test_when_a_job_fails_the_others_are_told_to_save(monkeypatch):
    ended = []

    class Slow(InProcess):
        def wait(self):
            while not ended:
                time.sleep(0.01)
            return 1

        def terminate(self):
            ended.append(self.command[-1])

    class Broken(InProcess):
        def wait(self):
            while not running:
                time.sleep(0.01)
            return 3

    running = []

    def begin(command, **settings):
        if command[-1] == "slow":
            running.append(command)
            return Slow(command, **settings)
        return Broken(command, **settings)

    monkeypatch.setattr(jobs_module, "subprocess", SimpleNamespace(Popen=begin))
    folder = Path(tempfile.mkdtemp())
    grid = [
        jobs_module.Job(name, folder / name, "score.py", [name], "results.json", "stage2")
        for name in ("slow", "broken", "never")
    ]
    with pytest.raises(InputError, match="broken ended with status 3"):
        jobs_module.do_all([grid], 2, ["python"])
    assert ended == ["slow"] and not (folder / "never.log").exists()


def test_a_model_of_few_positions_has_fewer_attempts_in_a_row(tmp_path):
    tokenizer = gemma_tokenizer()
    model = gemma_model(tokenizer)
    for positions, expected in ((8192, 6), (2048, 2), (32768, 10)):
        model.config.max_position_embeddings = positions
        save_checkpoint(tmp_path / "model", model, tokenizer)
        flags = {"task": "math", "model": str(tmp_path / "model")}
        assert reproduce.most_attempts(configure(flags)) == expected
    assert reproduce.most_attempts(Config()) == 10


def test_a_run_that_fails_is_named_with_its_log(tmp_path, capsys):
    tokenizer = gemma_tokenizer()
    save_checkpoint(tmp_path / "model", gemma_model(tokenizer), tokenizer)
    flags = ["--seeds", "0", "--out", str(tmp_path / "grid"), "--model", str(tmp_path / "model")]
    flags += [*TINY, "--task", "math", "--data", str(tmp_path / "nowhere")]
    assert reproduce.main(flags) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"score 0 ended with status 2, see {tmp_path}/grid/seed-0/score.log" in message
    assert message.endswith(
        "nowhere is no folder: name the one that holds the .jsonl, .jsonl.gz files"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--alpha", "1"], "--alpha is what the methods differ in"),
        (["--adaptive-beta2"], "--adaptive-beta2 is what the methods differ in"),
        (["--seed", "3"], "--seed is what the methods differ in"),
        (["--seeds", "3-1"], "--seeds 3-1 cannot be read"),
        (["--seeds", "five"], "--seeds five cannot be read"),
        (["--only", "scores"], "--only scores is unknown"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--map", "--task", "math"], "--map is for the built-in task"),
        (["--k", "1"], "--k 1 leaves no sibling"),
        (["--chess"], "--chess"),
    ],
)
def test_bad_flags_give_one_sentence(flags, words, tmp_path, capsys):
    assert reproduce.main(["--out", str(tmp_path / "grid"), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1 and not (tmp_path / "grid").exists()


def test_the_multipliers_are_those_of_the_readme():
    for r1, r2 in ((0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)):
        first, second = pictures.multipliers("1", r1, r2)
        assert first == [0.0] * 3 and second == [r2 - 0.5] * 3
        first, second = pictures.multipliers("2", r1, r2)
        assert first == [r1 - 0.5] * 3 and second == [11 * (r2 - 0.5)] * 3


def test_what_is_corrected_is_a_share_of_wrong_first_attempts(tmp_path):
    metrics = {"acc_t1": 0.6, "delta_i_to_c": 0.1}
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "results.json").write_text(json.dumps({"base": {}, "stage2": metrics}))
    assert pictures.own(tmp_path, "score") == pytest.approx(0.25)


def test_the_map_runs_each_cell_and_subtracts_direct_rl(tmp_path, monkeypatch, calls, capsys):
    monkeypatch.setattr(landscape, "FARS", (0, 9))
    monkeypatch.setattr(landscape, "RIGHTS", (0.5,))
    fitted = []

    def fit(seed):
        fitted.append((sft.FAR, sft.PHASES[-1].right, sft.PHASES[-1].slip))
        tokenizer = sft.builtin_tokenizer()
        return sft.builtin_model(tokenizer, seed).eval(), tokenizer

    monkeypatch.setattr(learner, "fit_builtin", fit)
    for name in ("FAR", "PHASES"):  # cell.py sets them for its process
        monkeypatch.setattr(sft, name, getattr(sft, name))
    flags = ["--map", "--seeds", "6", "--out", "map", *TINY]
    assert reproduce.main(flags) == 0, capsys.readouterr().err
    often = (0.5, 0.5 * cell.SLIPS)
    assert set(fitted) == {(0, *often), (9, *often)}
    assert len(calls) == 2 * 2 and (tmp_path / "map" / "map.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "map" / "results.json").read_text())
    last = results["cells"][-1]
    assert (last["far"], last["right"], last["ceiling"]) == (9, 0.5, 1.0)
    folder = tmp_path / "map" / "far-9-right-0.5" / "seed-6"
    ours, theirs = (
        json.loads((folder / name / "results.json").read_text())["stage2"]["acc_t2"]
        for name in ("score", "direct")
    )
    assert landscape.gains(last, "acc_t2")[0] == ours - theirs
    steps = [
        len((folder / n / "metrics.jsonl").read_text().splitlines()) for n in ("score", "direct")
    ]
    assert steps == [5, 5]
    assert landscape.table(results) in capsys.readouterr().out
    assert reproduce.main(flags) == 0 and len(calls) == 4
    assert "±" not in landscape.table(results)
    twice = {key: value * 2 if isinstance(value, list) else value for key, value in last.items()}
    assert "± .000" in landscape.table({"cells": [twice]})


def test_what_a_changed_answer_gains_is_delta_over_the_changed_share_of_all_seeds():
    changed, delta = [[0.5] * 30, [0.1] * 30], [[0.2] * 30, [-0.1] * 30]
    assert pictures.gain_of_a_change(changed, delta) == pytest.approx([0.1 / 0.6] * 30)
    assert pictures.gain_of_a_change([[0.0]], [[0.0]]) == [0.0]


def test_rewritten_counts_what_does_not_keep_the_answer_of_right_and_of_wrong_first_attempts(
    tmp_path,
):
    seconds = [(1, "ok"), (1, "no 1"), (1, "no 1"), (1, "slow 1"), (0, "ok"), (0, "no 2")]
    rows = [{"task": "sums", "attempts": [{"reward": r1}, {"text": text}]} for r1, text in seconds]
    (tmp_path / "eval-attempts-score").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "eval-attempts-score" / "transcripts.jsonl").write_text(lines)
    assert reproduce.rewritten(tmp_path, "score") == (0.75, 0.5)
