"""A running vLLM model's tensors in the shape of loading, a layer at a time: what vLLM repacked is made anew, filled, and repacked.

Source: vLLM 0.32, model_executor/model_loader/reload/ (vLLM keeps the shapes of loading for every layer), layers/utils.py (what it
repacks on a CPU). Layers whose weights are the kernels' own are written where they lie.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload.layerwise import _copy_and_restore_kernel_tensors, _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import SKIP_TENSORS, materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers
from vllm.platforms import current_platform

from reshard.errors import PlanError
from reshard.plugins.fitting import storage
from reshard.sync import Side
from reshard.sync.tensors import bind

Place = tuple[torch.nn.Module, str]


class Layers:
    """What `process` of `side` fills of `model`. Raises PlanError, before anything is touched, for what does not fit.

    ``give`` and ``complete`` are what ``Sync.recv`` asks for. `written`: whether a tensor of the running model was changed.
    """

    def __init__(self, model: torch.nn.Module, side: Side, process: int):
        self._model = model
        self._places = dict(places(model))
        self._one: dict[tuple, list[Place]] = defaultdict(list)  # the places of one tensor (tied weights)
        for place in dict.fromkeys(self._places.values()):
            self._one[self._key(place)].append(place)
        forms = self.forms()
        bind(forms, side, process, "engine")
        self._asked = {}  # the place of each name that ``give`` is asked for
        for stored in side.held_by(process):
            for own in filter(None, (stored, side.scales(stored))):
                known = [name for name in (own.name, *side.other_names.get(stored.entry.of, ())) if name in forms]
                self._asked.update((own.name, self._places[name]) for name in known[:1])
        self._planned = {other for place in self._asked.values() for other in self._one_with(place)}
        lost = [f"engine: {name} is repacked with its layer, and no part of the sync" for name, (layer, at) in self._places.items()
                if (layer, at) not in self._planned and repacked(layer) and getattr(layer, at, forms[name]).shape != forms[name].shape]  # fmt: skip
        if lost:
            raise PlanError(lost)
        self._open: dict[torch.nn.Module, set[str]] = {}
        self.written = False

    def forms(self) -> dict[str, torch.Tensor]:
        """{name: a tensor of the shape and dtype of loading, which takes no memory}; names of one tensor have one."""
        one: dict[tuple, torch.Tensor] = {}
        out = {}
        for name, place in self._places.items():
            like = loaded(*place)
            out[name] = one.setdefault(self._key(place), torch.empty((), dtype=like.dtype).expand(like.shape))
        return out

    def give(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors of these names, to be filled."""
        out = {}
        for name in names:
            layer, at = self._asked[name]
            if repacked(layer):
                self._begin(layer)
            else:
                self.written = True
            out[name] = getattr(layer, at).data
        return out

    def complete(self, names: Iterable[str]) -> None:
        """Repack the layers that are whole now, into the tensors that the kernels know."""
        for name in names:
            for layer, at in self._one_with(self._asked[name]):
                if layer in self._open:
                    self._open[layer].discard(at)
        for layer in [layer for layer, waits in self._open.items() if not waits]:
            self.written = True
            del self._open[layer]
            layer.__dict__.pop("_already_called_process_weights_after_loading", None)
            layer.quant_method.process_weights_after_loading(layer)
            if hasattr(layer, "update_param_tp_status"):
                layer.update_param_tp_status()
            info = get_layerwise_info(layer)
            _copy_and_restore_kernel_tensors(layer, info)
            info.reset()

    def finish(self, dtype: torch.dtype) -> None:
        """What attention derives of weights is derived anew, after all else, as vLLM does after loading."""
        for layer in self._model.modules():
            if is_deferred_attention_layer(layer):
                layer.process_weights_after_loading(dtype)

    def put_back(self) -> None:
        """Layers that are not whole become what they were."""
        for layer in self._open:
            info = get_layerwise_info(layer)
            _place_kernel_tensors(layer, info)
            info.reset()
        self._open = {}

    def _begin(self, layer: torch.nn.Module) -> None:
        """Give a repacked layer, and those that share a parameter with it, tensors in the shape of loading."""
        if layer in self._open:
            return
        names = [at for own, at in self._planned if own is layer]
        shared = {at: [place for place in self._one_with((layer, at)) if place[0] is not layer] for at in names}
        info = get_layerwise_info(layer)
        info.kernel_tensors = get_layer_params_buffers(layer)
        info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
        self._open[layer] = set(names)
        fresh = {at: torch.empty_like(getattr(layer, at), dtype=loaded(layer, at).dtype) for at in names if at in SKIP_TENSORS}
        restore_layer_on_meta(layer, info)
        materialize_layer(layer, info)
        for at, tensor in fresh.items():  # which vLLM does not make anew, and may have widened
            delattr(layer, at)
            layer.register_parameter(at, torch.nn.Parameter(tensor, requires_grad=False))
        for at, tensor in (info.kernel_tensors[0] | info.kernel_tensors[1]).items():
            new = getattr(layer, at, None)
            if at not in names and isinstance(new, torch.Tensor) and new is not tensor and new.shape == tensor.shape:
                new.data.copy_(tensor)  # no part of the sync
        for at, others in shared.items():
            for other, theirs in others:
                if repacked(other):
                    self._begin(other)
                    other._parameters[theirs] = layer._parameters[at]

    def _key(self, place: Place) -> tuple:
        tensor = getattr(*place, None)
        return storage(tensor) if tensor is not None and tensor.numel() else (id(place[0]), place[1])

    def _one_with(self, place: Place) -> list[Place]:
        return next(own for own in self._one.values() if place in own)


def places(model: torch.nn.Module) -> Iterator[tuple[str, Place]]:
    """(name, (layer, attribute)) of all that is loaded, tied weights under each of their names."""
    for prefix, layer in model.named_modules(remove_duplicate=False):
        kept = [name for name, b in layer._buffers.items() if b is not None and name not in layer._non_persistent_buffers_set]
        held = [name for name, p in layer._parameters.items() if p is not None]
        for at in dict.fromkeys((*held, *kept, *(get_layerwise_info(layer).restore_metadata[0] if repacked(layer) else ()))):
            yield f"{prefix}.{at}" if prefix else at, (layer, at)


def loaded(layer: torch.nn.Module, at: str) -> torch.Tensor:
    """A tensor of the shape and dtype of loading. A bias, of which vLLM keeps no record and which it may widen, has its weight's dtype."""
    known = {name: t for own in get_layerwise_info(layer).restore_metadata for name, t in own.items()} if repacked(layer) else {}
    if at == "bias" and "weight" in known:
        return getattr(layer, at).to("meta", known["weight"].dtype)
    return known[at] if at in known else getattr(layer, at)


def repacked(layer: torch.nn.Module) -> bool:
    """Whether vLLM makes something else of the layer's tensors after loading; all methods may, but for plain matrices on accelerators."""
    method = getattr(layer, "quant_method", None)
    plain = isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod) and not current_platform.is_cpu()
    return isinstance(method, QuantizeMethodBase) and not plain
