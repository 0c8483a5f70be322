r"""Is this box that answer? One notation for both, then math-verify's comparison; the worker.

plain() brings a box and an answer into one notation: units, separators, e-notation. Where the texts
then differ, math-verify's parser reads both, same() takes lists and equations apart and has
math-verify compare the parts, except for what it would wrongly accept: 1e-8 for 2e-8,
1 = 2 = 5 for 5, nylevE for Evelyn. Started by its file name as a worker (see pool.py), so that no
worker imports torch or another file of ours.
"""

import functools
import importlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

# characters; a longer box is no answer and not worth a parser's time
# (the benchmarks' longest has 204)
MAX_BOX = 4096
WORKER_MEMORY = 2 << 30  # bytes of address space

_SHORT_UNITS = (
    r"m/s|[mckn]m|[mk]g|ft|in|mi|yd|lbs?|oz|hrs?|min|sec|mph|m[lL]|[kMG]?Hz|[kM]?eV|sq|deg"
)
_TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}"  # \text{m s^{-1}}
# what may be left out after a number: no second answer (", 6", "but maybe 6"), only exponents have
# digits
_UNIT = (
    r"(?: |/|\*|\\cdot)*\\text\{(?! ?[eid] ?\}|"
    r"[^{}]*\b(?:or|and|if|not|is|but|maybe|through|to)(?![a-zA-Z]))"
    r"(?:[^{}\d,;=]|\^ ?\{?-?\d+\}?|(?<=[a-z])[23](?!\d))*\}(?: ?\^ ?(?:\{[^{}]*\}|\d))?"
)
_BASES = "two three four five six seven eight nine ten".split()
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


class Rule(NamedTuple):
    """What pattern finds becomes `to` (see re.sub); alone, a rule makes `example` `becomes`."""

    pattern: str
    to: str | Callable[[re.Match], str]
    example: str
    becomes: str


def _word(match: re.Match) -> str:
    return match[0] if match["other"] else rf"\text{{{match[0]}}}"


def _unit(match: re.Match) -> str:
    # "2 cm" is 2, but "no solution" is not "no"
    return match[0] if re.search(_TEXT + "$", match.string[: match.start()]) else ""


def _repeating(match: re.Match) -> str:
    whole, start, period = match.groups()
    top = int(whole + start + period) - int("0" + whole + start)
    return rf"\frac{{{top}}}{{{'9' * len(period) + '0' * len(start)}}}"


