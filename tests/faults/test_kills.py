"""A run killed with SIGKILL at random moments and resumed is its uninterrupted twin, bit for bit.

Oracles: the twin's outcome (weights, average with its counters, state of optimizer and schedule, losses), and after
each kill the twin's files: whatever has a checkpoint's name then is whole, and nothing that was saved is lost.
The long form is `make soak`.
"""

import kills


def test_killed_runs_end_as_their_twins(tmp_path):
    print(kills.soak(tmp_path, kills=4, most_each=2, seed=1))
