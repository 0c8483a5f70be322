"""score.py: estimators against brute force, the paired comparison against known differences, the published rows against their means."""

import itertools
import json
import math
import random
import statistics

import pytest

import score
from score import by_problem, compare, majority, pass_at_k, published, reflects, summarise, table


def row(id, reward, judged=None, reason=None, **more):
    return (
        dict(
            id=id,
            reward=float(reward),
            judged=judged,
            reason=reason or (None if reward == 1 else "wrong"),
            length=4,
            truncated=False,
            response="so",
        )
        | more
    )


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_draws(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(
                sum(any(draw) for draw in draws) / len(draws)
            )
    assert pass_at_k(32, 5, 1) == pytest.approx(5 / 32)


@pytest.mark.parametrize(
    "answers, expected",
    [
        # (judged, right): what a vote elects
        ([("5", 1), ("5", 1), ("6", 0)], 1.0),
        ([("5", 1), ("6", 0), ("6", 0)], 0.0),
        ([("5", 1), ("6", 0)], 0.5),
        ([("5", 1), ("6", 0), ("7", 0)], 1 / 3),
        ([("5", 1), ("5", 1), ("6", 0), ("6", 0), ("7", 0)], 0.5),
        ([("6", 0), ("7", 0)], 0.0),
        ([("5", 1)], 1.0),
        ([("6", 0)], 0.0),
        ([(None, 0), (None, 0), ("5", 1)], 1.0),
        ([(None, 0), (None, 0)], 0.0),  # no answer, no vote
        (
            [("0.5", 1), (r"\frac{1}{2}", 1), ("3", 0), ("3", 0), ("2", 0)],
            0.5,
        ),  # right answers are one candidate
        (
            [("6.0", 0), ("6", 0), (" 6 ", 0), ("5", 1), ("5", 1)],
            0.0,
        ),  # and so are wrong ones written alike
    ],
)
def test_majority_and_its_ties(answers, expected):
    rows = [row("p", right, judged) for judged, right in answers]
    for _ in range(5):
        random.shuffle(rows)
        assert majority(rows) == pytest.approx(expected)


def test_summary_of_an_evaluation():
    """Three problems, two samples each: scores 1, 0.5, 0 have mean 0.5 and standard error 0.5 / sqrt(3)."""
    rows = [
        row("a", 1, "1"),
        row("a", 1, "1"),
        row("b", 1, "2", response="but"),
        row("b", 0, None, "no_box"),
        row("c", 0, "9", length=16),
        row("c", 0, None, "truncated", truncated=True),
    ]
    random.shuffle(rows)
    summary = summarise(rows)
    assert summary.pop("standard_error") == pytest.approx(0.5 / math.sqrt(3))
    assert summary.pop("maj@k") == pytest.approx(2 / 3) and summary.pop("pass@k") == {
        "1": 0.5,
        "2": pytest.approx(2 / 3),
    }
    unjudged = summary.pop("unjudged")
    assert unjudged == {"no_box": 1, "truncated": 1}
    assert summary == {
        "pass@1": 0.5,
        "n": 3,
        "k": 2,
        "length_mean": 6.0,
        "truncated_share": 1 / 6,
        "unjudged_share": 1 / 6,
        "reflection_rate": 1 / 6,
    }


@pytest.mark.parametrize(
    "k, powers",
    [(1, ["1"]), (2, ["1", "2"]), (3, ["1", "2"]), (32, ["1", "2", "4", "8", "16", "32"])],
)
def test_powers_of_two(k, powers):
    scores = summarise([row("a", i % 2, str(i)) for i in range(k)])
    assert list(scores["pass@k"]) == powers and scores["pass@1"] == pytest.approx(
        scores["pass@k"]["1"]
    )


def test_rewards_that_are_no_verdicts():
    """A user's own reward: pass@1 is its mean, pass@k and maj@k do not exist."""
    summary = summarise(
        [row("a", 0.5, "1"), row("a", 0.5, "1"), row("b", 1, "2"), row("b", -0.5, "3")]
    )
    assert summary["pass@1"] == 0.375 and summary["pass@k"] == {} and summary["maj@k"] is None
    assert (
        table({"mine": summary})[1].split()[:7] == ["mine", "2", "2", "37.50", "12.50", "-", "4.0"]
        and len(table({"mine": summary})) == 2
    )


def test_the_table_shows_n_and_every_reason():
    scores = {
        "aime24": summarise([row(str(i), i % 2, "1") for i in range(30)]),
        "amc T=0.1": summarise(
            [
                row("a", 1, "1"),
                row("a", 0, None, "no_box"),
                row("a", 0, None, "timeout"),
                row("a", 0, None, "no_box"),
            ]
        ),
    }
    lines = table(scores)
    assert lines[1].split()[:4] == ["aime24", "30", "1", "50.00"] and lines[1].endswith(" -")
    assert lines[2].split()[2:6] == ["1", "4", "25.00", "-"] and lines[2].endswith(
        "no_box 2, timeout 1"
    )
    assert (
        len({line.index("%") for line in lines[1:3]}) == 1
        and lines[3] == "amc T=0.1 pass@1 25.00  pass@2 50.00  pass@4 100.00"
    )


def test_reflection_keywords():
    assert all(
        map(
            reflects,
            (
                "Let me VERIFY this.",
                "Wait",
                "the Root Cause",
                "but",
                "double-checked",
                "no question",
            ),
        )
    )
    assert not any(
        map(reflects, ("so x = 4", "", "root of the cause", "I am certain", "re examine"))
    )


# The published table.


@pytest.mark.parametrize(
    "base, model, mean",
    [
        ("1.5B", "DeepSeek-R1-Distill-Qwen-1.5B", "37.58/35.27"),
        ("1.5B", "Open-RS1", "34.60/35.91"),
        ("1.5B", "Open-RS2", "34.56/35.35"),
        ("1.5B", "Open-RS3", "33.99/35.46"),
        ("1.5B", "AdaptThink", "42.35/42.90"),
        ("1.5B", "II-Thought", "44.07/46.34"),
        ("1.5B", "FASTCuRL-preview", "42.78/42.63"),
        ("1.5B", "FASTCuRL-V3", "51.91/50.67"),
        ("1.5B", "L1-Exact", "50.48/49.40"),
        ("1.5B", "L1-Max", "49.66/49.19"),
        ("1.5B", "DeepScaleR", "52.14/48.83"),
        ("1.5B", "ReMix-PPO (350 steps)", "52.10/49.73"),
        ("7B", "DeepSeek-R1-Distill-Qwen-7B", "52.08/53.00"),
        ("7B", "ReasonFlux-F1", "43.50/44.77"),
        ("7B", "Light-R1", "53.08/54.69"),
        ("7B", "Skywork-OR1-Preview", "53.44/51.28"),
        ("7B", "Polaris", "55.17/55.20"),
        ("7B", "AdaptThink", "58.77/58.78"),
        ("7B", "AceReason-Nemotron", "63.24/60.99"),
        ("7B", "ReMix-PPO (75 steps)", "64.39/61.97"),
    ],
)
def test_published_rows_have_their_published_means(base, model, mean):
    cells = score.PUBLISHED[f"DeepSeek-R1-Distill-Qwen-{base}"][model].split()
    assert len(cells) == len(score.PAPER)
    greedy, sampled = zip(*(map(float, cell.split("/")) for cell in cells))
    published = list(map(float, mean.split("/")))
    assert statistics.mean(greedy) == pytest.approx(published[0], abs=0.006)
    assert statistics.mean(sampled) == pytest.approx(
        published[1], abs=0.55
    )  # six of these means are not those of the published cells


def test_ours_beside_the_published_rows():
    scores = {
        f"{name} {how}": {"pass@1": value}
        for name in score.PAPER
        for how, value in (("greedy", 0.5), ("T=0.1", 0.25))
    }
    lines = published(scores, "runs/mine/model", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    found = {line[:30].strip(): line[30:].split() for line in lines}
    assert found["ours: model"] == ["50.00/25.00"] * 6
    assert (
        found["ours - DeepSeek-R1-Distill-Qwe"][0] == "+16.67/+6.46"
        and found["ours - ReMix-PPO (350 steps)"][-1] == "-2.10/-24.73"
    )
    part = published({"amc greedy": {"pass@1": 0.5}}, "m", "DeepSeek-R1-Distill-Qwen-1.5B")
    assert [line for line in part if line.startswith("ours: m")][0].split()[2:] == [
        "-/-",
        "50.00/-",
        "-/-",
        "-/-",
        "-/-",
        "-/-",
    ]
    assert (
        published(scores, "m", "Qwen/Qwen2.5-Math-7B") == []
    )  # no table number is a target for it


# The paired comparison.


def results(path, problems, **settings):
    parts = {
        name: dict(k=4, temperature=0.6, template="r1", style="think", problems="0", skipped=0)
        | settings
        for name in problems
    }
    path.write_text(json.dumps({"scores": {}, "settings": {"parts": parts}, "problems": problems}))
    return path


def test_comparison_of_noise_and_of_a_difference(tmp_path):
    rng = random.Random(0)
    base = {str(i): rng.randint(0, 4) / 4 for i in range(200)}
    noise = {id: min(1, max(0, value + rng.choice((-0.25, 0, 0.25)))) for id, value in base.items()}
    better = {id: min(1, value + 0.25 * (int(id) % 2)) for id, value in base.items()}
    a = results(tmp_path / "a.json", {"x": base, "y": base, "z": base})
    b = results(tmp_path / "b.json", {"x": noise, "y": better, "w": base}, k=8)
    lines = compare(a, b)
    assert lines[:2] == ["they differ in x's k too: 4 and 8", "they differ in y's k too: 4 and 8"]
    cells = {line.split()[0]: line for line in lines[3:]}
    assert (
        list(cells) == ["x", "y", "mean"]
        and "may be chance" in cells["x"]
        and "may be chance" not in cells["y"]
    )
    difference = [better[id] - base[id] for id in base]
    low, high = (float(x) for x in cells["y"].partition("[")[2].partition("]")[0].split(","))
    half = 1.96 * 100 * statistics.stdev(difference) / math.sqrt(200)
    assert (low + high) / 2 == pytest.approx(100 * statistics.mean(difference), abs=0.3) and (
        high - low
    ) / 2 == pytest.approx(half, rel=0.1)
    other = results(tmp_path / "c.json", {"x": base}, template="qwen-math", style="boxed")
    assert [line for line in compare(a, other) if line.startswith("they")] == [
        "they differ in x's template too: r1 and qwen-math",
        "they differ in x's style too: think and boxed",
    ]
    assert compare(a, b) == lines  # drawn with a fixed seed
    assert [line.split()[1:4] for line in compare(a, a)[1:4]] == [
        ["200", f"{100 * statistics.mean(base.values()):.2f}"]
        + [f"{100 * statistics.mean(base.values()):.2f}"]
    ] * 3


def test_pairs_are_paired(tmp_path):
    """The same scores in another order of problems are no difference; problems of one file alone are named and left out."""
    base = {str(i): float(i % 3 == 0) for i in range(90)}
    a, b = (
        results(tmp_path / "a.json", {"x": base}),
        results(tmp_path / "b.json", {"x": dict(reversed(base.items())) | {"new": 1.0}}),
    )
    lines = compare(a, b)
    assert lines[0] == "x: 1 problems are in one of the two only, and left out"
    assert "[+0.00, +0.00]" in lines[-1] and lines[-1].split()[1] == "90"


@pytest.mark.parametrize(
    "text, why",
    [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"problems": {}}', "settings"),
        ("[" * 100_000, "RecursionError"),
        ('{"problems": {"x": {"a": "1"}}, "settings": {}}', "no number"),
        ('{"problems": {"y": {"a": 1}}, "settings": {}}', "nothing to compare"),
        (
            '{"problems": {"x": {"b": 1}}, "settings": {"parts": {"x": {"problems": "0", "skipped": 1, "k": 4}}}}',
            "no problem of x",
        ),
        (
            '{"problems": {"x": {"a": 1}}, "settings": {"parts": {"x": {"problems": "1", "skipped": 0}}}}',
            "other problems",
        ),
    ],
)
def test_files_that_cannot_be_compared(tmp_path, text, why):
    good, bad = results(tmp_path / "a.json", {"x": {"a": 1.0}}), tmp_path / "b.json"
    if text is not None:
        bad.write_text(text)
    with pytest.raises(ValueError, match=why):
        compare(good, bad)


def test_the_chart_is_a_picture(tmp_path):
    score.chart(
        {
            "aime24": summarise([row("a", 1, "1"), row("b", 0, "2")]),
            "toy": summarise([row("a", 0, "1")]),
        },
        tmp_path / "bars.png",
        "a model",
    )
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "bars.png"
    ).stat().st_size > 5000


def test_rows_by_problem():
    rows = [row("a", 1), row("b", 1), row("a", 0)]
    assert by_problem(rows) == {"a": [rows[0], rows[2]], "b": [rows[1]]}
