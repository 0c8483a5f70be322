"""The path of a GPU user: every command of README's section "On GPUs", on CPU ranks.

Small random models of the same architectures stand behind the models' names, and the problems behind the data set's, on a hub on
localhost. Two ranks take the place of eight, and the flags in SMALLER follow the command.
"""

import json
import math
import re
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import command, metrics_of, random_model
from infra.config import ALGORITHMS, DEEPSCALER, dry_run, parse

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCK = README.split("## On GPUs")[1].split("```")[1]
COMMANDS = [line for line in BLOCK.strip().splitlines() if "train.py" in line]
KINDS = {
    "Qwen/Qwen2.5-Math-7B": "qwen2",
    "Qwen/Qwen2.5-Math-1.5B": "qwen2 tied",
    "Qwen/Qwen3-1.7B-Base": "qwen3",
    "meta-llama/Llama-3.2-3B-Instruct": "llama",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "qwen2",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "qwen2",
}
SMALLER = (
    "--steps 2 --prompts 6 --minibatch 3 --max_prompt 160 --max_response 16 --lambda_start 1 --lambda_every 1 --entropy 1 --lr 1e-3 "
    "--threads 1"
).split()


@pytest.fixture(scope="module")
def stand_in(hub, small_model, problems_file, tmp_path_factory):
    """Environment of a user whose hub has the models of README, small ones, and DeepScaleR, the problems as one JSON list."""
    folder = tmp_path_factory.mktemp("hub")
    for kind in set(KINDS.values()):
        random_model(kind, folder / kind, small_model)
    for name, kind in KINDS.items():
        hub.add("models", name, folder / kind)
    rows = [json.loads(line) for line in open(problems_file, encoding="utf-8")]
    (folder / "data").mkdir()
    (folder / "data" / "deepscaler.json").write_text(
        json.dumps([{"problem": r["problem"], "answer": r["answer"], "solution": ""} for r in rows])
    )
    hub.add("datasets", DEEPSCALER, folder / "data")
    hub.requests.clear()
    return hub.env(folder / "cache")


def test_commands_cover_every_algorithm_and_architecture():
    cfgs = [parse(shlex.split(line.partition("train.py")[2])) for line in COMMANDS]
    assert {cfg.algo for cfg in cfgs} == set(ALGORITHMS)
    assert COMMANDS[0] == "torchrun --nproc_per_node 8 train.py --model Qwen2.5-Math-7B"


def flags_of(line):
    flags = [*shlex.split(line.partition("train.py")[2]), *SMALLER]
    return flags + (["--held_out", "2", "--eval_every", "2"] if "--held_out" in flags else [])


# those that two ranks can run one after the other in the same processes (runs.py), to save the starts; the first never
TOGETHER = [
    line
    for line in COMMANDS[1:]
    if "--nproc_per_node" in line and not re.search("--nnodes|--tp", line)
]


@pytest.fixture(scope="module")
def together(stand_in, hub, tmp_path_factory):
    """Folder of the runs of TOGETHER, by their number in COMMANDS."""
    runs = tmp_path_factory.mktemp("together")
    (runs / "flags.json").write_text(
        json.dumps({str(COMMANDS.index(line)): flags_of(line) for line in TOGETHER})
    )
    done = command("tests/runs.py", "algorithms", runs, runs / "flags.json", ranks=2, env=stand_in)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert set(json.loads((runs / "algorithms-1.json").read_text()).values()) == {None}
    return runs


@pytest.fixture
def run(request, line, stand_in, hub, tmp_path):
    """(folder, flags) of the run that a command of README made."""
    if line in TOGETHER:
        return request.getfixturevalue("together") / str(COMMANDS.index(line)), flags_of(line)
    launcher, folder = line.partition("train.py")[0], tmp_path / "run"
    flags = [*flags_of(line), "--out", str(folder)]
    nodes, ranks = (
        int((re.search(r"--nnodes (\d)", launcher) or [0, 1])[1]),
        min(2, int((re.search(r"per_node (\d)", launcher) or [0, 0])[1])),
    )
    if nodes == 1:
        done = [command("train.py", *flags, ranks=ranks, env=stand_in)]
    else:  # HOST is this one, with a rank on each node
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host = f"127.0.0.1:{free.getsockname()[1]}"
        rendezvous = shlex.split(
            launcher.replace("HOST:29500", host).replace("per_node 8", "per_node 1")
        )[1:]
        with ThreadPoolExecutor(nodes) as pool:
            done = list(
                pool.map(
                    lambda _: command("train.py", *flags, launcher=rendezvous, env=stand_in),
                    range(nodes),
                )
            )
    assert not any(d.returncode for d in done), done[0].stdout[-1000:] + done[0].stderr[-3000:]
    return folder, flags


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_readme(line, run, hub):
    folder, flags = run
    lines, cfg = [record for record in metrics_of(folder) if record["step"]], parse(flags)
    assert [record["step"] for record in lines] == [1, 2] and lines[-1]["total_rollouts"] == int(
        dry_run(cfg).split()[-1]
    )
    assert lines[1]["staleness"][0] == lines[1]["fresh_rollouts"] and lines[1]["staleness"][
        1
    ] == 3 * cfg.group_size * ("mix" in cfg.algo)
    rough = (
        cfg.rollout_dtype == "bfloat16"
    )  # vLLM alone in bfloat16: the trainer's float32 takes it for what it is
    for record in lines:
        assert (
            (1e-5 < record["gap_mean"] < 0.05 and abs(record["tis_mean"] - 1) < 0.05)
            if rough
            else record["gap_mean"] < 1e-5
        )
        assert (
            record["accuracy"] == 0 and record["truncated_share"] + record["unjudged_share"] > 0.9
        )
        assert 6 < record["entropy"] <= math.log(1024)  # near uniform
        assert (record["eval_accuracy_by_part"] or {"held_out": 0}).keys() == {"held_out"}
    assert (
        lines[1]["kl_base"] > 0
    )  # the entropy bonus moved the policy: without a reward nothing else could
    assert (folder / "model" / "model.safetensors").exists()
    assert not list(
        Path("/dev/shm").glob("*-tp:0-*cpushm*")
    )  # shared memory of tensor-parallel ranks, which would stop the next run of that name
    sent = hub.downloads()
    assert len(sent) == len(set(sent))  # one rank downloads, the others wait
    saved = json.loads((folder / "config.json").read_text())["values"]
    assert (saved["model"], saved["data"], saved["template"]) == (
        cfg.model,
        DEEPSCALER,
        {"auto": "r1"}.get(cfg.template, cfg.template),
    )
