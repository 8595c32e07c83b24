"""The readers behind a slide: which one is taken for which file, that all give the same pixels, and that damage is seen."""

import io
import logging

import numpy as np
import openslide
import PIL.Image
import pytest
import tifffile

from data_pipelines import readers
from data_pipelines.readers import RegionError, SlideError
from data_pipelines.slide_integrity import jpeg2000_damage, jpeg_damage, webp_damage
from data_pipelines.slide_scale import FileScale, aperio_scale, ome_scale, resolution_scale
from data_pipelines.slide_tiff import probe
from data_pipelines.slides import open_slide
from tests.tiff_files import empty_tile, halved, overwrite, picture, tile_bytes, write_tiff

needs_cucim = pytest.mark.skipif(readers.CuImage is None, reason="cuCIM is not installed")
FAST = "openslide" if readers.CuImage is None else "cucim"
CODECS = {
    "jpeg": ({"compression": "jpeg"}, FAST),
    "jpeg rgb": ({"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}}, FAST),
    "jpeg 2000": ({"compression": 33005}, FAST),
    "raw": ({}, "tifffile"),
    "lzw": ({"compression": "lzw"}, "tifffile"),
    "lzw predictor": ({"compression": "lzw", "predictor": True}, "tifffile"),
    "zstd": ({"compression": "zstd"}, "tifffile"),
    "webp": ({"compression": "webp", "compressionargs": {"lossless": True}}, "tifffile"),
    "jpeg 2000 34712": ({"compression": "jpeg2000"}, "tifffile"),
    "strips": ({"tile": None, "rowsperstrip": 37}, "tifffile"),
    "deflate": ({"compression": "zlib"}, "openslide"),
    "deflate predictor": ({"compression": "zlib", "predictor": True}, "openslide"),  # cuCIM would end the process
    "planar": ({"planarconfig": "separate"}, "openslide"),  # cuCIM would return wrong pixels
    "bigtiff": ({"compression": "jpeg", "bigtiff": True}, FAST),
}


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_gives_the_picture_by_the_right_reader(tmp_path, codec):
    options, backend = CODECS[codec]
    image = picture(230, 150)
    stored = np.moveaxis(image, -1, 0) if codec == "planar" else image
    options = dict(options)
    with tifffile.TiffWriter(tmp_path / "slide.tiff", bigtiff=options.pop("bigtiff", False)) as tif:
        settings = {"photometric": "rgb", "tile": (64, 64), "metadata": None, "resolution": (20_000, 20_000)}
        tif.write(stored, **(settings | {"resolutionunit": "CENTIMETER"} | options))
    with open_slide(tmp_path / "slide.tiff") as slide:
        assert slide.backend == backend
        found = slide.read(11, 30, 200, 110, 0.5)
    tolerance = 8 if codec.startswith(("jpeg", "bigtiff")) else 0
    assert np.abs(found.astype(float) - image[30:140, 11:211]).mean() <= tolerance


def test_rgba_is_laid_on_white(tmp_path):
    image = picture(128, 64)
    alpha = np.full((64, 128, 1), 255, np.uint8)
    alpha[:, :64] = 0
    path = write_tiff(tmp_path / "rgba.tiff", np.dstack([image, alpha]), compression="lzw", extrasamples=["unassalpha"])
    with open_slide(path, check=False) as slide:
        found = slide.read(0, 0, 128, 64, 0.5)
    assert (found[:, :64] == 255).all()
    np.testing.assert_array_equal(found[:, 64:], image[:, 64:])


def test_pyramid_in_sub_ifds_is_read_at_every_level(tmp_path):
    image = picture(256, 192)
    options = {"photometric": "rgb", "tile": (64, 64), "compression": "jpeg", "subsampling": (1, 1)}
    units = {"axes": "YXS", "PhysicalSizeX": 250.0, "PhysicalSizeY": 250.0}
    units |= {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif", ome=True) as tif:
        tif.write(image, subifds=1, metadata=units, **options)
        tif.write(halved(image), subfiletype=1, **options)
    with open_slide(tmp_path / "slide.ome.tif") as slide:
        assert (slide.backend, slide.mpp, len(slide.levels)) == ("tifffile", 0.25, 2)
        found = slide.read(64, 32, 80, 60, 0.5)
    assert np.abs(found.astype(float) - halved(image)[16:76, 32:112]).mean() < 8


@pytest.mark.parametrize("codec", ["jpeg", "lzw", "deflate"])
def test_tile_without_data_is_white_and_counted(tmp_path, codec):
    image = picture(230, 150)
    path = write_tiff(tmp_path / "sparse.tiff", image, **CODECS[codec][0])
    with open_slide(path) as slide:
        full = slide.read(0, 0, 230, 150, 0.5)
        assert slide.sparse_tiles == 0
    empty_tile(path, 1)
    with open_slide(path) as slide:
        found = slide.read(0, 0, 230, 150, 0.5)
        assert slide.sparse_tiles == 1
        np.testing.assert_array_equal(slide.read(100, 20, 60, 60, 0.5), found[20:80, 100:160])
    full[:64, 64:128] = 255
    np.testing.assert_array_equal(found, full)


@needs_cucim
def test_cucim_equals_tile_by_tile_decoding_where_downsamples_are_no_whole_numbers(tmp_path):
    path = write_tiff(tmp_path / "odd.tiff", picture(701, 507), levels=4, compression="jpeg")
    layout = probe(path)
    fast, plain = readers.CucimReader(path, layout), readers.TifffileReader(path, layout)
    random = np.random.default_rng(0)
    for index, level in enumerate(fast.levels):
        for _ in range(40):
            x, y = int(random.integers(level.width)), int(random.integers(level.height))
            region = (
                index,
                x,
                y,
                int(random.integers(1, level.width - x + 1)),
                int(random.integers(1, level.height - y + 1)),
            )
            np.testing.assert_array_equal(fast.read(*region), plain.read(*region))
    fast.close()
    plain.close()


# Checks at opening


@needs_cucim
def test_reader_that_disagrees_with_openslide_is_not_used(tmp_path, monkeypatch, caplog):
    path = write_tiff(tmp_path / "slide.tiff", picture(230, 150), compression="jpeg")
    read = readers.CucimReader.read
    monkeypatch.setattr(readers.CucimReader, "read", lambda self, *region: read(self, *region)[..., ::-1])
    with caplog.at_level(logging.WARNING), open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        assert slide.backend == "openslide" and "cucim differs by" in caplog.text
        expected = np.asarray(reference.read_region((0, 0), 0, (100, 100)))[..., :3]
        np.testing.assert_array_equal(slide.read(0, 0, 100, 100, 0.5), expected)


@needs_cucim
def test_reader_that_cannot_read_what_openslide_reads_is_not_used(tmp_path, monkeypatch):
    def refuse(*region: int) -> np.ndarray:
        raise RegionError("no")

    monkeypatch.setattr(readers.CucimReader, "read", lambda self, *region: refuse(*region))
    path = write_tiff(tmp_path / "slide.tiff", picture(230, 150), compression="jpeg")
    with open_slide(path) as slide:
        assert slide.backend == "openslide"


def test_without_cucim_only_speed_is_lost(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "slide.tiff", picture(230, 150), compression="jpeg", levels=2)
    with open_slide(path) as slide:
        expected = slide.read(10, 20, 100, 60, 1.0)
    monkeypatch.setattr(readers, "CuImage", None)
    with open_slide(path) as slide:
        assert slide.backend == "openslide"
        np.testing.assert_array_equal(slide.read(10, 20, 100, 60, 1.0), expected)


def test_without_openslide_the_message_says_how_to_get_it(tmp_path, monkeypatch, shared_data):
    monkeypatch.setattr(readers, "openslide", None)
    with pytest.raises(SlideError, match="pip install openslide-python openslide-bin"):
        open_slide(shared_data / "slides" / "CMU-1-Small-Region_dicom")
    path = write_tiff(tmp_path / "slide.tiff", picture(230, 150), compression="lzw")
    with open_slide(path) as slide:  # other readers go on, unchecked
        assert (slide.backend, slide.checked) == ("tifffile", False)


# Damage


def _random(length: int) -> bytes:
    return np.random.default_rng(1).integers(0, 256, length, dtype=np.uint8).tobytes()


DAMAGES = {
    "zeros": bytes,
    "ones": lambda length: b"\xff" * length,
    "one byte": lambda length: b"\xaa" * length,
    "random": _random,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("codec", ["jpeg", "jpeg 2000", "lzw", "deflate"])
def test_damaged_tile_raises_and_others_are_read(tmp_path, codec, damage):
    noise = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)  # compresses badly: long tiles
    path = write_tiff(tmp_path / "slide.tiff", noise, **(CODECS[codec][0] | {"tile": (256, 256)}))
    with open_slide(path) as slide:
        expected = slide.read(256, 0, 256, 256, 0.5)
    position, length = tile_bytes(path)[0]
    overwrite(path, position + length // 3, DAMAGES[damage](length // 3))
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(RegionError, match=r"slide\.tiff: region at"):
                slide.read(0, 0, 300, 200, 0.5)
            np.testing.assert_array_equal(slide.read(256, 0, 256, 256, 0.5), expected)


def test_jpeg_that_ends_early_is_found_by_its_flat_end(tmp_path):
    """Text in the data of this JPEG makes no marker and no run; the decoder runs out of data instead."""
    path = write_tiff(tmp_path / "slide.tiff", picture(256, 256), compression="jpeg", tile=(256, 256))
    position, length = tile_bytes(path)[0]
    overwrite(path, position + length // 3, (b"garbage" * length)[: length // 3])
    with open_slide(path) as slide, pytest.raises(RegionError):
        slide.read(0, 0, 256, 256, 0.5)


@needs_cucim
def test_flat_coloured_tiles_are_no_damage(tmp_path, monkeypatch):
    asked = []
    read = readers.OpenSlideReader.read
    monkeypatch.setattr(readers.OpenSlideReader, "read", lambda *args: (asked.append(args), read(*args))[1])
    ink = np.full((128, 192, 3), (20, 90, 40), np.uint8)
    with open_slide(write_tiff(tmp_path / "ink.tiff", ink, compression="jpeg"), check=False) as slide:
        for _ in range(3):
            assert np.ptp(slide.read(0, 0, 192, 128, 0.5), axis=(0, 1)).max() == 0
    assert len(asked) == 1  # OpenSlide confirmed once


def _jpeg(image: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}]
)
@pytest.mark.parametrize("kind", ["detail", "white", "half"])
def test_sound_jpegs_show_no_damage(options, kind):
    image = picture(256, 256) if kind != "white" else np.full((256, 256, 3), 255, np.uint8)
    if kind == "half":
        image[:, 128:] = (200, 150, 180)
    data = _jpeg(image, quality=60, **options)
    assert jpeg_damage(data, b"", (256, 256)) is None
    assert jpeg_damage(data + b"\0\0", b"", (256, 256)) is None  # padded to an even length
    assert jpeg_damage(data, b"", (128, 256)) == "is an image of 256 x 256 px in place of 128 x 256"


def test_real_tiles_show_no_damage(shared_data):
    looked_at = 0
    for name, damage in {
        "CMU-1-Small-Region.svs": jpeg_damage,
        "P2_0039_section1_x2.tiff": jpeg_damage,
        "TCGA-CR-7395-01A-01-TS1.svs": lambda data, tables, size: jpeg2000_damage(data, size),
    }.items():
        with tifffile.TiffFile(shared_data / "slides" / name) as tif:
            for page in (level.keyframe for level in tif.series[0].levels):
                for position, length in zip(page.dataoffsets, page.databytecounts):
                    tif.filehandle.seek(position)
                    assert damage(tif.filehandle.read(length), page.jpegtables or b"", page.tile[::-1]) is None
                    looked_at += 1
    assert looked_at == 130 + 1674 + 432 + 112 + 28 + 252 + 63


def test_damage_of_webp():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image in (noise, np.full((64, 64, 3), 255, np.uint8)):
        for lossless in (True, False):
            buffer = io.BytesIO()
            PIL.Image.fromarray(image).save(buffer, "WEBP", lossless=lossless)
            assert webp_damage(buffer.getvalue()) is None
    data = buffer.getvalue() + bytes(100)
    assert webp_damage(data) == "holds a long run of one byte"
    assert webp_damage(bytes(100)) == "does not start as a WebP"


def test_bytes_that_are_no_tile_are_damage():
    for data in (b"", b"\xff\xd8\xff\xd9", bytes(500), b"\xff\xd8" + b"\xff\xfe\0\0" * 50):
        assert jpeg_damage(data, b"", (64, 64)) == "has no JPEG header"
    assert jpeg2000_damage(b"", (64, 64)) == jpeg2000_damage(bytes(500), (64, 64)) == "has no JPEG 2000 header"


# What headers say


def test_scales_of_headers():
    assert resolution_scale(20_000, 20_000, unit=3).mpp == 0.5
    assert resolution_scale(50_800, 50_800, unit=2).mpp == 0.5
    assert resolution_scale(1, 1, unit=1).mpp is None and resolution_scale(0, 0, unit=2).mpp is None
    assert aperio_scale("Aperio|AppMag = 40|MPP = 0.2520") == FileScale(0.252, 0.252, 40.0, "the Aperio header")
    assert aperio_scale("Aperio|MPP = unknown|").mpp is None
    pixels = '<OME xmlns="http://x"><Image><Pixels PhysicalSizeX="{}" PhysicalSizeY="0.5"/></Image></OME>'
    assert ome_scale(pixels.format("0.5")).mpp == 0.5
    assert ome_scale(pixels.format("nan")).mpp is None and ome_scale("<OME").mpp is None


def test_xml_bombs_in_headers_are_not_expanded():
    bomb = '<!DOCTYPE o [<!ENTITY a "b"><!ENTITY c "&a;&a;">]><OME><Image><Pixels PhysicalSizeX="&c;"/></Image></OME>'
    assert ome_scale(bomb).mpp is None


@pytest.mark.parametrize(
    ("x", "objective", "trusted"),
    [
        (0.25, 40, True),
        (0.5, 20, True),
        (0.22, 20, True),
        (0.05, 40, False),
        (0.65, 40, False),
        (0.04, None, False),
        (25, None, False),
    ],
)
def test_which_scales_are_trusted(x, objective, trusted):
    assert (FileScale(x, x, objective).distrust() is None) == trusted
