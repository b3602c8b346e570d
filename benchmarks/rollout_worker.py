"""One contender at one workload in a process of its own:
`python -m benchmarks.rollout_worker CASE CONTENDER TURN QUICK` prints a line of JSON.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, ClassVar

from benchmarks.rollout_cases import (
    BATCH,
    LEAN_WORKERS,
    LOCK_STEP,
    PLAIN,
    PLAIN_VLLM,
    VLLM,
    Case,
    all_cases,
)

# Whoever measures vLLM on a CPU sets these first.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
SEED = 7


def main(case_name: str, contender: str, turn: int, *, quick: bool) -> dict[str, float]:
    """Load, warm up, measure."""
    from fdfast.lean import LeanPool
    from fdfast.models import fetch_demo_model, load_model
    from fdfast.rollout import SamplingOptions
    from fdfast.trainer.batch import Prompts
    from fdfast.trainer.config_file import make_config
    from fdfast.trainer.presets import PRESETS
    from fdfast.trainer.rollouts import read_split

    case = next(c for c in all_cases(quick=quick) if c.name == case_name)
    config = make_config(PRESETS["demo_lean"] | {"data.problem_names": ()})
    problems = read_split(config, "train")
    begin = 0 if quick else turn * case.num_problems
    chosen = [
        p for p in problems[begin : begin + case.num_problems] for _ in range(case.num_generations)
    ]
    model, tokenizer = load_model(fetch_demo_model(), dtype="bfloat16")
    options = SamplingOptions(
        max_completion_length=case.max_completion_length,
        temperature=1.0,
        stop_strings=("\n",) if case.one_line else (),
        max_tool_calling_iterations=3,
        max_tool_tokens=64,
    )
    prompts = [Prompts(tokenizer, config).student(problem) for problem in chosen]
    with LeanPool(workers=LEAN_WORKERS, timeout_s=10.0) as lean:
        lean.check(chosen[0].prompt, "rfl")  # loads Lean
        run = _RUNS.get(contender, _ours)(contender, model, tokenizer, lean)
        run(case, chosen[:2], prompts[:2], options)
        cpu, start = time.process_time(), time.perf_counter()
        found = run(case, chosen, prompts, options)
        wall = time.perf_counter() - start
    tokens = found.pop("tokens")
    return found | {
        "wall_s": wall,
        "cpu_s": time.process_time() - cpu,
        "tokens_per_s": tokens / wall,
        "verdicts_per_s": len(chosen) / wall,
        "tokens": tokens,
    }


Run = Callable[..., dict[str, float]]


def _ours(contender: str, model: Any, tokenizer: Any, lean: Any) -> Run:
    from fdfast.rollout import HFEngine, generate

    if contender == VLLM:
        engine: Any = _vllm_engine(tokenizer)
    else:
        engine = HFEngine(model, tokenizer, batch_size=BATCH, continuous=contender != LOCK_STEP)

    def run(case: Case, problems: Any, prompts: Any, options: Any) -> dict[str, float]:
        given = iter(prompts)
        start = time.perf_counter()
        with _tools(case, lean) as tools:
            seen = generate(
                problems,
                engine,
                options,
                tools,
                prompt=lambda problem: next(given),
                lean=lean,
                seed=SEED,
            )
        wall = time.perf_counter() - start
        assert all(t.verdict is not None for t in seen)
        if case.slow_tool_s:
            assert all(len(t.tool_calls) for t in seen), "an attempt had no tool call"
        return {
            "tokens": sum(t.num_sampled for t in seen),
            "proved": sum(t.verdict.proved for t in seen if t.verdict),
            "idle_share": engine.idle_s / wall,
        }

    return run


def _vllm_engine(tokenizer: Any) -> Any:
    from fdfast.models import fetch_demo_model
    from fdfast.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        fetch_demo_model(),
        tokenizer,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=BATCH,
        enforce_eager=True,
    )


class _Check:
    """A tool that compiles a file with Lean; a slow one answers `delay_s` later."""

    schemas: ClassVar[list[Any]] = []

    def __init__(self, lean: Any, delay_s: float) -> None:
        self.lean, self.delay_s = lean, delay_s

    def call(self, name: str, arguments: str) -> Any:
        from fdfast.lean.tools import ToolResult

        checked = self.lean.check_file(arguments)
        time.sleep(self.delay_s)
        said = "\n".join(str(message) for message in checked.messages[:1])
        return ToolResult(said or "No errors.", 0.0, ok=True)


class _Checks:
    """Every eighth attempt's tool is slow."""

    def __init__(self, lean: Any, slow_tool_s: float) -> None:
        self.lean, self.slow_tool_s = lean, slow_tool_s

    def __call__(self, number: int) -> _Check:
        return _Check(self.lean, self.slow_tool_s if number % 8 == 0 else 0.0)

    def close(self, number: int) -> dict[str, str]:
        return {}


