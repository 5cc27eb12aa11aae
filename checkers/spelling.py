r"""How is an answer spelt? LaTeX, ASCII and Unicode are brought to one spelling.

    \left( \tfrac12,\, 1{,}000 \right)        (\frac12, 1000)
    3 \text{ or } 4 \text{ feet}              3 ∨ 4 «feet»
    x<=5, √3/2                               x≤5, \sqrt{3}/2

Words become «words», "and" becomes a comma, "or" ∨, the end of a matrix row ¶, \setminus ∖, and the
braces of a set become ⦃ ⦄. So answers.py can tell them from variables, exponents and groups. Where
a model writes one of these signs itself, it becomes \unknown, and the answer is not read.
Next to read: sandbox.py.
"""

import re
from itertools import accumulate

from checkers.expressions import FUNCTIONS

END = r"(?![a-zA-Z])"  # of a command
SMALL = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹]+)|[₀₁₂₃₄₅₆₇₈₉]+")
SMALL_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "01234567890123456789")
UNICODE = str.maketrans(
    {
        **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot "},
        **{"÷": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in "},
        **{"°": r"^\circ ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "’": "'"},
        **{"½": r"\frac12", "⅓": r"\frac13", "¼": r"\frac14", "¾": r"\frac34", "⅔": r"\frac23"},
        **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ", "λ": r"\lambda "},
        **{"φ": r"\phi ", "ω": r"\omega ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}"},
    }
)
NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def fill(pattern: str) -> str:
    """A pattern of SPELLINGS, whose words in capitals (TEXT, END, NUMERAL) are replaced."""
    names = {"TEXT": r"\\(?:text(?:normal|rm|bf|it|sf|tt|up)?|[mh]box|mathrm|operatorname)"}
    for name, meaning in (names | {"END": END, "NUMERAL": "|".join(NUMERALS[2:])}).items():
        pattern = pattern.replace(name, meaning)
    return pattern


DEGREES = r"\^\s*\{?\s*\\circ\s*\}?"
SPELLINGS = [
    (re.compile(fill(pattern), re.DOTALL), new)
    for pattern, new in (
        (r"[«»¶∨⦃⦄∖]|(?<=\d)'|\\not(?:in|\s*\\in)END", r"\\unknown "),
        (r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(\d+)", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"^\s*\*\*(.+)\*\*\s*$", r"\1"),  # bold, in Markdown
        (r"TEXT\s*\{([^A-Za-z{}]*)\}", r"\1"),
        (r"\\frac\s*\{\s*TEXT\{([\w ]+)\}\s*\}\s*\{\s*TEXT\{([\w ]+)\}\s*\}", r"\\text{\1 per \2}"),
        (rf"{DEGREES}\s*(?:TEXT\s*\{{\s*C\s*\}}|C)$", "«degree celsius»"),
        (rf"{DEGREES}\s*(?:TEXT\s*\{{\s*F\s*\}}|F)$", "«degree fahrenheit»"),
        (r"(?<=\d)\s*\^?\s*\{?\s*(?:TEXT\s*\{\s*)?(?:st|nd|rd|th)(?![A-Za-z])[\s}]*", " "),
        (
            r"\s*(?:_\s*\{\s*)?(?:TEXT\s*\{\s*|\(\s*)?(?:in )?\bbase\b[\s}]*(\d+|NUMERAL)[\s)}]*$",
            r"_{\1}",
        ),
        (r"(?<=\d)\s*TEXT\s*\{\s*to\s*\}\s*(?=\d)", ":"),
        (r"\\\\(?:\[[\d.]+[a-z]{2}\])?", "¶"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)END(?:\s*\.)?", " "),
        (r"\\(?:displaystyle|textstyle|limits|cr|angle|triangle|checkmark)END", " "),
        (r"\\[hv]?phantom\s*(?:\{[^{}]*\}|[^\s{])", " "),
        (r"\\langleEND", "("),
        (r"\\rangleEND", ")"),
        # Digits in threes: 1{,}000  1,\!000  1\,000. Plain 1,000 is left to answers.thousands.
        (r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!|\\[, ])\s*(?=\d{3}(?!\d))", ""),
        (r"(?<=\d):00(?=\s*(?:\\text\{\s*)?[aApP]\.?\s?[mM])", ""),  # 9:00 a.m.
        (r"^(\s*-?)\s*\\\$\s*(-?[\d.,]+)$", r"\1\2 dollars"),
        (r"^(\s*-?)\s*€\s*(-?[\d.,]+)$", r"\1\2 euros"),
        (r"\{([:=<>+])\}", r"\1"),
        (r"\\[!,:;> ]|\\q?quadEND|~|\\(?=\n)|\{\s*\}", " "),
        (r"\\\{|\\lbraceEND", "⦃"),
        (r"\\\}|\\rbraceEND", "⦄"),
        (r"\\lbrackEND", "["),
        (r"\\rbrackEND", "]"),
        (r"\\?\$|\\[()\[\]]", " "),
        (r"(?:(?<==)|^)\s*\\(?:boxed|fbox)(?=\s*\{)|\\(?:textcolor|color)\s*\{\w+\}", " "),
        (r"\\[dtc](frac|binom)END", r"\\\1"),
        (r"\{([^{}]*)\\chooseEND([^{}]*)\}", r"\\binom{\1}{\2}"),
        (r"\{([^{}]*)\\overEND([^{}]*)\}", r"\\frac{\1}{\2}"),
        (r"\\[lc]?dotsEND|\.\.\.|…", "«dots»"),
        (r"\\(?:mathbb|mathbf|Bbb)\s*\{?R\}?", "«all real numbers»"),
        (r"\\(?:mathbf|mathit|boldsymbol|bm|mathsf|mathcal|vec|hat|overrightarrow)END", " "),
        (r"\\(?:bf|it|rm|em|underline)END|\\overline(?=\s*\{\s*[A-Z]{2}\s*\})", " "),
        (r"(?<![A-Za-z_^}])\{\s*([A-Za-z]|[A-Z]{2})\s*\}(?=\s*(?:[=_]|$))", r"\1"),  # \mathbf{M} =
        (r"\\(?:overline|bar)\s*\{?\s*([A-Za-z])\s*\}?", r"\1_{bar}"),
        (r"(?<=[A-Za-z])'", "_{prime}"),
        (r"\\(?:varnothing|emptyset)END|⦃\s*⦄", "«empty set»"),
        (
            r"⦃\s*[a-z]\s*(?:\\inEND\s*«all real numbers»)?\s*(?:\||:|\\midEND)"
            r"([^⦃⦄:]*(?:[<>=≤≥≠]|\\[gln]eq?)[^⦃⦄:]*)⦄",
            r"\1",
        ),
        (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
        (r"\\(?:setminus|backslash)END|(?<=numbers»)\s*[-\\]\s*(?=⦃)", "∖"),
        (r"(?<=\d)\s*([aApP])\.\s*[mM]\b\.?", r" \1m"),
        (r"\\(?:leq|leqslant|le)END|<=", r"≤"),
        (r"\\(?:geq|geqslant|ge)END|>=", r"≥"),
        (r"\\neq?END|!=|\\not\s*=", r"≠"),
        (r"\\ltEND", "<"),
        (r"\\gtEND", ">"),
        (r"\\approxEND", "≈"),
        (r"\\(?:[lr]?vert|mid)END", "|"),
        (r"\\(?:land|wedge)END", ","),
        (r"\\(?:lor|vee)END", "∨"),
        (r"\\colonEND", ":"),
    )
]
CASES = re.compile(r"\\begin\s*\{cases\}(.*?)\\end\s*\{cases\}", re.DOTALL)
TEXT = re.compile(fill(r"(TEXT)\s*\{([^{}]*)\}"))
KEPT_IN_TEXT = re.compile(r"((?<![A-Za-z^\d.])\d[\d.,:/]*|[(),;:%=&]|\band\b|\bor\b)")
WORDS = re.compile(r"\s*(?:[A-Za-z\s./-]*|[A-Za-z\s./]+\^?\{?[23]\}?|[A-Z0-9]+)\s*")
BARE_WORDS = {"and": ",", "or": "∨"} | dict.fromkeys(("infinity", "inf", "oo"), r"\infty ")
GLUED = re.compile(f"([A-Za-z]?)({'|'.join(FUNCTIONS)}|sqrt|pi)([A-Za-z]?)")  # xsqrt(2), sinx
RUN = re.compile(r"\\(?:begin|end)\s*\{\w+\}|\\[A-Za-z]+|«[^»]*»|([A-Za-z]{2,})")

# The short name of each spelling of a unit.
UNITS = {
    spelling: names.split()[0]
    for names in (
        "cm centimeter centimeters centimetre centimetres", "mm millimeter millimeters",
        "m meter meters metre metres", "km kilometer kilometers kilometre kilometres",
        "in inch inches", "ft foot feet", "yd yard yards", "mi mile miles", "mg milligrams",
        "g gm gram grams", "kg kilogram kilograms", "lb lbs pound pounds", "oz ounce ounces",
        "s sec second seconds", "min minute minutes", "h hr hrs hour hours", "day days",
        "week weeks", "month months", "year years", "cent cents", "dollar dollars usd",
        "euro euros", "l liter liters litre litres", "ml milliliter milliliters", "mph", "kph",
        "degree degrees deg", "celsius", "fahrenheit", "radian radians rad", "am", "pm",
    )
    for spelling in names.split()
}  # fmt: skip
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# Words that may be left out after a number are known units, nouns in the plural, and NOUNS. If one
# of TWISTS is among them, they change the number, so they may not be left out.
NOUNS = set(
    "unit way point clockwise counterclockwise percent percentage pct people men women children "
    "old sq square cubic".split()
)
TWISTS = set(
    "not no nor never than if when unless except squared cubed factorial minus plus times dozen "
    "all dozens dots wrong incorrect false half halves maybe perhaps but base mod modulo more "
    "less most least to vs versus hundreds thousands millions billions trillions thirds quarters "
    "fourths fifths couples sixths sevenths eighths ninths tenths hundredths thousandths pairs "
    "scores minuses negatives per ones twos threes fours fives sixes sevens eights nines tens xor "
    "millionths billionths twelfths decades gross grosses googols lakhs zeros factorials squares "
    "cubes roots inverses multiplied divided others errors mistakes guesses isnt excludes exceeds "
    "besides wrongs wrongly nots lies lie fails misses falsehoods doubts fake anti non un negated "
    "negation negative opposite opposites reciprocal reciprocals without twice double doubles "
    "triple triples halvings powers thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety hundred twenties quarter myriads "
    "quadrillions quintillions pluses reversed hex binary octal roughly approx guess root upper "
    "lower bound choices neither none".split()
)


OPENING, CLOSING = "([{⦃", ")]}⦄"


def depths(text: str, opening: str = OPENING, closing: str = CLOSING) -> list[int]:
    """How many brackets are open at each character; a closing bracket counts as outside."""
    return list(accumulate((letter in opening) - (letter in closing) for letter in text))


def closing_index(text: str) -> int:
    """Where the bracket that opens the text closing_index."""
    return next((at for at, depth in enumerate(depths(text)) if not depth), -1)


def tidy(text: str) -> str:
    """The same answer in one spelling."""
    text = SMALL.sub(spell_small, text)
    text = text.translate(UNICODE)
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = CASES.sub(lambda found: found[1].replace("¶", ","), text)
    text = RUN.sub(spell_run, TEXT.sub(spell_text, text))
    text = trim(re.sub(r",(\s*,)+", ",", text))
    while text[:1] + text[-1:] == "{}" and closing_index(text) == len(text) - 1:
        text = trim(text[1:-1])
    return text


def spell_small(found: re.Match) -> str:
    """Raised and lowered digits: cm² is cm^2, 101₂ is 101_2."""
    digits = found[0].translate(SMALL_DIGITS)
    return ("^" if found[1] else "_") + (digits if len(digits) == 1 else f"{{{digits}}}")


def trim(text: str) -> str:
    return re.sub(r"(?<!\\)[\s.,;]+$", "", text).strip()


def spell_text(found: re.Match) -> str:
    r"""\text{..}: numbers and separators stay as they are, the rest becomes «words»."""
    command, content = found.groups()
    word = content.strip()
    if command in (r"\mathrm", r"\operatorname") and word in FUNCTIONS:
        return rf"\{word} "
    if word in ("i", "e") and (command == r"\mathrm" or found[0] != found.string.strip()):
        return word
    pieces = KEPT_IN_TEXT.split(content.replace("'", ""))
    for index in range(0, len(pieces), 2):
        words = pieces[index].strip()
        if not WORDS.fullmatch(words):
            return r" \unknown "
        pieces[index] = f"«{words}»" if words.strip(".") else " "
    return " " + "".join(pieces) + " "


def spell_run(found: re.Match) -> str:
    """Letters side by side: a function, a separator, a word, or variables."""
    letters = found[1]
    if letters is None:  # a command, or «words»
        return found[0]
    lower = letters.lower()
    if lower in BARE_WORDS:
        return BARE_WORDS[lower]
    if letters == "sec" and not found.string[found.end() :].strip(" ."):
        return "«sec»"  # ten seconds, not a secant
    if glued := GLUED.fullmatch(letters):
        return rf"{glued[1]}\{glued[2]} {glued[3]}"
    apart = found.string[: found.start()][-1:] in ("", *" (,;[⦃»∨/=")  # 5xyzw is a product
    word = lower in {"per", *UNITS, *NOUNS} or (apart and len(letters) > 3)
    return f"«{letters}»" if word else letters
