"""How a model is asked: the prompts of each task, and the token ids that frame an attempt.

SCoRe asks twice. Everything is joined as tokens, never by decoding and tokenising again:

    x1 = [bos, question, template ...]      the first prompt, from the model's own chat template
    y1 = [...] + end token                  attempt 1, sampled
    p1 = [template, instruction, ...]       asks for another attempt: "There might be an error ..."
    x2 = x1 + y1 + p1                       the second prompt
    y2 = [...] + end token                  attempt 2, sampled

A task is one entry of TASKS, or a Python file of your own (`--task FILE`): its problems, its
prompts, its reward, and the flags that it sets in score.py and eval.py. The prompts are the paper's
(appendix C). Next to read: data.py.
"""

import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache, partial
from pathlib import Path

import rewards
from data import (
    InputError,
    Problem,
    code_problems,
    first_line,
    math_problems,
    own_problems,
    read_text,
    sums_problems,
)

# --- 1. Tasks ------------------------------------------------------------------------------------

MATH_FORM = (
    "At the end of the Solution, when you give your final answer, write it in the form "
    '"Final Answer: The final answer is $answer$. I hope it is correct."'
)
MATH_PROMPT = (
    "You are a math expert. When you respond, respond only with the Solution of the final Problem, "
    f"thinking step by step. {MATH_FORM}"
)
MATH_CORRECTION = (
    "There might be an error in the solution above because of lack of understanding of the "
    "question. Please correct the error, if any, and rewrite the solution. Only output the final "
    f"solution! {MATH_FORM}"
)
# Self-Refine asks for feedback first. NOT STATED: its words; these are ours.
MATH_FEEDBACK = "Check the solution above step by step. Say which steps are wrong, and why."
MATH_FEEDBACK += " If none is wrong, say so."
CODE_FEEDBACK = "Check the code above line by line. Say what is wrong with it, and why."
CODE_FEEDBACK += " If nothing is wrong, say so."
REFINE = "Now rewrite the {}, and follow your own feedback. Only output the final {}!"
MATH_REFINE = f"{REFINE.format('solution', 'solution')} {MATH_FORM}"
CODE_REFINE = REFINE.format("code", "correct Python program")
CODE_TASK = "You are an expert Python programmer, and here is your task:"
CODE_CORRECTION = (
    "# There might be an error in the code above because of lack of understanding of the question. "
    "Please correct the error, if any, and rewrite the solution. Only output the final correct "
    "Python program!"
)
MBPP_SHOTS = f"""\
{CODE_TASK} Write a function to find the similar elements from the given two tuple lists. \
Your code should pass these tests:

assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)
assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)
assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)

[BEGIN]

def similar_elements(test_tup1, test_tup2):
    res = tuple(set(test_tup1) & set(test_tup2))
    return (res)

[DONE]

{CODE_TASK} Write a python function to identify non-prime numbers. \
Your code should pass these tests:

assert is_not_prime(2) == False
assert is_not_prime(10) == True
assert is_not_prime(35) == True

[BEGIN]

import math
def is_not_prime(n):
    result = False
    for i in range(2, int(math.sqrt(n)) + 1):
        if n % i == 0:
            result = True
    return result

[DONE]

{CODE_TASK} Write a function to find the largest integers from a given list of numbers using heap \
queue algorithm. Your code should pass these tests:

assert heap_queue_largest([25, 35, 22, 85, 14, 65, 75, 22, 58], 3) == [85, 75, 65]
assert heap_queue_largest([25, 35, 22, 85, 14, 65, 75, 22, 58], 2) == [85, 75]
assert heap_queue_largest([25, 35, 22, 85, 14, 65, 75, 22, 58], 5) == [85, 75, 65, 58, 35]

[BEGIN]

import heapq as hq
def heap_queue_largest(nums, n):
    largest_nums = hq.nlargest(n, nums)
    return largest_nums

[DONE]

"""


ATTEMPT_FLAGS = {  # flags that eval.py and score.py share
    "problems": "held-out problems",
    "max_new_tokens": "longest attempt, in tokens",
    "precision": "precision of the weights: float32 or bfloat16",
    "rows": "problems attempted side by side; costs memory",
}


