"""Runs from end to end: folders, resuming, signals, bad input, alarms and the curve."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import read_state
from safetensors.torch import load_file, save_file

import eval as evaluation
import learner as learning
import models
import ranks
import runs
import score
from config import Config, plan_of
from figures import draw
from lora import load_checkpoint
from models import save_checkpoint
from runs import ALARM_STEPS, Progress, raise_alarms
from score import STAGES
from sft import builtin_model, builtin_tokenizer

SMALL = ["--batch", "8", "--k", "2", "--steps1", "5", "--steps2", "3", "--problems", "8"]
SMALL += ["--save-every", "2", "--show-every", "2"]


def run_score(*flags):
    return score.main([str(flag) for flag in flags])


@pytest.fixture(autouse=True)
def signals():
    """A run sets handlers for Ctrl-C and SIGTERM; this restores those from before the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt_at(monkeypatch, step, what):
    """Let `what` happen once, after the given step of the run."""
    one_step, fired = score.one_step, []

    def stepped(learner, run, *rest):
        line = one_step(learner, run, *rest)
        if line["step"] == step and not fired:
            fired.append(step)
            what()
        return line

    monkeypatch.setattr(score, "one_step", stepped)


def tree(folder: Path) -> dict:
    """Everything that a run produced, except times: lines, transcripts, results and weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = {p.name: load_checkpoint(str(p))[0].state_dict() for p in folder.glob("stage*")}
    flat = {f"{n}/{k}": v for n, w in weights.items() for k, v in w.items()}
    flat |= read_state(folder)
    return {
        "lines": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "samples": (folder / "samples.txt").read_text(),
        "results": json.loads((folder / "results.json").read_text()),
        "progress": json.loads((folder / "state" / "where.json").read_text())["progress"],
        "tensors": flat,
    }


def assert_equal(one: dict, two: dict):
    tensors, others = one.pop("tensors"), two.pop("tensors")
    assert one == two
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name  # bit for bit


@pytest.fixture
def finished(checkpoint, tmp_path):
    assert run_score("--model", checkpoint, "--out", tmp_path / "whole", *SMALL) == 0
    return tmp_path / "whole"


def test_a_run_writes_its_folder_and_checkpoints_load(finished):
    record = json.loads((finished / "config.json").read_text())
    assert record["settings"]["steps1"] == 5 and record["versions"]["torch"] == torch.__version__
    lines = tree(finished)["lines"]
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["stage"] for line in lines] == ["1"] * 5 + ["2"] * 3
    assert lines[0]["kl_t1"] == 0 == lines[0]["kl_t2"] and lines[4]["kl_t1"] > 0
    assert all(line["on_policy_gap"] < 1e-3 for line in lines)
    for stage in ("stage1", "stage2"):
        model, tokenizer = load_checkpoint(str(finished / stage))
        assert tokenizer.chat_template and model.config._attn_implementation == "grouped"
    samples = (finished / "samples.txt").read_text()
    assert "attempt 1" in samples and "wrong" in samples and "problem" in samples
    assert not [path for path in finished.iterdir() if path.suffix in (".part", ".old")]


def test_a_signal_saves_and_resume_goes_on_bit_for_bit(
    finished, checkpoint, tmp_path, monkeypatch, capsys
):
    # Between two saves, in Stage I and in Stage II. SIGTERM preempts a job, which is no failure.
    for step, number, status in ((2, signal.SIGINT, 130), (6, signal.SIGTERM, 0)):
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            interrupt_at(patch, step, lambda number=number: os.kill(os.getpid(), number))
            assert run_score("--model", checkpoint, "--out", out, *SMALL) == status
        assert f"python score.py --resume --out {out}" in capsys.readouterr().out
        saved = json.loads((out / "state" / "where.json").read_text())["progress"]["step"]
        assert run_score("--resume", "--out", out) == 0
        assert f"after {saved} saved steps" in capsys.readouterr().out
        assert_equal(tree(out), tree(finished))


def test_a_crash_loses_at_most_the_steps_since_the_last_save(
    finished, checkpoint, tmp_path, monkeypatch
):
    out = tmp_path / "crashed"

    def crash():
        raise MemoryError

    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, crash)
        with pytest.raises(MemoryError):
            run_score("--model", checkpoint, "--out", out, *SMALL)
    assert json.loads((out / "state" / "where.json").read_text())["progress"]["step"] == 2
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "torn')  # as a kill in the middle of a write leaves it
    assert run_score("--resume", "--out", out) == 0
    assert_equal(tree(out), tree(finished))


def test_kill_9_at_any_moment_leaves_a_run_that_resumes(finished, checkpoint, tmp_path):
    out = tmp_path / "killed"
    command = [sys.executable, score.__file__, "--model", checkpoint, "--out", out, *SMALL]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists():  # the first step is written
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert run_score("--resume", "--out", out) == 0
    assert_equal(tree(out), tree(finished))


def test_a_kill_between_the_two_moves_of_a_save_leaves_a_run_that_resumes(
    finished, checkpoint, tmp_path, monkeypatch
):
    out, replace_folder = tmp_path / "moved", runs.replace_folder

    def killed(folder, part):
        if json.loads((part / "where.json").read_text())["progress"]["step"] == 4:
            folder.rename(folder.with_name("state.old"))
            raise KeyboardInterrupt
        replace_folder(folder, part)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "replace_folder", killed)
        assert run_score("--model", checkpoint, "--out", out, *SMALL) == 130
    assert not (out / "state").exists() and (out / "state.part").exists()
    assert run_score("--resume", "--out", out) == 0
    assert_equal(tree(out), tree(finished))
    assert not list(out.glob("state.*"))


def test_stage_2_goes_on_from_stage_1_in_a_second_command(finished, checkpoint, tmp_path, capsys):
    out = tmp_path / "apart"
    assert run_score("--model", checkpoint, "--out", out, "--stage", "1", *SMALL) == 0
    assert f"python score.py --stage 2 --out {out}" in capsys.readouterr().out
    assert run_score("--stage", "2", "--out", out) == 0  # with the settings of Stage I
    apart, whole = tree(out), tree(finished)
    for tree_ in (apart, whole):
        del tree_["progress"]
    assert_equal(apart, whole)
    assert json.loads((out / "config.json").read_text())["earlier"][0]["settings"]["stage"] == "1"


def test_an_interrupted_stage_2_is_not_begun_again_over_itself(
    checkpoint, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "half"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_score("--model", checkpoint, "--out", out, *SMALL) == 130
    before = tree(out)
    assert run_score("--stage", "2", "--out", out) == 2
    assert "--resume" in capsys.readouterr().err
    assert_equal(tree(out), before)


@pytest.mark.parametrize(("steps1", "saved_at"), [(5, [2, 4, 2]), (1, [1, 2])])
def test_a_short_last_window_does_not_choose_the_checkpoint(
    steps1, saved_at, checkpoint, tmp_path, monkeypatch
):
    seen, keep_best = [], learning.keep_best

    def recorded(learner, run, progress, *stage):
        seen.append(progress.step)
        keep_best(learner, run, progress, *stage)

    monkeypatch.setattr(learning, "keep_best", recorded)
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL, "--steps1", steps1]
    assert run_score(*flags) == 0
    assert seen == saved_at


def test_single_turn_rl_is_a_run_of_its_own(checkpoint, tmp_path, capsys):
    out = tmp_path / "single"
    flags = ["--model", checkpoint, "--out", out, *SMALL]
    assert run_score(*flags, "--stage", "0", "--steps1", 3, "--save-every", 1) == 0
    assert set(tree(out)["results"]) == {"base", "base, sampled", "stage0"}
    assert f"next: python eval.py --model {out}/stage0" in capsys.readouterr().out
    assert run_score("--out", out, "--stage", "2") == 2  # Stage II goes on only from Stage I
    assert "holds a run already" in capsys.readouterr().err
    assert draw(out).stat().st_size > 5000


def test_the_checkpoint_kept_is_that_of_the_best_attempts_that_the_stage_trains(
    tmp_path, monkeypatch
):
    saved = []
    monkeypatch.setattr(models, "save_checkpoint", lambda folder, *_: saved.append(folder.name))
    monkeypatch.setattr(ranks, "unshard", lambda *_: None)
    learner = SimpleNamespace(
        policy=None,
        full_copy=None,
        chat=SimpleNamespace(tokenizer=None),
        cfg=Config(save_every=1),
    )
    run, progress = runs.Run(tmp_path), Progress()
    for stage, lines in (
        ("0", [(0.1, 0.9), (0.2, 0.1), (0.1, 0.9)]),
        ("1", [(0.9, 0.1), (0.1, 0.2)]),
        ("1b", [(0.1, 0.9), (0.1, 0.2), (0.1, 0.1)]),
        ("pair", [(0.9, 0.9), (0.1, 0.1)]),
    ):
        progress.best = -1.0
        for acc_t1, acc_t2 in lines:
            run.lines.append({"acc_t1": acc_t1, "acc_t2": acc_t2, "acc_t3": 1 - acc_t2})
            progress.step += 1
            learning.keep_best(learner, run, progress, STAGES[stage])
    # the best attempts 1, attempts 2 and attempts 3 (1 - acc_t2); SFT keeps every checkpoint
    expected = [f"stage{stage}" for stage in ("0", "0", "1", "1", "1b", "1b", "1b")]
    assert saved == [*expected, "pair", "pair"]


def test_two_commands_never_write_to_one_folder(checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "run"
    with runs.locked(out):
        assert run_score("--model", checkpoint, "--out", out, *SMALL) == 2
        assert f"--out {out} is in use" in capsys.readouterr().err
    assert not out.parent.exists()  # folders that stayed empty are removed
    assert run_score("--model", checkpoint, "--out", out, *SMALL, "--stage", "1") == 0


def test_stage_2_goes_on_in_a_folder_that_was_moved(checkpoint, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert run_score("--model", checkpoint, "--out", old, "--stage", "1", *SMALL) == 0
    old.rename(new)
    assert run_score("--stage", "2", "--out", new) == 0
    assert json.loads((new / "config.json").read_text())["settings"]["out"] == str(new)
    assert not old.exists()


def test_a_signal_during_the_exchange_of_signals_is_not_lost(checkpoint, tmp_path, monkeypatch):
    all_gather, out = ranks.all_gather, tmp_path / "run"

    def interrupted(items):
        found = all_gather(items)
        if items == [0] and len((out / "metrics.jsonl").read_text().splitlines()) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(ranks, "all_gather", interrupted)
    assert run_score("--model", checkpoint, "--out", out, *SMALL) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_stages_may_repeat(checkpoint, tmp_path):
    plan = [(stage.name, stage.folder) for stage in plan_of("1,2,1", STAGES)]
    assert plan == [("1", "stage1"), ("2", "stage2"), ("1", "stage1-2")]
    flags = ["--model", checkpoint, "--out", tmp_path / "twice", "--stage", "1,2,1,2", *SMALL]
    assert run_score(*flags, "--steps1", 1, "--steps2", 1) == 0
    names = {path.name for path in (tmp_path / "twice").glob("stage*")}
    assert names == {"stage1", "stage2", "stage1-2", "stage2-2"}


def test_the_control_starts_from_the_base_with_init(checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--init", checkpoint, "--stage", "2", "--alpha", "0", *SMALL]
    assert run_score(*flags, "--out", tmp_path / "control") == 0
    assert (tmp_path / "control" / "stage2" / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage", "3"], "--stage 3"),
        (["--stage", ""], "--stage"),
        (["--stage", "2"], "goes on from a stage 1"),
        (["--k", "1"], "--k 1"),
        (["--batch", "10", "--k", "4"], "--batch 10"),
        (["--beta1", "-0.1"], "--beta1"),
        (["--beta2", "nan"], "--beta2"),
        (["--lr", "0"], "--lr"),
        (["--steps1", "0"], "--steps1"),
        (["--max-new-tokens", "-3"], "--max-new-tokens"),
        (["--offline", "1.5"], "--offline"),
        (["--task", "chess"], "--task chess"),
        (["--init", "empty"], "no config.json"),
        (["--model", "empty"], "no config.json"),
        (["--model", "no/such"], "no/such"),
        (["--model", "/no/such"], "there is no checkpoint folder /no/such: correct the path"),
        (["--init", "runs/no/such"], "there is no checkpoint folder runs/no/such"),
        (["--init", ""], "--init is empty: give it a value, or leave it out"),
        (["--precision", "int4"], "--precision int4"),
        (["--recompute", "2"], "--recompute 2"),
        (["--temperature", "0"], "--temperature"),
        (["--model", "endless"], "no end token"),
        (["--model", "torn"], "torn"),
        (["--model", "half"], "weights are missing"),
        (["--init", "wide"], "another architecture"),
        (
            ["--max-new-tokens", "200"],
            "--max-new-tokens 200 is too many: the shortest prompt and 2 attempts are",
        ),
        (["--out", "a file"], "a file"),
        (["--resume"], "no run to resume"),
        (["--unknown", "1"], "--unknown"),
        (["--lr", "inf"], "--lr"),
        (["--out", "a file/run"], "a file"),
        (["--out", "torn"], "holds no run, but other files"),
        (["--out", "notes"], "holds no run, but other files"),
        (["--data", "notes"], "--data notes is for --task math or answers or code"),
        (["--k", "two"], "--k"),
        (["--temperature", "1e-40"], "--temperature 1e-40"),
        (["--seed", str(2**63)], "--seed"),
        (["--task", "help"], "--task help"),
        (["--out", "/proc/run"], "--out /proc/run"),
        (["--out", "x" * 300], "cannot be written"),
        (["--out", "/proc"], "--out /proc cannot be written"),
        (["--model", "wordless"], "wordless has a tokenizer of"),
        (["--model", "of a run"], "is no checkpoint: name a folder in it, such as"),
        (["--prompt", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--correction", "blank.txt"], "--correction blank.txt is empty"),
        (["--columns", "a,b"], "--columns a,b is for --task answers"),
        (["--task", "answers"], "--task answers needs --data"),
        (["--task", "nowhere.py"], "nowhere.py does not exist"),
        (["--eval-every", "-1"], "--eval-every -1"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_2_and_writes_nothing(
    flags, words, checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }} x"
    save_checkpoint(tmp_path / "endless", builtin_model(tokenizer, 0), tokenizer)
    shutil.copytree(checkpoint, "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"no weights")
    shutil.copytree(checkpoint, "half")
    weights = load_file("half/model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, "half/model.safetensors")
    wide = builtin_model(tokenizer, 0)
    wide.resize_token_embeddings(200)
    save_checkpoint(tmp_path / "wide", wide, tokenizer)
    shutil.copytree(checkpoint, "wordless")
    for path in (tmp_path / "wordless").glob("*token*"):
        path.unlink()
    for stage in ("stage1", "stage2"):
        shutil.copytree(checkpoint, tmp_path / "of a run" / stage)
    (tmp_path / "of a run" / "metrics.jsonl").write_text("{}")
    (tmp_path / "of a run" / "config.json").write_text("{}")
    (tmp_path / "blank.txt").write_text(" ")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "a file").write_text("not a folder")
    before = sorted(tmp_path.rglob("*"))
    model = [] if "--model" in flags or "--resume" in flags else ["--model", str(checkpoint)]
    assert run_score(*model, *flags) == 2
    message = capsys.readouterr().err
    assert words in message and "Traceback" not in message
    lines = [line for line in message.splitlines() if not line.startswith("skipped")]
    assert [line for line in lines if not line.endswith("asking the Hugging Face hub")] == lines[
        -1:
    ]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_is_never_overwritten(finished, checkpoint, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for stage in ("1,2", "1", "2"):
        assert run_score("--model", checkpoint, "--out", finished, "--stage", stage) == 2
        message = capsys.readouterr().err
        assert "--resume" in message and "--out" in message
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_resuming_with_another_setting_is_refused(finished, capsys):
    assert run_score("--resume", "--out", finished, "--lr", "0.5") == 2
    assert "--lr 0.5" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(finished, capsys):
    before = tree(finished)
    assert run_score("--resume", "--out", finished) == 0
    assert "next: python eval.py --model" in capsys.readouterr().out
    assert_equal(tree(finished), before)


# --- Nothing is lost ---------------------------------------------------------------------------


def test_what_training_did_not_write_stays_in_a_checkpoint_folder(checkpoint, tmp_path):
    out = tmp_path / "run"
    flags = ["--model", checkpoint, "--out", out, *SMALL, "--stage", "1"]
    (out / "stage1" / "notes").mkdir(parents=True)  # as if there had been an export before
    (out / "stage1" / "notes" / "a.txt").write_text("mine")
    (out / "stage1" / "config.json").write_text("not mine")
    save_checkpoint(out / "stage1", *load_checkpoint(str(checkpoint)))
    shutil.rmtree(out / "notes", ignore_errors=True)
    assert (out / "stage1" / "notes" / "a.txt").read_text() == "mine"
    assert load_checkpoint(str(out / "stage1"))
    shutil.rmtree(out)
    assert run_score(*flags) == 0
    (out / "stage1" / "a.txt").write_text("mine")
    assert run_score("--resume", "--out", out, "--steps1", 7) == 0
    assert (out / "stage1" / "a.txt").read_text() == "mine"


def test_more_steps_may_be_made_after_the_end_as_if_they_had_been_planned(
    finished, checkpoint, tmp_path, capsys
):
    whole = tmp_path / "longer"
    flags = ["--model", checkpoint, *SMALL, "--steps2", 6]
    assert run_score(*flags, "--out", whole) == 0
    assert run_score("--resume", "--out", finished, "--steps1", 9) == 2
    assert "--steps1 9 is too late, since its stage ended after 5 steps" in capsys.readouterr().err
    assert run_score("--resume", "--out", finished, "--steps2", 2) == 2
    assert "--steps2 2 is less than the 3 steps that were made" in capsys.readouterr().err
    assert run_score("--resume", "--out", finished, "--steps2", 6) == 0
    assert_equal(tree(finished), tree(whole))
    record = json.loads((finished / "config.json").read_text())
    assert record["settings"]["steps2"] == 6
    assert record["earlier"][0]["settings"]["steps2"] == 3
    episodes = [json.loads(line) for line in (finished / "episodes.jsonl").open()]
    assert sum(one["source"] == "stage2, held out" for one in episodes) == 8


def test_a_full_disk_gives_one_sentence_and_the_last_state_is_kept(finished, checkpoint, tmp_path):
    out = tmp_path / "full"
    code = """
