"""Programs that tests run under torchrun: each does things and saves what it saw, tests judge it.

torchrun … tests/workers.py NAME FOLDER   # -> FOLDER/NAME-WORLD-RANK.pt, a dict
"""

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace as Has
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import methods
import train
from buffer import Sample
from infra import checkpoint, ranks
from infra.metrics import Meter
from infra.toy import make_tokenizer
from model import Critic, Learner, Policy, collate
from rollout import Colocated, Engine, request_seed

VOCAB = 67  # rows that two ranks cannot share equally
# of every update() here: samples of version 9 are fresh, λ is 0.7, the rates are halved by warm-up
STEP, LAM, SCALE = 10, 0.7, 0.5
# fmt: off
SETTINGS = dict(
    dtype="float32", mismatch="none", temperature=0.7, micro_tokens=12, max_response=9,
    lr=1e-2, critic_lr=3e-2, warmup=STEP / SCALE, weight_decay=0.1, adam_beta2=0.95, grad_clip=0.05,
    lambda_start=0, lambda_every=1, lambda_floor=LAM, beta=0.1, entropy=0.02,
    clip_low=0.2, clip_high=0.3,
)
# What one train.update does: name -> (model, samples used, settings)
GROUP = dict(advantage="group", beta=0.0)  # no critic, no base, no precedent
UPDATES = {
    "ppo": ("tied", 7, {}),
    "ppo, one micro-batch": ("tied", 7, dict(micro_tokens=10_000)),
    "grpo": ("untied", 7, GROUP | dict(aggregate="sequence")),
    "constant": ("untied", 7, dict(  # without precedent
        advantage="group", lambda_floor=1.0, aggregate="constant", grad_clip=100.0,
        activation_checkpointing=True)),
    "decoupled": ("untied", 7, GROUP | dict(
        objective="ppo", correct="truncated", correct_high=1.2, mismatch="truncated",
        mismatch_high=1.1)),
    "in host memory, HSDP": ("tied", 7, dict(offload_optimizer=True, hsdp=True)),
    "one sample": ("tied", 1, {}),  # a second rank has nothing to do
}
# fmt: on
ROWS = [4, 0, 6, 2, 5, 1, 3]  # of the batch, as a shuffled minibatch has them


def tiny_model(folder, tied):
    """A random Qwen2 whose distributions are far from uniform, and the toy's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(int(tied))
    # fmt: off
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.15, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0,
        bos_token_id=None,
    )
    # fmt: on
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def config(**changes):
    cfg = methods.parse(["--out", "nowhere"])
    for name, value in (SETTINGS | changes).items():
        assert hasattr(cfg, name), name
        setattr(cfg, name, value)
    return cfg


def value_weight(size):
    return torch.linspace(-0.3, 0.3, size)[None]  # (1, H)


def full(tensors):
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors}


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.full_tensors()}


def local(tensors):
    return [t.to_local().detach().clone() for t in tensors]


def build(folder, model, cfg, me, critic=False):
    """The learners, as train.py makes them."""
    Policy.chunk_tokens = 5
    policy = Policy(folder / model, cfg.temperature, empty=not me.first)
    learners = {"policy": Learner(policy, cfg.lr, cfg, me)}
    if critic:
        module = Critic(folder / model, empty=not me.first)
        if me.first:  # at 0 the backbone has no gradient
            module.value.weight.data.copy_(value_weight(module.value.in_features))
        learners["critic"] = Learner(module, cfg.critic_lr, cfg, me)
    return learners


def update(learners, batch, cfg, rows=ROWS):
    """(norms, means) of one train.update."""
    method, meter = methods.Method(cfg), Meter()
    norms = train.update(learners, batch, rows, method, method.plan(STEP), meter)
    return norms, meter.gathered()[0]


def load_batch(folder, model):
    return torch.load(folder / f"batch-{model}.pt", weights_only=False)


def watch(learner):
    """A dict that the learner's next step() fills: gradients, norm, parameters before and after."""
    found, named, original = {}, list(learner.module.named_parameters()), learner.step

    def step(scale):
        found.update(grads=full((name, p.grad) for name, p in named), before=full(named))
        found.update(norm=original(scale), after=full(named))
        return found["norm"]

    learner.step = step
    return found


