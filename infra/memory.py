"""What fits on a GPU: bytes while training and generating, item by item, by arithmetic alone.

    python train.py --dry_run --model Qwen2.5-Math-7B --gpus 8 --gpu_memory 80

The trainer's items agree with peaks measured on GPUs to 0.4 %, once to 1.1 % (docs/gpus.md);
what no GPU has confirmed says "unmeasured". 1 GiB = 2**30 bytes: an H100 "80 GB" has 79.2.
"""

import json
import math
from collections import namedtuple
from pathlib import Path

GIB = 2**30
NODE = 8  # GPUs of a machine
CHUNK = 1024  # model.py, Policy.chunk_tokens
# measured: 0.8 without NCCL, 1.3 with NCCL on one rank
CONTEXT = 1.5 * GIB
# fragmentation; measured: an update ran in 1.05 times its peak, failed in 1.02
MARGIN = 0.05
# unmeasured: of a sleeping engine; published logs say 1.3 to 4.3 GiB, context included
ASLEEP = 1.5 * GIB
SEQUENCES, PREFILL = 256, 8192  # rollout.py: max_num_seqs, least max_num_batched_tokens

# context: longest prompt and response together (tokens)
NAMES = "kind hidden intermediate layers heads kv_heads vocab tied context head_dim"
Shape = namedtuple("Shape", NAMES, defaults=[128])
SMALL, LARGE = ("qwen2", 1536, 8960, 28, 12, 2, 151936), ("qwen2", 3584, 18944, 28, 28, 4, 152064)
SHAPES = {
    "Qwen2.5-Math-1.5B": Shape(*SMALL, True, 4096),
    "Qwen2.5-Math-7B": Shape(*LARGE, False, 4096),
    "DeepSeek-R1-Distill-Qwen-1.5B": Shape(*SMALL, False, 131072),
    "DeepSeek-R1-Distill-Qwen-7B": Shape(*LARGE, False, 131072),
    "Qwen3-1.7B-Base": Shape("qwen3", 2048, 6144, 28, 16, 8, 151936, True, 32768),
    "Llama-3.2-3B-Instruct": Shape("llama", 3072, 8192, 28, 24, 8, 128256, True, 131072),
}
KEYS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads vocab_size tie_word_embeddings max_position_embeddings head_dim"
).split()


