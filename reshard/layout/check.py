"""What can only be seen with sizes at hand: that a format holds every tensor of the model once, and which it does without."""

from collections import defaultdict
from functools import cached_property

from reshard.errors import LayoutError
from reshard.layout.bound import Layout
from reshard.layout.place import Placement
from reshard.text import some


def unheld(placement: Placement) -> list[str]:
    """Tensors that no entry holds, and those that several do; an entry that says `copy` may stand beside another, or alone,
    and one that says `omit` in the place of all."""
    layout, section = placement.layout, placement.section
    held: dict[tuple[str, int | None], list[str]] = defaultdict(list)
    copied: set[tuple[str, int | None]] = set()
    for entry in section.entries:
        if entry.alias:
            continue
        for number in placement.holding(entry):
            for name in dict.fromkeys(entry.of):
                at = name, number if layout.descriptor.tensors[name].place == entry.place else None
                if entry.copy:
                    copied.add(at)
                else:
                    held[at].append(f"{entry.label} (omit)" if entry.omit else entry.name)
    problems: dict[str, list[int | None]] = defaultdict(list)
    for tensor in layout.descriptor.tensors.values():
        if tensor.place in section.without:
            continue
        for number in layout.numbers(tensor.place):
            if not layout.exists(tensor, number):
                continue
            names = held.get((tensor.name, number), [])
            if not names and (tensor.name, number) not in copied:
                problems[f"nothing holds {tensor.name}"].append(number)
            elif len(names) > 1:
                problems[f"{tensor.name} is held by {' and by '.join(names)}"].append(number)
    return [text if numbers == [None] else f"{text} (number {some(list(map(str, numbers)))})" for text, numbers in problems.items()]


def refuse_unheld(placement: Placement, format: str) -> None:
    """Raises LayoutError with all tensors that `format` holds not at all or more than once."""
    problems = unheld(placement)
    if problems:
        text = problems[0] if len(problems) == 1 else f"{len(problems)} tensors:\n  " + "\n  ".join(problems[:20])
        raise LayoutError(
            f"layout {placement.layout.descriptor.path or placement.layout.name}: [{format}]: {text}",
            "add an entry, say omit = true with its when, or write conditions that exclude each other",
        )


class Omitted:
    """Tensors that a format does not hold: those of whole `places`, and those told one by one (name, number of its place)."""

    def __init__(self, layout: Layout, places: tuple[str, ...], tensors: set[tuple[str, int | None]]):
        self.layout, self.places, self.tensors = layout, places, tensors

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, tuple):
            return False
        tensor = self.layout.descriptor.tensors.get(key[0])
        if tensor is None:
            return False
        number = key[1] if tensor.index and tensor.index[0] == tensor.place else None
        return tensor.place in self.places or (tensor.name, number) in self.tensors

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the tensors that are left out, somewhere at least."""
        whole = (tensor.name for tensor in self.layout.descriptor.tensors.values() if tensor.place in self.places)
        return frozenset((*whole, *(name for name, _ in self.tensors)))


def omitted(placement: Placement) -> Omitted:
    """The tensors that the format of `placement` is declared to do without."""
    entries = [entry for entry in placement.section.entries if entry.omit is True]
    held = {(name, number) for entry in entries for number in placement.holding(entry) for name in entry.of}
    return Omitted(placement.layout, placement.section.without, held)
