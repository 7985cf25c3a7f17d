"""The demo, small: it is what a new user runs first."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "train_lm.py"
SMALL = {
    "device": "cpu",
    "steps": 14,
    "characters": 400_000,
    "vocabulary": 512,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "context": 32,
    "batch": 4,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_demo(**options: object) -> subprocess.CompletedProcess[str]:
    arguments = [f"--{name}={value}" for name, value in options.items()]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # the model is too small for more
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments], capture_output=True, text=True, timeout=120, env=one_thread
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    figure = tmp_path_factory.mktemp("demo") / "new folder" / "fan.png"
    return run_demo(**SMALL, figure=figure), figure


@pytest.fixture
def printed(demo) -> str:
    process, _ = demo
    assert process.returncode == 0, process.stderr
    return process.stdout


def numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.?\d*(?:e[+-]\d+)?", line)]


def test_demo_prints_ascending_percentiles_over_training(printed):
    rows = [numbers(line) for line in printed.splitlines() if re.match(r"\d+ +\d", line)]
    assert [rows[0][0], rows[-1][0]] == [1, 14]
    for step, tokens, mean, *percentiles in rows:
        assert tokens == step * 4 * 32
        assert len(percentiles) == 7
        assert percentiles == sorted(percentiles)
        assert percentiles[0] < mean < percentiles[-1]


def test_demo_prints_percentiles_of_held_out_text(printed):
    assert re.search(r"^held out$", printed, re.MULTILINE)
    assert re.search(r"^documentation +[\d,]+( +\d+\.\d{3}){8}$", printed, re.MULTILINE)


def test_demo_agrees_with_pytorch(printed):
    for quantity, limit in {"mean loss": 2e-6, "loss of a token": 5e-6, "gradient": 1e-7}.items():
        line = next(line for line in printed.splitlines() if line.startswith(quantity))
        assert numbers(line)[0] <= limit, line


def test_demo_prints_the_time_of_both_losses(printed):
    assert re.search(r"^xentile\.cross_entropy.* \d+\.\d\d ms$", printed, re.MULTILINE)
    assert re.search(r"^torch\.nn\.functional\.cross_entropy +\d+\.\d\d ms$", printed, re.MULTILINE)


def test_demo_shows_the_live_percentiles(demo):
    assert re.search(r"mean \d+\.\d\d, p50 \d+\.\d\d, p90 \d+\.\d\d", demo[0].stderr)


def test_demo_writes_the_chart_and_prints_its_path_last(printed, demo):
    assert printed.splitlines()[-1].endswith(f": {demo[1]}")
    assert demo[1].read_bytes().startswith(PNG_SIGNATURE)


def test_demo_refuses_a_width_that_the_heads_do_not_divide():
    process = run_demo(width=100, heads=3)
    assert process.returncode == 2
    assert "--width: must be a multiple of --heads, got 100 and 3" in process.stderr
