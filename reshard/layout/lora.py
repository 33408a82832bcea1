"""The layout of a LoRA adapter: two small matrices beside each weight that it targets, under PEFT's names. Pure.

A weight W of two dimensions becomes W + scale·R·C, where R has W's first dimension and C its second, and both have the rank. R is cut where W's
first dimension is, C where its second is. Of a fused weight (phi3's qkv_proj) C is one for all that is fused, and R is fused as they are.
PEFT stores ``lora_A`` with the rank first and ``lora_B`` with it last. For a matrix C is A; for an embedding R is. Stacked experts are packed
with the expert slowest in A and fastest in B. Source: peft 0.21 ``tuners/lora/layer.py``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from reshard.errors import PlanError
from reshard.layout.bound import Layout
from reshard.layout.fusion import Group
from reshard.layout.model import Entry, Section, Tensor
from reshard.planner.values import Operand, Over, Value, formed

#: what all of PEFT's names begin with
PREFIX = "base_model.model."
#: how the tensor is called that an adapter changes, where the changed one has its own name
BASE = "base"


@dataclass(frozen=True)
class Target:
    """An entry (of Hugging Face names) whose tensors an adapter changes: `ranks` are rank and scale, by the number of its place.

    `embedding`: PEFT's names are those of an embedding's. `flipped`: A lies over the first dimension (embeddings; stacks that PEFT takes
    for transposed). `outer`: of a stack, how many others of its module PEFT wrapped after it.
    """

    entry: Entry
    ranks: Mapping[int | None, tuple[int, float]]
    embedding: bool = False
    flipped: bool = False
    outer: int = 0

    @property
    def stacked(self) -> bool:
        return not self.embedding and not self.entry.name.endswith(".weight")

    def peft(self, letter: str, adapter: str | None = None) -> str:
        """PEFT's name of A or B, a template as the entry's. `adapter` is its name in memory, which files do not have."""
        infix = f".{adapter}" if adapter else ""
        if self.embedding:
            return f"{PREFIX}{self.entry.name.removesuffix('.weight')}.lora_embedding_{letter}{infix}"
        stem = self.entry.name.rpartition(".")[0]  # of a stack, whose last word is a parameter's, the module too
        return f"{PREFIX}{stem}{'.base_layer' * self.outer}.lora_{letter}{infix}.weight"


@dataclass(frozen=True)
class Way:
    """The numbers of a target's place that share rank, scale and sizes; names of the factors that they have."""

    rank: int
    scale: float
    shapes: tuple[tuple[int, ...], ...]  # of each tensor of the entry
    numbers: tuple[int | None, ...]
    rows: tuple[str, ...]
    columns: str


def ways(layout: Layout, target: Target) -> list[Way]:
    found: dict[tuple[int, float, tuple[tuple[int, ...], ...]], list[int | None]] = {}
    tensors = [layout.descriptor.tensors[name] for name in target.entry.of]
    for number, (rank, scale) in target.ranks.items():
        found.setdefault((rank, scale, tuple(layout.shape(t, number) for t in tensors)), []).append(number)
    row, column = ("A", "B") if target.flipped else ("B", "A")
    out = []
    for i, ((rank, scale, shapes), numbers) in enumerate(found.items()):
        end = f" {i + 1}" if i else ""
        rows = tuple(f"{name}.lora_{row}{end}" for name in target.entry.of)
        out.append(Way(rank, scale, shapes, tuple(numbers), rows, f"{'+'.join(target.entry.of)}.lora_{column}{end}"))
    return out


