"""Files of weights: every published format, and files that are damaged, mislabelled or hostile."""

import io
import json
import os
import pickle
import struct
import zipfile

import h5py
import numpy as np
import pytest

from data_pipelines import weights
from data_pipelines.safetensors_files import write_safetensors
from data_pipelines.torch_checkpoints import LEGACY_START
from data_pipelines.weights import WeightsError, read_weights

STATE_FILES = ["tiny_zip.pth", "tiny_legacy.pth", "tiny_wrapped.pth", "tiny.safetensors"]
LAYOUT_FILES = ["tiny_layouts_zip.pth", "tiny_layouts_legacy.pth", "tiny_layouts.safetensors"]
KERAS_FILES = ["tiny_keras3.weights.h5", "tiny_keras_legacy.h5", "tiny_keras_tf2.h5"]


@pytest.fixture(scope="module")
def files(shared_data):
    return shared_data / "golden" / "files"


def expected(files, name, prefix=""):
    with np.load(files / name) as arrays:
        return {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def assert_same(ours, theirs):
    for name, array in ours.items():
        assert (array.dtype, array.shape) == (theirs[name].dtype, theirs[name].shape), name
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("name", STATE_FILES)
def test_state_dicts(files, name):
    state = expected(files, "tiny_torch_expected.npz", "state/")
    ours = read_weights(files / name)
    assert set(ours) == set(state)
    assert_same(ours, state)


def test_state_dict_from_before_torch_had_counters(files):
    state = expected(files, "tiny_torch_expected.npz", "state/")
    ours = read_weights(files / "tiny_legacy_no_counter.pth")
    assert set(state) - set(ours) == {"bn1.num_batches_tracked"}
    assert_same(ours, state)


@pytest.mark.parametrize("name", LAYOUT_FILES)
def test_types_strides_and_shared_storages(files, name):
    layouts = expected(files, "tiny_torch_expected.npz", "layout/")
    ours = read_weights(files / name)
    names = set(layouts) if name.endswith(".pth") else {"half", "bf16", "flags", "scalar"}
    assert set(ours) == names
    assert_same(ours, layouts)


@pytest.mark.parametrize("name", KERAS_FILES)
def test_keras_files(files, name):
    arrays = expected(files, "tiny_keras_expected.npz")
    ours = read_weights(files / name)
    spelled = {key.removesuffix(":0").replace("depthwise_kernel", "kernel"): array for key, array in ours.items()}
    assert set(spelled) == set(arrays) - {"x", "y"}
    assert_same(spelled, arrays)
    assert ("block1a_dwconv/depthwise_kernel:0" in ours) == ("tf2" in name)


def test_keras_model_inside_a_model(tmp_path):
    """Layers of an inner model carry their own names; states of random layers and optimisers are no weights."""
    path = tmp_path / "nested.weights.h5"
    with h5py.File(path, "w") as file:
        for place, name, shapes in [
            ("layers/functional/layers/conv2d_1", "stem_conv", [(3, 3, 3, 4)]),
            ("layers/functional/layers/normalization", "normalization", [(3,), (3,), ()]),
            ("layers/dense", "predictions", [(4, 2), (2,)]),
            ("layers/dropout/seed_generator", "seed", [(2,)]),
        ]:
            variables = file.create_group(f"{place}/vars")
            variables.attrs["name"] = name
            for index, shape in enumerate(shapes):
                variables[str(index)] = np.full(shape, index, np.float32)
        file["optimizer/vars/0"] = np.zeros(3)
    ours = read_weights(path)
    assert set(ours) == {
        "stem_conv/kernel",
        "normalization/mean",
        "normalization/variance",
        "normalization/count",
        "predictions/kernel",
        "predictions/bias",
    }
    assert ours["normalization/count"] == 2 and ours["predictions/bias"].shape == (2,)


def test_whole_keras_model_in_an_old_file(tmp_path):
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        model = file.create_group("model_weights")
        model.attrs["layer_names"] = np.asarray([b"stem_conv"])
        layer = model.create_group("stem_conv")
        layer.attrs["weight_names"] = np.asarray([b"stem_conv/kernel:0"])
        layer["stem_conv/kernel:0"] = np.ones((3, 3, 3, 4), np.float32)
        file["optimizer_weights/step"] = np.zeros(())
    assert {name: array.shape for name, array in read_weights(path).items()} == {"stem_conv/kernel:0": (3, 3, 3, 4)}


def test_npz_and_the_prefix_of_parallel_training(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **{"module.a": np.arange(3), "module.b": np.zeros((2, 2), np.float16)})
    assert {name: array.dtype.name for name, array in read_weights(path).items()} == {"a": "int64", "b": "float16"}
    np.savez(path, **{"module.a": np.arange(3), "b": np.arange(3)})
    assert set(read_weights(path)) == {"module.a", "b"}


def test_real_files(shared_data):
    lite1 = read_weights(shared_data / "weights" / "efficientnet-lite1-77cc7160.pth")
    assert len(lite1) == 386
    assert sum(array.size for name, array in lite1.items() if "num_batches" not in name) == pytest.approx(
        5.47e6, rel=0.01
    )
    resnet = read_weights(shared_data / "weights" / "resnet50_imagenet_keras_conv1_to_stage4_fp16kernels.npz")
    assert len(resnet) == 258


# Bad input


def refusal(path):
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_missing_folder_and_unknown_ending(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.pth")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "model.keras").write_bytes(b"PK\x03\x04")
    assert ".safetensors, .npz, .h5, .pth" in refusal(tmp_path / "model.keras")


@pytest.mark.parametrize("ending", ["pth", "npz", "h5", "safetensors"])
def test_text_empty_and_unfetched_files(tmp_path, ending):
    path = tmp_path / f"w.{ending}"
    path.write_text("<html>404 not found, and some more text</html>")
    assert "a text file" in refusal(path)
    path.write_bytes(b"")
    assert "an empty file" in refusal(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(path)


@pytest.mark.parametrize(
    "name, ending, kind",
    [
        ("tiny.safetensors", "pth", "a safetensors file"),
        ("tiny_keras3.weights.h5", "npz", "an HDF5 file"),
        ("tiny_legacy.pth", "safetensors", "a legacy torch file"),
        ("tiny_zip.pth", "h5", "a zip archive"),
        ("tiny_zip.pth", "npz", "other things than arrays"),
    ],
)
def test_wrong_endings(files, tmp_path, name, ending, kind):
    path = tmp_path / f"w.{ending}"
    path.write_bytes((files / name).read_bytes())
    assert kind in refusal(path)


@pytest.mark.parametrize("name", ["tiny_zip.pth", "tiny_legacy.pth", "tiny.safetensors", "tiny_keras3.weights.h5"])
def test_truncated_files(files, tmp_path, name):
    content = (files / name).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        path = tmp_path / name
        path.write_bytes(content[: int(share * len(content))])
        refusal(path)


@pytest.mark.parametrize("name", ["tiny_layouts_zip.pth", "tiny_layouts_legacy.pth", "tiny.safetensors"])
def test_damaged_files_are_refused_or_read(files, tmp_path, name):
    """Whatever byte of the part that describes the arrays is wrong, nothing but WeightsError comes out."""
    content = (files / name).read_bytes()
    path, rng = tmp_path / name, np.random.default_rng(0)
    for position in rng.integers(0, min(len(content), 2500), 150):
        path.write_bytes(content[:position] + bytes([rng.integers(256)]) + content[position + 1 :])
        try:
            read_weights(path)
        except WeightsError as error:
            assert str(path) in str(error)


class Payload:
    """Runs a command when it is unpickled by a reader that trusts its input."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save_zip(path, root, **entries):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", root if isinstance(root, bytes) else pickle.dumps(root, protocol=2))
        for name, content in entries.items():
            archive.writestr(f"w/{name}", content)


def save_legacy(path, root):
    machine = {"protocol_version": 1001, "little_endian": True}
    path.write_bytes(LEGACY_START + b"".join(pickle.dumps(part, protocol=2) for part in (1001, machine, root, [])))


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize(
    "wrap", [lambda p: p, lambda p: {"state_dict": {}, "epoch": p}], ids=["bare", "beside weights"]
)
def test_nothing_in_a_checkpoint_runs(tmp_path, save, wrap):
    trace, path = tmp_path / "ran", tmp_path / "w.pth"
    save(path, wrap(Payload(f"touch {trace}")))
    message = refusal(path)
    assert f"it asks for {os.system.__module__}.system" in message and "state_dict alone" in message
    assert not trace.exists()

    pickle.loads(pickle.dumps(Payload(f"touch {trace}")))  # the payload is a real one
    assert trace.exists()


@pytest.mark.parametrize("ending", ["npz", "h5"])
def test_pickled_objects_in_array_files_are_refused(tmp_path, ending):
    path = tmp_path / f"w.{ending}"
    if ending == "npz":
        np.savez(path, a=np.asarray([Payload("true")], object))
        assert "allow_pickle" in refusal(path)
    else:
        with h5py.File(path, "w") as file:
            file["a"] = "text"
        assert "not numbers" in refusal(path)


def torch_pickle(storage=b"FloatStorage", count=4, offset=0, shape=(2,), strides=(1,), name="a"):
    """A state_dict of one tensor as torch pickles it."""
    stream = io.BytesIO()
    stream.write(b"\x80\x02}X" + struct.pack("<I", len(name)) + name.encode())
    stream.write(b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n" + storage + b"\n")
    stream.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + pickle.dumps(count, protocol=2)[2:-1] + b"tQ")
    for part in (offset, shape, strides):
        stream.write(pickle.dumps(part, protocol=2)[2:-1])
    stream.write(b"\x89ccollections\nOrderedDict\n)RtRs.")
    return stream.getvalue()


def test_tensors_are_views_within_their_storages(tmp_path):
    path, data = tmp_path / "w.pth", {"data/0": np.arange(4, dtype=np.float32).tobytes()}
    save_zip(path, torch_pickle(shape=(2, 2), strides=(1, 2)), **data)
    np.testing.assert_array_equal(read_weights(path)["a"], [[0, 2], [1, 3]])
    save_zip(path, torch_pickle(offset=3, shape=(2**40,), strides=(0,)), **data)
    assert read_weights(path)["a"].shape == (2**40,)  # expanded: one value, seen often
    for wrong in ({"offset": 3}, {"shape": (3, 2), "strides": (2, 1)}, {"shape": (2,), "strides": (2**62,)}):
        save_zip(path, torch_pickle(**wrong), **data)
        assert "outside its storage" in refusal(path)
    for wrong in ({"offset": -1}, {"strides": (-1,)}, {"shape": (2, 2)}, {"shape": (2.0,)}):
        save_zip(path, torch_pickle(**wrong), **data)
        assert "not what torch writes" in refusal(path)
    save_zip(path, torch_pickle(count=2**50), **data)
    assert "16 bytes for" in refusal(path)
    save_zip(path, torch_pickle(storage=b"ComplexFloatStorage"), **data)
    assert "torch.ComplexFloatStorage" in refusal(path)
    save_zip(path, torch_pickle())
    assert "w/data/0" in refusal(path)


def test_what_stands_beside_the_weights_is_passed_over(tmp_path):
    """Checkpoints of training hold devices, types of elements and counters besides; none of it is made or run."""
    beside = (
        b"U\x01dctorch\ndevice\n(U\x03cputRU\x01tctorch\nfloat32\n" + b"U\x01cccollections\nCounter\n(}K\x05K\x01stR"
    )
    root = b"\x80\x02}(U\x0astate_dict" + torch_pickle()[2:-1] + beside + b"u."
    save_zip(tmp_path / "w.pth", root, **{"data/0": np.arange(4, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(read_weights(tmp_path / "w.pth")["a"], [0, 1])


def test_safetensors_are_written_as_they_are_read(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.asarray(True),
        "c": np.zeros((0, 3), np.int64),
        "d": np.arange(3, dtype=np.float16),
    }
    path = tmp_path / "w.safetensors"
    write_safetensors(path, arrays, {"about": "µ"})
    assert_same(read_weights(path), arrays)
    assert list(read_weights(path)) == sorted(arrays) and weights.read_texts(path) == {"about": "µ"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    with pytest.raises(TypeError, match="a is of type complex64"):
        write_safetensors(path, {"a": np.zeros(1, np.complex64)}, {})
    assert weights.read_texts(path) == {"about": "µ"}, "the file is left as it was"
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    assert weights.read_texts(tmp_path / "w.npz") == {}


def test_what_is_not_a_state_dict_is_named(tmp_path):
    path = tmp_path / "w.pth"
    save_zip(path, [1, 2])
    assert "a list instead of a state_dict" in refusal(path)
    save_zip(path, {"epoch": 3, "lr": 0.1})
    assert "no tensors: epoch, lr" in refusal(path)
    save_zip(path, {})
    assert "holds no arrays" in refusal(path)
    save_zip(path, {}, byteorder=b"big")
    assert "big-endian" in refusal(path)


def test_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", torch_pickle())
        archive.writestr("w/data/0", bytes(1_000_000))
    assert "compressed" in refusal(path)
    save_zip(path, b"\x80\x02}r\xff\xff\xff\x7f.")  # a note numbered 2³¹ - 1
    assert "more memory" in refusal(path)

    monkeypatch.setattr(weights, "MAX_BYTES", 500_000)
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros(100_000))
    assert "GiB of memory" in refusal(tmp_path / "w.npz")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_dataset("a", (10**12,), "f4", chunks=(1000,))
    assert "GiB of memory" in refusal(tmp_path / "w.h5")


def test_hdf5_stays_inside_its_file(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a"] = np.zeros(3)
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["a"] = h5py.ExternalLink("other.h5", "a")
    assert "a is a link to elsewhere" in refusal(path)
    with h5py.File(path, "w") as file:
        file.create_dataset("a", (3,), "f8", external=[(str(tmp_path / "raw"), 0, 24)])
    assert "a is not stored in this file" in refusal(path)


@pytest.mark.parametrize(
    "entry, complaint",
    [
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "cut off or damaged"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}, "cut off or damaged"),
        ({"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}, "F8_E5M2"),
        ({"dtype": "F32", "shape": [2]}, "not that of a safetensors file"),
        ([1, 2], "not that of a safetensors file"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, entry, complaint):
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert complaint in refusal(path)
