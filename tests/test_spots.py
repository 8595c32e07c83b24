"""Places of patches: the sampling rule of He & Li 2023, lists of coordinates, and the masks they are drawn from."""

import collections

import numpy as np
import pytest

from data_pipelines.annotations import write_asap_xml
from data_pipelines.cohort import SlideRecord
from data_pipelines.pyramids import write_pyramid
from data_pipelines.slides import open_slide
from data_pipelines.spots import (
    MASK_MPP,
    SpotsError,
    cut_patch,
    find_regions,
    inner,
    keep_apart,
    read_spots,
    sample_spots,
)
from tests.programs import square

LISTS = ("train_bad", "train_good", "test_bad", "test_good")


def test_the_worked_places():
    points = np.array([(0, 0), (128, 0), (100, 100), (64, 200)], float)
    np.testing.assert_array_equal(keep_apart(points, 128), points[[0, 1, 3]])


def test_inner_pixels_have_all_four_diagonal_neighbours():
    random = np.random.default_rng(0)
    mask = random.random((12, 9)) < 0.8
    expected = np.zeros_like(mask)
    for y in range(2, 10):
        for x in range(2, 7):
            expected[y, x] = all(mask[y + dy, x + dx] for dy in (-2, 2) for dx in (-2, 2))
    np.testing.assert_array_equal(inner(mask), expected)


@pytest.mark.parametrize("count", [1, 20, 10_000])
def test_sampled_places_are_inside_and_apart(count):
    mask = np.zeros((60, 80), bool)
    mask[5:50, 30:75] = True
    mask[20, 40] = False
    random = np.random.default_rng(0)
    x, y = sample_spots(mask, count, downsample=64.0, spacing=128.0, random=random)
    assert 1 <= len(x) <= count and not (x % 64).any() and not (y % 64).any()
    assert (mask & inner(mask))[(y / 64).astype(int), (x / 64).astype(int)].all()
    close = (np.abs(x[:, None] - x) < 128) & (np.abs(y[:, None] - y) < 128)
    np.testing.assert_array_equal(close, np.eye(len(x), dtype=bool))
    again = sample_spots(mask, count, downsample=64.0, spacing=128.0, random=np.random.default_rng(0))
    np.testing.assert_array_equal(again[0], x)
    if count == 20:  # refills make up for what was too close
        assert len(x) == 20


def test_a_mask_without_room_gives_no_place():
    x, y = sample_spots(np.ones((4, 4), bool), 5, downsample=64.0, spacing=128.0, random=np.random.default_rng(0))
    assert len(x) == len(y) == 0


def test_lists_are_read_and_slides_found_whatever_their_capitals(tmp_path):
    (tmp_path / "list.txt").write_text("tumor_001,70592,125632\n\ntumor_002,64,128.5\n")
    spots = read_spots(tmp_path / "list.txt")
    assert len(spots) == 2 and spots.y.tolist() == [125632, 128.5]
    assert spots.of("Tumor_001").x.tolist() == [70592] and len(spots.of("Tumor_003")) == 0
    for text, words in (("a,1,2\nb,3\n", "line 2: 'b,3'"), ("a,1,x\n", "line 1"), ("\n", "holds no line")):
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(SpotsError, match=words):
            read_spots(tmp_path / "list.txt")


def test_the_released_lists_keep_the_rule(shared_data):
    """All multiples of 64, and apart as the rule says; as many as the card counts."""
    counts = {"train_bad": 1001, "train_good": 5000, "test_bad": 10842, "test_good": 9856}
    for name in LISTS:
        spots = read_spots(shared_data / "reference" / f"fwrd_camelyon16_coords_{name}.txt")
        assert len(spots) == counts[name] and not (spots.x % 64).any() and not (spots.y % 64).any()
        slide, of_slide = collections.Counter(spots.slide_id).most_common()[-1]
        mine = spots.of(slide)
        assert len(mine) == of_slide
        points = np.stack([mine.x, mine.y], axis=1)
        assert len(keep_apart(points, 128)) == len(points)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A slide of 1600 px at 1 µm: pink tissue on white, and an annotated square of tumour in it."""
    folder = tmp_path_factory.mktemp("slide")
    image = np.full((1600, 1600, 3), 243, np.uint8)
    noise = np.random.default_rng(0).integers((180, 80, 140), (230, 130, 190), (1000, 1000, 3))
    image[300:1300, 300:1300] = noise
    write_pyramid(folder / "a.tiff", image, mpp=1.0, compression="lzw")
    write_asap_xml(folder / "a.xml", [square(400, 500, side=500.0)])
    return SlideRecord("a", folder / "a.tiff", "tumour", "p", "train", annotation=folder / "a.xml")


def test_regions_of_a_slide(slide):
    regions = find_regions(slide)
    assert regions.annotated and regions.downsample == pytest.approx(MASK_MPP)
    assert regions.tissue.mean() == pytest.approx((1000 / 1600) ** 2, rel=0.05)
    assert regions.tumour.mean() == pytest.approx((500 / 1600) ** 2, rel=0.05)
    assert not (regions.normal & regions.tumour).any() and regions.normal.any()


def test_a_patch_is_cut_around_its_centre(slide):
    with open_slide(slide.path) as opened:
        patch = cut_patch(opened, 300, 800, side=64, mpp=1.0)
    assert patch.shape == (64, 64, 3)
    white = (patch > 235).all(axis=2)
    assert white[:, :32].all() and not white[:, 32:].any()
