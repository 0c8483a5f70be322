"""Whole runs, disturbed for real: `make stress`, about half an hour on two cores. `make test` has a small share of it (test_train.py).

Every disturbed run is compared with one that nobody disturbed, line by line of metrics.jsonl, but for times and memory.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time

import pytest

from conftest import Running, command, comparable, gone, metrics_of
from infra import checkpoint, toy

FLAGS = (
    "--p 0.6 --window 2 --minibatch 8 --reincarnate 4 --lambda_start 1 --lambda_every 1 --save_every 1 --keep 100 --eval_every 6 "
    "--eval_k 1"
).split()
PROMPTS = {"remix-ppo": 20, "remix-grpo": 10}
LONG = (
    "--algo",
    "ppo",
    "--prompts",
    40_000,
    "--eval_every",
    0,
)  # a first step of minutes, most of it in the engine


def lines_of(folder):
    return [comparable(line) for line in metrics_of(folder)]


def close(lines, wanted):
    """Equal to rounding: what another number of ranks may change."""
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for a, b in zip(lines, wanted):
        for key in a:
            assert a[key] == b[key] or abs(a[key] - b[key]) < 1e-3, (a["step"], key, a[key], b[key])


def finished(*flags, ranks):
    done = command("train.py", *flags, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def begun(tmp_path):
    """begun(*flags, ranks=2) -> a run of the embedded default in tmp_path/run, in the background; it ends with the test."""
    runs = []
    toy.model_folder()

    def start(*flags, ranks=2, out=tmp_path / "run"):
        runs.append(
            Running(tmp_path / f"{len(runs)}.log", "train.py", *flags, "--out", out, ranks=ranks)
        )
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.process.wait()


# Exact resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(algo, ranks) -> folder of an undisturbed run of eight steps with a checkpoint after each."""
    toy.model_folder()
    folder, runs = tmp_path_factory.mktemp("whole"), {}

    def run(algo, ranks):
        out = folder / f"{algo}-{ranks}"
        if out not in runs:
            runs[out] = finished(
                *FLAGS,
                "--algo",
                algo,
                "--prompts",
                PROMPTS[algo],
                "--steps",
                8,
                "--out",
                out,
                ranks=ranks,
            )
        return out

    return run


def stopped_after(folder, step, out):
    """A copy of a run as it would be had it been killed in the step after `step`: one step's records too many."""
    shutil.copytree(folder, out)
    for path in checkpoint.complete(out):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [line for line in open(out / name) if json.loads(line)["step"] <= step + 1]
        (out / name).write_text("".join(kept) + '{"step": 9, "cut')
    shutil.rmtree(out / "model")
    return out


@pytest.mark.parametrize("step", (3, 4, 5, 6))  # before, at and after reincarnation; an evaluation
@pytest.mark.parametrize("algo", PROMPTS)
def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path, algo, step):
    out = stopped_after(whole(algo, 2), step, tmp_path / "run")
    assert f"resuming after step {step}" in finished("--resume", "--out", out, ranks=2)
    assert [line["step"] for line in lines_of(out)] == list(range(9)) and lines_of(out) == lines_of(
        whole(algo, 2)
    )
    for name in (
        "samples.jsonl",
        "model/model.safetensors",
        "checkpoints/step_000008/buffer.safetensors",
    ):
        assert (out / name).read_bytes() == (whole(algo, 2) / name).read_bytes(), name


@pytest.mark.parametrize("before, after", ((2, 1), (1, 2)))
@pytest.mark.parametrize("algo", PROMPTS)
def test_a_run_resumed_on_another_number_of_ranks(whole, tmp_path, algo, before, after):
    """The same prompts, draws and minibatches; numbers equal to rounding."""
    out = stopped_after(whole(algo, before), 3, tmp_path / "run")
    finished("--resume", "--out", out, ranks=after)
    close(lines_of(out), lines_of(whole(algo, before)))
    close(lines_of(out), lines_of(whole(algo, after)))
    a, b = (
        [
            (s["step"], s["prompt"], s["response"])
            for s in map(json.loads, open(folder / "samples.jsonl"))
        ]
        for folder in (out, whole(algo, after))
    )
    assert a == b


# Kills


def kill(run, what):
    """kill -9 of: `rank` (one of the two), `ranks`, `torchrun` alone, its process `group`."""
    ranks = run.ranks
    if not ranks:  # torchrun itself has hardly begun
        what = "group"
    if what == "group":
        os.killpg(run.pid, signal.SIGKILL)
    for pid in {"rank": ranks[-1:], "ranks": ranks, "torchrun": [run.pid], "group": []}[what]:
        os.kill(pid, signal.SIGKILL)
    return ranks


