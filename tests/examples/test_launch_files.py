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
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from clm_arguments import parse_arguments

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
ZERO = {"processes": 2, "launcher": "deepspeed_launcher", "ACCELERATE_USE_DEEPSPEED": "true"}
NO_OFFLOAD = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}
WANTED = {
    "one_process": {"processes": 1, "launcher": "simple_launcher"},
    "ddp": {"processes": 2, "launcher": "multi_gpu_launcher"},
    "two_machines": {"processes": 4, "launcher": "multi_gpu_launcher"},
    "fsdp2": {
        "processes": 2,
        "launcher": "multi_gpu_launcher",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_OFFLOAD_PARAMS": "false",
    },
    "zero1": ZERO | NO_OFFLOAD | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": ZERO | NO_OFFLOAD | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO
    | NO_OFFLOAD
    | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
}


def header_commands(path):
    header = path.read_text(encoding="utf-8").split("\n\n")[0].replace("\\\n# ", "")
    return [shlex.split(line) for line in re.findall(r"^#   (accelerate launch .*)$", header, re.MULTILINE)]


def launched(arguments, monkeypatch):
    """Let accelerate read a command line and return (its launcher, what it understood), without launching."""
    seen = []
    for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(launch, name, lambda args, name=name: seen.append((name, args)))
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    return seen[0]


def test_there_is_a_file_for_each_way():
    assert {path.stem for path in FILES} == WANTED.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_command_means_what_the_file_is_for(path, monkeypatch, caplog):
    monkeypatch.chdir(ROOT)
    commands = header_commands(path)
    assert len(commands) == (2 if path.stem == "two_machines" else 1)
    for rank, command in enumerate(commands):
        launcher, args = launched(command[2:], monkeypatch)
        assert args.config_file == f"configs/accelerate/{path.name}"
        assert args.training_script == "examples/run_clm.py"
        parse_arguments(args.training_script_args)
        wanted = dict(WANTED[path.stem])
        assert (launcher, args.num_processes) == (wanted.pop("launcher"), wanted.pop("processes"))
        assert args.machine_rank == rank
        monkeypatch.setattr(sys.modules[prepare_multi_gpu_env.__module__], "is_port_in_use", lambda port: False)
        if launcher == "deepspeed_launcher":
            environment = prepare_deepspeed_cmd_env(args)[1]
        elif launcher == "multi_gpu_launcher":
            environment = prepare_multi_gpu_env(args)
        else:
            environment = {}
        assert {name: environment.get(name) for name in wanted} == wanted
        if path.stem == "two_machines":
            assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "2", rank)
            assert args.rdzv_endpoint == "10.0.0.1:29500"
    assert "had defaults used instead" not in caplog.text  # nothing was left for accelerate to choose or to ask


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_file_is_one_that_accelerate_knows(path):
    load_config_from_file(str(path))  # refuses unknown keys of the outer level, and only of that
    flags = {action.dest for action in launch.launch_command_parser()._actions}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for group in [value for value in content.values() if isinstance(value, dict)]:
        assert group.keys() <= flags


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_flags_in_headers_and_comments_exist(path):
    text = path.read_text(encoding="utf-8")
    known = {flag for action in launch.launch_command_parser()._actions for flag in action.option_strings}
    known |= {"--bf16", "--torch_compile", "--gradient_accumulation_steps", "--ewa"}
    for flag in set(re.findall(r"--\w+", text)):
        assert flag in known or flag == "--use_cpu", flag
    parse_arguments("--bf16 no --torch_compile no --ewa no --use_cpu yes --gradient_accumulation_steps 2".split())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_number_of_processes_can_be_given_on_the_command_line(path, monkeypatch):
    arguments = ["--config_file", str(path), "--num_processes", "8", "script.py"]
    assert launched(arguments, monkeypatch)[1].num_processes == 8
