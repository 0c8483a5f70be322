"""reward.py: what is right, and that an answer always comes, whatever the response does.

The hostile inputs are real ones. Golds are those in $REMIX_DATA, or else generated.
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
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward as module
from infra import data, grader
from reward import Judge, Verdict, canonical, final_answer, last_box, own, reflects, reward, try_own

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
    forms = [
        "{a}",
        "{a}.0",
        "\\frac{{{a}}}{{{b}}}",
        "({a}, {b})",
        "{a}\\sqrt{{{b}}}",
        "x^{b} - {a}",
        "{a}.{b}e-{b}",
        "{a} \\times 10^{{{b}}}",
        "[-{a}, \\infty)",
        "{a}\\pi",
    ]
    (tmp / "benchmarks").mkdir()
    for name, count in data.BENCHMARKS.items():
        with open(tmp / "benchmarks" / f"{name}.jsonl", "w") as file:
            for i in range(count):
                answer = forms[i % len(forms)].format(a=rng.randint(2, 999), b=rng.randint(2, 30))
                row = {
                    "id": f"{name}/{i}",
                    "problem": f"Find ${answer}$.",
                    "answer": [answer] if i % 2 else answer,
                }
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
            if (
                int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                == (parent or os.getpid())
                and b"--worker" in (folder / "cmdline").read_bytes()
            ):
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
        deadline = time.monotonic() + 120
        while len(found := self.pids()) != self.workers:
            assert time.monotonic() < deadline, f"{len(found)} of {self.workers} workers"
            time.sleep(0.02)
        return found


def script(tmp_path, code, **options):
    """Run code as a user's script: without a main guard, in a folder with a copy of reward.py."""
    (tmp_path / "infra").mkdir()
    for name in ("reward.py", "infra/grader.py", "infra/pool.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "script.py").write_text(code)
    return subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# -- which box --


@pytest.mark.parametrize(
    "text, box",
    [
        (r"\boxed{1}. So \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed {5}", "5"),
        (r"{ \boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"\\boxed{5}", "5"),
        (r"a \\ \boxed{5} \\", "5"),
        (r"\boxed{a \boxed{b} c}", "b"),
        ("\\boxed{\n7\n}", "\n7\n"),
        (r"\boxed{}", ""),
        (r"\boxed{", None),
        ("boxed{5}", None),
        ("5", None),
        ("", None),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
    ],
)
def test_last_box(text, box):
    assert last_box(text) == box


BALANCED = st.recursive(
    st.sampled_from(["1", " ", "x^", r"\{", r"\}", r"\frac", r"\\ "]),
    lambda inner: st.lists(inner, max_size=4).map(lambda parts: "{" + "".join(parts) + "}"),
)


@settings(max_examples=300, deadline=None)
@given(
    before=st.text("\\{} boxed1"),
    box=st.lists(BALANCED, max_size=5).map("".join),
    after=st.text("\\ boxed1"),
)
def test_last_box_is_found_after_anything(before, box, after):
    assert last_box(before + r"\boxed{" + box + "}" + after) == box


# -- what is right --


@pytest.mark.parametrize(
    "response, answer, style, reason",
    [
        # neighbouring boxes: the last one, alone
        (r"\boxed{1}. \n\n\boxed{2}", "2", "boxed", None),
        (r"\boxed{2}. \n\n\boxed{1}", "2", "boxed", "wrong"),
        (r"\boxed{1}. \n\n\boxed{2}", r"\{1, 2\}", "boxed", "wrong"),
        (r"$\boxed{1}$, $\boxed{2}$", "1", "boxed", "wrong"),
        # e-notation, on either side and on both
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33", "boxed", None),
        (r"\boxed{4.5e33}", r"4.5 \times 10^{33}", "boxed", None),
        (r"\boxed{4.50E+33}", "4.5e33", "boxed", None),
        (r"\boxed{45 \cdot 10^{32}}", "4.5e33", "boxed", None),
        (r"\boxed{4.6e33}", "4.5e33", "boxed", "wrong"),
        (r"\boxed{1e3}", "1000", "boxed", None),
        (r"\boxed{-1.5e-2}", "-0.015", "boxed", None),
        (r"\boxed{.5e1}", "5", "boxed", None),
        (r"\boxed{2e}", "2 e", "boxed", None),
        (r"\boxed{2e}", "200", "boxed", "wrong"),
        # tiny numbers are numbers too
        (r"\boxed{4.6 \times 10^{-33}}", "4.5e-33", "boxed", "wrong"),
        (r"\boxed{0.00000002}", "1e-8", "boxed", "wrong"),
        (r"\boxed{0.0}", r"6.6 \times 10^{-34}", "boxed", "wrong"),
        (r"\boxed{45e-34}", "4.5e-33", "boxed", None),
        (r"\boxed{\frac{1}{10^8}}", "0.00000001", "boxed", None),
        (r"\boxed{0.0}", "0", "boxed", None),
        # the same number, the same thing
        (r"\boxed{27}", "27.0", "boxed", None),
        (r"\boxed{27.0}", "27", "boxed", None),
        (r"\boxed{27.}", "27", "boxed", None),
        (r"\boxed{27}", "27.0.", "boxed", None),
        (r"\boxed{23}", "023", "boxed", None),
        (r"\boxed{32348}", r"\$32,\!348", "boxed", None),
        (r"\boxed{\dfrac12}", "0.5", "boxed", None),
        (r"\boxed{1/2}", r"\frac{1}{2}", "boxed", None),
        (r"\boxed{0.333333}", "1/3", "boxed", None),
        (r"\boxed{0.3333}", "1/3", "boxed", "wrong"),
        (r"\boxed{10\%}", "0.1", "boxed", None),
        (r"\boxed{2,3}", r"\{3,2\}", "boxed", None),
        (r"\boxed{(3,2)}", "(2,3)", "boxed", "wrong"),
        (r"\boxed{(x-1)(x+1)}", "x^2-1", "boxed", None),
        (r"\boxed{x = 5}", "5", "boxed", None),
        (r"\boxed{\text{Evelyn}}", "Evelyn", "boxed", None),
        (r"\boxed{\frac{\sqrt{3}}{\frac{1}{2}}}", r"2\sqrt3", "boxed", None),
        (r"\boxed{ no  solution }", "no solution", "boxed", None),
        (r"\boxed{5}, I am sure", " 5\n", "boxed", None),
        # a set and the relation that describes it, either way round
        (r"\boxed{x \ge 3}", r"[3,\infty)", "boxed", None),
        (r"\boxed{[3,\infty)}", r"x \ge 3", "boxed", None),
        (r"\boxed{0<x<1}", "(0,1)", "boxed", None),
        (r"\boxed{x > 3}", r"[3,\infty)", "boxed", "wrong"),
        (r"\boxed{x \ge 3}", "3", "boxed", "wrong"),
        # any one of a list of answers
        (r"\boxed{28}", ["27", "28.0"], "boxed", None),
        (r"\boxed{27}", ["27", "28.0"], "boxed", None),
        (r"\boxed{29}", ["27", "28.0"], "boxed", "wrong"),
        (r"\boxed{27, 28}", ["27", "28.0"], "boxed", "wrong"),
        (r"\boxed{29}", [], "boxed", "wrong"),
        # plus or minus, wherever it stands
        (r"\boxed{\frac{1\pm\sqrt5}{2}}", r"\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}", "boxed", None),
        (r"\boxed{x=\frac{1\pm\sqrt5}{2}}", r"\frac{1\pm\sqrt{5}}{2}", "boxed", None),
        (r"\boxed{\frac{6\pm4\sqrt2}{2}}", r"3 \pm 2 \sqrt{2}", "boxed", None),
        (r"\boxed{\frac{1\pm\sqrt5}{2}}", r"\frac{1+\sqrt5}{2}", "boxed", "wrong"),
        # units with exponents and symbols
        (r"\boxed{3.0\times10^8\,\mathrm{m\,s^{-1}}}", r"3e8", "boxed", None),
        (r"\boxed{2.7\times10^{43}\ \mathrm{erg\ s^{-1}}}", r"2.7e43", "boxed", None),
        (r"\boxed{5\ \Omega}", r"5", "boxed", None),
        (r"\boxed{5\,\text{k}\Omega}", r"5", "boxed", None),
        (r"\boxed{2.5\,\mu\text{m}}", r"2.5", "boxed", None),
        (r"\boxed{4\,\mu\mathrm{m}}", r"4", "boxed", None),
        (r"\boxed{9.5\,M_\odot}", r"9.5", "boxed", None),
        (r"\boxed{1\ M_{\odot}}", r"1", "boxed", None),
        (r"\boxed{1.5\,\AA}", r"1.5", "boxed", None),
        (r"\boxed{1.54\ \mathring{A}}", r"1.54", "boxed", None),
        (r"\boxed{\sim 9.5}", r"9.5", "boxed", None),
        (r"\boxed{5^{\text{th}}}", r"5", "boxed", None),
        (r"\boxed{x^2\Omega}", r"x^2", "boxed", "wrong"),
        # a unit hides no second answer
        (r"\boxed{5\text{, 6}}", r"5", "boxed", "wrong"),
        (r"\boxed{5\text{ apples or 6}}", r"5", "boxed", "wrong"),
        (r"\boxed{5\text{ but maybe 6}}", r"5", "boxed", "wrong"),
        (r"\boxed{5\text{ through 100}}", r"5", "boxed", "wrong"),
        (r"\boxed{5\text{ [6] }}", r"5", "boxed", "wrong"),
        (r"\boxed{27\text{ m/s2}}", r"27", "boxed", None),
        (r"\boxed{27\text{ (square units)}}", r"27", "boxed", None),
        # repeating decimals
        (r"\boxed{0.\overline{3}}", r"\frac13", "boxed", None),
        (r"\boxed{\frac{4}{11}}", r"0.\overline{36}", "boxed", None),
        (r"\boxed{2.\overline{4}}", r"\frac{22}{9}", "boxed", None),
        (r"\boxed{\frac16}", r"0.1\overline{6}", "boxed", None),
        (r"\boxed{-.1\overline{6}}", r"-\frac16", "boxed", None),
        (r"\boxed{0.\overline{3}}", r"0.3", "boxed", "wrong"),
        (r"\boxed{0.1\overline{6}}", r"0.\overline{16}", "boxed", "wrong"),
        # the base of a number
        (r"\boxed{52_7}", r"52", "boxed", "wrong"),
        (r"\boxed{52_{10}}", r"52", "boxed", None),
        (r"\boxed{52_{10}}", r"52_8", "boxed", "wrong"),
        (r"\boxed{4343_{\text{seven}}}", r"4343_6", "boxed", "wrong"),
        (r"\boxed{4343_{\text{six}}}", r"4343_6", "boxed", None),
        (r"\boxed{4343}", r"4343_6", "boxed", None),
        # a union in words
        (r"\boxed{x<2\text{ or }x>3}", r"(-\infty,2)\cup(3,\infty)", "boxed", None),
        (r"\boxed{(-\infty,2)\cup(3,\infty)}", r"x<2 or x>3", "boxed", None),
        (r"\boxed{x<2\text{ or }x \ge 3}", r"(-\infty,2)\cup(3,\infty)", "boxed", "wrong"),
        (r"\boxed{x<2\text{ or }y>3}", r"(-\infty,2)\cup(3,\infty)", "boxed", "wrong"),
        (r"\boxed{x<2}", r"(-\infty,2)\cup(3,\infty)", "boxed", "wrong"),
        # about
        (r"\boxed{5 \approx 6}", r"5", "boxed", "wrong"),
        (r"\boxed{\frac{270}{7} \approx 38.57}", r"\frac{270}7", "boxed", None),
        (r"\boxed{x = \frac13 \approx 0.33}", r"\frac13", "boxed", None),
        (r"\boxed{x \approx 5}", r"5", "boxed", None),
        # what only looks
        (r"\boxed{\boldsymbol{204}}", r"204", "boxed", None),
        (r"\boxed{\underline{204}}", r"204", "boxed", None),
        (r"\boxed{\fbox{5}}", r"5", "boxed", None),
        (r"\boxed{\color{red}{5}}", r"5", "boxed", None),
        (r"\boxed{\Large 5}", r"5", "boxed", None),
        (r"\boxed{5\ }", r"5", "boxed", None),
        (r"\boxed{\text{no}}", r"No", "boxed", None),
        (r"\boxed{\text{no}}", r"Yes", "boxed", "wrong"),
        (r"\boxed{\bold{204}}", r"205", "boxed", "wrong"),
        # six digits of what is no integer
        (r"\boxed{3.14159}", r"\pi", "boxed", None),
        (r"\boxed{333.3333}", r"1000/3", "boxed", None),
        (r"\boxed{123456.78}", r"123456.7812", "boxed", None),
        (r"\boxed{3.1415}", r"\pi", "boxed", "wrong"),
        (r"\boxed{333.33}", r"1000/3", "boxed", "wrong"),
        (r"\boxed{1000000.5}", r"1000000", "boxed", "wrong"),
        (r"\boxed{1000001.0}", r"1000000", "boxed", "wrong"),
        # no answer
        ("The answer is 5.", "5", "boxed", "no_box"),
        (r"\boxed{5", "5", "boxed", "no_box"),
        ("", "5", "boxed", "no_box"),
        (r"\boxed{}", "5", "boxed", "parse_failure"),
        (r"\boxed{ }", "", "boxed", "parse_failure"),
        (r"\boxed{" + "(" * 100 + "}", "5", "boxed", "parse_failure"),
        ("\\boxed{\ud800}", "5", "boxed", "parse_failure"),
        ("\\boxed{\x00}", "5", "boxed", "parse_failure"),
        # think: exactly one closing tag, the box after it
        (r"so 5</think> \boxed{5}", "5", "think", None),
        (r"<think>so</think>\boxed{5}", "5", "think", None),
        (r"so 5 \boxed{5}", "5", "think", "no_think"),
        (r"a</think>b</think>\boxed{5}", "5", "think", "no_think"),
        (r"so \boxed{5}</think> 5", "5", "think", "no_box"),
        (r"\boxed{6}</think>\boxed{5}", "6", "think", "wrong"),
        (r"so</think> \boxed{5}", ["4", "5.0"], "think", None),
        (r"so 5 </think> \boxed{5}", "5", "boxed", None),
        # hash: the text after the last one
        ("8+6=14;14+4=18;#18", "18", "hash", None),
        ("#17#18 \n", "18", "hash", None),
        ("#18#17", "18", "hash", "wrong"),
        ("18", "18", "hash", "no_box"),
        ("#018", "18", "hash", "wrong"),
        ("#18;", "18", "hash", "wrong"),
        ("#18", ["17", "18"], "hash", None),
        ("#", "", "hash", None),
        ("", "", "hash", "no_box"),
    ],
)
def test_traps(judge, response, answer, style, reason):
    assert judge.submit([(response, answer, style)]).result() == [
        Verdict(float(reason is None), reason)
    ]


# box | gold, on which what is right and what is wrong hinges on more than math-verify
ACCEPTED = r"""
(x-1)(x+1) | x^2-1
4.5 \times 10^{33} | 4.5e33
1.2E5 | 120000
120000 | 1.2E5
10^{-5} | 1e-5
10^-5 | 1e-5
1e-5 | 10^{-5}
0.00001 | 1e-5
4.5 \cdot 10^{33} | 4.5e33
4.5*10^33 | 4.5e33
4.5 x 10^33 | 4.5e33
4.5×10^{33} | 4.5e33
-4.5e33 | -4.5 \times 10^{33}
6.6e-34 \text{ J s} | 6.6 \times 10^{-34}
6.6e-34 | 6.6e-34 \text{ J s}
6.6 \times 10^{-34} \, \text{J} \cdot \text{s} | 6.6e-34
(1e3, 2e3) | (1000,2000)
1e3, 2e3 | 2000, 1000
4.5\times10^{+33} | 4.5e33
x = 1e-8 | 10^{-8}
x = 1e-8 | x = 0.00000001
7.5 \times 10^7 | 75000000
45000000 | 4.5e7
1e-9, 2e-9 | \{0.000000002, 0.000000001\}
2,3 | \{3,2\}
\{3,2\} | 2,3
3, 2 | 2,3
x=1 \text{ or } x=2 | 1,2
x=1 or x=2 | 2,1
x=1,2 | 1,2
1 and 2 | 1,2
1 \text{ and } 2 | 2, 1
x = \pm 2 | 2,-2
\pm 2 | -2,2
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
x \in \{1, 2\} | 1,2
(2,3) | (2, 3)
(2.0,3) | (2,3)
2,3 | (2,3)
\left(3, \frac{\pi}{2}\right) | (3, \pi/2)
27 \text{ cm} | 27
27\text{ square units} | 27
27 square units | 27
27 cm | 27
27 | 27 \text{ cm}
27 | 27 cm
27.5 | 27.5\text{ cm}^2
27 \text{ cm}^{2} | 27
27\,\mathrm{cm^2} | 27
27~\mathrm{m/s} | 27
27 m/s | 27
$27$ | 27
\$27 | 27
27\$ | 27
27^\circ | 27
27^{\circ} | 27
27 | 27^\circ
27° | 27
27 degrees | 27^\circ
27\% | 27
0.27 | 27\%
27 percent | 27\%
62.5 | 62.5%
62.5\% | 62.5%
\frac{5}{8} | 62.5%
\text{27} | 27
\text{27 cm} | 27
\textbf{27} | 27
x = 27 | 27
x = 27 \text{ cm} | 27
27.0 | 27
27 | 27.0
32,348 | 32348
32{,}348 | 32348
32\,348 | 32348
32 348 | 32348
32348 | 32,\!348
32,348.50 | 32348.5
\$32,348.50 | 32348.5
11,111,111,100 | 11,\! 111,\! 111,\! 100
x = 5 | 5
S_n = 5 | 5
f(2) = 5 | 5
2 + 3 = 5 | 5
5=5 | 5
m+n = 5 | 5
x = 2+3 = 5 | 5
x = 2+3 = 5 | x=5
AB = 5 | 5
|AB| = 5 | 5
\angle ABC = 90^\circ | 90
P(A) = 5 | 5
x^2+y^2 = 25 | 25
a_1 + a_2 = 5 | 5
5 | x = 5
2x+3 | y=2x+3
y = 3+2x | y=2x+3
f(x) = 2 x | f(x)=2x
2x | f(x)=2x
(x,y) = (2,3) | (2,3)
x=2, y=3 | x=2,y=3
evelyn | \text{Evelyn}
Evelyn | \text{Evelyn}
\text{evelyn} | Evelyn
\textbf{Evelyn} | \text{Evelyn}
\text{(C)} | \text{(C)}
C | \text{(C)}
(C) | \text{(C)}
\text{C} | \text{(C)}
\mathrm{C} | C
No solution | \text{no solution}
\text{No} | No
\text{True} | True
\text{SRAC} = \text{LRAC} | SRAC=LRAC
52_8 | 52_{8}
52 | 52_8
\frac{1}{3} | 0.333333
0.166667 | \frac{1}{6}
5 \text{ million} | 5000000
2.5 million | 2500000
1\frac{4}{5} | 9/5
1 \frac{4}{5} | 1.8
\frac{9}{5} | 1\frac{4}{5}
\dfrac12 | 0.5
10^{200}+1 | 1+10^{200}
\frac{d !}{2 k(d-k) !} | \frac{d!}{2k(d-k)!}
e^{it}\frac{4A}{3+3i} | \frac{4A}{3+3i}e^{it}
-1/3 | -\frac13
\frac{-1}{3} | -\frac{1}{3}
[-2,7] | x \in [-2,7]
x \in [-2,7] | [-2,7]
(-\infty, 0] | (-\infty,0]
(2,12) \cup (12,102) | (2,12)\cup(12,102)
(12,102) \cup (2,12) | (2,12)\cup(12,102)
[2,\infty) | k \geqslant 2
k \ge 2 | k \geqslant 2
2 \le k | k \geqslant 2
\{1-\sqrt5, 1+\sqrt5, -2\} | \{1\pm\sqrt{5},-2\}
\begin{pmatrix} -0.5 \\ 2 \end{pmatrix} | \begin{pmatrix} -1/2 \\ 2 \end{pmatrix}
\begin{bmatrix} -1/2 \\ 2 \end{bmatrix} | \begin{pmatrix} -1/2 \\ 2 \end{pmatrix}
\approx 27 | 27
3 \mathrm{e}^{2} | 3e^2
\frac{270}{7} | \frac{270}7\text{ degrees}
2 \cdot 3 | 6
x=-\frac{5}{2} \quad\text{or}\quad x=3 | 3, -5/2
18.90 | \$18.90
5.4 | 5.4 \text{ cents}
15000 | 15000 \text{ kcal m}^{-2} \text{yr}^{-1}
4.4677 \times 10^{14} Hz | 4.4677e14
0.003 | 0.003^{\prime \prime}
1950 | 1950^\circ C
f(x)=x, f(x)=2-x | f(x)=2-x, f(x)=x
(1,2),(3,4) | (3,4),(1,2)
\{(1,2),(3,4)\} | (3,4),(1,2)
\frac{a}{b} = 5 | 5
27\text{ ways} | 27
27 apples | 27
27. | 27
27\text{.} | 27
\emptyset | \{\}
\infty | +\infty
100\pi\text{ cm}^2 | 100\pi
a | A
3 4/5 | 3.8
3x+2y=5 | 2y+3x-5=0
(x, y) = (2, 3) | x=2,y=3
"""

REFUSED = r"""
2e-8 | 1e-8
2 \times 10^{-8} | 0.00000001
0 | 6.6e-34
0.0 | 6.6e-34 \text{ J s}
6.6e-34 | 0
6.6e-34 | 0.0
2e-8 \text{ cm} | 1e-8 \text{ cm}
(2e-8, 3) | (1e-8, 3)
2e-8, 3 | 1e-8, 3
\{2e-8, 3\} | \{1e-8, 3\}
x = 2e-8 | x = 1e-8
x = 2e-8 | 1e-8
2e-8 | x=1e-8
[0, 2e-8] | [0,1e-8]
(0, 2e-8) | (0,1e-8)
\begin{pmatrix} 2e-8 \\ 1 \end{pmatrix} | \begin{pmatrix} 1e-8 \\ 1 \end{pmatrix}
2 \times 10^{-20} x | 10^{-20} x
2 \times 10^{-20} x | 1.0 \times 10^{-20} x
0.0012344 | 0.001234
10^{200}+1 | 10^{200}
2^{1009}+1 | 2^{1009}
(3,2) | (2,3)
3,2 | (2,3)
5 or 6 | 5
5 \text{ or } 6 | 5
1,2,3,4,5 | 5
\{4,5\} | 5
x=4 or x=5 | 5
\pm 5 | 5
1,2 | 1,2,3
1,2,3 | 1,2
5,5,5,6 | 5,6
28 \text{ cm} | 27 \text{ cm}
28 \text{ cm} | 27
28^\circ | 27^\circ
0.1\% | 10\%
10\% | 1000
1 = 2 = 5 | 5
4 = 5 | 5
x = 4 = 5 | 5
2 + 2 = 5 | 5
x + 3 = 5 | 5
2x = 5 | 5
x = 5 = 6 | 5
5 = 6 | 5
6 = 5 | 5
1 = x | 5
y = 5 | x = 5
x = 1 = 5 | x=5
1=2=5 | x=5
nylevE | Evelyn
nylevE | \text{Evelyn}
\text{nylevE} | Evelyn
E*v*e*l*y*n | Evelyn
E*v*e*l*y*n | \text{Evelyn}
E \cdot v \cdot e \cdot l \cdot y \cdot n | \text{Evelyn}
\text{odd} | \text{even}
e v e n | \text{even}
CARS=CARL | SRAC=LRAC
x > 5 | 5
x \ge 5 | 5
x \neq 5 | 5
(4,5) | 5
[5,\infty) | 5
4<x<5 | 5
x<5 | x>5
x \le 5 | x<5
\infty | 5
-\infty | \infty
\infty - \infty | 0
0 \cdot \infty | 0
\frac{1}{0} | 5
\frac{1}{0} | \infty
\frac{0}{0} | 0
\emptyset | 0
\{\} | 5
\text{True} | 1
1 \subset 2 | 1
2 3 | 5
2 3 | 6
2(3) | 5
52_{8} | 52
52_7 | 52_8
52_7 | 52_{8}
4210_6 | 4210_{5}
5 \text{ million} | 5
\frac{1}{m} | \frac{1}{m}t
\frac{1}{2} | \frac{1}{2}t
2 | 2k
2 | 2 t
2n | 2
x | x^2
m^2/r^2 | mM/r^2
5 \text{ not } 6 | 6
5 \text{ if } x | 5
\text{not } 5 | 5
5! | 5
5? | 5
5 x | 5
5 \cdot 6 | 5
-5 | 5
5_ | 5
5, \ldots | 5
\ldots, 5 | 5
1, 2, \ldots, 5 | 1,2,5
5 \approx 6 | 6
11/2 | 1 \frac{1}{2}
1\frac12 | 11/2
12 | 1 2
1.5 | 1,5
(2,3) | [2,3]
[2,3) | (2,3)
__import__("os").system("touch /tmp/x") | 5
x \to 5 | 5
x := 5 | 6
5 \to 6 | 6
5 \pmod{7} | 6
\text{5 or 6} | 5
5/6 | 5
5:6 | 5
5;6 | 5
a=5, b=6 | 5
c = a = 6 | 5
\sqrt{-1} | 1
\text{answer} | 5
answer = 6 | 5
27 \text{ is not } 28 | 28
27\text{ or }28 | 28
3.61e-10 | 3.62e-10
1e400 | 1e401
1e9999 | 1e9998
3 \text{ or more} | 3
\frac{\pi}{6} | 30^\circ
3 4/5 | 3
5\text{ dozen} | 60
9:30 | 10:30
"""


@pytest.mark.parametrize(
    "block, right", [(ACCEPTED, 1.0), (REFUSED, 0.0)], ids=["accepted", "refused"]
)
def test_more_traps(judge, block, right):
    traps = [line.split(" | ") for line in block.strip().splitlines()]
    assert len(traps) > 100
    assert [trap for trap, got in zip(traps, rewards(judge, traps)) if got != right] == []


@pytest.mark.parametrize("rule", grader.RULES, ids=lambda rule: rule.example)
def test_a_rule_does_what_stands_beside_it(rule):
    assert re.sub(rule.pattern, rule.to, rule.example) == rule.becomes


@pytest.mark.parametrize(
    "alike",
    [
        [
            "27",
            "27.0",
            " 27 ",
            "$27$",
            "27\\text{ cm}",
            "27.",
            "\\text{27}",
            "027",
            "27^\\circ",
            "\\$27",
        ],
        [r"\dfrac{1}{2}", r"\frac12", r"\frac{1}{2}", "1/2", r"$\tfrac{1}{2}$"],
        [".5", "0.5", "0.50"],
        ["4.5e33", r"4.5 \times 10^{33}", "4.5*10^33", r"4.50 \cdot 10^{33}"],
        ["32,348", "32{,}348", r"32\,348", "32348"],
        [r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"],
        ["No solution", r"\text{no solution}"],
        ["x^{2}", "x^2"],
        [r"1\frac{1}{2}"],
        ["11/2"],
        ["12"],
        ["1 2"],
        ["-1/2", r"-\frac{1}{2}", r"\frac{-1}{2}"],
        ["2n"],
        ["2N"],
        ["1,2"],
        ["1.2"],
        [r"10\%"],
        ["10", "10.00"],
        [r"52_8"],
        [r"52_7"],
        ["100"],
        ["(1,2)"],
        ["[1,2]"],
        ["1e-8"],
        ["2e-8"],
        [""],
    ],
)
def test_canonical(alike):
    """One text for one answer, and none shared with what is something else."""
    assert len({canonical(text) for text in alike}) == 1
    assert [canonical(text) for text in (canonical(alike[0]), canonical(canonical(alike[0])))] == [
        canonical(alike[0])
    ] * 2
    CANONICAL.setdefault(canonical(alike[0]), alike)
    assert CANONICAL[canonical(alike[0])] == alike


CANONICAL = {}


@pytest.mark.parametrize(
    "response, style, final",
    [
        (r"\boxed{1} \boxed{ 2 }", "boxed", " 2 "),
        ("2", "boxed", None),
        (r"\boxed{1}</think>\boxed{2}", "think", "2"),
        (r"\boxed{1}</think>2", "think", None),
        (r"\boxed{1}", "think", None),
        (r"</think></think>\boxed{1}", "think", None),
        ("#1# 2 ", "hash", "2"),
        ("2", "hash", None),
    ],
)
def test_final_answer(response, style, final):
    assert final_answer(response, style) == final


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.text("\\{}$^_,. 0123456789eEx*textcmandor", max_size=300))
def test_canonical_takes_any_text(text):
    canonical(text)


@pytest.fixture(scope="module")
def golds(tmp_path_factory):
    """Every benchmark's answers, {name: [list of acceptable answers, ...]}."""
    folder = benchmark_folder(tmp_path_factory.mktemp("data"))
    load = {
        name: data.load_problems(folder / "benchmarks" / f"{name}.jsonl")
        for name in data.BENCHMARKS
    }
    return {
        name: [p["answer"] if isinstance(p["answer"], list) else [p["answer"]] for p in problems]
        for name, problems in load.items()
    }


def rewards(judge, pairs):
    return [
        v.reward
        for v in judge.submit(
            [(rf"So \boxed{{{box}}}.", gold, "boxed") for box, gold in pairs]
        ).result()
    ]


def number(text):
    """The number that a gold is, in plain Python, or None."""
    text = re.sub(r"\\text\{[^}]*\}|\\mbox.*|\^\{?\\circ\}?|\\%|\\!|[$\s,]|%", "", text).replace(
        r"\dfrac", r"\frac"
    )
    text = re.sub(r"^(-?)\\frac\{?(\d+?)\}?\{?(\d+)\}?$", r"\1\2/\3", text)
    text = re.sub(
        r"^(?:x|k|n|N)=|(?<=\d)\\times(?=10)", lambda match: "" if "=" in match[0] else "e", text
    )
    text = re.sub(r"e10\^\{?(-?\d+)\}?", r"e\1", re.sub(r"^10\^\{?(-?\d+)\}?$", r"1e\1", text))
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def really_equal(one, other):
    """By other means than those of reward.py."""
    bare = [
        re.sub(r"[\s${}]|\\(?:left|right)|^[xkn]=", "", text).replace("dfrac", "frac").rstrip(".")
        for text in (one, other)
    ]
    return bare[0] == bare[1] or None is not number(one) == number(other)


def test_golds_are_right_as_they_stand_and_in_other_words(judge, golds):
    r"""All 1,679 as they stand, each against itself and against all that its problem accepts.
    The distinct ones once more by math-verify and not as text: with + 0 where there is a number."""
    for name, answers in golds.items():
        alone = rewards(judge, [(gold, gold) for answer in answers for gold in answer])
        listed = rewards(judge, [(gold, answer) for answer in answers for gold in answer])
        assert alone == listed == [1.0] * sum(map(len, answers)), name
    distinct = sorted({gold for answers in golds.values() for answer in answers for gold in answer})
    reword = [
        lambda gold: gold.replace(r"\frac", r"\dfrac").replace(r"\times", r"\cdot"),
        lambda gold: gold if "." in gold[-2:] else gold + ".",
        lambda gold: gold if "$" in gold else f"${gold}$",
        lambda gold: re.sub(r"([+=])", r" \1 ", gold),
        lambda gold: (
            gold.replace("(", r"\left(").replace(")", r"\right)")
            if "left" not in gold and "]" not in gold
            else gold
        ),
        lambda gold: (
            gold + r"\text{ cm}"
            if number(gold) is not None and not re.search("[a-z%]", gold)
            else gold
        ),
        lambda gold: (
            gold[:-2]
            if gold.endswith(".0")
            else gold + ".0"
            if re.fullmatch(r"-?\d+", gold)
            else gold
        ),
    ]
    pairs = [
        (words, gold)
        for gold in distinct
        for words in sorted({change(gold) for change in reword} - {gold})
    ]
    assert len(pairs) > 500
    assert [pair for pair, got in zip(pairs, rewards(judge, pairs)) if got != 1] == []
    work = [
        (f"{gold}+0", gold)
        for gold in distinct
        if number(gold) is not None and not re.search(r"[^\d.$-]", gold)
    ]
    work = [(box.replace("$+0", "+0$"), gold) for box, gold in work][:150]
    assert (
        len(work) > 50 and [pair for pair, got in zip(work, rewards(judge, work)) if got != 1] == []
    )


def test_another_problems_answer_is_wrong(judge, golds):
    """Of every third problem: another's of its benchmark, and the number one above."""
    rng, pairs = random.Random(0), []
    for answers in golds.values():
        for i, answer in list(enumerate(answers))[::3]:
            other = rng.choice([j for j in range(len(answers)) if j != i])
            pairs.append((rng.choice(answers[other]), answer))
            pairs += [
                (str(int(gold) + 1), [gold]) for gold in answer if re.fullmatch(r"-?\d+", gold)
            ]
    pairs = [
        (box, answer)
        for box, answer in pairs
        if not any(really_equal(box, gold) for gold in answer)
    ]
    assert len(pairs) > 500
    assert [pair for pair, got in zip(pairs, rewards(judge, pairs)) if got] == []


def test_long_responses_are_read(judge):
    """One that is read in more than linear time is not read before this test's patience ends."""
    items = [
        ("think \\ { " * 500_000 + r"\boxed{27}", "27.0", "boxed"),
        (r"\boxed{" * 200_000, "1", "boxed"),
        ("{" * 10**6 + "}" * 10**6 + r"\boxed{27.0}", "27", "boxed"),
        (r"\boxed{" + "1+" * 500_000 + "1}", "500001", "boxed"),
        ("#" * 10**6, "", "hash"),
    ]
    found = [verdict.reason for verdict in judge.submit(items).result(300)]
    assert found == [None, "no_box", None, "parse_failure", None]


# -- an answer always comes --


def test_reward_from_the_main_thread_and_from_others():
    """math-verify itself raises off the main thread, which has scored whole runs 0."""
    asked = [
        (r"\boxed{20 + 7}", "27.0"),
        (r"\boxed{28}", "27.0"),
        (r"\boxed{1/2}", ["2", r"\frac12"]),
    ]
    assert [reward(*pair) for pair in asked] == [1.0, 0.0, 1.0]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: reward(*asked[i % 3])}))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {i: [1.0, 0.0, 1.0][i % 3] for i in range(12)}


