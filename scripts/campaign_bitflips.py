"""Flip one bit in a converted folder, and see who notices: `diff` with the source, and `inspect` (headers and sizes alone).

    python scripts/campaign_bitflips.py [--runs 500] [--seed 0] [--samples ../shared/samples/hf] [--folder DIR]

Each conversion of each sample is made once; then single bits are flipped, anywhere in any of its files, and put back. A bit
of a tensor's own bytes that `diff` misses, or anything but a clear error, is a violation (exit code 1). What no
comparison of weights can see is counted: a bit of the tokenizer, of padding, of a header's blanks.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from campaigns import LLAMA, MIXTRAL

import reshard
from reshard.demo import make_model
from reshard.dtypes import DTYPE_SIZE
from reshard.planner.batches import runs
from reshard.text import table

TARGETS = (
    {"format": "vllm", "tp": 2},
    {"format": "megatron", "tp": 2},
    {"format": "tp", "tp": 2},
    {"format": "rank-pt", "tp": 2},
    {"format": "hf"},
)


def conversions(models: dict[str, Path], root: Path) -> list[tuple[Path, Path]]:
    """(source, converted folder) of every sample in every target that takes it."""
    made = []
    for name, source in models.items():
        for options in TARGETS:
            folder = root / f"{name}-{options['format']}"
            try:
                reshard.convert(source, folder, fsync=False, **options)
            except reshard.ReshardError:
                continue  # a model that this format or mesh does not take
            made.append((source, folder))
    return made


def tensor_bytes(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Where in each file bytes of the model's tensors lie: what is elsewhere is header, padding or a constant."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for stored in reshard.open(folder).stored:
        width = DTYPE_SIZE[stored.dtype]
        for _, block in stored.blocks:
            found[stored.file] += [
                (stored.start + a * width, stored.start + b * width) for a, b in runs(block.offset, block.shape, block.strides, 0)
            ]
    return found


def noticed(action) -> tuple[bool, str | None]:
    """Whether `action` reports the damage, by its answer or by an error of ours; and a traceback where it is neither."""
    try:
        return not action(), None
    except reshard.ReshardError:
        return True, None
    except Exception:  # noqa: BLE001  what the campaign looks for
        return False, traceback.format_exc(limit=-3)


def kind_of(file: str, at: int, places: list[tuple[int, int]]) -> str:
    if any(start <= at < stop for start, stop in places):
        return "tensors"
    if file.endswith((".safetensors", ".pt")):
        return "headers, padding, constants"
    return file if file in ("config.json", "reshard.json") else "tokenizer and others"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=Path, help="a folder of Hugging Face checkpoints; without it, two models are made")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    args = parser.parse_args()
    dice, rows, violations, began = random.Random(args.seed), defaultdict(Counter), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="reshard-flips-", dir=args.folder) as name:
        root = Path(name)
        models = {path.parent.name: path.parent for path in sorted(args.samples.glob("*/config.json"))} if args.samples else {}
        for made, config in () if models else (("llama", LLAMA), ("mixtral", MIXTRAL)):
            make_model(root / made, config)
            models[made] = root / made
        pairs = [(source, folder, tensor_bytes(folder)) for source, folder in conversions(models, root / "out")]
        for number in range(args.runs):
            source, folder, places = pairs[number % len(pairs)]
            files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
            large = [path for path in files if str(path.relative_to(folder)) in places]
            file = dice.choice(large if dice.random() < 0.6 else files)
            at, bit = dice.randrange(min(file.stat().st_size, 20_000) if dice.random() < 0.3 else file.stat().st_size), dice.randrange(8)
            relative = str(file.relative_to(folder))
            with open(file, "r+b") as raw:
                raw.seek(at)
                byte = raw.read(1)[0]
                raw.seek(at)
                raw.write(bytes([byte ^ 1 << bit]))
            kind = kind_of(relative, at, places.get(relative, []))
            row = rows[kind]
            row["flips"] += 1
            by_diff, wrong = noticed(lambda source=source, folder=folder: reshard.diff(source, folder))
            by_inspect, also = noticed(lambda folder=folder: bool(reshard.open(folder)))
            row["diff"] += by_diff
            row["inspect"] += by_inspect
            what = f"flip {number}: {folder.name}/{relative}, byte {at}, bit {bit}"
            if wrong or also:
                violations.append(f"{what}: {wrong or also}")
            elif kind == "tensors" and not by_diff:
                violations.append(f"{what}: a tensor's bit, and diff says equal")
            with open(file, "r+b") as raw:
                raw.seek(at)
                raw.write(bytes([byte]))
        assert all(reshard.diff(source, folder) for source, folder, _ in pairs), "the folders are not what they were"
        shutil.rmtree(root / "out")
    keys = ("flips", "diff", "inspect")
    lines = [(kind, *(row[key] for key in keys)) for kind, row in sorted(rows.items())]
    print(
        table(
            [*lines, ("all", *(sum(row[key] for row in rows.values()) for key in keys))],
            ("where", "flips", "found by diff", "found by inspect"),
        )
    )
    print(
        *(f"VIOLATION {text}" for text in violations),
        f"{len(violations)} violations, {len(pairs)} folders, seed {args.seed}, {time.monotonic() - began:.0f} s",
        sep="\n",
    )
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