# in this order: what one writes, the next ones read
RULES = (
    # thousands
    Rule(r"(?<=\d)(?:\{,\}| ?, ?\\! ?|\\,)(?=\d{3}(?!\d))", "", r"32,\!348", "32348"),
    # what only looks
    Rule(
        (
            r"\\?\$|\\!|\\(?:left|right|displaystyle|boldsymbol|bold|bm|underline|fbox"
            r"|[lL]arge|LARGE|[hH]uge|(?:text)?color ?\{[a-z]+\})(?![a-zA-Z])\.?|(?<=\{) "
            r"|(?<!\\) (?=\})"
        ),
        "",
        r"\left(3, \bold 4\right)",
        "(3,  4)",
    ),
    # a final stop
    Rule(r"(?<!\.) ?\.$", "", "27 .", "27"),
    # braces around all
    Rule(r"^ ?\{([^{}]*)\}$", r"\1", "{27}", "27"),
    # spaces
    Rule(r"(?<!\\)\\(?:[,;: ]|$)|~|\\q?quad(?![a-zA-Z])", " ", r"2\, 3", "2  3"),
    # one \frac
    Rule(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", r"\dfrac12", r"\frac12"),
    # one \text
    Rule(
        r"\\(?:mbox|math(?:rm|bf|it)|text(?:rm|bf|it|normal)?) ?\{",
        r"\\text{",
        r"\mathrm{cm}",
        r"\text{cm}",
    ),
    # a number is no text
    Rule(r"\\text\{ ?((?:[-+]?\.?\d|[A-Za-z] ?=)[^{}]*)\}", r"\1", r"\text{27 cm}", "27 cm"),
    # "and" and "or" are commas
    Rule(
        (
            r" ?,? ?(?:\\text\{ ?(?:and|or) ?\}|(?<![a-zA-Z\\])(?:and"
            r"|or)(?![a-zA-Z])(?![^{}\\]*\})) ?,? ?"
        ),
        ", ",
        r"1 \text{ or } 2",
        "1, 2",
    ),
    # 32,348 and 32 348
    Rule(
        r"^(-?[1-9]\d{0,2})((?:[, ]\d{3})+)(?=$|\.\d| ?\\text| [A-Za-z])",
        lambda match: match[1] + re.sub("[, ]", "", match[2]),
        "32,348",
        "32348",
    ),
    # e-notation: math-verify reads 4.5e33 as 4.5 * e * 33
    Rule(
        r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]\+?0*(-?)0*(\d{1,4})(?![\w.])",
        r"\1 \\times 10^{\2\3}",
        "4.5e33",
        r"4.5 \times 10^{33}",
    ),
    # 4.5 x 10^33, where TeX reads 10^3 3 as well
    Rule(
        r"(?<=\d) ?(?:\\cdot|\\times|[*x×]) ?10 ?\^ ?\{? ?\+?(-?\d+)\}?",
        r" \\times 10^{\1}",
        "4.5 x 10^33",
        r"4.5 \times 10^{33}",
    ),
    # 10^-5
    Rule(r"(?<![\w^}])10 ?\^ ?\+?(-?\d+)", r"10^{\1}", "10^-5", "10^{-5}"),
    # math-verify adds 2(3), as if it were 2\frac{1}{3}
    Rule(r"(?<![\w.^{}\\])(\d+) ?(?=\(-?\d+\))", r"\1 \\cdot ", "2(3)", r"2 \cdot (3)"),
    # a mixed number
    Rule(
        r"(?<![\w.^{}\\])(\d+) (\d+) ?/ ?(\d+)(?!\d)", r"\1\\frac{\2}{\3}", "3 4/5", r"3\frac{4}{5}"
    ),
    # two numbers are not their product
    Rule(r"(?<![\w.^{}\\])(\d+) (?=\d)", r"\1 \\text{space} ", "2 3", r"2 \text{space} 3"),
    # per cent
    Rule(r"(?<!\\)%|\\text\{ ?percent ?\}|(?<=\d) ?percent", r"\\%", "62.5%", r"62.5\%"),
    # repeating decimals
    Rule(
        r"(?<![\w.])(\d*)\.(\d*)\\(?:overline|bar) ?\{(\d+)\}",
        _repeating,
        r"0.1\overline{6}",
        r"\frac{15}{90}",
    ),
    # degrees, primes, ordinals
    Rule(
        (
            r"(?<=[\d}]) ?\^ ?(?:\\circ|\{ ?\\circ ?\})(?: ?[CF](?![a-zA-Z]))?|°|\\degree"
            r"|(?<=\d) ?\^ ?\{ ?(?:\\prime ?|\\text\{ ?(?:st|nd|rd|th) ?\}|th)+\}"
        ),
        "",
        r"27^\circ C",
        "27",
    ),
    # unit symbols after a number
    Rule(
        (
            r"((?<![_^])\d|10\^\{-?\d+\}) ?(?:\\mu(?= ?\\text)|"
            r"(?:\\text\{ ?[kM] ?\} ?|[kM]|\\mu ?)?(?:\\Omega|\\AA|\\mathring ?\{A\}"
            r"|[LM]_ ?\{? ?\\odot ?\}?)(?= ?(?:$|[,;)\]])))"
        ),
        r"\1 \\text{unit}",
        r"5\text{k}\Omega",
        r"5 \text{unit}",
    ),
    # letters in a row: a word, or a unit after a number; math-verify would multiply them
    Rule(
        (
            rf"(?P<other>{_TEXT}|\\(?:begin|end|operatorname|math\w+) ?\{{[^{{}}]*\}}"
            rf"|\\[a-zA-Z]+|sqrt|infinity)|[a-zA-Z]{{4,}}"
            rf"|(?<=[\d}}])(?<!\\[a-zA-Z]) ?(?:{_SHORT_UNITS})(?![a-zA-Z])"
        ),
        _word,
        "27 cm",
        r"27\text{ cm}",
    ),
    # 5 million
    Rule(
        rf" ?\\text\{{ ?({'|'.join(_SCALES)})(?![a-z])",
        lambda match: rf" \times 10^{{{_SCALES[match[1]]}}} \text{{",
        r"5\text{million}",
        r"5 \times 10^{6} \text{}",
    ),
    # empty text
    Rule(r"\\text\{ ?\}", "", r"5\text{ }", "5"),
    # what follows a number is its unit, and is left out
    Rule(
        rf"(?:(?<=[\d)}}])|(?<=\\pi))(?:{_UNIT})+(?= ?(?:$|[,;)\]]|\\\}}))",
        _unit,
        r"27 \text{cm}",
        "27",
    ),
    # one letter is a name
    Rule(r"\\text\{ ?\(?([A-Za-z])\)? ?\}", r"\1", r"\text{(C)}", "C"),
    # a base in words
    Rule(
        rf"_ ?\{{ ?(?:\\text\{{ ?)?({'|'.join(_BASES)}) ?\}}?\}}",
        lambda match: f"_{{{_BASES.index(match[1]) + 2}}}",
        r"4343_{\text{six}}",
        "4343_{6}",
    ),
    # math-verify reads no E_1
    Rule(r"(?<![\\\w])E(?=_)", r"\\text{E}", "E_1", r"\text{E}_1"),
    # about, and a final stop
    Rule(r"^ ?\\(?:approx|sim)(?![a-zA-Z])|(?<!\.) ?\.$", "", r"\approx 27", " 27"),
    # plus or minus is two answers: math-verify reads none in a \frac
    Rule(
        r"^(?!.*\\[pm][pm].*\\[pm][pm])([^,]*)\\(?:pm|mp)(?![a-zA-Z])([^,]*)$",
        r"\1+\2, \1-\2",
        r"1 \pm 2",
        "1 + 2, 1 - 2",
    ),
)
_COMPILED = [(re.compile(rule.pattern), rule.to) for rule in RULES]


