// The operators sketch_update and sketch_quantile; their schemas are in src/xentile/_ops.py.
#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "operators.h"
#include "sketch_counter.h"

namespace xentile {
namespace {

enum Interpolation { kLinear, kLower, kHigher, kNearest, kMidpoint };

// One row of a state, ready for order statistics. Buckets in the order of their values: below 2**-24, bins, above 2**8, +inf.
class Distribution {
 public:
  explicit Distribution(const int64_t* state) : cumulative_(kBuckets) {
    int64_t sum = 0;
    for (int b = 0; b < kBuckets; b++) {
      const int column = b == 0 ? sketch::kZero : b <= sketch::kBins ? b - 1 : sketch::kOverflow + (b - 1 - sketch::kBins);
      cumulative_[b] = sum += state[column];
    }
    if (sum == 0) return;
    low_ = sketch::min_of_key(state[sketch::kMinKey]);
    high_ = sketch::max_of_key(state[sketch::kMaxKey]);
  }

  int64_t size() const { return cumulative_.back(); }

  struct Order {
    double value, lower, upper;  // the estimate of an order statistic, and the edges of its bucket
  };

  Order order(int64_t rank) const {
    const int b = static_cast<int>(std::upper_bound(cumulative_.begin(), cumulative_.end(), rank) - cumulative_.begin());
    const int64_t before = b == 0 ? 0 : cumulative_[b - 1], count = cumulative_[b] - before;
    const double left = b == 0 ? -kInf : b < kBuckets - 1 ? sketch::edge(b - 1) : kInf;
    const double right = b < kBuckets - 2 ? sketch::edge(b) : b == kBuckets - 2 ? overflow_edge() : kInf;
    double value = left + (right - left) * (static_cast<double>(rank - before) + 0.5) / static_cast<double>(count);
    if (b == 0) value = 0;
    if (b == kBuckets - 1) value = kInf;
    if (rank == 0 || rank == size() - 1) value = rank == 0 ? low_ : high_;
    return {std::clamp(value, low_, high_), std::clamp(left, low_, high_), std::clamp(right, low_, high_)};
  }

 private:
  static constexpr int kBuckets = sketch::kBins + 3;
  static constexpr double kInf = std::numeric_limits<double>::infinity();
  double overflow_edge() const {
    const double top = std::min<double>(high_, std::numeric_limits<float>::max());
    return std::max<double>(top, sketch::edge(sketch::kBins));
  }

  std::vector<int64_t> cumulative_;
  double low_ = 0, high_ = 0;
};

Distribution::Order quantile(const Distribution& distribution, double q, int64_t interpolation) {
  const int64_t last = distribution.size() - 1;
  if (last < 0) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    return {nan, nan, nan};
  }
  const double h = q * static_cast<double>(last);
  const double floor = interpolation == kNearest ? std::nearbyint(h) : std::floor(h);
  const double fraction = interpolation == kNearest ? 0 : h - floor;
  const int64_t lo = static_cast<int64_t>(floor), hi = fraction > 0 ? std::min(lo + 1, last) : lo;
  const Distribution::Order at_lo = distribution.order(lo), at_hi = distribution.order(hi);
  double value = at_lo.value;
  if (interpolation == kHigher) {
    value = at_hi.value;
  } else if ((interpolation == kLinear || interpolation == kMidpoint) && fraction > 0 && at_lo.value != at_hi.value) {
    const double step = interpolation == kMidpoint ? 0.5 : fraction;
    value = std::isinf(at_hi.value) ? at_hi.value : at_lo.value + step * (at_hi.value - at_lo.value);
  }
  return {value, at_lo.lower, at_hi.upper};
}

int64_t* write_state(const Tensor& state) {
  STD_TORCH_CHECK(state.dim() == 2, "xentile: sketch must be a matrix");
  return write<int64_t>(state, ScalarType::Long, state.size(0) * sketch::kWidth, "sketch");
}

}  // namespace

void sketch_update(const Tensor& values, std::optional<Tensor> mask, std::optional<Tensor> group_ids, Tensor state) {
  const int64_t n = values.numel(), groups = state.size(0);
  const float* x = read<float>(values, ScalarType::Float, n, "values");
  const bool* keep = read<bool>(mask, ScalarType::Bool, n, "mask");
  const int64_t* group = read<int64_t>(group_ids, ScalarType::Long, n, "group_ids");
  int64_t* cells = write_state(state);
  torch::stable::parallel_for(0, n, 16384, [&](int64_t begin, int64_t end) {
    sketch::Counter counter(cells, groups);
    for (int64_t i = begin; i < end; i++)
      if (!keep || keep[i]) counter.add_value(x[i], group ? group[i] : 0);
  });
}

void sketch_quantile(const Tensor& state, const Tensor& q, Tensor value, Tensor lower, Tensor upper, int64_t interpolation) {
  const int64_t groups = state.size(0), count = q.numel();
  const int64_t* cells = read<int64_t>(state, ScalarType::Long, groups * sketch::kWidth, "sketch");
  const double* at = read<double>(q, ScalarType::Double, count, "q");
  float* values = write<float>(value, ScalarType::Float, groups * count, "value");
  float* lowers = write<float>(lower, ScalarType::Float, groups * count, "lower");
  float* uppers = write<float>(upper, ScalarType::Float, groups * count, "upper");
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      const Distribution distribution(cells + g * sketch::kWidth);
      for (int64_t k = 0; k < count; k++) {
        const Distribution::Order order = quantile(distribution, at[k], interpolation);
        values[g * count + k] = static_cast<float>(order.value);
        lowers[g * count + k] = static_cast<float>(order.lower);
        uppers[g * count + k] = static_cast<float>(order.upper);
      }
    }
  });
}

}  // namespace xentile
