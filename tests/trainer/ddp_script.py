"""Train, evaluate, save and resume, and write what this process sees; `test_ddp.py` runs it under torchrun."""

import json
import sys
from pathlib import Path

import tiny
import torch


def main(folder: Path, options: dict) -> None:
    options |= {"eval_strategy": "steps", "eval_steps": 6, "save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    trainer = tiny.trainer(folder / "whole", tiny.llama(attention_dropout=0.0), **options)
    trainer.train()
    weights, loss = tiny.parameters(trainer.model), trainer.evaluate()["eval_loss"]
    trainer.save_model()
    resumed = tiny.trainer(folder / "resumed", tiny.llama(attention_dropout=0.0), **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-6"))
    facts = {
        "world_size": trainer.args.world_size,
        "loss": loss,
        "sum": sum(float(p.double().sum()) for p in weights.values()),
        "resumed is the same": tiny.same(weights, tiny.parameters(resumed.model)),
        "resumed loss": resumed.evaluate()["eval_loss"],
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