def plain(text: str) -> str:
    """The same answer in the LaTeX that math-verify reads as it was meant, without units."""
    text = " ".join(text.split())
    for pattern, to in _COMPILED if len(text) <= MAX_BOX else ():
        text = pattern.sub(to, text)
    return text.strip()


@functools.lru_cache(4096)
def canonical(text: str) -> str:
    r"""A normal form for voting: 27, 27.0, $27$ and 27\text{ cm} agree, as do 1/2 and \frac12."""
    text = plain(text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"^(-?)(\d+) ?/ ?(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(
        r"\\frac ?(?:\{([^{}]*)\}|(\d)) ?(?:\{([^{}]*)\}|(\d))",
        lambda match: rf"\frac{{{match[1] or match[2]}}}{{{match[3] or match[4]}}}",
        text,
    )
    text = re.sub(r"^\\frac\{-", r"-\\frac{", text)
    text = re.sub(r"\\sqrt ?(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"([\^_]) ?\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"(?<!\d)\.(?=\d)", "0.", text))  # 007, .5
    text = re.sub(r"(\.\d*?)0+(?!\d)", r"\1", text)  # 27.0
    text = re.sub(r"(?<=\d)\.(?!\d)", "", text)
    text = re.sub(r" (?![a-zA-Z0-9])|(?<![a-zA-Z0-9]) ", "", text)
    return text.casefold() if re.fullmatch(r"[a-zA-Z -]{4,}|[nN]o|[yY]es", text) else text


def refuse(*_):
    raise ValueError("text is never evaluated as Python")


def number(text: str):
    text = text.replace(",", "")
    return sympy.Integer(text) if text.isdigit() else sympy.Float(text)


def load() -> None:
    """Brings sympy and math-verify into the worker; whoever imports plain() needs neither."""
    global sympy, And, AppliedUndef, latex2sympy, latex2sympy2, normalize_latex
    global should_treat_as_complex, verify, notation, percent
    import sympy
    import sympy.physics.units  # noqa: F401 - simplify() imports it, and it calls sympify()
    from latex2sympy2_extended import (
        NormalizationConfig,
        latex2sympy,
        latex2sympy2,
        normalize_latex,
    )
    from latex2sympy2_extended.logic import And
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from sympy.core.function import AppliedUndef
    from sympy.parsing import sympy_parser

    # where sympify() and parse_expr() of a text end, and with them sympy.Number("1")
    sympy_parser.eval_expr = refuse
    latex2sympy2.convert_number = number
    latex2sympy2._Latex2Sympy.parse_number = lambda _, text: number(text)
    notation = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    percent = sympy.UnevaluatedExpr(sympy.Rational(1, 100))


@functools.lru_cache(4096)  # a group's responses share their answer
def read(text: str, real: bool, fold: bool):
    try:
        parsed = latex2sympy(
            normalize_latex(plain(text), notation),
            is_real=real,
            normalization_config=None,
            conversion_config=latex2sympy2.ConversionConfig(lowercase_symbols=fold),
        )
    except Exception:  # whatever ANTLR and sympy raise
        return None
    return parsed if isinstance(parsed, (sympy.Basic, sympy.MatrixBase)) else None


def chain(x) -> list:  # of a = b = c; [x] where x is no equation
    links = x._unsorted_args if isinstance(x, And) else [x]
    if not all(isinstance(link, sympy.Eq) for link in links):
        return [x]
    return [links[0].lhs] + [link.rhs for link in links]


