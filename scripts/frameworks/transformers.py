"""transformers: folders that reshard writes, opened by `from_pretrained`."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import SAMPLES, check, same
from frameworks.dcp import memory

TITLE = "transformers"
INSTALL = ()
VERSIONS = ("transformers", "torch")
MODELS = ("llama-tied", "qwen3_moe", "gpt_oss", "deepseek_v3", "phi3")


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    for name in MODELS[:1] if quick else MODELS:
        for format in ("hf", "transformers"):
            folder = scratch / name
            what = f"{name}: tp3 → {format}, `from_pretrained`"
            yield check(what, partial(_opened, name, format, folder), partial(_flipped, name, folder / format))
            shutil.rmtree(folder, ignore_errors=True)


def _opened(name: str, format: str, folder: Path) -> str:
    import reshard

    reshard.convert(SAMPLES / "hf" / name, folder / "tp", format="tp", tp=3, fsync=False)
    reshard.convert(folder / "tp", folder / format, format=format, tp=1 if format == "hf" else 2, fsync=False)
    return same(memory(SAMPLES / "hf" / name), memory(folder / format))


def _flipped(name: str, folder: Path) -> str:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    path.write_bytes(content)
    return same(memory(SAMPLES / "hf" / name), memory(folder))
