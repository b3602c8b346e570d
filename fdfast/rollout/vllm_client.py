"""One event loop's way to a vLLM server: turns, weights, and what to do when the server dies.

Each set of weights has a version. The server says in each answer by which version each token was
sampled; one that was restarted has its initial weights and says "default". So an answer is kept
only if our version sampled all of it, and else the weights are pushed again and the turn is asked
for again: all state is on our side.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fdfast import http_calls
from fdfast.errors import InputError, MachineError
from fdfast.rollout.vllm_turns import Sampled
from fdfast.rollout.vllm_worker import EXTENSION

if TYPE_CHECKING:
    import httpx2

USER = "VLLMServerEngine"
# Of small requests, which a live server answers at once.
_SHORT_S = 20.0
_FIRST_S = 60.0
_LOAD_S = 1800.0
_LONGEST_WAIT_S = 5.0
# Answers with an error to pushed weights until we say that they can't be pushed.
_MOST_REFUSALS = 3


@dataclass(frozen=True)
class ServerSettings:
    """How the server is asked; see `VLLMServerEngine`."""

    base_url: str
    api_key_env: str
    max_concurrency: int
    max_retries: int
    timeout_s: float
    restart_timeout_s: float
    may_sleep: bool


class Weights(NamedTuple):
    """The weights that answers must come from: a name of our own, a folder that has them, and
    whether the head is tied to the embedding.
    """

    version: str
    folder: Path
    tied: bool


class _RetryError(Exception):
    """No answer that counts, and another try may help.

    Args:
        said: why.
        answered: whether the server said so itself.
        retry_after_s: seconds that it asks for.
    """

    def __init__(self, said: str, *, answered: bool, retry_after_s: float = 0.0) -> None:
        super().__init__(said)
        self.answered, self.retry_after_s = answered, retry_after_s


class ServerClient:
    """Asks the server; all methods run in one event loop.

    Args:
        settings: how.
        weights: that answers must come from; None: whatever the server has.
        met: whether the server has ever answered.
        sleep: waits so many seconds.
        uniform: a random number between two bounds, the jitter.

    Attributes:
        max_model_len: the server's limit of tokens; known once it is ready.
    """

    def __init__(
        self,
        settings: ServerSettings,
        weights: Weights | None,
        *,
        met: bool,
        sleep: Callable[[float], Awaitable[None]],
        uniform: Callable[[float, float], float],
    ) -> None:
        self.settings, self.weights, self.sleep, self.uniform = settings, weights, sleep, uniform
        self.url = settings.base_url.rstrip("/").removesuffix("/v1")
        self._key = http_calls.read_key(settings.api_key_env, user=USER, setting="api_key_env")
        httpx = http_calls.import_httpx2(USER)
        self.client: httpx2.AsyncClient = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=settings.max_concurrency + 1),
            timeout=None,  # each request has a limit of its own, to its last byte
        )
        self.max_model_len = 0
        self._checking, self._trusted, self._refusals = asyncio.Lock(), False, 0
        self.met = met

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    async def sample(self, request: dict[str, Any]) -> Sampled:
        """A turn, by our weights, however often it has to be asked for.

        Args:
            request: the body of POST /inference/v1/generate.

        Raises:
            InputError: the server refuses the request.
            MachineError: it does not come back, or fails at each try.
        """
        for retry in range(self.settings.max_retries + 1):
            await self.ready()
            try:
                answer = await self._ask(
                    "POST", "/inference/v1/generate", self.settings.timeout_s, request
                )
                return self._read(answer)
            except _RetryError as error:
                # It may be another process by now: whatever we knew of it no longer holds.
                self._trusted, failure = False, error
            await self._wait(retry, failure)
        raise MachineError(
            f"{self.url}: no answer to a turn in {self.settings.max_retries + 1} tries; the last: "
            f"{failure}; see the server's log"
        )

    async def ready(self) -> None:
        """Wait until the server answers, is awake and has our weights; push them if it has not.

        Raises:
            InputError: the server lacks what is asked of it.
            MachineError: it does not answer within restart_timeout_s (a minute where it never has),
                or can't take the weights.
        """
        async with self._checking:
            limit_s = self.settings.restart_timeout_s
            if not self.met:  # more likely a wrong address than a server that restarts
                limit_s = min(limit_s, _FIRST_S)
            until, retry = time.monotonic() + limit_s, 0
            while not self._trusted:
                try:
                    await self._check()
                    self._trusted, self._refusals, self.met = True, 0, True
                    return
                except _RetryError as error:
                    failure = error
                if time.monotonic() > until:
                    raise MachineError(
                        f"{self.url}: vLLM's server gave no answer within "
                        f"{limit_s:g} s ({failure}); start it, and run "
                        "again"
                    )
                await self._wait(retry, failure)
                retry += 1

    async def logprobs_mode(self) -> str:
        """The server's `logprobs_mode`.

        Raises:
            InputError: the server does not say.
            MachineError: it does not answer.
        """
        await self.ready()
        try:
            return str((await self._config())["model_config"]["logprobs_mode"])
        except _RetryError as error:
            raise MachineError(f"{self.url}: no answer ({error})") from None

    async def fall_asleep(self) -> None:
        """Have the server give memory back."""
        await self.ready()
        try:
            await self._ask("POST", "/sleep?level=1", _LOAD_S)
        except _RetryError as error:
            raise MachineError(
                f"{self.url}: the server can't sleep ({error}); start it with --enable-sleep-mode"
            ) from None

    async def _check(self) -> None:
        # A server whose engine died answers other requests until it has ended, this one with 503.
        await self._ask("GET", "/health", _SHORT_S)
        models = await self._ask("GET", "/v1/models", _SHORT_S)
        try:
            self.max_model_len = int(models["data"][0]["max_model_len"])
        except (LookupError, TypeError, ValueError):
            raise InputError(f"{self.url}: /v1/models is not vLLM's; see base_url") from None
        if self.settings.may_sleep and await self._sleeps():
            await self._ask("POST", "/wake_up", _LOAD_S)
        if self.weights is not None and await self._version() != self.weights.version:
            await self._push(self.weights)

    async def _sleeps(self) -> bool:
        return bool((await self._ask("GET", "/is_sleeping", _SHORT_S)).get("is_sleeping"))

    async def _version(self) -> Any:
        return (await self._ask("GET", "/weight_info", _SHORT_S)).get("weight_version")

    async def _push(self, weights: Weights) -> None:
        """Have the server load them. Until all is done its version is neither the old nor the new
        one, so that no answer from in between counts, and so that a restart in between is seen.
        """
        loading = f"{weights.version}-loading-{secrets.token_hex(4)}"
        await self._ask("POST", "/update_weight_version", _SHORT_S, {"new_version": loading})
        load = await self._load_request(weights)
        try:
            await self._ask("POST", "/collective_rpc", _LOAD_S, load)
        except _RetryError as error:
            self._refusals += error.answered
            if self._refusals < _MOST_REFUSALS:
                raise
            raise MachineError(
                f"{self.url}: the server can't load the weights in {weights.folder} ({error}); it "
                "must see that folder (weights_dir) and run a model of the same shape"
            ) from None
        # Requests that the old weights began are ours no more, and must not keep the cache.
        path = "/reset_prefix_cache?reset_running_requests=true"
        if not (await self._ask("POST", path, _SHORT_S)).get("success"):
            raise _RetryError("the prefix cache is still in use", answered=True)
        if await self._version() != loading:
            raise _RetryError("the server was restarted while it loaded weights", answered=True)
        await self._ask(
            "POST", "/update_weight_version", _SHORT_S, {"new_version": weights.version}
        )

    async def _load_request(self, weights: Weights) -> dict[str, Any]:
        """The call of the workers that loads them."""
        config = await self._config()
        if config["parallel_config"].get("worker_extension_cls") == EXTENSION:
            return {"method": "fdfast_load_folder", "args": [str(weights.folder)]}
        if weights.tied and config["device_config"].get("device_type") == "cpu":
            raise InputError(
                f"{self.url}: on a CPU, vLLM alone would keep the old head of a model with tied "
                f"embeddings; start the server with --worker-extension-cls {EXTENSION}"
            )
        return {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}

    async def _config(self) -> dict[str, Any]:
        """The server's settings, by section."""
        # The first time, the server looks at its whole machine before it answers.
        info = await self._ask("GET", "/server_info?config_format=json", 10 * _SHORT_S)
        config = info.get("vllm_config") if isinstance(info, dict) else None
        names = ("model_config", "parallel_config", "device_config")
        if not isinstance(config, dict) or not all(isinstance(config.get(n), dict) for n in names):
            raise InputError(f"{self.url}: /server_info is not that of vLLM 0.32 or newer")
        return config

    async def _ask(
        self, method: str, path: str, limit_s: float, body: dict[str, Any] | None = None
    ) -> Any:
        """The JSON of a good answer.

        Raises:
            _RetryError: another try may help.
            InputError: none will.
        """
        httpx = http_calls.import_httpx2(USER)
        try:
            async with asyncio.timeout(limit_s):
                response = await self.client.request(method, self.url + path, json=body)
        except TimeoutError:
            late = f"no answer to {path} within {limit_s:g} s"
            raise _RetryError(late, answered=False) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            kind = type(error).__name__
            said = http_calls.one_line(f"{path}: {kind}: {error}", self._key)
            raise _RetryError(said, answered=False) from None
        if response.status_code == 200:
            try:
                return response.json() if response.content else {}
            except ValueError:
                raise _RetryError(f"the answer to {path} is not JSON", answered=True) from None
        said = f"HTTP {response.status_code}: {http_calls.error_text(response)}"
        said = http_calls.one_line(said, self._key)
        if response.status_code in http_calls.RETRIED:
            after = http_calls.retry_after_s(response)
            raise _RetryError(said, answered=True, retry_after_s=after)
        raise InputError(f"{self.url}{path}: the server refuses ({said}); {_way_out(path)}")

    async def _wait(self, retry: int, failure: _RetryError) -> None:
        longest = _LONGEST_WAIT_S
        await self.sleep(http_calls.backoff_s(retry, failure.retry_after_s, self.uniform, longest))

    def _read(self, answer: Any) -> Sampled:
        """The turn in an answer that counts."""
        try:
            choice = answer["choices"][0]
            ids, end = list(choice["token_ids"]), choice["finish_reason"]
            logprobs = [float(place["logprob"]) for place in choice["logprobs"]["content"]]
            versions = {span["version"] for span in choice.get("weight_versions") or ()}
        except (LookupError, TypeError, ValueError):
            raise _RetryError("the answer is no turn", answered=True) from None
        if end not in ("stop", "length") or not ids or len(ids) != len(logprobs):
            raise _RetryError(f"the turn ended with {end!r}", answered=True)
        if self.weights is not None and versions != {self.weights.version}:
            if not versions:
                raise InputError(
                    f"{self.url}: the server does not say by which weights it answers; it must be "
                    "vLLM 0.32 or newer"
                )
            raise _RetryError("the turn was sampled by other weights", answered=True)
        return Sampled(ids, logprobs, end == "stop")


def _way_out(path: str) -> str:
    """What mends a refusal."""
    if path.startswith(("/v1/", "/inference/")):
        return "see base_url, the key that api_key_env names, and max_model_len"
    return "start it with VLLM_SERVER_DEV_MODE=1 in its environment, reachable from here alone"
