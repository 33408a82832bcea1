"""Layouts: what every format calls, fuses and cuts of an architecture, as data, and where that puts each tensor.

One way through: ``files`` reads and checks TOML, ``resolve`` and ``sections`` put parts and places together (a ``Descriptor``), ``bound``
gives it the sizes of one config.json (a ``Layout``), ``place`` says what each rank of a format then stores.
docs/guides/descriptor.md explains the notation.
"""

from reshard.layout.bound import Layout
from reshard.layout.find import architectures, builtin_descriptors, find_descriptor, load_descriptor
from reshard.layout.mesh import Mesh, Rank, Rules
from reshard.layout.model import Constant, Descriptor, Entry, Section, Tensor, parse_version
from reshard.layout.place import Placement
from reshard.layout.values import PLATFORMS

__all__ = [
    "PLATFORMS",
    "Constant", "Descriptor", "Entry", "Layout", "Mesh", "Placement", "Rank", "Rules", "Section", "Tensor",
    "architectures", "builtin_descriptors", "find_descriptor", "load_descriptor", "parse_version",
]  # fmt: skip
