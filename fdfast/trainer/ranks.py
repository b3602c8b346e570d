"""The processes that train together, under torchrun: what each takes, what they say to each other,
and how all of them end when one does.

Every rank runs the same loop. In the stages that are a rank's own (rollouts, feedback) nobody waits
for anybody; where one ends, all meet (`together`), so an error or Ctrl-C on one rank ends every
rank at the same place of the run, and the finished steps can still be saved. Elsewhere, between
the collectives of a pass, Ctrl-C waits for the next meeting; an error there ends the others through
their broken connections, and torchrun.
"""

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fdfast.errors import InputError, MachineError
from fdfast.interrupts import sigterm_as_interrupt, uninterrupted

T = TypeVar("T")
INTERRUPTED = 130


class OtherRankEndedError(SystemExit):
    """Another rank failed, and has said why: this one ends without a word."""


@dataclass(frozen=True)
class _Fate:
    """How a rank came out of a stage of its own; status 0: well."""

    status: int = 0


class Ranks:
    """One process, which is all there is: every method is then the identity.

    Attributes:
        rank: of this process.
        size: of them all.
        main: whether this is the one that prints and writes.
        device: where this rank computes; None: where the model lies.
        agreed: whether all ranks are leaving the run from the same place, so that they can still
            do something together.
    """

    rank, size, main = 0, 1, True
    device: torch.device | None = None
    agreed = True

    def share(self, items: Sequence[T]) -> tuple[int, Sequence[T]]:
        """This rank's run of the items, and where it begins: sizes differ by one at most."""
        return 0, items

    def sums(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The sum over ranks of each number; one that a rank does not have is 0 there."""
        return dict(numbers)

    def every(self, value: T) -> list[T]:
        """Each rank's value, in rank order."""
        return [value]

    def to_main(self, value: T) -> list[T] | None:
        """Each rank's value on the main rank; None elsewhere."""
        return [value]

    def from_main(self, value: T | None) -> T:
        """The main rank's value; what the others give is not looked at."""
        assert value is not None
        return value

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What runs within is this rank's own work; whatever ends it ends all ranks at the end."""
        yield

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Hold Ctrl-C and SIGTERM back until the end."""
        return uninterrupted()

    def meet(self) -> None:
        """Leave the run here, all of them, if one was asked to."""
        with self.together():
            pass


class TorchrunRanks(Ranks):
    """One of several processes that torchrun began.

    Args:
        timeout_s: that a rank waits for the others, in a meeting or a collective.

    Raises:
        MachineError: the others can't be reached.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.main = self.rank == 0
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", self.rank))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.timeout_s = timeout_s
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            # NCCL moves tensors on GPUs; what ranks say to each other goes by gloo.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout)
            self.talk: Any = dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise MachineError(
                f"rank {self.rank} of {self.size}: can't reach the others ({_first_line(error)}); "
                "see MASTER_ADDR and MASTER_PORT, or begin again with torchrun"
            ) from error
        self.agreed, self.asked, self.alone = False, False, False

    def share(self, items: Sequence[T]) -> tuple[int, Sequence[T]]:
        """See `Ranks`."""
        start, stop = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return start, items[start:stop]

    def sums(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """See `Ranks`; added in rank order, so the same on every rank."""
        total: dict[str, float] = {}
        for theirs in self.every(dict(numbers)):
            for name, value in theirs.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def every(self, value: T) -> list[T]:
        """See `Ranks`."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.talk)
        return values

    def to_main(self, value: T) -> list[T] | None:
        """See `Ranks`."""
        values: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, values, group=self.talk)
        return values

    def from_main(self, value: T | None) -> T:
        """See `Ranks`."""
        values: list[Any] = [value]
        dist.broadcast_object_list(values, group=self.talk, group_src=0)
        said: T = values[0]
        return said

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """See `Ranks`.

        Raises:
            OtherRankEndedError: another rank's work was ended, or this rank's and a lower one's.
        """
        error: BaseException | None = None
        try:
            self.alone = True
            if self.asked:
                raise KeyboardInterrupt
            yield
        except BaseException as ended:
            error = ended
        self.alone = False
        fates = self.every(_Fate(0 if error is None else _status(error)))
        failed = [rank for rank, fate in enumerate(fates) if fate.status]
        if not failed:
            return
        self.agreed = True
        if error is not None and failed[0] == self.rank:
            raise error
        raise OtherRankEndedError(fates[failed[0]].status) from error

    def held(self) -> contextlib.AbstractContextManager[None]:
        """See `Ranks`: outside of `together` they always wait for the next meeting."""
        return contextlib.nullcontext()

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """What a signal does: it ends work that is this rank's own, else it is kept in mind."""
        self.asked = True
        if self.alone:
            raise KeyboardInterrupt


# A process is one rank, of one group.
_current: list[TorchrunRanks] = []


@contextlib.contextmanager
def ranks_of_torchrun(timeout_s: float = 1800.0) -> Iterator[Ranks]:
    """The ranks that torchrun began, or the one that there is; within another, that one's.

    Whatever error ends them is raised by one rank; the others raise OtherRankEndedError.

    Args:
        timeout_s: that a rank waits for the others.

    Raises:
        InputError: timeout_s is not positive.
        MachineError: a rank has gone, or does not answer.
    """
    if not timeout_s > 0:
        raise InputError(f"ranks: timeout_s must be positive; got {timeout_s}")
    if _current:
        yield _current[0]
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        with sigterm_as_interrupt():
            yield Ranks()
        return
    ranks = TorchrunRanks(timeout_s)
    _current.append(ranks)
    before = {s: signal.signal(s, ranks.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ranks
        ranks.meet()
    except BaseException as error:
        if ranks.agreed or isinstance(error, OtherRankEndedError):
            raise
        # One tells; those whose connections broke because of it do not.
        if _announced() > 1:
            raise OtherRankEndedError(_status(error)) from error
        if isinstance(error, RuntimeError) and _is_of_a_connection(error):
            raise MachineError(
                f"rank {ranks.rank} of {ranks.size}: another rank has gone, or did not answer for "
                f"{timeout_s:g} s ({_first_line(error)}); see what it said, and --resume"
            ) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _current.clear()
    dist.destroy_process_group()


def _announced() -> int:
    """How many ranks have come to an end that the others do not know of, this one included."""
    store = dist.distributed_c10d._get_default_store()
    try:
        return int(store.add("fdfast/ended", 1))
    except RuntimeError:  # the store has gone too, with torchrun
        return 1


def _status(error: BaseException) -> int:
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 2


def _is_of_a_connection(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, NCCL DistErrors."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection" in text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
