"""compare.py and plot.py: what is measured on a run, tables and pictures, which runs are to do."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from tools import compare, plot

ROOT = Path(__file__).parents[1]


def write_run(folder, algo="ppo", lr=2e-4, seed=0, steps=40, mixed=0, lag=1500, eval_every=4):
    """A run folder as train.py leaves it, of smooth made-up curves. mixed: steps of that phase."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    values = dict(algo=algo, lr=lr, seed=seed, steps=steps, utd=1, out=str(folder))
    (folder / "config.json").write_text(json.dumps({"values": values, "argv": [[]]}))
    names = """step phase fresh_rollouts total_rollouts entropy kl_base kl_prev ratio_mean_fresh
        ratio_mean_history staleness length_mean reflection_rate eval_accuracy eval_length_mean
        eval_accuracy_by_part seconds_step""".split()
    lines, total = [], 0
    for step in range(steps + 1):
        noise = 0.02 * math.sin(7 * step + 3 * seed)
        row = dict.fromkeys(names) | dict(step=step, phase="evaluation")
        if step:
            row |= dict(phase="on-policy", fresh_rollouts=64, staleness=[64], ratio_mean_fresh=1.0)
            row |= dict(entropy=1 - 0.01 * step + noise, kl_base=1e-3 * step)
            row |= dict(length_mean=20 + noise, seconds_step=0.4 + 0.1 * noise)
        if 0 < step <= mixed:
            row |= dict(phase="mixed", fresh_rollouts=38, staleness=[38, 13, 13])
            row |= dict(kl_prev=1e-4 * (1.5 + noise), ratio_mean_history=0.99 + noise / 10)
        total += row["fresh_rollouts"] or 0
        row["total_rollouts"] = total if step else None
        if step % eval_every == 0 or step == steps:
            accuracy = 0.25 + 0.65 * (1 - math.exp(-total / lag)) + noise
            row |= dict(eval_accuracy=accuracy, eval_length_mean=20 + noise)
            row |= dict(eval_accuracy_by_part={"toy": accuracy})
        lines.append(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
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
        # means 0.15, 0.4, 0.6, 0.8: one lucky evaluation is not enough
        ((0.1, 0.2, 0.9, 0.7, 0.8, 0.8), 300),
        ((0.5, 0.9, 0.9), 0),  # first point: mean of two, 0.7 exactly
        ((0.1, 0.4, 0.6, 0.8), 300),  # last point: mean of two, 0.7 exactly
        ((0.1, 0.2, 0.6, 0.79), math.inf),  # last: 0.695
        ((0.7, 0.7, 0.7), 0),  # (0.7 + 0.7 + 0.7) / 3 < 0.7 in floats
        ((0.7,), 0),
        ((0.6,), math.inf),
        ((), math.inf),
    ],
)
def test_rollouts_to_target(accuracies, expected):
    points = pd.Series(accuracies, index=[100 * i for i in range(len(accuracies))], dtype=float)
    assert compare.rollouts_to_target(points, 0.7) == expected


def results(rows):
    """{row: {lr: [(rollouts, accuracy) or None where the run has not finished]}} as `results`."""
    records = []
    for row, by_lr in rows.items():
        for lr, seeds in by_lr.items():
            for one in seeds:
                seen = (
                    dict(length=20.0, seconds=30.0, rollouts=one[0], accuracy=one[1]) if one else {}
                )
                records.append(dict(row=row, lr=lr) | seen)
    return pd.DataFrame(records, columns="row lr rollouts accuracy length seconds".split())


FAST, SLOW = [(300, 0.72), (300, 0.72)], [(400, 0.9), (400, 0.9)]
NEVER, BETTER = [(math.inf, 0.5), (100, 0.5)], [(math.inf, 0.6), (math.inf, 0.7)]


@pytest.mark.parametrize(
    "by_lr, expected",
    [
        ({1e-4: SLOW, 2e-4: FAST, 4e-4: NEVER}, (2e-4, "rollouts")),
        ({1e-4: NEVER, 2e-4: BETTER}, (2e-4, "accuracy")),
        ({1e-4: FAST, 2e-4: [(300, 0.75), (300, 0.75)], 4e-4: SLOW}, (2e-4, "accuracy")),
        ({1e-4: [None, None], 2e-4: [None, (math.inf, 0.1)]}, (2e-4, "accuracy")),
        ({1e-4: [None], 2e-4: [None]}, (1e-4, "-")),
    ],
)
def test_best_lr(by_lr, expected):
    assert compare.best_lr(results({"ppo": by_lr})) == expected


