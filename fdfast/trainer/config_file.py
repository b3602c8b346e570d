"""Settings from a preset, a YAML file and `key=value` words, with their types checked."""

import contextlib
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from fdfast.errors import InputError, MachineError
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.presets import PRESETS
from fdfast.trainer.stages import Stage


def make_config(
    values: dict[str, Any], *, source: str = "config", sources: Mapping[str, str] | None = None
) -> TrainConfig:
    """A TrainConfig from plain values, their types checked and converted.

    Args:
        values: key -> value.
        source: where they come from, for the message.
        sources: key -> where that one comes from; a key that is not in it comes from `source`.

    Raises:
        InputError: an unknown key (with the nearest known one), a wrong type or value.
        MachineError: pydantic is missing.
    """
    sources = sources or {}
    for key in values:
        _check_names({key: None}, TrainConfig, sources.get(key, source))
    stages = values.get("stages")
    for stage in stages if isinstance(stages, list | tuple) else ():
        _check_names(stage, Stage, f"{sources.get('stages', source)}: stages")
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise MachineError(
            f"configs need pydantic ({error}); run: pip install 'fdfast[train]'"
        ) from error
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # __post_init__'s own line; input is every setting
            raise InputError(str(first["ctx"]["error"])) from error
        where = sources.get(str(first["loc"][0]), source)
        raise InputError(
            f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}; got {first['input']!r}"
        ) from error


def _check_names(values: Any, settings: type, place: str) -> None:
    """Every key is a setting.

    Raises:
        InputError: one is none; with the nearest that is one.
    """
    known = [f.name for f in dataclasses.fields(settings)]
    for key in values if isinstance(values, Mapping) else ():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{place}: unknown key {key!r}{hint}")


def load_config(
    path: Path | None, overrides: Sequence[str], *, preset: str | None = None
) -> TrainConfig:
    """A config from a preset, then a YAML file, then `key=value` words.

    A word's value is text as it stands where the setting is a text, else YAML.

    Raises:
        InputError: a file that is missing or no YAML mapping, a word without `=`, or as
            make_config.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
        values |= PRESETS[preset]
    if path is not None:
        loaded = _read_yaml(path)
        values |= loaded
        sources |= dict.fromkeys(loaded, str(path))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is no setting; write key=value, learning_rate=2e-5, say")
        values[key] = text if key in _TEXTS else _yaml_value(key, text)
        sources[key] = "command line"
    return make_config(values, sources=sources)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MachineError(
            f"{path}: config files need pyyaml ({error}); run: pip install 'fdfast[train]'"
        ) from error
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such config file") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict | None):
        raise InputError(f"{path}: must hold `key: value` lines; got {type(loaded).__name__}")
    return loaded or {}


def _yaml_value(key: str, text: str) -> Any:
    """YAML's reading of one value, with 1e-5 a number (YAML 1.1 wants 1.0e-5)."""
    try:
        import yaml
    except ImportError as error:
        raise MachineError(
            f"settings need pyyaml ({error}); run: pip install 'fdfast[train]'"
        ) from error
    with contextlib.suppress(ValueError):
        if "e" in text.lower():
            return float(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date like 2026-13-45
        reason = " ".join(str(error).split())
        raise InputError(f"command line: {key}: {text!r} is no YAML: {reason}") from error


_TEXTS = frozenset(
    f.name
    for f in dataclasses.fields(TrainConfig)
    if f.type is str or get_origin(f.type) is Literal
)