def updates(folder, me):
    """Gradients and parameters of one train.update in each of UPDATES."""
    seen = {}
    for case, (model, count, changes) in UPDATES.items():
        cfg, found = config(**changes), {}
        # HSDP: as if each rank were on a node of its own
        where = dataclasses.replace(me, local_world=1 if cfg.hsdp else me.world)
        learners = build(folder, model, cfg, where, critic=cfg.advantage == "gae")
        batch, rows = load_batch(folder, model), ROWS[:count]
        for name, learner in learners.items():
            found[name] = watch(learner)
        _, found["means"] = update(learners, batch, cfg, rows)
        root = learners["policy"].module
        offload = root._get_fsdp_state()._fsdp_param_group.offload_policy
        found["layout"] = str(next(root.parameters()).placements), type(offload).__name__
        found["micro_batches"] = learners["policy"].micro_batches([batch.samples[i] for i in rows])
        seen[case] = found
    return seen


def state_of(learner):
    """Parameters and the optimiser's state, unsharded, read past the code under test."""
    state = full(learner.module.named_parameters())
    for name, p in learner.module.named_parameters():
        for moment, value in learner.optimizer.state.get(p, {}).items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[f"{name}/{moment}"] = whole.clone()
    return state


def broken_update(folder, me):
    """State and norms after updates of which some are not finite, in one sample, which one rank
    has: its gradient, its loss alone (k3 is inf, its slope 1), its returns."""

    def batch(column=None, factor=1.0):
        found = load_batch(folder, "tied")
        if column:
            found[column][2] = found[column][2].abs() * factor
        return found

    inf, cfg, seen = float("inf"), config(micro_tokens=10_000), {}
    gradient, loss = batch("advantages", inf), batch("logp_base", -inf)
    for case, batches in {
        "usual": [batch(), batch()],
        "broken": [gradient, batch(), loss, gradient, batch()],
        "critic": [batch(), batch("returns", float("nan"))],
    }.items():
        learners, seen[case] = build(folder, "tied", cfg, me, critic=True), []
        for each in batches:
            norms, means = update(learners, each, cfg)
            states = {name: state_of(learner) for name, learner in learners.items()}
            seen[case].append((states, norms, means))
    return seen


def snapshots(folder, me):
    """Log-probs under the policy, its base and its precedent, with a forward before every swap."""
    seen, cfg = {}, config(micro_tokens=20)
    for model in ("tied", "untied"):
        batch = load_batch(folder, model)
        samples = batch.samples
        learners = build(folder, model, cfg, me)
        policy, found = learners["policy"], {}
        held = {"base": policy.snapshot()}
        found["base_weights"] = weights(policy)
        update(learners, batch, cfg)
        held["prev"] = policy.snapshot()
        found["prev_weights"] = weights(policy)
        update(learners, batch, cfg)
        found["now_weights"] = weights(policy)
        found["names"] = policy.names
        shards = policy.module.lm.named_parameters()
        found["shards"] = {name: p.to_local().clone() for name, p in shards}
        frozen, shards = map(local, (held["base"] + held["prev"], policy.module.parameters()))
        found["now"] = policy.predict(samples)
        for name, snapshot in held.items():
            policy.predict(samples)
            with policy.swapped(snapshot):
                found[name] = policy.predict(samples)
                policy.predict(samples)
            found[name + "_after"] = policy.predict(samples)
            policy.module.unshard()  # as a forward without reshard leaves it
            with policy.swapped(snapshot):
                found[name + "_unsharded"] = policy.predict(samples)
        try:
            with policy.swapped(held["base"]):
                raise KeyError("inside")
        except KeyError:
            pass
        found["shards_kept"] = all(map(torch.equal, shards, local(policy.module.parameters())))
        found["frozen_kept"] = all(map(torch.equal, frozen, local(held["base"] + held["prev"])))
        found["nothing"] = policy.predict([])
        for _ in range(2):  # the second over the first
            export(folder, model, policy, f"exported-{model}-{me.world}", me)
        seen[model] = found
    return seen


def export(folder, model, policy, name, me):
    source = folder / model
    checkpoint.export(folder / name, source, policy, make_tokenizer(), policy.cfg, me)


