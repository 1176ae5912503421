"""Bytes per parameter and process that training with RAdam and an average takes, measured on CPUs with two processes.

    python benchmarks/memory.py [--bf16]

Each launch file trains two models whose sizes differ; the difference of their resident memory, divided by the
difference of their sizes, is free of what a process takes anyway. Measured at the largest point of an update, and after
it. The shim in `tests/processes/shim` stands in for the GPUs of FSDP2 and DeepSpeed.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (4, 20)  # 3.2 million parameters each
BACKENDS = {"one_process": "", "ddp": "", "fsdp2": "fsdp", "zero1": "deepspeed", "zero2": "deepspeed"}
BACKENDS["zero3"] = "deepspeed"


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def worker(layers: int, output_dir: str, *flags: str) -> None:
    """Train a model and print its size, the largest and the last resident memory."""
    import torch
    from accelerate import PartialState
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from hf_radam import RAdamTrainer, RAdamTrainingArguments

    torch.set_num_threads(1)
    arguments = RAdamTrainingArguments(
        output_dir,
        max_steps=4,
        per_device_train_batch_size=1,
        optim="radam",
        ewa=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu="use_cpu" in flags,
        bf16="bf16" in flags,
        ddp_find_unused_parameters=False,
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    )
    size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    seen = {"largest": 0, "last": 0}
    watching = threading.Event()

    def watch() -> None:
        while True:
            watching.wait()
            seen["largest"] = max(seen["largest"], resident())
            time.sleep(0.0005)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= 2:  # the optimizer's state and the average are there
                watching.set()

        def on_step_end(self, args, state, control, **kwargs):
            watching.clear()
            seen["last"] = resident()

    threading.Thread(target=watch, daemon=True).start()
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 64
    RAdamTrainer(model, arguments, train_dataset=rows, callbacks=[Watch()]).train()
    if PartialState().is_main_process:
        print("MEASURED", json.dumps({"size": size} | seen), flush=True)
    del model
    PartialState().destroy_process_group()


def measure(file: str, layers: int, flags: list[str]) -> dict[str, int]:
    """Launch one training."""
    backend = BACKENDS[file]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "processes" / "shim")]),
        "CPU_BACKEND": backend,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back at once
    }
    with tempfile.TemporaryDirectory() as folder:
        command = ["--config_file", str(ROOT / f"configs/accelerate/{file}.yaml"), "--main_process_port", "0"]
        command += [__file__, "--worker", str(layers), folder, *flags, *([] if backend else ["use_cpu"])]
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *command],
            env=environment,
            capture_output=True,
            text=True,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("MEASURED "))


def main() -> None:
    """Measure every launch file and print a table."""
    flags = [flag.removeprefix("--") for flag in sys.argv[1:]]
    print("bytes per parameter and process | at the largest | after an update")
    for file in BACKENDS:
        small, large = (measure(file, layers, flags) for layers in LAYERS)
        more = large["size"] - small["size"]
        print(file, *(round((large[when] - small[when]) / more, 1) for when in ("largest", "last")), sep=" | ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), *sys.argv[3:])
    else:
        main()
