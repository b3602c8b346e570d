"""Theorem sets through the package `datasets`: `hf:OWNER/NAME`, or `hf:` and a folder."""

from collections.abc import Iterator

from fdfast.data.records import Record
from fdfast.errors import InputError, MachineError

PREFIX = "hf:"


def read_hub(name: str) -> Iterator[tuple[str, str, Record]]:
    """Yield (place, split, record) of every split of a data set.

    Args:
        name: `hf:OWNER/NAME`, with `@REVISION` behind for a fixed version; or `hf:FOLDER`, one that
            `datasets` can load without the network.

    Raises:
        InputError: there is no such data set, or `datasets` cannot load it.
        MachineError: `datasets` is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise MachineError(
            f"{name}: data sets of the hub need the package datasets ({error});"
            " run: pip install 'fdfast[data]'"
        ) from error
    path, _, revision = name.removeprefix(PREFIX).partition("@")
    if not path.strip():
        raise InputError(f"{name}: a data set is named hf:OWNER/NAME")
    try:
        loaded = datasets.load_dataset(path, revision=revision or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{name}: cannot be loaded ({' '.join(str(error).split())[:300]}); check the name and"
            " the network, or download its file and name that"
        ) from error
    for split, rows in loaded.items():
        for index, record in enumerate(rows):
            yield f"{name}/{split}[{index}]", str(split), record
