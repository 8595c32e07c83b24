"""Folders of annotated images with everything that goes wrong in them, folds, masks, crops, regions of slides."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.annotations import AnnotationWarning
from data_pipelines.boxes import Boxes, BoxesError, read_boxes, write_boxes
from data_pipelines.cell_crops import CropReader, CropSampler, CropSource, crop_batches
from data_pipelines.cell_images import (
    ANNOTATED,
    NORMAL,
    assign_folds,
    check_groups,
    load_image,
    read_cell_images,
    read_groups,
    read_unlabelled,
)
from data_pipelines.cell_masks import draw_cells, read_mask, write_mask
from data_pipelines.cell_regions import draw_regions, regions_around

NAME = "2018 a-lv0-1-2-60-50"


def picture(path, width=60, height=50, *, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def annotate(path, *boxes):
    given = Boxes(np.array(boxes, float).reshape(-1, 4), np.full(len(boxes), np.nan))
    write_boxes(path, given, image=path.stem, width=60, height=50)


def raw(path, *boxes):
    corners = ("xmin", "ymin", "xmax", "ymax")
    items = ["".join(f"<{c}>{v}</{c}>" for c, v in zip(corners, box)) for box in boxes]
    path.write_text(
        "<annotation>"
        + "".join(f"<object><name>c</name><bndbox>{i}</bndbox></object>" for i in items)
        + "</annotation>"
    )


@pytest.fixture
def folder(tmp_path):
    """DigestPath's layout: two annotated images of one slide and differing size, one image without cells."""
    picture(tmp_path / "sig-train-pos" / f"{NAME}.jpeg")
    annotate(tmp_path / "sig-train-pos" / f"{NAME}.xml", (5, 5, 20, 25), (5, 5, 20, 25), (30, 10, 45, 30))
    picture(tmp_path / "sig-train-pos" / "2018 a-lv0-9-9-40-80.png", 40, 80)
    annotate(tmp_path / "sig-train-pos" / "2018 a-lv0-9-9-40-80.xml", (2, 2, 20, 20))
    picture(tmp_path / "sig-train-neg" / "other.png")
    return tmp_path


def test_digestpaths_layout_with_spaces_and_differing_sizes(folder):
    found = read_cell_images(folder)
    assert not found.left_out and not found.notes
    assert [(i.name, i.kind, i.width, i.height, len(i.boxes)) for i in found.images] == [
        (NAME, ANNOTATED, 60, 50, 3), ("2018 a-lv0-9-9-40-80", ANNOTATED, 40, 80, 1), ("other", NORMAL, 60, 50, 0),
    ]  # fmt: skip
    assert [image.slide_id for image in found.images] == ["2018 a", "2018 a", "other"]
    assert load_image(found.images[1]).shape == (80, 40, 3)


def test_boxes_at_borders_reversed_of_no_area_and_outside(folder):
    raw(
        folder / "sig-train-pos" / f"{NAME}.xml",
        (-5, -5, 10, 10),
        (50, 40, 70, 60),
        (20, 25, 5, 5),
        (9, 9, 9, 20),
        (90, 90, 99, 99),
    )
    with pytest.warns(AnnotationWarning, match="without an area"):
        found = read_cell_images(folder)
    np.testing.assert_array_equal(found.images[0].boxes, [[0, 0, 10, 10], [50, 40, 60, 50], [5, 5, 20, 25]])
    assert len(found.notes) == 1 and "1 of 4 boxes lie outside" in found.notes[0]


def test_files_that_do_not_fit_are_left_out_and_told(folder):
    positive, negative = folder / "sig-train-pos", folder / "sig-train-neg"
    annotate(positive / "no image.xml", (1, 1, 9, 9))
    picture(positive / "no annotation.png")
    picture(positive / "outside.png")
    annotate(positive / "outside.xml", (100, 100, 120, 120))
    (positive / "broken.png").write_bytes(b"\x89PNG nothing")
    annotate(positive / "broken.xml", (1, 1, 9, 9))
    picture(positive / "bad.png")
    (positive / "bad.xml").write_text("<annotation><object>")
    picture(negative / "both.png")
    annotate(negative / "both.xml", (1, 1, 9, 9))
    found = read_cell_images(folder)
    reasons = {file.rsplit("/", 1)[1]: reason for file, reason in found.left_out.items()}
    for file, words in {
        "no image.xml": "has no image of its name",
        "no annotation.png": "images without cells belong in sig-train-neg",
        "outside.png": "all its boxes lie outside",
        "broken.png": "cannot be read",
        "bad.png": "broken XML",
        "both.png": "it can be only one",
    }.items():
        assert words in reasons.pop(file)
    assert not reasons and len(found.images) == 3


