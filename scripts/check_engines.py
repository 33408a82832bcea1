"""The engines are the judge: what reshard writes for each family, beside what the engine itself makes of the same checkpoint.

    python scripts/check_engines.py --engine vllm --family llama --family qwen3_moe --out DIR
    python scripts/check_engines.py --engine vllm                  every family of families.toml
    python scripts/check_engines.py --engine megatron              in an environment with megatron-core
    python scripts/check_engines.py --engine files                 no engine: there and back through every format

Run it with the Python of an environment in which the engine is installed; reshard is taken from this checkout. A family is one table in
families.toml. For each, transformers makes a tiny random model; the engine's own classes are built on the CPU, one process per
rank, and filled by the engine's own loader from the Hugging Face checkpoint; names, dtypes, shapes and bytes of every rank's tensors
must be those of the files that ``reshard.convert`` writes. A control is read beside each: the same checkpoint with two tensors
exchanged, which must be told apart. One process imports the engine; every rank is forked from it.

Exit status: 0 when all that the engine builds is equal and every control was found.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from engines_common import DIFFERS, EQUAL, FAILED, FAULTS, MISSED, NO_LAYOUT, NO_MODEL, NOT_BUILT, REFUSED, forked, label  # noqa: E402
from tiny_models import TABLE, exchange, families, make  # noqa: E402


def prepare(config: dict, folder: Path) -> list[str] | None:
    """The family's checkpoint, and the control's, in `folder`; the two tensors exchanged."""
    reference(make(config, folder / "hf"), folder / "logits.pt")
    return exchange(folder / "hf", folder / "control")


def reference(model, path: Path) -> None:
    """transformers' own logits, in float32, for engines that are run."""
    import torch

    vocabulary = getattr(model.config, "vocab_size", None) or model.config.text_config.vocab_size
    tokens = torch.randint(3, vocabulary - 1, (2, 24), generator=torch.Generator().manual_seed(1))
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        torch.save({"tokens": tokens, "logits": model.float()(tokens).logits}, path)


def convert(folder: Path, format: str, mesh: dict, options: dict) -> dict[str, str]:
    """reshard's files for one mesh: of the checkpoint, and of the control. What of them is computed, or has fewer bits: name → how."""
    from engines_common import what_is_computed

    import reshard

    for source in ("hf", "control"):
        if (folder / source).is_dir():
            reshard.convert(
                folder / source, folder / f"{source}-{label(mesh)}", format=format, fsync=False, overwrite=True, **mesh, **options
            )
    source = reshard.open(folder / "hf")
    return what_is_computed(source, reshard.plan(source, format=format, **mesh, **options))


def check(name: str, family: dict, engine, folder: Path, quick: bool) -> list[dict]:
    """One row per mesh of `family`."""
    result, error = forked(prepare, family["config"], folder)()
    if error:
        return [{"family": name, "mesh": "", "status": NO_MODEL, "detail": [error[1].strip().splitlines()[-1]]}]
    return [row(name, family, mesh, engine, folder, result) for mesh in engine.meshes(family, quick)]


