"""Importing xentile, each time in a fresh process: it is silent, light, and works without what is optional."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from oracle import token_losses

import xentile
from xentile._schemas import SIGNATURE

PACKAGE = pathlib.Path(xentile.__file__).parent
NATIVE = "_C_cpu.so"

# A training step and a percentile, printed as JSON; every value is a function of the seed alone.
EXAMPLE = """
import json, sys, torch
import xentile as xt
torch.manual_seed(0)
logits = (torch.randn(64, 300) * 3).requires_grad_()
target = torch.randint(0, 300, (64,)).index_fill_(0, torch.tensor([5, 6]), -100)
sketch = xt.LossSketch()
options = {"label_smoothing": 0.1, "z_loss": 1e-4, "stats": ("entropy", "target_rank")}
out = xt.cross_entropy(logits, target, sketch=sketch, **options)
out.loss.backward()
print(json.dumps({
    "file": xt.__file__, "isa": torch.ops.xentile.isa(), "loss": out.loss.item(), "token_loss": out.token_loss.tolist(),
    "gradient": logits.grad.flatten().tolist(), "rank": out.target_rank.tolist(), "entropy": out.entropy.tolist(),
    "quantile": out.quantile([0.1, 0.5, 0.9]).tolist(), "count": sketch.count().item(),
    "modules": sorted(sys.modules), "native_unavailable": xt._ops.NATIVE_UNAVAILABLE,
}))
"""


def python(code: str, *flags: str, root: pathlib.Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code with xentile found in `root` before anywhere else, and no warning filters but the flags."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "PYTHONPATH")}
    environment["PYTHONPATH"] = str(root or PACKAGE.parent)
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def example(root: pathlib.Path | None = None, *flags: str) -> tuple[dict, str]:
    """What EXAMPLE printed, and its stderr."""
    result = python(EXAMPLE, *flags, root=root)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


def copy_without_native(tmp_path: pathlib.Path) -> pathlib.Path:
    shutil.copytree(PACKAGE, tmp_path / "xentile", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


@pytest.fixture(scope="module")
def here() -> dict:
    """EXAMPLE by the package under test, with whatever serves the CPU here."""
    values, stderr = example(None, "-W", "error")
    assert stderr == ""
    return values


def assert_same_numbers(a: dict, b: dict) -> None:
    """Equal integers, and floats that differ by rounding alone: another backend may add in another order."""
    assert (a["rank"], a["count"]) == (b["rank"], b["count"])
    for name in ("loss", "token_loss", "gradient", "entropy"):
        torch.testing.assert_close(torch.tensor(a[name]), torch.tensor(b[name]), rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(torch.tensor(a["quantile"]), torch.tensor(b["quantile"]), rtol=2**-7, atol=0)


def test_import_is_silent_with_warnings_as_errors() -> None:
    result = python("import xentile", "-W", "error")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


SETTINGS = """
import torch, torch.distributed
def state():
    modules = torch.nn.functional, torch.nn, torch.Tensor, torch.distributed
    settings = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed()
    return settings, [dict(vars(m)) for m in modules]
settings, names = state()
import xentile
assert settings == state()[0]
for before, after in zip(names, state()[1]):
    assert before.keys() == after.keys()
    assert all(before[k] is after[k] for k in before)
"""


def test_import_changes_nothing_of_torch() -> None:
    """No function is replaced and no global setting touched: whoever does not call xentile gets plain PyTorch."""
    result = python(SETTINGS, "-W", "error")
    assert result.returncode == 0, result.stderr


def test_neither_import_nor_use_on_a_cpu_loads_triton_or_matplotlib(here: dict) -> None:
    assert not {"triton", "matplotlib", "pandas", "transformers"} & set(here["modules"])


def test_it_works_where_triton_and_matplotlib_are_not_installed(here: dict) -> None:
    """None in sys.modules makes an import of that name fail as if the package were absent."""
    absent = "import sys; sys.modules.update(dict.fromkeys(('triton', 'matplotlib', 'tokenizers')))\n"
    result = python(absent + EXAMPLE)
    assert result.returncode == 0, result.stderr
    assert_same_numbers(json.loads(result.stdout), here)


def test_without_the_native_library_the_numbers_are_the_same(tmp_path: pathlib.Path, here: dict) -> None:
    root = copy_without_native(tmp_path)
    values, stderr = example(root, "-W", "error")
    assert stderr == ""
    assert pathlib.Path(values["file"]).is_relative_to(root), "the copy is what was imported"
    assert values["isa"] == "none"
    assert values["native_unavailable"].endswith("no _C_cpu.so"), "a person can read why"
    assert_same_numbers(values, here)


def test_the_numbers_compared_here_are_right(here: dict) -> None:
    """Else the tests above could agree on a mistake."""
    torch.manual_seed(0)
    logits = torch.randn(64, 300) * 3
    target = torch.randint(0, 300, (64,))
    exact = token_losses(logits, target).index_fill_(0, torch.tensor([5, 6]), 0.0)
    torch.testing.assert_close(torch.tensor(here["token_loss"], dtype=torch.float64), exact, rtol=1e-6, atol=0)


def test_a_corrupt_native_library_is_named_in_a_warning_and_replaced(tmp_path: pathlib.Path, here: dict) -> None:
    root = copy_without_native(tmp_path)
    header = b"\x7fELF\x02\x01\x01" + b"\0" * 57  # nothing behind it but what the loader looks for
    (root / "xentile" / NATIVE).write_bytes(header + SIGNATURE.encode())
    values, stderr = example(root, "-W", "always")
    assert "UserWarning: xentile: plain PyTorch is used on the CPU, because _C_cpu.so does not load: " in stderr
    assert values["isa"] == "none"
    assert_same_numbers(values, here)