ROWS = r"\\".join("&".join(["1"] * 100) for _ in range(18))
HOSTILE = [
    TOWER,
    r"\boxed{10000000!}",
    r"\boxed{\binom{10^9}{5 \cdot 10^8}}",
    r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k^3}}",
    r"\boxed{\lim_{x\to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^7}}",
    r"\boxed{\begin{pmatrix}" + ROWS + r"\end{pmatrix}}",
    r"\boxed{" + "9" * 4000 + "}",
    r"\boxed{\sqrt[10^9]{2}}",
    r"\boxed{" + "(" * 2000 + "1" + ")" * 2000 + "}",
    r"\boxed{" + r"\frac{1}{" * 400 + "1" + "}" * 400 + "}",
    r"\boxed{\operatorname{zeros}(10^5, 10^5)}",
    r"\boxed{" * 150_000,
    "x" * 10**6 + r"\boxed{20 + 7}",
    "{" * 10**6,
    "\\boxed{\0\ud800 5}",
    r"\boxed{" + r"1\text{a}" * 400 + "}",
    r"\boxed{\int_0^1 x^{x^x} dx}",
]


def test_no_hostile_text_is_right_or_outlasts_its_time():
    with Judge(workers=2, timeout=2) as judge:
        judge.start()
        batches = [judge.submit([(text, "5", "boxed")]) for text in HOSTILE]
        verdicts = [batch.result(300)[0] for batch in batches]
    assert [v.reward for v in verdicts] == [0.0] * len(HOSTILE)
    assert verdicts[0].reason == "timeout"


