"""Let FSDP2 and DeepSpeed run on CPU processes over gloo; for tests only, and only where `CPU_BACKEND` asks for it.

Put this folder on `PYTHONPATH`: Python imports a module of this name when it starts, so that a command that is meant
for GPUs runs as it is written. A process that is started otherwise calls `pretend`. Without it accelerate takes
processes on CPUs for DDP, whatever the launch file says, and FSDP is ignored without a word. Seen with accelerate 1.15;
it changes which back-end is believed to be there, and nothing of what is computed.
"""

import os


def pretend(backend: str) -> None:
    """Have accelerate believe that this process has an accelerator that FSDP or DeepSpeed can drive.

    Args:
        backend: ``"fsdp"`` or ``"deepspeed"``.
    """
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    import torch.distributed as dist
    import transformers.training_args as training_args
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare_backend(self, cpu=False, sagemaker_dp=False, wanted=None):
        if backend == "fsdp" and not dist.is_initialized():
            dist.init_process_group("gloo")
        return "gloo", DistributedType.MULTI_XPU  # one of those that accelerate turns into FSDP or DeepSpeed

    PartialState._prepare_backend = prepare_backend
    training_args.is_torch_bf16_gpu_available = lambda: True  # bf16 without use_cpu
    if backend == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import importlib

        # A kernel for inference only, which would be compiled (a minute) by the first process that trains. By this way,
        # because the name in the package is that of torch itself.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None


if os.environ.get("CPU_BACKEND") and "LOCAL_RANK" in os.environ:
    pretend(os.environ["CPU_BACKEND"])