def exported_in_bfloat16(folder, me):
    """A policy that computes in bfloat16, after an update: its log-probs and its masters."""
    cfg, batch = config(dtype="bfloat16", micro_tokens=10_000), load_batch(folder, "tied")
    learners = build(folder, "tied", cfg, me)
    update(learners, batch, cfg)
    policy = learners["policy"]
    export(folder, "tied", policy, f"exported-bfloat16-{me.world}", me)
    masters = full(policy.module.lm.named_parameters())
    return dict(logp=policy.predict(batch.samples), masters=masters)


def learner(folder, me):
    jobs = updates, broken_update, snapshots, exported_in_bfloat16
    return {job.__name__: job(folder, me) for job in jobs}


# The real vLLM engine


PROMPTS = [[5, 9, 12], [2], [40, 3, 3, 8, 66], [7, 7], [30, 31, 32], [9, 4, 2, 6, 8, 10]] * 2
SEEDS = [request_seed(0, "test", i) for i in range(len(PROMPTS))]
LENGTH = 24  # longest response (tokens)
CHANGES = dict(temperature=0.7, lr=1e-3, warmup=0, tp=1)


def ask(engine, chosen, version=0, temperature=0.7, length=LENGTH):
    prompts, seeds = zip(*((PROMPTS[i], SEEDS[i]) for i in chosen)) if chosen else ([], [])
    return engine.generate(list(prompts), list(seeds), version, temperature, length)


def refused(job):
    """What job() raised, as text; None where it did not. ValueError: vLLM's, or of a strict zip."""
    try:
        job()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def as_samples(responses, chosen):
    prompts = [torch.tensor(PROMPTS[i]) for i in chosen]
    known = dict(version=0, prompt_index=0, answer="")
    return [Sample(prompt=prompt, **known, **r) for prompt, r in zip(prompts, responses)]


def gap(policy, responses, chosen):
    """Largest |trainer - sampler| of the log-probs."""
    trainer = policy.predict(as_samples(responses, chosen))
    return max((a - r["logp_sampler"]).abs().max().item() for a, r in zip(trainer, responses))


def surroundings():
    """What the trainer relies on and an engine must leave alone."""
    return os.environ["LOCAL_WORLD_SIZE"], torch.get_num_threads()


def make_engine(folder, model, tp, me):
    """An engine that has the policy's weights as version 0, the policy, and what happened."""
    cfg, seen = config(**CHANGES | dict(tp=tp)), {}
    before = surroundings()
    with mock.patch.object(Engine, "sleep", autospec=True, side_effect=Engine.sleep) as sleep:
        engine = Engine(str(folder / model), 48, cfg, me)
    seen["put to sleep"] = sleep.call_count
    seen["untouched by Engine"] = before == surroundings()
    seen["before the first update"] = refused(lambda: ask(engine, [0]))
    policy = build(folder, model, cfg, me)["policy"]
    engine.update(0, policy.full_tensors(), policy.names)
    return engine, policy, seen


def learn(policy, responses, chosen):
    """One optimiser step on the responses."""
    samples = as_samples(responses, chosen)
    for indices in policy.micro_batches(samples):
        inputs = collate([samples[i] for i in indices], policy.ranks.device)
        policy.backward(policy.module(**inputs)["logp"].sum() / 100)
    policy.step(1.0)


def weights_arrive(engine, policy):
    """Gaps before and after a training step, before and after the update that follows it."""
    every, seen = range(len(PROMPTS)), {}
    before = surroundings()
    seen["responses"] = ask(engine, every)
    seen["untouched by generate"] = before == surroundings()
    seen["gap"] = gap(policy, seen["responses"], every)
    learn(policy, seen["responses"], every)
    seen["gap, stale"] = gap(policy, ask(engine, every), every)
    engine.update(0, iter([("never", "read")]), policy.names)  # awake and current: nothing to do
    engine.update(1, policy.full_tensors(), policy.names)
    seen["gap, updated"] = gap(policy, ask(engine, every, version=1), every)
    return seen


