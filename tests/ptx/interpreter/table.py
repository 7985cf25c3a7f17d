"""Every instruction the interpreter knows: entry -> (modifiers, types). Nothing else is accepted.

An entry is an opcode or an opcode with its first modifier. A modifier that would be silently skipped here gives wrong
numbers (the `.bf16` in `sub.rn.f32.bf16` once did), hence a closed list.
"""

from __future__ import annotations

from itertools import product

INTEGER = "u16 s16 u32 s32 u64 s64"
WORD = "b16 b32 b64"
PLAIN = f"{INTEGER} {WORD} f32 f64"
MIXED = "f32.bf16 f32.f16"  # narrow inputs, float32 result: sm_100 and later
PACKED = "f16x2 bf16x2"
SPACE = "global shared shared::cta"  # generic addresses are not modelled
SCOPE = "relaxed acquire release acq_rel weak volatile gpu sys cta"
CACHE = (
    f"{SCOPE} nc ca cg cs lu cv wb wt L1::evict_first L1::evict_last L1::evict_normal L1::no_allocate "
    "L1::evict_unchanged L2::cache_hint L2::evict_first L2::evict_last L2::evict_normal L2::64B L2::128B L2::256B"
)
RELATIONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan"


def _pairs(to: str, of: str) -> str:
    return " ".join(f"{destination}.{source}" for destination, source in product(to.split(), of.split()))


_ENTRIES: dict[str, tuple[str, str]] = {
    # arithmetic
    "add": ("rn ftz", f"{INTEGER} f32 f64 f32x2 {MIXED}"),
    "sub": ("rn ftz", f"{INTEGER} f32 f64 f32x2 {MIXED}"),
    "mul": ("rn ftz", "f32 f64 f32x2"),
    "mul.lo": ("", INTEGER),
    "mul.hi": ("", "u32 s32 u64 s64"),
    "mul.wide": ("", "u16 s16 u32 s32"),
    "mad.lo": ("", INTEGER),
    "mad.wide": ("", "u16 s16 u32 s32"),
    "fma.rn": ("ftz", f"f32 f64 f32x2 {MIXED}"),
    "div": ("", INTEGER),
    "div.rn": ("ftz", "f32 f64"),
    "div.full": ("ftz", "f32"),
    "div.approx": ("ftz", "f32"),
    "rem": ("", INTEGER),
    "min": ("ftz NaN", f"{INTEGER} f32 f64"),
    "max": ("ftz NaN", f"{INTEGER} f32 f64"),
    "neg": ("ftz", "s16 s32 s64 f32 f64"),
    "abs": ("ftz", "s16 s32 s64 f32 f64"),
    "copysign": ("", "f32 f64"),
    "sqrt.rn": ("ftz", "f32 f64"),
    "rcp.rn": ("ftz", "f32 f64"),
    "ex2.approx": ("ftz", "f32"),
    "lg2.approx": ("ftz", "f32"),
    "tanh.approx": ("", "f32"),
    "rcp.approx": ("ftz", "f32 f64"),
    "sqrt.approx": ("ftz", "f32"),
    "rsqrt.approx": ("ftz", "f32"),
    # bits
    "and": ("", f"pred {WORD}"),
    "or": ("", f"pred {WORD}"),
    "xor": ("", f"pred {WORD}"),
    "not": ("", f"pred {WORD}"),
    "shl": ("", WORD),
    "shr": ("", f"{INTEGER} {WORD}"),
    "shf.l": ("wrap clamp", "b32"),
    "shf.r": ("wrap clamp", "b32"),
    "lop3": ("", "b32"),
    "prmt": ("", "b32"),
    "bfe": ("", "u32 s32 u64 s64"),
    "popc": ("", "b32 b64"),
    "clz": ("", "b32 b64"),
    "brev": ("", "b32 b64"),
    "bfind": ("", "u32 u64"),
    # comparison, selection, moves, conversion
    "setp": (f"{RELATIONS} and or xor ftz", f"{PLAIN} f16 bf16 {PACKED}"),
    "selp": ("", PLAIN),
    "slct": ("", "b32.s32 s32.s32 u32.s32 f32.s32"),
    "mov": ("", f"pred {PLAIN}"),
    "cvta": ("global", "u64"),
    "cvta.to": ("global", "u64"),
    "cvt": ("", _pairs(f"{INTEGER} u8 s8", f"{INTEGER} u8 s8") + " f32.f16 f32.bf16 f64.f32 f64.f16 f64.bf16"),
    "cvt.ftz": ("", "f64.f32"),
    "cvt.rn": (
        "ftz relu",
        " ".join([_pairs("f32 f64", f"{INTEGER} u8 s8"), "f32.f64 f16.f64", _pairs(f"f16 bf16 {PACKED}", "f32")]),
    ),
    **{
        f"cvt.{rounding}": ("ftz sat", _pairs(INTEGER, "f32 f64") + " f32.f32 f64.f64")
        for rounding in ("rzi", "rni", "rmi", "rpi")
    },
    # memory
    "ld.param": ("", f"{PLAIN} u8 s8 b8"),
    "ld": (f"{SPACE} v2 v4 v8 {CACHE}", f"{PLAIN} u8 s8 b8"),
    "st": (f"{SPACE} v2 v4 v8 {CACHE}", f"{PLAIN} u8 s8 b8"),
    "atom": (f"{SPACE} add min max and or xor exch cas inc {CACHE}", "u32 s32 b32 u64 s64 b64 f32 f64"),
    "red": (f"{SPACE} add min max and or xor {CACHE}", "u32 s32 b32 u64 s64 b64 f32 f64"),
    # control; only barrier 0 of the whole block
    "bra": ("uni", ""),
    "ret": ("", ""),
    "exit": ("", ""),
    "bar.sync": ("", ""),
    "barrier.sync": ("aligned", ""),
    "bar.warp": ("sync", ""),
    # warps
    "shfl.sync": ("bfly up down idx", "b32"),
    "vote.sync": ("ballot any all", "b32 pred"),
    "redux.sync": ("add min max and or xor abs NaN", "u32 s32 b32 f32"),
    "elect.sync": ("", ""),
    "ldmatrix.sync": ("aligned m8n8 x1 x2 x4 trans shared shared::cta", "b16"),
    "stmatrix.sync": ("aligned m8n8 x1 x2 x4 trans shared shared::cta", "b16"),
    # no effect in this model: one thread's accesses are seen by all at once, caches do not exist
    "membar": (f"gl {SCOPE}", ""),
    "fence": (f"sc proxy async {SCOPE}", ""),
    "createpolicy": ("fractional L2::evict_first L2::evict_last L2::evict_normal L2::evict_unchanged", "b64"),
    "griddepcontrol": ("wait launch_dependents", ""),
}

TABLE: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    entry: (frozenset(modifiers.split()), frozenset(types.split()) or frozenset({""}))
    for entry, (modifiers, types) in _ENTRIES.items()
}

WITHOUT_EFFECT = frozenset({"membar", "fence", "createpolicy", "griddepcontrol"})
"""Checked like the others, then dropped: their operands are not read."""

SPACES = frozenset(SPACE.split())
