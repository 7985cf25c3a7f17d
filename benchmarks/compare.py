"""Two commits in one run: `python -m benchmarks.run --base main --filter ci`.

The base is checked out into a temporary worktree and built there; each side then runs in a process of its own, with
this checkout's benchmarks and its own xentile. Rounds alternate between the processes, so the ratio holds through a
noisy hour. A third side, this checkout once more, shows how far apart two equal things look.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import Case, quick
from benchmarks.provenance import REPOSITORY, commit
from benchmarks.timing import Clock, Step, interleave, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROUNDS = 31


class Side:
    """A worker process that imports xentile from `package` and times its steps itself."""

    def __init__(self, package: Path, threads: int) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(REPOSITORY)])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(package), str(threads)],
            cwd=REPOSITORY,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, **request: object) -> float:
        """Sends a request; returns the seconds that the worker answers with."""
        if self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker stopped with exit code {self.process.wait()}")
        return float(answer)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


@contextmanager
def installed(reference: str) -> Iterator[tuple[str, Path]]:
    """The commit of `reference`, and a folder with its xentile built and installed."""
    with tempfile.TemporaryDirectory() as folder:
        source, site = Path(folder) / "source", Path(folder) / "site"
        git = ["git", "-C", str(REPOSITORY)]
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(source), reference], check=True)
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
            # A base that fell back to plain PyTorch would lose every comparison.
            native = os.environ | {"XENTILE_REQUIRE_NATIVE": "1"}
            subprocess.run([*pip, "--target", str(site), str(source)], check=True, env=native)
            head = subprocess.run(
                ["git", "-C", str(source), "rev-parse", "--short=12", "HEAD"],
                check=True,
                capture_output=True,
                text=True,
            )
            yield head.stdout.strip(), site
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(source)], check=True)


def compare(reference: str, cases: Sequence[Case], few_tokens: bool, threads: int) -> int:
    """Prints, for each case, the time of the base and of this checkout, and the ratio with its 95 % interval."""
    with installed(reference) as (base, site), ExitStack() as stack:
        here = REPOSITORY / "src"
        sides = {"base": Side(site, threads), "here": Side(here, threads), "again": Side(here, threads)}
        for side in sides.values():
            stack.callback(side.close)
        print(f"base {base}, here {commit()}; above 1: here is faster [95 % interval]; here against itself")
        for case in cases:
            print(_line(quick(case) if few_tokens else case, sides), flush=True)
    return 0


def _line(case: Case, sides: dict[str, Side]) -> str:
    for side in sides.values():
        side.ask(case=asdict(case))
    steps: dict[str, Step] = {name: _step(side) for name, side in sides.items()}
    clock: Clock = lambda step, i: float(step(i))  # type: ignore[arg-type]  # noqa: E731 - the worker holds the clock
    seconds = interleave(steps, ROUNDS, clock)
    change, noise = ratio(seconds["base"], seconds["here"]), ratio(seconds["again"], seconds["here"])
    medians = " ".join(f"{1e3 * spread(seconds[name]).median:9.3f} ms" for name in ("base", "here"))
    return (
        f"{case.name:<60} {medians}  x{change.median:.3f} [{change.low:.3f}, {change.high:.3f}]"
        f"  x{noise.median:.3f} [{noise.low:.3f}, {noise.high:.3f}]"
    )


def _step(side: Side) -> Step:
    return lambda i: side.ask(run=i)
