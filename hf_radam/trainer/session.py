"""Write checkpoints that exist complete or not at all: `CheckpointSession`, and what the manifest of each says.

Upstream writes a checkpoint into `output_dir/_staging`. When every rank has written, the session completes it there
(trainer state, manifest with the hash of every file), flushes it to the disk and renames it to its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from hf_radam.checkpoints import manifest, storage
from hf_radam.checkpoints.runs import PREFIX, rotate
from hf_radam.sharding.base import all_gather_object, rank, world_size


class CheckpointSaveError(OSError):
    """A checkpoint that could not be written. Every earlier one is intact."""


class CheckpointSession:
    """Stages, commits and rotates the checkpoints of one run.

    Every rank has one and calls the same methods; rank 0 renames and removes, every rank hashes the files it wrote.

    Args:
        run_dir: folder of the run.
        limit: checkpoints to keep at its root (`save_total_limit`); None or 0 for all.
        barrier: waits for all ranks.
    """

    def __init__(self, run_dir: Path, limit: int | None, barrier: Any):
        self.run_dir = run_dir
        self.limit = limit
        self.staging = False
        """Whether a checkpoint is being written."""
        self.last_saved: tuple[int, bool] | None = None
        """Completed steps at the last save, and whether that lies at the root of the run or is only pinned."""
        self.uploads: dict[Path, Future[Any]] = {}
        """Checkpoints that are being uploaded, which rotation must not remove."""
        self._barrier = barrier
        self._hasher: storage.FileHasher | None = None

    @property
    def staging_dir(self) -> Path:
        """Folder that stands for the run while a checkpoint is written."""
        return self.run_dir / storage.STAGING

    @contextmanager
    def stage(self, step: int) -> Iterator[Path]:
        """Open a context in which the checkpoint after `step` completed steps is written into the folder it yields.

        Raises:
            CheckpointSaveError: if a disk failed; what was staged is removed, and every earlier checkpoint is intact.
        """
        name = f"{PREFIX}{step}"
        self.staging = True
        try:
            if rank() == 0:
                storage.recover_interrupted_save(self.run_dir)
            self._barrier()
            yield self.staging_dir / name
        except BaseException as error:
            self.abort()
            self._raise_if_disk_failed(error, self.run_dir / name)
            raise
        finally:
            self.staging = False

    def hash_weights(self, folder: Path) -> None:
        """Flush and hash the weight files written so far in the background, while what follows them is written."""
        if rank() == 0:
            if self._hasher is None:
                self._hasher = storage.FileHasher(folder)
            self._hasher.submit(folder.rglob("*.safetensors"))

    def seal(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Flush and hash every file of a staged checkpoint and write its manifest; collective.

        Args:
            folder: the staged checkpoint, complete but for the manifest.
            content: what the manifest says besides the files.
        """
        mine = {}
        if rank() > 0:  # each rank hashes the files that bear its number: one would take long over all of them
            mine = storage.FileHasher(folder).finish(only=lambda file: storage.rank_of(file) == rank())
        hashes = {name: facts for of_rank in all_gather_object(mine) for name, facts in of_rank.items()}
        if rank() == 0:
            manifest.write_manifest(folder, content, hasher=self._hasher, known=hashes)
            self._hasher = None

    def commit(self, step: int, *, at_root: bool, pinned_in: str | None) -> None:
        """Give a sealed checkpoint its place or places, which share the files; collective.

        Args:
            step: completed steps.
            at_root: whether it is one of the checkpoints that are rotated.
            pinned_in: the folder of the run in which it is kept for good, or None.
        """
        name = f"{PREFIX}{step}"
        places = [Path(pinned_in, name)] if pinned_in else []
        places += [Path(name)] if at_root else []
        if rank() == 0:
            for place in places:
                if place != Path(name):
                    storage.link_tree(self.staging_dir / name, self.staging_dir / place)
            for place in places:
                storage.commit(self.run_dir, place)
            storage.remove_staging(self.run_dir)
        self._barrier()
        self.last_saved = (step, at_root)

    def abort(self) -> None:
        """Remove what was staged. What another rank is still writing is removed when the run is resumed."""
        if self._hasher is not None:
            self._hasher.abort()
            self._hasher = None
        if rank() == 0:
            with suppress(OSError):
                storage.recover_interrupted_save(self.run_dir)

    def rotate(self, *, keep: set[Path]) -> None:
        """Remove the oldest checkpoints at the root beyond the limit, but for those in `keep` and under upload."""
        if rank() == 0:
            uploading = {folder for folder, job in self.uploads.items() if not job.done()}
            rotate(self.run_dir, self.limit, protected=keep | uploading)

    def _raise_if_disk_failed(self, error: BaseException, checkpoint: Path) -> None:
        if not _is_disk_failure(error):
            return
        on = f" on rank {rank()}" if world_size() > 1 else ""
        raise CheckpointSaveError(
            f"{checkpoint} could not be written{on}: {error} ({storage.free_space(self.run_dir)}). Make room or make "
            "the folder writable, and continue with --resume_from_checkpoint true: every earlier checkpoint is intact."
        ) from error


def _is_disk_failure(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):  # what torch's sharded saves raise on every rank
        return all(_is_disk_failure(failure) for failure, _ in error.failures.values())
    # Torch raises a RuntimeError that names the file of its source, or C++'s stream.
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "iostream"))
    return isinstance(error, (OSError, SafetensorError)) or of_torch
