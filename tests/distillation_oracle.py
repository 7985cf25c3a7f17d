"""The tables of docs/distillation.md as functions: plain PyTorch, under autograd, in whatever dtype comes in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DOCS = (Path(__file__).parent.parent / "docs" / "distillation.md").read_text()


def _table(head: str) -> list[list[str]]:
    """The rows of the table in the docs whose first line begins with `head`, as cells."""
    lines = DOCS[DOCS.index(head) :].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _code(cell: str) -> str:
    found = re.search(r"`(.*)`", cell)
    return found[1] if found else ""


MASSES = {name: (_code(p), _code(q)) for name, p, q in _table("| support |")}
FORMULAS = {name: (_code(d), _code(m)) for name, d, m in _table("| divergence |")}
HEADER = [cell.strip() for cell in DOCS[DOCS.index("| | forward_kl") :].splitlines()[0].strip("|").split("|")]
CELLS = {(row[0], d): cell for row in _table("| | forward_kl") for d, cell in zip(HEADER[1:], row[1:], strict=True)}
OFFERED = [key for key, cell in CELLS.items() if cell and not key[0].startswith("`")]
REFUSED = [key for key, cell in CELLS.items() if not cell]


class Teacher(NamedTuple):
    """What is known of a teacher with log-probabilities (N, V) at temperature T."""

    ids: Tensor
    logprobs: Tensor
    log_z: Tensor
    tail: Tensor


def teacher(log_p: Tensor, k: int, temperature: float) -> Teacher:
    """The top k of log_p, with log Z(T) and the tail's mass at T."""
    l, ids = log_p.topk(k)
    tempered = log_p / temperature
    log_z = torch.logsumexp(tempered, 1)
    rest = tempered.scatter(1, ids, -torch.inf)
    return Teacher(ids, l, log_z, torch.logsumexp(rest, 1) - log_z)


def divergence(z: Tensor, known: Teacher, support: str, name: str, beta: float, temperature: float) -> Tensor:
    """(N,), by the expressions of the docs."""

    class Indexed:
        """So that softmax(z / T)[ids] takes the columns of each row."""

        def __init__(self, x: Tensor) -> None:
            self.x = x

        def __getitem__(self, ids: Tensor) -> Tensor:
            return self.x.gather(-1, ids)

        def __truediv__(self, t: float) -> Indexed:
            return Indexed(self.x / t)

    def softmax(x: Any) -> Any:
        return Indexed(torch.softmax(x.x, -1)) if isinstance(x, Indexed) else torch.softmax(x, -1)

    dtype = z.dtype
    names: dict[str, Any] = {"z": Indexed(z), "ids": known.ids, "T": temperature, "beta": beta, "softmax": softmax}
    names |= {"l": known.logprobs.to(dtype), "log_z": known.log_z.to(dtype)[:, None]}
    names |= {"tail": known.tail.to(dtype)[:, None], "exp": torch.exp, "log": torch.log, "abs": torch.abs}
    names |= {"sum": lambda x: x.sum(-1, keepdim=True), "cat": lambda *parts: torch.cat(parts, -1)}
    p, q = (eval(code, names) for code in MASSES[support])
    return _compare(p, q, name, beta, _code(CELLS[support, name]) or FORMULAS[name][0], names)


def dense_divergence(z: Tensor, log_p: Tensor, name: str, beta: float, temperature: float) -> Tensor:
    """(N,), all V columns the classes."""
    p, q = torch.softmax(log_p.to(z.dtype) / temperature, -1), torch.softmax(z / temperature, -1)
    names: dict[str, Any] = {"log": torch.log, "abs": torch.abs, "sum": lambda x: x.sum(-1, keepdim=True)}
    return _compare(p, q, name, beta, FORMULAS[name][0], names)


def _compare(p: Tensor, q: Tensor, name: str, beta: float, code: str, names: dict[str, Any]) -> Tensor:
    names |= {"p": p, "q": q, "beta": beta}
    mixture = FORMULAS[name][1]
    if mixture:
        names["m"] = eval(mixture, names)
    result: Tensor = eval(code, names)[:, 0]
    return result
