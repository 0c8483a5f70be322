"""Memory and speed of the update half of the loop on one GPU, beside the memory plan's figures.

    python tools/bench_gpu.py OUT.jsonl             # one rank: about two minutes on an H100
    python tools/bench_gpu.py OUT.jsonl --ranks 8   # what a rank of eight holds, on one GPU
    python tools/bench_gpu.py OUT.jsonl --tiny      # the same path with a shape of nothing: a CPU will do

Random weights at real shapes through model.py's Learner and train.py's update; no vLLM. With
--ranks the process sees a rank of many through PyTorch's "fake" process group, which copies where
others communicate: the memory is that of such a rank, the time lacks communication.
"""

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
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
KEEP, OFFLOAD = "--no-activation_checkpointing", "--offload_optimizer"
LENGTHS = [(n, 16384, 1024) for n in (1024, 2048, 4096, 8192)]
ONE, HALF, WIDE = (4096, 16384, 1024), (4096, 8192, 1024), (4096, 16384, 4096)
CASES = [  # ranks, model, flags, (tokens of a row, --micro_tokens, chunk_tokens) …
    (8, BIG, "--algo remix-ppo", [ONE, HALF]),
    (8, BIG, "--algo remix-grpo", [ONE]),
    (1, R1, "--algo remix-grpo", [WIDE, HALF, *LENGTHS]),
    (1, R1, "--algo remix-ppo", [ONE]),
    (1, MATH, "--algo remix-ppo", [ONE]),
    (1, R1, f"--algo remix-grpo {KEEP}", [HALF]),
    (1, BIG, "--algo grpo --beta 0", [HALF]),
    (1, R1, f"--algo remix-grpo {OFFLOAD}", [ONE]),
]
CAPS = (1.2, 1.1, 1.05, 1.02)  # of the peak: what the allocator is given


