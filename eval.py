"""Score a model: pass@1 on named benchmarks.

    python eval.py --model DIR --benchmarks aime24,math500 --data_dir DATA --k 4 --temperature 0.6
    torchrun --nproc_per_node 8 eval.py --model DIR …         # the same numbers, for any number of ranks
    python eval.py --benchmarks toy --k 2                      # the embedded default on its own held-out problems

The trainer evaluates through evaluate() as well, on its own engine.
"""

import argparse
import json
import math
import os
from pathlib import Path

import faults
from config import ConfigError, check_vllm, context_length, exit_bad_input

# Self-reflection keywords of the authors' evaluation code, matched as they do: substrings of the lower-cased response.
REFLECTION = ("verify re-examine double-check why validate abduct question check but wait confirm scrutinize analyze investigate "
              "probe").split() + ["root cause"]


def reflects(text):
    """Whether a response holds at least one self-reflection keyword."""
    text = text.lower()
    return any(keyword in text for keyword in REFLECTION)


def load_eval_data(name, data_dir=None):
    """Problems of a benchmark, of the toy's held-out split ("toy"), of a file, or of the hub's OWNER/NAME. Raises ValueError."""
    import data
    import toy
    if name == "toy":
        return toy.problems("test")
    return data.load_problems(name) if "/" in name or Path(name).suffix else data.load_benchmark(name, data_dir)


