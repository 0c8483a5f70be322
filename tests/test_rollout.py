"""rollout.py with real vLLM engines: what tests/workers.py saw at one rank, at two, and with two ranks per engine."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM
from workers import LENGTH, PROMPTS, tiny_model

from conftest import command
from rollout import as_response, request_seed
from train import generate

EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    for name in ("tied", "untied"):
        tiny_model(folder / name, tied=name == "tied")
    return folder


def launch(job, folder, world):
    done = command("tests/workers.py", job, folder, ranks=world, env={"PYTHONHASHSEED": str(world)})
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        torch.load(folder / f"{job}-{world}-{rank}.pt", weights_only=False) for rank in range(world)
    ]


@pytest.fixture(scope="module")
def seen(folder):
    """What the two programs saw, which run at the same time: {world: [rank 0's, …]}."""
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip((1, 2), pool.map(launch, ("engine_one", "engine_two"), (folder, folder), (1, 2)))
        )


@pytest.fixture(scope="module")
def one(seen):
    return seen[1][0]


@pytest.fixture(scope="module")
def two(seen):
    """[rank 0, rank 1], each {tp: what it saw}."""
    return seen[2]


def same(responses, others, tolerance=0.0):
    return len(responses) == len(others) and all(
        torch.equal(a["response"], b["response"])
        and a["truncated"] == b["truncated"]
        and (a["logp_sampler"] - b["logp_sampler"]).abs().max() <= tolerance
        for a, b in zip(responses, others)
    )


# ---- weights


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_weights_arrive(one, model):
    seen = one[model]
    assert seen["gap"] < 1e-4 and seen["gap, updated"] < 1e-4
    assert (
        seen["gap, stale"] > 1e-3
    )  # the comparison can tell the weights of two neighbouring steps apart


@pytest.mark.parametrize("tp", [1, 2])
def test_weights_arrive_at_two_ranks(two, tp):
    for rank in two:
        assert (
            rank[tp]["gap"] < 1e-4
            and rank[tp]["gap, updated"] < 1e-4
            and rank[tp]["gap, stale"] > 1e-3
        )


def test_alarms(one):
    assert "version None" in one["before the first update"]
    seen = one["alarms"]
    assert "version 0" in seen["wrong version"] and "version 1" in seen["wrong version"]
    for name, culprit in (
        ("missing", "model.norm.weight"),
        ("missing head", "lm_head.weight"),
        ("unknown", "model.extra.weight"),
        ("unexpected", "model.norm.weight"),
    ):
        assert culprit in seen[name]
        assert all(
            seen[name + ", then"]
        )  # neither the old version nor the failed one can be asked for
    assert seen["gap"] < 1e-4  # a right update mends it
    assert "consumed to the end: False" in one["sleeping"]["not consumed"]


def test_order_of_calls_around_sleep(one):
    """Memory for the weights, the weights, then the cache, before anything is generated; no wake-up without weights."""
    wake = [
        "wake ['weights']",
        "reload_weights ['a', 'b']",
        "reset cache",
        "wake ['kv_cache']",
        "generate",
    ]
    assert one["sleeping"]["calls"] == ["sleep 2", *wake, "sleep 2", *wake, "sleep 2", *wake]
    for r in one["sleeping"][
        "responses"
    ]:  # the first log-prob of a position is the sampled token's
        assert r["response"].tolist() == [4] and r["logp_sampler"].tolist() == [-0.5]
    assert "expandable_segments" in one["sleeping"]["nothing freed"]
    assert (
        "older weights" in one["sleeping"]["old blocks"][0]
        and "version None" in one["sleeping"]["old blocks"][1]
    )
    assert (
        one["put to sleep"] == 1
    )  # from the start: the trainer fills the memory before the first update
    assert all("asleep" in message for message in one["sleeping"]["asleep"])


@pytest.mark.parametrize(
    "name, words",
    [
        ("fewer", ["1 responses to 2 requests"]),
        ("none", ["0 responses to 2 requests"]),
        ("empty", ["response 1 of 2", "0 tokens"]),
        ("NaN", ["response 1 of 2", "not finite"]),
        ("null", ["response 1 of 2", "not finite"]),
        ("infinite", ["response 0 of 2", "not finite"]),
        ("absent", ["no log-probs"]),
    ],
)
def test_less_than_a_whole_response_to_each_request_is_refused(one, name, words):
    assert all(word in one["sleeping"][name] for word in words), one["sleeping"][name]


def test_the_exported_model_in_a_new_engine(one):
    """What train.py saved, loaded by vLLM from its folder: the log-probs of training; in bfloat16, rounding shows."""
    assert one["exported"]["gap"] < 1e-4 < 1e-3 < one["exported"]["gap, bfloat16"] < 0.3


def test_stop_tokens_end_a_response(one):
    """Besides eos (1), the token 9 was given: it is part of the response, which does not count as truncated."""
    ends = [r["response"][-1].item() for r in one["exported"]["stopping"]]
    assert ends.count(9) > 2
    for r, end in zip(one["exported"]["stopping"], ends):
        assert not {1, 9} & set(r["response"][:-1].tolist()) and r["truncated"] == (
            end not in (1, 9)
        )


# ---- samples


def test_responses_end_as_they_say(one):
    responses = one["sampling"]["whole"] + one["untied"]["responses"] + one["tied"]["responses"]
    assert {r["truncated"] for r in responses} == {True, False}
    for r in responses:
        tokens = r["response"].tolist()
        assert r["response"].dtype == torch.int64 and r["logp_sampler"].dtype == torch.float32
        assert r["response"].shape == r["logp_sampler"].shape == (len(tokens),)
        assert EOS not in tokens[:-1] and r["truncated"] == (tokens[-1] != EOS)
        assert len(tokens) == LENGTH if r["truncated"] else len(tokens) <= LENGTH
    for prompt, r in zip(
        PROMPTS, one["sampling"]["long"]
    ):  # max_tokens beyond the engine's 48: cut by that
        assert r["truncated"] == (r["response"][-1] != EOS)
        assert not r["truncated"] or len(prompt) + len(r["response"]) == 48


def test_a_response_depends_on_its_own_seed_alone(one):
    seen = one["sampling"]
    assert same(seen["whole"], seen["again"])
    assert sorted(seen["parts"]) == list(range(12)) and same(
        seen["whole"], [seen["parts"][i] for i in range(12)]
    )
    assert all(
        not same([a], [b]) for a, b in zip(seen["whole"][:6], seen["whole"][6:])
    )  # one prompt, two seeds


def test_number_of_ranks_does_not_matter(one, two):
    whole = one["untied"]["responses"]
    for rank in two:
        assert same(whole, rank[1]["responses"]) and same(whole, rank[2]["responses"], 1e-4)
        for tp, tolerance in ((1, 0.0), (2, 1e-4)):
            assert set(rank[tp]["few"]) == {0, 1, 3}
            assert all(
                same(responses, whole[:count], tolerance)
                for count, responses in rank[tp]["few"].items()
            )


def test_greedy_is_the_argmax_of_every_step(one, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32)
    model.load_state_dict(one["weights"])
    for prompt, r in zip(PROMPTS, one["sampling"]["greedy"]):
        ids = torch.cat([torch.tensor(prompt), r["response"]])
        with torch.no_grad():
            best = model(input_ids=ids[None]).logits[0].argmax(-1)
        assert torch.equal(best[len(prompt) - 1 : -1], r["response"])
    assert same(one["sampling"]["greedy"], one["sampling"]["greedy again"])  # whatever the seeds


def test_samples_follow_the_policy_at_its_temperature(one, folder):
    """Pearson's chi-square of 3,000 first tokens against the softmax, in standard deviations above its mean."""
    model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32)
    model.load_state_dict(one["weights"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    first = Counter(one["sampling"]["first"])
    total = sum(first.values())

    def excess(temperature):
        expected = (logits / temperature).softmax(-1).double() * total
        often = [i for i, e in enumerate(expected.tolist()) if e >= 5]
        cells = [(first[i], expected[i].item()) for i in often]
        cells.append((total - sum(n for n, _ in cells), total - sum(e for _, e in cells)))
        chi = sum((n - e) ** 2 / e for n, e in cells)
        freedom = len(cells) - 1  # the mean; the variance is twice that
        return (chi - freedom) / (2 * freedom) ** 0.5

    assert abs(excess(0.7)) < 4 < 20 < excess(1.0)


def test_the_trainer_s_generators_are_left_alone(one, two):
    """Python's, numpy's and torch's states, LOCAL_WORLD_SIZE and the thread count around Engine() and generate()."""
    assert one["untouched by Engine"]
    assert one["untied"]["untouched by generate"] and one["tied"]["untouched by generate"]
    for rank in two:
        for tp in (1, 2):
            assert rank[tp]["untouched by Engine"] and rank[tp]["untouched by generate"]


# ---- seeds


def test_request_seed_is_distinct_and_63_bit():
    parts = [
        *itertools.product(range(3), range(20), range(20), range(8)),
        (1, 11),
        (11, 1),
        (1, 1, 1),
        (111,),
        ("a",),
    ]
    seeds = {request_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(seed.bit_count() for seed in seeds) / len(seeds)
    assert 31 < ones < 32 and max(seeds).bit_length() == 63  # 63 fair bits


def test_request_seed_is_the_same_in_every_process(one, two):
    """They ran under other hash seeds than this one."""
    assert one["seed"] == two[0]["seed"] == two[1]["seed"] == request_seed(0, 1, "a", 3)


def test_every_response_of_a_run_has_a_seed_of_its_own():
    """train.generate over runs, versions, prompts and samples; groups stay together and carry their problem's tags."""
    asked = []

    def record(prompts, seeds, version, temperature, max_tokens):
        asked.extend(seeds)
        assert (temperature, max_tokens) == (0.7, 9)
        return [{"response": torch.tensor([seed % 7])} for seed in seeds]

    problems = [(index, {"prompt_ids": [index, 9], "answer": str(index)}) for index in (4, 5, 17)]
    for seed, version in itertools.product((0, 1), (0, 1, 2)):
        cfg = SimpleNamespace(seed=seed, group_size=4, temperature=0.7, max_response=9)
        samples = generate(SimpleNamespace(generate=record), problems, version, cfg)
        assert [s["prompt_index"] for s in samples] == [i for i in (4, 5, 17) for _ in range(4)]
        for s in samples:
            assert s["version"] == version and s["answer"] == str(s["prompt_index"])
            assert s["prompt"].tolist() == [s["prompt_index"], 9]
    assert len(set(asked)) == len(asked) == 2 * 3 * 3 * 4


def test_log_probs_of_other_tokens_are_refused():
    flat = SimpleNamespace(token_ids=[4, 7, 9], logprobs=[-0.5, -0.1, -2.0], start_indices=[0, 2])
    output = SimpleNamespace(token_ids=(4, 9), logprobs=flat, finish_reason="length")
    found = as_response(output)
    assert found["logp_sampler"].tolist() == [-0.5, -2.0] and found["truncated"]
    for tokens in ((4, 7), (4,), (4, 9, 9)):
        output.token_ids = tokens
        with pytest.raises(RuntimeError, match="not those of"):
            as_response(output)
