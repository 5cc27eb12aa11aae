r"""Is it right? An attempt gets 1.0 or 0.0, nothing in between, and nothing for its format.

    attempt ── final_answer ──▶ "\frac{2}{4}" ── same_answer ──▶ right, if the true answer is 1/2
    attempt ── program_of ──▶ "def f(x): .." ── sandbox.run_many ──▶ right, if it passes all tests

`final_answer` finds the answer that an attempt at a MATH problem states. `same_answer` reads it and
the true answer into structures (a list, an interval, an equation, a word ...) of values, and
compares them. What cannot be read is wrong. Two answers where one is asked for are wrong, too. The
checks are strict because the policy is paid for whatever this file accepts: it will find each gap.
No function here keeps state, and no attempt can make one raise an error. A cut-off attempt is
judged like any other. Next to read: checkers/answers.py.
"""

import ast
import builtins
import re
import textwrap
import warnings

from checkers.answers import RELATION, is_solved, is_unit, read_answer, same
from checkers.expressions import GREEK
from checkers.shapes import PLAIN, is_copy
from checkers.spelling import NUMERALS, TWISTS, tidy
from data import InputError, Problem, boxes, preamble

# --- 1. Sums -----------------------------------------------------------------------------------


def sums_answer(attempt: str) -> str | None:
    """The digits of an attempt at a sum; `fast`, `slow` or `no` may come first. Else None."""
    found = re.fullmatch(r"(?:(?:fast|slow|no) )?(\d(?: \d)*)", attempt)
    return found[1] if found else None


# --- 2. MATH -----------------------------------------------------------------------------------

TAIL, LONGEST = 20_000, 600  # characters: the end of an attempt that is read; of an answer, at most


def is_right(stated: str, answer: str, question: str = "") -> bool:
    """Is the stated answer the true `answer`, and not a formula of the question in other spelling?

    NOT IN PAPER, like all of this checker. The question may contain the answer if that is a number
    or a word, or if it is spelt there as the true answer is. An equation or inequality of the
    question must be solved if the true answer is solved.
    """
    if not same_answer(stated, answer):
        return False
    asked = [one or two for one, two in MATHS.findall(BLOCK.sub("$", question.replace(r"\$", " ")))]
    if is_copy(stated, answer, asked):
        return False
    unsolved = not is_solved(stated) and is_solved(answer)
    relations = (formula for formula in asked if RELATION.search(tidy(formula)))
    return not (unsolved and any(same_answer(formula, answer) for formula in relations))


def math_reward(attempt: str, answer: str, question: str = "") -> float:
    """r̂(y, y*): 1.0 if the final answer of an attempt is the true `answer`, else 0.0."""
    stated = final_answer(attempt)
    return float(stated is not None and is_right(stated, answer, question))


BLOCK = re.compile(r"\\(?:begin|end)\s*\{(?:align|equation|gather|eqnarray|multline)(?:ed)?\*?\}")
MATHS = re.compile(r"\$\$?(.+?)\$|\\[\[(](.+?)\\[\])]", re.DOTALL)

HEDGES = TWISTS.union(NUMERALS, ["or"]) - set("all to than if when one base".split())
FORMULA = r"(-?(?:\$\$.+?\$\$|\$(?:\\.|[^$\\])+\$|\\\(.+?\\\)|\\\[.+?\\\]))"
DELIMITERS = re.compile(r"(-?)(?:\$\$?|\\[(\[])(.+?)(?:(?<!\\)\$\$?|\\[)\]])", re.DOTALL)
CALCULATION = re.compile(rf"(?:[^A-Za-z\\]|(?!{GREEK.pattern})\\(?:[a-z]+(?![A-Za-z])|\W))+")
# What changes the value of a box if it stands before or after it; such a box is not read.
BEFORE = re.compile(r"(?:(?:\A|[=$(])\s*-|\^|\\neq?\s*|≠\s*|\\sqrt\s*\{\s*)\Z")
AFTER = re.compile(r"\s*(?:!(?!\s)|\^(?!\s*\{?\s*\\circ))")
BARE = r"([-−]?(?:\\?\$)?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?!\w))"
WORD = r"(?<=[*`\"':])\s*([a-z]+(?: [a-z]+)?)(?=[*`\"'.!\s]*(?:i hope|[^\x00-\xb1]|$))"
SENTENCE = re.compile(
    r"(?:the\s+final\s+answer\s+is(?![a-z])|\bfinal\s+answer\s*:)(?:,[^,$\n]{,40},)?"
    r"(?:[\s:*_`'\"(>]|\[(?=\$)|an?\s|the\s)*"
    rf"(?:{FORMULA}|{BARE}|{WORD})",
    re.DOTALL | re.I | re.M,
)
REST = re.compile(r"(.*?)(?:[.!](?=[\s*_`'\")\]]|\Z)(?!\s*or\b)|\n|\Z)", re.DOTALL | re.I)
DECORATION = re.compile(r"[*_`'\")\]}\s]+|[^\x00-\xb1\u2010-\u221f]")
MORE = re.compile(rf"\s*(,\s*(?:and\s)?|and\s|or\s)\s*{FORMULA}", re.DOTALL)
UNEQUAL = re.compile(r"[<>≤≥]|\\[lg](?:eq?|t)\b")
REASON = re.compile(r"\W*(?:because|since|as (?!well))", re.I)
IN_BASE = re.compile(r"\(?(?:in )?base \$?(\w+)\$?\)?")
CLAUSE = re.compile(
    r"[,;:(–—]|\s-\s|\b(?:which|that|because|since|as|where|when|for|in|of|after|by|i hope)\b", re.I
)


