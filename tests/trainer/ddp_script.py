"""Train, evaluate, save, resume and extend, and write what this process sees; `test_ddp.py` runs it under torchrun."""

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
    # A constant rate from its last checkpoint in place, WSD from before its decay.
    more = options | {"max_steps": 18}
    source = {"extend_from": str(folder / "whole")} if options.get("lr_scheduler_type") == "wsd" else {}
    place = "longer" if source else "whole"
    longer = tiny.trainer(folder / place, tiny.llama(attention_dropout=0.0), **more, **source)
    longer.train(resume_from_checkpoint=True)
    planned = tiny.trainer(folder / "planned", tiny.llama(attention_dropout=0.0), **more)
    planned.train()
    facts = {
        "longer is the planned": tiny.same(tiny.parameters(longer.model), tiny.parameters(planned.model)),
        "world_size": trainer.args.world_size,
        "loss": loss,
        "sum": sum(float(p.double().sum()) for p in weights.values()),
        "resumed is the same": tiny.same(weights, tiny.parameters(resumed.model)),
        "resumed loss": resumed.evaluate()["eval_loss"],
    }
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(facts))


class AskedOnOneRank(tiny.TrainerCallback):
    """The SIGTERM reaches the last process first."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        managers = [c.jit_manager for c in self.trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
        managers[0].is_checkpoint_requested |= state.global_step == 3 and args.process_index == args.world_size - 1


def stop_all(folder: Path, options: dict) -> None:
    trainer = tiny.trainer(folder, **options, enable_jit_checkpoint=True)
    trainer.add_callback(AskedOnOneRank(trainer))
    trainer.train()
    facts = {"stopped at": trainer.state.global_step, "saved": [p.name for p in folder.glob("checkpoint-*")]}
    (folder / f"rank{trainer.args.process_index}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    (stop_all if sys.argv[3:] == ["stop"] else main)(Path(sys.argv[1]), json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # who leaves first must not cut the other off
        torch.distributed.destroy_process_group()
