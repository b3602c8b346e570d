"""The peers that drive a REPL, each used as its documentation says, on the fake one.

They come with the extra `peers`. Both start their REPL through `lake`, for which a script of three
lines stands in.
"""

import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.replio_drivers import HEADER, PythonDriver
from tests.fake_repl import fake_repl

PACKAGES = ("lean-interact", "lean-repl-py")
_LAKE = """#!/bin/sh
[ "$1" = env ] && shift && exec "$@"
exec '{repl}'
"""


def lacking(package: str) -> str:
    """Why a peer cannot run here; "" if it can."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"{package} is not installed: pip install 'fdfast[peers]'"
    return ""


def versions() -> dict[str, str]:
    """The installed peers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


class _LocalRepl:
    """A folder that looks like a built checkout of the REPL, with `lake` in it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        (self.path / "lean-toolchain").write_text("leanprover/lean4:v4.35.0\n")
        binaries = self.path / ".lake" / "build" / "bin"
        binaries.mkdir(parents=True)
        (binaries / "repl").symlink_to(fake_repl())
        self.lake = self.path / "lake"
        self.lake.write_text(_LAKE.format(repl=fake_repl()))
        self.lake.chmod(0o700)

    def remove(self) -> None:
        self._folder.cleanup()


class _LeanInteract(PythonDriver):
    def __init__(self) -> None:
        from lean_interact import LeanREPLConfig

        self.repl = _LocalRepl()
        self.config = LeanREPLConfig(
            local_repl_path=self.repl.path, build_repl=False, lake_path=self.repl.lake
        )
        self.env = 0

    def prepare(self, texts: Sequence[str]) -> Sequence[Any]:
        from lean_interact import Command

        return [Command(cmd=text, env=self.env) for text in texts]

    def read(self, answer: Any) -> list[str]:
        return [message.data for message in answer.messages]


class LeanInteractServer(_LeanInteract):
    """LeanInteract's LeanServer: one worker, `run` for each command."""

    def __init__(self) -> None:
        from lean_interact import Command, LeanServer

        super().__init__()
        self.server = LeanServer(self.config)
        self.env = self.server.run(Command(cmd=HEADER)).env

    def ask(self, commands: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        for command in commands:
            start = time.perf_counter()
            answer = self.server.run(command)
            yield answer, time.perf_counter() - start

    def close(self) -> None:
        self.server.kill()
        self.repl.remove()


class LeanInteractPool(_LeanInteract):
    """LeanInteract's LeanServerPool: two workers, `run_batch`; its `run` is what is timed."""

    def __init__(self) -> None:
        from lean_interact import Command
        from lean_interact.pool import LeanServerPool

        super().__init__()
        self.pool = LeanServerPool(self.config, num_workers=2)
        self.env = self.pool.run(Command(cmd=HEADER)).env
        self.seconds: list[float] = []
        run = self.pool.run

        def timed_run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            answer = run(*arguments, **options)
            self.seconds.append(time.perf_counter() - start)
            return answer

        self.pool.run = timed_run

    def ask(self, commands: Sequence[Any]) -> list[tuple[Any, float]]:
        self.seconds.clear()
        answers = self.pool.run_batch(commands)
        for answer in answers:
            if isinstance(answer, Exception):  # run_batch returns what its workers raise
                raise answer
        return list(zip(answers, self.seconds, strict=True))

    def close(self) -> None:
        self.pool.close()
        self.repl.remove()


class LeanReplPy(PythonDriver):
    """lean-repl-py's LeanREPLHandler: one worker."""

    def __init__(self) -> None:
        from lean_repl_py import LeanREPLHandler

        self.repl = _LocalRepl()
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{self.repl.path}{os.pathsep}{path}"
        try:
            self.handler = LeanREPLHandler()
        finally:
            os.environ["PATH"] = path
        self.handler.send_command(HEADER)
        _, self.handler.env = self.handler.receive_json()

    def ask(self, commands: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        for text in commands:
            start = time.perf_counter()
            self.handler.send_command(text)
            answer, _ = self.handler.receive_json()
            yield answer, time.perf_counter() - start

    def read(self, answer: Any) -> list[str]:
        return [message.data for message in answer.get("messages", ())]

    def close(self) -> None:
        self.handler.close()
        self.repl.remove()
