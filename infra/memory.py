"""What fits on a GPU: bytes of training and generating, item by item, from the model's shape and the flags, loading nothing.

    python train.py --dry_run --model Qwen2.5-Math-7B --gpus 8 --gpu_memory 80

The formulas follow model.py and train.py as written. tests/test_memory.py holds parameters, activations and log-probs against
PyTorch's allocations on a CPU; what no CPU can show is marked ASSUMED. Standard library only. 1 GiB = 2**30 bytes, so that an H100 "80 GB"
has 79.6 (nvidia-smi's MiB / 1024).
"""

import copy
import itertools
import json
import math
from pathlib import Path

GIB = 2**30
NODE = 8  # GPUs of a machine, as train.py's --hsdp takes them where the launcher does not say
# ASSUMED, no GPU was at hand. The logs of sleeping vLLM engines that people publish say 1.3 to 4.3 GiB "still in use", context included.
CONTEXT = (
    1.0 * GIB
)  # CUDA context, NCCL and cuBLAS buffers: vLLM takes its first snapshot after them, so its share does not cover them
ASLEEP = (
    1.5 * GIB
)  # what an engine keeps beyond weights and cache, asleep too: CUDA graphs, its own workspaces and NCCL buffers
MARGIN, MARGIN_ITEM = (
    0.05,
    "fragmentation, 5 %",
)  # of the trainer's own memory: blocks that one stream cached, or of the wrong size
SEQUENCES, PREFILL = 256, 8192  # rollout.py: max_num_seqs, least max_num_batched_tokens


