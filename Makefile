# Every target runs in the environment that is active; CONTRIBUTING.md says how to make one.
.PHONY: check fix test test-claims test-gpu test-remote bench

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

test-gpu: ## only what needs a CUDA device
	pytest -m gpu

test-remote: ## checkpoints load and run where the package is not importable
	pytest tests/test_remote_code.py

bench: ## every benchmark in scripts/
	set -e; for script in $(sort $(wildcard scripts/benchmark_*.py)); do python "$$script"; done
