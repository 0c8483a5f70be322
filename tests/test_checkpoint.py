"""checkpoint.py at two ranks and one, on a small module under FSDP2.

This file run under torchrun is the program (job); its tests judge what that saw.
"""

import contextlib
import resource
import signal
import sys
from argparse import Namespace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from torch import nn

from conftest import command
from infra import checkpoint, ranks
from infra.toy import make_tokenizer

HISTORY = {"window": 2, "entries": [(1, [[{"response": torch.arange(30_000), "reward": 1.0}]])]}


class Learner:
    def __init__(self, size):
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(size)
        self.module = fully_shard(nn.Sequential(nn.Linear(5, size), nn.Linear(size, 3)))
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def advance(self):
        self.module(torch.arange(10.0).view(2, 5)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def snapshot(self):
        return [p.detach().clone() for p in self.module.parameters()]


def state_of(learners, snapshots):
    """All that a checkpoint must bring back, unsharded, read past the code under test."""
    found = {}
    for name, learner in learners.items():
        for i, p in enumerate(learner.module.parameters()):
            found[name, i] = p.full_tensor()
            for key, value in learner.optimizer.state[p].items():
                found[name, i, key] = getattr(value, "full_tensor", lambda v=value: v)()
    for name, snapshot in snapshots.items():
        found |= {(name, i): p.full_tensor() for i, p in enumerate(snapshot)}
    return {key: value.detach().clone() for key, value in found.items()}


@contextlib.contextmanager
def full_disk(bytes_left):
    """No file may become larger, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, -1))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))


def exported(folder, me):
    """checkpoint.export of a small model."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    lm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    policy = Namespace(module=Namespace(lm=lm), full_tensors=lambda: lm.state_dict().items())
    cfg = Namespace(dtype="float32")
    checkpoint.export(folder / "model", folder, policy, make_tokenizer(), cfg, me)


def job(folder):
    """World 2 saves, goes on, and loads into new learners; world 1 loads what world 2 saved."""
    me, out, seen = ranks.start(threads=1), folder / "run", {"failed": []}

    def save(step):
        checkpoint.save(out, step, learners, snapshots, buffer, 2, me)

    def fails(work):
        try:
            work()
        except OSError as error:
            seen["failed"].append(str(error))

    learners = {"policy": Learner(4), "critic": Learner(7)}
    buffer = Namespace(state_dict=lambda: HISTORY)
    if me.world == 2:
        snapshots = {"base": learners["policy"].snapshot()}
        for learner in learners.values():
            learner.advance()
        snapshots["prev"] = learners["policy"].snapshot()
        for learner in learners.values():
            learner.advance()
        seen["before"] = checkpoint.newest(out)
        if me.first:
            # what a killed save leaves
            (out / "checkpoints" / "step_000099.tmp").mkdir(parents=True)
        for step in (3, 5, 10):
            save(step)
            ranks.gather(None)
            seen[step] = sorted(path.name for path in (out / "checkpoints").iterdir())
        seen["saved"] = state_of(learners, snapshots)
        for rank, bytes_left, work in (
            (1, 1000, lambda: save(11)),  # the shards
            (0, 100_000, lambda: save(11)),  # state.pt
            (0, 100, lambda: exported(folder, me)),
        ):
            with full_disk(bytes_left if me.rank == rank else -1):
                fails(work)
        seen["stands"] = checkpoint.newest(out)
        for learner in learners.values():
            learner.advance()
        seen["continued"] = state_of(learners, snapshots)
    learners = {"policy": Learner(4), "critic": Learner(7)}
    buffer = Namespace(load_state_dict=lambda state: seen.update(buffer=state))
    folder_read = checkpoint.newest(out)
    seen["step"], snapshots = checkpoint.load(folder_read, learners, buffer)
    seen["loaded"] = state_of(learners, snapshots)
    for learner in learners.values():
        learner.advance()
    seen["loaded continued"] = state_of(learners, snapshots)
    torch.save(seen, folder / f"{me.world}-{me.rank}.pt")
    ranks.gather(None)
    if me.world == 1:
        (folder_read / "state.pt").write_bytes(b"cut")
        fails(lambda: checkpoint.load(folder_read, learners, buffer))
        torch.save(seen, folder / "1-0.pt")
    ranks.stop()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """(world, rank) -> what it saw."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for world in (2, 1):
        done = command("tests/test_checkpoint.py", folder, ranks=world)
        assert done.returncode == 0, done.stderr[-4000:]
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt", weights_only=False)
        for world, rank in ((1, 0), (2, 0), (2, 1))
    }


def equal(a, b):
    """Nested dicts, lists and tuples with tensors, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def test_every_bit_comes_back_at_as_many_ranks_and_at_one(seen):
    """Parameters, moments, step counts, snapshots, history."""
    saved = seen[2, 0]["saved"]
    assert saved["critic", 0, "step"] == 2 and saved["critic", 0, "exp_avg_sq"].any()
    assert not torch.equal(saved["base", 0], saved["prev", 0])
    for found in seen.values():
        assert found["step"] == 10 and equal(found["loaded"], saved)
        assert equal(found["buffer"], HISTORY)


def test_training_goes_on_after_a_checkpoint_as_without_it(seen):
    for rank in (0, 1):
        found = seen[2, rank]
        assert equal(found["loaded continued"], found["continued"])
        assert not equal(found["continued"], found["saved"])


def test_a_full_disk_on_one_rank_is_one_line_on_every_rank_and_the_last_checkpoint_stands(seen):
    assert seen[2, 0]["failed"] == seen[2, 1]["failed"]
    assert seen[2, 0]["stands"].name == "step_000010"
    found = zip(
        seen[2, 0]["failed"], (1, 0, 0), ("step_000011.tmp", "step_000011.tmp", "model.tmp")
    )
    for line, rank, name in found:
        assert line.startswith(f"rank {rank} could not write ") and name in line
        assert "\n" not in line and ("a full disk" in line or "File too large" in line)
    assert len(seen[2, 0]["failed"]) == 3


def test_old_checkpoints_go_and_half_written_ones_do_not_count(seen):
    found = seen[2, 0]
    assert found["before"] is None and found[3] == ["step_000003", "step_000099.tmp"]
    assert found[5] == ["step_000003", "step_000005", "step_000099.tmp"]
    assert found[10] == ["step_000005", "step_000010", "step_000099.tmp"]


def test_a_damaged_checkpoint_is_named(seen):
    (line,) = seen[1, 0]["failed"]
    assert line.startswith("rank 0 could not read ") and "step_000010" in line


def test_what_a_killed_save_left_is_swept(tmp_path):
    for name in ("step_000001", "step_000002.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoint.sweep(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


if __name__ == "__main__":
    job(Path(sys.argv[1]))
