"""How many families `reshard layouts new` gets right unaided: of each family in tests/families_data, as if it were not known.

    python scripts/check_drafts.py [--from-transformers] [--from-vllm] [NAME …]        the second with vLLM's Python

The family's own descriptor, and those that extend it or that it extends by no more than names, are hidden. The draft is taken as it stands: right
is one by which the checkpoint opens, goes to tp 2 byte for byte as by the family's own descriptor, and comes back; *served* one whose files
for two ranks of vLLM are those of the family's own descriptor, which was held beside vLLM itself. *Opens*: all tensors are explained,
but some are cut otherwise. What is marked DECIDE counts as it was guessed.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from family_checkpoints import FAMILIES, checkpoint  # noqa: E402

import reshard  # noqa: E402
from reshard.authoring.draft import draft  # noqa: E402
from reshard.layout import find_descriptor  # noqa: E402
from reshard.stores import safetensors  # noqa: E402


def main() -> None:
    asked, counts = {"from_transformers": "--from-transformers" in sys.argv, "from_vllm": "--from-vllm" in sys.argv}, {}
    for family in [name for name in sys.argv[1:] if not name.startswith("-")] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            status, detail = (
                in_a_process(judged, family, Path(folder), asked) if asked["from_vllm"] else judged(family, Path(folder), asked)
            )
        counts[status] = counts.get(status, 0) + 1
        print(f"{family:<18} {status:<8} {detail}", flush=True)
    print(", ".join(f"{count} {status}" for status, count in counts.items()), "of", sum(counts.values()))


def held(folder: Path) -> dict:
    """Per file, the bytes of its tensors by name."""
    out = {}
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        out[path.name] = {name: raw[info.offset : info.offset + info.nbytes] for name, info in safetensors.read(path)[0].items()}
    return out


def judged(family: str, root: Path, asked: dict, without: frozenset[str] = frozenset()) -> tuple[str, str]:
    """What the draft for `family` is worth, written as if its own descriptor, and those `without`, did not exist."""
    source = checkpoint(family, root / "hf")
    own = find_descriptor(reshard.checkpoint.read_config(source / "config.json"))
    if own is None:
        return "unknown", "no descriptor to judge by"
    hidden = without | {own.name}
    try:
        text = draft(source, **asked, without=hidden)
        (root / "draft.toml").write_text(text)
        drafted = reshard.open(source, layout=root / "draft.toml")
    except reshard.ReshardError as error:
        return "wrong", str(error).splitlines()[0][:150]
    parent = text.splitlines()[0]
    reshard.convert(source, root / "right", format="tp", tp=2, fsync=False)
    reshard.convert(drafted, root / "drafted", format="tp", tp=2, fsync=False)
    reshard.convert(reshard.open(root / "drafted", layout=root / "draft.toml"), root / "back", format="hf", fsync=False)
    cut = held(root / "right") == held(root / "drafted")
    back = held(root / "back") == held(source)
    served = bool(asked.get("from_vllm")) and vllm(source, root / "own", None) == vllm(drafted, root / "asked", root / "draft.toml") != {}
    word = " and ".join(["right"] * (cut and back) + ["served"] * served) or "opens"
    return word, f"{parent}, {text.count('DECIDE')} to decide"


def vllm(source, out: Path, layout: Path | None) -> dict:
    """The files of two of vLLM's ranks; nothing where there can be none."""
    try:
        reshard.convert(source, out, format="vllm", tp=2, fsync=False, engine_version="0.32", engine_platform="cpu")
    except reshard.ReshardError:
        return {}
    return held(out)


def in_a_process(work, *args):
    """vLLM builds one model in a process."""
    from engines_common import forked

    result, error = forked(work, *args)()
    return result or ("wrong", error[1].strip().splitlines()[-1][:150])


if __name__ == "__main__":
    main()
