#!/usr/bin/env bash
# Build the wheel, install it in a fresh environment outside the checkout, and use it there.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" wheel -q --no-deps -w "$work/dist" .
"$work/venv/bin/pip" install -q -c constraints.txt "$work"/dist/*.whl
cd "$work"
venv/bin/reshard layouts
venv/bin/python -c 'from pathlib import Path; from reshard.demo import make_model; make_model(Path("model"))'
venv/bin/reshard convert model out --to vllm --tp 3
venv/bin/reshard diff model out