@dataclass(frozen=True)
class Task:
    """A task: problems, prompts, reward, and the flags of score.py and eval.py that it sets.

    load(split, count): the first `count` problems (None: all) of "train" or of one of `splits`,
    always in the same order; it has one more parameter for each flag in `takes`.
    first(problem): the first prompt. again: the words that ask for another attempt.
    states(attempt, problem): the answer in an attempt, None if there is none. form: a pattern of
    what a prompt must say, for `states` to find an answer. keeps: an attempt with this text keeps
    the answer of the attempt before. rewards(answers, problems): 1.0 or 0.0
    for each answer. same(one, two): are two answers the same? feedback, refine: what Self-Refine
    says instead of `again`. training: other flags of score.py.
    """

    load: Callable[..., tuple[Problem, ...]]
    first: Callable[[Problem], str]
    again: str
    states: Callable[[str, Problem], str | None]
    rewards: Callable[[list[str | None], list[Problem]], list[float]]
    same: Callable[[str, str], bool]
    problems: int
    max_new_tokens: int
    precision: str
    rows: int
    training: dict = field(default_factory=dict)
    splits: tuple[str, ...] = ("test",)  # held out
    takes: tuple[str, ...] = ()  # flags that only some tasks have: data, columns, ids
    form: str = ""
    keeps: str = ""
    cue: str = ""  # what a base model, without a chat template, continues
    feedback: str = ""
    refine: str = ""


def each(is_right: Callable[[str, Problem], bool]):
    """Make a task's `rewards` from a function that judges one answer; no answer (None) gets 0.0."""
    return lambda answers, problems: [
        float(answer is not None and is_right(answer, problem))
        for answer, problem in zip(answers, problems, strict=True)
    ]


def right_answer(stated: str, problem: Problem) -> bool:
    """Is an answer to one of your own questions right, as a text or as mathematics?"""
    gold = problem.answer
    return rewards.same_text(stated, gold) or rewards.is_right(stated, gold, problem.question)


def first_code(problem: Problem) -> str:
    """MBPP after the canonical three shots; HumanEval zero-shot, in words that are NOT STATED."""
    if problem.given:
        ask = "Complete this function. Write out all of it, and nothing else."
        return f"{CODE_TASK} {ask}\n\n{problem.question}"
    return f"{MBPP_SHOTS}{CODE_TASK} {problem.question}\n\n[BEGIN]"


def ask_math(problem: Problem) -> str:
    """MATH's first prompt; NOT STATED: where the question stands, and in which role's message."""
    return f"{MATH_PROMPT}\n\nProblem: {problem.question}"


GEMMA = {"model": "google/gemma-2-2b-it", "k": 4, "micro_tokens": 8192, "recompute": 1}
GEMMA |= {"beta1": 0.01}  # Table 8
MATH = Task(
    load=lambda split, count, data: math_problems(data)[split][:count],
    first=ask_math,
    again=MATH_CORRECTION,
    states=lambda attempt, _: rewards.final_answer(attempt),
    form=r"box|final answer is",
    rewards=each(lambda answer, p: rewards.is_right(answer, p.answer, p.question)),
    same=rewards.same_answer,
    problems=500,
    max_new_tokens=1024,  # NOT STATED
    precision="bfloat16",
    rows=64,
    training={  # steps1 + steps2, batch, lr: Table 8; the split and the others NOT STATED
        **GEMMA,
        **{"out": "runs/math", "steps1": 1500, "steps2": 1500, "batch": 512, "lr": 5e-6},
    },
    takes=("data",),
    cue="\n\nSolution:",
    feedback=MATH_FEEDBACK,
    refine=MATH_REFINE,
)
TASKS = {
    "sums": Task(
        load=sums_problems,
        first=lambda problem: problem.question,
        again="again =",
        states=lambda attempt, _: rewards.sums_answer(attempt),
        keeps="ok",
        rewards=each(lambda answer, problem: answer == problem.answer),
        same=str.__eq__,
        problems=2000,
        max_new_tokens=10,  # a word, seven digits and the end token are 9
        precision="float32",
        rows=500,
    ),
    "math": MATH,
    "answers": replace(  # your own questions, judged as MATH's are, or to the letter
        MATH,
        rewards=each(right_answer),
        same=lambda one, two: rewards.same_text(one, two) or rewards.same_answer(one, two),
        load=lambda split, count, data, columns: own_problems(data, columns)[split][:count],
        training={**MATH.training, "out": "runs/answers"},
        takes=("data", "columns"),
    ),
    "code": Task(
        load=lambda split, count, data, ids: code_problems(split, data, ids)[:count],
        first=first_code,
        again=CODE_CORRECTION,
        states=rewards.program_of,
        rewards=rewards.code_rewards,
        same=rewards.same_program,
        problems=500,  # HumanEval has 164
        max_new_tokens=512,  # NOT STATED
        precision="bfloat16",
        rows=64,
        training={  # steps1 + steps2, batch, lr, beta2: Table 8; the split and others NOT STATED
            **GEMMA,
            **{"out": "runs/code", "steps1": 750, "steps2": 750, "batch": 128, "lr": 1e-5},
            **{"beta2": 0.25, "ids": "511-974"},
        },
        splits=("test", "mbpp"),
        takes=("data", "ids"),
        cue="\n\n",
        feedback=CODE_FEEDBACK,
        refine=CODE_REFINE,
    ),
}


