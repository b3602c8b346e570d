"""A step's attempts in units, as Ray actors take them."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fdfast.data.problems import Problem
from fdfast.rollout.trajectory import SamplingOptions


@dataclass(frozen=True)
class Unit:
    """What an actor is handed at a time.

    Attributes:
        number: its place among the step's units.
        first: the place of its first attempt in the step.
        problems: what is attempted; those that stand there twice, twice.
        prompts: their token ids.
        options: how to sample.
        seed: of the step.
        version: of the weights that must be sampled from.
    """

    number: int
    first: int
    problems: tuple[Problem, ...]
    prompts: Mapping[Problem, list[int]]
    options: SamplingOptions
    seed: int
    version: int


def unit_sizes(problems: Sequence[Problem], *, num_actors: int, batch_size: int) -> list[int]:
    """How many attempts each unit has.

    Attempts at one problem stay together: the prompt that they share passes the model once. A unit
    fills the batch once if there is enough for all actors, so that whoever is slow holds little.
    It depends on settings alone, not on which actors live: the same units come again.

    Args:
        problems: of the step, those that are attempted several times side by side.
        num_actors: that shall have something to do.
        batch_size: trajectories that an actor decodes at once.
    """
    most = min(batch_size, math.ceil(len(problems) / num_actors))
    sizes: list[int] = []
    for _, group in itertools.groupby(problems):
        count = len(list(group))
        if sizes and sizes[-1] + count <= most:
            sizes[-1] += count
        else:
            sizes.append(count)
    return sizes
