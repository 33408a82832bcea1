"""SGLang's side of check_engines.py, which is read and not run: its models need a GPU to be built.

``SGLANG`` names the folder of its unpacked wheel. Every word of the names that reshard would write for a family (``qkv_proj``, ``w13_weight``) must
stand as an attribute, an argument or in a text of the model's own source, or of SGLang's modules that it takes classes from. That a word
is there proves no shape and no cut. As a control, vLLM's names of the same family, where they differ, must have words that are not there.
"""

import ast
import os
import re
from functools import cache
from pathlib import Path

FORMAT = "sglang"
ROOT = Path(os.environ.get("SGLANG", "sglang"))


def warm() -> None:
    if not (ROOT / "srt" / "models").is_dir():
        raise SystemExit(f"{ROOT} is not SGLang's source: unpack its wheel and set SGLANG to the folder `sglang` in it")

    from engines_files import warm as same

    same()


def release() -> str:
    return "SGLang 0.5.23"


def check(name: str, family: dict, engine, folder: Path, quick: bool) -> list[dict]:
    from check_engines import prepare
    from engines_common import NO_LAYOUT, NO_MODEL, forked

    _, error = forked(prepare, family["config"], folder)()
    row = {"family": name, "model_type": family["config"]["model_type"], "mesh": "tp1"}
    if error:
        return [row | {"status": NO_MODEL, "detail": [error[1].strip().splitlines()[-1]]}]
    found, error = forked(compared, folder)()
    if error:
        return [row | {"status": NO_LAYOUT, "detail": error[1].strip().splitlines()[:1]}]
    return [row | found]


def compared(folder: Path) -> dict:
    """Which words of the family's names in SGLang its source has not."""
    import reshard

    source = reshard.open(folder / "hf")
    names = {s.name for s in reshard.plan(source, format="sglang").plan.destinations}
    others = {s.name for s in reshard.plan(source, format="vllm").plan.destinations} - names
    file = model_file(source.architecture)
    if file is None:
        return {"status": "no model", "detail": [f"SGLang has no class {source.architecture}: its wrapper of transformers' would run"]}
    known = words(file)
    lacking = sorted(missing(names, known))
    if lacking:
        return {"status": "not found", "detail": [f"{file.name}: {', '.join(lacking)}"], "names": len(names)}
    seen = f"{len(missing(others, known))} words of vLLM's names are not there" if others else "vLLM's names are the same"
    return {"status": "read", "detail": [], "names": len(names), "control": seen, "source": file.name}


def missing(names: set[str], known: frozenset[str]) -> set[str]:
    return {word for name in names for word in re.split(r"[.]", name) if not word.isdigit() and word not in known}


def model_file(architecture: str) -> Path | None:
    """The file whose EntryClass is `architecture`."""
    for path in sorted((ROOT / "srt" / "models").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        entry = re.search(r"^EntryClass\b.*?=\s*(\[[^\]]*\]|\w+)", text, re.MULTILINE | re.DOTALL)
        if entry and re.search(rf"\b{architecture}\b", entry[1]):
            return path
    return None


@cache
def words(path: Path, depth: int = 4) -> frozenset[str]:
    """Names and pieces of texts in a file of SGLang's, and in those of its files that it imports from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg | ast.keyword):
            found.add(node.arg or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\w+", node.value))
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sglang.srt.") and depth:
            inner = ROOT.joinpath(*node.module.split(".")[1:])
            for file in (inner.with_suffix(".py"), inner / "__init__.py"):
                if file.is_file() and ("/models/" in str(file) or "/layers/" in str(file)):
                    found |= words(file, depth - 1)
    return frozenset(found)
