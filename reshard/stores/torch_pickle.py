"""The pickle of a torch.save file, written as torch writes it: its classes by name only, tensors as numbered storages."""

import io
import pickle
import types
from collections import OrderedDict
from math import prod
from typing import ClassVar

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import ReshardError
from reshard.stores.torch_allowlist import CALLS
from reshard.stores.torch_names import DTYPE_NAME, STORAGE_NAME, DType, Global, Made, Storage, TensorSpec, row_major_strides

#: what a tree to be written may hold beyond pickle's own types; no sets, whose order changes from run to run
_WRITABLE = frozenset(CALLS) - {("builtins", "set"), ("builtins", "frozenset"), ("collections", "defaultdict")}


class Pickler(pickle._Pickler):
    """Writes what torch.save would for the same tree, torch's classes by name only. ``specs`` lists the storages in order."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.specs: list[TensorSpec] = []
        self.names: set[str] = set()
        self.globals: dict[tuple[str, str], Global] = {}  # one object per name, so that the memo knows it again

    def _named(self, module: str, name: str) -> Global:
        return self.globals.setdefault((module, name), Global(module, name))

    def persistent_id(self, obj: object) -> tuple | None:
        if type(obj) is not Storage:
            return None
        kind = self._named("torch", STORAGE_NAME[obj.dtype]) if obj.dtype else self._named("torch.storage", "UntypedStorage")
        return ("storage", kind, obj.key, "cpu", obj.nbytes // DTYPE_SIZE.get(obj.dtype, 1))

    def save_spec(self, spec: TensorSpec) -> None:
        if spec.name in self.names:
            raise ReshardError(f"{spec.name} stands twice among the tensors of one file")
        if spec.dtype not in DTYPE_NAME:
            raise ReshardError(f"{spec.name} has dtype {spec.dtype}, which torch has not")
        typed = spec.dtype in STORAGE_NAME
        nbytes = prod(spec.shape) * DTYPE_SIZE[spec.dtype]
        storage = Storage(str(len(self.specs)), spec.dtype if typed else None, 0, nbytes)
        self.names.add(spec.name)
        self.specs.append(spec)
        args = (storage, 0, tuple(spec.shape), row_major_strides(spec.shape), False, OrderedDict())
        self.save(self._named("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3"))
        self.save(args if typed else (*args, DType(DTYPE_NAME[spec.dtype])))
        self.write(pickle.REDUCE)
        self.memoize(spec)

    def save_made(self, made: Made) -> None:
        self.save(self._named(made.module, made.name))
        self.save(made.args)
        self.write(pickle.REDUCE if made.called else pickle.NEWOBJ)
        self.memoize(made)
        if not made.called:
            self.save(made.state)
            self.write(pickle.BUILD)

    def save_dtype(self, dtype: DType) -> None:
        self.save(self._named("torch", dtype.name))

    def save_name(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_global(self, obj: object, name: str | None = None) -> None:
        key = (getattr(obj, "__module__", ""), name or getattr(obj, "__qualname__", ""))
        if key not in _WRITABLE:
            raise ReshardError(f"a torch file of reshard cannot hold {key[0]}.{key[1]}", "use plain dicts, lists, texts and numbers")
        super().save_global(obj, name)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, TensorSpec: save_spec, Made: save_made, DType: save_dtype, Global: save_name, type: save_global,
                types.FunctionType: save_global}  # fmt: skip
