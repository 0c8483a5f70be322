"""reward.py: what is right, and that an answer always comes, whatever the response does to the worker.

The hostile inputs are real ones. Golds are those in $REMIX_DATA, where it names a folder, or generated.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import data
import reward as module
from reward import Judge, Verdict, last_box, reward, own

ROOT = Path(module.__file__).parent
TOWER = r"\boxed{9^{9^{9^{9^9}}}}"  # parses at once; comparing it with anything never ends
RIGHT = Verdict(1.0, None)
SUM = (r"\boxed{20 + 7}", "27.0", "boxed")  # right, and needs a worker to be seen to be


def sums(count):
    """As many, no two the same."""
    return [(rf"\boxed{{{i} + 7}}", str(i + 7), "boxed") for i in range(count)]


def benchmark_folder(tmp: Path) -> Path:
    """$REMIX_DATA, or a generated folder with every benchmark at its size."""
    if os.environ.get("REMIX_DATA"):
        return Path(os.environ["REMIX_DATA"])
    rng = random.Random(0)
    forms = ["{a}", "{a}.0", "\\frac{{{a}}}{{{b}}}", "({a}, {b})", "{a}\\sqrt{{{b}}}", "x^{b} - {a}", "{a}.{b}e-{b}",
             "{a} \\times 10^{{{b}}}", "[-{a}, \\infty)", "{a}\\pi"]
    (tmp / "benchmarks").mkdir()
    for name, count in data.BENCHMARKS.items():
        with open(tmp / "benchmarks" / f"{name}.jsonl", "w") as file:
            for i in range(count):
                answer = forms[i % len(forms)].format(a=rng.randint(2, 999), b=rng.randint(2, 30))
                row = {"id": f"{name}/{i}", "problem": f"Find ${answer}$.", "answer": [answer] if i % 2 else answer}
                file.write(json.dumps(row) + "\n")
    return tmp


@pytest.fixture(scope="module")
def judge():
    with Judge(workers=2, timeout=20) as judge:
        yield judge


def pids(parent=None):
    """The reward workers among a process's children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == (parent or os.getpid())
                    and b"--worker" in (folder / "cmdline").read_bytes()):
                found.append(int(folder.name))
        except OSError:
            pass
    return found


class Watched(Judge):
    """A Judge of whose workers one can ask the pids."""

    def __init__(self, workers, timeout):
        super().__init__(workers, timeout)
        self.others = set(pids())

    def pids(self):
        return [pid for pid in pids() if pid not in self.others]

    def started(self):
        """The pids, once all workers run."""
        deadline = time.monotonic() + 30
        while len(found := self.pids()) != self.workers:
            assert time.monotonic() < deadline, f"{len(found)} of {self.workers} workers"
            time.sleep(0.02)
        return found


def script(tmp_path, code, **options):
    """Run code as a user's script: without a main guard, in a folder of its own with a copy of reward.py."""
    (tmp_path / "reward.py").write_text(Path(module.__file__).read_text())
    (tmp_path / "script.py").write_text(code)
    return subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          **options)


# -- which box --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, box", [
    (r"\boxed{1}. So \boxed{2}", "2"), (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed {5}", "5"),
    (r"{ \boxed{5}", "5"), (r"} \boxed{5} }", "5"), (r"\\boxed{5}", "5"), (r"a \\ \boxed{5} \\", "5"),
    (r"\boxed{a \boxed{b} c}", "b"), ("\\boxed{\n7\n}", "\n7\n"), (r"\boxed{}", ""),
    (r"\boxed{", None), ("boxed{5}", None), ("5", None), ("", None), (r"\boxed 5", None), (r"\fbox{5}", None),
])
def test_last_box(text, box):
    assert last_box(text) == box


BALANCED = st.recursive(st.sampled_from(["1", " ", "x^", r"\{", r"\}", r"\frac", r"\\ "]),
                        lambda inner: st.lists(inner, max_size=4).map(lambda parts: "{" + "".join(parts) + "}"))


@settings(max_examples=300, deadline=None)
@given(before=st.text("\\{} boxed1"), box=st.lists(BALANCED, max_size=5).map("".join), after=st.text("\\ boxed1"))
def test_last_box_is_found_after_anything(before, box, after):
    assert last_box(before + r"\boxed{" + box + "}" + after) == box