def adapter_layout(
    layout: Layout, targets: Iterable[Target], own: Mapping[Entry, Iterable[int | None]] = {}, name: str | None = None
) -> Layout:
    """The layout of an adapter of `layout`'s model: its factors, and (`own`) entries of whole tensors in the place of the model's.

    Under ``hf`` names are those of a model in memory, with the adapter's `name` in them; under ``peft`` they are those of
    adapter_model.safetensors.
    """
    tensors: dict[str, Tensor] = {}
    axes = dict(layout.descriptor.axes)
    entries: dict[str, list[Entry]] = {"hf": [], "peft": []}
    lacking: set[tuple[str, int | None]] = set()
    for target in targets:
        _check(layout, target.entry)
        for way in ways(layout, target):
            axes[_axis(way.rank)] = str(way.rank)
            made = list(_tensors(layout, target, way))
            tensors |= {tensor.name: tensor for tensor in made}
            others = [n for n in layout.numbers(target.entry.place) if n not in way.numbers]
            lacking |= {(tensor.name, n) for tensor in made for n in others}
            for format, infix in (("hf", name), ("peft", None)):
                entries[format] += _entries(layout, target, way, infix)
    for entry, numbers in own.items():
        held = set(numbers)
        for leaf in entry.of:
            tensors[leaf] = layout.descriptor.tensors[leaf]
            lacking |= {(leaf, n) for n in layout.numbers(entry.place) if n not in held}
        for format in entries:
            entries[format].append(replace(entry, name=f"{PREFIX}{entry.name}"))
    sections = {format: Section(tuple(each)) for format, each in entries.items()}
    descriptor = replace(layout.descriptor, name=f"{layout.name}+lora", tensors=MappingProxyType(tensors), axes=axes, formats=sections)
    bound = descriptor.bind(layout.config)
    return replace(bound, lacking=bound.lacking | lacking, _cache={})


def changed(layout: Layout, targets: Iterable[Target]) -> tuple[Layout, Mapping[tuple[str, int | None], str]]:
    """`layout` of a model whose weights are computed from themselves and an adapter's factors; and the tensors (name, number of their place)
    that are, each with the name by which it is an operand."""
    values: dict[str, tuple[Value, ...]] = {}
    renamed: dict[tuple[str, int | None], str] = {}
    for target in targets:
        for way in ways(layout, target):
            for leaf, rows, shape in zip(target.entry.of, way.rows, way.shapes):
                values[leaf] = (*values.get(leaf, ()), _value(layout.descriptor.tensors[leaf], shape, rows, way))
                renamed |= {(leaf, n): formed(leaf, BASE) for n in way.numbers}
    return replace(layout, values=MappingProxyType(values), _cache={}), renamed


def _check(layout: Layout, entry: Entry) -> None:
    for leaf in entry.of:
        if len(layout.descriptor.tensors[leaf].dims) != 2:
            raise PlanError([f"{leaf} is no matrix of layout {layout.name} that an adapter can target"])


def _axis(rank: int) -> str:
    return f"lora {rank}"


def _tensors(layout: Layout, target: Target, way: Way) -> Iterator[Tensor]:
    lora = (_axis(way.rank),)
    bases = [layout.descriptor.tensors[name] for name in target.entry.of]
    dims = [(base.dims[0], lora) for base in bases] + [(lora, bases[0].dims[1])]
    for name, base, own in zip((*way.rows, way.columns), (*bases, bases[0]), dims):
        split = tuple(axis for axis in base.split if any(axis in dim for dim in own))
        yield Tensor(name, base.index, own, split, base.when, base.stage, place=base.place)


def _entries(layout: Layout, target: Target, way: Way, adapter: str | None) -> Iterator[Entry]:
    entry, lora = target.entry, (_axis(way.rank),)
    base = layout.descriptor.tensors[entry.of[0]]
    stored = entry.dims_of(base)
    packed = {"A": lora, "B": lora} if not target.stacked else {"A": ("expert", *lora), "B": (*lora, "expert")}
    for dim, fusion in ((0, entry.fusion.renamed(dict(zip(entry.of, way.rows)))), (1, Group(None, (way.columns,)))):
        lying = next(axes for axes in stored if set(axes) == set(base.dims[dim]))
        letter = "A" if (dim == 1) != target.flipped else "B"
        dims = (packed["A"], lying) if letter == "A" else (lying, packed["B"])
        yield Entry(f"{entry.label}.lora_{letter} {way.rank}", target.peft(letter, adapter), fusion, dims, entry.cut, entry.split,
                    when=entry.when, stage=entry.stage, place=entry.place)  # fmt: skip


def _value(tensor: Tensor, shape: tuple[int, ...], rows: str, way: Way) -> Value:
    over = [Over((axis,), (size,), size) for axis, size in enumerate(shape)]
    first, rank = len(tensor.dims[0]), Over((), (), way.rank)
    operands = (
        Operand.alike(formed(tensor.name, BASE), shape),
        Operand(way.columns, (rank, *over[first:])),
        Operand(rows, (*over[:first], rank)),
    )
    return Value("merged", operands, None, (("factor", way.scale),))
