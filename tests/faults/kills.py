"""Kill training processes at random moments, let a user resume them, and compare with uninterrupted twins.

Run as a script this is the long form: `python tests/faults/kills.py --kills 50 --seed 0`. Of several processes one is
killed or all are; as a launcher does, the harness ends the others soon after it.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attempts
import torch
from processes import harness
from transformers.utils import logging

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.runs import CheckpointRef, check_resumable, list_checkpoints
from hf_radam.checkpoints.storage import STAGING


@dataclass
class Twin:
    """A run that nobody interrupted, with all of its checkpoints.

    Attributes:
        options: keywords of its arguments.
        how: back-end and number of processes, as keywords of `harness.run`.
        run: its folder.
        seconds: how long it took, from the start of its processes.
        outcomes: what each rank ended with.
    """

    options: dict[str, Any]
    how: dict[str, Any]
    run: Path
    seconds: float
    outcomes: list[dict[str, Any]]

    @classmethod
    def trained(cls, run: Path, options: dict[str, Any], how: dict[str, Any]) -> Twin:
        """Train it."""
        began = time.monotonic()
        outcomes = harness.run(attempts.train_until_killed, run, options | {"save_total_limit": None}, **how)
        return cls(options, how, run, time.monotonic() - began, outcomes)


@dataclass
class Victim:
    """A run whose processes are killed: after each kill its folder is looked at, as its user would.

    Attributes:
        run: its folder.
        twin: the same run, not interrupted.
        pins: folder and step of each checkpoint that must be kept permanently.
        inside: for each kill, whether it came in the middle of a save.
        newest: step of the newest checkpoint after the last kill.
        outcomes: what each rank ended with.
    """

    run: Path
    twin: Twin
    pins: list[tuple[str, int]]
    inside: list[bool] = field(default_factory=list)
    newest: int = 0
    outcomes: list[dict[str, Any]] = field(default_factory=list)

    def attempt(self, *, kill_after: float = 0.0, rank: int = -1, resume: str | None = None) -> bool:
        """Let the processes train; whether they came to their end before one was killed."""
        staging = _identity(self.run / STAGING)
        options = self.twin.options, resume, kill_after, rank
        ended = harness.run(attempts.train_until_killed, self.run, *options, check=False, grace=5, **self.twin.how)
        if all(outcome.error is None for outcome in ended):
            self.outcomes = [outcome.value for outcome in ended]
            return True
        assert -signal.SIGALRM in [outcome.exit_code for outcome in ended], ended
        self.inside.append(_identity(self.run / STAGING) not in (None, staging))
        self.inspect()
        return False

    def inspect(self) -> None:
        """Whatever has a checkpoint's name is whole and the twin's; nothing that was saved or pinned is gone."""
        places = list_checkpoints(self.run)
        for place in places:
            check_resumable(place.path)
            self.compare_files(place)
        newest = places[0].step if places else 0
        diary = attempts.diary(self.run)
        told = [int(line) for line in diary.read_text().split()] if diary.exists() else []
        assert newest >= max([self.newest, *told]), f"{newest} is the newest, after {self.newest}, told: {told}"
        self.newest = newest
        assert sum(not place.pinned_in for place in places) <= self.twin.options["save_total_limit"] + 1
        kept = [(place.pinned_in, place.step) for place in places]
        assert all(pin in kept for pin in self.pins if pin[1] <= newest), f"pinned {kept}, newest {newest}"
        if places:
            load_evaluation_model(self.run)

    def twin_of(self, place: CheckpointRef) -> Path:
        """The twin's checkpoint of the same step: pinned, if it is not at the root."""
        name = f"checkpoint-{place.step}"
        at_root = self.twin.run / name
        return at_root if at_root.exists() else self.twin.run / place.pinned_in / name

    def compare_files(self, place: CheckpointRef) -> None:
        """The weights in a checkpoint are the twin's, byte for byte."""
        theirs = self.twin_of(place)
        files = sorted(p.relative_to(theirs) for p in theirs.rglob("*.safetensors"))
        assert files == sorted(p.relative_to(place.path) for p in place.path.rglob("*.safetensors"))
        for file in files:
            assert (theirs / file).read_bytes() == (place.path / file).read_bytes(), place.path / file

    def before_newest(self) -> str | None:
        """The checkpoint one save before the newest: a run resumed from it saves over the newest."""
        root = [place for place in list_checkpoints(self.run) if place.path.parent == self.run]
        if len(root) == 2 and root[0].step - root[1].step == self.twin.options["save_steps"]:
            return str(root[1].path)
        return None


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name, and from itself before something happened in it."""
    try:
        return folder.stat().st_ino, folder.stat().st_ctime_ns
    except FileNotFoundError:
        return None


def kill_and_resume(victim: Victim, random_source: random.Random, *, most: int) -> None:
    """Kill the processes of a run up to `most` times, each at a random moment of its time, and let the last one end.

    One attempt in four goes on from the checkpoint before the newest, and so saves over an existing one.
    """
    last = victim.twin.options["max_steps"]
    for _ in range(most):
        # Starting and ending take a part of the time; the steps that are left, the rest.
        expected = victim.twin.seconds * (0.2 + 0.8 * (1 - victim.newest / last))
        resume = victim.before_newest() if random_source.random() < 0.25 else None
        rank = random_source.randrange(-1, victim.twin.how["world"])
        if victim.attempt(kill_after=random_source.uniform(0.01, expected), rank=rank, resume=resume):
            break
    else:
        victim.attempt()


def soak(folder: Path, *, kills: int, most_each: int, seed: int, backend: str = "one", processes: int = 1) -> str:
    """Kill processes `kills` times, over one method after another; every run must end as its twin; return the count.

    A run suffers at most `most_each` kills; `seed` is of the moments; `backend` and `processes` are of each run.
    """
    random_source, how = random.Random(seed), {"backend": backend, "world": processes}
    harness.run(int, **how)  # the first start takes longer, as the fork server imports everything
    twins: dict[str, Twin] = {}
    inside: dict[str, list[bool]] = {name: [] for name in attempts.SCENARIOS}
    done = run = 0
    while done < kills:
        name = list(inside)[run % len(inside)]
        if name not in twins:
            options = attempts.SCENARIOS[name] | harness.arguments(backend)
            twins[name] = Twin.trained(folder / name / "twin", options, how)
        victim = Victim(folder / name / str(run), twins[name], attempts.PINS.get(name, []))
        kill_and_resume(victim, random_source, most=min(random_source.randint(1, most_each), kills - done))
        wrong = attempts.differences(twins[name].outcomes, victim.outcomes)
        assert not wrong, f"{victim.run}: not as the twin after {len(victim.inside)} kills: {wrong}"
        inside[name] += victim.inside
        done += len(victim.inside)
        run += 1
    in_a_save = sum(kind for kinds in inside.values() for kind in kinds)
    assert kills < 50 or in_a_save * 5 >= kills, f"only {in_a_save} of {kills} kills came inside a save"
    each = "; ".join(f"{name}: {len(kinds)}, {sum(kinds)}" for name, kinds in inside.items())
    words = f"soak: {done} of {kills} kills ended bitwise equal, {in_a_save} inside a save"
    return f"{words} (kills, inside by method: {each})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="of each run; one of them is killed at a time, or all")
    parser.add_argument("--backend", default="ddp", choices=["ddp", "fsdp2", "fsdp2_sharded"])
    flags = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    several = {"backend": flags.backend, "processes": flags.processes} if flags.processes > 1 else {}
    with tempfile.TemporaryDirectory() as scratch:
        print(soak(Path(scratch), kills=flags.kills, most_each=4, seed=flags.seed, **several))
    sys.exit(0)
