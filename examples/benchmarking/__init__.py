"""The parts of `examples/benchmark.py`: what is measured, how, and how it is told."""
