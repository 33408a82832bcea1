"""Open a checkpoint: recognise its format, find its layout, and match every tensor in its files with that layout.

What comes out is a list of stored tensors with dtypes, files and byte offsets: one side of a join. Headers only.
"""

from reshard.checkpoint.config import find_config, model_config, read_config
from reshard.checkpoint.described import describe_checkpoint
from reshard.checkpoint.open import open_checkpoint
from reshard.checkpoint.opened import Checkpoint

__all__ = ["Checkpoint", "describe_checkpoint", "find_config", "model_config", "open_checkpoint", "read_config"]
