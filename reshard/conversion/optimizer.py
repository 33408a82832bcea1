"""The state of an optimizer beside the model's weights: the same blocks under other names.

A moment of a parameter, or a master copy of it, has the parameter's shape: it is cut and fused as that, and its dtype is kept. Step counts
are one number per parameter. What is neither (groups' settings, a scheduler's state) is kept byte for byte under its own name, where no name
changes. What cannot be kept is refused or told.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from reshard.checkpoint import Checkpoint
from reshard.dtypes import DTYPE_SIZE
from reshard.errors import PlanError
from reshard.formats import Format, States
from reshard.formats.pieces import Filed, Piece, placed
from reshard.geometry.block import Block, Key, Part, Stored, row_major
from reshard.layout import Entry, Placement
from reshard.planner.values import formed
from reshard.text import count, human, some


@dataclass(frozen=True)
class Optimizer:
    """Both sides of what is kept beside the weights. `key` is what the weights' names begin with, in such a folder; `shapes` are those of
    keys that are no tensor's of the layout, `beside` is what is no tensor, `lost` what cannot be kept, in words."""

    sources: list[Stored]
    destinations: list[Stored]
    key: str
    shapes: dict[str, tuple[int, ...]]
    beside: States
    kept: str
    lost: str | None

    def named(self, stored: Iterable[Stored]) -> list[Stored]:
        return [s._replace(name=self.key + s.name) for s in stored]


def optimizer_of(source: Checkpoint, kind: Format, placement: Placement) -> Optimizer:
    """What of the optimizer in `source` goes into a folder of format `kind`. Raises PlanError."""
    if not kind.states:
        raise PlanError([f"format {kind.name} holds no optimizer's state"], "use --to dcp, or leave out --optimizer")
    states = source.states() if source.states else None
    own = {s.name for s in source.whole}
    parsed = list(_parsed(states.pieces, own, source.key)) if states else []
    if states is None or not any(word for _, _, _, word in parsed):
        raise PlanError([f"{source.path} holds no optimizer's state that reshard knows ({source.format})"], "leave out --optimizer")
    named = {name for _, _, name, word in parsed if word}
    targets = [s for s in placement.stored() if s.name in named or not (isinstance(s.entry, Entry) and s.entry.copy)]
    same = {s.name for s in targets} >= named
    sources: list[Stored] = []
    destinations: list[Stored] = []
    problems: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    lost: list[Piece] = []
    by_word: dict[tuple[str, str], list[Piece]] = defaultdict(list)
    sizes = {s.name: s.shape for s in source.whole}
    for piece, head, name, word in parsed:
        if not word:
            by_word["", piece.name].append(piece)
        elif piece.extent in (None, sizes[name]):
            by_word[word, head].append(piece._replace(name=name))
        elif piece.extent == ():
            by_word[f"{word} of", head].append(piece._replace(name=name))
        else:
            by_word["", piece.name].append(piece)
    for (word, head), pieces in by_word.items():
        if not word:  # under its own name
            if same:
                sources += _alone(pieces, head, shapes, problems)
                destinations.append(_whole(head, pieces[0]))
            else:
                lost += pieces
        elif word.endswith(" of"):
            _counts(source, targets, head, word.removesuffix(" of"), pieces, sources, destinations, shapes)
        else:
            _moments(source, targets, head, word, pieces, sources, destinations, problems)
    if problems:
        raise PlanError(
            problems, "the optimizer's state is damaged or of another model; leave out --optimizer to convert the weights alone"
        )
    words = sorted({word.removesuffix(" of") for word, _ in by_word if word})
    size = sum(s.size * DTYPE_SIZE[s.dtype] for s in sources)
    others, key = states.others if same else {}, source.key or states.key
    kept = f"optimizer: {some(words)} of {count(len(named), 'parameter')}, {human(size)}, kept bit for bit"
    kept += f", and {count(len(others), 'setting')} byte for byte" if others else ""
    told = [f"{_listed('tensor', {piece.name for piece in lost})}, {human(sum(piece.nbytes for piece in lost))}"] if lost else []
    told += [_listed("setting", set(states.others))] if states.others and not same else []
    reasons = [f"not kept, since parameters have other names here: {', '.join(told)}"] if told else []
    reasons += [f"not kept: {states.lost}"] if states.lost else []
    paths = {s.name: _path(s.name, "state.") for s in destinations} | {key + s.name: (*key.split(".")[:-1], s.name) for s in targets}
    nested = any(len(path) > 1 for path in states.paths.values())
    beside = States([], others, (paths if nested else {}) | (dict(states.paths) if same else {}))
    return Optimizer(sources, destinations, key, shapes, beside, kept, "; ".join(reasons) or None)


