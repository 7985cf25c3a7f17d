// The operators of quantiles: radix_counts, one digit of a selection that others carry on, and host_quantile, all of
// it. Their schemas are in src/xentile/_schemas.py; the formulas are those of src/xentile/reference/quantile.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>

#include "checks.h"
#include "radix.h"

namespace xentile {
namespace {

// In the order of INTERPOLATIONS.
enum Interpolation {
  kLinear,
  kMidpoint,
  kLower,
  kHigher,
  kNearest,
  kInvertedCdf,
  kHazen,
  kWeibull,
  kMedianUnbiased,
  kNormalUnbiased
};

// Order statistics, digit by digit; the last few candidates of not too many values are sorted.
template <class F>
class Selection {
 public:
  explicit Selection(const Values& values) : values_(values), first_(count_digit<F>(values, kFirst, Prefixes({0}, 0))) {
    nans_ = first_.back();
    n_ = std::accumulate(first_.begin(), first_.end(), -nans_);
  }

  int64_t nans() const { return nans_; }
  int64_t n() const { return n_; }  // without NaN

  // The keys of these ranks, each below n. Once: it uses up the counts of the first digit.
  std::vector<uint64_t> find(std::vector<int64_t> ranks) {
    std::vector<uint64_t> prefixes(ranks.size());
    descend(std::move(first_), kFirst.bits, Prefixes(prefixes, 0), prefixes, ranks);
    for (int shift = kFirst.shift; shift > 0;) {
      const Prefixes index(prefixes, F::kWidth - shift);
      if (values_.n <= kGrain && gather(index, shift)) return sorted(prefixes, ranks, shift);
      const int bits = std::min(F::kDigit, shift);
      shift -= bits;
      descend(count_digit<F>(values_, {shift, bits}, index), bits, index, prefixes, ranks);
    }
    return prefixes;
  }

 private:
  static constexpr Digit kFirst = {F::kWidth - F::kDigit, F::kDigit};
  static constexpr size_t kFew = 1024;  // values that are sorted sooner than the next digit is counted

  struct Value {
    typename F::Bits key;
    int64_t upto;  // what it and those before it count
  };

  // From the counts of a digit: the digit of each rank, and the rank among the values that have it too.
  static void descend(std::vector<int64_t> counts, int bits, const Prefixes& index, std::vector<uint64_t>& prefixes,
                      std::vector<int64_t>& ranks) {
    const size_t buckets = size_t{1} << bits;
    for (auto row = counts.begin(); row != counts.end(); row += buckets) std::partial_sum(row, row + buckets, row);
    for (size_t t = 0; t < ranks.size(); t++) {
      const int64_t* upto = &counts[index.row_of(t) * buckets];
      const uint64_t digit = std::upper_bound(upto, upto + buckets, ranks[t]) - upto;
      ranks[t] -= digit > 0 ? upto[digit - 1] : 0;
      prefixes[t] = prefixes[t] << bits | digit;
    }
  }

  // Sorts the values that have one of the prefixes; false if they are not few.
  bool gather(const Prefixes& prefixes, int shift) {
    typename F::Bits keys[kBlock];
    few_.resize(kFew + kBlock);
    size_t filled = 0;
    for (int64_t first = 0; first < values_.n; first += kBlock) {
      const int size = keys_of<F>(values_, first, values_.n, keys);
      for (int i = 0; i < size; i++) {  // without a branch, which nobody could predict
        few_[filled] = {keys[i], values_.amount(first + i)};
        filled += prefixes.find(static_cast<uint64_t>(keys[i]) >> shift) > 0 && few_[filled].upto > 0;
      }
      if (filled > kFew) return false;
    }
    few_.resize(filled);
    std::sort(few_.begin(), few_.end(), [](const Value& a, const Value& b) { return a.key < b.key; });
    for (size_t i = 1; i < filled; i++) few_[i].upto += few_[i - 1].upto;
    return true;
  }