def final_answer(text: str) -> str | None:
    r"""The answer that an attempt states, None if there is none.

    It is in the last balanced \boxed{..} or \fbox{..}. If "The final answer is $..$" (the form that
    the paper's prompt asks for) or "Final answer: $..$" comes later, the last of these counts.
    """
    text = text[-TAIL:]
    box, start, end = (boxes(text) or [(None, 0, 0)])[-1]
    if BEFORE.search(text[:start]) or AFTER.match(text, end):
        box = None
    sentences = [s for s in SENTENCE.finditer(text, end) if not (s[3] and box)]
    stated = stated_in(sentences[-1], text) if sentences else box
    return stated and result_of(stated.strip())


def result_of(stated: str) -> str:
    """The result of a calculation: 42 for 6 · 7 = 42. Any other answer stays as it is.

    The last side is the result if all other sides equal it. It is the result, too, if all other
    sides are calculations that cannot be read, such as gcd(4, 6).
    """
    *sides, last = re.split(r"(?<![<>!:])=", stated)
    if not sides or PLAIN.fullmatch(sides[0]):
        return stated
    unread = all(CALCULATION.fullmatch(side) and not same_answer(side, side) for side in sides)
    return last.strip() if unread or all(same_answer(side, last) for side in sides) else stated


def stated_in(sentence: re.Match, text: str) -> str | None:
    """The formulas of a sentence and their unit; None if its other words may change the answer."""
    formulas, end, joint = [next(filter(None, sentence.groups()))], sentence.end(), ", "
    while sentence[1] and (more := MORE.match(text, end)):
        formulas, end = [*formulas, more[2]], more.end()
        joint = r" \text{ or } " if more[1].strip() == "or" else joint
    if "or" in joint and not all(map(UNEQUAL.search, formulas)):
        return None
    rest = DECORATION.sub(" ", REST.match(text, end)[1]).strip()
    clause = None if IN_BASE.fullmatch(rest) else CLAUSE.search(rest)
    unit = rest[: clause.start()].strip() if clause else rest
    said = rest[clause.start() :] if clause else ""
    hedged = re.search(r"[\d$\\+*/=<>]", said) or HEDGES & set(re.findall("[a-z]+", said.lower()))
    if hedged and not REASON.match(said):
        return None
    formula = joint.join(DELIMITERS.sub(r"\1\2", one) for one in formulas)
    if found := IN_BASE.fullmatch(unit):
        return rf"{formula} \text{{ base {found[1]}}}"
    if not unit or unit in ("%", "°"):
        return formula + {"": "", "%": r"\%", "°": r"^\circ"}[unit]
    return rf"{formula} \text{{ {unit}}}" if is_unit(unit.lower().split()) else None


def same_answer(prediction: str, gold: str) -> bool:
    """Is the prediction the gold answer? Both are LaTeX or ASCII, of up to 600 characters.

    Numbers and functions are compared by value, and a rounded number is another value. Order counts
    in a tuple, but not in a list. Units and the signs of percent, degree and dollar may be left
    out, but not the base of a number. What is no answer (empty, 1/0, 0 = 0) is never right, not
    even where the gold answer is the same text.
    """
    if max(len(prediction), len(gold)) > LONGEST:
        return False
    try:
        return same(*(read_answer(text) for text in (prediction, gold)))
    except Exception:  # Unreadable, or any other error: no text may end the run
        return False


