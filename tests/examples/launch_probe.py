"""`run_clm.py` once for each run in `PROBE_RUNS`, but each process writes down the blocks that it trains on.

`PROBE_RUNS` is a JSON list of command lines. Next to the output of each run stands, per process, the blocks of each
step, and whether the back-end shards.
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
        """Note the blocks."""
        self.blocks.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)

    def save_state(self):
        """Write down what was noted, at the end of the training."""
        super().save_state()
        kind = type(next(self.model.parameters())).__name__
        seen = {"blocks": self.blocks, "deepspeed": self.is_deepspeed_enabled, "kind": kind}
        Path(f"{self.args.output_dir}-seen-{self.args.process_index}.json").write_text(json.dumps(seen))


run_clm.RAdamTrainer = Recording
*first, last = json.loads(os.environ["PROBE_RUNS"])
for arguments in first:
    sys.argv[1:] = arguments
    run_clm.run()
sys.argv[1:] = last
run_clm.main()
