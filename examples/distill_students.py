"""The students of distill_smollm2.py, how one is trained, and how its losses are read."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from distill_teacher import Said, Teacher
from model import LanguageModel
from torch import Tensor, nn
from tqdm import tqdm

import xentile as xt
from xentile.cache import TopKCache

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
SUPPORTS = ("truncated", "teacher_renormalized", "tail_bucket")


class Recipe(NamedTuple):
    """Against what a student is trained. k is 0 for all of the vocabulary."""

    support: str
    k: int

    @property
    def label(self) -> str:
        return f"{self.support}, K = {self.k}" if self.k else "all logits"


class Row(NamedTuple):
    """Losses on held-out text, in nats, and the share of tokens predicted right."""

    label: str
    mean: float
    quantiles: list[float]
    accuracy: float

    @property
    def median(self) -> float:
        return self.quantiles[QUANTILES.index(0.5)]


class Small(nn.Module):
    """A small transformer that starts from nothing, and sees the tokens only."""

    def __init__(self, teacher: Teacher, context: int) -> None:
        super().__init__()
        self.model = LanguageModel(teacher.head.shape[0], context, width=128, layers=2, heads=4)

    def forward(self, said: Said, chosen: Tensor) -> Tensor:
        logits: Tensor = self.model(said.inputs(chosen).to(self.model.token.weight.device))
        return logits


class Self(nn.Module):
    """Self-distillation: the teacher with a feed-forward layer before its output layer, which starts as nothing."""

    def __init__(self, teacher: Teacher, context: int) -> None:
        super().__init__()
        width = teacher.head.shape[1]
        self.register_buffer("head", teacher.head)
        self.scale = nn.Parameter(torch.ones(()))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, said: Said, chosen: Tensor) -> Tensor:
        states = said.states(chosen).to(self.head.device)
        return F.linear(self.scale * states + self.down(F.gelu(self.up(states))), self.head)


STUDENTS: dict[str, Callable[[Teacher, int], nn.Module]] = {"small": Small, "self": Self}
PEAK = {"small": 3e-3, "self": 1e-3}


def train(name: str, recipe: Recipe, teacher: Teacher, said: Said, steps: int, batch: int, seed: int) -> nn.Module:
    """A student after so many steps; every recipe sees the same windows in the same order, from the same start."""
    torch.manual_seed(seed)
    student = STUDENTS[name](teacher, said.pieces.shape[1] - 1).to(teacher.head.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=PEAK[name], betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK[name], total_steps=steps, pct_start=0.1)
    cache = TopKCache(said.cache, k=recipe.k) if recipe.k else None
    order = torch.cat([torch.randperm(len(said.pieces)) for _ in range(1 + steps * batch // len(said.pieces))])
    with tqdm(order[: steps * batch].split(batch), desc=f"{name}, {recipe.label}", unit="step", leave=False) as bar:
        for chosen in bar:
            logits = student(said, chosen)
            out = against(recipe, logits, teacher, said, chosen, cache)
            out.loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return student.eval()


def against(
    recipe: Recipe, logits: Tensor, teacher: Teacher, said: Said, chosen: Tensor, cache: TopKCache | None
) -> xt.DistillationOutput:
    """The loss of logits (B, T, V) under a recipe."""
    if cache is None:
        with torch.no_grad():
            dense = F.linear(said.states(chosen).to(logits.device), teacher.head)
        return xt.distillation_loss(logits, dense)
    entries = cache.batch(chosen.tolist())
    return xt.topk_distillation_loss(
        logits,
        entries.ids.to(logits.device),
        entries.logprobs.to(logits.device),
        support=recipe.support,
        teacher_tail_logprob=entries.tail_logprob.to(logits.device),
    )


@torch.no_grad()
def losses(label: str, logits_of: Callable[[Tensor], Tensor], said: Said, batch: int) -> Row:
    """The cross-entropy of every held-out token, through one sketch."""
    sketch, correct = xt.LossSketch(), torch.zeros((), dtype=torch.int64)
    for chosen in torch.arange(len(said.pieces)).split(batch):
        logits = logits_of(chosen).flatten(0, 1)
        out = xt.cross_entropy(logits, said.targets(chosen).flatten().to(logits.device))
        sketch.update(out.token_loss.cpu())
        correct += out.correct.sum().cpu()
    accuracy = float(correct) / float(sketch.count())
    return Row(label, float(sketch.mean()), sketch.quantile(list(QUANTILES)).tolist(), accuracy)
