// The operator topk_support; its schema is in src/xentile/_schemas.py, its rules in xentile/reference/support.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "checks.h"
#include "operators.h"
#include "topk_row.h"

namespace xentile {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity(), kNaN = std::numeric_limits<double>::quiet_NaN();

enum Duplicates { kSum, kFirst, kRefuse };
enum Fallback { kNone, kRenormalize, kUniformTail };

struct SupportTask {
  int64_t columns;  // V
  SupportCode support;
  Duplicates duplicates;
  Fallback fallback;
};

// An entry that is present: its id, its log-probability l at temperature 1, then u = l / T.
struct Entry {
  int64_t id, place;  // place: in the order that was given
  double log_p, u;
};

// What else is known of a row; null where it is not.
struct Stored {
  const float *log_z, *tail_logprob;
  double temperature;
};

template <class Value>
double logsumexp(const Entry* begin, const Entry* end, Value value) {
  double top = -kInf, sum = 0;
  for (const Entry* e = begin; e < end; e++) top = value(*e) <= top ? top : value(*e);
  if (std::isinf(top)) return top;
  for (const Entry* e = begin; e < end; e++) sum += std::exp(value(*e) - top);
  return top + std::log(sum);
}

double of_log_p(const Entry& e) { return e.log_p; }
double of_u(const Entry& e) { return e.u; }

// log(1 - exp(x)), -inf where the rounding of what was stored has made x positive
double log_rest(double x) { return x >= 0 ? -kInf : std::log(-std::expm1(x)); }

// The canonical form of one row after another, in one thread.
class SupportRows {
 public:
  SupportRows(const SupportTask& task, int64_t k) : task_(task) { entries_.reserve(k); }

  void clear() { entries_.clear(); }

  // An entry, if it is present.
  void add(int64_t id, double log_p) {
    if (id >= 0 && log_p != -kInf) entries_.push_back({id, static_cast<int64_t>(entries_.size()), log_p, 0});
  }

  struct Masses {
    double tail, mass, absent;  // absent: log p of an entry that is not there
  };

  // Tail and mass; afterwards `u` of the entries inside is log p.
  Masses normalise(const Stored& stored) {
    const bool repeated = merge();
    if (repeated && task_.duplicates == kRefuse) {
      for (Entry& e : entries_) e.u = kNaN;
      return {kNaN, kNaN, kNaN};
    }
    const double divisor = task_.support == kSampled ? 1 : stored.temperature;
    for (Entry& e : entries_) e.u = e.log_p / divisor;
    switch (task_.support) {
      case kSampled:
        return {-kInf, std::exp(logsumexp(begin(), inside_end(), of_u)), -kInf};
      case kTeacherRenormalized:
      case kRenormalized:
        return renormalise(stored);
      default:
        return subtract_normaliser(stored);
    }
  }

  const Entry* begin() const { return entries_.data(); }
  const Entry* end() const { return begin() + entries_.size(); }
  const Entry* inside_end() const {
    return std::partition_point(begin(), end(), [this](const Entry& e) { return e.id < task_.columns; });
  }

 private:
  // Sorts by id and makes one entry of equal ids; whether there were any.
  bool merge() {
    std::sort(entries_.begin(), entries_.end(),
              [](const Entry& a, const Entry& b) { return a.id != b.id ? a.id < b.id : a.place < b.place; });
    size_t size = 0;
    for (size_t first = 0; first < entries_.size();) {
      size_t last = first + 1;
      while (last < entries_.size() && entries_[last].id == entries_[first].id) last++;
      Entry merged = entries_[first];
      if (task_.duplicates == kSum && last > first + 1)
        merged.log_p = logsumexp(begin() + first, begin() + last, of_log_p);
      entries_[size++] = merged;
      first = last;
    }
    const bool repeated = size < entries_.size();
    entries_.resize(size);
    return repeated;
  }

  Masses renormalise(const Stored& stored) {
    const Entry* last = inside_end();
    const double sum = logsumexp(begin(), last, of_u);
    double mass = stored.log_z ? std::exp(sum - *stored.log_z) : kNaN;
    if (stored.temperature == 1) mass = std::exp(sum);
    subtract(sum);
    return {-kInf, mass, -kInf};
  }

  Masses subtract_normaliser(const Stored& stored) {
    const double total = logsumexp(begin(), end(), of_u), given = stored.tail_logprob ? *stored.tail_logprob : kNaN;
    double log_z = stored.log_z ? *stored.log_z : 0, tail = -kInf;
    if (stored.log_z || stored.temperature == 1) {
      tail = stored.tail_logprob ? given : log_rest(total - log_z);
    } else if (task_.fallback == kUniformTail) {
      const double spread =
          spread_tail(stored.tail_logprob ? given : log_rest(logsumexp(begin(), end(), of_log_p)), stored.temperature);
      log_z = DoubleMath::logaddexp(total, spread);
      tail = spread == -kInf ? -kInf : spread - log_z;
    } else {
      log_z = total;
    }
    subtract(log_z);
    const double outside = logsumexp(inside_end(), end(), of_u),
                 mass = std::exp(logsumexp(begin(), inside_end(), of_u));
    return {task_.support == kTailBucket ? DoubleMath::logaddexp(tail, outside) : -kInf, mass, -kInf};
  }

