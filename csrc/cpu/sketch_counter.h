// Counting tokens in a sketch from several threads.
#pragma once
#include "sketch_math.h"

namespace xentile::sketch {

// A state (groups, layout.width()) int64.
struct State {
  int64_t* cells;
  int64_t groups;
  Layout layout;

  void add(int64_t group, int64_t column, int64_t amount) const { add(group * layout.width() + column, amount); }

  void add(int64_t cell, int64_t amount) const { __atomic_fetch_add(cells + cell, amount, __ATOMIC_RELAXED); }

  void raise(int64_t group, int64_t column, int64_t key) const {
    int64_t* cell = cells + group * layout.width() + column;
    int64_t old = __atomic_load_n(cell, __ATOMIC_RELAXED);
    while (key > old && !__atomic_compare_exchange_n(cell, &old, key, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  void add(int64_t group, const Totals& totals) const {
    add(group, kSumLo, totals.sum_lo);
    add(group, kSumHi, totals.sum_hi);
    add(group, kSquareLo, totals.square_lo);
    add(group, kSquareMid, totals.square_mid);
    add(group, kSquareHi, totals.square_hi);
    raise(group, kMaxKey, totals.max_key);
    raise(group, kMinKey, totals.min_key);
  }
};

// One thread's view of a state. What it adds reaches the state when the counter is destroyed, or when its slot is needed
// for another cell or group: threads that increment the same bins would wait for each other's cache lines.
class Counter {
 public:
  explicit Counter(const State& state) : state_(state) {}
  Counter(const Counter&) = delete;
  ~Counter() {
    for (const Count& count : counts_)
      if (count.amount) state_.add(count.cell, count.amount);
    for (const Slot& slot : slots_)
      if (slot.group >= 0) state_.add(slot.group, slot.totals);
  }

  void add_value(float value, int64_t group) { add_value(value, group, 1, 1); }

  // amount: what the bin gains; weight: of the value in the sums
  void add_value(float value, int64_t group, int64_t amount, double weight) {
    const int column = state_.layout.column_of(value);
    if (!add_token(column, group, amount) || column == kNaN) return;
    Slot& slot = slots_[group % kSlots];
    if (slot.group != group) {
      if (slot.group >= 0) state_.add(slot.group, slot.totals);
      slot = {group, {}};
    }
    add(slot.totals, value, weight);
  }

  // Values that were counted elsewhere, all of them in one group that exists.
  void add_totals(const Totals& totals, int64_t group) { state_.add(group, totals); }

  // Counts in a column; whether the group exists. If not, one more in kBadGroup instead.
  bool add_token(int column, int64_t group, int64_t amount) {
    const bool known = group >= 0 && group < state_.groups;
    const int64_t cell = known ? group * state_.layout.width() + column : kBadGroup;
    Count& count = counts_[cell % kCounts];
    if (count.cell != cell) {
      if (count.amount) state_.add(count.cell, count.amount);
      count = {cell, 0};
    }
    accumulate(count.amount, known ? amount : 1);
    return known;
  }

 private:
  static constexpr int kCounts = 2048, kSlots = 32;
  struct Count {
    int64_t cell = 0, amount = 0;
  };
  struct Slot {
    int64_t group = -1;
    Totals totals = {};
  };

  State state_;
  Count counts_[kCounts];
  Slot slots_[kSlots];
};

}  // namespace xentile::sketch
