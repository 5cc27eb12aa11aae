"""Programs from end to end on a small Gemma 2: data, prompts, reward, training, repair."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from gemma import CODE, fitted_checkpoint, gemma_model, gemma_tokenizer
from test_data import write, write_rows
from test_runs import run_score, tree

import data
import eval as evaluation
from checkers import sandbox
from config import configure
from data import InputError, Problem, code_problems, preamble, read_ids
from eval import base_of, given_episodes, only_wrong, read_attempts
from rewards import program_of
from sft import builtin_model, builtin_tokenizer
from tasks import TASKS, load_problems, read_chat, stated_answer

FAST = ["--task", "code", "--data", CODE, "--batch", "16", "--k", "4", "--max-new-tokens", "60"]
FAST += ["--steps1", "1", "--steps2", "1", "--problems", "6", "--rows", "8", "--lr", "1e-3"]
ALL = [
    (split, p)
    for split in ("train", "mbpp", "test")
    for p in load_problems("code", split, data=str(CODE))
]
REAL = Path(os.environ.get("REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def coder(tmp_path_factory):
    return fitted_checkpoint(tmp_path_factory.mktemp("models") / "coder", "code")


@pytest.fixture(scope="module")
def trained(coder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "code"
    assert run_score("--model", coder, "--out", out, *FAST) == 0
    return out


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (CODE / f"{name}.jsonl").read_text().splitlines()]


def rewards(programs: list[str], problems: list[Problem]) -> list[float]:
    pairs = zip(programs, problems, strict=True)
    stated = [stated_answer(program, None, problem) for program, problem in pairs]
    return TASKS["code"].rewards(stated, problems)


def run_eval(*flags) -> int:
    return evaluation.main(list(map(str, flags)))


# --- Data --------------------------------------------------------------------------------------


def test_training_has_the_ids_asked_for_and_no_others():
    splits = {split: [p.id for s, p in ALL if s == split] for split in ("train", "mbpp", "test")}
    assert splits["train"] == [f"MBPP/{i}" for i in (511, 512, 513, 514, 515, 601, 602)]
    assert splits["mbpp"] == [f"MBPP/{i}" for i in range(11, 17)]
    assert splits["test"] == [f"HumanEval/{i}" for i in range(5)]
    few = load_problems("code", "train", data=str(CODE), ids="601,511-512")
    assert [p.id for p in few] == ["MBPP/511", "MBPP/512", "MBPP/601"]
    assert read_ids("511-974") == tuple(range(511, 975))


@pytest.mark.parametrize(
    "ids", ["a", "-", "2-9", "511-99999999999", "1,4", "9000-9001", "12-11", ",", "-3"]
)
def test_bad_ids_are_answered_in_one_sentence(ids):
    with pytest.raises(InputError, match="--ids"):
        load_problems("code", "train", data=str(CODE), ids=ids)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Local folders laid out like the two data sets of the hub."""
    splits = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601)}
    splits["train"] = range(601, 975)
    for split, ids in splits.items():
        rows = [row for row in rows_of("mbpp") if row["task_id"] in ids]
        write_rows(tmp_path / "mbpp" / "full" / f"{split}.jsonl", rows)
    files = [{"split": split, "path": f"full/{split}.jsonl"} for split in splits]
    card = json.dumps([{"config_name": "full", "data_files": files}])
    (tmp_path / "mbpp" / "README.md").write_text(f"---\nconfigs: {card}\n---\n")
    write_rows(tmp_path / "humaneval" / "test.jsonl", rows_of("humaneval"))
    monkeypatch.setattr(data, "HUB_MBPP", str(tmp_path / "mbpp"))
    monkeypatch.setattr(data, "HUB_HUMANEVAL", str(tmp_path / "humaneval"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data.read_code.cache_clear()
    yield
    data.read_code.cache_clear()


def test_the_hub_and_the_files_give_the_same_problems(hub):
    for split in ("train", "mbpp", "test"):
        from_hub = code_problems(split, "", "511-974")
        assert from_hub == code_problems(split, str(CODE), "511-974") != ()


def test_without_network_and_files_one_sentence_says_both_ways_out(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"--task code.*no route.*network.*--data"):
        code_problems("train", "", "511-974")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test_list": "assert f(1)"}, "task_id 511 is not a row of MBPP.*no list of tests"),
        ({"test_list": ["assert f(1"]}, "task_id 511 is not a row of MBPP.*SyntaxError"),
        ({"test_list": []}, "task_id 511"),
        ({"code": None}, "mbpp.jsonl.gz, line 10 has no 'code', only"),
        ({"task_id": "x"}, "task_id x"),
        ({"text": [3]}, r"mbpp.jsonl.gz, line 10: 'text' is \[3\], no text"),
    ],
)
def test_rows_that_are_not_mbpps_are_named(change, words, tmp_path):
    rows = rows_of("mbpp")
    row = next(row for row in rows if row["task_id"] == 511)
    row.update(change)
    if change == {"code": None}:
        del row["code"]
    folder = write(tmp_path / "files", mbpp=rows, humaneval=rows_of("humaneval"))
    with pytest.raises(InputError, match=words):
        load_problems("code", "train", data=folder)


