// Runs a row kernel without Python or torch. Usage: driver PHASE FORMAT COLUMNS ROWS
//
// PHASE of the cross-entropy: reduce, gradient, fused (both, sharing the exponentials), scale or overflow; of
// distillation: topk and topk_tempered (both phases, against 64 ids), dense (both sums and the gradient of the forward
// KL divergence), teacher (the search for candidates, of which there are none, and the tail); or count, of the whole
// blocks of a row in a sketch. FORMAT float32, bfloat16 or float16; the instruction set is chosen when this is compiled
// (-DTABLE=kernels_avx2). Under callgrind the count is the same in every run: instructions.py takes the difference of
// two. Under the sanitizers `driver overflow float32 1000 1` must be reported: it makes a kernel read behind its row.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace xentile;

namespace {

// A row of numbers in [1, 4), without room behind its end.
std::vector<uint16_t> random_row(Format format, int64_t columns) {
  std::vector<uint16_t> halves;
  for (int64_t j = 0; j < columns; j++) {
    const uint16_t mantissa = std::rand() & 0xff;
    if (format == Format::kFloat32) halves.push_back(mantissa << 8);  // the low half of a little-endian number
    halves.push_back(format == Format::kFloat16 ? 0x3c00 + 8 * mantissa : 0x3f80 + mantissa);
  }
  halves.shrink_to_fit();
  return halves;
}

template <class Kernels>
const Kernels& chosen(Format format, const Kernels& float32, const Kernels& bfloat16, const Kernels& float16) {
  return format == Format::kFloat32 ? float32 : format == Format::kBFloat16 ? bfloat16 : float16;
}

// Values in [1/4, 16), as losses of tokens have, one after the other in all bins of six octaves of a sketch of 7 bits.
std::vector<float> losses(int64_t n) {
  std::vector<float> x(n);
  for (int64_t i = 0; i < n; i++) x[i] = std::ldexp(1 + (i * 37 % 128) / 128.0f, i % 6 - 2);
  return x;
}

constexpr int64_t kMostBlock = 4096;  // columns of a block of teacher_topk, at most
constexpr int kBins = 32 << 7;

// One row, and what its kernels write.
class Driver {
 public:
  Driver(Format format, int64_t columns)
      : format_(format),
        columns_(columns),
        row_(random_row(format, columns)),
        out_(row_.size()),
        exponentials_(columns),
        others_(columns),
        maxima_(kept_maxima(columns)),
        losses_(losses(columns)),
        histogram_(kBins + sketch::kNowhere) {}

  // Both share the exponentials. behind: how many columns are read that the row does not have.
  void cross_entropy(bool reduce, bool gradient, int64_t behind = 0) {
    const RowKernels<float>& kernels = chosen(format_, TABLE.float32, TABLE.bfloat16, TABLE.float16);
    const Kept kept = {exponentials_.data(), maxima_.data()};
    const Kept* shared = reduce && gradient ? &kept : nullptr;
    const int64_t target = columns_ / 2;
    const RowTask<float> task = {columns_ + behind, 1, 0, nullptr, false, false, false};
    RowSums sums = {};
    if (reduce) kernels.reduce(task, row_.data(), target, &sums, shared);
    if (gradient) kernels.gradient(task, row_.data(), target, {8, 1e-3f, 0, -1e-3f}, out_.data(), shared);
    result_ = sums.max + sums.rest + sums.argmax;
  }

  void scale() {
    chosen(format_, TABLE.float32, TABLE.bfloat16, TABLE.float16).scale(out_.data(), columns_, 0.5f);
  }

  void topk(bool tempered) {
    const RestKernels& kernels = chosen(format_, TABLE.float32_rest, TABLE.bfloat16_rest, TABLE.float16_rest);
    constexpr int k = 64;
    int32_t ids[k];
    for (int j = 0; j < k; j++) ids[j] = j * columns_ / k;
    const RestTask task = {columns_, 1, 0, ids, k, {tempered ? 0.5f : 1, 1e-30f}, tempered, true};
    const KeptRest kept = {tempered ? others_.data() : nullptr, exponentials_.data(), maxima_.data()};
    RestSums sums;
    kernels.reduce(task, row_.data(), &sums, &kept);
    kernels.gradient(task, row_.data(), {sums.max, tempered ? 1e-3f : 0, 1e-3f}, out_.data(), &kept);
    result_ = sums.max + sums.tempered + sums.plain;
  }