def is_formula(
    x,
) -> bool:  # x, S_n, f(2), m + n, a^2 - b^2: what an answer may be said to be the value of
    if isinstance(x, sympy.Pow):
        return is_formula(x.base)
    return (
        isinstance(x, (sympy.Symbol, AppliedUndef))
        or bool(x.args)
        and all(y == -1 or is_formula(y) for y in x.args)
    )


def members(x):  # (1, 2) is read as an open interval
    if isinstance(x, sympy.Interval) and x.is_open:
        return [x.start, x.end]
    return (
        getattr(x, "_unsorted_args", x.args)
        if isinstance(x, (sympy.FiniteSet, sympy.Tuple))
        else None
    )


def union(
    x,
):  # x < 2 or x > 3: where no number is both, the comma that plain() puts cannot mean "and"
    if (
        isinstance(x, sympy.FiniteSet)
        and len(x.free_symbols) == 1
        and all(isinstance(y, sympy.logic.boolalg.Boolean) for y in x.args)
    ):
        return sympy.Union(*(y.as_set() for y in x.args))
    return x


def match(golds, boxes) -> bool:  # in any order
    if not golds:
        return True
    found = next((i for i, box in enumerate(boxes) if same(golds[0], box)), None)
    return found is not None and match(golds[1:], boxes[:found] + boxes[found + 1 :])


def same(gold, box) -> bool:
    """Takes apart what has parts, so that the rules for numbers hold within lists, too."""
    if isinstance(gold, sympy.Union) != isinstance(box, sympy.Union):
        gold, box = union(gold), union(box)
    (*gold_left, gold_last), (*box_left, box_last) = chain(gold), chain(box)
    if not all(is_formula(part) or same(box_last, part) for part in box_left[bool(gold_left) :]):
        return False  # 1 = 2 = 5
    if gold_left and box_left:  # x = 5 against x = 2 + 3 = 5, or against 2x = 10
        return (
            same(gold_last, box_last)
            if gold_left[0] == box_left[0]
            else alike(
                sympy.Eq(gold_left[0], gold_last, evaluate=False),
                sympy.Eq(box_left[0], box_last, evaluate=False),
            )
        )
    if box_left:
        return (
            is_formula(box_left[0])
            and same(gold, box_last)
            or same(gold, box_left[0])
            and same(gold, box_last)
        )
    if gold_left:
        return isinstance(gold_left[0], (sympy.Symbol, sympy.Tuple, AppliedUndef)) and same(
            gold_last, box
        )
    if isinstance(gold, sympy.MatrixBase) and isinstance(box, sympy.MatrixBase):
        return gold.shape == box.shape and all(map(same, gold.flat(), box.flat()))
    if isinstance(gold, sympy.Interval) and isinstance(box, sympy.Interval):
        return (
            (gold.left_open, gold.right_open) == (box.left_open, box.right_open)
            and same(gold.start, box.start)
            and same(gold.end, box.end)
        )
    gold_members, box_members = members(gold), members(box)
    if gold_members is None and box_members is None:
        return alike(gold, box)
    if isinstance(
        gold if gold_members is None else box,
        (sympy.Expr, sympy.FiniteSet, sympy.Tuple, sympy.Interval),
    ):
        golds = [gold] if gold_members is None else list(gold_members)  # {5} is 5
        boxes = [box] if box_members is None else list(box_members)
        if len(golds) != len(boxes):
            return False
        return (
            match(golds, boxes)
            if isinstance(gold, sympy.FiniteSet)
            else all(map(same, golds, boxes))
        )
    return alike(gold, box)


def alike(gold, box) -> bool:
    """math-verify's verdict on two single things, except where it is known to be wrong."""
    if gold == box:
        return not gold.has(sympy.nan, sympy.zoo)
    words = [isinstance(x, sympy.Symbol) and len(x.name) > 3 for x in (gold, box)]
    if words[0] != words[1]:
        return False  # \text{Evelyn} is not E * v * e * l * y * n
    if isinstance(gold, sympy.Expr) and isinstance(box, sympy.Expr):
        if gold.has(percent) or box.has(
            percent
        ):  # 10\% is 0.1, and it is 10 for whoever asks for per cent
            return any(
                alike(gold.xreplace({percent: unit}), box.xreplace({percent: unit}))
                for unit in (percent.args[0], sympy.Integer(1))
            )
        apart, exact = distance(gold, box), not (gold.has(sympy.Float) or box.has(sympy.Float))
        if apart is not None and apart > 1e-5:  # math-verify rounds to six decimals: 1e-8 is 2e-8
            return False
        real = all(
            x.is_number and x.is_real and x % 1 != 0 for x in (gold, box)
        )  # no integers, which are exact
        if apart is not None and apart < (1e-6 if real else 1e-12) and not exact:
            return True
        if (
            exact and gold.is_rational and box.is_rational
        ):  # it looks at 100 digits: 10^{200} + 1 is 10^{200}
            return gold.doit() == box.doit()
    return verify(
        gold, box, timeout_seconds=None, allow_set_relation_comp=True
    )  # no time limit of its own: we get killed