def test_a_setup_and_a_split_that_is_not_asked_for_may_be_absent(tmp_path):
    rows = [row for row in rows_of("mbpp") if row["task_id"] > 510]
    rows[0]["test_setup_code"] = None
    folder = write(tmp_path / "files", mbpp=rows, humaneval=rows_of("humaneval"))
    assert load_problems("code", "train", data=folder)[0].tests[0] == ""
    assert len(load_problems("code", "test", data=folder)) == 5
    with pytest.raises(InputError, match="has no problem of 11-510"):
        load_problems("code", "mbpp", data=folder)


def test_training_on_ids_of_mbpps_test_split_prints_a_warning(capsys):
    read_ids.cache_clear()
    assert read_ids("510-511") == (510, 511)
    assert "--ids 510-511 spoils --split mbpp, 11-510, as a test" in capsys.readouterr().err


def test_a_folder_without_one_of_the_files_is_named(tmp_path):
    with pytest.raises(InputError, match="with humaneval in its name, but has none"):
        load_problems("code", "test", data=write(tmp_path / "files", mbpp=rows_of("mbpp")))


# --- Prompts -----------------------------------------------------------------------------------


def test_mbpp_is_asked_after_the_three_shots_of_the_paper_and_shows_its_tests():
    prompt = TASKS["code"].first(dict(ALL_BY_ID)["MBPP/511"])
    parts = prompt.split("You are an expert Python programmer, and here is your task: ")
    assert len(parts) == 5 and parts[0] == ""
    assert [part.partition(" Your code should pass these tests:\n\n")[0] for part in parts[1:]] == [
        "Write a function to find the similar elements from the given two tuple lists.",
        "Write a python function to identify non-prime numbers.",
        "Write a function to find the largest integers from a given list of numbers using heap "
        "queue algorithm.",
        "Write a function to square a number.",
    ]
    assert parts[2].endswith(
        "assert is_not_prime(2) == False\nassert is_not_prime(10) == True\n"
        "assert is_not_prime(35) == True\n\n[BEGIN]\n\nimport math\ndef is_not_prime(n):\n"
        "    result = False\n    for i in range(2, int(math.sqrt(n)) + 1):\n"
        "        if n % i == 0:\n            result = True\n    return result\n\n[DONE]\n\n"
    )
    assert parts[4].endswith(
        "assert square(3) == 9\nassert square(-2) == 4\nassert square(0) == 0\n\n[BEGIN]"
    )


ALL_BY_ID = {problem.id: problem for _, problem in ALL}


def test_humaneval_is_asked_zero_shot_and_shows_no_test():
    for split, problem in ALL:
        prompt = TASKS["code"].first(problem)
        assert ("assert" in prompt) == ("[BEGIN]" in prompt) == (split != "test")
        assert problem.question in prompt
        assert problem.answer.strip() not in prompt


