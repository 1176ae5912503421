"""The import table of the package, checked in the source and in what an import really loads.

A module may import the modules of `hf_radam` listed beside it and, where a list is given, only those packages; the
standard library is always allowed. Imports under `TYPE_CHECKING` and inside functions count too. The oracle for the
lazy package is `sys.modules` of a fresh interpreter. Both checks are also run on code that must fail them.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_radam

PACKAGE = Path(hf_radam.__file__).parent
ANY = None  # no rule for packages from outside


def within(package: str, names: str) -> set[str]:
    return {f"{package}.{name}" for name in names.split()}


# module or sub-package: (modules of hf_radam that it may import, packages that it may import)
TABLE: dict[str, tuple[set[str], set[str] | None]] = {
    "schedules": (set(), set()),
    "describe": ({"schedules"}, set()),
    "sharding": (set(), {"torch", "deepspeed"}),
    "optim": ({"sharding"}, {"torch", "schedulefree"}),
    "averaging": ({"optim", "sharding"}, {"torch"}),
    "batch_norm": (set(), {"torch"}),
    "random_state": (set(), {"torch", "numpy"}),
    "names": ({"optim", "schedules"}, ANY),
    "training_args": ({"schedules", "averaging", "names"}, ANY),
    "config_files": (set(), {"transformers", "yaml"}),
    "model_card": ({"averaging"}, {"yaml"}),
    "checkpoints.storage": (set(), set()),
    "checkpoints.manifest": (within("checkpoints", "storage"), set()),
    "checkpoints.layouts": (within("checkpoints", "manifest"), set()),
    "checkpoints.verify": (within("checkpoints", "storage manifest layouts"), set()),
    "checkpoints.runs": ({"schedules"} | within("checkpoints", "storage manifest layouts verify"), set()),
    "checkpoints.sharded": ({"sharding"} | within("checkpoints", "manifest layouts"), {"torch"}),
    "checkpoints.optimizer_state": ({"sharding"} | within("checkpoints", "manifest layouts sharded"), {"torch"}),
    "checkpoints.peft": ({"batch_norm"} | within("checkpoints", "manifest layouts"), ANY),
    "checkpoints.weights": (
        {"random_state", "sharding"} | within("checkpoints", "manifest layouts peft sharded"),
        ANY,
    ),
    "checkpoints.load": (
        within("checkpoints", "storage manifest layouts verify runs peft sharded weights"),
        ANY,
    ),
    "checkpoints.extension": (
        {"names", "schedules", "training_args"} | within("checkpoints", "storage manifest layouts verify runs"),
        set(),
    ),
    "inspection.phases": ({"schedules", "describe"}, set()),
    "inspection.peeking": (within("checkpoints", "manifest optimizer_state"), {"torch"}),
    "inspection.pickled": (set(), set()),
    "inspection.facts": (set(), set()),
    "inspection.checkpoint": (
        {"describe"}
        | within("checkpoints", "manifest layouts verify")
        | within("inspection", "phases peeking pickled facts"),
        set(),
    ),
    "inspection.uses": (
        {"describe"}
        | within("checkpoints", "verify manifest layouts runs load")
        | within("checkpoints", "sharded")
        | within("inspection", "phases facts"),
        {"transformers"},
    ),
    "inspection.run": (
        within("checkpoints", "storage manifest layouts verify runs load")
        | within("inspection", "peeking facts checkpoint uses"),
        set(),
    ),
    "inspection.report": (within("inspection", "phases facts run uses"), set()),
    "training_logs": (within("checkpoints", "storage manifest runs load"), set()),
    "plot_parts": ({"training_logs"}, set()),
    "plots": ({"schedules", "training_logs", "plot_parts"}, {"matplotlib"}),
    "merging.coefficients": ({"schedules", "averaging"}, set()),
    "merging.sources": (
        within("checkpoints", "manifest verify layouts runs load")
        | within("checkpoints", "sharded weights")
        | within("inspection", "phases pickled"),
        {"torch", "safetensors", "transformers"},
    ),
    "merging.differences": (within("checkpoints", "manifest"), set()),
    "merging.folder": (
        within("checkpoints", "storage manifest layouts verify")
        | within("checkpoints", "weights")
        | within("merging", "coefficients differences sources"),
        {"torch", "transformers"},
    ),
    "cli.commands": (set(), set()),
    "cli.drawing": (set(), set()),
    "cli.inspecting": (within("inspection", "checkpoint uses run report") | within("cli", "commands"), set()),
    "cli.consolidate": (
        within("checkpoints", "load runs") | within("checkpoints", "sharded") | within("cli", "commands"),
        set(),
    ),
    "cli.schedule": (
        {"averaging", "config_files", "names", "optim", "plots", "schedules", "training_args"}
        | within("checkpoints", "runs extension")
        | within("cli", "commands drawing"),
        {"torch", "transformers"},
    ),
    "cli.plotting": ({"training_logs"} | within("cli", "commands drawing schedule"), set()),
    "cli.averaging": (
        within("checkpoints", "manifest")
        | within("merging", "coefficients folder")
        | within("cli", "commands drawing"),
        set(),
    ),
    "cli.stopping": (set(), set()),
    "cli": (within("cli", "commands stopping inspecting consolidate schedule plotting averaging"), set()),
    "training.launched": (set(), {"accelerate", "transformers"}),
    "training.backends": (
        {"optim", "names", "batch_norm"} | within("checkpoints", "peft") | within("training", "launched"),
        ANY,
    ),
    "training.collected": (set(), set()),
    "training.support": (
        {"optim", "names", "schedules", "training_args"}
        | within("checkpoints", "peft")
        | within("training", "backends collected"),
        ANY,
    ),
    "training.given": ({"training_args"}, {"transformers"}),
    "training.evaluation": ({"averaging", "optim", "batch_norm", "sharding"}, {"torch"}),
    "training.parts": (
        {"averaging", "optim", "names", "schedules", "training_args"} | within("training", "support evaluation"),
        ANY,
    ),
    "training.resume_checks": (
        {"averaging"}
        | within("checkpoints", "manifest layouts verify optimizer_state runs extension")
        | within("checkpoints", "weights peft"),
        ANY,
    ),
    "training.verification": ({"sharding"} | within("checkpoints", "manifest verify"), {"torch"}),
    "training.agreement": ({"sharding"}, ANY),
    "training.shared_folder": (
        {"sharding"} | within("checkpoints", "storage") | within("training", "agreement"),
        {"torch"},
    ),
    "training.hub": (within("checkpoints", "storage"), ANY),
    "training.just_in_time": (set(), ANY),
    "training.failures": (within("checkpoints", "storage"), {"torch", "safetensors"}),
    "training.folders": (
        {"sharding"} | within("checkpoints", "peft weights") | within("training", "backends parts"),
        ANY,
    ),
    "training.raw_names": (set(), set()),
    "training.card_facts": (
        {"schedules", "model_card", "names", "averaging"}
        | within("checkpoints", "manifest runs load")
        | within("checkpoints", "peft sharded")
        | within("training", "parts raw_names"),
        {"transformers"},
    ),
    "training.card": ({"model_card"} | within("training", "card_facts parts"), {"transformers"}),
    "training.final_uploads": (within("training", "backends parts"), {"transformers"}),
    "training.saving": (
        {"names", "sharding"}
        | within("checkpoints", "storage manifest runs")
        | within("checkpoints", "peft weights")
        | within("training", "backends card failures final_uploads folders hub just_in_time"),
        ANY,
    ),
    "training.resuming": (
        {"sharding", "schedules", "training_args", "averaging"}
        | within("checkpoints", "optimizer_state storage manifest layouts verify runs load extension")
        | within("checkpoints", "weights peft")
        | within("training", "agreement shared_folder verification backends evaluation resume_checks parts"),
        ANY,
    ),
    "training.around_update": (within("training", "parts"), {"transformers"}),
    "training.search": (within("training", "evaluation support parts raw_names"), ANY),
    "training.curves": (set(), {"transformers"}),
    "training.reporting": (within("training", "card card_facts curves parts"), set()),
    "trainer": (
        {"averaging", "optim", "batch_norm", "random_state", "names", "sharding", "training_args"}
        | within(
            "training",
            "support given collected backends evaluation just_in_time saving reporting resuming search "
            "around_update raw_names",
        ),
        ANY,
    ),
}

# What a bare import must not bring in: these are usable without transformers, the schedules even without torch.
MUST_NOT_LOAD = {
    "schedules": {"torch", "transformers", "accelerate", "datasets", "numpy"},
    "averaging": {"transformers", "accelerate", "datasets"},
    "batch_norm": {"transformers", "accelerate", "datasets"},
    "optim": {"transformers", "accelerate", "datasets"},
    "random_state": {"transformers", "accelerate", "datasets"},
    "checkpoints.runs": {"torch", "transformers", "safetensors", "numpy", "yaml"},
}


def imported_modules(source: str, package: list[str]) -> set[str]:
    """Return the dotted names that a source imports; `package` resolves its relative imports.

    `from a import b` gives `a.b`, because b may be a module.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*anchor, *([node.module] if node.module else [])])
            found.update(f"{origin}.{alias.name}" for alias in node.names)
    return found


