"""The paper's pictures from the metrics of one or more runs.

    python plot.py runs/toy-ppo-seed0 runs/toy-remix-ppo-seed0 --out compare.png

Evaluation accuracy against fresh rollouts, steps and time; importance ratio, response length, reflection, entropy, KL
and staleness against steps. Runs that differ in nothing but their seed share a colour: the median as a line in a band
from the lowest to the highest seed where their x is shared, a thin line per run elsewhere (time never is). Lines of 40
points and more are drawn faint, under their running median over a twentieth. The last line of output is the PNG's path.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from infra.config import Parser, exit_bad_input

X_LABELS = {
    "total_rollouts": "fresh rollouts (responses)",
    "step": "training step",
    "seconds": "training time (s)",
}
PANELS = (  # x, title, y axis, {metric: (line style, name in the panel's legend)}
    (
        "total_rollouts",
        "Accuracy by rollouts",
        "right answers (share)",
        {"eval_accuracy": ("-", "")},
    ),
    ("step", "Accuracy by steps", "right answers (share)", {"eval_accuracy": ("-", "")}),
    ("seconds", "Accuracy by time", "right answers (share)", {"eval_accuracy": ("-", "")}),
    (
        "step",
        "Importance ratio",
        "mean ratio per token",
        {"ratio_mean_history": ("-", "history"), "ratio_mean_fresh": ("--", "fresh")},
    ),
    ("step", "Response length", "mean length (tokens)", {"length_mean": ("-", "")}),
    ("step", "Reflection", "responses that reflect (share)", {"reflection_rate": ("-", "")}),
    ("step", "Entropy", "policy entropy (nats per token)", {"entropy": ("-", "")}),
    (
        "step",
        "KL divergence",
        "KL (nats per token)",
        {"kl_base": ("-", "to base"), "kl_prev": ("--", "to precedent")},
    ),
    ("step", "Staleness", "mean age of samples (versions)", {"staleness": ("-", "")}),
)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
# Runs may differ in these flags and still be one curve.
NOT_IN_LABEL = {
    "algo",
    "seed",
    "out",
    "resume",
    "steps",
    "eval_every",
    "save_every",
    "keep",
    "samples",
    "threads",
    "dry_run",
    "tensorboard",
    "wandb",
    "max_skipped",
    "max_equal_rewards",
    "dump_rollouts",
    "replay",
}
NO_NUMBERS = {"phase", "staleness", "eval_accuracy_by_part"}  # among a run's metrics


def load_run(folder):
    """{"config": dict, "metrics": list of dict, one a step} of the run in `folder`. Raises ValueError with one line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    path, metrics = folder / "config.json", []
    try:
        config = json.loads(path.read_text())
        config["values"].items()
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: missing, or not that of a run ({type(error).__name__})"
        ) from None
    for number, line in enumerate(lines, 1):
        try:
            row = dict(json.loads(line))
            for values in (
                row.get("staleness") or [],
                [value for key, value in row.items() if key not in NO_NUMBERS],
            ):
                sum(
                    value for value in values if value is not None
                )  # TypeError where one is no number
            metrics.append(row)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object of a run's metrics ({error})"
            ) from None
    if not metrics:
        raise ValueError(f"{path}: no metrics yet")
    return {"config": config, "metrics": metrics}


def series(run, x, key):
    """[(x, value of metric `key`)] where it has one. x "seconds": time since the start; "staleness": its mean age."""
    points, seconds = [], 0.0
    for row in run["metrics"]:
        seconds += row.get("seconds_step") or 0.0
        value = row.get(key)
        if key == "staleness" and value is not None:  # number of responses of age 0, 1, ..., N
            value = sum(age * n for age, n in enumerate(value)) / sum(value) if sum(value) else None
        if value is not None:
            points.append((seconds if x == "seconds" else row.get(x) or 0, value))
    return points


def labels(runs):
    """One label per run: its algorithm, and those flags in which the runs of that algorithm differ (never the seed)."""
    configs, names = [run["config"]["values"] for run in runs], []
    for values in configs:
        rivals = [other for other in configs if other.get("algo") == values.get("algo")]
        differ = [key for key in values if any(other.get(key) != values[key] for other in rivals)]
        flags = [f"{key} {number(values[key])}" for key in differ if key not in NOT_IN_LABEL]
        names.append(" ".join([str(values.get("algo", "run")), *flags]))
    return names