def timed(work):
    """(what `work()` returns, seconds)."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begin = time.perf_counter()
    found = work()
    wait()
    return found, time.perf_counter() - begin


def learner(module, cfg, ranks):
    """A Learner of random weights, made on its own device."""
    torch.manual_seed(0)
    module.to_empty(device=ranks.device)
    for name, p in module.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.02)
    if isinstance(module, Policy):
        module.lm.tie_weights()
    return Learner(module, cfg.lr, cfg, ranks)


def random_batch(count, length, vocab, prompt=256):
    """`count` rows of `length` tokens as one step's batch, every column filled."""
    g = torch.Generator().manual_seed(1)
    columns = "logp_old logp_behavior logp_base logp_prev values returns advantages".split()
    prompt, samples = min(prompt, length // 2), []
    for i in range(count):
        ids, like = torch.randint(vocab, (length,), generator=g), torch.randn(length - prompt)
        samples.append(Sample(ids[:prompt], ids[prompt:], like - 12, False, 0, i, "", logp_behavior=like - 12))
    batch = Batch([[sample] for sample in samples], [])
    for name in columns:
        batch[name] = [torch.randn(length - prompt, generator=g) - 12 for _ in samples]
    return batch


def measure(folder, cfg, ranks, variants, say):
    """One set of learners: each variant's peak, plan and speed, then the least memory that will do."""
    method, cuda = methods.Method(cfg), ranks.device.type == "cuda"
    plan = method.plan(cfg.steps)  # λ has fallen: both references
    learners = {"policy": learner(Policy(folder, 1.0, empty=True), cfg, ranks)}
    if method.critic:
        learners["critic"] = learner(Critic(folder, empty=True), cfg, ranks)
    policy = learners["policy"]
    snapshots = [policy.snapshot() for _ in plan.references]
    for length, cfg.micro_tokens, memory.CHUNK in variants:
        policy.module.chunk_tokens = memory.CHUNK
        cfg.max_prompt, cfg.max_response = 256, length - 256
        vocab = policy.module.lm.config.vocab_size
        batch = random_batch(2 * ranks.world * (cfg.micro_tokens // length), length, vocab)
        work = lambda: update(learners, batch, range(len(batch.samples)), method, plan, Meter())  # noqa: B023, E731
        tokens = len(batch.samples) * length / ranks.world
        found = dict(length=length, micro_tokens=cfg.micro_tokens, chunk_tokens=memory.CHUNK)
        work()  # kernels are chosen, AdamW makes its moments
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found["norms"], _ = timed(work)
        if cuda:
            peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            free, total = torch.cuda.mem_get_info()
            other = total - free - torch.cuda.memory_reserved()
            found |= dict(peak_gib=peak / 2**30, reserved_gib=held / 2**30, other_gib=other / 2**30)
        found["update_tokens_per_second"] = [tokens / timed(work)[1] for _ in range(1 + (ranks.world == 1))]
        if ranks.world == 1:
            look = lambda: policy.predict(batch.samples)  # noqa: B023, E731
            found["predict_tokens_per_second"] = [tokens / timed(look)[1] for _ in range(3)]
        planned = memory.plan(cfg, memory.shape_of(folder), ranks.world, 80)["training"]
        own = {k: v / 2**30 for k, v in planned.items() if not k.startswith(("CUDA", "engine"))}
        say(**found, planned_gib=sum(own.values()), plan=own)
    for cap in CAPS if cuda and not cfg.offload_optimizer else ():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(cap * peak / total, 1.0))
        try:
            say(cap=cap, tokens_per_second=tokens / timed(work)[1])
        except torch.OutOfMemoryError:
            say(cap=cap, tokens_per_second=None)
    return learners, snapshots, batch, method, plan


def details(folder, cfg, learners, snapshots, batch, method, plan, say):
    """Streaming and swapping weights, two identical updates, bfloat16 beside float32."""
    policy, few = learners["policy"], batch.samples[:4]
    begin = policy.snapshot()

    def swap():
        with policy.swapped(snapshots[0]):
            pass

    @torch.no_grad()
    def again(target):
        for live, frozen in zip(target.module.parameters(), begin):
            live.copy_(frozen)

    for _ in range(2):
        size, seconds = timed(lambda: sum(t.nbytes for _, t in policy.full_tensors()))
        say(stream_seconds=seconds, stream_gib=size / 2**30, swap_seconds=timed(swap)[1])
    for kind in ("default", "flash", "deterministic"):
        torch.backends.cuda.enable_cudnn_sdp(kind == "default")
        torch.use_deterministic_algorithms(kind == "deterministic")
        ends, seconds = [], []
        try:
            for _ in range(2):
                again(policy)
                policy.optimizer.state.clear()
                work = lambda: update({"policy": policy}, batch, range(len(batch.samples)), method, plan, Meter())  # noqa: E731
                seconds.append(timed(work)[1])
                ends.append(policy.snapshot())
            same = [torch.equal(a.to_local(), b.to_local()) for a, b in zip(*ends)]
            say(attention=kind, equal=sum(same), of=len(same), seconds=seconds)
        except RuntimeError as error:
            say(attention=kind, error=str(error)[:300])
            policy.optimizer.zero_grad()
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)
    again(policy)
    half = [torch.cat(policy.predict(few)) for _ in range(2)]
    wide = copy.copy(cfg)
    wide.dtype = "float32"
    exact = learner(Policy(folder, 1.0, empty=True), wide, policy.ranks)
    again(exact)
    gap = (torch.cat(exact.predict(few)) - half[0]).abs()
    say(predicted_twice_equal=torch.equal(*half), gap_mean=gap.mean().item(), gap_max=gap.max().item())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    if args.ranks == 1:
        ranks = start(16)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", rank=0, world_size=args.ranks, store=FakeStore())
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        ranks = Ranks(0, args.ranks, args.ranks, device)
    card = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    first = True
    for world, name, flags, variants in CASES:
        if world != args.ranks:
            continue

        def say(**found):
            line = json.dumps(dict(card=card, ranks=world, model=name, flags=flags) | found)  # noqa: B023
            print(line, flush=True)
            with open(args.out, "a") as file:
                file.write(line + "\n")

        s = dict(memory.SHAPES[name])
        if args.tiny:
            s |= dict(hidden=64, intermediate=160, layers=3, heads=4, kv_heads=2, vocab=512, head_dim=16)
            variants = [(512, 1024, 64)]
        folder = tempfile.mkdtemp()
        config = AutoConfig.for_model(
            s["kind"], hidden_size=s["hidden"], intermediate_size=s["intermediate"],
            num_hidden_layers=s["layers"], num_attention_heads=s["heads"], vocab_size=s["vocab"],
            num_key_value_heads=s["kv_heads"], tie_word_embeddings=s["tied"],
            max_position_embeddings=s["context"],
        )
        config.save_pretrained(folder)
        cfg = methods.parse(f"--model {name} --dtype bfloat16 {flags}".split())
        try:
            made = measure(folder, cfg, ranks, variants, say)
            if first and world == 1:
                details(folder, cfg, *made, say)
        except torch.OutOfMemoryError as error:
            say(error=str(error)[:200])
        made, first = None, False
        gc.collect()
        if card != "CPU":
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
