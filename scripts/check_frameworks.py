"""The frameworks are the judge: what reshard writes is loaded by their own code, and what they write is read by reshard.

    python scripts/check_frameworks.py [--section NAME …] [--environments DIR] [--quick]
    python scripts/check_frameworks.py --page [--check]          docs/frameworks.md from the results, and nothing else

A section is a module of scripts/frameworks/. Each runs in an environment of its own (made in DIR with `pip install`, on top of the packages of
the Python that runs this; one that is there is taken as it is), and leaves its rows in docs/frameworks/SECTION.json. No row without its
run: a section that was not run keeps the rows of its last run, with their date. Exit status: 0 when all rows that were run are equal.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
RESULTS, PAGE = ROOT / "docs" / "frameworks", ROOT / "docs" / "frameworks.md"
SECTIONS = sorted(path.stem for path in (ROOT / "scripts" / "frameworks").glob("[a-z]*.py"))
#: one thread, this checkout, no network
SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
HEAD = """# Frameworks

What other programs' own code says of the files: `scripts/check_frameworks.py` makes the environments, runs it all, and writes this page from
what came out (`docs/frameworks/*.json`). *Control*: the same with something wrong in it, which must be told apart.
"""


def python_of(name: str, install: tuple[str, ...], folder: Path) -> str:
    """The Python of section `name`'s environment, made where there is none."""
    if not install:
        return sys.executable
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        inner = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True, capture_output=True, text=True
        )
        below = [sysconfig.get_paths()["purelib"], *(path for path in sys.path if path.endswith("site-packages"))]
        (Path(inner.stdout.strip()) / "below.pth").write_text("\n".join(dict.fromkeys(below)) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *install], check=True)
    return str(python)


def run_section(name: str, quick: bool) -> list[dict]:
    """The rows of one section, in this process."""
    section = importlib.import_module(f"frameworks.{name}")
    versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in section.VERSIONS)
    rows, today = [], datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory() as scratch:
        for row in section.rows(Path(scratch), quick):
            rows.append({"framework": section.TITLE, "versions": versions, "date": today, **row})
            print(f"{name:<14} {row['status']:<15} {row['what']}  ({row['seconds']} s)", flush=True)
            if row["status"] != "equal":
                print(row.get("detail", ""), flush=True)
    return rows


def page() -> str:
    lines = [HEAD]
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        if rows:
            lines.append(f"\n## {rows[0]['framework']}\n\n{rows[0]['versions']}; run {rows[0]['date']}\n")
            lines.append("| what | result | found | control |\n| --- | --- | --- | --- |")
            lines += [f"| {' | '.join(cell(row.get(key, '')) for key in ('what', 'status', 'detail', 'control'))} |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=SECTIONS, default=[], help="may be repeated (default: all)")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "reshard-frameworks", help="where they are made")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each kind")
    parser.add_argument("--page", action="store_true", help="write the page, run nothing")
    parser.add_argument("--check", action="store_true", help="with --page: fail if the page is not what the results say")
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # the file for the rows: this is the section's own environment
    args = parser.parse_args()
    if args.inside:
        (name,) = args.section
        Path(args.inside).write_text(json.dumps(run_section(name, args.quick)))
        return 0
    failed = False
    for name in [] if args.page else args.section or SECTIONS:
        install = importlib.import_module(f"frameworks.{name}").INSTALL
        with tempfile.TemporaryDirectory() as scratch:
            answer = Path(scratch) / "rows.json"
            command = [python_of(name, install, args.environments), __file__, "--section", name, "--inside", str(answer)]
            done = subprocess.run(command + ["--quick"] * args.quick, env=os.environ | SETTINGS)
            rows = json.loads(answer.read_text()) if answer.exists() else []
        failed |= bool(done.returncode) or not rows or any(row["status"] != "equal" for row in rows)
        if rows and not args.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
    if args.check:
        return int(PAGE.read_text() != page())
    if not args.quick:
        PAGE.write_text(page())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