def test_the_correction_is_the_papers_word_for_word_and_joined_as_tokens():
    assert TASKS["code"].again == (
        "# There might be an error in the code above because of lack of understanding of the "
        "question. Please correct the error, if any, and rewrite the solution. Only output the "
        "final correct Python program!"
    )
    tokenizer = gemma_tokenizer("code")
    chat = read_chat(tokenizer, gemma_model(tokenizer), "code")
    assert tokenizer.decode(chat.p1) == (
        f"\n<start_of_turn>user\n{TASKS['code'].again}<end_of_turn>\n<start_of_turn>model\n"
    )


# --- Reward ------------------------------------------------------------------------------------


def test_every_reference_program_passes_in_every_form_and_no_other_one_does():
    problems = [problem for _, problem in ALL]
    for form in ("{}", "[BEGIN]\n{}\n[DONE]", "Here:\n\n```python\n{}\n```\nIt works."):
        assert rewards([form.format(p.answer) for p in problems], problems) == [1.0] * len(ALL)
    others = [p.answer for p in problems[1:] + problems[:1]]
    assert rewards(others, problems) == [0.0] * len(ALL)
    assert rewards(["I do not know."] * len(ALL), problems) == [0.0] * len(ALL)


def test_a_helper_of_humanevals_tests_cannot_be_replaced():
    root = ALL_BY_ID["HumanEval/3"]
    cheat = "def line(c, x):\n    return 0.0\n\n\ndef root_of(c):\n    return 7.0"
    assert rewards([cheat, root.answer], [root, root]) == [0.0, 1.0]
    shift = ALL_BY_ID["HumanEval/2"]
    cheat = "def shift(s):\n    return s\n\n\ndef unshift(s):\n    return s"
    assert rewards([cheat, shift.answer], [shift, shift]) == [0.0, 1.0]


def test_imports_of_humanevals_prompt_need_not_be_written_again():
    half = ALL_BY_ID["HumanEval/1"]
    program = "def half(xs: List[float]) -> List[float]:\n    return [x / 2 for x in xs]"
    assert rewards([program], [half]) == [1.0]


# --- Training, evaluation, repair --------------------------------------------------------------


def test_the_settings_of_code_are_table_8():
    cfg = configure({"task": "code"})
    assert (cfg.lr, cfg.batch, cfg.alpha, cfg.beta1, cfg.beta2) == (1e-5, 128, 10, 0.01, 0.25)
    assert cfg.steps1 + cfg.steps2 == 1500 and cfg.temperature == 1 and cfg.ids == "511-974"


def test_training_earns_some_rewards_and_shows_programs(trained):
    lines = tree(trained)["lines"]
    assert [line["stage"] for line in lines] == ["1", "2"]
    assert lines[0]["kl_t1"] == 0 and any(line["acc_t1"] + line["acc_t2"] > 0 for line in lines)
    assert "def " in (trained / "samples.txt").read_text()


def test_evaluation_is_on_humaneval_and_with_a_split_on_mbpp(trained, capsys):
    asked = ["--model", trained / "stage2", "--task", "code", "--data", CODE]
    for split, flags, count in (("test", [], 5), ("mbpp", ["--split", "mbpp"], 6)):
        assert run_eval(*asked, "--max-new-tokens", "40", *flags) == 0
        assert "acc_t1" in capsys.readouterr().out
        folder = trained / "eval" / ("stage2" if split == "test" else "stage2-mbpp")
        rows = [json.loads(line) for line in (folder / "transcripts.jsonl").open()]
        assert [row["id"] for row in rows] == [p.id for s, p in ALL if s == split]
        assert len(rows) == count


