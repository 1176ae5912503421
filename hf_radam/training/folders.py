"""The model folders that a trainer writes: whole, tensor by tensor, or sharded where the back-end gathers nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINING_ARGS_NAME

from hf_radam.checkpoints import peft
from hf_radam.checkpoints.weights import save_config_and_tokenizer, save_model_folder, save_sharded_folder
from hf_radam.sharding import Weights
from hf_radam.training.backends import gathers_weights
from hf_radam.training.parts import PartsMixin


class FoldersMixin(PartsMixin):
    """Writes each kind of a trainer's weights; every process must call every method."""

    def _save_gathered(self, folder: Path) -> None:
        """Write the weights that are in the model, tensor by tensor: upstream gathers all, or writes none."""
        self._save_folder(folder, Weights.of_model(self._evaluation.sharding), in_float32=False)
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save_root(self, folder: Path) -> None:
        """Write the training weights of a checkpoint, sharded if the back-end was told not to gather them."""
        if gathers_weights(self):
            self._save_gathered(folder)
            return
        save_config_and_tokenizer(
            folder,
            self._bare_model,
            processing_class=self._tokenizer_to_save,
            in_float32=False,
        )
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self.accelerator.wait_for_everyone()
        if not self.is_fsdp_enabled:  # which writes them sharded by itself
            weights = Weights.of_model(self._evaluation.sharding)
            self._save_folder(folder, weights, in_float32=False, sharded=True)

    def _save_folder(self, folder: Path, weights: Weights, *, in_float32: bool = True, sharded: bool = False) -> None:
        if sharded:
            save_sharded_folder(
                folder, self._bare_model, weights, processing_class=self._tokenizer_to_save, in_float32=in_float32
            )
            return
        save_model_folder(
            folder,
            self._bare_model,
            weights,
            processing_class=self._tokenizer_to_save,
            in_float32=in_float32,
        )

    @property
    def _tokenizer_to_save(self) -> Any:
        """What upstream saves beside a model."""
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _save_beside(self, checkpoint: Path) -> Iterator[Path]:
        """Write every kind of weights that a checkpoint keeps beside those that train; yields each folder written."""
        for source in self._evaluation.kept:
            folder = checkpoint / peft.evaluation_subfolder(source, self._bare_model)
            with self._evaluation.weights(source) as weights:
                self._save_folder(folder, weights, sharded=not gathers_weights(self))
            yield folder
