// Divergences between a teacher's masses p and a student's q, for vectors of columns: what
// xentile/reference/divergence.py describes, in float32. There each logarithm is taken from logits; here what is known
// first is d = log q - log p, and only ratios are taken from it: of the larger of p and q no digit is lost, and neither
// where they are nearly equal.
#pragma once
#include "dense_kernels.h"
#include "simd.h"

namespace {
using xentile::DenseConstants;

XENTILE_INLINE VecF when(VecI mask, VecF v) { return (VecF)(mask & (VecI)v); }
XENTILE_INLINE VecF magnitude(VecF v) { return (VecF)((VecI)v & 0x7fffffff); }

// A mass times a logarithm: 0 where the mass is 0 and the logarithm infinite.
XENTILE_INLINE VecF times(VecF mass, VecF log) { return when(mass > 0.0f, mass * log); }

// exp(x) - 1 - x, |x| < 1: within 1.1e-7, relative.
XENTILE_INLINE VecF excess(VecF x) {
  VecF p = x * 0x1.a2c5ep-16f + 0x1.aa419cp-13f;
  p = p * x + 0x1.6c272cp-10f;
  p = p * x + 0x1.10fce8p-7f;
  p = p * x + 0x1.555504p-5f;
  p = p * x + 0x1.55557cp-3f;
  p = p * x + 0.5f;
  return p * (x * x);
}

// a log(a / b) - a + b >= 0, x = log(b / a)
XENTILE_INLINE VecF bregman(VecF a, VecF b, VecF x) {
  return select(magnitude(x) < 1.0f, a * excess(x), (b - a) - times(a, x));
}

// exp(-|d|) and 1 - exp(-|d|), both to the last digits.
struct Decay {
  VecF left, lost;
};

XENTILE_INLINE Decay decay(VecF d) {
  constexpr float kLog2E = 1.44269504f, kLowest = -88.03f, kRound = 12582912.0f + 127;  // lowest: a scale of exactly 0
  const VecF x = max(splat(kLowest), -magnitude(d));
  const VecF shifted = x * kLog2E + kRound, n = shifted - kRound;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF p = r * 0x1.6bebf2p-10f + 0x1.1227f6p-7f;  // exp(r) - 1, |r| <= ln 2 / 2: within 1.8e-8, relative
  p = p * r + 0x1.555674p-5f;
  p = p * r + 0x1.5554bp-3f;
  p = p * r + 0x1.fffffep-2f;
  p = p * (r * r) + r;
  const VecF scale = (VecF)((VecI)shifted << 23);
  return {multiply_add(scale, p, scale), (1.0f - scale) - scale * p};
}

// log(m) for m in (0, 1], given 1 - m, in which digits of a small logarithm are.
XENTILE_INLINE VecF log_of(VecF m, VecF one_minus_m) {
  constexpr int32_t kRootHalf = 0x3f3504f3;
  const VecI bits = (VecI)m - kRootHalf;
  const VecI exponent = bits >> 23;  // of 2 in m = 2**exponent * [sqrt(1/2), sqrt(2))
  const VecF mantissa = (VecF)((bits & 0x7fffff) + kRootHalf);
  const VecF f = select(exponent == 0, -one_minus_m, mantissa - 1.0f);
  VecF p = f * 0x1.645eacp-4f - 0x1.2432b8p-3f;  // log(1 + f) = f - f**2 / 2 + p f**3: within 3.5e-8, relative
  p = p * f + 0x1.317458p-3f;
  p = p * f - 0x1.53824ap-3f;
  p = p * f + 0x1.98d7f2p-3f;
  p = p * f - 0x1.000382p-2f;
  p = p * f + 0x1.5556d8p-2f;
  p = p * f - 0.5f;
  return __builtin_convertvector(exponent, VecF) * 0.693147182f + (p * (f * f) + f);
}

// 2**kExpBias exp(y)
XENTILE_INLINE VecF biased_exp(VecF y) {
  const ExpParts<1> e = exp_parts(Vectors<1>{{y}});
  return e.power[0] * e.scale[0];
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

  XENTILE_INLINE Masses(const DenseConstants& c, const Columns& y) {
    const auto e = exp_parts(Vectors<2>{{y.teacher, y.student}});
    p = e.power[0] * e.scale[0] * (c.teacher_factor * kExpUnbias);
    q = e.power[1] * e.scale[1] * (c.student_factor * kExpUnbias);
  }
};

// The masses by one exponential, of the larger one, and their ratio.
struct RelatedMasses {
  VecF d;  // 0 for a column at -inf in both
  VecI student_larger;
  Decay ratio;
  VecF larger, smaller;

