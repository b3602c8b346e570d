"""The two functions that check proofs: `verify` one, `verify_many` several at a time."""

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from fdfast.errors import InputError
from fdfast.lean.checker import Checker
from fdfast.lean.process import MEMORY_LIMIT_BYTES
from fdfast.lean.statement import complete_header, parse_statement
from fdfast.lean.toolchain import Toolchain, find_lean
from fdfast.lean.verdict import Verdict


class Attempt(NamedTuple):
    """One item for `verify_many`: the arguments of `verify`."""

    formal_statement: str
    proof: str
    header: str = ""


def verify(
    formal_statement: str,
    proof: str,
    *,
    header: str = "",
    timeout_s: float = 30.0,
    memory_bytes: int = MEMORY_LIMIT_BYTES,
    toolchain: Toolchain | None = None,
) -> Verdict:
    """Check that `proof` proves `formal_statement`; `checker` says what that means.

    Args:
        formal_statement: `theorem NAME BINDERS : TYPE :=`, as in miniF2F's field of that name.
        proof: the text that follows the `:=`.
        header: what stands above the theorem: imports, `open`, definitions. Trusted as the
            caller's word, except that axioms count. "" is `prelude` and `import FdBase` with the
            embedded Lean; these are put before any header without imports.
        timeout_s: the time for the whole check, in seconds.
        memory_bytes: the largest resident set of Lean.
        toolchain: the Lean to use; None is `find_lean()`.

    Raises:
        InputError: the statement has not that form, or the header imports what is not there.
        MachineError: Lean cannot be run here. That is never a verdict.
    """
    item = Attempt(formal_statement, proof, header)
    return verify_many(
        [item],
        workers=1,
        timeout_s=timeout_s,
        memory_bytes=memory_bytes,
        toolchain=toolchain,
    )[0]


def verify_many(
    items: Sequence[Attempt | tuple[str, str, str]],
    *,
    workers: int = 2,
    timeout_s: float = 30.0,
    memory_bytes: int = MEMORY_LIMIT_BYTES,
    toolchain: Toolchain | None = None,
) -> list[Verdict]:
    """Check many proofs, `workers` at a time; the verdicts come in the order of the items.

    Each worker is a thread that holds one Lean process. Arguments and errors are those of `verify`;
    `timeout_s` is for each item, and a malformed statement is found before the first check.

    Args:
        items: each an `Attempt` or the tuple (formal_statement, proof, header).
        workers: how many Lean processes; more than the machine has cores gains nothing.
        timeout_s: see `verify`.
        memory_bytes: see `verify`.
        toolchain: see `verify`.
    """
    if workers < 1:
        raise InputError(f"verify_many: workers must be at least 1; got {workers}")
    if not timeout_s > 0:
        raise InputError(f"verify: timeout_s must be more than 0; got {timeout_s}")
    lean = toolchain or find_lean()
    attempts = [Attempt(*item) for item in items]
    for attempt in attempts:
        parse_statement(attempt.formal_statement)
        complete_header(lean, attempt.header)
    verdicts: dict[int, Verdict] = {}
    cancel = threading.Event()
    numbers = itertools.count()  # next() on it is atomic

    def work() -> None:
        checker = Checker(lean, timeout_s=timeout_s, memory_bytes=memory_bytes, cancel=cancel)
        try:
            while not cancel.is_set() and (number := next(numbers)) < len(attempts):
                verdicts[number] = checker.verify(*attempts[number])
        finally:
            checker.close()

    with ThreadPoolExecutor(workers, thread_name_prefix="lean-check") as pool:
        futures = [pool.submit(work) for _ in range(min(workers, len(attempts)))]
        try:
            for future in futures:
                future.result()
        finally:
            # After a KeyboardInterrupt or a MachineError the running jobs are killed.
            cancel.set()
    return [verdicts[number] for number in range(len(attempts))]
