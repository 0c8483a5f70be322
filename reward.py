r"""Is this response right? 0 or 1, judged by math-verify in worker processes that can be killed.

Why processes: math-verify limits its own time with SIGALRM, which raises off the main thread (and then every answer
looks wrong), and sympy can hang in places no thread can interrupt: `\boxed{9^{9^{9^{9^9}}}}` is enough. So each worker
is a child process that speaks one JSON object a line; one that takes too long is killed and replaced, and it starts
from this file by name, so scripts need no main guard and a trainer may have threads, CUDA or a fork behind it.

What is judged is the last balanced \boxed{...}, alone (math-verify merges neighbouring boxes into a set). plain() brings
it and the answer into one notation: units, separators, e-notation (math-verify reads 4.5e33 as 4.5 * e * 33). Where the
texts then differ, math-verify's parser reads both, _grader() takes lists and equations apart and has math-verify compare
the parts, except for what it would wrongly accept: 1e-8 for 2e-8, 1 = 2 = 5 for 5, nylevE for Evelyn.
"""

import concurrent.futures
import functools
import importlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

# boxed: the last \boxed{} of the response.  think: exactly one </think> (the prompt opened the tag), then the last box
# after it.  hash: the toy task, what follows the last #, compared as text.  Besides them, MODULE:FUNCTION: your own, see own().
STYLES = ("boxed", "think", "hash")
MAX_BOX = 4096  # characters; a longer box is no answer and not worth a parser's time (the benchmarks' longest has 204)
# Wall clock for an item, its second try included: right answers take 0.1 s and less, so that a machine may be fifty
# times slower than it should. A lone reward() may have a worker to start first, which takes 1 to 3 s.
TIMEOUT, CALL_TIMEOUT = 5.0, 9.5
START_SECONDS = (
    120.0  # for a worker to import math-verify: about 1 s, far more on a cold network disk
)
WORKER_MEMORY = 2 << 30  # bytes of address space
_FILE = os.path.abspath(__file__)


class Verdict(NamedTuple):
    reward: float  # 1.0 right, 0.0 not
    # None when right, else "wrong", "no_box" (or no #), "no_think" (not exactly one </think>), "parse_failure" (the box
    # is empty, too long or no mathematics), "timeout", "crash" (the worker died on it twice)
    reason: str | None


def last_box(text: str) -> str | None:
    r"""What the last balanced \boxed{...} holds, or None. Escaped braces (\{) do not count. Linear in the length."""
    opened, last = (
        [],
        None,
    )  # opened: the start of the contents of every open brace, negative where no box opened it
    for token in re.compile(r"\\boxed\s*\{|\\(?!\\boxed)[\\{}]|[{}]").finditer(
        text, max(text.find(r"\boxed"), 0)
    ):
        if token[0] == "}":
            start = opened.pop() if opened else -1
            if start > (last[0] if last else -1):
                last = (start, token.start())
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(-1)
    return text[slice(*last)] if last else None


def final_answer(response: str, style: str) -> str | None:
    """The text that is judged: of the last box (think: after the only </think>; hash: after the last #). None: there is none."""
    if style == "hash":
        _, mark, final = response.rpartition("#")
        return final.strip() if mark else None
    if style == "think":
        if response.count("</think>") != 1:
            return None
        response = response.partition("</think>")[2]
    return last_box(response)


# -- one notation for an answer ---------------------------------------------------------------------------------------

_SHORT_UNITS = (
    r"m/s|[mckn]m|[mk]g|ft|in|mi|yd|lbs?|oz|hrs?|min|sec|mph|m[lL]|[kMG]?Hz|[kM]?eV|sq|deg"
)
_TEXT = r"\\text\{(?:[^{}]|\{[^{}]*\})*\}"  # \text{m s^{-1}}
# what may be left out after a number: no second answer (", 6", "but maybe 6"), only exponents have digits
_UNIT = (
    r"(?: |/|\*|\\cdot)*\\text\{(?! ?[eid] ?\}|[^{}]*\b(?:or|and|if|not|is|but|maybe|through|to)(?![a-zA-Z]))"
    r"(?:[^{}\d,;=]|\^ ?\{?-?\d+\}?|(?<=[a-z])[23](?!\d))*\}(?: ?\^ ?(?:\{[^{}]*\}|\d))?"
)
_BASES = "two three four five six seven eight nine ten".split()
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _word(
    match: re.Match,
) -> str:  # letters in a row: a word, or a unit after a number; math-verify would multiply them
    return match[0] if match["other"] else rf"\text{{{match[0]}}}"


