"""The parts of `compare_methods.py`: what to train, training it, reading it, and telling it."""
