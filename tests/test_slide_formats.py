"""Files with more than one image: the slide is found among labels, overviews and thumbnails, or the file is refused."""

import shutil

import numpy as np
import pytest
import tifffile

from data_pipelines.slide_scale import ome_scale
from data_pipelines.slides import SlideError, open_slide
from tests.tiff_files import halved, picture, write_tiff

SLIDE = picture(352, 256).repeat(2, 0).repeat(2, 1)  # cells of 16 px: of 8 on level 1, which JPEG nearly keeps
LABEL, REGION = picture(136, 120, seed=1), picture(320, 448, seed=2)
JPEG = {"compression": "jpeg"}
STRIPS = {"tile": None}


def ome(path, *images):
    """images: (pixels, name, µm per px or None, levels), written as OME series with sub-IFD pyramids."""
    with tifffile.TiffWriter(path, ome=True) as tif:
        for pixels, name, mpp, levels in images:
            about = {"axes": "ZYXS" if pixels.ndim == 4 else "YXS", "Name": name}
            if mpp is not None:
                sizes = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                about |= sizes | {"PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
            settings = {"photometric": "rgb", "tile": (64, 64)}
            tif.write(pixels, subifds=levels - 1, metadata=about, **settings)
            for _ in range(levels - 1):
                pixels = halved(pixels)
                tif.write(pixels, subfiletype=1, **settings)
    return path


def pages(path, *images):
    """images: (pixels, options), written as plain pages of a generic TIFF of 0.5 µm per px."""
    with tifffile.TiffWriter(path) as tif:
        for pixels, options in images:
            settings = {"photometric": "rgb", "tile": (64, 64), "metadata": None, "resolution": (20_000, 20_000)}
            tif.write(pixels, **(settings | {"resolutionunit": "CENTIMETER"} | options))
    return path


def svs(path, *further):
    """An Aperio file: the slide, its thumbnail, `further` pages, then label and macro."""
    about = "Aperio Image Library v1\r\n704x512 (64x64) JPEG|AppMag = 20|MPP = 0.5|"
    return pages(
        path,
        (SLIDE, JPEG | {"description": about}),
        (LABEL, JPEG | STRIPS | {"description": "Aperio\r\n704x512 -> 136x120"}),
        *((pixels, JPEG | {"description": about}) for pixels in further),
        (LABEL, STRIPS | {"compression": "lzw", "description": "Aperio\r\nlabel 136x120", "subfiletype": 1}),
        (LABEL, JPEG | STRIPS | {"description": "Aperio\r\nmacro 136x120", "subfiletype": 9}),
    )


def scn(path, collection, *regions):
    """A Leica file of 0.5 µm per px: an overview of `collection` (width, height) px, and `regions` (pixels, x, y) scanned on it."""
    pages, images = [], []

    def image(levels, width, height, x, y, objective):
        sizes = "".join(
            f'<dimension sizeX="{level.shape[1]}" sizeY="{level.shape[0]}" r="{r}" ifd="{len(pages) + r}"/>'
            for r, level in enumerate(levels)
        )
        pages.extend(levels)
        light = "<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        settings = f"<objectiveSettings><objective>{objective}</objective></objectiveSettings>{light}"
        view = f'<view sizeX="{width * 500}" sizeY="{height * 500}" offsetX="{x * 500}" offsetY="{y * 500}"/>'  # nm
        pixels = f'<pixels sizeX="{levels[0].shape[1]}" sizeY="{levels[0].shape[0]}">{sizes}</pixels>'
        images.append(f"<image>{pixels}{view}<scanSettings>{settings}</scanSettings></image>")

    width, height = collection
    image([picture(width // 16, height // 16, seed=9)], width, height, 0, 0, 1.25)
    for region, x, y in regions:
        image([region, halved(region)], region.shape[1], region.shape[0], x, y, 20)
    size = f'sizeX="{width * 500}" sizeY="{height * 500}"'
    namespace = "http://www.leica-microsystems.com/scn/2010/10/01"
    about = f'<?xml version="1.0"?><scn xmlns="{namespace}"><collection {size}>{"".join(images)}</collection></scn>'
    with tifffile.TiffWriter(path, bigtiff=True) as tif:
        for number, page in enumerate(pages):
            settings = {"photometric": "rgb", "tile": (64, 64), "metadata": None, "compression": "jpeg"}
            settings |= {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
            tif.write(page, description=None if number else about, **settings)
    return path


def assert_is_the_slide(path, *, levels, tolerance=0.0):
    """That the slide and nothing else was opened, and that every level of it shows the same."""
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.mpp_source) == (704, 512, 0.5, "file")
        assert len(slide.levels) == levels
        image = SLIDE
        for level in range(levels):
            found = slide.read(0, 0, image.shape[1], image.shape[0], 0.5 * 2**level)
            assert np.abs(found.astype(float) - image).mean() <= tolerance
            image = halved(image)


# More than one image, one of them the slide


def test_ome_label_before_the_slide(tmp_path):
    path = ome(tmp_path / "a.ome.tiff", (LABEL, "label image", None, 1), (SLIDE, "scan", 0.5, 2))
    assert_is_the_slide(path, levels=2)


def test_ome_label_and_overview_after_the_slide(tmp_path):
    overview = picture(480, 480, seed=3)  # large, but of another scale
    path = ome(tmp_path / "a.ome.tiff", (SLIDE, "0", 0.5, 3), (LABEL, "1", None, 1), (overview, "2", 8.0, 1))
    assert_is_the_slide(path, levels=3)


def test_ome_slide_smaller_than_its_overview_is_known_by_the_name(tmp_path):
    path = ome(tmp_path / "a.ome.tiff", (picture(960, 960), "macro_image", 8.0, 1), (SLIDE, "scan", 0.5, 1))
    assert_is_the_slide(path, levels=1)


@pytest.mark.parametrize("label", [STRIPS, JPEG, JPEG | {"subfiletype": 1}])
@pytest.mark.parametrize("first", [True, False])
def test_label_page_of_a_generic_tiff(tmp_path, label, first):
    slide = [(SLIDE, JPEG), (halved(SLIDE), JPEG | {"subfiletype": 1})]
    images = [(LABEL, label), *slide] if first else [*slide, (LABEL, label)]
    assert_is_the_slide(pages(tmp_path / "a.tiff", *images), levels=2, tolerance=8)


def test_thumbnail_label_and_macro_of_an_aperio_slide(tmp_path):
    assert_is_the_slide(svs(tmp_path / "a.svs", halved(SLIDE)), levels=2, tolerance=8)


def test_two_scanned_regions_of_a_leica_slide_stand_where_they_were_scanned(tmp_path):
    path = scn(tmp_path / "a.scn", (2048, 1536), (SLIDE, 100, 200), (REGION, 1200, 600))
    with open_slide(path) as slide:
        assert (slide.width, slide.height, slide.mpp, slide.backend) == (2048, 1536, 0.5, "openslide")
        assert slide.bounds == (100, 200, 1420, 848)
        for region, x, y in ((SLIDE, 100, 200), (REGION, 1200, 600)):
            found = slide.read(x, y, region.shape[1], region.shape[0], 0.5)
            assert np.abs(found.astype(float) - region).mean() < 8
        assert (slide.read(900, 800, 200, 200, 0.5) == 255).all()  # between them nothing was scanned


def test_level_at_an_irregular_factor_is_no_second_scan(tmp_path):
    third = np.ascontiguousarray(SLIDE[::5, ::5])
    images = [(SLIDE, JPEG), (halved(SLIDE), JPEG | {"subfiletype": 1}), (third, JPEG | {"subfiletype": 1})]
    with open_slide(pages(tmp_path / "a.tiff", *images)) as slide:
        assert (slide.width, slide.height) == (704, 512)
        assert slide.levels[-1].downsample == pytest.approx(5, abs=0.1)


def test_flattened_pyramid_is_no_second_scan(tmp_path):
    levels = [SLIDE, halved(SLIDE), halved(halved(SLIDE))]
    path = ome(tmp_path / "a.ome.tiff", *((level, f"resolution {n}", 0.5, 1) for n, level in enumerate(levels)))
    assert_is_the_slide(path, levels=1)


def test_mask_as_large_as_the_slide_is_not_the_slide(tmp_path):
    mask = (SLIDE[..., 0] > 128).astype(np.uint8) * 255
    path = pages(tmp_path / "a.tiff", (mask, {"photometric": "minisblack"}), (SLIDE, {}))
    assert_is_the_slide(path, levels=1)


# Refused, because no one image is the slide


@pytest.mark.parametrize("size", [(320, 448), (704, 512)])
def test_two_scanned_regions_are_refused(tmp_path, size):
    region = picture(*size, seed=2)
    path = ome(tmp_path / "a.ome.tiff", (SLIDE, "scan 1", 0.5, 2), (region, "scan 2", 0.5, 1))
    with pytest.raises(SlideError, match=r"a\.ome\.tiff: holds 2 scanned regions \('scan 1' 704 x 512 px, 'scan 2'"):
        open_slide(path)


def test_small_second_region_is_told_from_a_label_by_its_scale(tmp_path):
    path = ome(tmp_path / "a.ome.tiff", (SLIDE, "", 0.5, 1), (LABEL, "", 0.5, 1))
    with pytest.raises(SlideError, match="2 scanned regions"):
        open_slide(path)


def test_two_scanned_regions_of_a_generic_tiff_are_refused(tmp_path):
    with pytest.raises(SlideError, match=r"holds 2 scanned regions \(704 x 512 px, 320 x 448 px\): save each"):
        open_slide(pages(tmp_path / "a.tiff", (SLIDE, JPEG), (REGION, JPEG)))


def test_focus_planes_are_refused(tmp_path):
    planes = np.stack([SLIDE, SLIDE[::-1], SLIDE[:, ::-1]])
    for path, count in (
        (ome(tmp_path / "z.ome.tiff", (planes, "scan", 0.5, 1)), 3),
        (ome(tmp_path / "zl.ome.tiff", (LABEL, "", None, 1), (planes, "scan", 0.5, 1)), 3),
        (pages(tmp_path / "z.tiff", *((plane, JPEG) for plane in planes)), 3),
        (svs(tmp_path / "z.svs", np.ascontiguousarray(SLIDE[::-1])), 2),
    ):
        with pytest.raises(SlideError, match=rf"stack of {count} images of one size \(focus planes, or scans\)"):
            open_slide(path)


def test_channels_of_fluorescence_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "c.ome.tiff", ome=True) as tif:
        planes = np.ascontiguousarray(np.moveaxis(SLIDE, -1, 0))
        tif.write(planes, photometric="minisblack", tile=(64, 64), metadata={"axes": "CYX"})
    with pytest.raises(SlideError, match="gray image"):
        open_slide(tmp_path / "c.ome.tiff")


# Scale of the right image


def test_scale_and_objective_are_those_of_the_image_read():
    image = '<Image ID="{0}"><ObjectiveSettings ID="{1}"/><Pixels SizeX="{2}" SizeY="{2}" {3}/></Image>'
    sizes = 'PhysicalSizeX="{0}" PhysicalSizeXUnit="nm" PhysicalSizeY="{0}" PhysicalSizeYUnit="nm"'
    objectives = "".join(f'<Objective ID="O:{m}" NominalMagnification="{m}"/>' for m in (1, 40))
    images = image.format("I:0", "O:1", 100, sizes.format(9000)) + image.format("I:1", "O:40", 900, sizes.format(250))
    xml = f'<OME xmlns="x"><Instrument>{objectives}</Instrument>{images}</OME>'
    assert (ome_scale(xml, (900, 900)).mpp, ome_scale(xml, (900, 900)).objective) == (0.25, 40)
    assert (ome_scale(xml).mpp, ome_scale(xml).objective) == (9.0, 1)
    assert ome_scale(xml, (900, 100)).mpp is None


# DICOM


@pytest.fixture
def dicom(shared_data):
    """kind of image -> its file, of the real series: VOLUME, LABEL, OVERVIEW, THUMBNAIL."""
    files = (shared_data / "slides" / "CMU-1-Small-Region_dicom").glob("*.dcm")
    kinds = ("VOLUME", "LABEL", "OVERVIEW", "THUMBNAIL")
    heads = {file: file.read_bytes()[:4096] for file in files}
    return {kind: next(f for f, head in heads.items() if f"\\{kind}\\".encode() in head) for kind in kinds}


def test_dicom_label_and_overview_do_not_stand_for_the_slide(dicom, tmp_path):
    for place, kind in enumerate(("LABEL", "OVERVIEW", "THUMBNAIL", "VOLUME")):  # the slide last, by name
        shutil.copy(dicom[kind], tmp_path / f"{place}.dcm")
    for path in (tmp_path, tmp_path / "0.dcm"):
        with open_slide(path) as slide:
            assert (slide.width, slide.height, slide.mpp) == (2220, 2967, 0.499)


def test_dicom_without_a_slide_among_its_images_is_refused(dicom, tmp_path):
    for kind in ("LABEL", "OVERVIEW"):
        shutil.copy(dicom[kind], tmp_path / f"{kind}.dcm")
    with pytest.raises(SlideError, match="cannot be read as a slide: OpenSlide"):
        open_slide(tmp_path)


def test_tiled_tiff_stays_as_it_was(tmp_path):
    assert_is_the_slide(write_tiff(tmp_path / "a.tiff", SLIDE, levels=3, compression="lzw"), levels=3)
