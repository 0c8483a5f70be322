"""model.py and train.update against slow, unsharded, unpadded computations; FSDP2 for real, at one
and two ranks; the exported model."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from buffer import Batch, Sample
from conftest import command
from loss import kl_convex, mix_ppg, ppo, value_loss
from model import Critic, Policy, collate, deal
from workers import ROWS, SCALE, STEP, UPDATES, VOCAB, config, load_batch, tiny_model, value_weight

LENGTHS = [(3, 5), (1, 9), (6, 1), (2, 2), (4, 9), (1, 1), (5, 7)]  # prompt, response (tokens)
TOKENS = sum(t for _, t in LENGTHS)
FRESH = 4  # of the samples; the others are history


# ---- slow oracles: one sample at a time, no padding, the whole log-softmax


def rows_of(sample):
    """Token ids (1, L) and the positions whose outputs belong to the response."""
    ids = torch.cat([sample.prompt, sample.response])
    return ids[None], range(len(sample.prompt) - 1, len(ids) - 1)


def naive(lm, sample, temperature):
    """log-probs and entropies (T,) of the response."""
    ids, at = rows_of(sample)
    table = (lm(input_ids=ids).logits[0] / temperature).log_softmax(-1)  # (L, V)
    logp = torch.stack([table[i, ids[0, i + 1]] for i in at])
    return logp, torch.stack([-(table[i].exp() * table[i]).sum() for i in at])


def naive_values(backbone, weight, bias, sample):
    ids, at = rows_of(sample)
    hidden = backbone(input_ids=ids).last_hidden_state[0]  # (L, H)
    return torch.stack([(hidden[i] * weight[0]).sum() + bias[0] for i in at])


def load(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype=torch.float32)


def make_samples(seed):
    """Ragged samples."""
    g, samples = torch.Generator().manual_seed(seed), []
    for i, pair in enumerate(LENGTHS):
        prompt, response = (torch.randint(2, VOCAB, (n,), generator=g) for n in pair)
        known = dict(version=STEP - 1 - (i >= FRESH), prompt_index=i, answer="", truncated=False)
        samples.append(Sample(prompt, response, torch.zeros(len(response)), **known))
    return samples


def make_batch(seed, lm):
    """A batch with all that an update needs, near enough to the model that no ratio is clamped."""
    g, samples = torch.Generator().manual_seed(seed), make_samples(seed)

    def near(rows, scale):
        return [row + scale * torch.randn(len(row), generator=g) for row in rows]

    with torch.no_grad():
        logp = [naive(lm, sample, 0.7)[0] for sample in samples]
    groups = [[sample] for sample in samples]
    batch = Batch(groups[:FRESH], groups[FRESH:])
    batch["logp_old"] = near(logp, 0.05)
    batch["logp_base"], batch["logp_prev"] = near(logp, 0.2), near(logp, 0.1)
    for i, (sample, old) in enumerate(zip(samples, batch["logp_old"])):
        (sample.logp_behavior,) = near([old], 0.3 * (i >= FRESH))
        (sample.logp_sampler,) = near([sample.logp_behavior], 0.1)
    for name in ("advantages", "values", "returns"):
        batch[name] = near([torch.zeros(len(row)) for row in logp], 1.0)
    return batch


def close(found, wanted, tolerance=1e-5):
    """Equal to `tolerance`, in units of the largest entry where that is above 1."""
    scale = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for name in ("tied", "untied"):
        tiny_model(folder / name, tied=name == "tied")
        torch.save(make_batch(1, load(folder / name)), folder / f"batch-{name}.pt")
    return folder


# ---- micro-batches


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(1, 50), max_size=30), st.sampled_from([1, 2, 3, 5]), st.integers(1, 120)
)
def test_deal(lengths, world, budget):
    shares = deal(list(lengths), world, budget)
    assert len(shares) == world and len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    loads = [sum(lengths[i] for batch in share for i in batch) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    # rows of one length need no more micro-batches than the budget demands
    rows, length = len(lengths), max(lengths, default=1)
    assert len(deal([length] * rows, 1, budget)[0]) == -(-rows // max(budget // length, 1))


def test_collate_of_nothing_is_one_masked_token(folder):
    inputs, policy = collate([], "cpu"), Policy(folder / "tied", 1.0)
    assert inputs["mask"].tolist() == [[False]]
    found = policy(**inputs)
    assert found["logp"].tolist() == found["entropy"].tolist() == [[0.0]]
    (found["logp"] + found["entropy"]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


# ---- policy and critic, unsharded


def weighted(samples, seed=7):
    """Random weights of log-probs and entropies, (2, T) a sample: their sum has gradients."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, len(s.response), generator=g) for s in samples]


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def make_policy(folder, temperature, chunk):
    policy = Policy(folder, temperature)
    policy.chunk_tokens = chunk
    return policy


