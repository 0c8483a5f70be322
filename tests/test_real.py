"""The path of a GPU user: every command of docs/gpus.md, "Other runs", on CPU ranks.

Small random models of the same architectures stand behind the models' names, on a hub on localhost.
One rank (a machine) takes the place of more, SMALLER follows the command; Llama is in bfloat16, as
on a GPU.
"""

import json
import math
import re
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

import methods
from conftest import ROOT, command, metrics_of, random_model
from infra import config, data

PAGE = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
COMMANDS = PAGE.split("## Other runs")[1].split("```")[1].strip().splitlines()
KINDS = {
    "Qwen2.5-Math-7B": "qwen2",
    "Qwen2.5-Math-1.5B": "qwen2 tied",
    "Qwen3-1.7B-Base": "qwen3",
    "Llama-3.2-3B-Instruct": "llama",
    "DeepSeek-R1-Distill-Qwen-1.5B": "qwen2",
    "DeepSeek-R1-Distill-Qwen-7B": "qwen2",
}
SMALLER = (
    "--steps 2 --prompts 6 --minibatch 3 --max_prompt 160 --max_response 16 --entropy 1 --lr 1e-3 "
    "--threads 1"
).split()


def flags_of(line):
    flags = [*shlex.split(line.partition("train.py")[2]), *SMALLER]
    flags += ["--held_out", "2", "--eval_every", "2"] if "--held_out" in flags else []
    algo = config.parse(flags, methods.NUMBERS, methods.ROWS).algo
    flags += ["--lambda_start", "1", "--lambda_every", "1"] if "remix" in algo else []
    return flags + (["--dtype", "bfloat16"] if "Llama" in line else [])


CFGS = [config.parse(flags_of(line), methods.NUMBERS, methods.ROWS) for line in COMMANDS]


def on_two_machines(line, *program, env):
    """What became of a command with --nnodes 2 where HOST is this machine, a rank a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        line = line.replace("HOST:29500", f"127.0.0.1:{free.getsockname()[1]}")
    launcher = shlex.split(re.sub(r"per_node \d", "per_node 1", line.partition("train.py")[0]))[1:]
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(command, *program, launcher=launcher, env=env) for _ in range(2)]
    return [node.result() for node in nodes]


@pytest.fixture(scope="module")
def runs(hub, small_model, problems_file, tmp_path_factory):
    """Folder of the runs, by their number in COMMANDS; what can shares a start (runs.py)."""
    served, folder = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("runs")
    for name, kind in KINDS.items():
        random_model(kind, served / name, small_model)
        owner = next(owner for start, owner in data.OWNERS.items() if name.startswith(start))
        hub.add("models", f"{owner}/{name}", served / name)
    rows = [json.loads(line) | {"solution": ""} for line in open(problems_file, encoding="utf-8")]
    (served / "data").mkdir()
    (served / "data" / "deepscaler.json").write_text(json.dumps(rows))
    hub.add("datasets", config.DEEPSCALER, served / "data")
    hub.requests.clear()
    env, together, done = hub.env(served / "cache"), {}, []
    for number, line in enumerate(COMMANDS):
        program = ["train.py", *flags_of(line), "--out", folder / str(number)]
        if "--nnodes" in line:
            done += on_two_machines(line, *program, env=env)
        else:
            together[number] = flags_of(line)
    (folder / "flags.json").write_text(json.dumps(together))
    how = dict(timeout=600, env=env)
    done.append(command("tests/runs.py", "algorithms", folder, folder / "flags.json", **how))
    for one in done:
        assert one.returncode == 0, one.stdout[-1000:] + one.stderr[-3000:]
    assert set(json.loads((folder / "algorithms-0.json").read_text()).values()) == {None}
    return folder


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_command(number, runs, hub):
    cfg, lines = CFGS[number], [m for m in metrics_of(runs / str(number)) if m["step"]]
    assert [m["step"] for m in lines] == [1, 2]
    assert lines[1]["total_rollouts"] == methods.total_rollouts(cfg, 2)
    past = 3 * cfg.group_size * (cfg.p > 0)
    assert lines[1]["staleness"] == [lines[1]["fresh_rollouts"], past, 0]
    for m in lines:
        rough = cfg.dtype == "bfloat16"  # float32 needs no correction
        assert (1e-5 < m["gap_mean"] < 0.05) if rough else m["gap_mean"] < 1e-5
        assert abs(m["mismatch_weight"] - 1) < 0.05 if rough else "mismatch_weight" not in m
        assert m["accuracy"] == 0 and m["truncated_share"] + m["unjudged_share"] > 0.9
        assert 6 < m["entropy"] <= math.log(1024)  # near uniform
        assert set(m["eval_accuracy_by_part"] or ["held_out"]) == {"held_out"}
    # the entropy bonus moved the policy: without a reward nothing else could
    assert lines[1]["kl_base"] > 0 and (runs / str(number) / "model" / "config.json").exists()
    assert len(sent := hub.downloads()) == len(set(sent))  # one rank downloads, the others wait
    saved = json.loads((runs / str(number) / "config.json").read_text())["values"]
    assert (saved["model"], saved["data"]) == (cfg.model, config.DEEPSCALER)
    assert saved["template"] == ("r1" if cfg.template == "auto" else cfg.template)


def test_commands_cover_the_papers_rows_and_every_architecture():
    assert {cfg.algo for cfg in CFGS} == set(methods.ROWS) - {"decoupled"}
    assert {KINDS[cfg.model] for cfg in CFGS} == set(KINDS.values())