def number(value):
    """0.0002 as 2e-4; anything else as it is."""
    if not isinstance(value, float) or value == 0 or abs(value) >= 0.01:
        return str(value)
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def curve(axis, lines, colour, style="-"):
    """Draw lines [[(x, y)]], one per seed: median and min-max band if all have the same x, else a thin line each."""
    lines = [line for line in lines if line]
    xs = [[x for x, _ in line] for line in lines]
    if len(lines) > 1 and all(x == xs[0] for x in xs):
        ys = [[y for _, y in column] for column in zip(*lines)]
        axis.fill_between(
            xs[0], [min(y) for y in ys], [max(y) for y in ys], color=colour, alpha=0.15, linewidth=0
        )
        lines = [list(zip(xs[0], [statistics.median(y) for y in ys]))]
    for line in lines:
        x, y = zip(*line)
        half = len(y) // 40
        smooth = [statistics.median(y[max(i - half, 0) : i + half + 1]) for i in range(len(y))]
        axis.plot(
            x,
            smooth,
            style,
            color=colour,
            linewidth=1.6 if len(lines) == 1 else 0.9,
            marker="." * (len(y) == 1),
        )
        if half:
            axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.35)


def figure(runs, path, title=None):
    """Draw `runs` (from `load_run`) as a grid of panels and write it to `path`. Needs no display."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    groups = {}
    for name, run in zip(labels(runs), runs):
        groups.setdefault(name, []).append(run)
    colours = dict(zip(groups, COLOURS))
    if len(groups) > len(COLOURS):
        colours = {label: colormaps["turbo"](i / len(groups)) for i, label in enumerate(groups)}
    fig = Figure(figsize=(13, 10), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    ends = {}  # label -> last row of the mixed phase, where reincarnation followed
    for label, group in groups.items():
        mixed = [row for row in group[0]["metrics"] if row.get("phase") == "mixed"]
        if mixed and group[0]["metrics"][-1].get("phase") == "on-policy":
            ends[label] = mixed[-1]
    for axis, (x, heading, y_label, metrics) in zip(fig.subplots(3, 3).flat, PANELS):
        axis.set_title(heading, loc="left", fontsize=11, fontweight="bold")
        drawn = []  # every value of the panel
        for key, (style, _) in metrics.items():
            for label, group in groups.items():
                lines = [series(run, x, key) for run in group]
                curve(axis, lines, colours[label], style)
                drawn += [y for line in lines for _, y in line]
        if not drawn:
            text = "no data: no run recorded\n" + "\n".join(metrics)
            axis.text(
                0.5, 0.5, text, ha="center", va="center", color="0.5", transform=axis.transAxes
            )
            axis.set(xticks=[], yticks=[])
            continue
        for label, row in ends.items():
            if row.get(x):
                axis.axvline(row[x], color=colours[label], linestyle=":", linewidth=1)
        axis.set(xlabel=X_LABELS[x], ylabel=y_label)
        if "kl_base" in metrics and max(drawn) > 0:
            axis.set_yscale("log", nonpositive="mask")
        else:
            axis.ticklabel_format(useOffset=False)
        if not any(drawn):
            axis.set_ylim(0, 1)
        axis.grid(alpha=0.25)
        if len(metrics) > 1:
            styles = [Line2D([], [], color="0.3", linestyle=style) for style, _ in metrics.values()]
            axis.legend(styles, [name for _, name in metrics.values()], fontsize=8)
    handles = [Line2D([], [], color=colours[label], linewidth=2.5) for label in groups]
    names = [
        f"{label} ({len(group)} runs)" if len(group) > 1 else label
        for label, group in groups.items()
    ]
    if ends:
        handles.append(Line2D([], [], color="0.5", linestyle=":"))
        names.append("reincarnation")
    fig.legend(handles, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    if title:
        fig.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)


def main(argv=None):
    parser = Parser(
        prog="plot.py", description="Plot the metrics of one or more runs.", allow_abbrev=False
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder (what train.py calls --out)"
    )
    parser.add_argument(
        "--out", metavar="FILE.png", help="picture to write [default RUN/plot.png of the first run]"
    )
    parser.add_argument("--title", help="heading of the picture")
    try:
        args = parser.parse_args(argv)
        out = args.out or Path(args.runs[0]) / "plot.png"
        figure([load_run(folder) for folder in args.runs], out, args.title)
    except (ValueError, OSError) as error:
        exit_bad_input(error)
    print(out)


if __name__ == "__main__":
    main()
