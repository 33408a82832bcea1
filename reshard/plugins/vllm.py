"""vLLM's entry point: ``--load-format reshard``. Every vLLM process calls ``register`` if VLLM_PLUGINS allows it."""

import logging


def register() -> None:
    """Tell vLLM of the loader. Never raises: a vLLM that has other places for plug-ins goes on without it, and a warning."""
    try:
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known
        from vllm.model_executor.model_loader import register_model_loader

        if "reshard" not in known:
            from reshard.plugins.vllm_loader import ReshardModelLoader

            register_model_loader("reshard")(ReshardModelLoader)
    except Exception as error:  # noqa: BLE001  vLLM would die of whatever leaves this function
        logging.getLogger("vllm.reshard").warning("--load-format reshard is not available: %s: %s", type(error).__name__, error)
