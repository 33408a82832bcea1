"""A real vLLM engine, filled by ``--load-format reshard`` from a Megatron folder, against transformers on the original.

    python scripts/serve_vllm.py HF_FOLDER [--tp 1] [--megatron-tp 3] [--dtype float32]
    python scripts/serve_vllm.py --family llama --family qwen3_moe …        tiny random models of scripts/families.toml, one engine after another

With the Python of an environment that has vLLM. reshard writes HF_FOLDER as Megatron TP 3; the engine, which finds the loader by its entry
point, serves that folder; its greedy tokens must be transformers', its log-probabilities of every prompt token within 1e-3 (float32).
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
LENGTH = 24
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ", "Water boils at a temperature of", "Once upon a time there was"]


def prompts(folder: Path) -> list[list[int]]:
    """PROMPTS as tokens; random ones where the folder has no tokenizer."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    if (folder / "tokenizer.json").is_file():
        return [AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    config = AutoConfig.from_pretrained(folder).get_text_config()
    return torch.randint(3, config.vocab_size, (len(PROMPTS), LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def expected(folder: Path, dtype: str, tokens: int) -> list[dict]:
    """transformers' greedy continuation of each prompt, and the log-probability of each prompt token after the first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    out = []
    with torch.no_grad():
        for prompt in prompts(folder):
            ids = torch.tensor([prompt])
            logs = torch.log_softmax(model(ids).logits[0].float(), -1)
            told = [float(logs[i, token]) for i, token in enumerate(ids[0, 1:].tolist())]
            for _ in range(tokens):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            out.append({"prompt": prompt, "logprobs": told, "tokens": ids[0, len(prompt) :].tolist()})
    return out


def family(name: str, args) -> int:
    """This script, in a process of its own, on a tiny model of the family."""
    import subprocess

    from tiny_models import families, make

    with tempfile.TemporaryDirectory() as scratch:
        make(families()[name]["config"], Path(scratch) / name, dtype=args.dtype)
        options = ["--tp", str(args.tp), "--megatron-tp", str(args.megatron_tp), "--dtype", args.dtype, "--tokens", str(args.tokens)]
        done = subprocess.run([sys.executable, __file__, f"{scratch}/{name}", *options], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"passed"')]
        print(lines[-1] if lines else f"{name}: {done.stderr[-1500:]}", flush=True)
        return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--megatron-tp", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    if args.family:
        return max([family(name, args) for name in args.family])
    from check_vllm import entry_points

    import reshard

    with tempfile.TemporaryDirectory() as scratch:
        entry_points(Path(scratch) / "site")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), f"{scratch}/site"])  # the engine's own processes find it there
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        reshard.convert(args.folder, f"{scratch}/megatron", format="megatron", tp=args.megatron_tp, fsync=False)
        wanted = expected(args.folder, args.dtype, args.tokens)
        from vllm import LLM, SamplingParams

        began = time.monotonic()
        engine = LLM(f"{scratch}/megatron", load_format="reshard", tensor_parallel_size=args.tp, dtype=args.dtype, enforce_eager=True,
                     max_model_len=128, max_logprobs=1, disable_log_stats=True, skip_tokenizer_init=True)  # fmt: skip
        up = time.monotonic() - began
        sampling = SamplingParams(temperature=0, max_tokens=args.tokens, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": one["prompt"]} for one in wanted], sampling, use_tqdm=False)
    worst, same = 0.0, 0
    for one, answer in zip(wanted, answers):
        own = [table[token].logprob for token, table in zip(one["prompt"][1:], answer.prompt_logprobs[1:])]
        worst = max([worst, *(abs(a - b) for a, b in zip(own, one["logprobs"]))])
        told = list(answer.outputs[0].token_ids)[: len(one["tokens"])]
        same += told == one["tokens"]
    passed = same == len(wanted) and (args.dtype != "float32" or worst < 1e-3)
    print(json.dumps({"passed": passed, "model": args.folder.name, "prompts": len(wanted), "same_tokens": same, "max_abs_dlogprob": worst, "tp": args.tp,
                      "from": f"megatron tp{args.megatron_tp}", "dtype": args.dtype, "engine_up_s": round(up, 1)}))  # fmt: skip
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
