"""Checkpoints of random bytes with the names, dtypes and shapes of tests/families_data."""

import json
import zlib
from pathlib import Path

import numpy as np

from reshard.dtypes import DTYPE_SIZE, INTEGERS
from reshard.stores import safetensors

DATA = Path(__file__).parent / "families_data"
FAMILIES = sorted(path.stem for path in DATA.glob("*.json"))


def checkpoint(family: str, folder: Path) -> Path:
    """A checkpoint of random bytes with the names, dtypes and shapes of `family`. A prediction layer repeats embedding and head."""
    data = json.loads((DATA / f"{family}.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(data["config"]))
    image = safetensors.compose([(name, dtype, tuple(shape)) for name, (dtype, shape) in data["tensors"].items()], {"format": "pt"})
    same = {"shared_head.head.weight": "lm_head.weight", "embed_tokens.weight": "embed_tokens.weight",
            "emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}  # fmt: skip
    with open(folder / "model.safetensors", "wb") as out:
        out.write(image.segments[0][1])
        for name, info in sorted(image.tensors.items(), key=lambda item: item[1].offset):
            seed = next((own for end, own in same.items() if name.endswith(end)), name)
            rng, count = np.random.default_rng(zlib.crc32(seed.encode())), info.nbytes // DTYPE_SIZE[info.dtype]
            mean = name.endswith(("norm.weight", "A_log"))  # as in trained models: what is transformed comes back exactly
            if info.dtype in INTEGERS:
                out.write(rng.integers(0, 4, count).astype(f"i{DTYPE_SIZE[info.dtype]}").tobytes())
                continue
            wide = rng.normal(float(mean), 0.02, count).astype(np.float32)
            out.write(wide.tobytes() if info.dtype == "F32" else (wide.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return folder