def test_an_annotation_without_boxes_is_an_image_without_cells(folder):
    picture(folder / "sig-train-pos" / "looked at.png")
    annotate(folder / "sig-train-pos" / "looked at.xml")
    found = read_cell_images(folder)
    assert [i.name for i in found.of(NORMAL)] == ["looked at", "other"] and "no box" in found.notes[0]


def test_a_flat_folder_and_what_cannot_be_used(folder, tmp_path):
    assert len(read_cell_images(folder / "sig-train-pos").images) == 2
    with pytest.raises(BoxesError, match="no such folder"):
        read_cell_images(tmp_path / "nowhere")
    with pytest.raises(
        BoxesError, match=r"none of 1 files is an image with an annotated box; other.png: has no annotation"
    ):
        read_cell_images(folder / "sig-train-neg")
    picture(folder / "sig-train-neg" / f"{NAME}.png")
    with pytest.raises(BoxesError, match=f"two images are called {NAME}"):
        read_cell_images(folder)


def test_two_annotations_of_an_image_are_refused(folder):
    (folder / "sig-train-pos" / f"{NAME}.json").write_text("{}")
    with pytest.raises(BoxesError, match=f"two files for the image {NAME}, {NAME}.json and {NAME}.xml: keep one"):
        read_cell_images(folder)


