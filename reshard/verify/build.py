"""Put one rank's stored tensors into transformers' own model, as the engine would use them.

Each layer of the model takes the stored tensor: whole if that is what every rank holds, or a slice with the collective that
belongs to it. Which it is, and what a slice holds, is told by the engine's table (``tables.py``): a new architecture is a new table.
"""

from collections import defaultdict
from copy import copy

import torch
from torch import nn

from reshard.verify.attention import Heads, joined, sections, splits
from reshard.verify.experts import fill
from reshard.verify.model import Model
from reshard.verify.parallel import (
    Fused,
    Gathered,
    Joined,
    Linear,
    NoHeads,
    Part,
    Receive,
    RowLinear,
    Send,
    Skipped,
    VocabEmbedding,
    VocabHead,  # fmt: skip
)
from reshard.verify.slices import Slices
from reshard.verify.tables import Row


def build(s: Slices, m: Model) -> dict[str, Linear]:
    """Fill `m` with the tensors of `s`; what doesn't fit goes to ``s.problems``. Returns the layers made of slices, by path."""
    computed = {
        id(tensor) for part in m.module.modules() for name, tensor in part._buffers.items() if name in part._non_persistent_buffers_set
    }
    empty = {
        id(tensor): tensor for tensor in (*m.module.parameters(), *m.module.buffers()) if id(tensor) not in computed
    }  # kept: an id is an object's
    ends(s, m)
    depth = m.config.num_hidden_layers
    layers = defaultdict(list)
    for path in s.modules:
        if (number := m.layer_of(path)) is not None:
            layers[number].append(path)
    everywhere = {m.layer_of(name) for table in s.tables for name in table}
    linears: dict[str, Linear] = {}
    for number in range(depth):
        if number not in everywhere:
            s.problem(f"{m.layers}.{number}", f"is on no rank, config.json tells of {depth} layers")
        if number in layers:
            linears |= layer(s, m, f"{m.layers}.{number}", sorted(layers[number]))
        else:
            m.put(f"{m.layers}.{number}", Skipped())
    for name, tensor in (*m.module.named_parameters(), *m.module.named_buffers()):
        if id(tensor) in empty:
            s.problem(name.replace(".experts.inner.", ".experts."), "is missing")
    predicted = range(
        depth, depth + (getattr(m.config, "num_nextn_predict_layers", None) or 0)
    )  # layers for more tokens at once, which engines leave out
    beyond = {name for number in predicted for path in layers.get(number, ()) for name in s.modules[path].values()}
    for name in s.table.keys() - s.used - beyond:
        known = (
            f"in {type(m.module).__name__}" if s.table[name].row else f"in verify's table of {s.rows.engine}'s names for {s.rows.family}"
        )
        s.problem(name, f"has no place {known}")
    return linears


