"""From judged responses to scores: pass@1 with its standard error, pass@k, maj@k; paired comparison, published rows, picture.

A row is one judged response: a dict with id (of its problem), reward (1 is right), reason, judged (its final answer as text, None where
it has none), response, length (tokens) and truncated. Standard errors and intervals are over problems: the k samples of one problem are
not independent.
"""

import json
import math
from collections import Counter
from pathlib import Path

from reward import canonical

# Self-reflection keywords of the authors' evaluation code, matched as they do: substrings of the lower-cased response.
REFLECTION = (
    "verify re-examine double-check why validate abduct question check but wait confirm scrutinize analyze investigate "
    "probe"
).split() + ["root cause"]

# The paper's benchmarks in its order, and what its authors publish (README of github.com/AnitaLeungxx/ReMix-Off-Policy-RFT): greedy / T = 0.1
# (the mean of 32 runs on aime24 and amc), at most 8192 tokens. The means that we print are those of the cells: of the published means at T = 0.1,
# six differ from theirs, by up to 0.54. base model -> model -> a pair for each benchmark
PAPER = ("aime24", "amc", "math500", "minerva", "olympiadbench")
PUBLISHED = {
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        "DeepSeek-R1-Distill-Qwen-1.5B": "33.33/18.54 43.37/44.58 67.40/67.40 16.54/17.28 27.26/29.19",
        "Open-RS1": "23.33/19.58 42.17/45.44 64.20/68.00 16.18/19.49 27.11/29.26",
        "Open-RS2": "16.67/20.31 45.78/44.92 65.00/68.40 18.38/17.65 26.96/28.15",
        "Open-RS3": "16.67/19.69 44.58/43.98 67.60/67.40 15.64/19.12 25.48/28.15",
        "AdaptThink": "13.33/19.06 57.83/56.81 78.60/76.80 23.90/23.90 38.07/37.93",
        "II-Thought": "26.67/28.65 56.63/59.72 73.00/77.80 23.16/23.16 40.89/42.37",
        "FASTCuRL-preview": "26.67/25.94 60.24/54.27 74.20/74.20 20.22/21.69 32.59/37.04",
        "FASTCuRL-V3": "36.67/33.44 66.27/63.63 84.40/83.40 28.67/28.31 43.56/44.59",
        "L1-Exact": "23.33/25.10 71.08/66.57 84.00/84.20 29.41/26.84 44.59/44.3",
        "L1-Max": "20.00/23.13 69.88/66.79 83.00/84.00 29.04/27.57 46.37/44.44",
        "DeepScaleR": "40.00/31.96 65.06/63.58 83.20/81.20 29.04/26.1 43.41/41.33",
        "ReMix-PPO (350 steps)": "36.67/29.08 69.88/64.04 82.00/83.80 30.15/29.04 41.78/42.67",
    },
    "DeepSeek-R1-Distill-Qwen-7B": {
        "DeepSeek-R1-Distill-Qwen-7B": "33.33/37.53 68.68/66.55 83.80/84.80 30.15/32.72 44.44/43.41",
        "ReasonFlux-F1": "20.00/20.19 54.22/53.07 77.20/79.60 29.04/31.99 37.04/38.81",
        "Light-R1": "30.00/40.00 66.27/66.73 87.00/86.8 34.56/31.62 47.56/48.30",
        "Skywork-OR1-Preview": "43.33/36.31 63.86/61.60 84.40/83.40 29.41/31.25 46.22/43.85",
        "Polaris": "40.00/39.71 63.86/67.40 87.60/86.40 36.40/34.19 48.00/48.30",
        "AdaptThink": "46.67/47.62 75.90/74.20 87.60/87.00 33.46/34.56 50.22/50.52",
        "AceReason-Nemotron": "60.00/50.00 80.72/77.48 89.00/89.60 36.40/35.29 50.07/53.85",
        "ReMix-PPO (75 steps)": "63.33/50.31 78.31/77.78 90.20/91.00 37.50/37.87 52.59/52.89",
    },
}


def reflects(text):
    """Whether a response holds at least one self-reflection keyword."""
    text = text.lower()
    return any(keyword in text for keyword in REFLECTION)


