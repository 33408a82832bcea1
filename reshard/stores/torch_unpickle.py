"""The pickle of a torch.save file, read by an interpreter of ours: no named module is imported, nothing named is run.

``torch_allowlist`` holds every callable there is; any other name is refused. Tensors come out as TensorInfo.
"""

import argparse
import io
import pickle
import types
from collections import OrderedDict
from math import prod
from typing import ClassVar, NoReturn, Protocol

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.stores import TensorInfo
from reshard.stores.torch_allowlist import CALLS, DTENSORS, REFERENCES, SHARDED_TENSORS, TENSOR_TYPES, Budget, cost, flat, is_inert
from reshard.stores.torch_names import (
    DTYPE_NAME,
    DTYPE_OF_NAME,
    DTYPE_OF_STORAGE,
    OTHER_DTYPES,
    OTHER_STORAGES,
    DType,
    Global,
    Opaque,
    Storage,
    row_major_strides,
)
from reshard.stores.torch_sharded import sharded, shards
from reshard.stores.ziprecords import COPY

PICKLE_LIMIT = 256 << 20
_LONGEST_NAME = 500  # of a module and of a class
#: bounds on what a pickle may unfold to, so that a caller may walk the tree by plain recursion
_DEPTH_LIMIT, _NODE_LIMIT = 200, 20_000_000


class Records(Protocol):
    """What an unpickler asks of the file that its pickle lies in, from byte `start` to `end`."""

    start: int
    end: int

    def content(self, key: str, limit: int) -> bytes: ...

    def locate(self, key: str) -> tuple[int, int]: ...

    def error(self, message: str, hint: str | None = ...) -> FormatError: ...


