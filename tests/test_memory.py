"""infra/memory.py: parameters as counted, activations as autograd saves them, shards by hand, peaks
that a GPU showed."""

import json
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from infra import memory
from infra.memory import GIB, SHAPES, engine, layer_activations, parameters, plan, report, shape_of
from methods import parse
from model import Critic, Policy

SMALL = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
R1, MATH, BIG = "DeepSeek-R1-Distill-Qwen-1.5B", "Qwen2.5-Math-1.5B", "Qwen2.5-Math-7B"


def configured(flags, **changes):
    cfg = parse(f"--model {BIG} --dtype bfloat16 {flags}".split())
    for name, value in changes.items():
        assert hasattr(cfg, name)
        setattr(cfg, name, value)
    return cfg


def counted(config):
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen2Config(**SMALL, tie_word_embeddings=False),
        Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
        LlamaConfig(**SMALL, tie_word_embeddings=False),
        LlamaConfig(**SMALL, head_dim=24, tie_word_embeddings=True),
    ],
    ids=lambda c: c.model_type,
)
def test_parameters_of_a_folder(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert parameters(shape_of(tmp_path)) == counted(config)
    critic = Critic(tmp_path, empty=True)
    assert parameters(shape_of(tmp_path), critic=True) == sum(
        p.numel() for p in critic.parameters()
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_what_a_config_leaves_out_is_what_transformers_takes(kind, tmp_path):
    given = SMALL | {"model_type": kind}
    if kind == "llama":
        del given["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(given))
    assert parameters(shape_of(tmp_path)) == counted(AutoConfig.from_pretrained(tmp_path))


def test_known_names():
    published = {MATH: 1_543_714_304, BIG: 7_615_616_512, R1: 1_777_088_000}  # of the hub's files
    assert {name: parameters(SHAPES[name]) for name in published} == published
    assert shape_of("Qwen/Qwen2.5-Math-7B") == shape_of("/models/Qwen2.5-Math-7B/") == SHAPES[BIG]


def test_models_without_a_shape(tmp_path):
    assert shape_of("no-such-model") is None
    folder = tmp_path / BIG  # the file decides, not the name
    Qwen2Config(**SMALL, max_position_embeddings=777).save_pretrained(folder)
    assert shape_of(folder).hidden == 64 and shape_of(folder).context == 777
    for text in ("{", "[]", '{"model_type": "gpt2", "head_dim": 2}', '{"model_type": "qwen2"}'):
        (folder / "config.json").write_text(text)
        assert shape_of(folder) is None
    [line] = report(configured("", model="nowhere"), 8, 80)
    assert "nowhere" in line and BIG in line
    assert len(report(configured("", model=None), 8, 80)) == 1


@pytest.mark.parametrize(
    "config",
    [Qwen2Config(**SMALL), Qwen3Config(**SMALL, head_dim=32), LlamaConfig(**SMALL)],
    ids=lambda c: c.model_type,
)
def test_activations_are_what_autograd_saves(config, tmp_path):
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
    expected = layer_activations(shape_of(tmp_path), 2)
    assert kept_alive.shape == x.shape
    assert sum(saved.values()) / (2 * length) == pytest.approx(expected, rel=1e-3)


KEEP, OFFLOAD = "--no-activation_checkpointing", "--offload_optimizer"


@pytest.mark.parametrize(
    "gpus, model, flags, chunk, peak",
    [  # GiB, H100, tools/bench_gpu.py
        (8, BIG, "--algo remix-ppo", 1024, 43.86),
        (8, BIG, "--algo remix-ppo --micro_tokens 8192", 1024, 40.04),
        (8, BIG, "--algo remix-grpo", 1024, 33.97),
        (1, R1, "--algo remix-grpo", 1024, 46.12),
        (1, R1, "--algo remix-grpo", 4096, 56.54),
        (1, R1, "--algo remix-grpo --micro_tokens 8192", 1024, 45.35),
        (1, R1, f"--algo remix-grpo --micro_tokens 8192 {KEEP}", 1024, 66.81),
        (1, R1, f"--algo remix-grpo {OFFLOAD}", 1024, 6.39),
        (1, R1, "--algo remix-ppo", 1024, 63.38),
        (1, MATH, "--algo remix-ppo", 1024, 57.74),
    ],
)
def test_peaks_measured_on_a_gpu(gpus, model, flags, chunk, peak, monkeypatch):
    monkeypatch.setattr(memory, "CHUNK", chunk)
    cfg = configured(flags, max_prompt=256, max_response=4096 - 256)
    busy, _, _ = plan(cfg, SHAPES[model], gpus, 80)
    own = {k: v for k, v in busy.items() if not k.startswith(("frag", "CUDA", "engine"))}
    assert sum(own.values()) / GIB == pytest.approx(peak, rel=0.005)


def test_chunks_are_the_models():
    assert memory.CHUNK == Policy.chunk_tokens


@pytest.mark.parametrize("gpus, shards, hsdp", [(1, 1, 0), (8, 8, 0), (32, 32, 0), (32, 8, 1)])
def test_shards_by_hand(gpus, shards, hsdp):
    n, critic = 7_615_616_512, 7_615_616_512 - 152064 * 3584 + 3584 + 1
    busy, idle, _ = plan(configured("--algo remix-ppo", hsdp=hsdp), SHAPES[BIG], gpus, 80)
    assert busy["policy: parameters"] == busy["gradients"] == busy["base policy"] == 4 * n / shards
    assert busy["policy: AdamW"] == 2 * busy["precedent policy"] == 8 * n / shards
    assert busy["critic: AdamW"] == 2 * busy["critic: parameters"] == 8 * critic / shards
    assert "gradients" not in idle and idle["base policy"] == busy["base policy"]


@pytest.mark.parametrize(
    "flags, kept",
    [
        ("--algo remix-ppo", {"critic: AdamW", "base policy", "precedent policy"}),
        ("--algo remix-ppo --anchor old", {"critic: AdamW", "base policy"}),
        ("--algo remix-grpo --lambda_floor 1", {"base policy"}),
        ("--algo grpo --beta 0", set()),
    ],
)
def test_what_is_kept(flags, kept):
    _, idle, _ = plan(configured(flags), SHAPES[BIG], 8, 80)
    assert kept == {"critic: AdamW", "base policy", "precedent policy"} & set(idle)


def test_engine_by_hand():
    s = SHAPES[BIG]
    items, tokens = engine(configured("", max_prompt=1024, max_response=3072), s, 80)
    assert items["engine: weights"] == 2 * 7_615_616_512
    assert tokens == items["engine: cache"] // (2 * 28 * 4 * 128 * 2)
    assert sum(items.values()) == pytest.approx(0.5 * 80 * GIB)  # its share, no more
    halves, _ = engine(configured("", tp=2), s, 80)
    assert halves["engine: weights"] == 7_615_616_512
    # vLLM repeats key-value heads rather than split one
    items, tokens = engine(configured("", tp=8), s, 80)
    assert tokens == items["engine: cache"] // (2 * 28 * 1 * 128 * 2)


def test_a_longer_row_stands_alone():
    found = []
    for micro, length in ((16384, 1000), (16384, 15384), (4096, 15384), (16384, 31768)):
        cfg = configured("", micro_tokens=micro, max_prompt=1000, max_response=length)
        found.append(plan(cfg, SHAPES["DeepSeek-R1-Distill-Qwen-7B"], 64, 80)[0]["activations"])
    assert found[0] == found[1] == found[2] == found[3] / 2


@pytest.mark.parametrize(
    "flags, model, gpus, gpu_memory, fits",
    [
        ("--algo remix-ppo", BIG, 8, 80, True),
        ("--algo remix-grpo --engine_memory 0.6", R1, 1, 80, False),
        ("--algo remix-grpo --engine_memory 0.45", R1, 1, 80, True),
        ("--algo grpo", MATH, 1, 24, False),
        (f"--algo grpo {OFFLOAD}", MATH, 1, 24, True),
        ("--algo ppo", BIG, 1, 80, False),
        ("--algo remix-grpo --engine_memory 0.2", BIG, 8, 80, False),  # no room for the cache
    ],
)
def test_verdict(flags, model, gpus, gpu_memory, fits):
    lines = report(configured(flags, model=model), gpus, gpu_memory)
    assert lines[-1].startswith("fits: " if fits else "does not fit: ")
    rows = [re.fullmatch(r"  (.{26})\s*([\d.]+)\s+([\d.]+)(  unmeasured)?", line) for line in lines]
    rows = [row for row in rows if row]
    assert [row[1].split(":")[0] == "engine" for row in rows] == [bool(row[4]) for row in rows]
    for column in (2, 3):
        *sizes, total = [float(row[column]) for row in rows]
        assert sum(sizes) == pytest.approx(total, abs=0.06 * len(rows))
