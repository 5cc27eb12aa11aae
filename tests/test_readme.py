"""The README is true: its commands parse, its settings are the defaults, its metrics are logged."""

import json
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import metrics
import score
from config import Config, check_settings, configure, parse_eval_flags, parse_train_flags, plan_of
from experiments import landscape, memory, reproduce, tables
from sample import Attempt, Episode
from score import STAGES
from sft import builtin_model, builtin_tokenizer
from tasks import TASKS

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
launcher = get_args_parser()
COMMANDS = [line.partition("#")[0] for block in BLOCKS[1:] for line in block.splitlines()]


def test_the_first_block_is_the_two_commands():
    train, check = BLOCKS[0].splitlines()
    assert "-r requirements.txt" in train and train.endswith("python score.py")
    assert "-r requirements-dev.txt" in check and check.endswith("python -m pytest -q -n 2")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    program, *words = shlex.split(command)
    if program == "torchrun":
        launch = launcher.parse_args(words)
        words = [launch.training_script, *launch.training_script_args]
    else:
        assert program == "python"
    script, *flags = words
    if script == "score.py":
        typed = parse_train_flags("", flags)
        cfg = configure(typed)
        check_settings(cfg, plan_of(cfg.stage, STAGES))
    elif script == "eval.py":
        assert parse_eval_flags("", flags)
    elif script == "experiments/reproduce.py":
        assert reproduce.parse_flags(flags)
    else:
        assert (Path(score.__file__).parent / script).exists()


def test_the_settings_it_names_are_the_defaults():
    cfg = Config()
    for claim in (
        f"`k = {cfg.k}`",
        f"α = {cfg.alpha:g}",
        f"β1 = {cfg.beta1:g}",
        f"β2 = {cfg.beta2:g}",
        f"{cfg.steps1} + {cfg.steps2}",
        f"batch {cfg.batch}",
        f"--steps2 {cfg.steps1 + cfg.steps2}",
        f"{builtin_model(builtin_tokenizer(), seed=0).num_parameters():,} weights",
        f"learning rate {cfg.lr * 1e4:g}e-4",
    ):
        assert claim in README, claim


def test_the_memory_tables_are_what_their_command_prints():
    cfg = configure({"task": "math"})
    benchmarks = (Path(score.__file__).parent / "BENCHMARKS.md").read_text()
    assert memory.table(cfg) in benchmarks and memory.what_fits(cfg) in benchmarks


def test_the_tables_are_those_of_the_results_in_assets():
    root = Path(score.__file__).parent
    results = json.loads((root / "assets" / "results.json").read_text())
    assert results["settings"] == {} and len(results["seeds"]) >= 5
    published = (root / "RESULTS.md").read_text()
    assert tables.table(results) in published and tables.claims(results) in published
    elsewhere = {words: tables.read(name) for name, words in tables.ELSEWHERE.items()}
    assert tables.rounding(results, elsewhere) in published
    assert tables.summary(results, elsewhere.values()) in README
    of_the_map = json.loads((root / "assets" / "map.json").read_text())
    assert of_the_map["settings"] == {} and len(of_the_map["seeds"]) == 3
    assert landscape.table(of_the_map) in published
    seeds = f"--seeds {results['seeds'][0]}-{results['seeds'][-1]}"
    assert seeds in README and seeds in published


def test_the_settings_of_math_are_table_8():
    cfg = configure({"task": "math"})
    assert (cfg.lr, cfg.batch, cfg.alpha, cfg.beta1, cfg.beta2) == (5e-6, 512, 10, 0.01, 0.1)
    assert cfg.steps1 + cfg.steps2 == 3000 and cfg.temperature == 1 and cfg.max_new_tokens == 1024
    assert configure({"task": "math", "lr": 1e-5}).lr == 1e-5
    for task, known in TASKS.items():  # eval.py's defaults are score.py's
        cfg = configure({"task": task})
        asked = (cfg.max_new_tokens, cfg.precision, cfg.rows, cfg.problems)
        assert asked == (known.max_new_tokens, known.precision, known.rows, known.problems)


def test_every_metric_is_in_its_table():
    attempt = Attempt([1], [0.0], "1", "1", True, 1.0)
    problem = score.Problem("1+1 =", "2", "sums", "p")
    logged = set(metrics.measure([Episode(problem, [1], (attempt, attempt))]))
    logged |= {"kl_t1", "kl_t2", "grad_norm", "on_policy_gap", "seconds", "alarms"}
    logged |= {"advantage", "learned", "beta2"}
    assert not {name for name in logged if f"`{name}`" not in README}


def test_every_function_it_names_exists():
    modules = "score|sample|metrics|eval|runs|sft|tasks"
    for module, name in re.findall(rf"`({modules})\.(?!py`)(\w+)`", README):
        assert hasattr(__import__(module), name), f"{module}.{name}"