def row(name: str, family: dict, mesh: dict, engine, folder: Path, control) -> dict:
    began = time.monotonic()
    out = {"family": name, "model_type": family["config"]["model_type"], "mesh": label(mesh), "status": EQUAL, "detail": []}
    computed, error = forked(convert, folder, engine.FORMAT, mesh, engine.options())()
    if error:
        known = "no layout descriptor" in error[1] or "says nothing of format" in error[1]
        out |= {"status": NO_LAYOUT if known else REFUSED if "Error" in error[0] and "Traceback" not in error[1] else FAILED}
        out["detail"] = error[1].strip().splitlines()[-12:] if not known else [error[1].splitlines()[0]]
        return out
    work = folder / f"group-{label(mesh)}"
    work.mkdir()
    world = mesh.get("tp", 1) * mesh.get("pp", 1)
    waits = [forked(engine.rank, folder, mesh, rank, world, work, computed) for rank in range(world)]
    answers = [wait() for wait in waits]
    errors = [error for _, error in answers if error]
    first = next((e for e in errors if e[0] == NOT_BUILT), errors[0] if errors else None)
    if first:
        out |= {"status": NOT_BUILT if first[0] == NOT_BUILT else FAILED, "detail": first[1].strip().splitlines()[-12:]}
    else:
        ranks = [result for result, _ in answers]
        lines = [f"rank {i}: {line}" for i, rank in enumerate(ranks) for line in rank["differences"]]
        found = control is None or any(rank["control"] for rank in ranks)
        out |= {key: sum(rank[key] for rank in ranks) for key in ("tensors", "bytes")}
        out |= {key: ranks[0][key] for key in ranks[0] if key not in ("tensors", "bytes", "differences", "control")}
        out |= {"status": DIFFERS if lines else EQUAL if found else MISSED, "detail": lines[:40], "differing": len(lines),
                "computed": dict(list(computed.items())[:4]), "control": f"{control[0]} ↔ {control[1]}: {'told apart' if found else 'NOT SEEN'}" if control else "none possible"}  # fmt: skip
    for source in ("hf", "control"):
        shutil.rmtree(folder / f"{source}-{label(mesh)}", ignore_errors=True)
    return out | {"seconds": round(time.monotonic() - began, 2)}


def table(rows: list[dict]) -> str:
    lines = []
    for r in rows:
        size = f"{r['tensors']} tensors, {r['bytes']} bytes" if "tensors" in r else ""
        extra = f"  logits {r['logits']}" if "logits" in r else ""
        lines.append(f"{r['family']:<22} {r['mesh']:<10} {r['status']:<15} {size}{extra}  {r.get('seconds', '')}")
        lines += [f"    {line}" for line in r["detail"][:12]] if r["status"] != EQUAL else []
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "megatron", "files", "verify", "sglang"), required=True)
    parser.add_argument("--family", action="append", default=[], help="a table of families.toml; may be repeated (default: all)")
    parser.add_argument("--families", type=Path, default=TABLE, help="another table than scripts/families.toml")
    parser.add_argument("--out", type=Path, help="folder for ENGINE.json; rows of families that were not run stay")
    parser.add_argument("--scratch", type=Path, help="keep checkpoints here")

    parser.add_argument("--quick", action="store_true", help="two ranks only: TP 2, and EP 2 with experts")
    args = parser.parse_args()
    every = families(args.families)
    unknown = [name for name in args.family if name not in every]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in {args.families}; it has {', '.join(every)}")
    engine = importlib.import_module(f"engines_{args.engine}")
    began = time.monotonic()
    engine.warm()
    print(f"{engine.release()} imported in {time.monotonic() - began:.0f} s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.family or every:
            if args.engine not in every[name].get("only", [args.engine]):
                continue
            folder = (args.scratch or Path(scratch)) / args.engine / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            own = [
                {**r, "engine": engine.release()} for r in getattr(engine, "check", check)(name, every[name], engine, folder, args.quick)
            ]
            print(table(own), flush=True)
            rows += own
            if args.out:
                keep(own, args.out / f"{args.engine}.json")
            if not args.scratch:
                shutil.rmtree(folder)
    counts = {status: sum(r["status"] == status for r in rows) for status in dict.fromkeys(r["status"] for r in rows)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"({time.monotonic() - began:.0f} s)")
    return int(any(r["status"] in FAULTS for r in rows))


def keep(rows: list[dict], path: Path) -> None:
    """Write `rows` in place of those of the same families."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {r["family"] for r in rows}
    before = [r for r in json.loads(path.read_text()) if r["family"] not in own] if path.exists() else []
    lines = [json.dumps(r, ensure_ascii=False) for r in sorted(before + rows, key=lambda r: r["family"])]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    sys.exit(main())