def moment(run, out, when, rng):
    """Wait for a moment to kill at: while it comes to its `start`, some `time` in its steps, a `checkpoint` half written, a line of `metrics` being flushed."""
    end, metrics = time.monotonic() + 120, out / "metrics.jsonl"
    if when == "start":
        return time.sleep(rng.uniform(0.5, 15))
    if when == "time":
        run.wait_for("\nstep ")
        return time.sleep(rng.uniform(0, 10))
    time.sleep(5)
    before = metrics.stat().st_size if metrics.exists() else 0
    while time.monotonic() < end and run.process.poll() is None:
        if when == "checkpoint" and list(out.glob("checkpoints/step_*.tmp/*")):
            return time.sleep(rng.uniform(0, 0.03))
        if (
            when == "metrics"
            and metrics.exists()
            and metrics.stat().st_size > before > 0
            and rng.random() < 0.3
        ):
            return
        before = metrics.stat().st_size if metrics.exists() and not before else before
        time.sleep(0.0005)


def test_twenty_kills(begun, tmp_path):
    """One run, killed twenty times, each time resumed at once, while the killed one may still be dying: in the end as if nothing had been."""
    out, rng = tmp_path / "run", random.Random(int(os.environ.get("STRESS_SEED", "0")))
    flags = (*FLAGS, "--algo", "remix-ppo", "--prompts", 20, "--steps", 1000)
    log = []
    for i in range(20):
        what, when = (
            ("rank", "ranks", "torchrun", "group")[i % 4],
            ("time", "checkpoint", "metrics", "start", "time")[i % 5],
        )
        run = begun(*(("--resume",) if (out / "config.json").exists() else flags))
        moment(run, out, when, rng)
        assert run.process.poll() is None, run.text[-4000:]
        training = len(run.ranks) == 2 and re.search(r"^step ", run.text, re.M)
        ranks, began = kill(run, what), time.monotonic()
        stray = [path.name for path in out.glob("checkpoints/*.tmp")]
        if i % 2:
            gone(ranks)  # else the next run waits for its folder
        run.process.wait(75)
        gone(ranks)
        if what == "rank" and training:
            assert re.search(
                r"^rank 0, (step \d+, )?\w+: rank 1 is gone .*--resume goes on", run.text, re.M
            ), run.text[-4000:]
        steps = (
            [
                json.loads(line)["step"]
                for line in open(out / "metrics.jsonl")
                if line.endswith("\n")
            ]
            if (out / "metrics.jsonl").exists()
            else []
        )
        assert steps == list(range(len(steps)))
        log.append((what, when, steps[-1:], stray, round(time.monotonic() - began, 1)))
        print(*log[-1], flush=True)
    last = len(steps) + 5
    finished("--resume", "--out", out, "--steps", last, ranks=2)
    finished(*flags, "--steps", last, "--out", tmp_path / "whole", ranks=2)
    assert [line["step"] for line in lines_of(out)] == list(range(last + 1)) and lines_of(
        out
    ) == lines_of(tmp_path / "whole")
    assert (out / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()
    assert not list(out.rglob("*.tmp")) and any(
        stray for *_, stray, _ in log
    )  # some kills did come within a save


def test_a_run_killed_before_its_first_checkpoint_starts_again(begun, tmp_path):
    flags = (*FLAGS, "--algo", "remix-ppo", "--prompts", 20, "--steps", 3)
    run = begun(*flags, "--save_every", 0, ranks=None).wait_for("step    2/")
    os.kill(run.pid, signal.SIGKILL)
    run.end()
    assert "resuming after step 0" in finished("--resume", "--out", tmp_path / "run", ranks=None)
    finished(*flags, "--out", tmp_path / "whole", ranks=None)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


# Signals


def test_a_notice_to_torchrun_or_to_one_rank_saves_and_stops_all(begun, tmp_path):
    run = begun(*FLAGS, "--algo", "remix-ppo", "--prompts", 20, "--steps", 1000).wait_for(
        "step    2/"
    )
    os.kill(run.ranks[1], signal.SIGTERM)
    assert run.end() == 0, run.text  # torchrun was told nothing
    step = int(re.search(r"stopped after step (\d+): SIGTERM; --resume goes on", run.text)[1])
    assert (
        checkpoint.newest(tmp_path / "run").name == f"step_{step:06d}"
        and lines_of(tmp_path / "run")[-1]["step"] == step
    )
    run = begun("--resume").wait_for(f"step {step + 2:>4}/")
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == 1  # torchrun's own, whatever the ranks say
    last = int(re.search(r"stopped after step (\d+): SIGTERM; --resume goes on", run.text)[1])
    assert (
        "rank 0, " not in run.text
        and checkpoint.newest(tmp_path / "run").name == f"step_{last:06d}"
    )
    finished(
        *FLAGS,
        "--algo",
        "remix-ppo",
        "--prompts",
        20,
        "--steps",
        last + 1,
        "--out",
        tmp_path / "whole",
        ranks=2,
    )
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")[: last + 1]


def in_its_first_step(out):
    """Waits for config.json, the last that a run writes before its loop (of a resumed one: anew), and a moment more."""
    end = time.monotonic() + 120
    while not ((out / "config.json").exists() and (out / "config.json").stat().st_mtime):
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(4)


def test_a_step_that_ends_too_late_is_not_waited_for(begun, tmp_path):
    """25 s after the notice the process ends, while its main thread is in the engine; a second signal ends it at once."""
    run = begun(*LONG, "--steps", 3, ranks=None).wait_for("rank on CPU")
    in_its_first_step(tmp_path / "run")
    began = time.monotonic()
    os.kill(run.pid, signal.SIGTERM)
    assert (
        run.wait_for("another signal stops it at once", 10).end(35) == 1
        and time.monotonic() - began > 20
    )
    assert re.search(
        r"^rank 0, step 1, \w+: step not over 25 s after SIGTERM, stopped without saving; no checkpoint yet",
        run.text,
        re.M,
    )
    os.utime(tmp_path / "run" / "config.json", (0, 0))
    run = begun("--resume", ranks=None)
    in_its_first_step(tmp_path / "run")
    os.kill(run.pid, signal.SIGINT)
    run.wait_for("another signal stops it at once", 10)
    time.sleep(1.5)
    os.kill(run.pid, signal.SIGINT)
    assert run.end(5) == 130 and "SIGINT again, stopped at once" in run.text


def test_a_notice_where_a_rank_hangs(begun):
    run = begun(*FLAGS, "--algo", "remix-ppo", "--prompts", 20, "--steps", 1000).wait_for(
        "step    2/"
    )
    ranks = run.ranks
    os.kill(ranks[0], signal.SIGSTOP)
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() != 0 and re.search(
        r"^rank 1, step \d+, \w+: rank 0 is stopped; checkpoint step_\d+ stands, --resume",
        run.text,
        re.M,
    ), run.text
    gone(ranks)


def test_a_notice_while_loading(begun):
    run = begun(*FLAGS, "--steps", 3, ranks=None)
    time.sleep(3)
    os.kill(run.pid, signal.SIGTERM)
    assert run.end(5) == 143 and "stopped by SIGTERM; nothing was written" in run.text


# A rank that hangs, a folder in use, a full disk


def test_a_hung_rank_is_named_with_step_and_phase(begun):
    run = begun(
        *FLAGS, "--algo", "remix-ppo", "--prompts", 20, "--steps", 1000, "--collective_timeout", 0.3
    ).wait_for("step    2/")
    ranks = run.ranks
    os.kill(ranks[0], signal.SIGSTOP)
    assert run.wait_for("rank 1, step", 60).end() == 1  # torchrun waits 30 s for the one that hangs
    assert re.search(
        r"^rank 1, step \d+, \w+: rank 0 is stopped \(.*Timed out.*\); checkpoint step_\d+ stands",
        run.text,
        re.M,
    ), run.text
    gone(ranks)


def test_a_folder_in_use(begun, tmp_path):
    first = begun(*LONG, "--steps", 3, ranks=None)
    in_its_first_step(tmp_path / "run")
    second = begun("--resume", ranks=None)
    assert second.end(150) == 2
    error = [line for line in second.text.splitlines() if line.startswith("error: ")]
    assert (
        len(error) == 1
        and f"is in use by process {first.pid} on " in error[0]
        and first.process.poll() is None
    )


def limited(pids, size):
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("what", ("checkpoint", "metrics.jsonl", "model"))
def test_a_full_disk(begun, tmp_path, what):
    """Here a limit of file size. One line on what could not be written, the last good checkpoint stands, and with room again the run goes on."""
    out, steps = tmp_path / "run", 12 if what == "model" else 1000
    flags = (*FLAGS, "--algo", "remix-ppo", "--prompts", 20)
    saves = {
        "checkpoint": (),
        "metrics.jsonl": ("--save_every", 3),
        "model": ("--save_every", 1000, "--eval_every", 0),
    }[what]
    run = begun(*flags, "--steps", steps, *saves).wait_for("step    4/")
    limited(run.ranks, (out / what).stat().st_size + 100 if what == "metrics.jsonl" else 50_000)
    assert run.end() == 1
    stands = checkpoint.newest(out)
    name = {
        "checkpoint": r"could not write \S+\.tmp: ",
        "metrics.jsonl": r"could not write \S+metrics.jsonl: ",
        "model": r"could not write \S+\.tmp: ",
    }[what]
    line = re.search(rf"^rank [01], step \d+, \w+: .*{name}.*$", run.text, re.M)
    assert line and "Traceback" not in run.text.split("torch/distributed/elastic")[0], run.text[
        -4000:
    ]
    assert (f"checkpoint {stands.name} stands" if stands else "no checkpoint yet") in line[0]
    last = (int(stands.name[5:]) if stands else 0) + 3
    finished(
        "--resume",
        "--out",
        out,
        "--steps",
        last,
        *(("--save_every", 1, "--eval_every", 6) if what == "model" else ()),
        ranks=2,
    )
    finished(*flags, "--steps", last, "--out", tmp_path / "whole", ranks=2)
    if what != "model":
        assert lines_of(out) == lines_of(tmp_path / "whole")
    assert (out / "model" / "model.safetensors").exists() and not list(out.rglob("*.tmp"))
