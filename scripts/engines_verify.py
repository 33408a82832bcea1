"""check_engines.py with ``reshard verify`` as the engine: each family's shards run, one process per rank, beside transformers' logits.

verify plants defects of its own in every run, which must be found.
"""

import shutil
import time
from pathlib import Path

FORMAT = "verify"
MESHES = ({"tp": 2}, {"tp": 4}, {"tp": 2, "ep": 2})


def warm() -> None:
    from engines_files import warm as same

    same()


def release() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def check(name: str, family: dict, engine, folder: Path, quick: bool) -> list[dict]:
    from check_engines import convert, prepare
    from engines_common import DIFFERS, EQUAL, MISSED, NO_MODEL, NOT_BUILT, forked, label

    _, error = forked(prepare, family["config"], folder)()
    if error:
        return [{"family": name, "mesh": "", "status": NO_MODEL, "detail": [error[1].strip().splitlines()[-1]]}]
    rows = []
    for mesh in MESHES[:1] if quick else MESHES:
        if mesh.get("ep") and not family.get("experts"):
            continue
        began = time.monotonic()
        row = {"family": name, "model_type": family["config"]["model_type"], "mesh": label(mesh)}
        _, error = forked(convert, folder, "tp", mesh, {})()
        if not error:
            found, error = forked(run, folder, label(mesh), seconds=280)()
        if error:
            row |= {"status": NOT_BUILT, "detail": error[1].strip().splitlines()[:6]}
        else:
            status = DIFFERS if not found["equal"] else EQUAL if found["found"] else MISSED
            row |= {"status": status, "detail": found["detail"], "defects": found["defects"]}
        for source in ("hf", "control"):
            shutil.rmtree(folder / f"{source}-{label(mesh)}", ignore_errors=True)
        rows.append(row | {"seconds": round(time.monotonic() - began, 2)})
    return rows


def run(folder: Path, mesh: str) -> dict:
    """The shards of the checkpoint beside the original, and with planted defects."""
    import reshard.verify

    found = reshard.verify.verify(folder / f"hf-{mesh}", reference=folder / "hf", device="cpu")
    return {"equal": found.shards.passed and not found.settings, "found": bool(found.controls) and not found.missed, "defects": len(found.controls),
            "detail": [] if found else found.describe(False).splitlines()[:12]}  # fmt: skip