def _listed(what: str, names: set[str]) -> str:
    return f"{count(len(names), what)}: {some(sorted(names))}"


def _path(name: str, between: str) -> tuple[str | int, ...]:
    """The keys of a saved state by which `name` is reached, where it is nested: those before the parameter's name, that, and the word."""
    head, found, rest = name.partition(between)
    parameter, _, word = rest.rpartition(".")
    return (*head.split(".")[:-1], between[:-1], parameter, word) if found else (name,)


def _parsed(pieces: Iterable[Piece], own: set[str], key: str) -> Iterator[tuple[Piece, str, str, str]]:
    """(piece, what stands before the parameter's name, that name as the layout has it, word of the state) of all that is no weight; the last
    two are empty where it is no parameter's."""
    for piece in pieces:
        if piece.name.startswith(key) and piece.name[len(key) :] in own:
            continue
        head, between, rest = piece.name.partition("state.")
        name, _, word = rest.rpartition(".")
        if between and (not head or head.endswith(".")):
            for begin in dict.fromkeys(("", key, "model.", "module.")):
                if name.startswith(begin) and name[len(begin) :] in own:
                    yield piece, f"{head}state.{begin}", name[len(begin) :], word
                    break
            else:
                yield piece, "", "", ""
        else:
            yield piece, "", "", ""


def _moments(source: Checkpoint, targets: list[Stored], head: str, word: str, pieces: list[Piece],
             sources: list[Stored], destinations: list[Stored], problems: list[str]) -> None:  # fmt: skip
    """State of its parameter's shape: the blocks of the parameter, under names of their own."""
    names = {piece.name for piece in pieces}
    found = placed([s for s in source.whole if s.name in names], Filed.of(pieces))
    problems += [f"{head}…{word}: {problem}" for problem in found.problems]
    held: set[Key] = set()
    for s in found.stored:
        own = _formed(s, word)
        sources.append(own._replace(name=f"{head}{s.name}.{word}", entry=None))
        held.update(key for key, _ in own.blocks)
    for s in targets:
        own = _formed(s, word)
        keys = {key for key, _ in own.blocks}
        if keys <= held:
            destinations.append(own._replace(name=f"{head}{s.name}.{word}", entry=None))
        elif keys & held:
            problems.append(f"{s.name} fuses parameters of which some have {word} and some have not")


def _formed(s: Stored, word: str) -> Stored:
    return s._replace(parts=tuple(part._replace(first=(formed(part.first[0], word), *part.first[1:])) for part in s.parts))


def _counts(source: Checkpoint, targets: list[Stored], head: str, word: str, pieces: list[Piece],
            sources: list[Stored], destinations: list[Stored], shapes: dict[str, tuple[int, ...]]) -> None:  # fmt: skip
    """One number per parameter: of all that are fused into one, which must be equal, as replicas are."""
    by_key: dict[Key, list[Piece]] = defaultdict(list)
    by_name: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    for s in source.whole:
        for key, _ in s.blocks:
            by_key[key] += by_name.get(s.name, ())
    for s in targets:
        found = list(dict.fromkeys(piece for key, _ in s.blocks for piece in by_key.get(key, ())))
        if found:
            name = f"{head}{s.name}.{word}"
            shapes[name] = ()
            part = Part((name,), Block((), 0, ()))
            sources += [Stored(i, piece.name, piece.dtype, (), (part,), None, piece.file, piece.offset) for i, piece in enumerate(found)]
            destinations.append(Stored(0, name, found[0].dtype, (), (part,)))


def _whole(name: str, piece: Piece) -> Stored:
    shape = piece.extent or ()
    return Stored(0, name, piece.dtype, shape, (Part((name,), Block(tuple((0, n) for n in shape), 0, row_major(shape))),))


def _alone(pieces: list[Piece], name: str, shapes: dict[str, tuple[int, ...]], problems: list[str]) -> list[Stored]:
    whole = _whole(name, pieces[0])
    shapes[name] = whole.shape
    found = placed([whole], Filed.of(pieces))
    problems += found.problems
    return found.stored