# -- what is right ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, answer, style, reason", [
    # neighbouring boxes: the last one, alone
    (r"\boxed{1}. \n\n\boxed{2}", "2", "boxed", None), (r"\boxed{2}. \n\n\boxed{1}", "2", "boxed", "wrong"),
    (r"\boxed{1}. \n\n\boxed{2}", r"\{1, 2\}", "boxed", "wrong"), (r"$\boxed{1}$, $\boxed{2}$", "1", "boxed", "wrong"),
    # e-notation, on either side and on both
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", "boxed", None), (r"\boxed{4.5e33}", r"4.5 \times 10^{33}", "boxed", None),
    (r"\boxed{4.50E+33}", "4.5e33", "boxed", None), (r"\boxed{45 \cdot 10^{32}}", "4.5e33", "boxed", None),
    (r"\boxed{4.6e33}", "4.5e33", "boxed", "wrong"), (r"\boxed{1e3}", "1000", "boxed", None),
    (r"\boxed{-1.5e-2}", "-0.015", "boxed", None), (r"\boxed{.5e1}", "5", "boxed", None),
    (r"\boxed{2e}", "2 e", "boxed", None), (r"\boxed{2e}", "200", "boxed", "wrong"),
    # tiny numbers are numbers too
    (r"\boxed{4.6 \times 10^{-33}}", "4.5e-33", "boxed", "wrong"), (r"\boxed{0.00000002}", "1e-8", "boxed", "wrong"),
    (r"\boxed{0.0}", r"6.6 \times 10^{-34}", "boxed", "wrong"), (r"\boxed{45e-34}", "4.5e-33", "boxed", None),
    (r"\boxed{\frac{1}{10^8}}", "0.00000001", "boxed", None), (r"\boxed{0.0}", "0", "boxed", None),
    # the same number, the same thing
    (r"\boxed{27}", "27.0", "boxed", None), (r"\boxed{27.0}", "27", "boxed", None),
    (r"\boxed{27.}", "27", "boxed", None), (r"\boxed{27}", "27.0.", "boxed", None),
    (r"\boxed{23}", "023", "boxed", None), (r"\boxed{32348}", r"\$32,\!348", "boxed", None),
    (r"\boxed{\dfrac12}", "0.5", "boxed", None), (r"\boxed{1/2}", r"\frac{1}{2}", "boxed", None),
    (r"\boxed{0.333333}", "1/3", "boxed", None), (r"\boxed{0.3333}", "1/3", "boxed", "wrong"),
    (r"\boxed{10\%}", "0.1", "boxed", None), (r"\boxed{2,3}", r"\{3,2\}", "boxed", None),
    (r"\boxed{(3,2)}", "(2,3)", "boxed", "wrong"), (r"\boxed{(x-1)(x+1)}", "x^2-1", "boxed", None),
    (r"\boxed{x = 5}", "5", "boxed", None), (r"\boxed{\text{Evelyn}}", "Evelyn", "boxed", None),
    (r"\boxed{\frac{\sqrt{3}}{\frac{1}{2}}}", r"2\sqrt3", "boxed", None),
    (r"\boxed{ no  solution }", "no solution", "boxed", None), (r"\boxed{5}, I am sure", " 5\n", "boxed", None),
    # any one of a list of answers
    (r"\boxed{28}", ["27", "28.0"], "boxed", None), (r"\boxed{27}", ["27", "28.0"], "boxed", None),
    (r"\boxed{29}", ["27", "28.0"], "boxed", "wrong"), (r"\boxed{27, 28}", ["27", "28.0"], "boxed", "wrong"),
    (r"\boxed{29}", [], "boxed", "wrong"),
    # no answer
    ("The answer is 5.", "5", "boxed", "no_box"), (r"\boxed{5", "5", "boxed", "no_box"), ("", "5", "boxed", "no_box"),
    (r"\boxed{}", "5", "boxed", "parse_failure"), (r"\boxed{ }", "", "boxed", "parse_failure"),
    (r"\boxed{" + "(" * 100 + "}", "5", "boxed", "parse_failure"),
    ("\\boxed{\ud800}", "5", "boxed", "parse_failure"), ("\\boxed{\x00}", "5", "boxed", "parse_failure"),
    # think: exactly one closing tag, the box after it
    (r"so 5</think> \boxed{5}", "5", "think", None), (r"<think>so</think>\boxed{5}", "5", "think", None),
    (r"so 5 \boxed{5}", "5", "think", "no_think"), (r"a</think>b</think>\boxed{5}", "5", "think", "no_think"),
    (r"so \boxed{5}</think> 5", "5", "think", "no_box"), (r"\boxed{6}</think>\boxed{5}", "6", "think", "wrong"),
    (r"so</think> \boxed{5}", ["4", "5.0"], "think", None), (r"so 5 </think> \boxed{5}", "5", "boxed", None),
    # hash: the text after the last one
    ("8+6=14;14+4=18;#18", "18", "hash", None), ("#17#18 \n", "18", "hash", None), ("#18#17", "18", "hash", "wrong"),
    ("18", "18", "hash", "no_box"), ("#018", "18", "hash", "wrong"), ("#18;", "18", "hash", "wrong"),
    ("#18", ["17", "18"], "hash", None), ("#", "", "hash", None), ("", "", "hash", "no_box"),
])
def test_traps(judge, response, answer, style, reason):
    assert judge.submit([(response, answer, style)]).result() == [Verdict(float(reason is None), reason)]


