"""Where a run's curves go beside metrics.jsonl: TensorBoard, Weights & Biases.

A sink is a copy: what a run needs, and what a resume reads, is metrics.jsonl alone.
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fdfast.errors import InputError, MachineError
from fdfast.files import atomic_file
from fdfast.losses.output import VERL_NAMES
from fdfast.trainer.settings import Settings

REPORTS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class LoggingSettings(Settings):
    """Where the curves go, beside metrics.jsonl.

    Attributes:
        report_to: some of tensorboard, wandb; () for metrics.jsonl alone.
        run_name: for people; "" for the name of output_dir.
        logging_dir: of the files of both; "" for output_dir/logs.
        metric_names: of both: trl, or verl, whose names what means the same there gets
            (losses.output.VERL_NAMES); metrics.jsonl has TRL's.
        wandb_project: of Weights & Biases.
        wandb_mode: offline (send later with wandb sync), online or disabled.
    """

    group = "logging."

    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    run_name: str = ""
    logging_dir: str = ""
    metric_names: Literal["trl", "verl"] = "trl"
    wandb_project: str = "fdfast"
    wandb_mode: Literal["offline", "online", "disabled"] = "offline"


class Sink(Protocol):
    """Takes the rows of metrics.jsonl, oldest first."""

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """One row's numbers.

        Args:
            step: finished optimizer steps.
            row: name -> value; what is no finite number is left out.
        """

    def close(self) -> None:
        """All that was written is on disk, or sent."""


def numbers(row: Mapping[str, Any], *, names: str = "trl") -> dict[str, float]:
    """A row's finite numbers, without its step.

    Args:
        row: of metrics.jsonl, whose names are TRL's.
        names: trl leaves them, verl takes those of `VERL_NAMES` for what means the same there.
    """
    found = {}
    for name, value in row.items():
        if name == "step" or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        found[_verl_name(name) if names == "verl" else name] = float(value)
    return found


def _verl_name(name: str) -> str:
    """Of an evaluation's metric the name with eval_ before it, as TRL writes it."""
    if name.startswith("eval_"):
        plain = name.removeprefix("eval_")
        return f"eval_{VERL_NAMES[plain]}" if plain in VERL_NAMES else name
    return VERL_NAMES.get(name, name)


def check_reports(report_to: Sequence[str]) -> None:
    """Refuse a run whose reports lack a package, before a model is loaded.

    Raises:
        InputError: a name that is none.
        MachineError: a package is missing.
    """
    for name in report_to:
        if name not in REPORTS:
            raise InputError(f"report_to must name some of {', '.join(REPORTS)}; got {name!r}")
        _summary_writer() if name == "tensorboard" else _wandb()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MachineError(
            f"report_to tensorboard: it is not installed ({error}); run: "
            "pip install 'fdfast[tensorboard]', or leave it out"
        ) from error
    return SummaryWriter


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MachineError(
            f"report_to wandb: it is not installed ({error}); run: "
            "pip install 'fdfast[wandb]', or leave it out"
        ) from error
    return wandb


def make_sinks(
    report_to: Sequence[str],
    folder: Path,
    *,
    step: int,
    run_name: str = "",
    logging_dir: str = "",
    metric_names: str = "trl",
    wandb_project: str = "fdfast",
    wandb_mode: str = "offline",
    settings: Mapping[str, Any] | None = None,
) -> list[Sink]:
    """The sinks that a run names.

    Args:
        report_to: of REPORTS.
        folder: of the run.
        step: finished steps; what a sink has of later ones will come again.
        run_name: for people; "" for the folder's name.
        logging_dir: of the sinks' files; "" for `folder`/logs.
        metric_names: trl or verl.
        wandb_project: of Weights & Biases.
        wandb_mode: offline, online or disabled.
        settings: of the run, which Weights & Biases shows beside the curves.

    Raises:
        InputError: a name that is none.
        MachineError: a package is missing, or it can't begin a run.
    """
    check_reports(report_to)
    made: list[Sink] = []
    files = Path(logging_dir) if logging_dir else folder / "logs"
    for name in report_to:
        if name == "tensorboard":
            made.append(TensorBoardSink(files / "tensorboard", step=step, names=metric_names))
            continue
        made.append(
            WandbSink(
                files,
                step=step,
                names=metric_names,
                project=wandb_project,
                mode=wandb_mode,
                run_name=run_name or folder.name,
                settings=settings or {},
            )
        )
    return made


class TensorBoardSink:
    """Event files, which `tensorboard --logdir` reads.

    Args:
        folder: of the event files.
        step: finished steps; points of later ones, from before a resume, are hidden by TensorBoard.
        names: of the metrics, trl or verl.

    Raises:
        MachineError: TensorBoard is missing.
    """

    def __init__(self, folder: Path, *, step: int, names: str = "trl") -> None:
        self.names = names
        # A run that begins has no points at all, not even of the evaluation before its first step.
        purge = step + 1 if step else 0
        self.writer = _summary_writer()(log_dir=str(folder), purge_step=purge)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """See `Sink`; the points are on disk when this returns."""
        for name, value in numbers(row, names=self.names).items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """See `Sink`."""
        self.writer.close()


class WandbSink:
    """A run of Weights & Biases: one for all starts of a run, by an id kept in `folder`/wandb.json.

    W&B takes no step twice, so after a resume the steps that it has already are left out.

    Args:
        folder: of its files; offline ones go into `folder`/wandb, from where `wandb sync` sends
            them.
        step: finished steps; at 0 another run of W&B begins.
        names: of the metrics, trl or verl.
        project: W&B's.
        mode: offline, online or disabled.
        run_name: for people.
        settings: shown beside the curves.

    Raises:
        MachineError: wandb is missing, or can't begin a run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        names: str,
        project: str,
        mode: str,
        run_name: str,
        settings: Mapping[str, Any],
    ) -> None:
        wandb = _wandb()
        folder.mkdir(parents=True, exist_ok=True)
        self.names, self.place = names, folder / "wandb.json"
        known = json.loads(self.place.read_text(encoding="utf-8")) if self.place.exists() else None
        if not step or known is None:
            known = {"id": secrets.token_hex(8), "step": 0, "evaluation": -1}
        self.known: dict[str, Any] = known
        self.waiting: dict[str, int] = {}
        try:
            self.run = wandb.init(
                project=project,
                name=run_name,
                id=known["id"],
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=str(folder),
                config=json.loads(json.dumps(dict(settings), default=vars)),  # stages too
                # The trainer has the terminal, and stores its own settings, versions and commit.
                settings=wandb.Settings(console="off", silent=True, disable_git=True),
            )
        except wandb.Error as error:
            raise MachineError(
                f"report_to wandb: it can't begin a run ({' '.join(str(error).split())[:200]}); "
                "log in (wandb login), or take wandb_mode=offline"
            ) from error
        self._remember()

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """See `Sink`; a step's row and that of the evaluation after it are one point."""
        kind = "evaluation" if "eval_loss" in row else "step"
        if step <= self.known[kind]:
            return
        if step > max(self.waiting.values(), default=step):
            self._settle()
        # Not committed: W&B ends a point when one of a later step comes, or the run ends.
        self.run.log(numbers(row, names=self.names), step=step, commit=False)
        self.waiting[kind] = step

    def _settle(self) -> None:
        """What waited is W&B's for good."""
        self.known |= self.waiting
        self.waiting = {}
        self._remember()

    def _remember(self) -> None:
        with atomic_file(self.place) as temporary:
            temporary.write_text(json.dumps(self.known), encoding="utf-8")

    def close(self) -> None:
        """See `Sink`."""
        self.run.finish()
        self._settle()
