"""`run_clm.py` once for each run in `PROBE_RUNS`, but each process writes down what it trains on.

`PROBE_RUNS` is a JSON list of command lines. Next to the output of each run stands, per process, the blocks of each
step, and after the last whether the back-end shards. In a run named "failing" process 1 fails in its second step.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_clm  # noqa: E402


class Recording(run_clm.RAdamTrainer):
    """Notes the blocks of each step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = []

    def training_step(self, model, inputs, *args, **kwargs):
        """Note the blocks, or fail where that is asked for."""
        self.blocks.append(inputs["input_ids"].tolist())
        if "failing" in self.args.output_dir and (self.args.process_index, len(self.blocks)) == (1, 2):
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
            "bars": not run_clm.datasets.are_progress_bars_disabled(),
        }
        Path(f"{self.args.output_dir}-seen-{self.args.process_index}.json").write_text(json.dumps(seen))


run_clm.RAdamTrainer = Recording
*first, last = json.loads(os.environ["PROBE_RUNS"])
for arguments in first:
    sys.argv[1:] = arguments
    run_clm.run()
sys.argv[1:] = last
run_clm.main()
