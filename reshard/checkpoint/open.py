"""From a folder to an opened checkpoint: its format, its config.json, the descriptor of its architecture, the match."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from reshard import formats
from reshard.checkpoint.adapter import adapter_of
from reshard.checkpoint.config import find_config, model_config, read_config
from reshard.checkpoint.match import match
from reshard.checkpoint.opened import Checkpoint
from reshard.dtypes import INTEGERS
from reshard.errors import FormatError, LayoutError, PlanError
from reshard.foreign import quote
from reshard.formats.manifest import read_manifest
from reshard.formats.quantised import codes_without_scales, refuse, scheme
from reshard.hub import folder_of
from reshard.layout import Descriptor, Mesh, Placement, architectures, builtin_descriptors, find_descriptor, load_descriptor
from reshard.layout.schemes import quantised
from reshard.stores.files import AnyPath, reading
from reshard.stores.identity import identity, noting


def open_checkpoint(
    path: str | Path,
    *,
    format: str | None = None,
    layout: str | Path | None = None,
    config: str | AnyPath | None = None,
    cache: bool = False,
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Read the headers of the checkpoint in folder `path`, and match them with its layout.

    `format` forces what is otherwise recognised from the files; `layout` is a TOML file of the user's own; `config` is a
    config.json, or the folder of one, for formats that have none. `path` may be hf://ORG/NAME[@REV][/SUBDIR]: ranges of its
    files are read then, unless they are in the Hub's cache; `cache` puts them there first. `adapter` is the folder of a LoRA adapter, which
    is merged into the weights as they are read. A folder that is an adapter itself is one side of a conversion, too: `config` is its base's.
    Raises FormatError, LayoutError, PlanError or HubError.
    """
    if adapter is not None:
        from reshard.checkpoint.merged import mergeable, merged

        base = open_checkpoint(path, format=format, layout=layout, config=config, cache=cache)
        mergeable(base)
        return merged(base, open_checkpoint(adapter, layout=layout, config=base.config_path))
    folder = folder_of(path, cache)
    manifest = read_manifest(folder)
    kind = formats.get(format) if format else formats.recognise(folder, manifest)
    config_path, make = _config_of(folder, config, kind)
    with noting() as identities:
        if isinstance(config_path, Path):
            identities[str(config_path)] = identity(config_path.stat())
        with reading(folder):
            settings = make(folder) if make else read_config(config_path)
        own = load_descriptor(Path(layout)) if layout else None

        def opened(read: Callable[[], formats.Contents]) -> Checkpoint:
            with noting() as noted:
                with reading(folder), _naming(folder):
                    contents = read()
            with _naming(config_path):
                checkpoint = _matched(folder, kind, contents, manifest or {}, config_path, settings, own)
            identities.update(noted)
            checkpoint.identities, checkpoint.made = identities, settings if make else None
            checkpoint.masters = contents.masters and partial(opened, contents.masters)
            return checkpoint

        return opened(partial(kind.read, folder))


def _config_of(
    folder: AnyPath, config: str | AnyPath | None, kind: formats.Format
) -> tuple[AnyPath, Callable[[AnyPath], Mapping[str, object]] | None]:
    """The file that tells the model's sizes; and, of a format that has one of its own in the place of config.json, what makes that of it."""
    try:
        return find_config(folder, config), None
    except FormatError:
        if config is not None or kind.settings is None or not (folder / kind.settings[0]).is_file():
            raise
        return folder / kind.settings[0], kind.settings[1]


@contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """Errors of layouts and meshes, which know of no file, with the name of the one that they are about."""
    try:
        yield
    except (LayoutError, PlanError) as error:
        if str(path) in f"{error} {error.hint}":
            raise
        raise (LayoutError if isinstance(error, LayoutError) else FormatError)(f"{path}: {error}", error.hint) from None