def ends(s: Slices, m: Model) -> None:
    """Embedding, final norm and output layer, or the messages that stand for them on other pipeline stages."""
    last = s.shards.mesh.pp - 1
    own, width = s.seat.rank.pp, len(s.seat.stage)
    names = f"{m.head}.weight", f"{m.embedding}.weight"
    tables = [next(s.tables[seat.rank.number] for seat in s.seats if seat.rank.pp == stage) for stage in range(last + 1)]

    def held(stage: int, wanted: tuple[str, ...]) -> str | None:
        return next((name for name in wanted if name in tables[stage]), None)

    # tied, the embedding is the output layer, whatever else a file holds; a stage without it, and vLLM, have it as the output layer's
    heads = {stage: name for stage in range(last + 1) if (name := held(stage, names[::-1] if m.tied else names[:1]))}
    at = last if last in heads else min(heads, default=last)  # the stage that computes logits: of tied models perhaps the first
    hidden, vocab = m.config.hidden_size, m.config.vocab_size
    table = m.at(m.embedding)
    if not isinstance(table, nn.Embedding):
        s.problem(f"{m.embedding}.weight", f"belongs to a {type(table).__name__}, which does more than look up: verify can't cut it")
    embedding: nn.Module = Receive(s.seat.before, hidden, s.dtype)
    if own == 0:
        name = held(0, names[::-1] if m.tied else names[1:]) or names[1]
        rows = _rows(s, name, hidden, vocab)
        embedding = (
            VocabEmbedding(table, s.read(name), sum(rows[: s.group.index]), s.group)
            if rows and isinstance(table, nn.Embedding)
            else nn.Identity()
        )
    m.put(m.embedding, embedding)
    head: nn.Module = nn.Identity()
    s.computes_logits = own == at
    if own == at:
        name, bias = heads.get(at, names[0]), f"{m.head}.bias"
        rows = _rows(s, name, hidden, vocab)
        shared = isinstance(embedding, VocabEmbedding) and heads.get(at) in s.used
        if rows:
            head = VocabHead(embedding.weight if shared else s.read(name), s.read(bias) if bias in s.table else None, rows, vocab, s.group)
        if at != last:
            head = nn.Sequential(Receive(s.number + (last - at) * width, hidden, s.dtype), head)
    elif own == last:
        head = Send(s.number + (at - last) * width)
    m.put(m.head, head)
    if m.tied:
        s.used.update(names)
    if own == last:
        _whole(s, m, m.norm, s.modules[m.norm])
    else:
        m.put(m.norm, Send(s.seat.after))
    for path in [path for path in s.modules if m.layer_of(path) is None and path in m.paths - {m.embedding, m.head, m.norm}]:
        if own == 0 and (row := s.row(path)) and row.cut == "whole":  # learned positions and their like, beside the embedding
            _whole(s, m, path, s.modules[path])
    users = {names[1]: 0, names[0]: at, f"{m.head}.bias": at, **dict.fromkeys(s.modules[m.norm].values(), last)}
    for name, stage in users.items():
        if name in s.table.keys() - s.used and own != stage:
            s.repeated(name, stage)


def _rows(s: Slices, name: str, hidden: int, vocab: int) -> list[int]:
    """Rows of an embedding or output layer on each rank of the group; what is past the vocabulary is padding."""
    if name not in s.table:
        s.problem(name, "is missing")
        return []
    rows = s.along(name, 0)
    if s.fits(name, (None, hidden)) and sum(rows) < vocab:
        s.problem(name, f"has {' + '.join(map(str, rows))} = {sum(rows)} rows on the ranks of its group, the vocabulary has {vocab}")
    return rows


def layer(s: Slices, m: Model, prefix: str, paths: list[str]) -> dict[str, Linear]:
    """Fill one decoder layer, each part as its row of the table says."""
    linears: dict[str, Linear] = {}
    experts: dict[str, list[str]] = defaultdict(list)
    outputs = [path for path in s.rows.paths("heads", m.layer_of(f"{prefix}.")) if path in m.paths]
    heads = {path.rpartition(".")[0]: _heads(s, m, path) for path in outputs}
    for path in paths:
        owner = path.rpartition(".")[0]
        kinds, row = s.modules[path], s.row(path)
        if row is None:
            continue
        if row.cut == "experts":
            experts[row.path.partition(".{expert}")[0].format(layer=m.layer_of(path))] += kinds.values()
        elif row.parts and f"{owner}.{row.parts[0]}" in m.paths:
            linears[path] = _fused(s, m, owner, row, kinds, heads.get(owner))
        elif path in m.paths and _size(m.at(path)):
            linears[path] = _linear(s, m, path, row, kinds, heads.get(owner))
        elif path in m.paths and row.cut in ("column", "row"):
            s.problem(
                next(iter(kinds.values())), f"belongs to a {type(m.at(path)).__name__}, which is no plain projection: verify can't cut it"
            )
        elif path in m.paths:
            _whole(s, m, path, kinds, heads.get(path))
    for path, names in experts.items():
        if path in m.paths:
            fill(s, m, path, names)
    _same_width(s, paths)
    for output, own in zip(outputs, heads.values()):
        owner = output.rpartition(".")[0]
        _localise(m.at(owner), own)
        if not own.local_queries and output in linears:
            m.put(owner, NoHeads(linears[output]))
    return linears


