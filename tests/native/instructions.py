"""Instructions per logit of the row kernels, by callgrind: the same number in every run, also on a busy machine.

Usage: python tests/native/instructions.py [COLUMNS ...]

The count is that of the AVX2 kernels, because valgrind does not know AVX-512. A limit guards each of them against a
change that makes the compiler emit something else, as a spilled accumulator or a conversion lane by lane.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-march=x86-64-v3"]
LIMITS = {  # instructions per logit of a long row
    ("reduce", "float32"): 2.85,
    ("reduce", "bfloat16"): 3.15,
    ("reduce", "float16"): 3.0,
    ("gradient", "float32"): 2.9,
    ("gradient", "bfloat16"): 3.75,
    ("gradient", "float16"): 3.05,
    ("fused", "float32"): 3.9,
    ("fused", "bfloat16"): 4.8,
    ("fused", "float16"): 4.1,
    ("topk", "float32"): 4.6,
    ("topk", "bfloat16"): 5.2,
    ("topk", "float16"): 4.4,
    ("topk_tempered", "float32"): 7.5,
    ("topk_tempered", "bfloat16"): 8.4,
    ("topk_tempered", "float16"): 7.7,
    ("dense", "float32"): 15.5,
    ("dense", "bfloat16"): 20.8,
    ("dense", "float16"): 17.8,
    ("teacher", "float32"): 3.2,
    ("teacher", "bfloat16"): 3.7,
    ("teacher", "float16"): 3.5,
    ("count", "float32"): 6.5,  # per value, of a sketch
}


def build(folder: str) -> str:
    """Compile the driver with the AVX2 kernels as setup.py does."""
    driver = f"{folder}/driver"
    sources = [str(ROOT / "csrc/cpu/rows_avx2.cpp"), str(ROOT / "tests/native/driver.cpp")]
    subprocess.run(["g++", *FLAGS, "-DTABLE=kernels_avx2", *sources, "-o", driver], check=True)
    return driver


def executed(driver: str, *arguments: object) -> int:
    """Instructions of one run."""
    callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    run = subprocess.run([*callgrind, driver, *map(str, arguments)], capture_output=True, text=True, check=True)
    return int(re.findall(r"Collected : (\d+)", run.stderr)[0])


def main() -> int:
    """Print the table; 1 if a limit is exceeded."""
    lengths = [int(a) for a in sys.argv[1:]] or [1000, 32000, 128256]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        driver = build(folder)
        for (phase, dtype), limit in LIMITS.items():
            counts = []
            for columns in lengths:
                once, more = (executed(driver, phase, dtype, columns, rows) for rows in (1, 5))
                counts.append((more - once) / 4 / columns)
            failed |= counts[-1] > limit
            cells = "  ".join(f"{count:.2f} at {columns}" for count, columns in zip(counts, lengths, strict=True))
            print(f"{phase:13} {dtype:9} {cells}   limit {limit}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
