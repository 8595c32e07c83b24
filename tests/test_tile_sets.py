"""Sets of tiles: what is written comes back as the same table and the same pixels, and reading needs no TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines import tile_sets
from data_pipelines.files import OutputError
from data_pipelines.patches import PatchesError, PatchReader, read_patches, write_patches
from data_pipelines.tile_sets import TileSetError, is_tile_set, read_tile, write_tile_set


def save_images(folder):
    """Nine images in three formats, their numbers as shades; their files, and the shade of each."""
    folder.mkdir()
    files = [folder / f"{n}.{'png' if n < 3 else 'tif' if n < 6 else 'jpg'}" for n in range(9)]
    for n, file in enumerate(files):
        Image.fromarray(np.full((8, 6 + n, 3), 20 * n, np.uint8)).save(file)
    return files


KNOWN = {
    "label": ["tumour", "normal", "normal"] * 3,
    "slide_id": [f"slide {n // 2}" for n in range(9)],
    "patient_id": [f"p{n // 4}" for n in range(9)],
    "split": ["train"] * 5 + ["test"] * 4,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    files = save_images(root / "images")
    return write_tile_set(root / "sets", "my_tiles", path=files, **KNOWN)


def test_the_table_comes_back(written):
    for path in (written, written.parent):
        patches = read_patches(path)
        by_shade = dict(zip(shades(patches), range(9)))
        order = [by_shade[20 * n] for n in range(9)]
        for name, values in KNOWN.items():
            assert getattr(patches, name)[order].tolist() == values


def shades(patches):
    reader = PatchReader(patches, np.zeros(len(patches)), side=8)
    batch = reader.read(np.arange(len(patches)), size=len(patches))
    assert not batch.failed
    image = batch.arrays["image"]
    assert (image == image[:, :1, :1, :1]).all()
    return image[:, 0, 0, 0].tolist()


def test_lists_may_name_patches_of_a_set(written, tmp_path):
    patches = read_patches(written)
    write_patches(tmp_path / "list.csv", patches.take(np.array([4, 2])))
    assert shades(read_patches(tmp_path / "list.csv")) == [shades(patches)[4], shades(patches)[2]]
    gone = patches.path[0].with_name("99.tile")
    with pytest.raises(OSError, match="no patch 99 in the split"):
        read_tile(gone)


def test_without_splits_there_are_none(tmp_path):
    files = save_images(tmp_path / "images")
    patches = read_patches(write_tile_set(tmp_path, "plain", path=files, label=KNOWN["label"]))
    assert set(patches.split) == {""} and set(patches.slide_id) == {""}
    with pytest.raises(OutputError, match=r"plain.*there already"):
        write_tile_set(tmp_path, "plain", path=files, label=KNOWN["label"])


def test_reading_needs_no_tensorflow(written):
    code = (
        "import sys, numpy as np; from data_pipelines.patches import PatchReader, read_patches;"
        f"p = read_patches({str(written)!r}); b = PatchReader(p, np.zeros(9), 8).read(np.arange(9), size=9);"
        "assert b.arrays['weight'].sum() == 9; sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_cannot_be_a_set_is_refused(tmp_path, monkeypatch):
    files = save_images(tmp_path / "images")
    with pytest.raises(TileSetError, match="'My Tiles' is no name"):
        write_tile_set(tmp_path, "My Tiles", path=files, label=KNOWN["label"])
    files[4].write_text("no image")
    with pytest.raises(TileSetError, match=r"4\.tif: no image"):
        write_tile_set(tmp_path, "broken", path=files, label=KNOWN["label"])
    assert not is_tile_set(tmp_path / "broken")

    def unreachable(name):
        raise TileSetError(f"{name}: it is not on this disk and cannot be downloaded")

    monkeypatch.setattr(tile_sets, "_public_folder", unreachable)
    with pytest.raises(PatchesError, match="patch_camelyon: it is not on this disk"):
        read_patches("patch_camelyon")
