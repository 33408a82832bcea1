"""LoRA adapters: which weights of its base one targets, with what rank and scale, as adapter_config.json and the names of its tensors say.

Names tell what is targeted, the config how much: scale = alpha / rank (rsLoRA: / √rank), by patterns where some modules have their own.
What changes more than that (DoRA) or changed the base before (PiSSA) is refused by name. Source: peft 0.21 ``tuners/lora``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod, sqrt

from reshard.errors import FormatError, PlanError
from reshard.foreign import quote
from reshard.formats import Contents
from reshard.formats.peft import CONFIG
from reshard.layout import Entry, Layout
from reshard.layout.lora import PREFIX, Target, adapter_layout
from reshard.stores.files import AnyPath, read_json

#: settings under which an adapter is more than base + scale·B·A, and how that is called
_MORE = {
    "use_dora": "DoRA, which scales each row by a learned magnitude",
    "use_qalora": "QA-LoRA, which pools the input",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a LoRA with a bias of its own (lora_bias)",
    "alora_invocation_tokens": "an activated LoRA, in force for part of a prompt only",
    "trainable_token_indices": "trained rows of the embedding (trainable_token_indices)",
    "layer_replication": "a LoRA over repeated layers (layer_replication)",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow, which chooses among several adapters",
}
#: ways to begin that take something off the base's weights, which the files do not tell
_BASE_CHANGED = re.compile(r"pissa.*|olora|corda|loftq|lora_ga", re.I)
_AWAY = "merge it with PEFT: PeftModel.from_pretrained(model, DIR).merge_and_unload()"
#: a pattern that matches in bounded time: nothing repeated that repeats inside
_PATTERN = re.compile(r"(?:\\[.dw]|[\w.|()^$-]|\[[\w-]+\]|(?<!\))[*+?])*", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base: `targets` get scale·B·A, the entries of `own` are whole tensors in the place of the base's."""

    targets: tuple[Target, ...]
    own: Mapping[Entry, tuple[int | None, ...]] = field(default_factory=dict)
    name: str | None = None

    def layout(self, base: Layout) -> Layout:
        return adapter_layout(base, self.targets, self.own, self.name)


def adapter_of(folder: AnyPath, contents: Contents, base: Layout) -> Adapter | None:
    """The adapter of a model of layout `base` that `contents` are; None where they are none. Raises FormatError or PlanError."""
    names = {piece.name: piece.extent or () for piece in contents.pieces}
    if not any(".lora_" in name for name in names):
        return None
    if not (folder / CONFIG).is_file():
        raise FormatError(f"{folder} holds a LoRA adapter's weights and no {CONFIG}, which tells their scale", "copy it again, whole")
    settings = _settings(folder / CONFIG)
    infix = {match[1] for name in names if (match := re.search(r"\.lora_(?:[AB]\.([^.]+)\.weight|embedding_[AB]\.([^.]+))$", name))}
    if len(infix) > 1:
        raise FormatError(f"{folder} holds {len(infix)} adapters: {quote(', '.join(sorted(map(str, infix))))}", "save them one by one")
    name = next(iter(infix), None)
    held = {key: shape for full, shape in names.items() for key in _below(full)} if contents.nested else names

    def there(target: Target, numbers: Iterable[int | None]) -> Target:
        """`target` with the strengths of those of `numbers` that the files have."""
        entry = target.entry
        found = [n for n in numbers if any(_filled(base, target.peft(letter, name), entry, n) in held for letter in "AB")]
        return replace(target, ranks={n: _strength(settings, _filled(base, entry.name, entry, n).removesuffix(".weight")) for n in found})

    targets, modules = [], {}
    for entry, numbers in _entries(base):
        if entry.name.endswith(".weight"):
            targets += [there(Target(entry, {}), numbers), there(Target(entry, {}, embedding=True, flipped=True), numbers)]
        elif _wanted(settings, entry.name):
            modules.setdefault(entry.name.rpartition(".")[0], []).append((entry, numbers))
    for stacks in modules.values():  # parameters of one module are wrapped in their order: the last stands outside
        found = [there(Target(entry, {}, outer=len(stacks) - 1 - i), numbers) for i, (entry, numbers) in enumerate(stacks)]
        flipped = any(_flipped(base, target, name, held) for target in found)
        targets += [replace(target, flipped=flipped) for target in found]
    adapter = Adapter(tuple(target for target in targets if target.ranks), _own(base, names), name)
    if not adapter.targets:
        raise PlanError([f"{folder}: none of its {len(names)} tensors is beside a weight of layout {base.name}"],
                        "name the config.json of the model that it was trained on, with --config")  # fmt: skip
    return adapter


