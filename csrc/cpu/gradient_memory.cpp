// Memory for gradients, kept between steps. The C library maps a large tensor anew at each step and unmaps it when it
// is freed, so every step pays a page fault for each of its pages, which can take longer than the loss itself. Here a
// freed gradient stays mapped, and MADV_FREE leaves its pages to the system: under memory pressure it takes them
// without writing anything out, otherwise the next step finds them in place.
#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "operators.h"

namespace xentile {
namespace {

#if defined(__linux__) && defined(MADV_FREE)

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLeast = 32 << 20;  // the C library keeps smaller memory mapped by itself
constexpr size_t kMostIdle = 2;

struct Block {
  char* data;
  size_t bytes;

  void unmap() const { munmap(data, bytes); }

  // At a multiple of kHugePage, because only such pages can be huge: 512 times fewer faults when memory is new.
  static std::optional<Block> map(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return std::nullopt;
    char* first = static_cast<char*>(mapped);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(first) % kHugePage) % kHugePage;
    if (before) munmap(first, before);
    munmap(first + before + bytes, kHugePage - before);
    return Block{first + before, bytes};
  }
};

class Pool {
 public:
  // Blocks that are too small are unmapped, so that one of the largest batch remains, whatever lengths batches have.
  std::optional<Block> take(size_t bytes) {
    std::vector<Block> too_small;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(idle_.begin(), idle_.end(), [=](const Block& b) { return b.bytes >= bytes; });
      if (found != idle_.end()) {
        const Block block = *found;
        idle_.erase(found);
        return block;
      }
      too_small.swap(idle_);
    }
    for (const Block& block : too_small) block.unmap();
    return Block::map(bytes);
  }

  void give_back(const Block& block) {
    if (madvise(block.data, block.bytes, MADV_FREE) != 0) return block.unmap();
    std::optional<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto smaller = [](const Block& a, const Block& b) { return a.bytes < b.bytes; };
      idle_.insert(std::lower_bound(idle_.begin(), idle_.end(), block, smaller), block);
      if (idle_.size() > kMostIdle) {
        surplus = idle_.front();
        idle_.erase(idle_.begin());
      }
    }
    if (surplus) surplus->unmap();
  }

  void clear() {
    std::vector<Block> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(idle_);
    }
    for (const Block& block : blocks) block.unmap();
  }

  bool enabled() const { return enabled_; }

 private:
  static bool chosen() {
    const char* variable = std::getenv("XENTILE_KEEP_MEMORY");
    return !variable || std::string_view(variable) != "0";
  }

  const bool enabled_ = chosen();
  std::mutex mutex_;
  std::vector<Block> idle_;  // by size
};

Pool& pool() {
  static Pool* const the = new Pool;  // never destroyed: tensors may outlive static objects
  return *the;
}

#endif

}  // namespace

Tensor empty_gradient(const Tensor& logits) {
#if defined(__linux__) && defined(MADV_FREE)
  const size_t bytes = logits.numel() * logits.element_size();
  if (pool().enabled() && bytes >= kLeast) {
    if (const std::optional<Block> block = pool().take(bytes)) {
      std::vector<int64_t> strides(logits.dim(), 1);
      for (int64_t d = logits.dim() - 1; d > 0; d--) strides[d - 1] = strides[d] * logits.size(d);
      return torch::stable::from_blob(block->data, logits.sizes(), strides, logits.device(), logits.scalar_type(),
                                      [block = *block](void*) { pool().give_back(block); });
    }
  }
#endif
  return torch::stable::new_empty(logits, logits.sizes());
}

void empty_cache() {
#if defined(__linux__) && defined(MADV_FREE)
  pool().clear();
#endif
}

}  // namespace xentile
