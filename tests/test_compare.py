"""compare.py and plot.py: what is measured on a run, the tables and pictures made of it, which runs are still to do."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tools import compare, plot

ROOT = Path(__file__).parents[1]


def write_run(
    folder, algo="ppo", lr=2e-4, seed=0, steps=40, fresh=64, mixed=0, lag=1500, eval_every=4
):
    """A run folder as train.py leaves it, with smooth made-up curves. mixed: steps of the mixed phase."""
    folder.mkdir(parents=True)
    values = dict(algo=algo, lr=lr, seed=seed, steps=steps, utd=1, out=str(folder))
    (folder / "config.json").write_text(
        json.dumps({"values": values, "sources": dict.fromkeys(values, "flag")})
    )
    names = """step phase fresh_rollouts total_rollouts entropy kl_base kl_prev ratio_mean_fresh ratio_mean_history
        staleness length_mean reflection_rate eval_accuracy eval_length_mean seconds_step"""
    lines, total = [], 0
    for step in range(steps + 1):
        row, noise = dict.fromkeys(names.split()), 0.02 * math.sin(7 * step + 3 * seed)
        row |= dict(step=step, phase="evaluation")
        if step:
            row |= dict(
                phase="on-policy",
                fresh_rollouts=fresh,
                staleness=[64],
                seconds_step=0.4 + 0.1 * noise,
                entropy=1 - 0.01 * step + noise,
                kl_base=1e-3 * step,
                length_mean=20 + noise,
                ratio_mean_fresh=1.0,
            )
        if 0 < step <= mixed:
            row |= dict(
                phase="mixed",
                fresh_rollouts=38,
                staleness=[38, 13, 13],
                kl_prev=1e-4 * (1.5 + noise),
                ratio_mean_history=0.99 + noise / 10,
            )
        total += row["fresh_rollouts"] or 0
        row["total_rollouts"] = total if step else None
        if step % eval_every == 0 or step == steps:
            row |= dict(
                eval_accuracy=0.25 + 0.65 * (1 - math.exp(-total / lag)) + noise,
                eval_length_mean=20 + noise,
            )
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    return folder


def command(script, *arguments, cwd=ROOT):
    arguments = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 20_000


# What is measured.


@pytest.mark.parametrize(
    "accuracies, expected",
    [
        (
            (0.1, 0.2, 0.9, 0.7, 0.8, 0.8),
            300,
        ),  # 0.15, 0.4, 0.6, 0.8: one lucky evaluation is not enough
        ((0.5, 0.9, 0.9), 0),  # first point: mean of two, 0.7 exactly
        ((0.1, 0.4, 0.6, 0.8), 300),  # last point: mean of two, 0.7 exactly
        ((0.1, 0.2, 0.6, 0.79), None),  # last: 0.695
        ((0.7, 0.7, 0.7), 0),  # rounding must not matter: (0.7 + 0.7 + 0.7) / 3 < 0.7 in floats
        ((0.7,), 0),
        ((0.6,), None),
        ((), None),
    ],
)
def test_rollouts_to_target(accuracies, expected):
    assert (
        compare.rollouts_to_target([(100 * i, y) for i, y in enumerate(accuracies)], 0.7)
        == expected
    )


def summaries(*pairs):
    return [
        dict(rollouts=r, accuracy=a, length=20.0, seconds=30.0, points=[(0, 0.2), (r or 500, a)])
        for r, a in pairs
    ]


def test_median_counts_what_never_arrived_as_infinite():
    assert compare.median_rollouts(summaries((300, 0.7), (None, 0.6), (100, 0.8))) == 300
    assert compare.median_rollouts(summaries((None, 0.7), (None, 0.6), (100, 0.8))) == math.inf
    assert compare.median_rollouts(summaries((300, 0.7), (100, 0.8))) == 200


def test_best_lr():
    slow, fast = summaries((400, 0.9), (400, 0.9)), summaries((300, 0.72), (300, 0.72))
    never, never_better = summaries((None, 0.5), (100, 0.5)), summaries((None, 0.6), (None, 0.7))
    assert compare.best_lr({1e-4: slow, 2e-4: fast, 4e-4: never}) == (2e-4, "rollouts")
    assert compare.best_lr({1e-4: never, 2e-4: never_better}) == (2e-4, "accuracy")
    tie = summaries((300, 0.75), (300, 0.75))
    assert compare.best_lr({1e-4: fast, 2e-4: tie, 4e-4: slow}) == (2e-4, "accuracy")


def test_summary_of_a_run(tmp_path):
    run = plot.load_run(write_run(tmp_path / "a", steps=8, eval_every=4))
    rows = run["metrics"]
    seen = compare.summary(run, target=0.3)
    assert seen["points"] == [(64 * step, rows[step]["eval_accuracy"]) for step in (0, 4, 8)]
    assert seen["accuracy"] == pytest.approx(sum(rows[i]["eval_accuracy"] for i in (0, 4, 8)) / 3)
    assert seen["seconds"] == pytest.approx(sum(row["seconds_step"] for row in rows[1:]))
    assert seen["rollouts"] == 0 and compare.summary(run, target=0.99)["rollouts"] is None
    for row in rows:
        row["eval_accuracy"] = row["eval_length_mean"] = None
    assert (
        math.isnan(compare.summary(run, 0.3)["accuracy"])
        and compare.summary(run, 0.3)["rollouts"] is None
    )


# Tables and picture.


def test_tables_hide_nothing(tmp_path):
    results = {
        "ppo": {
            1e-4: summaries((400, 0.71), (500, 0.75), (None, 0.6)),
            2e-4: summaries((300, 0.8)),
        },
        "grpo": {5e-5: []},
    }
    text = compare.tables(results, budget=1000, target=0.7, seeds=3)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert lines[0][2] == "fresh rollouts to 70%: median [each seed]"
    assert ["ppo", "2e-4", "300 [300]", "0.800 [0.800, 0.800]", "20.0", "30.0", "rollouts"] in lines
    assert ["grpo", "-", "-", "-", "-", "-", "-"] in lines
    assert [
        "ppo",
        "1e-4",
        "3 of 3",
        "500 [400, 500, >1000]",
        "0.710 [0.600, 0.750]",
        "20.0",
        "30.0",
    ] in lines
    assert ["ppo", "2e-4 *", "1 of 3", "300 [300]", "0.800 [0.800, 0.800]", "20.0", "30.0"] in lines
    assert ["grpo", "5e-5", "0 of 3", "-", "-", "-", "-"] in lines
    assert (
        len({len(line) for line in text.splitlines() if line.startswith("| ppo ")}) == 2
    )  # each table is aligned


def test_table_and_picture_from_run_folders(tmp_path):
    results = {row: {} for row in compare.ROWS}
    for i, row in enumerate(compare.ROWS):
        for lr in (1e-4, 2e-4):
            lag = 900 + 300 * i - 1e6 * lr  # the higher lr is the faster one
            folders = [
                write_run(tmp_path / f"{i}-{lr}-{seed}", row, lr, seed, lag=lag)
                for seed in range(3)
            ]
            results[row][lr] = [compare.summary(plot.load_run(folder), 0.7) for folder in folders]
    text = compare.tables(results, 2560, 0.7, 3)
    assert text.count("3 of 3") == 16 and text.count("2e-4 *") == 8
    compare.picture(results, 2560, 0.7, tmp_path / "compare.png")
    assert is_picture(tmp_path / "compare.png")
    compare.picture({row: {} for row in compare.ROWS}, 2560, 0.7, tmp_path / "empty.png")


# Which runs are still to do.


def test_state_of(tmp_path):
    assert compare.state_of(tmp_path / "none", 8) == "new"
    (tmp_path / "empty").mkdir()
    assert compare.state_of(tmp_path / "empty", 8) == "new"
    run = write_run(tmp_path / "a", steps=8)
    assert compare.state_of(run, 8) == "complete"
    assert compare.state_of(run, 9) == "interrupted"
    (run / "model" / "config.json").unlink()
    assert compare.state_of(run, 8) == "interrupted"
    for text in ("", '{"step": 8', "[]\n"):
        (run / "metrics.jsonl").write_text(text)
        assert compare.state_of(run, 8) == "interrupted"
    (run / "metrics.jsonl").unlink()
    assert compare.state_of(run, 8) == "interrupted"


@pytest.mark.parametrize("row", compare.ROWS)
def test_plan_meets_the_budget_and_no_more(row):
    flags, steps = compare.plan(row, seed=1, budget=3000, lr=1e-4)
    cfg = compare.parse(flags)
    assert compare.total_rollouts(cfg, steps - 1) < 3000 <= compare.total_rollouts(cfg, steps)
    assert (cfg.steps, cfg.seed, cfg.lr) == (steps, 1, 1e-4)
    fresh = compare.schedule(cfg, 1).fresh * cfg.group_size
    assert abs(cfg.eval_every * fresh - 256) <= fresh / 2


def test_runs_with_other_settings_are_refused(tmp_path):
    flags, steps = compare.plan("ppo", 0, 640, 2e-4)
    values = vars(compare.parse(flags)) | {"max_gap": 1e-3}
    run = write_run(tmp_path / "a", steps=steps)
    (run / "config.json").write_text(
        json.dumps({"values": {key: v for key, v in values.items() if key != "sources"}})
    )
    assert compare.train(run, flags, steps) is None  # complete: nothing is started
    changed = [*flags, "--clip_low", "0.3"]
    assert compare.other_settings(run, changed) == {"clip_low": (0.2, 0.3)}
    assert "clip_low was 0.2, is 0.3" in compare.train(run, changed, steps)


def test_bad_flags_are_answered_before_anything_runs(tmp_path):
    for arguments in ("--budget 0", "--lrs 1e-4", "--seeds a", "demo --seeds 0", "--nproc 2"):
        answer = command("tools/compare.py", *arguments.split(), cwd=tmp_path)
        assert answer.returncode == 2 and "error:" in answer.stderr and not list(tmp_path.iterdir())


# The commands, with a train.py that writes made-up runs.

FAKE_TRAIN = """
import sys, pathlib
sys.path[:0] = [{root!r}, {tests!r}]
import test_compare
from infra import config
cfg = config.parse(sys.argv[1:])
print("training", *sys.argv[1:])
if cfg.seed == 13:
    sys.exit("Boom: an unlucky seed")