def evaluate(engine, judge, tokenizer, problems, version, k, temperature, max_tokens, style, seed):
    """Sample k responses to each problem (dicts with prompt_ids) and judge them.

    Returns one row a response, on every rank: id, sample, reward (0 or 1), reason, length (tokens), truncated, response. A collective.
    """
    from distributed import gather
    from rollout import request_seed

    asked = [(problem, sample) for problem in problems for sample in range(k)]
    responses = engine.generate([problem["prompt_ids"] for problem, _ in asked],
                                [request_seed(seed, "eval", version, problem["id"], sample) for problem, sample in asked],
                                version, temperature, max_tokens)
    rank, world = engine.ranks.rank, engine.ranks.world
    rows = [dict(id=problem["id"], sample=sample, length=len(response["response"]), truncated=response["truncated"],
                 response=tokenizer.decode(response["response"], skip_special_tokens=True), answer=problem["answer"])
            for (problem, sample), response in list(zip(asked, responses))[rank::world]]
    judge_rows(judge, rows, style)
    parts = gather(rows)
    return [parts[i % world][i // world] for i in range(len(asked))]


def judge_rows(judge, rows, style):
    """Add reward and reason to rows with response, answer and truncated. A truncated response is wrong whatever it says."""
    complete = [row for row in rows if not row["truncated"]]
    verdicts = judge.submit([(row["response"], row["answer"], style) for row in complete]).result()
    for row in rows:
        row.update(reward=0.0, reason="truncated")
    for row, verdict in zip(complete, verdicts):
        row.update(reward=verdict.reward, reason=verdict.reason)


def summarise(rows):
    """Scores of a list of rows: pass@1 with the standard error over problems, n, k, lengths, truncated and unjudged by reason."""
    per_problem = {}
    for row in rows:
        per_problem.setdefault(row["id"], []).append(row["reward"])
    means = [sum(rewards) / len(rewards) for rewards in per_problem.values()]
    n, mean = len(means), sum(means) / len(means)
    variance = sum((m - mean) ** 2 for m in means) / (n - 1) if n > 1 else 0.0
    reasons = {}
    for row in rows:
        if row["reason"] not in (None, "wrong"):
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    return {"pass@1": mean, "standard_error": math.sqrt(variance / n), "n": n, "k": len(rows) // n,
            "length_mean": sum(row["length"] for row in rows) / len(rows),
            "truncated_share": sum(row["truncated"] for row in rows) / len(rows),
            "reflection_rate": sum(reflects(row["response"]) for row in rows) / len(rows), "unjudged": reasons}


def main(argv=None):
    import data
    import hub
    import toy
    from reward import Judge, own

    parser = argparse.ArgumentParser(prog="eval.py", description="pass@1 on math benchmarks", allow_abbrev=False)
    parser.add_argument("--model", help="folder, or name on the hub, of a Hugging Face model; none: the embedded default")
    parser.add_argument("--benchmarks", default="toy", help="comma-separated: toy, " + ", ".join(data.BENCHMARKS))
    parser.add_argument("--k", type=int, default=1, help="samples per problem")
    parser.add_argument("--temperature", type=float, default=0.6, help="sampling temperature; 0: greedy")
    parser.add_argument("--data_dir", help="folder of benchmark files NAME.jsonl; none: $REMIX_DATA")
    parser.add_argument("--template", default="auto", help=f"prompt template: {', '.join(data.TEMPLATES)}, or a file; auto: that of the run for "
                        "RUN/model and RUN/best, else chosen by the model")
    parser.add_argument("--reward", help="your own reward, MODULE:FUNCTION, in place of right or wrong")
    parser.add_argument("--max_prompt", type=int, default=1024, help="longest prompt (tokens); longer ones are counted and skipped")
    parser.add_argument("--max_response", type=int, default=8192, help="longest response (tokens), fitted to the model's context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks per engine")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--engine_memory", type=float, default=0.9, help="share of GPU memory for vLLM")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    parser.add_argument("--reward_workers", type=int, default=2, help="judging processes per rank")
    parser.add_argument("--out", help="folder for results.json and samples.jsonl; none: RUN/eval for RUN/model, else eval/MODEL")
    args = parser.parse_args(argv)

    path = Path(args.model or "toy").resolve()
    beside = {"model": "eval", "best": "eval-best"}.get(path.name)  # RUN/model -> RUN/eval
    out = Path(args.out or (path.parent / beside if beside else Path("eval") / path.name))
    first, names = os.environ.get("RANK", "0") == "0", list(dict.fromkeys(args.benchmarks.split(",")))
    try:
        for name, least in dict(k=1, max_prompt=1, max_response=1, temperature=0, tp=1, threads=1, reward_workers=1).items():
            if not getattr(args, name) >= least:
                raise ConfigError(f"--{name} is {getattr(args, name)}: at least {least} is needed")
        if not (args.temperature < 100 and 0 < args.engine_memory < 1 and 0 <= args.seed < 2**32):
            raise ConfigError("--temperature must lie below 100, --engine_memory in (0, 1), --seed in [0, 2^32)")
        if int(os.environ.get("WORLD_SIZE", 1)) % args.tp:
            raise ConfigError(f"{os.environ['WORLD_SIZE']} ranks cannot be divided into tensor-parallel groups of --tp {args.tp}")
        vllm = check_vllm()
        if (out / "results.json").exists():
            raise ConfigError(f"{out} already holds results: choose another --out")
        if args.reward:
            own(args.reward)
        problems = {name: load_eval_data(name, args.data_dir) for name in names}
        folder = hub.model_folder(args.model) if args.model else toy.model_folder(os.environ.get("LOCAL_RANK", "0") == "0")
        if args.model:
            hub.check_model(folder, args.tp)
        tokenizer = data.load_tokenizer(folder)
        skipped = {}
        for name in names:
            template = trained_with(path) or data.default_template(args.model or folder, tokenizer) if args.template == "auto" else args.template
            template = "raw" if name == "toy" else template
            problems[name], skipped[name] = data.encode_prompts(problems[name], tokenizer, template, args.max_prompt)
            problems[name] = problems[name], args.reward or data.template_style(template), template
        longest = max(len(problem["prompt_ids"]) for rows, *_ in problems.values() for problem in rows)
        context = context_length(folder)
        max_response = min(args.max_response, context - longest) if context else args.max_response
        from distributed import check_gpus  # PyTorch, late: what needs no more than a look is said by now
        check_gpus(vllm)
        if max_response < 1:
            raise ConfigError(f"a prompt of {longest} tokens fills the model's context of {context}: lower --max_prompt")
        os.makedirs(out, exist_ok=True)  # what cannot be written to is known before the evaluation
    except (ValueError, OSError) as error:
        exit_bad_input(error)
    if first and max_response < args.max_response:
        print(f"responses are limited to {max_response} tokens: the model's context is {context}, the longest prompt {longest}")

    import torch
    import torch.distributed as dist

    from distributed import start
    from rollout import Engine, stop_tokens

    with faults.reported(), Judge(args.reward_workers) as judge:
        ranks = start(args.threads)
        if args.dtype == "auto":
            args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        args.rollout_dtype = args.dtype
        engine = Engine(folder, longest + max_response, args, ranks, version=0, stop=stop_tokens(tokenizer))
        scores, rows = {}, []
        for name, (encoded, style, template) in problems.items():
            found = evaluate(engine, judge, tokenizer, encoded, 0, args.k, args.temperature, max_response, style, args.seed)
            scores[name] = summarise(found) | {"skipped": skipped[name], "template": template, "style": style}
            rows += [row | {"benchmark": name} for row in found]
    if ranks.first:
        print(table(scores))
        (out / "results.json").write_text(json.dumps({"scores": scores, "settings": vars(args)}, indent=1))
        with open(out / "samples.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(out)
    dist.destroy_process_group()


def trained_with(model):
    """The template of the run whose model/ or best/ this is; None where it is no run's."""
    try:
        return json.loads((model.parent / "config.json").read_text())["values"]["template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def table(scores):
    """The console table: one row a benchmark, n always shown."""
    lines = [f"{'benchmark':<14} {'n':>4} {'k':>3} {'pass@1':>7} {'± s.e.':>7} {'tokens':>8} {'truncated':>9} {'unjudged':>8}"]
    for name, s in scores.items():
        lines.append(f"{name:<14} {s['n']:>4} {s['k']:>3} {100 * s['pass@1']:>7.2f} {100 * s['standard_error']:>7.2f} {s['length_mean']:>8.1f} "
                     f"{s['truncated_share']:>9.3f} {sum(s['unjudged'].values()):>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    faults.guard()
    main()
    faults.leave()