def find_task(task: str) -> Task:
    """The task of that name, or of a Python file with one TASK = Task(..); else InputError."""
    if task in TASKS:
        return TASKS[task]
    if not task.endswith(".py"):
        known = ", ".join(TASKS)
        raise InputError(f"--task {task} is unknown: choose {known}, or a file such as my_task.py")
    return run_task_file(os.path.abspath(task))


@cache
def run_task_file(path: str) -> Task:
    """The TASK of a Python file, which may import modules from its own folder."""
    if not os.path.exists(path):
        raise InputError(f"--task {path} does not exist: name a Python file with TASK = Task(..)")
    sys.path.append(os.path.dirname(path))
    task = explained(path, "it", runpy.run_path)(path).get("TASK")
    if not isinstance(task, Task):
        raise InputError(f"--task {path} has no TASK = Task(..): add it, see TUTORIAL.md")
    if not isinstance(task.again, str) or not task.again.strip():
        raise InputError(f"--task {path} is wrong, since again is {task.again!r}: write a text")
    calls = {n: explained(path, n, getattr(task, n), check) for n, check in RESULTS.items()}
    training = dict(task.training)
    if training.get("out") in {None, *(known.training.get("out") for known in TASKS.values())}:
        training["out"] = f"runs/{Path(path).stem}"  # not that of the task it was inherited from
    return replace(task, training=training, **calls)


def explained(path: str, name: str, call: Callable, check=lambda result, *_: result) -> Callable:
    """A function of a task file; its errors become one sentence that names the line.

    check(result, *arguments) turns its result into the right type, or raises an error.
    """

    def called(*args, **flags):
        try:
            return check(call(*args, **flags), *args)
        except InputError:
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == path]
            where = f", line {lines[-1]}" if lines else ""
            raise InputError(f"--task {path}{where}: {name} fails ({error!r}): fix it") from error

    return called


def as_problems(found, split: str, *_) -> tuple[Problem, ...]:
    problems = tuple(found)
    if not problems:
        raise ValueError(f"no problem in {split}")
    for problem in problems:
        if not isinstance(problem, Problem):
            raise TypeError(f"{problem!r:.40} is no Problem(question, answer)")
        as_text(problem.question)
    return problems


def as_text(value, *_) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def as_rewards(found, answers: list, *_) -> list[float]:
    values = list(found)
    if len(values) != len(answers):
        raise ValueError(f"{len(values)} rewards for {len(answers)} answers")
    if others := [value for value in values if value not in (0, 1)]:
        raise ValueError(f"{others[0]!r} is no reward: give 1 (right) or 0 (wrong)")
    return [float(value) for value in values]


RESULTS = {  # what each function of a task file must return
    "load": as_problems,
    "first": as_text,
    "states": lambda stated, *_: stated if stated is None else as_text(stated),
    "rewards": as_rewards,
    "same": lambda answer, *_: bool(answer),
}


def load_problems(
    task: str,
    split: str,
    count: int | None = None,
    data: str = "",
    ids: str = "",
    columns: str = "",
) -> tuple[Problem, ...]:
    """The problems of a task's "train" split, or of a held-out split, always in the same order.

    data: folder of the task's files, "" for the hub. ids: the problems of MBPP to train on.
    columns: those of question and answer in your own files. Raises InputError if there is nothing
    to read.
    """
    check_task(task, data=data, ids=ids, columns=columns)
    known = find_task(task)
    ids = ids or known.training.get("ids", "")
    flags = {"data": data, "ids": ids, "columns": columns or "question,answer"}
    problems = known.load(split, count, **{name: flags[name] for name in known.takes})
    return tuple(
        p if p.task == task and p.id else replace(p, task=task, id=p.id or p.question)
        for p in problems
    )


