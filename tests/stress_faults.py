"""Whole runs, disturbed for real: `make stress`, about half an hour on two cores.

`make test` has a small share of it (test_train.py). A disturbed run is compared with one that
nobody disturbed, line by line of metrics.jsonl, but for times and memory.
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
import torch

from conftest import Running, command, comparable, gone, metrics_of
from infra import checkpoint, toy
from test_checkpoint import equal

FLAGS = (
    "--p 0.6 --window 2 --minibatch 8 --reincarnate 4 --lambda_start 1 --lambda_every 1 "
    "--save_every 1 --keep 100 --eval_every 6 --eval_k 1"
).split()
PROMPTS = {"remix-ppo": 20, "remix-grpo": 10}
PPO = (*FLAGS, "--algo", "remix-ppo", "--prompts", 20)
# a first step of minutes, most of it in the engine
LONG = ("--algo", "ppo", "--prompts", 40_000, "--eval_every", 0, "--steps", 3)


def lines_of(folder):
    return [comparable(line) for line in metrics_of(folder)]


def finished(*flags, ranks):
    done = command("train.py", *flags, ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def begun(tmp_path):
    """begun(*flags, ranks=2) -> a run in tmp_path/run, in the background; it ends with the test."""
    runs = []
    toy.model_folder()

    def start(*flags, ranks=2):
        log, out = tmp_path / f"{len(runs)}.log", tmp_path / "run"
        runs.append(Running(log, "train.py", *flags, "--out", out, ranks=ranks))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.process.wait()


# Exact resume


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(algo, ranks) -> folder of an undisturbed run of eight steps that saved each."""
    toy.model_folder()
    folder = tmp_path_factory.mktemp("whole")

    def run(algo, ranks):
        out, prompts = folder / f"{algo}-{ranks}", PROMPTS[algo]
        if not out.exists():
            flags = ("--algo", algo, "--prompts", prompts, "--steps", 8, "--out", out)
            finished(*FLAGS, *flags, ranks=ranks)
        return out

    return run


def stopped_after(folder, step, out):
    """A copy of a run as if killed in the step after `step`: one step's records too many."""
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
    out, wanted = stopped_after(whole(algo, 2), step, tmp_path / "run"), whole(algo, 2)
    assert f"resuming after step {step}" in finished("--resume", "--out", out, ranks=2)
    assert lines_of(out) == lines_of(wanted)
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name
    last = "checkpoints/step_000008/state.pt"
    states = [torch.load(path / last, weights_only=True) for path in (out, wanted)]
    assert equal(*states)


@pytest.mark.parametrize("before, after", ((2, 1), (1, 2)))
@pytest.mark.parametrize("algo", PROMPTS)
def test_a_run_resumed_on_another_number_of_ranks(whole, tmp_path, algo, before, after):
    """The same prompts, draws and minibatches; numbers equal to rounding."""
    out = stopped_after(whole(algo, before), 3, tmp_path / "run")
    finished("--resume", "--out", out, ranks=after)
    for other in (whole(algo, before), whole(algo, after)):
        for a, b in zip(lines_of(out), lines_of(other), strict=True):
            for key in a:
                assert a[key] == b[key] or abs(a[key] - b[key]) < 1e-3, (a["step"], key)
    texts = []
    for folder in (out, whole(algo, after)):
        samples = map(json.loads, open(folder / "samples.jsonl"))
        texts.append([(s["step"], s["prompt"], s["response"]) for s in samples])
    assert texts[0] == texts[1]


# Kills


def kill(run, what):
    """kill -9 of one `rank`, all `ranks`, `torchrun` alone, or its process `group`."""
    ranks = run.ranks
    if what == "group" or not ranks:  # torchrun itself has hardly begun
        os.killpg(run.pid, signal.SIGKILL)
        return ranks
    for pid in {"rank": ranks[-1:], "ranks": ranks, "torchrun": [run.pid]}[what]:
        os.kill(pid, signal.SIGKILL)
    return ranks


def moment(run, out, when, rng):
    """Wait for a moment to kill at: on the way to its `start`, some `time` in its steps, a
    `checkpoint` half written, a line of `metrics` just written."""
    if when == "start":
        return time.sleep(rng.uniform(0.5, 15))
    run.wait_for("\nstep ")
    if when == "time":
        return time.sleep(rng.uniform(0, 10))
    metrics, end = out / "metrics.jsonl", time.monotonic() + 120
    before = metrics.stat().st_size
    while time.monotonic() < end and run.process.poll() is None:
        if when == "checkpoint" and list(out.glob("checkpoints/step_*.tmp/*")):
            return time.sleep(rng.uniform(0, 0.03))
        if when == "metrics" and metrics.stat().st_size > before:
            return
        time.sleep(0.0005)


