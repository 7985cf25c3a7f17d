// Divergences between a teacher's masses p and a student's q, for vectors of columns: what
// xentile/reference/divergence.py describes, in float32. There each logarithm is taken from logits; here what is known
// first is d = log q - log p, and ratios are taken from it: where p and q are nearly equal no digit is lost.
#pragma once
#include "dense_kernels.h"
#include "simd.h"

namespace {
using xentile::DenseCoefficients;
using xentile::DenseConstants;

XENTILE_INLINE VecF when(VecI mask, VecF v) { return (VecF)(mask & (VecI)v); }
XENTILE_INLINE VecF magnitude(VecF v) { return (VecF)((VecI)v & 0x7fffffff); }

// A mass times a logarithm: 0 where the mass is 0 and the logarithm infinite.
XENTILE_INLINE VecF times(VecF mass, VecF log) { return when(mass > 0.0f, mass * log); }

// exp(x) = scale + scale * rest for x <= 0, with |rest| < 1/2 to 1.8e-8 of its own. `exp_parts` in simd.h, an
// instruction shorter, is within 1.05e-7: enough for a sum, but a gradient may be the difference of two masses.
struct Power {
  VecF scale, rest;

  explicit XENTILE_INLINE Power(VecF x) {
    constexpr float kLog2E = 1.44269504f, kRound = 12582912.0f + 127;  // adding it rounds to an integer in the low bits
    constexpr float kLowest = -88.03f;                                 // a scale of exactly 0
    x = max(splat(kLowest), x);
    const VecF shifted = x * kLog2E + kRound, n = shifted - kRound;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    const VecF r = x - n * 0.693147182f;  // ln 2 happens to be within 2**-28 of a float
#else
    const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
#endif
    VecF p = r * 0x1.6bebf2p-10f + 0x1.1227f6p-7f;
    p = p * r + 0x1.555674p-5f;
    p = p * r + 0x1.5554bp-3f;
    p = p * r + 0x1.fffffep-2f;
    rest = p * (r * r) + r;
    scale = (VecF)((VecI)shifted << 23);
  }
  XENTILE_INLINE VecF value() const { return multiply_add(scale, rest, scale); }
  XENTILE_INLINE VecF one_minus_value() const { return (1.0f - scale) - scale * rest; }
};

// exp(x) - 1 - x for |x| < 1, within 1.1e-7 of its own.
XENTILE_INLINE VecF excess(VecF x) {
  VecF p = x * 0x1.a2c5ep-16f + 0x1.aa419cp-13f;
  p = p * x + 0x1.6c272cp-10f;
  p = p * x + 0x1.10fce8p-7f;
  p = p * x + 0x1.555504p-5f;
  p = p * x + 0x1.55557cp-3f;
  p = p * x + 0.5f;
  return p * (x * x);
}

// log(m) for m in (0, 1], given also 1 - m, in which the digits of a small logarithm are.
XENTILE_INLINE VecF log_of(VecF m, VecF one_minus_m) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const VecI bits = (VecI)m - kRootHalf;
  const VecI exponent = bits >> 23;  // of 2 in m = 2**exponent * mantissa, mantissa in [sqrt(1/2), sqrt(2))
  const VecF mantissa = (VecF)((bits & 0x7fffff) + kRootHalf);
  const VecF f = select(exponent == 0, -one_minus_m, mantissa - 1.0f);
  VecF p = f * 0x1.645eacp-4f - 0x1.2432b8p-3f;  // log(1 + f) = f + p f**2, within 3.5e-8 of its own
  p = p * f + 0x1.317458p-3f;
  p = p * f - 0x1.53824ap-3f;
  p = p * f + 0x1.98d7f2p-3f;
  p = p * f - 0x1.000382p-2f;
  p = p * f + 0x1.5556d8p-2f;
  p = p * f - 0.5f;
  return __builtin_convertvector(exponent, VecF) * 0.693147182f + (p * (f * f) + f);
}

// a log(a / b) - a + b >= 0, x = log(b / a)
XENTILE_INLINE VecF bregman(VecF a, VecF b, VecF x) {
  return select(magnitude(x) < 1.0f, a * excess(x), (b - a) - times(a, x));
}

// Columns of a row: y relative to its maximum, of student and teacher, and d = log q - log p, which is NaN for a column
// at -inf in both.
struct Columns {
  VecF student, teacher, d;

  XENTILE_INLINE Columns(const DenseConstants& c, VecF z, VecF x)
      : student((z - c.student_max) * c.inverse_temperature), teacher((x - c.teacher_max) * c.inverse_temperature) {
    d = (student - teacher) + c.log_ratio;
  }
};

