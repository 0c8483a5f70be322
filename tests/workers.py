"""Programs that the tests run under torchrun: each does things and saves what it saw; the tests judge it.

torchrun … tests/workers.py NAME FOLDER   # -> FOLDER/NAME-WORLD-RANK.pt, a dict
"""

import dataclasses
import itertools
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace as Has

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist

import train
from infra import checkpoint
from infra.config import parse
from infra.metrics import Meter
from infra.ranks import start
from infra.toy import make_tokenizer
from model import Critic, Learner, Policy, collate
from rollout import Engine, request_seed

LAM, VERSION = 0.7, 3  # of every update() here: samples of version 3 are fresh
VOCAB = 67  # rows that two ranks cannot share equally


def tiny_model(folder, tied):
    """A random Qwen2 whose distributions are far from uniform, and the toy's tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(int(tied))
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            initializer_range=0.15,
            tie_word_embeddings=tied,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def config(**changes):
    cfg = parse([])
    values = dict(
        dtype="float32",
        rollout_dtype="float32",
        temperature=0.7,
        chunk_tokens=5,
        micro_tokens=12,
        lr=1e-2,
        critic_lr=3e-2,
        weight_decay=0.1,
        adam_beta2=0.95,
        grad_clip=0.05,
        beta=0.1,
        entropy=0.02,
        aggregate="token",
        max_response=9,
        kl_estimator="k3",
        value_clip=0.5,
        clip_low=0.2,
        clip_high=0.3,
    )
    for name, value in (values | changes).items():
        assert hasattr(cfg, name), name
        setattr(cfg, name, value)
    return cfg


def value_weight(size):
    return torch.linspace(-0.3, 0.3, size)[None]  # (1, H)


def full(tensors):
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors}


def weights(policy):
    return {name: tensor.clone() for name, tensor in policy.full_tensors()}


def local(learner):
    return [p.to_local().detach().clone() for p in learner.module.parameters()]


def build(folder, model, cfg, ranks, critic=False):
    policy = Policy(
        folder / model, cfg.temperature, cfg.chunk_tokens, empty=not ranks.first
    )  # as train.py does
    learners = {"policy": Learner(policy, cfg.lr, cfg, ranks)}
    if critic:
        module = Critic(folder / model, empty=not ranks.first)
        if ranks.first:  # who has the weights
            module.value.weight.data.copy_(
                value_weight(module.value.in_features)
            )  # at 0 the backbone has no gradient
        learners["critic"] = Learner(module, cfg.critic_lr, cfg, ranks)
    return learners


def state_of(learners, snapshots=()):
    """Everything that a checkpoint must bring back, unsharded, read past the code under test."""
    state = {}
    for name, learner in learners.items():
        state[name] = full(learner.module.named_parameters())
        for key, p in learner.module.named_parameters():
            for moment, value in learner.optimizer.state[p].items():
                whole = value.full_tensor() if hasattr(value, "full_tensor") else value
                state[name][f"{key}/{moment}"] = whole.clone()
        state[name]["lr"] = torch.tensor([group["lr"] for group in learner.optimizer.param_groups])
    for name, snapshot in dict(snapshots).items():
        state[name] = full(zip(map(str, range(len(snapshot))), snapshot))
    return state


# What one train.update does: name -> (model, critic, samples used, config)
UPDATES = {
    "ppo": ("tied", True, 7, {}),
    "ppo, one micro-batch": ("tied", True, 7, dict(micro_tokens=10_000)),
    "grpo": ("untied", False, 7, dict(aggregate="sequence", beta=0.0)),
    "constant": (
        "untied",
        False,
        7,
        dict(aggregate="constant", grad_clip=100.0, activation_checkpointing=True),
    ),
    "in host memory, HSDP": ("tied", True, 7, dict(offload_optimizer=True, hsdp=True)),
    "one sample": ("tied", True, 1, {}),  # a second rank has nothing to do
}


def watch(learner):
    """A dict that the learner's next step() fills: gradients, their norm, parameters before and after."""
    found, named, original = {}, list(learner.module.named_parameters()), learner.step

    def step(scale):
        found.update(grads=full((name, p.grad) for name, p in named), before=full(named))
        found.update(norm=original(scale), after=full(named))
        return found["norm"]

    learner.step = step
    return found


