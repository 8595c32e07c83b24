"""Refined masks of slides, their windows under tiles, and patches with masks as batches."""

import dataclasses

import numpy as np
import pytest
import tifffile
from PIL import Image

from data_pipelines.annotations import AnnotationError, write_asap_xml
from data_pipelines.cohort import SlideRecord, read_columns
from data_pipelines.defocus import defocus, disc
from data_pipelines.lesion_masks import TileMasks, cut_masks, read_mask, refine, write_mask
from data_pipelines.masked_patches import MaskedPatchReader, MaskedTileReader, read_masks
from data_pipelines.patches import PatchesError, PatchReader, read_patches
from data_pipelines.polygons import Shape
from data_pipelines.pyramids import write_pyramid
from data_pipelines.shelf import Shelf
from data_pipelines.tiles import Grid, tile_slide
from data_pipelines.tissue import hed, otsu_threshold, stain_density, stain_threshold, tissue_mask

SIDE, MPP = 512, 0.5
PINK, GLASS = (200, 90, 170), (243, 243, 243)


def draw_slide(path, *, tissue=True):
    """Tissue in the left half of the slide."""
    rgb = np.full((SIDE, SIDE, 3), GLASS, np.uint8)
    if tissue:
        rgb[:, : SIDE // 2] = PINK
        rgb[::2, : SIDE // 2 : 2] = (150, 60, 140)
    return write_pyramid(path, rgb, mpp=MPP, compression="lzw")


def ring(x0, y0, x1, y1):
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], float)


def record(folder, annotation, **slide):
    path = folder / "slide.tiff"
    if not path.exists():
        draw_slide(path, **slide)
    return SlideRecord("slide", path, "malignant", "p", "train", MPP, annotation)


@pytest.fixture
def outlined(tmp_path):
    """An outline over tissue and glass, with a hole in the tissue: x 128 to 384, y 128 to 384 of level 0."""
    hole = ring(160, 160, 224, 224)
    shape = Shape("polygon", ring(128, 128, 384, 384), (hole,), name="a", group="lesion")
    write_asap_xml(tmp_path / "outline.xml", [shape])
    return record(tmp_path, tmp_path / "outline.xml")


def expected(cells):
    """The lesion on the slide's cells: inside the outline, on tissue, outside the hole."""
    y, x = (np.mgrid[:cells, :cells] + 0.5) * SIDE / cells
    inside = (x > 128) & (x < 384) & (y > 128) & (y < 384)
    hole = (x > 160) & (x < 224) & (y > 160) & (y < 224)
    return inside & ~hole & (x < SIDE / 2)


def test_glass_and_holes_are_no_lesion(outlined):
    found = refine(outlined, mpp=2.0)
    assert (found.mask.mpp, found.mask.downsample, found.mask.mask.shape) == (2.0, 4.0, (128, 128))
    wanted = expected(128)
    assert (found.mask.mask != wanted).mean() < 0.005  # cells that the rim of the tissue cuts
    area = (256**2 - 64**2) * (MPP / 1000) ** 2
    assert found.outlined_mm2 == pytest.approx(area, rel=1e-6)
    assert found.kept_mm2 == pytest.approx(found.mask.mask.sum() * 4e-6)
    kept, before = found.mask.mask.sum(), round(found.outlined_mm2 / 4e-6)
    assert found.dice == pytest.approx(2 * kept / (kept + before))


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("downsample", [1, 4, 16])
def test_mask_images_of_any_level_are_refined(tmp_path, kind, downsample):
    cells = SIDE // downsample
    y, x = (np.mgrid[:cells, :cells] + 0.5) * downsample
    values = (((x > 128) & (x < 384) & (y > 128) & (y < 384)) * 255).astype(np.uint8)
    path = tmp_path / f"mask.{kind}"
    if kind == "png":
        Image.fromarray(values).save(path)
    else:
        with tifffile.TiffWriter(path) as tif:
            tif.write(values, subifds=1)
            tif.write(values[::2, ::2], subfiletype=1)
    found = refine(record(tmp_path, path), mpp=downsample * MPP)
    assert found.mask.downsample == downsample
    wanted = (values > 0) & (x < SIDE / 2)
    assert (found.mask.mask != wanted).mean() < 0.02


