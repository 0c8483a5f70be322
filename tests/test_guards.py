"""guards.py: signals of a small program, the lock of a folder, what stops a run and what is said.

Whole runs that are disturbed: test_train.py, stress_faults.py.
"""

import ast
import math
import os
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch

from conftest import ROOT, alive, gone
from infra import guards
from infra.guards import Alarms, agree, check_gap, stop


def program(text, **env):
    """A Python program with the repository on its path; its first lines are done."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import os, signal, sys\nfrom infra import guards\n{text}"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


# Launcher and signals


LAUNCHER = """
import subprocess
text = "from infra import guards; guards.guard(); print('on', flush=True); input()"
environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
rank = subprocess.Popen([sys.executable, "-c", text], env=environment, start_new_session=True)
print(rank.pid, flush=True)
input()
"""


def test_a_rank_dies_with_its_launcher():
    launcher = program(LAUNCHER)
    lines = {launcher.stdout.readline(), launcher.stdout.readline()}
    rank = int((lines - {"on\n"}).pop())
    assert alive(rank)
    launcher.kill()
    gone([rank], 10)


def test_a_rank_whose_launcher_died_before_does_not_begin():
    run = program("os.getppid = lambda: 1\nguards.guard()", TORCHELASTIC_RUN_ID="x")
    assert "torchrun is gone" in run.communicate(timeout=120)[1] and run.returncode == 1


@pytest.mark.parametrize("number", guards.SIGNALS)
def test_a_signal_before_the_first_step_ends_the_process(number):
    run = program("guards.guard(); print('on', flush=True); input()")
    run.stdout.readline()
    run.send_signal(number)
    _, error = run.communicate(timeout=120)
    assert run.returncode == -number and not error


# The second within which signals are one lasts until a line comes.
NOTICE = """
import argparse, hashlib
guards.guard()
guards.listen()
guards.time.sleep = lambda seconds: input()
if not os.fork():
    print(os.getpid(), flush=True)
    signal.pause()
while not guards._notice:
    pass
