"""Flags that cannot work, what needs no torch, and what the files of the project may import."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from test_runs import SMALL, run_score, signals  # noqa: F401

from config import EVAL_EXAMPLES, EXAMPLES, GROUPS, Config, parse_train_flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage", "1,1b,2"], "--attempts 2 is too few"),
        (["--attempts", "1"], "--attempts 1 is too few"),
        (["--stage", "star", "--attempts", "3"], "--attempts 3 is not for --stage star"),
        (["--stage", "0", "--offline", "0.5"], "--offline 0.5 is not for --stage 0"),
        (["--stage", "1,1b", "--attempts", "3", "--offline", "1"], "is not for --stage 1b"),
        (["--adaptive-beta2", "--beta2", "0"], "--adaptive-beta2 needs Stage I and a --beta2"),
        (["--adaptive-beta2", "--stage", "pair"], "--adaptive-beta2 needs Stage I"),
        (["--stage", "1b", "--attempts", "3"], "goes on from a stage 1"),
        (["--stage", "stars"], "--stage stars is unknown"),
    ],
)
def test_stages_that_cannot_work_give_one_sentence(flags, words, checkpoint, tmp_path, capsys):
    assert run_score("--model", checkpoint, "--out", tmp_path / "run", *SMALL, *flags) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


ROOT = Path(__file__).parent.parent


def started(script, folder, fake_torch, *flags):
    """Run a script of this project in a process of its own, where `fake_torch` is torch."""
    (folder / "torch.py").write_text(fake_torch)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("script", ["score.py", "eval.py"])
def test_help_and_a_mistyped_flag_do_not_wait_for_torch(script, tmp_path):
    fake = "raise SystemExit('torch was loaded')"
    done = started(script, tmp_path, fake, "--help")
    assert done.returncode == 0 and "--temperature" in done.stdout and not done.stderr
    done = started(script, tmp_path, fake, "--outt", "x")
    assert done.returncode == 2
    assert done.stderr == f"{script}: unrecognized arguments: --outt x; see --help\n"
    assert "torch was loaded" in started(script, tmp_path, fake).stderr  # the fake torch is used


def test_help_groups_every_setting_and_its_examples_are_right(tmp_path):
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert sorted(grouped) == sorted(item.name for item in fields(Config))
    shown = started("score.py", tmp_path, "", "--help").stdout
    assert all(f"\n{title}:\n" in shown for title in GROUPS) and EXAMPLES in shown
    lines = [line.split("  ")[1] for line in EXAMPLES.splitlines()[1:]]
    assert all(parse_train_flags("", line.split()[2:]) is not None for line in lines)
    shown = started("eval.py", tmp_path, "", "--help").stdout
    assert EVAL_EXAMPLES in shown and "\nattempts:\n" in shown


@pytest.mark.parametrize("script", ["score.py", "eval.py"])
def test_ctrl_c_while_torch_is_loaded_prints_nothing(script, tmp_path):
    fake = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    done = started(script, tmp_path, fake)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_it_trains_on_a_system_without_fcntl_and_resource(checkpoint, tmp_path):
    """This is as on Windows, where programs cannot be run: one sentence says so."""
    code = """
import contextlib, sys
with contextlib.suppress(ImportError):
    import psutil  # has other modules of its own on Windows
sys.modules.update(fcntl=None, resource=None)
import score, rewards
from data import InputError, Problem
status = score.main(sys.argv[1:])
try:
    rewards.code_rewards(["def f(): return 1"], [Problem("", "", "code", "", tests=("f()",))])
except InputError as error:
    print(error)
sys.exit(status)
"""
    flags = ["--model", checkpoint, "--out", tmp_path / "run", *SMALL]
    command = [sys.executable, "-c", code, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "stage2" / "config.json").exists()
    assert "--task code needs Linux or macOS for its sandbox" in done.stdout


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, at its top or within functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom)]
    return (
        found | {n.module for n in froms} | {f"{n.module}.{a.name}" for n in froms for a in n.names}
    )


def test_imports_go_one_way():
    files = {p.stem: p for p in ROOT.glob("*.py")}
    files |= {f"checkers.{p.stem}": p for p in ROOT.glob("checkers/[a-z]*.py")}
    needs = {name: imported(path) & set(files) for name, path in files.items()}
    assert not any("experiments" in name for path in files.values() for name in imported(path))
    while free := [name for name, others in needs.items() if not others]:
        needs = {name: others - set(free) for name, others in needs.items() if name not in free}
    assert not needs, f"a circle: {needs}"


def test_only_ranks_imports_torch_distributed():
    users = {p.stem for p in ROOT.glob("*.py") if "torch.distributed" in imported(p)}
    assert users == {"ranks"}


def test_stages_are_named_only_in_their_table():
    named = re.compile(r'"(0|1|1b|2|star|pair)[+"]')
    table = ROOT.joinpath("score.py").read_text()
    start, end = table.index("\nSCORE = ("), table.index("\nSTAGES = {")
    rest = table[:start] + table[end:]
    for path in ROOT.glob("*.py"):
        found = [x[0] for x in named.finditer(rest if path.stem == "score" else path.read_text())]
        assert not found, (path.name, found)
    assert len(named.findall(table[start:end])) > 8
