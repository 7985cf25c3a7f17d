"""Installing: without a compiler the package is pure Python and computes; a library of other sources is not called."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from xentile import _ops

ROOT = Path(__file__).parent.parent
LIBRARY = Path(_ops.__file__).with_name("_C_cpu.so")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def checkout(folder: Path) -> Path:
    """What a fresh clone has of the package, and nothing that a build left."""
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(*command: object, **options: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in an environment that has what pyproject.toml names under build-system, and nothing else."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("isolated")
    site = folder / "site"
    site.mkdir()
    setuptools = importlib.metadata.distribution("setuptools")
    for name in {file.parts[0] for file in setuptools.files or ()} - {"..", "__pycache__"}:
        (site / name).symlink_to(setuptools.locate_file(name))
    headers = {"XENTILE_TORCH_INCLUDE": str(Path(torch.__file__).parent / "include"), "XENTILE_REQUIRE_NATIVE": "0"}
    environment = os.environ | NO_COMPILER | headers | {"PYTHONPATH": str(site)}
    source = checkout(folder)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    run("-S", "-c", build, cwd=source, env=environment)
    (wheel,) = (source / "dist").iterdir()
    return wheel


def test_a_wheel_built_without_a_compiler_is_pure_python(pure_wheel: Path) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(pure_wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {"xentile/py.typed", "xentile/_triton/short.py", "xentile/reference/cross_entropy.py"} <= set(names)


def test_without_a_compiler_the_package_computes_and_the_doctor_says_why_it_is_slow(
    pure_wheel: Path, tmp_path: Path
) -> None:
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    program = """
import torch, xentile as xt
from xentile.__main__ import doctor
logits, target, sketch = torch.randn(8, 50, requires_grad=True), torch.arange(8), xt.LossSketch()
out = xt.cross_entropy(logits, target, sketch=sketch)
out.loss.backward()
torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, target))
assert logits.grad.any() and sketch.count() == 8
print(xt.__file__, doctor(), sep="\\n")
"""
    imported, *lines = run("-c", program, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}).splitlines()
    assert Path(imported).is_relative_to(tmp_path)
    assert (
        "CPU:  plain PyTorch, because the package was installed without a C++ compiler or without torch headers: "
        "no _C_cpu.so"
    ) in lines


def test_a_failed_build_in_place_leaves_no_library_of_an_earlier_one(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    old = checkout(tmp_path) / "src" / "xentile" / "_C_cpu.so"
    old.write_bytes(b"built long ago")
    environment = os.environ | NO_COMPILER | {"XENTILE_REQUIRE_NATIVE": "0"}
    run("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, env=environment)
    assert not old.exists()


def test_a_library_without_the_signature_of_the_schemas_is_not_loaded(tmp_path: Path) -> None:
    stale = tmp_path / "_C_cpu.so"
    stale.write_bytes(b"xentile schemas 0123456789abcdef")
    with pytest.warns(UserWarning, match="plain PyTorch is used on the CPU, because _C_cpu.so was built from other so"):
        reason = _ops._load_native(stale)
    assert reason == "_C_cpu.so was built from other sources than this package, which must be installed again"


def test_a_library_that_does_not_load_is_said_to(tmp_path: Path) -> None:
    broken = tmp_path / "_C_cpu.so"
    broken.write_bytes(_ops.SIGNATURE.encode())
    with pytest.warns(UserWarning, match="because _C_cpu.so does not load"):
        assert "does not load" in str(_ops._load_native(broken))


@pytest.mark.skipif(_ops.NATIVE_UNAVAILABLE is not None, reason=str(_ops.NATIVE_UNAVAILABLE))
def test_another_schema_makes_the_present_library_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "xentile schemas " + "0" * 16
    monkeypatch.setattr(_ops, "SIGNATURE", other)
    with pytest.warns(UserWarning, match="was built from other sources"):
        assert _ops._load_native(LIBRARY) is not None
