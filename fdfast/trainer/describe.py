"""`fdfast config show`: every setting, its value and meaning, as YAML that --config reads."""

import dataclasses
import re
from typing import Any

from fdfast.trainer.config import TrainConfig
from fdfast.trainer.paper import PAPER_PRESETS, open_choices_as_comments
from fdfast.trainer.settings import Settings

_FIELD = re.compile(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", re.MULTILINE)


def documentation(settings: Settings) -> dict[str, str]:
    """What each setting of a group is, in a line, from its class's own words; values as YAML has
    them, not Python.
    """
    text = type(settings).__doc__ or ""
    found = {name: " ".join(said.split()) for name, said in _FIELD.findall(text)}
    return {
        name: re.sub(r"\bNone\b", "null", said.replace("()", "[]")) for name, said in found.items()
    }


def describe(config: TrainConfig, *, preset: str | None = None) -> str:
    """The settings as YAML, each with a comment above it; of a preset of the paper's with what the
    paper leaves open.
    """
    above = open_choices_as_comments() + "\n" if preset in PAPER_PRESETS else ""
    return above + "\n".join(_lines(config, ""))


def _lines(settings: Settings, indent: str) -> list[str]:
    import yaml

    said = documentation(settings)
    lines = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        lines.append(f"{indent}# {said[field.name]}")
        if isinstance(value, Settings):
            lines += [f"{indent}{field.name}:", *_lines(value, indent + "  ")]
            continue
        written = yaml.safe_dump({field.name: yaml_value(value)}, allow_unicode=True, width=10**6)
        lines += [indent + line for line in written.rstrip("\n").split("\n")]
        lines += [] if indent else [""]
    return [*lines, ""] if indent else lines


def yaml_value(value: Any) -> Any:
    """Tuples as lists, which YAML has, and of a stage what it sets."""
    if dataclasses.is_dataclass(value):
        return {name: item for name, item in vars(value).items() if item is not None}
    return [yaml_value(item) for item in value] if isinstance(value, tuple | list) else value
