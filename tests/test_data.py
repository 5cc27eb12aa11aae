"""Problems, splits, prompts and end tokens."""

import pytest
from conftest import make_model

import data
from data import InputError, add_columns, load_problems, read_chat
from sample import Sampling, askable
from sft import builtin_tokenizer

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
