"""Everything that reshard does on a GPU, in one command and under nine minutes: a table of what holds and how fast.

    python scripts/gpu_check.py --out results            # one GPU or more; writes gpu_check.md, .json and .log there
    python scripts/gpu_check.py --only load,pack         # these parts alone
    python scripts/gpu_check.py --device cpu             # a small model on the CPU: shows that the script itself runs

In two halves, where a command may not take so long (the second keeps the first's rows, and finds its model in --work):

    python scripts/gpu_check.py --out results --work w --only env,foreach,model,fp8,load,pack,ipc
    python scripts/gpu_check.py --out results --work w --only sync,verify,tests,nccl

Each part is a process of its own, ended when its time is up, so that one that hangs costs no other. The table is written
anew after every part. Exit code 1: a goal was not met, a part did not end well, or nothing could be run.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: parts in the order in which they run, and the most seconds each may take; those of one row run side by side, since none is timed
ROWS = (
    {"env": 60},
    {"foreach": 45, "model": 90},
    {"fp8": 45},
    {"load": 100},
    {"pack": 60},
    {"ipc": 100},
    {"sync": 240},
    {"verify": 240, "tests": 90, "nccl": 110},
)
PARTS = {part: seconds for row in ROWS for part, seconds in row.items()}


@dataclass
class Done:
    """A part that ran, or did not: `trouble` says why."""

    part: str
    seconds: float
    trouble: str = ""


def run(part: str, limit: float, args: argparse.Namespace, rows: Path, log: Path) -> Done:
    """Run one part; end it and all that it started when `limit` seconds have passed."""
    command = [sys.executable, str(HERE / "gpu_parts.py"), part, "--device", args.device, "--work", args.work, "--rows", str(rows)]
    command += ["--layers", str(args.layers)] if args.layers else []
    began = time.monotonic()
    with open(log, "ab") as out:
        out.write(f"\n===== {part}\n".encode())
        out.flush()
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            code = process.wait(limit)
            trouble = f"ended with exit code {code}: {_last(log)}" if code else ""
        except subprocess.TimeoutExpired:
            trouble = f"not done after {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # also what it left behind
            except ProcessLookupError:
                pass
            process.wait()
    return Done(part, time.monotonic() - began, trouble)


def _last(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def table(rows: list[dict], done: list[Done]) -> str:
    """The rows as Markdown, part after part, and below them what did not run."""
    lines = ["| part | case | result | goal | |", "| --- | --- | --- | --- | --- |"]
    words = {True: "met", False: "**NOT MET**", None: ""}
    lines += [f"| {r['part']} | {_cell(r['case'])} | {_cell(r['value'])} | {_cell(r['goal'])} | {words[r['ok']]} |" for r in rows]
    lines += [f"| {one.part} | the whole part | {_cell(one.trouble)} | runs to its end | **NOT MET** |" for one in done if one.trouble]
    met, missed = sum(r["ok"] is True for r in rows), sum(r["ok"] is False for r in rows)
    taken = ", ".join(f"{one.part} {one.seconds:.0f} s" for one in done)
    return "\n".join(
        [*lines, "", f"{met} goals met, {missed} not; {sum(bool(one.trouble) for one in done)} parts did not end well. {taken}.", ""]
    )


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "/").split())


def read(rows: Path) -> list[dict]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for gpu_check.md, gpu_check.json and gpu_check.log")
    parser.add_argument("--only", metavar="PART,…", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--skip", metavar="PART,…", default="", help="leave these out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--work", help="folder for the model and its shards (default: a temporary one); kept, if given")
    parser.add_argument("--layers", type=int, help="of the model on disk, 8 unless said otherwise: 3.4 GB")
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that all parts take together")
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else list(PARTS)
    if unknown := [part for part in chosen + list(filter(None, args.skip.split(","))) if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(PARTS)}")
    chosen = [part for part in PARTS if part in chosen and part not in args.skip.split(",")]
    out = args.out or Path(tempfile.mkdtemp(prefix="gpu-check-"))
    out.mkdir(parents=True, exist_ok=True)
    scratch = None
    if not args.work:
        args.work = scratch = tempfile.mkdtemp(prefix="gpu-check-work-")
    Path(args.work).mkdir(parents=True, exist_ok=True)
    try:
        found, done = check(chosen, out, args)
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"\n{(out / 'gpu_check.md').read_text()}\nin {out}")
    return int(any(r["ok"] is False for r in found) or any(one.trouble for one in done) or not any(r["ok"] for r in found))


def check(chosen: list[str], out: Path, args: argparse.Namespace) -> tuple[list[dict], list[Done]]:
    """Run the parts `chosen`; the table in `out` also keeps what an earlier run found of the others."""
    until, log = time.monotonic() + 60 * args.minutes, out / "gpu_check.log"
    before, found, done = earlier(out, chosen), [], []
    log.write_bytes(log.read_bytes() if before["parts"] and log.exists() else b"")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(PARTS)) as pool:
        for row in ROWS:
            at = {part: Path(folder) / part for part in row if part in chosen}
            for part in at:
                at[part].mkdir()
            left = until - time.monotonic()
            runs = [
                pool.submit(run, part, min(PARTS[part], left), args, at[part] / "rows", at[part] / "log")
                if left > 10
                else pool.submit(Done, part, 0, "not run: no time was left")
                for part in at
            ]
            for part, one in zip(at, runs):
                done.append(one.result())
                found += read(at[part] / "rows")
                with open(log, "ab") as whole:
                    whole.write((at[part] / "log").read_bytes() if (at[part] / "log").exists() else b"")
                rows, parts = ordered([*before["rows"], *found]), ordered([*before["parts"], *map(vars, done)])
                (out / "gpu_check.md").write_text(table(rows, [Done(**known) for known in parts]))
                (out / "gpu_check.json").write_text(json.dumps({"rows": rows, "parts": parts}, indent=1))
                print(f"{part}: {done[-1].trouble or 'done'}, {done[-1].seconds:.0f} s", flush=True)
    return found, done


def earlier(out: Path, chosen: list[str]) -> dict[str, list[dict]]:
    """Rows and parts of an earlier run in `out` that this one does not make anew."""
    try:
        known = json.loads((out / "gpu_check.json").read_text())
        return {kind: [one for one in known[kind] if one["part"] in PARTS and one["part"] not in chosen] for kind in ("rows", "parts")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"rows": [], "parts": []}


def ordered(known: list[dict]) -> list[dict]:
    return sorted(known, key=lambda one: list(PARTS).index(one["part"]))


if __name__ == "__main__":
    sys.exit(main())