def entry(dotted: str, table: dict[str, tuple[set[str], set[str] | None]]) -> str:
    """The entry of the table that a module, or a name in it, belongs to; what has none is returned as it is."""
    parts = dotted.split(".")
    candidates = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for name in candidates if name in table), dotted)


def violations(root: Path, table: dict[str, tuple[set[str], set[str] | None]]) -> list[str]:
    """Return one sentence per import in the package at `root` that the table does not allow."""
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if inside == Path("__init__.py"):
            continue  # names every module, lazily: what that loads is measured below
        dotted = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        names = imported_modules(path.read_text(encoding="utf-8"), [root.name, *inside.parts[:-1]])
        module = entry(dotted, table)
        if module not in table:
            if names or inside.name != "__init__.py":
                found.append(f"{inside}: {module} is not in the import table")
            continue
        internal, external = table[module]
        for name in sorted(names):
            top, _, rest = name.partition(".")
            if top == root.name:
                if entry(rest, table) not in internal | {module, "__version__"}:
                    found.append(f"{inside}: imports {name}, but {module} may import {sorted(internal) or 'no module'}")
            elif top not in sys.stdlib_module_names and external is not ANY and top not in external:
                found.append(f"{inside}: imports {name}, but {module} may import {sorted(external) or 'no package'}")
    return found


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages in `sys.modules` of a fresh interpreter after a statement."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=120
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_the_package_follows_the_table():
    assert violations(PACKAGE, TABLE) == []


