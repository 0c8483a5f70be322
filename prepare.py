"""What a run needs before its first step, on every rank alike: problems, model, tokenizer, lengths, number types.

Whatever is wrong here is a ValueError of one line. What is small is looked at first, the model is fetched last.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

import hub
import replay
from eval import load_eval_data
from infra import data, memory, toy
from infra.config import SETTLED, VLLM_VERSION, ConfigError, check_vllm, context_length
from infra.ranks import check_gpus
from reward import Judge, own


def prepare(cfg, say):
    """Resolve everything in `cfg` that is still open. Returns (folder of the model, tokenizer, problems, parts).

    problems: what to train on; parts: name -> problems to evaluate on; dicts with id, problem, answer and prompt_ids.
    say: prints a line, on rank 0. Raises ValueError.
    """
    check_gpus(None if cfg.replay else check_vllm())
    record = replay.recorded(cfg) if cfg.replay else None
    if cfg.template != "auto":
        data.template_style(cfg.template)
    if cfg.reward and not cfg.replay:
        own(cfg.reward)
    try:
        problems = (
            toy.problems("train")
            if cfg.data == "toy"
            else data.load_problems(cfg.data, cfg.problem_key, cfg.answer_key, cfg.data_split, say)
        )
    except hub.HubError as error:
        more = (
            ""
            if os.path.isdir(cfg.model)
            else f" (with --model {cfg.model} in the same command, if that is not there either)"
        )
        raise ValueError(f"{error}{more}") from None
    problems, held_out = data.split_held_out(problems, cfg.held_out)
    names = cfg.eval_data.split(",") if cfg.eval_every and not cfg.replay else []
    if cfg.replay and cfg.eval_every:
        say("no evaluations: --replay has no engine")
    parts = {
        name: held_out if name == "held_out" else load_eval_data(name, cfg.data_dir)
        for name in names
    }
    if cfg.reward and not cfg.replay:
        try_reward(cfg.reward, problems[0]["answer"])
    folder = (
        hub.model_folder(cfg.model)
        if cfg.model
        else toy.model_folder(os.environ.get("LOCAL_RANK", "0") == "0")
    )
    if cfg.model:
        hub.check_model(folder, cfg.tp)
    tokenizer = data.load_tokenizer(folder)
    problems, parts = fit(cfg, folder, tokenizer, problems, parts, say)
    cfg.fingerprint = fingerprint(folder, problems)
    if cfg.resume and saved_fingerprint(cfg.out) not in (None, cfg.fingerprint):
        raise ValueError(
            f"the run in {cfg.out} was on other problems or another kind of model: --model and --data may move, not change"
        )
    if cfg.replay:
        if record["fingerprint"] != cfg.fingerprint:
            raise ValueError(
                f"--replay {cfg.replay} was recorded on other problems or another kind of model than --data and --model give"
            )
        settle(
            cfg,
            "the recording",
            **{
                name: record["settings"][name]
                for name in ("dtype", "rollout_dtype")
                if getattr(cfg, name) == "auto"
            },
        )
    if cfg.dtype == "auto":
        settle(cfg, "the machine", dtype="bfloat16" if torch.cuda.is_available() else "float32")
    if cfg.rollout_dtype == "auto":
        settle(cfg, "dtype", rollout_dtype=cfg.dtype)
    if cfg.tis is None:
        settle(cfg, "dtype and rollout_dtype", tis=0.0 if exact(cfg) else 2.0)
    if (
        os.environ.get("RANK", "0") == "0"
    ):  # alone, on its own GPU: to ask for a GPU's name may claim some of its memory
        describe_machine(cfg, folder, int(os.environ.get("WORLD_SIZE", 1)), say)
    return folder, tokenizer, problems, parts


def try_reward(function, answer):
    """Call the user's reward once, before the first thousand. Raises ValueError unless it gives a number for an empty response."""
    with Judge(1) as judge:
        try:
            (verdict,) = judge.submit([("", answer, function)]).result()
        except RuntimeError as error:
            raise ValueError(error) from None
    if verdict.reason not in (None, "wrong"):
        raise ValueError(
            f"--reward {function} gave no number for an empty response: {verdict.reason}"
        )


