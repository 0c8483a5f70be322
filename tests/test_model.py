"""model.py against slow, unsharded, unpadded computations; FSDP2 for real, at one and two ranks."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_checkpoint import equal
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from workers import LAM, UPDATES, VERSION, VOCAB, config, tiny_model, value_weight

from conftest import command
from loss import kl_convex, mix_ppg, value_loss
from model import Critic, Policy, collate, deal

LENGTHS = [(3, 5), (1, 9), (6, 1), (2, 2), (4, 9), (1, 1), (5, 7)]  # prompt, response (tokens)


# ---- slow oracles: one sample at a time, no padding, the whole log-softmax


def naive(lm, sample, temperature):
    """log-probs and entropies (T,) of the response."""
    begin = len(sample["prompt"])
    ids = torch.cat([sample["prompt"], sample["response"]])  # (L,)
    table = (lm(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)  # (L, V)
    at = range(begin - 1, len(ids) - 1)
    logp = torch.stack([table[i, ids[i + 1]] for i in at])
    return logp, torch.stack([-(table[i].exp() * table[i]).sum() for i in at])


def naive_values(backbone, weight, bias, sample):
    ids = torch.cat([sample["prompt"], sample["response"]])
    hidden = backbone(input_ids=ids[None]).last_hidden_state[0]  # (L, H)
    begin = len(sample["prompt"])
    return torch.stack(
        [(hidden[i] * weight[0]).sum() + bias[0] for i in range(begin - 1, len(ids) - 1)]
    )


def load(folder, kind=AutoModelForCausalLM):
    return kind.from_pretrained(folder, dtype=torch.float32)


def make_samples(seed, lm=None, temperature=0.7):
    """Ragged samples; with a model also everything that an update needs, near enough to it that no ratio is clamped."""
    g = torch.Generator().manual_seed(seed)

    def noise(n, scale):
        return scale * torch.randn(n, generator=g)

    samples = [
        {
            name: torch.randint(2, VOCAB, (n,), generator=g)
            for name, n in zip(("prompt", "response"), pair)
        }
        for pair in LENGTHS
    ]
    if lm:
        for i, s in enumerate(samples):
            with torch.no_grad():
                logp, n = naive(lm, s, temperature)[0], len(s["response"])
            s["version"] = VERSION - i % 3 % 2
            s["logp_old"] = logp + noise(n, 0.05)
            s["logp_behavior"] = s["logp_old"] + noise(n, 0.3 * (s["version"] < VERSION))
            s |= {
                "logp_base": logp + noise(n, 0.2),
                "logp_prev": logp + noise(n, 0.1),
                "advantages": noise(n, 1.0),
            }
            s |= {"values": noise(n, 1.0), "returns": noise(n, 1.0)}
    return samples


def close(found, wanted, tolerance=1e-5):
    """Equal to `tolerance`, in units of the largest entry where that is above 1."""
    torch.testing.assert_close(
        found, wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item())
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for name in ("tied", "untied"):
        tiny_model(folder / name, tied=name == "tied")
        torch.save(make_samples(1, load(folder / name)), folder / f"samples-{name}.pt")
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
    assert deal(list(lengths), world, budget) == shares


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 60))
def test_deal_fills_micro_batches(rows, length, budget):
    """Rows of one length need no more micro-batches than the budget demands."""
    fit = max(budget // length, 1)
    assert len(deal([length] * rows, 1, budget)[0]) == -(-rows // fit)


def test_deal_of_nothing_is_no_work():
    assert deal([], 3, 10) == [[], [], []]


def test_collate():
    samples = [
        dict(
            prompt=torch.tensor([5, 6, 7]),
            response=torch.tensor([8, 9]),
            x=torch.tensor([0.5, 1.5]),
        ),
        dict(
            prompt=torch.tensor([4]),
            response=torch.tensor([3, 2, 1]),
            x=torch.tensor([-1.0, -2.0, -3.0]),
        ),
    ]
    inputs, fields = collate(samples, "cpu", ["x"])
    assert inputs["ids"][0].tolist() == [5, 6, 7, 8, 9] and inputs["ids"][1, :4].tolist() == [
        4,
        3,
        2,
        1,
    ]
    assert inputs["mask"].tolist() == [[True, True, False], [True, True, True]]
    assert inputs["where"][0, :2].tolist() == [2, 3] and inputs["where"][1].tolist() == [0, 1, 2]
    assert inputs["tokens"][0, :2].tolist() == [8, 9] and inputs["tokens"][1].tolist() == [3, 2, 1]
    assert fields["x"].tolist() == [[0.5, 1.5, 0.0], [-1.0, -2.0, -3.0]]
    assert all(0 <= w < inputs["ids"].shape[1] for w in inputs["where"].flatten().tolist())


def test_collate_of_nothing_is_one_masked_token(folder):
    inputs, fields = collate([], "cpu", ["x", "y"])
    assert inputs["mask"].tolist() == [[False]] and set(fields) == {"x", "y"}
    assert fields["x"].tolist() == fields["y"].tolist() == [[0.0]]
    policy = Policy(folder / "tied", 1.0, 4)
    logp, entropy = policy(**inputs)
    assert logp.tolist() == entropy.tolist() == [[0.0]]
    (logp + entropy).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


# ---- policy and critic, unsharded


def weighted(samples, seed=7):
    """Random weights of log-probs and entropies, per sample: their weighted sum has a gradient everywhere."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, len(s["response"]), generator=g) for s in samples]


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def run(policy, samples, weights, **junk):
    """Outputs as lists of (2, T), and the gradients of their weighted sum."""
    inputs = collate(samples, "cpu")[0] | junk
    outputs = torch.stack(policy(**inputs))  # (2, B, T)
    rows = [outputs[:, i, : len(s["response"])] for i, s in enumerate(samples)]
    assert not outputs[:, ~inputs["mask"]].any()
    return [row.detach() for row in rows], gradients(
        policy, sum((row * w).sum() for row, w in zip(rows, weights))
    )


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_equals_full_log_softmax(folder, model, temperature):
    samples, lm = make_samples(2), load(folder / model)
    weights = weighted(samples)
    slow = [torch.stack(naive(lm, s, temperature)) for s in samples]
    slow_gradients = gradients(lm, sum((row * w).sum() for row, w in zip(slow, weights)))
    assert max(row[0].min() for row in slow) < -1 and all(
        g.abs().max() > 1e-3 for g in slow_gradients.values()
    )
    for chunk in (1, 3, 1000):
        rows, found = run(Policy(folder / model, temperature, chunk), samples, weights)
        for row, wanted in zip(rows, slow):
            close(row, wanted.detach())
        assert {"lm." + name for name in slow_gradients} == set(found)
        for name, wanted in slow_gradients.items():
            close(found["lm." + name], wanted)


