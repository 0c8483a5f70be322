"""Save, resume, export. A checkpoint is written aside, to the disk itself, and renamed: a folder
without `.tmp` is complete.

    OUT/checkpoints/step_000100/   sharded/: policy, critic, optimisers, frozen policies, in
                                   PyTorch's distributed format
                                   state.pt: step, buffer
    OUT/model/                     the policy in Hugging Face format

Nothing random is saved because nothing random is carried over: prompts, draws, minibatches and
request seeds are functions of (seed, step). state.pt runs no code when it is read, but the
distributed format's metadata is a pickle: do not resume from a stranger's folder.
"""

import contextlib
import os
import shutil
import traceback
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from infra.ranks import gather


def newest(out):
    """Folder of the newest complete checkpoint of run `out`, or None."""
    return next(reversed(complete(out)), None)


def complete(out):
    """Folders of the complete checkpoints of run `out`, oldest first."""
    found = (Path(out) / "checkpoints").glob("step_*")
    return sorted(path for path in found if path.suffix != ".tmp")


def sweep(out):
    """Remove what a killed save or removal left in run `out`."""
    for path in (Path(out) / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(path)


@contextlib.contextmanager
def together(doing):
    """What fails on one rank inside fails on all, as an OSError of one line: rank, `doing`, cause.

    A collective at its end. Nothing inside may wait for another rank once one can have failed.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException

    causes, own = {}, None
    try:
        yield
    except CheckpointException as error:  # no Exception; on every rank, about all of them
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
    except Exception as error:
        causes, own = {dist.get_rank(): error}, error
    lines = []
    for rank, cause in causes.items():
        text = " ".join("".join(traceback.format_exception_only(cause)).split())
        if "unexpected pos" in text or "file write failed" in text:  # PyTorch's words for it
            text = f"a short write, as on a full disk or beyond a quota ({text})"
        lines.append(f"rank {rank} {doing}: {text}")
    found = sorted(set().union(*gather(lines)))
    if found:
        raise OSError(found[0]) from own


def put_in_place(aside, folder):
    """The finished folder `aside` becomes `folder`, in place of an earlier one.

    Flushed to the disk first, so that a loss of power finds it whole.
    """

    def settle(path):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    for path in (*aside.rglob("*"), aside):
        settle(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    settle(folder.parent)


def sharded_state(learners, snapshots):
    """Everything that lives in shards, under stable names."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    state = {}
    for name, learner in learners.items():
        model, optimizer = get_state_dict(learner.module, learner.optimizer)
        state[name] = {"model_state_dict": model, "optim_state_dict": optimizer}
    for name, snapshot in snapshots.items():
        state[name] = {str(i): tensor for i, tensor in enumerate(snapshot)}
    return state


def save(out, step, learners, snapshots, buffer, keep, ranks):
    """Write the checkpoint of `step`, then remove all but the newest `keep`. A collective.

    learners: name -> Learner; snapshots: name -> list of DTensors. Raises OSError on every rank
    where one could not write.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(out) / "checkpoints" / f"step_{step:06d}"
    aside = folder.with_name(folder.name + ".tmp")
    with together(f"could not write {aside}"):
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    with together(f"could not write {aside}"):
        dcp.save(sharded_state(learners, snapshots), checkpoint_id=aside / "sharded")
    with together(f"could not write {aside}"):
        if ranks.first:
            state = {"step": step, "snapshots": sorted(snapshots), "buffer": buffer.state_dict()}
            torch.save(state, aside / "state.pt")
            put_in_place(aside, folder)
            for old in complete(out)[:-keep]:  # only now, when the new one is complete
                # half removed, it must not pass for one
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))


def load(folder, learners, buffer):
    """Read a checkpoint into learners and buffer; returns (step, snapshots). Any number of
    ranks may have written it. A collective. Raises OSError."""
    with together(f"could not read {folder} (remove it, and --resume takes the one before)"):
        return read(folder, learners, buffer)


def read(folder, learners, buffer):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    state = torch.load(folder / "state.pt", weights_only=True)
    snapshots = {name: learners["policy"].snapshot() for name in state["snapshots"]}
    sharded = sharded_state(learners, snapshots)
    dcp.load(sharded, checkpoint_id=folder / "sharded")
    for name, learner in learners.items():
        set_state_dict(learner.module, learner.optimizer, **sharded[name])
    for name, snapshot in snapshots.items():
        snapshots[name] = [sharded[name][str(i)] for i in range(len(snapshot))]
    buffer.load_state_dict(state["buffer"])
    return state["step"], snapshots


def export(folder, source, policy, tokenizer, cfg, ranks):
    """Save the policy as a Hugging Face model with its tokenizer, aside and renamed. A collective.

    In the compute type, so that whoever loads it gets the log-probs of training. source: the folder
    that the model came from, for its generation_config.json.
    """
    weights = {}
    for name, tensor in policy.full_tensors():  # every rank takes part, rank 0 keeps
        if ranks.first:
            weights[name] = tensor.cpu().clone()
    folder, config = Path(folder), policy.module.lm.config
    aside = folder.with_name(folder.name + ".tmp")
    with together(f"could not write {aside}"):
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            if config.tie_word_embeddings:
                weights.pop("lm_head.weight", None)
            config.dtype, config.architectures = cfg.dtype, [type(policy.module.lm).__name__]
            config.save_pretrained(aside)
            save_torch_state_dict(weights, aside)
            tokenizer.save_pretrained(aside)
            if (generation := Path(source) / "generation_config.json").exists():
                shutil.copy(generation, aside)
            put_in_place(aside, folder)
