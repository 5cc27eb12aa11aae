"""Problems, splits, prompts and end tokens."""

import gzip
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gemma import FILES

import data
import rewards
from data import InputError, add_columns, last_box, math_problems
from tasks import load_problems


@pytest.mark.parametrize(
    ("question", "answer"),
    [("4+7 9+0 3+6 =", "1 1 9 9"), ("4+7 9+0 3+8 =", "1 2 0 1"), ("1+2 4+5 5+4 9+1 =", "4 0 0 0")],
)
def test_sums_are_added_by_hand(question, answer):
    columns = [tuple(map(int, column.split("+"))) for column in question.split()[:-1]]
    assert add_columns(columns) == answer
    upper, lower = ("".join(str(c[i]) for c in columns) for i in range(2))
    assert "".join(answer.split()) == str(int(upper) + int(lower))


def test_a_flipped_carry_changes_that_column_and_what_it_carries_into():
    assert add_columns([(1, 2), (4, 5), (3, 3)], flipped=2) == "3 9 7"
    assert add_columns([(1, 2), (4, 5), (3, 3)], flipped=1) == "4 0 6"


def test_every_answer_is_the_sum_and_as_long_as_the_question():
    for problem in load_problems("sums", "test", 300):
        columns = [tuple(map(int, c.split("+"))) for c in problem.question.split()[:-1]]
        numbers = [int("".join(str(c[i]) for c in columns)) for i in range(2)]
        assert problem.answer.replace(" ", "") == str(sum(numbers))
        assert len(columns) == data.COLUMNS == len(problem.answer.split())


@pytest.mark.parametrize(
    ("question", "level"),
    [
        ("2+5 9+0 3+6", 0),
        ("2+5 3+4 3+8", 1),
        ("2+5 9+0 3+8", 2),
        ("1+2 4+5 5+5 0+9 9+9", 2),  # two carries, of two columns each
        ("1+2 4+5 0+9 9+9", 3),
        ("1+2 0+9 4+4 9+9", 1),
    ],
)
def test_the_level_of_a_sum_is_how_far_a_carry_runs(question, level):
    columns = [tuple(map(int, column.split("+"))) for column in question.split()]
    assert data.longest_carry(columns) == level
    problem = load_problems("sums", "test", 1)[0]
    columns = [tuple(map(int, column.split("+"))) for column in problem.question.split()[:-1]]
    assert problem.level == str(data.longest_carry(columns))


def test_training_and_held_out_problems_share_nothing_and_are_always_the_same():
    train, test = load_problems("sums", "train", 5000), load_problems("sums", "test", 2000)
    assert not {p.id for p in train} & {p.id for p in test}
    assert len({p.id for p in train}) == 5000 and len({p.id for p in test}) == 2000
    assert load_problems("sums", "test", 10) == test[:10]


# --- MATH ----------------------------------------------------------------------------------------