  // The log-mass at a temperature of a tail that is spread evenly over the columns without an entry.
  double spread_tail(double log_mass, double temperature) const {
    const double others = static_cast<double>(task_.columns) - static_cast<double>(entries_.size());
    return others > 0 ? std::log(others) * (1 - 1 / temperature) + log_mass / temperature : -kInf;
  }

  void subtract(double log_z) {
    for (Entry& e : entries_) e.u -= log_z;
  }

  const SupportTask& task_;
  std::vector<Entry> entries_;
};

// Calls f(pointer to the first), for each of the dtypes that log-probabilities are stored in.
template <class F>
void with_logprobs(const Tensor& t, int64_t size, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(read<float>(t, ScalarType::Float, size, "logprobs"));
    case ScalarType::BFloat16:
      return f(read<torch::headeronly::BFloat16>(t, ScalarType::BFloat16, size, "logprobs"));
    case ScalarType::Half:
      return f(read<torch::headeronly::Half>(t, ScalarType::Half, size, "logprobs"));
    default:
      STD_TORCH_CHECK(false, "xentile: logprobs must be float32, bfloat16 or float16");
  }
}

class Ids {
 public:
  Ids(const Tensor& t, int64_t size) {
    if (t.scalar_type() == ScalarType::Int) {
      narrow_ = read<int32_t>(t, ScalarType::Int, size, "ids");
    } else {
      wide_ = read<int64_t>(t, ScalarType::Long, size, "ids");
    }
  }
  int64_t operator[](int64_t i) const { return wide_ ? wide_[i] : narrow_[i]; }

 private:
  const int64_t* wide_ = nullptr;
  const int32_t* narrow_ = nullptr;
};

}  // namespace

void topk_support(const Tensor& ids_tensor, const Tensor& logprobs_tensor, std::optional<Tensor> log_z,
                  std::optional<Tensor> tail_logprob, std::optional<Tensor> token_temperature, Tensor sorted_ids,
                  Tensor sorted_logprobs, Tensor tail, Tensor mass, int64_t num_classes, int64_t support,
                  int64_t duplicates, int64_t fallback, double temperature) {
  STD_TORCH_CHECK(ids_tensor.dim() == 2, "xentile: ids must be a matrix");
  const int64_t rows = ids_tensor.size(0), k = ids_tensor.size(1);
  const Ids ids(ids_tensor, rows * k);
  const float* log_zs = read<float>(log_z, ScalarType::Float, rows, "log_z");
  const float* tail_logprobs = read<float>(tail_logprob, ScalarType::Float, rows, "tail_logprob");
  const float* temperatures = read<float>(token_temperature, ScalarType::Float, rows, "token_temperature");
  int32_t* ids_out = write<int32_t>(sorted_ids, ScalarType::Int, rows * k, "sorted_ids");
  float* logprobs_out = write<float>(sorted_logprobs, ScalarType::Float, rows * k, "sorted_logprobs");
  float* tail_out = write<float>(tail, ScalarType::Float, rows, "tail");
  float* mass_out = write<float>(mass, ScalarType::Float, rows, "mass");
  const SupportTask task = {num_classes, static_cast<SupportCode>(support), static_cast<Duplicates>(duplicates),
                            static_cast<Fallback>(fallback)};
  with_logprobs(logprobs_tensor, rows * k, [&](const auto* logprobs) {
    torch::stable::parallel_for(0, rows, 1 + 1024 / k, [&](int64_t begin, int64_t end) {
      SupportRows row(task, k);
      for (int64_t i = begin; i < end; i++) {
        row.clear();
        for (int64_t j = i * k; j < (i + 1) * k; j++) row.add(ids[j], logprobs[j]);
        const SupportRows::Masses masses =
            row.normalise({log_zs ? log_zs + i : nullptr, tail_logprobs ? tail_logprobs + i : nullptr,
                           temperatures ? temperatures[i] : temperature});
        tail_out[i] = static_cast<float>(masses.tail), mass_out[i] = static_cast<float>(masses.mass);
        int64_t out = i * k;
        for (const Entry* e = row.begin(); e < row.inside_end(); e++, out++)
          ids_out[out] = static_cast<int32_t>(e->id), logprobs_out[out] = static_cast<float>(e->u);
        for (; out < (i + 1) * k; out++)
          ids_out[out] = static_cast<int32_t>(num_classes), logprobs_out[out] = static_cast<float>(masses.absent);
      }
    });
  });
}

}  // namespace xentile
