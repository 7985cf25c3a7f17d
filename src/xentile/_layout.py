"""The layout of a loss sketch: which column of its int64 state counts what.

A value x > 0 falls in the bin of its float32 bits cut to 7 mantissa bits, so bins are log-linear: each octave is split
in 2**7 bins of equal width, and the relative width of a bin is at most 2**-7. Order of bits = order of values, hence
the bin is two integer operations, and identical on every backend. The regular bins cover [2**-24, 2**8) nats.

    bin(x)   = (bits(x) >> 16) - ((127 - 24) << 7)                 bits: the float32 pattern as an integer
    edge(i)  = float32 with the pattern (i + ((127 - 24) << 7)) << 16       bin i is [edge(i), edge(i + 1))

State: int64 [G, WIDTH], one row a group, all zeros when empty. Columns below ADDITIVE merge by addition, the two after
it by maximum; both are exact, so a merge is associative, commutative and bitwise reproducible. The columns from BINS on
hold:

* ZERO: x < 2**-24 (zero, subnormal, negative); OVERFLOW: finite x >= 2**8; INF: +inf; NAN: NaN and -inf.
* IGNORED: tokens whose target is `ignore_index`; OUT_OF_RANGE: tokens whose target is outside [0, V);
  BAD_GROUP: tokens whose group is outside [0, G), in row 0, whatever else is to be said of them.
* Sums over the finite values, each an integer in limbs, hence exact and independent of the order:
  sum x   = SUM_HI * 2**-20 + SUM_LO * 2**-48              x clamped to +-2**24, rounded to a multiple of 2**-48, which
  sum x^2 = SQ_HI * 2**8 + SQ_MID * 2**-20 + SQ_LO * 2**-48      is exact for every |x| >= 2**-25
* MAX_KEY, MIN_KEY: the extreme values (without NaN and -inf), as keys that grow with the maximum and with minus the
  minimum. With k the order-preserving signed integer of a float32: MAX_KEY = k + 2**31 + 1, MIN_KEY = 2**31 - k.
"""

MANTISSA_BITS = 7
E_MIN, E_MAX = -24, 8
BINS = (E_MAX - E_MIN) << MANTISSA_BITS
SHIFT = 23 - MANTISSA_BITS
FIRST_KEY = (127 + E_MIN) << MANTISSA_BITS  # key of the first regular bin

ZERO, OVERFLOW, INF, NAN = BINS, BINS + 1, BINS + 2, BINS + 3
IGNORED, OUT_OF_RANGE, BAD_GROUP = BINS + 4, BINS + 5, BINS + 6
SUM_LO, SUM_HI = BINS + 7, BINS + 8
SQ_LO, SQ_MID, SQ_HI = BINS + 9, BINS + 10, BINS + 11
ADDITIVE = BINS + 12
MAX_KEY, MIN_KEY = BINS + 12, BINS + 13
WIDTH = BINS + 16  # a multiple of 16 columns: rows stay 128-byte aligned

LIMIT = 2.0**24  # values are clamped to +-LIMIT in the sums

INTERPOLATIONS = ("linear", "lower", "higher", "nearest", "midpoint")  # order = the integer code in the ops
REDUCTIONS = ("none", "mean", "sum")
