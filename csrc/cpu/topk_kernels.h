// The interface between topk_distillation and its row kernels. As in kernels.h: no standard header, no torch header.
#pragma once
#include <stdint.h>

namespace xentile {

// 1 / T in two parts. low > 0, also where it means nothing: -inf * low shall be -inf.
struct InverseTemperature {
  float high, low;
};

// A row some columns of which are excluded: a support, and the target. The others are the rest, R.
struct RestTask {
  int64_t columns;
  float logit_scale, softcap;  // as in RowTask
  const int32_t* excluded;     // ascending
  int64_t excluded_size;
  InverseTemperature inverse;
  bool tempered;  // the exponentials of z / T are wanted, and T is not 1
  bool plain;     // those of z are
};

// Phase 1 over the rest, m the maximum of z.
struct RestSums {
  float top;       // the largest x
  float max;       // m; -inf if R is empty
  float tempered;  // r, the sum of exp((z - m) / T), if wanted
  float plain;     // r1, the sum of exp(z - m), if wanted
};

// dz_j = tempered * exp((z_j - max) / T) + plain * exp(z_j - max), of which a part is there if the task wants it.
struct RestCoefficients {
  float max, tempered, plain;
};

// As `Kept`, of the exponentials that a task wants, for logits without a transform.
struct KeptRest {
  float *tempered, *plain;  // (V), null where not wanted
  float* maxima;            // (kept_maxima(V))
};

struct RestKernels {
  // kept: null, or where to leave the exponentials.
  void (*reduce)(const RestTask&, const void* x, RestSums* sums, const KeptRest* kept);
  // dx may be x. kept: null, or what `reduce` left for the same row, and at least what is wanted now; one of its arrays
  // may be dx. Excluded columns receive anything.
  void (*gradient)(const RestTask&, const void* x, const RestCoefficients&, void* dx, const KeptRest* kept);
  void (*gather)(const void* x, const int32_t* columns, int64_t n, float* values);
  void (*scatter)(const float* values, const int32_t* columns, int64_t n, void* x);
};

}  // namespace xentile
