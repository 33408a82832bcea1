"""vLLM's entry point: ``--load-format reshard``, and the weight transfer backend ``reshard``. Every vLLM process calls ``register`` if VLLM_PLUGINS allows it."""

import logging


def register() -> None:
    """Tell vLLM of both. Never raises: a vLLM that has other places for plug-ins goes on without them, and a warning."""
    for name, tell in (("--load-format reshard", _loader), ("weight transfer backend reshard", _transfer)):
        try:
            tell()
        except Exception as error:  # noqa: BLE001  vLLM would die of whatever leaves this function
            logging.getLogger("vllm.reshard").warning("%s is not available: %s: %s", name, type(error).__name__, error)


def _loader() -> None:
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as known
    from vllm.model_executor.model_loader import register_model_loader

    if "reshard" not in known:
        from reshard.plugins.vllm_loader import ReshardModelLoader

        register_model_loader("reshard")(ReshardModelLoader)


def _transfer() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    for factory, name in (
        (WeightTransferEngineFactory, "ReshardWeightTransferEngine"),
        (WeightTransferTrainerFactory, "ReshardTrainerEngine"),
    ):
        if "reshard" not in factory._registry:
            factory.register_engine("reshard", "reshard.plugins.vllm_transfer", name)  # imported when it is asked for