import resource, signal, sys
import score
size, one_step = int(sys.argv[1]), score.one_step
def stepped(learner, run, *rest):
    if len(run.lines) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return one_step(learner, run, *rest)
score.one_step = stepped
sys.exit(score.main(sys.argv[2:]))
"""
    for size in (100, 100_000):  # too small for a log; for weights
        flags = ["--model", checkpoint, "--out", out, *SMALL]
        command = [sys.executable, "-c", code, size, *flags]
        folder = Path(score.__file__).parent
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, cwd=folder, check=False
        )
        said = [line for line in done.stderr.splitlines() if line.startswith("score.py:")]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert len(said) == 1 and "cannot be written (" in said[0] and "is kept" in said[0]
        assert run_score("--resume", "--out", out) == 0
        assert_equal(tree(out), tree(finished))
        shutil.rmtree(out)


def test_a_run_begins_only_where_there_is_room_for_it(checkpoint, tmp_path, monkeypatch, capsys):
    weights = sum(w.numel() for w in load_checkpoint(str(checkpoint))[0].parameters())
    needed = weights * (4 * 3 + 12 * 2)  # two checkpoints, one that is being written; two states
    flags = ["--model", checkpoint, *SMALL]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    assert run_score(*flags, "--out", tmp_path / "small") == 2
    assert "GB are free: name another" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert run_score(*flags, "--out", tmp_path / "enough") == 0


def test_an_old_run_hides_no_mistyped_setting(finished, capsys):
    for flags, words in (
        (["--stage", "3"], "--stage 3 is unknown"),
        (["--alpha", "nan"], "--alpha nan"),
        (["--k", "3"], "--batch 128 is not divisible by --k 3"),
        (["--stage", "2", "--k", "3"], "--batch 8 is not divisible by --k 3"),
        (["--stage", "2", "--batch", "12"], "holds a run already"),
    ):
        assert run_score("--out", finished, *flags) == 2
        assert words in capsys.readouterr().err


def test_the_commands_that_are_printed_work_as_they_stand(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    out = "two words/it's"
    flags = ["--model", checkpoint, "--out", out, *SMALL, "--max-new-tokens", 12]
    for stage, programs in (("1", ["score.py"]), ("2", ["eval.py", "eval.py"])):
        given = flags if stage == "1" else ["--out", out]
        assert run_score(*given, "--stage", stage) == 0
        printed = capsys.readouterr().out.rpartition("next: ")[2].strip()
        commands = [shlex.split(part) for part in printed.split(", or ")]
        assert [command[1] for command in commands] == programs
    assert commands[0][2:] == ["--model", f"{out}/stage2"]  # other settings come from the run
    for _python, _script, *words in commands:
        assert evaluation.main(words) == 0
    assert (Path(out) / "eval" / "stage2" / "metrics.json").exists()
    assert (Path(out) / "report.html").exists()


def test_a_run_goes_on_from_another_folder_and_with_a_base_that_was_moved(
    finished, checkpoint, tmp_path, monkeypatch, capsys
):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(checkpoint, start / "base model")
    monkeypatch.chdir(start)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_score("--model", "base model", "--out", "run", *SMALL) == 130
    record = json.loads((start / "run" / "config.json").read_text())
    assert record["settings"]["model"] == str(start / "base model")
    assert record["typed"]["model"] == "base model"
    monkeypatch.chdir(elsewhere)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_score("--resume", "--out", start / "run") == 130
    (start / "base model").rename(elsewhere / "moved")
    assert run_score("--resume", "--out", start / "run") == 2
    assert "there is no checkpoint folder" in capsys.readouterr().err
    save_checkpoint(elsewhere / "other", builtin_model(builtin_tokenizer(), 1), builtin_tokenizer())
    assert run_score("--resume", "--out", start / "run", "--model", "other") == 2
    assert "other weights than the base of the run" in capsys.readouterr().err
    assert run_score("--resume", "--out", start / "run", "--model", "moved") == 0
    assert_equal(tree(start / "run"), tree(finished))


def test_the_first_ctrl_c_is_answered_at_once(checkpoint, tmp_path, monkeypatch, capfd):
    said = []

    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        said.append(capfd.readouterr().err)

    interrupt_at(monkeypatch, 1, interrupted)
    assert run_score("--model", checkpoint, "--out", tmp_path / "run", *SMALL) == 130
    assert "stopping after this step" in said[0]


def test_held_out_metrics_come_as_often_as_is_asked_and_change_nothing(
    finished, checkpoint, tmp_path
):
    out = tmp_path / "watched"
    assert run_score("--model", checkpoint, "--out", out, *SMALL, "--eval-every", 3) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if "held_out" in line] == [2, 5]
    watched, plain = tree(out), tree(finished)
    assert set(lines[2]["held_out"]) >= {"acc_t1", "acc_t2", "delta"}
    for line in watched["lines"]:
        line.pop("held_out", None)
    assert_equal(watched, plain)


def test_tensorboard_gets_the_metrics_if_it_is_installed(checkpoint, tmp_path, monkeypatch, capsys):
    written, out = [], tmp_path / "run"

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

    flags = ["--model", checkpoint, *SMALL, "--tensorboard", 1, "--eval-every", 8]
    fake = SimpleNamespace(SummaryWriter=Writer)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", fake)
        assert run_score(*flags, "--out", out) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert written[0] == (out / "tensorboard", 0)
    for line in lines:
        assert ("train/acc_t2", line["acc_t2"], line["step"]) in written
    assert ("held out/delta", lines[7]["held_out"]["delta"], 7) in written
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run_score(*flags, "--out", tmp_path / "other") == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


FILES = ["metrics.jsonl", "config.json", "results.json"]
FILES += [f"state/{name}" for name in ("where.json", ".metadata", "__0_0.distcp")]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_a_damaged_file_is_named_and_kept_on_resume(name, damage, finished, capsys):
    path = finished / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\0garbage" + whole)
    others = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert run_score("--resume", "--out", finished, "--steps2", 6) == 2
    message = capsys.readouterr().err
    named = "state" if name in ("state/.metadata", "state/__0_0.distcp") else name
    assert named in message and message.count("\n") == 1
    assert others == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


def line(step, **metrics):
    usual = {
        "stage": "1",
        "acc_t1": 0.5,
        "acc_t2": 0.6,
        "copied": 0.5,
        "cut_off": 0.0,
        "unreadable": 0.0,
        "on_policy_gap": 0.0,
        "kl_t1": 0.0,
        "kl_t2": 0.0,
    }
    return {"step": step, **usual, **metrics}


@pytest.mark.parametrize(
    ("metrics", "word"),
    [
        ({"copied": 0.96}, "collapse"),
        ({"acc_t1": 0.44, "acc_t2": 0.7}, "sabotage"),
        ({"cut_off": 0.11}, "cut off"),
        ({}, None),
        ({"acc_t1": 0.44, "acc_t2": 0.4}, None),
        ({"copied": 0.98}, "collapse"),
        ({"copied": 0.97}, None),  # the base model does so, too
        ({"acc_t1": 0.0, "acc_t2": 0.0, "copied": 0.99}, "no reward"),  # not a collapse
        ({"unreadable": 0.97, "copied": 0.99}, "no reward"),
        ({"on_policy_gap": 0.6}, "sampled and scored differ, by over .5 nats a token"),
    ],
)
def test_an_alarm_is_raised_once(metrics, word, capsys):
    copied = metrics.get("copied", 0.9) - 0.01 if word else 0.975
    base = {"acc_t1": 0.5, "acc_t2": 0.5, "copied": copied}
    progress = Progress(step=ALARM_STEPS)
    lines = [line(step, **metrics) for step in range(ALARM_STEPS)]
    raised = raise_alarms(lines, base, progress, fresh=True)
    assert [text.split(":")[0] for text in raised] == ([word] if word else [])
    assert raise_alarms(lines, base, progress, fresh=True) == []
    assert (word or "alarm") in capsys.readouterr().out or not word


@pytest.mark.parametrize(
    ("metrics", "word"),
    [({"unreadable": 0.97}, "no reward"), ({"cut_off": 0.2}, "cut off"), ({"copied": 1.0}, None)],
)
def test_a_base_model_that_cannot_learn_is_an_alarm_at_the_first_step(metrics, word):
    base = {"acc_t1": 0.5, "acc_t2": 0.5, "copied": 0.9, "cut_off": 0.0, "unreadable": 0.0}
    base |= metrics
    raised = raise_alarms([line(0)], base, Progress(step=1), fresh=True)
    assert [text.split(":")[0] for text in raised] == ([word] if word else [])
    assert raise_alarms([line(0)], base, Progress(step=1), fresh=False) == []  # begun elsewhere
    assert raise_alarms([line(0), line(1)], base, Progress(step=2), fresh=True) == []


def test_a_kl_at_step_0_is_an_alarm_unless_the_policy_began_elsewhere():
    base, lines = {"acc_t1": 0.5, "acc_t2": 0.5, "copied": 0.5}, [line(0, kl_t1=0.01)]
    assert "KL" in raise_alarms(lines, base, Progress(step=1), fresh=True)[0]
    assert raise_alarms(lines, base, Progress(step=1), fresh=False) == []
    assert raise_alarms([line(0)], base, Progress(step=1), fresh=True) == []


def test_the_curve_is_drawn(finished, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    assert evaluation.main(["--plot", str(finished)]) == 0
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluation.main(["--plot", str(finished)]) == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err


def test_a_run_of_another_version_is_not_resumed(finished, capsys):
    record = json.loads((finished / "config.json").read_text())
    del record["settings"]["rows"]
    (finished / "config.json").write_text(json.dumps(record))
    assert run_score("--resume", "--out", finished) == 2
    assert "another version" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_ends_the_run(checkpoint, tmp_path, capsys):
    assert run_score("--model", checkpoint, "--out", tmp_path / "x", *SMALL, "--lr", "1e30") == 2
    message = capsys.readouterr().err
    assert "lower --lr" in message and "Traceback" not in message


def test_the_builtin_model_is_the_same_in_memory_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "learner.fit_builtin", lambda seed: (builtin_model(t := builtin_tokenizer(), seed), t)
    )
    for precision in ("float32", "bfloat16"):
        flags = [*SMALL, "--precision", precision, "--steps1", "1", "--steps2", "1"]
        once, twice = tmp_path / f"once-{precision}", tmp_path / f"twice-{precision}"
        assert run_score("--out", once, *flags) == 0
        assert run_score("--out", twice, *flags, "--stage", "1") == 0
        assert run_score("--out", twice, "--stage", "2") == 0
        one, two = tree(once), tree(twice)
        assert one["lines"][0]["kl_t2"] == 0
        assert one["lines"] == two["lines"]