def draw_mask(path, colour, *, second=None):
    """A square of one colour on black, and another of a second one."""
    image = np.zeros((64, 64, len(colour)), np.uint8)
    image[16:48, 16:48] = colour
    if len(colour) == 4:
        image[..., 3] = 255
    if second:
        image[:8, :8] = second
    Image.fromarray(image).save(path)


@pytest.mark.parametrize("colour", [(0, 255, 0), (255, 255, 255), (0, 0, 255, 255)])
def test_a_mask_may_be_of_any_one_colour(tmp_path, colour):
    draw_mask(tmp_path / "mask.png", colour)
    found = refine(record(tmp_path, tmp_path / "mask.png"), mpp=4.0)
    assert found.outlined_mm2 == pytest.approx(32**2 * 16e-6)
    assert read_mask(tmp_path / "mask.png").sum() == 32**2


def test_masks_that_tell_no_lesion_are_refused(tmp_path):
    path = tmp_path / "mask.png"
    draw_mask(path, (0, 255, 0), second=(255, 0, 0))
    with pytest.raises(AnnotationError, match="of several colours: write the tumour alone"):
        refine(record(tmp_path, path), mpp=4.0)
    Image.fromarray(np.zeros((50, 300), np.uint8)).save(path)
    with pytest.raises(AnnotationError, match="300 × 50 pixels, the slide 512 × 512"):
        refine(record(tmp_path, path), mpp=4.0)


def test_masks_larger_than_pictures_may_be_are_read(tmp_path, monkeypatch):
    draw_mask(tmp_path / "mask.png", (0, 255, 0))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert refine(record(tmp_path, tmp_path / "mask.png"), mpp=4.0).outlined_mm2 == pytest.approx(32**2 * 16e-6)
    assert read_mask(tmp_path / "mask.png").sum() == 32**2


def test_an_empty_mask_stays_empty(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "mask.png")
    found = refine(record(tmp_path, tmp_path / "mask.png"), mpp=4.0)
    assert not found.mask.mask.any() and (found.outlined_mm2, found.kept_mm2, found.dice) == (0, 0, 1)


def test_on_a_slide_without_tissue_nothing_is_kept(tmp_path):
    write_asap_xml(tmp_path / "outline.xml", [Shape("polygon", ring(10, 10, 200, 200), group="lesion")])
    found = refine(record(tmp_path, tmp_path / "outline.xml", tissue=False), mpp=2.0)
    assert found.outlined_mm2 > 0 and not found.mask.mask.any() and found.dice == 0


def test_what_cannot_be_refined_says_why(tmp_path):
    with pytest.raises(AnnotationError, match="slide: has no annotation to refine: fill the column"):
        refine(record(tmp_path, None), mpp=2.0)
    for name in ("mask.png", "mask.tiff"):
        (tmp_path / name).write_text("no picture")
        with pytest.raises(AnnotationError, match=rf"{name}: no mask image can be read"):
            read_mask(tmp_path / name)


def test_stain_threshold_is_that_of_the_tissue_mask():
    rng = np.random.default_rng(0)
    rgb = np.full((40, 40, 3), 240, np.uint8)
    rgb[:20] = rng.integers((150, 60, 120), (220, 140, 200), (20, 40, 3))
    threshold = stain_threshold(rgb)
    np.testing.assert_array_equal(stain_density(rgb) > threshold, tissue_mask(rgb, "stain"))
    assert threshold == otsu_threshold(hed(rgb)[..., 0] + hed(rgb)[..., 1])
    assert stain_threshold(np.full((8, 8, 3), 240, np.uint8)) is None


@pytest.mark.parametrize("name", ["m.png", "m.tiff"])
def test_masks_go_to_disk_and_back(tmp_path, name):
    mask = np.random.default_rng(0).random((37, 50)) < 0.3
    write_mask(tmp_path / name, mask)
    np.testing.assert_array_equal(read_mask(tmp_path / name), mask)
    with Image.open(tmp_path / name) as image:
        assert image.mode == "1"


