"""`RayFleet`: attempts made and checked on many machines, for one learner.

Each actor has a copy of the weights and its machine's Lean. It takes units of a step's attempts as
it gets free. What an actor had in hand when it died is done again, with the same draws, by another.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

from fdfast.data.problems import Problem
from fdfast.errors import InputError, MachineError
from fdfast.interrupts import patience
from fdfast.rollout.ray_actor import ActorSettings, RolloutActor
from fdfast.rollout.ray_cluster import join_cluster, num_that_fit
from fdfast.rollout.ray_units import Unit, unit_sizes
from fdfast.rollout.ray_weights import Stored, put_weights
from fdfast.rollout.trajectory import SamplingOptions, Trajectory
from fdfast.rollout.weights import checkpoint_weights, model_weights

# An actor that dies so often in a row, or a unit with which so many die, is given up.
MAX_DEATHS = 3
# Sampled units of an actor that wait for its Lean; with more, Lean is what binds.
MAX_UNJUDGED = 1
_ADD = "let machines join (ray start --address=HOST:6379) and --resume"


@dataclass(eq=False)
class Member:
    """An actor, or the place of one that died and is made again.

    Attributes:
        number: its place.
        handle: Ray's.
        where: its machine and process, once it is ready.
        version: of the weights that it has; 0 for none.
        deaths: in a row.
        units: in hand: sampled, or waiting for Lean.
    """

    number: int
    handle: Any
    where: str = ""
    version: int = 0
    deaths: int = 0
    units: list[Unit] = field(default_factory=list)


@dataclass(frozen=True)
class _Call:
    """What an actor was asked."""

    member: Member
    kind: Literal["set_up", "load", "sample", "judged"]
    unit: Unit | None = None
    version: int = 0


class RayFleet:
    """Actors on a Ray cluster; see the module.

    Args:
        settings: of every actor.
        address: see `join_cluster`.
        num_actors: wanted; those for which there is no room join when there is.
        gpus_per_actor: of Ray's accounting; 0 samples on the CPU.
        cpus_per_actor: likewise.
        start_timeout_s: how long to wait for actors that do not come while there are none.
        say: prints a line.

    Attributes:
        members: see `Member`.
        version: of the latest weights.
        redone: units that were done again, of all steps.

    Raises:
        InputError: an argument is off, or an actor refuses the settings.
        MachineError: Ray is missing, there is no cluster, or it has no room.
    """

    def __init__(
        self,
        settings: ActorSettings,
        *,
        address: str = "auto",
        num_actors: int = 1,
        gpus_per_actor: float = 1.0,
        cpus_per_actor: float = 1.0,
        start_timeout_s: float = 600.0,
        say: Callable[[str], None] = print,
    ) -> None:
        if num_actors < 1:
            raise InputError(f"ray: num_actors must be at least 1; got {num_actors}")
        self.settings, self.num_actors, self.say = settings, num_actors, say
        self.start_timeout_s = start_timeout_s
        self.ray, self._joined = join_cluster(address)
        self.version = self.redone = 0
        self._weights: dict[str, Stored] = {}
        self._size = {"num_gpus": gpus_per_actor, "num_cpus": cpus_per_actor}
        self._calls: dict[Any, _Call] = {}
        self._queue: deque[Unit] = deque()
        self._results: dict[int, list[Trajectory]] = {}
        self._deaths: Counter[int] = Counter()  # of who had a unit, by its number
        self._last, self._nobody_since = "", 0.0
        self.members: list[Member] = []
        try:
            fit = num_that_fit(self.ray, gpus=gpus_per_actor, cpus=cpus_per_actor)
            self._settings_ref = self.ray.put(settings)
            for number in range(num_actors):
                self.members.append(Member(number, None))
                self._start(self.members[-1])
            self._wait_for(min(num_actors, fit))
        except BaseException:
            self.close()
            raise

    def attempt(
        self,
        problems: Sequence[Problem],
        options: SamplingOptions,
        *,
        prompt: Callable[[Problem], list[int]],
        seed: int,
        first: int = 0,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> list[Trajectory]:
        """Attempts with verdicts, as `generate` gives them, whatever actors make them.

        Args:
            problems: what is attempted; those that stand there twice, twice, side by side.
            options: how to sample.
            prompt: a problem's token ids.
            seed: of the step.
            first: the place of the first of them in the step.
            timed: a context manager for each of the stages `rollout` and `verify`.

        Returns:
            One trajectory a problem, in order, all from the latest weights.

        Raises:
            InputError: a prompt, the model or its chat template does not do.
            MachineError: no actor is left, or a unit ends every actor that takes it.
        """
        assert self.version, "update_weights comes first"
        units = self._units(problems, options, prompt=prompt, seed=seed, first=first)
        self._queue, self._results, self._deaths = deque(units), {}, Counter()
        try:
            with timed("rollout"):
                self._hand_out()
                while self._unsampled():
                    self._next()
            with timed("verify"):
                while len(self._results) < len(units):
                    self._next()
        except BaseException:
            self._abandon()
            raise
        return [trajectory for unit in units for trajectory in self._results[unit.number]]

    def update_weights(self, model: Any) -> None:
        """Sample from these weights from now on; every actor that lives has them afterwards.

        Args:
            model: a causal LM of transformers, or peft's wrapper of one.

        Raises:
            InputError: its adapters can't be merged.
            MachineError: Ray's store has no room for them, or no actor is left.
        """
        named = checkpoint_weights(model) if self.settings.use_vllm else model_weights(model)
        # The old ones leave the store first: nobody reads them any more.
        self._weights = {}
        self._weights = put_weights(self.ray, named)
        self.version += 1
        for member in self._ready():
            self._load(member)
        while any(m.version < self.version for m in self._ready()) or not self._ready():
            self._next()

    def sleep(self) -> None:
        """Nothing to do: an actor's GPU is its own."""

    def close(self) -> None:
        """End the actors, and leave the cluster if this object joined it; it stays."""
        for member in self.members:
            if member.handle is not None:
                self.ray.kill(member.handle)
        self.members, self._calls, self._weights = [], {}, {}
        if self._joined:
            self.ray.shutdown()
            self._joined = False

    def _units(
        self,
        problems: Sequence[Problem],
        options: SamplingOptions,
        *,
        prompt: Callable[[Problem], list[int]],
        seed: int,
        first: int,
    ) -> list[Unit]:
        sizes = unit_sizes(
            problems, num_actors=self.num_actors, batch_size=self.settings.batch_size
        )
        units, start = [], 0
        for number, size in enumerate(sizes):
            part = tuple(problems[start : start + size])
            prompts = {problem: prompt(problem) for problem in dict.fromkeys(part)}
            units.append(Unit(number, first + start, part, prompts, options, seed, self.version))
            start += size
        return units

    def _ready(self) -> list[Member]:
        return [member for member in self.members if member.where]

    def _unsampled(self) -> bool:
        return bool(self._queue) or any(call.kind == "sample" for call in self._calls.values())

    def _start(self, member: Member) -> None:
        """Make the member's actor; it waits in Ray until a machine has room."""
        actor = self.ray.remote(RolloutActor).options(
            **self._size, max_concurrency=4, scheduling_strategy="SPREAD"
        )
        member.handle, member.where, member.version = actor.remote(), "", 0
        call = _Call(member, "set_up")
        self._calls[member.handle.set_up.remote(self._settings_ref)] = call

    def _load(self, member: Member) -> None:
        ref = member.handle.load.remote(self._weights, self.version)
        self._calls[ref] = _Call(member, "load", version=self.version)

    def _wait_for(self, count: int) -> None:
        """Until so many are ready, or for start_timeout_s; one is enough to begin."""
        until = time.monotonic() + self.start_timeout_s
        while len(self._ready()) < min(count, len(self.members)) and (
            not self._ready() or time.monotonic() < until
        ):
            self._next(until)
        if len(self._ready()) < self.num_actors:
            self.say(
                f"ray: {len(self._ready())} of {self.num_actors} actors; the others join when "
                "the cluster has room for them"
            )

    def _hand_out(self) -> None:
        """Units to whoever is free, those with the least in hand first."""
        sampling = {id(c.member) for c in self._calls.values() if c.kind == "sample"}
        for member in sorted(self._ready(), key=lambda member: len(member.units)):
            free = id(member) not in sampling and len(member.units) <= MAX_UNJUDGED
            if self._queue and free and member.version == self.version:
                unit = self._queue.popleft()
                member.units.append(unit)
                self._calls[member.handle.sample.remote(unit)] = _Call(member, "sample", unit)

    def _next(self, until: float | None = None) -> None:
        """Wait for an answer, and follow it up.

        Args:
            until: a time (monotonic) after which not to wait.

        Raises:
            InputError: an actor says so.
            MachineError: no actor is left, or none comes.
        """
        errors = self.ray.exceptions
        wait_s = patience(self._patience(until))
        done, _ = self.ray.wait([*self._calls], num_returns=1, timeout=wait_s)
        for ref in done:
            call = self._calls.pop(ref)
            try:
                answer = self.ray.get(ref)
            except errors.RayTaskError as error:
                self._failed(call, error)
            except errors.RayError as error:
                self._died(call.member, error)
            else:
                self._answered(call, answer)
        self._hand_out()

    def _patience(self, until: float | None) -> float | None:
        """Seconds to wait for an answer; None: as long as it takes."""
        now = time.monotonic()
        if not self.members:
            raise MachineError(f"ray: no actor is left; the latest: {self._last}; {_ADD}")
        if self._ready():
            self._nobody_since = 0.0
            return None if until is None else max(0.0, until - now)
        self._nobody_since = self._nobody_since or now
        left = self._nobody_since + self.start_timeout_s - now
        if left <= 0:
            latest = f"; the latest: {self._last}" if self._last else ""
            raise MachineError(
                f"ray: no actor is left, and in {self.start_timeout_s:g} s the cluster had no room "
                f"for another{latest}; {_ADD}"
            )
        return left

    def _answered(self, call: _Call, answer: Any) -> None:
        member = call.member
        if call.kind == "set_up":
            member.where = answer
            if self._weights:
                self._load(member)
        elif call.kind == "load":
            member.version = call.version
            if call.version < self.version:
                self._load(member)
        elif call.kind == "sample":
            assert call.unit is not None
            ref = member.handle.judged.remote(call.unit.number)
            self._calls[ref] = _Call(member, "judged", call.unit)
        else:
            assert call.unit is not None
            member.units.remove(call.unit)
            member.deaths = 0
            self._results[call.unit.number] = answer

    def _failed(self, call: _Call, error: Any) -> None:
        """An actor's own error: of the input, it ends the call; of its machine, the actor.

        Raises:
            InputError: as the actor said it; anything else than the two is a bug, and raised too.
        """
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        if not isinstance(error.cause, MachineError):
            raise error
        member = call.member
        self._last = str(error.cause)
        units = self._take_back(member)
        self.members.remove(member)
        self.ray.kill(member.handle)
        self.say(
            f"ray: actor {member.number} is given up, {self._last}; {_again(units)}"
            f"{len(self.members)} of {self.num_actors} actors are left"
        )

    def _died(self, member: Member, error: Exception) -> None:
        """Make an actor again that died, with its machine or alone.

        Raises:
            MachineError: a unit ended too many.
        """
        member.deaths += 1
        where = f" on {member.where}" if member.where else ""
        self._last = f"actor {member.number}{where} died ({_reason(error)})"
        units = self._take_back(member)
        self.ray.kill(member.handle)
        for unit in units:
            self._deaths[unit.number] += 1
        if member.deaths < MAX_DEATHS:
            self._start(member)
            then = "another is made in its place"
        else:
            self.members.remove(member)
            then = f"for the {MAX_DEATHS}. time in a row, so it is given up"
        self.say(f"ray: {self._last}; {_again(units)}{then}")
        for unit in units:
            if self._deaths[unit.number] >= MAX_DEATHS:
                names = ", ".join(dict.fromkeys(problem.name for problem in unit.problems))
                raise MachineError(
                    f"ray: {MAX_DEATHS} actors died with the attempts at {names}; look at their "
                    "machines' memory and Ray's logs (/tmp/ray/session_latest/logs), or lower "
                    "generation_batch_size"
                )

    def _take_back(self, member: Member) -> list[Unit]:
        """What the member has in hand goes to the front of the queue; its answers are not heard."""
        self._calls = {ref: c for ref, c in self._calls.items() if c.member is not member}
        units = sorted(member.units, key=lambda unit: unit.number)
        member.units = []
        self._queue.extendleft(reversed(units))
        self.redone += len(units)
        return units

    def _abandon(self) -> None:
        """After an error: nothing of this call goes on, and what dies with it is made again."""
        busy = [member for member in self.members if member.units]
        for member in busy:
            self._take_back(member)
            self.ray.kill(member.handle)
            self._start(member)
        self._queue.clear()


def _again(units: Sequence[Unit]) -> str:
    count = sum(len(unit.problems) for unit in units)
    return f"its {count} attempts are made again by others; " if count else ""


def _reason(error: Exception) -> str:
    """Ray's words in one line, without its identifiers."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines[1:] if line and ": " not in line[:16]]
    return (told or lines or [type(error).__name__])[0][:200]
