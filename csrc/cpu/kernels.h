// The interface between the operators and the row kernels, of which there is one set per instruction set.
//
// The units that implement it for an instruction set include no C++ standard header and no torch header: an inline
// function compiled for AVX-512 could be the copy that the linker keeps for all of the library, and crash on an older
// CPU.
#pragma once
#include <stdint.h>

#include "dense_kernels.h"
#include "teacher_kernels.h"
#include "topk_kernels.h"

namespace xentile {

// What is the same for every row. Acc: float, or double for float64 logits.
template <class Acc>
struct RowTask {
  int64_t columns;    // V
  Acc logit_scale;    // z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap)
  Acc softcap;        // 0: off
  const Acc* weight;  // (V) class weights, null: all ones
  bool smoothing;     // the gap is wanted, and the gradient has a constant part
  bool entropy;       // the spread is wanted
  bool rank;          // the rank is wanted
};

// Phase 1 of a row. z is the logit after scale and softcap, m the maximum of z; e_j = exp(z_j - m).
struct RowSums {
  double max;      // m
  double target;   // z of the target (0 without a target)
  double rest;     // sum of e_j over j != target: the target is excluded, never subtracted
  double gap;      // sum of weight_j (m - z_j) over all j, if smoothing
  double spread;   // sum of e_j (m - z_j) over j != target, if entropy
  int64_t argmax;  // lowest index of the largest x
  int64_t rank;    // #{j: x_j > x_t} + #{j < t: x_j == x_t}, if rank
};

// What phase 3 needs: dx_j = (exp_factor * exp(z_j - max) - constant * weight_j) * dz_j/dx_j, and dx_t = target *
// dz_t/dx_t.
template <class Acc>
struct Coefficients {
  Acc max, exp_factor, constant, target;
};

// What phase 1 leaves to phase 3 when both run in one launch without options: the exponentials, which take more time
// than the memory does that holds them. Both arrays belong to the caller.
struct Kept {
  float* exponentials;  // (V)
  float* maxima;        // (kept_maxima(V)): what the exponentials of each block are relative to
};

// No block has less than 1024 columns but the last one on each side of the target.
constexpr int64_t kept_maxima(int64_t columns) { return columns / 1024 + 4; }

template <class Acc>
struct RowKernels {
  // target < 0: no column is excluded. kept: null, or where to leave the exponentials.
  void (*reduce)(const RowTask<Acc>&, const void* x, int64_t target, RowSums* sums, const Kept* kept);
  // dx may be x. kept: null, or what `reduce` left for the same row; kept->exponentials may be dx.
  void (*gradient)(const RowTask<Acc>&, const void* x, int64_t target, const Coefficients<Acc>&, void* dx,
                   const Kept* kept);
  void (*scale)(void* x, int64_t n, Acc scale);
};

namespace sketch {

constexpr int kCountBlock = 1024;
constexpr int kNowhere = 16;  // counters beyond a histogram, for values that are in no bin

// How many values of a block are in [0, 2**-24), and how many neither there nor in a bin.
struct BlockCount {
  int below, others;
};

// Sums and extremes of values: the columns of the same names of a sketch.
struct Totals {
  int64_t sum_lo, sum_hi, square_lo, square_mid, square_hi, max_key, min_key;
};

}  // namespace sketch

struct KernelTable {
  const char* name;
  RowKernels<float> float32, bfloat16, float16;
  RestKernels float32_rest, bfloat16_rest, float16_rest;
  TopKKernels topk_float32, topk_bfloat16, topk_float16;
  DenseKernels dense;
  // Counts x[0:kCountBlock] in histogram[0:bins], and in *totals with those below the bins, but not the others. What is
  // in histogram[bins:bins + kNowhere] afterwards means nothing.
  sketch::BlockCount (*count)(const float* x, int shift, int first_key, int bins, uint32_t* histogram,
                              sketch::Totals* totals);
};

extern const KernelTable kernels_default, kernels_avx2, kernels_avx512;
extern const RowKernels<double> kernels_float64;

}  // namespace xentile
