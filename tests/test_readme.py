"""Every block of the README and of `docs/` runs or parses, the flag table is the code's, the files exist.

Run as a script, this file writes the flag table into the README.
"""

import dataclasses
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TABLE = re.compile(r"(<!-- flags:.*?-->\n)(.*?)(<!-- end of flags -->)", re.DOTALL)


def blocks(language: str) -> list[str]:
    return [
        block for text in (README, *DOCS.values()) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    ]


def flag_table() -> str:
    """The fields that are ours, or whose default is, with their help text."""
    from transformers import TrainingArguments

    from hf_radam import RAdamTrainingArguments

    upstream = set(TrainingArguments.__dataclass_fields__)
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for field in [field for field in dataclasses.fields(RAdamTrainingArguments) if field.init]:
        if field.name not in upstream or field.name in ("optim", "lr_scheduler_type"):
            default = "" if field.default is None else f"`{field.default}`"
            if field.name == "optim":
                default = "upstream's"
            rows.append(f"| `--{field.name}` | {default} | {field.metadata['help']} |")
    return "\n".join(rows) + "\n"


def test_the_flag_table_is_the_codes():
    assert TABLE.search(README).group(2) == flag_table(), "write it anew: python tests/test_readme.py"


@pytest.mark.parametrize(
    "block",
    blocks("python"),
    ids=["trainer", "plain loop", "loop that is resumed", "schedule-free loop", "SFTTrainer"],
)
def test_python_blocks_run(block, tmp_path):
    assert block.count("\n") < 40
    if "from trl" in block:
        sft = pytest.importorskip("sft")
        sft.llama().save_pretrained(tmp_path / "runs" / "radam_ewa")
        sft.tokenizer().save_pretrained(tmp_path / "runs" / "radam_ewa")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = [float(word) for word in re.findall(r"[-+]?\d+\.\d+", done.stdout.splitlines()[-1])]
    assert numbers, done.stdout
    if "runs/readme" in block:
        assert (tmp_path / "runs/readme/checkpoint-60/ewa/model.safetensors").is_file()
    if "uninterrupted" in block:
        assert numbers == [0.0], "the resumed loop is not the uninterrupted one"
    if "evaluating()" in block:  # what is to ship and what is to be gone on from are different weights
        shipped, kept = (torch.load(tmp_path / name) for name in ("model.pt", "checkpoint.pt"))
        assert all(not torch.equal(value, kept["model"][name]) for name, value in shipped.items())


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command, monkeypatch, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for run in ("first", "radam_wsd", "radam_ewa/checkpoint-500"):  # what is extended
        (tmp_path / "runs" / run).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if "examples/run_clm.py" in command:
        import clm_arguments

        assert command[:2] == ["accelerate", "launch"]
        clm_arguments.parse_arguments(command[command.index("examples/run_clm.py") + 1 :])
    elif command[0] == "hf-radam":
        from hf_radam import cli

        cli.parse(command[1:])
    elif command[:2] == ["python", "benchmarks/compare_methods.py"]:
        import compare_methods

        arguments = compare_methods.parse_arguments(command[2:])
        assert all((ROOT / path).is_file() for path in arguments.document)
    elif command[:2] == ["python", "benchmarks/benchmark.py"]:
        import benchmark

        arguments = benchmark.parse_arguments(command[2:])
        assert all((ROOT / path).is_file() for path in (arguments.json or arguments.from_json, *arguments.document))
    elif command[0] == "lm_eval":
        options = dict(zip(command[1::2], command[2::2], strict=True))
        assert set(options) <= set("--model --model_args --tasks --include_path --device --batch_size".split())
        assert re.fullmatch(r"pretrained=runs/radam_ewa/checkpoint-1000(/ewa)?", options["--model_args"])
    elif command[:2] == ["transformers", "serve"]:
        from transformers.cli.serve import Serve

        model, flag, _ = command[2:]
        assert model.endswith("/ewa") and {"force_model", flag.removeprefix("--")} <= {
            *inspect.signature(Serve).parameters
        }
    elif command[0] == "curl":
        assert json.loads(command[command.index("-d") + 1])["model"] == "runs/radam_ewa/checkpoint-1000/ewa"
    else:
        import evaluate_clm

        assert command[:2] == ["python", "examples/evaluate_clm.py"]
        evaluate_clm.parse_arguments(command[2:])


def test_the_task_for_lm_eval_is_one():
    (task,) = map(yaml.safe_load, blocks("yaml"))
    assert f"--tasks {task['task']} --include_path" in DOCS["guide.md"]
    assert {"dataset_path", "test_split", "output_type", "doc_to_target", "metric_list"} <= task.keys()


def test_the_cost_of_a_save_has_been_measured():
    section = DOCS["checkpoints.md"].split("## What a durable save costs")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| .*\d\.\d\d", section, re.MULTILINE)) == 4


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^    make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def entries(text: str) -> set[str]:
    """Names in a file tree, with as many spaces before them as they have there."""
    return set(re.findall(r"^( {4,}[\w/]+(?:\.py)?)  ", text, re.MULTILINE))


def test_the_file_trees_are_complete():
    package = ROOT / "hf_radam"
    files = [path for path in package.rglob("[!_]*.py") if path.parent.name != "optim"]
    folders = [path for path in package.rglob("*/") if path.is_dir() and path.name != "__pycache__"]
    named = {}
    for path in [*files, *folders]:
        inside = path.relative_to(package).parts
        named[path] = " " * (4 + 2 * len(inside)) + path.name + "/" * path.is_dir()
    ours, examples = DOCS["structure.md"].split("    examples/\n")
    assert entries(ours) == set(named.values())
    short = {line for path, line in named.items() if path.parent == package or path.is_dir()}
    tree = README.split("## Files")[1].split("    examples/")[0]
    assert entries(tree) == short
    modules = [path for folder in ("examples", "benchmarks") for path in (ROOT / folder).glob("[!_]*.py")]
    assert entries(examples) == {" " * 6 + path.name for path in modules}


@pytest.mark.parametrize(("kind", "parts"), [("benchmark", "benchmark_report"), ("comparison", "compare_results")])
def test_the_measured_tables_are_those_of_the_numbers(kind, parts):
    import tables

    made_by = importlib.import_module(parts).PARTS
    data = json.loads((ROOT / "docs" / f"{kind}.json").read_text(encoding="utf-8"))
    marked = [text for text in (README, *DOCS.values()) if tables.names(text, kind)]
    assert README in marked
    for text in marked:
        assert tables.written(text, kind, made_by, data) == text, f"write them anew with examples/{kind}"
    assert {name for text in marked for name in tables.names(text, kind)} == set(made_by)


def test_links_lead_to_files():
    for text, folder in [(README, ROOT), *((text, ROOT / "docs") for text in DOCS.values())]:
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (folder / target).is_file() or target.startswith("https://"), target


def test_every_config_has_been_measured_and_stands_in_the_table():
    for path in (ROOT / "configs").glob("*.yaml"):
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert "TO BE MEASURED" not in header
        losses = re.findall(r"\d\.\d{3}", header)
        assert losses and all(loss in README for loss in losses), path.name


if __name__ == "__main__":
    text = TABLE.sub(lambda match: match.group(1) + flag_table() + match.group(3), README)
    (ROOT / "README.md").write_text(text, encoding="utf-8")
