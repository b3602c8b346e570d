"""Rollouts with a vLLM server: token ids in, token ids out, over HTTP.

Start it so:

    VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model DIR \\
        --host 127.0.0.1 --enable-scale-out --logprobs-mode processed_logprobs \\
        --worker-extension-cls fdfast.rollout.vllm_worker.WorkerExtension

The development mode lets anyone who reaches the port replace the weights, so it must be reachable
from here alone. The extension is needed on a CPU only, and wants fdfast to be importable there.
"""

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from pathlib import Path
from typing import Any

from fdfast import http_calls
from fdfast.checks import check_positive
from fdfast.errors import InputError, MachineError
from fdfast.http_calls import LoopThread
from fdfast.interrupts import result_of, wait_for
from fdfast.models import free_bytes
from fdfast.rollout.trajectory import SamplingOptions, Trajectory
from fdfast.rollout.turns import Draft, MakeTools, OnEnd, Turns
from fdfast.rollout.vllm_client import USER, ServerClient, ServerSettings, Weights
from fdfast.rollout.vllm_turns import (
    Sampled,
    check_logprobs_mode,
    check_prompts,
    logprobs_mode_for,
    run_turns,
)
from fdfast.rollout.weights import checkpoint_weights, save_weights

_MEMORY = Path("/dev/shm")  # files there are in memory


