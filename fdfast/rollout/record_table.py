"""Records as rows of a Parquet file: columns of lists and structs, as pandas, polars and datasets
read them."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fdfast.errors import InputError, MachineError
from fdfast.files import atomic_file
from fdfast.rollout.record_fields import FIELDS

# Rows in memory at once: one of 8192 ids takes about a megabyte.
_ROWS = 128
_SCALARS = {"text": "string", "int": "int64", "id": "int32", "number": "float64", "flag": "bool_"}


def need_pyarrow(path: Path) -> Any:
    """The module `pyarrow`, with `pyarrow.parquet` loaded.

    Raises:
        MachineError: it is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MachineError(
            f"{path}: .parquet files need pyarrow ({error}); run: pip install 'fdfast[data]'"
        ) from error
    return pyarrow


def _arrow_type(pyarrow: Any, spec: Any) -> Any:
    """The column type of a spec of `record_fields`."""
    if isinstance(spec, tuple):
        return _arrow_type(pyarrow, spec[0])
    if isinstance(spec, list):
        return pyarrow.list_(_arrow_type(pyarrow, spec[0]))
    if isinstance(spec, dict):
        return pyarrow.struct([(name, _arrow_type(pyarrow, s)) for name, s in spec.items()])
    if isinstance(spec, frozenset):
        return pyarrow.string() if isinstance(next(iter(spec)), str) else pyarrow.int64()
    return getattr(pyarrow, _SCALARS[spec])()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows that fit `FIELDS`; the file is whole or not there.

    Raises:
        MachineError: pyarrow is missing.
    """
    pyarrow = need_pyarrow(path)
    schema = pyarrow.schema([(name, _arrow_type(pyarrow, spec)) for name, spec in FIELDS.items()])
    rows = iter(rows)
    with (
        atomic_file(path) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, compression="zstd") as file,
    ):
        while chunk := list(itertools.islice(rows, _ROWS)):
            file.write_table(pyarrow.Table.from_pylist(chunk, schema=schema))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with its place, `FILE[ROW]` from 0.

    Raises:
        InputError: no such file, or no Parquet file.
        MachineError: pyarrow is missing.
    """
    pyarrow = need_pyarrow(path)
    count = itertools.count()
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for row in batch.to_pylist():
                    yield f"{path}[{next(count)}]", row
    except OSError as error:  # FileNotFoundError has a strerror, a broken file only words
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: is no parquet file ({error})") from error
