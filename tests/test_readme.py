"""The texts are true: commands parse, numbers are those of the results, links lead somewhere."""

import doctest
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import metrics
import score
import sft
from config import Config, check_settings, configure, parse_eval_flags, parse_train_flags, plan_of
from experiments import landscape, memory, reproduce, tables
from sample import Attempt, Episode
from score import STAGES
from tasks import TASKS

ROOT = Path(score.__file__).parent
NAMES = ("README.md", "TUTORIAL.md", "RESULTS.md", "BENCHMARKS.md")
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}
README, TUTORIAL, RESULTS, BENCHMARKS = TEXTS.values()
BLOCKS = re.findall(r"```sh\n(.*?)```", README + TUTORIAL + RESULTS, re.DOTALL)
launcher = get_args_parser()


def commands(block):
    """The lines of a block, continued ones as one, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := line.partition("#")[0].strip())]


COMMANDS = [command for block in BLOCKS[1:] for command in commands(block)]
# and the commands within sentences
COMMANDS += re.findall(r"`((?:python|torchrun) [^`]+\.py[^`]*)`", "\n".join(TEXTS.values()))


def test_the_first_block_is_the_two_commands():
    train, check = commands(BLOCKS[0])
    assert "-r requirements.txt" in train and train.endswith("python score.py")
    assert "-r requirements-dev.txt" in check and check.endswith("python -m pytest -q -n 2")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    program, *words = shlex.split(command.replace("\n", " "))
    if program == "torchrun":
        launch = launcher.parse_args([word for word in words if word != "..."])
        words = [launch.training_script, *launch.training_script_args]
    elif program in ("hf", "pip", "source"):
        return
    else:
        assert program == "python"
    script, *flags = words
    if script == "score.py" and "--help" not in flags:
        typed = parse_train_flags("", flags)
        cfg = configure(typed)
        check_settings(cfg, plan_of(cfg.stage, STAGES))
    elif script == "eval.py":
        assert parse_eval_flags("", flags)
    elif script == "experiments/reproduce.py":
        assert reproduce.parse_flags(flags)
    else:
        assert (ROOT / script).exists()
        known = (ROOT / script).read_text()
        assert all(f'"{flag}"' in known or flag in known for flag in flags if flag[:2] == "--")


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_narrow_and_links_and_pictures_exist(name):
    text = TEXTS[name]
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    without_links = [re.sub(r"\]\([^)]*\)|https?://\S+", "]", line) for line in lines]
    assert [line for line in without_links if len(line) > 100] == []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        assert (ROOT / path).exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / (path or name)).read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, link


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_what_the_tutorial_computes_is_what_python_answers():
    found = doctest.testfile(str(ROOT / "TUTORIAL.md"), module_relative=False)
    assert found.attempted >= 8 and not found.failed


def test_the_settings_that_the_texts_name_are_the_defaults():
    cfg = Config()
    for claim in (
        f"`k = {cfg.k}`",
        f"α = {cfg.alpha:g}",
        f"β1 = {cfg.beta1:g}",
        f"β2 = {cfg.beta2:g}",
        f"{cfg.steps1} + {cfg.steps2}",
        f"batch {cfg.batch}",
        f"--steps2 {cfg.steps1 + cfg.steps2}",
        f"learning rate {cfg.lr * 1e4:g}e-4",
        f"{100 * sft.PHASES[-1].right:g} % of its later attempts",
    ):
        assert claim in README + TUTORIAL, claim


def test_the_memory_table_is_what_its_command_prints():
    assert memory.table() in BENCHMARKS


def test_the_tables_are_those_of_the_results_in_assets():
    results = json.loads((ROOT / "assets" / "results.json").read_text())
    assert results["settings"] == {} and len(results["seeds"]) >= 5
    assert tables.table(results) in RESULTS and tables.claims(results) in RESULTS
    elsewhere = {words: tables.read(name) for name, words in tables.ELSEWHERE.items()}
    assert tables.rounding(results, elsewhere) in RESULTS and tables.rewrites(results) in RESULTS
    held, failed, unsure = map(
        tables.claims(results).count, ("| yes |", "| **no** |", "| not sure |")
    )
    untested = sum(claim.least < 0 for claim in tables.CLAIMS)
    said = f'We tested {len(tables.CLAIMS) - untested} comparisons of the paper ("A is above B")'
    for text in (README, RESULTS):
        words = f"{said}: here {held - untested} hold, {failed} do not, {unsure} are unclear"
        assert words in " ".join(text.split())
    rows = results["rows"].items()
    means = {name: [statistics.mean(row[c]) for c in ("acc_t1", "acc_t2")] for name, row in rows}
    for name in ("direct", "no-bonus", "no-stage1", "star", "pair"):
        assert " / ".join(map(tables.short, means[name])) in " ".join(RESULTS.split()), name
    single = {words: tables.read(name) for name, words in tables.FIRST_SEEDS.items()}
    assert tables.first_seeds(single) in RESULTS
    assert tables.longer(tables.read("direct-480")) in RESULTS
    others = [*elsewhere.values(), *single.values()]
    runs = sum(len(one["seeds"]) for one in (results, *others))
    assert f"{runs} runs" in " ".join(README.split()) and f"{runs} runs" in RESULTS
    assert tables.summary(results) in README
    for words, name in (("acc@t2 ended at", "score"), ("(stage1:", "stage1")):
        every = (one["rows"].get(name, {}).get("acc_t2", []) for one in (results, *others))
        ends = [x for column in every for x in column]
        said = f"{words} {tables.short(min(ends))} to {tables.short(max(ends))}"
        assert said in " ".join(README.split())
    assert sum(Config.seed in one["seeds"] for one in others) == 3
    of_the_map = json.loads((ROOT / "assets" / "map.json").read_text())
    assert of_the_map["settings"] == {} and len(of_the_map["seeds"]) == 3
    assert landscape.table(of_the_map) in RESULTS
    gains = sorted(statistics.mean(landscape.gains(c, "acc_t2")) for c in of_the_map["cells"])
    gained, not_gained = gains[-5:], gains[:-5]
    lowest, highest, other = (f"{x:.2f}"[1:] for x in (gained[0], gained[-1], not_gained[-1]))
    for text in (README, RESULTS):
        assert f"gains {lowest} to {highest}" in " ".join(text.split())
        assert f"at most {other}" in " ".join(text.split())
    seeds = f"--seeds {results['seeds'][0]}-{results['seeds'][-1]}"
    assert seeds in README and seeds in RESULTS


def test_the_settings_of_math_are_table_8():
    cfg = configure({"task": "math"})
    assert (cfg.lr, cfg.batch, cfg.alpha, cfg.beta1, cfg.beta2) == (5e-6, 512, 10, 0.01, 0.1)
    assert cfg.steps1 + cfg.steps2 == 3000 and cfg.temperature == 1 and cfg.max_new_tokens == 1024
    assert configure({"task": "math", "lr": 1e-5}).lr == 1e-5
    for task, known in TASKS.items():  # eval.py's defaults are score.py's
        cfg = configure({"task": task})
        asked = (cfg.max_new_tokens, cfg.precision, cfg.rows, cfg.problems)
        assert asked == (known.max_new_tokens, known.precision, known.rows, known.problems)


def test_every_metric_is_in_the_tutorial():
    attempt = Attempt([1], [0.0], "1", "1", True, 1.0)
    problem = score.Problem("1+1 =", "2", "sums", "p")
    logged = set(metrics.measure([Episode(problem, [1], (attempt, attempt))]))
    logged |= {"kl_t1", "kl_t2", "grad_norm", "on_policy_gap", "seconds", "alarms"}
    logged |= {"advantage", "learned", "beta2"}
    assert not {name for name in logged if f"`{name}`" not in TUTORIAL}


def test_every_function_that_the_tutorial_names_exists():
    modules = "score|learner|sample|metrics|eval|runs|sft|tasks"
    for module, name in re.findall(rf"`({modules})\.(?!py`)(\w+)`", TUTORIAL):
        assert hasattr(__import__(module), name), f"{module}.{name}"
