"""Your own task: a Python file, or files of questions and answers."""

import json
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
from gemma import gemma_model, gemma_tokenizer
from test_runs import signals  # noqa: F401

import eval as evaluation
import score
import tasks
from config import Config
from data import InputError, own_problems
from models import save_checkpoint
from tasks import find_task, load_problems

EXAMPLE = Path(score.__file__).parent / "experiments" / "backwards.py"
SMALL = "--batch 4 --k 2 --steps1 1 --steps2 1 --problems 4 --rows 4".split()


@pytest.fixture
def small(tmp_path):
    tokenizer = gemma_tokenizer()
    save_checkpoint(tmp_path / "small", gemma_model(tokenizer), tokenizer)
    return tmp_path / "small"


def run(main, *flags) -> int:
    return main([str(flag) for flag in flags])


# --- 1. A Python file --------------------------------------------------------------------------


def test_the_example_trains_goes_on_and_is_evaluated_from_elsewhere(
    small, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    flags = ["--task", EXAMPLE, "--model", small, "--out", out, *SMALL]
    monkeypatch.chdir(EXAMPLE.parent)
    assert run(score.main, "--task", EXAMPLE.name, *flags[2:], "--stage", 1) == 0
    cfg = json.loads((out / "config.json").read_text())["settings"]
    assert (cfg["max_new_tokens"], cfg["precision"], cfg["lr"]) == (32, "bfloat16", 5e-6)
    assert cfg["task"] == str(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    assert run(score.main, "--stage", 2, "--out", out) == 0
    printed = capsys.readouterr().out
    assert f"eval.py --model {out}/stage2" in printed
    assert run(score.main, "--resume", "--out", out, "--steps2", 2) == 0
    samples = (out / "samples.txt").read_text()
    assert any(p.answer in samples for p in load_problems(str(EXAMPLE), "train"))
    asked = ["--model", out / "stage2"]  # the other settings are those of the run
    assert run(evaluation.main, *asked) == 0
    settings = json.loads((out / "eval" / "stage2" / "metrics.json").read_text())["settings"]
    assert (settings["task"], settings["problems"]) == (str(EXAMPLE), "4")
    assert run(evaluation.main, *asked, "--ask", "ant bee cat") == 0
    assert "attempt 2" in capsys.readouterr().out


def test_the_example_rewards_words_in_reverse_order_and_its_splits_share_nothing():
    task = find_task(str(EXAMPLE))
    train, test = (load_problems(str(EXAMPLE), split) for split in ("train", "test"))
    assert len(train) == len(test) == 3000 and not {p.id for p in train} & {p.id for p in test}
    problem = test[0]
    assert problem.answer.split() == problem.question.split()[::-1]
    assert problem.id == problem.question and problem.task == str(EXAMPLE)
    assert load_problems(str(EXAMPLE), "test", 1) == (problem,)
    answers = [problem.answer, f" {problem.answer}\n", problem.question, None]
    assert task.rewards(answers, [problem] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert [task.states(attempt, problem) for attempt in ("", "ant")] == [None, "ant"]


def test_the_tutorial_shows_the_whole_example():
    text = EXAMPLE.read_text()
    assert text.partition('"""\n\n')[2] in (EXAMPLE.parent.parent / "TUTORIAL.md").read_text()
    code = text.partition('"""')[2].partition('"""')[2]
    lines = [line for line in code.splitlines() if line.strip() and "import" not in line]
    assert len(lines) <= 30


TASK = EXAMPLE.read_text()
REWARDS = "rewards=each(lambda answer, problem: answer.split() == problem.answer.split())"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1 +", "it fails (SyntaxError"),
        ("x = y", ", line 1: it fails (NameError"),
        ("x = 1", "has no TASK = Task(..)"),
        ("TASK = 1", "has no TASK = Task(..)"),
        (TASK.replace(REWARDS, "rewards=lambda y, _: [0.5] * len(y)"), "0.5 is no reward"),
        (TASK.replace(REWARDS, "rewards=lambda y, _: [float('nan')] * len(y)"), "is no reward"),
        (TASK.replace("Problem(question, answer)", "(question, answer)"), "is no Problem"),
        (TASK.replace("again=", "again='' and "), "again is ''"),
        (TASK.replace("lambda problem: f", "lambda problem: None and f"), "None is no text"),
        (
            TASK.replace("made = random.Random(split), {}", "made = 1 / 0"),
            "load fails (ZeroDivisionError",
        ),
        (TASK.replace("answer.split() ==", "answer.shape =="), "rewards fails (AttributeError"),
        (TASK.replace(REWARDS, "rewards=lambda *_: [1.0]"), "1 rewards for"),
        (TASK.replace(REWARDS, "rewards=lambda y, _: [None] * len(y)"), "None is no reward"),
        (TASK.replace("attempt or None", "attempt + 1"), "states fails (TypeError"),
        (TASK.replace("{problem.question}", "{problem.asked}"), "first fails (AttributeError"),
        (TASK.replace("[:count]", "[:0]"), "no problem in train"),
        (TASK.replace('"steps1": 200', '"stepps": 200'), "sets 'stepps' in training"),
        (
            TASK.replace("Random(split)", "Random(0)").replace('(split == "test")', "True"),
            "are in t",
        ),
    ],
)
def test_a_faulty_file_gives_one_sentence(text, words, small, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    out = tmp_path / "run"
    assert run(score.main, "--task", file, "--model", small, "--out", out, *SMALL) == 2
    message = capsys.readouterr().err
    assert f"--task {file}" in message and words in message and message.count("\n") == 1
    assert not out.exists()


# --- 2. Files of questions and answers -----------------------------------------------------------

TRAIN = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(6)]
TEST = [{"question": "Half of 1?", "answer": "0.5"}, {"question": "2 < 3?", "answer": "yes"}]


def as_jsonl(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows) -> str:
    lines = [",".join(rows[0]), *(f'"{row["question"]}",{row["answer"]}' for row in rows)]
    return "\ufeff" + "\r\n".join(lines)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def test_jsonl_csv_and_parquet_are_read_alike(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    found = []
    for kind, write in (("jsonl", as_jsonl), ("csv", as_csv), ("parquet", None)):
        place = folder / kind
        place.mkdir()
        for split, rows in (("train", TRAIN), ("test", TEST)):
            if write:
                (place / f"my_{split}.{kind}").write_text(write(rows), encoding="utf-8")
            else:
                datasets.Dataset.from_list(rows).to_parquet(place / f"{split}.parquet")
        found.append([load_problems("answers", s, data=str(place)) for s in ("train", "test")])
    assert found[0] == found[1] == found[2]
    train, test = found[0]
    assert [p.answer for p in train] == "0 2 4 6 8 10".split()
    rewards = find_task("answers").rewards
    assert rewards([r"\frac{1}{2}", "Yes"], list(test)) == [1.0, 1.0]
    assert rewards(["10", None], [train[5], train[0]]) == [1.0, 0.0]


def test_columns_may_have_other_names_and_solutions_end_in_their_answer(folder, capsys):
    train = [{"q": "a?", "how": "Well.\n#### 1,042"}, {"q": "b?", "how": r"So $\boxed{7}$."}]
    train += [{"q": "c?", "how": "#### "}, {"q": "a?", "how": "3"}]
    (folder / "train.jsonl").write_text(as_jsonl(train))
    (folder / "test.jsonl").write_text(as_jsonl([{"q": "d?", "how": "4"}]))
    found = load_problems("answers", "train", data=str(folder), columns="q, how")
    said = capsys.readouterr().err
    assert "left out 1 train rows without question or answer, such as ['c?', '#### ']" in said
    assert "left out 1 train rows that repeat a question, such as ['a?', '3']" in said
    assert [(p.question, p.answer) for p in found] == [("a?", "1,042"), ("b?", "7")]
    for columns in ("q", "q,how,why", ","):
        with pytest.raises(InputError, match="must name two"):
            load_problems("answers", "train", data=str(folder), columns=columns)
    lacking = "train.jsonl, line 1 has no 'question', only 'q', 'how': rename one, or for --task"
    with pytest.raises(InputError, match=f"{lacking} answers give --columns"):
        load_problems("answers", "train", data=str(folder))
    (folder / "test.jsonl").write_text(as_jsonl([{"q": " a?", "how": "4"}]))
    own_problems.cache_clear()
    with pytest.raises(InputError, match="of the test problems, 1 are in training, too"):
        load_problems("answers", "train", data=str(folder), columns="q,how")


def test_a_comma_outside_of_quotes_is_reported(folder):
    (folder / "train.csv").write_text("question,answer\n1?,1\nCapital of the USA?,Washington, D.C.")
    (folder / "test.csv").write_text("question,answer\n2?,2")
    with pytest.raises(InputError, match=r"train.csv, row 2 has more or fewer cells.*quotes.*USA"):
        load_problems("answers", "train", data=str(folder))
    (folder / "train.csv").write_text("question;answer\n1?;1")
    own_problems.cache_clear()
    with pytest.raises(InputError, match=r"train.csv has one column, 'question;answer': put"):
        load_problems("answers", "train", data=str(folder))


def test_an_answer_that_is_no_mathematics_is_compared_to_the_letter(folder, capsys):
    words = ["Gauß", "東京", "H2O", "C#", "Washington, D.C.", "O'Neill", "snow_white", "Is it? No."]
    solution = "We add 3 and 4. " * 9
    rows = [{"question": f"{n}?", "answer": word} for n, word in enumerate([*words, solution])]
    (folder / "train.jsonl").write_text(as_jsonl(rows))
    (folder / "test.jsonl").write_text(as_jsonl([{"question": "b?", "answer": "7"}]))
    train = load_problems("answers", "train", data=str(folder))
    said = capsys.readouterr().err
    assert "1 train answers are over 100 letters, such as 'We add" in said and "####" in said
    task = find_task("answers")
    for problem, word in zip(train, words, strict=False):
        forms = (f"Final Answer: The final answer is ${word}$.", rf"So \boxed{{\text{{{word}}}}}.")
        stated = [task.states(form, problem) for form in forms]
        assert task.rewards([*stated, "Euler"], [problem] * 3) == [1.0, 1.0, 0.0], word
        assert task.same(*stated)


def test_a_data_set_of_the_hub_may_have_a_configuration(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, rows in (("train", TRAIN), ("test", [{"question": "5?", "answer": 5}])):
        (folder / f"{split}.jsonl").write_text(as_jsonl(rows))
    load, asked = datasets.load_dataset, []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return load(str(folder), split=split)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train = load_problems("answers", "train", data="openai/gsm8k:main")
    assert [p.answer for p in train] == "0 2 4 6 8 10".split()
    assert asked == [("openai/gsm8k", "main", split) for split in ("train", "test")]


def test_own_questions_are_asked_with_own_prompts(folder, small, tmp_path, monkeypatch, capsys):
    for split, rows in (("train", TRAIN), ("test", TEST)):
        (folder / f"{split}.csv").write_text(as_csv(rows), encoding="utf-8")
    (tmp_path / "prompt.txt").write_text("Answer this: {question} Box it!")
    (tmp_path / "again.txt").write_text("Look again.\n")
    words = ["--prompt", tmp_path / "prompt.txt", "--correction", tmp_path / "again.txt"]
    flags = ["--task", "answers", "--data", folder, "--model", small, "--max-new-tokens", 8, *words]
    out = tmp_path / "run"
    assert run(score.main, *flags, *SMALL, "--precision", "float32", "--out", out) == 0
    samples = (out / "samples.txt").read_text()
    assert "Answer this: What is" in samples and "Look again." in samples
    assert run(evaluation.main, "--model", out / "stage2") == 0
    printed = capsys.readouterr().err
    for flag in ("--data", "--prompt", "--correction"):
        assert f"{flag} {tmp_path}" in printed
    asked = ["--model", "stage2", *flags[:4], *flags[6:], "--problems", 4, "--precision", "float32"]
    monkeypatch.chdir(out)  # the same settings, given in another way, are the same evaluation
    assert run(evaluation.main, *asked) == 0
    for name in ("prompt", "again"):
        path = tmp_path / f"{name}.txt"
        path.write_text(path.read_text() + "!")
        assert run(score.main, "--resume", "--out", out, "--steps2", 3) == 2
        assert f"{path} has changed since the run" in capsys.readouterr().err
        assert run(evaluation.main, "--model", out / "stage2", "--ask", "Half of 1?") == 0
        assert f"{path} has changed since the run" in capsys.readouterr().err
        path.write_text(path.read_text()[:-1])
    assert run(evaluation.main, "--model", out / "stage2", "--ask", "Half of 1?") == 0
    assert "changed" not in capsys.readouterr().err
    (folder / "train.csv").write_text(as_csv(TRAIN[1:]), encoding="utf-8")
    own_problems.cache_clear()
    assert run(score.main, "--resume", "--out", out, "--steps2", 3) == 2
    assert f"--data {folder} has changed since the run" in capsys.readouterr().err
    (folder / "train.csv").write_text(as_csv(TRAIN), encoding="utf-8")
    (folder / "test.csv").write_text(as_csv(TEST[1:]), encoding="utf-8")
    own_problems.cache_clear()
    assert run(score.main, "--resume", "--out", out, "--steps2", 3) == 2
    assert f"--data {folder} has changed since the run" in capsys.readouterr().err
    (folder / "test.csv").write_text(as_csv(TEST), encoding="utf-8")
    (tmp_path / "again.txt").rename(tmp_path / "moved.txt")
    assert run(evaluation.main, "--model", out / "stage2", "--ask", "Half of 1?") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"eval.py: --correction {tmp_path}") and "cannot be read" in message
    lines = (out / "eval" / "stage2" / "transcripts.jsonl").read_text().splitlines()
    tokenizer = gemma_tokenizer()
    x1 = tokenizer.decode(json.loads(lines[0])["x1"])
    assert "Answer this: Half of 1? Box it!" in x1 and "math expert" not in x1
    wording = tasks.Wording(again="Look again.")
    chat = tasks.read_chat(tokenizer, gemma_model(tokenizer), "answers", wording)
    assert "Look again." in tokenizer.decode(chat.p1)
    (tmp_path / "prompt.txt").write_text("Answer this:")
    text = tasks.read_words("--prompt", str(tmp_path / "prompt.txt"))
    assert text == "Answer this:\n\n{question}"


def test_a_prompt_must_say_in_which_form_an_answer_is_read(tmp_path):
    (tmp_path / "prompt.txt").write_text("Answer this.")
    for task, refused in (("answers", True), ("math", True), ("sums", False)):
        cfg = Config(task=task, prompt=str(tmp_path / "prompt.txt"))
        with pytest.raises(InputError, match="must say how") if refused else nullcontext():
            tasks.wording_of(cfg)
    for words in (r"Put it into \boxed{}.", "End with: The Final answer is $42$."):
        (tmp_path / "prompt.txt").write_text(words)
        assert words in tasks.wording_of(cfg).prompt


@pytest.mark.parametrize("text", ["Answer: {quesiton}", "{ question }?", "{problem} box it"])
def test_a_prompt_with_another_word_in_braces_is_refused(text, tmp_path):
    (tmp_path / "prompt.txt").write_text(text)
    with pytest.raises(InputError, match=r"misspells .question."):
        tasks.read_words("--prompt", str(tmp_path / "prompt.txt"))
    (tmp_path / "prompt.txt").write_text(r"Write \boxed{answer}, as in $x^{n}$.")
    assert tasks.read_words("--prompt", str(tmp_path / "prompt.txt")).endswith("\n\n{question}")