out = pathlib.Path(cfg.out)
if cfg.resume:
    out.rename(out.with_name(out.name + "-before"))
import json
test_compare.write_run(out, cfg.algo, cfg.lr, cfg.seed, cfg.steps, eval_every=cfg.eval_every)
values = {{key: value for key, value in vars(cfg).items() if key != "sources"}}
(out / "config.json").write_text(json.dumps(dict(values=values)))
"""
FAKE_EVAL = """
import sys, pathlib
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir()
(out / "results.json").write_text('{"scores": {"toy": {"pass@1": 0.75, "n": 4, "length_mean": 21.5}}}')
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder in which compare.py finds its commands, in place of the repository's."""
    scripts = {
        "infra/toy.py": "print('warm')",
        "eval.py": FAKE_EVAL,
        "train.py": FAKE_TRAIN.format(root=str(ROOT), tests=str(ROOT / "tests")),
    }
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compare_command_goes_on_with_what_is_missing(fake, monkeypatch, capfd):
    monkeypatch.setattr(compare, "ROWS", ("ppo --utd 2", "grpo"))
    arguments = "--budget 640 --lrs 2e-4 --grpo_lrs 1e-4 --target 0.3".split()
    with pytest.raises(SystemExit) as stop:
        compare.main([*arguments, "--seeds", "0,13"])
    text = capfd.readouterr()
    assert "2 of 4 runs failed" in str(stop.value) and text.err.count("Boom: an unlucky seed") == 2
    folder = fake / "runs" / "compare"
    assert (
        (folder / "table.md").read_text() in text.out
        and "1 of 2" in text.out
        and is_picture(folder / "compare.png")
    )
    (folder / "grpo-lr1e-4-10steps-seed0" / "model" / "config.json").unlink()
    compare.main([*arguments, "--seeds", "0,1"])
    assert (
        capfd.readouterr().out.splitlines()[-1] == "runs/compare/table.md runs/compare/compare.png"
    )
    logs = {log.stem: log.read_text() for log in folder.glob("*.log")}
    assert {
        name: (text.count("training"), text.count("--resume")) for name, text in logs.items()
    } == {
        "ppo-utd2-lr2e-4-10steps-seed0": (1, 0),
        "ppo-utd2-lr2e-4-10steps-seed1": (1, 0),
        "ppo-utd2-lr2e-4-10steps-seed13": (1, 0),
        "grpo-lr1e-4-10steps-seed0": (2, 1),
        "grpo-lr1e-4-10steps-seed1": (1, 0),
        "grpo-lr1e-4-10steps-seed13": (1, 0),
    }


