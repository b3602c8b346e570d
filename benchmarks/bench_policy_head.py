"""policy_head, forward and backward with every gradient, against peers, plain PyTorch and the
GEMMs.

`make bench` runs it, or `pytest benchmarks`. Contenders take turns, one pass each, so that a busy
neighbour hits all alike. First every contender gets a small case right: pytest's -x stops at the
first that does not, before anything is timed.
"""

import functools
from typing import Any

import pytest
import torch

from benchmarks.cases import ERROR_TOKENS, Case, all_cases
from benchmarks.contenders import Contender, Limit
from benchmarks.data import Inputs
from benchmarks.measure import Errors, peak_mib_alone, timed, wrong_contenders

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # peers warn of what is not ours to mend
    pytest.mark.timeout(0),
]

CANNOT = "cannot run here: "


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case by case, turn by turn, all contenders."""
    device, quick = metafunc.config.getoption("device"), metafunc.config.getoption("quick")
    memory = torch.cuda.get_device_properties(0).total_memory if device == "cuda" else 0
    cases = all_cases(device, quick=quick, memory_bytes=memory)
    if metafunc.function is bench_turn:
        items = [
            (Ready.of(case), turn, name)
            for case in cases
            for turn in range(case.turns)
            for name, entry in Ready.of(case).entries.items()
            if turn < turns_of(case, entry)
        ]
        ids = [f"{ready.case.name}-{turn}-{name}" for ready, turn, name in items]
        metafunc.parametrize(("ready", "turn", "name"), items, ids=ids)
    else:
        timed_cases = [case for case in cases if case.kind == "timed"]  # they have every contender
        metafunc.parametrize("case", timed_cases, ids=[case.name for case in timed_cases])


class Ready:
    """A case with its entries, and what the first turn of each found out."""

    def __init__(self, case: Case) -> None:
        self.case = case
        entries: list[Contender | Limit] = [*case.contenders(), *case.limits()]
        self.entries = {entry.name: entry for entry in entries}
        self.notes: dict[str, str] = {}

    @staticmethod
    @functools.cache
    def of(case: Case) -> "Ready":
        """The one of this case."""
        return Ready(case)

    def begin(self, name: str, *, quick: bool) -> dict[str, float]:
        """What is measured once, errors and memory; then the warming up. Writes the row's note."""
        case, entry = self.case, self.entries[name]
        if isinstance(entry, Limit):
            self.notes[name] = entry.prepare(inputs_of(case))
            return {}
        if entry.lacks:
            self.notes[name] = CANNOT + entry.lacks
            return {}
        try:
            self.notes[name] = f"mean KL {errors_of(case).mean_kl:.2g}" if case.has_kl else ""
            seen = errors_of(case).of(entry) if case.kind != "growth" else {}
            if case.kind != "accuracy":
                seen["peak_mib"] = peak_mib_alone(case, entry, quick=quick)
            if case.kind == "timed" and (entry.compiled or case.device == "cuda"):
                entry.run(inputs_of(case))  # compiles for this shape
        except torch.OutOfMemoryError:
            self.notes[name] = f"{CANNOT}out of GPU memory"
            return {}
        return seen


# Only the case that runs holds tensors.
@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> Inputs:
    return case.inputs()


@functools.lru_cache(maxsize=1)
def errors_of(case: Case) -> Errors:
    return Errors(inputs_of(case), ERROR_TOKENS[case.kind])


def turns_of(case: Case, entry: Contender | Limit) -> int:
    """Slow contenders have a turn less, those that cannot run one row that says why."""
    if isinstance(entry, Contender) and entry.lacks:
        return 1
    fewer = isinstance(entry, Contender) and entry.fewer_turns and case.turns > 1
    return case.turns - fewer


def bench_small_cases_are_right(case: Case) -> None:
    assert wrong_contenders(case) == []


def bench_turn(
    benchmark: Any, request: pytest.FixtureRequest, ready: Ready, turn: int, name: str
) -> None:
    case, entry, info = ready.case, ready.entries[name], benchmark.extra_info
    info |= {"case": case.name, "shape": str(case.shape), "contender": name, "data": case.data}
    info["backend"] = "torch" if isinstance(entry, Limit) else entry.backend
    if turn == 0:
        info |= ready.begin(name, quick=request.config.getoption("quick"))
    info["note"] = ready.notes[name]
    if case.kind != "timed" or info["note"].startswith(CANNOT):
        benchmark.pedantic(lambda: None, rounds=1)  # a row without a time
        return
    x = inputs_of(case)
    benchmark.pedantic(
        lambda: info.update(timed(functools.partial(entry.run, x), case.device)), rounds=1
    )