def _unit(match: re.Match) -> str:  # "2 cm" is 2, but "no solution" is not "no"
    return match[0] if re.search(_TEXT + "$", match.string[: match.start()]) else ""


_RULES = [
    (re.compile(pattern), to)
    for pattern, to in (
        # typography: thousands, what only looks, a final stop, spaces, one \frac, one \text, "and" and "or"
        (r"(?<=\d)(?:\{,\}| ?, ?\\! ?|\\,)(?=\d{3}(?!\d))", ""),  # 32,\!348
        (
            r"\\?\$|\\!|\\(?:left|right|displaystyle|boldsymbol|bold|bm|underline|fbox|[lL]arge|LARGE|[hH]uge|(?:text)?color ?\{[a-z]+\})(?![a-zA-Z])\.?|(?<=\{) |(?<!\\) (?=\})",
            "",
        ),
        (r"(?<!\.) ?\.$", ""),
        (r"^ ?\{([^{}]*)\}$", r"\1"),
        (r"(?<!\\)\\(?:[,;: ]|$)|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:mbox|math(?:rm|bf|it)|text(?:rm|bf|it|normal)?) ?\{", r"\\text{"),
        (r"\\text\{ ?((?:[-+]?\.?\d|[A-Za-z] ?=)[^{}]*)\}", r"\1"),  # \text{27 cm}
        (
            r" ?,? ?(?:\\text\{ ?(?:and|or) ?\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])(?![^{}\\]*\})) ?,? ?",
            ", ",
        ),
        # numbers: 32,348 and 32 348; 4.5e33; 4.5 x 10^33, where TeX reads 10^3 3 as well
        (
            r"^(-?[1-9]\d{0,2})((?:[, ]\d{3})+)(?=$|\.\d| ?\\text| [A-Za-z])",
            lambda match: match[1] + re.sub("[, ]", "", match[2]),
        ),
        (
            r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]\+?0*(-?)0*(\d{1,4})(?![\w.])",
            r"\1 \\times 10^{\2\3}",
        ),
        (r"(?<=\d) ?(?:\\cdot|\\times|[*x×]) ?10 ?\^ ?\{? ?\+?(-?\d+)\}?", r" \\times 10^{\1}"),
        (r"(?<![\w^}])10 ?\^ ?\+?(-?\d+)", r"10^{\1}"),
        (
            r"(?<![\w.^{}\\])(\d+) ?(?=\(-?\d+\))",
            r"\1 \\cdot ",
        ),  # math-verify adds 2(3), as if it were 2\frac{1}{3}
        (r"(?<![\w.^{}\\])(\d+) (\d+) ?/ ?(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"(?<![\w.^{}\\])(\d+) (?=\d)", r"\1 \\text{space} "),  # and 2 3
        (r"(?<!\\)%|\\text\{ ?percent ?\}|(?<=\d) ?percent", r"\\%"),
        (
            r"(?<![\w.])(\d*)\.(\d*)\\(?:overline|bar) ?\{(\d+)\}",
            lambda match: (  # 0.1\overline{6}
                rf"\frac{{{int(match[1] + match[2] + match[3]) - int('0' + match[1] + match[2])}}}{{{'9' * len(match[3]) + '0' * len(match[2])}}}"
            ),
        ),
        # words and units: degrees; bare words; 5 million; what follows a number is its unit, and is left out
        (
            r"(?<=[\d}]) ?\^ ?(?:\\circ|\{ ?\\circ ?\})(?: ?[CF](?![a-zA-Z]))?|°|\\degree|(?<=\d) ?\^ ?\{ ?(?:\\prime ?|\\text\{ ?(?:st|nd|rd|th) ?\}|th)+\}",
            "",
        ),
        (
            r"((?<![_^])\d|10\^\{-?\d+\}) ?(?:\\mu(?= ?\\text)|(?:\\text\{ ?[kM] ?\} ?|[kM]|\\mu ?)?(?:\\Omega|\\AA|\\mathring ?\{A\}"
            r"|[LM]_ ?\{? ?\\odot ?\}?)(?= ?(?:$|[,;)\]])))",
            r"\1 \\text{unit}",
        ),
        (
            rf"(?P<other>{_TEXT}|\\(?:begin|end|operatorname|math\w+) ?\{{[^{{}}]*\}}|\\[a-zA-Z]+|sqrt|infinity)|[a-zA-Z]{{4,}}"
            rf"|(?<=[\d}}])(?<!\\[a-zA-Z]) ?(?:{_SHORT_UNITS})(?![a-zA-Z])",
            _word,
        ),
        (
            rf" ?\\text\{{ ?({'|'.join(_SCALES)})(?![a-z])",
            lambda match: rf" \times 10^{{{_SCALES[match[1]]}}} \text{{",
        ),
        (r"\\text\{ ?\}", ""),
        (rf"(?:(?<=[\d)}}])|(?<=\\pi))(?:{_UNIT})+(?= ?(?:$|[,;)\]]|\\\}}))", _unit),
        (r"\\text\{ ?\(?([A-Za-z])\)? ?\}", r"\1"),  # \text{(C)}
        (
            rf"_ ?\{{ ?(?:\\text\{{ ?)?({'|'.join(_BASES)}) ?\}}?\}}",
            lambda match: f"_{{{_BASES.index(match[1]) + 2}}}",
        ),
        (r"(?<![\\\w])E(?=_)", r"\\text{E}"),  # math-verify reads no E_1
        (r"^ ?\\(?:approx|sim)(?![a-zA-Z])|(?<!\.) ?\.$", ""),
        (
            r"^(?!.*\\[pm][pm].*\\[pm][pm])([^,]*)\\(?:pm|mp)(?![a-zA-Z])([^,]*)$",
            r"\1+\2, \1-\2",
        ),  # math-verify reads none in a \frac
    )
]


