"""The tools of a batch of trajectories: each has a work folder of its own, all share one Lean."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fdfast.lean import LeanPool
from fdfast.lean.folder import private_folder
from fdfast.lean.tools import Limits, Toolbox, tool_schemas


class Toolboxes:
    """Makes the tools of trajectory number n; a context manager, whose end removes the folders.

    Args:
        lean: compiles files for `check_file`.
        libraries: name -> folder, for `search_library`; without any there is no such tool.
        limits: of each trajectory.
    """

    def __init__(
        self,
        lean: LeanPool,
        *,
        libraries: Mapping[str, Path] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.lean, self.libraries, self.limits = lean, dict(libraries or {}), limits or Limits()
        self._boxes: dict[int, Toolbox] = {}
        self._stack = contextlib.ExitStack()
        self._folder: Path | None = None

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return tool_schemas(search=bool(self.libraries))

    def __enter__(self) -> Self:
        self._folder = self._stack.enter_context(private_folder())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._boxes.clear()
        self._stack.close()

    def __call__(self, number: int) -> Toolbox:
        """The tools of trajectory number n, made once."""
        assert self._folder is not None, "Toolboxes is used as a context manager"
        if number not in self._boxes:
            folder = self._folder / str(number)
            folder.mkdir()
            box = Toolbox(folder, self.lean.check_file, self.libraries, self.limits)
            self._boxes[number] = self._stack.enter_context(box)
        return self._boxes[number]

    def files(self, number: int) -> dict[str, str]:
        """The Lean files that it has written: path -> text."""
        box = self._boxes.get(number)
        return {} if box is None else box.files()