def check_task(task: str, **flags: str) -> None:
    """Raise InputError for an unknown task, or for a flag that the task does not take."""
    takes = find_task(task).takes
    for flag, value in flags.items():
        if value and flag not in takes:
            takers = " or ".join(name for name in TASKS if flag in TASKS[name].takes)
            raise InputError(
                f"--{flag} {value} is for --task {takers}: leave it out, or change --task"
            )


def settings_of(task: str) -> dict:
    """The flags of score.py that a task sets."""
    known = find_task(task)
    return {name: getattr(known, name) for name in ATTEMPT_FLAGS} | known.training


def keeps_answer(attempt: str, task: Task) -> bool:
    """Does an attempt state no answer of its own, but keep that of the attempt before it?"""
    return bool(task.keeps) and attempt == task.keeps


def stated_answer(attempt: str, before: str | None, problem: Problem) -> str | None:
    """The answer that an attempt states, or None; before: the answer of the attempt before it."""
    task = find_task(problem.task)
    return before if keeps_answer(attempt, task) else task.states(attempt, problem)


def judge(attempts: list[str], before: list[str | None], problems: list[Problem]):
    """The answers that attempts state, and their rewards; all problems are of one task.

    before: for each attempt, the answer of the attempt before it. If the true answers are not known
    (None), all rewards are 0.
    """
    stated = [stated_answer(*each) for each in zip(attempts, before, problems, strict=True)]
    if problems[0].answer is None:
        return stated, [0.0] * len(stated)
    return stated, find_task(problems[0].task).rewards(stated, problems)


def agree(one: str | None, two: str | None, task: str) -> bool:
    """Are two stated answers the same? If one is None, they are not."""
    return None not in (one, two) and (one == two or find_task(task).same(one, two))


# --- 2. Prompts as token ids -----------------------------------------------------------------

# For base models, which have no chat template. NOT STATED: the layout.
COMPLETION_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'user' %}{{ 'CUE' }}"
    "{% else %}{{ eos_token + '\n\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Chat:
    """A tokenizer and the ids that frame an attempt of its model.

    p1: what stands between an attempt's end token and the next attempt. end_ids: every token that
    ends an attempt (Gemma: 1 and 107). close_id: the one that the chat template itself writes; it
    closes an attempt that was cut off. p2: if given, stands for p1 from attempt 2 on.
    """

    tokenizer: object
    p1: list[int]
    end_ids: tuple[int, ...]
    close_id: int
    render: Callable[[list[dict]], str]  # messages as text, by the model's chat template
    p2: list[int] | None = None
    prompt: str = ""  # the first prompt, if it is not the task's

    def after(self, number: int) -> list[int]:
        """What asks again after attempt `number`."""
        return self.p1 if number == 1 or self.p2 is None else self.p2

    def room(self, attempts: int, max_new_tokens: int) -> int:
        """The most tokens that may follow x1."""
        longest = max(len(self.p1), len(self.p2 or []))
        return attempts * (max_new_tokens + 1 + longest)

    def x1(self, problem: Problem) -> list[int]:
        """The first prompt's token ids; its only BOS is written by the template."""
        return self.x1s([problem])[0]

    def x1s(self, problems: list[Problem]) -> list[list[int]]:
        """`x1` of many problems at once, which is faster."""
        texts = [self.first_text(problem) for problem in problems]
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def first_text(self, problem: Problem) -> str:
        """The first prompt, in the model's template."""
        asked = self.prompt.replace("{question}", problem.question)
        asked = asked or find_task(problem.task).first(problem)
        return self.render([{"role": "user", "content": asked}])

    def text(self, tokens: list[int]) -> str:
        """An attempt as text, without its end token; stray special tokens stay visible."""
        ended = bool(tokens) and tokens[-1] in self.end_ids
        return self.tokenizer.decode(tokens[:-1] if ended else tokens).strip()


@dataclass(frozen=True)
class Wording:
    """What flags change in the prompts; date is what a chat template takes for today's date."""

    prompt: str = ""
    again: str = ""
    thinking: bool = False
    date: str = "2024-10-04"


