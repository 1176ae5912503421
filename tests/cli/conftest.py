"""Runs for the commands to read."""

import shutil
from pathlib import Path

import pytest
import tiny
from constant_runs import train
from inspecting import stock

LOGGING = {"logging_strategy": "steps", "logging_steps": 5}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The checkpoints of a run at a constant learning rate, with a tokenizer; tests leave them as they are."""
    return train(tmp_path_factory.mktemp("constant"), tiny.llama(), **LOGGING)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run of each method, with checkpoints every 6 of 20 steps and the model at its root."""
    root = tmp_path_factory.mktemp("made")
    for name, options in tiny.METHODS.items():
        tiny.trained(root / name, save_strategy="steps", save_steps=6, **LOGGING, **options).save_model()
    return root


@pytest.fixture(scope="session")
def made_by_stock(tmp_path_factory):
    """A run of stock `Trainer` with checkpoints after 5 and 10 steps."""
    root = tmp_path_factory.mktemp("stock")
    stock(root, lr_scheduler_type="constant", logging_steps=1).train()
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of a finished run: `run("wsd")`."""

    def copy(name):
        return Path(shutil.copytree(made / name, tmp_path / name))

    return copy