  void dense() {
    const DenseLogits logits = {row_.data(), format_, 1, 0};
    DenseSums student, teacher;
    for (DenseSums* sums : {&student, &teacher}) TABLE.dense.reduce(logits, columns_, -1, 1, false, nullptr, sums);
    const float factor = 1 / student.tempered;
    const DenseConstants constants = {kForwardKl, 1, student.max, teacher.max, factor, factor, 0, 0.5f, 0.5f};
    DenseTotals totals;
    TABLE.dense.gradient({logits, logits, 1, 0, columns_, -1}, constants, {1e-3f, 0, 0, 0, 0}, format_, out_.data(),
                         &totals);
    result_ = totals.value;
  }

  void teacher() {
    const TopKKernels& kernels = chosen(format_, TABLE.topk_float32, TABLE.topk_bfloat16, TABLE.topk_float16);
    constexpr float one = 1, above_all = 4;
    const TopKTask task = {1, 0, 1, &one};
    int32_t values[kMostBlock + kTopKPadding], ids[kMostBlock + kTopKPadding];
    double sum = 0;
    for (int64_t begin = 0; begin < columns_; begin += kernels.block) {
      const int64_t n = std::min(kernels.block, columns_ - begin);
      const uint16_t* block = row_.data() + begin * (format_ == Format::kFloat32 ? 2 : 1);
      const Collected found = kernels.collect(block, n, begin, above_all, {values, ids});
      kernels.add_tail(task, block, n, above_all, found.spans, above_all, &sum);
    }
    result_ = sum;
  }

  void count() {
    constexpr int shift = 16, first_key = (127 - 24) << 7;
    sketch::Totals totals = {};
    for (int64_t i = 0; i + sketch::kCountBlock <= columns_; i += sketch::kCountBlock)
      TABLE.count(losses_.data() + i, shift, first_key, kBins, histogram_.data(), &totals);
    result_ = totals.sum_hi + totals.square_mid + histogram_[kBins / 2];
  }

  // Of everything that was written, so that no compiler leaves it out.
  void print() const {
    uint32_t hash = 0;
    for (uint16_t half : out_) hash = 31 * hash + half;
    std::printf("result %g gradient %08x\n", result_, hash);
  }

 private:
  const Format format_;
  const int64_t columns_;
  const std::vector<uint16_t> row_;
  std::vector<uint16_t> out_;
  std::vector<float> exponentials_, others_, maxima_;
  const std::vector<float> losses_;
  std::vector<uint32_t> histogram_;
  double result_ = 0;
};

const std::map<std::string, void (*)(Driver&)> kPhases = {
    {"reduce", [](Driver& d) { d.cross_entropy(true, false); }},
    {"gradient", [](Driver& d) { d.cross_entropy(false, true); }},
    {"fused", [](Driver& d) { d.cross_entropy(true, true); }},
    {"overflow", [](Driver& d) { d.cross_entropy(true, false, 1000); }},
    {"scale", [](Driver& d) { d.scale(); }},
    {"topk", [](Driver& d) { d.topk(false); }},
    {"topk_tempered", [](Driver& d) { d.topk(true); }},
    {"dense", [](Driver& d) { d.dense(); }},
    {"teacher", [](Driver& d) { d.teacher(); }},
    {"count", [](Driver& d) { d.count(); }},
};
const std::map<std::string, Format> kFormats = {
    {"float32", Format::kFloat32}, {"bfloat16", Format::kBFloat16}, {"float16", Format::kFloat16}};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5 || !kPhases.count(argv[1]) || !kFormats.count(argv[2]))
    return std::fprintf(stderr, "usage: driver PHASE FORMAT COLUMNS ROWS\n"), 2;
  Driver driver(kFormats.at(argv[2]), std::atoll(argv[3]));
  void (*const run)(Driver&) = kPhases.at(argv[1]);
  for (int64_t rows = std::atoll(argv[4]); rows > 0; rows--) run(driver);
  driver.print();
}