def alarms(engine, policy):
    """What must raise; at the end the engine is right again, at version 3."""
    norm, head, names = "model.norm.weight", "lm_head.weight", policy.names

    def tensors(drop=None, **added):
        return {name: t for name, t in weights(policy).items() if name != drop} | added

    seen = {"wrong version": refused(lambda: ask(engine, [0], version=0))}
    for name, found, expected in (
        ("missing", tensors(norm), names),
        ("missing head", tensors(head), names),
        ("unknown", tensors(**{"model.extra.weight": torch.zeros(1)}), names),
        ("unexpected", tensors(), names - {norm}),
    ):
        seen[name] = [refused(lambda f=found, e=expected: engine.update(2, iter(f.items()), e))]
        seen[name] += [refused(lambda v=version: ask(engine, [0], version=v)) for version in (1, 2)]
    engine.update(3, policy.full_tensors(), policy.names)
    seen["gap"] = gap(policy, ask(engine, range(4), version=3), range(4))
    return seen


# log-probs of two tokens at one position, the sampled one first
FLAT = Has(token_ids=[4, 7], logprobs=[-0.5, -0.1], start_indices=[0])
ANSWER = Has(token_ids=(4,), logprobs=FLAT, finish_reason="stop")


class RecordingLLM:
    """vLLM's interface as the engine uses it: notes the calls, answers each request."""

    def __init__(self, take=None, clean=True, answers=None):
        self.calls, self.take, self.clean, self.answers = [], take, clean, answers

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def reset_prefix_cache(self):
        self.calls.append("reset cache")
        return self.clean

    def collective_rpc(self, method, kwargs):
        taken = itertools.islice(kwargs["weights_iterator"], self.take)
        self.calls.append(f"{method} {[name for name, _ in taken]}")

    def generate(self, requests, parameters, use_tqdm):
        self.calls.append("generate")
        return [Has(outputs=[ANSWER])] * (len(requests) if self.answers is None else self.answers)


def sleeping(engine):
    """Order of calls around a sleep, as on a GPU."""
    real, seen = (engine.llm, engine.sleeps), {}
    pairs = [("a", torch.zeros(1)), ("b", torch.zeros(1))]

    def update(version, expected=("a", "b")):
        engine.update(version, iter(pairs), set(expected))

    more_each_time = ((free << 21, 80 << 30) for free in itertools.count(1))
    with mock.patch.object(torch.cuda, "mem_get_info", lambda: next(more_each_time)):
        engine.llm, engine.sleeps = RecordingLLM(), True
        engine.sleep()  # what its constructor does where a trainer follows
        for version in (4, 5):
            update(version)
            seen["responses"] = ask(engine, [0, 1], version=version)
            engine.sleep()
        seen["asleep"] = [refused(lambda v=v: ask(engine, [0], version=v)) for v in (4, 5, None)]
        update(5)  # the version is the same, the weights were dropped
        ask(engine, [0], version=5)
        seen["calls"] = list(engine.llm.calls)
    with mock.patch.object(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30)):
        seen["nothing freed"] = refused(engine.sleep)
    engine.llm = RecordingLLM(clean=False)
    seen["old blocks"] = [refused(lambda: update(6)), refused(lambda: ask(engine, [0], version=6))]
    engine.llm = RecordingLLM(answers=1)
    update(7)
    seen["fewer"] = refused(lambda: ask(engine, [0, 1], version=7))
    engine.llm = RecordingLLM(take=1)
    seen["not consumed"] = refused(lambda: update(6, "a"))
    engine.llm, engine.sleeps = real
    return seen


def sampling(engine):
    """Version 3: orders and compositions of the batch, greedy, a long request, first tokens."""
    seen = {"whole": ask(engine, range(12), 3), "again": ask(engine, range(12), 3)}
    parts = [7, 2, 11], [4], [0, 1, 10, 9], [8, 3, 6, 5]
    seen["parts"] = {i: r for part in parts for i, r in zip(part, ask(engine, part, 3))}
    seen["greedy"] = ask(engine, range(6), 3, temperature=0.0)
    seen["long"] = ask(engine, range(6), 3, length=60_000)
    seeds = [request_seed(1, i) for i in range(3000)]
    first = engine.generate([PROMPTS[0]] * len(seeds), seeds, 3, 0.7, 1)
    seen["first"] = [r["response"].item() for r in first]
    return seen


