// Runs a row kernel without Python or torch. Usage: driver PHASE FORMAT COLUMNS ROWS
//
// PHASE reduce, gradient or scale; FORMAT float32, bfloat16 or float16; the instruction set is chosen when this is compiled
// (-DTABLE=kernels_avx2). Under callgrind the count is the same in every run: instructions.py takes the difference of two.
// Under the sanitizers, `driver overflow float32 1000 1` must be reported: a kernel that reads behind its row.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace xentile;

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "usage: driver PHASE FORMAT COLUMNS ROWS\n"), 2;
  const char *phase = argv[1], *format = argv[2];
  const int64_t columns = std::atoll(argv[3]), rows = std::atoll(argv[4]);
  const bool wide = !std::strcmp(format, "float32"), brain = !std::strcmp(format, "bfloat16");
  const RowKernels<float>& kernels = wide ? TABLE.float32 : brain ? TABLE.bfloat16 : TABLE.float16;

  std::vector<uint32_t> row((columns + 1) / (wide ? 1 : 2) + 16), out(row.size());
  for (uint32_t& word : row) {  // numbers in [1, 8) in each format
    const uint32_t a = std::rand() & 0xff, b = std::rand() & 0xff;
    word = wide ? 0x3f800000 + (a << 16) : brain ? (0x3f80 + a) << 16 | (0x3f80 + b) : (0x3c00 + 8 * a) << 16 | (0x3c00 + 8 * b);
  }
  row.resize((columns + 1) / (wide ? 1 : 2));

  const bool overflow = !std::strcmp(phase, "overflow");
  const RowTask<float> task = {columns + (overflow ? 1000 : 0), 1, 0, nullptr, false, false, false};
  const Coefficients<float> coefficients = {8, 1e-3f, 0, -1e-3f};
  RowSums sums = {};
  for (int64_t i = 0; i < rows; i++) {
    if (!std::strcmp(phase, "reduce") || overflow) kernels.reduce(task, row.data(), columns / 2, &sums);
    if (!std::strcmp(phase, "gradient")) kernels.gradient(task, row.data(), columns / 2, coefficients, out.data());
    if (!std::strcmp(phase, "scale")) kernels.scale(out.data(), columns, 0.5f);
  }
  std::printf("%g %g %lld %08x\n", sums.max, sums.rest, static_cast<long long>(sums.argmax), out[3]);
}
