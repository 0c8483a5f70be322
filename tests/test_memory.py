"""memory.py: its formulas against what PyTorch allocates, in the model, in the head and in a whole update, and its verdicts and advice."""

import copy
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import train
from conftest import ROOT
from infra import memory
from infra.config import parse
from infra.memory import (
    GIB,
    SHAPES,
    choices,
    critic_parameters,
    layer_activations,
    parameters,
    plan,
    report,
    shape,
    shape_of,
)
from infra.ranks import Ranks
from model import Critic, Learner, Policy

SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def configured(flags, **changes):
    cfg = parse(flags.split())
    for name, value in changes.items():
        setattr(cfg, name, value)
    return cfg


def peak_of(work):
    """Most bytes allocated at once by `work()`, beyond what there was before it: from the allocator's own events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def numel(module):
    return sum(p.numel() for p in module.parameters())


# Shapes and parameters.


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen2Config(**SMALL, tie_word_embeddings=False),
        Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
        Qwen3Config(**SMALL, head_dim=16, attention_bias=True, tie_word_embeddings=False),
        LlamaConfig(**SMALL, tie_word_embeddings=False),
        LlamaConfig(**SMALL, head_dim=24, tie_word_embeddings=True),
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    ],
    ids=lambda c: c.model_type,
)
def test_parameters_of_a_folder(config, tmp_path):
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        assert parameters(shape_of(tmp_path)) == numel(AutoModelForCausalLM.from_config(config))
    assert critic_parameters(shape_of(tmp_path)) == numel(Critic(tmp_path, empty=True))


def test_parameters_of_the_known_names():
    for name, s in SHAPES.items():
        config = AutoConfig.for_model(
            s["kind"],
            head_dim=s["head_dim"],
            hidden_size=s["hidden"],
            intermediate_size=s["intermediate"],
            num_hidden_layers=s["layers"],
            vocab_size=s["vocab"],
            num_attention_heads=s["heads"],
            num_key_value_heads=s["kv_heads"],
            tie_word_embeddings=s["tied"],
        )
        with torch.device("meta"):
            assert parameters(s) == numel(AutoModelForCausalLM.from_config(config)), name
    published = {
        "Qwen2.5-Math-1.5B": 1_543_714_304,
        "Qwen2.5-Math-7B": 7_615_616_512,
        "DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    }
    assert {
        name: parameters(SHAPES[name]) for name in published
    } == published  # the hub's safetensors counts


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_what_a_config_leaves_out_is_what_transformers_takes(kind, tmp_path):
    given = SMALL | {"model_type": kind}
    if kind == "llama":
        del given["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    with torch.device("meta"):
        assert parameters(shape_of(tmp_path)) == numel(
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        )


def test_shape_of(tmp_path):
    assert (
        shape_of("Qwen/Qwen2.5-Math-7B")
        == shape_of("/models/Qwen2.5-Math-7B/")
        == SHAPES["Qwen2.5-Math-7B"]
    )
    assert shape_of("no-such-model") is None and shape_of(None) is None
    folder = tmp_path / "Qwen2.5-Math-7B"  # the file decides, not the name
    Qwen2Config(**SMALL, max_position_embeddings=777).save_pretrained(folder)
    assert shape_of(folder)["hidden"] == 64 and shape_of(folder)["context"] == 777
    for text in (
        "{",
        "[]",
        '{"model_type": "gpt2", "num_attention_heads": 2}',
        '{"model_type": "qwen2"}',
    ):
        (folder / "config.json").write_text(text)
        assert shape_of(folder) is None


def test_standard_library_only():
    code = "import sys, memory; print(sorted({'torch', 'transformers', 'numpy', 'vllm'} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


# Activations and log-probs: what autograd saves, what the allocator sees.


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(**SMALL), Qwen3Config(**SMALL, head_dim=32), LlamaConfig(**SMALL)],
    ids=lambda c: c.model_type,
)
def test_activations_of_a_layer(config, tmp_path):
    config.save_pretrained(tmp_path)
    backbone, length = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model, 128
    x = torch.randn(2, length, 64, dtype=torch.bfloat16, requires_grad=True)
    angles = backbone.rotary_emb(x, torch.arange(length)[None])
    apart = {t.untyped_storage().data_ptr() for t in [x, *angles, *backbone.parameters()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept_alive = backbone.layers[0](x, position_embeddings=angles)
    assert kept_alive.shape == x.shape
    assert sum(saved.values()) / (2 * length) == pytest.approx(
        layer_activations(shape_of(tmp_path), 2), rel=1e-3
    )


def test_activations_of_the_7b():
    assert layer_activations(SHAPES["Qwen2.5-Math-7B"], 2) / 1024 == pytest.approx(
        220, abs=1
    )  # KiB a token, measured on that layer before


@pytest.mark.parametrize("chunk, hidden", [(512, 16), (32, 256)])
def test_log_probs_of_a_chunk(chunk, hidden):
    """Five float32 copies of a chunk's logits beside the head's gradient; or, where chunks are small, three copies of that gradient."""
    vocab, chunks = 2048, 3
    head = torch.nn.Linear(hidden, vocab, bias=False, dtype=torch.bfloat16)
    policy = SimpleNamespace(lm=SimpleNamespace(lm_head=head), temperature=0.7)
    rows, tokens = (
        torch.randn(chunk * chunks, hidden, dtype=torch.bfloat16, requires_grad=True),
        torch.randint(vocab, (chunk * chunks,)),
    )

    def work():
        parts = [
            checkpoint(lambda h, t: Policy.head(policy, h, t), h, t, use_reentrant=False)
            for h, t in zip(rows.split(chunk), tokens.split(chunk))
        ]
        logp, entropy = (torch.cat(part) for part in zip(*parts))
        (logp.sum() + 0.1 * entropy.sum()).backward()

    cfg = configured(
        "--model m --algo grpo",
        chunk_tokens=chunk,
        micro_tokens=chunk * chunks,
        max_prompt=1,
        max_response=8,
        activation_checkpointing=True,
    )
    s = shape(
        "qwen2", hidden, 1, 1, 1, 1, vocab, False, None
    )  # a layer next to nothing: the head is the peak
    found = plan(cfg, s, 1, 80)
    assert found["worst"] in ("a chunk's log-probs", "the root's gradients")
    expected = 2 * hidden * vocab + max(20 * chunk * vocab, 4 * hidden * vocab)
    assert peak_of(work) == pytest.approx(expected, rel=0.05)
    if found["worst"] == "a chunk's log-probs":
        assert found["training"]["logits, head's gradient"] == expected


# A whole update by the trainer's own code under FSDP2. Collectives of the "fake" group do nothing: one process sees a rank of many.


@pytest.fixture
def fake_ranks():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def start(world, local_world):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        return Ranks(0, world, local_world, torch.device("cpu"))

    yield start
    torch.set_num_threads(threads)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "world, vocab, changes",
    [
        (8, 4096, dict(advantage="gae")),
        (1, 4096, dict()),
        (8, 8192, dict(activation_checkpointing=False)),
        (8, 16384, dict(chunk_tokens=16, tied=True)),
        (2, 512, dict(hsdp=True, micro_tokens=256)),
        (2, 8192, dict(chunk_tokens=8, micro_tokens=256)),
    ],
    ids=["critic", "alone", "no-checkpointing", "small-chunks-tied", "hsdp", "root"],
)
def test_a_whole_update(world, vocab, changes, fake_ranks, tmp_path, monkeypatch):
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=changes.pop("tied", False),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    cfg = configured(
        "--model m --algo grpo",
        **dict(
            dtype="bfloat16",
            rollout_dtype="bfloat16",
            micro_tokens=512,
            chunk_tokens=64,
            tis=0.0,
            max_prompt=8,
            max_response=248,
            activation_checkpointing=True,
        )
        | changes,
    )
    monkeypatch.setattr(train, "measure", lambda *_, **__: None)
    nodes = 2 if cfg.hsdp else 1
    monkeypatch.setattr(memory, "NODE", world)
    ranks, meter = fake_ranks(nodes * world, world), SimpleNamespace(add=lambda *_: None)
    learners = {"policy": Learner(Policy(tmp_path, 1.0, cfg.chunk_tokens), cfg.lr, cfg, ranks)}
    if cfg.advantage == "gae":
        learners["critic"] = Learner(Critic(tmp_path), cfg.critic_lr, cfg, ranks)
    fields = ["logp_old", "logp_behavior", "advantages", "logp_base"] + ["values", "returns"] * (
        cfg.advantage == "gae"
    )
    batch = [
        dict(prompt=torch.arange(8), response=torch.randint(vocab, (248,)), version=0)
        | {f: torch.randn(248) for f in fields}
        for _ in range(6 * nodes * world)
    ]  # three micro-batches a rank

    def update():
        train.update(learners, batch, 1.0, 0, 1.0, meter, cfg)

    update()  # AdamW makes its moments
    monkeypatch.setattr(memory, "MARGIN", 0)
    p = plan(cfg, shape_of(tmp_path), nodes * world, 80)

    def local(tensors):
        return 4 * sum(t.to_local().numel() for t in tensors)

    for name, learner in learners.items():
        moments = [
            state[key]
            for state in learner.optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ]
        assert p["training"][f"{name}: parameters"] == pytest.approx(
            local(learner.module.parameters()), rel=2e-3
        )
        assert p["generating"][f"{name}: AdamW"] == pytest.approx(local(moments), rel=2e-3)
    assert p["generating"]["base policy"] == pytest.approx(
        local(learners["policy"].snapshot()), rel=2e-3
    )
    transient = (
        "policy: gradients",
        "critic: gradients",
        "unsharded layers",
        "activations",
        "logits, head's gradient",
    )
    expected = sum(p["training"][item] for item in transient)
    assert 0.98 <= expected / peak_of(update) <= 1.11


def test_adamw_takes_no_copy_of_its_moments(fake_ranks, tmp_path):
    """Fused, as on a GPU and in host memory: not a root of all second moments at once, a float32 copy of the shard."""
    AutoModelForCausalLM.from_config(Qwen2Config(**SMALL)).save_pretrained(tmp_path)
    learner = Learner(
        Policy(tmp_path, 1.0, 64),
        1e-3,
        configured("--model m", dtype="float32", offload_optimizer=True),
        fake_ranks(2, 2),
    )
    for p in learner.module.parameters():
        p.grad = torch.ones_like(p)
    learner.optimizer.step()
    shard = sum(p.to_local().nbytes for p in learner.module.parameters())
    assert peak_of(learner.optimizer.step) < 0.02 * shard
    for group in learner.optimizer.param_groups:  # what would be the default on CUDA
        group.update(fused=False, foreach=True)
    assert peak_of(learner.optimizer.step) > 0.97 * shard


# The plan's arithmetic.


def test_shards_by_hand():
    cfg, s = configured("--model Qwen2.5-Math-7B --algo remix-ppo"), SHAPES["Qwen2.5-Math-7B"]
    n, critic = 7_615_616_512, 7_615_616_512 - 152064 * 3584 + 3584 + 1
    for gpus, shards, hsdp in (
        (1, 1, False),
        (8, 8, False),
        (32, 32, False),
        (32, 8, True),
        (4, 4, True),
    ):
        p = plan(configured("--model Qwen2.5-Math-7B --algo remix-ppo", hsdp=hsdp), s, gpus, 80)
        assert (
            p["training"]["policy: parameters"]
            == p["training"]["policy: gradients"]
            == p["training"]["base policy"]
            == 4 * n / shards
        )
        assert (
            p["training"]["critic: AdamW"]
            == 2 * p["training"]["critic: gradients"]
            == 8 * critic / shards
        )
        assert (
            p["training"]["precedent policy"]
            == p["generating"]["precedent policy"]
            == 4 * n / shards
        )
        assert p["checkpoint"] == pytest.approx(
            12 * n + 12 * critic + 8 * n
        )  # parameters, two moments; base, precedent
        assert p["generating"]["policy: gradients"] == p["generating"]["critic: gradients"] == 0
    for changes in (dict(anchor="old"), dict(lambda_floor=1.0)):
        p = plan(configured("--model m --algo remix-ppo", **changes), s, 8, 80)
        assert p["training"]["precedent policy"] == 0 < p["training"]["base policy"]
    p = plan(configured("--model m --algo remix-grpo", beta=0.0), s, 8, 80)
    assert (
        p["training"]["precedent policy"]
        == p["training"]["base policy"]
        == p["training"]["critic: AdamW"]
        == 0
    )
    p = plan(cfg, s, 8, 80)
    own = (
        "CUDA, NCCL",
        "engine: weights",
        "engine: work space",
        "engine: cache",
        memory.MARGIN_ITEM,
    )
    for column in ("training", "generating"):
        assert p["total"][column] == sum(p[column].values())
        assert p[column][memory.MARGIN_ITEM] == pytest.approx(
            0.05 * sum(size for item, size in p[column].items() if item not in own)
        )


def test_engine_by_hand():
    s = SHAPES["Qwen2.5-Math-7B"]
    p = plan(configured("--model m --algo ppo", max_prompt=1024, max_response=3072), s, 8, 80)
    assert p["engine"]["token"] == 2 * 28 * 4 * 128 * 2 and p["engine"]["count"] == 8
    assert p["generating"]["engine: weights"] == 2 * 7_615_616_512
    assert p["engine"]["tokens"] == int(p["generating"]["engine: cache"] / p["engine"]["token"])
    assert sum(
        size for item, size in p["generating"].items() if item.startswith("engine")
    ) == pytest.approx(0.5 * 80 * GIB)  # its share, no more
    halves = plan(configured("--model m --algo ppo", tp=2), s, 8, 80)
    assert (
        halves["generating"]["engine: weights"] == 7_615_616_512
        and halves["engine"]["token"] == p["engine"]["token"] / 2
        and halves["engine"]["count"] == 4
    )
    assert (
        plan(configured("--model m", tp=8), s, 8, 80)["engine"]["token"] == 2 * 28 * 1 * 128 * 2
    )  # vLLM repeats kv heads rather than split one
    assert (
        plan(configured("--model m", rollout_dtype="float32"), s, 8, 80)["engine"]["token"]
        == 2 * p["engine"]["token"]
    )
    assert (
        plan(configured("--model m", max_prompt=1024, max_response=100_000), s, 8, 80)["engine"][
            "length"
        ]
        == 4096
    )  # the model's context


def test_a_longer_row_stands_alone():
    s = SHAPES["DeepSeek-R1-Distill-Qwen-7B"]
    kept = [
        plan(
            configured(
                "--model m --algo grpo", micro_tokens=micro, max_prompt=1000, max_response=length
            ),
            s,
            64,
            80,
        )["training"]["activations"]
        for micro, length in ((16384, 1000), (16384, 15384), (4096, 15384), (16384, 31768))
    ]
    assert kept[0] == kept[1] == kept[2] == kept[3] / 2
    advised = choices(
        configured("--model m --algo grpo", micro_tokens=16384, max_prompt=1000, max_response=5000),
        s,
        64,
    )[0]["micro_tokens"]
    assert advised == [8192, 4096]  # less would change nothing


def test_offloaded_states_are_counted_in_host_memory():
    s, flags = SHAPES["Qwen2.5-Math-7B"], "--model Qwen2.5-Math-7B --algo remix-ppo"
    held, moved = (
        plan(configured(flags), s, 16, 80),
        plan(configured(flags, offload_optimizer=True), s, 16, 80),
    )
    states = [
        item
        for item in held["training"]
        if item.startswith(("policy:", "critic:", "base", "precedent"))
    ]
    assert len(states) == 8 and not any(
        moved[column][item] for item in states for column in ("training", "generating")
    )
    assert (
        moved["host"]["offloaded"] == 8 * sum(held["training"][item] for item in states)
        and held["host"]["offloaded"] == 0
    )  # 8 of 16: a machine
    assert moved["host"]["loading"] == held["host"]["loading"] == 4 * 7_615_616_512


# Verdicts and advice.


def verdict(flags, gpus, gpu_memory):
    return report(configured(flags), gpus, gpu_memory)


@pytest.mark.parametrize(
    "flags, gpus, gpu_memory, fits",
    [
        ("--model Qwen2.5-Math-7B --algo remix-ppo", 8, 80, True),
        ("--model DeepSeek-R1-Distill-Qwen-7B --algo remix-ppo", 8, 80, True),
        ("--model DeepSeek-R1-Distill-Qwen-1.5B --algo remix-grpo", 1, 80, True),
        ("--model Qwen2.5-Math-1.5B --algo grpo", 1, 24, False),
        ("--model Qwen2.5-Math-1.5B --algo grpo --offload_optimizer", 1, 24, True),
        (
            "--model Qwen2.5-Math-1.5B --algo grpo --micro_tokens 4096 --engine_memory 0.25 --chunk_tokens 256",
            1,
            24,
            False,
        ),
        ("--model Qwen2.5-Math-7B --algo ppo", 1, 80, False),
        (
            "--model Qwen2.5-Math-7B --algo remix-grpo --engine_memory 0.2",
            8,
            80,
            False,
        ),  # no room for the cache
        (
            "--model DeepSeek-R1-Distill-Qwen-1.5B --algo remix-grpo --engine_memory 0.6",
            1,
            80,
            False,
        ),
    ],
)
def test_verdict_and_advice(flags, gpus, gpu_memory, fits):
    lines = verdict(flags, gpus, gpu_memory)
    assert all(len(line) < 200 for line in lines)
    if fits:
        assert re.fullmatch(rf"fits: [\d.]+ of {gpu_memory} GiB", lines[-1])
        return
    assert any(line.startswith("does not fit: ") for line in lines)
    advised = re.fullmatch(r"it fits with (--.*): ([\d.]+) of .*", lines[-1])
    followed = verdict(f"{flags} {advised[1]}", gpus, gpu_memory)
    assert followed[-1] == f"fits: {advised[2]} of {gpu_memory} GiB"
    for line in lines[
        lines.index(next(x for x in lines if x.startswith("does not fit"))) + 1 : -1
    ]:  # each flag by itself does what it says
        flag = line.strip().split("  ")[0]
        n = int(flag.split()[1]) if flag.startswith("--gpus") else gpus
        alone = verdict(flags if n != gpus else f"{flags} {flag}", n, gpu_memory)
        assert line.endswith("fits") == alone[-1].startswith("fits"), line
        before, after = (
            next(x for x in text if x.startswith("  total")).split()[1:3] for text in (lines, alone)
        )
        for i, column in enumerate(("training", "generating")):
            said = re.search(rf"(saves|takes) ([\d.]+) while {column}", line)
            change = float(before[i]) - float(after[i])
            assert change == pytest.approx(
                (1 if said[1] == "saves" else -1) * float(said[2]) if said else 0, abs=0.11
            )


def test_no_flag_suffices():
    lines = verdict("--model Qwen2.5-Math-7B --algo ppo", 1, 12)
    assert re.fullmatch(
        r"nothing that leaves algorithm and lengths as they are makes it fit on 1 x 12 GiB: [\d.]+ GiB are missing with --.*",
        lines[-1],
    )


def test_the_table_adds_up():
    lines = verdict("--model Qwen2.5-Math-7B --algo remix-ppo", 8, 80)
    rows = [re.fullmatch(r"  (.{26})\s*([\d.]+|-)\s+([\d.]+|-)( .*)?", line) for line in lines]
    sizes = [[float(row[i].replace("-", "0")) for i in (2, 3)] for row in rows if row]
    for column in zip(*sizes):
        assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.5)
    assert len(sizes) == 17 and "GiB (2^30 bytes)" in lines[0]


def test_models_without_a_shape():
    assert (
        "config.json" in report(configured("--model nowhere"), 8, 80)[0]
        and len(report(configured("--model nowhere"), 8, 80)) == 1
    )
    assert len(report(configured(""), 8, 80)) == 1
    cfg = configured("--model Qwen2.5-Math-7B --algo ppo")
    before = copy.copy(cfg)
    report(cfg, 1, 80)
    assert cfg == before  # advice changes copies