def test_a_refined_mask_is_an_annotation_again(outlined, tmp_path):
    """Of the slide's own foreground nothing more is cut away."""
    first = refine(outlined, mpp=2.0)
    write_mask(tmp_path / "refined.tiff", first.mask.mask)
    again = refine(dataclasses.replace(outlined, annotation=tmp_path / "refined.tiff"), mpp=2.0)
    np.testing.assert_array_equal(again.mask.mask, first.mask.mask)
    assert again.dice == 1


def tiles_of(grid):
    tissue = np.ones((128, 128), bool)
    return tile_slide(
        "slide", width=SIDE, height=SIDE, slide_mpp=MPP, grid=grid, tissue=tissue, mask_downsample=4.0, min_tissue=0
    )


def test_windows_of_a_mask_lie_under_their_tiles():
    """Against drawing the tile's own pixels from the mask, one by one."""
    mask = np.random.default_rng(2).random((128, 128)) < 0.5
    mask[:40] = False
    tiles = tiles_of(Grid(tile=64, stride=48, mpp=1.0))
    found = cut_masks(tiles, mask, downsample=4.0, side=32)
    for row in range(len(tiles)):
        x, y = tiles.x[row] + (np.arange(64) + 0.5) * 2, tiles.y[row] + (np.arange(64) + 0.5) * 2
        rows, columns = (y / 4).astype(int), (x / 4).astype(int)
        inside = (rows < 128)[:, None] & (columns < 128)[None]
        slow = mask[np.minimum(rows, 127)][:, np.minimum(columns, 127)] & inside
        np.testing.assert_array_equal(found.mask(row, 64), slow)
        assert found.share[row] == pytest.approx(slow.mean())
    assert (found.place[tiles.y + 128 <= 160] == -1).all()  # the empty top needs no bits


def test_tables_of_masks_join(tmp_path):
    tiles = tiles_of(Grid(tile=64, stride=64, mpp=1.0))
    mask = np.random.default_rng(3).random((128, 128)) < 0.5
    both = [cut_masks(tiles, None, downsample=1, side=32), cut_masks(tiles, mask, downsample=4, side=32)]
    joined = TileMasks.concatenate([*both, both[1]])
    for row in range(len(tiles)):
        assert not joined.mask(row, 32).any()
        for copy in (1, 2):
            np.testing.assert_array_equal(joined.mask(copy * len(tiles) + row, 32), both[1].mask(row, 32))


def test_tiles_come_with_their_lesion(outlined):
    refined = refine(outlined, mpp=1.0)
    tiles = tiles_of(Grid(tile=64, stride=64, mpp=1.0))
    masks = cut_masks(tiles, refined.mask.mask, downsample=refined.mask.downsample, side=64)
    shelf = Shelf([outlined])
    label = (masks.share > 0).astype(np.float32)
    batch = MaskedTileReader(tiles, shelf, masks, label).read(np.arange(len(tiles)), size=len(tiles) + 1)
    shelf.close()
    arrays = batch.arrays
    assert not batch.failed and arrays["weight"].tolist() == [1] * len(tiles) + [0] and arrays["row"][-1] == -1
    whole = np.zeros((256, 256), np.uint8)
    for row in range(len(tiles)):
        left, top = tiles.u[row], tiles.v[row]
        whole[top : top + 64, left : left + 64] = arrays["mask"][row]
        stained = arrays["image"][row].mean(-1) < 200
        assert (arrays["mask"][row] <= stained).mean() > 0.98
    assert (whole.astype(bool) != expected(256)).mean() < 0.01
    np.testing.assert_array_equal(arrays["label"][:-1], label)


def test_slides_that_cannot_be_read_count_for_nothing(tmp_path):
    tiles = tiles_of(Grid(tile=64, stride=64, mpp=1.0))
    gone = SlideRecord("slide", tmp_path / "gone.tiff", "malignant", "p")
    masks = cut_masks(tiles, np.ones((128, 128), bool), downsample=4, side=32)
    batch = MaskedTileReader(tiles, Shelf([gone]), masks, np.ones(len(tiles))).read(np.array([0, 3]), size=2)
    assert set(batch.failed) == {0, 3} and "gone.tiff" in batch.failed[0]
    assert not batch.arrays["weight"].any() and not batch.arrays["mask"].any()