def updates(folder, ranks):
    """Gradients and parameters of one train.update in each of UPDATES."""
    seen = {}
    for case, (model, critic, count, changes) in UPDATES.items():
        cfg, meter, found = config(**changes), Meter(), {}
        found["nodes"] = (
            2 if cfg.hsdp and ranks.world == 2 else 1
        )  # HSDP: as if each rank were on a node of its own
        learners = build(
            folder,
            model,
            cfg,
            dataclasses.replace(ranks, local_world=ranks.world // found["nodes"]),
            critic,
        )
        used = torch.load(folder / f"samples-{model}.pt")[:count]
        if cfg.beta == 0:
            used = [
                {key: value for key, value in s.items() if key not in ("logp_base", "logp_prev")}
                for s in used
            ]
        for name, learner in learners.items():
            found[name] = watch(learner)
        train.update(learners, used, LAM, VERSION, 0.5, meter, cfg)
        found["means"] = meter.gathered()[0]
        root = learners["policy"].module
        found["layout"] = (
            str(next(root.parameters()).placements),
            type(root._get_fsdp_state()._fsdp_param_group.offload_policy).__name__,
        )
        found["micro_batches"] = learners["policy"].my_micro_batches(used)
        seen[case] = found
    return seen


def broken_update(folder, ranks):
    """State and norms after updates of which some are not finite, in one sample, which one rank has: its gradient, its loss alone, its returns."""
    usual, (gradient, loss, returns) = (
        torch.load(folder / "samples-tied.pt"),
        ([dict(s) for s in torch.load(folder / "samples-tied.pt")] for _ in range(3)),
    )
    gradient[2]["advantages"] = gradient[2]["advantages"] * float("inf")
    loss[2]["logp_base"] = torch.full_like(
        loss[2]["logp_base"], -float("inf")
    )  # k3 = inf, its slope 1
    returns[2]["returns"] = returns[2]["returns"] * float("nan")  # the critic's alone
    cfg, seen = config(micro_tokens=10_000), {}
    for case, batches in {
        "usual": [usual, usual],
        "broken": [gradient, usual, loss, gradient, usual],
        "critic": [usual, returns],
    }.items():
        learners, seen[case] = build(folder, "tied", cfg, ranks, critic=True), []
        for batch in batches:
            meter = Meter()
            norms = train.update(learners, batch, LAM, VERSION, 1.0, meter, cfg)
            states = {
                name: state_of({name: learner})[name]
                if learner.optimizer.state
                else full(learner.module.named_parameters())
                for name, learner in learners.items()
            }
            seen[case].append((states, norms, meter.gathered()[0]))
    return seen


def snapshots(folder, ranks):
    """Log-probs under the policy, its base and its precedent, with a forward before every swap."""
    seen, cfg = {}, config(micro_tokens=20)
    for model in ("tied", "untied"):
        samples = torch.load(folder / f"samples-{model}.pt")
        learners = build(folder, model, cfg, ranks)
        policy, found = learners["policy"], {}
        held = {"base": policy.snapshot()}
        found["base_weights"] = weights(policy)
        train.update(learners, samples, LAM, VERSION, 1.0, Meter(), cfg)
        held["prev"] = policy.snapshot()
        found["prev_weights"] = weights(policy)
        train.update(learners, samples, LAM, VERSION, 1.0, Meter(), cfg)
        found["now_weights"] = weights(policy)
        found["names"] = policy.names
        found["shards"] = {
            name: p.to_local().clone() for name, p in policy.module.lm.named_parameters()
        }
        frozen, shards = (
            {name: [t.to_local().clone() for t in s] for name, s in held.items()},
            local(policy),
        )
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
        found["shards_kept"] = all(map(torch.equal, shards, local(policy)))
        found["frozen_kept"] = all(
            torch.equal(a, b.to_local()) for n in held for a, b in zip(frozen[n], held[n])
        )
        found["nothing"] = policy.predict([])
        for _ in range(2):  # the second over the first
            checkpoint.export(
                folder / f"exported-{model}-{ranks.world}",
                folder / model,
                policy,
                make_tokenizer(),
                cfg,
                ranks,
            )
        seen[model] = found
    return seen


def exported_in_bfloat16(folder, ranks):
    """The policy computing in bfloat16 after an update, its log-probs, and the model that it was saved as."""
    samples, cfg = (
        torch.load(folder / "samples-tied.pt"),
        config(dtype="bfloat16", micro_tokens=10_000),
    )
    learners = build(folder, "tied", cfg, ranks)
    train.update(learners, samples, LAM, VERSION, 1.0, Meter(), cfg)
    checkpoint.export(
        folder / f"exported-bfloat16-{ranks.world}",
        folder / "tied",
        learners["policy"],
        make_tokenizer(),
        cfg,
        ranks,
    )
    masters = full(learners["policy"].module.lm.named_parameters())
    return dict(logp=learners["policy"].predict(samples), masters=masters)


def learner(folder, ranks):
    return {
        job.__name__: job(folder, ranks)
        for job in (updates, broken_update, snapshots, exported_in_bfloat16)
    }


# The real vLLM engine


PROMPTS = [[5, 9, 12], [2], [40, 3, 3, 8, 66], [7, 7], [30, 31, 32], [9, 4, 2, 6, 8, 10]] * 2
SEEDS = [request_seed(0, "test", i) for i in range(len(PROMPTS))]
LENGTH = 24  # longest response (tokens)
CHANGES = dict(temperature=0.7, lr=1e-3, tp=1)


def ask(engine, chosen, version=0, temperature=0.7, length=LENGTH):
    return engine.generate(
        [PROMPTS[i] for i in chosen], [SEEDS[i] for i in chosen], version, temperature, length
    )


def refused(job):
    """The message of the RuntimeError that job() must raise; None where it does not."""
    try:
        job()
    except RuntimeError as error:
        return str(error)


def gap(policy, responses, chosen):
    """Largest |trainer - sampler| of the log-probs."""
    trainer = policy.predict(
        [dict(r, prompt=torch.tensor(PROMPTS[i])) for i, r in zip(chosen, responses)]
    )
    return max((a - r["logp_sampler"]).abs().max().item() for a, r in zip(trainer, responses))


def generators():
    _, keys, position, *_ = np.random.get_state()
    return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()


def make_engine(folder, model, tp, ranks):
    """An engine that has the policy's weights as version 0, the policy, and what happened on the way."""
    cfg, seen = config(**CHANGES | dict(tp=tp)), {}
    before = generators(), os.environ["LOCAL_WORLD_SIZE"], torch.get_num_threads()
    sleep, seen["put to sleep"] = Engine.sleep, 0

    def counted(engine):
        seen["put to sleep"] += 1
        sleep(engine)

    Engine.sleep = counted
    engine = Engine(str(folder / model), 48, cfg, ranks)
    Engine.sleep = sleep
    seen["untouched by Engine"] = before == (
        generators(),
        os.environ["LOCAL_WORLD_SIZE"],
        torch.get_num_threads(),
    )
    seen["before the first update"] = refused(lambda: ask(engine, [0]))
    policy = build(folder, model, cfg, ranks)["policy"]
    engine.update(0, policy.full_tensors(), policy.names)
    return engine, policy, seen


def learn(policy, responses, chosen):
    """One optimiser step on the responses."""
    samples = [dict(r, prompt=torch.tensor(PROMPTS[i])) for i, r in zip(chosen, responses)]
    for indices in policy.my_micro_batches(samples):
        logp, _ = policy.module(**collate([samples[i] for i in indices], policy.ranks.device)[0])
        policy.backward(logp.sum() / 100)
    policy.step(1.0)


def weights_arrive(engine, policy):
    """Gaps before and after a training step, before and after the update that follows it."""
    every, seen = range(len(PROMPTS)), {}
    before = generators()
    seen["responses"] = ask(engine, every)
    seen["untouched by generate"] = before == generators()
    seen["gap"] = gap(policy, seen["responses"], every)
    learn(policy, seen["responses"], every)
    seen["gap, stale"] = gap(policy, ask(engine, every), every)
    engine.update(0, iter([("never", "read")]), policy.names)  # awake and current: nothing to do
    engine.update(1, policy.full_tensors(), policy.names)
    seen["gap, updated"] = gap(policy, ask(engine, every, version=1), every)
    return seen


def alarms(engine, policy):
    """What must raise; at the end the engine is right again, at version 3."""

    def tensors(drop=None, add=None):
        found = [(name, tensor.clone()) for name, tensor in policy.full_tensors() if name != drop]
        return found + ([(add, torch.zeros(1))] if add else [])

    seen = {"wrong version": refused(lambda: ask(engine, [0], version=0))}
    norm = "model.norm.weight"
    for name, found, expected in (
        ("missing", tensors(drop=norm), policy.names),
        ("missing head", tensors(drop="lm_head.weight"), policy.names),
        ("unknown", tensors(add="model.extra.weight"), policy.names),
        ("unexpected", tensors(), policy.names - {norm}),
    ):
        seen[name] = refused(lambda: engine.update(2, iter(found), expected))
        seen[name + ", then"] = [
            refused(lambda: ask(engine, [0], version=version)) for version in (1, 2)
        ]
    engine.update(3, policy.full_tensors(), policy.names)
    seen["gap"] = gap(policy, ask(engine, range(4), version=3), range(4))
    return seen


def completion(tokens, logp):
    flat = Has(
        token_ids=[*tokens, 7], logprobs=[*logp, -0.1], start_indices=list(range(len(tokens)))
    )
    return Has(token_ids=tuple(tokens), logprobs=flat, finish_reason="stop")


ANSWER = completion([4], [-0.5])
BROKEN_ANSWERS = {
    "fewer": lambda requests: [ANSWER] * (len(requests) - 1),
    "none": lambda requests: [],
    "empty": lambda requests: [ANSWER, completion([], [])],
    "NaN": lambda requests: [ANSWER, completion([4, 5], [-0.5, float("nan")])],
    "null": lambda requests: [ANSWER, completion([4, 5], [None, -0.5])],
    "infinite": lambda requests: [completion([4], [-float("inf")]), ANSWER],
    "absent": lambda requests: [ANSWER, Has(token_ids=(4,), logprobs=None, finish_reason="stop")],
}


class RecordingLLM:
    """vLLM's interface as the engine uses it: notes the calls, answers each request with one token."""

    def __init__(self, take=None, clean=True, answers=None):
        self.calls, self.take, self.clean, self.answers = (
            [],
            take,
            clean,
            answers or (lambda requests: [ANSWER] * len(requests)),
        )

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags):
        self.calls.append(f"wake {tags}")

    def reset_prefix_cache(self):
        self.calls.append("reset cache")
        return self.clean

    def collective_rpc(self, method, kwargs):
        self.calls.append(
            f"{method} {[name for name, _ in itertools.islice(kwargs['weights_iterator'], self.take)]}"
        )

    def generate(self, requests, parameters, use_tqdm):
        self.calls.append("generate")
        return [Has(outputs=[answer]) for answer in self.answers(requests)]