def pass_at_k(n, right, k):
    """The chance that at least one of k responses drawn from n without replacement is right: 1 - C(n - right, k) / C(n, k),
    unbiased (Chen et al. 2021, arXiv 2107.03374)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(rows):
    """The chance that a vote among the responses to one problem elects a right answer; ties are drawn.

    Right answers are one candidate however they are written, wrong ones where canonical() writes them alike. Who has no answer does not vote.
    """
    votes = Counter(
        True if row["reward"] == 1 else canonical(row["judged"])
        for row in rows
        if row["reward"] == 1 or row["judged"] is not None
    )
    first = [candidate for candidate, count in votes.items() if count == max(votes.values())]
    return (True in first) / len(first) if first else 0.0


def by_problem(rows):
    """id -> its rows."""
    found = {}
    for row in rows:
        found.setdefault(row["id"], []).append(row)
    return found


def summarise(rows):
    """Scores of k rows for each of n problems, in [0, 1], with lengths (tokens) and the number of unjudged responses by reason.

    What does not exist is None or empty: a standard error of one problem, pass@k and maj@k of a user's own rewards other than 0 and 1.
    """
    problems, mean = by_problem(rows), lambda values: sum(values) / len(values)
    means = [mean([row["reward"] for row in some]) for some in problems.values()]
    n, k, score = len(means), len(rows) // len(means), mean(means)
    error = math.sqrt(sum((m - score) ** 2 for m in means) / (n - 1) / n) if n > 1 else None
    verdicts = all(row["reward"] in (0, 1) for row in rows)
    right = [sum(row["reward"] == 1 for row in some) for some in problems.values()]
    return {
        "pass@1": score,
        "standard_error": error,
        "n": n,
        "k": k,
        "pass@k": {
            str(2**i): mean([pass_at_k(k, r, 2**i) for r in right])
            for i in range(k.bit_length() if verdicts else 0)
        },
        "maj@k": mean([majority(some) for some in problems.values()]) if verdicts else None,
        "length_mean": mean([row["length"] for row in rows]),
        "truncated_share": mean([row["truncated"] for row in rows]),
        "reflection_rate": mean([reflects(row["response"]) for row in rows]),
        "unjudged_share": mean([row["reason"] not in (None, "wrong", "truncated") for row in rows]),
        "unjudged": dict(
            Counter(row["reason"] for row in rows if row["reason"] not in (None, "wrong"))
        ),
    }


def table(scores):
    """Lines of the console table: a row for each part of an evaluation, n always shown, in percent; then pass@k for the powers of two."""
    width = max(map(len, [*scores, "benchmark"]))
    lines = [
        f"{'benchmark':<{width}} {'n':>4} {'k':>3} {'pass@1':>7} {'± s.e.':>7} {'maj@k':>7} {'tokens':>8} {'truncated':>9} "
        f"{'reflect':>8} unjudged"
    ]
    percent = lambda value: "-" if value is None else f"{100 * value:.2f}"  # noqa: E731
    for name, s in scores.items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in s["unjudged"].items())
        lines.append(
            f"{name:<{width}} {s['n']:>4} {s['k']:>3} {percent(s['pass@1']):>7} {percent(s['standard_error']):>7} "
            f"{percent(s['maj@k']):>7} {s['length_mean']:>8.1f} {100 * s['truncated_share']:>8.2f}% {100 * s['reflection_rate']:>7.2f}% "
            f"{reasons or '-'}"
        )
    return lines + [
        f"{name:<{width}} "
        + "  ".join(f"pass@{k} {100 * value:.2f}" for k, value in s["pass@k"].items())
        for name, s in scores.items()
        if s["k"] > 1 and s["pass@k"]
    ]


def published(scores, model, base):
    """Lines that set our greedy and T = 0.1 scores beside the published ones of the same base model, [] where there are none.

    scores: what summarise() gives, under the names that eval.py's `--preset paper` gives its parts; model, base: names or folders.
    """
    rows = PUBLISHED.get(Path(base).name, {})
    if not rows:
        return []

    def line(name, cells, form):
        mean = [sum(column) / len(cells) if None not in column else None for column in zip(*cells)]
        return f"{name[:30]:<30}" + "".join(
            f" {'/'.join(format(x, form) if x is not None else '-' for x in pair):>14}"
            for pair in [*cells, mean]
        )

    ours = [
        tuple(
            100 * scores[part]["pass@1"] if part in scores else None
            for part in (f"{name} greedy", f"{name} T=0.1")
        )
        for name in PAPER
    ]
    lines = [
        "published (greedy/T=0.1; AMC is the set of 83; source: README of the authors' repository) and ours",
        f"{'':<30}" + "".join(f" {name:>14}" for name in [*PAPER, "mean"]),
    ]
    theirs = {
        name: [tuple(map(float, cell.split("/"))) for cell in row.split()]
        for name, row in rows.items()
    }
    lines += [line(name, cells, ".2f") for name, cells in theirs.items()] + [
        line(f"ours: {Path(model).name}", ours, ".2f")
    ]
    for name in [name for name in rows if name == Path(base).name or name.startswith("ReMix")]:
        difference = [
            tuple(None if o is None else o - t for o, t in zip(*pair))
            for pair in zip(ours, theirs[name])
        ]
        lines.append(line(f"ours - {name}", difference, "+.2f"))
    return lines


def compare(first, second, resamples=10_000):
    """Lines: by how much the second evaluation's pass@1 differs from the first's on the problems of both, with the 95 % interval of a
    paired bootstrap over problems. first, second: paths of results.json. Raises ValueError."""
    import numpy as np

    files = []
    for path in (first, second):
        path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
        try:
            files.append(json.loads(path.read_text()))
            problems, _ = files[-1]["problems"], files[-1]["settings"].items()
            if not all(
                isinstance(score, (int, float))
                for part in problems.values()
                for score in part.values()
            ):
                raise ValueError("a score is no number")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: no results.json of eval.py ({type(error).__name__}: {error})"
            ) from None
    a, b = files
    names = [name for name in a["problems"] if name in b["problems"]]
    if not names:
        raise ValueError(
            f"nothing to compare: {first} is on {', '.join(a['problems'])}, {second} on {', '.join(b['problems'])}"
        )
    lines, width = [], max(map(len, [*names, "benchmark", "mean"]))

    def differ(what, one, other, names):
        for name in names:
            if one.get(name) != other.get(name):
                lines.append(
                    f"they differ in {what}{name} too: {one.get(name)} and {other.get(name)}"
                )

    differ("", a["settings"], b["settings"], ("max_response", "seed", "dtype"))
    differ(
        "the version of ",
        *(one["settings"].get("versions", {}) for one in files),
        ("vllm", "math_verify"),
    )
    for name in names:
        one, other = (file["settings"].get("parts", {}).get(name, {}) for file in files)
        differ(f"{name}'s ", one, other, ("k", "temperature", "template", "style"))
        if one.get("problems") != other.get("problems") and not (
            one["skipped"] or other["skipped"]
        ):
            raise ValueError(
                f"nothing to compare: {name} is other problems in {first} than in {second}"
            )
    lines.append(
        f"{'benchmark':<{width}} {'n':>4} {'first':>7} {'second':>7} {'difference':>10} {'95 % interval':>17}"
    )
    rng, rows = np.random.default_rng(0), []
    for name in names:
        both = [id for id in a["problems"][name] if id in b["problems"][name]]
        alone = len(a["problems"][name].keys() ^ b["problems"][name].keys())
        if not both:
            raise ValueError(f"nothing to compare: no problem of {name} is in both")
        pair = 100 * np.array(
            [[part["problems"][name][id] for id in both] for part in (a, b)]
        )  # (2, n)
        difference = pair[1] - pair[0]  # (n,)
        means = difference[rng.integers(len(both), size=(resamples, len(both)))].mean(
            axis=1
        )  # (resamples,)
        rows.append((name, len(both), *pair.mean(axis=1), difference.mean(), means))
        if alone:
            lines.insert(0, f"{name}: {alone} problems are in one of the two only, and left out")
    if len(rows) > 1:
        rows.append(
            (
                "mean",
                sum(row[1] for row in rows),
                *(sum(row[i] for row in rows) / len(rows) for i in range(2, 6)),
            )
        )
    for name, n, x, y, difference, means in rows:
        low, high = np.percentile(means, [2.5, 97.5])
        verdict = "" if low > 0 or high < 0 else "  may be chance" if low < high else "  the same"
        lines.append(
            f"{name:<{width}} {n:>4} {x:>7.2f} {y:>7.2f} {difference:>+10.2f} {f'[{low:+.2f}, {high:+.2f}]':>17}{verdict}"
        )
    return lines


def chart(scores, path, title):
    """Draw pass@1 with standard errors as bars, into a PNG. Needs no display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 1.3 * len(scores), 4), layout="constrained")
    axis = figure.subplots()
    heights = [100 * s["pass@1"] for s in scores.values()]
    errors = [100 * (s["standard_error"] or 0) for s in scores.values()]
    bars = axis.bar(
        [f"{name}\nn = {s['n']}, k = {s['k']}" for name, s in scores.items()],
        heights,
        width=0.6,
        color="#0072B2",
        alpha=0.85,
        yerr=errors,
        capsize=4,
    )
    axis.bar_label(
        bars, [f"{height:.1f}" for height in heights], label_type="center", color="white"
    )
    axis.set(
        ylabel="pass@1 (%), ± standard error",
        ylim=(0, max(1, 1.15 * max(map(sum, zip(heights, errors))))),
    )
    axis.set_title(title, loc="left", fontsize=10)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    figure.savefig(path, dpi=110)
