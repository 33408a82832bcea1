"""``inspect``, ``diff`` and ``demo``: what is there, and whether it is the same."""

import json
import sys

import click

from reshard.cli.convert import opened
from reshard.cli.options import FORMATS, Place, json_option, report_option, source_options
from reshard.cli.progress import progress_bar
from reshard.dtypes import USER_WORDS
from reshard.errors import ReshardError
from reshard.foreign import printable
from reshard.text import count, human, table


@click.command()
@click.argument("path", type=Place())
@source_options
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def inspect(path, from_, layout, config, tensors, as_json):
    """Tell what PATH holds: format, architecture, mesh, and with --tensors every tensor."""
    from reshard.conversion.job import mesh_json

    ckpt = opened(path, from_, layout, config)
    result = {"ok": True, "path": str(path), "format": ckpt.format, "architecture": ckpt.architecture,
              "mesh": mesh_json(ckpt.mesh), "bytes": ckpt.bytes} | ({"writer": ckpt.writer, "ranks": ckpt.holders} if ckpt.writer else {}) | ({"revision": ckpt.revision} if ckpt.remote else {})  # fmt: skip
    rows = _tensor_rows(ckpt)
    if as_json:
        result["tensors"] = (
            [dict(zip(("name", "shape", "dtype", "split_dim", "fused", "ranks"), row)) for row in rows] if tensors else len(rows)
        )
        click.echo(json.dumps(result))
        return
    where = f"{ckpt.format} of {count(ckpt.holders, 'rank')}, written by {ckpt.writer}" if ckpt.writer else f"{ckpt.format} {ckpt.mesh}"
    click.echo(
        f"{printable(str(path))}: {where}, {ckpt.architecture} (layout {ckpt.layout.name}), {len(rows)} tensors, {human(ckpt.bytes)}"
    )
    if told := ckpt.what_is_beside():
        click.echo(told)
    if tensors:
        text = [(n, "×".join(map(str, s)) or "scalar", d, "-" if x is None else x, "+".join(f) or "-", len(r)) for n, s, d, x, f, r in rows]
        click.echo(table(text, ("name", "shape per rank", "dtype", "split dim", "fused", "ranks")))


def _tensor_rows(ckpt) -> list[tuple]:
    rows: dict[str, list] = {}
    for s in ckpt.stored:
        row = rows.setdefault(
            s.name,
            [
                s.name,
                list(s.shape),
                s.dtype,
                split_dim(ckpt.layout.descriptor, s.entry, ckpt.mesh.tp),
                list(s.entry.of) if len(s.entry.of) > 1 else [],
                [],
            ],
        )
        row[5].append(s.rank)
    return [tuple(row) for row in rows.values()]


def split_dim(descriptor, entry, tp: int) -> int | None:
    """The dimension of a stored tensor that tensor parallelism cuts; None where it is replicated."""
    tensor = descriptor.tensors[entry.of[0]]
    split = tensor.split if entry.split is None else entry.split
    if tp == 1 or not split:
        return None
    lead = sum(1 for axis in tensor.index if axis not in entry.numbered)
    return lead + next(d for d, axes in enumerate(entry.dims_of(tensor)) if split[0] in axes)


@click.command()
@click.argument("a", type=Place())
@click.argument("b", type=Place())
@click.option("--config", type=Place(exists=True), help="config.json of the model, or its folder, where neither A nor B has one.")
@click.option("--layout", type=click.Path(exists=True, dir_okay=False), help="A layout descriptor of your own, for both.")
@click.option("--from-a", type=click.Choice(FORMATS), help="Format of A, where its files don't tell.")
@click.option("--from-b", type=click.Choice(FORMATS), help="Format of B, where its files don't tell.")
@click.option("--dtype", type=click.Choice(list(USER_WORDS)), help="Compare floating-point tensors as this: confirms a cast.")
@click.option("--atol", type=click.FloatRange(0), default=0.0, metavar="X", help="Elements within X of each other are equal.")
@click.option("--dequantise", is_flag=True, help="Compare the weights of a quantised one with those of the other.")
@report_option
@json_option
@click.option("-q", "--quiet", is_flag=True)
def diff(a, b, config, layout, from_a, from_b, dtype, atol, dequantise, report, as_json, quiet):
    """Tell whether A and B hold the same parameters, bit for bit, whatever their layouts. Exit code 3: they differ."""
    from reshard.api import diff as run
    from reshard.api import open_pair

    left, right = open_pair(a, b, layout=layout, config=config, formats=(from_a, from_b))
    with progress_bar(left.bytes + right.bytes, quiet or as_json) as tell:
        found = run(left, right, dtype=dtype, atol=atol, maps=report is not None and not dequantise, dequantise=dequantise, progress=tell)
    if report:
        from reshard.pages.diff import diff_page

        report.write_text(diff_page(found, a, b))
    if as_json:
        differing = [d.to_json() for d in found.differing]
        click.echo(json.dumps({"ok": True, "equal": found.equal, "tensors": found.tensors, "differing": differing,
                               "missing_in_a": found.missing_in_a, "missing_in_b": found.missing_in_b,
                               "bytes_missing_in_a": found.bytes_missing_in_a, "bytes_missing_in_b": found.bytes_missing_in_b}))  # fmt: skip
    elif found.equal:
        how = f"as {dtype}" if dtype else "" if atol else "bit for bit, dequantised" if dequantise else "bit for bit"
        click.echo(f"equal: {found.tensors} tensors, {', '.join(filter(None, [how, f'within {atol:g}' if atol else '']))}")
    else:
        sides = (a, found.missing_in_a, found.bytes_missing_in_a), (b, found.missing_in_b, found.bytes_missing_in_b)
        for word, names, size in sides:
            for name in names[:20]:
                click.echo(printable(f"missing in {word}: {name}"))
            if names:
                click.echo(f"missing in {word}: {count(len(names), 'tensor')}, {human(size)}")
        if found.differing:
            rows = [(f"{d.name} ({d.why})" if d.why else d.name, d.elements, "-" if d.max_abs_diff is None else f"{d.max_abs_diff:.3g}")
                    for d in found.differing[:20]]  # fmt: skip
            click.echo(table(rows, ("differs", "elements", "max |a-b|")))
        click.echo(
            f"different: {len(found.differing)} of {found.tensors} tensors differ, {len(found.missing_in_a) + len(found.missing_in_b)} missing"
        )
    if not found.equal:
        sys.exit(3)


@click.command()
def demo():
    """The whole story on a small model: convert, convert again, come back, compare. No download, a few seconds."""
    from reshard.demo import demo as run

    if not run(click.echo):
        raise ReshardError("the demo did not come back to where it began", "this is a defect of reshard; please report it")
