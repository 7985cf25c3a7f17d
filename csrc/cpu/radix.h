// One digit of a radix selection: how many values have each. The keys of values are described in
// src/xentile/reference/quantile.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// A storage format as unsigned integers. Infinity: the bits of +inf; whatever is larger without its sign is NaN.
template <class Float, class T, uint64_t Infinity>
struct Format {
  typedef T Bits;
  static constexpr int kWidth = std::numeric_limits<T>::digits;
  static constexpr T kSign = T(T{1} << (kWidth - 1));
  static constexpr int kDigit = kWidth == 64 ? 13 : 11;  // at most; the last value of the first digit has to mean NaN

  // Ordered as the values. Every NaN is the largest key.
  static T key(T bits) {
    const T magnitude = bits & T(~kSign);
    const T ordered = bits & kSign ? T(~bits) : T(bits | kSign);
    return magnitude > T(Infinity) ? T(~T{0}) : ordered;
  }
  static double value(T key) {
    const T bits = key & kSign ? T(key ^ kSign) : T(~key);
    Float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }
};
typedef Format<float, uint32_t, 0x7f800000> Float32;
typedef Format<torch::headeronly::BFloat16, uint16_t, 0x7f80> BFloat16;
typedef Format<torch::headeronly::Half, uint16_t, 0x7c00> Float16;
typedef Format<double, uint64_t, 0x7ff0000000000000> Float64;

// Calls f with the format of a dtype.
template <class Function>
void with_format(torch::headeronly::ScalarType dtype, Function f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(Float32());
    case ScalarType::BFloat16:
      return f(BFloat16());
    case ScalarType::Half:
      return f(Float16());
    case ScalarType::Double:
      return f(Float64());
    default:
      STD_TORCH_CHECK(false, "xentile: x must be float32, bfloat16, float16 or float64");
  }
}

// The distinct prefixes, each of which owns a row of counters. Row 0 takes the values that have none of them,
// or all of them for the first digit, above which there is nothing.
class Prefixes {
 public:
  Prefixes(const std::vector<uint64_t>& prefixes, int width)
      : exact_(width <= kIndexBits),
        mask_((uint64_t{1} << std::min(width, kIndexBits)) - 1),
        head_(mask_ + 1),
        next_(1),
        value_(1) {
    if (width == 0) {
      row_of_.assign(prefixes.size(), 0);
      return;
    }
    for (const uint64_t prefix : prefixes) {
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

struct Values {
  const void* x;
  const bool* mask;        // null: all values
  const int64_t* amounts;  // what each counts; null: one
  int64_t n;

  int64_t amount(int64_t i) const {
    const int64_t full = amounts ? amounts[i] : 1;
    return mask ? full & -int64_t{mask[i]} : full;  // without a branch, which nobody could predict
  }
};

// The digit of a key is its `bits` bits from `shift` on, and its prefix what is above them.
struct Digit {
  int shift, bits;
};

enum Search {
  kNone,    // the first digit
  kExact,   // many values match, and no branch could be predicted
  kChained  // few do
};

constexpr int kBlock = 512;        // keys are computed by vector instructions, and stay in the L1 cache
constexpr int64_t kGrain = 32768;  // values that one thread takes at least

template <class F>
int keys_of(const Values& values, int64_t first, int64_t end, typename F::Bits* keys) {
  const auto* x = static_cast<const typename F::Bits*>(values.x) + first;
  const int size = static_cast<int>(std::min<int64_t>(kBlock, end - first));
  for (int i = 0; i < size; i++) keys[i] = F::key(x[i]);
  return size;
}

template <class F, Search search, bool all>
void count(const Values& values, Digit digit, const Prefixes& prefixes, int64_t begin, int64_t end, int64_t* counters) {
  typename F::Bits keys[kBlock];
  const int shift = digit.shift, bits = digit.bits;
  const uint64_t digits = (uint64_t{1} << bits) - 1;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int size = keys_of<F>(values, first, end, keys);
    for (int i = 0; i < size; i++) {
      const uint64_t rest = static_cast<uint64_t>(keys[i]) >> shift;
      uint64_t row = 0;
      if constexpr (search == kExact) row = prefixes.find_exact(rest >> bits);
      if constexpr (search == kChained) {
        row = prefixes.find(rest >> bits);
        if (row == 0) continue;
      }
      counters[(row << bits) + (rest & digits)] += all ? 1 : values.amount(first + i);
    }
  }
}

typedef void (*Kernel)(const Values&, Digit, const Prefixes&, int64_t begin, int64_t end, int64_t* counters);

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

// What the values with each prefix and digit count: a row of 2**bits counters for each row of the prefixes.
template <class F>
std::vector<int64_t> count_digit(const Values& values, Digit digit, const Prefixes& prefixes) {
  const bool first = digit.shift + digit.bits == F::kWidth;
  const Search search = first ? kNone : prefixes.exact() ? kExact : kChained;
  const Kernel kernel = kernel_for<F>(search, !values.mask && !values.amounts);
  std::vector<int64_t> total(static_cast<size_t>(prefixes.rows()) << digit.bits);
  if (values.n <= kGrain) {
    kernel(values, digit, prefixes, 0, values.n, total.data());
    return total;
  }
  torch::stable::parallel_for(0, values.n, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counters(total.size());
    kernel(values, digit, prefixes, begin, end, counters.data());
    for (size_t b = 0; b < total.size(); b++)
      if (counters[b] != 0) __atomic_fetch_add(&total[b], counters[b], __ATOMIC_RELAXED);
  });
  return total;
}

}  // namespace
