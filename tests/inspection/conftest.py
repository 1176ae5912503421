"""Real runs for the command to look into."""

import shutil
from pathlib import Path

import pytest
from inspecting import stock
from tiny import METHODS, trainer


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A finished run of each method, with checkpoints every 6 of 20 updates and the model at its root."""
    root = tmp_path_factory.mktemp("made")
    for name, options in METHODS.items():
        run = trainer(root / name, save_strategy="steps", save_steps=6, **options)
        run.train()
        run.save_model()
    return root


@pytest.fixture(scope="session")
def made_by_stock(tmp_path_factory):
    """A run of stock `Trainer` with AdamW, which it decays linearly."""
    root = tmp_path_factory.mktemp("stock")
    stock(root, warmup_steps=0.6).train()
    return root


@pytest.fixture
def run(made, tmp_path):
    """A copy of a finished run: `run("wsd")`."""

    def copy(name):
        return Path(shutil.copytree(made / name, tmp_path / name))

    return copy
