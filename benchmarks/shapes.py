"""The shapes that are measured: hidden size and vocabulary of real models."""

from typing import NamedTuple


class Shape(NamedTuple):
    """N tokens of a model with hidden size D and vocabulary V."""

    model: str
    N: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"{self.model}: {self.N} x {self.D} x {self.V}"


SMOLLM2_135M = Shape("SmolLM2-135M", 1024, 576, 49152)