class Unpickler(pickle._Unpickler):
    """pickle's own interpreter in Python, every opcode that calls, fills or hashes replaced.

    The C one is three times as fast, but would hash a deeply nested key, set attributes of whatever lies on its stack, and
    size its memo by a number in the file.
    """

    #: BYTEARRAY8 would allocate any size that the file names
    dispatch: ClassVar = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if bytes((code,)) not in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.EXT1, pickle.EXT2,
                                          pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.BYTEARRAY8)}  # fmt: skip

    def __init__(self, archive: Records):
        content = archive.content("data.pkl", PICKLE_LIMIT)
        super().__init__(io.BytesIO(content))
        self.archive = archive
        self.budget = Budget((1 << 20) + 4 * len(content), "its calls copy bytes and items,")
        self.repeated = Budget(max(1 << 20, archive.end - archive.start), "its tensors repeat bytes of their storages,")
        self.storages: dict[str, Storage] = {}
        self.globals: dict[tuple[str, str], Global | DType] = {}
        self.calls = CALLS | {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor_v2,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_v3,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): self._from_type,
            ("builtins", "getattr"): self._member,
        }

    def run(self) -> object:
        try:
            tree = self.load()
        except FormatError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a damaged stream leads to
            what = f"{type(error).__name__}: {quote(error)}"
            if isinstance(error, KeyError) and type(error.args[0]) is int and 0 <= error.args[0] < 256:
                what = f"opcode {bytes((error.args[0],))!r}"
            self._fail(f"its pickle is damaged or hostile ({what})")
        problem = _unbounded(tree)
        if problem:
            raise self.archive.error(f"its pickle unfolds to {problem}", "this is no checkpoint of tensors")
        return tree

    def _fail(self, message: str, hint: str | None = COPY) -> NoReturn:
        """Raises, naming the key under which the interpreter is at work: the last text on its stack."""
        stacks = [getattr(self, "stack", [])] + getattr(self, "metastack", [])[::-1]
        near = next((item for stack in stacks for item in reversed(stack) if type(item) is str), None)
        raise self.archive.error(message if near is None else f"{quote(near)}: {message}", hint)

    # names and calls

    def find_class(self, module: str, name: str) -> Global | DType:
        if len(module) > _LONGEST_NAME or len(name) > _LONGEST_NAME:
            self._fail(f"its pickle names {quote(module)}.{quote(name)}, which nothing is called")
        key = ("builtins" if module == "__builtin__" else module, name)
        if key not in self.globals:
            self.globals[key] = self._resolve(*key)
        return self.globals[key]

    def _resolve(self, module: str, name: str) -> Global | DType:
        key = (module, name)
        if module == "torch" and (name in DTYPE_OF_NAME or name in OTHER_DTYPES):
            return DType(name)
        if module == "torch" and (name in DTYPE_OF_STORAGE or name in OTHER_STORAGES) or key == ("torch.storage", "UntypedStorage"):
            return Global(module, name)
        if key in self.calls or key in REFERENCES or key in TENSOR_TYPES | DTENSORS | SHARDED_TENSORS or is_inert(*key):
            return Global(module, name)
        self._fail(f"its pickle names {quote(module)}.{quote(name)}, which reshard neither needs nor runs",
                   "save plain tensors: torch.save({name: tensor, …}, path), sharded tensors (DTensor) made whole first")  # fmt: skip

    def _call(self, what: object, args: object) -> object:
        if not isinstance(what, Global) or type(args) is not tuple:
            self._fail(f"its pickle calls a {type(what).__name__} with a {type(args).__name__}")
        key = (what.module, what.name)
        if key in self.calls:
            self.budget.take(1 + len(args) + sum(map(cost, args)))
            return self.calls[key](*args)
        if is_inert(*key):
            return Opaque(*key, args)
        self._fail(f"its pickle calls {quote(what.module)}.{quote(what.name)}")

    def load_reduce(self):
        args = self.stack.pop()
        what = self.stack.pop()
        self.stack.append(self._call(what, args))

    def load_build(self):
        state = self.stack.pop()
        held = self.stack[-1]
        if isinstance(held, Opaque):
            held.state = state
        elif type(held) in (argparse.Namespace, types.SimpleNamespace):
            self.budget.take(1 + cost(state))
            if type(state) is not dict or not all(type(name) is str for name in state):
                self._fail("a namespace's state is not a dict of names")
            vars(held).update(state)
        elif type(held) is not OrderedDict:  # a state_dict's _metadata is an attribute, of no use here
            self._fail(f"its pickle sets attributes of a {type(held).__name__}")

    # containers

    def _fill(self, held: object, items: list, kind: type) -> None:
        """Adds `items` to the dict (keys and values in turn), list or set `held`, or to an opaque stand-in for one."""
        if isinstance(held, Opaque):
            held.items.extend(items)
        elif not isinstance(held, kind):
            self._fail(f"its pickle puts items into a {type(held).__name__}")
        elif kind is dict:
            held.update(zip(flat(items[::2]), items[1::2], strict=True))
        else:
            (held.extend if kind is list else held.update)(items if kind is list else flat(items))

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self._fill(self.stack[-1], [key, value], dict)

    def load_setitems(self):
        items = self.pop_mark()
        self._fill(self.stack[-1], items, dict)

    def load_dict(self):
        items = self.pop_mark()
        self.stack.append({})
        self._fill(self.stack[-1], items, dict)

    def load_append(self):
        item = self.stack.pop()
        self._fill(self.stack[-1], [item], list)

    def load_appends(self):
        items = self.pop_mark()
        self._fill(self.stack[-1], items, list)

    def load_additems(self):
        items = self.pop_mark()
        self._fill(self.stack[-1], items, set)

    def load_frozenset(self):
        self.stack.append(frozenset(flat(self.pop_mark())))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_reduce, pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict,
        pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems, pickle.FROZENSET[0]: load_frozenset,
    }  # fmt: skip

    # tensors

    def persistent_load(self, pid: object) -> Storage:
        if not (type(pid) is tuple and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], Global) and isinstance(pid[2], str)):
            self._fail(f"its pickle refers to a {type(pid).__name__} where a storage is due")
        _, kind, key, _, count = pid
        if key in self.storages:
            return self.storages[key]
        if kind.name in OTHER_STORAGES:
            self._fail(f"its dtype is torch's {kind.name}, which reshard does not know", f"known: {', '.join(DTYPE_NAME.values())}")
        if kind.name not in DTYPE_OF_STORAGE and kind.name != "UntypedStorage":
            self._fail(f"its storage is a {quote(kind.module)}.{quote(kind.name)}")
        dtype = DTYPE_OF_STORAGE.get(kind.name)
        offset, nbytes = self.archive.locate(f"data/{key}")
        if type(count) is not int or nbytes != count * DTYPE_SIZE.get(dtype, 1):
            self._fail(f"record data/{quote(key)} has {nbytes} bytes, the pickle says {quote(count)} elements of {kind.name}")
        storage = self.storages[key] = Storage(key, dtype, offset, nbytes)
        return storage

    def _tensor_v2(self, storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> TensorInfo:
        return self._tensor(storage, getattr(storage, "dtype", None), offset, shape, strides, metadata)

    def _tensor_v3(self, storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None) -> TensorInfo:
        name = dtype.name if isinstance(dtype, DType) else str(type(dtype))
        if name not in DTYPE_OF_NAME:
            self._fail(f"its dtype is torch.{name}, which reshard does not know", f"known: {', '.join(DTYPE_NAME.values())}")
        return self._tensor(storage, DTYPE_OF_NAME[name], offset, shape, strides, metadata)

    def _tensor(self, storage, dtype, offset, shape, strides, metadata) -> TensorInfo:
        """Offsets and strides count elements of `dtype` in `storage`. Every element must lie inside."""
        if not isinstance(storage, Storage) or dtype is None:
            self._fail("a tensor has no storage of a known dtype")
        if metadata:
            self._fail(f"a tensor is a lazily conjugated or negated view ({quote(metadata)})", "save tensor.resolve_conj().resolve_neg()")
        if not (type(shape) is type(strides) is tuple and len(shape) == len(strides) <= 64):
            self._fail(f"a tensor has shape {quote(shape)} and strides {quote(strides)}")
        for n in (offset, *shape, *strides):
            if type(n) is not int or not 0 <= n < 1 << 63:
                self._fail(f"a tensor has offset {quote(offset)}, shape {quote(shape)} and strides {quote(strides)}, expected sizes")
        size = DTYPE_SIZE[dtype]
        if 0 in shape:
            return TensorInfo(dtype, shape, storage.offset)
        last, row_major = offset, row_major_strides(shape)
        for n, stride in zip(shape, strides):
            last += (n - 1) * stride
        if (last + 1) * size > storage.nbytes or prod(shape) * size >= 1 << 63:
            self._fail(f"a tensor of {dtype} {quote(shape)} with strides {quote(strides)} ends at byte {(last + 1) * size} of its storage "
                       f"data/{quote(storage.key)}, which has {storage.nbytes}")  # fmt: skip
        self.repeated.take(max(0, prod(shape) * size - storage.nbytes))
        plain = strides == row_major or all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major))
        return TensorInfo(dtype, shape, storage.offset + offset * size, None if plain else strides)

    def _parameter(self, data, requires_grad=True, hooks=None, state=None) -> TensorInfo:
        if not isinstance(data, TensorInfo):
            self._fail(f"a parameter holds a {type(data).__name__}")
        return data

    def _from_type(self, rebuild, kind, args, state) -> object:
        """A tensor that carries Python attributes; they are dropped. A DTensor is one."""
        if isinstance(kind, Global) and (kind.module, kind.name) in DTENSORS:
            try:
                return sharded(state)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._fail(f"a DTensor is not as torch writes one ({type(error).__name__}: {quote(error)})")
        if isinstance(kind, Global) and (kind.module, kind.name) in SHARDED_TENSORS:
            try:
                return shards(state)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._fail(f"a ShardedTensor is not as torch writes one ({type(error).__name__}: {quote(error)})")
        if not isinstance(kind, Global) or (kind.module, kind.name) not in TENSOR_TYPES:
            self._fail(f"a tensor is of the class {quote(getattr(kind, 'name', kind))}", "save plain tensors")
        return self._call(rebuild, args)

    def _member(self, owner: object, name: object) -> Global:
        """A class inside a class, or a member of an enumeration: all that torch's files ask of getattr. Of what is not made, by name."""
        if not isinstance(owner, Global) or not is_inert(owner.module, owner.name) or type(name) is not str or len(name) > _LONGEST_NAME:
            self._fail("its pickle asks for an attribute, which reshard neither needs nor runs")
        return Global(owner.module, f"{owner.name}.{name}"[:_LONGEST_NAME])