def write_list(folder, rows, header="path,label,mask"):
    for name in ("a", "b", "c"):
        Image.fromarray(np.full((40, 60, 3), 100, np.uint8)).save(folder / f"{name}.png")
    mask = np.zeros((40, 60), np.uint8)
    mask[:20] = 7  # instances are numbered
    Image.fromarray(mask).save(folder / "a_mask.png")
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(folder / "b_mask.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(folder / "small.png")
    (folder / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder / "list.csv"


def test_listed_patches_come_with_their_masks(tmp_path):
    """Resized alike; an empty mask and no mask are no lesion, whatever the label."""
    listing = write_list(tmp_path, ["a.png,malignant,a_mask.png", "b.png,malignant,b_mask.png", "c.png,benign,"])
    patches = read_patches(listing)
    reader = MaskedPatchReader(PatchReader(patches, np.array([1, 1, 0.0]), 32), read_masks(listing, patches))
    batch = reader.read(np.array([0, 1, 2]), size=4)
    assert batch.arrays["mask"].shape == (4, 32, 32) and batch.arrays["mask"].dtype == np.uint8
    np.testing.assert_array_equal(batch.arrays["mask"][0], np.arange(32)[:, None] // 16 < 1 + np.zeros((32, 32)))
    assert not batch.arrays["mask"][1:].any()
    assert batch.arrays["label"].tolist() == [1, 1, 0, 0] and batch.arrays["weight"].tolist() == [1, 1, 1, 0]


def test_a_mask_of_another_size_leaves_its_patch_out(tmp_path):
    listing = write_list(tmp_path, ["a.png,malignant,small.png", "c.png,benign,"])
    patches = read_patches(listing)
    reader = MaskedPatchReader(PatchReader(patches, np.array([1, 0.0]), 32), read_masks(listing, patches))
    batch = reader.read(np.array([0, 1]), size=2)
    assert batch.arrays["weight"].tolist() == [0, 1]
    assert "a mask of 8 x 8 pixels for an image of 60 x 40" in batch.failed[0]


def test_lists_without_masks_are_refused(tmp_path):
    listing = write_list(tmp_path, ["a.png,malignant"], header="path,label")
    with pytest.raises(PatchesError, match=r"list\.csv: has no column mask: add it"):
        read_masks(listing, read_patches(listing))
    listing = write_list(tmp_path, ["a.png,malignant,nowhere.png"])
    with pytest.raises(PatchesError, match=r"line 2: there is no file .*nowhere\.png"):
        read_masks(listing, read_patches(listing))


def test_other_columns_of_a_cohort_are_read_beside_it(tmp_path):
    (tmp_path / "c.csv").write_text("slide_id,path,label,Site,year\na,a.tiff,x,SGH,2018\nb,b.tiff,y,,\n")
    assert read_columns(tmp_path / "c.csv", ("site", "year", "subtype")) == {
        "a": {"site": "SGH", "year": "2018"},
        "b": {"site": "", "year": ""},
    }


def test_defocus_is_a_mean_over_a_disc():
    assert disc(0.3).shape == (1, 1) and disc(2).shape == (5, 5)
    for radius in (2.5, 6.0):
        kernel = disc(radius)
        assert kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel.T)
        reach = len(kernel) // 2
        second = (kernel * (np.arange(-reach, reach + 1) ** 2)[None]).sum()
        assert second == pytest.approx(radius**2 / 4 + 1 / 12, rel=0.03)  # a disc's second moment, and a pixel's


@pytest.mark.parametrize("radius", [1.5, 5.0])
def test_a_point_becomes_a_disc(radius):
    image = np.zeros((31, 31, 3), np.uint8)
    image[15, 15] = 255
    reach = len(disc(radius)) // 2
    wanted = np.zeros((31, 31))
    wanted[15 - reach : 16 + reach, 15 - reach : 16 + reach] = 255 * disc(radius)
    assert np.abs(defocus(image, radius)[..., 0] - wanted).max() <= 0.5 + 1e-6
    flat = np.full((9, 9, 3), 77, np.uint8)
    np.testing.assert_array_equal(defocus(flat, radius), flat)
    assert defocus(image, 0) is image
