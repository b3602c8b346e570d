"""Drivers of a REPL that are ours or need no package: fdfast's pool, Python loops, the C++ limit.

Each starts its workers on the fake REPL, opens the header there, and is then asked to run commands;
how it is told a command and what it makes of the answer is its own way.
"""

import asyncio
import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tests.fake_repl import compiled, fake_repl

if TYPE_CHECKING:
    from fdfast._replio import Answer

HEADER = "import Mathlib"
LIMIT_SOURCE = Path(__file__).with_name("replio_limit.cpp")


@dataclass(frozen=True)
class Pass:
    """One pass over some commands.

    Attributes:
        wall_s: seconds from the first command to the last answer.
        cpu_s: CPU seconds of the driver with all its threads, without the workers'.
        latencies_s: for each command, from its write to its answer in the caller's form.
        data: for each command, the texts of the messages in its answer; empty where not asked for.
    """

    wall_s: float
    cpu_s: float
    latencies_s: Sequence[float]
    data: Sequence[Sequence[str]] = ()


class Driver(Protocol):
    """What the benchmark needs of a contender."""

    def run(self, texts: Sequence[str], *, keep: bool = False) -> Pass:
        """Run commands, given as Lean text; `keep` fills the field `data`."""

    def close(self) -> None:
        """End the workers."""


class PythonDriver:
    """Times what a driver in this process does; made of `prepare`, `ask` and `read`."""

    def prepare(self, texts: Sequence[str]) -> Sequence[Any]:
        """The commands in the form in which a user has them: not timed."""
        return texts

    def ask(self, commands: Sequence[Any]) -> Iterable[tuple[Any, float]]:
        """For each command, in any order, its answer and the seconds it took."""
        raise NotImplementedError

    def read(self, answer: Any) -> list[str]:
        """The texts of an answer's messages."""
        return [message["data"] for message in answer.get("messages", ())]

    def run(self, texts: Sequence[str], *, keep: bool = False) -> Pass:
        """See `Driver`."""
        commands = self.prepare(texts)
        kept: list[Any] = []
        latencies: list[float] = []
        wall, cpu = time.perf_counter(), time.process_time()
        for answer, seconds in self.ask(commands):
            latencies.append(seconds)
            if keep:
                kept.append(answer)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        assert len(latencies) == len(texts), "an answer is missing, or one too many"
        return Pass(wall, cpu, latencies, [self.read(answer) for answer in kept])


