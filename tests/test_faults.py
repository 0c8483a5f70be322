"""What needs no run: the lock of a folder, who is lost, signals of a small program. Whole runs: test_train.py, stress_faults.py."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import faults
from conftest import ROOT, alive, gone


def program(text, **how):
    """A Python program with the repository on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def held(tmp_path):
    """A process that holds the folder."""
    other = program(
        f"import faults, time; faults.hold({str(tmp_path)!r}); print('held', flush=True); time.sleep(60)"
    )
    assert other.stdout.readline() == "held\n"
    return other


def test_a_folder_in_use_names_its_holder_and_is_free_when_that_one_is_dead(tmp_path):
    other, said = held(tmp_path), []
    with pytest.raises(ValueError, match=f"in use by process {other.pid} on .* since 20"):
        faults.hold(tmp_path, wait=0.5, say=said.append)
    assert len(said) == 1 and "waiting" in said[0]
    os.kill(other.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"process {other.pid} "):  # a hung run has it still
        faults.hold(tmp_path, wait=0, say=said.append)
    other.kill()
    faults.hold(tmp_path, say=said.append)
    assert f"process {os.getpid()} " in (tmp_path / "lock").read_text() and faults.Here.lock
    faults.Here.lock.close()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    said = []
    monkeypatch.setattr(faults.fcntl, "flock", flock)
    faults.hold(tmp_path, say=said.append)
    assert len(said) == 1 and "no locks on this file system (Operation not supported)" in said[0]
    faults.Here.lock.close()


def test_lost_ranks(monkeypatch):
    """Dead, stopped, alive, another machine's, and a process number that has been given again."""
    stopped, dead = (
        program("import sys; sys.stdin.read()", stdin=subprocess.PIPE) for _ in range(2)
    )
    machine, here, birth = faults.identity()
    peers = [
        (machine, here, birth),
        (machine, stopped.pid, faults.process(stopped.pid)[1]),
        (machine, dead.pid, faults.process(dead.pid)[1]),
        ("elsewhere", 1, "1"),
        (machine, here, "1"),
    ]
    monkeypatch.setattr(faults.Here, "peers", peers[:2])
    assert faults.lost() == ""
    stopped.send_signal(signal.SIGSTOP)
    dead.kill()
    gone([dead.pid], 10)
    monkeypatch.setattr(faults.Here, "peers", peers)
    assert faults.lost() == "rank 1 is stopped, rank 2 is gone, rank 4 is gone"
    stopped.kill()


LAUNCHER = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import faults; faults.guard(); print('on', flush=True); import time; time.sleep(60)"],
                          env=os.environ | {"TORCHELASTIC_RUN_ID": "x"}, start_new_session=True)
print(worker.pid, flush=True)
time.sleep(60)
"""


def test_a_rank_dies_with_its_launcher():
    launcher = program(LAUNCHER)
    lines = {launcher.stdout.readline(), launcher.stdout.readline()}
    worker = int((lines - {"on\n"}).pop())
    assert alive(worker)
    launcher.kill()
    gone([worker], 10)


BUSY = """
import faults, os, signal, sys, time
faults.guard()
faults.PATIENCE, faults.Here.step, faults.Here.phase = float(sys.argv[1]), 7, "generate"
if not os.fork():
    print(os.getpid(), flush=True)
    time.sleep(60)
import hashlib
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # the main thread comes to no bytecode of its own, as in an engine
"""


@pytest.mark.parametrize("again", [False, True])
def test_a_main_thread_in_c_code_is_no_reason_to_stay(again):
    """The deadline, and a second signal; several within a second are one. A forked child is ended by the first."""
    run = program(BUSY.replace("sys.argv[1]", "60" if again else "3"))
    child, began = int(run.stdout.readline()), time.monotonic()
    os.kill(child, signal.SIGTERM)
    for _ in range(2):
        run.send_signal(signal.SIGTERM)
    assert "saves and stops at the end of step 7" in run.stdout.readline()
    gone([child], 10)
    if again:
        time.sleep(1.2)
        run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=30)
    assert run.returncode == (130 if again else 1) and (again or time.monotonic() - began >= 3)
    assert (
        "SIGINT again, stopped at once" if again else "step not over 3.0 s after SIGTERM"
    ) in error and error.strip().startswith("rank 0, step 7, generate: ")


@pytest.mark.parametrize(
    "error, said, trace",
    [
        (
            "OSError('could not write x')",
            "rank 0, start: could not write x; nothing was written",
            False,
        ),
        (
            "RuntimeError('[gloo/pair.cc:1] Connection closed by peer')",
            "rank 0, start: another rank hangs, or its machine is gone ([gloo/pair.cc:1] Conn",
            False,
        ),
        ("KeyError('x')", "rank 0, start: KeyError: 'x'; nothing was written", True),
    ],
)
def test_what_ends_a_run_is_its_last_line(error, said, trace):
    run = program(f"import faults\nwith faults.reported():\n    raise {error}")
    _, text = run.communicate(timeout=30)
    assert (
        run.returncode == 1
        and text.splitlines()[-1].startswith(said)
        and ("Traceback" in text) == trace
    )


def test_what_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(faults.Here, "out", tmp_path)
    assert faults.stands() == "nothing was written"
    (tmp_path / "config.json").write_text("{}")
    assert faults.stands() == "no checkpoint yet, --resume starts again"
    for name in ("step_000005", "step_000010", "step_000015.tmp"):
        Path(tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert faults.stands() == "checkpoint step_000010 stands, --resume goes on from there"