def test_repair_begins_with_the_wrong_programs_of_a_file(trained, tmp_path, capsys):
    file = tmp_path / "wrong.jsonl"
    right = ALL_BY_ID["MBPP/12"].answer
    write_rows(
        file,
        [
            {"task_id": 11, "program": "def doubled(xs):\n    return xs"},
            {"task_id": "MBPP/11", "program": "def doubled(xs):\n    return xs * 2"},
            {"task_id": 12, "program": right},
        ],
    )
    asked = ["--model", trained / "stage2", "--task", "code", "--data", CODE, "--split", "mbpp"]
    assert run_eval(*asked, "--max-new-tokens", "20", "--repair", file) == 0
    folder = trained / "eval" / "stage2-mbpp-repair"
    rows = [json.loads(line) for line in (folder / "transcripts.jsonl").open()]
    assert [row["id"] for row in rows] == ["MBPP/11", "MBPP/11"]  # the right one needs no repair
    assert [row["attempts"][0]["text"] for row in rows] == [
        "def doubled(xs):\n    return xs",
        "def doubled(xs):\n    return xs * 2",
    ]
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert metrics["acc_t1"] == 0 and metrics["delta"] == metrics["acc_t2"]


def test_repair_without_a_file_begins_with_the_bases_own_wrong_programs(trained, coder, tmp_path):
    assert base_of(str(trained / "stage2")) == str(coder)
    asked = ["--model", trained / "stage2", "--task", "code", "--data", CODE, "--split", "mbpp"]
    asked += ["--max-new-tokens", "40"]
    assert run_eval(*asked, "--out", tmp_path / "repair", "--repair") == 0
    base = [*asked[:1], coder, *asked[2:], "--attempts", "1", "--out", tmp_path / "base"]
    assert run_eval(*base) == 0
    first = [json.loads(line) for line in (tmp_path / "base" / "transcripts.jsonl").open()]
    expected = {
        row["id"]: row["attempts"][0]["tokens"] for row in first if not row["attempts"][0]["reward"]
    }
    rows = [json.loads(line) for line in (tmp_path / "repair" / "transcripts.jsonl").open()]
    assert {row["id"]: row["attempts"][0]["tokens"] for row in rows} == expected


def test_a_given_first_attempt_is_continued_as_tokens():
    tokenizer = builtin_tokenizer()
    chat = read_chat(tokenizer, builtin_model(tokenizer, 0), "sums")
    problem = load_problems("sums", "test", 1)[0]
    digits = "1 1 1"
    episodes = given_episodes([problem, problem], [digits, problem.answer], chat, longest=99)
    (episode,) = only_wrong(episodes, "a test")
    assert episode.attempts[0].tokens == [
        *tokenizer.convert_tokens_to_ids(digits.split()),
        chat.close_id,
    ]
    with pytest.raises(InputError, match="no wrong attempt"):
        only_wrong(given_episodes([problem], [problem.answer], chat, longest=99), "a test")
    assert (
        given_episodes([problem], [digits], chat, longest=3) == []
    )  # three digits and an end token


