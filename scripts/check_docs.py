"""Run what README and docs show, and compare what is printed: python scripts/check_docs.py SMOLLM2 [PAGE …]

SMOLLM2 is the folder that main_job.sh makes. Each page runs in an empty folder that holds it as `smollm2`, against a Hub on loopback that holds
it as ada/smollm2. In a fenced block, `$ command` is run by a shell and the lines after it are what it must print; a line `…` stands for any
lines. A block of lines that begin with `reshard ` is run too; a python block is run, and an unnamed block right after it is its output.
`<!-- run: command -->` runs unseen, `<!-- not run: why -->` before a block passes it over, and says so. Times, speeds and commits may differ.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from hubserver import Hub  # noqa: E402

_BLOCK = re.compile(r"<!-- (run|not run): (.*?) -->|^```(\w*)\n(.*?)^```$", re.S | re.M)
#: what is another number in every run
_VARIES = [(r"\b[0-9.]+ s\b", "_ s"), (r" in [0-9.]+s\b( \([0-9.]+ [kMG]?B/s\))?", " in _s"), (r"\b[0-9a-f]{12}\b", "COMMIT"),
           (r"(?m)^resumed: .* files were done; wrote 9 files, [0-9.]+ MB", "resumed: _")]  # fmt: skip


@dataclass
class Step:
    """A command, the lines that it must print (None: whatever it prints), and the line of the page where they begin."""

    command: str
    expected: str | None
    line: int
    python: bool = False


def steps(text: str, skipped: list[str]) -> Iterator[Step]:
    found = list(_BLOCK.finditer(text))
    for number, match in enumerate(found):
        kind, note, language, body = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        before = found[number - 1] if number else None
        near = before is not None and not text[before.end() : match.start()].strip()
        if kind == "run":
            yield Step(note, None, line)
        elif kind or (near and before[1] == "not run"):
            if kind is None:
                skipped.append(f"line {line}: {before[2]}")
        elif language == "python":
            after = found[number + 1] if number + 1 < len(found) else None
            follows = after is not None and after[1] is None and not after[3] and not text[match.end() : after.start()].strip()
            yield Step(body, after[4] if follows else None, line, python=True)
        elif not language and re.search(r"^\$ ", body, re.M):
            for shown in re.split(r"^(?=\$ )", body, flags=re.M)[1:]:
                command, _, expected = shown[2:].partition("\n")
                yield Step(command, expected, line)
        elif not language and body.startswith("reshard "):
            for command in body.splitlines():
                if command.startswith("reshard "):
                    yield Step(command, None, line)


def alike(expected: str, printed: str) -> bool:
    """Whether `printed` is `expected`, up to what varies and what `…` stands for."""
    for pattern, word in _VARIES:
        expected, printed = (re.sub(pattern, word, text) for text in (expected, printed))
    lines = [line.rstrip() for line in expected.strip().splitlines()]
    pattern = "\n".join(".*" if line == "…" else re.escape(line) for line in lines)
    return re.fullmatch(pattern, "\n".join(line.rstrip() for line in printed.strip().splitlines()), re.S) is not None


def check(page: Path, model: Path) -> int:
    """Run `page`; print what differs, and return how much that is."""
    wrong, ran, skipped = 0, 0, []
    with tempfile.TemporaryDirectory() as name, Hub(Path(name) / "hub") as hub:
        work = Path(name) / "rd"
        work.mkdir()
        (work / "smollm2").symlink_to(model.resolve())
        hub.add_folder("ada/smollm2", model)
        bin = Path(sys.executable).parent
        env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_ada",
               "HF_HOME": str(Path(name) / "home"), "NO_PROXY": "127.0.0.1,localhost", "COLUMNS": "160", "NO_COLOR": "1"}  # fmt: skip
        for step in steps(page.read_text(), skipped):
            ran += 1
            args = [sys.executable, "-c", step.command] if step.python else ["bash", "-c", step.command]
            done = subprocess.run(args, cwd=work, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
            printed = done.stdout.replace(str(work), "/tmp/rd").replace(hub.url, "https://huggingface.co")
            expect_failure = step.expected is not None and ("Error:" in step.expected or step.command.startswith(("reshard diff", "echo")))
            if (done.returncode and not expect_failure) or (step.expected is not None and not alike(step.expected, printed)):
                wrong += 1
                print(f"--- {page.relative_to(ROOT)}:{step.line}: {step.command.strip()} (exit code {done.returncode})\n{printed}")
    print(f"{page.relative_to(ROOT)}: {ran} steps run, {wrong} differ" + "".join(f"\n  not run, {why}" for why in skipped))
    return wrong


def main() -> None:
    model, *names = sys.argv[1:]
    pages = [Path(name).resolve() for name in names] or [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ]
    found = sum([check(page, Path(model)) for page in pages])
    sys.exit(f"{found} differ" if found else 0)


if __name__ == "__main__":
    main()
