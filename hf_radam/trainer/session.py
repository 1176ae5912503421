"""Write checkpoints that exist complete or not at all: `CheckpointSession`, the weights and the manifest of each.

Upstream writes a checkpoint into `output_dir/_staging`. When every rank has written, the session completes it there
(trainer state, manifest with the hash of every file), flushes it to the disk and renames it to its place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException
from transformers.trainer import TRAINING_ARGS_NAME

from hf_radam import __version__
from hf_radam.checkpoints import manifest, peft, storage, weights
from hf_radam.checkpoints.runs import PREFIX, rotate
from hf_radam.names import SchedulerName
from hf_radam.sharding import Weights
from hf_radam.sharding.base import all_gather_object, rank, world_size
from hf_radam.trainer import reporting
from hf_radam.trainer.compatibility import gathers_weights, is_sharded, optimizer_name
from hf_radam.trainer.resume import describe_average


class CheckpointSaveError(OSError):
    """A checkpoint that could not be written. Every earlier one is intact."""


class CheckpointSession:
    """Stages, commits and rotates the checkpoints of one run.

    Every rank has one and calls the same methods; rank 0 renames and removes, every rank hashes the files it wrote.

    `limit` is the number of checkpoints to keep at the root (`save_total_limit`), None or 0 for all.
    """

    def __init__(self, run_dir: Path, limit: int | None, barrier: Any):
        self.run_dir = run_dir
        self.limit = limit
        self.staging = False  # whether a checkpoint is being written
        self.last_saved: tuple[int, bool, bool] | None = None
        """Completed steps at the last save, whether that lies at the root of the run, and whether it can be resumed."""
        self.uploads: dict[Path, Future[Any]] = {}  # of checkpoints, which rotation must not remove
        self._barrier = barrier
        self._hasher: storage.FileHasher | None = None

    @property
    def staging_dir(self) -> Path:
        """Folder that stands for the run while a checkpoint is written."""
        return self.run_dir / storage.STAGING

    @contextmanager
    def stage(self, step: int) -> Iterator[Path]:
        """Open a context in which the checkpoint after `step` completed steps is written into the folder it yields.

        If a disk fails, it removes the staged files and raises `CheckpointSaveError`; earlier checkpoints are intact.
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
        """Flush and hash every file of a staged checkpoint and write its manifest, with `content` in it; collective."""
        mine = {}
        if rank() > 0:  # each rank hashes the files that bear its number: one would take long over all of them
            mine = storage.FileHasher(folder).finish(only=lambda file: storage.rank_of(file) == rank())
        hashes = {name: facts for of_rank in all_gather_object(mine) for name, facts in of_rank.items()}
        if rank() == 0:
            manifest.write_manifest(folder, content, hasher=self._hasher, known=hashes)
            self._hasher = None

    def commit(self, step: int, *, at_root: bool, pinned_in: str | None, resumable: bool) -> None:
        """Give a sealed checkpoint its place or places, which share the files; collective.

        At the root of the run checkpoints are rotated; the folder `pinned_in` keeps them permanently.
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
        self.last_saved = (step, at_root, resumable)

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
        free = f"{shutil.disk_usage(self.run_dir).free / 2**30:.2f} GiB free"
        raise CheckpointSaveError(
            f"{checkpoint} could not be written{on}: {error} ({free}). Make room or make the folder writable, and "
            "continue with --resume_from_checkpoint true: every earlier checkpoint is intact."
        ) from error


def _is_disk_failure(error: BaseException) -> bool:
    if isinstance(error, CheckpointException):  # what torch's sharded saves raise on every rank
        return all(_is_disk_failure(failure) for failure, _ in error.failures.values())
    # Torch raises a RuntimeError that names the file of its source, or C++'s stream.
    of_torch = isinstance(error, RuntimeError) and any(word in str(error) for word in ("inline_container", "iostream"))
    return isinstance(error, (OSError, SafetensorError)) or of_torch


# ---- A checkpoint of a trainer ----


def save_what_is_missing(trainer: Any, save: Callable[[], None]) -> None:
    """Save the state after a step if it is pinned, a new best model, or the last before a SIGTERM ends the run."""
    step, saved = trainer.state.global_step, trainer._session.last_saved
    if trainer._was_finished:
        return
    at_root = saved[0] if saved and saved[1] else None
    if trainer._sigterm is not None and trainer._sigterm.is_requested(trainer.args):
        trainer.control.should_training_stop = True
        if saved != (step, True, True):
            with saving(trainer, at_root=True, resumable=True):
                save()
    elif trainer.args.load_best_model_at_end and trainer.state.best_global_step == step != at_root:
        # Evaluated more often than saved: the best model would have no checkpoint to be loaded from.
        with saving(trainer, at_root=True):
            save()
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    elif trainer._pinned_in is not None and (saved is None or saved[0] != step):
        with saving(trainer, at_root=False):
            save()


@contextmanager
def saving(trainer: Any, *, at_root: bool, resumable: bool = False) -> Iterator[None]:
    """Open a context in which upstream writes a checkpoint, which is completed and committed at its end.

    Args:
        trainer: has a session.
        at_root: whether it belongs to the checkpoints at the root of the run; else it is only pinned.
        resumable: write the optimizer whatever `save_only_model` says, as for every pinned checkpoint.
    """
    session, args, state = trainer._session, trainer.args, trainer.state
    step, pinned_in = state.global_step, trainer._pinned_in
    if trainer._evaluation.inside:
        raise RuntimeError(
            "The model holds the evaluation weights here (evaluation_weights()), but the root of a checkpoint holds "
            "the training weights. Save the checkpoint outside."
        )
    best, strategy = state.best_model_checkpoint, args.hub_strategy
    try:
        with session.stage(step) as folder:
            try:
                yield
                resumable = resumable or pinned_in is not None
                if args.save_only_model and resumable:
                    trainer._save_training_state(folder)
            finally:
                args.hub_strategy = strategy
            trainer.accelerator.wait_for_everyone()
            # Upstream looked for the best checkpoint where this one is staged.
            is_best = at_root and state.best_global_step == step
            state.best_model_checkpoint = str(session.run_dir / f"{PREFIX}{step}") if is_best else best
            if args.should_save:
                manifest.mark_state(state.stateful_callbacks, step)
                state.save_to_json(str(folder / manifest.TRAINER_STATE_NAME))
            session.seal(folder, _manifest(trainer))
            complete = resumable or not args.save_only_model
            session.commit(step, at_root=at_root, pinned_in=pinned_in, resumable=complete)
    except BaseException:
        state.best_model_checkpoint = best
        raise
    reporting.write_card_section(trainer, only_if_present=True)
    if at_root:
        written, best = session.run_dir / f"{PREFIX}{step}", state.best_model_checkpoint
        upload = reporting.push_checkpoint(trainer, written) if args.push_to_hub else None
        if upload is not None:
            session.uploads[written] = upload
        session.rotate(keep={written, *([Path(best)] if best else [])})


def remove_own_checkpoint(trainer: Any) -> None:
    """Remove a checkpoint of this package that stock mode is about to write over: a pinned one may share its files."""
    folder = Path(trainer._get_output_dir(trainer._trial_of_run), f"{PREFIX}{trainer.state.global_step}")
    if trainer.is_world_process_zero() and (folder / manifest.MANIFEST_NAME).is_file():
        storage.remove(folder.parent, folder)
    trainer.accelerator.wait_for_everyone()


def _manifest(trainer: Any) -> dict[str, Any]:
    args, state, plan, schedule = trainer.args, trainer.state, trainer._plan, trainer._schedule
    source, scheduler = trainer._evaluation.source, SchedulerName(args.lr_scheduler_type).value
    return {
        "hf_radam_version": __version__,
        "method": {"optim": optimizer_name(trainer), "lr_scheduler_type": scheduler, "ewa": args.ewa},
        "global_step": state.global_step,
        "max_steps": state.max_steps,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "warmup_steps": args.resolve_warmup_steps(state.max_steps, plan.past if plan else None),
        "schedule": None if schedule is None else schedule.to_dict(),
        "schedule_step": trainer._scheduled_steps,
        "extended_from": plan.extended_from if plan else None,
        "averaging": describe_average(trainer.average, requested_start_step=args.ewa_start_step),
        "evaluation": {
            "folder": source and peft.evaluation_subfolder(source, trainer._bare_model),
            **weights.parameter_dtypes(trainer._bare_model),
        },
    }


def save_evaluation_weights(trainer: Any, target: Path, *, stock: Callable[[str, bool], None]) -> None:
    """Write the evaluation weights into a folder; `stock` is upstream's `save_model`."""
    if (target / manifest.MANIFEST_NAME).is_file():
        raise ValueError(
            f"save_model({str(target)!r}) would overwrite the training weights of that checkpoint, which has the "
            "evaluation weights beside them. Save to another folder."
        )
    with trainer._evaluation.applied(exchange=True):
        if is_sharded(trainer):
            _save_full_weights(trainer, target)
        else:
            stock(str(target), True)
    if target == Path(str(trainer.args.output_dir)):
        reporting.write_card_section(trainer, only_if_present=True)