def same_text(prediction: str, gold: str) -> bool:
    r"""Are both texts the same, apart from spaces, backslashes and a \text{..} around them?"""
    one, two = (
        " ".join(WRAPPED.sub(r"\1", x).replace("\\", "").split()) for x in (prediction, gold)
    )
    return one == two != ""


WRAPPED = re.compile(r"\A\s*\\(?:text|textbf|textit|mathrm|mbox)\s*\{(.*)\}\s*\Z", re.DOTALL)

# --- 3. Programs -------------------------------------------------------------------------------

NEW_TASK = re.compile(r"^.*\bhere is (?:your|the next|another) task\b", re.I | re.M)
MARKER = re.compile(r"^[ \t]*\[BEGIN\]|\[DONE\][ \t]*$", re.I | re.M)
LEFTOVER = re.compile(r"(?:<end_of_turn>|<eos>|</s>|<\|[^|]*\|>)(?=\s|$)")
FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
PYTHON = ("", "python", "py", "python3", "python2", "code", "ipython")
DEFINES = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?def \w+ *\(|class \w+ *[:(]|\w+ *= *lambda\b)", re.M
)
IMPORT = re.compile(r"^(?:import|from) .*$", re.M)
FUTURE = re.compile(r"^from __future__ import .*\n?", re.M)
BUILTINS = frozenset(dir(builtins))
TESTING = re.compile(r"def (?:check\(|test)|class Test")
COMPLETIONS = (  # what completes a line that begins a statement of several lines
    ("{}", "{}\n 0", "try: 0\n{}\n 0", "if 0: 0\n{}\n 0")
    + ("{}\n)", "{}\n): 0", "{}\n]", "{}\n}}", '{}"""', "{}'''")
)


def code_rewards(programs: list[str | None], problems: list[Problem]) -> list[float]:
    """r̂(y, y*) of many programs: 1.0 if one passes all tests of its problem, else 0.0."""
    try:
        from checkers import sandbox  # cannot be imported on a system without fork
    except ImportError as error:
        raise InputError(
            f"--task code needs Linux or macOS for its sandbox ({error}): use such a machine"
        ) from error
    jobs = [
        (whole_program(program or "", problem), list(problem.tests))
        for program, problem in zip(programs, problems, strict=True)
    ]
    return list(map(float, sandbox.run_many(jobs)))


def whole_program(program: str, problem: Problem) -> str:
    """A program, preceded by what HumanEval's prompt has before its function, such as imports."""
    future = "".join(FUTURE.findall(program))  # Python wants these lines first
    return future + preamble(problem.given) + FUTURE.sub("", program)


def same_program(one: str, two: str) -> bool:
    """Are two programs the same, apart from empty lines and spaces at the end of lines?"""
    lines = ([line.rstrip() for line in program.split("\n")] for program in (one, two))
    return len({"\n".join(filter(None, part)) for part in lines}) == 1


def program_of(attempt: str, problem: Problem | None = None) -> str | None:
    """The program in an attempt, or None.

    It is the last part that defines what the problem's tests call, with helpers from other parts.
    If there is none, it is HumanEval's prompt with the function body that the attempt gives. If
    there is no body either, it is the last part that defines something, if possible no test.
    """
    sources = programs_in(attempt)
    tests = "\n".join(problem.tests) if problem else ""
    wanted = names_used(tests) or names_used(tests, but=())  # a builtin's name only if no other
    owners = [source for source in sources if wanted & set(definitions(source))]
    if owners:
        return with_helpers(owners[-1], sources)
    if problem and problem.given and (body := continued(problem.given, attempt)):
        return body
    sources = [p for p in sources if not TESTING.match(DEFINES.search(p)[0])] or sources
    return sources[-1] if sources else None


def programs_in(attempt: str) -> list[str]:
    """All parts of an attempt that define something, in order.

    A part may be fenced, stand between MBPP's [BEGIN] and [DONE], or be bare with prose around it.
    After a definition, "here is your task" ends the attempt: the model went on with a new task.
    """
    text = LEFTOVER.split(attempt.replace("\r\n", "\n").replace("\ufeff", ""))[0]
    text = MARKER.sub(lambda mark: f"\n{mark[0].strip()}\n", text)
    for task in NEW_TASK.finditer(text):
        if DEFINES.search(text, 0, task.start()):
            text = text[: task.start()]
            break
    found = []
    for fenced, lines in blocks(text):
        for part in [lines] if fenced else bare_code(lines):
            source = textwrap.dedent("\n".join(part)).strip("\n").rstrip()
            if DEFINES.search(source):
                found.append(source)
    return found


