"""Several machines: one folder that all see, or an error on all of them. Two processes play two machines."""

from __future__ import annotations

import os

import pytest
import tiny
from processes import harness

from hf_radam.trainer import ranks as shared_folder


def train(folder, apart):
    """Train as one process on a machine of its own; `apart` gives each machine a folder of the same name."""
    rank = os.environ["RANK"]
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = "1", "0"
    shared_folder.PATIENCE = 2.0
    home = folder / rank if apart else folder
    home.mkdir(exist_ok=True)
    os.chdir(home)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2} | harness.arguments("ddp")
    with pytest.raises(ValueError, match="save_on_each_node is not supported"):
        tiny.trainer("run", save_on_each_node=True, **options | tiny.METHODS["ewa"]).train()
    tiny.trainer("run", **options | tiny.METHODS["ewa"]).train()
    return sorted(file.name for file in (home / "run" / "checkpoint-2").glob("rng_state*"))


def test_one_folder_holds_the_files_of_both(tmp_path):
    assert harness.run(train, tmp_path, False) == [["rng_state_0.pth", "rng_state_1.pth"]] * 2


def test_folders_apart_are_refused_on_both(tmp_path):
    for outcome in harness.run(train, tmp_path, True, check=False):
        assert "is not shared by all machines: ranks [1] do not see" in outcome.error
    assert not list(tmp_path.rglob("seen-by-all*"))
