"""Rollouts by Hugging Face's `generate`: batched, with its KV cache.

Legend: B prompts, L positions.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fdfast.rollout.completion import Completion, SamplingOptions


class HFEngine:
    """Samples from the very model that is trained.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        batch_size: prompts generated at once.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 16) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.end_ids = sorted({*ends, tokenizer.eos_token_id} - {None})

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions, *, seed: int
    ) -> list[Completion]:
        """One completion a prompt, in order; the same seed gives the same answers.

        Args:
            prompts: token ids, B lists.
            options: how to sample.
            seed: of the whole call; the caller's random state is left as it was.
        """
        was_training = self.model.training
        self.model.eval()
        completions: list[Completion] = []
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                for start in range(0, len(prompts), self.batch_size):
                    batch = prompts[start : start + self.batch_size]
                    completions += self._generate_batch(batch, options)
        finally:
            self.model.train(was_training)
        return completions

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], options: SamplingOptions
    ) -> list[Completion]:
        longest = max(len(p) for p in prompts)
        pad = self.tokenizer.pad_token_id
        device = next(self.model.parameters()).device
        ids_BL = torch.tensor(
            [[pad] * (longest - len(p)) + list(p) for p in prompts], device=device
        )
        mask_BL = torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        )
        sampling: dict[str, Any] = {
            "do_sample": False,
            "temperature": None,
            "top_p": None,
            "top_k": None,
        }
        if options.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": options.top_k,
            }
        if options.stop_strings:
            sampling |= {"stop_strings": list(options.stop_strings), "tokenizer": self.tokenizer}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of generation flags that the model's own config carries
            out_BL = self.model.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                max_new_tokens=options.max_completion_length,
                eos_token_id=self.end_ids,
                pad_token_id=pad,
                **sampling,
            )
        return [self._completion(row, options) for row in out_BL[:, longest:].tolist()]

    def _completion(self, ids: list[int], options: SamplingOptions) -> Completion:
        """Cut what follows the first end token or stop string: it is padding, no part of the
        answer.
        """
        ended = next((i + 1 for i, token in enumerate(ids) if token in self.end_ids), None)
        stopped = self._stopped_at(ids[:ended], options.stop_strings)
        ids = ids[: stopped or ended]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(ids, text, truncated=stopped is None and ended is None)

    def _stopped_at(self, ids: list[int], stop_strings: Sequence[str]) -> int | None:
        """How many tokens it took until a stop string was written; None if none was."""

        def stops(length: int) -> bool:
            text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
            return any(stop in text for stop in stop_strings)

        if not stop_strings or not stops(len(ids)):
            return None
        return next(length for length in range(1, len(ids) + 1) if stops(length))
