"""Write our part of the model card beside a run, and write it again when what it says has changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from hf_radam import model_card
from hf_radam.training.card_facts import facts_of
from hf_radam.training.parts import PartsMixin

logger = logging.get_logger(__name__)


def write_our_part(trainer: PartsMixin, *, model_follows: bool = False) -> None:
    """Write our part into the card that upstream has written. Only the first process calls it.

    Args:
        trainer: a trainer with a card in its `output_dir`.
        model_follows: whether a model is about to be put beside the card.
    """
    file = _card_of(trainer)
    facts = facts_of(trainer)
    facts = replace(facts, holds_model=facts.holds_model or model_follows)
    file.write_text(model_card.completed(file.read_text(encoding="utf-8"), facts), encoding="utf-8")


def renew_our_part(trainer: PartsMixin, *, model_follows: bool = False) -> None:
    """Write our part again where there is a card with one; every process may call it.

    TRL's trainers write their card before each checkpoint, so that it knows neither that one nor the final model.
    """
    if trainer._active and trainer.is_world_process_zero():
        file = _card_of(trainer)
        try:
            if file.is_file() and model_card.has_our_part(file.read_text(encoding="utf-8")):
                write_our_part(trainer, model_follows=model_follows)
        except (OSError, ValueError) as error:  # no reason to end a training, on one process of several
            logger.warning(f"The model card {file} could not be brought up to date: {error}")


def _card_of(trainer: PartsMixin) -> Path:
    return Path(str(trainer.args.output_dir), "README.md")
