"""Many runs under one budget of fresh rollouts, and what came out of them as a table and a picture.

    python compare.py        every algorithm, learning rate and seed on the embedded default: runs/compare/table.md and
                             compare.png. Run it again and it goes on with what is missing.
    python compare.py demo   ReMix-PPO against PPO in minutes: runs/demo-N/demo.png

Every row gets the same number of learning rates, so that no algorithm is tuned more than another, and all are shown.
A run is measured by the fresh rollouts after which its evaluation accuracy reaches the target.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from infra.config import parse, schedule, total_rollouts
from tools import plot

ROOT = Path(__file__).resolve().parent.parent
ROWS = (
    "ppo",
    "ppo --utd 2",
    "grpo",
    "grpo --utd 2",
    "mix-ppo",
    "mix-grpo",
    "remix-ppo",
    "remix-grpo",
)
EVAL_ROLLOUTS = 256  # about so many fresh rollouts between two evaluations
MACHINE = {
    "out",
    "resume",
    "max_gap",
    "micro_tokens",
    "chunk_tokens",
    "engine_memory",
    "reward_workers",
    "dtype",
    "rollout_dtype",
    "template",
    "style",
}  # no settings, or resolved when the run starts
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}  # runs side by side on few cores; quiet


# Measuring: pure functions of what a run recorded.


def rollouts_to_target(points, target):
    """Fresh rollouts at the first evaluation whose centred 3-point mean accuracy reaches `target`; None if none does.

    points: [(fresh rollouts so far, accuracy)] in order. At both ends the mean is over the points there are; elsewhere
    this looks one evaluation ahead, for every algorithm alike.
    """
    for i, (rollouts, _) in enumerate(points):
        near = [accuracy for _, accuracy in points[max(i - 1, 0) : i + 2]]
        if sum(near) / len(near) >= target - 1e-9:
            return rollouts
    return None


def summary(run, target):
    """The figures of one run (from plot.load_run). "accuracy" and "length" are means of its last 3 evaluations."""
    points = plot.series(run, "total_rollouts", "eval_accuracy")
    lengths = plot.series(run, "total_rollouts", "eval_length_mean")

    def last(values):
        return statistics.fmean(y for _, y in values[-3:]) if values else math.nan

    return dict(
        points=points,
        rollouts=rollouts_to_target(points, target),
        accuracy=last(points),
        length=last(lengths),
        seconds=sum(row.get("seconds_step") or 0 for row in run["metrics"]),
    )


def median_rollouts(seeds):
    """Median over the summaries of some seeds; a seed that never reached the target counts as infinity."""
    return statistics.median([math.inf if s["rollouts"] is None else s["rollouts"] for s in seeds])


def best_lr(by_lr):
    """(learning rate, what decided) of {lr: summaries}: fewest median rollouts to target, then highest accuracy."""
    median = {lr: median_rollouts(seeds) for lr, seeds in by_lr.items()}
    best = min(
        by_lr, key=lambda lr: (median[lr], -statistics.median([s["accuracy"] for s in by_lr[lr]]))
    )
    alone = median[best] < math.inf and list(median.values()).count(median[best]) == 1
    return best, "rollouts" if alone else "accuracy"


def rollouts_text(value, budget):
    return f">{budget}" if value in (None, math.inf) else f"{value:.0f}"


def cells(seeds, budget):
    """One row's cells from the summaries of its seeds."""
    if not seeds:
        return ["-"] * 4
    accuracy = [s["accuracy"] for s in seeds]
    each = ", ".join(rollouts_text(s["rollouts"], budget) for s in seeds)
    return [
        f"{rollouts_text(median_rollouts(seeds), budget)} [{each}]",
        f"{statistics.median(accuracy):.3f} [{min(accuracy):.3f}, {max(accuracy):.3f}]",
        *(f"{statistics.median([s[key] for s in seeds]):.1f}" for key in ("length", "seconds")),
    ]