  XENTILE_INLINE RelatedMasses(const DenseConstants& c, const Columns& y)
      : d(when(y.d == y.d, y.d)), student_larger(d > 0.0f), ratio(decay(d)) {
    const VecF factor = select(student_larger, splat(c.student_factor), splat(c.teacher_factor)) * kExpUnbias;
    larger = biased_exp(select(student_larger, y.student, y.teacher)) * factor;
    smaller = larger * ratio.left;
  }
  XENTILE_INLINE VecF p() const { return select(student_larger, smaller, larger); }
  XENTILE_INLINE VecF q() const { return select(student_larger, larger, smaller); }
};

// M = teacher_share p + student_share q
struct Mixture {
  RelatedMasses masses;
  VecF relative;  // M / the larger mass
  VecF p, q;      // log(p / M), log(q / M)

  XENTILE_INLINE Mixture(const DenseConstants& c, const Columns& y) : masses(c, y) {
    const VecF teacher = splat(c.teacher_share), student = splat(c.student_share);
    const VecF of_smaller = select(masses.student_larger, teacher, student);
    const VecF of_larger = select(masses.student_larger, student, teacher);
    relative = multiply_add(of_smaller, masses.ratio.left, of_larger);
    const VecF log = log_of(relative, of_smaller * masses.ratio.lost);
    p = -when(masses.student_larger, masses.d) - log;
    q = when(~masses.student_larger, masses.d) - log;
  }
  XENTILE_INLINE VecF mass() const { return masses.larger * relative; }
  XENTILE_INLINE VecF overlap() const { return masses.smaller / relative; }  // p q / M
};

// f and kSign G, with G = q df/dq up to what cancels in G - q sum(G), and q.
struct Term {
  VecF value, slope, q;
};

struct ForwardKl {
  static constexpr float kSign = -1;
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Masses m(c, y);
    return {bregman(m.p, m.q, y.d), m.p, m.q};
  }
};

struct ReverseKl {
  static constexpr float kSign = 1;
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Masses m(c, y);
    return {bregman(m.q, m.p, -y.d), times(m.q, y.d), m.q};
  }
};

// The linear parts of both Bregman divergences cancel.
struct Jsd {
  static constexpr float kSign = 1;
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Mixture m(c, y);
    const VecF q = m.masses.q(), of_q = c.student_share * times(q, m.q);
    return {c.teacher_share * times(m.masses.p(), m.p) + of_q, of_q, q};
  }
};

struct SkewForwardKl {
  static constexpr float kSign = -1;
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Mixture m(c, y);
    return {bregman(m.masses.p(), m.mass(), -m.p), c.student_share * m.overlap(), m.masses.q()};
  }
};

struct SkewReverseKl {
  static constexpr float kSign = 1;
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const Mixture m(c, y);
    const VecF q = m.masses.q();
    return {bregman(q, m.mass(), -m.q), times(q, m.q) + c.teacher_share * m.overlap(), q};
  }
};

struct TotalVariation {
  static constexpr float kSign = 1;
  static XENTILE_INLINE Term of(const DenseConstants& c, const Columns& y) {
    const RelatedMasses m(c, y);
    const VecF q = m.q(), half = 0.5f * q;
    const VecF slope = when(m.d != 0.0f, select(m.student_larger, half, -half));
    return {0.5f * (m.larger * m.ratio.lost), slope, q};
  }
};

}  // namespace
