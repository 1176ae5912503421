"""The files in `configs/accelerate/`: complete, and what their headers say.

Oracles: accelerate's own parser, and the environment that it would give the processes; what each file is for, written
down here.
"""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from clm_arguments import parse_arguments

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP2 |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_OFFLOAD_PARAMS": "false"}
FSDP2["FSDP_RESHARD_AFTER_FORWARD"] = "true"
ZERO = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE": "none" for part in ("OPTIMIZER", "PARAM")}
ZERO["ACCELERATE_USE_DEEPSPEED"] = "true"
WANTED = {
    "one_process": ("simple_launcher", 1, {}),
    "ddp": ("multi_gpu_launcher", 2, {}),
    "two_machines": ("multi_gpu_launcher", 4, {}),
    "fsdp2": ("multi_gpu_launcher", 2, FSDP2),
}
for stage in "123":
    WANTED[f"zero{stage}"] = ("deepspeed_launcher", 2, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})
WANTED["zero3"][2]["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = "true"


def launched(arguments, monkeypatch):
    """Let accelerate read a command line and return (its launcher, what it understood), without launching."""
    seen = []
    for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: seen.append((name, args)))
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    return seen[0]


@pytest.mark.parametrize("name", sorted(FILES.keys() | WANTED.keys()))
def test_the_header_command_means_what_the_file_is_for(name, monkeypatch, caplog):
    """For every way to launch there is a file, and for every file a way."""
    monkeypatch.chdir(ROOT)
    header = FILES[name].read_text(encoding="utf-8").split("\n\n")[0].replace("\\\n# ", "")
    commands = [shlex.split(line) for line in re.findall(r"^#   (accelerate launch .*)$", header, re.MULTILINE)]
    assert len(commands) == (2 if name == "two_machines" else 1)
    monkeypatch.setattr(sys.modules[prepare_multi_gpu_env.__module__], "is_port_in_use", lambda port: False)
    for rank, command in enumerate(commands):
        launcher, args = launched(command[2:], monkeypatch)
        assert args.config_file == f"configs/accelerate/{name}.yaml"
        assert (args.training_script, args.machine_rank) == ("examples/run_clm.py", rank)
        parse_arguments(args.training_script_args)
        assert (launcher, args.num_processes) == WANTED[name][:2]
        environment = {}
        if launcher == "deepspeed_launcher":
            environment = prepare_deepspeed_cmd_env(args)[1]
        elif launcher == "multi_gpu_launcher":
            environment = prepare_multi_gpu_env(args)
        assert WANTED[name][2].items() <= environment.items()
        if name == "two_machines":
            assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint) == ("2", "2", "10.0.0.1:29500")
    assert "had defaults used instead" not in caplog.text  # nothing was left for accelerate to choose or to ask
    known = {action.dest for action in launch.launch_command_parser()._actions}
    for group in yaml.safe_load(FILES[name].read_text(encoding="utf-8")).values():
        assert not isinstance(group, dict) or group.keys() <= known  # accelerate looks at the outer level alone
    more = ["--config_file", str(FILES[name]), "--num_processes", "8", "script.py"]
    assert launched(more, monkeypatch)[1].num_processes == 8
