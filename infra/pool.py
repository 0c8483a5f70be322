"""Worker processes that can be killed: one request at a time, one JSON object a line.

Not a process pool of a library: those start their children from the caller's main module (the
trainer, hence torch). Nor an executor: its threads finish their work before the interpreter may
exit. Here a worker is a file started by its name, kept by a daemon thread of ours.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

# for a worker to import math-verify: about 1 s, far more on a cold network disk
START_SECONDS = 120.0


class Pool:
    """`workers` processes of the Python file `path`, at most `seconds` (wall clock) a request.

    They start with start(), else with the first requests. A pool does not survive a fork.
    """

    def __init__(self, path: str, workers: int, seconds: float):
        if workers < 1 or seconds <= 0:
            raise ValueError(f"needs workers >= 1 and timeout > 0, not {workers} and {seconds}")
        self.path, self.workers, self.seconds = path, workers, seconds
        self.closed, self.dropped, self.processes = False, False, set()
        self._queue, self._threads, self._mine = queue.SimpleQueue(), [], threading.local()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Returns when all workers are ready. Raises RuntimeError where one cannot start."""
        barrier = threading.Barrier(self.workers)

        def ready():
            barrier.wait()  # no thread takes two
            self._worker()

        with self._lock:
            started = [self._put(ready) for _ in range(self.workers)]
        for future in started:
            future.result()

    def submit(self, request: dict, finish) -> Future:
        """A Future of finish(request, self.ask), in a thread that has a worker of its own."""
        with self._lock:
            return self._put(lambda: finish(request, self.ask))

    def _put(self, work) -> Future:
        if self.closed:
            raise RuntimeError("this pool is closed")
        while len(self._threads) < self.workers:
            self._threads.append(threading.Thread(target=self._serve, daemon=True))
            self._threads[-1].start()
        future = Future()
        self._queue.put((future, work))
        return future

    def _serve(self) -> None:
        while (task := self._queue.get()) is not None:
            future, work = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:
                    future.set_exception(error)
        if getattr(self._mine, "process", None) is not None:
            self._end(self._mine.process)

    def close(self, wait: bool = True) -> None:
        """Finishes what it has and ends the workers; wait=False fails what it has, and returns."""
        with self._lock:
            if not self.closed:
                self.closed = True
                for _ in self._threads:
                    self._queue.put(None)
            self.dropped = self.dropped or not wait
        for thread in self._threads if wait else ():
            thread.join()
        # their threads see them die
        for process in list(self.processes) if self.dropped else ():
            process.kill()

    def _worker(self) -> subprocess.Popen:
        """This thread's own process: on Linux it dies with the thread that started it."""
        if getattr(self._mine, "process", None) is None:
            self._mine.process = self._start()
        return self._mine.process

    def ask(self, request: dict) -> dict:
        """The worker's reply. Raises TimeoutError (it took too long and was killed),
        ChildProcessError (the worker died on it twice), RuntimeError (none can start)."""
        left = self.seconds
        # a death need not be the request's fault (out-of-memory killer): try it once more
        for _ in range(2):
            process, began = self._worker(), time.monotonic()
            reply = _exchange(process, request, left)
            if reply is not None:
                return reply
            self._mine.process = None
            self._end(process)
            left -= time.monotonic() - began
            if left <= 0:
                raise TimeoutError(f"no reply in {self.seconds} s")
        raise ChildProcessError("the worker died twice")

    def _start(self) -> subprocess.Popen:
        # a fixed hash seed, because sympy's path to an answer can depend on the order of sets;
        # one thread, because a BLAS with one buffer a core would run into the memory limit
        fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for _ in range(2):
            # -P: the modules beside the file are not the worker's
            process = subprocess.Popen(
                [sys.executable, "-P", self.path, "--worker", str(os.getpid())],
                env=os.environ | fixed,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self.processes.add(process)
            if self.dropped:
                self._end(process)
                raise RuntimeError("this pool was closed before its work was done")
            reply = _exchange(process, None, START_SECONDS)
            if reply == {"ready": True}:
                return process
            self._end(process)
            if reply is not None:
                break
        why = reply["error"] if reply else f"exit status {process.returncode}"
        raise RuntimeError(f"no worker could start ({why}): is math-verify[antlr4_13_2] installed?")

    def _end(self, process: subprocess.Popen) -> None:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()
            except OSError:  # what was still buffered for a dead reader
                pass
        process.wait()
        self.processes.discard(process)


def _exchange(process: subprocess.Popen, request: dict | None, seconds: float) -> dict | None:
    """The reply, or None where the worker died, or took longer and was killed."""
    # unlike a read with a timeout, it guards the write as well
    killer = threading.Timer(seconds, process.kill)
    killer.daemon = True
    killer.start()
    try:
        if request is not None:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (OSError, ValueError):
        return None
    finally:
        killer.cancel()
