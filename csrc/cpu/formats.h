// The storage formats of logits: how vectors of floats are read from, and rounded to nearest even into, each of them.
//
// Work proceeds in batches of kBatch vectors. A format may deal the elements of a batch to lanes in any order, as long
// as `load`, `load_floats`, `store`, `lane_of` and `elements` agree: bfloat16 puts even elements in one vector and odd
// ones in the next, which takes a shift and a mask where the natural order would take shuffles.
#pragma once
#include "simd.h"

namespace {

constexpr int kBatch = 2;               // vectors
constexpr int kStep = kBatch * kLanes;  // elements
typedef int16_t VecS __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t VecW __attribute__((vector_size(4 * kLanes), may_alias));

typedef int16_t LooseS __attribute__((vector_size(4 * kLanes), may_alias, aligned(2)));
typedef uint16_t LooseW __attribute__((vector_size(4 * kLanes), may_alias, aligned(2)));

XENTILE_INLINE VecF vector_at(const float* p) { return load(p); }
XENTILE_INLINE VecS vector_at(const int16_t* p) { return *reinterpret_cast<const LooseS*>(p); }
XENTILE_INLINE VecW vector_at(const uint16_t* p) { return *reinterpret_cast<const LooseW*>(p); }

// Compilers make shuffles of the steps for 32-bit lanes only.
template <class Combine>
XENTILE_INLINE int16_t horizontal(VecS v, Combine combine) {
  return horizontal(combine((VecI)v << 16, (VecI)v & INT32_C(-65536)), combine) >> 16;
}
template <class Combine>
XENTILE_INLINE uint16_t horizontal(VecW v, Combine combine) {
  return horizontal(combine((VecU)v << 16, (VecU)v & 0xffff0000u), combine) >> 16;
}

typedef Vectors<kBatch> Batch;

constexpr int64_t kChunk = 4 * kStep;  // elements among which a number is looked for at once

struct Float32 {
  typedef float T;
  static constexpr T kLowest = -kInf, kNaN = __builtin_nanf("");
  static XENTILE_INLINE Batch load(const T* p) { return {{::load(p), ::load(p + kLanes)}}; }
  static XENTILE_INLINE Batch load_floats(const float* p) { return load(p); }
  static XENTILE_INLINE int64_t lane_of(int64_t element) { return element; }
  static XENTILE_INLINE VecI elements(int k) { return lane_index() + k * kLanes; }  // in vector k of a batch
  static XENTILE_INLINE void store(T* p, Batch b) {
    ::store(p, b.v[0]);
    ::store(p + kLanes, b.v[1]);
  }
  static float max(const T* x, int64_t n);
  static bool contains(const T* x, T value);  // whether x[0:kChunk] holds it
};

// The maximum of 16-bit floats by comparing their bits as signed integers; if all numbers have a sign, the largest is
// the smallest as an unsigned integer. A NaN may count as larger than all.
struct Float16Bits {
  typedef uint16_t T;
  static T max_bits(const T* x, int64_t n);
  static bool contains(const T* x, T value);
};

struct BFloat16 : Float16Bits {
  static constexpr T kLowest = 0xff80, kNaN = 0x7fc0;
  static XENTILE_INLINE Batch load(const T* p) {
    const VecU pairs = (VecU)::load(reinterpret_cast<const float*>(p));
    return {{(VecF)(pairs << 16), (VecF)(pairs & 0xffff0000u)}};
  }
  static XENTILE_INLINE Batch load_floats(const float* p) {
    Batch b;
    for (int k = 0; k < kLanes; k++) b.v[0][k] = p[2 * k], b.v[1][k] = p[2 * k + 1];
    return b;
  }
  static XENTILE_INLINE int64_t lane_of(int64_t element) { return element / 2 + element % 2 * kLanes; }
  static XENTILE_INLINE VecI elements(int k) { return 2 * lane_index() + k; }
  // A NaN stays one if its payload has a zero among the bits that are kept: see `canonical` in simd.h.
  static XENTILE_INLINE VecU round(VecF v) {
    const VecU bits = (VecU)v;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  static XENTILE_INLINE void store(T* p, Batch b) {
    ::store(reinterpret_cast<float*>(p), (VecF)((round(b.v[0]) >> 16) | (round(b.v[1]) & 0xffff0000u)));
  }
  static float max(const T* x, int64_t n);
};

struct Float16 : Float16Bits {
  static constexpr T kLowest = 0xfc00, kNaN = 0x7e00;
  static XENTILE_INLINE Batch load(const T* p) { return {{widen(p), widen(p + kLanes)}}; }
  static XENTILE_INLINE Batch load_floats(const float* p) { return Float32::load(p); }
  static XENTILE_INLINE int64_t lane_of(int64_t element) { return element; }
  static XENTILE_INLINE VecI elements(int k) { return Float32::elements(k); }
  static XENTILE_INLINE void store(T* p, Batch b) { ::store(reinterpret_cast<float*>(p), narrow(b)); }
  static float max(const T* x, int64_t n);