def _heads(s: Slices, m: Model, output: str) -> Heads:
    """The heads of the attention module whose output projection is at `output`, as the stored shapes tell them."""
    owner = output.rpartition(".")[0]
    attention, queries, ranks = m.at(owner), m.config.num_attention_heads, s.group.size
    held = {row.holds: (path, row) for path in s.modules if path.rpartition(".")[0] == owner and (row := s.row(path))}
    value = (_size(m.at(output)) or (0, queries))[1] // queries
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None) or value
    told = getattr(m.config, "num_key_value_heads", None) or getattr(attention, "num_kv_heads", None)
    keys = queries if ("latent_key_value",) in held else told or queries

    def rows(*holds: str, but: str = "") -> int | None:
        path, row = held.get(holds, ("", None))
        return s.width(f"{path}.weight", 0) if row and row.order != but else None

    columns, own_rows, fused = s.width(f"{output}.weight", 1), rows("key"), rows("query", "key", "value", but="groups")
    own = queries // ranks if columns is None else columns // value
    if own_rows is not None:
        own_keys = own_rows // size
    elif fused is not None:
        own_keys = (fused // size - own) // 2
    else:
        own_keys = own if keys == queries else max(keys // ranks, 1)
    own_rows = rows("query")
    if own_rows is not None and columns is not None and own_rows != columns:
        s.problem(f"{held['query',][0]}.weight", f"has {own_rows} rows, {output.rpartition('.')[2]} has {columns} columns on this rank")
    elif own_keys and own % own_keys:
        s.problem(f"{output}.weight", f"is of {own} query heads, with {own_keys} key/value heads on this rank")
    return Heads(queries, keys, size, s.group.index, ranks, own, own_keys)


def _localise(attention: nn.Module, heads: Heads) -> None:
    """Tell transformers' module of how many heads it is now."""
    per_key = heads.local_queries // heads.local_keys if heads.local_keys else 1
    for name, value in (("num_heads", heads.local_queries), ("num_attention_heads", heads.local_queries),
                        ("num_key_value_heads", heads.local_keys), ("num_kv_heads", heads.local_keys), ("num_key_value_groups", per_key),
                        ("split_size", heads.local_queries * heads.size)):  # fmt: skip
        if isinstance(getattr(attention, name, None), int):
            setattr(attention, name, value)
    if hasattr(attention, "config"):
        attention.config = copy(attention.config)
        attention.config.num_attention_heads, attention.config.num_key_value_heads = heads.local_queries, heads.local_keys


def _linear(s: Slices, m: Model, path: str, row: Row, kinds: dict[str, str], heads: Heads | None) -> Linear:
    """A projection that transformers has as well, of this rank's rows (column parallel) or columns (row parallel), or whole."""
    full = m.at(path)
    rows, columns = _size(full)
    weight, bias = _read(s, kinds, full.bias is not None)
    if weight is None:
        return Linear(full.weight)
    linear, module = Linear(weight, bias), None
    if row.cut == "row":
        s.fits(kinds["weight"], (rows, None), columns)
        linear = RowLinear(weight, bias, s.group)
    elif row.cut == "column":
        s.fits(kinds["weight"], (None, columns), rows + _repeated(row, heads))
    else:
        s.fits(kinds["weight"], (rows, columns))
    if row.becomes and row.becomes != row.order:
        linear = Fused(weight, bias, splits(row, len(weight), heads, s.group))
        module = Joined(linear, joined(row, heads))
    m.put(path, module or linear)
    return linear


def _size(module: nn.Module) -> tuple[int, int] | None:
    """Outputs and inputs of a plain projection; None for what is none. GPT-2's Conv1D is one whose weight has its inputs first."""
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[1], module.weight.shape[0]
    return (module.out_features, module.in_features) if type(module) is nn.Linear or type(module).__name__ == "FalconLinear" else None


def _fused(s: Slices, m: Model, owner: str, row: Row, kinds: dict[str, str], heads: Heads | None) -> Linear:
    """One stored matrix in place of several projections of transformers'."""
    parts = [m.at(f"{owner}.{name}") for name in row.parts]
    weight, bias = _read(s, kinds, parts[0].bias is not None)
    if weight is None:
        return Linear(parts[0].weight)
    sizes = [part.out_features for part in parts]
    if row.cut == "whole":
        s.fits(kinds["weight"], (sum(sizes), parts[0].in_features))
        split = sections(*sizes)
    else:
        s.fits(kinds["weight"], (None, parts[0].in_features), sum(sizes) + _repeated(row, heads))
        split = splits(row, len(weight), heads, s.group)
    fused, outputs = Fused(weight, bias, split), {}
    for index, name in enumerate(row.parts):
        m.put(f"{owner}.{name}", Part(fused, index, outputs))
    return fused


def _repeated(row: Row, heads: Heads | None) -> int:
    """Rows of keys and values that all ranks together hold twice. In groups, none is: ranks have plain pieces of all rows."""
    times = 0 if heads is None or row.order != "sections" else sum(part in ("key", "value") for part in row.holds)
    return times * heads.repeated * heads.size if times else 0


def _same_width(s: Slices, paths: list[str]) -> None:
    """Each rank's outputs of gate and up, and inputs of down, are the same columns: of as many each."""
    rows = {path: row for path in paths if (row := s.row(path)) and row.cut in ("column", "row")}
    for path in [path for path, row in rows.items() if row.holds == ("down",)]:
        owner, _, leaf = path.rpartition(".")
        inputs = s.width(f"{path}.weight", 1)
        for other in [other for other, row in rows.items() if other.rpartition(".")[0] == owner and {"gate", "up"} & set(row.holds)]:
            outputs = s.width(f"{other}.weight", 0)
            if None not in (inputs, outputs) and outputs != len(rows[other].holds) * inputs:
                s.problem(f"{other}.weight", f"has {outputs} rows, {leaf} has {inputs} columns on this rank")


def _read(s: Slices, kinds: dict[str, str], biased: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weight and bias of a projection; a lack of either is a problem, a bias too many is one by being left over."""
    if "weight" not in kinds:
        return None, None
    bias = None
    if biased and "bias" in kinds:
        bias = s.read(kinds["bias"])
    elif biased:
        s.problem(kinds["weight"], "lacks the bias that config.json tells of")
    return s.read(kinds["weight"]), bias


def _whole(s: Slices, m: Model, path: str, kinds: dict[str, str], heads: Heads | None = None) -> None:
    """Norms, routers and the like, which every rank holds whole; of attention sinks it holds its heads'."""
    module = m.at(path)
    for kind, name in kinds.items():
        place = module._parameters if kind in module._parameters else module._buffers
        if place.get(kind) is None:
            continue
        expected = (heads.local_queries,) if heads and s.table[name].row.cut == "heads" else tuple(place[kind].shape)
        s.fits(name, expected)
        tensor = s.read(name)
        place[kind] = nn.Parameter(tensor, requires_grad=False) if place is module._parameters else tensor
        if before := s.table[name].row.gathered:
            widths = s.along(f"{path.rpartition('.')[0]}.{before}.weight", 0)
            if [sum(widths)] == list(tensor.shape):
                m.put(path, Gathered(module, widths, s.group))
            else:
                s.problem(name, f"is of shape {list(tensor.shape)}, {before} has {sum(widths)} rows on the ranks of its group")