struct Masses {
  VecF p, q;

  XENTILE_INLINE Masses(const DenseConstants& c, const Columns& y)
      : p(Power(y.teacher).value() * c.teacher_factor), q(Power(y.student).value() * c.student_factor) {}
};

// The masses by one exponential, of the larger one, and their ratio.
struct RelatedMasses {
  VecF d;  // 0 for a column at -inf in both
  VecI student_larger;
  VecF ratio, one_minus_ratio;  // of the smaller mass to the larger one
  VecF larger, smaller;

  XENTILE_INLINE RelatedMasses(const DenseConstants& c, const Columns& y)
      : d(when(y.d == y.d, y.d)), student_larger(d > 0.0f) {
    const Power decay(-magnitude(d));
    ratio = decay.value(), one_minus_ratio = decay.one_minus_value();
    const VecF factor = select(student_larger, splat(c.student_factor), splat(c.teacher_factor));
    larger = Power(select(student_larger, y.student, y.teacher)).value() * factor;
    smaller = larger * ratio;
  }
  XENTILE_INLINE VecF p() const { return select(student_larger, smaller, larger); }
  XENTILE_INLINE VecF q() const { return select(student_larger, larger, smaller); }
};

// M = teacher_share p + student_share q
struct Mixture {
  RelatedMasses masses;
  VecF relative;      // M / the larger mass
  VecF log_p, log_q;  // log(M / p), log(M / q)

  XENTILE_INLINE Mixture(const DenseConstants& c, const Columns& y) : masses(c, y) {
    const VecF teacher = splat(c.teacher_share), student = splat(c.student_share);
    const VecF of_smaller = select(masses.student_larger, teacher, student);
    const VecF of_larger = select(masses.student_larger, student, teacher);
    relative = multiply_add(of_smaller, masses.ratio, of_larger);
    const VecF log = log_of(relative, of_smaller * masses.one_minus_ratio);
    log_p = log + when(masses.student_larger, masses.d);
    log_q = log - when(~masses.student_larger, masses.d);
  }
  XENTILE_INLINE VecF mass() const { return masses.larger * relative; }
  XENTILE_INLINE VecF p_share() const {  // p / M
    return select(masses.student_larger, masses.ratio, splat(1)) / relative;
  }
};

// f, q, and df/dq up to what cancels in q (df/dq - E); for the forward KL divergence -q df/dq, where q may be 0.
struct Term {
  VecF value, q, slope;
};

struct ForwardKl {
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Masses m(c, y);
    return {bregman(m.p, m.q, y.d), m.q, m.p};
  }
  static XENTILE_INLINE VecF expected_slope(const Term& t) { return -t.slope; }
  // By explicit multiply_add: with and without the value it has to be the same bits.
  static XENTILE_INLINE VecF gradient(const Term& t, const DenseCoefficients& g) {
    return multiply_add(t.q, splat(g.mass - g.divergence * g.expected), t.slope * -g.divergence);
  }
};

// Divergences with a finite df/dq wherever q > 0.
struct Sloped {
  static XENTILE_INLINE VecF expected_slope(const Term& t) { return times(t.q, t.slope); }
  static XENTILE_INLINE VecF gradient(const Term& t, const DenseCoefficients& g) {
    return times(t.q, multiply_add(t.slope - g.expected, splat(g.divergence), splat(g.mass)));
  }
};

struct ReverseKl : Sloped {
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Masses m(c, y);
    return {bregman(m.q, m.p, -y.d), m.q, y.d};
  }
};

struct Jsd : Sloped {
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Mixture m(c, y);
    const VecF p = m.masses.p(), q = m.masses.q(), mass = m.mass();
    const VecF value = c.teacher_share * bregman(p, mass, m.log_p) + c.student_share * bregman(q, mass, m.log_q);
    return {value, q, -c.student_share * m.log_q};
  }
};

struct SkewForwardKl : Sloped {
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Mixture m(c, y);
    return {bregman(m.masses.p(), m.mass(), m.log_p), m.masses.q(), -c.student_share * m.p_share()};
  }
};

struct SkewReverseKl : Sloped {
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Mixture m(c, y);
    const VecF q = m.masses.q();
    return {bregman(q, m.mass(), m.log_q), q, c.teacher_share * m.p_share() - m.log_q};
  }
};

struct TotalVariation : Sloped {
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const RelatedMasses m(c, y);
    const VecF sign = (VecF)(((VecI)splat(0.5f)) | ((VecI)m.d & INT32_MIN));
    return {0.5f * (m.larger * m.one_minus_ratio), m.q(), when(m.d != 0.0f, sign)};
  }
};

}  // namespace