def run(policy, samples, weights, **junk):
    """Outputs as lists of (2, T), and the gradients of their weighted sum."""
    inputs = collate(samples, "cpu") | junk
    assert inputs["mask"].sum(1).tolist() == [len(s.response) for s in samples]
    found = policy(**inputs)
    outputs = torch.stack([found["logp"], found["entropy"]])  # (2, B, T)
    assert not outputs[:, ~inputs["mask"]].any()
    rows = [outputs[:, i, : len(s.response)] for i, s in enumerate(samples)]
    total = sum((row * w).sum() for row, w in zip(rows, weights))
    return [row.detach() for row in rows], gradients(policy, total)


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_equals_full_log_softmax(folder, model, temperature):
    samples, lm = make_samples(2), load(folder / model)
    weights = weighted(samples)
    slow = [torch.stack(naive(lm, s, temperature)) for s in samples]
    wanted = gradients(lm, sum((row * w).sum() for row, w in zip(slow, weights)))
    assert max(row[0].min() for row in slow) < -1
    assert all(g.abs().max() > 1e-3 for g in wanted.values())
    for chunk in (1, 3, 1000):
        rows, found = run(make_policy(folder / model, temperature, chunk), samples, weights)
        for row, slow_row in zip(rows, slow):
            close(row, slow_row.detach())
        assert {"lm." + name for name in wanted} == set(found)
        for name in wanted:
            close(found["lm." + name], wanted[name])


