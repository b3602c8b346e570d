"""What a rollout engine is asked and what it answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; TRL's names.

    Attributes:
        max_completion_length: tokens at most.
        temperature: > 0; 0 is greedy.
        top_p: nucleus; 1 is off.
        top_k: 0 is off.
        stop_strings: text that ends a completion; it stays part of it.
    """

    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One sampled answer: the ids that were sampled are the ids that are trained.

    Attributes:
        ids: token ids as sampled, the end token included if the model wrote one.
        text: the same without special tokens.
        truncated: whether it ran into max_completion_length.
    """

    ids: list[int]
    text: str
    truncated: bool
