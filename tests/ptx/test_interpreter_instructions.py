"""Single instructions against numpy, and the refusal of whatever the table does not list."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from .handwritten import ADDRESS, LANE, THREADS, run, run_wide
from .interpreter import Kernel, UnsupportedPTX
from .interpreter.kernel import EXECUTORS
from .interpreter.scalars import Array, fma_f32, fma_f64
from .interpreter.table import TABLE

RNG = np.random.default_rng(0)
X: Array = RNG.integers(0, 2**32, THREADS, dtype=np.uint32)
F = RNG.standard_normal(THREADS).astype(np.float32)
S = X.view(np.int32)
INDEX = np.arange(THREADS, dtype=np.uint32)
NAN = np.full(THREADS, np.nan, np.float32)
ZERO, ONE = 0 * X, 0 * X + 1


def _bfloat16_pairs(values: Array) -> Array:
    """The lower and the upper half of each word, read as bf16."""
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(-1, 2)


CASES = {
    "lop3": ("lop3.b32 %r3, %r2, %r1, 255, 0x96;", X, X ^ INDEX ^ 255),
    "popc": ("popc.b32 %r3, %r2;", X, [int(v).bit_count() for v in X]),
    "clz": ("clz.b32 %r3, %r2;", X >> LANE, [32 - int(v).bit_length() for v in X >> LANE]),
    "brev": ("brev.b32 %r3, %r2;", X, [int(f"{v:032b}"[::-1], 2) for v in X]),
    "bfe.u32": ("bfe.u32 %r3, %r2, 5, 7;", X, X >> 5 & 127),
    "bfe.s32": ("bfe.s32 %r3, %r2, 5, 7;", X, (S << 20 >> 25).view(np.uint32)),
    "prmt": ("prmt.b32 %r3, %r2, 0, 0x0123;", X, X.byteswap()),
    "prmt sign": (
        "prmt.b32 %r3, %r2, 0, 0xb210;",
        X,
        X & 0xFFFFFF | np.where(X >> 31, 0xFF000000, 0).astype(np.uint32),
    ),
    "shf.l.wrap": ("shf.l.wrap.b32 %r3, %r2, %r2, 8;", X, X << 8 | X >> 24),
    "shf.r.clamp": ("shf.r.clamp.b32 %r3, %r1, %r2, 40;", X, X),
    "mul.hi": (
        "mul.hi.s32 %r3, %r2, 1717986919;",
        X,
        (S.astype(np.int64) * 1717986919 >> 32).astype(np.int32).view(np.uint32),
    ),
    "div.s32": ("div.s32 %r3, %r2, 7;", X, np.trunc(S / 7).astype(np.int32).view(np.uint32)),
    "rem.s32": ("rem.s32 %r3, %r2, 7;", X, np.fmod(S, 7).view(np.uint32)),
    "shr.s32 too far": ("shr.s32 %r3, %r2, 40;", X, (S >> 31).view(np.uint32)),
    "shl too far": ("shl.b32 %r3, %r2, 32;", X, ZERO),
    "cvt saturates": (
        "cvt.rzi.s32.f32 %r3, %r2;",
        F * np.float32(1e10),
        np.clip((F * np.float32(1e10)).astype(np.float64), -(2**31), 2**31 - 1).astype(np.int64).astype(np.uint32),
    ),
    "cvt of NaN": ("cvt.rzi.s32.f32 %r3, %r2;", NAN, ZERO),
    "setp.ltu of NaN": ("setp.ltu.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 0, %p1;", NAN, ONE),
    "setp.ne of NaN": ("setp.ne.f32 %p1, %r2, 0f00000000; selp.b32 %r3, 1, 0, %p1;", NAN, ZERO),
    "setp and !p": (
        "setp.lt.u32 %p1, %r1, 9; setp.gt.and.u32 %p2, %r1, 3, !%p1; selp.b32 %r3, 1, 0, %p2;",
        X,
        INDEX >= 9,
    ),
    "max ignores NaN": ("max.f32 %r3, %r2, 0f7FC00000;", F, F.view(np.uint32)),
    "max.NaN": ("max.NaN.f32 %r3, %r2, 0f7FC00000; setp.nan.f32 %p1, %r3, %r3; selp.b32 %r3, 1, 0, %p1;", F, ONE),
    "three-input max": ("max.f32 %r3, %r2, 0f3F800000, 0f40000000;", F, np.maximum(F, np.float32(2)).view(np.uint32)),
    "ftz flushes": ("add.ftz.f32 %r3, %r2, 0f00000000;", F * np.float32(1e-39), ZERO),
    "copysign": ("copysign.f32 %r3, %r2, 0f3F800000;", F, np.copysign(np.float32(1), F).view(np.uint32)),
    "slct": ("slct.b32.s32 %r3, 1, 0, %r2;", X, S >= 0),
    "bf16x2": ("cvt.rn.bf16x2.f32 %r3, %r2, 0f7FC00000;", np.ones(THREADS, np.float32), ZERO + 0x3F807FFF),
    "mixed add": (
        "cvt.rn.bf16.f32 %h1, %r2; add.rn.f32.bf16 %r3, %h1, 0f3F800000;",
        INDEX.astype(np.float32),
        (INDEX.astype(np.float32) + 1).view(np.uint32),
    ),
    "ex2 of an integer is exact": ("ex2.approx.ftz.f32 %r3, %r2;", LANE.astype(np.float32), (LANE + 127) << 23),
    "shfl.up": ("shfl.sync.up.b32 %r3, %r1, 1, 0, -1;", X, np.where(LANE == 0, INDEX, INDEX - 1)),
    "shfl.down": ("shfl.sync.down.b32 %r3|%p1, %r1, 1, 31, -1; selp.b32 %r3, 1, 0, %p1;", X, LANE < 31),
    "shfl.idx": ("shfl.sync.idx.b32 %r3, %r1, 3, 31, -1;", X, INDEX - LANE + 3),
    "redux": ("redux.sync.min.s32 %r3, %r2, -1;", X, np.repeat(S.reshape(-1, 32).min(1), 32).view(np.uint32)),
    "vote": ("setp.lt.u32 %p1, %r1, 5; vote.sync.ballot.b32 %r3, %p1, -1;", X, np.repeat([31, 0], 32)),
    "elect": ("elect.sync _|%p1, -1; selp.b32 %r3, 1, 0, %p1;", X, LANE == 0),
    "vector mov": ("mov.b32 {%h1, %h2}, %r2; mov.b32 %r3, {%h2, %h1};", X, X << 16 | X >> 16),
    "ldmatrix": (
        (
            f"{ADDRESS} st.shared.b32 [%r5], %r2; bar.sync 0; mov.u32 %r7, %laneid; and.b32 %r8, %r7, 15;"
            "mul.lo.s32 %r8, %r8, 16; add.s32 %r8, %r8, %r4;"
            "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r3, %r9}, [%r8]; bar.sync 0; st.shared.b32 [%r5], %r9;"
            "bar.sync 0; add.s32 %r3, %r3, %r9;"
        ),
        X,
        np.tile(X[:32] + X[32:], 2),
    ),
    "ldmatrix.trans": (
        (
            f"{ADDRESS} st.shared.b32 [%r5], %r2; bar.sync 0; mov.u32 %r7, %laneid; and.b32 %r8, %r7, 7;"
            "mul.lo.s32 %r8, %r8, 16; add.s32 %r8, %r8, %r4;"
            "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r8];"
        ),
        X,
        np.tile(np.ascontiguousarray(X[:32].view(np.uint16).reshape(8, 8).T).view(np.uint32).ravel(), 2),
    ),
    "stmatrix": (
        (
            f"{ADDRESS} mov.u32 %r7, %laneid; and.b32 %r8, %r7, 7; sub.s32 %r9, %r1, %r7; mad.lo.s32 %r8, %r8, 16, %r4;"
            "mad.lo.s32 %r8, %r9, 4, %r8; stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r8], {%r2}; bar.sync 0;"
            "ld.shared.b32 %r3, [%r5];"
        ),
        X,
        np.ascontiguousarray(X.view(np.uint16).reshape(2, 8, 8).swapaxes(1, 2)).view(np.uint32).ravel(),
    ),
    "bfloat16 compare": (
        "mov.b32 {%h1, %h2}, %r2; setp.gt.bf16 %p1, %h1, %h2; selp.b32 %r3, 1, 0, %p1;",
        F,
        _bfloat16_pairs(F)[:, 0] > _bfloat16_pairs(F)[:, 1],
    ),
    "packed bfloat16 compare": (
        "mov.b32 %r4, 0x3F803F80; setp.gt.bf16x2 %p1|%p2, %r2, %r4; selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 2, 0, %p2;"
        "add.s32 %r3, %r5, %r6;",
        F,
        (_bfloat16_pairs(F) > 1) @ np.array([1, 2]),
    ),
    "packed float16 compare": (
        (
            "setp.lt.f16x2 %p1|%p2, %r2, 0x3C003C00; selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 2, 0, %p2;"
            "add.s32 %r3, %r5, %r6;"
        ),
        X,
        (X.view(np.float16).reshape(-1, 2) < 1) @ np.array([1, 2]),
    ),
    "inner scope": ("{ .reg .b32 %r1; mov.b32 %r1, 7; } mov.b32 %r3, %r1;", X, INDEX),
    "loop of different length": (
        "mov.b32 %r3, 0;\nLOOP:\nsetp.ge.u32 %p1, %r3, %r1; @%p1 bra DONE; add.s32 %r3, %r3, 1; bra LOOP;\nDONE:\n",
        X,
        INDEX,
    ),
    "exchange through shared memory": (
        f"{ADDRESS} st.shared.b32 [%r5], %r2; bar.sync 0; ld.shared.b32 %r3, [%r6];",
        X,
        X[::-1],
    ),
    "shared memory starts as 0xFF": ("atom.shared.cas.b32 %r3, [buf], -1, 5;", X, [2**32 - 1] + [5] * (THREADS - 1)),
    "a barrier counts out those who left": (
        "setp.lt.u32 %p1, %r1, 9; mov.b32 %r3, 1; @%p1 st.global.b32 [%rd3], %r3; @%p1 ret; bar.sync 0;",
        X,
        ONE,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_instruction_equals_numpy(name: str) -> None:
    body, given, wanted = CASES[name]
    np.testing.assert_array_equal(run(body, given), np.asarray(wanted).astype(np.uint32))


WIDE = RNG.integers(0, 2**64, THREADS, dtype=np.uint64)
SMALL = WIDE >> np.uint64(16)
WIDE_CASES = {
    "mul.hi.u64": ("mul.hi.u64 %rd6, %rd5, %rd5;", WIDE, [int(v) * int(v) >> 64 for v in WIDE]),
    "bfe.u64": ("bfe.u64 %rd6, %rd5, 40, 9;", WIDE, WIDE >> np.uint64(40) & np.uint64(511)),
    "bfe.s64": ("bfe.s64 %rd6, %rd5, 40, 9;", WIDE, (WIDE.view(np.int64) << 15 >> 55).view(np.uint64)),
    "atomic max of int64": ("atom.global.max.s64 %rd6, [%rd3], %rd5; ld.global.b64 %rd6, [%rd3];", SMALL, SMALL),
    "float64 arithmetic": (
        (
            "cvt.rn.f64.u64 %d1, %rd5; fma.rn.f64 %d1, %d1, 0d3FF8000000000000, 0d3FF0000000000000;"
            "cvt.rni.s64.f64 %rd6, %d1;"
        ),
        WIDE >> np.uint64(20),
        np.rint((WIDE >> np.uint64(20)).astype(np.float64) * 1.5 + 1).astype(np.uint64),
    ),
    "cvt.rzi.s64.f32": (
        "cvt.rn.f32.u32 %f1, %r1; cvt.rzi.s64.f32 %rd6, %f1;",
        WIDE,
        INDEX.astype(np.uint64),
    ),
}


@pytest.mark.parametrize("name", WIDE_CASES)
def test_wide_instruction_equals_numpy(name: str) -> None:
    body, given, wanted = WIDE_CASES[name]
    np.testing.assert_array_equal(run_wide(body, given), np.asarray(wanted, np.uint64))


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("tex.2d.v4.f32.s32 {%f1, %f2, %f3, %f4}, [t, {%r1, %r1}];", id="opcode"),
        pytest.param("add.sat.f32 %r3, %r2, %r2;", id="modifier"),
        pytest.param("ld.global.L2::192B.b32 %r3, [%rd4];", id="cache modifier"),
        pytest.param("add.f16 %h1, %h2, %h3;", id="type"),
        pytest.param("fma.rz.f32 %r3, %r2, %r2, %r2;", id="rounding"),
        pytest.param("mul.s32 %r3, %r2, %r2;", id="missing .lo, .hi or .wide"),
        pytest.param("ld.b32 %r3, [%rd4];", id="generic address"),
        pytest.param("ld.shared::cluster.b32 %r3, [%r4];", id="state space"),
        pytest.param("setp.lt.s32 %p1|%p2, %r1, %r2;", id="second destination"),
        pytest.param("mov.u64 %rd5, some_global;", id="symbol"),
        pytest.param("bar.sync 1, 32;", id="partial barrier"),
        pytest.param("mov.u32 %r3, %clock;", id="special register"),
        pytest.param("call.uni f;", id="call"),
    ],
)
def test_unknown_ptx_is_rejected_when_parsed(statement: str) -> None:
    with pytest.raises(UnsupportedPTX):
        run(statement, X, parse_only=True)


@pytest.mark.parametrize(
    "statement",
    [
        pytest.param("shfl.sync.bfly.b32 %r3, %r1, 1, 7, -1;", id="part of a warp"),
        pytest.param("redux.sync.add.u32 %r3, %r1, 255;", id="member mask"),
        pytest.param("add.s32 %r3, %r2, %r2, %r2;", id="one operand too many"),
        pytest.param("ld.global.v2.b32 %r3, [%rd4];", id="vector into one register"),
        pytest.param("add.f32 %r3, %r2, 7;", id="integer as a float"),
        pytest.param("add.s32 %r3, %h1, %r2;", id="narrow register"),
    ],
)
def test_wrong_operands_are_rejected_when_run(statement: str) -> None:
    with pytest.raises(UnsupportedPTX):
        run(statement, X)


def test_every_entry_of_the_table_has_an_implementation() -> None:
    assert TABLE.keys() == EXECUTORS.keys()


def test_kernel_is_chosen_by_name() -> None:
    text = ".visible .entry first() .reqntid 32 { ret; } .visible .entry second() .reqntid 64 { ret; }"
    assert Kernel(text, "second").program.block == 64
    with pytest.raises(ValueError, match=r"no \.entry third"):
        Kernel(text, "third")


def _float32(*values: float) -> Array:
    return np.array(values, np.float32)


def test_float32_fma_rounds_once() -> None:
    # 1 + 2**-24 lies half-way between two float32 numbers; what decides is too small for the float64 sum
    half_unit = _float32(2.0**-12)
    assert fma_f32(half_unit, half_unit, _float32(1))[0] == 1
    assert fma_f32(half_unit, _float32(2.0**-12 + 2.0**-34), _float32(1))[0] == 1 + 2.0**-23
    assert fma_f32(_float32(1 + 2.0**-23), _float32(1 + 2.0**-23), _float32(2.0**-100))[0] == 1 + 2.0**-22
    tie = _float32(1 + 2.0**-12)  # its square is 1 + 2**-11 + 2**-24: a tie
    assert fma_f32(tie, tie, _float32(0))[0] == 1 + 2.0**-11
    assert fma_f32(tie, tie, _float32(2.0**-100))[0] == 1 + 2.0**-11 + 2.0**-23
    assert fma_f32(tie, tie, _float32(-(2.0**-100)))[0] == 1 + 2.0**-11


def test_float32_fma_equals_exact_arithmetic_where_the_product_cancels() -> None:
    a, b = (1 + RNG.integers(0, 2**23, 500) * 2.0**-23 for _ in range(2))
    c = (-(a * b) * (1 + RNG.integers(-3, 4, 500) * 2.0**-24)).astype(np.float32)
    exact = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c.tolist(), strict=True)]
    np.testing.assert_array_equal(fma_f32(a.astype(np.float32), b.astype(np.float32), c), _float32(*exact))


def test_float64_fma_keeps_the_low_half_of_the_product() -> None:
    a = np.array([1 + 2.0**-30])
    assert fma_f64(a, a, -(a * a))[0] == 2.0**-60


def test_approximations_err_but_within_their_bound() -> None:
    x = np.linspace(-20, 20, THREADS).astype(np.float32)
    y = run("ex2.approx.ftz.f32 %r3, %r2;", x).view(np.float32)
    error = np.abs(y / np.exp2(x.astype(np.float64)) - 1)
    assert 2.0**-25 < error.max() < 2.0**-22 + 2.0**-24
    np.testing.assert_array_equal(y, run("ex2.approx.ftz.f32 %r3, %r2;", x).view(np.float32))
