"""The cases of the REPL benchmark, who runs them, and what their numbers have to reach."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import replio_drivers as drivers
from benchmarks import replio_peers as peers
from benchmarks.targets import LIMIT, Target

SMALL, STRING, MESSAGES = "small commands", "256 KiB as one string", "256 KiB as 1,500 messages"
MEMORY, LEAN = "memory of the parent", "real Lean"
OURS, OURS_RAW, SERVER = "ours", "ours, raw frames", "LeanInteract server"
SERVER_POOL = "LeanInteract pool"
OURS_BATCH = "ours, raw frames, a batch"
LEAN_PROCESSES, LEAN_MESSAGES = "a process for each run of Lean", "the same, messages alone"
LIMIT_ONE = f"{LIMIT}: C++ epoll loop"
IN_BYTES, OUT_BYTES, NUM_MESSAGES = 64 << 10, 256 << 10, 1500
MEMORY_COMMANDS, MEMORY_WORKERS = 100_000, 4

# The limit frames answers and parses none, LeanInteract parses them all: ours is held to both, as
# it frames (a batch, or answers as they come) and with every answer parsed.
TARGETS = (
    Target(SMALL, OURS_BATCH, "cpu", 2.0, LIMIT_ONE),
    Target(SMALL, OURS_RAW, "cpu", 2.0, LIMIT_ONE),
    Target(SMALL, OURS_BATCH, "cpu", 1 / 20, SERVER),
    Target(SMALL, OURS, "cpu", 1 / 20, SERVER),
    Target(SMALL, f"{OURS}, 2 workers", "cpu", 1 / 20, SERVER_POOL),
    Target(MESSAGES, OURS_RAW, "cpu", 1 / 30, SERVER),
    Target(MESSAGES, OURS, "cpu", 1 / 30, SERVER),
    Target(MEMORY, OURS, "growth", 20.0),
    Target(LEAN, OURS, "wall", 1 / 3, LEAN_PROCESSES),
)


@dataclass(frozen=True)
class Case:
    """Commands of one kind.

    Attributes:
        name: in the tables; unique.
        shape: what goes in and out, for people.
        make: the texts of so many commands.
        num_commands: of a pass.
        turns: passes of each contender.
    """

    name: str
    shape: str
    make: Callable[[int], list[str]]
    num_commands: int
    turns: int


@dataclass(frozen=True)
class Contender:
    """Who drives the REPL.

    Attributes:
        name: in the tables.
        workers: REPLs it drives at once.
        start: gives the driver with its workers running.
        lacks: why it cannot run here, "" if it can.
        most: case -> at most so many commands a pass and one turn, where more would take minutes.
    """

    name: str
    workers: int
    start: Callable[[], drivers.Driver]
    lacks: str = ""
    most: tuple[tuple[str, int], ...] = ()

    def commands_of(self, case: Case) -> int:
        """How many commands a pass of the case has."""
        return min(case.num_commands, dict(self.most).get(case.name, case.num_commands))

    def turns_of(self, case: Case) -> int:
        """How many passes: one of what cannot run, to say so, or takes long."""
        return 1 if self.lacks or case.name in dict(self.most) else case.turns


def small(count: int) -> list[str]:
    """A theorem of two hundred bytes each, all different."""
    return [
        f"theorem t_{i} (a b : Nat) (h : a = b) : b = a := by\n  have h2 : b = a := h.symm\n"
        "  simp at *\n  omega\n"
        "-- words that make the command two hundred bytes long, as many of those in a run are today"
        for i in range(count)
    ]


def large(wish: str, count: int) -> list[str]:
    """A command of 64 KiB each, with a wish for a large answer."""
    line = f"-- {'y' * 96}\n"
    filling = line * (IN_BYTES // len(line))
    return [f"-- fake[{wish}]\ntheorem t_{i} : True := trivial\n{filling}" for i in range(count)]


def all_cases(*, quick: bool = False) -> list[Case]:
    """Every case, in the order in which they run.

    Args:
        quick: few commands and one turn, to try the benchmark itself.
    """
    few, fewer, turns = (200, 4, 1) if quick else (10_000, 50, 3)
    return [
        Case(SMALL, "200 bytes in, 14 out", small, few, turns),
        Case(
            STRING,
            "64 KiB in, 256 KiB out",
            lambda count: large(f"size={OUT_BYTES}", count),
            fewer,
            turns,
        ),
        Case(
            MESSAGES,
            "64 KiB in, 256 KiB out",
            lambda count: large(f"messages={NUM_MESSAGES}", count),
            fewer,
            turns,
        ),
    ]


def all_contenders() -> list[Contender]:
    """Everybody, in the order of a turn."""
    interact, repl_py = peers.lacking("lean-interact"), peers.lacking("lean-repl-py")
    return [
        Contender(LIMIT_ONE, 1, drivers.Limit),
        Contender(f"{LIMIT_ONE}, 2 workers", 2, lambda: drivers.Limit(2)),
        Contender(OURS_BATCH, 1, drivers.OursBatch),
        Contender(OURS_RAW, 1, drivers.OursRaw),
        Contender(OURS, 1, drivers.Ours),
        Contender(f"{OURS_BATCH}, 2 workers", 2, lambda: drivers.OursBatch(2)),
        Contender(f"{OURS_RAW}, 2 workers", 2, lambda: drivers.OursRaw(2)),
        Contender(f"{OURS}, 2 workers", 2, lambda: drivers.Ours(2)),
        Contender("plain Python loop", 1, drivers.PlainLoop),
        Contender("asyncio", 1, drivers.Asyncio),
        Contender("asyncio, 2 workers", 2, lambda: drivers.Asyncio(2)),
        Contender(SERVER, 1, peers.LeanInteractServer, interact),
        Contender(SERVER_POOL, 2, peers.LeanInteractPool, interact),
        # It parses all that has come after every line.
        Contender("lean-repl-py", 1, peers.LeanReplPy, repl_py, ((MESSAGES, 1),)),
    ]


def wrong_contenders(contenders: Sequence[Contender]) -> list[str]:
    """A line for each contender that does not give every command its own whole answer."""
    lines = []
    for contender in contenders:
        if contender.lacks:
            continue
        driver = contender.start()
        try:
            lines += [f"{contender.name}: {why}" for why in _wrong(driver)]
        finally:
            driver.close()
    return lines


def _wrong(driver: drivers.Driver) -> list[str]:
    words = [f"word-{i}" for i in range(8)]
    wanted = {
        f"the {len(words)} words": ([f"-- fake[say={w}]" for w in words], [[w] for w in words]),
        "the string": (large(f"size={OUT_BYTES}", 1), [["x" * OUT_BYTES]]),
        "the messages": (
            large("messages=150", 1),
            [["x" * 60] * 150],
        ),  # with all some take seconds
    }
    return [
        f"{what} came back otherwise"
        for what, (texts, data) in wanted.items()
        if sorted(map(list, driver.run(texts, keep=True).data)) != sorted(data)
    ]
