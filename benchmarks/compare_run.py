"""Train the jobs of a comparison, several at a time, each in a process of its own; finished ones are kept."""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compare_plan import Curves, Job, Settings, command, jobs

SCRIPT = Path(__file__).parents[1] / "examples" / "run_clm.py"
PR_SET_PDEATHSIG = 1  # `prctl`: the signal that a process gets when its parent dies


class JobError(RuntimeError):
    """A training that failed."""


class Stopped(Exception):
    """The comparison was asked to end."""


def read(folder: Path, job: Job) -> Curves | None:
    """Read the curves of a job from its `trainer_state.json`; None if it is not finished."""
    try:
        state = json.loads((folder / job.name / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    history: list[dict[str, Any]] = [entry for entry in state["log_history"] if entry["step"] > job.begins]

    def values(name: str) -> dict[int, float]:
        found = {entry["step"]: float(entry[name]) for entry in history if name in entry}
        return {step: value if math.isfinite(value) else math.inf for step, value in found.items()}

    seconds = next((float(entry["train_runtime"]) for entry in history if "train_runtime" in entry), math.nan)
    curves = Curves(values("eval_loss"), values("eval_raw_loss"), values("loss"), values("learning_rate"), seconds)
    return curves if state["global_step"] == job.ends and job.ends in curves.evaluated else None


@dataclass
class Runner:
    """Trains what is needed."""

    settings: Settings
    folder: Path  # of the trainings
    workers: int  # trainings at a time
    log: Callable[[str], None] = print
    known: dict[str, Curves] = field(default_factory=dict)  # the finished jobs by name
    stopping: bool = False  # set it to end; a signal handler may
    _running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = field(default_factory=dict)

    def run(self) -> dict[str, Curves]:
        """Train until nothing is needed; no process is left, whatever happens.

        Raises:
            JobError: a training fails.
            compare_plan.NoBestRate: no grid of learning rates has its best inside.
            Stopped: `stopping` was set.
        """
        try:
            while (needed := self.needed()) or self._running:
                workers = self.workers if self.known else 1  # the first prepares the data for all
                for job in needed:
                    if len(self._running) < workers and (job.trunk is None or job.trunk in self.known):
                        self._start(job)
                while not any(process.poll() is not None for _, process, _ in self._running.values()):
                    if self.stopping:
                        raise Stopped
                    time.sleep(0.2)
                self._collect()
            return self.known
        finally:
            for _, process, _ in self._running.values():
                process.terminate()
            for _, process, _ in self._running.values():
                process.wait()

    def needed(self) -> list[Job]:
        """Jobs that are neither finished, in this process or an earlier one, nor running."""
        while True:
            missing = [job for job in jobs(self.settings, self.known) if job.name not in {*self.known, *self._running}]
            found = {job.name: curves for job in missing if (curves := read(self.folder, job))}
            if not found:
                return missing
            self.known.update(found)

    def _start(self, job: Job) -> None:
        target = self.folder / job.name
        if job.trunk is not None and not (self.folder / job.trunk / f"checkpoint-{job.begins}").is_dir():
            raise JobError(f"{job.trunk} has lost checkpoint-{job.begins}. Remove its folder to train it again.")
        shutil.rmtree(target, ignore_errors=True)  # unfinished
        target.mkdir(parents=True)

        def die_with_parent() -> None:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        with open(target / "log.txt", "wb") as log:  # its own session: Ctrl-C reaches the comparison alone
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *command(job, self.settings, str(self.folder))],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._running[job.name] = (job, process, time.monotonic())

    def _collect(self) -> None:
        """Read the trainings that have ended."""
        for name, (job, process, begin) in [*self._running.items()]:
            if process.poll() is None:
                continue
            del self._running[name]
            curves = read(self.folder, job)
            if process.returncode or curves is None:
                log = self.folder / name / "log.txt"
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
                raise JobError(f"{name} failed (exit code {process.returncode}). Output in {log}:\n" + "\n".join(last))
            self.known[name] = curves
            loss, steps, seconds = curves.evaluated[job.ends], job.ends - job.begins, time.monotonic() - begin
            left = sum(job.ends - job.begins for job in self.needed())
            self.log(f"{name}: {loss:.3f} after {steps} steps in {seconds:.0f} s; at least {left} steps to start")