def save_checkpoint_weights(trainer: Any, folder: Path, *, stock: Callable[[str, bool], None]) -> None:
    """Write the training weights at the root of a checkpoint, and every other kind of weights beside them."""
    session, sharded = trainer._session, not gathers_weights(trainer)
    if not is_sharded(trainer):
        stock(str(folder), True)
    elif not sharded:
        _save_full_weights(trainer, folder)
    else:
        tokenizer = trainer._tokenizer_to_save
        weights.save_config_and_tokenizer(folder, trainer._bare_model, processing_class=tokenizer, in_float32=False)
        if trainer.args.should_save:
            torch.save(trainer.args, folder / TRAINING_ARGS_NAME)
        trainer.accelerator.wait_for_everyone()
        if not trainer.is_fsdp_enabled:  # which writes its shards with the optimizer
            _save_folder(trainer, folder, Weights.of_model(trainer._evaluation.sharding), sharded=True)
    session.hash_weights(folder)
    for source in trainer._evaluation.saved_sources:
        with trainer._evaluation.weights(source) as saved:
            subfolder = folder / peft.evaluation_subfolder(source, trainer._bare_model)
            _save_folder(trainer, subfolder, saved, sharded=sharded, in_float32=True)
        session.hash_weights(folder)


def _save_full_weights(trainer: Any, folder: Path) -> None:
    """Write full weights tensor by tensor: upstream gathers all of them on one rank, or writes none."""
    _save_folder(trainer, folder, Weights.of_model(trainer._evaluation.sharding), sharded=False)
    if trainer.args.should_save:
        torch.save(trainer.args, folder / TRAINING_ARGS_NAME)


def _save_folder(trainer: Any, folder: Path, saved: Weights, *, sharded: bool, in_float32: bool = False) -> None:
    save = weights.save_sharded_folder if sharded else weights.save_model_folder
    save(folder, trainer._bare_model, saved, processing_class=trainer._tokenizer_to_save, in_float32=in_float32)
