# Every target runs in the environment that is active; CONTRIBUTING.md says how to make one.
.PHONY: check fix test test-claims test-gpu test-remote kernels bench

check: ## lint, format and types; edits nothing
	ruff check --no-fix
	ruff format --check
	mypy

fix: ## what ruff can mend by itself
	ruff check --fix
	ruff format

test: ## everything this machine can run
	pytest

test-claims: ## models trained for minutes: what docs/tasks.md says; needs the extra `tasks`
	pytest -m claim

test-gpu: ## only what runs on a CUDA device, the kernels' tests among it
	pytest -m gpu

test-remote: ## checkpoints load and run where the package is not importable
	pytest tests/test_remote_code.py

kernels: ## compile every kernel for every shape, a quarter of an hour; writes the table under docs/
	python scripts/compile_kernels.py --json docs/kernel_resources_triton_$$(python -c 'import triton; print(triton.__version__)').json

bench: ## speed and memory on the CPU, serving, and the kernels where there is a GPU; scripts/benchmark_assisted.py needs a model
	python scripts/benchmark.py
	python scripts/benchmark_serving.py
	python scripts/benchmark_gpu.py