 private:
#if defined(__AVX512F__)
  // The forms with a mask, all lanes wanted: g++ 12 warns of undefined operands in the others.
  static XENTILE_INLINE VecF widen(const T* p) {
    return (VecF)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static XENTILE_INLINE VecF narrow(Batch b) {
    __m256i halves[2];
    for (int k = 0; k < 2; k++) halves[k] = _mm512_maskz_cvtps_ph(0xffff, (__m512)b.v[k], _MM_FROUND_TO_NEAREST_INT);
    VecF packed;
    __builtin_memcpy(&packed, halves, sizeof packed);
    return packed;
  }
#elif defined(__F16C__)
  static XENTILE_INLINE VecF widen(const T* p) {
    return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static XENTILE_INLINE VecF narrow(Batch b) {
    const __m128i low = _mm256_cvtps_ph((__m256)b.v[0], _MM_FROUND_TO_NEAREST_INT);
    return (VecF)_mm256_set_m128i(_mm256_cvtps_ph((__m256)b.v[1], _MM_FROUND_TO_NEAREST_INT), low);
  }
#else
  // Multiplying by 2**112 moves the exponent bias of float16 to that of float32, subnormals included.
  static XENTILE_INLINE VecF widen(const T* p) {
    const VecU half = __builtin_convertvector(*reinterpret_cast<const LooseH*>(p), VecU);
    const VecU magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    const VecF finite = (VecF)(magnitude << 13) * 0x1p112f;
    const VecF special = (VecF)((magnitude << 13) | 0x7f800000u);
    return (VecF)((VecU)select(magnitude < 0x7c00u, finite, special) | sign);
  }
  // Normal numbers: rounded on the bits. Subnormals: adding 0.5 lets the adder round to multiples of 2**-24.
  static XENTILE_INLINE VecU round(VecF v) {
    const VecU bits = (VecU)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const VecU normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const VecU subnormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;
    VecU result = (VecU)select(magnitude < 0x38800000u, (VecF)subnormal, (VecF)normal);
    result = (VecU)select(magnitude >= 0x477ff000u, (VecF)(VecU{} + 0x7c00u), (VecF)result);
    result = (VecU)select(magnitude > 0x7f800000u, (VecF)(VecU{} + 0x7e00u), (VecF)result);
    return result | sign;
  }
  static XENTILE_INLINE VecF narrow(Batch b) {
    VecH halves[2];
    for (int k = 0; k < 2; k++) halves[k] = __builtin_convertvector(round(b.v[k]), VecH);
    VecF packed;
    __builtin_memcpy(&packed, halves, sizeof packed);
    return packed;
  }
#endif
};

// Several batches.
template <class F, int K>
XENTILE_INLINE Vectors<K> load_all(const typename F::T* p) {
  Vectors<K> all;
  for (int k = 0; k < K; k += kBatch) {
    const Batch b = F::load(p + k * kLanes);
    for (int i = 0; i < kBatch; i++) all.v[k + i] = b.v[i];
  }
  return all;
}

template <class F, int K>
XENTILE_INLINE void store_all(typename F::T* p, const Vectors<K>& all) {
  for (int k = 0; k < K; k += kBatch) F::store(p + k * kLanes, {{all.v[k], all.v[k + 1]}});
}

template <class F, int K>
XENTILE_INLINE Vectors<K> load_all_floats(const float* p) {
  Vectors<K> all;
  for (int k = 0; k < K; k += kBatch) {
    const Batch b = F::load_floats(p + k * kLanes);
    for (int i = 0; i < kBatch; i++) all.v[k + i] = b.v[i];
  }
  return all;
}

// p[0:n] for 0 <= n <= kStep, and `fill` behind it: a batch that may be read whole.
template <class F>
struct Padded {
  typename F::T values[kStep];
  XENTILE_INLINE Padded(const typename F::T* p, int64_t n, typename F::T fill) {
    for (typename F::T& value : values) value = fill;
    __builtin_memcpy(values, p, n * sizeof(*p));
  }
};

template <class F>
XENTILE_INLINE float load_one(const typename F::T* p) {
  return F::load(Padded<F>(p, 0, *p).values).v[0][0];
}

// One number from x[0:n], n > 0: `combine` takes two vectors, or two numbers, in any order, and the same number any
// number of times, because the last vectors overlap those before.
template <class T, class Combine>
XENTILE_INLINE T fold(const T* x, int64_t n, Combine combine) {
  constexpr int chains = 4;  // of dependent operations
  constexpr int64_t lanes = sizeof(VecF) / sizeof(T), step = chains * lanes;
  if (n < step) {
    T all = x[0];
    for (int64_t j = 1; j < n; j++) all = combine(all, x[j]);
    return all;
  }
  decltype(vector_at(x)) all[chains];
  for (int k = 0; k < chains; k++) all[k] = decltype(vector_at(x)){} + x[0];
  for (int64_t j = 0; j + step <= n; j += step)
    for (int k = 0; k < chains; k++) all[k] = combine(all[k], vector_at(x + j + k * lanes));
  for (int k = 0; k < chains; k++) all[k] = combine(all[k], vector_at(x + n - step + k * lanes));
  return horizontal(combine(combine(all[0], all[1]), combine(all[2], all[3])), combine);
}

// The maximum of x[0:n], n > 0, if there is no NaN. With one, anything: the sum of the exponentials says so. (To ignore
// NaN would take another instruction: a vector maximum returns, beside a NaN, the operand that it can load.)
inline float Float32::max(const T* x, int64_t n) {
  struct {
    XENTILE_INLINE VecF operator()(VecF a, VecF b) const { return ::max(a, b); }
    XENTILE_INLINE float operator()(float a, float b) const { return a > b ? a : b; }
  } larger;
  return fold(x, n, larger);
}

inline uint16_t Float16Bits::max_bits(const T* x, int64_t n) {
  const int16_t top = fold(reinterpret_cast<const int16_t*>(x), n, kLarger);
  return top >= 0 ? top : fold(x, n, kSmaller);
}

template <class Vec>
XENTILE_INLINE bool any(Vec mask) {
  uint64_t words[sizeof mask / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (uint64_t word : words) all |= word;
  return all;
}

inline bool Float32::contains(const T* x, T value) {
  VecI equal = {};
  for (int i = 0; i < kChunk; i += kLanes) equal |= (VecI)(::load(x + i) == value);
  return any(equal);
}

inline bool Float16Bits::contains(const T* x, T value) {
  const uint16_t magnitude = value & 0x7fff ? 0xffff : 0x7fff;  // 0 equals -0
  VecW equal = {};
  for (int i = 0; i < kChunk; i += kStep) {
    const VecW bits = vector_at(x + i);
    equal |= (VecW)((bits & magnitude) == (uint16_t)(value & magnitude));
  }
  return any(equal);
}

inline float BFloat16::max(const T* x, int64_t n) {
  const T bits = max_bits(x, n);
  return load_one<BFloat16>(&bits);
}

inline float Float16::max(const T* x, int64_t n) {
  const T bits = max_bits(x, n);
  return load_one<Float16>(&bits);
}

}  // namespace