def _flipped(base: Layout, target: Target, name: str | None, held: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether A of a stack lies over its rows: PEFT asks the module, we see it by the sizes."""
    tensors = [base.descriptor.tensors[leaf] for leaf in target.entry.of]
    for number in target.ranks:
        sizes, first = [base.shape(tensor, number) for tensor in tensors], len(tensors[0].dims[0])
        rows, columns = sum(prod(size[:first]) for size in sizes), prod(sizes[0][first:])
        if rows != columns and held.get(_filled(base, target.peft("A", name), target.entry, number), ())[-1:] == (rows,):
            return True
    return False


def _below(name: str) -> Iterator[str]:
    """`name`, and what is left of it below each of its keys."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _settings(path: AnyPath) -> Mapping[str, object]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise FormatError(f"{path} holds a {type(settings).__name__}, expected an object")
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(f"{path.parent} is an adapter of type {quote(str(kind))}; reshard knows LORA", _AWAY)
    more = [what for key, what in _MORE.items() if settings.get(key)]
    if more:
        raise FormatError(f"{path.parent} is {', and '.join(more)}: more than base + scale·B·A ({path.name})", _AWAY)
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and _BASE_CHANGED.fullmatch(begun):
        raise FormatError(f"{path.parent} began as {quote(begun)} (init_lora_weights), which changes the base's weights, and its files do not tell how",
                          "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it")  # fmt: skip
    for key, table, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", int | float)):
        own = settings.get(table) or {}
        if not isinstance(own, dict):
            raise FormatError(f"{path}: {table} is {quote(repr(own))}, expected numbers by pattern of a module's name")
        for pattern, value in {key: settings.get(key, 8), **own}.items():
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 1 << 20:
                raise FormatError(f"{path}: {quote(pattern)} is {quote(repr(value))}, expected a number above 0")
            if len(pattern) > 200 or not _PATTERN.fullmatch(pattern) or len(re.findall(r"[*+?]", pattern)) > 4 or not _compiles(pattern):
                raise FormatError(f"{path}: {table}: cannot take {quote(repr(pattern))} as a pattern of module names")
    return settings


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


def _strength(settings: Mapping[str, object], module: str) -> tuple[int, float]:
    """Rank and scale of the module."""
    rank, alpha = (_by_pattern(settings.get(key), module, settings.get(default, 8)) for key, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))  # fmt: skip
    return rank, alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, otherwise: float) -> float:
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)


def _entries(base: Layout) -> Iterator[tuple[Entry, list[int | None]]]:
    """Every way in which the model's matrices are named, on disk and in memory, with the numbers in which they exist."""
    section, seen = base.section("hf"), set()
    for each in (section, *section.prefixes):
        for one in (each, *(variant for _, _, variant in each.variants)):
            for entry in one.entries:
                tensors = [base.descriptor.tensors[name] for name in entry.of]
                if entry.omit or (entry.place, entry.name) in seen:
                    continue
                numbers = [n for n in base.numbers(entry.place) if all(base.exists(t, n if t.place == entry.place else None) for t in tensors)
                           and base.holds(entry.when, entry.place, n)]  # fmt: skip
                if numbers:
                    seen.add((entry.place, entry.name))
                    yield entry, numbers


def _filled(base: Layout, name: str, entry: Entry, number: int | None) -> str:
    return base.fill(name, entry.place, number, number).replace("{expert}", "0")


def _wanted(settings: Mapping[str, object], name: str) -> bool:
    """Whether a parameter is among `target_parameters`."""
    wanted = settings.get("target_parameters")
    return isinstance(wanted, list) and any(isinstance(each, str) and f".{name}".endswith(f".{each}") for each in wanted)


def _own(base: Layout, names: Mapping[str, object]) -> Mapping[Entry, tuple[int | None, ...]]:
    """Entries of whole tensors among `names`: modules_to_save, biases, embeddings saved with their adapter (``base_layer``)."""
    whole = {name.removeprefix(PREFIX) for name in names if ".lora_" not in name and name.startswith(PREFIX)}
    entries = list(_entries(base)) if whole else []
    out: dict[Entry, tuple[int | None, ...]] = {}
    taken: set[str] = set()
    for entry, numbers in entries:
        module, _, last = entry.name.rpartition(".")
        for each in (entry, replace(entry, name=f"{module}.base_layer.{last}")):
            found = {n: at for n in numbers if (at := _filled(base, each.name, entry, n)) in whole - taken}
            if not found:
                continue
            if each is entry and any((other.copy or other.alias) and other.of == entry.of for other, _ in entries):
                raise PlanError([f"the adapter has its own {quote(min(found.values()))}, and the model has one tensor for input and output embedding"],
                                "such a merge is no tied model any more: untie the base (tie_word_embeddings) before it is trained")  # fmt: skip
            taken |= set(found.values())
            out[each] = tuple(found)
    return out
