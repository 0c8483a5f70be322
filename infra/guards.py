"""What ends a run other than its last step: a dead launcher, a signal, the clock, an alarm.

Until listen(), and in eval.py, a signal ends the process. From then on the first is a notice: the
step is finished, the run saves and stops. Python runs a signal's handler between two bytecodes of
the main thread; where that one waits in C for another rank, so does the notice. kill -9 works
always. A torchrun that was told to end kills its ranks 30 s after it told them: to have a longer
step finished, signal a rank.
"""

import ctypes
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import filelock

from infra.ranks import gather

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SKIPPED = 3  # updates in a row that end the run
# Steps in a row that end the run. 20 are 3,080 responses of the paper's remix-ppo: 19 times out of
# 20 a policy that is right once in a thousand would have been.
NOTHING_LEARNED = 20
# What may differ between machines (what is in these places may not), and what is no flag.
NOT_SHARED = {"model", "data", "data_dir", "eval_data", "template", "replay", "out"}
NOT_SHARED |= {"given", "fingerprint"}

_started = time.perf_counter()
_notice = None  # name of the signal that came
_lock = None


def guard():
    """Call first, in the main thread. Under torchrun this process dies with it, however it dies."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # no traceback for Ctrl-C
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # torchrun gives its children sessions of their own: nothing else would end them. 1 is
        # PR_SET_PDEATHSIG: a signal when the thread that started us ends, torchrun's main thread.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # It may have died before. In a container torchrun itself may be process 1.
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            sys.exit("error: torchrun is gone")


def listen():
    """From here on the first SIGTERM or SIGINT is a notice that stop() tells; another, more than a
    second later, ends the process at once. A forked child is ended by the first."""
    for number in SIGNALS:
        signal.signal(number, _note)
    os.register_at_fork(after_in_child=_deaf)


def _note(number, _frame):
    global _notice
    if _notice:
        return
    _notice = signal.Signals(number).name
    if os.environ.get("RANK", "0") == "0":
        # not print, which this may have interrupted
        os.write(1, f"\n{_notice}: saves and stops after this step, at once at another\n".encode())
    # Within a second signals are one: a cluster may tell torchrun and the ranks, and torchrun tells
    # the ranks again. The next is the kernel's, which does not wait for Python.
    time.sleep(1)
    _deaf()


def _deaf():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop(step, cfg, longest):
    """Why the run ends after `step`, before its last: the name of a signal to any rank, or a text
    on --max_hours; None goes on. A collective.

    longest: duration of the longest step so far (s). Out of time is when another such step might
    end later than --max_hours after this process began, by rank 0's clock.
    """
    if step == cfg.steps:
        return None
    late = 0 < 3600 * cfg.max_hours < time.perf_counter() - _started + longest
    seen = gather((_notice, late))
    for notice, _ in seen:
        if notice:
            return notice
    return f"another might end later than --max_hours {cfg.max_hours}" if seen[0][1] else None


def hold(folder, wait=60):
    """Lock a run's folder for the life of this process, waiting up to `wait` s for a run that is
    about to end. Raises ValueError where one goes on."""
    global _lock
    _lock = filelock.FileLock(Path(folder) / "lock")
    try:
        _lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"waiting up to {wait} s for {folder}, in use by another run", flush=True)
        try:
            _lock.acquire(timeout=wait)
        except filelock.Timeout:
            raise ValueError(
                f"{folder} is in use by another run: stop that one, or choose another --out"
            ) from None


def agree(cfg, fingerprint):
    """Raise RuntimeError, on every rank alike, unless all ranks have rank 0's settings and data.
    A collective. fingerprint: of the problems and the kind of model."""
    facts = {"data or kind of model": fingerprint}
    for name, value in vars(cfg).items():
        if name not in NOT_SHARED:
            facts[f"--{name}"] = value
    first, *others = gather(facts)
    for rank, other in enumerate(others, 1):
        differ = [name for name in first if first.get(name) != other.get(name)]
        if differ:
            raise RuntimeError(
                f"rank {rank} has another {', '.join(differ)} than rank 0: start all ranks with "
                "the same command, code and data"
            )


def check_gap(gap, version, bound):
    """Raise RuntimeError when sampler and trainer disagree by more than rounding.

    gap: (n,) |log-prob by trainer - by sampler| of the fresh tokens; bound: of its mean.
    """
    mean = gap.mean().item()
    if not (math.isfinite(mean) and mean <= bound):
        cause = "the engine's weights are not the trainer's"
        if not math.isfinite(mean):
            cause = "the policy has diverged (a smaller --lr?), or its weights never were finite"
        raise RuntimeError(
            f"mean |trainer - sampler| log-prob is {mean:.2e} at version {version}, "
            f"above {bound:.0e}: {cause}"
        )


class Alarms:
    """Counts what may happen now and then, but not in a row. A resumed run counts anew."""

    def __init__(self, cfg, say):
        self.critic, self.say = cfg.advantage == "gae", say
        self.nothing, self.unread = 0, False  # steps in a row; whether the last had no verdict
        self.row = {}  # learner -> skipped updates in a row

    def rewards(self, groups, step):
        """Say when no response of a step has a verdict. Raises RuntimeError after NOTHING_LEARNED
        steps in a row whose rewards are equal: within each group; with a critic, in the whole step.

        groups: lists of samples with `reward` and `reason` (None: right).
        """
        samples = [sample for group in groups for sample in group]
        reasons = Counter(sample.reason or "right" for sample in samples)
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        unread = not reasons.keys() & {"right", "wrong"}
        if unread and not self.unread:
            self.say(
                f"WARNING: no response of step {step} has a verdict ({counts}): see samples.jsonl"
            )
        self.unread = unread
        compared = [samples] if self.critic else groups
        equal = all(len({sample.reward for sample in group}) <= 1 for group in compared)
        self.nothing = self.nothing + 1 if equal else 0
        of_each = "" if self.critic else " within each group"
        if self.nothing >= NOTHING_LEARNED:
            raise RuntimeError(
                f"nothing was learned in {self.nothing} steps, rewards were equal{of_each} (step "
                f"{step}: {counts}): too easy, too hard, or cut short? See samples.jsonl"
            )

    def skipped(self, norms, step):
        """How many updates of a minibatch were skipped for their gradient's norm (norms: learner ->
        float), aloud. Raises RuntimeError after SKIPPED in a row."""
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        self.row = {name: self.row.get(name, 0) + 1 for name in bad}
        for name, count in self.row.items():
            line = f"step {step}: loss or gradient of the {name} is not finite, {count} in a row"
            if count >= SKIPPED:
                raise RuntimeError(f"{line}: the run has diverged (a smaller --lr?)")
            self.say(f"{line}: update skipped")
        return len(bad)
