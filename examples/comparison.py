"""`xentile.cross_entropy` beside `F.cross_entropy` of PyTorch on the same logits: their difference and their time."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import xentile as xt

ROUNDS = 25
WARM_UP = 3


def losses_and_gradient(logits: Tensor, target: Tensor, which: str) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss, the loss per token and the gradient of the mean, in float64."""
    leaf = logits.detach().double() if which == "float64" else logits.detach().clone()
    leaf.requires_grad_()
    if which == "xentile":
        out = xt.cross_entropy(leaf, target)
        mean, per_token = out.loss, out.token_loss
    else:
        upcast = leaf if which == "float64" else leaf.float()  # 16-bit logits are upcast first, as trainers do
        mean, per_token = F.cross_entropy(upcast, target), F.cross_entropy(upcast, target, reduction="none")
    (gradient,) = torch.autograd.grad(mean, leaf)
    return mean.detach().double(), per_token.detach().double(), gradient.double()


def agreement(logits: Tensor, target: Tensor) -> str:
    """The largest absolute differences between xentile, PyTorch and PyTorch in float64, as a table."""
    ours, theirs, exact = (losses_and_gradient(logits, target, which) for which in ("xentile", "torch", "float64"))
    columns = ((ours, theirs), (ours, exact), (theirs, exact))
    lines = [f"{'largest difference':<22}{'xentile - torch':>18}{'xentile - float64':>20}{'torch - float64':>18}"]
    for i, name in enumerate(("mean loss", "loss of a token", "gradient")):
        errors = [float((a[i] - b[i]).abs().max()) for a, b in columns]
        lines.append(f"{name:<22}{errors[0]:>18.2e}{errors[1]:>20.2e}{errors[2]:>18.2e}")
    return "\n".join(lines)


def milliseconds(step: Callable[[], Tensor], leaf: Tensor) -> float:
    """The time of one forward and backward call."""
    leaf.grad = None
    if leaf.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step().backward()
    if leaf.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def speed(logits: Tensor, target: Tensor) -> str:
    """Medians of forward + backward of both, in turn, so that whatever else the machine does falls on both."""
    leaf = logits.detach().clone().requires_grad_()
    sketch = xt.LossSketch(leaf.device)
    steps = {
        "xentile": lambda: xt.cross_entropy(leaf, target, sketch=sketch).loss,
        "torch": lambda: F.cross_entropy(leaf.float(), target),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(WARM_UP + ROUNDS):
        for name in sorted(steps, reverse=i % 2 == 1):  # whichever goes second may find a warmer cache
            elapsed = milliseconds(steps[name], leaf)
            if i >= WARM_UP:
                times[name].append(elapsed)
    ratio = statistics.median(b / a for a, b in zip(times["xentile"], times["torch"], strict=True))
    return (
        f"{'xentile.cross_entropy, with percentiles':<42}{statistics.median(times['xentile']):>9.2f} ms\n"
        f"{'torch.nn.functional.cross_entropy':<42}{statistics.median(times['torch']):>9.2f} ms\n"
        f"{'time of PyTorch over time of xentile':<42}{ratio:>9.1f}"
    )
