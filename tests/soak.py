"""Train the embedded default for an hour on two ranks and see what grows: `make soak`, or `python tests/soak.py --minutes 5 --out FOLDER`.

Every few seconds: memory and open files of every process of the run (torchrun, ranks, reward workers), from /proc. Reports, for each, the
slope over training steps by least squares after a warm-up, and checks that metrics.jsonl is strict JSON, a line a step. What counts is
anonymous memory (heaps): resident and proportional (PSS) have the libraries in them, of which PSS shares out more when others' programs end.
Exit code 1 where a rank grows by more than --most MB per 1,000 steps or any process by an open file.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from conftest import Running, metrics_of


def family(pid):
    """Process ids of a process and all that it started."""
    found = [pid]
    for parent in found:
        for thread in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, thread.read_text().split())
    return found


def look(pid):
    """(name, anonymous memory, PSS, RSS (MB), open files) of a process."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    rank = next((entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")), None)
    name = (
        "torchrun"
        if rank is None
        else f"rank {rank}"
        if any(word.endswith("train.py") for word in words)
        else f"{words[0][:12]} of rank {rank}"
    )
    name = f"reward worker of rank {rank}" if "--worker" in words else name
    memory = {
        line.split()[0]: int(line.split()[1]) / 1024
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    }
    return (
        name,
        memory["Anonymous:"],
        memory["Pss:"],
        memory["Rss:"],
        len(os.listdir(f"/proc/{pid}/fd")),
    )


def slope(points):
    """Least squares: y per x of [(x, y), …]."""
    n, mean_x, mean_y = (
        len(points),
        sum(x for x, _ in points) / len(points),
        sum(y for _, y in points) / len(points),
    )
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if n > 1 and spread else 0.0


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=5, help="seconds between looks")
    parser.add_argument(
        "--warm_up", type=float, default=0.2, help="share of the looks that the slopes leave out"
    )
    parser.add_argument(
        "--most", type=float, default=5, help="MB that a rank may grow by in 1,000 steps"
    )
    parser.add_argument("--out", default="runs/soak")
    parser.add_argument("flags", nargs="*", help="of train.py, after --")
    args = parser.parse_args()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    run = Running(
        out.parent / f"{out.name}.log",
        "train.py",
        "--steps",
        100_000,
        "--prompts",
        20,
        "--minibatch",
        10,
        "--reincarnate",
        0,
        "--save_every",
        50,
        "--eval_every",
        50,
        "--eval_k",
        1,
        *args.flags,
        "--out",
        out,
        ranks=2,
    )
    run.wait_for("step    1/")
    looks = open(
        out.parent / f"{out.name}.looks.jsonl", "w"
    )  # every look: [time, process, name, step, anonymous, PSS, RSS, files]
    seen, end = (
        {},
        time.monotonic() + 60 * args.minutes,
    )  # (process, name) -> [(step, anonymous, PSS, RSS, files), …]
    while time.monotonic() < end and run.process.poll() is None:
        step = metrics_of(out, unfinished=True)[-1]["step"]
        for pid in family(run.pid):
            try:
                name, *numbers = look(pid)
            except OSError:  # ended, or just begun
                continue
            seen.setdefault((pid, name), []).append((step, *numbers))
            looks.write(json.dumps([round(time.time(), 1), pid, name, step, *numbers]) + "\n")
        looks.flush()
        time.sleep(args.every)
    ended = run.process.poll()
    if ended is None:
        os.kill(run.pid, signal.SIGTERM)
        run.end()
    lines = metrics_of(out)
    fine = (
        ended is None
        and [line["step"] for line in lines] == list(range(len(lines)))
        and "--resume goes on" in run.text
    )
    print(
        f"{lines[-1]['step']} steps in {args.minutes:g} minutes; metrics.jsonl: {len(lines)} lines, strict JSON; ended as asked: {ended is None}"
    )
    print(
        f"{'MB':<28} {'looks':>6} {'steps':>13} {'anonymous':>10} {'PSS':>8} {'RSS':>8} {'anonymous / 1,000 steps':>24} {'PSS':>8} {'RSS':>8} {'files':>9}"
    )
    for (_, name), rows in sorted(seen.items(), key=lambda item: item[0][1]):
        rows = rows[int(args.warm_up * len(rows)) :]
        anonymous, pss, rss, files = (
            1000 * slope([(row[0], row[i]) for row in rows]) for i in (1, 2, 3, 4)
        )
        fine &= not (len(rows) > 10 and files > 0.5 and rows[-1][4] > rows[0][4]) and not (
            name[:5] == "rank " and anonymous > args.most
        )
        print(
            f"{name:<28} {len(rows):>6} {rows[0][0]:>5} - {rows[-1][0]:>5} {rows[-1][1]:>10.1f} {rows[-1][2]:>8.1f} {rows[-1][3]:>8.1f} {anonymous:>24.2f} "
            f"{pss:>8.2f} {rss:>8.2f} {min(row[4] for row in rows):>4} -{max(row[4] for row in rows):>3}"
        )
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