@pytest.fixture(scope="module")
def golds(tmp_path_factory):
    """Every benchmark's answers, {name: [list of acceptable answers, ...]}."""
    folder = benchmark_folder(tmp_path_factory.mktemp("data"))
    load = {name: data.load_benchmark(name, folder) for name in data.BENCHMARKS}
    return {name: [p["answer"] if isinstance(p["answer"], list) else [p["answer"]] for p in problems]
            for name, problems in load.items()}


def rewards(judge, pairs):
    return [v.reward for v in judge.submit([(rf"So \boxed{{{box}}}.", gold, "boxed") for box, gold in pairs]).result()]


def test_golds_are_right_as_they_stand_and_in_other_words(judge, golds):
    r"""All 1,600 as they stand. Up to 100 a benchmark with 27 and 27.0 exchanged, or 5e-4 and 5 \cdot 10^{-4}, or \frac
    and \dfrac, or in dollars (measured once on all 1,600 golds of the real benchmarks: all right)."""
    for name, answers in golds.items():
        as_they_stand = rewards(judge, [(gold, answer) for answer in answers for gold in answer])
        assert as_they_stand == [1.0] * sum(map(len, answers)), name
        other = []
        for answer in answers[::-(-len(answers) // 100)]:
            box = answer[0] if "$" in answer[0] else f"${answer[0]}$"
            if re.fullmatch(r"-?\d+(\.0)?", answer[0]):
                box = answer[0][:-2] if answer[0].endswith(".0") else answer[0] + ".0"
            elif number := re.fullmatch(r"(-?[\d.]+)e(-?\d+)", answer[0]):
                box = rf"{number[1]} \cdot 10^{{{number[2]}}}"
            other.append((box.replace(r"\times", r"\cdot").replace(r"\frac", r"\dfrac"), answer))
        assert rewards(judge, other) == [1.0] * len(other), name


def test_other_golds_are_wrong(judge, golds):
    """Up to 50 a benchmark against their neighbours', and against themselves plus one."""
    neighbours, near = [], []
    for answers in golds.values():
        answers = answers[-50:]
        neighbours += [(a[0], b) for a, b in zip(answers, answers[1:]) if not set(a) & set(b)]
        near += [(str(int(a[0]) + 1), a) for a in answers if re.fullmatch(r"-?\d+", a[0])]
    assert len(neighbours) > 150 and len(near) > 15
    assert sum(rewards(judge, neighbours)) <= 2  # x = 5 and 5 may be neighbours
    assert sum(rewards(judge, near)) == 0


def test_long_responses_are_read_quickly(judge):
    began = time.monotonic()
    items = [("think \\ { " * 500_000 + r"\boxed{27}", "27.0", "boxed"), (r"\boxed{" * 200_000, "1", "boxed"),
             ("{" * 10**6 + "}" * 10**6 + r"\boxed{27.0}", "27", "boxed"),
             (r"\boxed{" + "1+" * 500_000 + "1}", "500001", "boxed"), ("#" * 10**6, "", "hash")]
    assert [v.reason for v in judge.submit(items).result()] == [None, "no_box", None, "parse_failure", None]
    assert time.monotonic() - began < 10


# -- an answer always comes -------------------------------------------------------------------------------------------

def test_reward_from_the_main_thread_and_from_others():
    """math-verify itself raises off the main thread, which has scored whole runs 0."""
    asked = [(r"\boxed{20 + 7}", "27.0"), (r"\boxed{28}", "27.0"), (r"\boxed{1/2}", ["2", r"\frac12"])]
    assert [reward(*pair) for pair in asked] == [1.0, 0.0, 1.0]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: reward(*asked[i % 3])})) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [1.0, 0.0, 1.0][i % 3] for i in range(12)}


