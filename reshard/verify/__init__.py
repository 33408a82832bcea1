"""Prove a sharded checkpoint by using it: run the shards as their engine would, and compare logits with the original's.

``tables.py``, ``tables/`` what engines call and cut · ``shards.py`` read it · ``group.py`` ranks as processes · ``model.py``,
``slices.py``, ``build.py`` put a rank's slices into transformers' modules (``attention.py``, ``experts.py``, ``parallel.py``: what
engines compute) · ``run.py`` one process's work · ``launch.py`` all of them · ``reference.py`` the original · ``figures.py``,
``trace.py`` the comparison · ``settings.py`` config.json and args · ``direct.py``, ``beyond.py`` what no prompt reaches · ``devices.py``,
``exact.py``, ``watch.py`` GPUs, precision, and the first rank that stops · ``controls.py`` planted defects · ``permute.py`` the proof without
processes · ``report.py``, ``page.py``.
"""

from importlib.util import find_spec
from pathlib import Path

from reshard.errors import FormatError, ReshardError
from reshard.hub import is_remote
from reshard.verify.request import Request

METHODS = ("tp", "permute")


def verify(
    checkpoint: str | Path,
    *,
    reference: str | Path,
    nproc: int | None = None,
    format: str | None = None,
    config: str | Path | None = None,
    layout: str | Path | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    method: str = "tp",
    prompts: tuple[str, ...] = (),
    low_memory: bool = False,
    told: bool = False,
):
    """Whether the shards in `checkpoint` are the model in `reference` (a Hugging Face checkpoint): a Report, true if they are.

    Method ``tp`` runs one process per rank, started here (`nproc` of them; a script that calls this guards its own start with
    ``if __name__ == "__main__"``), or by torchrun, under which the ranks other than 0 get None. ``permute`` runs one process:
    shards merged with their ranks permuted must give the same logits (`layout`: a descriptor of your own to merge them by). `device` is cpu or cuda (the default where there is one).
    Raises ReshardError for what can't be run at all; shards that give other logits are a false Report.
    """
    from reshard.verify.launch import check_reference, run_here, run_processes, under_torchrun

    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ReshardError(f"verify needs {' and '.join(missing)} to run the original model", "pip install 'reshard[verify]'")
    if method not in METHODS:
        raise FormatError(f"unknown method {method!r}", f"use one of {', '.join(METHODS)}")
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    for place in (checkpoint, reference):
        if is_remote(place):
            raise FormatError(f"{place} is on the Hub; verify runs folders on this disk", f"`reshard pull {place} DIR`, then verify DIR")
    if device == "cuda":
        from reshard.verify.exact import refuse_override

        refuse_override(device)
    request = Request(
        Path(checkpoint),
        Path(reference),
        format,
        config and Path(config),
        layout and Path(layout),
        device,
        dtype,
        tuple(prompts),
        low_memory,
        told,
    )
    check_reference(request.reference)
    if method == "permute":
        from reshard.verify.permute import verify_permuted

        return verify_permuted(request)
    if under_torchrun():
        return run_here(request)
    from reshard.verify.shards import open_shards

    shards = open_shards(request.checkpoint, format)
    if nproc not in (None, len(shards.ranks)):
        raise FormatError(
            f"{checkpoint} has {len(shards.ranks)} ranks ({shards.mesh}), --nproc says {nproc}",
            f"use --nproc {len(shards.ranks)}, or leave it out",
        )
    return run_processes(request, len(shards.ranks))
