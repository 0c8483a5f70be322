"""Memory and speed of the update half of the loop on one GPU, beside the memory plan's figures.

    python tools/bench_gpu.py OUT.jsonl             # one rank: about three minutes on an H100
    python tools/bench_gpu.py OUT.jsonl --ranks 8   # what a rank of eight holds, on one GPU
    python tools/bench_gpu.py OUT.jsonl --tiny      # the same path, nothing to compute: any CPU

Random weights at real shapes through model.py's Learner and train.py's update; no vLLM. With
--ranks the process sees a rank of many through PyTorch's "fake" process group, which copies where
others communicate: the memory is that of such a rank, the time lacks communication.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig

import methods
from buffer import Batch, Sample
from infra import memory
from infra.metrics import Meter
from infra.ranks import Ranks, start
from model import Critic, Learner, Policy
from train import update

R1, MATH, BIG = "DeepSeek-R1-Distill-Qwen-1.5B", "Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B"
LENGTHS = [(n, 16384, 1024) for n in (1024, 2048, 4096, 8192)]
ONE, HALF, WIDE = (4096, 16384, 1024), (4096, 8192, 1024), (4096, 16384, 4096)
CASES = [  # ranks, model, flags, (tokens of a row, --micro_tokens, chunk_tokens) …
    (8, BIG, "--algo remix-ppo", [ONE, HALF]),
    (8, BIG, "--algo remix-grpo", [ONE]),
    (1, R1, "--algo remix-grpo", [WIDE, HALF, *LENGTHS]),
    (1, R1, "--algo remix-ppo", [ONE]),
    (1, MATH, "--algo remix-ppo", [ONE]),
    (1, R1, "--algo remix-grpo --no-activation_checkpointing", [HALF]),
    (1, BIG, "--algo grpo --beta 0", [HALF]),
    (1, R1, "--algo remix-grpo --offload_optimizer", [ONE]),
]
CAPS = (1.1, 1.05, 1.02)  # of the peak: what the allocator is given


def timed(work):
    """(what `work()` returns, seconds)."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    found = work()
    wait()
    return found, time.perf_counter() - begin


def learner(module, cfg, ranks):
    """A Learner of random weights, the same each time, made on its own device."""
    torch.manual_seed(0)
    module.to_empty(device=ranks.device)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.02)
    if isinstance(module, Policy):
        module.lm.tie_weights()
    return Learner(module, cfg.lr, cfg, ranks)


def random_batch(count, length, vocab, prompt):
    """One step's batch of `count` rows of `length` tokens, every column filled."""
    torch.manual_seed(1)
    ids, logp = torch.randint(vocab, (count, length)), torch.randn(count, length - prompt) - 12
    rows = zip(ids[:, :prompt], ids[:, prompt:], logp)
    samples = [
        Sample(a, b, c, False, 0, i, "", logp_behavior=c) for i, (a, b, c) in enumerate(rows)
    ]
    batch = Batch([[sample] for sample in samples], [])
    for name in "logp_old logp_base logp_prev values returns advantages".split():
        batch[name] = list(torch.randn(count, length - prompt) - 12)
    return batch


