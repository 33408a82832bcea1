"""The layout of a LoRA adapter: two small matrices beside each weight it targets, under peft's names. Pure.

Of a weight [out, in] the adapter holds A [r, in] and B [out, r]. A is cut where the weight's `in` is, B where its `out` is,
so that an adapter under FSDP2 or tensor parallelism is placed by the rules of the weights it sits beside.
"""

from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType

from reshard.errors import PlanError
from reshard.layout import Entry, Layout, Section, Tensor
from reshard.layout.fusion import Group


def adapter(
    layout: Layout, r: int, targets: Iterable[str] = ("q", "k", "v", "o", "gate", "up", "down"), *, name: str | None = None
) -> Layout:
    """The adapter's own layout: nothing but its A and B of the tensors of `layout` named in `targets`.

    `name` is peft's adapter name as it stands in a model's parameter names (``default``); None leaves it out, as
    adapter_model.safetensors does. Formats hf and tp (HF names, cut as the weights are) know it.
    """
    tensors, entries = {}, []
    section = layout.section("hf")
    for target in targets:
        base = layout.descriptor.tensors.get(target)
        entry = next((e for e in section.entries if e.of == (target,) and not e.alias), None)
        if base is None or entry is None or len(base.dims) != 2 or not entry.name.endswith(".weight"):
            raise PlanError([f"{target} is no matrix of layout {layout.name} that an adapter can target"])
        stem = f"base_model.model.{entry.name.removesuffix('.weight')}"
        for kind, dims in (("A", (("lora",), base.dims[1])), ("B", (base.dims[0], ("lora",)))):
            axes = {axis for dim in dims for axis in dim}
            tensor = Tensor(
                f"{target}_lora_{kind}",
                base.index,
                dims,
                tuple(a for a in base.split if a in axes),
                base.when,
                base.stage,
                place=base.place,
            )
            tensors[tensor.name] = tensor
            full = f"{stem}.lora_{kind}.{name + '.' if name else ''}weight"
            entries.append(Entry(tensor.name, full, Group(None, (tensor.name,)), place=base.place))
    descriptor = replace(layout.descriptor, name=f"{layout.name}+lora", tensors=MappingProxyType(tensors),
                         axes={**layout.descriptor.axes, "lora": str(r)}, formats={"hf": Section(tuple(entries))})  # fmt: skip
    return descriptor.bind(layout.config)
