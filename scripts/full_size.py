"""Plans of published models from their config.json alone: parameters, bytes of each rank, time and memory of the plan.

    python scripts/full_size.py [NAME …]     names of tests/full_size; a Markdown table

Published are the counts of the model cards: of the main model, and of its prediction layer beside it where the files have one.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "tests" / "full_size"
#: billions, as the card says, and of prediction layers (their own tensors)
PUBLISHED = {
    "llama-3.1-405b": (405.853, 0), "deepseek-v3": (671.026, 11.6), "deepseek-v3.2": (671.9, 11.6), "kimi-k2": (1026.4, 0), "qwen3-235b-a22b": (235.094, 0),
    "qwen3.5-397b-a17b": (396.4, 6.6), "glm-5": (744, 9.9), "gpt-oss-120b": (116.829, 0), "minimax-m2": (228.7, 0), "nemotron-3-nano-30b-a3b": (31.578, 0),
}  # fmt: skip
#: where the values of the configs were found. No config.json was opened on the Hub; no weights were
SOURCES = {
    "llama-3.1-405b": "several public repositories, alike", "kimi-k2": "ParagEkbote/hf-model-inspector's report of Kimi-K2-Instruct-0905; the rest as DeepSeek-V3",
    "qwen3-235b-a22b": "slime, scripts/models/qwen3-235B-A22B.sh", "nemotron-3-nano-30b-a3b": "copies of its config.json in public repositories",
    "qwen3.5-397b-a17b": "slime, scripts/models/qwen3.5-397B-A17B.sh; the delta net's heads from memory",
    **dict.fromkeys(("deepseek-v3", "deepseek-v3.2", "glm-5", "gpt-oss-120b", "minimax-m2"), "transformers 5.23, the config class's defaults"),
}  # fmt: skip
TP, EP = 8, 8


def row(name: str) -> str:
    config = CONFIGS / f"{name}.json"
    command = [sys.executable, "-m", "reshard", "plan", "--config", str(config), "--to", "tp", "--tp", str(TP), "--json"]
    if "expert" in config.read_text():
        command += ["--ep", str(EP)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        return f"| {name} | {done.stderr.strip().splitlines()[0]} | | | | | |"
    result = json.loads(done.stdout)
    held = [rank["bytes_held"] for rank in result["ranks"]]
    main, beside = PUBLISHED[name]
    said = f"{main} + {beside}" if beside else f"{main}"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (
        f"| {name} | {result['parameters']:,} | {said} B | {min(held) / 1e9:.1f}–{max(held) / 1e9:.1f} GB | {sum(held) / 1e9:.1f} GB "
        f"| {seconds:.1f} s | {after.ru_maxrss / 1024:.0f} MiB | {SOURCES[name]} |"
    )


if __name__ == "__main__":
    print(
        f"| model | parameters | published | a rank of tp {TP} (ep {EP}) | all ranks | CPU | most memory so far | config's values |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name in sys.argv[1:] or PUBLISHED:
        print(row(name), flush=True)
