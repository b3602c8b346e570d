"""What the CPU's numbers have to reach, on two cores, and whether they do; `replio_cases` has more.

Legend: N tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import FILTERED, GROWTH_V, KLS, OTHER_WORKSPACE_MB, PLAIN, SMALL

Row = dict[str, Any]
LIMIT = "limit"  # the best row whose name begins so
KL32, KL16, GRPO32 = "forward KL, float32", "forward KL, bfloat16", "GRPO, float32"


@dataclass(frozen=True)
class Target:
    """A row's number against a bound, or against a rival's number.

    Attributes:
        case: its name.
        contender: whose row.
        measure: a name in FIELDS.
        at_most: the bound.
        rival: the contender of the same case that the number is divided by; "" for none.
    """

    case: str
    contender: str
    measure: str
    at_most: float
    rival: str = ""


TARGETS = (
    Target(KL32, PLAIN, "time", 0.85, "Liger-Kernel"),
    Target(KL32, PLAIN, "time", 0.5, "TRL"),
    Target(KL32, PLAIN, "time", 1.10, LIMIT),
    Target(KL32, FILTERED.format(0.03), "time", 0.80, LIMIT),
    Target(KL16, PLAIN, "time", 1.0, "Liger-Kernel"),
    Target(GRPO32, PLAIN, "time", 1.05, "naive PyTorch"),
    Target(GRPO32, PLAIN, "time", 0.75, "Liger-Kernel (no entropy)"),
    Target(GRPO32, PLAIN, "time", 0.6, "TRL (entropy without gradient)"),
    *(
        Target(case, ours, "memory", 0.10, "naive PyTorch")
        for case in (KL32, KL16)
        for ours in (PLAIN, SMALL)
    ),
    # No growth with the vocabulary: the workspace holds at any. A tenth is left for what the
    # process does meanwhile; chunks of one length may leave some of it unused.
    *(
        Target(f"{case}, memory at V = {V}", SMALL, "memory", 1.10 * OTHER_WORKSPACE_MB["cpu"])
        for case in (KL32, KL16, GRPO32)
        for V in GROWTH_V
    ),
    *(Target(f"{KL16}, mean KL {kl}", PLAIN, "error", 0.005) for kl in KLS),
    Target(KL32, PLAIN, "error", 2.0, "naive PyTorch"),
    Target(GRPO32, PLAIN, "error", 2.0, "naive PyTorch"),
)
# Wall time and CPU time must both keep a bound, since the machine is shared; so must both errors.
FIELDS = {
    "time": ("wall_s", "cpu_s"),
    "memory": ("peak_mib",),
    # Of the process, with the models and the optimizer's state.
    "whole memory": ("rss_mib",),
    "error": ("dhidden_error", "dweight_error"),
    # Of a driver of REPLs: its workers run beside it, so wall time says little of it.
    "cpu": ("cpu_s",),
    "wall": ("wall_s",),
    "growth": ("grown_mib",),
    # Of a saving: the limit divided by what was saved.
    "time over limit": ("time_over_limit",),
    "memory over limit": ("memory_over_limit",),
}


@dataclass(frozen=True)
class Verdict:
    """A target with what was measured: the worst of its fields, None where a row is missing."""

    target: Target
    measured: float | None

    @property
    def outcome(self) -> str:
        """met, MISSED or not measured."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured <= self.target.at_most else "MISSED"

    def __str__(self) -> str:
        """For the column of the row's other targets."""
        target = self.target
        against = f" / {target.rival}" if target.rival else ""
        seen = "-" if self.measured is None else f"{self.measured:.3g}"
        return f"{target.measure}{against} {seen}, at most {target.at_most:g}: {self.outcome}"


def evaluate(rows: Sequence[Row], targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Every target against the rows of one run."""
    return [Verdict(target, _measured(rows, target)) for target in targets]


def _measured(rows: Sequence[Row], target: Target) -> float | None:
    own = _values(rows, target.case, target.contender, target.measure)
    if own is None:
        return None
    if not target.rival:
        return max(own)
    theirs = _values(rows, target.case, target.rival, target.measure)
    if theirs is None:
        return None
    return max(mine / other for mine, other in zip(own, theirs, strict=True))


def _values(
    rows: Sequence[Row], case: str, contender: str, measure: str
) -> tuple[float, ...] | None:
    """The fields of a row, or of the least of the limits'; None if there is none with numbers."""
    found = []
    for row in rows:
        named = row["contender"].startswith(LIMIT) if contender == LIMIT else False
        if row["case"] == case and (named or row["contender"] == contender):
            values = [row[field] for field in FIELDS[measure]]
            if "" not in values:
                found.append(tuple(float(value) for value in values))
    return min(found) if found else None