guards.gather = lambda value: [(None, False), value]
cfg = argparse.Namespace(steps=9, max_hours=0)
print(guards.stop(3, cfg, 0), guards.stop(9, cfg, 0), flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # C code: no bytecode, no handler
"""


@pytest.mark.parametrize("rank", (0, 1))
def test_a_notice_is_told_between_steps_and_a_second_signal_is_the_end(rank):
    """Signals within a second are one; a forked child is ended by the first."""
    run = program(NOTICE, RANK=str(rank))
    child = int(run.stdout.readline())
    os.kill(child, signal.SIGTERM)
    gone([child], 10)
    run.send_signal(signal.SIGTERM)
    if rank == 0:
        assert run.stdout.readline() == "\n"
        assert run.stdout.readline().startswith("SIGTERM: ")
    run.send_signal(signal.SIGTERM)
    run.stdin.write("\n")
    run.stdin.flush()
    assert run.stdout.readline() == "SIGTERM None\n"
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == -signal.SIGINT


def test_time_is_up_by_the_clock_of_rank_0(monkeypatch):
    """At 3000 s of 3600 a step of 600 s still fits; the last step needs no reason."""
    cfg = Namespace(steps=5, max_hours=1.0)
    monkeypatch.setattr(guards.time, "perf_counter", lambda: guards._started + 3000)
    monkeypatch.setattr(guards, "gather", lambda value: [value, (None, False)])
    assert stop(3, cfg, 600) is None and "--max_hours 1.0" in stop(3, cfg, 601)
    assert stop(5, cfg, 601) is None and stop(3, Namespace(steps=5, max_hours=0), 601) is None
    monkeypatch.setattr(guards, "gather", lambda value: [(None, False), value])
    assert stop(3, cfg, 601) is None


def test_a_folder_in_use_is_named_and_free_when_its_run_is_dead(tmp_path, capsys):
    other = program(f"guards.hold({str(tmp_path)!r}); print('held', flush=True); input()")
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"^{tmp_path} is in use by another run: "):
        guards.hold(tmp_path, wait=0)
    assert "waiting" in capsys.readouterr().out
    other.kill()
    guards.hold(tmp_path)
    guards._lock.release()


# Alarms


@pytest.mark.parametrize(
    "gap, bound, words",
    [
        ([0, 1.8e-3], 1e-3, None),
        ([0, 2.2e-3], 1e-3, "version 4, above 1e-03: the engine's weights"),
        ([0, 0.08], 5e-2, None),
        ([0, 0.12], 5e-2, "6.00e-02 at version 4"),
        ([0, math.nan], 5e-2, "version 4, .*the policy has diverged"),
        ([0, math.inf], math.inf, "version 4, .*the policy has diverged"),
    ],
)
def test_the_gap_alarm(gap, bound, words):
    with pytest.raises(RuntimeError, match=words) if words else nullcontext():
        check_gap(torch.tensor(gap), 4, bound)


RIGHT, WRONG, CUT = (1.0, None), (0.0, "wrong"), (0.0, "truncated")


def groups(*rows):
    """Groups of samples from rows of (reward, reason)."""
    return [[Namespace(reward=reward, reason=reason) for reward, reason in row] for row in rows]


def run(steps, advantage="group"):
    """(number of the step that stops, its message) and what was said before; 3 in a row stop."""
    said = []
    alarms = Alarms(Namespace(advantage=advantage), said.append)
    for number, step in enumerate(steps, 1):
        try:
            alarms.rewards(step, number)
        except RuntimeError as error:
            return number, str(error), said
    return None, None, said


@pytest.fixture(autouse=True)
def three(monkeypatch):
    monkeypatch.setattr(guards, "NOTHING_LEARNED", 3)


def test_steps_that_teach_nothing_stop_in_a_row():
    same, different = groups([WRONG, WRONG]), groups([WRONG, RIGHT])
    assert run([same] * 2)[0] is None and run([same] * 3)[0] == 3
    assert run([same, same, different, same, same])[0] is None
    assert run([same, same, different, same, same, same])[0] == 6
    own = groups([(0.25, "wrong"), (0.5, "wrong")])  # a reward of one's own: both are no 1
    assert run([own] * 9)[0] is None


def test_rewards_must_differ_within_a_group_but_for_a_critic_between_prompts():
    apart, mixed = groups([RIGHT, RIGHT], [WRONG, CUT]), groups([RIGHT, RIGHT], [WRONG, RIGHT])
    number, message, _ = run([apart] * 3)
    assert number == 3 and "step 3: 2 right, 1 wrong, 1 truncated" in message
    assert run([apart] * 9, "gae")[0] is None and run([apart, apart, mixed] * 3)[0] is None
    single = groups([WRONG], [WRONG])
    assert run([single] * 3, "gae")[0] == 3
    assert run([groups([WRONG], [RIGHT])] * 9, "gae")[0] is None


def test_no_verdict_is_said_once_until_there_is_one_again():
    rows = [CUT, CUT], [CUT, CUT], [RIGHT, CUT], [CUT, CUT], [WRONG, CUT]
    _, _, said = run([groups(row) for row in rows], "gae")
    assert [line.split("(")[0] for line in said] == [
        "WARNING: no response of step 1 has a verdict ",
        "WARNING: no response of step 4 has a verdict ",
    ]


def test_skipped_updates_are_said_counted_and_stop_in_a_row():
    said = []
    alarms = Alarms(Namespace(advantage="gae"), said.append)
    assert alarms.skipped(dict(policy=0.5, critic=2.0), 7) == 0 and said == []
    assert alarms.skipped(dict(policy=math.nan, critic=2.0), 7) == 1
    assert "step 7" in said[0] and "policy" in said[0] and "1 in a row" in said[0]
    assert alarms.skipped(dict(policy=math.inf, critic=math.nan), 8) == 2
    # the policy's count begins anew
    assert alarms.skipped(dict(policy=0.1, critic=math.nan), 8) == 1
    with pytest.raises(RuntimeError, match="step 8: .*critic is not finite, 3 in a row"):
        alarms.skipped(dict(policy=math.inf, critic=-math.inf), 8)


def test_ranks_that_disagree_are_named(monkeypatch):
    """Paths may differ between machines."""
    seen = []

    def gathered(*changes):
        def gather(facts):
            seen.append(facts)
            return [facts, *(facts | change for change in changes)]

        monkeypatch.setattr(guards, "gather", gather)
        agree(Namespace(seed=3, lr=1.0, out="a", model="b", given={"seed"}), "f")

    gathered({}, {})
    assert seen[0].keys() == {"--seed", "--lr", "data or kind of model"}
    with pytest.raises(RuntimeError, match="rank 2 has another --seed, --lr than rank 0"):
        gathered({}, {"--seed": 5, "--lr": 0.1})
    with pytest.raises(RuntimeError, match="rank 1 has another data or kind of model than"):
        gathered({"data or kind of model": "e"})


# Nothing that comes from elsewhere is executed


PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "os.system", "np.load", "numpy.load"}
SAFE = {"shell": "False", "allow_pickle": "False", "trust_remote_code": "False"}
SAFELY = "dict(dtype=torch.float32, trust_remote_code=False)"  # for **safely


def test_no_module_runs_what_it_reads():
    """No pickle, eval or shell; the libraries' loaders are told to run no code. dcp.load is a
    checkpoint's own, whose docstring warns."""
    loaders = 0
    for path in (*ROOT.glob("*.py"), *ROOT.glob("infra/*.py"), *ROOT.glob("family/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not PICKLES & {name.name.split(".")[0] for name in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in PICKLES, path
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in RUNS_CODE, (path, name)
            for keyword, value in SAFE.items():
                assert keywords.get(keyword, value) == value, (path, name)
            if name == "torch.load":
                assert keywords["weights_only"] == "True", path
            if name.endswith(("from_pretrained", ".from_config")) or name == "LLM":
                told = keywords.get("trust_remote_code", keywords.get(None))
                assert told == "False" or f"{told} = {SAFELY}" in path.read_text(), (path, name)
                loaders += 1
    assert loaders >= 4  # tokenizer, config, model, vLLM