def test_padding_is_never_read(folder):
    samples, policy = make_samples(3), Policy(folder / "untied", 0.7, 4)
    weights = weighted(samples)
    rows, found = run(policy, samples, weights)
    inputs = collate(samples, "cpu")[0]
    junk = {name: value.clone() for name, value in inputs.items()}
    for i, (p, t) in enumerate(LENGTHS):
        junk["ids"][i, p + t :], junk["tokens"][i, t:], junk["where"][i, t:] = 33 + i, 50 - i, i
    assert all((junk[name] != inputs[name]).any() for name in ("ids", "tokens", "where"))
    other, other_gradients = run(policy, samples, weights, **junk)
    for a, b in zip(rows, other):
        close(a, b, 1e-6)
    for name in found:
        close(found[name], other_gradients[name], 1e-6)


def test_a_sample_does_not_depend_on_its_batch(folder):
    samples, policy = make_samples(4), Policy(folder / "tied", 0.7, 4)
    weights = weighted(samples)
    rows, whole = run(policy, samples, weights)
    parts, summed = {}, {name: 0 for name in whole}
    for batch in ([6, 0, 3], [5], [2, 4, 1]):
        found, gradient = run(policy, [samples[i] for i in batch], [weights[i] for i in batch])
        parts |= dict(zip(batch, found))
        summed = {name: summed[name] + gradient[name] for name in whole}
    for i, row in enumerate(rows):
        close(parts[i], row)
    for name in whole:
        close(summed[name], whole[name])


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_logits_exist_for_one_chunk_at_a_time(folder, chunk):
    """The head sees at most `chunk` response tokens, in the backward pass too; nothing with V is kept in between."""
    samples, policy, seen, kept = make_samples(5), Policy(folder / "untied", 1.0, chunk), [], []
    tokens = sum(t for _, t in LENGTHS)
    policy.lm.lm_head.register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel())
    )

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp, entropy = policy(**collate(samples, "cpu")[0])
    assert sum(seen) == tokens and max(seen) == min(chunk, tokens)
    assert kept and not [shape for shape in kept if shape and shape[-1] == VOCAB]
    seen.clear()
    (logp + entropy).sum().backward()
    assert sum(seen) == tokens and max(seen) == min(chunk, tokens)


