// Counting tokens in a sketch from several threads.
#pragma once
#include "sketch_math.h"

namespace xentile::sketch {

// Adds tokens to the state (G, kWidth). Bins are incremented at once, atomically; sums and extremes are collected, and
// reach the state when the counter is destroyed or a slot is needed for another group. One counter a thread.
class Counter {
 public:
  Counter(int64_t* state, int64_t groups) : state_(state), groups_(groups) {}
  Counter(const Counter&) = delete;
  ~Counter() {
    for (Slot& slot : slots_) flush(slot);
  }

  void add_value(float value, int64_t group) {
    if (!known(group)) return;
    const int column = column_of(value);
    increment(group, column);
    if (column == kNaN) return;
    Slot& slot = slots_[group % kSlots];
    if (slot.group != group) {
      flush(slot);
      slot = {group, {}};
    }
    slot.totals.add(value);
  }

  void add_token(Column column, int64_t group) {
    if (known(group)) increment(group, column);
  }

 private:
  static constexpr int kSlots = 32;
  struct Slot {
    int64_t group = -1;
    Totals totals = {};
  };

  bool known(int64_t group) {
    if (group >= 0 && group < groups_) return true;
    increment(0, kBadGroup);
    return false;
  }

  void increment(int64_t group, int column) { add(group, column, 1); }

  void add(int64_t group, int column, int64_t amount) {
    __atomic_fetch_add(state_ + group * kWidth + column, amount, __ATOMIC_RELAXED);
  }

  void raise(int64_t group, int column, int64_t key) {
    int64_t* cell = state_ + group * kWidth + column;
    int64_t old = __atomic_load_n(cell, __ATOMIC_RELAXED);
    while (key > old && !__atomic_compare_exchange_n(cell, &old, key, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
  }

  void flush(const Slot& slot) {
    if (slot.group < 0) return;
    const Totals& t = slot.totals;
    add(slot.group, kSumLo, t.sum_lo);
    add(slot.group, kSumHi, t.sum_hi);
    add(slot.group, kSquareLo, t.square_lo);
    add(slot.group, kSquareMid, t.square_mid);
    add(slot.group, kSquareHi, t.square_hi);
    raise(slot.group, kMaxKey, t.max_key);
    raise(slot.group, kMinKey, t.min_key);
  }

  int64_t* state_;
  int64_t groups_;
  Slot slots_[kSlots];
};

}  // namespace xentile::sketch
