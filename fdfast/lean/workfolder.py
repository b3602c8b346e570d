"""A folder that an agent may write Lean files in, and nothing else.

Every path goes component by component through open folders (`dir_fd`, O_NOFOLLOW), so that neither
`..` nor a symbolic link leads out, not even one that appears between the check and the use.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from fdfast.errors import InputError, MachineError
from fdfast.lean.screen import refuse_text

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_PARTS = 4
_MAX_NAME_BYTES = 100
# What the path of a file can be at fault for; any other error is the machine's.
_FAULTS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "a part of the path is a file (or a link), where a folder is needed",
    errno.EISDIR: "it is a folder",
    errno.ELOOP: "it is a symbolic link",
    errno.EEXIST: "a part of the path is there already as something else",
    errno.ENXIO: "it is no regular file",
    errno.ENAMETOOLONG: "the name is too long",
}


class Refused(Exception):  # noqa: N818 - what the model asked for, not a fault of the program
    """Why a file cannot be written or read, and what to do instead."""


def split_path(path: str) -> tuple[str, ...]:
    """The components of an agent's path, `Foo/Bar.lean` say.

    Raises:
        Refused: it is not a relative path of plain names to a .lean file.
    """
    shown = repr(path if len(path) <= 80 else path[:77] + "...")
    rule = "use a relative path such as 'Main.lean' or 'Lemmas/Basic.lean'"
    if reason := refuse_text(path):
        raise Refused(f"path {shown} is not allowed: {reason}; {rule}")
    parts = tuple(path.split("/"))
    if path.startswith(("/", "~")):
        raise Refused(f"path {shown} is not allowed: it leaves the work folder; {rule}")
    if any(part in ("", ".", "..") for part in parts):
        raise Refused(f"path {shown} is not allowed: it has an empty, '.' or '..' part; {rule}")
    if any(not _is_plain(part) for part in parts):
        raise Refused(
            f"path {shown} is not allowed: names are letters, digits, '_', '-' and '.', do not"
            f" begin with '.' or '-', and have at most {_MAX_NAME_BYTES} bytes; {rule}"
        )
    if len(parts) > _MAX_PARTS:
        raise Refused(f"path {shown} is not allowed: it has more than {_MAX_PARTS} parts; {rule}")
    # Other endings are none of an agent's business: a compiled .olean, or a lakefile, which is run.
    if not parts[-1].endswith(".lean") or parts[-1] in (".lean", "lakefile.lean"):
        raise Refused(f"path {shown} is not allowed: the name must end in '.lean'; {rule}")
    return parts


def _is_plain(name: str) -> bool:
    return (
        name[0] not in ".-"
        and all(letter.isalnum() or letter in "_-.'" for letter in name)
        and len(name.encode()) <= _MAX_NAME_BYTES
    )


class WorkFolder:
    """The files of one agent; a context manager that holds the folder open.

    Args:
        folder: it must exist; whoever made it removes it.
        file_bytes: of a file at most.
        num_files: in the folder at most.
    """

    def __init__(self, folder: Path, *, file_bytes: int, num_files: int) -> None:
        self.folder = folder
        self._file_bytes = file_bytes
        self._num_files = num_files
        try:
            # Not O_NOFOLLOW: the folder itself is the caller's choice.
            self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise MachineError(
                f"tools: the work folder {folder} cannot be opened ({error.strerror});"
                " make it first"
            ) from error

    def close(self) -> None:
        """Let go of the folder; its files stay."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def write(self, path: str, text: str) -> None:
        """Write a file whole; folders on the way are made, a file of that name is replaced.

        Raises:
            Refused: the path or the text is not allowed, or there are too many files.
            MachineError: a full disk, no permission.
        """
        parts = split_path(path)
        if reason := refuse_text(text):
            raise Refused(f"{path} is not written: {reason}; write plain Unicode text")
        data = text.encode()
        if len(data) > self._file_bytes:
            raise Refused(
                f"{path} is not written: it has {len(data)} bytes, at most {self._file_bytes} are"
                " allowed; write a shorter file"
            )
        files = self.files()
        if path not in files and len(files) >= self._num_files:
            raise Refused(
                f"{path} is not written: there are {len(files)} files, at most {self._num_files}"
                f" are allowed; write over one of them: {', '.join(files[:8])}"
            )
        with _reasons(path, "written"), self._open_folder(parts[:-1], make=True) as folder:
            # A new file put in place: what a link of that name points at is not touched, and nobody
            # reads half a file.
            temporary = f".{secrets.token_hex(8)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o644, dir_fd=folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                os.replace(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise

    def read(self, path: str) -> str:
        """A file's text.

        Raises:
            Refused: the path is not allowed, or there is no such file.
            MachineError: it cannot be read.
        """
        parts = split_path(path)
        with _reasons(path, "read"), self._open_folder(parts[:-1], make=False) as folder:
            # O_NONBLOCK: opening a pipe would wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(parts[-1], flags, dir_fd=folder), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise Refused(f"{path} is not read: it is no regular file; write it first")
                data = file.read(self._file_bytes + 1)
        if len(data) > self._file_bytes:
            raise Refused(f"{path} is not read: it has more than {self._file_bytes} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise Refused(
                f"{path} is not read: no UTF-8 at byte {error.start}; write it again"
            ) from error

    def files(self) -> list[str]:
        """The paths of all .lean files, in order; links are not followed."""
        if self._root < 0:
            raise InputError("tools: the work folder is closed; make another Toolbox")
        found: list[str] = []
        self._list(self._root, "", found, _MAX_PARTS)
        return sorted(found)

    def _list(self, folder: int, prefix: str, found: list[str], depth: int) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and entry.name.endswith(".lean"):
                    found.append(prefix + entry.name)
                elif depth > 1 and entry.is_dir(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # just gone
                        below = os.open(entry.name, _FOLDER, dir_fd=folder)
                        try:
                            self._list(below, f"{prefix}{entry.name}/", found, depth - 1)
                        finally:
                            os.close(below)

    @contextlib.contextmanager
    def _open_folder(self, parts: tuple[str, ...], *, make: bool) -> Iterator[int]:
        """Open the folder of a file, one component after the other."""
        if self._root < 0:
            raise InputError("tools: the work folder is closed; make another Toolbox")
        folder = os.dup(self._root)
        try:
            for part in parts:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=folder)
                below = os.open(part, _FOLDER, dir_fd=folder)
                os.close(folder)
                folder = below
            yield folder
        finally:
            os.close(folder)


@contextlib.contextmanager
def _reasons(path: str, verb: str) -> Iterator[None]:
    """Say what is wrong with the path; what is not the path's fault is the machine's."""
    try:
        yield
    except OSError as error:
        if error.errno in _FAULTS:
            raise Refused(
                f"{path} is not {verb}: {_FAULTS[error.errno]}; "
                + ("write it first, or name" if verb == "read" else "take")
                + " another path"
            ) from error
        raise MachineError(
            f"tools: {path} cannot be {verb} in the work folder ({error.strerror}); free disk space"
            " or take another folder"
        ) from error
