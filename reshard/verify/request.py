"""What to verify, and how. Imports nothing heavy: the command line reads it before torch is there."""

import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """`format` forces what is otherwise recognised; `device` is cpu or cuda; `config` (a folder or file) stands in for the
    checkpoint's own config.json; `layout` is a descriptor file for method permute, the only one that reads any; `prompts` are texts instead of the built-in ids; `told` shows steps on stderr."""

    checkpoint: Path
    reference: Path
    format: str | None = None
    config: Path | None = None
    layout: Path | None = None
    device: str = "cpu"
    dtype: str = "fp32"
    prompts: tuple[str, ...] = ()
    low_memory: bool = False
    told: bool = False

    def say(self, step: str) -> None:
        if self.told:
            print(step, file=sys.stderr, flush=True)
