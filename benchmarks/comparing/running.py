"""Train what a comparison needs, several at a time, each in a process of its own; what is finished stays finished."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import planning
from .jobs import Job, command
from .reading import Curves, is_finished, read
from .settings import Settings

SCRIPT = Path(__file__).parents[2] / "examples" / "run_clm.py"
LOG = "log.txt"
PR_SET_PDEATHSIG = 1
"""An option of `prctl`: which signal a process gets when the one that has begun it ends."""


class JobError(RuntimeError):
    """A training that failed; says where its output is."""


class Stopped(Exception):
    """The comparison was asked to end."""


def _die_with_the_parent() -> None:
    """In a training, before it begins: have the kernel end it when the comparison is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Runner:
    """Trains, and tells how far it is.

    Args:
        settings: of the comparison.
        folder: where the trainings lie.
        workers: how many at a time.
        threads: of each.
        say: is told every line of progress.
    """

    settings: Settings
    folder: Path
    workers: int
    threads: int
    say: Callable[[str], None] = print
    known: dict[str, Curves] = field(default_factory=dict)
    stopping: bool = False
    """Set it to end; a signal's handler may."""
    _running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = field(default_factory=dict)
    _made: int = 0
    _began: float = field(default_factory=time.monotonic)

    def run(self) -> dict[str, Curves]:
        """Train until nothing is needed any more; whatever is raised, no process is left.

        Returns:
            The losses of every training by its name.

        Raises:
            JobError: if one fails.
            planning.NoBestRate: if no grid of learning rates has its best inside.
            Stopped: after `stopping` was set.
        """
        try:
            while True:
                wanted = self.wanted()
                if not wanted and not self._running:
                    return self.known
                workers = self.workers if self.known else 1  # the first prepares the data for all
                for job in wanted:
                    if len(self._running) < workers and self._may_begin(job):
                        self._begin(job)
                self._wait(wanted)
        finally:
            for _, process, _ in self._running.values():
                process.terminate()
            for _, process, _ in self._running.values():
                process.wait()

    def wanted(self) -> list[Job]:
        """What is needed and neither finished, here or by an earlier call, nor running."""
        while True:
            wanted = planning.needed(self.settings, self.known)
            finished = [job for job in wanted if job.name not in self._running and is_finished(self.folder, job)]
            if not finished:
                return [job for job in wanted if job.name not in self._running]
            for job in finished:
                self.known[job.name] = read(self.folder, job)

    def _may_begin(self, job: Job) -> bool:
        return job.name not in self._running and (job.trunk is None or job.trunk in self.known)

    def _begin(self, job: Job) -> None:
        target = self.folder / job.name
        if job.trunk is not None and not (self.folder / job.trunk / f"checkpoint-{job.begins}").is_dir():
            raise JobError(f"{job.trunk} has no checkpoint-{job.begins} any more: remove the folder to train it anew.")
        shutil.rmtree(target, ignore_errors=True)  # of a call that was stopped: trainings here are short
        target.mkdir(parents=True)
        words = [sys.executable, str(SCRIPT), *command(job, self.settings, str(self.folder))]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.settings.device == "cuda":  # one GPU each: with more, Trainer would make larger batches
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with open(target / LOG, "wb") as log:  # a session of its own: what it is told by Ctrl-C, it is told by us
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_the_parent,
            )
        self._running[job.name] = (job, process, time.monotonic())

    def _wait(self, wanted: list[Job]) -> None:
        """Until one has ended."""
        while not self.stopping:
            for name, (job, process, begin) in [*self._running.items()]:
                code = process.poll()
                if code is None:
                    continue
                del self._running[name]
                if code or not is_finished(self.folder, job):
                    log = self.folder / name / LOG
                    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
                    raise JobError(f"{name} failed (exit code {code}); its output is in {log}:\n" + "\n".join(last))
                self.known[name] = read(self.folder, job)
                self._made += job.cost
                self._tell(job, time.monotonic() - begin, wanted)
                return
            time.sleep(0.2)
        raise Stopped

    def _tell(self, job: Job, seconds: float, wanted: list[Job]) -> None:
        left = sum(other.cost for other in wanted if other.name not in self.known)
        rate = self._made / (time.monotonic() - self._began)
        losses = self.known[job.name].evaluated
        self.say(
            f"[{(time.monotonic() - self._began) / 60:5.1f} min] {job.name}: {losses[max(losses)]:.3f} "
            f"after {job.cost} updates in {seconds:.0f} s; at least {left / rate / 60:.0f} min for the {left} updates "
            "that are known to be needed"
        )
