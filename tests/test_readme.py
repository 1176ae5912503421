"""Every block of README and `docs/` runs or parses, and what is generated or measured is up to date.

Oracles: the parsers, the fields of the arguments, the JSON files, the files of the repository.
"""

import importlib
import inspect
import json
import re
import shlex
import statistics
import sys
import types
from pathlib import Path

import pytest
import test_layering
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = {path: path.read_text(encoding="utf-8") for path in (README, *sorted(DOCS.glob("*.md")))}
TEXT = "\n".join(PAGES.values())
MEASURED = {"benchmark": ("benchmark_report", "performance.md"), "comparison": ("compare_results", "comparison.md")}
LEFT_OUT = {"summary", "growth", "every", "grids", "longer_cosines", "first_budget"}
"""Tables that the documents do not show: figures or sentences have their numbers."""
sys.path.insert(0, str(DOCS))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


# ---- Python ----


def first_words(block: str) -> str:
    return next(word for word in ("SFTTrainer", "evaluating", "uninterrupted", "LlamaConfig") if word in block)


@pytest.mark.filterwarnings("ignore")  # a user sees warnings of upstream, and goes on
@pytest.mark.parametrize("block", blocks("python"), ids=first_words)
def test_python_blocks_run(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = types.ModuleType("script")  # dataclasses look for the module that defines them
    monkeypatch.setitem(sys.modules, "script", script)
    if "from trl" in block:
        sft = pytest.importorskip("sft")
        sft.llama().save_pretrained("runs/radam_ewa")
        sft.tokenizer().save_pretrained("runs/radam_ewa")
    exec(block, vars(script))
    printed = [float(word) for word in re.findall(r"[-+]?\d+\.\d+", capsys.readouterr().out.splitlines()[-1])]
    assert printed
    if "LlamaConfig" in block:
        assert Path("runs/readme/checkpoint-60/ewa/model.safetensors").is_file()
        assert len([line for line in block.splitlines() if line]) <= 12  # the script of the README
    if "uninterrupted" in block:
        assert printed == [0.0], "the resumed loop is not the uninterrupted one"
    if "evaluating()" in block:  # x is saved to ship, y to resume from
        shipped, resumable = torch.load("model.pt"), torch.load("checkpoint.pt")
        assert all(not torch.equal(value, resumable["model"][name]) for name, value in shipped.items())


# ---- Commands ----


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line) for line in lines if line and not line.startswith("lm_eval ")]  # not installed here


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command, monkeypatch, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for run in ("first", "radam_wsd", "radam_ewa/checkpoint-500"):  # what is extended
        (tmp_path / "runs" / run).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    if command[0] == "accelerate":
        import clm_arguments

        script = command.index("examples/run_clm.py")
        assert command[1] == "launch" and all((ROOT / word).is_file() for word in command[2:script] if "/" in word)
        clm_arguments.parse_arguments(command[script + 1 :])
    elif command[0] == "hf-radam":
        from hf_radam.cli.main import parse

        parse(command[1:])
    elif command[:2] == ["transformers", "serve"]:
        from transformers.cli.serve import Serve

        model, flag, _ = command[2:]
        assert model.endswith("/ewa")
        assert {"force_model", flag.removeprefix("--")} <= set(inspect.signature(Serve).parameters)
    else:
        assert command[0] == "python" and (ROOT / command[1]).is_file()
        arguments = importlib.import_module(Path(command[1]).stem).parse_arguments(command[2:])
        if command[1].startswith("benchmarks/"):
            assert all((ROOT / path).is_file() for path in (arguments.from_json, *arguments.document))


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = TEXT + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = set(re.findall(r"^    make (\w[\w-]*)", text, re.MULTILINE)) | set(re.findall(r"`make (\w[\w-]*)", text))
    assert len(found) > 5
    assert found <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


# ---- Links ----


def test_links_lead_to_files_and_headings_and_from_the_readme_to_every_document():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            name, _, heading = target.partition("#")
            file = page.parent / name
            assert file.is_file(), f"{page.name}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8").lower(), re.MULTILINE)
                anchors = [re.sub(r"[^\w\- ]", "", words).replace(" ", "-") for words in headings]
                assert heading in anchors, f"{page.name}: {target}"
    assert all(f"(docs/{page.name})" in PAGES[README] for page in PAGES if page != README)


# ---- Generated and measured ----


def test_the_page_of_flags_and_the_drawing_of_the_modules_are_those_of_the_code():
    import generate

    assert PAGES[DOCS / "flags.md"] == generate.flags_page(), "run make docs"
    text = PAGES[DOCS / "development.md"]
    assert generate.DRAWING.findall(text) == [generate.drawing()], "run make docs"
    assert [{*names} for names in reversed(generate.RANKS)] == [{*names} for names in test_layering.RANKS]
    files = [file for file in (ROOT / "hf_radam").rglob("[!_]*.*") if file.suffix in (".py", ".cpp")]
    tree = text.split("```")[0]
    assert [file.name for file in files if not re.search(rf"\b{file.stem}\b", tree)] == []


@pytest.mark.parametrize("kind", MEASURED)
def test_the_measured_tables_are_those_of_the_numbers(kind):
    import tables

    parts, name = MEASURED[kind]
    made_by = importlib.import_module(parts).PARTS
    data = json.loads((DOCS / f"{kind}.json").read_text(encoding="utf-8"))
    text = PAGES[DOCS / name]
    assert tables.written(text, kind, made_by, data) == text, f"write them anew by the command in {name}"
    assert set(tables.names(text, kind)) == set(made_by) - LEFT_OUT


def test_the_costs_in_words_are_those_of_the_benchmark():
    import benchmark_report

    data = json.loads((DOCS / "benchmark.json").read_text(encoding="utf-8"))
    every = {row["every"]: row["seconds"] for row in data["every"]["rows"]}
    share = f"With `--ewa_every 16` an average costs {100 * every[16] / every[1]:.1f} % of that per step"
    assert share in PAGES[DOCS / "performance.md"]
    rows = {row["name"]: row["seconds"] for row in benchmark_report.largest_table(data, "steps")["rows"]}
    assert rows["hf_radam.RAdam, fused"] <= 1.02 * rows["torch.optim.AdamW, fused"]
    readme = " ".join(PAGES[README].split())
    assert "a fused step of RAdam takes as long as one of torch's fused AdamW" in readme
    assert "with RAdam and EWA is as fast as `Trainer` with that AdamW" in readme
    with_ewa = [row for one in data["trainers"] for row in one["rows"] if "EWA" in row["name"]]
    assert all(0.99 < statistics.median(row["to_stock"]) < 1.01 for row in with_ewa)


def test_the_upstream_internals_are_where_the_table_says():
    table = PAGES[DOCS / "development.md"].split("## Upstream internals")[1]
    rows = [line.split("|") for line in table.splitlines() if "`_" in line]
    assert len(rows) > 5
    for _, _, names, modules, *_ in rows:
        source = "".join((ROOT / "hf_radam" / path).read_text("utf-8") for path in re.findall(r"`(.*?)`", modules))
        assert [name for name in re.findall(r"`(.*?)`", names) if name not in source] == []