  // The keys of ranks among the values with these prefixes, all of which were gathered.
  std::vector<uint64_t> sorted(std::vector<uint64_t> prefixes, const std::vector<int64_t>& ranks, int shift) const {
    for (size_t t = 0; t < ranks.size(); t++) {
      const auto below = [](const Value& value, uint64_t key) { return value.key < key; };
      const auto same = std::lower_bound(few_.begin(), few_.end(), prefixes[t] << shift, below);
      const int64_t rank = ranks[t] + (same == few_.begin() ? 0 : same[-1].upto);
      const auto beyond = [](int64_t rank, const Value& value) { return rank < value.upto; };
      prefixes[t] = std::upper_bound(same, few_.end(), rank, beyond)->key;
    }
    return prefixes;
  }

  const Values& values_;
  std::vector<int64_t> first_;
  int64_t nans_, n_;
  std::vector<Value> few_;
};

// Where among n sorted values a quantile lies: between two ranks, and how far from the lower.
struct Position {
  int64_t lower, upper;
  double fraction;
};

// (alpha, beta) of Hyndman and Fan's continuous definitions.
double continuous(double q, double n, double last, double alpha, double beta) {
  return std::min(std::max(n * q + (alpha + q * (1 - alpha - beta)) - 1, 0.0), last);
}

double between(double q, double n, int64_t interpolation) {
  const double last = n - 1, h = q * last;
  switch (interpolation) {
    case kMidpoint:
      return 0.5 * (std::floor(h) + std::ceil(h));
    case kLower:
      return std::floor(h);
    case kHigher:
      return std::ceil(h);
    case kNearest:
      return std::nearbyint(h);
    case kInvertedCdf:
      return std::min(std::max(std::ceil(n * q - 1), 0.0), last);
    case kHazen:
      return continuous(q, n, last, 1 / 2.0, 1 / 2.0);
    case kWeibull:
      return continuous(q, n, last, 0, 0);
    case kMedianUnbiased:
      return continuous(q, n, last, 1 / 3.0, 1 / 3.0);
    case kNormalUnbiased:
      return continuous(q, n, last, 3 / 8.0, 3 / 8.0);
    default:
      return h;
  }
}

Position position(double q, int64_t n, int64_t interpolation) {
  const double h = between(q, static_cast<double>(n), interpolation), lower = std::floor(h);
  return {static_cast<int64_t>(lower), static_cast<int64_t>(std::ceil(h)), h - lower};
}

// The first value that reaches a share q of the total. The product may be off by one; the quotient is what counts.
Position weighted_position(double q, int64_t total) {
  const double all = static_cast<double>(total);
  double reached = std::ceil(q * all) - 1;
  for (int i = 0; i < 2; i++) reached += reached / all < q;
  const int64_t rank = reached < all ? static_cast<int64_t>(std::max(reached, 1.0)) - 1 : total - 1;
  return {rank, rank, 0};
}

double interpolate(double low, double high, double fraction) {
  const double step = high - low;
  if (low == high) return low;
  if (step == INFINITY) return low + high;
  return fraction < 0.5 ? low + step * fraction : high - step * (1 - fraction);
}

// Weights as integers, in units that depend on the largest. False if one that counts is negative, infinite or NaN.
bool to_units(const double* weights, const bool* mask, int64_t n, std::vector<int64_t>& units) {
  double largest = 0;
  bool valid = true;
  for (int64_t i = 0; i < n; i++) {
    const double weight = mask && !mask[i] ? 0 : weights[i];
    valid &= weight >= 0 && weight < INFINITY;
    largest = std::max(largest, weight);
  }
  int exponent;
  const double scale = std::frexp(largest, &exponent) * 0x1p31 / largest;  // a power of two, or NaN
  units.resize(n);
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const double scaled = mask && !mask[i] ? 0 : weights[i] * scale;
      units[i] = std::isfinite(scaled) ? std::llrint(scaled) : 0;
    }
  });
  return valid;
}

