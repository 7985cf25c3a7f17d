// The interface between the operator teacher_topk and its kernels. As in kernels.h: no standard header, no torch
// header.
#pragma once
#include <stdint.h>

namespace xentile {

// What teacher_topk does with every block of a row. Its first temperature is always 1.
struct TopKTask {
  float logit_scale, softcap;  // z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap); softcap 0: off
  int temperatures;
  const float* inverse_temperatures;
};

// Logits that may be among the K largest, by rising id. A value is the logit as an integer of the same order: its bits,
// those below the sign inverted where there is a sign.
struct Candidates {
  int32_t *values, *ids;
};

struct Collected {
  int64_t candidates;
  float below;     // the maximum of the others
  uint32_t spans;  // a bit for each span of the block with a candidate in it
};

struct TopKKernels {
  int64_t block;  // columns
  // Values of the maxima of `wanted` disjoint groups of x[0:n], or some more or less; returns how many.
  int64_t (*group_maxima)(const void* x, int64_t n, int64_t wanted, int32_t* maxima);
  // The largest number that k of values[0:n] reach, or a smaller one that no others do. Writes behind the end, up to
  // kTopKPadding.
  int32_t (*kth_largest)(int32_t* values, int64_t n, int64_t k);
  // Writes those of x[0:n] above the limit, n <= block; id: that of the first.
  Collected (*collect)(const void* x, int64_t n, int64_t id, float limit, Candidates out);
  // sums[t] += sum of exp((z_j - max) / temperature_t) over those that are not. spans: what `collect` said.
  void (*add_tail)(const TopKTask&, const void* x, int64_t n, float limit, uint32_t spans, float max, double* sums);
};

constexpr int64_t kTopKPadding = 32;

}  // namespace xentile