@pytest.mark.parametrize("hostile", ["x" * 10**6 + TOWER, "{" * 10**6])
def test_reward_answers_in_time(hostile):
    """Altogether, with the start of a worker: the one before was killed."""
    assert module.TIMEOUT < module.CALL_TIMEOUT < 10
    assert reward(hostile, "5") == 0.0


def test_no_text_is_evaluated(judge, tmp_path):
    """Neither by sympify() nor by parse_expr(), which end in eval()."""
    mark = tmp_path / "evaluated"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    for text in (
        code,
        rf"\text{{{code}}}",
        f"1+{code}",
        rf"\operatorname{{exec}}({code})",
        f"x_{{{code}}}",
        f"$${code}$$",
        rf"\operatorname{{gcd}}({code}, 2)",
        rf"1\%{code}",
        f"5, {code}",
        rf"\frac{{{code}}}{{2}}",
        f"1e5{code}",
    ):
        assert rewards(judge, [(text, "5"), ("5", text), (text, f"{text} + 0")])[:2] == [0.0, 0.0]
    code = "import sympy; from infra import grader; grader.load(); sympy.sympify('1 + 1')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert not mark.exists() and "never evaluated" in done.stderr


def test_start_starts_the_workers():
    with Watched(workers=2, timeout=20) as judge:
        judge.start()
        first = judge.pids()
        judge.start()
        assert (
            len(first) == 2
            and rewards(judge, [("20 + 7", "27.0")]) == [1.0]
            and judge.pids() == first
        )
    with pytest.raises(RuntimeError, match="closed"):
        judge.start()