def test_demo_command_works_twice(fake, capfd):
    for n, target, ratio in ((1, 0.4, "PPO over ReMix-PPO: 0."), (2, 0.99, "No ratio:")):
        compare.main(f"demo --budget 640 --target {target} --nproc 1".split())
        out = capfd.readouterr().out
        assert (
            out.splitlines()[-1]
            == f"runs/demo-{n}/demo.png runs/demo-{n}/remix-ppo runs/demo-{n}/ppo"
        )
        assert (
            is_picture(fake / "runs" / f"demo-{n}" / "demo.png")
            and "| 0.750" in out
            and ratio in out
        )


def test_demo_says_which_command_failed(fake, capfd):
    with pytest.raises(SystemExit) as stop:
        compare.main("demo --budget 640 --nproc 1 --seed 13".split())
    assert "train.py --algo remix-ppo --seed 13" in str(stop.value) and "exit code 1" in str(
        stop.value
    )


# plot.py.


def test_series_and_staleness(tmp_path):
    run = plot.load_run(write_run(tmp_path / "a", steps=3, mixed=2, eval_every=1))
    assert plot.series(run, "step", "staleness") == [
        (1, 39 / 64),
        (2, 39 / 64),
        (3, 0),
    ]  # (13 * 1 + 13 * 2) / 64
    _, first, second, third = [row["seconds_step"] for row in run["metrics"]]
    at = [x for x, _ in plot.series(run, "seconds", "eval_accuracy")]
    assert at == pytest.approx([0, first, first + second, first + second + third])
    assert (
        plot.series(run, "step", "reflection_rate")
        == []
        == plot.series(run, "step", "no_such_metric")
    )