def test_the_table_only_points_down():
    for position, (module, (internal, _)) in enumerate(TABLE.items()):
        assert internal <= set(list(TABLE)[:position]), module


@pytest.mark.parametrize("module", MUST_NOT_LOAD)
def test_a_bare_import_stays_light(module):
    if not (PACKAGE / module).is_dir() and not (PACKAGE / f"{module.replace('.', '/')}.py").exists():
        pytest.skip(f"hf_radam.{module} does not exist")
    assert not loaded_by(f"import hf_radam.{module}") & MUST_NOT_LOAD[module]


def test_the_package_alone_loads_nothing():
    assert not loaded_by("import hf_radam; dir(hf_radam)") & {"torch", "numpy", "transformers"}


def test_public_names_are_listed_and_lazy():
    assert set(hf_radam.__all__) <= set(dir(hf_radam))
    assert set(hf_radam.__all__) == {*hf_radam._MODULE_OF, "__version__"}
    with pytest.raises(AttributeError, match="module 'hf_radam' has no attribute 'Trainer'"):
        hf_radam.Trainer  # noqa: B018


@pytest.mark.parametrize(
    ("file", "source", "reason"),
    [
        ("schedules.py", "import torch", "imports torch, but schedules may import no package"),
        ("schedules.py", "def f():\n    from torch import nn", "imports torch.nn, but schedules may import no package"),
        ("schedules.py", "from . import averaging", "imports hf_radam.averaging, but"),
        ("schedules.py", "from hf_radam import RAdam", "imports hf_radam.RAdam, but schedules may import no module"),
        ("averaging.py", "import transformers.trainer", "imports transformers.trainer, but averaging may"),
        (
            "averaging.py",
            "import hf_radam.names as n",
            "imports hf_radam.names, but averaging may import [",
        ),
        ("optim/radam.py", "from ..averaging import WeightAverage", "imports hf_radam.averaging.WeightAverage, but"),
        ("optim/radam.py", "from .. import trainer", "imports hf_radam.trainer, but optim may import ["),
        ("training_args.py", "from hf_radam.trainer import RAdamTrainer", "but training_args may import ["),
        ("novelty.py", "import math", "novelty is not in the import table"),
        ("checkpoints/novelty.py", "import math", "checkpoints.novelty is not in the import table"),
        ("checkpoints/storage.py", "from hf_radam.checkpoints import runs", "but checkpoints.storage may import no"),
    ],
)
def test_the_check_can_fail(tmp_path, file, source, reason):
    path = tmp_path / "hf_radam" / file
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    (message,) = violations(tmp_path / "hf_radam", TABLE)
    assert message.startswith(file) and reason in message


def test_what_the_table_allows_passes(tmp_path):
    allowed = {
        "__init__.py": "from hf_radam.trainer import RAdamTrainer",
        "schedules.py": "import math\nfrom collections.abc import Sequence",
        "optim/__init__.py": "from hf_radam.optim.radam import RAdam\nfrom .radam import RAdam",
        "optim/radam.py": "import torch.optim\nfrom schedulefree import RAdamScheduleFree",
        "trainer.py": "from transformers import Trainer\nfrom .averaging import WeightAverage",
    }
    for file, source in allowed.items():
        path = tmp_path / "hf_radam" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    assert violations(tmp_path / "hf_radam", TABLE) == []


def test_the_measurement_can_fail():
    assert "numpy" in loaded_by("import numpy")