def sleeping(engine):
    """Order of calls around a sleep, as on a GPU."""
    real, seen, pairs = (
        (engine.llm, engine.sleeps),
        {},
        [("a", torch.zeros(1)), ("b", torch.zeros(1))],
    )
    memory, real_memory = itertools.count(1 << 30, 1 << 21), torch.cuda.mem_get_info
    torch.cuda.mem_get_info = lambda: (next(memory), 80 << 30)  # more is free each time
    engine.llm, engine.sleeps = RecordingLLM(), True
    engine.sleep()  # what its constructor does where a trainer follows
    for version in (4, 5):
        engine.update(version, iter(pairs), {"a", "b"})
        seen["responses"] = ask(engine, [0, 1], version=version)
        engine.sleep()
    seen["asleep"] = [
        refused(lambda: ask(engine, [0], version=version)) for version in (4, 5, None)
    ]
    engine.update(5, iter(pairs), {"a", "b"})  # the version is the same, the weights were dropped
    ask(engine, [0], version=5)
    seen["calls"] = list(engine.llm.calls)
    torch.cuda.mem_get_info = lambda: (1 << 30, 80 << 30)
    seen["nothing freed"] = refused(engine.sleep)
    torch.cuda.mem_get_info = real_memory
    engine.llm = RecordingLLM(clean=False)
    seen["old blocks"] = (
        refused(lambda: engine.update(6, iter(pairs), {"a", "b"})),
        refused(lambda: ask(engine, [0], version=6)),
    )
    for version, (name, answers) in enumerate(BROKEN_ANSWERS.items(), 100):
        engine.llm = RecordingLLM(answers=answers)
        engine.update(version, iter(pairs), {"a", "b"})
        seen[name] = refused(lambda: ask(engine, [0, 1], version=version))
    engine.llm = RecordingLLM(take=1)
    seen["not consumed"] = refused(lambda: engine.update(6, iter(pairs), {"a"}))
    engine.llm, engine.sleeps = real
    return seen


