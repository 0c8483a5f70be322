"""Policy and critic under FSDP2: log-probs, entropy and values of tokens, frozen snapshots.

The modules see micro-batches of right-padded rows (prompt, response, padding), so that attention
needs no mask, and return (b, T) tensors over response tokens alone, 0 at padding. Parameters are
float32 masters; the computation is in bfloat16 on GPUs, in float32 on CPUs.
"""

import contextlib
import math
from functools import partial

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from infra.ranks import gather


def pretrained(kind, folder, empty):
    """A float32 model on the CPU from a Hugging Face folder, or its `empty` skeleton on meta.

    kind: name of an Auto class of transformers.
    """
    import transformers

    kind, logging = getattr(transformers, kind), transformers.utils.logging
    logging.disable_progress_bar()
    # else the critic's backbone reports the head that it does not want
    logging.set_verbosity_error()
    safe = dict(dtype=torch.float32, trust_remote_code=False)
    if not empty:
        return kind.from_pretrained(folder, use_safetensors=True, **safe)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return kind.from_config(config, **safe).eval()


class Policy(nn.Module):
    """A Hugging Face causal LM; forward gives log π_θ and entropy at the sampling temperature.

    The logits exist for `chunk_tokens` response tokens at once, in the backward pass too (each
    chunk is checkpointed): never a (B, T, V) tensor. This must happen inside the root's forward,
    outside of which FSDP2 leaves the head's weight sharded.
    """

    predicts, chunk_tokens = "logp", 1024

    def __init__(self, folder, temperature, empty=False):
        super().__init__()
        self.lm = pretrained("AutoModelForCausalLM", folder, empty)
        self.temperature = temperature

    @property
    def backbone(self):  # no attribute: a module registered twice would be saved twice
        return self.lm.model

    def head(self, hidden, tokens):
        """hidden (n, H), tokens (n,) -> log-probs (n,), entropies (n,), float32."""
        logits = self.lm.lm_head(hidden).float() / self.temperature  # (n, V)
        log_z = logits.logsumexp(-1)  # (n,)
        logp = logits.gather(-1, tokens[:, None])[:, 0] - log_z
        entropy = log_z - (logits.softmax(-1) * logits).sum(-1)
        return logp, entropy

    def forward(self, ids, where, tokens, mask):
        """ids (b, L); where, tokens, mask (b, T) -> {"logp", "entropy"}, (b, T) each."""
        hidden = self.lm.model(input_ids=ids, use_cache=False).last_hidden_state  # (b, L, H)
        hidden, tokens = response_rows(hidden, where, mask), tokens[mask]  # (n, H), (n,)
        chunks = zip(hidden.split(self.chunk_tokens), tokens.split(self.chunk_tokens))
        parts = [checkpoint(self.head, h, t, use_reentrant=False) for h, t in chunks]
        logp, entropy = (torch.cat(part) for part in zip(*parts))
        return {"logp": scatter(logp, mask), "entropy": scatter(entropy, mask)}


class Critic(nn.Module):
    """The same backbone with a value head, zero at the start.

    V is read at the position whose logits produce the token.
    """

    predicts = "values"

    def __init__(self, folder, empty=False):
        super().__init__()
        self.backbone = pretrained("AutoModel", folder, empty)
        self.value = nn.Linear(self.backbone.config.hidden_size, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, ids, where, tokens, mask):
        """ids (b, L); where, mask (b, T) -> {"values": (b, T)}. `tokens` is not used."""
        hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state  # (b, L, H)
        values = self.value(response_rows(hidden, where, mask)).float()[:, 0]  # (n,)
        return {"values": scatter(values, mask)}


