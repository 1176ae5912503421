"""Imports of the package point down its six ranks only, also inside functions and under `TYPE_CHECKING`.

The check is run on code that must fail it, too. `MUST_NOT_LOAD` is checked in a fresh interpreter by `sys.modules`.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_radam

PACKAGE = Path(hf_radam.__file__).parent
RANKS = (
    ("schedules", "config_files", "random_state"),
    ("sharding",),
    ("averaging", "optim", "batch_norm"),
    ("names", "training_args", "checkpoints"),
    ("trainer",),
    ("cli",),
)
MUST_NOT_LOAD = {
    "schedules": {"torch", "transformers", "numpy"},
    "checkpoints.verify": {"torch", "transformers", "safetensors"},
    "checkpoints.runs": {"torch", "transformers"},
    "cli": {"torch", "transformers", "matplotlib"},
    "cli.inspect": {"torch", "transformers", "matplotlib"},
    "averaging": {"transformers", "accelerate", "datasets"},
    "optim": {"transformers", "accelerate", "datasets"},
    "batch_norm": {"transformers", "accelerate", "datasets"},
}


def rank_of(module: str) -> int:
    (found,) = [rank for rank, names in enumerate(RANKS) if module.split(".")[1] in names]
    return found


def wrong_imports(source: str, module: str) -> list[str]:
    """List the modules of hf_radam that `source` imports from a higher rank."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            whole = node.module == "hf_radam"
            names = [f"hf_radam.{alias.name}" for alias in node.names] if whole else [node.module]
        own = [name for name in names if name.startswith("hf_radam.") and not name.startswith("hf_radam.__")]
        found += [name for name in own if rank_of(name) > rank_of(module)]
    return found


def modules() -> dict[str, str]:
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]
    return {
        ".".join(["hf_radam", *file.relative_to(PACKAGE).with_suffix("").parts]): file.read_text() for file in files
    }


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    assert wrong_imports(modules()[module], module) == []


def test_the_check_can_fail():
    source = "def f():\n    from hf_radam.trainer import ranks\nfrom hf_radam import averaging, __version__\n"
    assert sorted(wrong_imports(source, "hf_radam.sharding.base")) == ["hf_radam.averaging", "hf_radam.trainer"]
    assert wrong_imports(source, "hf_radam.cli.average") == []


@pytest.mark.parametrize("module", MUST_NOT_LOAD)
def test_a_bare_import_stays_light(module):
    code = f"import sys, json, hf_radam.{module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert MUST_NOT_LOAD[module] & set(json.loads(done.stdout)) == set()