def test_the_same_request_is_judged_once():
    """A hang of a whole group costs one timeout and its worker, and every index gets its own
    verdict."""
    with Watched(workers=1, timeout=3) as judge:
        judge.start()
        first = judge.pids()
        items = [
            (TOWER, "5", "boxed"),
            SUM,
            (r"\boxed{1 + 1}", "3", "boxed"),
            (TOWER, ["5"], "boxed"),
        ] * 50
        verdicts = judge.submit(items).result(250)  # 100 timeouts would be 300
        assert (
            verdicts
            == [Verdict(0.0, "timeout"), RIGHT, Verdict(0.0, "wrong"), Verdict(0.0, "timeout")] * 50
        )
        assert not set(first) & set(judge.pids()), "the hung process lives on"


@pytest.mark.parametrize(
    "arguments",
    [
        (None, "5"),
        (5, "5"),
        (r"\boxed{5}", None),
        (r"\boxed{5}", 5),
        (r"\boxed{5}", [5]),
        (r"\boxed{5}", "5", "nope"),
        (b"\\boxed{5}", "5"),
        (r"\boxed{5}", "5", None),
        (r"\boxed{5}", "5", ["boxed"]),
    ],
)
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
    batches = [
        judge.submit([(rf"\boxed{{{i} + 0}}", str(i // 2 * 2), "boxed") for i in range(60)])
        for _ in range(3)
    ]
    assert [[v.reward for v in batch.result()] for batch in batches] == [[1.0, 0.0] * 30] * 3


def test_a_stopped_worker_is_replaced():
    with Watched(workers=1, timeout=5) as judge:
        judge.submit([SUM]).result()
        os.kill(judge.started()[0], signal.SIGSTOP)
        assert judge.submit(sums(3)).result(120) == [Verdict(0.0, "timeout"), RIGHT, RIGHT]


def test_a_killed_worker_is_replaced_and_its_item_judged_again():
    with Watched(workers=2, timeout=60) as judge:
        judge.submit(sums(20)).result()
        for pid in judge.started():
            os.kill(
                pid, signal.SIGSTOP
            )  # so that the kill below hits them with an item each in hand
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
            while (
                sum(map(int, Path(f"/proc/{worker}/stat").read_text().split()[13:15])) < 200
            ):  # clock ticks of 10 ms
                time.sleep(0.02)  # until it computes: importing takes less
            judge.others.add(worker)
            os.kill(worker, signal.SIGKILL)
        assert batch.result(60) == [Verdict(0.0, "crash"), RIGHT]


def test_worker_limits_and_ctrl_c():
    with Watched(workers=1, timeout=20) as judge:
        assert rewards(judge, [("20 + 7", "27.0")]) == [1.0]
        worker = judge.started()[0]
        memory = re.search(r"Max address space\s+(\d+)", Path(f"/proc/{worker}/limits").read_text())
        assert int(memory[1]) == grader.WORKER_MEMORY
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


def test_close_without_waiting_drops_the_work():
    judge = Judge(workers=1, timeout=1000)
    batch = judge.submit([(TOWER, "5", "boxed"), SUM])
    judge.close(wait=False)
    with pytest.raises(RuntimeError, match="closed"):
        batch.result(300)


def test_a_script_ends_though_its_judges_were_not_closed(tmp_path):
    """Amid work that would take 1000 s."""
    done = script(
        tmp_path,
        r"""
from reward import Judge, reward
print(reward(r"\boxed{20 + 7}", "27"))
judge = Judge(1, 1000)
judge.start()
judge.submit([(r"\boxed{9^{9^{9^{9^9}}}}", "5", "boxed"), (r"\boxed{20 + 7}", "27", "boxed")])
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0\n", "")


def test_text_needs_no_process():
    before = set(pids())
    with Judge() as judge:
        batch = judge.submit(
            [("#18", "18", "hash"), (r"\boxed{5}", "5", "boxed"), ("5", "5", "boxed")]
        )
        assert batch.done() and set(pids()) == before


# -- other people's scripts --


def test_a_script_without_main_guard_and_its_forks(tmp_path):
    """Modules beside reward.py are not the worker's, and nothing but the script itself prints."""
    for name in ("math_verify", "sympy", "antlr4"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    done = script(
        tmp_path,
        r"""
import os
from reward import Judge, reward
print(reward(r"\boxed{20 + 7}", "27.0"), reward(r"\boxed{28}", "27.0"), flush=True)
if os.fork() == 0:  # the parent's threads are not here
    print(reward(r"\boxed{20 + 7}", "27.0"), reward(r"\boxed{28}", "27.0"), flush=True)
    os._exit(0)
os.wait()
print(Judge(1, 1.5).submit([(r"\boxed{9^{9^{9^{9^9}}}}", "5", "boxed")]).result()[0].reason)
""",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1.0 0.0\n1.0 0.0\ntimeout\n", "")


def test_workers_die_with_their_parent(tmp_path):
    """Even amid something that never ends, when the parent had no chance to clean up."""
    done = script(
        tmp_path,
        rf"""
import os, signal, sys, time
sys.path += [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_reward import TOWER, Watched, sums
judge = Watched(2, 100)
judge.submit(sums(50)).result()
judge.submit([(TOWER, "5", "boxed"), (TOWER, "6", "boxed")])
time.sleep(1)
print(*judge.started(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
""",
    )
    workers = done.stdout.split()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(
        Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
        for pid in workers
    ):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


def test_no_math_verify_is_an_error_not_a_wrong_answer(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "math_verify.py").write_text("raise ImportError('no antlr here')")
    done = script(
        tmp_path,
        r"""
from reward import Judge, reward
try:
    Judge(1).start()
except RuntimeError as error:
    print("start:", error)
try:
    Judge(1).submit([(r"\boxed{20 + 7}", "27.0", "boxed")] * 3).result()
except RuntimeError as error:
    print(error)
print(reward(r"\boxed{20 + 7}", "27.0"))
""",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "broken")},
    )
    assert (
        done.stdout.count("no antlr here") == 2
        and done.stdout.startswith("start: no worker")
        and "is math-verify" in done.stdout
        and done.stdout.endswith("\n0.0\n")
    )
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
        items = [
            (text, ["7", "8"], "my_own_rewards:grade") for text in ("all", "half", "neither", "")
        ]
        verdicts = judge.submit(
            [*items, ("all", "7", "my_own_rewards:grade"), (r"\boxed{7.0}", "7", "boxed")]
        ).result()
    assert verdicts == [
        (1.0, None),
        (0.5, "wrong"),
        (-1.0, "wrong"),
        (-1.0, "wrong"),
        (0.0, "wrong"),
        (1.0, None),
    ]


def test_an_own_function_that_fails_is_no_verdict(mine):
    """What raises or is no number stops the run and says why; what hangs is cut off."""
    with Judge(1, timeout=2) as judge:
        for text, why in (("raise", "KeyError"), ("nan", "nan is no reward")):
            with pytest.raises(RuntimeError, match=f"my_own_rewards:grade failed: .*{why}"):
                judge.submit([(text, "7", "my_own_rewards:grade")]).result()
        assert judge.submit([("hang", "7", "my_own_rewards:grade")]).result() == [(0.0, "timeout")]
        assert judge.submit([("all", ["7", "8"], "my_own_rewards:grade")]).result() == [(1.0, None)]


@pytest.mark.parametrize(
    "function, why",
    [
        ("absent_module:f", "No module named"),
        ("my_own_rewards:absent", "no attribute"),
        ("my_own_rewards:three", "no function"),
    ],
)
def test_no_such_function(mine, function, why):
    with pytest.raises(ValueError, match=why):
        own(function)


def test_an_own_function_is_tried_before_it_is_needed(mine):
    try_own("my_own_rewards:grade", "7")
    with pytest.raises(ValueError, match="No module"):
        try_own("absent_module:f", "7")


@pytest.mark.parametrize("text, found", [("But WAIT,", True), ("a root cause", True), ("5", False)])
def test_reflects(text, found):
    assert reflects(text) is found