def exported(folder, policy, me):
    """Gap between the trained policy and vLLM on the model it was saved as; then in bfloat16."""
    export(folder, "tied", policy, "exported", me)
    seen, every = {}, range(len(PROMPTS))

    def fresh(stop=(), **changes):
        cfg = config(**CHANGES | changes)
        return ask(Engine(str(folder / "exported"), 48, cfg, me, version=0, stop=stop), every)

    seen["gap"] = gap(policy, fresh(), every)
    seen["gap, bfloat16"] = gap(policy, fresh(dtype="bfloat16"), every)
    seen["stopping"] = fresh(stop=[9])
    return seen


# The behaviour around it: positions in the stream of prompts, and their problems
ASKED = [(17 + i, dict(prompt_ids=PROMPTS[i], answer=str(i))) for i in range(5)]


class Noted:
    """Passes all on to an object, and notes the calls."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __getattr__(self, name):
        def call(*args):
            values = [None if hasattr(value, "send") else value for value in args]
            self.calls.append((name, *values))
            return getattr(self.inner, name)(*args)

        return call


def verdicts(items):
    """A judge's answer, by the answer alone."""
    found = [(float(answer) % 2, None) for _, answer, _ in items]
    return Has(result=lambda: found)


def make_colocated(engine, judge, me, tokenizer=None, **changes):
    """A Colocated whose engine is this one."""
    cfg = config(**CHANGES | dict(max_response=LENGTH, seed=5, group_size=6) | changes)
    task = Has(folder="", tokenizer=tokenizer or make_tokenizer())
    with mock.patch("rollout.Engine", return_value=engine):
        return Colocated(cfg, task, judge, me)


def colocated(folder, engine, policy, me, **how):
    """The rollouts of step 8, an evaluation of version 8, and what engine and judge were asked."""
    judge, noted = Noted(Has(submit=verdicts)), Noted(engine)
    how |= dict(style="hash", dump_rollouts=True, out=folder / f"run-{me.world}-{engine.tp}")
    behaviour = make_colocated(noted, judge, me, **how)
    groups = behaviour.rollouts(policy, 8, ASKED)
    seen = {"groups": groups, "engine": list(noted.calls), "judge": list(judge.calls)}
    noted.calls.clear()
    seen["evaluated"] = behaviour.evaluate(policy, 8, lambda *given: given == (noted, judge))
    seen["evaluation"], seen["writer"] = noted.calls, behaviour.writer(policy)
    return seen


def engine_one(folder, me):
    """One rank: everything that needs no second one."""
    engine, policy, seen = make_engine(folder, "untied", 1, me)
    seen["untied"], seen["alarms"] = weights_arrive(engine, policy), alarms(engine, policy)
    seen["sampling"], seen["weights"] = sampling(engine), weights(policy)
    seen["sleeping"], seen["seed"] = sleeping(engine), request_seed(0, 1, "a", 3)
    seen["colocated"] = colocated(folder, engine, policy, me)
    engine, policy, _ = make_engine(folder, "tied", 1, me)
    seen["tied"] = weights_arrive(engine, policy)
    seen["exported"] = exported(folder, policy, me)
    return seen


def engine_two(folder, me):
    """Two ranks as two engines, then as one (tensor-parallel): the same requests, and fewer."""
    seen = {"seed": request_seed(0, 1, "a", 3)}
    for tp in (1, 2):
        engine, policy, found = make_engine(folder, "untied", tp, me)
        found["few"] = {count: ask(engine, range(count)) for count in (0, 1, 3)}
        seen[tp] = found | weights_arrive(engine, policy)
        seen[tp]["colocated"] = colocated(folder, engine, policy, me, tp=tp)
        import vllm  # only now: the engine sets vLLM's environment before

        vllm.distributed.destroy_model_parallel()  # so that vLLM can lay out the ranks anew
    return seen


JOBS = {job.__name__: job for job in (learner, engine_one, engine_two)}


def main(name, folder):
    me, folder = ranks.start(threads=1), Path(folder)
    torch.save(JOBS[name](folder, me), folder / f"{name}-{me.world}-{me.rank}.pt")
    ranks.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