def distance(gold, box) -> float | None:
    """Relative, for numbers, and for formulas at a point; None where that says nothing.

    Quick where simplify() is slow.
    """
    try:
        point = {
            x: 1 + sympy.Rational(sum(map(ord, x.name)) * 7919 % 9973, 9973)
            for x in gold.free_symbols | box.free_symbols
        }
        a, b = (sympy.N(x.subs(point)) for x in (gold, box))
        scale, apart = max(abs(a), abs(b)), abs(a - b)
        return 0.0 if scale < 1e-100 else float(apart / scale)  # what sympy leaves of a zero
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def agree(
    text: str, how
) -> bool:  # what \approx stands between: 1/3 and 0.33, not 5 and 6; math-verify reads the first
    parts = [read(part, *how) for part in plain(text).split(r"\approx")]
    if len(parts) == 1 or None in parts:
        return len(parts) == 1
    values = [
        value
        for part in parts
        if not is_formula(value := chain(part)[-1].xreplace({percent: percent.args[0]}))
    ]
    return all(
        (apart := distance(values[0], value)) is not None and apart < 0.01 for value in values[1:]
    )


def judge(box: str, golds: list[str]) -> dict:
    parsed = False
    for gold in golds:
        both = plain(gold) + " ; " + plain(box)
        bases = [
            set(re.findall(r"\d_ ?\{? ?(?:\\text\{ ?)?(\w+)", plain(text))) for text in (gold, box)
        ]
        if bases[1] not in (
            set(),
            bases[0] or {"10"},
        ):  # 52_8 is not 52_7, and not 52; math-verify ignores the base
            parsed = True
            continue
        letters = [
            set(re.sub(r"\\[a-zA-Z]+(\{[a-zA-Z ]*\})?", "", text))
            for text in (plain(gold), plain(box))
        ]
        # m and M are one letter to math-verify; here only where neither text has both
        how = (
            not should_treat_as_complex(both),
            not any(x.isupper() and x.lower() in them for them in letters for x in them),
        )
        mine, its = read(box, *how), read(gold, *how)
        parsed = parsed or mine is not None
        if mine is not None and its is not None and same(its, mine) and agree(box, how):
            return {"reward": 1.0, "reason": None}
    return {"reward": 0.0, "reason": "wrong" if parsed or not golds else "parse_failure"}


@functools.cache
def own(function: str):
    """The user's reward MODULE:FUNCTION, importable from the working folder.

    (response, answer) -> a number, 1 for right. It runs in the workers, under their limits of time
    and memory. Raises ValueError where there is no such function.
    """
    module, _, name = function.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"reward {function}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward {function} is no function")
    return found


def _worker(parent: int) -> None:
    """Answers {"box", "golds"} with {"reward", "reason"}, line by line, until stdin ends."""
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    if (
        sys.platform == "linux"
    ):  # die with the parent, even where a forked sibling of ours still holds the pipe open
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            return
    for limit, value in ((resource.RLIMIT_AS, WORKER_MEMORY), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # a lower limit is in force, or macOS
            pass
    out = os.fdopen(os.dup(1), "w")
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), 1
    )  # whatever else prints must not end up among the replies
    logging.disable(logging.CRITICAL)  # math-verify logs whole responses

    def say(**reply):
        print(json.dumps(reply), file=out, flush=True)

    try:
        load()
    except Exception as error:
        return say(error=f"{type(error).__name__}: {error}")

    def judge_own(function: str, response: str, answer) -> dict:
        try:
            value = float(own(function)(response, answer))
            if not abs(value) < 1e9:  # NaN too
                raise ValueError(f"{value} is no reward")
            return {"reward": value, "reason": None if value == 1 else "wrong"}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    judge(
        "0.5", [r"\frac{1}{2}"]
    )  # fills the parser's tables, which must not count against the first response
    say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "function" in request:
            say(**judge_own(**request))
            continue
        try:
            verdict = judge(**request)
        except Exception:  # sympy may raise anything, MemoryError and RecursionError included
            verdict = {"reward": 0.0, "reason": "parse_failure"}
        say(**verdict)


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    _worker(int(sys.argv[2]))
