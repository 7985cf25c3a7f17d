"""The benchmark suite: same work, same process, correctness before speed. `python -m benchmarks.run --help`."""
