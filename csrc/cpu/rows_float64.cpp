// Phases 1 and 3 for float64 logits: plain loops and the C library's functions, for gradcheck and other tests of
// correctness.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace xentile {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
typedef RowTask<double> Task;

double transform(const Task& task, double x) {
  const double scaled = task.logit_scale * x;
  return task.softcap == 0 ? scaled : task.softcap * std::tanh(scaled / task.softcap);
}

double jacobian(const Task& task, double z) {
  if (task.softcap == 0) return task.logit_scale;
  const double u = z / task.softcap;
  return task.logit_scale * ((1 - u) * (1 + u));
}

// Adds the columns [begin, end) to s; shift: what exponentials are relative to.
void add_block(const Task& task, const double* x, int64_t begin, int64_t end, int64_t target, double shift,
               RowSums* s) {
  double rest = 0, gaps = 0, spread = 0;
  for (int64_t j = begin; j < end; j++) {
    const double z = transform(task, x[j]), gap = shift - z;
    if (task.smoothing) gaps += (task.weight ? task.weight[j] : 1) * gap;
    if (j == target) {
      s->target = z;
      continue;
    }
    const double e = std::exp(-gap);
    rest += e;
    if (task.entropy && e > 0) spread += e * gap;
    if (task.rank && target >= 0) s->rank += x[j] > x[target] || (j < target && x[j] == x[target]);
  }
  s->rest += rest, s->gap += gaps, s->spread += spread;
}

void reduce(const Task& task, const void* row, int64_t target, RowSums* sums, const Kept*) {
  constexpr int64_t block = 256;  // sums of sums: the error grows with the root of the number of columns
  const double* x = static_cast<const double*>(row);
  RowSums s = {};
  double top = -kInf;
  for (int64_t j = 0; j < task.columns; j++)
    if (x[j] > top) top = x[j], s.argmax = j;
  s.max = transform(task, top);
  const double shift = s.max == -kInf ? 0 : s.max;  // a row of -inf: exp(-inf) = 0, and a NaN still shows
  for (int64_t j = 0; j < task.columns; j += block)
    add_block(task, x, j, std::min(j + block, task.columns), target, shift, &s);
  *sums = s;
}

void gradient(const Task& task, const void* row, int64_t target, const Coefficients<double>& c, void* out,
              const Kept*) {
  const double* x = static_cast<const double*>(row);
  double* dx = static_cast<double*>(out);
  const double at_target = c.target * jacobian(task, transform(task, x[target]));
  for (int64_t j = 0; j < task.columns; j++) {
    const double z = transform(task, x[j]);
    double d = c.exp_factor * std::exp(z - c.max);
    if (task.smoothing) d -= c.constant * (task.weight ? task.weight[j] : 1);
    dx[j] = d * jacobian(task, z);
  }
  dx[target] = at_target;
}

void scale(void* data, int64_t n, double factor) {
  double* x = static_cast<double*>(data);
  for (int64_t j = 0; j < n; j++) x[j] *= factor;
}

}  // namespace

const RowKernels<double> kernels_float64 = {reduce, gradient, scale};

}  // namespace xentile
