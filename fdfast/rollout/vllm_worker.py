"""What vLLM's workers get from us: loading new weights, tied heads included.

On a CPU vLLM packs each linear layer's weight when it is loaded. A head that is tied to the
embedding gets no weight of its own, so `reload_weights` leaves its packed copy as it was: the model
would go on with the new layers and the old head.
"""

from typing import Any

from torch import Tensor

EXTENSION = "fdfast.rollout.vllm_worker.WorkerExtension"


class WorkerExtension:
    """Methods of every worker: `--worker-extension-cls` (`worker_extension_cls`)."""

    model_runner: Any
    reload_weights: Any

    def fdfast_load_folder(self, folder: str) -> None:
        """Take the weights in a folder of safetensors."""
        self.reload_weights(weights_path=folder)
        repack_heads(self.model_runner.get_model())

    def fdfast_load_tensors(self, weights: dict[str, Tensor]) -> None:
        """Take these weights, named as in a checkpoint; of any shape, dtype and device."""
        self.reload_weights(weights_iterator=iter(weights.items()))
        repack_heads(self.model_runner.get_model())


def repack_heads(model: Any) -> None:
    """Pack the heads again, where vLLM packs: on a CPU."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead) and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)
