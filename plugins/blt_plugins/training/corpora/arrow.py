"""pyarrow, which the extra ``data`` installs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blt_core.errors import DataError


def arrow() -> Any:
    """The module; DataError with the fix where it is not installed."""
    try:
        import pyarrow.ipc
        import pyarrow.types
    except ImportError as error:
        raise DataError(
            "Parquet and Arrow files need pyarrow.   fix: pip install 'blt-core[data]'"
        ) from error
    return pyarrow


@contextlib.contextmanager
def arrow_errors(path: Path | str) -> Iterator[None]:
    """Raise DataError, naming ``path``, for a file that cannot be read."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read: {reason}") from error
    except arrow().ArrowException as error:
        raise DataError(f"{path}: damaged: {str(error).splitlines()[0]}") from error
