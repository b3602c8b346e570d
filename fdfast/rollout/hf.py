"""Rollouts by Hugging Face's `generate`: batched, with its KV cache.

Legend: B prompts, L positions.
"""

import bisect
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from fdfast.models import import_transformers
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
        settings = self._generation_config(options)
        wants_tokenizer = {"tokenizer": self.tokenizer} if options.stop_strings else {}
        # `generate` fills what `settings` leaves open from the model's own generation_config: a
        # repetition penalty there would make the samples none of the policy that is trained.
        own, self.model.generation_config = self.model.generation_config, settings
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of max_length, which max_new_tokens goes over
                out_BL = self.model.generate(
                    input_ids=ids_BL,
                    attention_mask=mask_BL,
                    generation_config=settings,
                    **wants_tokenizer,
                )
        finally:
            self.model.generation_config = own
        return [self._completion(row, options) for row in out_BL[:, longest:].tolist()]

    def _generation_config(self, options: SamplingOptions) -> Any:
        """transformers' form of `options`, with nothing of the model's own."""
        sampling: dict[str, Any] = {"do_sample": False}
        if options.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": options.temperature,
                "top_p": options.top_p,
                "top_k": options.top_k,
            }
        return import_transformers().GenerationConfig(
            max_new_tokens=options.max_completion_length,
            eos_token_id=self.end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            stop_strings=list(options.stop_strings) or None,
            **sampling,
        )

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
        return bisect.bisect_left(range(len(ids) + 1), True, lo=1, key=stops)