def plain(text: str) -> str:
    """The same answer in the LaTeX that math-verify reads as it was meant, without units."""
    text = " ".join(text.split())
    for pattern, to in _RULES if len(text) <= MAX_BOX else ():
        text = pattern.sub(to, text)
    return text.strip()


@functools.lru_cache(4096)
def canonical(text: str) -> str:
    r"""A normal form for voting: 27, 27.0, $27$ and 27\text{ cm} agree, as do 1/2, \frac12 and \dfrac{1}{2}. Text only."""
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


def _look(response: str, answer: str | list[str], style: str) -> Verdict | dict:
    """What can be said without mathematics: a verdict, or else the request for a worker."""
    if style not in STYLES and ":" not in style:
        raise ValueError(
            f"unknown reward style {style!r}: choose one of {', '.join(STYLES)}, or MODULE:FUNCTION"
        )
    golds = [answer] if isinstance(answer, str) else list(answer)
    if not isinstance(response, str) or not all(isinstance(gold, str) for gold in golds):
        raise TypeError("a response must be a str, an answer a str or a list of str")
    if ":" in style:
        return {"function": style, "response": response, "answer": answer}
    final = final_answer(response, style)
    if final is None:
        return Verdict(
            0.0, "no_think" if style == "think" and response.count("</think>") != 1 else "no_box"
        )
    if style == "hash":
        right = final in [gold.strip() for gold in golds]
        return Verdict(float(right), None if right else "wrong")
    if not final.strip() or len(final) > MAX_BOX:
        return Verdict(0.0, "parse_failure")
    box, *texts = map(canonical, (final, *golds))
    if box in texts:
        return Verdict(1.0, None)
    if all(
        re.fullmatch(r"-?\d+", text) for text in (box, *texts)
    ):  # other integers: no work for a parser
        return Verdict(0.0, "wrong")
    return {"box": final, "golds": [gold for gold in golds if len(gold) <= MAX_BOX]}


# -- the parent's side ------------------------------------------------------------------------------------------------


class _Batch:
    """The verdicts of one submit, filled in by several threads."""

    def __init__(self, count: int):
        self.future, self.verdicts, self.left = concurrent.futures.Future(), [None] * count, count
        self.lock = threading.Lock()
        self.future.set_running_or_notify_cancel()  # from here on cancel() is refused: the threads own the result
        if not count:
            self.future.set_result([])

    def put(self, indices: list[int], verdict: Verdict) -> None:
        with self.lock:
            for index in indices:
                self.verdicts[index], self.left = verdict, self.left - 1
            if not self.left and not self.future.done():
                self.future.set_result(self.verdicts)

    def fail(self, error: Exception) -> None:
        with self.lock:
            if not self.future.done():
                self.future.set_exception(error)


