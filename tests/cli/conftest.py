"""Checkpoints to merge."""

import pytest
import tiny
from constant_runs import train


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Those of a run at a constant learning rate, with a tokenizer; nobody changes them."""
    return train(tmp_path_factory.mktemp("constant"), tiny.llama())
