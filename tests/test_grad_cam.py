"""Grad-CAM against the worked example, the closed form, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np

from srcc_jax.kernels.grad_cam import grad_cam


def test_worked_example():
    maps = jnp.stack([jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, 1.0], [1.0, 0.0]])], -1)[None]
    cam = grad_cam(lambda maps: (maps.sum((1, 2)) @ jnp.array([0.1, -1.0]))[:, None], maps)
    np.testing.assert_allclose(cam, [[[0.1, 0.0], [0.0, 0.4]]], atol=1e-6)


def test_pooling_and_a_dense_layer_have_a_closed_form():
    rng = np.random.default_rng(0)
    maps, kernel = rng.normal(size=(3, 5, 4, 6)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    cam = grad_cam(lambda maps: maps.mean((1, 2)) @ kernel + 1.0, jnp.asarray(maps), index=1)
    np.testing.assert_allclose(cam, np.maximum(maps @ kernel[:, 1] / 20, 0), atol=1e-6)


def test_another_head_equals_finite_differences():
    rng = np.random.default_rng(1)
    maps, kernel = rng.normal(size=(2, 3, 3, 4)), rng.normal(size=4)

    def logit(maps):  # depends on place and not linearly on the maps; np or jnp
        return ((maps**2).sum((1, 2)) @ kernel + maps[:, 0, 0].sum(-1) ** 3)[:, None]

    step, gradient = 1e-5, np.zeros_like(maps)
    for at in np.ndindex(maps.shape):
        moved = np.zeros_like(maps)
        moved[at] = step
        gradient[at] = (logit(maps + moved) - logit(maps - moved))[at[0], 0] / (2 * step)
    alpha = gradient.mean((1, 2))
    expected = np.maximum((maps * alpha[:, None, None, :]).sum(-1), 0)
    np.testing.assert_allclose(grad_cam(logit, jnp.asarray(maps, jnp.float32)), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_maps_inside_jit_come_back_as_float32():
    maps = jnp.ones((1, 2, 2, 3), jnp.bfloat16)
    cam = jax.jit(lambda maps: grad_cam(lambda m: m.mean((1, 2)) @ jnp.ones((3, 1)), maps))(maps)
    assert cam.dtype == jnp.float32 and cam.shape == (1, 2, 2)
    np.testing.assert_allclose(cam, np.full((1, 2, 2), 0.75))
