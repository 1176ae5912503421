"""Kill one process of a run at random moments, or all of them, and let the run go on (`kills.py --processes 2`).

As a launcher does, the other processes are ended soon after the one that was killed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import attempts
import many
from processes import harness

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.runs import check_resumable, list_checkpoints

STEPS = {"max_steps": 12}


def train_until_killed(run: Path, backend: str, options: dict[str, Any], victim: int, seconds: float) -> dict[str, Any]:
    """Train, and have one rank (or each, if it is -1) killed after so many seconds, if it is not done before."""
    if victim in (-1, int(os.environ.get("RANK", "0"))):
        timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    return many.train(run, backend, options)


def soak(folder: Path, *, kills: int, processes: int, backend: str, seed: int) -> str:
    """Kill `kills` times over the scenarios of `many`; every run must end as its twin, bit for bit, on every rank.

    Returns:
        The count, in words.
    """
    source, done, runs = random.Random(seed), 0, 0
    scenarios = {name: options | STEPS for name, options in many.SCENARIOS.items()}
    how: dict[str, Any] = {"backend": backend, "world": processes}
    twins, seconds = {}, {}
    for name, options in scenarios.items():
        harness.run(int, **how)  # the first start takes longer
        began = time.monotonic()
        twins[name] = harness.run(many.train, folder / name / "twin", backend, options, **how)
        seconds[name] = time.monotonic() - began
    while done < kills:
        name = list(scenarios)[runs % len(scenarios)]
        run, newest = folder / name / str(runs), 0
        ended: list[Any] = []
        while not ended:
            victim = source.randrange(-1, processes) if done < kills else processes
            left = 0.2 + 0.8 * (1 - newest / scenarios[name]["max_steps"])
            moment = source.uniform(0, seconds[name] * left)
            each = harness.run(
                train_until_killed, run, backend, scenarios[name], victim, moment, check=False, grace=5, **how
            )
            if all(outcome.error is None for outcome in each):
                ended = [outcome.value for outcome in each]
                continue
            assert -signal.SIGKILL in [outcome.exit_code for outcome in each], each
            done += 1
            for place in list_checkpoints(run):
                check_resumable(place.path)
            found = [place.step for place in list_checkpoints(run)]
            assert max(found, default=0) >= newest, (newest, found)
            newest = max(found, default=0)
        for rank, twin in zip(ended, twins[name], strict=True):
            wrong = [thing for thing in attempts.differences(twin, rank) if thing != "/began at"]
            assert not wrong, f"{run}: not as the twin: {wrong}"
        load_evaluation_model(run)
        runs += 1
    return f"soak: {done} of {kills} kills in {runs} runs of {processes} processes ({backend}) ended bitwise equal"
