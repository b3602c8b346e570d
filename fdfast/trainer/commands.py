"""`fdfast train`, `fdfast rollout` and `fdfast config`."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfast.errors import InputError

if TYPE_CHECKING:
    from fdfast.trainer.config import TrainConfig

_SETTINGS = """Settings come from the preset, then from the YAML file, then from key=value words;
the later wins. A setting is named by its path (loss.beta), or by its last name alone
where that is one setting's (beta):

  fdfast {command}

Every setting, with its meaning and value: fdfast config show [PRESET]."""

_TRAIN = """Train a model by Feedback Distillation: it attempts problems, gets feedback on each
attempt, and learns to answer as a teacher does that has read the feedback.

{settings} Metrics, checkpoints and the final model go to output_dir; Ctrl-C
and SIGTERM leave a checkpoint, from which --resume goes on. On several GPUs or processes:
torchrun --nproc_per_node N -m fdfast train ...; they share each step and the weights.""".format(
    settings=_SETTINGS.format(
        command="train --preset fd_paper model_name_or_path=Qwen/Qwen3-8B dataset=problems.jsonl"
    )
)

_ROLLOUT = """Let a model attempt problems, as the trainer does, and keep the attempts: what it
wrote, its tool calls with their answers, Lean's verdict, the feedback, and for each token how
likely student and teacher find it. They go to OUTPUT/trajectories.jsonl as they come and at the
end to OUTPUT/trajectories.parquet; `fdfast show OUTPUT` prints them.

{settings}""".format(
    settings=_SETTINGS.format(
        command="rollout --model Qwen/Qwen3-8B --data problems.jsonl --backend vllm tools=true"
    )
)


class _Presets:
    """The names in trainer.PRESETS, looked up when needed: the trainer imports torch."""

    def __iter__(self) -> Iterator[str]:
        from fdfast.trainer.presets import PRESETS

        return iter(PRESETS)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


class _PresetsOrWords(_Presets):
    """Of `config show`, whose PRESET may be left out before key=value words."""

    def __contains__(self, name: object) -> bool:
        return "=" in str(name) or super().__contains__(name)


def register(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the commands."""
    train = subparsers.add_parser(
        "train",
        help="train a model by Feedback Distillation",
        description=_TRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(train)
    train.add_argument("--resume", action="store_true", help="from output_dir's newest checkpoint")
    _add_dry_run(train)
    train.set_defaults(run=_train)

    config = subparsers.add_parser("config", help="settings").add_subparsers(
        required=True, metavar="COMMAND", parser_class=type(subparsers.choices["train"])
    )
    show = config.add_parser(
        "show", help="every setting of a preset with its meaning, as YAML that --config reads"
    )
    show.add_argument(
        "preset", nargs="?", choices=_PresetsOrWords(), metavar="PRESET", help="%(choices)s"
    )
    _add_words(show)
    show.set_defaults(run=_show_config)

    rollout = subparsers.add_parser(
        "rollout",
        help="let a model attempt problems, and keep the attempts",
        description=_ROLLOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_settings(rollout)
    rollout.add_argument("--model", metavar="PATH", help="model_name_or_path")
    rollout.add_argument("--data", metavar="PATH", help="dataset")
    rollout.add_argument(
        "--backend",
        choices=("hf", "vllm"),
        help="what samples: transformers, or vLLM (a server's with vllm.server_base_url=...)",
    )
    rollout.add_argument("--output", type=Path, default=Path("runs/rollout"), metavar="FOLDER")
    rollout.add_argument("--limit", type=int, metavar="N", help="the first N problems alone")
    rollout.add_argument(
        "--no-feedback",
        action="store_true",
        help="neither feedback nor a teacher's view of the tokens",
    )
    rollout.set_defaults(run=_rollout)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    _add_words(parser)
    parser.add_argument(
        "--preset", choices=_Presets(), metavar="NAME", help="begin with these: %(choices)s"
    )


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: model each stage's memory and time on a GPU (needs none, nor weights)",
    )
    parser.add_argument("--gpu", metavar="NAME", help="a100, h100 (taken), h200 or b200")
    parser.add_argument("--gpus", type=int, metavar="N", help="how many (1)")
    for name, limit in (("prompt", "max_prompt_length"), ("completion", "max_completion_length")):
        parser.add_argument(
            f"--{name}-tokens", type=int, metavar="N", help=f"of one on average ({limit})"
        )


def _add_words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="key=value", help="over the file's settings")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="the same, as an option, over all of these",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML, over the preset's")


def _load(arguments: argparse.Namespace) -> "TrainConfig":
    from fdfast.trainer import load_config

    words = [*arguments.settings, *arguments.set]
    return load_config(arguments.config, words, preset=arguments.preset)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        return _dry_run(arguments)
    for name in ("gpu", "gpus", "prompt_tokens", "completion_tokens"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for --dry-run; add it, or drop this")
    from fdfast.trainer import train
    from fdfast.trainer.ranks import ranks_of_torchrun

    with ranks_of_torchrun() as ranks:
        with ranks.together():  # one of them says what is wrong
            config = _load(arguments)
        train(config, resume=arguments.resume)
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from fdfast.trainer.dry_run import not_modelled, table, workloads
    from fdfast.trainer.estimate import read_shape

    config = _load(arguments)
    stages = workloads(
        config,
        prompt_tokens=arguments.prompt_tokens,
        completion_tokens=arguments.completion_tokens,
    )
    gpus = 1 if arguments.gpus is None else arguments.gpus
    shape = read_shape(config.model.model_name_or_path)
    print(table(shape, stages, gpu=arguments.gpu or "h100", gpus=gpus))
    for line in not_modelled(config):
        print(line)
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    from fdfast.trainer.describe import describe

    if arguments.preset is not None and "=" in arguments.preset:
        arguments.settings.insert(0, arguments.preset)
        arguments.preset = None
    print(describe(_load(arguments), preset=arguments.preset), end="")
    return 0


def _rollout(arguments: argparse.Namespace) -> int:
    from fdfast.trainer.collect import collect

    if arguments.limit is not None and arguments.limit < 1:
        raise InputError(f"--limit must be at least 1; got {arguments.limit}")
    collect(
        _rollout_config(arguments),
        arguments.output,
        limit=arguments.limit,
        feedback=not arguments.no_feedback,
    )
    return 0


def _names_a_server(word: str) -> bool:
    name = word.partition("=")[0]
    return name in ("vllm.server_base_url", "vllm_server_base_url", "server_base_url")


def _rollout_config(arguments: argparse.Namespace) -> "TrainConfig":
    """The settings, where the command's own words win."""
    from fdfast.trainer import load_config

    words = [*arguments.settings, *arguments.set]
    if arguments.no_feedback:  # whatever source is named is not asked
        words += ["feedback.source=constant", "feedback.text=none", "feedback.on_failure=skip"]
    for key, value in (("model_name_or_path", arguments.model), ("dataset", arguments.data)):
        if value is not None:
            words.append(f"{key}={value}")
    if arguments.backend is not None:
        words.append(f"use_vllm={'true' if arguments.backend == 'vllm' else 'false'}")
    if arguments.backend == "vllm" and any(_names_a_server(word) for word in words):
        words.append("vllm.mode=server")
    return load_config(arguments.config, words, preset=arguments.preset)
