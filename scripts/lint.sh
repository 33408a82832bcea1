#!/usr/bin/env bash
# What CI demands of the code before it runs: ruff's rules, imports that go one way, strict types in most rooms.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install -q -c constraints.txt -e '.[lint]'
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/lint-imports --no-logo
.venv/bin/python -m mypy