def test_unlabelled_folders(folder, tmp_path):
    assert [image.name for image in read_unlabelled(folder / "sig-train-neg").images] == ["other"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(BoxesError, match="holds no image"):
        read_unlabelled(tmp_path / "empty")


def test_real_crops_are_read_whole(shared_data):
    found = read_cell_images(shared_data / "patches" / "digestpath_signet_ring" / "gt")
    assert [len(image.boxes) for image in found.images] == [64, 40, 50] and not found.left_out
    assert {image.slide_id for image in found.images} == {"2018_64982_1-3_2019-02-25 21_57_36"}
    assert load_image(found.images[0], reduce=4).shape == (2010 // 4, 2003 // 4, 3)


def test_written_boxes_come_back(tmp_path):
    boxes = Boxes(np.array([[1.5, 2, 9.2, 8], [0, 0, 4, 4]]), np.array([0.25, np.nan]))
    write_boxes(tmp_path / "a.xml", boxes, image="a.png", width=60, height=50)
    found = read_boxes(tmp_path / "a.xml")
    np.testing.assert_array_equal(found.box, [[1, 2, 10, 8], [0, 0, 4, 4]])
    np.testing.assert_array_equal(found.score, [0.25, np.nan])


def test_folds_by_image_and_by_group():
    names = [f"s{n // 4}-lv0-{n}" for n in range(24)]
    kinds = [ANNOTATED if n % 4 else NORMAL for n in range(24)]
    easy = assign_folds(names, kinds, {}, folds=3, mode="easy", seed=0)
    for kind in (ANNOTATED, NORMAL):
        assert np.bincount(easy[np.array(kinds) == kind], minlength=3).tolist() in ([6, 6, 6], [2, 2, 2])
    hard = assign_folds(names, kinds, {}, folds=3, mode="hard", seed=0)
    assert all(len(set(hard[n : n + 4])) == 1 for n in range(0, 24, 4)) and set(hard) == {0, 1, 2}
    np.testing.assert_array_equal(hard, assign_folds(names, kinds, {}, folds=3, mode="hard", seed=0))


def test_organs_join_slides_and_too_few_groups_are_refused():
    names = ["a", "b", "c", "d"]
    groups = {
        "a": {"organ": "colon", "split": "test"},
        "b": {"organ": "colon", "patient_id": "p"},
        "c": {"patient_id": "p"},
    }
    fold = assign_folds(names, [ANNOTATED] * 4, groups, folds=2, mode="hard", seed=0)
    assert fold[0] == fold[1] == fold[2] != fold[3]
    with pytest.raises(BoxesError, match="3 folds of 4 images from 2 independent groups"):
        assign_folds(names, [ANNOTATED] * 4, groups, folds=3, mode="hard", seed=0)


def test_tables_of_groups(tmp_path):
    (tmp_path / "g.csv").write_text("image,organ,other\na b,colon,x\n")
    assert read_groups(tmp_path / "g.csv") == {"a b": {"organ": "colon"}}
    (tmp_path / "g.csv").write_text("image,slide_id,split\nx/a.png,,Test\nb.svs.xml,s,\n")
    assert read_groups(tmp_path / "g.csv") == {"a": {"split": "test"}, "b": {"slide_id": "s"}}
    (tmp_path / "g.csv").write_text("image,split\na.png,test\na.xml,train\n")
    with pytest.raises(BoxesError, match=r"g.csv: two rows of the image a say different things"):
        read_groups(tmp_path / "g.csv")
    (tmp_path / "g.csv").write_text("image,split\na.png,held out\n")
    with pytest.raises(BoxesError, match=r"g.csv: the split of a is 'held out': give one of train, validation, test"):
        read_groups(tmp_path / "g.csv")
    (tmp_path / "g.csv").write_text("image,other\na,x\n")
    with pytest.raises(BoxesError, match="one of slide_id, patient_id, organ"):
        read_groups(tmp_path / "g.csv")


def test_groups_of_images_that_are_not_there():
    assert check_groups("g.csv", {"a": {}, "b": {}}, ["a", "b", "c"]) == ()
    assert check_groups("g.csv", {"a": {}, "x": {}}, ["a", "b"]) == ("g.csv: 1 of 2 rows are of no image: x",)
    with pytest.raises(
        BoxesError, match=r"g.csv: none of its 1 rows is of an image, the first of which is a; it names x"
    ):
        check_groups("g.csv", {"x": {}}, ["a"])


def test_an_empty_slide_leaves_the_one_that_the_name_tells(tmp_path):
    names = ["s-lv0-1", "s-lv0-2", "t-lv0-1"]
    (tmp_path / "g.csv").write_text("image,slide_id\ns-lv0-1,\ns-lv0-2,\nt-lv0-1,\n")
    for groups in (read_groups(tmp_path / "g.csv"), {name: {"slide_id": ""} for name in names}):
        fold = assign_folds(names, [ANNOTATED] * 3, groups, folds=2, mode="hard", seed=0)
        assert fold[0] == fold[1] != fold[2]


def test_masks_are_pictures_that_come_back(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (7, 9)).astype(np.uint8)
    write_mask(tmp_path / "m.png", mask)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), mask)
    colours = np.asarray(Image.open(tmp_path / "m.png").convert("RGB"))
    assert len(np.unique(colours[mask == 2], axis=0)) == 1 and colours.max() > 200
    (tmp_path / "m.png").write_bytes(b"nothing")
    with pytest.raises(BoxesError, match="the round is done again"):
        read_mask(tmp_path / "m.png")
    drawn = draw_cells(
        np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.uint8), {(1, 2, 3): np.array([[2, 3, 9, 11]])}, width=1
    )
    assert drawn[3, 2].tolist() == drawn[10, 8].tolist() == [1, 2, 3] and not drawn[11, 9].any()


@pytest.fixture
def sources(folder, tmp_path):
    images = read_cell_images(folder).images
    write_mask(tmp_path / "a.png", np.full((50, 60), 1, np.uint8))
    return [CropSource(images[0], tmp_path / "a.png"), CropSource(images[2], None)]