def test_the_head_is_normalised_in_float32(folder):
    """With bfloat16 weights too: the probabilities of all tokens sum to 1 beyond bfloat16's three digits."""
    policy = Policy(folder / "tied", 0.7, 4).bfloat16()
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    logp, entropy = policy.head(hidden.expand(VOCAB, -1), torch.arange(VOCAB))
    assert logp.dtype == entropy.dtype == torch.float32
    close(logp.exp().sum(), torch.tensor(1.0))
    close(entropy, -(logp.exp() * logp).sum().expand(VOCAB))


def test_critic(folder):
    samples = make_samples(6)
    critic, inputs, weights = Critic(folder / "tied"), collate(samples, "cpu")[0], weighted(samples)
    (values,) = critic(**inputs)
    assert values.shape == inputs["mask"].shape and not values.any()
    assert gradients(critic, values.sum())["value.weight"].any()  # zero, yet it learns
    critic.value.weight.data.copy_(value_weight(64))
    critic.value.bias.data.fill_(0.25)
    (values,) = critic(**inputs)
    assert not values[~inputs["mask"]].any()
    found = gradients(
        critic, sum((values[i, : w.shape[1]] * w[0]).sum() for i, w in enumerate(weights))
    )
    backbone = load(folder / "tied", AutoModel)
    slow = [naive_values(backbone, value_weight(64), torch.tensor([0.25]), s) for s in samples]
    slow_gradients = gradients(backbone, sum((v * w[0]).sum() for v, w in zip(slow, weights)))
    for row, wanted in zip(values, slow):
        close(row[: len(wanted)].detach(), wanted.detach())
    for name, wanted in slow_gradients.items():
        assert wanted.any()
        close(found["backbone." + name], wanted)


# ---- FSDP2 at one and two ranks: tests/workers.py did it, here it is judged


@pytest.fixture(scope="module")
def seen(folder):
    """world -> [what rank 0 saw, what rank 1 saw]. """
    for world in (2, 1):
        done = command("tests/workers.py", "learner", folder, ranks=world)
        assert done.returncode == 0, done.stderr[-4000:]
    return {
        world: [
            torch.load(folder / f"learner-{world}-{rank}.pt", weights_only=False)
            for rank in range(world)
        ]
        for world in (1, 2)
    }