@contextlib.contextmanager
def _tools(case: Case, lean: Any) -> Any:
    """A tool for each attempt, and every turn a call of it: the model knows no tools."""
    from fdfast.rollout.tool_calls import Call
    from fdfast.rollout.tool_turns import ToolTurns

    if not case.slow_tool_s:
        yield None
        return
    read = ToolTurns.read_calls
    ToolTurns.read_calls = lambda self, text, *others: [  # type: ignore[method-assign]
        Call("check", f"theorem attempt (p q : Prop) (h : p) (k : q) : p :={text}")
    ]
    try:
        yield _Checks(lean, case.slow_tool_s)
    finally:
        ToolTurns.read_calls = read  # type: ignore[method-assign]


def _plain_transformers(contender: str, model: Any, tokenizer: Any, lean: Any) -> Run:
    """What a script does: padded batches through `generate`, then all proofs to Lean."""
    import torch

    def run(case: Case, problems: Any, prompts: Any, options: Any) -> dict[str, float]:
        tokens, items = 0, []
        torch.manual_seed(SEED)
        for start in range(0, len(prompts), BATCH):
            batch = tokenizer.pad(
                {"input_ids": prompts[start : start + BATCH]}, return_tensors="pt"
            )
            stops = {"stop_strings": ["\n"], "tokenizer": tokenizer} if case.one_line else {}
            with torch.no_grad():
                output = model.generate(
                    **batch,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    max_new_tokens=options.max_completion_length,
                    pad_token_id=tokenizer.pad_token_id,
                    **stops,
                )
            written = output[:, batch["input_ids"].shape[1] :].tolist()
            end = tokenizer.eos_token_id  # which pads, too
            for problem, row in zip(problems[start : start + BATCH], written, strict=True):
                ids = row[: row.index(end) + 1] if end in row else row
                tokens += len(ids)
                items.append((problem, tokenizer.decode(ids, skip_special_tokens=True)))
        return {"tokens": tokens, "proved": _proved(lean, items)}

    return run


def _plain_vllm(contender: str, model: Any, tokenizer: Any, lean: Any) -> Run:
    """What a script does with vLLM: all prompts to `LLM.generate`, then all proofs to Lean."""
    engine = _vllm_engine(tokenizer)

    def run(case: Case, problems: Any, prompts: Any, options: Any) -> dict[str, float]:
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=1.0,
            max_tokens=options.max_completion_length,
            stop=["\n"] if case.one_line else None,
            seed=SEED,
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = engine.llm.generate(asked, sampling, use_tqdm=False)
        texts = [(p, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True)]
        tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
        return {"tokens": tokens, "proved": _proved(lean, texts)}

    return run


def _proved(lean: Any, answers: Any) -> int:
    from fdfast.data.problems import proof_text

    items = [
        (p.theorem.formal_statement, proof_text(text), p.theorem.header) for p, text in answers
    ]
    return sum(verdict.proved for verdict in lean.check_many(items))


_RUNS = {PLAIN: _plain_transformers, PLAIN_VLLM: _plain_vllm}

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    _, case_name, contender, turn, quick = sys.argv
    print(json.dumps(main(case_name, contender, int(turn), quick=quick == "1")))
