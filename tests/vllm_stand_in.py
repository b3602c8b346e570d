"""A server on this machine that speaks vLLM's endpoints, and fails as a test says.

Its "model" writes two ids and the end token: a function of the weights it has, the prompt and the
seed, so that a test knows what each turn must be.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file

# What a request meets: nothing, a status, a dead connection, or that after a restart.
Fault = Literal["die", "restart", "restart and die"] | int | None


class StandIn(ThreadingHTTPServer):
    """See the module; `fault(path, n)` says what the n-th request of a path (from 0) meets."""

    daemon_threads = True

    def __init__(self, end_id: int, fault: Callable[[str, int], Fault]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.end_id, self.fault, self.lock = end_id, fault, threading.Lock()
        self.seen: list[tuple[str, Any]] = []
        self.keys: set[str | None] = set()
        self.config: dict[str, Any] = {
            "model_config": {"logprobs_mode": "processed_logprobs"},
            "parallel_config": {"worker_extension_cls": ""},
            "device_config": {"device_type": "cuda"},
        }
        self.max_model_len, self.asleep = 64, False
        self.turn: Callable[[dict[str, Any]], list[int]] | None = None
        self.restart()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def restart(self) -> None:
        """As a new process has it."""
        self.version, self.tag, self.asleep = "default", 0.0, False

    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def bodies(self, path: str) -> list[Any]:
        return [body for seen, body in self.seen if seen == path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what some tests want."""


def written(tag: float, request: dict[str, Any], end_id: int) -> list[int]:
    """What the model with these weights writes."""
    seed = request["sampling_params"]["seed"]
    return [3 + (seed + sum(request["token_ids"])) % 97, 100 + int(tag), end_id]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as vLLM's are
    server: StandIn

    def do_GET(self) -> None:
        self._meet(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._meet(json.loads(self.rfile.read(length)) if length else None)

    def _meet(self, body: Any) -> None:
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            number = len(server.bodies(path))
            server.seen.append((path, body))
            server.keys.add(self.headers.get("Authorization"))
        fault = server.fault(path, number)
        if isinstance(fault, str) and fault.startswith("restart"):
            server.restart()
        if isinstance(fault, str) and fault.endswith("die"):
            self.close_connection = True
            return
        if isinstance(fault, int):
            self._send({"error": {"message": "no"}}, fault)
            return
        self._send(self._answer(path, body), 200)

    def _answer(self, path: str, body: Any) -> Any:
        server = self.server
        if path == "/v1/models":
            return {"data": [{"id": "m", "max_model_len": server.max_model_len}]}
        if path == "/weight_info":
            return {"weight_version": server.version}
        if path == "/server_info":
            return {"vllm_config": server.config}
        if path == "/is_sleeping":
            return {"is_sleeping": server.asleep}
        if path in ("/sleep", "/wake_up"):
            server.asleep = path == "/sleep"
        elif path == "/update_weight_version":
            server.version = body["new_version"]
        elif path == "/collective_rpc":
            [folder] = [*body.get("args", ()), *body.get("kwargs", {}).values()]
            weights = load_file(Path(folder) / "model.safetensors")
            server.tag = float(weights["model.norm.weight"][0])
        elif path == "/reset_prefix_cache":
            return {"success": True}
        elif path == "/inference/v1/generate":
            return self._turn(body)
        return {}

    def _turn(self, body: Any) -> Any:
        server = self.server
        ids = server.turn(body) if server.turn else written(server.tag, body, server.end_id)
        most = body["sampling_params"]["max_tokens"]
        cut, ids = len(ids) > most, ids[:most]
        spans = [{"version": server.version, "start": 0, "end": len(ids)}]
        choice = {
            "token_ids": ids,
            "logprobs": {"content": [{"token_id": i, "logprob": -i / 8} for i in ids]},
            "finish_reason": "length" if cut else "stop",
            "weight_versions": spans,
        }
        return {"choices": [choice]}

    def _send(self, body: Any, status: int) -> None:
        sent = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def stand_in(
    end_id: int, fault: Callable[[str, int], Fault] = lambda path, number: None
) -> Iterator[StandIn]:
    """A running one."""
    server = StandIn(end_id, fault)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