def test_twenty_kills(begun, tmp_path):
    """One run, killed twenty times and resumed at once, while the killed one may still be dying: in
    the end as if nothing had been."""
    out, rng = tmp_path / "run", random.Random(int(os.environ.get("STRESS_SEED", "0")))
    strays = 0
    for i in range(20):
        what = ("rank", "ranks", "torchrun", "group")[i % 4]
        when = ("time", "checkpoint", "metrics", "start", "time")[i % 5]
        resume = (out / "config.json").exists()
        run = begun("--resume") if resume else begun(*PPO, "--steps", 1000)
        moment(run, out, when, rng)
        assert run.process.poll() is None, run.text[-4000:]
        ranks, began = kill(run, what), time.monotonic()
        strays += len(list(out.glob("checkpoints/*.tmp")))
        if i % 2:
            gone(ranks)  # else the next run waits for its folder
        run.process.wait(75)
        gone(ranks)
        print(what, when, round(time.monotonic() - began, 1), flush=True)
    last = metrics_of(out, unfinished=True)[-1]["step"] + 5
    finished("--resume", "--out", out, "--steps", last, ranks=2)
    finished(*PPO, "--steps", last, "--out", tmp_path / "whole", ranks=2)
    assert lines_of(out) == lines_of(tmp_path / "whole")
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not list(out.rglob("*.tmp")) and strays  # some kills did come within a save


def test_a_run_killed_before_its_first_checkpoint_starts_again(begun, tmp_path):
    run = begun(*PPO, "--steps", 3, "--save_every", 0, ranks=None).wait_for("step    2/")
    os.kill(run.pid, signal.SIGKILL)
    run.end()
    assert "resuming after step 0" in finished("--resume", "--out", tmp_path / "run", ranks=None)
    finished(*PPO, "--steps", 3, "--save_every", 0, "--out", tmp_path / "whole", ranks=None)
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


# Signals


def test_a_notice_to_torchrun_or_to_one_rank_saves_and_stops_all(begun, tmp_path):
    out, told = tmp_path / "run", r"stopped after step (\d+): SIGTERM; --resume goes on"
    run = begun(*PPO, "--steps", 1000).wait_for("step    2/")
    os.kill(run.ranks[1], signal.SIGTERM)
    assert run.end() == 0, run.text  # torchrun was told nothing
    step = int(re.search(told, run.text)[1])
    assert checkpoint.newest(out).name == f"step_{step:06d}" and lines_of(out)[-1]["step"] == step
    run = begun("--resume").wait_for(f"step {step + 2:>4}/")
    os.kill(run.pid, signal.SIGTERM)
    assert run.end() == 1  # torchrun's own, whatever the ranks say
    last = int(re.search(told, run.text)[1])
    assert checkpoint.newest(out).name == f"step_{last:06d}"
    finished(*PPO, "--steps", last + 1, "--out", tmp_path / "whole", ranks=2)
    wanted = [line for line in lines_of(tmp_path / "whole") if line["step"] <= last]
    assert lines_of(out) == wanted


def in_its_first_step(out):
    """Waits for config.json, the last that a new run writes before its loop, and a moment more."""
    end = time.monotonic() + 120
    while not (out / "config.json").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(10)


def test_a_second_signal_ends_a_long_step_at_once(begun, tmp_path):
    run = begun(*LONG, ranks=None)
    in_its_first_step(tmp_path / "run")
    os.kill(run.pid, signal.SIGTERM)
    run.wait_for("SIGTERM: saves and stops", 20)
    time.sleep(2)
    os.kill(run.pid, signal.SIGINT)
    assert run.end(5) == -signal.SIGINT


def test_a_signal_while_loading_ends_the_run(begun):
    run = begun(*FLAGS, "--steps", 3, ranks=None)
    time.sleep(3)
    os.kill(run.pid, signal.SIGTERM)
    assert run.end(5) == -signal.SIGTERM


# A folder in use, a full disk


def test_a_folder_in_use(begun, tmp_path):
    first = begun(*LONG, ranks=None)
    in_its_first_step(tmp_path / "run")
    second = begun("--resume", ranks=None)
    assert second.end(150) == 2
    (error,) = [line for line in second.text.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'run'} is in use" in error and first.process.poll() is None


SAVES = {
    "checkpoint": (),
    "metrics.jsonl": ("--save_every", 3),
    "model": ("--save_every", 1000, "--eval_every", 0),
}


@pytest.mark.parametrize("what", SAVES)
def test_a_full_disk(begun, tmp_path, what):
    """Here a limit of file size. It is said what could not be written, the last checkpoint stands,
    and with room again the run goes on."""
    out, steps = tmp_path / "run", 12 if what == "model" else 1000
    run = begun(*PPO, "--steps", steps, *SAVES[what]).wait_for("step    4/")
    most = (out / what).stat().st_size + 100 if what == "metrics.jsonl" else 50_000
    for pid in run.ranks:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, most))
    assert run.end() == 1
    name = r"\S+metrics.jsonl" if what == "metrics.jsonl" else r"\S+\.tmp"
    assert re.search(rf"could not write {name}: ", run.text), run.text[-4000:]
    stands = checkpoint.newest(out)
    last = (int(stands.name[5:]) if stands else 0) + 3
    often = ("--save_every", 1, "--eval_every", 6) if what == "model" else ()
    finished("--resume", "--out", out, "--steps", last, *often, ranks=2)
    finished(*PPO, "--steps", last, "--out", tmp_path / "whole", ranks=2)
    assert what == "model" or lines_of(out) == lines_of(tmp_path / "whole")
    assert (out / "model" / "model.safetensors").exists() and not list(out.rglob("*.tmp"))