class Judge:
    """Judges responses in `workers` processes, at most `timeout` seconds (wall clock) an item.

    The processes start with start(), else with the first items that need them. Make one Judge per process: it does not
    survive a fork.
    """

    def __init__(self, workers: int = 2, timeout: float = TIMEOUT):
        if workers < 1 or timeout <= 0:
            raise ValueError(
                f"a Judge needs workers >= 1 and timeout > 0 seconds, not {workers} and {timeout}"
            )
        self.workers, self.timeout = workers, timeout
        self._queue, self._threads, self._lock, self._closed = (
            queue.SimpleQueue(),
            [],
            threading.Lock(),
            False,
        )

    def start(self) -> None:
        """Starts the worker processes and returns when they are ready. Raises RuntimeError where one cannot start."""
        with self._lock:
            for ready in self._launch(at_once=True):
                ready.result()

    def _launch(self, at_once: bool) -> list[concurrent.futures.Future]:
        if self._closed:
            raise RuntimeError("this Judge is closed")
        ready = [concurrent.futures.Future() for _ in range(0 if self._threads else self.workers)]
        for future in ready:  # every process is started by the thread that keeps it: on Linux it dies with that thread
            self._threads.append(
                threading.Thread(target=self._serve, args=(future, at_once), daemon=True)
            )
            self._threads[-1].start()
        return ready

    def submit(self, items: list[tuple[str, str | list[str], str]]) -> concurrent.futures.Future:
        """items: (response, answer, style) each -> a Future of one Verdict per item, in order. The same request is judged once.

        Raises ValueError for an unknown style, TypeError for what is not text, RuntimeError once closed. The Future
        raises RuntimeError where no worker can start (math-verify missing): that must not pass for a wrong answer.
        """
        looks = [_look(*item) for item in items]
        batch, requests = _Batch(len(looks)), {}
        for index, look in enumerate(looks):
            if isinstance(look, Verdict):
                batch.put([index], look)
            else:  # a group's responses repeat each other, and what hangs must hang once
                requests.setdefault(json.dumps(look), (batch, [], look))[1].append(index)
        with self._lock:
            if requests or self._closed:
                self._launch(at_once=False)
            for request in requests.values():
                self._queue.put(request)
        return batch.future

    def close(self, wait: bool = True) -> None:
        """Takes no more work, finishes what it has, ends the workers; wait=False returns at once."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._queue.put(None)
        for thread in self._threads if wait else []:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(wait=kind is None)

    def _serve(self, ready: concurrent.futures.Future, at_once: bool) -> None:
        """One thread, and the one process that it owns."""
        process = None
        try:
            process = _start() if at_once else None
            ready.set_result(None)
        except Exception as error:
            ready.set_exception(error)
        while (task := self._queue.get()) is not None:
            batch, indices, request = task
            try:
                verdict, left = Verdict(0.0, "crash"), self.timeout
                for _ in range(
                    2
                ):  # a death need not be the item's fault (out-of-memory killer): try it once more
                    if batch.future.done():  # it failed
                        break
                    process = process or _start()
                    began = time.monotonic()
                    reply = _exchange(process, request, left)
                    if reply is not None:
                        if (
                            "error" in reply
                        ):  # in the user's own function: no verdict on the response
                            raise RuntimeError(
                                f"the reward {request['function']} failed: {reply['error']}"
                            )
                        verdict = Verdict(**reply)
                        break
                    process = _end(process)
                    left -= time.monotonic() - began
                    if left <= 0:
                        verdict = Verdict(0.0, "timeout")
                        break
                batch.put(indices, verdict)
            except Exception as error:
                batch.fail(error)
        if process:
            _end(process)


def _start() -> subprocess.Popen:
    """A worker that is ready for its first request. Raises RuntimeError."""
    # a fixed hash seed, because sympy's path to an answer can depend on the order of sets; one thread, because a BLAS
    # with one buffer a core would run into the memory limit
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, _FILE, "--worker", str(os.getpid())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        reply = _exchange(process, None, START_SECONDS)
        if reply == {"ready": True}:
            return process
        _end(process)
        if reply is not None:
            break
    why = reply["error"] if reply else f"exit status {process.returncode}"
    raise RuntimeError(
        f"no reward worker could start ({why}): is math-verify[antlr4_13_2] installed?"
    )


def _exchange(process: subprocess.Popen, request: dict | None, seconds: float) -> dict | None:
    """The reply of a worker, or None where it died, or took more than so many seconds and was killed."""
    killer = threading.Timer(
        seconds, process.kill
    )  # unlike a read with a timeout, it guards the write as well
    killer.daemon = True
    killer.start()
    try:
        if request is not None:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return None
    finally:
        killer.cancel()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except OSError:  # what was still buffered for a dead reader
            pass
    process.wait()


@functools.cache
def own(function: str):
    """The user's reward MODULE:FUNCTION, importable from the working folder: (response, answer) -> a number, 1 for right.

    It runs in the workers, under their limits of time and memory. Raises ValueError where there is no such function.
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