class VLLMServerEngine:
    """A running vLLM server; `Engine` says what it does.

    A server that dies costs no trajectory: the turns that were in flight are asked for again when
    it is back, with our last weights, which are pushed again before anything is sampled. Until the
    first `update_weights` it samples by whatever weights the server has.

    Args:
        base_url: http://HOST:PORT.
        tokenizer: of the model.
        end_ids: tokens that end a turn, see `fdfast.rollout.turns.end_ids`; None: the tokenizer's.
        api_key_env: the environment variable that holds the key; "" sends none.
        max_concurrency: turns at the server at once; those that wait for tools do not count.
        max_retries: how often a turn is asked for again.
        timeout_s: seconds for one turn.
        restart_timeout_s: seconds to wait for a server that does not answer.
        weights_dir: a folder that the server sees under the same path; None: /dev/shm where it has
            room, else as `tempfile` chooses. Weights lie in a folder in it that only this user can
            read; it goes with `close` or the process (after SIGKILL it stays).
        may_sleep: whether `sleep` puts the server to sleep (--enable-sleep-mode).
        max_tool_threads: calls carried out at once.
        sleep: waits so many seconds (tests replace it).
        uniform: a random number between two bounds, the jitter (tests replace it).

    Attributes:
        tokenizer: of the model.
        end_ids: tokens that end a turn.

    Raises:
        InputError: a setting can't be, or the key is missing.
        MachineError: httpx2 is missing.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: Any,
        *,
        end_ids: Sequence[int] | None = None,
        api_key_env: str = "",
        max_concurrency: int = 256,
        max_retries: int = 5,
        timeout_s: float = 1800.0,
        restart_timeout_s: float = 600.0,
        weights_dir: Path | None = None,
        may_sleep: bool = False,
        max_tool_threads: int = 8,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        http_calls.import_httpx2(USER)
        http_calls.check_url(
            base_url,
            setting="base_url",
            form="http(s)://HOST[:PORT]",
            key_setting="api_key_env",
        )
        http_calls.read_key(api_key_env, user=USER, setting="api_key_env")
        try:
            positive = {"max_concurrency": max_concurrency, "timeout_s": timeout_s}
            check_positive(USER, {**positive, "restart_timeout_s": restart_timeout_s})
        except ValueError as error:
            raise InputError(str(error)) from None
        self.settings = ServerSettings(
            base_url,
            api_key_env,
            max_concurrency,
            max_retries,
            timeout_s,
            restart_timeout_s,
            may_sleep,
        )
        self.tokenizer, self.max_tool_threads = tokenizer, max_tool_threads
        self.idle_s = 0.0
        self._met = False
        self.end_ids = sorted({tokenizer.eos_token_id} - {None} if end_ids is None else end_ids)
        self.weights: Weights | None = None
        self._weights_dir, self._sleep, self._uniform = weights_dir, sleep, uniform
        # Nobody else has this name: a server that carries it has our weights.
        self._versions = (f"fdfast-{secrets.token_hex(6)}-{n}" for n in itertools.count(1))
        self._home: Path | None = None

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
        """One trajectory a prompt, in order. See `Engine.generate`, and `VLLMEngine.generate` on
        what a seed promises.

        Raises:
            InputError: a prompt leaves no room under the server's max_model_len, it can't give the
                log-probs of these options or refuses a request, or the chat template has no tools.
            MachineError: a tool met a fault of the machine, or the server does not come back.
        """
        wanted = logprobs_mode_for(options)
        with self._connected() as (loop, client):
            result_of(loop.submit(client.ready()))
            check_prompts(prompts, client.max_model_len)
            if wanted:
                check_logprobs_mode(options, result_of(loop.submit(client.logprobs_mode())))
            with (
                Turns(
                    self.tokenizer,
                    self.end_ids,
                    options,
                    make_tools=tools,
                    on_end=on_end,
                    max_tool_threads=self.max_tool_threads,
                ) as turns,
                contextlib.closing(_Requests(loop, client)) as sampler,
            ):
                seen = run_turns(
                    turns,
                    prompts,
                    sampler,
                    seed=seed,
                    first=first,
                    max_running=self.settings.max_concurrency,
                    max_model_len=client.max_model_len,
                )
                self.idle_s = turns.idle_s
                return seen

    def update_weights(self, model: Any) -> None:
        """Sample from these weights from now on; what the prefix cache holds is forgotten.

        Args:
            model: a causal LM of transformers, of the same shape; LoRA's adapters are merged.

        Raises:
            InputError: its adapters can't be merged.
            MachineError: the weights can't be written, or the server can't load them or does not
                come back.
        """
        before, self.weights = self.weights, self._save(model)
        if before is not None:
            shutil.rmtree(before.folder, ignore_errors=True)
        with self._connected() as (loop, client):
            result_of(loop.submit(client.ready()))

    def sleep(self) -> None:
        """Have the server give memory back until `update_weights` or `generate`, if it may."""
        if self.settings.may_sleep:
            with self._connected() as (loop, client):
                result_of(loop.submit(client.fall_asleep()))

    def close(self) -> None:
        """Remove the weights that were written; the server is left as it is."""
        if self._home is not None:
            self._remove_home()
            self._home = self.weights = None

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[LoopThread, ServerClient]]:
        with LoopThread("vllm") as loop:
            client = ServerClient(
                self.settings,
                self.weights,
                met=self._met,
                sleep=self._sleep,
                uniform=self._uniform,
            )
            try:
                yield loop, client
            finally:
                self._met = client.met
                loop.submit(client.close()).result()

    def _save(self, model: Any) -> Weights:
        """The weights in a new folder."""
        from safetensors import SafetensorError

        if self._home is None:
            self._home = self._new_home(model)
            self._remove_home = weakref.finalize(self, shutil.rmtree, self._home, True)
        version = next(self._versions)
        folder = self._home / version
        try:
            folder.mkdir()
            save_weights(model, folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise MachineError(
                f"update_weights: can't write the weights to {folder} ({error}); give weights_dir, "
                "a folder with room that the server sees, too"
            ) from error
        return Weights(version, folder, bool(model.config.tie_word_embeddings))

    def _new_home(self, model: Any) -> Path:
        parent = self._weights_dir
        if parent is None and os.access(_MEMORY, os.W_OK):
            size = sum(t.numel() * t.element_size() for t in checkpoint_weights(model).values())
            # The old ones are removed before the new ones are read, not before they are written.
            parent = _MEMORY if free_bytes(_MEMORY) > 2.5 * size else None
        try:
            return Path(tempfile.mkdtemp(prefix="fdfast-weights-", dir=parent))
        except OSError as error:
            raise MachineError(f"weights_dir: can't make a folder in {parent}: {error}") from error


class _Requests:
    """Samples turns by requests to a server, all in flight at once."""

    def __init__(self, loop: LoopThread, client: ServerClient) -> None:
        self.loop, self.client = loop, client
        self.running: dict[Future[Sampled], Draft] = {}

    def start(self, draft: Draft, params: dict[str, Any]) -> None:
        """See `Sampler`."""
        ids = [*draft.prompt_ids, *draft.ids]
        request = {"token_ids": ids, "sampling_params": params}
        self.running[self.loop.submit(self.client.sample(request))] = draft

    def num_running(self) -> int:
        """See `Sampler`."""
        return len(self.running)

    def finished(self, turns: Turns) -> list[tuple[Draft, Sampled]]:
        """See `Sampler`."""
        futures: list[Future[Any]] = [*self.running, *turns.waiting]
        wait_for(futures, return_when=FIRST_COMPLETED)
        ended = [future for future in self.running if future.done()]
        return [(self.running.pop(future), future.result()) for future in ended]

    def close(self) -> None:
        """Cancel what an error or Ctrl-C left in flight; the server then ends it, too."""
        for future in self.running:
            future.cancel()
