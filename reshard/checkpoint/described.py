"""A checkpoint of which there is only a config.json: the tensors that its files would hold, for plans from shapes alone."""

from math import prod
from pathlib import Path

from reshard import formats
from reshard.checkpoint.config import find_config, model_config, read_config
from reshard.checkpoint.opened import Checkpoint
from reshard.dtypes import DTYPE_SIZE, TABLE
from reshard.errors import LayoutError
from reshard.geometry.block import Stored
from reshard.layout import Mesh, Placement, architectures, find_descriptor, load_descriptor
from reshard.layout.check import refuse_unheld
from reshard.layout.quantise import as_published


def describe_checkpoint(config: str | Path, layout: str | Path | None = None) -> Checkpoint:
    """The Hugging Face checkpoint of the model that `config` (a config.json or its folder) describes, optional places with it;
    towers that would be carried are unknown. There are no bytes to read. Raises LayoutError, FormatError or PlanError."""
    path = find_config(Path(config), config)
    settings = read_config(path)
    descriptor = load_descriptor(Path(layout)) if layout else find_descriptor(settings)
    if descriptor is None:
        text = f"{path}: no layout descriptor for architecture {', '.join(architectures(settings)) or '(config.json names none)'}"
        raise LayoutError(text, "pass a descriptor of your own with --layout FILE.toml")
    numbers = model_config(settings)
    bound = descriptor.bind(numbers)
    bound = as_published(bound.present(bound.absent))
    kind = formats.get("hf")
    placement = Placement(bound, bound.section("hf"), kind.rules, Mesh())
    refuse_unheld(placement, "hf")
    words = {row.torch: word for word, row in TABLE.items()}
    common = words.get(str(numbers.get("dtype") or numbers.get("torch_dtype")), "BF16")
    stored, at = [], 0
    for s in placement.stored():
        dtype = bound.descriptor.tensors[s.entry.of[0]].dtype or common
        stored.append(Stored(s.rank, s.name, dtype, s.shape, s.parts, s.entry, "model.safetensors", at, s.pad))
        at += prod(s.shape) * DTYPE_SIZE[dtype]
    return Checkpoint(path.parent, "hf", Mesh(), bound, stored, config_path=path)