def _children(node: object) -> list | None:
    if isinstance(node, dict):
        return list(node.values())
    if type(node) in (list, tuple):
        return list(node)
    if type(node) in (argparse.Namespace, types.SimpleNamespace):
        return list(vars(node).values())
    return [node.args, node.state, node.items] if type(node) is Opaque else None


def _unbounded(root: object) -> str | None:
    """What is wrong with a tree that holds itself, is too deep, or by sharing unfolds to too many nodes; None if nothing."""
    done: dict[int, tuple[int, int]] = {}
    entered: set[int] = set()
    stack = [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if id(node) in done:  # before its children are listed: a long list may be held a million times
            continue
        children = _children(node)
        if children is None:
            continue
        if leaving:
            depth = size = 0
            for child in children:
                d, s = done.get(id(child), (0, 1))
                depth, size = max(depth, d), size + s
            if depth >= _DEPTH_LIMIT:
                return f"more than {_DEPTH_LIMIT} levels"
            if size >= _NODE_LIMIT:
                return f"more than {_NODE_LIMIT} values"
            entered.discard(id(node))
            done[id(node)] = depth + 1, size + 1
        elif id(node) in entered:
            return "an object that holds itself"
        else:
            entered.add(id(node))
            stack.append((node, True))
            stack.extend((child, False) for child in children)
    return None
