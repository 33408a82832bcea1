"""transformers' own model of a config.json, without memory for its weights, and where its parts are."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from reshard.errors import FormatError


@dataclass(frozen=True)
class Model:
    """transformers' model and the paths in it of embedding, layers, final norm and output layer. `paths` are all its modules'."""

    module: nn.Module
    paths: frozenset[str]
    embedding: str
    layers: str
    norm: str
    head: str

    @property
    def config(self):
        """The language model's part of the configuration."""
        return self.module.config.get_text_config()

    @property
    def tied(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    def at(self, path: str) -> nn.Module:
        return self.module.get_submodule(path)

    def put(self, path: str, module: nn.Module) -> None:
        self.module.set_submodule(path, module)

    def layer_of(self, name: str) -> int | None:
        """The number of the layer that `name`, a tensor's or a module's, is in."""
        number = name[len(self.layers) + 1 :].partition(".")[0] if name.startswith(f"{self.layers}.") else ""
        return int(number) if number.isdecimal() else None


def hush() -> None:
    """No bars and no advice from transformers and accelerate: the ranks would all give them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def empty_model(config) -> Model:
    """The model of a transformers config on the meta device, its tables (rotary angles) computed. Raises FormatError."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            )
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise FormatError(
            f"transformers cannot make the model that config.json describes ({config.model_type}): {text}", "is config.json this model's?"
        ) from error
    for part in module.modules():
        for name in part._non_persistent_buffers_set:
            part._buffers[name] = torch.full_like(part._buffers[name], float("nan"), device="cpu")  # would be seen if it stayed
        if part._non_persistent_buffers_set:
            module._init_weights(part)
    return parts_of(module.eval())


def parts_of(module: nn.Module) -> Model:
    """Where the parts of a causal language model of transformers' are."""
    path_of = {id(part): path for path, part in module.named_modules()}
    base = getattr(module, module.base_model_prefix)
    depth = module.config.get_text_config().num_hidden_layers
    stacks = [
        (part, child) for part in base.modules() for child in part.children() if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    norms = [child for child in stacks[0][0].children() if "Norm" in type(child).__name__] if stacks else []
    if not norms:
        raise FormatError(f"{type(module).__name__} has no {'norm behind its layers' if stacks else f'list of {depth} layers'}: verify can't run it in ranks",
                          "use --method permute")  # fmt: skip
    return Model(module, frozenset(path_of.values()), path_of[id(module.get_input_embeddings())], path_of[id(stacks[0][1])],
                 path_of[id(norms[-1])], path_of[id(module.get_output_embeddings())])  # fmt: skip
