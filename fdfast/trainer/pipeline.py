"""Where the learner's batches come from: made when it asks, or ahead of it while it trains.

A batch goes through two stages, `sample` (rollout, and Lean's verdict on each attempt as it ends)
and `tell` (feedback and the teacher's prompts), then to the learner, which is the third: passes of
teacher and student, and the update. In a `Pipeline` each of the first two is a thread with a
bounded queue behind it, so that all three work on different steps at once. The batch of step n is
sampled from weights that are as new as there are when it begins, and at most `max_staleness`
updates older than those that step n changes; 0 is the loop without a pipeline, bit for bit.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, Self

from fdfast.interrupts import EndedError, ends_with, uninterrupted
from fdfast.trainer.batch import Attempt
from fdfast.trainer.metrics import Clock

# How long Ctrl-C waits while the learner waits for a batch.
_HEARD_S = 0.1


@dataclass
class Batch:
    """What a step is trained on.

    Attributes:
        step: finished optimizer steps before its own.
        attempts: this rank's.
        sampled_at: finished steps of the weights that they were sampled from.
        counts: what the feedback's provider counted.
        clock: seconds of each stage.
    """

    step: int
    attempts: list[Attempt]
    sampled_at: int
    counts: dict[str, float] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)


class Batches(Protocol):
    """Hands out the batch of each step, in order; a context manager."""

    def take(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            InputError, MachineError: a stage did; see `Rollouts`.
        """

    def finished(self, step: int) -> None:
        """So many steps are finished."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End, whatever is under way."""


class OnDemand:
    """A batch is made when it is asked for.

    Args:
        sample: makes the batch of a step.
        tell: adds the feedback.
    """

    def __init__(self, sample: Callable[[int], Batch], tell: Callable[[Batch], Batch]) -> None:
        self.sample, self.tell = sample, tell

    def take(self, step: int) -> Batch:
        """See `Batches`."""
        return self.tell(self.sample(step))

    def finished(self, step: int) -> None:
        """See `Batches`."""

    def __enter__(self) -> Self:
        """See `Batches`."""
        return self

    def __exit__(self, *error: object) -> None:
        """See `Batches`."""


class Pipeline:
    """Batches are made ahead, by a thread for each stage.

    Ctrl-C strikes the learner alone, and never while it has the lock or has begun one thread of
    two. The stages end where they ask (`interrupts.go_on`).

    Args:
        sample: makes the batch of a step; from another thread than the learner's, as is `tell`.
        tell: adds the feedback.
        first: finished steps.
        last: steps of the run; none beyond is made.
        max_staleness: see above; so many batches may wait for the learner, one at least.
    """

    def __init__(
        self,
        sample: Callable[[int], Batch],
        tell: Callable[[Batch], Batch],
        *,
        first: int,
        last: int,
        max_staleness: int,
    ) -> None:
        self.sample, self.tell = sample, tell
        self.steps, self.max_staleness = range(first, last), max_staleness
        self.done = first
        self.sampled: deque[Batch] = deque()
        self.told: deque[Batch] = deque()
        self.error: BaseException | None = None
        self.ending = threading.Event()
        self.changed = threading.Condition()
        self.threads = [
            threading.Thread(target=self._run, args=(stage,), name=f"fdfast {name}")
            for name, stage in (("rollout", self._sample_all), ("feedback", self._tell_all))
        ]

    def __enter__(self) -> Self:
        """Begin with the first batch."""
        try:
            with uninterrupted():
                for thread in self.threads:
                    thread.start()
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        """End the stages where they are, and wait until they have."""
        with uninterrupted(), self.changed:
            self.ending.set()
            self.changed.notify_all()
        for thread in self.threads:
            if thread.ident is not None:
                thread.join()

    def take(self, step: int) -> Batch:
        """See `Batches`; its clock has the learner's wait."""
        start = time.perf_counter()
        batch = None
        while batch is None:
            with uninterrupted(), self.changed:
                self.changed.wait_for(lambda: self.told or self.error is not None, _HEARD_S)
                if self.told:
                    batch = self.told.popleft()
                    self.changed.notify_all()
                elif self.error is not None:
                    raise self.error
        assert batch.step == step
        batch.clock.spent["time/wait"] = time.perf_counter() - start
        return batch

    def finished(self, step: int) -> None:
        """See `Batches`."""
        with uninterrupted(), self.changed:
            self.done = step
            self.changed.notify_all()

    def _sample_all(self) -> None:
        for step in self.steps:
            self._wait(lambda: not self.sampled and self.done >= step - self.max_staleness)  # noqa: B023
            self._pass_on(self.sampled, self.sample(step))

    def _tell_all(self) -> None:
        room = max(1, self.max_staleness)
        for _ in self.steps:
            self._wait(lambda: bool(self.sampled) and len(self.told) < room)
            with self.changed:
                batch = self.sampled.popleft()
                self.changed.notify_all()
            self._pass_on(self.told, self.tell(batch))

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: ready() or self.ending.is_set())
            if self.ending.is_set():
                raise EndedError

    def _pass_on(self, to: deque[Batch], batch: Batch) -> None:
        with self.changed:
            to.append(batch)
            self.changed.notify_all()

    def _run(self, stage: Callable[[], None]) -> None:
        """A thread: what ends it early is the learner's to hear."""
        ends_with(self.ending)
        try:
            stage()
        except EndedError:
            pass
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()
