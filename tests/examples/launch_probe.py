"""`run_clm.py` as it is, but each process writes down what it trains on; for `test_launching.py`.

`PROBE_FOLDER` is where to, one file for each process: for each update the blocks, and after the last whether the
back-end shards. `PROBE_FAIL="1:2"` makes process 1 fail in its second update.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_clm  # noqa: E402


class Recording(run_clm.RAdamTrainer):
    """Notes the blocks of each update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = []

    def training_step(self, model, inputs, *args, **kwargs):
        """Note the blocks, or fail where that is asked for."""
        self.blocks.append(inputs["input_ids"].tolist())
        if os.environ.get("PROBE_FAIL") == f"{self.args.process_index}:{len(self.blocks)}":
            raise RuntimeError("this process fails")
        return super().training_step(model, inputs, *args, **kwargs)

    def save_state(self):
        """Write down what was noted, at the end of the training."""
        super().save_state()
        seen = {
            "blocks": self.blocks,
            "fsdp": self.is_fsdp_enabled,
            "deepspeed": self.is_deepspeed_enabled,
            "kind": type(next(self.model.parameters())).__name__,
            "optimizer": type(self.optimizer.optimizer).__name__,
            "bars": not run_clm.datasets.are_progress_bars_disabled(),
        }
        Path(os.environ["PROBE_FOLDER"], f"{self.args.process_index}.json").write_text(json.dumps(seen))


run_clm.RAdamTrainer = Recording
run_clm.main()
