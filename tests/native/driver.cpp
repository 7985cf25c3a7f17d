// Runs a row kernel without Python or torch. Usage: driver PHASE FORMAT COLUMNS ROWS
//
// PHASE reduce, gradient, fused (both, sharing the exponentials), scale or overflow; FORMAT float32, bfloat16 or
// float16; the instruction set is chosen when this is compiled (-DTABLE=kernels_avx2). Under callgrind the count is the
// same in every run: instructions.py takes the difference of two. Under the sanitizers `driver overflow float32 1000 1`
// must be reported: it makes a kernel read behind its row.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace xentile;

namespace {

// A row of numbers in [1, 8), without room behind its end.
std::vector<uint16_t> random_row(const std::string& format, int64_t columns) {
  std::vector<uint16_t> halves;
  for (int64_t j = 0; j < columns; j++) {
    const uint16_t mantissa = std::rand() & 0xff;
    if (format == "float32") halves.push_back(mantissa << 8);  // the low half of a little-endian number
    halves.push_back(format == "float16" ? 0x3c00 + 8 * mantissa : 0x3f80 + mantissa);
  }
  halves.shrink_to_fit();
  return halves;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "usage: driver PHASE FORMAT COLUMNS ROWS\n"), 2;
  const std::string phase = argv[1], format = argv[2];
  const int64_t columns = std::atoll(argv[3]), rows = std::atoll(argv[4]), target = columns / 2;
  const RowKernels<float>& kernels = format == "float32"    ? TABLE.float32
                                     : format == "bfloat16" ? TABLE.bfloat16
                                                            : TABLE.float16;

  const std::vector<uint16_t> row = random_row(format, columns);
  std::vector<uint16_t> out(row.size());
  std::vector<float> exponentials(columns), maxima(kept_maxima(columns));
  const Kept kept = {exponentials.data(), maxima.data()};
  const RowTask<float> task = {columns + (phase == "overflow" ? 1000 : 0), 1, 0, nullptr, false, false, false};
  const Coefficients<float> coefficients = {8, 1e-3f, 0, -1e-3f};
  RowSums sums = {};
  for (int64_t i = 0; i < rows; i++) {
    if (phase == "reduce" || phase == "overflow") kernels.reduce(task, row.data(), target, &sums, nullptr);
    if (phase == "gradient") kernels.gradient(task, row.data(), target, coefficients, out.data(), nullptr);
    if (phase == "scale") kernels.scale(out.data(), columns, 0.5f);
    if (phase == "fused") {
      kernels.reduce(task, row.data(), target, &sums, &kept);
      kernels.gradient(task, row.data(), target, coefficients, out.data(), &kept);
    }
  }
  uint32_t hash = 0;
  for (uint16_t half : out) hash = 31 * hash + half;
  std::printf("max %g rest %g argmax %lld gradient %08x\n", sums.max, sums.rest, static_cast<long long>(sums.argmax),
              hash);
}
