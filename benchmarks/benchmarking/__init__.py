"""The parts of `benchmarks/benchmark.py`: what is measured, how, and how it is told."""