def measure(folder, cfg, ranks, variants, say, more):
    """One set of learners: each variant's peak, plan and speed, then how little memory will do."""
    method, cuda = methods.Method(cfg), ranks.device.type == "cuda"
    plan = method.plan(cfg.steps)  # λ has fallen: both references
    learners = {"policy": learner(Policy(folder, 1.0, empty=True), cfg, ranks)}
    if method.critic:
        learners["critic"] = learner(Critic(folder, empty=True), cfg, ranks)
    policy = learners["policy"]
    snapshots, s = [policy.snapshot() for _ in plan.references], memory.shape_of(folder)
    for length, cfg.micro_tokens, memory.CHUNK in variants:
        policy.module.chunk_tokens = memory.CHUNK
        cfg.max_prompt = min(256, length // 2)
        cfg.max_response = length - cfg.max_prompt
        count = 2 * ranks.world * (cfg.micro_tokens // length)
        batch, tokens = (
            random_batch(count, length, s.vocab, cfg.max_prompt),
            count * length / ranks.world,
        )
        work = partial(update, learners, batch, range(count), method, plan, Meter())
        found = dict(length=length, micro_tokens=cfg.micro_tokens, chunk_tokens=memory.CHUNK)
        work()  # kernels are chosen, AdamW makes its moments
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            work()
            peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_reserved()
            free, total = torch.cuda.mem_get_info()
            found |= dict(peak=peak / 2**30, other=(total - free - kept) / 2**30)
        items = memory.resting(cfg, s, ranks.world) | memory.passing(cfg, s, ranks.world)
        found |= dict(planned=sum(items.values()) / 2**30, snapshots=len(snapshots))
        found["update_tokens_per_second"] = tokens / timed(work)[1]
        if ranks.world == 1:
            policy.predict(batch.samples)
            seconds = timed(partial(policy.predict, batch.samples))[1]
            found["predict_tokens_per_second"] = tokens / seconds
        say(**found)
    if more:
        details(
            folder, cfg, policy, batch, partial(update, {"policy": policy}, *work.args[1:]), say
        )
    for cap in CAPS if cuda else ():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(cap * peak / total, 1.0))
        say(cap=cap, update_tokens_per_second=tokens / timed(work)[1])


def details(folder, cfg, policy, batch, work, say):
    """Streaming and swapping weights, two identical updates, bfloat16 beside float32."""
    begin, few = policy.snapshot(), batch.samples[:4]
    size, seconds = timed(lambda: sum(tensor.nbytes for _, tensor in policy.full_tensors()))
    say(
        stream_gib=size / 2**30,
        stream_seconds=seconds,
        swap=timed(partial(policy._exchange, begin))[1],
    )
    policy._exchange(begin)
    for exact in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(not exact)
        torch.use_deterministic_algorithms(exact)
        ends = []
        for _ in range(2):
            start_again(policy, begin)
            seconds = timed(work)[1]
            ends.append(policy.snapshot())
        same = [torch.equal(a.to_local(), b.to_local()) for a, b in zip(*ends)]
        say(deterministic=exact, equal=sum(same), of=len(same), seconds=seconds)
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)
    start_again(policy, begin)
    wide = copy.copy(cfg)
    wide.dtype = "float32"
    exact = learner(Policy(folder, 1.0, empty=True), wide, policy.ranks)
    start_again(exact, begin)
    gap = (torch.cat(exact.predict(few)) - torch.cat(policy.predict(few))).abs()
    say(gap_mean=gap.mean().item(), gap_max=gap.max().item())


@torch.no_grad()
def start_again(policy, weights):
    for live, frozen in zip(policy.module.parameters(), weights):
        live.copy_(frozen)
    policy.optimizer.state.clear()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic algorithms ask for it
    if args.ranks == 1:
        ranks = start(16)
    else:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
        ranks = Ranks(0, args.ranks, args.ranks, torch.device("cuda:0" if cuda else "cpu"))
    for _, name, flags, variants in [case for case in CASES if case[0] == args.ranks]:
        card = torch.cuda.get_device_name() if cuda else "CPU"
        where = dict(card=card, ranks=args.ranks, model=name, flags=flags)
        s, folder = memory.SHAPES[name], tempfile.mkdtemp()
        if args.tiny:
            small = dict(hidden=64, intermediate=160, layers=2, heads=4, kv_heads=2, head_dim=16)
            s, variants = s._replace(vocab=512, **small), [(32, 64, 16)]
        config = AutoConfig.for_model(s.kind, **dict(zip(memory.KEYS[1:], s[1:])))
        config.save_pretrained(folder)

        def say(where=where, **found):
            line = json.dumps(where | found)
            print(line, flush=True)
            with open(args.out, "a") as file:
                file.write(line + "\n")

        try:
            cfg = methods.parse(f"--model {name} --dtype bfloat16 {flags}".split())
            measure(folder, cfg, ranks, variants, say, flags == "--algo remix-grpo" and name == R1)
        except torch.OutOfMemoryError as error:
            say(error=str(error)[:100])
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
