"""Prompts, and the token ids that frame an attempt."""

import pytest
from conftest import make_model
from gemma import gemma_model, gemma_tokenizer
from tokenizers import AddedToken

import data
import tasks
from config import configure
from data import InputError, Problem
from sample import Attempt, Sampling, askable, segments
from sft import builtin_tokenizer
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
    """A tokenizer with a template like Gemma's: it closes a message with a token other than eos."""
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "<close>"]})
    tokenizer.add_tokens(["user", "model"])
    tokenizer.chat_template = GEMMA_LIKE
    return tokenizer


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
    kept, longest = askable([*problems, long], model, chat, Sampling(2, 10))
    assert kept == list(problems) and longest == len(chat.x1(problems[0])) + 2 * (10 + 1 + 2)
    assert "skipped 1 of 5" in capsys.readouterr().err


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
    ended = Attempt([300, 301, 1], [0.0] * 3, "", None, True, 0.0)  # by <eos>, the other end token
    cut = Attempt([300, 301], [0.0] * 2, "", None, False, 0.0)
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


# --- Chat templates of other families ------------------------------------------------------------

ASKS = "{% for m in messages %}{{ m.role + ' ' + m.content }}"
CLOSED = "{% if m.role == 'assistant' %}{}{% endif %}{% endfor %} go"


def templated(template: str, *ends: str):
    """A tokenizer whose template closes answers, with added tokens that are special."""
    tokenizer = gemma_tokenizer()
    tokenizer.add_tokens([AddedToken(end, special=True) for end in ends])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ASKS + CLOSED.replace("{}", " <eos>"), "<eos>"),  # a space before it
        (ASKS + CLOSED.replace("{}", "\n<|EOT|>\n"), "<|EOT|>"),  # special, but not the eos
    ],
)
def test_an_end_token_may_follow_white_space_and_be_an_added_one(template, end):
    tokenizer = templated(template, "<|EOT|>")
    chat = read_chat(tokenizer, gemma_model(tokenizer), "math")
    assert chat.close_id == tokenizer.convert_tokens_to_ids(end) in chat.end_ids
    assert tokenizer.decode(chat.p1).strip().startswith("user")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content }", "cannot be used"),
        ({"tool_use": "{{ messages }}", "rag": "{{ messages }}"}, "cannot be used"),
    ],
)
def test_a_template_that_fails_gives_one_sentence(template, words):
    tokenizer = templated(template)
    with pytest.raises(InputError) as found:
        read_chat(tokenizer, gemma_model(tokenizer), "math")
    message = str(found.value)
    assert "the chat template of small gemma" in message and words in message
    assert "\n" not in message


def test_a_template_without_any_end_token_is_refused():
    tokenizer = templated(ASKS + "{% endfor %}")
    with pytest.raises(InputError, match="has no end token"):
        read_chat(tokenizer, gemma_model(tokenizer), "math")


def test_a_template_that_prints_todays_date_gets_a_fixed_one():
    today = "{{ strftime_now('%d %b %Y') }} " + ASKS + CLOSED.replace("{}", "<eos>")
    tokenizer = templated(today)
    other = tasks.Wording(date="2026-01-31")
    for wording, day in ((tasks.USUAL, "04 Oct 2024"), (other, "31 Jan 2026")):
        chat = read_chat(tokenizer, gemma_model(tokenizer), "math", wording)
        assert chat.first_text(Problem("1?", "1", "math", "1")).startswith(day)
    with pytest.raises(InputError, match="--date tomorrow is no date"):
        tasks.wording_of(configure({"date": "tomorrow"}))


def test_thinking_is_asked_for_only_by_its_flag():
    switch = ASKS + CLOSED.replace("{}", "<eos>")
    switch += "{% if not enable_thinking %} (no thoughts){% endif %}"
    tokenizer = templated(switch)
    problem = Problem("1?", "1", "math", "1")
    for flag, quiet in ((0, True), (1, False)):
        wording = tasks.wording_of(configure({"thinking": flag}))
        chat = read_chat(tokenizer, gemma_model(tokenizer), "math", wording)
        assert chat.first_text(problem).endswith("(no thoughts)") == quiet
        assert tokenizer.decode(chat.p1).endswith("(no thoughts)") == quiet


def test_a_base_models_cue_is_not_kept_with_its_tokenizer():
    tokenizer = builtin_tokenizer()
    tokenizer.chat_template = None
    model = make_model(0)
    math, code = (read_chat(tokenizer, model, task) for task in ("math", "code"))
    problem = Problem("1?", "1", "math", "1")
    assert tokenizer.chat_template is None
    assert math.first_text(problem).endswith("Solution:")
    assert not code.first_text(problem).endswith("Solution:")
