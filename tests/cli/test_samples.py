"""The sample of a schedule in `docs/tools.md` is what the command says.

Oracle: the command itself. Those of the README's first run are held to a run in `tests/examples/test_first_run.py`.
"""

import re
import shlex
from pathlib import Path

from hf_radam import cli

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "tools.md").read_text("utf-8")


def test_the_schedule(capsys, monkeypatch, tmp_path):
    line = re.search(r"^hf-radam (schedule configs/.*)$", DOCUMENT, re.MULTILINE)[1]
    sample = re.search(r"<!-- sample: tests/cli/test_samples.*?```text\n(.*?)```", DOCUMENT, re.DOTALL)[1].splitlines()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line)) == 0
    output = capsys.readouterr().out.splitlines()
    assert len(sample) > 3
    assert [line for line in sample if line not in output] == []
    assert Path("schedule.png").is_file()
