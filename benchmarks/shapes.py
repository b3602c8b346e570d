"""The shapes that are measured or modelled: hidden size and vocabulary of real models."""

from typing import NamedTuple


class Shape(NamedTuple):
    """N tokens of a model with hidden size D and vocabulary V."""

    model: str
    N: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"{self.model}: {self.N} x {self.D} x {self.V}"

    def fitting(self, memory_bytes: int) -> "Shape":
        """With N halved until plain PyTorch's pass fits.

        It stores about 20 bytes a logit of student and teacher together (logits, float32
        log-probabilities, their gradients), beside some 8 bytes an element of the weight.
        """
        N = self.N
        while N > 1 and 0.9 * memory_bytes < 20 * N * self.V + 8 * self.V * self.D:
            N //= 2
        return self._replace(N=N)


SMOLLM2_135M = Shape("SmolLM2-135M", 2048, 576, 49152)
# For a GPU, at the 8,192 tokens that the kernels were designed for.
QWEN3_8B = Shape("Qwen3-8B", 8192, 4096, 151936)
QWEN3_5_9B = Shape("Qwen3.5-9B", 8192, 4096, 248320)
LLAMA_3_8B = Shape("Llama-3-8B", 8192, 4096, 128256)
GEMMA_3_27B = Shape("Gemma-3-27B", 8192, 5376, 262208)
GPU_SHAPES = (QWEN3_8B, QWEN3_5_9B, LLAMA_3_8B, GEMMA_3_27B)
