#!/usr/bin/env bash
# README's test command: an environment of its own, then the whole test suite, on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install -q -c constraints.txt -e '.[test]'
exec .venv/bin/python -m pytest -n 2 "$@"
