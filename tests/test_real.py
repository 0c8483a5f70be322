"""The path of a GPU user: a randomly initialised model with a tokenizer of its own on real problems, every algorithm, two ranks."""

import math

import pytest
from conftest import command, metrics_of

from config import ALGORITHMS, dry_run, parse


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_random_model_on_the_problems(algo, small_model, problems_file, tmp_path):
    flags = ["--model", str(small_model), "--data", str(problems_file), "--algo", algo, "--steps", "2", "--prompts", "5", "--minibatch", "3",
             "--max_prompt", "160", "--max_response", "16", "--lambda_start", "1", "--lambda_every", "1", "--entropy", "1", "--lr", "1e-3",
             "--out", str(tmp_path / "run")]
    done = command("train.py", *flags, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    lines, cfg = metrics_of(tmp_path / "run"), parse(flags)
    assert [line["step"] for line in lines] == [1, 2] and lines[-1]["total_rollouts"] == int(dry_run(cfg).split()[-1])
    assert lines[1]["staleness"][0] == lines[1]["fresh_rollouts"] and lines[1]["staleness"][1] == 2 * cfg.group_size * ("mix" in algo)
    for line in lines:
        assert line["gap_mean"] < 1e-5 and line["accuracy"] == 0 and line["truncated_share"] + line["unjudged_share"] > 0.9
        assert 6 < line["entropy"] <= math.log(1024)  # near uniform
    assert lines[1]["kl_base"] > 0  # the entropy bonus moved the policy: without a reward nothing else could
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