def sampling(engine):
    """Version 3: orders and compositions of the batch, greedy, a long request with its progress bar, first tokens."""
    seen = {"whole": ask(engine, range(12), 3), "again": ask(engine, range(12), 3)}
    parts = [7, 2, 11], [4], [0, 1, 10, 9], [8, 3, 6, 5]
    seen["parts"] = {i: r for part in parts for i, r in zip(part, ask(engine, part, 3))}
    seen["greedy"] = ask(engine, range(6), 3, temperature=0.0)
    seen["greedy again"] = engine.generate(PROMPTS[:6], list(range(6)), 3, 0.0, LENGTH)
    seen["long"] = ask(engine, range(6), 3, length=60_000)
    many = 3000
    first = engine.generate(
        [PROMPTS[0]] * many, [request_seed(1, i) for i in range(many)], 3, 0.7, 1
    )
    seen["first"] = [r["response"].item() for r in first]
    return seen


def engine_one(folder, ranks):
    """One rank: everything that needs no second one."""
    engine, policy, seen = make_engine(folder, "untied", 1, ranks)
    seen["untied"], seen["alarms"] = weights_arrive(engine, policy), alarms(engine, policy)
    seen["sampling"], seen["weights"] = sampling(engine), weights(policy)
    seen["sleeping"], seen["seed"] = sleeping(engine), request_seed(0, 1, "a", 3)
    engine, policy, _ = make_engine(folder, "tied", 1, ranks)
    seen["tied"] = weights_arrive(engine, policy)
    seen["exported"] = exported(folder, policy, ranks)
    return seen