def shape(
    kind,
    hidden,
    intermediate,
    layers,
    heads,
    kv_heads,
    vocab,
    tied,
    context,
    head_dim=None,
    attention_bias=False,
    mlp_bias=False,
):
    """What memory depends on. context: longest prompt and response together (tokens); None: not said."""
    return dict(
        kind=kind,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        tied=tied,
        context=context,
        head_dim=head_dim or hidden // heads,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


SMALL, LARGE = ("qwen2", 1536, 8960, 28, 12, 2, 151936), ("qwen2", 3584, 18944, 28, 28, 4, 152064)
SHAPES = {  # the models' own config.json, by the last part of the name
    "Qwen2.5-Math-1.5B": shape(*SMALL, True, 4096),
    "Qwen2.5-Math-7B": shape(*LARGE, False, 4096),
    "DeepSeek-R1-Distill-Qwen-1.5B": shape(*SMALL, False, 131072),
    "DeepSeek-R1-Distill-Qwen-7B": shape(*LARGE, False, 131072),
    "Qwen2.5-1.5B": shape(*SMALL, True, 131072),
    "Qwen2.5-7B": shape(*LARGE, False, 131072),
    "Qwen3-1.7B-Base": shape("qwen3", 2048, 6144, 28, 16, 8, 151936, True, 32768, head_dim=128),
    "Llama-3.2-3B-Instruct": shape(
        "llama", 3072, 8192, 28, 24, 8, 128256, True, 131072, head_dim=128
    ),
}


def shape_of(model):
    """The shape of a model folder by its config.json, else of a known name; None where neither says (or `model` is None)."""
    if model is None:
        return None
    path = Path(model) / "config.json"
    if not path.is_file():
        return SHAPES.get(Path(model).resolve().name)
    try:
        c = json.loads(path.read_text())
        kind, heads = c["model_type"], c["num_attention_heads"]
        if kind not in ("qwen2", "qwen3", "llama"):
            return None
        return shape(
            kind,
            c["hidden_size"],
            c["intermediate_size"],
            c["num_hidden_layers"],
            heads,
            c.get("num_key_value_heads") or heads,
            c["vocab_size"],
            c.get("tie_word_embeddings", False),
            c.get("max_position_embeddings"),
            c.get("head_dim") or (128 if kind == "qwen3" else None),
            c.get("attention_bias", False),
            c.get("mlp_bias", False),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def splits(tp, heads, kv_heads):
    """Whether vLLM can share these attention heads out to `tp` ranks; it repeats key-value heads where there are fewer."""
    return heads % tp == 0 and (kv_heads % tp == 0 or tp % kv_heads == 0)


def layer_parameters(s):
    """Parameters of one decoder layer."""
    h, i, q, kv = (
        s["hidden"],
        s["intermediate"],
        s["heads"] * s["head_dim"],
        s["kv_heads"] * s["head_dim"],
    )
    count = h * (2 * q + 2 * kv) + 3 * h * i + 2 * h  # q, k, v, o; gate, up, down; two norms
    if s["kind"] == "qwen2" or s["attention_bias"]:
        count += q + 2 * kv
    if s["kind"] != "qwen2" and s["attention_bias"]:
        count += h
    if s["kind"] == "llama" and s["mlp_bias"]:
        count += 2 * i + h
    return count + (2 * s["head_dim"] if s["kind"] == "qwen3" else 0)  # q_norm, k_norm


def root_parameters(s, head=True):
    """Parameters outside the layers, FSDP2's root group: embedding, last norm and, where it is not the embedding, the head."""
    return s["vocab"] * s["hidden"] * (2 if head and not s["tied"] else 1) + s["hidden"]


def parameters(s):
    """Parameters of the causal language model."""
    return s["layers"] * layer_parameters(s) + root_parameters(s)


def critic_parameters(s):
    """The same backbone with a value head (hidden -> 1) in place of the language head."""
    return s["layers"] * layer_parameters(s) + root_parameters(s, head=False) + s["hidden"] + 1


def layer_activations(s, c):
    """Bytes a token that one layer saves for its backward pass, c bytes a number, without the layer's input.

    Two norms (a float32 copy, 1/rms, normalised, scaled), q, k, v and the attention's output with its float32 log-sum-exp
    (SDPA's fused kernels take k and v unexpanded), four tensors of the MLP. qwen3 normalises q and k as well.
    """
    h, q, kv = s["hidden"], s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    saved = (
        2 * (4 * h + 4 + 2 * c * h)
        + c * (2 * q + 2 * kv)
        + 4 * s["heads"]
        + 4 * c * s["intermediate"]
    )
    return saved + (
        (4 + c) * (q + kv) + 4 * (s["heads"] + s["kv_heads"]) if s["kind"] == "qwen3" else 0
    )


def plan(cfg, s, gpus, gpu_memory):
    """Bytes on each GPU in the two moments that matter, {item: bytes} each, `engine`, `host` and `total` (GiB in, bytes out).

    `training`: the worst moment of an update, in its second micro-batch or later, when all gradients exist. It is the policy's
    backward pass: the critic's comes after it has freed its activations, and has a smaller root group and no logits.
    """
    c = (
        4 if cfg.dtype == "float32" else 2
    )  # bytes a number: the trainer's compute type, then the engine's
    r = c
    shards = min(gpus, NODE) if cfg.hsdp else gpus
    length = min(
        cfg.max_prompt + cfg.max_response, s["context"] or math.inf
    )  # prepare.py's fit() cuts responses to the context
    tokens = max(cfg.micro_tokens, length)  # a longer row stands alone
    layer, root, embedding, n = (
        layer_parameters(s),
        root_parameters(s),
        s["vocab"] * s["hidden"],
        parameters(s),
    )

    # what lives in shards, float32
    one, other = 4 * n / shards, 4 * critic_parameters(s) / shards if cfg.advantage == "gae" else 0
    sharded = {
        "policy: parameters": one,
        "policy: gradients": one,
        "policy: AdamW": 2 * one,
        "critic: parameters": other,
        "critic: gradients": other,
        "critic: AdamW": 2 * other,
        "base policy": one if cfg.beta > 0 else 0,
        "precedent policy": one if cfg.convex and cfg.anchor == "prev" else 0,
    }
    resident = (dict.fromkeys(sharded, 0) if cfg.offload_optimizer else sharded) | dict.fromkeys(
        ("unsharded layers", "activations", "logits, head's gradient"), 0
    )  # the table's order

    # activations for one micro-batch: what the layers keep, then the last norm and the response's rows
    saved = layer_activations(s, c) * tokens
    kept = s["layers"] * (c * s["hidden"] * tokens if cfg.activation_checkpointing else saved)
    last = (4 + 2 * c) * s["hidden"] * tokens
    one_layer = (saved if cfg.activation_checkpointing else 0) + (
        2 * c * s["intermediate"] + c * s["hidden"]
    ) * tokens
    logits = min(cfg.chunk_tokens, tokens) * s["vocab"]
    held = (
        4 * (s["layers"] - 1) * layer / shards if cfg.hsdp and gpus > NODE else 0
    )  # what FSDP2 all-reduces it holds until the backward pass ends

    moments = {  # where an update can peak
        # five float32 copies of a chunk's logits, or its head's gradient, that of earlier chunks and their sum; the last layer is prefetched
        "a chunk's log-probs": {
            "unsharded layers": c * (root + layer),
            "activations": kept + last,
            "logits, head's gradient": c * embedding + max(20 * logits, 2 * c * embedding),
        },
        # this layer, the next one down, its first gradient (of `down`), the float32 reduction of the one before; held grows as `kept` shrinks
        "a layer's backward pass": {
            "unsharded layers": c * root
            + (2 * c + 4) * layer
            + c * s["hidden"] * s["intermediate"]
            + max(held - kept, 0),
            "activations": kept + one_layer,
            "logits, head's gradient": c * embedding,
        },
        "the root's gradients": {
            "unsharded layers": (c + 4 + 4 / shards) * root + held
        },  # input and output of their reduction
    }
    worst = max(moments, key=lambda name: sum((resident | moments[name]).values()))
    training = resident | moments[worst]
    # weights on their way to the engine are gone before its cache wakes up (rollout.py), and smaller
    generating = resident | {"policy: gradients": 0, "critic: gradients": 0}
    for items in (training, generating):
        items[MARGIN_ITEM] = MARGIN * sum(items.values())

    share, weights = cfg.engine_memory * gpu_memory * GIB, r * n / cfg.tp
    work = (
        max(length, PREFILL) * r * (3 * s["intermediate"] / cfg.tp + 3 * s["hidden"])
        + 16 * SEQUENCES * s["vocab"]
        + ASLEEP
    )  # ASSUMED
    cache, token = (
        share - weights - work,
        2 * s["layers"] * max(s["kv_heads"] // cfg.tp, 1) * s["head_dim"] * r,
    )
    training |= {"CUDA, NCCL": CONTEXT, "engine: work space": ASLEEP}
    generating |= {
        "CUDA, NCCL": CONTEXT,
        "engine: weights": weights,
        "engine: work space": work,
        "engine: cache": max(cache, 0),
    }
    total = {"training": sum(training.values()), "generating": sum(generating.values())}
    short = max(length * token - cache, 0) + sum(
        max(value - gpu_memory * GIB, 0) for value in total.values()
    )
    return dict(
        training=training,
        generating=generating,
        worst=worst,
        total=total,
        short=short,
        engine=dict(
            count=gpus // cfg.tp, token=token, length=length, tokens=int(max(cache, 0) // token)
        ),
        checkpoint=sum(size for item, size in sharded.items() if "gradients" not in item) * shards,
        host=dict(
            loading=4 * n,
            offloaded=min(gpus, NODE) * sum(sharded.values()) if cfg.offload_optimizer else 0,
        ),
    )


def choices(cfg, s, gpus):
    """({flag: values, from the least change on} that leave what is trained as it is, the same of those that do not)."""
    length, halves = (
        min(cfg.max_prompt + cfg.max_response, s["context"] or math.inf),
        [2**i for i in range(16, 7, -1)],
    )
    same = dict(
        activation_checkpointing=[True] * (not cfg.activation_checkpointing),
        hsdp=[False] * cfg.hsdp,
        micro_tokens=[n for n in halves if length / 2 < n < cfg.micro_tokens],
        chunk_tokens=[n for n in halves if n < cfg.chunk_tokens],
        engine_memory=sorted(
            (i / 20 for i in range(2, 19)), key=lambda share: abs(share - cfg.engine_memory)
        ),
        tp=[
            n
            for n in (2, 4, 8)
            if n > cfg.tp and gpus % n == 0 and splits(n, s["heads"], s["kv_heads"])
        ],
        offload_optimizer=[True] * (not cfg.offload_optimizer),
    )
    other = dict(
        anchor=["old"] * (cfg.convex and cfg.anchor == "prev"),
        max_response=[cfg.max_response // 2, cfg.max_response // 4],
        advantage=["group"] * (cfg.advantage == "gae"),
        gpus=[gpus * 2**i for i in range(1, 8)],
    )
    return same, other


def best(cfg, s, gpus, gpu_memory, values_of):
    """(flags as text, their plan): of all combinations the one that misses least, by the fewest flags, offloading and larger changes last."""
    found = None
    for picked in itertools.product(
        *([(0, None), *enumerate(values, 1)] for values in values_of.values())
    ):
        flags = {name: value for name, (_, value) in zip(values_of, picked) if value is not None}
        changed = copy.copy(cfg)
        for name, value in flags.items():
            setattr(changed, name, value)
        after = plan(changed, s, flags.get("gpus", gpus), gpu_memory)
        rank = after["short"], len(flags), "offload_optimizer" in flags, sum(i for i, _ in picked)
        if found is None or rank < found[0]:
            found = rank, flags, after
    return " ".join(as_flag(name, value, cfg) for name, value in found[1].items()), found[2]


def as_flag(name, value, cfg):
    """How it is written on the command line."""
    if name == "advantage" and cfg.algo.endswith("ppo"):
        return f"--algo {cfg.algo.replace('ppo', 'grpo')}"  # the row: a group baseline needs groups
    return (
        f"--{name} {value}"
        if not isinstance(value, bool)
        else f"--{name}"
        if value
        else f"--no-{name}"
    )


def report(cfg, gpus, gpu_memory, model=None):
    """The plan of `cfg` on `gpus` GPUs of `gpu_memory` GiB as lines of text: table, engine, host memory, verdict and what would help.

    model: the folder that cfg.model was found to be.
    """
    s = shape_of(model or cfg.model)
    if s is None:
        return [
            "memory: the embedded default needs no plan, it is tiny"
            if cfg.model is None
            else f"memory: the shape of {cfg.model} is not known here: give --model a folder with the config.json of a qwen2, qwen3 or llama model, "
            f"or one of {', '.join(SHAPES)}"
        ]
    if not splits(cfg.tp, s["heads"], s["kv_heads"]):
        return [
            f"does not run: --tp {cfg.tp} does not divide the {s['heads']} attention heads and {s['kv_heads']} key-value heads of {model or cfg.model}"
        ]
    p = plan(cfg, s, gpus, gpu_memory)
    engine, host, total, room = p["engine"], p["host"], p["total"], gpu_memory * GIB

    def gib(value):
        return f"{value / GIB:.1f}"

    lines = [
        f"memory of each GPU in GiB (2^30 bytes), {gpus} x {gpu_memory:g}",
        f"  {'':26}{'training':>10}{'generating':>12}",
    ]
    for item in p["generating"]:
        row = [p[column].get(item, 0) for column in total]
        if any(row):
            lines.append(
                f"  {item:26}{gib(row[0]) if row[0] else '-':>10}{gib(row[1]) if row[1] else '-':>12}"
            )
    lines += [
        f"  {'total':26}{gib(total['training']):>10}{gib(total['generating']):>12}   training peaks in {p['worst']}",
        f"engines: {engine['count']}, tensor-parallel over {cfg.tp}; the cache of one holds {engine['tokens']:,} tokens, "
        f"{engine['tokens'] // engine['length']} prompts and responses of {engine['length']:,}; a step asks it for up to "
        f"{math.ceil(cfg.prompts * cfg.group_size / engine['count']):,}",
        f"host memory: {gib(host['loading'])} GiB on the first machine while loading"
        + (
            f"; {gib(host['offloaded'])} GiB on each by --offload_optimizer, more where pinned blocks are rounded up to powers of two"
            if host["offloaded"]
            else ""
        ),
        f"disk: {gib(p['checkpoint'])} GiB a checkpoint, {gib((cfg.keep + 1) * p['checkpoint'])} with --keep {cfg.keep} and the one being written",
    ]
    peak = max(total, key=total.get)
    if not p["short"]:
        return [*lines, f"fits: {gib(total[peak])} of {gpu_memory:g} GiB"]
    if total[peak] > room:
        largest = sorted(p[peak].items(), key=lambda pair: -pair[1])[:3]
        lines.append(
            f"does not fit: needs {gib(total[peak])} GiB of {gpu_memory:g} while {peak}; largest: "
            + ", ".join(f"{item} {gib(size)}" for item, size in largest)
        )
    else:
        lines.append(
            f"does not fit: the engine's cache holds {engine['tokens']:,} tokens, one prompt and response need {engine['length']:,}"
        )
    same, other = choices(cfg, s, gpus)
    for name, values in (same | other).items():
        flag, after = best(cfg, s, gpus, gpu_memory, {name: values})
        saved = {column: total[column] - after["total"][column] for column in total}
        if not after["short"] or any(
            saved[column] > GIB / 20 and total[column] > room for column in total
        ):
            said = [
                f"{'saves' if size > 0 else 'takes'} {gib(abs(size))} while {column}"
                for column, size in saved.items()
                if abs(size) > GIB / 20
            ]
            lines.append(
                f"  {flag:26}  {', '.join(said)}{'' if after['short'] else ': fits' if said else 'fits'}"
            )
    flags, after = best(cfg, s, gpus, gpu_memory, same)
    if after["short"]:
        return [
            *lines,
            f"nothing that leaves algorithm and lengths as they are makes it fit on {gpus} x {gpu_memory:g} GiB: "
            f"{gib(after['short'])} GiB are missing with {flags or 'the flags given'}",
        ]
    return [
        *lines,
        f"it fits with {flags}: {gib(max(after['total'].values()))} of {gpu_memory:g} GiB"
        + (
            f", {gib(after['host']['offloaded'])} GiB of host memory on each machine"
            if after["host"]["offloaded"]
            else ""
        ),
    ]
