r"""Is this response right? 0 or 1, judged by math-verify in worker processes that can be killed.

Why processes: math-verify limits its own time with SIGALRM, which raises off the main thread (and then every answer
looks wrong), and sympy can hang in places no thread can interrupt: `\boxed{9^{9^{9^{9^9}}}}` is enough. So each worker
is a child process that speaks one JSON object a line; one that takes too long is killed and replaced, and it starts
from this file by name, so scripts need no main guard and a trainer may have threads, CUDA or a fork behind it.

Three things differ from handing the whole response to math-verify, which
  1. merges neighbouring boxes into a set: only the last balanced \boxed{...} is judged, alone;
  2. reads 4.5e33 as 4.5 * e * 33: e-notation becomes 4.5 \times 10^{33} on both sides first;
  3. calls 1e-8 and 2e-8 equal (it rounds to six decimals): numbers below 1e-3 must also agree to 0.1 %.
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
START_SECONDS = 120.0  # for a worker to import math-verify: about 1 s, far more on a cold network disk
WORKER_MEMORY = 2 << 30  # bytes of address space
_FILE = os.path.abspath(__file__)


class Verdict(NamedTuple):
    reward: float  # 1.0 right, 0.0 not
    # None when right, else "wrong", "no_box" (or no #), "no_think" (not exactly one </think>), "parse_failure" (the box
    # is empty, too long or no mathematics), "timeout", "crash" (the worker died on it twice)
    reason: str | None


def last_box(text: str) -> str | None:
    r"""What the last balanced \boxed{...} holds, or None. Escaped braces (\{) do not count. Linear in the length."""
    opened, last = [], None  # opened: the start of the contents of every open brace, negative where no box opened it
    for token in re.finditer(r"\\boxed\s*\{|\\(?!\\boxed)[\\{}]|[{}]", text):
        if token[0] == "}":
            start = opened.pop() if opened else -1
            if start > (last[0] if last else -1):
                last = (start, token.start())
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(-1)
    return text[slice(*last)] if last else None


def _look(response: str, answer: str | list[str], style: str) -> Verdict | dict:
    """What can be said without mathematics: a verdict, or else the request for a worker."""
    if style not in STYLES and ":" not in style:
        raise ValueError(f"unknown reward style {style!r}: choose one of {', '.join(STYLES)}, or MODULE:FUNCTION")
    golds = [answer] if isinstance(answer, str) else list(answer)
    if not isinstance(response, str) or not all(isinstance(gold, str) for gold in golds):
        raise TypeError("a response must be a str, an answer a str or a list of str")
    if ":" in style:
        return {"function": style, "response": response, "answer": answer}
    if style == "hash":
        _, mark, final = response.rpartition("#")
        if mark and final.strip() in [gold.strip() for gold in golds]:
            return Verdict(1.0, None)
        return Verdict(0.0, "wrong" if mark else "no_box")
    if style == "think":
        if response.count("</think>") != 1:
            return Verdict(0.0, "no_think")
        response = response.partition("</think>")[2]
    box = last_box(response)
    if box is None:
        return Verdict(0.0, "no_box")
    box, *golds = (re.sub(r"(?<!\.) ?\.$", "", " ".join(text.split())) for text in (box, *golds))  # "27." is 27
    if not box or len(box) > MAX_BOX:
        return Verdict(0.0, "parse_failure")
    if box in golds:
        return Verdict(1.0, None)
    return {"box": box, "golds": [gold for gold in golds if len(gold) <= MAX_BOX]}


def final_answer(response, style):
    if style == "hash":
        return response.rpartition("#")[2].strip() if "#" in response else None
    if style == "think":
        response = response.partition("</think>")[2]
    return last_box(response)


def canonical(text):
    return "".join(text.split())


# -- the parent's side ------------------------------------------------------------------------------------------------

class _Batch:
    """The verdicts of one submit, filled in by several threads."""

    def __init__(self, count: int):
        self.future, self.verdicts, self.left = concurrent.futures.Future(), [None] * count, count
        self.lock = threading.Lock()
        self.future.set_running_or_notify_cancel()  # from here on cancel() is refused: the threads own the result
        if not count:
            self.future.set_result([])

    def put(self, index: int, verdict: Verdict) -> None:
        with self.lock:
            self.verdicts[index], self.left = verdict, self.left - 1
            if not self.left and not self.future.done():
                self.future.set_result(self.verdicts)

    def fail(self, error: Exception) -> None:
        with self.lock:
            if not self.future.done():
                self.future.set_exception(error)


class Judge:
    """Judges responses in `workers` processes, at most `timeout` seconds (wall clock) an item.

    The processes start with the first item that needs one. Make one Judge per process: it does not survive a fork.
    """

    def __init__(self, workers: int = 2, timeout: float = 10.0):
        if workers < 1 or timeout <= 0:
            raise ValueError(f"a Judge needs workers >= 1 and timeout > 0 seconds, not {workers} and {timeout}")
        self.workers, self.timeout = workers, timeout
        self._queue, self._threads, self._lock, self._closed = queue.SimpleQueue(), [], threading.Lock(), False

    def submit(self, items: list[tuple[str, str | list[str], str]]) -> concurrent.futures.Future:
        """items: (response, answer, style) each -> a Future of one Verdict per item, in order.

        Raises ValueError for an unknown style, TypeError for what is not text, RuntimeError once closed. The Future
        raises RuntimeError where no worker can start (math-verify missing): that must not pass for a wrong answer.
        """
        looks = [_look(*item) for item in items]
        batch = _Batch(len(looks))
        with self._lock:
            if self._closed:
                raise RuntimeError("this Judge is closed")
            if not self._threads and any(isinstance(look, dict) for look in looks):
                self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(self.workers)]
                for thread in self._threads:
                    thread.start()
            for index, look in enumerate(looks):
                if isinstance(look, Verdict):
                    batch.put(index, look)
                else:
                    self._queue.put((batch, index, look))
        return batch.future

    def start(self):
        self.submit([(r"\boxed{1}", "1.0", "boxed")]).result()

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

    def _serve(self) -> None:
        """One thread, and the one process that it owns."""
        process = None
        while (task := self._queue.get()) is not None:
            batch, index, request = task
            try:
                verdict = Verdict(0.0, "crash")
                for _ in range(2):  # a death need not be the item's fault (out-of-memory killer): try it once more
                    if batch.future.done():  # it failed
                        break
                    process = process or _start()
                    began = time.monotonic()
                    reply = _exchange(process, request, self.timeout)
                    if reply is not None:
                        if "error" in reply:  # in the user's own function: no verdict on the response
                            raise RuntimeError(f"the reward {request['function']} failed: {reply['error']}")
                        verdict = Verdict(**reply)
                        break
                    process = _end(process)
                    if time.monotonic() - began >= self.timeout:
                        verdict = Verdict(0.0, "timeout")
                        break
                batch.put(index, verdict)
            except Exception as error:
                batch.fail(error)
        if process:
            _end(process)


def _start() -> subprocess.Popen:
    """A worker that is ready for its first request. Raises RuntimeError."""
    # a fixed hash seed, because sympy's path to an answer can depend on the order of sets; one thread, because a BLAS
    # with one buffer a core would run into the memory limit
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for _ in range(2):
        process = subprocess.Popen([sys.executable, _FILE, "--worker", str(os.getpid())], env=environment,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                   start_new_session=True)  # torchrun and terminals signal whole groups, and the trainer goes on to the end of its step
        reply = _exchange(process, None, START_SECONDS)
        if reply == {"ready": True}:
            return process
        _end(process)
        if reply is not None:
            break
    why = reply["error"] if reply else f"exit status {process.returncode}"
    raise RuntimeError(f"no reward worker could start ({why}): is math-verify[antlr4_13_2] installed?")


def _exchange(process: subprocess.Popen, request: dict | None, seconds: float) -> dict | None:
    """The reply of a worker, or None where it died, or took more than so many seconds and was killed."""
    killer = threading.Timer(seconds, process.kill)  # unlike a read with a timeout, it guards the write as well
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

    Never raises and always returns: a worker has 10 s for it. Callable from any thread and script. A call that cannot
    be judged (unknown style, not text, no worker) scores 0.0 and logs why. The rule is that of ReMix (arXiv
    2507.06892): 1 where both the format (see STYLES) and the answer are right. A whole batch is a Judge's work.
    """
    try:
        return _judge_of(os.getpid()).submit([(response, answer, style)]).result()[0].reward
    except Exception as error:
        logging.getLogger(__name__).error("not judged, scored 0: %s", error)
        return 0.0


# -- the worker's side ------------------------------------------------------------------------------------------------

def _plain(text: str) -> str:
    r"""4.5e33 -> 4.5 \times 10^{33}"""
    number = r"(?<![\w.\\])((?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d{1,4})(?![\w.])"
    return re.sub(number, lambda match: rf"{match[1]} \times 10^{{{int(match[2])}}}", text)


def _worker(parent: int) -> None:
    """Answers {"box", "golds"} with {"reward", "reason"}, line by line, until stdin ends."""
    import resource
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    if sys.platform == "linux":  # die with the parent, even where a forked sibling of ours still holds the pipe open
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
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever else prints must not end up among the replies
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != os.path.dirname(_FILE)]
    logging.disable(logging.CRITICAL)  # math-verify logs whole responses

    def say(**reply):
        print(json.dumps(reply), file=out, flush=True)

    try:
        from math_verify import parse, verify
        from sympy import Expr, UnevaluatedExpr
    except Exception as error:
        return say(error=f"{type(error).__name__}: {error}")

    def read(text: str) -> list:  # math-verify: [expression, text], or less where it could not read it
        return parse(rf"\boxed{{{_plain(text)}}}", parsing_timeout=None)  # no timeouts of its own: we get killed

    read_gold = functools.lru_cache(1024)(read)  # a group's responses share their answer

    def tiny_and_apart(gold, box) -> bool:
        if not all(isinstance(x, Expr) and x.is_number and not x.has(UnevaluatedExpr) for x in (gold, box)):
            return False  # UnevaluatedExpr: percentages
        gold, box = complex(gold), complex(box)
        return 0 < abs(gold) < 1e-3 and abs(gold - box) > 1e-3 * abs(gold)

    def judge(box: str, golds: list[str]) -> Verdict:
        prediction = read(box)
        for gold in map(read_gold, golds):
            if gold and prediction and verify(gold, prediction, timeout_seconds=None):
                if not tiny_and_apart(gold[0], prediction[0]):
                    return Verdict(1.0, None)
        failed = all(isinstance(reading, str) for reading in prediction)
        return Verdict(0.0, "parse_failure" if failed else "wrong")

    def judge_own(function: str, response: str, answer) -> dict:
        try:
            value = float(own(function)(response, answer))
            if not abs(value) < 1e9:  # NaN too
                raise ValueError(f"{value} is no reward")
            return Verdict(value, None if value == 1 else "wrong")._asdict()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    judge("0.5", [r"\frac{1}{2}"])  # fills the parser's tables, which must not count against the first response
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
