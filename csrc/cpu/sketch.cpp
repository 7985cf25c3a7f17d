// The operators sketch_update and sketch_quantile; their schemas are in src/xentile/_schemas.py.
#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "operators.h"
#include "sketch_state.h"

namespace xentile {
namespace {

constexpr int64_t kMostInHistogram = int64_t{1} << 31;  // its counts are uint32

enum Interpolation { kLinear, kLower, kHigher, kNearest, kMidpoint };

// One row of a state, ready for order statistics. Buckets in the order of their values: below 2**-24, bins, above 2**8,
// +inf.
class Distribution {
 public:
  Distribution(const sketch::Layout& layout, const int64_t* state) : layout_(layout) {
    cumulative_.reserve(layout.bins + 3);
    int64_t sum = 0;
    const auto append = [&](int column) { cumulative_.push_back(sum += state[column]); };
    append(sketch::kZero);
    for (int bin = 0; bin < layout.bins; bin++) append(sketch::kSpecial + bin);
    append(sketch::kOverflow);
    append(sketch::kInf);
    if (sum == 0) return;
    low_ = sketch::min_of_key(state[sketch::kMinKey]);
    high_ = sketch::max_of_key(state[sketch::kMaxKey]);
  }

  int64_t size() const { return cumulative_.back(); }

  struct Order {
    double value, lower, upper;  // the estimate of an order statistic, and the edges of its bucket
  };

  Order order(int64_t rank) const {
    const int b =
        static_cast<int>(std::upper_bound(cumulative_.begin(), cumulative_.end(), rank) - cumulative_.begin());
    const int64_t before = b == 0 ? 0 : cumulative_[b - 1], count = cumulative_[b] - before;
    const int overflow = layout_.bins + 1, infinite = overflow + 1;
    const double left = b == 0 ? -kInf : b < infinite ? layout_.edge(b - 1) : kInf;
    const double right = b < overflow ? layout_.edge(b) : b == overflow ? overflow_edge() : kInf;
    double value = left + (right - left) * (static_cast<double>(rank - before) + 0.5) / static_cast<double>(count);
    if (b == 0) value = 0;
    if (b == infinite) value = kInf;
    if (rank == 0 || rank == size() - 1) value = rank == 0 ? low_ : high_;
    return {std::clamp(value, low_, high_), std::clamp(left, low_, high_), std::clamp(right, low_, high_)};
  }

 private:
  static constexpr double kInf = std::numeric_limits<double>::infinity();
  double overflow_edge() const {
    const double top = std::min<double>(high_, std::numeric_limits<float>::max());
    return std::max<double>(top, layout_.edge(layout_.bins));
  }

  const sketch::Layout& layout_;
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

// Counts many values in group 0: their histogram is made apart, without atomics, and added in the end.
class Histogram {
 public:
  // first_added: the bin whose counts are added to the state first. Threads are done at the same time, and would wait
  // for each other's cache lines if all began with the same.
  Histogram(const sketch::State& state, int64_t unit, int first_added)
      : state_(state), unit_(unit), first_added_(first_added), counts_(state.layout.bins + sketch::kNowhere) {}
  ~Histogram() {
    add_bins(first_added_, state_.layout.bins);
    add_bins(0, first_added_);
    state_.add(0, sketch::kZero, below_ * unit_);
    state_.add(0, totals_);
  }

  void add_block(const float* x) {
    const sketch::Layout& layout = state_.layout;
    const sketch::BlockCount block =
        kernel_table().count(x, layout.shift, layout.first_key, layout.bins, counts_.data(), &totals_);
    below_ += block.below;
    if (block.others == 0) return;
    const auto end = static_cast<uint32_t>(sketch::bits_of(layout.edge(layout.bins)));
    for (int i = 0; i < sketch::kCountBlock; i++)
      if (static_cast<uint32_t>(sketch::bits_of(x[i])) >= end) add(x[i]);  // negative, NaN, or large
  }

  void add(float x) {
    if (!counter_) counter_.emplace(state_);
    counter_->add_value(x, 0, unit_, 1);
  }

 private:
  void add_bins(int begin, int end) const {
    for (int bin = begin; bin < end; bin++)
      if (counts_[bin]) state_.add(0, sketch::kSpecial + bin, counts_[bin] * unit_);
  }

  const sketch::State& state_;
  const int64_t unit_;
  const int first_added_;
  std::optional<sketch::Counter> counter_;
  std::vector<uint32_t> counts_;
  int64_t below_ = 0;
  sketch::Totals totals_ = {};
};

void count_all(Histogram& histogram, const float* x, const bool* keep, int64_t n) {
  constexpr int64_t block = sketch::kCountBlock;
  float kept[block];
  int64_t filled = 0;
  for (int64_t i = 0; i < n;) {
    if (!keep && n - i >= block) {
      histogram.add_block(x + i);
      i += block;
      continue;
    }
    for (; i < n && filled < block; i++) {
      kept[filled] = x[i];
      filled += !keep || keep[i];
    }
    if (filled < block) break;
    histogram.add_block(kept);
    filled = 0;
  }
  for (int64_t i = 0; i < filled; i++) histogram.add(kept[i]);
}

}  // namespace

void sketch_update(const Tensor& values, std::optional<Tensor> mask, std::optional<Tensor> weights,
                   std::optional<Tensor> group_ids, Tensor sketch, int64_t unit) {
  const int64_t n = values.numel();
  const float* x = read<float>(values, ScalarType::Float, n, "values");
  const bool* keep = read<bool>(mask, ScalarType::Bool, n, "mask");
  const float* weight = read<float>(weights, ScalarType::Float, n, "weights");
  const int64_t* group = read<int64_t>(group_ids, ScalarType::Long, n, "group_ids");
  const sketch::State state = write_state(sketch);
  torch::stable::parallel_for(0, n, 16384, [&](int64_t begin, int64_t end) {
    // A histogram has to be cleared and added to the state: of no use to fewer values.
    if (!weight && !group && end - begin >= state.layout.bins / 2) {
      for (int64_t i = begin; i < end; i += kMostInHistogram) {
        Histogram histogram(state, unit, static_cast<int>(begin * state.layout.bins / n));
        count_all(histogram, x + i, keep ? keep + i : nullptr, std::min(kMostInHistogram, end - i));
      }
      return;
    }
    sketch::Counter counter(state);
    for (int64_t i = begin; i < end; i++) {
      const int64_t amount = keep && !keep[i] ? 0 : weight ? sketch::amount_of(weight[i], unit) : unit;
      if (amount > 0) counter.add_value(x[i], group ? group[i] : 0, amount, static_cast<double>(amount) / unit);
    }
  });
}

void sketch_quantile(const Tensor& state, const Tensor& q, Tensor value, Tensor lower, Tensor upper,
                     int64_t interpolation) {
  const int64_t groups = state.size(0), count = q.numel();
  const sketch::Layout layout = layout_of(state);
  const int64_t* cells = read<int64_t>(state, ScalarType::Long, groups * layout.width(), "sketch");
  const double* at = read<double>(q, ScalarType::Double, count, "q");
  float* values = write<float>(value, ScalarType::Float, groups * count, "value");
  float* lowers = write<float>(lower, ScalarType::Float, groups * count, "lower");
  float* uppers = write<float>(upper, ScalarType::Float, groups * count, "upper");
  torch::stable::parallel_for(0, groups, 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      const Distribution distribution(layout, cells + g * layout.width());
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