class Ours(PythonDriver):
    """fdfast's pool; JSON objects in, parsed answers out, each as it comes."""

    def __init__(self, workers: int = 1) -> None:
        from fdfast import _replio  # not there where only the kernels are measured

        self.pool = _replio.Pool([str(fake_repl())], workers=workers)
        self.run([f"-- worker {k}" for k in range(4 * workers)])  # every worker opens the header

    def ask(self, commands: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        frames = [json.dumps({"cmd": text}).encode() for text in commands]
        for answer in self.answers(frames):
            yield answer.json(), answer.seconds

    def answers(self, frames: Sequence[bytes]) -> "Iterator[Answer]":
        """The answers in the order in which they come."""
        self.pool.submit(frames, header=HEADER.encode())
        for _ in frames:
            yield checked(self.pool.next())

    def close(self) -> None:
        self.pool.close()


class OursRaw(Ours):
    """The same with ready-made frames in and raw bytes out, as the limit has it."""

    def prepare(self, texts: Sequence[str]) -> Sequence[Any]:
        return [json.dumps({"cmd": text}).encode() for text in texts]

    def ask(self, commands: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        for answer in self.answers(commands):
            yield answer, answer.seconds

    def read(self, answer: Any) -> list[str]:
        return super().read(json.loads(answer.raw))


class OursBatch(OursRaw):
    """The same, where all answers are fetched when the last has come."""

    def answers(self, frames: Sequence[bytes]) -> "Iterator[Answer]":
        tickets = self.pool.submit(frames, header=HEADER.encode())
        yield checked(self.pool.wait(tickets[-1]))
        left = len(tickets) - 1
        while left:  # twice where another worker is still at work
            found = self.pool.ready() or [self.pool.next()]
            left -= len(found)
            yield from map(checked, found)


def checked(answer: "Answer | None") -> "Answer":
    """The answer of a worker, and nothing else."""
    if answer is None or answer.end != "answer":
        raise RuntimeError(f"ours: no answer but {answer and answer.end}")
    return answer


class PlainLoop(PythonDriver):
    """What one writes first: subprocess, a line at a time, json.loads; one worker."""

    def __init__(self) -> None:
        command = [str(fake_repl())]
        self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._one({"cmd": HEADER})

    def _one(self, command: dict[str, Any]) -> Any:
        stdin, stdout = self.worker.stdin, self.worker.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(command).encode() + b"\n\n")
        stdin.flush()
        lines = []
        while (line := stdout.readline()) != b"\n":
            if not line:
                raise RuntimeError("plain Python loop: the worker ended")
            lines.append(line)
        return json.loads(b"".join(lines))

    def ask(self, commands: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        for text in commands:
            start = time.perf_counter()
            answer = self._one({"cmd": text, "env": 0})
            yield answer, time.perf_counter() - start

    def close(self) -> None:
        self.worker.communicate()


class Asyncio(PythonDriver):
    """asyncio's subprocess and StreamReader; a task for each worker."""

    def __init__(self, workers: int = 1) -> None:
        self.loop = asyncio.new_event_loop()
        self.workers = [self.loop.run_until_complete(self._start()) for _ in range(workers)]

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        worker = await asyncio.create_subprocess_exec(
            str(fake_repl()), stdin=pipe, stdout=pipe, limit=1 << 26
        )
        await self._one(worker, {"cmd": HEADER})
        return worker

    async def _one(self, worker: asyncio.subprocess.Process, command: dict[str, Any]) -> Any:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(command).encode() + b"\n\n")
        await worker.stdin.drain()
        return json.loads(await worker.stdout.readuntil(b"\n\n"))

    def ask(self, commands: Sequence[Any]) -> list[tuple[Any, float]]:
        found: list[tuple[Any, float]] = []
        waiting = iter(commands)

        async def work(worker: asyncio.subprocess.Process) -> None:
            for text in waiting:
                start = time.perf_counter()
                answer = await self._one(worker, {"cmd": text, "env": 0})
                found.append((answer, time.perf_counter() - start))

        async def work_all() -> None:
            await asyncio.gather(*(work(worker) for worker in self.workers))

        self.loop.run_until_complete(work_all())
        return found

    def close(self) -> None:
        for worker in self.workers:
            self.loop.run_until_complete(worker.communicate(b""))  # which closes stdin
        self.loop.close()


class Limit:
    """The bare epoll loop of `replio_limit.cpp`, a process of its own for each pass."""

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.program = str(compiled(LIMIT_SOURCE))

    def run(self, texts: Sequence[str], *, keep: bool = False) -> Pass:
        """See `Driver`."""
        commands = [{"cmd": HEADER}, *({"env": 0, "cmd": text} for text in texts)]
        with tempfile.TemporaryDirectory() as folder:
            frames, answers = Path(folder) / "frames", Path(folder) / "answers"
            frames.write_bytes(b"".join(json.dumps(c).encode() + b"\n\n" for c in commands))
            arguments = [str(frames), str(self.workers), str(answers) if keep else ""]
            done = subprocess.run(
                [self.program, str(fake_repl()), *arguments], check=True, stdout=subprocess.PIPE
            )
            found = json.loads(done.stdout)
            raw = answers.read_bytes().split(b"\n\n")[:-1] if keep else []
        data = [PythonDriver().read(json.loads(answer)) for answer in raw]
        return Pass(found["wall_s"], found["cpu_s"], found["latencies_s"], data)

    def close(self) -> None:
        """Nothing is left running."""
