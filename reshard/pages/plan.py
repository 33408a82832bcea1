"""A plan as a page: bytes of every rank, and how each family of tensors lies on both sides, part by part.

A *family* is the tensors of the model that share a stored tensor on either side (q, k and v, where one side fuses them). Of layers and experts
that lie alike the first is drawn, so that the page of 671 billion parameters is as long as that of one billion.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from reshard.conversion.job import Job
from reshard.dtypes import DTYPE_SIZE
from reshard.geometry.block import Block, Stored
from reshard.page import bar, page, rows
from reshard.text import count, human

#: more ranks than that, and intervals of one block than that, are not drawn but counted
_RANKS, _PIECES = 16, 96
_COLOURS = 8
_STYLE = """
h4 { font-size: .8rem; font-weight: normal; opacity: .75; margin: 0; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; } @media (max-width: 50rem) { .sides { grid-template-columns: 1fr; } }
.shard { display: flex; height: 1.1rem; margin: 2px 0; background: var(--soft); position: relative; }
.row { display: grid; grid-template-columns: 4.5rem 1fr; align-items: center; } .row > span { font-size: .8rem; opacity: .75; }
.shard i { position: absolute; top: 0; bottom: 0; border-left: 1px solid Canvas; box-sizing: border-box; }
.shard i:focus-visible { outline: 2px solid CanvasText; z-index: 1; } .dim .shard i:not(.same) { opacity: .25; }
.key span { display: inline-block; padding: 0 .5rem; margin-right: .4rem; color: #fff; border-radius: .2rem; font-size: .85rem; }
.t0 { background: #2f6db3 } .t1 { background: #b3572f } .t2 { background: #2f8a5b } .t3 { background: #7b4ab0 }
.t4 { background: #a8862a } .t5 { background: #b03a6b } .t6 { background: #2f8c93 } .t7 { background: #6b6f76 }
#said { position: sticky; bottom: 0; background: Canvas; border-top: 1px solid var(--line); padding: .4rem 0; min-height: 1.5rem; font-size: .9rem; }
"""
_SCRIPT = """
const said = document.getElementById('said');
function tell(e) { const i = e.target.closest('.shard i'); if (!i) return; const f = i.closest('section');
  said.textContent = i.getAttribute('aria-label'); f.classList.add('dim');
  f.querySelectorAll('.shard i').forEach(o => o.classList.toggle('same', o.className.split(' ')[0] === i.className.split(' ')[0])); }
function leave(e) { const f = e.target.closest('section'); if (f) f.classList.remove('dim'); }
for (const name of ['mouseover', 'focusin']) document.addEventListener(name, tell);
for (const name of ['mouseout', 'focusout']) document.addEventListener(name, leave);
"""


@dataclass(frozen=True)
class Family:
    """Tensors that are fused with each other on either side, and the first stored tensors of each rank that hold them."""

    tensors: tuple[str, ...]
    sources: tuple[Stored, ...]
    destinations: tuple[Stored, ...]
    instances: int  # tensors of the model


def families(sources: Sequence[Stored], destinations: Sequence[Stored]) -> list[Family]:
    """All families, in the order in which the source holds them."""
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    held: tuple[dict, dict] = defaultdict(dict), defaultdict(dict)  # first tensor's name → (rank, names) → the first such stored tensor
    keys: dict[str, set] = defaultdict(set)
    for side, found in zip((sources, destinations), held):
        for stored in side:
            names = tuple(dict.fromkeys(part.first[0] for part in stored.parts))
            for name in names[1:]:
                group[root(name)] = root(names[0])
            for part in stored.parts:
                keys[part.first[0]].update((*part.first[:-1], part.first[-1] + i) if i else part.first for i in range(part.count))
            if names:
                found[names[0]].setdefault((stored.rank, names), stored)
    together: dict[str, list[str]] = defaultdict(list)
    for name in keys:
        together[root(name)].append(name)

    def of(found: dict, names: list[str]) -> tuple[Stored, ...]:
        return tuple(sorted((s for name in names for s in found[name].values()), key=lambda s: s.rank))

    return [
        Family(tuple(names), of(held[0], names), of(held[1], names), sum(len(keys[name]) for name in names)) for names in together.values()
    ]


def intervals(block: Block) -> Iterator[tuple[int, int]]:
    """Where `block` lies in its stored tensor, as half-open ranges of elements, from the first; hulls where they would be too many."""
    axes = sorted((axis for axis in zip(block.strides, block.shape) if axis[1] > 1), reverse=True)
    dense, inner = 1, 0  # elements of the innermost axes that lie in one piece, and how many axes those are
    for stride, size in reversed(axes):
        if stride > dense:
            break
        dense, inner = dense + stride * (size - 1), inner + 1
    outer, total = axes[: len(axes) - inner], 1
    for _, size in outer:
        total *= size
    if total > _PIECES:
        yield block.offset, block.offset + sum(stride * (size - 1) for stride, size in axes) + 1
        return
    starts = [block.offset]
    for stride, size in outer:
        starts = [start + i * stride for start in starts for i in range(size)]
    yield from ((start, start + dense) for start in starts)


def plan_page(job: Job) -> str:
    """The page of `job`."""
    source, plan = job.source, job.plan
    axes = {name: tensor.axes for name, tensor in source.layout.descriptor.tensors.items()}
    body = [
        f"<h1>reshard plan: {escape(source.format)} {source.mesh} → {escape(job.format)} {job.mesh}</h1>",
        f"<p><code>{escape(str(source.path))}</code>, {escape(source.architecture)}: reads {human(job.bytes_read)} (least {human(plan.least_bytes_read)}), "
        f"writes {human(job.bytes_written)} (least {human(plan.bytes_held)}) into {count(len(job.folder.files), 'file')}.</p>",
        "<h2>Bytes of every rank</h2>", _ranks(job),
        "<h2>How each family lies</h2><p>On the left the source's shards, on the right the result's; of layers and experts that lie alike, the first. "
        "Point at a part, or tab to it: its box, bytes, file and offset stand at the bottom.</p>",
    ]  # fmt: skip
    for family in families(plan.join.sources, plan.destinations):
        colours = {name: f"t{i % _COLOURS}" for i, name in enumerate(family.tensors)}
        key = "".join(f'<span class="{colours[name]}">{escape(name)}</span>' for name in family.tensors)
        largest = max(stored.size for stored in (*family.sources, *family.destinations)) or 1
        both = ("source", family.sources), ("result", family.destinations)
        sides = "".join(f"<div><h4>{word}</h4>{_side(side, largest, colours, axes)}</div>" for word, side in both)
        body.append(f"<section><h3 class=key>{key} {count(family.instances, 'tensor')}</h3><div class=sides>{sides}</div></section>")
    return page("reshard plan", [*body, "<div id=said role=status aria-live=polite></div>"], _STYLE, _SCRIPT)


def _ranks(job: Job) -> str:
    found = job.ranks()
    most = max((max(row["bytes_written"], row["bytes_read"]) for row in found), default=0) or 1
    cells = [[f"<td>rank {row['rank']}</td>", *(f"<td class=n>{human(row[name])}</td>" for name in ("bytes_read", "bytes_written", "bytes_held")),
              f"<td class=w>{bar(row['bytes_written'] / most)}</td>"] for row in found]  # fmt: skip
    return rows(["", "reads", "writes", "least: holds", "writes"], cells)


def _side(side: Sequence[Stored], largest: int, colours: Mapping[str, str], axes: Mapping[str, Sequence[str]]) -> str:
    ranks = sorted({stored.rank for stored in side})
    shown = [_shard(stored, largest, colours, axes) for stored in side if stored.rank in ranks[:_RANKS]]
    more = f"<p>… and {count(len(ranks) - _RANKS, 'more rank')}</p>" if len(ranks) > _RANKS else ""
    return "".join(shown) + more


def _shard(stored: Stored, largest: int, colours: Mapping[str, str], axes: Mapping[str, Sequence[str]]) -> str:
    size, itemsize, parts = stored.size or 1, DTYPE_SIZE[stored.dtype], []
    for part in stored.parts:
        name, block = part.first[0], part.block
        box = ", ".join(f"{axis} {a}:{b}" for axis, (a, b) in zip(axes.get(name, ()), block.box))
        many = f", the first of {part.count}" if part.count > 1 else ""
        spans = list(intervals(block)) if part.count == 1 else [(block.offset, block.offset + part.step * part.count)]
        at = f"{stored.file} at byte {stored.start + block.offset * itemsize}"
        label = f"{name}[{box}]{many}: {human(block.size * itemsize)} in {stored.name} of rank {stored.rank}, {at}"
        for number, (start, stop) in enumerate(spans):
            place = f"left:{100 * start / size:.3f}%;width:{100 * (stop - start) / size:.3f}%"
            focus = "0" if number == 0 else "-1"
            parts.append(
                f'<i class="{colours[name]}" tabindex={focus} role=img style="{place}" aria-label="{escape(label)}" title="{escape(label)}"></i>'
            )
    width = f"width:{100 * size / largest:.2f}%"
    return f'<div class=row><span>rank {stored.rank}</span><div class=shard style="{width}">{"".join(parts)}</div></div>'
