"""Score a model on math benchmarks: pass@1 with its standard error, pass@k, maj@k.

    python eval.py --model DIR_OR_NAME --benchmarks aime24,math500 --k 4 --temperature 0.6
    torchrun --nproc_per_node 8 eval.py --model DIR_OR_NAME --preset paper   # the paper's protocol beside its published rows
    python eval.py --benchmarks toy --k 2                                    # the embedded default on its own held-out problems
    python eval.py --rejudge RUN/eval                                        # judge the responses on disk again
    python eval.py --compare A/results.json B/results.json                   # is the difference more than chance?

The output folder holds results.json, samples.jsonl (every response), results.png, and settings.json from the start: interrupted, the same
command goes on after the samples on disk. The numbers do not depend on the number of ranks. The trainer evaluates through evaluate(), too.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import faults
import hub
import score
from infra.config import (
    VLLM_VERSION,
    ConfigError,
    Parser,
    check_vllm,
    context_length,
    exit_bad_input,
)
from reward import Judge, final_answer, own

CHUNK = 512  # responses of an engine between two writes to samples.jsonl: so many at most are generated again after an interruption
MACHINE = {
    "out",
    "tp",
    "engine_memory",
    "threads",
    "reward_workers",
    "data_dir",
    "commit",
}  # what may differ when an evaluation goes on


class Part(NamedTuple):
    """k samples at one temperature for each problem (dicts with prompt_ids) of a benchmark."""

    name: str  # "aime24", with --preset paper "aime24 greedy" or "aime24 T=0.1"
    problems: list
    temperature: float
    k: int
    style: str
    template: str
    skipped: int


def load_eval_data(name, data_dir=None):
    """Problems of a benchmark, of the toy's held-out split ("toy"), of a file, or of the hub's OWNER/NAME. Raises ValueError."""
    from infra import data, toy

    if name == "toy":
        return toy.problems("test")
    return (
        data.load_problems(name)
        if "/" in name or Path(name).suffix
        else data.load_benchmark(name, data_dir)
    )


def evaluate(
    engine,
    judge,
    tokenizer,
    problems,
    version,
    k,
    temperature,
    max_tokens,
    style,
    seed,
    done=frozenset(),
    write=None,
):
    """Sample k responses to each problem (dicts with prompt_ids) and judge them, while the next ones are generated.

    Returns one row a response, on every rank: what score.py reads, and sample, prompt, gold. `done`: (id, sample) of responses to leave out;
    write(rows) is called with each finished chunk of rows. A collective.
    """
    from infra.ranks import gather
    from rollout import request_seed

    ranks, rows, waiting = engine.ranks, [], []

    def finish(mine, pending, count):
        for row, verdict in zip([row for row in mine if not row["truncated"]], pending.result()):
            row.update(verdict._asdict())
        parts = gather(mine)
        rows.extend(chunk := [parts[i % ranks.world][i // ranks.world] for i in range(count)])
        if write:
            write(chunk)

    asked = [
        (problem, sample)
        for problem in problems
        for sample in range(k)
        if (problem["id"], sample) not in done
    ]
    size = CHUNK * ranks.world // engine.tp
    for begin in range(0, len(asked), size):
        chunk = asked[begin : begin + size]
        responses = engine.generate(
            [problem["prompt_ids"] for problem, _ in chunk],
            [
                request_seed(seed, "eval", version, problem["id"], sample)
                for problem, sample in chunk
            ],
            version,
            temperature,
            max_tokens,
        )
        mine = [
            as_row(tokenizer, problem, sample, response, style)
            for (problem, sample), response in list(zip(chunk, responses))[
                ranks.rank :: ranks.world
            ]
        ]
        waiting.append((mine, judge_rows(judge, mine, style), len(chunk)))
        if len(waiting) > 1:
            finish(*waiting.pop(0))
    for chunk in waiting:
        finish(*chunk)
    return rows


def as_row(tokenizer, problem, sample, response, style):
    """A row without a verdict; a truncated response needs none: it is wrong whatever it says."""
    text, truncated = (
        tokenizer.decode(response["response"], skip_special_tokens=True),
        response["truncated"],
    )
    return dict(
        id=problem["id"],
        sample=sample,
        prompt=tokenizer.decode(problem["prompt_ids"]),
        response=text,
        judged=None if truncated else final_answer(text, style),
        gold=problem["answer"],
        reward=0.0,
        reason="truncated",
        length=len(response["response"]),
        truncated=truncated,
    )


def judge_rows(judge, rows, style):
    """The Future of the verdicts on those rows that are not truncated."""
    return judge.submit(
        [(row["response"], row["gold"], style) for row in rows if not row["truncated"]]
    )


def parse(argv):
    """Flags -> checked arguments. Raises ConfigError."""
    from infra import data

    parser = Parser(
        prog="eval.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        help="folder, or name on the hub, of a Hugging Face model; none: the embedded default",
    )
    add(
        "--preset",
        choices=["paper"],
        help="the paper's protocol: its five benchmarks, greedy and at T = 0.1 (32 samples on aime24 and amc), 8192 tokens",
    )
    add(
        "--benchmarks",
        help=f"comma-separated: toy, {', '.join(data.BENCHMARKS)}, files of problems, or data sets OWNER/NAME on the hub [toy]",
    )
    add("--k", type=int, help="samples per problem [1]; greedy takes one")
    add("--temperature", type=float, help="sampling temperature [0.6]; 0: greedy")
    add(
        "--data_dir",
        help="folder of benchmark files NAME.jsonl; none: $REMIX_DATA, else they are downloaded once, to HF_HOME",
    )
    add(
        "--template",
        default="auto",
        help=f"prompt template: {', '.join(data.TEMPLATES)}, or a file [auto: that of the run for RUN/model and RUN/best, "
        "else chosen by the model]",
    )
    add("--reward", help="your own reward, MODULE:FUNCTION, in place of right or wrong")
    add(
        "--max_prompt",
        type=int,
        default=2048,
        help="longest prompt (tokens); longer ones are counted and skipped [%(default)s]",
    )
    add(
        "--max_response",
        type=int,
        default=8192,
        help="longest response (tokens), shorter where the model's context ends [%(default)s]",
    )
    add("--seed", type=int, default=0, help="of every request [%(default)s]")
    add("--tp", type=int, default=1, help="tensor-parallel ranks per engine [%(default)s]")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="type of computation [auto: bfloat16 on a GPU, float32 on a CPU]",
    )
    add(
        "--engine_memory",
        type=float,
        default=0.9,
        help="share of GPU memory for vLLM [%(default)s]",
    )
    add("--threads", type=int, default=1, help="CPU threads per rank [%(default)s]")
    add("--reward_workers", type=int, default=2, help="judging processes per rank [%(default)s]")
    add(
        "--out",
        help="output folder [RUN/eval for RUN/model, RUN/eval-best for RUN/best, else eval/MODEL; DIR/rejudged for --rejudge DIR]",
    )
    add(
        "--rejudge",
        metavar="DIR",
        help="judge the responses of an earlier evaluation again, generating nothing",
    )
    add(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="compare two results.json: paired differences with bootstrap intervals",
    )
    args = parser.parse_args(argv)
    for name, least in dict(
        k=1, max_prompt=1, max_response=1, temperature=0, tp=1, threads=1, reward_workers=1
    ).items():
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            raise ConfigError(f"--{name} is {getattr(args, name)}: at least {least} is needed")
    if not (
        (args.temperature or 0) < 100 and 0 < args.engine_memory < 1 and 0 <= args.seed < 2**32
    ):
        raise ConfigError(
            "--temperature must lie below 100, --engine_memory in (0, 1), --seed in [0, 2^32)"
        )
    if int(os.environ.get("WORLD_SIZE", 1)) % args.tp:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} ranks cannot be divided into tensor-parallel groups of --tp {args.tp}"
        )
    path = Path(args.model or "toy").resolve()
    beside = {"model": "eval", "best": "eval-best"}.get(path.name)  # RUN/model -> RUN/eval
    args.out = Path(
        args.out
        or (
            Path(args.rejudge) / "rejudged"
            if args.rejudge
            else path.parent / beside
            if beside
            else Path("eval") / path.name
        )
    )
    if not args.compare:
        check_free(args.out)
    if args.template != "auto":
        data.template_style(args.template)
    if args.reward:
        own(args.reward)
    return args


def check_free(out):
    """Raise ConfigError where `out` holds a finished evaluation."""
    if (out / "results.json").exists():
        raise ConfigError(f"{out} already holds results: choose another --out")


def make_parts(args, say):
    """Everything that a generation needs. Returns (parts, folder of the model, tokenizer, longest sequence (tokens)). Raises ValueError."""
    from infra import data, toy
    from prepare import encode, try_reward

    vllm = check_vllm()
    names = ",".join(score.PAPER) if args.preset else "toy"
    names = list(
        dict.fromkeys(
            name.strip()
            for name in (names if args.benchmarks is None else args.benchmarks).split(",")
        )
    )
    problems = {name: load_eval_data(name, args.data_dir) for name in names}
    if args.reward:
        try_reward(args.reward, problems[names[0]][0]["answer"])
    folder = (
        hub.model_folder(args.model)
        if args.model
        else toy.model_folder(os.environ.get("LOCAL_RANK", "0") == "0")
    )
    if args.model:
        hub.check_model(folder, args.tp)
    tokenizer, context = data.load_tokenizer(folder), context_length(folder)
    from infra.ranks import check_gpus

    check_gpus(vllm)
    template = (
        args.template
        if args.template != "auto"
        else (
            of_run(args.model, "template") or data.default_template(args.model or folder, tokenizer)
        )
    )
    parts = []
    for name in names:
        chosen = "raw" if name == "toy" else template
        encoded, skipped = encode(
            problems[name],
            folder,
            tokenizer,
            chosen,
            min(args.max_prompt, (context or 10**9) - 1),
            say,
            f" of {name}",
        )
        for temperature in (
            (0.0, 0.1)
            if args.preset and args.temperature is None
            else (0.6 if args.temperature is None else args.temperature,)
        ):
            k = args.k or (32 if args.preset and name in ("aime24", "amc") else 1)
            label = (
                f"{name} {f'T={temperature:g}' if temperature else 'greedy'}"
                if args.preset
                else name
            )
            parts.append(
                Part(
                    label,
                    encoded,
                    temperature,
                    k if temperature else 1,
                    args.reward or data.template_style(chosen),
                    chosen,
                    skipped,
                )
            )
    longest = max(len(problem["prompt_ids"]) for part in parts for problem in part.problems)
    length = min(longest + args.max_response, context or 10**9)
    if length < longest + args.max_response:
        say(
            f"responses may have {args.max_response} tokens, fewer where the model's context of {context} ends: {context - longest} after the longest prompt"
        )
    return parts, folder, tokenizer, length


def of_run(model, name):
    """The value `name` of the run whose model/ or best/ this is; None where it is no run's."""
    try:
        return json.loads((Path(model).resolve().parent / "config.json").read_text())["values"][
            name
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def describe(args, parts, folder, length):
    """The settings of an evaluation, as written down: all flags, what they led to, and the versions of what computed it."""
    import torch

    from infra import data

    weights = (
        hashlib.sha256()
    )  # the end of every file: other weights differ there, and 15 GB need not be read
    for file in sorted(Path(folder).glob("*.safetensors")):
        weights.update(
            hub.digest(file, max(0, file.stat().st_size - (1 << 16)), file.stat().st_size)
        )
    versions = dict(
        torch=torch.__version__,
        vllm=VLLM_VERSION,
        transformers=importlib.metadata.version("transformers"),
        math_verify=importlib.metadata.version("math-verify"),
        python=sys.version.split()[0],
    )
    flags = {
        name: value for name, value in vars(args).items() if name not in ("compare", "rejudge")
    }
    described = {
        part.name: dict(
            n=len(part.problems),
            k=part.k,
            temperature=part.temperature,
            template=part.template,
            style=part.style,
            skipped=part.skipped,
            problems=data.content(part.problems),
            prompts=hashlib.sha256(
                json.dumps([p["prompt_ids"] for p in part.problems]).encode()
            ).hexdigest()[:16],
        )
        for part in parts
    }
    return flags | dict(
        out=str(args.out),
        weights=weights.hexdigest()[:16],
        versions=versions,
        commit=commit(),
        longest_sequence=length,
        base=of_run(args.model, "model") or args.model,
        parts=described,
    )


def commit():
    """The git commit of this code, with "+" where files differ from it; None outside a repository."""

    def git(*words):
        return subprocess.run(
            ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def begin(out, settings):
    """Make the output folder, or go on with what is there. Returns the rows of samples.jsonl. Raises ConfigError for other settings."""
    from infra.metrics import rewrite

    os.makedirs(out, exist_ok=True)
    faults.hold(out)
    check_free(out)  # again: another evaluation may have ended here in the meantime
    path = out / "settings.json"
    if path.exists():

        def flat(values):
            return (
                values
                | {
                    f"{key} of {part}": value
                    for part, inner in values.get("parts", {}).items()
                    for key, value in inner.items()
                }
                | {"parts": 0}
            )

        now, found = flat(json.loads(json.dumps(settings))), flat(json.loads(path.read_text()))
        if differ := [
            name for name in now | found if name not in MACHINE and found.get(name) != now.get(name)
        ]:
            raise ConfigError(
                f"{out} holds an unfinished evaluation with another {differ[0]} ({found.get(differ[0])}, now {now.get(differ[0])}): "
                "say the same to go on with it, or choose another --out"
            )
    path.write_text(json.dumps(settings, indent=1))
    samples = out / "samples.jsonl"
    rows = read_rows(samples) if samples.exists() else []
    rewrite(
        samples, "".join(json.dumps(row) + "\n" for row in rows)
    )  # without an unfinished last line
    return rows


def read_rows(path):
    """The rows of a samples.jsonl; an unfinished last line is left out. Raises ValueError with the line's number."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
                rows[-1]["part"], rows[-1]["gold"], rows[-1]["response"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if not line.endswith("\n"):
                    return rows
                raise ValueError(
                    f"{path}, line {number}: no row of eval.py ({type(error).__name__}: {error})"
                ) from None
    return rows


def check_whole(settings, rows):
    """Raise ConfigError unless the rows are k samples for every problem of every part, each once."""
    wanted = sum(part["n"] * part["k"] for part in settings["parts"].values())
    found = {(row["part"], row["id"], row["sample"]) for row in rows}
    if not len(found) == len(rows) == wanted or any(
        row["sample"] >= settings["parts"][row["part"]]["k"] for row in rows
    ):
        raise ConfigError(
            f"{settings['out']} holds {len(found)} of {wanted} responses ({len(rows)} lines): the evaluation's own command goes on with it"
        )


def finish(out, settings, rows):
    """Scores of all rows: the console's table, results.json and the picture."""
    from infra.metrics import rewrite

    parts = {name: [row for row in rows if row["part"] == name] for name in settings["parts"]}
    scores = {name: score.summarise(some) | settings["parts"][name] for name, some in parts.items()}
    problems = {
        name: {
            id: sum(row["reward"] for row in some) / len(some)
            for id, some in score.by_problem(part).items()
        }
        for name, part in parts.items()
    }
    print("\n".join(score.table(scores)))
    if settings["preset"] and (
        lines := score.published(scores, settings["model"], settings["base"] or "")
    ):
        print("\n".join(lines))
    score.chart(scores, out / "results.png", settings["model"] or "the embedded default")
    rewrite(
        out / "results.json",
        json.dumps({"scores": scores, "settings": settings, "problems": problems}, indent=1),
    )
    print(out)


def rejudge(args):
    """Judge the rows of an earlier evaluation again, by its own styles or --reward."""
    try:
        settings = json.loads((Path(args.rejudge) / "settings.json").read_text())
        rows = read_rows(Path(args.rejudge) / "samples.jsonl")
        styles = {name: args.reward or part["style"] for name, part in settings["parts"].items()}
        check_whole(settings, rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--rejudge {args.rejudge}: no evaluation to judge again ({error})"
        ) from None
    before = [row["reward"] for row in rows]
    with Judge(args.reward_workers) as judge:
        for name, style in styles.items():
            some = [row for row in rows if row["part"] == name and not row["truncated"]]
            try:
                verdicts = judge_rows(judge, some, style).result()
            except RuntimeError as error:  # of one's own reward, or no math-verify
                raise ConfigError(str(error)) from None
            for row, verdict in zip(some, verdicts):
                row.update(verdict._asdict(), judged=final_answer(row["response"], style))
            settings["parts"][name]["style"] = style
    settings |= dict(
        reward=args.reward or settings["reward"],
        out=str(args.out),
        rejudged=args.rejudge,
        commit=commit(),
        versions=settings["versions"] | dict(math_verify=importlib.metadata.version("math-verify")),
    )
    os.makedirs(args.out, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(settings, indent=1))
    (args.out / "samples.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    print(
        f"{sum(a != row['reward'] for a, row in zip(before, rows))} of {len(rows)} verdicts changed"
    )
    finish(args.out, settings, rows)


def main(argv=None):
    first = os.environ.get("RANK", "0") == "0"
    say = functools.partial(print, flush=True) if first else lambda *_: None
    try:
        args = parse(argv)
        if args.compare:
            return print("\n".join(score.compare(*args.compare)))
        if args.rejudge:
            return rejudge(args)
        parts, folder, tokenizer, length = make_parts(args, say)
        import torch

        if args.dtype == "auto":
            args.dtype = "bfloat16" if torch.cuda.is_available() else "float32"
        settings = describe(args, parts, folder, length) if first else None
        rows = (
            begin(args.out, settings) if first else None
        )  # what cannot be written to is known before the evaluation
    except (ValueError, OSError) as error:
        exit_bad_input(error)

    import torch.distributed as dist

    from infra.ranks import gather, start
    from rollout import Engine, stop_tokens

    args.rollout_dtype = args.dtype
    faults.Here.kept = f"{args.out / 'samples.jsonl'} stands, the same command goes on after it"
    with faults.reported(), Judge(args.reward_workers) as judge:
        if any(part.style != "hash" for part in parts):
            judge.start()  # before CUDA does
        ranks = start(args.threads)
        done = gather([(row["part"], row["id"], row["sample"]) for row in rows] if first else None)[
            0
        ]
        if done:
            say(f"going on after {len(done)} responses of an interrupted evaluation")
        file = open(args.out / "samples.jsonl", "a", encoding="utf-8") if first else None

        def write(part, chunk):
            if first:
                file.writelines(json.dumps({"part": part} | row) + "\n" for row in chunk)
                file.flush()

        engine = Engine(folder, length, args, ranks, version=0, stop=stop_tokens(tokenizer))
        for part in parts:
            evaluate(
                engine,
                judge,
                tokenizer,
                part.problems,
                0,
                part.k,
                part.temperature,
                args.max_response,
                part.style,
                args.seed,
                {(id, sample) for name, id, sample in done if name == part.name},
                functools.partial(write, part.name),
            )
    if first:
        file.close()
        rows = read_rows(args.out / "samples.jsonl")
        check_whole(settings, rows)
        finish(args.out, settings, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    faults.guard()
    main()
    faults.leave()