def exported(folder, policy, ranks):
    """Gap between the trained policy and a new vLLM engine on the model that it was saved as; then one in bfloat16."""
    checkpoint.export(
        folder / "exported", folder / "tied", policy, make_tokenizer(), policy.cfg, ranks
    )
    cfg, seen = config(**CHANGES), {}
    engine = Engine(str(folder / "exported"), 48, cfg, ranks, version=0)
    seen["gap"] = gap(policy, ask(engine, range(12)), range(12))
    rough = Engine(
        str(folder / "exported"),
        48,
        config(**CHANGES | dict(rollout_dtype="bfloat16")),
        ranks,
        version=0,
    )
    seen["gap, bfloat16"] = gap(policy, ask(rough, range(12)), range(12))
    stopping = Engine(str(folder / "exported"), 48, cfg, ranks, version=0, stop=[9])
    seen["stopping"] = ask(stopping, range(12))
    return seen


def engine_two(folder, ranks):
    """Two ranks as two engines, then as one (tensor-parallel): the same requests, and fewer than there are engines."""
    seen = {"seed": request_seed(0, 1, "a", 3)}
    for tp in (1, 2):
        engine, policy, found = make_engine(folder, "untied", tp, ranks)
        found["few"] = {count: ask(engine, range(count)) for count in (0, 1, 3)}
        seen[tp] = found | weights_arrive(engine, policy)
        import vllm  # only now: the engine sets vLLM's environment before

        vllm.distributed.destroy_model_parallel()  # so that vLLM can lay out the ranks anew
    return seen


JOBS = {job.__name__: job for job in (learner, engine_one, engine_two)}


def main(name, folder):
    ranks, folder = start(threads=1), Path(folder)
    torch.save(JOBS[name](folder, ranks), folder / f"{name}-{ranks.world}-{ranks.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
