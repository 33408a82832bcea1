"""A LoRA adapter alone, to be synced: its layout from its base's."""

from collections.abc import Iterable

from reshard.errors import PlanError
from reshard.layout import Layout
from reshard.layout.lora import Target, adapter_layout


def adapter(
    layout: Layout, r: int, targets: Iterable[str] = ("q", "k", "v", "o", "gate", "up", "down"), *, name: str | None = None
) -> Layout:
    """The adapter's own layout: nothing but its A and B of the tensors of `layout` named in `targets`, cut as those are.

    `name` is PEFT's adapter name as it stands in a model's parameter names (``default``); None leaves it out, as
    adapter_model.safetensors does. Formats hf and tp (HF names, cut as the weights are) know it.
    """
    found = []
    for target in targets:
        base = layout.descriptor.tensors.get(target)
        entry = next((e for e in layout.section("hf").entries if e.of == (target,) and not e.alias), None)
        if base is None or entry is None or len(base.dims) != 2 or not entry.name.endswith(".weight"):
            raise PlanError([f"{target} is no matrix of layout {layout.name} that an adapter can target"])
        found.append(Target(entry, {number: (r, 1.0) for number in layout.numbers(entry.place) if layout.exists(base, number)}))
    return adapter_layout(layout, found, name=name)
