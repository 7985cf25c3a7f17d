// The state of a sketch, from the tensor that holds it.
#pragma once
#include "checks.h"
#include "sketch_counter.h"

namespace xentile {

inline sketch::Layout layout_of(const Tensor& state) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(0) > 0, "xentile: sketch must be a matrix with a row a group");
  const sketch::Layout layout = sketch::Layout::of_width(state.size(1));
  STD_TORCH_CHECK(layout.bins > 0, "xentile: sketch has a number of columns that belongs to no precision");
  return layout;
}

inline sketch::State write_state(const Tensor& state) {
  const sketch::Layout layout = layout_of(state);
  return {write<int64_t>(state, ScalarType::Long, state.size(0) * layout.width(), "sketch"), state.size(0), layout};
}

}  // namespace xentile
