"""Several runs of train.py in one process, some of them sabotaged: to start a process takes longer than a run.

    python tests/runs.py NAME FOLDER [INPUT]     # or under torchrun -> FOLDER/NAME-RANK.json, run -> what it ended with, null if at its end

INPUT: folder of the run whose rollouts are trained on, or a file of flags. Runs that replay are done where nothing can import what only engines
and judges need.
"""

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

LAPTOP = (
    "vllm",
    "math_verify",
    "datasets",
    "pyarrow",
    "tensorboard",
    "matplotlib",
)  # is without these
TOY = (
    "--algo remix-ppo --prompts 20 --p 0.6 --window 2 --minibatch 8 --reincarnate 3 --lambda_start 1 --lambda_every 1 "
    "--eval_every 3 --eval_k 1 --save_every 2 --steps 5"
).split()
RECORDED = [*TOY, "--dump_rollouts"]


class Runs:
    """Runs in one process group, each with what it ended with."""

    def __init__(self, folder):
        import torch.distributed as dist

        import faults
        import train
        from infra import ranks as distributed

        self.train, self.folder, self.ended, self.ranks = train, folder, {}, distributed.start(1)
        train.start = lambda *_: self.ranks
        faults.reported = contextlib.nullcontext  # it would end the process
        dist.destroy_process_group = lambda: None

    def __call__(self, name, *flags, **sabotage):
        """Run train.py with flags; sabotage: what replaces functions of train.py meanwhile."""
        print(f"== {name}", flush=True)
        with contextlib.ExitStack() as stack:
            for target, value in sabotage.items():
                stack.enter_context(mock.patch.object(self.train, target, value))
            try:
                self.ended[name] = self.train.main(
                    [*map(str, flags), "--out", str(self.folder / name)]
                )
            except (RuntimeError, ValueError) as error:
                self.ended[name] = f"{type(error).__name__}: {error}"


def algorithms(run, flags):
    """A run for each entry of a JSON file, name -> flags."""
    for name, values in json.loads(flags.read_text()).items():
        run(name, *values)


def engine(run, _):
    """With vLLM: a run that records its rollouts; one whose engine keeps its first weights; one whose responses are all cut."""
    from rollout import Engine

    run("recorded", *RECORDED)

    class Stale(Engine):
        def update(self, version, tensors, expected):
            if self.version is None:
                return super().update(version, tensors, expected)
            for _ in tensors:  # taken, not loaded
                pass
            self.version = version

    class Late(Stale):
        def update(self, version, tensors, expected):
            if self.version is None:
                super().update(version, tensors, expected)

    run("stale", *TOY, "--eval_every", 0, "--no-resume", Engine=Stale)
    run("late", *TOY, "--eval_every", 0, Engine=Late)
    run("cut", *TOY, "--eval_every", 0, "--max_response", 2, "--max_equal_rewards", 2)


def replayed(run, recorded):
    """One rank, no vLLM: the recorded run again; with another loss; with updates that are not finite; with other rewards."""
    import torch
    from safetensors.torch import load_file, save_file

    import prepare
    from infra import config

    config.check_vllm = prepare.check_vllm = None  # not even asked for
    train, again = (
        run.train,
        ("--config", recorded / "config.json", "--replay", recorded / "rollouts"),
    )
    real = train.batch_advantages

    def spoil(fine):
        """batch_advantages that makes one response's advantages infinite where not fine(step, …)."""
        steps = iter(range(1, 99))

        def spoilt(batch, cfg):
            real(batch, cfg)
            for sample in batch if not fine(next(steps)) else ():
                sample["advantages"] = torch.full_like(sample["advantages"], math.inf)

        return spoilt

    def edited(name, **values):
        """A copy of the recording with other values in every sample."""
        copy = shutil.copytree(recorded / "rollouts", run.folder / f"rollouts-{name}")
        for path in copy.glob("*.json"):
            record = json.loads(path.read_text())
            for sample in record["samples"]:
                sample.update(values)
            path.write_text(json.dumps(record))
        return copy

    def first_wrong(batch, cfg):
        real(batch, cfg)
        if batch[0]["version"] == 1:  # step 2
            batch[0]["advantages"] = batch[0]["advantages"] * math.nan

    run("same", *again)
    run("other loss", *again, "--clip_low", 0.01, "--clip_high", 0.01)
    run("one broken", *again, batch_advantages=first_wrong)
    run("all broken", *again, "--max_skipped", 4, batch_advantages=spoil(lambda step: step < 2))
    run(
        "all right",
        *again,
        "--replay",
        edited("right", reward=1.0, reason=None),
        "--max_equal_rewards",
        2,
    )
    run(
        "unjudged",
        *again,
        "--replay",
        edited("unjudged", reward=0.0, reason="no_box"),
        "--max_equal_rewards",
        3,
    )
    other = shutil.copytree(recorded / "rollouts", run.folder / "rollouts-mixed")
    for suffix in (".json", ".safetensors"):
        shutil.copy(other / f"step_000001{suffix}", other / f"step_000003{suffix}")
    run("other prompts", *again, "--replay", other)
    tensors = load_file(recorded / "rollouts" / "step_000001.safetensors")
    spoilt = dict(
        tokens=lambda t: t if t.is_floating_point() or len(t) == 6 else t + 1000,
        types=lambda t: t.double(),
        numbers=lambda t: t * math.nan if t.is_floating_point() else t,
        shapes=lambda t: t[:6] if t.is_floating_point() else t,
    )
    for name, change in spoilt.items():
        other = shutil.copytree(recorded / "rollouts", run.folder / f"rollouts-{name}")
        save_file(
            {key: change(tensor).contiguous() for key, tensor in tensors.items()},
            other / "step_000001.safetensors",
        )
        run(name, *again, "--replay", other)
    run("reasons", *again, "--replay", edited("reasons", reason=["a"]))
    run("rewards", *again, "--replay", edited("rewards", reward="much"))


def apart(run, recorded):
    """Two ranks, no vLLM: the recorded run again; ranks with another seed, other data, another history."""
    from infra import toy

    train, rank = run.train, run.ranks.rank
    again = ("--config", recorded / "config.json", "--replay", recorded / "rollouts")
    run("two", *again, "--micro_tokens", 150)
    run("seed", *TOY, "--seed", rank)
    file = run.folder / f"problems-{rank}.jsonl"
    file.write_text(
        "".join(
            json.dumps({"problem": p["problem"], "answer": p["answer"]}) + "\n"
            for p in toy.problems("train")[rank:]
        )
    )
    run(
        "data",
        "--model",
        toy.model_folder(rank == 0),
        "--data",
        file,
        "--template",
        "raw",
        "--style",
        "hash",
        "--max_prompt",
        8,
        "--max_response",
        40,
    )

    class Forgetful(train.RingBuffer):
        def push(self, version, groups):
            if rank == 1 and version == 1:
                groups[-1][0]["reward"] = 0.5
            super().push(version, groups)

    run("history", *again, RingBuffer=Forgetful)


def main(name, folder, given=None):
    if name in ("replayed", "apart"):
        sys.modules.update(dict.fromkeys(LAPTOP))  # import raises ImportError
    run = Runs(Path(folder))
    globals()[name](run, given and Path(given))
    (Path(folder) / f"{name}-{run.ranks.rank}.json").write_text(json.dumps(run.ended))


if __name__ == "__main__":
    main(*sys.argv[1:])