def parsed(source: str) -> ast.Module:
    """The syntax tree of a program; an empty one if the text is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return ast.Module([], [])


def definitions(source: str) -> dict[str, str]:
    """The source of each function, class and value that a program defines at its top level."""
    found, lines = {}, source.split("\n")
    for node in parsed(source).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        found |= {name: "\n".join(lines[first - 1 : node.end_lineno]) for name in names if name}
    return found


def names_used(source: str, but=BUILTINS) -> set[str]:
    """Names that a program uses and does not define, without those in `but`."""
    nodes = list(ast.walk(parsed(source)))
    used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    made = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    made |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    made |= {n.asname or n.name.partition(".")[0] for n in nodes if isinstance(n, ast.alias)}
    made |= {getattr(n, "name", "") for n in nodes if not isinstance(n, ast.alias)}
    return used - made - set(but)


def with_helpers(source: str, others: list[str]) -> str:
    """A program, preceded by the definitions that it lacks and other programs have."""
    known = {name: text for other in others for name, text in definitions(other).items()}
    imports = [line for other in others for line in IMPORT.findall(other)]
    helpers: list[str] = []
    while missing := sorted(names_used("\n".join([*helpers, source])) & set(known)):
        helpers = [known.pop(missing[0]), *helpers]
    given = [line for line in imports if line not in source] if helpers else []
    return "\n\n".join([*dict.fromkeys(given), *helpers, source])


def continued(given: str, attempt: str) -> str | None:
    """HumanEval's prompt with the function body that an attempt gives, None if it gives none."""
    code = [lines for fenced, lines in blocks(attempt) if fenced and any(lines)]
    lines = (code or [attempt.split("\n")])[-1]
    first = lines[0].lstrip() if lines else ""
    inside = [f"    {first}"]
    for line in lines[1:]:
        if line.strip() and line[0] not in " \t":
            break
        inside.append(line)
    bodies = ("\n".join(inside), textwrap.indent("\n".join([first, *inside[1:]]), "    "))
    whole = (given.rstrip() + "\n" + body.rstrip() for body in bodies if first)
    return next((program for program in whole if parsed(program).body), None)


def blocks(text: str) -> list[tuple[bool, list[str]]]:
    """The parts of an attempt as (is it fenced?, lines), without fences in other languages."""
    found, fence, python = [(False, [])], "", True
    for line in text.split("\n"):
        mark, lines = FENCE.match(line), found[-1][1]
        if fence and line.rstrip().endswith(fence) and not within_text(lines):
            lines += [line.rstrip().removesuffix(fence)] * python
            fence, python = "", True
            found.append((False, []))
        elif not fence and mark and line.count(mark[1]) == 1 and not within_text(lines):
            fence, python = mark[1], mark[2].lower() in PYTHON
            found.append((True, []))
        elif line.strip().upper() in ("[BEGIN]", "[DONE]"):
            found.append((bool(fence), []))
        elif python:
            lines.append(line)
    return found


def bare_code(lines: list[str]) -> list[list[str]]:
    """The groups of lines that are code; prose may stand between them."""
    parts = [[]]
    for line in lines:
        inside = parts[-1] and (not line.strip() or line[0] in " \t" or within_text(parts[-1]))
        if inside or is_code(line.strip()):
            parts[-1].append(line)
        elif parts[-1]:
            parts.append([])
    return parts


def within_text(lines: list[str]) -> bool:
    """Do the lines end within a triple-quoted string?"""
    source = "\n".join(lines)
    return source.count('"""') % 2 == 1 or source.count("'''") % 2 == 1


def is_code(line: str) -> bool:
    """Is a line Python rather than prose? It may begin a statement of several lines."""
    if line.startswith(("#", "@", ")", "]", "}", '"""', "'''")):
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for completion in COMPLETIONS:
            try:
                found = ast.parse(completion.format(line)).body[0]
            except (SyntaxError, ValueError, IndexError, MemoryError, RecursionError):
                continue
            return not isinstance(found, ast.Expr) or isinstance(found.value, ast.Call)
    return False