def markdown(header, rows):
    """A markdown table, padded to read well as text."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |"
        for line in lines
    )


def tables(results, budget, target, seeds):
    """Both tables as markdown. results: {row: {lr: summaries of the seeds that have finished}}."""
    columns = [
        f"fresh rollouts to {target:.0%}: median [each seed]",
        "final accuracy: median [min, max]",
        "response length (tokens)",
        "training time (s)",
    ]
    chosen, full = [], []
    for row, by_lr in results.items():
        ran = {lr: summaries for lr, summaries in by_lr.items() if summaries}
        best, reason = best_lr(ran) if ran else (None, "-")
        chosen.append(
            [row, plot.number(best) if ran else "-", *cells(ran.get(best), budget), reason]
        )
        for lr, summaries in by_lr.items():
            mark = " *" if lr == best else ""
            full.append(
                [
                    row,
                    plot.number(lr) + mark,
                    f"{len(summaries)} of {seeds}",
                    *cells(summaries, budget),
                ]
            )
    return f"""\
Every run has a budget of {budget} fresh rollouts. The target is reached at the first evaluation whose centred 3-point
mean reaches it. Final accuracy and response length are means over the last 3 evaluations.

Each algorithm at its best learning rate: lowest median of rollouts to the target; on a tie, or where the target is not
reached, highest median of final accuracy.

{markdown(["algorithm", "lr", *columns, "lr decided by"], chosen)}

Every learning rate (* = the best one).

