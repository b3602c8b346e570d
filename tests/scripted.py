"""Makes an engine write given texts, a turn each; the log-probs stay the model's."""

from collections.abc import Callable, Sequence

import pytest


def script(
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: object,
    end_id: int,
    turns_of: Callable[[int], Sequence[str]],
) -> None:
    """Trajectory number n writes the turns `turns_of(n)`, each with the end token after it."""
    left: dict[tuple[int, int], list[int]] = {}

    def sample(logits, options, generators):
        tokens = []
        for generator in generators:
            seed = generator.initial_seed()
            key = (seed, seed % 1_000_003)
            if key not in left:
                left[key] = [
                    token
                    for turn in turns_of(key[1])
                    for token in [*tokenizer(turn, add_special_tokens=False).input_ids, end_id]
                ]
            tokens.append(left[key].pop(0))
        logprobs = logits.log_softmax(-1)
        return tokens, [float(logprobs[i, t]) for i, t in enumerate(tokens)]

    monkeypatch.setattr("fdfast.rollout.hf.sample", sample)
