// Vectors of floats as wide as the instruction set has them, and the two transcendental functions of a row.
//
// GCC's vector extensions, which clang has too: one source for SSE2, NEON, AVX2 and AVX-512. Intrinsics appear only
// where the language has no word for it. Compile with -ffp-contract=fast (a * b + c becomes one FMA) and never with
// -ffast-math: NaN, infinities and the rounding trick in `exp_parts` must work.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define XENTILE_INLINE inline __attribute__((always_inline))
#define XENTILE_LAMBDA __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes), may_alias));
typedef float LooseF __attribute__((vector_size(4 * kLanes), may_alias, aligned(2)));  // at any element of any format
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes), may_alias));
typedef uint16_t LooseH __attribute__((vector_size(2 * kLanes), may_alias, aligned(2)));

constexpr float kInf = __builtin_inff();

XENTILE_INLINE VecF splat(float x) { return VecF{} + x; }
XENTILE_INLINE VecF load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
XENTILE_INLINE void store(float* p, VecF v) { *reinterpret_cast<LooseF*>(p) = v; }
XENTILE_INLINE VecF select(VecI mask, VecF yes, VecF no) { return mask ? yes : no; }

// The larger one, b if either is NaN. Compilers do not make one instruction of the expression.
XENTILE_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// a * b + c with one rounding where the instruction set has that, also when a * b is needed by itself.
XENTILE_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return (VecF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (VecF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Any NaN becomes the usual one.
XENTILE_INLINE VecF canonical(VecF v) { return select(v == v, v, splat(__builtin_nanf(""))); }

XENTILE_INLINE VecI lane_index() {
  VecI lane;
  for (int k = 0; k < kLanes; k++) lane[k] = k;
  return lane;
}

// One number from all lanes, by halves.
template <class Vec, class Combine>
XENTILE_INLINE auto horizontal(Vec v, Combine combine) {
  for (int width = sizeof v / sizeof v[0] / 2; width > 0; width /= 2)
    for (int k = 0; k < width; k++) v[k] = combine(v[k], v[k + width]);
  return v[0];
}

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kLarger = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto kSmaller = [](auto a, auto b) { return a < b ? a : b; };

XENTILE_INLINE float horizontal_max(VecF v) { return horizontal(v, kLarger); }

// In double: these few additions are of the largest numbers, and would round more than all that came before.
XENTILE_INLINE double horizontal_sum(VecF v) {
  double lanes[kLanes];
  for (int k = 0; k < kLanes; k++) lanes[k] = v[k];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; k++) lanes[k] += lanes[k + width];
  return lanes[0];
}

// Several vectors that go through the same operations. Each step is written for all of them before the next one: the
// chain of dependent operations of an exponential is longer than what a processor can look ahead.
template <int K>
struct Vectors {
  VecF v[K];
};

// factor * exp(d) = power * scale * 2**-kExpBias, for d <= 70. The bias keeps results that would be subnormal in full
// precision: what float32 can hold of exp(d) is never lost, and for anything below, such as exp(-inf), scale is exactly
// 0. A factor costs nothing: it becomes part of the polynomial.
constexpr int kExpBias = 24;
constexpr float kExpUnbias = 1.0f / (1 << kExpBias);

template <int K>
struct ExpParts {
  VecF power[K], scale[K];
};

template <int K>
XENTILE_INLINE ExpParts<K> exp_parts(Vectors<K> d, float factor = 1) {
  constexpr float kLog2E = 1.44269504f, kLowest = -104.665f;  // rounds to 2**-151: an exponent field of 0
  constexpr float kRound = 12582912.0f + 127 + kExpBias;      // adding it rounds to an integer in the low bits
  // Minimax for |r| <= ln 2 / 2 of the form 1 + r + ..: within 1.05e-7, and exp(0) = 1.
  const float p5 = factor * 0x1.106250p-7f, p4 = factor * 0x1.572a64p-5f, p3 = factor * 0x1.5557b0p-3f,
              p2 = factor * 0x1.fffdfcp-2f;
  VecF shifted[K], n[K], r[K];
  ExpParts<K> e;
  for (int k = 0; k < K; k++) d.v[k] = max(splat(kLowest), d.v[k]);  // NaN stays NaN
  for (int k = 0; k < K; k++) shifted[k] = d.v[k] * kLog2E + kRound;
  for (int k = 0; k < K; k++) n[k] = shifted[k] - kRound;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  for (int k = 0; k < K; k++) r[k] = d.v[k] - n[k] * 0.693147182f;  // ln 2 happens to be within 2**-28 of a float
#else
  for (int k = 0; k < K; k++) r[k] = (d.v[k] - n[k] * 0.693359375f) + n[k] * 2.12194440e-4f;
#endif
  for (int k = 0; k < K; k++) e.power[k] = r[k] * p5 + p4;
  for (int k = 0; k < K; k++) e.power[k] = e.power[k] * r[k] + p3;
  for (int k = 0; k < K; k++) e.power[k] = e.power[k] * r[k] + p2;
  for (int k = 0; k < K; k++) e.power[k] = e.power[k] * r[k] + factor;
  for (int k = 0; k < K; k++) e.power[k] = e.power[k] * r[k] + factor;
  for (int k = 0; k < K; k++) e.scale[k] = (VecF)((VecI)shifted[k] << 23);
  return e;
}

// exp(d) of one number
XENTILE_INLINE float exp_one(float d) {
  const ExpParts<1> e = exp_parts(Vectors<1>{{splat(d)}});
  return e.power[0][0] * e.scale[0][0] * kExpUnbias;
}

// tanh(u), relative error a few 2**-24 also near 0, where 1 - 2 / (exp(2u) + 1) alone would cancel.
XENTILE_INLINE VecF tanh(VecF u) {
  const VecF magnitude = (VecF)((VecI)u & 0x7fffffff);
  const ExpParts<1> e = exp_parts(Vectors<1>{{magnitude * -2.0f}});
  const VecF decay = e.power[0] * e.scale[0] * kExpUnbias;  // exp(-2|u|)
  const VecF large = 1.0f - 2.0f * decay / (1.0f + decay);  // rounds better than (1 - decay) / (1 + decay)
  const VecF square = u * u;
  VecF p = square * -5.70498872745e-3f + 2.06390887954e-2f;  // odd polynomial for |u| < 0.625 (Cephes)
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const VecF small = p * square * magnitude + magnitude;
  const VecF result = select(magnitude < 0.625f, small, large);
  return (VecF)((VecI)result | ((VecI)u & INT32_MIN));
}

}  // namespace
