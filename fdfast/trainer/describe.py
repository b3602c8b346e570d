"""`fdfast config show`: every setting, its value and meaning, as YAML that --config reads."""

import dataclasses
import re
from typing import Any

from fdfast.trainer.config import TrainConfig

_FIELD = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


def documentation() -> dict[str, str]:
    """What each setting is, in a line, from TrainConfig's own words."""
    text = TrainConfig.__doc__ or ""
    return {name: " ".join(said.split()) for name, said in _FIELD.findall(text)}


def describe(config: TrainConfig) -> str:
    """The settings as YAML, each with a comment above it."""
    import yaml

    said = documentation()
    lines = []
    for field in dataclasses.fields(config):
        value = yaml_value(getattr(config, field.name))
        written = yaml.safe_dump({field.name: value}, allow_unicode=True, width=1_000_000)
        lines += [f"# {said[field.name]}", written.rstrip("\n"), ""]
    return "\n".join(lines)


def yaml_value(value: Any) -> Any:
    """Tuples as lists, which YAML has, and of a stage what it sets."""
    if dataclasses.is_dataclass(value):
        return {name: item for name, item in vars(value).items() if item is not None}
    return [yaml_value(item) for item in value] if isinstance(value, tuple | list) else value