@pytest.mark.parametrize("arguments", [
    (None, "5"), (5, "5"), (r"\boxed{5}", None), (r"\boxed{5}", 5), (r"\boxed{5}", [5]), (r"\boxed{5}", "5", "nope"),
    (b"\\boxed{5}", "5"), (r"\boxed{5}", "5", None), (r"\boxed{5}", "5", ["boxed"]),
])
def test_reward_never_raises(arguments, caplog):
    assert reward(*arguments) == 0.0
    assert "scored 0" in caplog.text


def test_submit_says_what_is_wrong(judge):
    with pytest.raises(ValueError, match="'nope'.*boxed, think, hash"):
        judge.submit([(r"\boxed{5}", "5", "boxed"), ("#5", "5", "nope")])
    with pytest.raises(TypeError):
        judge.submit([(r"\boxed{5}", 5, "boxed")])
    with pytest.raises(ValueError):
        Judge(workers=0)
    assert judge.submit([]).result(1) == []


def test_verdicts_keep_their_order(judge):
    batches = [judge.submit([(rf"\boxed{{{i} + 0}}", str(i // 2 * 2), "boxed") for i in range(60)]) for _ in range(3)]
    assert [[v.reward for v in batch.result()] for batch in batches] == [[1.0, 0.0] * 30] * 3


def test_a_hang_costs_its_timeout_and_nothing_else():
    with Watched(workers=1, timeout=3) as judge:
        assert judge.submit([SUM]).result() == [RIGHT]
        first, began = judge.started(), time.monotonic()
        items = [(TOWER, "5", "boxed"), SUM, (r"\boxed{28}", "27.0", "boxed")]
        verdicts = judge.submit(items).result(60)
        assert verdicts == [Verdict(0.0, "timeout"), RIGHT, Verdict(0.0, "wrong")]
        assert 3 <= time.monotonic() - began < 20
        assert not set(first) & set(judge.pids()), "the hung process lives on"


def test_a_stopped_worker_is_replaced():
    with Watched(workers=1, timeout=3) as judge:
        judge.submit([SUM]).result()
        os.kill(judge.started()[0], signal.SIGSTOP)
        verdicts = judge.submit(sums(3)).result(60)
        assert verdicts == [Verdict(0.0, "timeout"), RIGHT, RIGHT]


def test_a_killed_worker_is_replaced_and_its_item_judged_again():
    with Watched(workers=2, timeout=60) as judge:
        judge.submit(sums(20)).result()
        for pid in judge.started():
            os.kill(pid, signal.SIGSTOP)  # so that the kill below hits them with an item each in hand
        batch = judge.submit(sums(20))
        time.sleep(0.3)
        for pid in judge.pids():
            os.kill(pid, signal.SIGKILL)
        assert batch.result(60) == [RIGHT] * 20
        for pid in judge.started():
            os.kill(pid, signal.SIGKILL)  # and while idle
        assert judge.submit(sums(20)).result(60) == [RIGHT] * 20


def test_an_item_that_kills_its_worker_twice_is_a_crash():
    with Watched(workers=1, timeout=120) as judge:
        batch = judge.submit([(TOWER, "5", "boxed"), SUM])
        for _ in range(2):
            worker = judge.started()[0]
            while sum(map(int, Path(f"/proc/{worker}/stat").read_text().split()[13:15])) < 200:  # clock ticks of 10 ms
                time.sleep(0.02)  # until it computes: importing takes less
            judge.others.add(worker)
            os.kill(worker, signal.SIGKILL)
        assert batch.result(60) == [Verdict(0.0, "crash"), RIGHT]


def test_items_are_spread_over_the_workers():
    with Watched(workers=2, timeout=3) as judge:
        batch = judge.submit([(TOWER, "5", "boxed"), SUM, (TOWER, "6", "boxed")])
        assert len(set(judge.started())) == 2
        assert [v.reason for v in batch.result(60)] == ["timeout", None, "timeout"]


def test_worker_limits_and_ctrl_c():
    with Watched(workers=1, timeout=20) as judge:
        assert rewards(judge, [("20 + 7", "27.0")]) == [1.0]
        worker = judge.started()[0]
        memory = re.search(r"Max address space\s+(\d+)", Path(f"/proc/{worker}/limits").read_text())
        assert int(memory[1]) == module.WORKER_MEMORY
        os.kill(worker, signal.SIGINT)
        assert rewards(judge, [("20 + 7", "27.0")]) == [1.0] and judge.pids() == [worker]


def test_close_finishes_the_work_and_ends_the_workers():
    before = set(pids())
    judge = Judge(workers=2)
    batch = judge.submit(sums(10))
    judge.close()
    assert batch.done() and batch.result() == [RIGHT] * 10 and set(pids()) == before
    judge.close()
    with pytest.raises(RuntimeError, match="closed"):
        judge.submit([("#5", "5", "hash")])


def test_text_needs_no_process():
    before = set(pids())
    with Judge() as judge:
        batch = judge.submit([("#18", "18", "hash"), (r"\boxed{5}", "5", "boxed"), ("5", "5", "boxed")])
        assert batch.done() and set(pids()) == before


# -- other people's scripts -------------------------------------------------------------------------------------------

def test_a_script_without_main_guard_and_its_forks(tmp_path):
    """Modules beside reward.py are not the worker's, and nothing but the script itself prints."""
    for name in ("math_verify", "sympy", "antlr4"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    done = script(tmp_path, r"""
import os
from reward import Judge, reward
print(reward(r"\boxed{20 + 7}", "27.0"), reward(r"\boxed{28}", "27.0"), flush=True)
if os.fork() == 0:  # the parent's threads are not here
    print(reward(r"\boxed{20 + 7}", "27.0"), reward(r"\boxed{28}", "27.0"), flush=True)
    os._exit(0)
os.wait()
print(Judge(1, 1.5).submit([(r"\boxed{9^{9^{9^{9^9}}}}", "5", "boxed")]).result()[0].reason)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0 0.0\n1.0 0.0\ntimeout\n", "")


def test_workers_die_with_their_parent(tmp_path):
    """Even in the middle of something that never ends, when the parent had no chance to clean up."""
    done = script(tmp_path, rf"""
import os, signal, sys, time
sys.path += [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_reward import TOWER, Watched, sums
judge = Watched(2, 100)
judge.submit(sums(50)).result()
judge.submit([(TOWER, "5", "boxed"), (TOWER, "6", "boxed")])
time.sleep(1)
print(*judge.started(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""")
    workers = done.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
              for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_no_math_verify_is_an_error_not_a_wrong_answer(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "math_verify.py").write_text("raise ImportError('no antlr here')")
    done = script(tmp_path, r"""
from reward import Judge, reward
try:
    Judge(2).submit([(r"\boxed{20 + 7}", "27.0", "boxed")] * 3).result()
except RuntimeError as error:
    print(error)
print(reward(r"\boxed{20 + 7}", "27.0"))
""", env={**os.environ, "PYTHONPATH": str(tmp_path / "broken")})
    assert "no antlr here" in done.stdout and "is math-verify" in done.stdout and done.stdout.endswith("\n0.0\n")
    assert "scored 0" in done.stderr


# Your own reward: MODULE:FUNCTION.

MINE = """
import time

def grade(response, answer):
    if response == "raise":
        raise KeyError("x")
    while response == "hang":
        time.sleep(1)
    if response == "nan":
        return float("nan")
    return {"all": True, "half": 0.5}.get(response, -1) if answer == ["7", "8"] else 0

three = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the working folder of the user."""
    (tmp_path / "my_own_rewards.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_own_rewards", raising=False)


def test_an_own_function_judges_beside_the_others(mine):
    with Judge(2) as judge:
        items = [(text, ["7", "8"], "my_own_rewards:grade") for text in ("all", "half", "neither", "")]
        verdicts = judge.submit([*items, ("all", "7", "my_own_rewards:grade"), (r"\boxed{7.0}", "7", "boxed")]).result()
    assert verdicts == [(1.0, None), (0.5, "wrong"), (-1.0, "wrong"), (-1.0, "wrong"), (0.0, "wrong"), (1.0, None)]


def test_an_own_function_that_fails_is_no_verdict(mine):
    """What raises or is no number stops the run and says why; what hangs is cut off, like everything else that is judged."""
    with Judge(1, timeout=2) as judge:
        for text, why in (("raise", "KeyError"), ("nan", "nan is no reward")):
            with pytest.raises(RuntimeError, match=f"my_own_rewards:grade failed: .*{why}"):
                judge.submit([(text, "7", "my_own_rewards:grade")]).result()
        assert judge.submit([("hang", "7", "my_own_rewards:grade")]).result() == [(0.0, "timeout")]
        assert judge.submit([("all", ["7", "8"], "my_own_rewards:grade")]).result() == [(1.0, None)]


@pytest.mark.parametrize("function, why", [
    ("absent_module:f", "No module named"), ("my_own_rewards:absent", "no attribute"), ("my_own_rewards:three", "no function")])
def test_no_such_function(mine, function, why):
    with pytest.raises(ValueError, match=why):
        own(function)