@pytest.mark.parametrize(
    "row",
    [
        {"task_id": 9999, "program": "x"},
        {"task_id": 11},
        {"program": "x"},
        {"task_id": 0, "program": "x"},
    ]
    + [{"task_id": 11, "attempts": a} for a in (5, {}, [], [3], [{}], [{"text": 1}])],
)
def test_a_row_that_names_no_problem_or_program_is_named(row, tmp_path):
    write_rows(tmp_path / "wrong.jsonl", [{"task_id": 11, "program": "x"}, row])
    with pytest.raises(InputError, match="row 2 lacks an attempt or a problem of this --split"):
        read_attempts(tmp_path / "wrong.jsonl", list(ALL_BY_ID.values()))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "train"], "--split train"),
        (["--repair", "missing.jsonl"], "--repair missing.jsonl"),
        (["--repair", "--attempts", "1"], "--attempts 1 is too few for --repair"),
    ],
)
def test_bad_input_gives_one_sentence_and_status_2(
    flags, words, coder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run_eval("--model", coder, "--task", "code", "--data", CODE, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("eval.py: ") and words in error
    assert not list(tmp_path.iterdir())


def test_a_sandbox_that_does_not_work_gives_one_sentence(coder, tmp_path, monkeypatch, capsys):
    sandbox.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    flags = ["--model", coder, "--task", "code", "--data", CODE, "--out", tmp_path / "out"]
    assert run_eval(*flags, "--max-new-tokens", "4") == 2
    message = capsys.readouterr().err
    assert "the sandbox does not work here" in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


WRONG = "def unlike(x):\n    return None"
HELPER = "def helper(x):\n    return [x]"
LAYOUTS = {  # of a right program: {program}, indented {inside}, and the {body} that goes on
    "bare": "{program}",
    "fenced": "Sure.\n```python\n{program}\n```\nIt works.",
    "marks": "[BEGIN]\n{program}\n[DONE]",
    "byte order mark": "\ufeff{program}",
    "used below": "```python\n{program}\n```\n```python\ndef main():\n    print(1)\n\nmain()\n```",
    "tested below": "```python\n{program}\n```\n```python\ndef run_tests():\n    pass\n```",
    "tests of its own": "```python\n{program}\n```\n```python\nclass TestIt:\n    pass\n```",
    "an alternative": "```python\n{program}\n```\nOr else:\n```python\n" + WRONG + "\n```",
    "a helper below": "```python\n{program}\n```\nUse it with:\n```python\n" + HELPER + "\n```",
    "a helper above": "```python\n" + HELPER + "\n```\nThen:\n```python\n{program}\n```",
    "a main part": '{program}\n\nif __name__ == "__main__":\n    print("done")',
    "the future": "from __future__ import annotations\n{program}",
    "printed": "```python\n{program}\n```\n```python\nprint(3)\n```\n```\n3\n```",
    "a list": "1. The program:\n   ```python\n{inside}\n   ```",
}
BODIES = {  # of HumanEval's functions: a base model continues its prompt
    "a body": "{body}",
    "a fenced body": "```python\n{body}\n```",
    "a body and more": "{body}\n\nprint('done')",
}


def laid_out(problem: Problem) -> list[str]:
    program, name = problem.answer.strip("\n"), problem.given and "test"
    parts = {"program": program, "inside": "   " + program.replace("\n", "\n   ")}
    given = problem.given.rstrip()
    if name and program.startswith(given):
        parts["body"] = program[len(given) :].strip("\n")
    layouts = [*LAYOUTS.values(), *(BODIES.values() if "body" in parts else ())]
    return [layout.format(**parts) for layout in layouts]


def check_layouts(problems: list[Problem]) -> None:
    pairs = [(text, problem) for problem in problems for text in laid_out(problem)]
    texts, asked = map(list, zip(*pairs, strict=True))
    verdicts = rewards(texts, asked)
    assert [pair for pair, right in zip(pairs, verdicts, strict=True) if not right] == []


def test_a_right_program_passes_in_every_layout():
    check_layouts([problem for _, problem in ALL])


def test_helpers_in_another_part_of_an_attempt_are_found():
    problem = next(problem for split, problem in ALL if problem.id == "HumanEval/0")
    parts = "```python\ndef more(x):\n    return x + 1\n```\n"
    parts += "```python\ndef add_one(n):\n    return more(n)\n```\n"
    assert rewards([parts, parts + "```python\ndef more(x):\n    return 0\n```"], [problem] * 2)[0]


@pytest.mark.skipif(not REAL.exists(), reason="MBPP and HumanEval are not here: see REAL_DATA")
def test_references_of_mbpp_and_humaneval_pass_in_every_layout():
    mbpp, humaneval = data.read_code(str(REAL))
    check_layouts([*[*mbpp.values()][:60], *humaneval[:60]])


@pytest.mark.skipif(
    not REAL.exists(),
    reason="MBPP and HumanEval are not here: name their folder in REAL_DATA to run all references",
)
def test_all_references_of_mbpp_and_humaneval_pass():
    mbpp, humaneval = data.read_code(str(REAL))
    problems = [*mbpp.values(), *humaneval]
    assert (len(mbpp), len(humaneval)) == (974, 164)
    jobs = [(preamble(p.given) + program_of(p.answer, p), list(p.tests)) for p in problems]
    found = sandbox.run_many(jobs, timeout=60.0)  # on a busy machine one takes more than 3 seconds
    assert [p.id for p, right in zip(problems, found, strict=True) if not right] == []