USUAL = Wording()


def wording_of(settings) -> Wording:
    """The Wording of a Config or of eval.py's flags; reads the files of --prompt, --correction."""
    words = {"prompt": settings.prompt, "correction": settings.correction}
    prompt, again = (read_words(f"--{name}", path) for name, path in words.items())
    if prompt and not re.search(find_task(settings.task).form, prompt, re.IGNORECASE):
        raise InputError(
            f"--prompt {settings.prompt} must say how to state the answer, as \\boxed{{..}} or in "
            "'The final answer is $..$', since nothing else is read as an answer: add, for "
            "example, Write the answer as \\boxed{answer}."
        )
    try:
        date.fromisoformat(settings.date)
    except ValueError as error:
        raise InputError(f"--date {settings.date} is no date: give YYYY-MM-DD") from error
    return Wording(prompt, again, bool(settings.thinking), settings.date)


def fixed_date(template: str, day: str) -> str:
    """A chat template that takes `day` for today: prompts must not change at midnight."""
    if "strftime_now" not in template:
        return template
    today = date.fromisoformat(day)
    parts = (f".replace('%{letter}', '{today.strftime('%' + letter)}')" for letter in "aAbBdjmuyY")
    return (
        f"{{% macro strftime_now(form) %}}{{{{ form{''.join(parts)} }}}}{{% endmacro %}}{template}"
    )


def render(tokenizer, completion: str, wording: Wording, messages: list[dict]) -> str:
    """Messages as text by the model's chat template, or by `completion` if it has none."""
    try:
        own = tokenizer.chat_template and tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages,
            chat_template=fixed_date(own or completion, wording.date),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=wording.thinking,
        )
    except Exception as error:  # a template may raise anything
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} cannot be used "
            f"({first_line(error)}): name another --model"
        ) from error


def refining(tokenizer, model, task: str, wording: Wording = USUAL) -> Chat:
    """The Chat of Self-Refine: attempt 1, then feedback on it, and then attempt 2."""
    known = find_task(task)
    feedback, refine = known.feedback or known.again, known.refine or known.again
    p2 = read_chat(tokenizer, model, task, replace(wording, again=refine)).p1
    return replace(read_chat(tokenizer, model, task, replace(wording, again=feedback)), p2=p2)


def read_words(flag: str, path: str) -> str:
    """The words in a file of --prompt or --correction, "" for no file; a prompt has {question}."""
    if not path:
        return ""
    try:
        text = read_text(Path(path)).strip()
    except InputError as error:
        raise InputError(f"{flag} {error}") from error
    if not text:
        raise InputError(f"{flag} {path} is empty: write the words into it")
    if flag == "--prompt" and "{question}" not in text:
        # a word in braces, which is no argument of a LaTeX command such as \boxed{answer}
        if re.search(r"(?<![\w\\}^_])\{ *[A-Za-z]+ *\}", text):
            raise InputError(f"{flag} {path} misspells {{question}}: write it like this")
        text += "\n\n{question}"
    return text


def read_chat(tokenizer, model, task: str, wording: Wording = USUAL) -> Chat:
    """The Chat of a model: p1 and the end tokens, read from template and configs together.

    A tokenizer without a chat template gets COMPLETION_TEMPLATE. Raises InputError if there is no
    token that could end an attempt.
    """
    completion = COMPLETION_TEMPLATE.replace("CUE", find_task(task).cue)
    write = partial(render, tokenizer, completion, wording)
    marker = "ATTEMPT"
    messages = [
        {"role": "user", "content": "QUESTION"},
        {"role": "assistant", "content": marker},
        {"role": "user", "content": wording.again or find_task(task).again},
    ]
    after = write(messages).partition(marker)[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False).input_ids
    listed = [tokenizer.eos_token_id, model.config.eos_token_id]
    listed.append(model.generation_config.eos_token_id if model.can_generate() else None)
    end_ids = {i for one in listed for i in (one if isinstance(one, list) else [one])} - {None}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not ids or ids[0] not in end_ids | special:
        raise InputError(
            f"{tokenizer.name_or_path} has no end token: its chat template must close an answer "
            "with one, or its tokenizer must name an eos_token"
        )
    end_ids = tuple(sorted(end_ids | {ids[0]}))
    return Chat(tokenizer, ids[1:], end_ids, ids[0], write, prompt=wording.prompt)
