"""A chat endpoint on this machine that answers what a test says, well or badly."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = (
    "1. Introduce both hypotheses by name before anything else, then close the goal with the one "
    "whose type matches it exactly.\n"
    "2. Check every constant name with the search tool before using it, since only the core "
    "library is imported here."
)


def completion(text: str | None, *, prompt_tokens: int = 100, completion_tokens: int = 40) -> bytes:
    """The body of a good answer."""
    body = {
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
    }
    return json.dumps(body).encode()


class Reply:
    """One answer of the server.

    Args:
        body: bytes of it.
        status: HTTP's.
        headers: beside the usual ones.
        cut: send only half of what Content-Length promises, and close.
        byte_s: seconds between two bytes.
    """

    def __init__(
        self,
        body: bytes = b"",
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        cut: bool = False,
        byte_s: float = 0.0,
    ) -> None:
        self.body, self.status, self.headers = body, status, headers or {}
        self.cut, self.byte_s = cut, byte_s


class ChatServer(ThreadingHTTPServer):
    """Answers request number n (from 0) with `script(n, request)`, and remembers what it saw."""

    daemon_threads = True

    def __init__(self, script: Callable[[int, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.lock = script, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.under_way = self.most_under_way = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what some tests want."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.requests)
            server.requests.append(request | {"path": self.path})
            server.keys.append(self.headers.get("Authorization"))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self._answer(server.script(number, request))
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        body = reply.body[: len(reply.body) // 2] if reply.cut else reply.body
        if not reply.byte_s:
            self.wfile.write(body)
            return
        for byte in body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(reply.byte_s)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def chat_server(script: Callable[[int, dict[str, Any]], Reply]) -> Iterator[ChatServer]:
    """A running server."""
    server = ChatServer(script)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
