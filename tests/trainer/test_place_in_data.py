"""A warning is logged where a run that is resumed with larger or smaller steps continues at another place in the data.

Oracle: the samples that were used, as the data itself counts them.
"""

import logging

import pytest
import tiny

from hf_radam.trainer.resume import epochs_after


class Counted(list):
    """Data that keeps the order in which it is asked."""

    def __init__(self, rows):
        super().__init__(rows)
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return super().__getitem__(index)


def train(folder, resume=None, **options):
    """Train; returns the samples in the order in which they were asked for."""
    trainer = tiny.trainer(folder, optim="radam", max_steps=12, **options)
    trainer.train_dataset = Counted(tiny.TRAIN)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.train_dataset.asked


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run of 12 steps with a checkpoint after 6, and the samples in the order of their use."""
    folder = tmp_path_factory.mktemp("first")
    return folder, train(folder, save_strategy="steps", save_steps=6)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4), (2, 1), (4, 2)])
def test_the_place_in_the_data(tmp_path, first, caplog, batch, accumulation):
    folder, order = first
    with caplog.at_level(logging.WARNING):
        resumed = train(
            tmp_path / "new",
            str(folder / "checkpoint-6"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
    same = resumed[:4] == order[6 * 4 : 7 * 4]
    assert same == (batch * accumulation == 4)
    warned = "is at epoch 0.375, but its 6 steps are" in caplog.text
    assert warned != same


def test_epochs_after_steps():
    assert epochs_after(5, batches_per_epoch=10, accumulation=1) == 0.5
    assert epochs_after(5, batches_per_epoch=9, accumulation=2) == 1.0  # the fifth step has one batch
    assert epochs_after(7, batches_per_epoch=9, accumulation=2) == 1 + 4 / 9
