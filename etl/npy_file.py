"""Arrays of unknown length written to `.npy` files block by block. numpy only."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray


class NpyFile:
    """Appends rows; `close` leaves the bytes that np.save of all of them would."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row_shape: tuple[int, ...] = ()) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._dtype, self._row_shape = dtype, row_shape
        self._count = 0
        self._write_header()

    def append(self, rows: NDArray[Any]) -> None:
        """Rows [n, *row_shape] of the file's dtype."""
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._count += len(rows)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        """numpy leaves room in it for any number of rows."""
        header = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._count, *self._row_shape),
        }
        npy.write_array_header_1_0(self._file, header)


def write_npy(path: Path, array: NDArray[Any]) -> None:
    """The bytes of np.save, whose error on a full disk does not say that the disk is full."""
    file = NpyFile(path, array.dtype, array.shape[1:])
    file.append(array)
    file.close()
