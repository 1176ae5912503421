"""A time limit ends what hangs or spins, and nothing that works slowly. Oracle: exit codes."""

import subprocess
import sys

import limits
import pytest

WORK = "import time; end = time.process_time() + 0.6\nwhile time.process_time() < end: sum(range(1000))"
SLOW = "import time\nfor _ in range(5): sum(range(1_000_000)); time.sleep(0.2)"  # works a small part of the time
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLOW!r}])"


@pytest.mark.parametrize("code", [WORK, CHILD], ids=["work", "slow child"])
def test_what_works_may_take_longer_than_the_limit(code):
    assert limits.run([sys.executable, "-c", code], seconds=0.5).returncode == 0


@pytest.mark.parametrize("code", ["import time; time.sleep(3600)", "while True: pass"], ids=["hangs", "spins"])
def test_what_hangs_or_spins_is_ended(code):
    with pytest.raises(subprocess.TimeoutExpired):
        limits.run([sys.executable, "-uc", f"print('before')\n{code}"], seconds=0.1)