def slow_update(folder, case):
    """Gradients of one update on the whole minibatch, and the mean entropy: no shards, no micro-batches, no padding."""
    model, with_critic, count, changes = UPDATES[case]
    cfg, samples = config(**changes), torch.load(folder / f"samples-{model}.pt")[:count]
    lm, tokens, total, entropies = (
        load(folder / model),
        sum(len(s["response"]) for s in samples),
        0,
        [],
    )
    for s in samples:
        logp, entropy = naive(lm, s, cfg.temperature)
        loss, _ = mix_ppg(
            logp, s["logp_old"], s["logp_behavior"], s["advantages"], cfg.clip_low, cfg.clip_high
        )
        loss = loss - cfg.entropy * entropy
        if cfg.beta:
            loss = loss + cfg.beta * kl_convex(logp, s["logp_base"], s["logp_prev"], LAM)
        total = (
            total
            + {
                "token": loss.sum() / tokens,
                "sequence": loss.mean() / count,
                "constant": loss.sum() / (count * cfg.max_response),
            }[cfg.aggregate]
        )
        entropies.append(entropy.detach())
    found = {"policy": {"lm." + name: g for name, g in gradients(lm, total).items()}}
    if with_critic:
        critic, total = Critic(folder / model), 0
        critic.value.weight.data.copy_(value_weight(64))
        for s in samples:
            values = naive_values(critic.backbone, critic.value.weight, critic.value.bias, s)
            total = (
                total + value_loss(values, s["values"], s["returns"], cfg.value_clip).sum() / tokens
            )
        found["critic"] = gradients(critic, total)
    return found, torch.cat(entropies).mean().item()


@pytest.mark.parametrize("case", UPDATES)
@pytest.mark.parametrize("world", [1, 2])
def test_update(seen, folder, world, case):
    """The gradient, for any number of ranks and micro-batches; clipping by the global norm; AdamW's first step."""
    cfg, (wanted, entropy) = config(**UPDATES[case][3]), slow_update(folder, case)
    rates = {"policy": cfg.lr * 0.5, "critic": cfg.critic_lr * 0.5}
    for rank in seen[world]:
        found = rank["updates"][case]
        assert (
            len(found["micro_batches"]) == len(seen[world][0]["updates"][case]["micro_batches"]) > 0
        )
        assert found["means"]["entropy"] == pytest.approx(entropy, rel=1e-5)
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
        assert len(found["micro_batches"]) > 1


def test_where_shards_lie(seen):
    """--hsdp and --offload_optimizer change no number: that they are not ignored shows in what FSDP2 was told."""
    for world in (1, 2):
        for case, (_, _, _, changes) in UPDATES.items():
            assert world == 1 or seen[world][0]["updates"][case]["nodes"] == ("hsdp" in changes) + 1
            placements, policy = seen[world][0]["updates"][case]["layout"]
            assert placements == (
                "(Replicate(), Shard(dim=0))"
                if "hsdp" in changes and world == 2
                else "(Shard(dim=0),)"
            )
            assert policy == (
                "CPUOffloadPolicy" if "offload_optimizer" in changes else "OffloadPolicy"
            )


def test_ranks_hold_the_same_parameters(seen):
    for case in UPDATES:
        for a, b in zip(*(rank["updates"][case]["policy"]["after"].values() for rank in seen[2])):
            assert torch.equal(a, b)
    # between worlds and micro-batch sizes they differ only where a gradient is so small that its direction is rounding
    first, *others = [
        seen[world][0]["updates"][case]
        for case in ("ppo", "ppo, one micro-batch")
        for world in (1, 2)
    ]
    for other in others:
        for name in ("policy", "critic"):
            after = other[name]["after"]
            off = torch.cat(
                [(p - after[key]).abs().flatten() for key, p in first[name]["after"].items()]
            )
            assert (off > 1e-6).float().mean() < 1e-3 and off.max() < 1e-3