def response_rows(hidden, where, mask):
    """hidden (b, L, H) at positions where (b, T), valid ones only -> (n, H)."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]  # (b, 1)
    return hidden[rows, where][mask]


def scatter(flat, mask):
    """flat (n,) back to (b, T), 0 where mask is False; keeps the graph even where n is 0."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def deal(lengths, world, budget):
    """Share rows out to ranks and pack them into micro-batches of `budget` tokens.

    Returns shares[rank] = list of micro-batches, each a list of indices into `lengths` (tokens).
    Rows go longest first to the rank with the fewest tokens; a micro-batch holds rows of like
    length while rows x longest <= budget (a longer row stands alone). Every rank gets the same
    number, empty ones where it has fewer: a collective inside forward or backward would otherwise
    wait for ever.
    """
    loads, rows = [0] * world, [[] for _ in range(world)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += lengths[index]
        rows[rank].append(index)
    shares = []
    for mine in rows:
        share = []
        for index in mine:
            if share and (len(share[-1]) + 1) * lengths[share[-1][0]] <= budget:
                share[-1].append(index)
            else:
                share.append([index])
        shares.append(share)
    most = max(map(len, shares))
    return [share + [[] for _ in range(most - len(share))] for share in shares]


def collate(samples, device):
    """Samples -> what a module takes: ids (b, L); where, tokens, mask (b, T).

    No sample gives one row of one masked token, so that a rank without work still takes part.
    """
    if not samples:
        one = torch.zeros(1, 1, dtype=torch.long, device=device)
        return dict(ids=one, where=one, tokens=one, mask=one.bool())

    def pad(rows):
        return pad_sequence(rows, batch_first=True).to(device)

    pairs = [(sample.prompt, sample.response) for sample in samples]
    return dict(
        ids=pad([torch.cat(pair) for pair in pairs]),
        where=pad([torch.arange(len(p) - 1, len(p) + len(r) - 1) for p, r in pairs]),
        tokens=pad([r for _, r in pairs]),
        mask=pad([torch.ones(len(r), dtype=torch.bool) for _, r in pairs]),
    )


class Learner:
    """One module under FSDP2 with its AdamW: predict, train, swap a frozen snapshot in.

    Rank 0's module holds the weights and broadcasts them; the other ranks' may be `empty`, so that
    a machine's memory holds one full copy, not one per rank.
    """

    def __init__(self, module, lr, cfg, ranks):
        from torch.distributed import fsdp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
        from torch.distributed.device_mesh import init_device_mesh

        self.cfg, self.ranks, self.module, self.lr = cfg, ranks, module, lr
        weights = module.state_dict() if ranks.first else {}
        module.to("meta")
        cuda, offload = ranks.device.type == "cuda", cfg.offload_optimizer
        # HSDP: gradients are averaged over the nodes, everything else stays within a node
        nodes = ranks.world // ranks.local_world
        shape = (nodes, ranks.local_world) if cfg.hsdp and nodes > 1 else (ranks.world,)
        names = ("replicate", "shard")[-len(shape) :]
        sharding = dict(
            mesh=init_device_mesh(ranks.device.type, shape, mesh_dim_names=names),
            reshard_after_forward=True,
            mp_policy=fsdp.MixedPrecisionPolicy(getattr(torch, cfg.dtype), torch.float32),
            offload_policy=fsdp.OffloadPolicy(),
        )
        if offload:
            sharding["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=cuda)
        if isinstance(module, Policy):
            module.lm.tie_weights()
            self.names = set(module.lm.state_dict())  # what the engine must receive
        for layer in module.backbone.layers:
            if cfg.activation_checkpointing:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            fsdp.fully_shard(layer, **sharding)
        fsdp.fully_shard(module, **sharding)  # the root too reshards after forward: see _exchange
        module.to_empty(device="cpu" if offload else ranks.device)
        # its frequencies are in no checkpoint
        rotary = module.backbone.rotary_emb
        module.backbone.rotary_emb = type(rotary)(config=rotary.config).to(ranks.device)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, weights, options=options)
        self.optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=lr,
            betas=(0.9, cfg.adam_beta2),
            weight_decay=cfg.weight_decay,
            # no copy of the moments on a GPU; fast in host memory
            fused=cuda or offload or None,
        )

    def micro_batches(self, samples):
        """This rank's micro-batches of samples that every rank holds: lists of indices.

        As many on each rank.
        """
        lengths = [len(sample.prompt) + len(sample.response) for sample in samples]
        return deal(lengths, self.ranks.world, self.cfg.micro_tokens)[self.ranks.rank]

    @torch.no_grad()
    def predict(self, samples):
        """log π (of a critic: V) of every sample: a list of (T,) CPU tensors, on every rank.

        A collective.
        """
        if not samples:
            return []
        mine, found, what = {}, {}, self.module.predicts
        quiet = dict(leave=False, delay=2, disable=not self.ranks.first)
        for indices in tqdm(self.micro_batches(samples), what, **quiet):
            inputs = collate([samples[i] for i in indices], self.ranks.device)
            rows = self.module(**inputs)[what].float().cpu()  # (b, T)
            for i, row in zip(indices, rows):
                mine[i] = row[: len(samples[i].response)].clone()
        for part in gather(mine):
            found.update(part)
        return [found[i] for i in range(len(samples))]

    def backward(self, loss):
        """Accumulate the gradient of this rank's share of a global sum.

        FSDP2 averages over ranks, hence the factor. A loss that is not finite may have a gradient
        that is: 0 x loss, else 0, makes it NaN as well, so that its norm tells all ranks.
        """
        (loss * (1 + 0 * loss.detach()) * self.ranks.world).backward()

    def step(self, scale):
        """Clip, update at learning rate lr x `scale`, clear. Returns the gradient's norm (float).

        Before clipping, the same on every rank. Where it is not finite nothing is updated, neither
        weights nor the optimiser's state.
        """
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.cfg.grad_clip)
        norm = whole(norm).item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def snapshot(self):
        """A frozen copy of this rank's shards: a list of DTensors in the order of parameters()."""
        return [p.detach().clone() for p in self.module.parameters()]

    @contextlib.contextmanager
    def swapped(self, snapshot):
        """Inside, the module is the snapshot's policy; shards are exchanged, to the bit."""
        self._exchange(snapshot)
        try:
            yield
        finally:
            self._exchange(snapshot)

    @torch.no_grad()
    def _exchange(self, snapshot):
        # an unsharded copy left from a forward would silently be used instead of the new shards
        for part in self.module.modules():
            if hasattr(part, "reshard"):
                part.reshard()
        for live, frozen in zip(self.module.parameters(), snapshot, strict=True):
            live, frozen = live.to_local(), frozen.to_local()
            kept = live.clone()
            live.copy_(frozen)
            frozen.copy_(kept)

    def full_tensors(self):
        """Yield (Hugging Face name, full tensor) one at a time, tied heads included.

        A collective: all ranks, to the end. Cast to the type of computation, which halves what
        travels: these are the weights that the forward pass uses.
        """
        for name, tensor in self.module.lm.state_dict().items():
            yield name, whole(tensor.to(self.ranks.device, getattr(torch, self.cfg.dtype)))


def whole(tensor):
    """A sharded tensor (DTensor) in full; any other as it is. A collective for the former."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
