"""Planted mistakes that the interpreter must catch, and the counts it keeps."""

from __future__ import annotations

import numpy as np
import pytest

from .handwritten import ADDRESS, FRAME, THREADS, launch, run
from .interpreter import Deadlock, GlobalMemoryRace, Kernel, MemoryFault, Offset, Scattered, SharedMemoryRace

X = np.arange(THREADS, dtype=np.uint32)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(
            "ld.global.b32 %r3, [%rd4+4];",
            "out of bounds 4-byte access, block 0 thread 63: ld.global",
            id="past the end",
        ),
        pytest.param(
            "ld.global.b32 %r3, [%rd4+-4];", "out of bounds 4-byte access, block 0 thread 0", id="before the start"
        ),
        pytest.param("ld.global.b32 %r3, [%rd2+2];", "misaligned 4-byte access", id="misaligned"),
        pytest.param("ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd4];", "misaligned 16-byte", id="misaligned vector"),
        pytest.param("st.global.b32 [%rd3+4096], %r2;", "out of bounds", id="store"),
        pytest.param("atom.global.add.u32 %r3, [%rd3+4], 1;", "out of bounds", id="atomic"),
        pytest.param("mov.b64 %rd5, 0; ld.global.b32 %r3, [%rd5];", "out of bounds", id="null pointer"),
        pytest.param("ld.shared.b32 %r3, [buf+256];", "out of bounds 4-byte shared access", id="shared"),
        pytest.param("ld.shared.b32 %r3, [buf+2];", "misaligned 4-byte shared access", id="misaligned shared"),
    ],
)
def test_bad_access_is_reported_with_its_place(body: str, what: str) -> None:
    with pytest.raises(MemoryFault, match=what):
        run(body, X)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(
            f"{ADDRESS} st.shared.b32 [%r5], %r2; ld.shared.b32 %r3, [%r6];",
            "loads what another thread stored",
            id="store, load",
        ),
        pytest.param(
            f"{ADDRESS} ld.shared.b32 %r3, [%r6]; st.shared.b32 [%r5], %r2;",
            "overwrites what another thread loaded",
            id="load, store",
        ),
        pytest.param(
            f"{ADDRESS} st.shared.b32 [%r5], %r2; st.shared.b32 [%r6], %r2; mov.b32 %r3, 0;",
            "overwrites what another thread stored",
            id="store, store",
        ),
        pytest.param("st.shared.b32 [buf], %r2; mov.b32 %r3, 0;", "stores another value", id="two warps store at once"),
        pytest.param(
            f"{ADDRESS} st.shared.b32 [%r5], %r2; bar.warp.sync -1; ld.shared.b32 %r3, [%r6];",
            "loads what another thread stored",
            id="a warp barrier between warps",
        ),
    ],
)
def test_missing_barrier_is_a_race(body: str, what: str) -> None:
    with pytest.raises(SharedMemoryRace, match=what):
        run(body, X)


def test_warp_barrier_orders_the_lanes_of_a_warp() -> None:
    body = (
        "mov.u32 %r4, buf; mad.lo.s32 %r5, %r1, 4, %r4; xor.b32 %r6, %r5, 4;"
        "st.shared.b32 [%r5], %r2; bar.warp.sync -1; ld.shared.b32 %r3, [%r6];"
        "bar.warp.sync -1; st.shared.b32 [%r5], %r1;"
    )
    np.testing.assert_array_equal(run(body, X), X ^ 1)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            "setp.lt.u32 %p1, %r1, 9; @%p1 bra SKIP; bar.sync 0;\nSKIP:\n bar.sync 0; mov.b32 %r3, 0;", id="block"
        ),
        pytest.param(
            "setp.lt.u32 %p1, %r1, 9; @%p1 bra SKIP; bar.warp.sync -1;\nSKIP:\n bar.sync 0; mov.b32 %r3, 0;", id="warp"
        ),
    ],
)
def test_barrier_that_some_threads_skip_is_a_deadlock(body: str) -> None:
    with pytest.raises(Deadlock):
        run(body, X)


def test_endless_loop_is_a_deadlock() -> None:
    text = FRAME.replace("SIZE", "4").replace("BITS", "32").replace("INPUT", "%r2").replace("OUTPUT", "%r2")
    kernel = Kernel(text.replace("BODY", "\nAGAIN:\n bra AGAIN;"))
    with pytest.raises(Deadlock, match="step limit"):
        kernel.launch((1,), [X.copy(), X.copy()], step_limit=1000)


