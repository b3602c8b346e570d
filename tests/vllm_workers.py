"""Run as a program: vLLM with two worker processes takes new weights, and answers as transformers.

A program of its own, for vLLM starts its workers by importing the main module again.
"""

import sys
from pathlib import Path

import torch

from fdfast.models import load_model
from fdfast.rollout import HFEngine, SamplingOptions
from fdfast.rollout.vllm_engine import VLLMEngine
from tests.tiny import save_tiny_model


def main() -> None:
    """Print "equal", or fail."""
    folder = save_tiny_model(Path(sys.argv[1]))
    model, tokenizer = load_model(folder)
    engine = VLLMEngine(
        folder, dtype="float32", max_model_len=256, enforce_eager=True, tensor_parallel_size=2
    )
    prompts = [tokenizer(text).input_ids for text in ("Why", "theorem a + b = b + a", "x")]
    options = SamplingOptions(max_completion_length=24, temperature=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    old = engine.generate(prompts, options, seed=0)
    engine.update_weights(model)
    new = engine.generate(prompts, options, seed=0)
    right = HFEngine(model, tokenizer).generate(prompts, options, seed=0)
    engine.close()
    assert [t.ids for t in new] == [t.ids for t in right] != [t.ids for t in old]
    print("equal")


if __name__ == "__main__":
    main()
