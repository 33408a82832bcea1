"""Which of a layout's sections names a folder's tensors, and below which keys of a saved state they stand."""

from collections import Counter
from collections.abc import Iterable

from reshard import formats
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.pieces import Piece
from reshard.layout import Layout, Mesh, Placement, Rules, Section

#: keys of a trainer's own states, where they stand beside parameters that have no key
_TRAINERS = frozenset(("optim", "optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "scheduler", "dataloader", "train_state", "rng", "random_states",
                       "ema", "scaler", "trainer", "extra_state"))  # fmt: skip


def spelled(
    layout: Layout, kind: formats.Format, mesh: Mesh, pieces: Iterable[Piece]
) -> tuple[str, list[Piece], dict[str, tuple[int, int]], str]:
    """The section whose names `pieces` bear, the pieces by those names, what stands beside the model: key → (tensors, bytes), and the key
    below which the model stands.

    A trainer saves more than a model: names may all stand below ``model.`` or ``state.model.``, beside an optimizer's. That key
    is the model's below which most names are the layout's; among equals the shortest. Raises FormatError where two fit.
    """
    pieces = list(pieces)
    score: Counter[tuple[str, str]] = Counter()
    held = dict.fromkeys(piece.name for piece in pieces)
    for section in (kind.section, *kind.others):
        if section not in layout.descriptor.formats:
            continue
        known = frozenset(_names(layout, kind.section_of(layout, section), kind.rules, mesh))
        for name in held:
            for key in _keys(name):
                if name[len(key) :] in known:
                    score[section, key] += 1
    if not score:
        return kind.section, pieces, {}, ""
    most = max(score.values())
    section, key = best = min((at for at, count in score.items() if count == most), key=lambda at: at[1].count("."))
    rival = next((at for at in score if at != best and score[at] == most and at[0] == section and at[1].count(".") == key.count(".")), None)
    if rival and "model." not in (key, rival[1]):
        raise FormatError(
            f"the names of a model stand below {quote(key)} and below {quote(rival[1])}", "save the model alone, or under the key model"
        )
    key = "model." if rival else key
    model, beside = [], {}
    others = set()
    for piece in pieces:
        if piece.name.startswith(key) and not (key == "" and piece.name.partition(".")[0] in _TRAINERS):
            model.append(piece._replace(name=piece.name[len(key) :]) if key else piece)
            continue
        head = piece.name.partition(".")[0]
        count, size = beside.get(head, (0, 0))
        beside[head] = count + (piece.name not in others), size + piece.nbytes
        others.add(piece.name)
    return section, model, beside, key


def _keys(name: str) -> list[str]:
    """The keys below which `name` may stand: none, and all before each of its dots."""
    return [""] + [name[: i + 1] for i, letter in enumerate(name) if letter == "."]


def _names(layout: Layout, section: Section, rules: Rules, mesh: Mesh) -> Iterable[str]:
    """Every name that a section has for a tensor, in any of its variants and under any prefix."""
    for spelling in (section, *section.prefixes):
        for one in (spelling, *(variant for _, _, variant in spelling.variants)):
            for stored in Placement(layout, one, rules, mesh).stored(aliases=True):
                yield stored.name
