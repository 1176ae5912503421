"""Measure the bytes per parameter and process of training with RAdam and an average, on CPUs with two processes.

    python benchmarks/memory.py [--bf16]

Each launch file trains two models; the difference of their resident memory divided by that of their sizes is free of
what any process takes. The shim in `tests/processes/shim` stands in for the GPUs of FSDP2 and DeepSpeed.
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
    """Train a model and print its size, the peak within a step and the memory after it."""
    import torch
    from accelerate import PartialState
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

    from hf_radam import RAdamTrainer, RAdamTrainingArguments

    torch.set_num_threads(1)
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    options = {"max_steps": 4, "per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
    options |= quiet | dict.fromkeys(flags, True)
    arguments = RAdamTrainingArguments(output_dir, optim="radam", ewa=True, **options)
    sizes = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, num_hidden_layers=layers))
    size = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    seen = {"peak": 0, "after": 0}
    watching = threading.Event()

    def watch() -> None:
        while watching.wait():
            seen["peak"] = max(seen["peak"], resident())
            time.sleep(0.0005)

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step >= 2:  # the optimizer's state and the average exist
                watching.set()

        def on_step_end(self, args, state, control, **kwargs):
            watching.clear()
            seen["after"] = resident()

    threading.Thread(target=watch, daemon=True).start()
    rows = [{"input_ids": list(range(8)), "labels": list(range(8))}] * 64
    RAdamTrainer(model, arguments, train_dataset=rows, callbacks=[Watch()]).train()
    if PartialState().is_main_process:
        print("MEASURED", json.dumps({"size": size} | seen), flush=True)
    PartialState().destroy_process_group()


def measure(file: str, layers: int, flags: list[str]) -> dict[str, int]:
    """Launch one training."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "processes" / "shim")]),
        "CPU_BACKEND": BACKENDS[file],
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory goes back at once
    }
    with tempfile.TemporaryDirectory() as folder:
        command = ["--config_file", str(ROOT / f"configs/accelerate/{file}.yaml"), "--main_process_port", "0"]
        command += [__file__, "--worker", str(layers), folder, *flags, *([] if BACKENDS[file] else ["use_cpu"])]
        command = [sys.executable, "-m", "accelerate.commands.launch", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED")]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("MEASURED "))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(int(sys.argv[2]), *sys.argv[3:])
    else:
        print("bytes per parameter and process | at the peak | after a step")
        for name in BACKENDS:
            small, large = (measure(name, layers, [flag[2:] for flag in sys.argv[1:]]) for layers in LAYERS)
            more = large["size"] - small["size"]
            print(name, *(round((large[when] - small[when]) / more, 1) for when in ("peak", "after")), sep=" | ")
