"""Save, resume, export. A checkpoint is written aside, to the disk itself, and renamed: a folder without `.tmp` is complete.

    OUT/checkpoints/step_000100/   sharded/: policy, critic, optimisers, base and precedent (PyTorch's distributed format)
                                   buffer.safetensors, state.json: history, step
    OUT/model/                     the policy in Hugging Face format

Nothing random is saved because nothing random is carried over: prompts, draws, minibatches and request seeds are functions of
(seed, step). The distributed format's metadata is a pickle: do not resume from a stranger's folder.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from infra.ranks import gather


def newest(out):
    """Folder of the newest complete checkpoint of run `out`, or None."""
    found = complete(out)
    return found[-1] if found else None


def complete(out):
    """Folders of the complete checkpoints of run `out`, oldest first."""
    return sorted(
        path for path in (Path(out) / "checkpoints").glob("step_*") if path.suffix != ".tmp"
    )


def sweep(out):
    """Remove what a killed save or removal left in run `out`."""
    for path in (Path(out) / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(path)


@contextlib.contextmanager
def together(doing):
    """What fails on one rank inside fails on all, as an OSError of one line that names rank and cause. A collective at its end.

    `doing`: what could not be done, for that line. Nothing inside may wait for another rank once one can have failed.
    """
    failures = {}
    try:
        yield
    except (
        CheckpointException
    ) as error:  # no Exception; dcp raises it on every rank, about all of them
        failures = {rank: cause for rank, (cause, _) in error.failures.items()}
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(
            error
        ):  # as the Rust of safetensors and tokenizers reports one
            raise
        failures = {dist.get_rank(): error}
    texts = {
        f"rank {rank} {doing}: {' '.join(str(cause).split())}" for rank, cause in failures.items()
    }
    if found := sorted(set().union(*gather(texts))):
        hint = (
            " (a short write, as on a full disk, beyond a quota or a limit of file size)"
            if "unexpected pos" in found[0]
            else ""
        )
        raise OSError(found[0] + hint)


def put_in_place(aside, folder):
    """The finished folder `aside` becomes `folder`, in place of an earlier one: on the disk first, so that a loss of power finds it whole."""

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
    state = {}
    for name, learner in learners.items():
        model, optimizer = get_state_dict(learner.module, learner.optimizer)
        state[name] = {"model": model, "optimizer": optimizer}
    for name, snapshot in snapshots.items():
        state[name] = {str(i): tensor for i, tensor in enumerate(snapshot)}
    return state


def save(out, step, learners, snapshots, buffer, keep, ranks):
    """Write the checkpoint of `step`. learners: name -> Learner; snapshots: name -> list of DTensors. A collective."""
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
            tensors, state = {}, buffer.state_dict()
            skeleton = pack(state, tensors, "")
            save_file(tensors, aside / "buffer.safetensors")
            (aside / "state.json").write_text(
                json.dumps({"step": step, "snapshots": sorted(snapshots), "buffer": skeleton})
            )
            put_in_place(aside, folder)
            for old in complete(out)[:-keep]:  # only now, when the new one is complete
                shutil.rmtree(
                    old.rename(old.with_suffix(".tmp"))
                )  # half removed, it must not pass for one


def load(folder, learners, buffer):
    """Read a checkpoint into learners and buffer; returns (step, snapshots). Any number of ranks. A collective. Raises OSError."""
    with together(f"could not read {folder} (without it, --resume takes the one before)"):
        return read(folder, learners, buffer)


def read(folder, learners, buffer):
    state = json.loads((folder / "state.json").read_text())
    snapshots = {name: learners["policy"].snapshot() for name in state["snapshots"]}
    sharded = sharded_state(learners, snapshots)
    dcp.load(sharded, checkpoint_id=folder / "sharded")
    for name, learner in learners.items():
        set_state_dict(
            learner.module,
            learner.optimizer,
            model_state_dict=sharded[name]["model"],
            optim_state_dict=sharded[name]["optimizer"],
        )
    buffer.load_state_dict(unpack(state["buffer"], load_file(folder / "buffer.safetensors")))
    return state["step"], {
        name: [sharded[name][str(i)] for i in range(len(snapshot))]
        for name, snapshot in snapshots.items()
    }


def pack(value, tensors, path):
    """Replace every tensor in nested lists and dicts by {"tensor": key} and put it into `tensors`: JSON beside safetensors."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.contiguous().clone()
        return {"tensor": path}
    if isinstance(value, dict):
        return {key: pack(inner, tensors, f"{path}/{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(inner, tensors, f"{path}/{i}") for i, inner in enumerate(value)]
    return value


def unpack(value, tensors):
    """The inverse of pack()."""
    if isinstance(value, dict):
        return (
            tensors[value["tensor"]]
            if value.keys() == {"tensor"}
            else {key: unpack(inner, tensors) for key, inner in value.items()}
        )
    return [unpack(inner, tensors) for inner in value] if isinstance(value, list) else value


def export(folder, source, policy, tokenizer, cfg, ranks):
    """Save the policy as a Hugging Face model with its tokenizer, written aside and renamed. A collective.

    In the compute type, so that whoever loads it gets the log-probs of training. `source`: the folder that the model came
    from, for its generation_config.json.
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
