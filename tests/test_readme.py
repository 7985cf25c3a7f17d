"""Every code block of the README and every docstring example runs, and what the README names exists."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import xentile as xt

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(xt.__path__, "xentile.")
    if not module.name.startswith("xentile._triton") and not module.name.endswith(("__main__", "_C_cpu"))
)
WITH_EXAMPLES = {f"xentile.{name}" for name in ("cross_entropy", "sketch", "module", "quantile", "readout", "streams")}


def test_the_python_blocks_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert "top-1 accuracy" in capsys.readouterr().out


def test_the_line_before_equals_the_line_after() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    before = re.search(r"# before: loss = (.*)", BLOCKS[0])
    assert before is not None
    expected = eval(before[1], names)
    torch.testing.assert_close(names["out"].loss, expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    if name.endswith("torchmetrics"):
        pytest.importorskip("torchmetrics")
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, **{n: getattr(xt, n) for n in xt.__all__}})
    assert result.failed == 0
    assert result.attempted > 0 or name not in WITH_EXAMPLES


def test_files_and_make_targets_named_in_the_readme_exist() -> None:
    for path in re.findall(r"`((?:src|tests|benchmarks|csrc|docs)/[\w./]*)`", README) + re.findall(
        r"\]\((docs/.*?)\)", README
    ):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make (\w+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_changelog_follows_keep_a_changelog() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert "## [Unreleased]" in lines
    headings = {line for line in lines if line.startswith("### ")}
    assert headings <= {f"### {kind}" for kind in ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")}
