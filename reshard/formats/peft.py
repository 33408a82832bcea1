"""``peft``: a LoRA adapter as PEFT saves it: adapter_model.safetensors (or .bin) and adapter_config.json. Source: peft 0.21 ``save_and_load.py``."""

from reshard.errors import FormatError
from reshard.formats import Contents, Folder, Format, OutFile, Target
from reshard.formats.hf import state_dict
from reshard.formats.pieces import pieces_of
from reshard.geometry.block import Stored
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import safetensors
from reshard.stores.files import AnyPath

#: what an adapter is: beside its weights, in whatever format these are
CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return bool(names & set(_WEIGHTS)) and not any(name.startswith(("model", "pytorch_model")) for name in names)


def _read(folder: AnyPath) -> Contents:
    file = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FormatError(f"{folder} holds no {' or '.join(_WEIGHTS)}", "copy the adapter again, whole")
    held = safetensors.read(folder / file)[0] if file.endswith(".safetensors") else state_dict(folder / file)
    return Contents(Mesh(), pieces_of(file, held), writer="peft")


def _write(target: Target, stored: list[Stored]) -> Folder:
    image = safetensors.compose([(s.name, s.dtype, s.shape) for s in sorted(stored, key=lambda s: s.name)], {"format": "pt"})
    return Folder([OutFile(_WEIGHTS[0], image)], pieces_of(_WEIGHTS[0], image.tensors), {})


FORMAT = Format(
    "peft",
    "peft",
    Rules(grid, even_stages, even=False),
    _recognise,
    _read,
    _write,
    holds=("adapter",),
    small=(CONFIG,),
    usage="from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained({repo})",
)
