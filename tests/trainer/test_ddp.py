"""Two real processes under DDP (gloo, loopback): the same weights evaluated and saved as with one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ddp_script
import pytest
import tiny
from transformers import AutoModelForCausalLM

from hf_radam import load_evaluation_model
from hf_radam.checkpoints.manifest import read_manifest

HERE = Path(__file__).parent


def launch(folder: Path, processes: int, options: dict, *action: str) -> list[dict]:
    """Run `ddp_script.py` in so many processes; returns what each of them saw."""
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = [str(HERE / "ddp_script.py"), str(folder), json.dumps(options), *action]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("method", ["ewa", "schedule_free", "wsd"])
def test_two_processes_are_one(tmp_path, method):
    options = tiny.METHODS[method] | {"ddp_find_unused_parameters": False}
    two = launch(tmp_path / "two", 2, options | {"per_device_train_batch_size": 2})
    (tmp_path / "one").mkdir()
    ddp_script.main(tmp_path / "one", options | {"per_device_train_batch_size": 4})
    one = json.loads((tmp_path / "one" / "rank0.json").read_text())
    assert [facts["world_size"] for facts in (*two, one)] == [2, 2, 1]
    # The gradient is summed in another order: roundings of 6e-8 in 12 updates of size 1e-2.
    for facts in two:
        assert facts["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert facts["sum"] == pytest.approx(one["sum"], abs=1e-3)
        assert facts["resumed is the same"] and facts["resumed loss"] == facts["loss"] == two[0]["loss"]
        assert facts["longer is the planned"]
    run_folder, beside = tmp_path / "two" / "whole", "" if method == "wsd" else method
    for shipped in (
        load_evaluation_model(run_folder / "checkpoint-12"),
        AutoModelForCausalLM.from_pretrained(run_folder / "checkpoint-12" / beside),
        AutoModelForCausalLM.from_pretrained(run_folder),
    ):
        assert tiny.loss_of(shipped) == pytest.approx(two[0]["loss"], abs=2e-6)
    files = read_manifest(run_folder / "checkpoint-12")["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", Path(beside, "model.safetensors").as_posix()} <= set(files)


def test_a_sigterm_that_one_process_has_seen_stops_all_of_them(tmp_path):
    two = launch(tmp_path / "two", 2, tiny.METHODS["ewa"] | {"ddp_find_unused_parameters": False}, "stop")
    assert two == [{"stopped at": 4, "saved": ["checkpoint-4"]}] * 2
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(read_manifest(tmp_path / "two/checkpoint-4")["files"])
