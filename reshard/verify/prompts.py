"""What the models are asked: ids that reach every rank's part of the vocabulary, the same on every machine."""

from pathlib import Path

import torch


def built_in(vocab: int, edges: list[int], longest: int) -> torch.Tensor:
    """Two sequences of ids, [2, n]: the lowest and highest ids and those on both sides of `edges` (where a rank's rows of the
    embedding end, and the last before padding); and ids scattered over the vocabulary by a fixed recurrence."""
    near = [at + step for at in edges for step in (-1, 0)]
    chosen = [i for i in dict.fromkeys([0, 1, 2, vocab - 1, vocab - 2, *near]) if 0 <= i < vocab]
    length = min(max(len(chosen), 32), 96, longest)
    scattered, state = [], 1
    for _ in range(2 * length):
        state = (state * 1103515245 + 12345) % 2**31
        scattered.append((state >> 8) % vocab)
    return torch.tensor([(chosen + scattered)[:length], scattered[length:]])


def tokenized(folder: Path, text: str) -> torch.Tensor:
    """The ids of `text`, [1, n], by the tokenizer in `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, return_tensors="pt").input_ids
