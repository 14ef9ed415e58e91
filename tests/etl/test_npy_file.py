import numpy as np
import pytest

from etl.manifest import DOCUMENT_DTYPE
from etl.npy_file import NpyFile


@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("dtype", ["<u2", "<i4", DOCUMENT_DTYPE])
def test_blocks_leave_the_bytes_of_saving_all_at_once(tmp_path, dtype, shape):
    dtype = np.dtype(dtype)
    rows = np.frombuffer(np.random.default_rng(0).bytes(1200 * 3 * dtype.itemsize), dtype)
    rows = rows.reshape(-1, *shape)
    file = NpyFile(tmp_path / "a.npy", dtype, shape)
    for start in range(0, len(rows), 700):
        file.append(rows[start : start + 700])
    file.close()
    np.save(tmp_path / "b.npy", rows)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
