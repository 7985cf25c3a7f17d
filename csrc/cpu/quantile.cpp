// The operator radix_counts: one digit of a radix selection. Its schema is in src/xentile/_schemas.py, the keys are
// described in src/xentile/reference/quantile.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"

namespace xentile {
namespace {

// A storage format as unsigned integers. Infinity: the bits of +inf; whatever is larger without its sign is NaN.
template <class T, uint64_t Infinity>
struct Format {
  typedef T Bits;
  static constexpr int kWidth = std::numeric_limits<T>::digits;
  static constexpr T kSign = T(T{1} << (kWidth - 1));

  // Ordered as the values. Every NaN is the largest key.
  static T key(T bits) {
    const T magnitude = bits & T(~kSign);
    const T ordered = bits & kSign ? T(~bits) : T(bits | kSign);
    return magnitude > T(Infinity) ? T(~T{0}) : ordered;
  }
};
typedef Format<uint32_t, 0x7f800000> Float32;
typedef Format<uint16_t, 0x7f80> BFloat16;
typedef Format<uint16_t, 0x7c00> Float16;
typedef Format<uint64_t, 0x7ff0000000000000> Float64;

// The distinct prefixes, each of which owns a row of counters. Row 0 takes the values that have none of them.
class Prefixes {
 public:
  Prefixes(const int64_t* prefixes, int64_t count, int width)
      : exact_(width <= kIndexBits),
        mask_((uint64_t{1} << std::min(width, kIndexBits)) - 1),
        head_(mask_ + 1),
        next_(1),
        value_(1) {
    for (int64_t t = 0; t < count; t++) {
      const uint64_t prefix = static_cast<uint64_t>(prefixes[t]);
      int row = find(prefix);
      if (row == 0) {
        row = rows();
        value_.push_back(prefix);
        next_.push_back(head_[prefix & mask_]);
        head_[prefix & mask_] = row;
      }
      row_of_.push_back(row);
    }
  }

  // Whether the low bits of a prefix, by which its row is found, are all of it.
  bool exact() const { return exact_; }
  int find_exact(uint64_t prefix) const { return head_[prefix]; }
  int find(uint64_t prefix) const {
    int row = head_[prefix & mask_];
    while (row > 0 && value_[row] != prefix) row = next_[row];
    return row;
  }

  int rows() const { return static_cast<int>(value_.size()); }
  int row_of(int64_t target) const { return row_of_[target]; }

 private:
  static constexpr int kIndexBits = 12;  // the index takes half of an L1 cache
  bool exact_;
  uint64_t mask_;
  std::vector<int> head_, next_, row_of_;
  std::vector<uint64_t> value_;
};

// The digit of a key is its `bits` bits from `shift` on, and its prefix what is above them.
struct Task {
  const void* x;
  const bool* mask;        // null: all values
  const int64_t* weights;  // null: ones
  int shift, bits;
  const Prefixes& prefixes;
};

enum Search {
  kNone,    // the first digit: nothing is above it, and all values go to row 1
  kExact,   // many values match, and no branch could be predicted
  kChained  // few do
};

template <class F, Search search, bool all>
void count(const Task& task, int64_t begin, int64_t end, int64_t* counters) {
  constexpr int kBlock = 512;  // keys are computed by vector instructions, and stay in the L1 cache
  typename F::Bits keys[kBlock];
  const auto* x = static_cast<const typename F::Bits*>(task.x);
  const int shift = task.shift, bits = task.bits;
  const uint64_t digits = (uint64_t{1} << bits) - 1;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int size = static_cast<int>(std::min<int64_t>(kBlock, end - first));
    for (int i = 0; i < size; i++) keys[i] = F::key(x[first + i]);
    for (int i = 0; i < size; i++) {
      const uint64_t rest = static_cast<uint64_t>(keys[i]) >> shift;
      uint64_t row = 1;
      if constexpr (search == kExact) row = task.prefixes.find_exact(rest >> bits);
      if constexpr (search == kChained) {
        row = task.prefixes.find(rest >> bits);
        if (row == 0) continue;
      }
      int64_t amount = 1;
      if constexpr (!all) {
        if (task.weights) amount = task.weights[first + i];
        if (task.mask && !task.mask[first + i]) amount = 0;
      }
      counters[(row << bits) + (rest & digits)] += amount;
    }
  }
}

typedef void (*Kernel)(const Task&, int64_t begin, int64_t end, int64_t* counters);

template <class F>
Kernel kernel_for(Search search, bool all) {
  switch (search) {
    case kNone:
      return all ? count<F, kNone, true> : count<F, kNone, false>;
    case kExact:
      return all ? count<F, kExact, true> : count<F, kExact, false>;
    default:
      return all ? count<F, kChained, true> : count<F, kChained, false>;
  }
}

Kernel kernel_for(ScalarType dtype, Search search, bool all) {
  switch (dtype) {
    case ScalarType::Float:
      return kernel_for<Float32>(search, all);
    case ScalarType::BFloat16:
      return kernel_for<BFloat16>(search, all);
    case ScalarType::Half:
      return kernel_for<Float16>(search, all);
    case ScalarType::Double:
      return kernel_for<Float64>(search, all);
    default:
      STD_TORCH_CHECK(false, "xentile: x must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace

void radix_counts(const Tensor& x, std::optional<Tensor> mask, std::optional<Tensor> weights, const Tensor& prefixes,
                  int64_t shift, int64_t bits, Tensor counts) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "xentile: x has the wrong device or strides");
  const int width = 8 * static_cast<int>(x.element_size());
  STD_TORCH_CHECK(shift >= 0 && bits > 0 && bits <= 16 && shift + bits <= width, "xentile: no such digit");
  const int64_t n = x.numel(), targets = prefixes.numel(), buckets = int64_t{1} << bits;
  const bool first = shift + bits == width;
  STD_TORCH_CHECK(!first || targets == 1, "xentile: the first digit has one prefix");
  const int64_t* wanted = read<int64_t>(prefixes, ScalarType::Long, targets, "prefixes");
  int64_t* total = write<int64_t>(counts, ScalarType::Long, targets * buckets, "counts");
  const Prefixes index(wanted, targets, width - static_cast<int>(shift + bits));
  const bool* keep = read<bool>(mask, ScalarType::Bool, n, "mask");
  const int64_t* amounts = read<int64_t>(weights, ScalarType::Long, n, "weights");
  const Task task = {x.const_data_ptr(), keep, amounts, static_cast<int>(shift), static_cast<int>(bits), index};
  const Search search = first ? kNone : index.exact() ? kExact : kChained;
  const Kernel kernel = kernel_for(x.scalar_type(), search, !keep && !amounts);
  torch::stable::parallel_for(0, n, 32768, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counters(index.rows() * buckets);
    kernel(task, begin, end, counters.data());
    for (int64_t t = 0; t < targets; t++) {
      const int64_t* row = counters.data() + index.row_of(t) * buckets;
      for (int64_t b = 0; b < buckets; b++)
        if (row[b] != 0) __atomic_fetch_add(total + t * buckets + b, row[b], __ATOMIC_RELAXED);
    }
  });
}

}  // namespace xentile

STABLE_TORCH_LIBRARY_IMPL(xentile, CPU, m) { m.impl("radix_counts", TORCH_BOX(&xentile::radix_counts)); }
