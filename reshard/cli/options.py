"""Arguments and options that commands share, and what they are converted to."""

from pathlib import Path

import click

from reshard.errors import ReshardError
from reshard.registry import FORMATS as KNOWN
from reshard.registry import READ_ONLY

FORMATS = ["hf", *(name for name in KNOWN if name != "hf")]
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Size(click.ParamType):
    """A number of bytes such as 128MB."""

    name = "size"

    def convert(self, value, param, ctx):
        if isinstance(value, int):
            return value
        text = value.strip().upper().removesuffix("/S")
        number = text.rstrip("KMGTIB")
        try:
            return int(float(number) * _UNITS[text[len(number) :]])
        except (ValueError, KeyError):
            self.fail(f"{value!r} is not a size; write it like 128MB", param, ctx)


class Place(click.ParamType):
    """A folder, or hf://ORG/NAME[@REV][/SUBDIR]; a malformed one is wrong usage."""

    name = "location"

    def __init__(self, target: bool = False, exists: bool = False):
        self._target, self._exists = target, exists

    def convert(self, value, param, ctx):
        from reshard.hub import is_remote

        if is_remote(value):
            from reshard.hub.location import parse, parse_target

            try:
                return str((parse_target if self._target else parse)(value))
            except ReshardError as error:
                usage = click.BadParameter(str(error), ctx, param)
                usage.hint = error.hint
                raise usage from None
        return click.Path(exists=True).convert(value, param, ctx) if self._exists else value

    def shell_complete(self, ctx, param, incomplete):
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="dir")]


def mesh_options(command):
    for name, text in (("--ep", "expert-parallel ranks"), ("--pp", "pipeline stages"), ("--tp", "tensor-parallel ranks")):
        command = click.option(name, type=click.IntRange(1, 65536), default=1, show_default=True, help=f"Number of {text} of the result.")(
            command
        )
    command = click.option("--etp", type=click.IntRange(0, 65536), default=0, hidden=True)(command)
    return command


def source_options(command):
    command = click.option(
        "--config", type=Place(exists=True), help="config.json of the model, or its folder, where the checkpoint has none."
    )(command)
    command = click.option("--layout", type=click.Path(exists=True, dir_okay=False), help="A layout descriptor of your own.")(command)
    return click.option("--from", "from_", type=click.Choice(FORMATS), help="Format of SRC, where its files don't tell.")(command)


def target_options(command, required=True):
    command = click.option(
        "--engine-version", metavar="V", help="Release of vLLM or SGLang that will read the files; the newest known by default."
    )(command)
    command = click.option(
        "--engine-platform",
        type=click.Choice(["cuda", "rocm", "cpu"]),
        help="What that engine runs on, where names or shapes hang on it; cuda by default.",
    )(command)
    command = click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Store floating-point tensors as this.")(command)
    command = click.option("--optimizer", is_flag=True, help="With the optimizer's state, where SRC has it and the format holds it.")(
        command
    )
    command = click.option("--dequantise", is_flag=True, help="Compute the weights of a quantised checkpoint from its codes and scales.")(
        command
    )
    command = click.option(
        "--quantise", type=click.Choice(["fp8"]), help="Compute codes and scales from weights: FP8 in blocks of 128 × 128."
    )(command)
    command = click.option("--refine", is_flag=True, help="Repeat scales on finer blocks, exactly, where a cut misses them.")(command)
    command = mesh_options(command)
    return click.option(
        "--to",
        "to",
        type=click.Choice([name for name in FORMATS if name not in READ_ONLY]),
        required=required,
        help="Format of the result.",
    )(command)


rank_option = click.option("--rank", type=click.IntRange(0), help="Only what this rank needs.")
cache_option = click.option(
    "--cache", is_flag=True, help="Download SRC's files into the Hub's cache first, for others too, and read them there."
)
report_option = click.option("--report", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write an HTML page too.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def run_options(command):
    """What ``convert`` and ``pull`` share besides source and target."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Tracebacks with errors."),
        click.option("-q", "--quiet", is_flag=True, help="No progress, no summary."),
        json_option,
        click.option("--overwrite", is_flag=True, help="Replace what the destination holds."),
        click.option(
            "--max-shard-size",
            type=Size(),
            help="Bytes of a weight file, at most, where one tensor is no larger; default: usual for the format.",
        ),
        click.option(
            "--allow-overflow", is_flag=True, help="With --dtype: store a value that has no room in it as infinity, instead of refusing."
        ),
        click.option("--no-fsync", is_flag=True, help="Don't wait until the files are durable."),
        click.option("--buffer", type=Size(), default="128MB", show_default=True, help="Memory for buffers, in all."),
        click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Threads; default 2, and 8 where SRC is on the Hub."),
        click.option("-n", "--dry-run", is_flag=True, help="Plan only; write nothing."),
        cache_option,
        rank_option,
    ):
        command = option(command)
    return command


def push_options(command):
    command = click.option("--base-model", metavar="ORG/NAME", help="For the model card, where the files don't tell.")(command)
    command = click.option("--include-code", is_flag=True, help="Publish the .py files that lie directly in the folder, too.")(command)
    command = click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")(command)
    return click.option(
        "--public/--private", default=False, help="A new repository is private, and a public one is refused, unless --public."
    )(command)