def shape_of(model):
    """The Shape of a model folder by its config.json, else of a known name; None: not known."""
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text())
        s = Shape(*map(config.get, KEYS))
        head_dim = s.head_dim or (128 if s.kind == "qwen3" else s.hidden // s.heads)
        s = s._replace(kv_heads=s.kv_heads or s.heads, tied=bool(s.tied), head_dim=head_dim)
        return s if s.kind in ("qwen2", "qwen3", "llama") else None
    except OSError:
        return SHAPES.get(Path(model).name)
    except (ValueError, TypeError, AttributeError):
        return None


def layer_parameters(s):
    """Parameters of one decoder layer, as the models have it by default: biases in qwen2 alone."""
    h, i, q, kv = s.hidden, s.intermediate, s.heads * s.head_dim, s.kv_heads * s.head_dim
    count = h * (2 * q + 2 * kv) + 3 * h * i + 2 * h  # q, k, v, o; gate, up, down; two norms
    return count + {"qwen2": q + 2 * kv, "qwen3": 2 * s.head_dim, "llama": 0}[s.kind]


def root_parameters(s):
    """Parameters outside the layers, FSDP2's root group: embedding, last norm, untied head."""
    return s.vocab * s.hidden * (1 if s.tied else 2) + s.hidden


def parameters(s, critic=False):
    """Parameters of the policy, or of the critic: a value head in place of the language head."""
    if critic:
        return parameters(s._replace(tied=True)) + s.hidden + 1
    return s.layers * layer_parameters(s) + root_parameters(s)


def layer_activations(s, c):
    """Bytes a token that one layer saves for its backward pass, c bytes a number, its input apart.

    Two norms (a float32 copy, 1/rms, normalised, scaled), q, k, v and the attention's output with
    its float32 log-sum-exp, four tensors of the MLP. qwen3 normalises q and k as well.
    """
    h, q, kv = s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim
    norms = 2 * (4 * h + 4 + 2 * c * h)
    saved = norms + c * (2 * q + 2 * kv) + 4 * s.heads + 4 * c * s.intermediate
    more = (4 + c) * (q + kv) + 4 * (s.heads + s.kv_heads)
    return saved + (more if s.kind == "qwen3" else 0)


def longest(cfg, s):
    """Prompt and response together (tokens)."""
    return min(cfg.max_prompt + cfg.max_response, s.context or math.inf)


def resting(cfg, s, gpus):
    """{item: bytes} of what stays on each GPU between updates, float32 shards."""
    shards = min(gpus, NODE) if cfg.hsdp else gpus
    one = 0 if cfg.offload_optimizer else 4 / shards
    policy, critic = one * parameters(s), one * parameters(s, critic=True)
    items = {"policy: parameters": policy, "policy: AdamW": 2 * policy}
    if cfg.advantage == "gae":
        items |= {"critic: parameters": critic, "critic: AdamW": 2 * critic}
    if cfg.beta > 0:
        items["base policy"] = policy
        if cfg.lambda_floor < 1 and cfg.anchor == "prev":
            items["precedent policy"] = policy
    return items


def passing(cfg, s, gpus):
    """{item: bytes} of what an update adds at its peak, when all gradients exist.

    That is in the policy's backward pass: the critic's comes when the policy's gradients are gone.
    """
    c = 4 if cfg.dtype == "float32" else 2  # bytes a number in computation
    shards = min(gpus, NODE) if cfg.hsdp else gpus
    tokens = max(cfg.micro_tokens, longest(cfg, s))  # a longer row stands alone
    layer, root, embedding = layer_parameters(s), root_parameters(s), s.vocab * s.hidden
    saved, width = layer_activations(s, c) * tokens, c * s.hidden * tokens
    kept = s.layers * (width if cfg.activation_checkpointing else saved)
    one_layer = (saved if cfg.activation_checkpointing else 0) + width
    # six float32 copies of a chunk's logits; or a chunk's gradient of the head, and their sum
    logits = max(24 * min(CHUNK, tokens) * s.vocab, 2 * c * embedding)
    down = c * s.hidden * s.intermediate
    down += c * root + (2 * c + 4) * layer
    busy = kept + one_layer + 2 * c * s.intermediate * tokens
    moments = [  # unsharded parameters, activations, logits and the head's gradient
        # a chunk's log-probs: the last norm, the response's rows; the last layer is prefetched
        (c * (root + layer), kept + 4 * s.hidden * tokens + 2 * width, c * embedding + logits),
        # a layer's backward: it, the next one down, its first gradient, the last one's reduction
        (down, busy, c * embedding),
        # the root's gradients: input and output of their reduction
        ((c + 4 + 4 / shards) * root, 0, 0),
    ]
    gradients = 0 if cfg.offload_optimizer else 4 * parameters(s) / shards
    names = "unsharded layers", "activations", "logits, head's gradient"
    return {"gradients": gradients} | dict(zip(names, max(moments, key=sum)))


def engine(cfg, s, gpu_memory):
    """({item: bytes} of an engine awake, tokens that its cache holds: what its share leaves)."""
    c = 4 if cfg.dtype == "float32" else 2
    work = max(longest(cfg, s), PREFILL) * c * (3 * s.intermediate / cfg.tp + 3 * s.hidden)
    work += 16 * SEQUENCES * s.vocab + ASLEEP
    weights = c * parameters(s) / cfg.tp
    cache = max(cfg.engine_memory * gpu_memory * GIB - weights - work, 0)
    token = 2 * s.layers * max(s.kv_heads // cfg.tp, 1) * s.head_dim * c
    names = "engine: work space", "engine: weights", "engine: cache"
    return dict(zip(names, (work, weights, cache))), int(cache // token)


def plan(cfg, s, gpus, gpu_memory):
    """({item: bytes} on each GPU while training, the same while generating, tokens of a cache)."""
    idle, (awake, tokens) = resting(cfg, s, gpus), engine(cfg, s, gpu_memory)
    busy = idle | passing(cfg, s, gpus)
    for items in (busy, idle):
        items |= {"fragmentation": MARGIN * sum(items.values()), "CUDA, NCCL": CONTEXT}
    return busy | {"engine: work space": ASLEEP}, idle | awake, tokens


def report(cfg, gpus, gpu_memory):
    """The plan of `cfg` on `gpus` GPUs of `gpu_memory` GiB as lines of text, the last a verdict."""
    if cfg.model is None:
        return ["memory: the embedded default needs no plan, it is tiny"]
    s, known = shape_of(cfg.model), ", ".join(SHAPES)
    if s is None:
        return [f"memory: no shape of {cfg.model} is known: give its folder, or one of {known}"]
    *columns, tokens = plan(cfg, s, gpus, gpu_memory)
    lines = [f"memory of each GPU in GiB (2^30 bytes), {gpus} x {gpu_memory:g}"]
    lines.append(f"  {'':26}{'training':>10}{'generating':>12}")
    for item in columns[0] | columns[1]:
        busy, idle = (items.get(item, 0) / GIB for items in columns)
        known = "  unmeasured" if item.startswith("engine") else ""
        lines.append(f"  {item:26}{busy:>10.1f}{idle:>12.1f}{known}")
    busy, idle = (sum(items.values()) / GIB for items in columns)
    lines.append(f"  {'total':26}{busy:>10.1f}{idle:>12.1f}")
    responses = tokens // longest(cfg, s)
    lines.append(f"an engine's cache holds {tokens:,} tokens, {responses} responses at once")
    worst, doing = (columns[0], "training") if busy > idle else (columns[1], "generating")
    largest = sorted(worst.items(), key=lambda pair: -pair[1])[:3]
    named = ", ".join(f"{item} {size / GIB:.1f}" for item, size in largest)
    fits = max(busy, idle) <= gpu_memory and responses > 0
    verdict = f"{max(busy, idle):.1f} of {gpu_memory:g} GiB while {doing}; largest: {named}"
    return [*lines, f"{'fits' if fits else 'does not fit'}: {verdict}"]