@pytest.fixture
def rows():
    """Our own problems by split, as the files hold them."""
    return {
        split: [json.loads(line) for line in (FILES / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }


@pytest.fixture
def hub(rows, tmp_path, monkeypatch):
    """The hub's two data sets as folders, which the real load_dataset reads."""
    import datasets

    train, test = tmp_path / "hendrycks_math", tmp_path / "MATH-500"
    configs = []
    for subject in data.SUBJECTS.split():
        both = [row for row in rows["train"] + rows["test"] if as_config(row) == subject]
        for split, half in (("train", both[::2]), ("test", both[1::2])):
            write_rows(train / subject / f"{split}.jsonl", map(as_on_the_hub, half))
        files = [{"split": s, "path": f"{subject}/{s}.jsonl"} for s in ("train", "test")]
        configs.append({"config_name": subject, "data_files": files})
    (train / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    write_rows(test / "test.jsonl", rows["test"])
    monkeypatch.setattr(data, "HUB_TRAIN", str(train))
    monkeypatch.setattr(data, "HUB_TEST", str(test))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    math_problems.cache_clear()
    yield
    math_problems.cache_clear()


def as_config(row):
    return row["subject"].lower().replace(" & ", "_and_").replace(" ", "_")


def as_on_the_hub(row):
    level = f"Level {row['level']}"
    return {
        "problem": row["problem"],
        "level": level,
        "type": row["subject"],
        "solution": row["solution"],
    }


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_files_of_math_may_stand_beside_those_of_another_task(tmp_path):
    for split in ("train", "test"):
        shutil.copy(FILES / f"{split}.jsonl", tmp_path / f"math_{split}.jsonl")
        write_rows(tmp_path / f"gsm8k_{split}.jsonl", [{"question": "1 + 1", "answer": "2"}])
    assert math_problems(str(tmp_path)) == math_problems(str(FILES))


def test_the_hub_and_the_files_give_the_same_problems_in_the_same_order(hub):
    from_hub, from_files = math_problems(""), math_problems(str(FILES))
    assert from_hub == from_files
    assert (len(from_hub["train"]), len(from_hub["test"])) == (24, 14)
    assert {p.level for p in from_hub["test"]} == set("12345")
    assert len({p.subject for p in from_hub["train"]}) == 7


def test_a_problem_of_math500_in_other_words_on_the_hub_is_refused(hub, rows):
    other = {**rows["test"][0], "problem": "In other words: " + rows["test"][0]["problem"]}
    write_rows(Path(data.HUB_TEST) / "test.jsonl", [other, *rows["test"][1:]])
    with pytest.raises(InputError, match="lacks problems of"):
        math_problems("")


def test_without_network_and_files_one_sentence_says_both_ways_out(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=r"no route.*network.*--data"):
        math_problems("")


def write(folder, **files):
    folder.mkdir()
    for name, rows in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(folder)


def test_golds_that_are_empty_boxes_are_skipped_with_a_count(tmp_path, rows, capsys):
    empty = {"problem": "Which?", "solution": r"None: \boxed{}.", "answer": ""}
    folder = write(tmp_path / "math", train=[empty, *rows["train"]], math500=rows["test"])
    assert len(load_problems("math", "train", data=folder)) == 24
    assert "skipped 1 train problems without an answer" in capsys.readouterr().err


def test_solutions_with_several_boxes_are_counted_and_named(tmp_path, rows, capsys):
    both = {"problem": "Which?", "solution": r"\boxed{1} or \boxed{2}, \boxed{2}.", "level": 1}
    folder = write(tmp_path / "math", train=[both, *rows["train"]], math500=rows["test"])
    found = load_problems("math", "train", data=folder)
    [(key, answer)] = [(p.id, p.answer) for p in found if p.question == "Which?"]
    assert answer == "2"
    message = capsys.readouterr().err
    assert "1 train problems have several boxes" in message and f"such as {key}" in message


def test_an_answer_is_the_solutions_last_box_where_none_is_given(rows):
    golds = {row["problem"]: last_box(row["solution"]) for row in rows["train"]}
    assert sum("answer" not in row for row in rows["train"]) == 4
    for problem in load_problems("math", "train", data=str(FILES)):
        assert problem.answer == golds[problem.question]


def test_a_problem_in_both_splits_is_found_even_if_its_spaces_differ(tmp_path, rows):
    twin = {**rows["test"][0], "problem": "  " + rows["test"][0]["problem"].replace(" ", "\n ")}
    folder = write(tmp_path / "math", train=[*rows["train"], twin], test=rows["test"])
    with pytest.raises(InputError, match="of the test problems, 1 are in training, too"):
        load_problems("math", "train", data=folder)


# --- Files ---------------------------------------------------------------------------------------


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_ignored(tmp_path):
    text = "one\u2028two\u2029three\u0085four\rfive"
    row = json.dumps({"problem": text, "answer": 4}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"\ufeff{row}\r\n\n{row}".encode())
    rows = data.read_jsonl(path, data.MATH_TEXTS)
    assert rows == [{"problem": text, "answer": "4"}] * 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("problem,answer", "begins 'problem,answer', which is no JSON"),
        ('{"problem": "1?", "answer', "which is no JSON"),
        ('[{"problem": "1?"}]', "is [{'problem': '1?'}], no JSON object"),
        ("4", "is 4, no JSON object"),
        ('{"question": "1?", "answer": "1"}', "has no 'problem', only 'question', 'answer'"),
        ('{"problem": ["1?"]}', "'problem' is ['1?'], no text"),
        ('{"problem": "1?", "answer": true}', "'answer' is True, no text"),
        ('{"problem": "1?", "answer": {"is": 1}}', "'answer' is {'is': 1}, no text"),
    ],
)
def test_a_bad_line_is_reported_with_file_line_key_and_what_was_found(line, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "0?"}\n\n' + line + "\n")
    with pytest.raises(InputError) as found:
        data.read_jsonl(path, data.MATH_TEXTS)
    assert str(found.value).startswith(f"{path}, line 3") and words in str(found.value)


REAL = Path(os.environ.get("REAL_DATA", "nowhere"))


@pytest.mark.skipif(not (REAL / "gsm8k_train.jsonl.gz").exists(), reason="no GSM8K in REAL_DATA")
def test_every_answer_of_gsm8k_is_read_and_equals_itself(tmp_path):
    for split in ("train", "test"):
        shutil.copy(REAL / f"gsm8k_{split}.jsonl.gz", tmp_path)
    sizes = {}
    for split in ("train", "test"):
        problems = load_problems("answers", split, data=str(tmp_path))
        answers = [problem.answer for problem in problems]
        wrong = [a for a in answers if not rewards.is_right(a, a, "")]
        assert not wrong and all(a.replace(",", "").lstrip("-").isdigit() for a in answers)
        sizes[split] = len(problems)
    assert sizes == {"train": 7473, "test": 1319}
