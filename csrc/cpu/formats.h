// The storage formats of logits: how a vector of floats is read from, and rounded to nearest even into, each of them.
#pragma once
#include "simd.h"

namespace {

// Writes around the cache where the instruction set can: `p` must be aligned to the vector. `stream_fence` ends it.
XENTILE_INLINE void stream(void* p, VecF v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(static_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(p), (__m128)v);
#else
  *static_cast<VecF*>(p) = v;
#endif
}

XENTILE_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

struct Float32 {
  typedef float T;
  static constexpr int kVectors = 1;  // vectors of floats that fill one vector of T
  static XENTILE_INLINE VecF load(const T* p) { return ::load(p); }
  static XENTILE_INLINE VecF pack(const VecF* v) { return v[0]; }
};

// Packs 32-bit lanes that hold 16-bit numbers, in order.
XENTILE_INLINE VecF pack_halves(VecU low, VecU high) {
  struct {
    VecH low, high;
  } halves = {__builtin_convertvector(low, VecH), __builtin_convertvector(high, VecH)};
  VecF packed;
  __builtin_memcpy(&packed, &halves, sizeof packed);
  return packed;
}

struct BFloat16 {
  typedef uint16_t T;
  static constexpr int kVectors = 2;
  static XENTILE_INLINE VecF load(const T* p) {
    return (VecF)(__builtin_convertvector(*reinterpret_cast<const LooseH*>(p), VecU) << 16);
  }
  static XENTILE_INLINE VecU round(VecF v) {
    const VecU bits = (VecU)v;
    const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (VecU)select(v == v, (VecF)rounded, (VecF)(VecU{} + 0x7fc0u));
  }
  static XENTILE_INLINE VecF pack(const VecF* v) { return pack_halves(round(v[0]), round(v[1])); }
};

struct Float16 {
  typedef uint16_t T;
  static constexpr int kVectors = 2;
#if defined(__AVX512F__)
  // The forms with a mask, all lanes wanted: g++ 12 warns of undefined operands in the others.
  static XENTILE_INLINE VecF load(const T* p) {
    return (VecF)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static XENTILE_INLINE VecF pack(const VecF* v) {
    __m256i halves[2];
    for (int k = 0; k < 2; k++) halves[k] = _mm512_maskz_cvtps_ph(0xffff, (__m512)v[k], _MM_FROUND_TO_NEAREST_INT);
    VecF packed;
    __builtin_memcpy(&packed, halves, sizeof packed);
    return packed;
  }
#elif defined(__F16C__)
  static XENTILE_INLINE VecF load(const T* p) {
    return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static XENTILE_INLINE VecF pack(const VecF* v) {
    const __m128i low = _mm256_cvtps_ph((__m256)v[0], _MM_FROUND_TO_NEAREST_INT);
    return (VecF)_mm256_set_m128i(_mm256_cvtps_ph((__m256)v[1], _MM_FROUND_TO_NEAREST_INT), low);
  }
#else
  // Multiplying by 2**112 moves the exponent bias of float16 to that of float32, subnormals included.
  static XENTILE_INLINE VecF load(const T* p) {
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
  static XENTILE_INLINE VecF pack(const VecF* v) { return pack_halves(round(v[0]), round(v[1])); }
#endif
};

}  // namespace