@functools.cache
def _judge_of(pid: int) -> Judge:  # by process: threads do not survive a fork
    return Judge()


def reward(response: str, answer: str | list[str], style: str = "boxed") -> float:
    r"""1.0 where the response's final answer equals the answer (any one of a list), else 0.0.

    Never raises and answers within 10 s, come what may. Callable from any thread and script. A call that cannot be judged
    (unknown style, not text, no worker) scores 0.0 and logs why. The rule is that of ReMix (arXiv 2507.06892): 1 where both
    the format (see STYLES) and the answer are right. A whole batch is a Judge's work.
    """
    try:
        return (
            _judge_of(os.getpid())
            .submit([(response, answer, style)])
            .result(CALL_TIMEOUT)[0]
            .reward
        )
    except Exception as error:
        logging.getLogger(__name__).error("not judged, scored 0: %s", error or type(error).__name__)
        return 0.0


# -- the worker's side ------------------------------------------------------------------------------------------------


def _grader():
    """math-verify's parser and comparison, and what is refused beyond them -> judge(box, golds)."""
    import sympy
    import sympy.physics.units  # noqa: simplify() imports it, and it calls sympify()
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

    def refuse(*_):
        raise ValueError("text is never evaluated as Python")

    def number(text: str):
        text = text.replace(",", "")
        return sympy.Integer(text) if text.isdigit() else sympy.Float(text)

    sympy_parser.eval_expr = (
        refuse  # where sympify() and parse_expr() of a text end, and with them sympy.Number("1")
    )
    latex2sympy2.convert_number, latex2sympy2._Latex2Sympy.parse_number = (
        number,
        lambda _, text: number(text),
    )
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
        """Takes apart what has parts, so that the rules for numbers and equations hold within lists, too."""
        if isinstance(gold, sympy.Union) != isinstance(box, sympy.Union):
            gold, box = union(gold), union(box)
        (*gold_left, gold_last), (*box_left, box_last) = chain(gold), chain(box)
        if not all(
            is_formula(part) or same(box_last, part) for part in box_left[bool(gold_left) :]
        ):
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
            if (
                apart is not None and apart > 1e-5
            ):  # math-verify rounds to six decimals: 1e-8 is 2e-8
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
        """Relative, for numbers, and for formulas at a point; None where that says nothing. Quick where simplify() is slow."""
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
    ) -> (
        bool
    ):  # what \approx stands between: 1/3 and 0.33, not 5 and 6; math-verify reads the first
        parts = [read(part, *how) for part in plain(text).split(r"\approx")]
        if len(parts) == 1 or None in parts:
            return len(parts) == 1
        values = [
            value
            for part in parts
            if not is_formula(value := chain(part)[-1].xreplace({percent: percent.args[0]}))
        ]
        return all(
            (apart := distance(values[0], value)) is not None and apart < 0.01
            for value in values[1:]
        )

    def judge(box: str, golds: list[str]) -> Verdict:
        parsed = False
        for gold in golds:
            both = plain(gold) + " ; " + plain(box)
            bases = [
                set(re.findall(r"\d_ ?\{? ?(?:\\text\{ ?)?(\w+)", plain(text)))
                for text in (gold, box)
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
                return Verdict(1.0, None)
        return Verdict(0.0, "wrong" if parsed or not golds else "parse_failure")

    return judge


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
    sys.path[:] = [
        folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(_FILE)
    ]
    logging.disable(logging.CRITICAL)  # math-verify logs whole responses

    def say(**reply):
        print(json.dumps(reply), file=out, flush=True)

    try:
        judge = _grader()
    except Exception as error:
        return say(error=f"{type(error).__name__}: {error}")

    def judge_own(function: str, response: str, answer) -> dict:
        try:
            value = float(own(function)(response, answer))
            if not abs(value) < 1e9:  # NaN too
                raise ValueError(f"{value} is no reward")
            return Verdict(value, None if value == 1 else "wrong")._asdict()
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
            verdict = Verdict(0.0, "parse_failure")
        say(**verdict._asdict())


if __name__ == "__main__" and sys.argv[1:2] == ["--worker"]:
    _worker(int(sys.argv[2]))
