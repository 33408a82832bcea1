"""Wrong descriptors: each mistake is one LayoutError that names file, table and key. Nothing else comes out."""

import random

import pytest
from bad.descriptors import CONFIG, as_toml, builtin_texts, mutant, use
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.descriptors import layout_dir, load_descriptor
from reshard.errors import LayoutError, PlanError
from reshard.formats import get
from reshard.place import Mesh, Placement