{markdown(["algorithm", "lr", "runs", *columns], full)}
"""


def picture(results, budget, target, path):
    """Accuracy by rollouts of each family; rollouts to target and final accuracy of each row, at its best lr."""
    from matplotlib.figure import Figure

    best = {}
    for row, by_lr in results.items():
        if ran := {lr: seeds for lr, seeds in by_lr.items() if seeds}:
            best[row] = ran[best_lr(ran)[0]]
    methods = list(dict.fromkeys(row.replace("grpo", "ppo") for row in ROWS))
    colours = {row: plot.COLOURS[methods.index(row.replace("grpo", "ppo"))] for row in ROWS}
    fig = Figure(figsize=(13, 9), layout="constrained")
    curves, dots = fig.subplots(2, 2, sharey="row")
    for axis, family in zip(curves, ("PPO", "GRPO")):
        for row in best:
            if ("grpo" in row) == (family == "GRPO"):
                plot.curve(axis, [s["points"] for s in best[row]], colours[row])
                axis.plot([], [], color=colours[row], label=row)
        axis.axhline(target, color="0.5", linestyle=":", label="target")
        axis.set(
            title=f"{family} family",
            xlabel=plot.X_LABELS["total_rollouts"],
            ylabel="right answers (share)",
        )
        axis.legend(loc="lower right")
    for axis, key in zip(dots, ("rollouts", "accuracy")):
        for place, row in enumerate(best):
            values = [math.inf if s[key] is None else s[key] for s in best[row]]
            for value in values:
                x, marker = (budget, ">") if value == math.inf else (value, "o")
                axis.plot(x, place, marker, color=colours[row], alpha=0.7)
            if statistics.median(values) < math.inf:
                axis.plot(statistics.median(values), place, "|", color=colours[row], markersize=22)
    dots[0].set_yticks(range(len(best)), best)
    dots[0].invert_yaxis()
    dots[0].set(xlabel=f"fresh rollouts to {target:.0%}: each seed, | median, > not reached")
    dots[1].set(xlabel="final accuracy (share): each seed, | median")
    for axis in fig.axes:
        axis.grid(alpha=0.25)
    fig.savefig(path, dpi=110)


# Running.


def plan(row, seed, budget, lr=None):
    """(flags for train.py, steps) of one run. row: an algorithm, perhaps with flags; lr None: the default."""
    flags = [
        "--algo",
        *row.split(),
        "--seed",
        str(seed),
        *(["--lr", str(lr)] if lr is not None else []),
    ]
    cfg = parse(flags)
    steps = next(
        n for n in count(1) if total_rollouts(cfg, n) >= budget
    )  # the smallest number that reaches the budget
    every = max(1, round(EVAL_ROLLOUTS / (schedule(cfg, 1).fresh * cfg.group_size)))
    return [*flags, "--steps", str(steps), "--eval_every", str(every)], steps


def state_of(folder, steps):
    """ "complete" (all steps done and the model exported), "interrupted" (to be resumed) or "new"."""
    if not (folder / "config.json").exists():
        return "new"
    try:
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError, KeyError, TypeError, RecursionError):
        return "interrupted"
    return (
        "complete"
        if last == steps and (folder / "model" / "config.json").exists()
        else "interrupted"
    )


def other_settings(folder, flags):
    """The settings that the run in `folder` was made with and that `flags` would change: {flag: (then, now)}."""
    saved, now = json.loads((folder / "config.json").read_text())["values"], vars(parse(flags))
    return {
        key: (value, now[key])
        for key, value in saved.items()
        if isinstance(value, (int, float, str))
        and key in now
        and key not in MACHINE
        and value != now[key]
    }


def train(folder, flags, steps):
    """Bring the run in `folder` to its end, its output in FOLDER.log. Returns what went wrong, or None."""
    state, log = state_of(folder, steps), folder.with_name(folder.name + ".log")
    try:
        changed = other_settings(folder, flags) if state != "new" else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{folder.name} has no readable config.json ({type(error).__name__}): delete the folder, or choose another --runs"
    if changed:
        text = ", ".join(f"{key} was {then}, is {now}" for key, (then, now) in changed.items())
        return f"{folder.name} was run with other settings ({text}): delete it, or choose another --runs"
    if state == "complete":
        return None
    command = [
        sys.executable,
        "train.py",
        *flags,
        "--out",
        str(folder),
        *["--resume"] * (state == "interrupted"),
    ]
    with open(log, "a") as output:
        code = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
        ).returncode
    if code == 0 and state_of(folder, steps) == "complete":
        return None
    return "\n    ".join(
        [
            f"{folder.name} failed (exit code {code}); the end of {os.path.relpath(log)}:",
            *log.read_text(errors="replace").splitlines()[-8:],
        ]
    )


def call(*command):
    """Run `python COMMAND` with its output to the console; exit 1 if it fails."""
    print(f"$ python {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT).returncode
    if code:
        sys.exit(f"error: `python {shlex.join(command)}` failed with exit code {code}")


def compare(args):
    from tqdm import tqdm

    folder = args.runs / "compare"
    folder.mkdir(parents=True, exist_ok=True)
    call("infra/toy.py")  # once, before runs side by side look for it
    results, jobs, failed = {row: {} for row in ROWS}, [], 0
    for row in ROWS:
        for lr in args.grpo_lrs if "grpo" in row else args.lrs:
            for seed in args.seeds:
                flags, steps = plan(row, seed, args.budget, lr)
                name = f"{row.replace(' --', '-').replace(' ', '')}-lr{plot.number(lr)}-{steps}steps-seed{seed}"
                results[row].setdefault(lr, []).append((folder / name, steps))
                jobs.append((folder / name, flags, steps))
    pool = ThreadPoolExecutor(args.jobs)
    try:
        running = as_completed([pool.submit(train, *job) for job in jobs])
        for done in tqdm(running, total=len(jobs), desc="runs", unit="run"):
            if done.result():
                failed += 1
                tqdm.write(done.result(), file=sys.stderr)
    finally:
        pool.shutdown(
            cancel_futures=True
        )  # an interrupt from the keyboard reaches those that run by itself
    for by_lr in results.values():
        for lr, runs in by_lr.items():
            complete = [run for run, steps in runs if state_of(run, steps) == "complete"]
            by_lr[lr] = [summary(plot.load_run(run), args.target) for run in complete]
    text = tables(results, args.budget, args.target, len(args.seeds))
    (folder / "table.md").write_text(text)
    picture(results, args.budget, args.target, folder / "compare.png")
    print(
        f"\n{text}\n{os.path.relpath(folder / 'table.md')} {os.path.relpath(folder / 'compare.png')}"
    )
    if failed:
        sys.exit(
            f"error: {failed} of {len(jobs)} runs failed; the same command goes on with what is missing"
        )


def demo(args):
    taken = [int(path.name[5:]) for path in args.runs.glob("demo-*") if path.name[5:].isdigit()]
    folder = args.runs / f"demo-{max(taken, default=0) + 1}"
    folder.mkdir(parents=True)
    runs, rows, reached = [folder / "remix-ppo", folder / "ppo"], [], []
    call("infra/toy.py")
    for run in runs:
        flags, _ = plan(run.name, args.seed, args.budget)
        call(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(args.nproc),
            "train.py",
            *flags,
            "--out",
            str(run),
        )
    with ThreadPoolExecutor(len(runs)) as pool:  # at once: most of it is start-up
        list(
            pool.map(
                lambda run: call(
                    "eval.py",
                    "--model",
                    str(run / "model"),
                    "--benchmarks",
                    "toy",
                    "--k",
                    "4",
                    "--temperature",
                    "1.0",
                    "--out",
                    str(run / "eval"),
                ),
                runs,
            )
        )
    for run in runs:
        seen = summary(plot.load_run(run), args.target)
        scores = json.loads((run / "eval" / "results.json").read_text())["scores"]["toy"]
        rows.append(
            [
                run.name,
                rollouts_text(seen["rollouts"], args.budget),
                f"{scores['pass@1']:.3f}",
                f"{scores['length_mean']:.1f}",
                f"{seen['seconds']:.0f}",
            ]
        )
        reached.append(seen["rollouts"])
    header = [
        "algorithm",
        f"fresh rollouts to {args.target:.0%}",
        "final accuracy (held-out)",
        "response length (tokens)",
        "training time (s)",
    ]
    print(f"\n{markdown(header, rows)}\n")
    remix, ppo = reached
    if remix:
        ratio = f"{ppo / remix:.2f}" if ppo is not None else f"above {args.budget / remix:.2f}"
        print(
            f"Fresh rollouts to {args.target:.0%}, PPO over ReMix-PPO: {ratio} (one seed, one learning rate)."
        )
    else:
        print(
            f"No ratio: ReMix-PPO did not go from below to {args.target:.0%} within {args.budget} fresh rollouts."
        )
    title = f"ReMix-PPO and PPO, {args.budget} fresh rollouts each"
    plot.figure([plot.load_run(run) for run in runs], folder / "demo.png", title)
    print(*map(os.path.relpath, [folder / "demo.png", *runs]))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    command = demo if argv[:1] == ["demo"] else compare

    def listed(kind):
        return lambda text: [kind(item) for item in text.split(",")]

    def positive(text):
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        prog="compare.py" + " demo" * (command is demo),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--budget", type=positive, default=4096, help="fresh rollouts of each run")
    add(
        "--target",
        type=float,
        default=0.5 if command is demo else 0.6,
        help="evaluation accuracy to reach (share)",
    )
    add(
        "--runs",
        type=lambda text: Path(text).resolve(),
        default="runs",
        help="folder that holds everything written",
    )
    if command is demo:
        add("--seed", type=int, default=0)
        add("--nproc", type=positive, default=2, help="ranks")
    else:
        add(
            "--lrs",
            type=listed(float),
            default="2e-4,4e-4,8e-4",
            help="learning rates of the PPO family",
        )
        add(
            "--grpo_lrs",
            type=listed(float),
            default="1e-4,2e-4,4e-4",
            help="learning rates of the GRPO family",
        )
        add("--seeds", type=listed(int), default="0,1,2")
        add("--jobs", type=positive, default=2, help="runs at once")
    args = parser.parse_args(argv[1:] if command is demo else argv)
    if command is compare and len(args.lrs) != len(args.grpo_lrs):
        parser.error(
            "--lrs and --grpo_lrs differ in length: every row gets the same number of learning rates"
        )
    try:
        command(args)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
