"""Rollouts on disk: a run writes them (--dump_rollouts), another trains on them without an engine and without judging (--replay).

    RUN/rollouts/step_000001.safetensors    prompts, responses and the sampler's log-probs
    RUN/rollouts/step_000001.json           everything else, for reading: what run wrote it, texts, answers, rewards, reasons

The JSON is renamed last: where it stands, its step is whole. Nothing here is a pickle, and vLLM is neither needed nor imported.
"""

import json
from concurrent.futures import Future
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from infra.checkpoint import pack, unpack
from reward import Verdict
from rollout import check_responses

DECIDE = (
    "prompts",
    "group_size",
    "p",
    "reincarnate",
    "seed",
    "temperature",
)  # which prompts are asked at a step, and how
KEPT = (
    "prompt",
    "response",
    "logp_sampler",
    "truncated",
    "version",
    "prompt_index",
    "answer",
    "reward",
    "reason",
    "reflects",
)


def dump(folder, step, tokenizer, fresh, cfg):
    """Write the fresh samples of a step into `folder`, aside and then renamed. Rank 0 alone."""
    texts = [
        {f"{name}_text": tokenizer.decode(sample[name]) for name in ("prompt", "response")}
        for sample in fresh
    ]
    record = {
        "step": step,
        "fingerprint": cfg.fingerprint,
        "settings": {name: getattr(cfg, name) for name in (*DECIDE, "dtype", "rollout_dtype")},
        "samples": [
            {key: sample[key] for key in KEPT} | text for sample, text in zip(fresh, texts)
        ],
    }
    path, tensors = Path(folder) / f"step_{step:06d}", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(pack(record, tensors, ""), indent=1)
    for suffix, write in (
        (".safetensors", lambda aside: save_file(tensors, aside)),
        (".json", lambda aside: aside.write_text(text)),
    ):
        aside = path.with_name(f"{path.name}{suffix}.tmp")
        write(aside)
        aside.replace(path.with_name(path.name + suffix))


def load(folder, step):
    """What dump() wrote of a step. Raises ValueError."""
    path = Path(folder) / f"step_{step:06d}.json"
    try:
        record = json.loads(path.read_text())
        if any(
            not isinstance(record[name], kind)
            for name, kind in (("fingerprint", str), ("settings", dict), ("samples", list))
        ):
            raise TypeError("no record of rollouts")
        if not {record["settings"].get(name) for name in ("dtype", "rollout_dtype")} <= {
            "float32",
            "bfloat16",
            "float16",
        }:
            raise TypeError("it does not say in which types it was computed")
        return unpack(record, load_file(path.with_suffix(".safetensors")))
    except Exception as error:  # safetensors raises a kind of its own
        raise ValueError(
            f"--replay: {path} or its .safetensors cannot be read ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def recorded(cfg):
    """The record of step 1 in --replay, once it is clear that all steps are there and asked for the same. Raises ValueError."""
    folder = Path(cfg.replay)
    if not folder.is_dir():
        raise ValueError(
            f"--replay {folder}: no such folder; a run with --dump_rollouts makes one, RUN/rollouts"
        )
    whole = {
        path.stem
        for path in folder.glob("step_*.json")
        if path.with_suffix(".safetensors").exists()
    }
    if missing := [step for step in range(1, cfg.steps + 1) if f"step_{step:06d}" not in whole]:
        fits = f": --steps {missing[0] - 1} would do" if missing[0] > 1 else ""
        raise ValueError(
            f"--replay {folder} has no step {missing[0]} of the {cfg.steps} that --steps asks for{fits}"
        )
    record = load(folder, 1)
    for name in DECIDE:
        if record["settings"].get(name) != getattr(cfg, name):
            raise ValueError(
                f"--replay {folder} was recorded with --{name} {record['settings'].get(name)}, not {getattr(cfg, name)}: "
                "take its run's flags (--config RUN/config.json), and change those of the loss alone"
            )
    return record


class Replay:
    """In the place of Engine and Judge: the recorded responses with their recorded rewards, whatever the weights."""

    def __init__(self, folder, cfg, ranks):
        """`folder`: of the model that is trained."""
        self.cfg, self.ranks, self.samples = cfg, ranks, []
        self.vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]

    def update(self, version, tensors, expected):
        """No engine takes the weights."""

    def sleep(self):
        """Nothing to put to sleep."""

    def generate(self, prompts, seeds, version, temperature, max_tokens):
        """As Engine.generate, of what policy `version` wrote then. Raises ValueError where that answers other prompts."""
        self.samples = load(self.cfg.replay, version + 1)["samples"]
        try:
            if [s["prompt"].tolist() for s in self.samples] != prompts:
                raise ValueError("it holds responses to other prompts")
            found = [
                {name: s[name] for name in ("response", "logp_sampler", "truncated")}
                for s in self.samples
            ]
            check_responses(found)
            for s in self.samples:
                tokens, logp = s["response"], s["logp_sampler"]
                if (tokens.dtype, tokens.shape, logp.dtype) != (
                    torch.int64,
                    logp.shape,
                    torch.float32,
                ) or not 0 <= tokens.min() <= tokens.max() < self.vocabulary:
                    raise ValueError("a response is not made of the model's tokens")
                if not isinstance(s["truncated"], bool) or not isinstance(s["reason"], str | None):
                    raise ValueError("truncated must be true or false, reason a text or null")
            self.verdicts = [Verdict(float(s["reward"]), s["reason"]) for s in self.samples]
        except (
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
        ) as error:
            raise ValueError(
                f"--replay: step {version + 1} in {self.cfg.replay} cannot be trained on ({type(error).__name__}: {error})"
            ) from None
        return found

    def submit(self, items):
        """As Judge.submit, of this rank's share of the latest responses: a Future of their recorded verdicts."""
        done, mine = Future(), slice(self.ranks.rank, None, self.ranks.world)
        done.set_result(
            [v for s, v in zip(self.samples[mine], self.verdicts[mine]) if not s["truncated"]]
        )
        return done