def fit(cfg, folder, tokenizer, problems, parts, say):
    """Choose template and style, fit lengths to the model's context, tokenise the prompts. Returns (problems, parts).

    problems: list of problems to train on; parts: name -> list of problems to evaluate on.
    """
    if cfg.template == "auto":
        settle(
            cfg,
            "the model",
            template="raw"
            if cfg.data == "toy"
            else data.default_template(cfg.model or folder, tokenizer),
        )
    if cfg.style == "auto":
        settle(cfg, "the template", style=data.template_style(cfg.template))
    context = context_length(folder)
    if context and cfg.max_prompt + cfg.max_response > context:
        if cfg.max_prompt >= context:
            raise ConfigError(
                f"--max_prompt {cfg.max_prompt} leaves no room for a response in the model's context of {context} tokens"
            )
        if cfg.sources["max_response"] == "flag":
            raise ConfigError(
                f"--max_prompt {cfg.max_prompt} + --max_response {cfg.max_response} exceed the model's context of {context} tokens"
            )
        settle(cfg, "the model's context", max_response=context - cfg.max_prompt)
    say(
        f"prompts take up to {cfg.max_prompt} tokens, responses up to {cfg.max_response}; the model's context is {context or 'not known'}"
    )
    problems, _ = encode(problems, folder, tokenizer, cfg.template, cfg.max_prompt, say)
    for name, part in parts.items():
        parts[name], _ = encode(
            part, folder, tokenizer, cfg.template, cfg.max_prompt, say, f" of {name}"
        )
    say(
        f"{len(problems)} problems, template {cfg.template}, judged by {cfg.reward or cfg.style}; the model sees "
        f"{tokenizer.decode(problems[0]['prompt_ids'])!r}"
    )
    return problems, parts


def encode(problems, folder, tokenizer, template, max_prompt, say, of=""):
    """(the problems with their prompt_ids, the number of those that were too long, which is said). Raises ValueError, also for ids that the model in
    `folder` does not have."""
    encoded, skipped = data.encode_prompts(problems, tokenizer, template, max_prompt)
    if skipped:
        say(
            f"skipped {skipped} of {len(problems)} prompts{of}: longer than {max_prompt} tokens (--max_prompt)"
        )
    largest = max(tokenizer.eos_token_id, *(max(problem["prompt_ids"]) for problem in encoded))
    if largest >= (
        vocabulary := json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    ):
        raise ConfigError(
            f"the tokenizer in {folder} gives ids up to {largest}, its model has {vocabulary}: they are not of one model"
        )
    return encoded, skipped


def fingerprint(folder, problems):
    """A hash of what a run trains and on what: the model's config.json, but for who wrote it, prompts and answers."""
    config = json.loads((Path(folder) / "config.json").read_text())
    written_by = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
    found = hashlib.sha256(
        json.dumps(
            {key: value for key, value in sorted(config.items()) if key not in written_by}
        ).encode()
    )
    for problem in problems:
        found.update(json.dumps([problem["prompt_ids"], problem["answer"]]).encode())
    return found.hexdigest()


def saved_fingerprint(out):
    """That of the run in `out`, None where it has none."""
    return json.loads((Path(out) / "config.json").read_text()).get("fingerprint")


def settle(cfg, source, **values):
    """Give values to what was left open, and note what decided."""
    for name, value in values.items():
        setattr(cfg, name, value)
        cfg.sources[name] = SETTLED + source


def exact(cfg):
    """Whether trainer and engine both compute in float32, so that their log-probs differ by rounding alone."""
    return cfg.dtype == cfg.rollout_dtype == "float32"


def describe_machine(cfg, folder, world, say):
    """Say on what the run trains and, on GPUs, whether it will fit: the verdict of --dry_run --gpus, on what they really have."""
    cuda = torch.cuda.is_available()
    say(
        f"{world} rank{'s' * (world > 1)} on {torch.cuda.get_device_name() if cuda else 'CPU'}: training in {cfg.dtype}, "
        + (
            f"on the rollouts in {cfg.replay}"
            if cfg.replay
            else f"vLLM {VLLM_VERSION} in {cfg.rollout_dtype}{' (its first start compiles for minutes)' * cuda}"
        )
    )
    if cuda and not cfg.replay:
        size = torch.cuda.get_device_properties(0).total_memory / memory.GIB
        lines = memory.report(cfg, world, round(size, 1), folder)
        say(
            "\n".join(
                lines[
                    next(
                        i
                        for i, line in enumerate(lines)
                        if line.startswith(("fits", "does not", "memory:"))
                    ) :
                ]
            )
        )
