"""The house has doors: who may import whom (see CONTRIBUTING.md)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICE_SIDE = {"jax", "jaxlib", "flax", "optax", "orbax"}
HOST_SIDE = {"tensorflow", "tensorflow_datasets", "cucim", "openslide", "tifffile", "absl"}
FORBIDDEN = {
    "data_pipelines": {"srcc_jax", "experiments", "absl"} | DEVICE_SIDE,
    "srcc_jax": {"data_pipelines", "experiments"} | HOST_SIDE,
}
# Import nothing of ours, but models may use kernels, and the files of augmentation (augment*.py) each other
LEAVES = {
    "models": ("srcc_jax.models", "srcc_jax.kernels"),
    "losses": (),
    "augment": ("srcc_jax.augment",),
    "metrics": (),
}


def imported_modules(path: pathlib.Path) -> set[str]:
    """Dotted names of all modules that a file imports, relative imports resolved."""
    names = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(room: str) -> list[pathlib.Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_the_check_sees_relative_and_nested_imports(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_imports.ROOT", tmp_path)
    (tmp_path / "room").mkdir()
    path = tmp_path / "room" / "a.py"
    path.write_text("from .b import c\ndef f():\n    import jax.numpy\n")
    assert imported_modules(path) == {"room.b", "room.b.c", "jax.numpy"}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_only_what_they_may(room):
    wrong = {
        (path.name, name)
        for path in files(room)
        for name in imported_modules(path)
        if name.split(".")[0] in FORBIDDEN[room]
    }
    assert not wrong


def test_leaves_of_the_device_side_import_nothing_of_ours():
    wrong = set()
    for path in files("srcc_jax"):
        leaf = path.relative_to(ROOT / "srcc_jax").parts[0].removesuffix(".py").split("_")[0]
        if leaf in LEAVES:
            wrong |= {
                (path.name, name)
                for name in imported_modules(path)
                if name.startswith("srcc_jax.") and not name.startswith(LEAVES[leaf])
            }
    assert not wrong


@pytest.mark.parametrize("room, shared", [("srcc_jax/methods", set()), ("experiments", {"experiments.run"})])
def test_neighbours_do_not_import_each_other(room, shared):
    package = room.replace("/", ".")
    wrong = {
        (path.name, name)
        for path in files(room)
        for name in imported_modules(path)
        if name.startswith(package + ".") and not any(name.startswith(s) for s in shared)
    }
    assert not wrong


def test_tensorflow_is_imported_by_the_stream_and_its_datasets_by_tile_sets_alone():
    importers = {
        (p.name, name.split(".")[0])
        for p in files("data_pipelines")
        for name in imported_modules(p)
        if name.startswith("tensorflow")
    }
    assert importers == {("stream.py", "tensorflow"), ("tile_sets.py", "tensorflow_datasets")}
