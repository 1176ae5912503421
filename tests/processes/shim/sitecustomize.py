"""Let FSDP2 and DeepSpeed run on CPU processes over gloo; for tests only, and only where `CPU_BACKEND` asks for it.

Put this folder on `PYTHONPATH`: Python imports a module of this name when it starts, so that a command that is meant
for GPUs runs as it is written. Without it accelerate takes processes on CPUs for DDP, whatever the launch file says,
and FSDP is ignored without a word. Seen with accelerate 1.15; it changes which back-end is believed to be there, and
nothing of what is computed.
"""

import os

BACKEND = os.environ.get("CPU_BACKEND")

if BACKEND and "LOCAL_RANK" in os.environ:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if BACKEND == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import datetime

    import torch.distributed as dist
    import transformers.training_args as training_args
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    LIMIT = datetime.timedelta(seconds=int(os.environ.get("CPU_BACKEND_TIMEOUT", "120")))

    def _prepare_backend(self, cpu=False, sagemaker_dp=False, backend=None):
        if BACKEND == "fsdp" and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=LIMIT)
        return "gloo", DistributedType.MULTI_XPU  # one of those that accelerate turns into FSDP or DeepSpeed

    PartialState._prepare_backend = _prepare_backend
    training_args.is_torch_bf16_gpu_available = lambda: True  # bf16 without use_cpu
