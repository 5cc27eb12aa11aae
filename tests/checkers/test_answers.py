"""The answer checker: hand-made pairs, rewritten golds, hostile answers, and MATH if it is here."""

import gzip
import json
import os
import re
import statistics
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from rewards import final_answer, math_reward, same_answer
from tasks import load_problems

FILES = Path(__file__).parents[1] / "math"
MATH = Path(os.environ.get("REAL_DATA", Path(__file__).parents[3] / "shared" / "data"))
with_math = pytest.mark.skipif(
    not (MATH / "math500.jsonl").exists(),
    reason="MATH's files are not here: name their folder in REAL_DATA to check the real golds",
)


def rows(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- 1. Hand-made pairs -----------------------------------------------------------------------

PAIRS = rows(FILES / "pairs.jsonl")
KNOWN_MISSES = {r"0.56 = 56\%", "[-2,2]", r"(-\infty,-1] \cup [1,\infty)"}  # golds of three pairs


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_hand_made_pairs_are_told_apart(kind):
    for pair in PAIRS:
        one, two = pair["prediction"], pair["gold"]
        if pair["kind"] == kind and not (pair["equal"] and two in KNOWN_MISSES):
            assert same_answer(one, two) == pair["equal"], pair
            assert same_answer(two, one) == pair["equal"], pair


def test_at_least_99_percent_are_right_and_no_wrong_answer_is_accepted():
    found = [(same_answer(p["prediction"], p["gold"]), p["equal"]) for p in PAIRS]
    assert len(found) > 2000
    assert sum(one == two for one, two in found) >= 0.99 * len(found)
    assert not any(accepted and not equal for accepted, equal in found)


def test_no_answer_that_once_fooled_the_checker_does_so_again():
    for attack in rows(FILES / "attacks.jsonl"):
        one, two = attack["prediction"], attack["gold"]
        assert not same_answer(one, two) and not same_answer(two, one), attack


@pytest.mark.parametrize("case", rows(FILES / "final.jsonl"), ids=lambda case: case["kind"])
def test_the_final_answer_is_the_last_box_or_the_papers_sentence(case):
    assert final_answer(case["text"]) == case["answer"]


def test_full_answers_are_paid_as_their_labels_say():
    cases = rows(FILES / "answers.jsonl")
    found = [(bool(math_reward(c["text"], c["gold"])), c["right"]) for c in cases]
    assert len(found) >= 360 and sum(right for _, right in found) >= 240
    assert not any(paid and not right for paid, right in found)
    assert sum(paid == right for paid, right in found) >= 0.98 * len(found)


def test_no_copy_that_once_fooled_the_reward_is_paid_again():
    cases = rows(FILES / "copies.jsonl")
    paid = [c for c in cases if math_reward(c["attempt"], c["gold"], c["question"])]
    assert len(cases) >= 180 and paid == []


def test_a_calculation_states_its_result_if_it_is_right():
    for calculation, result in (
        (r"6 \cdot 7 = 42", "42"),
        (r"\binom{5}{2} = 10", "10"),
        (r"\gcd(18, 12) = 6", "6"),
        (r"x^2 - 5x + 6 = (x-2)(x-3)", "(x-2)(x-3)"),
        (r"\left(\frac12\right)^3 = \frac18", "0.125"),
    ):
        assert math_reward(rf"\boxed{{{calculation}}}", result)
    for wrong, result in (("13 + 0 = 12", "12"), ("5 = 5", "5"), (r"\theta + 3 = 8", "8")):
        assert not math_reward(rf"\boxed{{{wrong}}}", result)


def test_a_corrected_answer_wins_and_numbers_in_passing_do_not_count():
    assert math_reward(r"so \boxed{5}. Wait: \boxed{\frac{1}{2}}", "0.5") == 1.0
    assert math_reward(r"so \boxed{0.5}. Wait: \boxed{5}", r"\frac12") == 0.0
    assert math_reward("The answer is 7.", "7") == 0.0
    assert math_reward("Final Answer: The final answer is $7$. I hope it is correct.", "7") == 1.0


# --- 2. Golds rewritten by rule ---------------------------------------------------------------

INTEGER, FRACTION = re.compile(r"-?\d{1,9}"), re.compile(r"(-?)\\frac\{(\d+)\}\{(\d+)\}")
TUPLE = re.compile(r"\((-?\d+),\s*(-?\d+)\)")
LIST = re.compile(r"(-?\d{1,2}), ?(-?\d{1,2})")
SURD = re.compile(r"(\d*)\\sqrt\{(\d+)\}")
BASE = re.compile(r"(\d+)_\{?(\d)\}?")
INTERVAL = re.compile(r"\[(-?\d+),\s*(-?\d+)\)")


def of_integer(form):
    return lambda gold: form(int(gold)) if INTEGER.fullmatch(gold) else None


def of_fraction(form):
    def rewrite(gold):
        found = FRACTION.fullmatch(gold)
        return form(found[1], int(found[2]), int(found[3])) if found and found[3] > "1" else None

    return rewrite


def of_groups(pattern, form):
    return lambda gold: form(*found.groups()) if (found := pattern.fullmatch(gold)) else None


EQUAL = {
    "in dollars": lambda gold: f"${gold}$",
    "in a box": lambda gold: rf"\boxed{{{gold}}}",
    "full stop": lambda gold: gold + ".",
    "dfrac": lambda gold: gold.replace(r"\frac", r"\dfrac"),
    "spaces": lambda gold: f" {gold} ",
    "parentheses around": of_integer(lambda n: rf"\left( {n} \right)"),
    "point zero": of_integer(lambda n: f"{n}.0"),
    "a sum": of_integer(lambda n: f"{n - 1} + 1"),
    "a fraction of integers": of_integer(lambda n: rf"\frac{{{3 * n}}}{{3}}"),
    "x =": of_integer(lambda n: f"x = {n}"),
    "degrees": of_integer(lambda n: rf"{n}^\circ"),
    "percent": of_integer(lambda n: rf"{n}\%"),
    "currency": of_integer(lambda n: rf"\${n}"),
    "unit": of_integer(lambda n: rf"{n}\text{{ cm}}"),
    "thousands": of_integer(lambda n: f"{n:,}"),
    "TeX thousands": of_integer(lambda n: f"{n:,}".replace(",", r"{,}")),
    "scientific": of_integer(lambda n: rf"{n} \times 10^0"),
    "slash": of_fraction(lambda sign, a, b: f"{sign}{a}/{b}"),
    "not reduced": of_fraction(lambda sign, a, b: rf"{sign}\frac{{{2 * a}}}{{{2 * b}}}"),
    "minus above": of_fraction(lambda sign, a, b: rf"\frac{{{sign}{a}}}{{{b}}}"),
    "unicode minus": lambda gold: gold.replace("-", "−"),
    "tuple spaced": of_groups(TUPLE, lambda a, b: rf"\left( {a},\, {b} \right)"),
    "list reversed": of_groups(LIST, lambda a, b: f"{b}, {a}"),
    "list with and": of_groups(LIST, lambda a, b: rf"{a} \text{{ and }} {b}"),
    "set": of_groups(LIST, lambda a, b: rf"\{{{a}, {b}\}}"),
    "half power": of_groups(SURD, lambda a, b: f"{a or 1} \\cdot {b}^{{1/2}}"),
    "ascii sqrt": of_groups(SURD, lambda a, b: f"{a or 1}*sqrt({b})"),
    "base in braces": of_groups(BASE, lambda n, b: f"{n}_{{{b}}}"),
    "inequality": of_groups(INTERVAL, lambda a, b: rf"{a} \le x < {b}"),
}
UNEQUAL = {
    "nothing": lambda gold: "",
    "zero over zero": lambda gold: r"\frac{0}{0}",
    "with another": lambda gold: gold + r" \text{ or } 987654321",
    "list with another": lambda gold: gold + ", 987654321",
    "tautology": lambda gold: f"{gold} = {gold}",
    "plus one": of_integer(lambda n: str(n + 1)),
    "sign": of_integer(lambda n: str(-n) if n else "1"),
    "digit appended": of_integer(lambda n: f"{n}1"),
    "nearly": of_integer(lambda n: f"{n}.0000001"),
    "base": of_integer(lambda n: f"{n}_{{37}}" if n < 0 else None),
    "plus minus": of_integer(lambda n: rf"\pm {n}" if n else None),
    "not this": of_integer(lambda n: rf"x \neq {n}"),
    "more than this": of_integer(lambda n: f"x > {n}"),
    "thousand": of_integer(lambda n: rf"{n} \text{{ thousand}}" if n else None),
    "equation of two": of_integer(lambda n: f"x + y = {n}"),
    "upside down": of_fraction(lambda sign, a, b: f"{sign}{b}/{a}" if a != b else None),
    "rounded": of_fraction(
        lambda sign, a, b: sign + f"{a / b:.6f}" if Fraction(f"{a / b:.6f}") * b != a else None
    ),
    "numerator": of_fraction(lambda sign, a, b: f"{sign}{a + 1}/{b}"),
    "glued": of_fraction(lambda sign, a, b: f"{sign}{a}{b}"),
    "swapped": of_groups(TUPLE, lambda a, b: f"({b}, {a})" if a != b else None),
    "brackets": of_groups(TUPLE, lambda a, b: f"[{a}, {b}]"),
    "no brackets": of_groups(TUPLE, lambda a, b: f"{a}, {b}"),
    "one short": of_groups(LIST, lambda a, b: a),
    "twice": of_groups(LIST, lambda a, b: f"{a}, {b}, {b}"),
    "in order": of_groups(LIST, lambda a, b: f"({a}, {b})"),
    "radicand": of_groups(SURD, lambda a, b: rf"{a}\sqrt{{{int(b) + 1}}}"),
    "root lost": of_groups(SURD, lambda a, b: f"{a}{b}"),
    "base lost": of_groups(BASE, lambda n, b: n),
    "other base": of_groups(BASE, lambda n, b: f"{n}_{{{int(b) + 1}}}"),
    "closed": of_groups(INTERVAL, lambda a, b: f"[{a}, {b}]"),
}
GOLDS = sorted({pair["gold"] for pair in PAIRS if same_answer(pair["gold"], pair["gold"])})


@pytest.mark.parametrize("kind", [*EQUAL, *UNEQUAL])
def test_golds_rewritten_by_rule_keep_or_lose_their_value(kind):
    rewrite = {**EQUAL, **UNEQUAL}[kind]
    rewritten = [(rewrite(gold), gold) for gold in GOLDS if "=" not in gold or kind in UNEQUAL]
    rewritten = [(new, gold) for new, gold in rewritten if new is not None]
    assert rewritten
    wrong = [pair for pair in rewritten if same_answer(*pair) != (kind in EQUAL)]
    assert len(wrong) <= (0.02 * len(rewritten) if kind in EQUAL else 0), wrong


# --- 3. Hostile answers -----------------------------------------------------------------------

HOSTILE = [
    *(
        "9^{9^{9^{9^9}}}",
        "9^9^9^9^9",
        "99999999!",
        "(((9!)!)!)!",
        "2^{99999999999}",
        "e^{e^{e^{e^e}}}",
    ),
    *("(" * 5000 + "5" + ")" * 5000, "{" * 300 + "5" + "}" * 300, "[" * 40 + "5" + "]" * 40),
    *(
        r"\frac{" * 200 + "5" + "}{1}" * 200,
        "-" * 500 + "5",
        "+" * 500 + "5",
        "|" * 501,
        r"\sqrt{" * 100 + "25",
    ),
    *("5\x00", "\x00", "5\u200b", "٥", "«5»", "5" * 100_000, "x" * 1_000_000, " " * 10**6 + "5"),
    *('__import__("os").system("true")', "exec('5')", "lambda: 5", "5 if 1 else 6", "eval(5)"),
    *("{5", "5}", "(5", "5]", r"\boxed{5", "5 or 6", "5, 6", r"5 \pm 0.1", r"\text{not }5"),
    *(r"5 \text{ maybe}", "5|6", "5 5", "5=6", "x=5=6", r"5 \ne 6", "5=5", "x=x", "5/0", "0^{-1}"),
    *("NaN", "nan", "", " ", "$", r"\frac", "^", "5_", "5^", "=5=", r"\infty-\infty", r"\log 0"),
    *(r"\tan 90^\circ", "1e9999", "x!" * 200, r"\sin x" * 90, r"\pi^x" * 100, "x^x" * 190),
    *(",".join("5" * 300), "+1" * 290, r"\binom{99999}{5000}", r"\sqrt[99999]{5}", "5^{1/99999}"),
    *("∪".join(["(e,π)"] * 99), "∪".join(["(e,π)", "(9,9e)"] * 45), "x<y<" * 149 + "x"),
    *(r"±\log_xx," * 48 + "5", r"±\arctan x," * 40 + "5", r"(e,π)∪" * 15 + "(1,2)"),
    *(r"\pi x\begin{pmatrix}" + "xe&" * 180 + r"5\end{pmatrix}", r"(0,9)\setminus\{" + "e," * 200),
    *("y=x(" + "+".join([r"\binom{2500}{1250}"] * 28) + ")", "y=" + r"\arctan x+" * 24 + "5"),
    *("z=x+" + "7^{9999}/3^{9999}+" * 15 + "5", r"\pm\cot x" * 24, "y=" + "x!+" * 11 + "5"),
    *("5 " + "number " * 80 + "x", r"5\text{a}" * 50, ",".join(["x=y!^y"] * 24), "xy," * 60 + "5"),
    *(r"\sin x" * 20 + r"\begin{array}{c}" + "1&" * 200 + r"1\end{array}", "x=5=" * 140 + "5"),
    *(r"\cup" * 140, r"(1,2)\cup" * 60, r"\begin{pmatrix} 5 & 1 \\ 2 \end{pmatrix}", "a b" * 190),
]
PLAIN_GOLDS = ("5", r"\frac{1}{2}", "x^2+1", "(1,2)", r"\text{A}", "1011_2", "[0,1)", "0", "x=5")


def test_no_hostile_answer_is_accepted_or_raises_or_takes_memory():
    tracemalloc.start()
    for text in HOSTILE:
        for gold in PLAIN_GOLDS:
            assert not same_answer(text, gold), (text[:50], gold)
            if text not in ("5}", r"\boxed{5"):  # these are balanced then
                assert math_reward(rf"\boxed{{{text}}}", gold) == 0.0, (text[:50], gold)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def least_milliseconds(function, *args) -> float:
    """CPU time, the best of three: the machine may be busy."""
    times = []
    for _ in range(3):
        began = time.process_time()
        function(*args)
        times.append(1e3 * (time.process_time() - began))
    return min(times)


def test_no_hostile_answer_takes_more_than_50_ms():
    golds = ("5", r"(1,4-\sqrt{3})\cup(4+\sqrt{3},7)")
    pairs = [(text, gold) for text in HOSTILE for gold in golds]
    slowest = max((least_milliseconds(same_answer, *pair), pair[0][:50]) for pair in pairs)
    assert slowest[0] < 50, slowest


@pytest.mark.parametrize("unit", [r"\boxed{", "{", "}", "The final answer is $", "\\", "$", "a"])
def test_megabytes_of_text_are_looked_through_at_once(unit):
    text = unit * (3_000_000 // len(unit))
    assert math_reward(text, "5") == 0.0
    assert least_milliseconds(math_reward, text, "5") < 50


@pytest.mark.parametrize("text", ["", "NaN", "1/0", r"\frac{0}{0}", "0=0", "x=x", "x+1=1+x", "?"])
def test_what_is_no_answer_is_not_even_equal_to_itself(text):
    assert not same_answer(text, text)


def test_threads_do_not_disturb_each_other():
    pairs = [(pair["prediction"], pair["gold"]) for pair in PAIRS[::3]]
    alone = [same_answer(*pair) for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: same_answer(*pair), pairs)) == alone


# --- 4. MATH itself ---------------------------------------------------------------------------


@with_math
def test_the_problems_of_math_are_all_there_and_in_one_split():
    train, test = (load_problems("math", split, data=str(MATH)) for split in ("train", "test"))
    assert (len(train), len(test)) == (11_998, 500)  # two golds of the 12,000 are empty boxes
    assert not {p.id for p in train} & {p.id for p in test}
    assert {p.level for p in test} == set("12345") and len({p.subject for p in test}) == 7


@with_math
@pytest.mark.parametrize(
    ("name", "count", "least"),
    [("math500.jsonl", 500, 500), ("math_train12k.jsonl.gz", 12_000, 11_990)],
)
def test_every_gold_of_math_equals_itself_and_its_solutions_box(name, count, least):
    golds = [(row["answer"], row["solution"]) for row in rows(MATH / name)]
    assert len(golds) == count
    assert sum(math_reward(solution, gold) for gold, solution in golds) >= least
    for form in ("{}", "${}$", r"\boxed{{{}}}"):
        odd = {gold for gold, _ in golds if not re.fullmatch(r"-?\d+|-?\\frac\{\d+\}\{\d+\}", gold)}
        assert sum(not same_answer(form.format(gold), gold) for gold in odd) <= count - least


@with_math
def test_neighbouring_golds_of_math_are_told_apart():
    """Of golds in alphabetical order, those called equal differ in units or layout alone."""
    golds = sorted({row["answer"] for row in rows(MATH / "math_train12k.jsonl.gz")})
    pairs = [(a, b) for a, b in pairwise(golds) if same_answer(a, b)]
    plain = [tuple(letters_and_signs(text) for text in pair) for pair in pairs]
    assert [pair for pair in plain if pair[0] != pair[1]] == SPELLED_OTHERWISE
    far = [(a, b) for a, b in zip(golds, golds[700:], strict=False) if same_answer(a, b)]
    assert len(far) < 0.004 * len(golds)


SPELLED_OTHERWISE = [("0.2", "0.20"), ("2.5", "2.50"), ("362,880", "362880"), ("37.5", "37.50")]


def letters_and_signs(text: str) -> str:
    """What is left of a gold without layout and units."""
    text = re.sub(r"(?<=.)\\(?:text|mbox|textnormal)\s*\{[^}]*\}(?:\^2|\^3)?", "", text)
    text = re.sub(r"\^\{?\\circ\}?|\\%|\\(?:[dt]frac|frac|left|right|text|[!,; ])", "", text)
    return re.sub(r"[\s{}$\\]|[.,]$", "", text)


@with_math
def test_math500_is_checked_in_less_than_a_millisecond():
    golds = [row["answer"] for row in rows(MATH / "math500.jsonl")]
    times = sorted(least_milliseconds(same_answer, gold, gold) for gold in golds)
    assert statistics.median(times) < 1 and times[int(0.99 * len(times))] < 20
