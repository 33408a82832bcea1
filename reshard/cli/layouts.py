"""``layouts``: the architectures that reshard knows, and what helps to write a descriptor of one it does not."""

import json
import shutil
import sys
import textwrap
from pathlib import Path

import click

from reshard.cli.look import split_dim
from reshard.cli.options import FORMATS, Place, json_option
from reshard.errors import ReshardError
from reshard.foreign import printable
from reshard.text import human, table


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def layouts(ctx, as_json):
    """List the architectures that reshard knows; `layouts show NAME` explains one."""
    if ctx.invoked_subcommand:
        return
    from reshard.layout import builtin_descriptors

    known = builtin_descriptors()
    if as_json:
        rows = [
            {"name": n, "architectures": list(d.architectures), "formats": sorted(d.formats), "description": d.description}
            for n, d in known.items()
        ]
        click.echo(json.dumps({"ok": True, "layouts": rows}))
        return
    rows = [(n, ", ".join(d.architectures), ", ".join(sorted(d.formats)), d.description) for n, d in known.items()]
    text = table(rows, ("layout", "architectures", "formats", "what"))
    width = shutil.get_terminal_size((1000, 24)).columns  # as wide as need be where it is no terminal
    if max(map(len, text.splitlines())) <= width:
        click.echo(text)
        return
    for name, *lines in rows:  # too narrow for columns
        click.echo("\n".join([name, *(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    ") for line in lines)]))


@layouts.command("show")
@click.argument("name")
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True)
@click.option("--format", "format_", type=click.Choice(FORMATS), default="hf", show_default=True)
@click.option("--config", type=click.Path(exists=True), help="config.json to take sizes from; without it sizes are shown by name.")
def show(name, tp, format_, config):
    """Tell for each tensor of layout NAME its dims, what it is fused with, and which dim tensor parallelism splits."""
    from reshard import formats

    descriptor = _named(name)
    kind = formats.get(format_)
    if config is None:
        rows = [_entry_row(descriptor, entry, tp) for entry in descriptor.section(kind.section).entries if not entry.omit]
        click.echo(table(rows, ("name", "holds", "interleaved within", "split dim", f"dims per rank of tp{tp}", "when")))
        return
    from reshard.checkpoint import find_config, model_config, read_config
    from reshard.layout import Mesh, Placement

    layout = descriptor.bind(model_config(read_config(find_config(Path(config), config))))
    placement = Placement(layout, layout.section(kind.section), kind.rules, Mesh(tp))
    rows = [(s.name, "×".join(map(str, s.shape)), "-" if (d := split_dim(descriptor, s.entry, tp)) is None else d, "+".join(s.entry.of))
            for s in placement.stored(placement.ranks[:1])]  # fmt: skip
    click.echo(table(rows, ("name", "shape on rank 0", "split dim", "holds")))


def _entry_row(descriptor, entry, tp: int) -> tuple:
    """One line of `layouts show` without a config: sizes by the names of their axes."""
    tensor = descriptor.tensors[entry.of[0]]
    split = tensor.split if entry.split is None else entry.split

    def size(axis: str) -> str:
        return f"{axis}/{tp}" if tp > 1 and split[:1] == (axis,) else axis

    lead = [f"[{name}]" for name in tensor.index if name not in entry.numbered]
    dims = [" ".join(map(size, axes)) for axes in entry.dims_of(tensor)]
    text = " ".join(lead + [f"({d})" if " " in d else d for d in dims])
    cut = split_dim(descriptor, entry, max(tp, 2))
    when = tensor.when if entry.when == "true" else entry.when
    return (
        entry.name,
        " + ".join(entry.of),
        " ".join(g.axis for g in entry.fusion.groups() if g.axis) or "-",
        "-" if cut is None else cut,
        text,
        "" if when == "true" else when,
    )


@layouts.command("check")
@click.argument("name")
@click.option("--config", type=click.Path(exists=True), required=True, help="config.json of a model of it, or its folder.")
@json_option
def check(name, config, as_json):
    """Tell what is inconsistent in layout NAME (or FILE.toml), per format and mesh. No weights are read. Exit code 3: something is."""
    from reshard.authoring.review import doubts, review
    from reshard.checkpoint import find_config, read_config

    descriptor = _named(name)
    found, asked = review(descriptor, read_config(find_config(Path(config), config))), doubts(descriptor)
    wrong = [f for f in found if f.wrong]
    if as_json:
        rows = [{"format": f.format, "mesh": str(f.mesh), "release": f.release, "tensors": f.tensors, "largest_rank": f.largest,
                 "wrong": list(f.wrong), "cannot": list(f.cannot)} for f in found]  # fmt: skip
        click.echo(json.dumps({"ok": not wrong, "checked": rows, "doubts": asked}))
    else:
        rows = [(f.format, str(f.mesh), f.release or "", "INCONSISTENT" if f.wrong else "no such cut" if f.cannot else
                 f"{f.tensors} tensors, largest rank {human(f.largest)} in bf16") for f in found]  # fmt: skip
        click.echo(table(rows, ("format", "mesh", "release", "")))
        for text in dict.fromkeys(f"no such cut: {f.format} {f.mesh}: {line}" for f in found for line in f.cannot):
            click.echo(printable(text))
        for line in dict.fromkeys(line for f in wrong for line in f.wrong):
            where = [f"{f.format} {f.mesh}{' of ' + f.release if f.release else ''}" for f in wrong if line in f.wrong]
            click.echo(printable(f"inconsistent: {line} ({where[0]}{f' and {len(where) - 1} more' if len(where) > 1 else ''})", keep="\n"))
        for text in asked:
            click.echo(printable(f"is this right? {text}"))
        click.echo(f"{len(found) - len(wrong)} of {len(found)} consistent" if wrong else f"consistent: {len(found)} formats and meshes")
    if wrong:
        sys.exit(3)


@layouts.command("new")
@click.argument("path", type=Place())
@click.option("--from-transformers", is_flag=True, help="Ask transformers' model of this architecture what tensor parallelism splits.")
@click.option("--from-vllm", is_flag=True, help="Ask vLLM's model and loader what is split, and what its parameters hold and are called.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write it there, not to the terminal.")
def new(path, from_transformers, from_vllm, output):
    """Write a descriptor of the checkpoint in PATH, which no layout explains: from its names, shapes and config.json. What a person
    must decide is marked DECIDE."""
    from reshard.authoring.draft import draft

    text = draft(path, from_transformers=from_transformers, from_vllm=from_vllm)
    if output is None:
        click.echo(text, nl=False)
        return
    if Path(output).exists():
        raise ReshardError(f"{output} is there already", "name a file that is not")
    Path(output).write_text(text, encoding="utf-8")
    count = text.count("DECIDE")
    click.echo(
        f"{output}: {count} to decide; then `reshard layouts check {output} --config {path}`" if count else f"{output}: nothing to decide"
    )


def _named(name: str):
    """The descriptor in FILE.toml, or the one built in."""
    from reshard.layout import builtin_descriptors, load_descriptor

    if name.endswith(".toml"):
        return load_descriptor(Path(name))
    known = builtin_descriptors()
    if name not in known:
        raise ReshardError(f"no layout {name!r}", f"known: {', '.join(known)}; or the path of a file, FILE.toml")
    return known[name]