def test_padding_is_never_read(folder):
    samples, policy = make_samples(3), make_policy(folder / "untied", 0.7, 4)
    inputs, weights = collate(samples, "cpu"), weighted(samples)
    junk = {name: value.clone() for name, value in inputs.items()}
    for i, (p, t) in enumerate(LENGTHS):
        junk["ids"][i, p + t :], junk["tokens"][i, t:], junk["where"][i, t:] = 33 + i, 50 - i, i
    assert all((junk[name] != inputs[name]).any() for name in ("ids", "tokens", "where"))
    clean, dirty = run(policy, samples, weights), run(policy, samples, weights, **junk)
    for a, b in zip([*clean[0], *clean[1].values()], [*dirty[0], *dirty[1].values()], strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_logits_exist_for_one_chunk_at_a_time(folder, chunk):
    """The head sees at most `chunk` response tokens, in the backward pass too; nothing with V is
    kept in between."""
    policy, seen, kept = make_policy(folder / "untied", 1.0, chunk), [], []
    policy.lm.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    def in_chunks():
        rows = [shape[:-1].numel() for shape in seen]
        seen.clear()
        return sum(rows) == TOKENS and max(rows) == min(chunk, TOKENS)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = policy(**collate(make_samples(5), "cpu"))
    assert in_chunks() and kept and not [shape for shape in kept if shape and shape[-1] == VOCAB]
    (found["logp"] + found["entropy"]).sum().backward()
    assert in_chunks()


def test_the_head_is_normalised_in_float32(folder):
    """With bfloat16 weights too: all probabilities sum to 1 beyond bfloat16's three digits."""
    policy = Policy(folder / "tied", 0.7).bfloat16()
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp, entropy = policy.head(hidden.expand(VOCAB, -1), torch.arange(VOCAB))
    assert logp.dtype == entropy.dtype == torch.float32
    close(logp.exp().sum(), torch.tensor(1.0))
    close(entropy, -(logp.exp() * logp).sum().expand(VOCAB))


def test_the_critic_is_zero_at_first_and_learns(folder):
    """What it computes then is held by test_update."""
    inputs, critic = collate(make_samples(6), "cpu"), Critic(folder / "tied")
    values = critic(**inputs)["values"]
    assert values.shape == inputs["mask"].shape and not values.any()
    assert gradients(critic, values.sum())["value.weight"].any()
    critic.value.bias.data.fill_(0.25)
    values = critic(**inputs)["values"]
    assert torch.equal(values, inputs["mask"] * 0.25)


# ---- FSDP2 at one and two ranks: tests/workers.py did it, here it is judged


@pytest.fixture(scope="module")
def seen(folder):
    """world -> [what rank 0 saw, what rank 1 saw]."""
    for world in (1, 2):
        done = command("tests/workers.py", "learner", folder, ranks=world)
        assert done.returncode == 0, done.stderr[-4000:]

    def saved(world, rank):
        return torch.load(folder / f"learner-{world}-{rank}.pt", weights_only=False)

    return {1: [saved(1, 0)], 2: [saved(2, 0), saved(2, 1)]}


def slow_update(folder, case):
    """({learner: gradients}, means) of one update on the whole minibatch: no shards, no
    micro-batches, no padding."""
    model, count, changes = UPDATES[case]
    cfg, batch, rows = config(**changes), load_batch(folder, model), ROWS[:count]
    lm, losses, entropies, policy_loss = load(folder / model), [], [], []
    for i in rows:
        columns = "logp_old logp_behavior logp_sampler advantages logp_base logp_prev".split()
        old, behavior, sampler, advantages, base, prev = (batch[name][i] for name in columns)
        logp, entropy = naive(lm, batch.samples[i], cfg.temperature)
        if cfg.objective == "ppo":
            loss = ppo(logp, old, advantages, cfg.clip_low, cfg.clip_high)[0]
            loss = loss * (old - behavior).exp().clamp(max=cfg.correct_high)
            loss = loss * (behavior - sampler).exp().clamp(max=cfg.mismatch_high)
        else:
            loss = mix_ppg(logp, old, behavior, advantages, cfg.clip_low, cfg.clip_high)[0]
        policy_loss, entropies = [*policy_loss, loss.detach()], [*entropies, entropy.detach()]
        loss = loss - cfg.entropy * entropy
        if cfg.beta:  # λ is at its floor
            loss = loss + cfg.beta * kl_convex(logp, base, prev, cfg.lambda_floor)
        losses.append(loss)
    flat = torch.cat(losses)
    total = {
        "token": flat.mean(),
        "sequence": sum(loss.mean() for loss in losses) / count,
        "constant": flat.sum() / (count * cfg.max_response),
    }[cfg.aggregate]
    found = {"policy": {"lm." + name: g for name, g in gradients(lm, total).items()}}
    means = dict(entropy=torch.cat(entropies).mean(), policy_loss=torch.cat(policy_loss).mean())
    if cfg.advantage == "gae":
        critic = Critic(folder / model)
        critic.value.weight.data.copy_(value_weight(64))
        head, losses = (critic.value.weight, critic.value.bias), []
        for i in rows:
            values = naive_values(critic.backbone, *head, batch.samples[i])
            losses.append(value_loss(values, batch["values"][i], batch["returns"][i]))
        means["value_loss"] = torch.cat(losses).mean()
        found["critic"] = gradients(critic, means["value_loss"])
    return found, {name: value.item() for name, value in means.items()}


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("world", [1, 2])
def test_update(seen, folder, world, case):
    """The gradient, for any number of ranks and micro-batches; clipping by the global norm; AdamW's
    first step, each learner at its own rate times the warm-up's factor."""
    cfg, (wanted, means) = config(**UPDATES[case][2]), slow_update(folder, case)
    rates = {"policy": cfg.lr * SCALE, "critic": cfg.critic_lr * SCALE}
    first = seen[world][0]["updates"][case]
    for rank in seen[world]:
        found = rank["updates"][case]
        assert equal(found["policy"]["after"], first["policy"]["after"])
        assert len(found["micro_batches"]) == len(first["micro_batches"]) > 0
        for name, value in means.items():
            assert found["means"][name] == pytest.approx(value, rel=1e-5, abs=1e-6)
        for name, slow in wanted.items():
            run, norm = found[name], torch.stack([g.norm() for g in slow.values()]).norm().item()
            assert set(run["grads"]) == set(slow) and (norm > cfg.grad_clip) == (cfg.grad_clip < 1)
            assert run["norm"] == pytest.approx(norm, rel=1e-4)
            shrink = min(1.0, cfg.grad_clip / norm)
            for key, gradient in slow.items():
                assert gradient.any()
                close(run["grads"][key], gradient)
                g, before = run["grads"][key] * shrink, run["before"][key]
                decayed = before * (1 - rates[name] * cfg.weight_decay)
                close(run["after"][key], decayed - rates[name] * g / (g.abs() + 1e-8))
    if case == "one sample" and world == 2:
        assert seen[2][1]["updates"][case]["micro_batches"] == [[]]
    if case == "ppo":
        assert len(first["micro_batches"]) > 1
    # --hsdp and --offload_optimizer change no number: that they count shows in where shards lie
    hsdp = cfg.hsdp and world == 2
    placements = "(Replicate(), Shard(dim=0))" if hsdp else "(Shard(dim=0),)"
    offload = "CPUOffloadPolicy" if cfg.offload_optimizer else "OffloadPolicy"
    assert first["layout"] == (placements, offload)


def equal(a, b):
    """Two dicts of tensors, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("world", [1, 2])
def test_an_update_that_is_not_finite_changes_nothing(seen, world):
    """Neither weights nor AdamW's moments and count, on any rank, though one rank alone has the
    sample; nor what a usual update does after it. The critic is judged by itself."""
    for rank in seen[world]:
        found = rank["broken_update"]
        usual, broken, critic = found["usual"], found["broken"], found["critic"]
        fine = [math.isfinite(norms["policy"]) for _, norms, _ in broken]
        assert fine == [False, True, False, False, True]
        assert all(math.isfinite(norms["critic"]) for _, norms, _ in broken)
        policy = [states["policy"] for states, _, _ in broken]
        assert not any("/" in key for key in policy[0])  # no moments yet
        assert any(key.endswith("/step") for key in policy[1])
        assert equal(policy[1], usual[0][0]["policy"]) and equal(policy[4], usual[1][0]["policy"])
        assert equal(policy[1], policy[2]) and equal(policy[2], policy[3])
        assert not equal(policy[4], policy[3])
        assert not equal(broken[2][0]["critic"], broken[3][0]["critic"])  # it went on
        (before, _, _), (after, norms, means) = critic
        assert math.isfinite(norms["policy"]) and math.isnan(norms["critic"])
        assert equal(before["critic"], after["critic"])
        assert not equal(before["policy"], after["policy"])
        assert "policy_grad_norm" not in broken[0][2] and "critic_grad_norm" not in means


MODELS = pytest.mark.parametrize("model", ["tied", "untied"])


@MODELS
@pytest.mark.parametrize("world", [1, 2])
def test_predict_and_swapped_snapshots(seen, folder, world, model):
    """Inside a swap the log-probs are the snapshot's; after it the policy's, to the bit; whatever
    ran before."""
    samples, slow = load_batch(folder, model).samples, {}
    first = seen[world][0]["snapshots"][model]
    for name in ("base", "prev", "now"):
        lm = load(folder / model)
        lm.load_state_dict(first[name + "_weights"])
        with torch.no_grad():
            slow[name] = [naive(lm, s, 0.7)[0] for s in samples]
    for a, b in (("base", "prev"), ("base", "now"), ("prev", "now")):
        assert max((x - y).abs().max() for x, y in zip(slow[a], slow[b])) > 0.05
    for rank in seen[world]:
        found = rank["snapshots"][model]
        for name in ("base", "prev", "base_unsharded", "prev_unsharded", "now"):
            assert [len(row) for row in found[name]] == [t for _, t in LENGTHS]
            for row, wanted in zip(found[name], slow[name.split("_")[0]]):
                close(row, wanted)
        for name in ("base_after", "prev_after"):
            assert all(map(torch.equal, found[name], found["now"]))
        assert found["shards_kept"] and found["frozen_kept"] and found["nothing"] == []
        assert all(map(torch.equal, found["now"], first["now"]))


@MODELS
@pytest.mark.parametrize("world", [1, 2])
def test_full_tensors_and_export(seen, folder, world, model):
    """Every name of the checkpoint format, the tied head too, and the ranks' shards together; what
    is saved is the policy, which the original's other files accompany."""
    original, path = load(folder / model), folder / f"exported-{model}-{world}"
    names, exported = set(original.state_dict()), load(path)
    shards = [rank["snapshots"][model]["shards"] for rank in seen[world]]
    for rank in seen[world]:
        found = rank["snapshots"][model]
        weights = found["now_weights"]
        assert found["names"] == set(weights) == names and "lm_head.weight" in names
        for name in shards[0]:
            assert torch.equal(weights[name], torch.cat([shard[name] for shard in shards]))
        same = torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
        assert same == (model == "tied")
        assert equal(weights, exported.state_dict())
    tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert tied == (model == "tied") and exported.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(path).encode("1+2=")
    assert not path.with_name(path.name + ".tmp").exists()
    generation = [p / "generation_config.json" for p in (folder / model, path)]
    assert generation[0].read_text() == generation[1].read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_export_in_the_type_of_training(seen, folder, world):
    """bfloat16: half the size, and the weights that the forward pass of training used: its
    log-probs, but for kernels."""
    path, found = folder / f"exported-bfloat16-{world}", seen[world][0]["exported_in_bfloat16"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_file(path / "model.safetensors")  # on the disk; the head is the embedding
    rounded = {name: master.bfloat16() for name, master in found["masters"].items()}
    assert equal(weights, rounded) and weights.keys() == dict(model.named_parameters()).keys()
    pairs = zip(load_batch(folder, "tied").samples, found["logp"])
    gaps = [naive(model, s, 0.7)[0] - logp for s, logp in pairs]
    assert torch.cat(gaps).abs().mean() < 0.02
