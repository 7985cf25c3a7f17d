// One row of teacher_topk, from logits to results. The formulas are in src/xentile/reference/teacher.py.
//
// A row is read once, in blocks. Logits above a limit become candidates; all others are at once part of the tail, which
// is summed relative to its own maximum. The limit rises: K logits at least as large are known to exist. Now and then
// the candidates are reduced to the best K, and what is dropped goes to the tail as well. So every logit is counted
// once, and the tail is never a difference.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace xentile::teacher {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kSample = 32768;  // columns of which a limit is made; the second-level cache holds them

inline float logit_of(int32_t value) {
  const int32_t bits = value < 0 ? value ^ 0x7fffffff : value;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// A limit that every number >= bound is above, also in a thread that takes subnormal numbers for zeros.
inline float just_below(float bound) {
  constexpr float least = std::numeric_limits<float>::min();
  return std::abs(bound) < least ? -least : std::nextafter(bound, -kInf);
}

// Temperature 1 and those asked for; none is computed twice.
struct Temperatures {
  explicit Temperatures(const float* asked, int64_t count) : values{1} {
    for (int64_t t = 0; t < count; t++) {
      const auto known = std::find(values.begin(), values.end(), asked[t]);
      column.push_back(known - values.begin());
      if (known == values.end()) values.push_back(asked[t]);
    }
    // Finite, as infinity times the distance of the maximum to itself would be NaN.
    for (double t : values) inverses.push_back(std::min(static_cast<float>(1 / t), std::numeric_limits<float>::max()));
  }
  std::vector<double> values;
  std::vector<float> inverses;
  std::vector<int64_t> column;  // where in `values` each one that was asked for is
};

struct Problem {
  const TopKKernels& kernels;
  const TopKKernels& float32_kernels;  // for candidates that were dropped
  const char* data;
  int64_t rows, columns, k, item, pitch;  // item, pitch: bytes of a logit, and from one row to the next
  Temperatures temperatures;
  TopKTask task;
  int32_t* ids;
  float *logprobs, *log_z, *tail_logprob;

  double transform(double x) const {
    const double scaled = task.logit_scale * x;
    return task.softcap == 0 ? scaled : task.softcap * std::tanh(scaled / task.softcap);
  }
};

struct Entry {
  int32_t value, id;
  bool operator<(const Entry& other) const { return value != other.value ? value > other.value : id < other.id; }
};

// Works off rows, in one thread.
class TopK {
 public:
  explicit TopK(const Problem& problem)
      : p_(problem),
        crowded_(std::max<int64_t>(2 * p_.k, 64)),
        many_(std::max<int64_t>(p_.k, 16)),
        values_(crowded_ + p_.kernels.block + kTopKPadding),
        ids_(values_.size()),
        maxima_(std::min(kSample, p_.columns) + kTopKPadding),
        dropped_(values_.size()),
        best_(p_.k),
        below_(p_.k),
        sums_(p_.temperatures.values.size()),
        log_sums_(sums_.size()) {}

  void row(int64_t i) {
    const char* x = p_.data + i * p_.pitch;
    count_ = 0, limit_ = tail_max_ = -kInf;
    std::fill(sums_.begin(), sums_.end(), 0);
    raise_limit(x, 0);
    for (int64_t begin = 0; begin < p_.columns; begin += p_.kernels.block) {
      const int64_t n = std::min(p_.kernels.block, p_.columns - begin);
      const char* block = x + begin * p_.item;
      const Collected found = p_.kernels.collect(block, n, begin, limit_, {&values_[count_], &ids_[count_]});
      count_ += found.candidates;
      add_tail(p_.kernels, block, n, limit_, found.spans, found.below);
      if (count_ > crowded_) limit_ = std::max(limit_, keep_best());
      if (found.candidates >= many_) raise_limit(x, begin + n);  // as when logits rise from column to column
    }
    if (count_ > p_.k) keep_best();
    if (count_ < p_.k) fill_up();
    epilogue(i);
  }

 private:
  // Among the next logits, K groups have a maximum of at least the K-th largest of the groups' maxima.
  void raise_limit(const char* x, int64_t begin) {
    const int64_t n = std::min(kSample, p_.columns - begin);
    const int64_t groups = p_.kernels.group_maxima(x + begin * p_.item, n, 4 * p_.k, maxima_.data());
    if (groups < p_.k) return;
    limit_ = std::max(limit_, just_below(logit_of(p_.kernels.kth_largest(maxima_.data(), groups, p_.k))));
  }

  // Drops all but the best K candidates; returns the least logit of these, or less. A later one that is equal is no
  // candidate, as its id is higher; of equal candidates the first ones stay.
  float keep_best() {
    const int32_t kth = p_.kernels.kth_largest(values_.data(), count_, p_.k);
    int64_t ties = p_.k;
    for (int64_t c = 0; c < count_; c++) ties -= values_[c] > kth;
    int64_t kept = 0, dropped = 0;
    int32_t highest = std::numeric_limits<int32_t>::min();
    for (int64_t c = 0; c < count_; c++) {  // without branches
      const int32_t value = values_[c];
      const bool equal = value == kth, keep = value > kth || (equal && ties > 0);
      ties -= equal;
      values_[kept] = value, ids_[kept] = ids_[c];
      kept += keep;
      dropped_[dropped] = logit_of(value);
      dropped += !keep;
      highest = keep ? highest : std::max(highest, value);
    }
    for (int64_t begin = 0; begin < dropped; begin += p_.float32_kernels.block)
      add_tail(p_.float32_kernels, &dropped_[begin], std::min(p_.float32_kernels.block, dropped - begin), kInf, 0,
               logit_of(highest));
    count_ = kept;
    return logit_of(kth);
  }

  // max: the largest of those of x[0:n] that are not above the limit
  void add_tail(const TopKKernels& kernels, const void* x, int64_t n, float limit, uint32_t spans, float max) {
    const float top = static_cast<float>(p_.transform(max));
    if (!(top <= tail_max_)) {
      for (size_t t = 0; t < sums_.size(); t++)
        if (sums_[t] != 0) sums_[t] *= std::exp((tail_max_ - double{top}) / p_.temperatures.values[t]);
      tail_max_ = top;
    }
    // Only -inf so far: relative to 0, exp(-inf) is 0 and not exp(-inf + inf) = NaN, and a NaN still shows.
    kernels.add_tail(p_.task, x, n, limit, spans, tail_max_ == -kInf ? 0 : tail_max_, sums_.data());
  }

  // Every logit above -inf is a candidate, and there are fewer than K: the others follow by id. Those that remain are
  // equal, and no -inf any more if there is a softcap.
  void fill_up() {
    const int64_t candidates = count_;
    constexpr int32_t lowest = INT32_MIN + 0x007fffff;  // the value of -inf
    for (int32_t id = 0, next = 0; count_ < p_.k; id++) {
      if (next < candidates && ids_[next] == id) {
        next++;
      } else {
        values_[count_] = lowest, ids_[count_++] = id;
      }
    }
    tail_max_ = static_cast<float>(p_.transform(-kInf));
    for (double& sum : sums_) sum = std::isnan(sum) ? sum : p_.columns - p_.k;
  }

  // Everything relative to the maximum, whose own exponential is left out of the sums: a peaked row keeps its digits.
  void epilogue(int64_t i) {
    for (int64_t k = 0; k < p_.k; k++) best_[k] = {values_[k], ids_[k]};
    std::sort(best_.begin(), best_.end());
    const double top = p_.transform(logit_of(best_[0].value)), tail_below = tail_max_ - top;
    if (!std::isfinite(top) || std::isnan(sums_[0])) return break_row(i);
    for (int64_t k = 0; k < p_.k; k++) below_[k] = p_.transform(logit_of(best_[k].value)) - top;
    for (size_t t = 0; t < sums_.size(); t++) {
      const double temperature = p_.temperatures.values[t];
      double rest = sums_[t] * std::exp(tail_below / temperature);
      for (int64_t k = 1; k < p_.k; k++) rest += std::exp(below_[k] / temperature);
      log_sums_[t] = std::log1p(rest);
    }
    for (int64_t k = 0, out = i * p_.k; k < p_.k; k++, out++) {
      p_.ids[out] = best_[k].id;
      p_.logprobs[out] = static_cast<float>(below_[k] - log_sums_[0]);
    }
    int64_t out = i * p_.temperatures.column.size();
    for (int64_t t : p_.temperatures.column) {
      const double temperature = p_.temperatures.values[t];
      p_.log_z[out] = static_cast<float>(log_sums_[t] - log_sums_[0] / temperature);
      p_.tail_logprob[out++] = static_cast<float>(std::log(sums_[t]) + tail_below / temperature - log_sums_[t]);
    }
  }

  void break_row(int64_t i) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    const int64_t asked = p_.temperatures.column.size();
    std::iota(p_.ids + i * p_.k, p_.ids + (i + 1) * p_.k, 0);
    std::fill_n(p_.logprobs + i * p_.k, p_.k, nan);
    std::fill_n(p_.log_z + i * asked, asked, nan);
    std::fill_n(p_.tail_logprob + i * asked, asked, nan);
  }

  const Problem& p_;
  const int64_t crowded_, many_;       // candidates in the buffer, and in a block, that are worth a higher limit
  std::vector<int32_t> values_, ids_;  // candidates
  std::vector<int32_t> maxima_;
  std::vector<float> dropped_;
  std::vector<Entry> best_;
  std::vector<double> below_;  // of the best: how far from the maximum, at most 0
  std::vector<double> sums_,
      log_sums_;  // of each temperature: of the tail relative to tail_max_, of all to the maximum
  int64_t count_ = 0;
  float limit_ = -kInf, tail_max_ = -kInf;
};

}  // namespace xentile::teacher