def _matched(
    folder: AnyPath,
    kind: formats.Format,
    contents: formats.Contents,
    manifest: Mapping[str, object],
    config_path: AnyPath,
    settings: Mapping[str, object],
    own: Descriptor | None,
) -> Checkpoint:
    """The checkpoint whose files hold `contents`, by the descriptor that is given or, by default, that of its architecture."""
    descriptor = own or find_descriptor(settings)
    quantised_as = scheme(settings, contents)
    if descriptor is None and quantised_as:
        raise refuse(folder, quantised_as, contents)
    if descriptor is None:
        raise unknown_architecture(settings, contents)
    if not own and contents.layout not in (None, descriptor.name, f"{descriptor.name}+lora"):
        raise FormatError(f"{folder} was written by layout {quote(contents.layout)}, {config_path} is a model of layout {descriptor.name}",
                          "pass the layout's file with --layout, or the right config.json with --config")  # fmt: skip
    bound = descriptor.bind(model_config(settings))
    disagreements = kind.disagreements(bound, contents) if kind.disagreements else []
    if disagreements:
        raise PlanError([f"{folder}: {text}" for text in disagreements],
                        f"{config_path} is of another model: name the config.json of the one that was trained, with --config")  # fmt: skip
    names = {piece.name for piece in contents.pieces}
    bound = quantised(bound, kind.section, names) if quantised_as else bound
    adapter = adapter_of(folder, contents, bound) if "adapter" in kind.holds else None
    if adapter is None and "model" not in kind.holds:
        raise FormatError(
            f"{folder} holds no weights of a LoRA adapter's: none of its {len(names)} tensors has lora in its name", "copy it again, whole"
        )
    bound = adapter.layout(bound) if adapter else bound
    checkpoint = Checkpoint(
        folder,
        kind.name,
        contents.mesh,
        bound,
        [],
        engine_version=contents.engine_version,
        config_path=config_path,
        writer=contents.writer,
        adapter=adapter,
    )
    checkpoint.native = manifest.get("dtypes", {})
    checkpoint.origin = (
        {"repo": folder.repository.location.repo, "revision": folder.revision} if checkpoint.remote else manifest.get("source")
    )
    try:
        match(checkpoint, kind, contents)
    except PlanError:
        if quantised_as and checkpoint.layout.scheme == "none":  # one sentence instead of a line for each scale
            raise refuse(folder, quantised_as, contents) from None
        raise
    numbers = {name for name, tensor in checkpoint.layout.descriptor.tensors.items() if tensor.dtype in INTEGERS}  # no codes
    without = None if own else codes_without_scales(folder, settings, checkpoint.stored, numbers.union(checkpoint.layout.operands))
    if without:
        raise without
    return checkpoint


def unknown_architecture(settings: Mapping[str, object], contents: formats.Contents) -> LayoutError:
    """The error for a model that no descriptor lists: which family comes closest, and what it leaves unexplained."""
    names = {piece.name for piece in contents.pieces}
    best: tuple[tuple[int, ...], str, list[str]] | None = None
    for family, descriptor in builtin_descriptors().items():
        try:
            bound = descriptor.bind(model_config(settings))
            section = bound.section("hf")
            all_entries = section.entries + tuple(e for _, _, variant in section.variants for e in variant.entries)
            rules = formats.get("hf").rules
            known = {s.name for s in Placement(bound, replace(section, entries=all_entries), rules, Mesh()).stored(aliases=True)}
            lacking = sum(s.name not in names for s in Placement(bound, section, rules, Mesh()).stored())
        except LayoutError:
            continue
        left = sorted(names - known)
        score = len(left), lacking, -len(descriptor.formats), len(descriptor.tensors), -len(descriptor.architectures)
        if best is None or score < best[0]:
            best = score, family, left
    architecture = quote(", ".join(architectures(settings) or ["(config.json names none)"]))
    text = f"no layout descriptor for architecture {architecture}"
    if contents.layout:
        return LayoutError(f"{text}; its files were written by layout {quote(contents.layout)}", "pass that layout's file with --layout")
    if best is None or len(best[2]) == len(names):
        text += f", and no family explains any of its {len(names)} tensors:\n  {_listed(sorted(names))}"
        return LayoutError(text, "`reshard layouts new` drafts a descriptor (docs/guides/descriptor.md); pass it with --layout FILE.toml")
    _, family, left = best
    if left:
        text += f"\nclosest is {family}, which leaves {len(left)} of {len(names)} tensors unexplained:\n  {_listed(left)}"
    else:
        text += f"\n{family} explains the names of all {len(names)} tensors"
    return LayoutError(
        text, f'`reshard layouts new` drafts a descriptor; it begins with extends = "{family}". Pass it with --layout FILE.toml'
    )


def _listed(names: list[str], shown: int = 12) -> str:
    return "\n  ".join(map(quote, names[:shown])) + (f"\n  … and {len(names) - shown} more" if len(names) > shown else "")
