"""Settings from a preset, a YAML file and `key=value` words, with their types checked."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_origin

from fdfast.errors import InputError, MachineError
from fdfast.trainer.config import TrainConfig
from fdfast.trainer.presets import PRESETS
from fdfast.trainer.settings import path_of, paths
from fdfast.trainer.stages import Stage


def make_config(
    values: dict[str, Any], *, source: str = "config", sources: Mapping[str, str] | None = None
) -> TrainConfig:
    """A TrainConfig from plain values, their types checked and converted.

    Args:
        values: by path (loss.beta), in groups ({"loss": {"beta": 0}}), or by the other names that
            `settings.path_of` knows.
        source: where they come from, for the message.
        sources: path -> where that one comes from; a path that is not in it comes from `source`.

    Raises:
        InputError: an unknown key (with the nearest known one), a wrong type or value.
        MachineError: pydantic is missing.
    """
    given = by_path(values, source)
    sources = sources or {}
    for path, value in given.items():
        if isinstance(value, bool) and paths(TrainConfig)[0][path] in _NUMBERS:
            where = sources.get(path, source)  # pydantic would take it for 0 or 1
            raise InputError(f"{where}: {path}: must be a number; got {value}")
    stages = given.get("stages")
    if isinstance(stages, list | tuple):
        place = f"{sources.get('stages', source)}: stages"
        given["stages"] = [_stage(stage, place) for stage in stages]
    try:
        from pydantic import TypeAdapter, ValidationError
    except ImportError as error:
        raise MachineError(
            f"configs need pydantic ({error}); run: pip install 'fdfast[train]'"
        ) from error
    try:
        return TypeAdapter(TrainConfig).validate_python(_nested(given))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # __post_init__'s own line; input is every setting
            raise InputError(str(first["ctx"]["error"])) from error
        loc = [str(part) for part in first["loc"]]
        where = sources.get(".".join(loc[:2]), sources.get(loc[0], source))
        got, said = first["input"], first["msg"]
        if first["type"] == "tuple_type":
            said = f"must be a list, [{'' if got is None else got}] say"
        raise InputError(f"{where}: {'.'.join(loc)}: {said}; got {got!r}") from error


def by_path(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Settings by path, from groups within groups and from the names that `path_of` knows.

    Raises:
        InputError: a key is no setting, stands there twice, or is a group without settings.
    """
    found: dict[str, Any] = {}
    _, groups = paths(TrainConfig)
    for key, value in values.items():
        path = path_of(str(key), TrainConfig, place)
        given = {path: value}
        if path in groups:
            if not isinstance(value, Mapping):
                raise InputError(f"{place}: {_no_group(path, groups[path], value)}")
            given = {path_of(f"{path}.{name}", TrainConfig, place): v for name, v in value.items()}
        if twice := sorted(found.keys() & given.keys()):
            raise InputError(f"{place}: {twice[0]} is given twice; drop one")
        found |= given
    return found


def _no_group(path: str, group: type, value: Any) -> str:
    """What is wrong with a group that is one value; a word may be meant for its first setting, as
    in feedback=llm and model=demo.
    """
    first = dataclasses.fields(group)[0]
    said = f"{path} is a group of settings ({path}.{first.name}, ...); got {value!r}"
    meant = isinstance(value, str) and first.type is str
    return f"{said}; did you mean {path}.{first.name}={value}?" if meant else said


def _nested(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a tree of dataclasses is validated from."""
    tree: dict[str, Any] = {}
    for path, value in given.items():
        name, dot, rest = path.partition(".")
        if dot:
            tree.setdefault(name, {})[rest] = value
        else:
            tree[name] = value
    return tree


def _stage(values: Any, place: str) -> Any:
    """A stage's settings by its own names, from those that the whole tree has for them.

    Raises:
        InputError: a key is none of a stage's, or stands there twice.
    """
    if not isinstance(values, Mapping):
        return values
    own = {f.name for f in dataclasses.fields(Stage)}
    found = {key: value for key, value in values.items() if key in own}
    for path, value in by_path({k: v for k, v in values.items() if k not in own}, place).items():
        name = path.rsplit(".", 1)[-1]
        if name not in own or path_of(name, TrainConfig, place) != path:
            raise InputError(
                f"{place}: {path} is the run's, not a stage's; a stage has {', '.join(sorted(own))}"
            )
        if name in found:
            raise InputError(f"{place}: {name} is given twice; drop one")
        found[name] = value
    return found


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
        loaded = by_path(_read_yaml(path), str(path))
        values |= loaded
        sources |= dict.fromkeys(loaded, str(path))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise InputError(f"{word!r} is no setting; write key=value, learning_rate=2e-5, say")
        key = path_of(key, TrainConfig, "command line")
        value = text if key in _TEXTS else _yaml_value(key, text)
        given = by_path({key: value}, "command line")
        values |= given
        sources |= dict.fromkeys(given, "command line")
    config = make_config(values, sources=sources)
    if config.stages and sources.get("optim.max_steps") == "command line":
        raise InputError(
            "command line: optim.max_steps would be ignored, each stage has its own; set "
            f"stages=[{{max_steps: {config.optim.max_steps}, ...}}], or stages=[] for none"
        )
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MachineError(
            f"{path}: config files need pyyaml ({error}); run: pip install 'fdfast[train]'"
        ) from error
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_repeated(yaml.compose(text, Loader=yaml.SafeLoader), path)
        loaded = yaml.safe_load(text)
    except InputError:  # a ValueError, as YAML's own are
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such config file") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict | None):
        raise InputError(f"{path}: must hold `key: value` lines; got {type(loaded).__name__}")
    return loaded or {}


def _refuse_repeated(node: Any, path: Path) -> None:
    """YAML would take the last of two keys of one name, and with it drop a whole group.

    Raises:
        InputError: a mapping has a key twice.
    """
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key.value, str) and key.value in seen:
            line = key.start_mark.line + 1
            raise InputError(f"{path}:{line}: {key.value} is given twice; drop one")
        seen |= {key.value} if isinstance(key.value, str) else set()
        _refuse_repeated(value, path)


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


_NUMBERS = (int, float, int | None, float | None)
_TEXTS = frozenset(
    path
    for path, kind in paths(TrainConfig)[0].items()
    if kind is str or get_origin(kind) is Literal
)