def test_crops_are_a_function_of_seed_and_step(sources):
    size = np.array([(50, 60), (50, 60)])
    sampler = CropSampler(size, [np.array([0]), np.array([1])], [0.5, 0.5], 32, 8, (3, 0))
    np.testing.assert_array_equal(sampler(5), sampler(5))
    assert not np.array_equal(sampler(5), sampler(6))
    assert not np.array_equal(sampler(5), CropSampler(size, sampler.pools, sampler.shares, 32, 8, (3, 1))(5))
    drawn = np.concatenate([sampler(step) for step in range(200)])
    assert 0.45 < (drawn[:, 0] == 0).mean() < 0.55
    assert drawn[:, 1:].min() == 0 and drawn[:, 1].max() == 50 - 32 and drawn[:, 2].max() == 60 - 32


def test_crops_hold_the_pixels_of_image_and_mask(sources):
    reader = CropReader(sources, side=32, reduce=1)
    found = reader.read(np.array([[0, 3, 7], [1, 0, 0]]))
    np.testing.assert_array_equal(found["image"][0], load_image(sources[0].image)[3:35, 7:39])
    assert (found["mask"][0] == 1).all() and (found["mask"][1] == 0).all() and found["weight"].tolist() == [1, 1]


def test_beyond_a_small_image_a_crop_counts_for_nothing(sources):
    found = CropReader(sources, side=64, reduce=1).read(np.array([[0, 0, 0]]))
    assert (found["mask"][0, :50, :60] == 1).all() and (found["mask"][0, 50:] == 255).all()
    assert (found["image"][0, :, 60:] == 255).all()


def test_batches_do_not_depend_on_where_they_begin(sources):
    sampler = CropSampler(np.array([(50, 60), (50, 60)]), [np.array([0, 1])], [1.0], 32, 2, (0, 0))
    run = [
        batch["image"]
        for batch in crop_batches(CropReader(sources, side=32, reduce=1), sampler, begin=0, end=4, threads=2)
    ]
    late = [
        batch["image"]
        for batch in crop_batches(CropReader(sources, side=32, reduce=1), sampler, begin=2, end=4, threads=1)
    ]
    np.testing.assert_array_equal(run[2:], late)


def test_a_file_that_vanishes_is_named(sources):
    sources[0].image.path.write_bytes(b"")
    with pytest.raises(BoxesError, match=r"2018 a-lv0-1-2-60-50.jpeg: cannot be read"):
        CropReader(sources, side=32, reduce=1).read(np.array([[0, 0, 0]]))


def test_every_box_is_in_one_region():
    random = np.random.default_rng(0)
    corner = random.uniform(0, 5000, (30, 2))
    boxes = np.concatenate([corner, corner + random.uniform(20, 90, (30, 2))], axis=1)
    places, middle = regions_around(boxes, 1000), (boxes[:, :2] + boxes[:, 2:]) / 2
    holds = ((middle[:, None] >= places) & (middle[:, None] < places + 1000)).all(axis=2)
    assert (holds.sum(axis=1) == 1).all() and holds.any(axis=0).all()
    near = np.array([[100, 100, 190, 190], [900, 700, 990, 780]])
    np.testing.assert_array_equal(regions_around(near, 1000), [[45, -60]])  # what fits one square is not cut
    assert len(regions_around(np.array([[0, 0, 2500, 900]]), 1000)) == 1
    assert regions_around(np.zeros((0, 4)), 1000).shape == (0, 2)


def test_drawn_regions_lie_on_tissue_and_apart():
    tissue = np.zeros((100, 100), bool)
    tissue[20:80, 20:90] = True
    avoid = np.array([[300.0, 300.0]])
    places = draw_regions(tissue, downsample=10, side=100, count=5, avoid=avoid, random=np.random.default_rng(0))
    assert len(places) == 5
    together = np.concatenate([places, avoid])
    for number, place in enumerate(places):
        assert not (np.abs(np.delete(together, number, axis=0) - place) < 100).all(axis=1).any()
        x, y = (place / 10).round().astype(int)
        assert tissue[y : y + 10, x : x + 10].mean() >= 0.5
    nothing = draw_regions(
        np.zeros((9, 9), bool), downsample=10, side=50, count=5, avoid=avoid, random=np.random.default_rng(0)
    )
    assert nothing.shape == (0, 2)