def test_summary_of_a_run(tmp_path):
    folder = write_run(tmp_path / "a", steps=8)
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    seen = compare.summary(plot.load_run(folder), target=0.3)
    expected = [(64 * step, rows[step]["eval_accuracy"]) for step in (0, 4, 8)]
    assert list(seen["points"].items()) == expected
    assert seen["accuracy"] == pytest.approx(sum(rows[i]["eval_accuracy"] for i in (0, 4, 8)) / 3)
    assert seen["seconds"] == pytest.approx(sum(row["seconds_step"] for row in rows[1:]))
    assert seen["rollouts"] == 0
    assert compare.summary(plot.load_run(folder), target=0.99)["rollouts"] == math.inf


def test_tables_hide_nothing():
    three = [(400, 0.71), (500, 0.75), (math.inf, 0.6)]
    rows = {"ppo": {1e-4: three, 2e-4: [(300, 0.8), None, None]}, "grpo": {5e-5: [None] * 3}}
    text = compare.tables(results(rows), budget=1000, target=0.7)
    table = [line for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert lines[0][2] == "fresh rollouts to 70%: median [each base and seed]"
    best = ["300 [300]", "0.800 [0.800, 0.800]", "20.0", "30.0"]
    other = ["500 [400, 500, >1000]", "0.710 [0.600, 0.750]", "20.0", "30.0"]
    for line in (
        ["ppo", "2e-4", *best, "rollouts"],
        ["grpo", "5e-5", "-", "-", "-", "-", "-"],
        ["ppo", "1e-4", "3 of 3", *other],
        ["ppo", "2e-4 *", "1 of 3", *best],
        ["grpo", "5e-5 *", "0 of 3", "-", "-", "-", "-"],
    ):
        assert line in lines
    assert len({len(line) for line in table}) == 2  # each table is aligned


def test_picture_of_all_rows(tmp_path):
    records = []
    for i, row in enumerate(compare.ROWS.split(",")):
        for seed in range(3):
            run = plot.load_run(
                write_run(tmp_path / f"{i}-{seed}", row, seed=seed, lag=900 + 300 * i)
            )
            records.append(dict(row=row, lr=2e-4) | compare.summary(run, 0.7))
    compare.picture(pd.DataFrame(records), 2560, 0.7, tmp_path / "compare.png")
    assert is_picture(tmp_path / "compare.png")
    none = results({"ppo": {1e-4: [None]}})
    compare.picture(none, 2560, 0.7, tmp_path / "empty.png")


# Which runs are still to do.


def test_complete(tmp_path):
    run = write_run(tmp_path / "a", steps=8)
    assert compare.complete(run, 8) and not compare.complete(run, 9)
    (run / "model" / "config.json").unlink()
    assert not compare.complete(run, 8) and not compare.complete(tmp_path / "none", 8)


@pytest.mark.parametrize("row", compare.ROWS.split(","))
def test_plan_meets_the_budget_and_no_more(row):
    flags, steps = compare.plan(row, 2, seed=1, budget=3000, lr=1e-4)
    cfg = compare.settings(flags)
    assert compare.total_rollouts(cfg, steps - 1) < 3000 <= compare.total_rollouts(cfg, steps)
    assert (cfg.steps, cfg.base_seed, cfg.seed, cfg.lr) == (steps, 2, 1, 1e-4)
    fresh = compare.total_rollouts(cfg, 1)
    assert abs(cfg.eval_every * fresh - 256) <= fresh / 2


def save_config(folder, cfg):
    """config.json as train.py writes it."""
    values = {key: value for key, value in vars(cfg).items() if key not in ("given", "sources")}
    (folder / "config.json").write_text(json.dumps({"values": values, "argv": [[]]}))


def test_runs_with_other_settings_are_refused(tmp_path):
    flags, steps = compare.plan("ppo", 0, 0, 640, 2e-4)
    run = write_run(tmp_path / "a", steps=steps)
    save_config(run, compare.settings([*flags, "--micro_tokens", "150"]))
    compare.train(run, flags, steps)  # the same but for the machine, and complete: nothing to start
    assert not run.with_suffix(".log").exists()
    changed = [*flags, "--clip_low", "0.3", "--data_dir", "x"]
    assert compare.other_settings(run, changed) == dict(clip_low=(0.2, 0.3), data_dir=(None, "x"))
    with pytest.raises(ValueError, match="a was run with other settings .clip_low was 0.2, is 0.3"):
        compare.train(run, changed, steps)


# The commands, with made-up runs in place of those that they start.


def made_up(command, stdout=None, **how):
    """subprocess.run for compare.py: what train.py and eval.py would leave; seed 13 is unlucky."""
    print("started", *command[1:], file=stdout)
    out = Path(command[-1] if command[-1] != "--resume" else command[-2])
    if "eval.py" in command:
        scores = {"pass@1": 0.75, "length_mean": 21.5}
        out.mkdir()
        (out / "results.json").write_text(json.dumps({"scores": {"toy": scores}}))
    if "train.py" in command:
        cfg = compare.parse(command[command.index("train.py") + 1 :])
        if cfg.seed == 13:
            print("Boom: an unlucky seed", file=stdout)
            return subprocess.CompletedProcess(command, 1)
        if cfg.resume:
            out.rename(out.with_name(out.name + "-before"))
        write_run(out, cfg.algo, cfg.lr, cfg.seed, cfg.steps, eval_every=cfg.eval_every)
        save_config(out, cfg)
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An empty folder to call compare.py in."""
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=made_up, STDOUT=None))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_compare_command_goes_on_with_what_is_missing(fake, monkeypatch, capfd):
    arguments = "--budget 640 --lrs 2e-4 --grpo_lrs 1e-4 --target 0.3 --bases 3".split()
    arguments += ["--rows", "ppo --utd 2,grpo"]
    with pytest.raises(SystemExit) as stop:
        compare.main([*arguments, "--seeds", "0,13"])
    text, folder = capfd.readouterr(), fake / "runs" / "compare"
    assert "2 of 4 runs failed" in str(stop.value) and text.err.count("Boom: an unlucky seed") == 2
    assert (folder / "table.md").read_text() in text.out and "1 of 2" in text.out
    assert is_picture(folder / "compare.png")
    points = pd.read_json(folder / "results.jsonl", lines=True)
    assert list(points["seed"]) == [0, 13] * 2 and points["accuracy"].notna().sum() == 2
    (folder / "grpo-lr1e-4-5steps-base3-seed0" / "model" / "config.json").unlink()
    compare.main([*arguments, "--seeds", "0,1", "--dry_run"])
    assert re.fullmatch(
        r"3 of 4 runs to do, 2 at once, \d+ s each: 0.0 hours\n", capfd.readouterr().out
    )
    compare.main([*arguments, "--seeds", "0,1"])
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == "runs/compare/table.md runs/compare/compare.png"
    done = {}
    for log in folder.glob("*.log"):
        done[log.stem] = (
            log.read_text().count("started train.py"),
            log.read_text().count("--resume"),
        )
    names = [f"ppo-utd2-lr2e-4-5steps-base3-seed{seed}" for seed in (0, 1, 13)]
    names += [f"grpo-lr1e-4-5steps-base3-seed{seed}" for seed in (0, 1, 13)]
    assert done == dict.fromkeys(names, (1, 0)) | {names[3]: (2, 1)}


def test_demo_command(fake, capfd):
    (fake / "runs" / "demo-1").mkdir(parents=True)  # an earlier one, which stays
    compare.main("demo --budget 640 --target 0.4 --nproc 1".split())
    out = capfd.readouterr().out
    assert out.splitlines()[-1] == "runs/demo-2/demo.png runs/demo-2/remix-ppo runs/demo-2/ppo"
    assert is_picture(fake / "runs" / "demo-2" / "demo.png") and "| 0.750" in out
    assert "started -m torch.distributed.run --standalone --nproc_per_node 1 train.py --algo" in out
    assert "40%, PPO over ReMix-PPO: above 1.11 [?, above 1.67], one base and seed" in out


def reached(rollouts, earliest, latest):
    return dict(rollouts=rollouts, earliest=earliest, latest=latest)


NOT, PPO = reached(math.inf, 300, math.inf), reached(300, 200, 500)


@pytest.mark.parametrize(
    "remix, ppo, text",
    [
        (reached(200, 100, 400), PPO, "PPO over ReMix-PPO: 1.50 [0.50, 5.00], one base"),
        (reached(200, 100, 400), NOT, "ReMix-PPO: above 5.00 [0.75, above 10.00], one base"),
        (reached(200, 0, math.inf), PPO, "PPO over ReMix-PPO: 1.50 [?, ?], one base"),
        (NOT, PPO, "No ratio: ReMix-PPO did not go from below to 50% within 1000 fresh"),
        (reached(0, 0, 0), PPO, "No ratio:"),
    ],
)
def test_the_sentence_of_the_demo(remix, ppo, text):
    assert text in compare.sentence(remix, ppo, 0.5, 1000)


def test_demo_says_which_command_failed(fake, capfd):
    with pytest.raises(SystemExit) as stop:
        compare.main("demo --budget 640 --nproc 1 --seed 13".split())
    assert "train.py --algo remix-ppo --base_seed 0 --seed 13" in str(stop.value)
    assert "exit code 1" in str(stop.value)


@pytest.mark.parametrize("flags", ["--lrs 1e-4", "--seeds a", "demo --seeds 0", "--nproc 2"])
def test_bad_flags_are_answered_before_anything_runs(fake, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        compare.main(flags.split())
    text = capfd.readouterr()
    assert stop.value.code == 2 and text.out == "" and not (fake / "runs").exists()
    assert text.err.startswith("error: ") and text.err.count("\n") == 1


# plot.py.


def test_series_and_staleness(tmp_path):
    run = plot.load_run(write_run(tmp_path / "a", steps=3, mixed=2, eval_every=1))
    ages = plot.series(run, "step", "staleness")  # (13 * 1 + 13 * 2) / 64
    assert list(ages.items()) == [(1, 39 / 64), (2, 39 / 64), (3, 0)]
    seconds = plot.series(run, "step", "seconds_step").cumsum()
    at = plot.series(run, "seconds", "eval_accuracy").index
    assert list(at) == pytest.approx([0, *seconds])
    assert plot.series(run, "step", "reflection_rate").empty
    assert plot.series(run, "step", "no_such_metric").empty


def test_labels_name_what_differs_but_the_seed():
    def run(**values):
        return plot.Run(dict(seed=0, utd=1, lr=2e-4) | values, None)

    one, other = run(algo="ppo"), run(algo="ppo", seed=1)
    runs = [one, other, run(algo="ppo", utd=2, lr=1e-4), run(algo="remix-ppo", utd=2)]
    assert plot.labels(runs) == ["ppo utd 1 lr 2e-4"] * 2 + ["ppo utd 2 lr 1e-4", "remix-ppo"]
    assert plot.labels([one, other]) == ["ppo", "ppo"]


def test_number():
    texts = {2e-4: "2e-4", 5e-05: "5e-5", 0.00025: "2.5e-4", 0.4: "0.4", 0.0: "0.0", 3: "3"}
    assert [plot.number(value) for value in texts] == list(texts.values())


def test_plot_command(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"ppo-{seed}", seed=seed)
        write_run(tmp_path / f"remix-{seed}", "remix-ppo", seed=seed, mixed=30, eval_every=7)
    runs = sorted(path.name for path in tmp_path.iterdir())
    answer = command("tools/plot.py", *runs, "--title", "made up", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "ppo-0/plot.png\n" and is_picture(tmp_path / "ppo-0" / "plot.png")
    new = tmp_path / "new" / "one.png"
    assert command("tools/plot.py", tmp_path / runs[0], "--out", new).stdout == f"{new}\n"
    assert is_picture(new)


def test_the_band_and_the_median_of_seeds():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    lines = [pd.Series(y, index=[1, 2, 3]) for y in ([1.0, 5, 3], [2.0, 2, 9], [0.0, 3, 4])]
    plot.curve(axis, lines, "red")
    (line,), (band,) = axis.lines, axis.collections
    assert list(line.get_ydata()) == [1, 3, 4]
    assert band.get_datalim(axis.transData).get_points().tolist() == [[1, 0], [3, 9]]
    plot.curve(axis, [lines[0], lines[1].iloc[:2], lines[0].iloc[:0]], "blue")
    assert len(axis.lines) == 3 and len(axis.collections) == 1  # x differs: a line each, no band


def test_plot_of_a_run_that_has_barely_begun(tmp_path):
    run = write_run(tmp_path / "a", steps=0)
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_accuracy": null}\n')
    answer = command("tools/plot.py", run)
    assert answer.returncode == 0 and answer.stderr == "" and is_picture(run / "plot.png")


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.jsonl", None),
        ("metrics.jsonl", ""),
        ("metrics.jsonl", '{"step": 0}\n{"st'),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", "[" * 100_000),
        ("metrics.jsonl", '{"step": 0, "entropy": "high"}'),
        ("metrics.jsonl", '{"step": 0, "staleness": [1, "a"]}'),
        ("metrics.jsonl", '{"step": ' + "9" * 5000 + "}"),
        ("metrics.jsonl", '{"step": [1]}'),
        ("metrics.jsonl", b"\xff\xfe"),
        ("config.json", None),
        ("config.json", "{}"),
        ("config.json", "[" * 100_000),
        ("config.json", b"\xff\xfe"),
        ("config.json", '{"values": [1]}'),
    ],
)
def test_a_broken_run_is_one_line(tmp_path, name, text):
    run = write_run(tmp_path / "run", steps=4)
    (run / name).unlink()
    if text is not None:
        (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=name) as error:
        plot.load_run(run)
    assert "\n" not in str(error.value) and not compare.complete(run, 4)


@pytest.mark.parametrize("arguments", [["moved"], ["run", "--out", "a.xyz"], []])
def test_plot_answers_bad_input_in_one_line(tmp_path, arguments):
    write_run(tmp_path / "run", steps=4)
    answer = command("tools/plot.py", *arguments, cwd=tmp_path)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
