r"""Is this response right? 0 or 1, judged by math-verify in worker processes that can be killed.

Why processes: math-verify limits its own time with SIGALRM, which raises off the main thread (and
then every answer looks wrong), and sympy can hang where no thread can interrupt it:
`\boxed{9^{9^{9^{9^9}}}}` is enough. What is judged is the last balanced \boxed{...}, alone
(math-verify merges neighbouring boxes into a set): by its text here, else by infra/grader.py.
"""

import functools
import json
import logging
import os
import re
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import NamedTuple

from infra import grader
from infra.grader import MAX_BOX, canonical, own
from infra.pool import Pool

__all__ = ["canonical", "own"]
# boxed: the last \boxed{} of the response. think: exactly one </think> (the prompt opened the tag),
# then the last box after it. hash: the toy task, what follows the last #, compared as text.
# Besides them, MODULE:FUNCTION: your own, see own().
STYLES = ("boxed", "think", "hash")
# Wall clock for an item, its second try included: right answers take 0.1 s and less, so that a
# machine may be fifty times slower than it should. A lone reward() may have a worker to start
# first, which takes 1 to 3 s.
TIMEOUT, CALL_TIMEOUT = 5.0, 9.5
# Self-reflection keywords of the authors' evaluation code, matched as they do.
REFLECTION = (
    "verify re-examine double-check why validate abduct question check but wait confirm scrutinize "
    "analyze investigate probe"
).split() + ["root cause"]


class Verdict(NamedTuple):
    reward: float  # 1.0 right, 0.0 not
    # None when right, else "wrong", "no_box" (or no #), "no_think" (not exactly one </think>),
    # "parse_failure" (the box is empty, too long or no mathematics), "timeout", "crash" (the worker
    # died on it twice)
    reason: str | None


def last_box(text: str) -> str | None:
    r"""What the last balanced \boxed{...} holds, or None. Escaped braces (\{) do not count."""
    # opened: the start of the contents of every open brace, negative where no box opened it
    opened, last = [], None
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
    """The text that is judged: of the last box (think: after the only </think>; hash: after the
    last #). None: there is none."""
    if style == "hash":
        _, mark, final = response.rpartition("#")
        return final.strip() if mark else None
    if style == "think":
        if response.count("</think>") != 1:
            return None
        response = response.partition("</think>")[2]
    return last_box(response)


def look(response: str, answer: str | list[str], style: str) -> Verdict | dict:
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


class Pending:
    """The verdicts of one submit, as they come."""

    def __init__(self, verdicts: list[Verdict | Future]):
        self._verdicts = verdicts
        self._futures = {verdict for verdict in verdicts if isinstance(verdict, Future)}

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self, timeout: float | None = None) -> list[Verdict]:
        """In the order of the items. Raises TimeoutError or RuntimeError: no verdict."""
        done, waiting = wait(self._futures, timeout, FIRST_EXCEPTION)
        failed = any(future.exception() for future in done)
        for future in waiting:
            future.cancel()
        if waiting and not failed:
            raise TimeoutError(f"not judged within {timeout} s")
        for future in done:
            future.result()
        return [v.result() if isinstance(v, Future) else v for v in self._verdicts]


class Judge:
    """Judges responses in `workers` processes, at most `timeout` seconds (wall clock) an item.

    The processes start with start(), else with the first items that need them. Make one Judge per
    process: it does not survive a fork.
    """

    def __init__(self, workers: int = 2, timeout: float = TIMEOUT):
        self.workers, self.timeout = workers, timeout
        self._pool = Pool(grader.__file__, workers, timeout)

    def start(self) -> None:
        """Returns when the workers are ready. Raises RuntimeError where one cannot start."""
        self._pool.start()

    def submit(self, items: list[tuple[str, str | list[str], str]]) -> Pending:
        """items: (response, answer, style) each. The same request is judged once.

        Raises ValueError for an unknown style, TypeError for what is not text, RuntimeError once
        closed. result() raises RuntimeError where no worker can start (math-verify missing): that
        must not pass for a wrong answer.
        """
        looks = [look(*item) for item in items]
        if self._pool.closed:
            raise RuntimeError("this Judge is closed")
        # a group's responses repeat each other, and what hangs must hang once
        asked = {}
        for found in looks:
            if not isinstance(found, Verdict) and json.dumps(found) not in asked:
                asked[json.dumps(found)] = self._pool.submit(found, _verdict)
        return Pending([v if isinstance(v, Verdict) else asked[json.dumps(v)] for v in looks])

    def close(self, wait: bool = True) -> None:
        """Finishes the work and ends the workers; wait=False drops the work and returns at once."""
        self._pool.close(wait)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close(wait=kind is None)


def _verdict(request: dict, ask) -> Verdict:
    # ask: see Pool.ask
    try:
        reply = ask(request)
    except TimeoutError:
        return Verdict(0.0, "timeout")
    except ChildProcessError:
        return Verdict(0.0, "crash")
    if "error" in reply:  # in the user's own function: no verdict on the response
        raise RuntimeError(f"the reward {request['function']} failed: {reply['error']}")
    return Verdict(**reply)


def try_own(name: str, answer: str | list[str]) -> None:
    """Calls MODULE:FUNCTION once, before the first thousand. Raises ValueError without a number."""
    with Judge(1) as judge:
        try:
            (verdict,) = judge.submit([("", answer, name)]).result()
        except RuntimeError as error:
            raise ValueError(error) from None
    if verdict.reason not in (None, "wrong"):
        raise ValueError(f"--reward {name} gave no number for an empty response: {verdict.reason}")


def reflects(text: str) -> bool:
    """Whether a response holds at least one self-reflection keyword."""
    text = text.lower()
    return any(keyword in text for keyword in REFLECTION)


@functools.cache
def _judge_of(pid: int) -> Judge:  # by process: threads do not survive a fork
    return Judge()


def reward(response: str, answer: str | list[str], style: str = "boxed") -> float:
    r"""1.0 where the response's final answer equals the answer (any one of a list), else 0.0.

    Never raises and answers within 10 s, come what may. Callable from any thread and script. A call
    that cannot be judged (unknown style, not text, no worker) scores 0.0 and logs why. The rule is
    that of ReMix (arXiv 2507.06892): 1 where both the format (see STYLES) and the answer are right.
    A whole batch is a Judge's work.
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
