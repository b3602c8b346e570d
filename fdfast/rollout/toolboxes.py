"""The tools of a batch of trajectories: each has a work folder of its own, all share one Lean."""

import contextlib
import itertools
import shutil
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
        self._names = itertools.count()

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
        for number in [*self._boxes]:
            self.close(number)
        self._stack.close()

    def __call__(self, number: int) -> Toolbox:
        """The tools of trajectory number n, with an empty work folder."""
        assert self._folder is not None, "Toolboxes is used as a context manager"
        self.close(number)
        folder = self._folder / f"{next(self._names)}"
        folder.mkdir()
        box = Toolbox(folder, self.lean.check_file, self.libraries, self.limits)
        self._boxes[number] = box
        return box

    def close(self, number: int) -> dict[str, str]:
        """Trajectory number n has ended: its folder goes.

        Returns:
            The Lean files that it has written: path -> text.
        """
        box = self._boxes.pop(number, None)
        if box is None:
            return {}
        files = box.files()
        box.close()
        shutil.rmtree(box.folder, ignore_errors=True)
        return files
