"""Top-K entries as bytes and back: ids exactly, log-probabilities within the stated error, in the stated size."""

from __future__ import annotations

import numpy as np
import pytest
import teachers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xentile as xt
from xentile.cache import packing
from xentile.cache.shard import columns

ROUNDING = 2.0**-21  # relative, of three operations in float32


def entries(generator: np.random.Generator, rows: int, vocab_size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries in any order, some absent, with ranges from nothing to hundreds of nats."""
    ids = np.stack([generator.choice(vocab_size, k, replace=False) for _ in range(rows)]).astype(np.int32)
    logprobs = -(generator.exponential(size=(rows, k)) * 10.0 ** generator.uniform(-6, 2, size=(rows, 1)))
    ids[generator.random((rows, k)) < 0.1] = -1
    logprobs[generator.random((rows, k)) < 0.1] = -np.inf
    return ids, logprobs.astype(np.float32)


def expected(ids: np.ndarray, logprobs: np.ndarray) -> list[dict[int, float]]:
    return [
        {int(i): float(lp) for i, lp in zip(*row, strict=True) if i >= 0 and lp > -1000}
        for row in zip(ids, logprobs, strict=True)
    ]


@given(
    bits=st.integers(0, 20),
    below=st.integers(0, 2**19),
    k=st.integers(1, 80),
    rows=st.integers(0, 5),
    seed=st.integers(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_entries_of_any_vocabulary_come_back(bits: int, below: int, k: int, rows: int, seed: int) -> None:
    vocab_size = 2**bits - below % (2**bits // 2 + 1)
    k = min(k, vocab_size)
    ids, logprobs = entries(np.random.default_rng(abs(seed)), rows, vocab_size, k) if rows else empty(k)
    back_ids, back_logprobs = packing.unpack(packing.pack(ids, logprobs, vocab_size), vocab_size, k)
    assert (back_ids.dtype, back_logprobs.dtype, back_ids.shape) == (np.int32, np.float32, (rows, k))
    for before, after in zip(expected(ids, logprobs), expected(back_ids, back_logprobs), strict=True):
        assert before.keys() == after.keys()
        top, spread = (
            max(before.values(), default=0.0),
            max(before.values(), default=0.0) - min(before.values(), default=0),
        )
        assert max(after.values(), default=0.0) == top
        for token_id, logprob in before.items():
            assert abs(after[token_id] - logprob) <= spread / 8180 + ROUNDING * abs(logprob) + 1e-10


def empty(k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty((0, k), np.int32), np.empty((0, k), np.float32)


@given(width=st.integers(0, 20), k=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_integers_of_any_width_come_back(width: int, k: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width, size=(4, k), dtype=np.uint32)
    packed = packing.pack_bits(values, width)
    assert packed.shape == (4, -(-k * width // 8))
    np.testing.assert_array_equal(packing.unpack_bits(packed, width, k), values)


def test_entries_come_back_by_falling_probability_then_by_id_and_absent_ones_last() -> None:
    ids = np.array([[7, 3, -1, 9, 1]], np.int32)
    logprobs = np.array([[-2.0, -1.0, -0.5, -2.0, -np.inf]], np.float32)
    back_ids, back_logprobs = packing.unpack(packing.pack(ids, logprobs, 10), 10, 5)
    assert back_ids.tolist() == [[3, 7, 9, -1, -1]]
    assert back_logprobs.tolist() == [[-1.0, -2.0, -2.0, -np.inf, -np.inf]]


@pytest.mark.parametrize("vocab_size", [49152, 128256, 151936, 262144, 2**20])
def test_a_token_takes_at_most_240_bytes_at_k_64(vocab_size: int) -> None:
    header = teachers.header(vocab_size=vocab_size, k=64, temperatures=(1.0,), has_token_ids=False)
    size = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in columns(header).values())
    assert size <= 238  # which leaves two for names, checksums and the index


def test_the_columns_are_those_that_are_announced() -> None:
    ids, logprobs = entries(np.random.default_rng(0), 3, 1000, 20)
    packed = packing.pack(ids, logprobs, 1000)
    announced = packing.columns(1000, 20)
    assert {name: (a.dtype.type, a.shape[1:]) for name, a in packed.items()} == announced


@pytest.mark.parametrize("support", ["truncated", "teacher_renormalized", "renormalized", "tail_bucket"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_loss_and_gradient_are_those_of_the_uncompressed_teacher(support: str, divergence: str) -> None:
    """Probabilities are off by a factor of at most 1 + R / 8180, R the range of the token's log-probabilities: the
    absolute values of the error of a token's gradient add up to at most four times that.
    """
    vocab_size, k = 1000, 64
    teacher = xt.teacher_topk(teachers.logits(150, vocab_size), k)
    ids, logprobs = packing.unpack(
        packing.pack(teacher.ids.numpy(), teacher.logprobs.numpy(), vocab_size), vocab_size, k
    )
    student = teachers.logits(150, vocab_size, seed=1) + teachers.logits(150, vocab_size) / 2
    known = {"teacher_tail_logprob": teacher.tail_logprob[:, 0]} if support == "tail_bucket" else {}
    options = {"support": support, "divergence": divergence, "reduction": "none", **known}

    def result(*entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = student.double().requires_grad_()
        loss = xt.topk_distillation_loss(x, *entries, **options).loss
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    exact, exact_gradient = result(teacher.ids, teacher.logprobs)
    stored, stored_gradient = result(torch.from_numpy(ids), torch.from_numpy(logprobs))
    factor = (teacher.logprobs[:, 0] - teacher.logprobs[:, -1]).double() / 8180
    assert ((stored_gradient - exact_gradient).abs().sum(dim=1) <= 4 * factor).all()
    error = (stored - exact).abs() / (1 + exact.abs())
    assert error.max() <= 1e-3
    assert error.median() <= 1e-4
