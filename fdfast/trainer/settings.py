"""What a tree of settings is made of: fields with their rules, groups, and names with dots."""

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, TypeVar

from fdfast.errors import InputError

S = TypeVar("S")
_RULE = "rule"


def at_least_one(default: int) -> Any:
    """A field of 1 and more."""
    return _field(default, lambda value: value >= 1, "be at least 1")


def not_negative(default: float) -> Any:
    """A field of 0 and more."""
    return _field(default, lambda value: value >= 0, "not be negative")


def positive(default: float) -> Any:
    """A field above 0."""
    return _field(default, lambda value: value > 0, "be positive")


def within(default: float | None, holds: Callable[[float], bool], interval: str) -> Any:
    """A field in an interval; None, where that is the default, is always allowed."""
    return _field(default, lambda value: value is None or holds(value), f"lie in {interval}")


def one_of(default: str, known: Collection[str]) -> Any:
    """A field that names one of several."""
    return _field(default, lambda value: value in known, f"be one of {', '.join(known)}")


def _field(default: Any, holds: Callable[[Any], bool], rule: str) -> Any:
    return dataclasses.field(default=default, metadata={_RULE: (holds, rule)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """A group of settings, or the whole tree; each field keeps its rule.

    Attributes:
        group: how the tree names the group, with a dot behind it.
    """

    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check every field's rule.

        Raises:
            InputError: one is broken.
        """
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), self.group + field.name
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"config: {name} must be a finite number; got {value}")
            holds, rule = field.metadata.get(_RULE, (None, ""))
            if holds is not None and not holds(value):
                shown = repr(value) if isinstance(value, str) else value
                raise InputError(f"config: {name} must {rule}; got {shown}")


def flat(settings: Any) -> dict[str, Any]:
    """Every setting by its path: loss.beta, say."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            found |= {f"{field.name}.{name}": v for name, v in flat(value).items()}
        else:
            found[field.name] = value
    return found


def plain(settings: Any) -> dict[str, Any]:
    """The same, as JSON has it."""
    found: dict[str, Any] = json.loads(json.dumps(flat(settings), default=vars))
    return found


def replaced(settings: S, values: Mapping[str, Any]) -> S:
    """The settings with other values, by path."""
    own: dict[str, Any] = {}
    for path, value in values.items():
        name, dot, rest = path.partition(".")
        group = own.get(name, getattr(settings, name))
        own[name] = replaced(group, {rest: value}) if dot else value
    return dataclasses.replace(settings, **own)  # type: ignore[type-var]


def path_of(name: str, tree: type, place: str) -> str:
    """The path of a setting that is named by its path, by its last name alone where one setting
    has it, or with underscores for dots as TRL writes it (vllm_mode).

    Args:
        name: as it was given.
        tree: the dataclass whose settings are known.
        place: where it stands, for the message.

    Raises:
        InputError: no setting has that name, or several do.
    """
    known, groups = paths(tree)
    if name in known or name in groups:
        return name
    found = [p for p in known if name in (p.rsplit(".", 1)[-1], p.replace(".", "_"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{place}: {name!r} is one of {', '.join(found)}; name it in full")
    names = [*known, *groups, *(p.rsplit(".", 1)[-1] for p in known)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{place}: unknown key {name!r}{hint}")


def paths(tree: type) -> tuple[dict[str, Any], dict[str, type]]:
    """The settings of a tree with their types, by path, and its groups."""
    known: dict[str, Any] = {}
    groups: dict[str, type] = {}
    for field in dataclasses.fields(tree):
        if isinstance(field.type, type) and issubclass(field.type, Settings):
            groups[field.name] = field.type
            known |= {f"{field.name}.{f.name}": f.type for f in dataclasses.fields(field.type)}
        else:
            known[field.name] = field.type
    return known, groups
