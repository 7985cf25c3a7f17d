"""The layout of a loss sketch: which column of its int64 state counts what.

A value x > 0 falls in the bin of its float32 bits cut to M mantissa bits (7 unless chosen otherwise), so bins are
log-linear: each octave is split in 2**M bins of equal width, and the relative width of a bin is at most 2**-M. Order of
bits = order of values, hence the bin is two integer operations, and identical on every backend. The regular bins cover
[2**-24, 2**8) nats. Bins of M nest in those of M - 1: adding them up in pairs coarsens a sketch exactly.

    bin(x)   = (bits(x) >> (23 - M)) - ((127 - 24) << M)                bits: the float32 pattern as an integer
    edge(i)  = float32 with the pattern (i + ((127 - 24) << M)) << (23 - M)      bin i is [edge(i), edge(i + 1))

State: int64 [G, width], one row a group, all zeros when empty: SPECIAL columns that are the same for every M, then the
bins. All columns merge by addition but MAX_KEY and MIN_KEY, which merge by maximum; both are exact, so a merge is
associative, commutative and bitwise reproducible. The special columns:

* ZERO: x < 2**-24 (zero, subnormal, negative); OVERFLOW: finite x >= 2**8; INF: +inf; NAN: NaN and -inf.
* IGNORED: tokens whose target is `ignore_index`; OUT_OF_RANGE: tokens whose target is outside [0, V);
  BAD_GROUP: tokens whose group is outside [0, G), in row 0, whatever else is to be said of them.
* Sums over the finite values, each an integer in limbs, hence exact and independent of the order:
  sum x   = SUM_HI * 2**-20 + SUM_LO * 2**-48                     x clamped to +-2**24; exact for |x| >= 2**-25
  sum x^2 = SQ_HI * 2**17 + SQ_MID * 2**-20 + SQ_LO * 2**-48      exact for |x| >= 1/2
  A limb of a value is the integer nearest to what the limbs before it leave, half to even: to add a constant, in whose
  neighbourhood doubles are as far apart as the limb's unit, and to take its bits, is all it takes. So a value in the
  bins has no SQ_HI, and sums are right for 2**35 values or more, as long as sum x^2 is below 2**43 over the bins.
* MAX_KEY, MIN_KEY: the extreme values (without NaN and -inf), as keys that grow with the maximum and with minus the
  minimum. With k the order-preserving signed integer of a float32: MAX_KEY = k + 2**31 + 1, MIN_KEY = 2**31 - k.
"""

from __future__ import annotations

from dataclasses import dataclass

E_MIN, E_MAX = -24, 8
LIMIT = 2.0**24  # values are clamped to +-LIMIT in the sums,
WEIGHED_LIMIT = 2.0**30  # and a value times its weight to this; its square times its weight to LIMIT squared

ZERO, OVERFLOW, INF, NAN = 0, 1, 2, 3
IGNORED, OUT_OF_RANGE, BAD_GROUP = 4, 5, 6
SUM_LO, SUM_HI = 7, 8
SQ_LO, SQ_MID, SQ_HI = 9, 10, 11
MAX_KEY, MIN_KEY = 12, 13
SUM_LIMBS = ((SUM_HI, -20), (SUM_LO, -48))  # with the exponent of what one of it stands for
SQUARE_LIMBS = ((SQ_HI, 17), (SQ_MID, -20), (SQ_LO, -48))
EXTREMES = slice(MAX_KEY, MIN_KEY + 1)
SPECIAL = 16  # the first bin; rows stay 128-byte aligned

PRECISIONS = range(1, 11)  # M of the sketches that are offered

INTERPOLATIONS = ("linear", "lower", "higher", "nearest", "midpoint")  # order = the integer code in the ops
REDUCTIONS = ("none", "mean", "sum")
SUPPORTS = ("truncated", "teacher_renormalized", "renormalized", "tail_bucket", "sampled")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tv")
DUPLICATES = ("sum", "first", "refuse")
FALLBACKS = ("none", "renormalize", "uniform_tail")


@dataclass(frozen=True)
class Layout:
    """The bins for M mantissa bits."""

    mantissa_bits: int = 7

    @property
    def bins(self) -> int:
        """How many regular bins there are."""
        return (E_MAX - E_MIN) << self.mantissa_bits

    @property
    def width(self) -> int:
        """Columns of a state."""
        return SPECIAL + self.bins

    @property
    def shift(self) -> int:
        """Bits of a float32 below those that choose the bin."""
        return 23 - self.mantissa_bits

    @property
    def first_key(self) -> int:
        """The float32 bits of the first edge, without their last `shift`."""
        return (127 + E_MIN) << self.mantissa_bits

    @classmethod
    def of_width(cls, width: int) -> Layout:
        """The layout of a state with so many columns; ValueError if there is none."""
        for bits in PRECISIONS:
            if cls(bits).width == width:
                return cls(bits)
        raise ValueError(f"a sketch's state must have SPECIAL + 32 * 2**M columns, M in 1 ... 10, got {width}")


DEFAULT = Layout()