def test_unset_register_is_poison() -> None:
    np.testing.assert_array_equal(run("mov.b32 %r3, %r9;", X), np.full(THREADS, 0xFFFFFFFF, np.uint32))


def test_bytes_requests_and_sectors_are_counted() -> None:
    _, counts = launch("mov.b32 %r3, 1;", X)
    assert (counts.loaded, counts.stored) == ({1: 4 * THREADS}, {0: 4 * THREADS})
    assert (counts.load_requests[1], counts.load_sectors[1]) == (2, 8)
    assert counts.instructions == 9 * THREADS


def test_atomics_are_counted_per_argument() -> None:
    _, counts = launch("red.global.add.u32 [%rd1], 1; red.global.add.f32 [%rd1+4], 0f3F800000; mov.b32 %r3, 1;", X)
    assert counts.atomics == {0: 2 * THREADS}
    assert counts.float_atomics == THREADS


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param("st.global.b32 [%rd1], %r2; mov.b32 %r3, 0;", "overwrites what another stored", id="one address"),
        pytest.param("st.global.b32 [%rd3], %r1; ld.global.b32 %r3, [%rd1];", "loads what another stored", id="load"),
        pytest.param("ld.global.b32 %r3, [%rd1]; add.s32 %r3, %r3, 1;", "overwrites what another loaded", id="store"),
    ],
)
def test_global_race_is_found_on_request(body: str, what: str) -> None:
    given = X + np.uint32(5)
    run(body, given)
    with pytest.raises(GlobalMemoryRace, match=what):
        run(body, given, races=True)


def test_barrier_orders_the_threads_of_a_block() -> None:
    body = "ld.global.b32 %r4, [%rd1]; bar.sync 0; mov.b32 %r3, 7;"
    np.testing.assert_array_equal(run(body, X, races=True), np.full(THREADS, 7))


COPY = """.visible .entry copy(.param .u64 to, .param .u64 from, .param .u64 stride) .reqntid 32 {
    .reg .b32 %r<4>; .reg .b64 %rd<8>; .reg .b16 %h<2>;
    ld.param.u64 %rd1, [to]; ld.param.u64 %rd2, [from]; ld.param.u64 %rd3, [stride];
    mov.u32 %r1, %ctaid.x; cvt.u64.u32 %rd4, %r1; mul.lo.s64 %rd5, %rd4, %rd3; add.s64 %rd2, %rd2, %rd5;
    mov.u32 %r2, %tid.x; mul.wide.u32 %rd6, %r2, 2; add.s64 %rd2, %rd2, %rd6; ld.global.b16 %h1, [%rd2];
    mad.lo.s32 %r3, %r1, 32, %r2; mul.wide.u32 %rd7, %r3, 2; add.s64 %rd1, %rd1, %rd7;
    st.global.b16 [%rd1], %h1; ret; }"""


def test_pointer_into_an_array() -> None:
    to, source = np.zeros(32, np.uint16), np.arange(40, dtype=np.uint16)
    Kernel(COPY).launch((1,), [to, Offset(source, 6), 0])
    np.testing.assert_array_equal(to, source[3:35])


def test_pieces_of_a_huge_array() -> None:
    rows = np.arange(64, dtype=np.uint16).reshape(2, 32)
    to, stride = np.zeros(64, np.uint16), 2**40 + 2
    Kernel(COPY).launch((2,), [to, Scattered({0: rows[0], stride: rows[1]}), stride])
    np.testing.assert_array_equal(to, rows.ravel())
    with pytest.raises(MemoryFault, match="block 1 thread 0"):
        Kernel(COPY).launch((2,), [to, Scattered({0: rows[0], stride: rows[1]}), stride - 2])


def test_blocks_run_in_the_order_asked_for() -> None:
    text = """.visible .entry order(.param .u64 counter, .param .u64 out) .reqntid 32 {
        .reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
        ld.param.u64 %rd1, [counter]; ld.param.u64 %rd2, [out]; mov.u32 %r1, %tid.x; setp.ne.u32 %p1, %r1, 0; @%p1 ret;
        mov.u32 %r2, %ctaid.x; atom.global.add.u32 %r3, [%rd1], 1;
        mul.wide.u32 %rd3, %r2, 4; add.s64 %rd2, %rd2, %rd3; st.global.b32 [%rd2], %r3; ret; }"""
    out = np.zeros(3, np.uint32)
    Kernel(text).launch((3,), [np.zeros(1, np.uint32), out], block_order=[2, 0, 1])
    np.testing.assert_array_equal(out, [1, 2, 0])
