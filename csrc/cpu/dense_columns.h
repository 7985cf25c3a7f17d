// Columns of a matrix of logits as float32, in the order of memory: what two matrices of different formats have in
// common.
#pragma once
#include "blocks.h"
#include "dense_kernels.h"

namespace {
using xentile::DenseLogits;
using xentile::Format;

constexpr int64_t kColumns = 1024;
static_assert(kColumns % kSpan == 0 && kStep <= xentile::kDensePadding);

XENTILE_INLINE int64_t whole_steps(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// Batches in the order of memory.
template <class F>
XENTILE_INLINE Batch load_in_order(const typename F::T* p) {
  return F::load(p);
}
template <>
XENTILE_INLINE Batch load_in_order<BFloat16>(const uint16_t* p) {
  Batch b;
  for (int k = 0; k < kBatch; k++) {
    const LooseH half = *reinterpret_cast<const LooseH*>(p + k * kLanes);
    b.v[k] = (VecF)(__builtin_convertvector(half, VecU) << 16);
  }
  return b;
}

template <class F>
XENTILE_INLINE void store_in_order(typename F::T* p, Batch b) {
  F::store(p, b);
}
template <>
XENTILE_INLINE void store_in_order<BFloat16>(uint16_t* p, Batch b) {
  for (int k = 0; k < kBatch; k++)
    *reinterpret_cast<LooseH*>(p + k * kLanes) = __builtin_convertvector(BFloat16::round(b.v[k]) >> 16, VecH);
}

// Calls f(F()) for the format's F.
template <class Function>
XENTILE_INLINE auto with_format(Format format, Function f) {
  switch (format) {
    case Format::kBFloat16:
      return f(BFloat16());
    case Format::kFloat16:
      return f(Float16());
    case Format::kFloat32:
      break;
  }
  return f(Float32());
}

// z of the columns [begin, begin + n), and -inf behind them up to whole steps: in memory, or in `room`.
template <class F>
const float* load_columns(const DenseLogits& logits, int64_t begin, int64_t n, float* room) {
  const auto* x = static_cast<const typename F::T*>(logits.x) + begin;
  const Transform transform = {logits.scale, logits.softcap};
  const bool identity = transform.identity();
  if (sizeof(*x) == sizeof(float) && identity && n % kStep == 0) return reinterpret_cast<const float*>(x);
  for (int64_t j = 0; j < n; j += kStep) {
    Batch b = load_in_order<F>(n - j < kStep ? Padded<F>(x + j, n - j, F::kLowest).values : x + j);
    if (!identity)
      for (VecF& v : b.v) v = transform(v);
    Float32::store(room + j, b);
  }
  for (int64_t j = n; j < whole_steps(n); j++) room[j] = -kInf;  // also under a softcap
  return room;
}

XENTILE_INLINE const float* load_columns(const DenseLogits& logits, int64_t begin, int64_t n, float* room) {
  return with_format(logits.format, [&](auto f) { return load_columns<decltype(f)>(logits, begin, n, room); });
}

template <class F>
void store_columns(const float* from, int64_t n, typename F::T* to) {
  const int64_t whole = n / kStep * kStep;
  for (int64_t j = 0; j < whole; j += kStep) store_in_order<F>(to + j, Float32::load(from + j));
  typename F::T some[kStep];
  if (whole < n) store_in_order<F>(some, Float32::load(from + whole));
  __builtin_memcpy(to + whole, some, (n - whole) * sizeof(*to));
}

XENTILE_INLINE void store_columns(Format format, const float* from, int64_t n, void* row, int64_t begin) {
  with_format(format, [&](auto f) {
    typedef decltype(f) F;
    store_columns<F>(from, n, static_cast<typename F::T*>(row) + begin);
  });
}

}  // namespace
