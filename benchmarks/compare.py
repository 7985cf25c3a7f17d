"""Two commits in one run: `python -m benchmarks.run --base main --filter ci`.

The base is exported into a temporary folder and built there; each side then runs in a process of its own, with
this checkout's benchmarks and its own xentile. Rounds alternate between the processes, so the ratio holds through a
noisy hour. A third side, this checkout once more, shows how far apart two equal things look.

A case that the base cannot run, because it lacks the function or fails in it, is reported as such; the others go on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Case, quick
from benchmarks.provenance import REPOSITORY, commit
from benchmarks.timing import Clock, Step, interleave, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROUNDS = 31


class BaseError(Exception):
    """The base could not be exported, built or started; the message is for whoever asked for it."""


class CaseError(Exception):
    """A side cannot run a case; the message says which and why."""


class Side:
    """A worker process that imports xentile from `package` and times its steps itself. One that died is replaced when
    it is asked for the next case.
    """

    def __init__(self, name: str, package: Path, threads: int) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "benchmarks.worker", str(package), str(threads)]
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package), str(REPOSITORY)])}
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=self._environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def prepare(self, case: Case) -> None:
        """Takes the first step of a case; CaseError if this side can't."""
        if self._process.poll() is not None:
            self.close()
            self._start()
        self._ask({"case": asdict(case)})

    def run(self, i: int) -> float:
        """The seconds of a step on input set i."""
        return self._ask({"run": i})

    def _ask(self, request: Mapping[str, Any]) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            text = self._process.stdout.readline()
        except BrokenPipeError:
            text = ""
        if not text:
            raise CaseError(f"{self.name} cannot run it: its process ended with exit code {self._process.wait()}")
        answer = json.loads(text)
        if "cannot" in answer:
            raise CaseError(f"{self.name} cannot run it: {answer['cannot']}")
        return float(answer["seconds"])

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()


def exported(reference: str, folder: Path) -> str:
    """Writes the files of a commit into a folder; returns the commit."""
    git = ["git", "-C", str(REPOSITORY)]
    head = _output([*git, "rev-parse", "--verify", "--short=12", f"{reference}^{{commit}}"], "is no commit").strip()
    archive = folder.with_suffix(".tar")
    _output([*git, "archive", f"--output={archive}", head], "could not be exported")
    folder.mkdir()
    _output(["tar", "-xf", str(archive), "-C", str(folder)], "could not be exported")
    return head


@contextmanager
def installed(reference: str) -> Iterator[tuple[str, Path]]:
    """The commit of `reference`, and a folder with its xentile built and installed."""
    with tempfile.TemporaryDirectory() as folder:
        source, site = Path(folder) / "source", Path(folder) / "site"
        head = exported(reference, source)
        install(source, site)
        yield head, site


def install(source: Path, site: Path) -> None:
    """Builds the package in `source`, native library included, into `site`."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation"]
    # A base that fell back to plain PyTorch would lose every comparison.
    _output([*pip, "--target", str(site), str(source)], "does not build", {"XENTILE_REQUIRE_NATIVE": "1"})


def _output(command: Sequence[str], failure: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints; BaseError with the first line that speaks of an error, or the last, if it fails."""
    everything = os.environ | (environment or {})
    try:
        done = subprocess.run(command, env=everything, capture_output=True, text=True, check=False)
    except OSError as error:  # no git
        raise BaseError(f"{failure}: {error}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        # "subprocess-exited-with-error" is pip's own, and says less
        errors = [line for line in lines if re.search("(error|fatal): (?!subprocess-exited)", line)] or lines[-1:]
        raise BaseError(f"{failure}: {errors[0] if errors else f'exit code {done.returncode}'}")
    return done.stdout


def compare(reference: str, cases: Sequence[Case], few_tokens: bool, threads: int) -> int:
    """Prints, for each case, the time of the base and of this checkout, and the ratio with its 95 % interval."""
    with installed(reference) as (base, site), ExitStack() as stack:
        here = REPOSITORY / "src"
        folders = {"base": site, "here": here, "again": here}
        sides = {name: Side(name, folder, threads) for name, folder in folders.items()}
        for side in sides.values():
            stack.callback(side.close)
        print(f"base {base}, here {commit()}; above 1: here is faster [95 % interval]; here against itself")
        for case in map(quick, cases) if few_tokens else cases:
            print(line(case, sides), flush=True)
    return 0


def line(case: Case, sides: Mapping[str, Side]) -> str:
    """The times of a case and their ratios, or the side that can't run it and why."""
    clock: Clock = lambda step, i: float(step(i))  # type: ignore[arg-type]  # noqa: E731 - the worker holds the clock
    try:
        for side in sides.values():
            side.prepare(case)
        steps: dict[str, Step] = {name: side.run for name, side in sides.items()}
        seconds = interleave(steps, ROUNDS, clock)
    except CaseError as error:
        return f"{case.name:<60} {error}"
    change, noise = ratio(seconds["base"], seconds["here"]), ratio(seconds["again"], seconds["here"])
    medians = " ".join(f"{1e3 * spread(seconds[name]).median:9.3f} ms" for name in ("base", "here"))
    return (
        f"{case.name:<60} {medians}  x{change.median:.3f} [{change.low:.3f}, {change.high:.3f}]"
        f"  x{noise.median:.3f} [{noise.low:.3f}, {noise.high:.3f}]"
    )