@pytest.mark.parametrize("world", [1, 2])
def test_an_update_that_is_not_finite_changes_nothing(seen, world):
    """Neither weights nor AdamW's moments and count, on any rank, though one rank alone has the sample; nor what a usual update does
    after it. The critic is judged by itself. Means stay finite."""
    for rank in seen[world]:
        usual, broken, critic = (
            rank["broken_update"][case] for case in ("usual", "broken", "critic")
        )
        finite = [
            {name: math.isfinite(norm) for name, norm in norms.items()} for _, norms, _ in broken
        ]
        assert finite == [
            dict(policy=fine, critic=True) for fine in (False, True, False, False, True)
        ]
        policy = [states["policy"] for states, _, _ in broken]
        assert all("/" not in key for key in policy[0])  # no moments yet
        assert equal(policy[1], usual[0][0]["policy"]) and any(
            key.endswith("/step") for key in policy[1]
        )
        assert equal(policy[1], policy[2]) and equal(policy[2], policy[3])
        assert equal(policy[4], usual[1][0]["policy"]) and not equal(policy[4], policy[3])
        assert not equal(broken[2][0]["critic"], broken[3][0]["critic"])  # it went on
        (before, _, _), (after, norms, _) = critic
        assert math.isfinite(norms["policy"]) and math.isnan(norms["critic"])
        assert equal(before["critic"], after["critic"]) and not equal(
            before["policy"], after["policy"]
        )
        for _, _, means in broken + critic:
            assert all(map(math.isfinite, means.values()))
        assert "policy_grad_norm" not in broken[0][2] and "critic_grad_norm" not in critic[1][2]
    assert [norms for _, norms, _ in seen[world][0]["broken_update"]["usual"]] == [
        norms for _, norms, _ in seen[world][-1]["broken_update"]["usual"]
    ]


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("world", [1, 2])
def test_predict_and_swapped_snapshots(seen, folder, world, model):
    """Inside a swap the log-probs are the snapshot's; after it the policy's, to the bit; whatever ran before."""
    samples, slow = torch.load(folder / f"samples-{model}.pt"), {}
    found = seen[world][0]["snapshots"][model]
    with torch.no_grad():
        for name in ("base", "prev", "now"):
            lm = load(folder / model)
            lm.load_state_dict(found[name + "_weights"])
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
        assert all(map(torch.equal, found["now"], seen[world][0]["snapshots"][model]["now"]))


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("world", [1, 2])
def test_full_tensors(seen, folder, world, model):
    """Every name of the checkpoint format, the tied head too, and the ranks' shards put together."""
    names = set(load(folder / model).state_dict())
    assert "lm_head.weight" in names
    shards = [rank["snapshots"][model]["shards"] for rank in seen[world]]
    for rank in seen[world]:
        found = rank["snapshots"][model]
        assert found["names"] == set(found["now_weights"]) == names
        for name in shards[0]:
            assert torch.equal(
                found["now_weights"][name], torch.cat([shard[name] for shard in shards])
            )
        head, embedding = (
            found["now_weights"][name] for name in ("lm_head.weight", "model.embed_tokens.weight")
        )
        assert torch.equal(head, embedding) == (model == "tied")


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("world", [1, 2])
def test_export(seen, folder, world, model):
    exported, samples = (
        load(folder / f"exported-{model}-{world}"),
        torch.load(folder / f"samples-{model}.pt"),
    )
    for s, wanted in zip(samples, seen[world][0]["snapshots"][model]["now"]):
        close(naive(exported, s, 0.7)[0].detach(), wanted)
    tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert tied == (model == "tied")
    assert AutoTokenizer.from_pretrained(folder / f"exported-{model}-{world}").encode("1+2=")
    assert not (folder / f"exported-{model}-{world}.tmp").exists()
    generation = [
        (folder / name / "generation_config.json").read_text()
        for name in (model, f"exported-{model}-{world}")
    ]
    assert generation[0] == generation[1] and exported.dtype == torch.float32


@pytest.mark.parametrize("world", [1, 2])
def test_export_in_the_type_of_training(seen, folder, world):
    """bfloat16: half the size, and the weights that the forward pass of training used: its log-probs, but for kernels."""
    path, found = folder / f"exported-bfloat16-{world}", seen[world][0]["exported_in_bfloat16"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert (
        model.dtype == torch.bfloat16
        and json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    )
    weights = load_file(
        path / "model.safetensors"
    )  # what lies on the disk; the head is the embedding
    assert weights.keys() == found["masters"].keys() == dict(model.named_parameters()).keys()
    for name, master in found["masters"].items():
        assert master.dtype == torch.float32 and torch.equal(weights[name], master.bfloat16())
    gaps = [
        naive(model, s, 0.7)[0] - logp
        for s, logp in zip(torch.load(folder / "samples-tied.pt"), found["logp"])
    ]
    assert torch.cat(gaps).abs().mean() < 0.02