def test_labels_name_what_differs_but_the_seed():
    def run(**values):
        return {"config": {"values": dict(seed=0, utd=1, lr=2e-4) | values}}

    runs = [
        run(algo="ppo"),
        run(algo="ppo", seed=1),
        run(algo="ppo", utd=2, lr=1e-4),
        run(algo="remix-ppo", utd=2),
    ]
    assert plot.labels(runs) == ["ppo utd 1 lr 2e-4"] * 2 + ["ppo utd 2 lr 1e-4", "remix-ppo"]
    assert plot.labels(runs[:2]) == ["ppo", "ppo"]


def test_number():
    values = {
        2e-4: "2e-4",
        5e-05: "5e-5",
        0.00025: "2.5e-4",
        0.4: "0.4",
        0.0: "0.0",
        3: "3",
        None: "None",
    }
    assert [plot.number(value) for value in values] == list(values.values())


def test_plot_command(tmp_path):
    runs = [write_run(tmp_path / f"ppo-{seed}", seed=seed) for seed in range(3)]
    runs += [
        write_run(tmp_path / f"remix-{seed}", "remix-ppo", seed=seed, mixed=30, eval_every=7)
        for seed in range(3)
    ]
    answer = command(
        "tools/plot.py",
        *[run.relative_to(tmp_path) for run in runs],
        "--title",
        "made up",
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "ppo-0/plot.png" and is_picture(
        tmp_path / "ppo-0" / "plot.png"
    )
    answer = command("tools/plot.py", runs[0], "--out", tmp_path / "new" / "one.png")
    assert answer.stdout == f"{tmp_path}/new/one.png\n" and is_picture(tmp_path / "new" / "one.png")


def test_plot_of_a_run_that_has_barely_begun(tmp_path):
    run = write_run(tmp_path / "a", steps=0)
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": null}\n')
    answer = command("tools/plot.py", run)
    assert answer.returncode == 0 and answer.stderr == "" and is_picture(run / "plot.png")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda run: (run / "metrics.jsonl").unlink(),
            "metrics.jsonl: missing, or not that of a run (FileNotFoundError)",
        ),
        (lambda run: (run / "metrics.jsonl").write_text(""), "metrics.jsonl: no metrics yet"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n{"st'),
            "metrics.jsonl, line 2: not a JSON object",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_text("3\n"),
            "metrics.jsonl, line 1: not a JSON object",
        ),
        (
            lambda run: (run / "config.json").unlink(),
            "config.json: missing, or not that of a run (FileNotFoundError)",
        ),
        (
            lambda run: (run / "config.json").write_text("{}"),
            "config.json: missing, or not that of a run (KeyError)",
        ),
        (lambda run: run.rename(run.with_name("moved")), "run: no such folder"),
    ],
)
def test_plot_answers_bad_input_in_one_line(tmp_path, spoil, message):
    run = write_run(tmp_path / "run", steps=4)
    spoil(run)
    answer = command("tools/plot.py", run)
    assert answer.returncode == 2 and answer.stdout == ""
    assert (
        answer.stderr.startswith("error: ")
        and message in answer.stderr
        and answer.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.jsonl", "[" * 100_000),
        ("metrics.jsonl", '{"step": 0, "entropy": "high"}'),
        ("metrics.jsonl", '{"step": 0, "staleness": [1, "a"]}'),
        ("metrics.jsonl", '{"step": ' + "9" * 5000 + "}"),
        ("metrics.jsonl", '{"step": [1]}'),
        ("metrics.jsonl", b"\xff\xfe"),
        ("config.json", "[" * 100_000),
        ("config.json", b"\xff\xfe"),
        ("config.json", '{"values": [1]}'),
    ],
)
def test_a_strangers_run_is_one_line(tmp_path, name, text):
    run = write_run(tmp_path / "run", steps=4)
    (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=name) as error:
        plot.load_run(run)
    assert "\n" not in str(error.value)
    if name == "config.json":
        assert "run has no readable config.json" in compare.train(run, ["--steps", "4"], 4)


def test_plot_refuses_a_file_type_it_cannot_write(tmp_path):
    answer = command(
        "tools/plot.py", write_run(tmp_path / "run", steps=4), "--out", tmp_path / "a.xyz"
    )
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "xyz" in answer.stderr
