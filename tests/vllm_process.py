"""A real vLLM server in a process of its own, which a test may kill."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from fdfast.rollout.vllm_worker import EXTENSION

ROOT = Path(__file__).parents[1]
# Without them vLLM asks the hub, takes all memory, binds threads to cores, or reports its use.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
KEY = "sk-secret-0123456789"


class ServerProcess:
    """vLLM's OpenAI server.

    Args:
        model: a folder.
        log: its output goes there.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log = model, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin to start."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--served-model-name", "demo"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        command += ["--max-model-len", "2048", "--enforce-eager", "--api-key", KEY]
        command += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
        command += ["--worker-extension-cls", EXTENSION]
        environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
        environment |= ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, limit_s: float = 240.0) -> None:
        """Until it answers."""
        until = time.monotonic() + limit_s
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < until, self.log.read_text()[-4000:]
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5),
            ):
                return
            time.sleep(0.5)

    def kill(self) -> None:
        """SIGKILL to it and to all that it started (its own session)."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def server_process(model: Path, log: Path) -> Iterator[ServerProcess]:
    """A running one."""
    server = ServerProcess(model, log)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()
