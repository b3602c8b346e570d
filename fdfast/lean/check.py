"""The two functions that check proofs: `verify` one, `verify_many` several at a time.

Each call starts its Lean and ends it; whoever checks again and again keeps a `LeanPool`.
"""

from collections.abc import Sequence
from typing import Literal

from fdfast.lean.pool import Item, LeanPool
from fdfast.lean.toolchain import Toolchain
from fdfast.lean.verdict import Verdict


def verify(
    formal_statement: str,
    proof: str,
    *,
    header: str = "",
    timeout_s: float = 30.0,
    memory_mb: int = 2048,
    toolchain: Toolchain | None = None,
    level: Literal[1, 2] = 1,
) -> Verdict:
    """Check that `proof` proves `formal_statement`; `checker` says what that means.

    Args:
        formal_statement: `theorem NAME BINDERS : TYPE :=`, as in miniF2F's field of that name.
        proof: the text that follows the `:=`.
        header: what stands above the theorem: imports, `open`, definitions. Trusted as the
            caller's word, except that axioms count. "" is `prelude` and `import FdBase` with the
            embedded Lean; these are put before any header without imports.
        timeout_s: the time for the whole check, in seconds.
        memory_mb: the largest resident set of Lean, in MiB.
        toolchain: the Lean to use; None is `find_lean()`.
        level: 1, or 2 for a replay by the kernel, where the toolchain offers it.

    Raises:
        InputError: the statement has not that form, or the header imports what is not there.
        MachineError: Lean cannot be run here. That is never a verdict.
    """
    with LeanPool(
        workers=1, timeout_s=timeout_s, memory_mb=memory_mb, toolchain=toolchain, level=level
    ) as pool:
        return pool.check(formal_statement, proof, header)


def verify_many(
    items: Sequence[Item],
    *,
    workers: int = 2,
    timeout_s: float = 30.0,
    memory_mb: int = 2048,
    toolchain: Toolchain | None = None,
    level: Literal[1, 2] = 1,
) -> list[Verdict]:
    """Check many proofs, `workers` at a time; the verdicts come in the order of the items.

    Arguments and errors are those of `verify`; `timeout_s` is for each item, and a malformed
    statement is found before the first check.

    Args:
        items: each an `Attempt` or the tuple (formal_statement, proof, header).
        workers: how many Lean processes; more than the machine has cores gains nothing.
        timeout_s: see `verify`.
        memory_mb: see `verify`.
        toolchain: see `verify`.
        level: see `verify`.
    """
    with LeanPool(
        workers=min(workers, max(len(items), 1)),
        timeout_s=timeout_s,
        memory_mb=memory_mb,
        toolchain=toolchain,
        level=level,
    ) as pool:
        return pool.check_many(items)
