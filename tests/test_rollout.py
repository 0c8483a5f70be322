"""rollout.py with real vLLM engines: what tests/workers.py saw at one rank, at two, and with two
ranks per engine; then records, and behaviours around scripted engines."""

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace as Has

import pytest
import torch
from transformers import AutoModelForCausalLM

import rollout
from buffer import Sample
from conftest import command
from infra.toy import make_tokenizer
from reward import canonical
from rollout import Recorded, as_response, check_record, request_seed, write_record
from workers import ASKED, LENGTH, PROMPTS, Noted, make_colocated, tiny_model

EOS = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    for name in ("tied", "untied"):
        tiny_model(folder / name, tied=name == "tied")
    return folder


def launch(folder, job, world):
    done = command("tests/workers.py", job, folder, ranks=world, env={"PYTHONHASHSEED": str(world)})
    assert done.returncode == 0, done.stderr[-4000:]
    paths = [folder / f"{job}-{world}-{rank}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.fixture(scope="module")
def seen(folder):
    """[what one rank saw, what two saw]; the two programs run at the same time."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [(folder, "engine_one", 1), (folder, "engine_two", 2)]
        return list(pool.map(lambda job: launch(*job), jobs))


@pytest.fixture(scope="module")
def one(seen):
    return seen[0][0]


@pytest.fixture(scope="module")
def two(seen):
    """[rank 0, rank 1], each {tp: what it saw}."""
    return seen[1]


def same(responses, others, tolerance=0.0):
    return len(responses) == len(others) and all(
        torch.equal(a["response"], b["response"])
        and a["truncated"] == b["truncated"]
        and (a["logp_sampler"] - b["logp_sampler"]).abs().max() <= tolerance
        for a, b in zip(responses, others)
    )


# ---- weights


def test_weights_arrive(one, two):
    """The comparison can tell the weights of two neighbouring steps apart."""
    for seen in (one["tied"], one["untied"], *(rank[tp] for rank in two for tp in (1, 2))):
        assert seen["gap"] < 1e-4 and seen["gap, updated"] < 1e-4 and seen["gap, stale"] > 1e-3


def test_alarms(one):
    """A failed update: neither the old version nor the failed one can be asked for."""
    seen, norm = one["alarms"], "model.norm.weight"
    assert "version None" in one["before the first update"] and "version 0" in seen["wrong version"]
    culprits = {"missing": norm, "missing head": "lm_head.weight", "unknown": "'extra'"}
    for name, culprit in (culprits | {"unexpected": norm}).items():
        message, *then = seen[name]
        assert culprit in message and all(then)
    assert seen["gap"] < 1e-4  # a right update mends it
    assert "the end" in one["sleeping"]["not consumed"]


def test_order_of_calls_around_sleep(one):
    """Memory for the weights, the weights, then the cache; no wake-up without weights."""
    seen, reload = one["sleeping"], "reload_weights ['a', 'b']"
    wake = ["wake ['weights']", reload, "reset cache", "wake ['kv_cache']", "generate"]
    assert seen["calls"] == ["sleep 2", *wake, "sleep 2", *wake, "sleep 2", *wake]
    for r in seen["responses"]:  # the first log-prob of a position is the sampled token's
        assert r["response"].tolist() == [4] and r["logp_sampler"].tolist() == [-0.5]
    assert "expandable_segments" in seen["nothing freed"]
    assert "older weights" in seen["old blocks"][0] and "version None" in seen["old blocks"][1]
    assert one["put to sleep"] == 1  # the trainer fills the memory before the first update
    assert all("asleep" in message for message in seen["asleep"])


NAN, INF = float("nan"), float("inf")
# fmt: off
BROKEN = [  # tokens, their log-probs, what is said
    ([], [], "0 tokens"), ([4, 5], [-0.5, NAN], "not finite"), ([4, 5], [None, -0.5], "not finite"),
    ([4], [-INF], "not finite"), ([4, 5], [-0.5], "other tokens"),
    ([4], [-0.5, -1], "other tokens"),
]
# fmt: on


def test_less_than_a_whole_response_is_refused(one):
    for tokens, logp, words in BROKEN:
        flat = Has(token_ids=[4, 5, 7][: len(logp)], logprobs=logp)
        flat.start_indices = range(len(logp))
        with pytest.raises(RuntimeError, match=words):
            as_response(Has(token_ids=tokens, logprobs=flat, finish_reason="stop"))
    with pytest.raises(RuntimeError, match="0 log-probs"):
        as_response(Has(token_ids=(4,), logprobs=None, finish_reason="stop"))
    # the first log-prob of each position is of the token that was sampled
    flat = Has(token_ids=[4, 7, 9], logprobs=[-0.5, -0.1, -2.0], start_indices=[0, 2])
    found = as_response(Has(token_ids=(4, 9), logprobs=flat, finish_reason="length"))
    assert found["logp_sampler"].tolist() == [-0.5, -2.0] and found["truncated"]
    assert "RuntimeError" in one["sleeping"]["fewer"]  # 1 response to 2 requests


def test_the_exported_model_in_a_new_engine(one):
    """vLLM on what train.py saved: the log-probs of training; in bfloat16, rounding shows."""
    assert one["exported"]["gap"] < 1e-4 < 1e-3 < one["exported"]["gap, bfloat16"] < 0.3


def test_stop_tokens_end_a_response(one):
    """Besides eos (1) the token 9: part of the response, which does not count as truncated."""
    ends = [r["response"][-1].item() for r in one["exported"]["stopping"]]
    assert ends.count(9) > 2
    for r, end in zip(one["exported"]["stopping"], ends):
        assert not {1, 9} & set(r["response"][:-1].tolist())
        assert r["truncated"] == (end not in (1, 9))


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
    for prompt, r in zip(PROMPTS, one["sampling"]["long"]):  # cut by the engine's 48
        assert r["truncated"] == (r["response"][-1] != EOS)
        assert not r["truncated"] or len(prompt) + len(r["response"]) == 48


def test_a_response_depends_on_its_own_seed_alone(one):
    seen = one["sampling"]
    assert same(seen["whole"], seen["again"]) and sorted(seen["parts"]) == list(range(12))
    assert same(seen["whole"], [seen["parts"][i] for i in range(12)])
    for a, b in zip(seen["whole"][:6], seen["whole"][6:]):  # one prompt, two seeds
        assert not same([a], [b])


def test_number_of_ranks_does_not_matter(one, two):
    whole = one["untied"]["responses"]
    for rank, (tp, tolerance) in itertools.product(two, ((1, 0.0), (2, 1e-4))):
        assert same(whole, rank[tp]["responses"], tolerance)
        assert set(rank[tp]["few"]) == {0, 1, 3}
        for count, responses in rank[tp]["few"].items():
            assert same(responses, whole[:count], tolerance)


def load(one, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float32)
    model.load_state_dict(one["weights"])
    return model


@torch.no_grad()
def test_greedy_is_the_argmax_of_every_step(one, folder):
    model = load(one, folder)
    for prompt, r in zip(PROMPTS, one["sampling"]["greedy"]):
        ids = torch.cat([torch.tensor(prompt), r["response"]])
        best = model(input_ids=ids[None]).logits[0].argmax(-1)
        assert torch.equal(best[len(prompt) - 1 : -1], r["response"])


@torch.no_grad()
def test_samples_follow_the_policy_at_its_temperature(one, folder):
    """Pearson's chi-square of 3,000 first tokens, in standard deviations above its mean."""
    logits = load(one, folder)(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
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


def test_the_trainer_s_surroundings_are_left_alone(one, two):
    """LOCAL_WORLD_SIZE and the thread count."""
    assert one["untouched by Engine"]
    assert one["untied"]["untouched by generate"] and one["tied"]["untouched by generate"]
    for rank, tp in itertools.product(two, (1, 2)):
        assert rank[tp]["untouched by Engine"] and rank[tp]["untouched by generate"]


# ---- seeds


def test_request_seed_is_distinct_and_63_bit(one, two):
    parts = list(itertools.product(range(3), range(20), range(20), range(8)))
    parts += [(1, 11), (11, 1), (1, 1, 1), (111,), ("a",)]
    seeds = {request_seed(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    ones = sum(seed.bit_count() for seed in seeds) / len(seeds)
    assert 31 < ones < 32 and max(seeds).bit_length() == 63  # 63 fair bits
    # the same in processes with other hash seeds
    assert one["seed"] == two[0]["seed"] == two[1]["seed"] == request_seed(0, 1, "a", 3)


# ---- Colocated


def test_colocated_takes_weights_generates_and_sleeps(one, two):
    for seen in (one["colocated"], *(rank[tp]["colocated"] for rank in two for tp in (1, 2))):
        update, generate, sleep = seen["engine"]
        assert update[:3] == ("update", 7, None) and "lm_head.weight" in update[3]
        assert generate[0] == "generate" and generate[3:] == (7, 0.7, LENGTH)
        assert generate[1] == [PROMPTS[i] for i in range(5) for _ in range(6)]
        every = itertools.product(range(17, 22), range(6))
        assert generate[2] == [request_seed(5, 7, index, i) for index, i in every]
        assert sleep == ("sleep",) and seen["writer"] is None
        # an evaluation: the weights of now, whatever is asked of the engine, sleep
        assert [call[:2] for call in seen["evaluation"]] == [("update", 8), ("sleep",)]
        assert seen["evaluated"] is True


def test_colocated_gives_groups_of_judged_samples(one):
    groups, tokenizer = one["colocated"]["groups"], make_tokenizer()
    ((name, items),) = one["colocated"]["judge"]
    assert name == "submit" and [len(group) for group in groups] == [6] * 5
    whole = []  # what was cut is not even judged
    for i, group in enumerate(groups):
        assert len({tuple(s.response.tolist()) for s in group}) > 1
        for s in group:
            assert (s.version, s.prompt_index, s.answer) == (7, 17 + i, str(i))
            assert s.prompt.tolist() == PROMPTS[i] and s.prompt.dtype == torch.int64
            assert s.logp_behavior is None and s.logp_base is None
            verdict = (0.0, "truncated") if s.truncated else (i % 2, None)
            assert (s.reward, s.reason) == verdict
            text = tokenizer.decode(s.response, skip_special_tokens=True)
            whole += [] if s.truncated else [(text, str(i), "hash")]
    assert items == whole and {s.truncated for group in groups for s in group} == {True, False}


def alike(groups, others, tolerance=0.0):
    """Groups of Samples that are equal, tokens to the last, log-probs to `tolerance`."""
    for a, b in zip(itertools.chain(*groups), itertools.chain(*others), strict=True):
        for field in fields(Sample):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, torch.Tensor):
                torch.testing.assert_close(x, y, rtol=0, atol=tolerance)
            else:
                assert x == y and type(x) is type(y)
    return [len(group) for group in groups] == [len(group) for group in others]


class Letters:
    """A tokenizer whose ids are characters."""

    chat_template, eos_token_id, added_tokens_decoder = None, EOS, {}

    def __call__(self, text, **_):
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids.tolist()))


def test_what_is_noted_of_a_response(monkeypatch):
    texts = [r"Wait: \boxed{\frac12}.", r"\boxed{\dfrac{1}{2}}", "none", r"Wait, \boxed{7}"]
    verdicts = [(1.0, None), (0.5, None), (0.0, "no_box")]
    judge = Noted(Has(submit=lambda items: Has(result=lambda: verdicts)))
    monkeypatch.setattr(rollout, "deal_out", lambda items, ranks: items)
    monkeypatch.setattr(rollout, "bring_home", lambda mine, count: mine)
    behaviour = make_colocated(None, judge, None, Letters(), style="boxed", reward="mine:exact")
    a, b, c, d = samples = [
        Sample(None, torch.tensor(list(map(ord, text))), None, text == texts[3], 3, 17, "0")
        for text in texts
    ]
    behaviour.verify(samples)
    # a reward of one's own in place of the style; the style says what was said
    assert judge.calls == [("submit", [(text, "0", "mine:exact") for text in texts[:3]])]
    assert [(s.reward, s.reason) for s in samples] == [*verdicts, (0.0, "truncated")]
    assert a.said == b.said == canonical(r"\frac{1}{2}") and c.said is None
    assert [s.reflects for s in samples] == [True, False, False, True]


# ---- records


def recorded(folder):
    """Recorded without engine, judge, task or ranks."""
    return Recorded(Has(replay=folder))


def test_rollouts_are_the_same_on_every_rank_of_any_number_and_in_a_record(one, two, folder):
    """But for rounding: the weights come from an update by as many ranks."""
    groups = one["colocated"]["groups"]
    for rank, tp in itertools.product(two, (1, 2)):
        assert alike(groups, rank[tp]["colocated"]["groups"], 1e-4)
    for seen, name in ((one, "run-1-1"), (two[0][1], "run-2-1"), (two[0][2], "run-2-2")):
        behaviour = recorded(folder / name / "rollouts")
        assert alike(behaviour.rollouts(None, 8, ASKED), seen["colocated"]["groups"])
        assert [p.name for p in behaviour.folder.iterdir()] == ["step_000008.pt"]
    assert behaviour.writer(None) is None and behaviour.evaluate(None, 8, None) is None


HOW = dict(dtype="float32", temperature=1.0, group_size=2)


@pytest.fixture
def run(tmp_path):
    """A run folder with a record of step 3: two groups of two."""
    groups = []
    for index, problem in ASKED[:2]:
        known = dict(version=2, prompt_index=index, answer=problem["answer"], truncated=False)
        prompt, response = torch.tensor(problem["prompt_ids"]), torch.arange(3)
        groups.append([Sample(prompt, response, torch.zeros(3), **known)] * 2)
    write_record(Has(out=tmp_path, **HOW), 3, groups)
    return tmp_path / "rollouts"


def test_a_record_of_other_prompts_is_refused(run):
    a, b, c = ASKED[:3]
    assert len(recorded(run).rollouts(None, 3, [a, b])) == 2
    # fewer, more, another order, position, text
    for asked in ([a], [a, b, c], [b, a], [a, (99, b[1])], [a, (18, c[1])]):
        with pytest.raises(ValueError, match="^--replay: .*step_000003.pt answers other prompts"):
            recorded(run).rollouts(None, 3, asked)


class Harm:
    """Would be run by a careless reader."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


SPOILT = {"harm": [[Harm()]], "shape": {"groups": []}, "names": [[{"x": 1}]], "types": [[3]]}


@pytest.mark.parametrize("how", ["cut", "text", "gone", *SPOILT])
def test_a_record_that_cannot_be_read_is_one_line(run, how):
    path = run / "step_000003.pt"
    whole = path.read_bytes()
    path.unlink()
    if how in SPOILT:
        torch.save(SPOILT[how], path)
    elif how != "gone":
        path.write_bytes(whole[:-200] if how == "cut" else b"two\nlines")
    with pytest.raises(ValueError) as raised:
        recorded(run).rollouts(None, 3, ASKED[:2])
    text = str(raised.value)
    assert "--replay" in text and "step_000003.pt is no record" in text and "\n" not in text


def test_check_record_names_the_first_step_that_is_missing(run):
    with pytest.raises(ValueError, match="no step 1 of the 3 of --steps.*--dump_rollouts"):
        check_record(Has(replay=run, steps=3, **HOW))
    for step in (1, 2):
        write_record(Has(out=run.parent, **HOW), step, [])
    check_record(Has(replay=run, steps=3, **HOW))
    with pytest.raises(ValueError, match="no step 4"):
        check_record(Has(replay=run, steps=4, **HOW))
    for name, other in dict(dtype="bfloat16", temperature=0.6, group_size=4).items():
        with pytest.raises(ValueError, match=f"was recorded with --{name} {HOW[name]}: say so"):
            check_record(Has(replay=run, steps=3, **HOW | {name: other}))