// The quantiles q[0:count] into `out`; NaN where nothing counts.
template <class F, class Out>
void quantiles(Selection<F>& selection, bool weighted, const double* q, int64_t count, int64_t interpolation,
               Out* out) {
  std::vector<Position> positions(count);
  std::vector<int64_t> ranks;
  for (int64_t k = 0; k < count; k++) {
    const double share = std::min(q[k] >= 0 ? q[k] : 0, 1.0);  // NaN where q is outside: below
    positions[k] = weighted ? weighted_position(share, selection.n()) : position(share, selection.n(), interpolation);
    ranks.push_back(positions[k].lower);
    ranks.push_back(positions[k].upper);
  }
  const std::vector<uint64_t> keys = selection.find(ranks);
  for (int64_t k = 0; k < count; k++) {
    const double low = F::value(static_cast<typename F::Bits>(keys[2 * k]));
    const double high = F::value(static_cast<typename F::Bits>(keys[2 * k + 1]));
    out[k] = static_cast<Out>(q[k] >= 0 && q[k] <= 1 ? interpolate(low, high, positions[k].fraction) : NAN);
  }
}

}  // namespace

void radix_counts(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> weights, const Tensor& prefixes,
                  int64_t shift, int64_t bits, Tensor counts) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "xentile: x has the wrong device or strides");
  const int width = 8 * static_cast<int>(x.element_size());
  STD_TORCH_CHECK(shift >= 0 && bits > 0 && bits <= 16 && shift + bits <= width, "xentile: no such digit");
  const int64_t n = x.numel(), targets = prefixes.numel(), buckets = int64_t{1} << bits;
  STD_TORCH_CHECK(shift + bits < width || targets == 1, "xentile: the first digit has one prefix");
  const int64_t* wanted = read<int64_t>(prefixes, ScalarType::Long, targets, "prefixes");
  int64_t* total = write<int64_t>(counts, ScalarType::Long, targets * buckets, "counts");
  const Prefixes index({wanted, wanted + targets}, width - static_cast<int>(shift + bits));
  const bool* keep = read<bool>(mask, ScalarType::Bool, n, "mask");
  const int64_t* amounts = read<int64_t>(weights, ScalarType::Long, n, "weights");
  const Values values = {x.const_data_ptr(), keep, amounts, n};
  const Digit digit = {static_cast<int>(shift), static_cast<int>(bits)};
  with_format(x.scalar_type(), [&](auto format) {
    const std::vector<int64_t> counted = count_digit<decltype(format)>(values, digit, index);
    for (int64_t t = 0; t < targets; t++) {
      const int64_t* row = counted.data() + index.row_of(t) * buckets;
      for (int64_t b = 0; b < buckets; b++) total[t * buckets + b] += row[b];
    }
  });
}

void host_quantile(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> weights, const Tensor& q,
                   Tensor value, Tensor counted, int64_t interpolation, bool omit_nan) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "xentile: x has the wrong device or strides");
  const int64_t n = x.numel(), count = q.numel();
  const bool* keep = read<bool>(mask, ScalarType::Bool, n, "mask");
  const double* weight = read<double>(weights, ScalarType::Double, n, "weights");
  const double* wanted = read<double>(q, ScalarType::Double, count, "q");
  int64_t* found = write<int64_t>(counted, ScalarType::Long, 2, "counted");
  std::vector<int64_t> units;
  const bool valid = !weight || to_units(weight, keep, n, units);
  const Values values = {x.const_data_ptr(), keep, weight ? units.data() : nullptr, n};
  with_format(x.scalar_type(), [&](auto format) {
    typedef decltype(format) F;
    typedef std::conditional_t<F::kWidth == 64, double, float> Out;
    Out* out = write<Out>(value, kAccType<Out>, count, "value");
    Selection<F> selection(values);
    found[0] = valid ? selection.n() : -1;
    found[1] = valid ? selection.nans() : -1;
    if (found[0] > 0 && (omit_nan || found[1] == 0))
      quantiles(selection, weight != nullptr, wanted, count, interpolation, out);
    else
      std::fill(out, out + count, static_cast<Out>(NAN));
  });
}

}  // namespace xentile

STABLE_TORCH_LIBRARY_IMPL(xentile, CPU, m) {
  m.impl("radix_counts", TORCH_BOX(&xentile::radix_counts));
  m.impl("host_quantile", TORCH_BOX(&xentile::host_quantile));
}
