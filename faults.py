"""What happens to a run from outside: a dead launcher, signals, lost ranks, a second run in the same folder.

    guard()       die with torchrun; SIGTERM (a cluster's notice) and SIGINT (Ctrl-C) become a notice, which the loop asks for between steps
    reported()    what ends a run is said in one line with rank, step and phase
    hold(out)     one run at a time in a folder

A notice before the first step (or in eval.py) ends the process at once. In a step the loop has 25 s to reach the step's end, where all ranks agree, save
and leave; else the process ends as it is, and the line names the checkpoint that stands. A second signal always ends it at once.
Python's own signal handlers would wait until the main thread leaves C++ (a generation, a collective): a thread waits for the signals.
The standard library alone, so that guard() comes before the imports that take seconds.
"""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

SIGNALS = ("SIGTERM", "SIGINT")
PATIENCE = (
    25  # seconds from a notice to the end of its step; torchrun kills 30 s after it passed one on
)
ONE_NOTICE = 1  # seconds within which signals are one: a cluster may tell torchrun and the ranks, and torchrun tells the ranks again


class Here:
    """Where this process is, for whoever has to say so: one run a process, as signals are the process's."""

    rank = os.environ.get("RANK", "0")
    out = None  # run folder
    step, phase = None, "start"  # step: None before the loop
    notice = None  # name of the signal that came
    kept = None  # what stands on the disk, in words, where it is no run's checkpoint
    leaving = False  # the loop is over, or about to be: what follows takes as long as it takes
    peers = []  # identity() of every rank
    lock = None


def guard():
    """Call first, in the main thread. Under torchrun this process dies with it, however torchrun dies."""
    if (
        "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux"
    ):  # torchrun's children have sessions of their own: nothing else ends them
        parent = os.getppid()
        ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        )  # PR_SET_PDEATHSIG: when the thread that started us ends, which is torchrun's main thread
        if (
            os.getppid() != parent or parent == 1 and not torchrun(1)
        ):  # it died before: in a container, it may be process 1 itself
            sys.exit("error: torchrun is gone")
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for name in SIGNALS:
        signal.signal(
            getattr(signal, name), lambda *_: None
        )  # the byte in the socket is what counts
        signal.siginterrupt(getattr(signal, name), False)
    os.register_at_fork(after_in_child=unguard)
    threading.Thread(target=watch, args=(reader, writer), daemon=True).start()


def torchrun(pid):
    with contextlib.suppress(OSError):
        return b"torch" in Path(f"/proc/{pid}/cmdline").read_bytes()


def unguard():
    """In a forked child: signals are its own."""
    signal.set_wakeup_fd(-1)
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def watch(reader, _writer):
    """The thread that waits for signals. `_writer` is held so that it stays open."""
    number = reader.recv(1)[0]
    Here.notice, came = signal.Signals(number).name, time.monotonic()
    first = Here.rank == "0"
    if Here.step is None:
        end(f"stopped by {Here.notice}; {stands()}" if first else None, 128 + number)
    if first and not Here.leaving:
        print(
            f"{Here.notice}: this run saves and stops at the end of step {Here.step}; another signal stops it at once",
            flush=True,
        )
    reader.settimeout(0.5)
    while True:
        with contextlib.suppress(TimeoutError):
            number = reader.recv(1)[0]
            if time.monotonic() - came > ONE_NOTICE:
                end(
                    f"{where()}: {signal.Signals(number).name} again, stopped at once; {stands()}",
                    128 + number,
                )
        if Here.leaving:
            continue
        if gone := lost():
            time.sleep(5)  # a collective that lost a peer says so itself, unless it is NCCL's
            end(f"{where()}: {gone}; {stands()}", 1)
        if time.monotonic() - came > PATIENCE:
            end(
                f"{where()}: step not over {PATIENCE} s after {Here.notice}, stopped without saving; {stands()}",
                1,
            )


def end(line, code):
    """End the process here and now, whatever its main thread is in."""
    if line:
        print(
            f"\n{line}", file=sys.stderr, flush=True
        )  # on a line of its own, also after a progress bar
    os._exit(code)


def leave():
    """End a process whose work is done with code 0. Python's own end has aborted a finished run: threads of libraries, torn down in C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def where():
    return f"rank {Here.rank}, {f'step {Here.step}, ' if Here.step else ''}{Here.phase}"


def stands():
    """What is left on the disk, and what goes on with it."""
    if Here.kept:
        return Here.kept
    kept = (
        sorted(
            path.name
            for path in Path(Here.out, "checkpoints").glob("step_*")
            if path.suffix != ".tmp"
        )
        if Here.out
        else []
    )
    if kept:
        return f"checkpoint {kept[-1]} stands, --resume goes on from there"
    return (
        "no checkpoint yet, --resume starts again"
        if Here.out and Path(Here.out, "config.json").exists()
        else "nothing was written"
    )


@contextlib.contextmanager
def reported():
    """Inside, an error ends the process with a line that says where, with a traceback above it unless the cause lies outside this program.

    At once: the other ranks learn of it by losing this one, and no clean-up may wait for them.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:  # PyTorch's CheckpointException is no Exception
        text = " ".join(str(error).split())
        peer = (
            type(error).__name__.startswith("Dist") or "gloo" in text
        )  # what torch.distributed raises for lost peers and time-outs
        if peer:
            time.sleep(1)  # until a dying peer is dead
            text = f"{lost() or 'another rank hangs, or its machine is gone'} ({text[:200]})"
        elif not isinstance(error, OSError):
            traceback.print_exc()
            text = f"{type(error).__name__}: {text}"
        end(f"{where()}: {text}; {stands()}", 1)


# Who is still there


def identity():
    """(machine and process namespace, process, its birth) of this process."""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return (
        f"{socket.gethostname()} {namespace}",
        os.getpid(),
        (process(os.getpid()) or (None, None))[1],
    )


def process(pid):
    """(state, birth) of a process of this machine, as Linux writes them, or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], fields[19]


def lost():
    """The ranks of this machine that are dead or stopped, in words; "" where all run."""
    found, here = [], identity()[0]
    for rank, (machine, pid, birth) in enumerate(Here.peers):
        if machine == here and birth:
            state, born = process(pid) or ("X", birth)
            if state in "XZ" or born != birth:
                found.append(f"rank {rank} is gone")
            elif state in "Tt":
                found.append(f"rank {rank} is stopped")
    return ", ".join(found)


# One run at a time


def hold(out, wait=60, say=print):
    """Lock run folder `out` for the life of this process, waiting up to `wait` s for who has it. Raises ValueError naming the holder."""
    file = open(Path(out) / "lock", "a+", encoding="utf-8")
    begin, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read().split()) or "an unnamed process"
            if time.monotonic() - begin > wait:
                raise ValueError(
                    f"{out} is in use by {holder}: stop that run first, or choose another --out"
                ) from None
            if not said:
                say(f"waiting up to {wait} s for {out}, in use by {holder}")
            said = True
            time.sleep(0.2)
        except OSError as error:
            say(
                f"{out}: no locks on this file system ({error.strerror}): see to it that no other run writes there"
            )
            break
    file.seek(0)
    file.truncate()
    file.write(
        f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    )
    file.flush()
    Here.lock = file  # closed, and so given back, when the process ends
