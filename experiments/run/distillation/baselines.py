"""What an engineer would try first on the features of the same frozen teacher: logistic regression, and, without tumour patches, the
distance to the normal ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from data_pipelines.patches import Patches, PatchReader, patch_batches
from experiments.run.progress import progress
from srcc_jax.methods.reverse_distillation import Teacher
from srcc_jax.metrics import roc_auc
from srcc_jax.models.layers import fold_batch_norm
from srcc_jax.models.teachers import teacher_maps
from srcc_jax.parallel import by_rows, put, whole

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ours: C of the logistic regression, chosen on the validation patches


def pooled_features(
    teacher: Teacher, variables: Mapping[str, Any], patches: Patches, *, tile: int, batch: int, mesh: Mesh, threads: int
) -> np.ndarray:
    """float32 [N, D]: means over the pixels of the teacher's three maps, one behind the other; NaN where a patch cannot be read."""
    shardings = (whole(mesh), by_rows(mesh))

    def pool(folded: Any, image: jax.Array) -> jax.Array:
        maps = teacher_maps(teacher, folded, image, folded=True)
        return jnp.concatenate([each.mean((1, 2), dtype=jnp.float32) for each in maps], axis=-1)

    pooled = jax.jit(pool, in_shardings=shardings, out_shardings=shardings[1])
    folded = jax.jit(lambda given: fold_batch_norm(given, epsilon=teacher.bn_epsilon))(dict(variables))
    reader = PatchReader(patches, np.zeros(len(patches)), tile)
    rows = np.arange(len(patches))
    steps = -(-len(rows) // batch)
    read = patch_batches(
        reader, lambda step: rows[step * batch : (step + 1) * batch], size=batch, begin=0, end=steps, threads=threads
    )
    parts = []
    with progress(len(rows), "features of the teacher", unit="patches") as bar:
        for found in read:
            values = np.asarray(pooled(folded, put({"image": found.arrays["image"]}, mesh)["image"]))
            parts.append(np.where(found.arrays["weight"][:, None] > 0, values, np.nan))
            bar.update(len(values))
    return np.concatenate(parts)[: len(rows)]


def logistic_scores(
    features: np.ndarray, label: np.ndarray, validation: np.ndarray, validation_label: np.ndarray
) -> LogisticRegression:
    """Logistic regression on standardised features [n, D], classes weighted equally, with the penalty of PENALTIES of which the
    validation patches have the highest ROC AUC; of equals the strongest."""
    models = [LogisticRegression(C=c, class_weight="balanced", max_iter=2000).fit(features, label) for c in PENALTIES]
    values = [float(roc_auc(validation_label, model.decision_function(validation))) for model in models]
    return models[int(np.argmax(values))]


def baseline_scores(features: np.ndarray, tumour: np.ndarray, train: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """Scores float [N] of all patches, from those of rows `train`: the probability of tumour; without tumour among them the distance
    to the normal ones (Mahalanobis, covariance shrunk by Ledoit and Wolf's rule). features [N, D] without NaN, tumour int [N]."""
    scaler = StandardScaler().fit(features[train])
    scaled = scaler.transform(features)
    if not tumour[train].any():
        return np.sqrt(LedoitWolf().fit(scaled[train]).mahalanobis(scaled))
    model = logistic_scores(scaled[train], tumour[train], scaled[validation], tumour[validation])
    return model.predict_proba(scaled)[:, 1]
