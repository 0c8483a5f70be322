"""Several runs of train.py in one process, some of them sabotaged: a start takes longer than a run.

    python tests/runs.py NAME FOLDER [INPUT]     # or under torchrun

Writes FOLDER/NAME-RANK.json: run -> what it ended with, null if at its end. INPUT: the folder of
the run whose rollouts are trained on, or a file of flags. Runs that replay are done where nothing
can import what only engines and judges need.
"""

import contextlib
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LAPTOP = ("vllm", "math_verify", "tensorboard", "matplotlib")  # is without these
TOY = (
    "--algo remix-ppo --prompts 20 --p 0.6 --window 2 --minibatch 8 --reincarnate 3 "
    "--lambda_start 1 --lambda_every 1 --save_every 2 --steps 5 --eval_every"
).split()
QUIET, RECORDED = [*TOY, "0"], [*TOY, "3", "--eval_k", "1", "--dump_rollouts"]


class Runs:
    """Runs in one process group, each with what it ended with."""

    def __init__(self, folder):
        import reward
        import rollout
        import train

        self.train, self.folder, self.ended, self.ranks = train, folder, {}, train.start(1)
        train.start, train.stop = lambda *_: self.ranks, lambda: None
        self.Engine, self.engines, self.judge = rollout.Engine, {}, reward.Judge()

    def __call__(self, name, *flags, **sabotage):
        """Run train.py with flags; sabotage: "module.name" -> what replaces it meanwhile."""
        if self.ranks.first:
            print(f"== {name}", flush=True)
        argv = ["train.py", *map(str, flags), "--out", str(self.folder / name)]
        ours = {"rollout__Engine": self.engine, "train__Judge": self.one_judge, "sys__argv": argv}
        sabotage = ours | sabotage
        with contextlib.ExitStack() as stack:
            for target, value in sabotage.items():
                stack.enter_context(mock.patch(target.replace("__", "."), value))
            try:
                self.ended[name] = self.train.main()
            except (RuntimeError, ValueError) as error:
                self.ended[name] = f"{type(error).__name__}: {error}"

    def one_judge(self):
        """Its workers take seconds to start."""
        return contextlib.nullcontext(self.judge)

    def engine(self, folder, max_len, cfg, ranks, kind=None, **how):
        """The real engine, one for all runs of a model: each takes a start, and 1 GiB of cache."""
        key = folder, max_len, cfg.dtype
        if key not in self.engines:
            self.engines[key] = self.Engine(folder, max_len, cfg, ranks, **how)
        found = self.engines[key]
        found.__class__, found.version = kind or self.Engine, None
        return found


def algorithms(run, flags):
    """A run for each entry of a JSON file, name -> flags; of eval.py where benchmarks are
    asked for."""
    import eval

    eval.ranks.start, eval.ranks.stop = lambda *_: run.ranks, lambda: None
    for name, values in json.loads(flags.read_text()).items():
        if "--benchmarks" in values:
            print(f"== {name}", flush=True)
            with mock.patch("eval.Judge", run.one_judge):
                run.ended[name] = eval.main(values)
        else:
            run(name, *values)


def engine(run, _):
    """With vLLM: a recorded run; engines that keep old weights; responses that are all cut."""
    run("recorded", *RECORDED)

    class Stale(run.Engine):  # takes new weights, and does not load them
        def update(self, version, tensors, expected):
            if self.version is None:
                return super().update(version, tensors, expected)
            for _ in tensors:
                pass
            self.version = version

    class Late(Stale):  # does not even take them
        def update(self, version, tensors, expected):
            if self.version is None:
                super().update(version, tensors, expected)

    run("stale", *QUIET, rollout__Engine=partial(run.engine, kind=Stale))
    run("late", *QUIET, rollout__Engine=partial(run.engine, kind=Late))
    run("cut", *QUIET, "--max_response", 2, infra__guards__NOTHING_LEARNED=2)


def replayed(run, recorded):
    """One rank, no vLLM: the recorded run again; another loss; broken updates; other rewards."""
    import torch

    import methods
    from infra import config

    config.check_vllm = None  # not even asked for
    credit, flags = methods.Method.credit, [*RECORDED[:-1], "--replay", recorded / "rollouts"]

    def spoilt(count):
        """credit() that makes the advantages of `count` responses infinite, in step 2."""
        calls = iter(range(1, 99))

        def spoil(method, batch):
            credit(method, batch)
            for row in batch["advantages"][:count] if next(calls) == 2 else ():
                row.fill_(math.inf)

        return spoil

    def edited(name, change):
        """A copy of the recording, each sample changed."""
        copy = shutil.copytree(recorded / "rollouts", run.folder / f"rollouts-{name}")
        for path in copy.glob("*.pt"):
            record = torch.load(path, weights_only=True)
            for group in record["groups"]:
                group[:] = [sample | change(sample) for sample in group]
            torch.save(record, path)
        return [*flags[:-1], copy]

    right = edited("right", lambda sample: dict(reward=1.0, reason=None))
    run("same", *flags)
    run("other loss", *flags, "--clip_low", 0.01, "--clip_high", 0.01)
    run("one broken", *flags, methods__Method__credit=spoilt(1))
    run("all broken", *flags, methods__Method__credit=spoilt(99))
    run("all right", *right, infra__guards__NOTHING_LEARNED=2)
    run("numbers", *edited("numbers", lambda s: dict(logp_sampler=s["logp_sampler"] * math.nan)))
    mixed = edited("mixed", lambda sample: {})
    shutil.copy(mixed[-1] / "step_000001.pt", mixed[-1] / "step_000003.pt")
    run("other prompts", *mixed)
    torn = edited("torn", lambda sample: {})
    (torn[-1] / "step_000002.pt").write_bytes(b"PK\3\4 torn")
    run("torn", *torn)


def apart(run, recorded):
    """Two ranks, no vLLM: the recorded run again; ranks with another seed or other data."""
    from infra import config, toy

    config.check_vllm = None
    flags, rank = [*RECORDED[:-1], "--replay", recorded / "rollouts"], run.ranks.rank
    run("two", *flags, "--micro_tokens", 150)
    run("seed", *flags, "--seed", rank)
    problems = toy.problems
    run("data", *flags, infra__toy__problems=lambda split: problems(split)[rank:])


JOBS = algorithms, engine, replayed, apart

if __name__ == "__main__":
    name, folder, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if name in ("replayed", "apart"):
        sys.modules |= dict.fromkeys(LAPTOP)
    run = Runs(folder)
    {job.__name__: job for job in JOBS}[name](run, source)
    (folder / f"{name}-{run.ranks.rank}.json").write_text(json.dumps(run.ended))
    sys.stdout.flush()
