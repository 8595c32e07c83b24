"""Figures of features and attention: what is drawn of what, and where."""

import numpy as np
import pytest
from PIL import Image

from experiments.run.figures.attention import draw_attention, make_attention, painted
from experiments.run.figures.embedding import Panel, draw_embeddings, drawn_rows, embed
from tests.small_networks import architecture, variables


def test_every_kind_is_drawn_and_large_ones_are_thinned():
    kind = np.repeat(["searched", "mined", "positive"], [5000, 30, 400])
    rows = drawn_rows(kind, seed=1, most=900)
    names, counts = np.unique(kind[rows], return_counts=True)
    assert dict(zip(names, counts)) == {"mined": 30, "positive": 400, "searched": 470}
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(rows, drawn_rows(kind, seed=1, most=900))
    assert len(drawn_rows(kind, seed=1)) == 4000 and len(drawn_rows(kind[:10], seed=0)) == 10


def test_groups_of_features_stay_groups():
    rng = np.random.default_rng(0)
    group = np.arange(60) % 2
    places = embed((rng.standard_normal((60, 16)) + 20 * group[:, None]).astype(np.float32), seed=0)
    assert places.shape == (60, 2)
    centres = np.stack([places[group == g].mean(0) for g in (0, 1)])
    nearest = np.linalg.norm(places[:, None] - centres[None], axis=2).argmin(1)
    np.testing.assert_array_equal(nearest, group)
    with pytest.raises(ValueError, match="at least four points, there are 3"):
        embed(np.zeros((3, 2)), seed=0)


def test_the_embedding_is_written_as_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    kind = np.repeat(["negative", "positive", "mined", "of my own"], 10)
    panels = [Panel(name, rng.standard_normal((40, 8)).astype(np.float32), kind) for name in ("weak", "strong")]
    draw_embeddings(tmp_path / "a.png", panels, seed=0)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1560, 810)
        colours = {tuple(int(part) for part in pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    assert {(0x3A, 0xA6, 0xB9), (0xD1, 0x49, 0x5B), (0xE0, 0x8E, 0x0B), (0x7A, 0x5B, 0xC4)} <= colours


def test_attention_is_of_the_class_that_is_asked_for(tmp_path):
    net = architecture("resnet18", classes=2)
    weights = variables(net)
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    found = [make_attention(net, index=index)(weights, image) for index in (0, 1)]
    np.testing.assert_allclose(found[0][1] + found[1][1], 1, atol=1e-6)
    assert found[0][0].shape == (3, 2, 2) and (found[0][0] >= 0).all() and (found[0][0] != found[1][0]).any()
    draw_attention(tmp_path / "pairs.png", image, ["a", "b", "c"], {"weak": found[0], "strong": found[1]})
    with Image.open(tmp_path / "pairs.png") as sheet:
        assert sheet.height > 3 * 168 and sheet.width > 3 * 168
    one = make_attention(architecture("resnet18", classes=1), index=0)
    _, probability = one(variables(architecture("resnet18", classes=1)), image)
    assert ((probability > 0) & (probability < 1)).all()


def test_a_map_is_painted_where_it_is_high():
    image, values = np.full((64, 64, 3), 200, np.uint8), np.zeros((4, 4), np.float32)
    np.testing.assert_array_equal(painted(image, values), image)
    values[0, 3] = 7.0
    over = painted(image, values).astype(int)
    hot, cold = over[4, 60], over[60, 4]
    assert hot[0] > hot[2] + 50 and cold[2] > cold[0]  # red above blue where it is high
