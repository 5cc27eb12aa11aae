"""Problems, splits, prompts and end tokens."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_model
from gemma import FILES, gemma_model, gemma_tokenizer

import data
import tasks
from data import InputError, Problem, add_columns, math_problems
from sample import Attempt, Sampling, askable, segments
from sft import builtin_tokenizer
from sources import last_box
from tasks import load_problems, read_chat

# Gemma 2's own layout: no system role, contents trimmed, one BOS, <end_of_turn> closes a turn.
GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ ' <turn> ' + role + ' ' + message['content'] | trim + ' <close> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn> model' }}{% endif %}"
)


def gemma_like():
    """A tokenizer with Gemma's kind of template, whose turn end is not its eos."""
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<close>"]})
    tokenizer.add_tokens(["user", "model"])
    tokenizer.chat_template = GEMMA_LIKE
    return tokenizer


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


def test_an_unknown_task_is_named():
    with pytest.raises(InputError, match="--task chess"):
        load_problems("chess", "train")


def test_x1_has_one_bos_and_p1_is_the_instruction_between_two_attempts():
    tokenizer = builtin_tokenizer()
    chat = read_chat(tokenizer, make_model(0), "sums")
    x1 = chat.x1(load_problems("sums", "train", 1)[0])
    assert x1.count(tokenizer.bos_token_id) == 1 and x1[0] == tokenizer.bos_token_id
    assert tokenizer.decode(chat.p1) == "again ="
    assert chat.end_ids == (tokenizer.eos_token_id,) == (chat.close_id,)


def test_a_template_that_closes_turns_with_another_token_than_eos_adds_an_end_token():
    tokenizer = gemma_like()
    model = make_model(0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 77]
    chat = read_chat(tokenizer, model, "sums")
    close = tokenizer.convert_tokens_to_ids("<close>")
    assert chat.close_id == close
    assert chat.end_ids == tuple(sorted({tokenizer.eos_token_id, 77, close}))
    assert tokenizer.decode(chat.p1).split() == [
        "<turn>",
        "user",
        "again",
        "=",
        "<close>",
        "<turn>",
        "model",
    ]
    x1 = chat.x1(load_problems("sums", "train", 1)[0])
    assert x1.count(tokenizer.bos_token_id) == 1
    whole = [
        {"role": "user", "content": "1+1 ="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "again ="},
    ]
    text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    two = tokenizer.convert_tokens_to_ids("2")
    joined = [*chat.x1(data.Problem("1+1 =", "2", "sums", "p")), two, close, *chat.p1]
    assert joined == tokenizer(text, add_special_tokens=False).input_ids


def test_text_shows_stray_special_tokens_and_hides_only_the_end_token():
    tokenizer = builtin_tokenizer()
    chat = read_chat(tokenizer, make_model(0), "sums")
    one, bos, end = tokenizer.convert_tokens_to_ids(["1", "<bos>", "<end>"])
    assert chat.text([one, one, end]) == "1 1"
    assert chat.text([one, bos, one, end]) == "1 <bos> 1"
    assert chat.text([one, one]) == "1 1"


def test_a_model_without_an_end_token_is_refused():
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(InputError, match="no end token"):
        read_chat(tokenizer, make_model(0), "sums")


def test_a_prompt_too_long_for_the_model_skips_its_problem_with_a_count(capsys):
    model = make_model(0)
    chat, problems = (
        read_chat(builtin_tokenizer(), model, "sums"),
        load_problems("sums", "train", 4),
    )
    model.config.max_position_embeddings = 46  # room for a prompt of 20 tokens
    long = data.Problem(" ".join(["1+1"] * 50) + " =", "2", "sums", "long")
    assert askable([*problems, long], model, chat, Sampling(2, 10)) == list(problems)
    assert "skipped 1 of 5" in capsys.readouterr().err


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


def test_an_answer_is_the_solutions_last_box_where_none_is_given(rows):
    golds = {row["problem"]: last_box(row["solution"]) for row in rows["train"]}
    assert sum("answer" not in row for row in rows["train"]) == 4
    for problem in load_problems("math", "train", data=str(FILES)):
        assert problem.answer == golds[problem.question]


def test_a_problem_in_both_splits_is_named_whatever_its_spaces(tmp_path, rows):
    twin = {**rows["test"][0], "problem": "  " + rows["test"][0]["problem"].replace(" ", "\n ")}
    folder = write(tmp_path / "math", train=[*rows["train"], twin], test=rows["test"])
    with pytest.raises(InputError, match="1 problems are in training and in test"):
        load_problems("math", "train", data=folder)


def test_the_prompts_are_the_papers_word_for_word():
    form = (
        "At the end of the Solution, when you give your final answer, write it in the form "
        '"Final Answer: The final answer is $answer$. I hope it is correct."'
    )
    assert (
        "You are a math expert. When you respond, respond only with the Solution of the final "
        f"Problem, thinking step by step. {form}"
    ) == tasks.MATH_PROMPT
    assert (
        "There might be an error in the solution above because of lack of understanding of the "
        "question. Please correct the error, if any, and rewrite the solution. "
        f"Only output the final solution! {form}"
    ) == tasks.MATH_CORRECTION


def test_gemma_gets_its_own_layout_with_one_bos_no_system_role_and_end_of_turn():
    tokenizer = gemma_tokenizer()
    chat = read_chat(tokenizer, gemma_model(tokenizer), "math")
    assert (chat.end_ids, chat.close_id) == ((1, 107), 107)
    problem = Problem("What is {1} + 1?", "2", "math", "p")
    x1 = chat.x1(problem)
    assert x1.count(2) == 1 and x1[0] == 2 and 2 not in chat.p1
    assert tokenizer.decode(x1) == (
        f"<bos><start_of_turn>user\n{tasks.MATH_PROMPT}\n\nProblem: What is {{1}} + 1?"
        "<end_of_turn>\n<start_of_turn>model\n"
    )
    assert tokenizer.decode(chat.p1) == (
        f"\n<start_of_turn>user\n{tasks.MATH_CORRECTION}<end_of_turn>\n<start_of_turn>model\n"
    )
    ended = Attempt([300, 301, 1], [0.0] * 3, "", True, 0.0)  # by <eos>, the other end token
    cut = Attempt([300, 301], [0.0] * 2, "", False, 0.0)
    for attempt, closing in ((ended, []), (cut, [107])):
        joined = [t for part, _ in segments(chat, x1, [attempt]) for t in part]
        assert joined == [*x1, *attempt.tokens, *closing, *chat.p1]


def test_a_base_model_gets_a_plain_layout():
    tokenizer = gemma_tokenizer()
    tokenizer.chat_template = None
    chat = read_chat(tokenizer, gemma_model(tokenizer), "math")
    x1 = chat.x1(Problem("What is 1 + 1?", "2", "math", "p"))
    text = f"<bos>{tasks.MATH_PROMPT}\n\nProblem: What is 1 + 1?\n\nSolution:"
    assert x1 == tokenizer(text, add_special_tokens=False).input_ids
    again = f"\n\n{tasks.MATH_CORRECTION}\n\nSolution:"
    assert chat.p1 == tokenizer(again, add_special_tokens=False).input_ids
    assert chat.close_id == 1
