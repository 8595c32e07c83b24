"""Rows in a file: written in any order, found in theirs, still there for the next process."""

import errno

import numpy as np
import pytest

from data_pipelines.files import OutputError
from data_pipelines.row_files import RowFile


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_written_in_any_order_are_read_in_theirs(tmp_path, dtype):
    rng = np.random.default_rng(0)
    table = rng.random((100, 7)).astype(dtype)
    file = RowFile(tmp_path / "new" / "a.rows", 100, 7, dtype)
    assert not file.exists
    file.create()
    for rows in np.array_split(rng.permutation(100), 9):
        file.write(rows, table[rows])
    file.sync()
    again = RowFile(tmp_path / "new" / "a.rows", 100, 7, dtype)
    np.testing.assert_array_equal(again.read(0, 100), table)
    np.testing.assert_array_equal(again.read(31, 40), table[31:40])
    again.remove()
    assert not file.exists and not list((tmp_path / "new").iterdir())


def test_a_file_of_this_size_is_kept_and_another_is_made_anew(tmp_path):
    file = RowFile(tmp_path / "a.rows", 4, 2, "float32")
    file.create()
    file.write(np.array([3]), np.ones((1, 2), np.float32))
    file.create()
    assert file.read(3, 4).tolist() == [[1, 1]]
    wider = RowFile(tmp_path / "a.rows", 4, 3, "float32")
    assert file.exists and not wider.exists
    wider.create()
    assert wider.exists and not wider.read(0, 4).any()


def test_rows_of_another_shape_or_type_are_refused(tmp_path):
    file = RowFile(tmp_path / "a.rows", 4, 2, "float32")
    file.create()
    for values in (np.ones((1, 3), np.float32), np.ones((2, 2), np.float32), np.ones((1, 2))):
        with pytest.raises(ValueError, match=r"a\.rows: rows need float32 \[1, 2\]"):
            file.write(np.array([0]), values)
    file.write(np.zeros(0, int), np.zeros((0, 2), np.float32))


def test_a_full_disk_is_said_with_its_cure(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = RowFile(tmp_path / "a.rows", 4, 2, "float32")
    file.create()
    monkeypatch.setattr("data_pipelines.row_files.open", full, raising=False)
    with pytest.raises(OutputError, match=r"a\.rows: No space left on device; free space there"):
        file.write(np.array([0]), np.ones((1, 2), np.float32))
