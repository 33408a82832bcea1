"""``verify``."""

import json
import os
import signal
import sys
from pathlib import Path

import click

from reshard.cli.options import FORMATS, json_option
from reshard.errors import ReshardError


@click.command()
@click.argument("ckpt")
@click.option("--reference", required=True, metavar="HF", help="Folder of the original Hugging Face checkpoint.")
@click.option("--nproc", type=click.IntRange(1), help="Processes to start, one per rank: as many as CKPT has ranks. Not under torchrun.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda where there is a GPU.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Compute in this, both sides."
)
@click.option(
    "--method",
    type=click.Choice(["tp", "permute"]),
    default="tp",
    show_default=True,
    help="tp: a tensor-parallel forward. permute: one process; shards merged with ranks permuted must compute the same.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Run this text instead of built-in ids; may be repeated.")
@click.option("--low-memory", is_flag=True, help="Stream the original from disk, layer by layer.")
@click.option("--trace", is_flag=True, help="Show the error of every part of the model.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE", help="Write an HTML page too.")
@click.option("--from", "from_", type=click.Choice(FORMATS), help="Format of CKPT, where its files don't tell.")
@click.option(
    "--config", type=click.Path(exists=True), help="config.json of the model, or its folder, where CKPT has none (default: HF's)."
)
@click.option(
    "--layout", type=click.Path(exists=True, dir_okay=False), help="A layout descriptor of your own, for --method permute; tp reads none."
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks with errors.")
def verify(
    ckpt, reference, nproc, device, dtype, method, prompts, low_memory, trace, report, from_, config, layout, as_json, quiet, verbose
):
    """Prove the shards in CKPT by running them as their engine would, and comparing logits with the original's.

    Defects are planted in the same run, and must be found. Exit code 3: the logits differ, or a planted defect did not show.
    """
    from reshard.verify import verify as run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the blocks that end the ranks and remove their folder
    try:
        found = run(ckpt, reference=reference, nproc=nproc, format=from_, config=config, layout=layout, device=device, dtype=dtype, method=method,
                    prompts=prompts, low_memory=low_memory, told=not (quiet or as_json))  # fmt: skip
    except ReshardError:
        if os.environ.get("RANK", "0") != "0":  # of torchrun's ranks one tells
            sys.exit(1)
        raise
    if found is None:
        return
    if report:
        from reshard.verify.page import page

        Path(report).write_text(page(found), encoding="utf-8")
    click.echo(json.dumps({"ok": True, **found.to_json()})) if as_json else click.echo(found.describe(trace))
    if not found:
        sys.exit(3)
