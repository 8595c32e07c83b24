"""torchvision's deformable convolution for the benchmarks, also where its wheel was built for CUDA and torch's for CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import pathlib
import shutil
import subprocess
import tempfile

from experiments.run.program import UsageError

_MISSING = ("libc10_cuda.so", "libtorch_cuda.so", "libcudart.so.13", "libcudart.so.12")


def load_operators() -> None:
    """Makes torch.ops.torchvision.deform_conv2d callable. Where the library asks for CUDA's, which are not there, they are stood in for by
    functions that do nothing: its code for CPU calls none. That needs a C compiler and binutils; UsageError without them."""
    import torch

    if hasattr(torch.ops.torchvision, "deform_conv2d"):
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        raise UsageError("torchvision is not installed: pip install torchvision, for the benchmarks alone")
    library = pathlib.Path(found.submodule_search_locations[0]) / "_C.so"
    absent = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if absent:
        raise UsageError(f"{library} does not load beside this torch, and {', '.join(absent)} is missing to help it")
    with tempfile.TemporaryDirectory() as folder:
        needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        for name in _MISSING:
            if name in needed:
                ctypes.CDLL(str(_stub(library, name, pathlib.Path(folder))), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))


def _stub(library: pathlib.Path, name: str, folder: pathlib.Path) -> pathlib.Path:
    """A library of this name with what the other one wants of CUDA, each a function that returns 0."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    wanted = [line.split()[-1].partition("@")[::2] for line in listed.stdout.splitlines()]
    runtime = name.startswith("libcudart")
    symbols = sorted(
        {
            symbol
            for symbol, version in wanted
            if "cuda" in symbol.lower() and version.startswith("libcudart") == runtime
        }
    )
    if name == "libtorch_cuda.so":
        symbols = []  # all that is not of the runtime is in libc10_cuda.so
    source, made = folder / f"{name}.c", folder / name
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
    versions = folder / f"{name}.map"
    versions.write_text(f"{name} {{ global: *; }};\n")
    line = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(made), str(source)]
    subprocess.run(line + ([f"-Wl,--version-script={versions}"] if runtime else []), check=True)
    return made
