# Each target works from a bare clone: scripts/bootstrap.sh makes .venv first and returns at once when it is up to date.
.PHONY: quickstart test lint clean bootstrap
export PYTHON

quickstart: bootstrap
	.venv/bin/curvprune run recipes/quickstart.yaml --out runs/quickstart

# make test ARGS="-m slow tests/test_resume.py"
test: bootstrap
	.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: bootstrap
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bootstrap:
	@scripts/bootstrap.sh

# Runs are results: they stay.
clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
