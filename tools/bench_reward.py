"""How many responses a second are judged: a Judge, and math-verify alone in one thread.

python tools/bench_reward.py [--responses 2048] [--workers 2], with the golds of $REMIX_DATA.
"""

import argparse
import json
import logging
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reward import Judge


def make(count: int, rng: random.Random) -> list[tuple[str, str | list[str], str]]:
    """Responses of about 8k tokens. Half are right, half give another problem's answer."""
    files = sorted((Path(os.environ["REMIX_DATA"]) / "benchmarks").glob("*.jsonl"))
    golds = [json.loads(line)["answer"] for path in files for line in path.read_text().splitlines()]
    line = r"We have $x^2 + \frac{a}{b} = 4.5 \cdot 10^3$, so that {n} of the pairs remain; "
    line += "let me check that again. "
    items = []
    for i in range(count):
        answer, other = rng.sample(golds, 2)
        box = answer if i % 2 else other
        box = box if isinstance(box, str) else box[0]
        box = box.replace(r"\frac", r"\dfrac").replace(r"\times", r"\cdot")
        text = "".join(line.replace("{n}", str(rng.randint(2, 10**6))) for _ in range(300))
        items.append((text + rf"Therefore the answer is $\boxed{{ {box} }}$.", answer, "boxed"))
    return items


def plain_math_verify(items):
    from math_verify import parse, verify

    for response, answer, _ in items:
        golds = [answer] if isinstance(answer, str) else answer
        try:
            found = parse(response)
            yield (any(verify(parse(rf"\boxed{{{gold}}}"), found) for gold in golds),)
        except Exception:  # its timeouts among them
            yield (False,)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    items = make(args.responses, random.Random(0))
    with Judge(args.workers) as judge:
        judge.start()
        for name, run in (
            (f"Judge, {args.workers} workers", lambda: judge.submit(items).result()),
            ("plain math-verify", lambda: plain_math_verify(items)),
        ):
            began = time.perf_counter()
            right = sum(verdict[0] for verdict in run()) / len(items)
            rate = len(items) / (time.perf_counter() - began)
            print(f"{name:<20} {rate:8.1f} judgements/s   {right:6.1%} right")


if __name__ == "__main__":
    main()
