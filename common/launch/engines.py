"""The start of the engine: joins the processes of a training under DDP, DeepSpeed's ZeRO or FSDP2.

Accelerate chooses the device and the collective backend; only DeepSpeed on CPUs needs its backend named here.
"""

import os
import platform
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, patch_environment
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from common.arguments import TrainingArguments
from common.errors import UserError
from common.locking import cache_folder, free_port, guard


def start_engine(args: TrainingArguments) -> torch.device:
    """Joins the processes that a launcher started and sets up the device of this one, which is returned.

    A dry run joins nothing: it checks the input alone. Raises UserError if the engine can't run on these devices.
    """
    engine = args.engine.name
    if args.do_train:  # the launcher holds it back from programs that nothing is lost with
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    if engine == "DeepSpeed" and args.use_cpu and torch.accelerator.is_available():
        raise UserError(
            "--use_cpu: DeepSpeed takes the GPUs that it sees; hide them with CUDA_VISIBLE_DEVICES= instead."
        )
    planned = args.plan and "DEVICE_MEMORY" in os.environ  # for cards elsewhere
    if engine == "FSDP2" and args.use_cpu and not planned and "ACCELERATE_TORCH_DEVICE" not in os.environ:
        raise UserError("--fsdp needs GPUs, and none is visible here; --deepspeed works on CPUs too.")
    if args.dry_run:
        return args.device
    if engine != "DDP" and "LOCAL_RANK" not in os.environ:  # no launcher: this process is the only one
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= alone | {"MASTER_PORT": str(free_port())}
    if "LOCAL_RANK" in os.environ:  # before transformers joins, which would choose another backend on a CPU
        timeout, backend = timedelta(seconds=args.ddp_timeout), args.ddp_backend
        if engine == "DeepSpeed":
            guard_compilation(args.use_cpu)
            with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
                PartialState(backend="gloo" if args.use_cpu else backend, timeout=timeout)
        elif engine == "FSDP2":  # it moves tensors on the CPU too, for saving and offloading
            with patch_environment(ACCELERATE_USE_FSDP="true", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT"):
                PartialState(backend=backend, timeout=timeout)
        else:
            PartialState(cpu=args.use_cpu, backend=backend, timeout=timeout)
        args.accelerator_config.use_configured_state = True
    device = args.device  # the first access: transformers now looks for the process group
    if engine == "DeepSpeed":  # transformers would do this while it parses, when no process has joined
        args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.engine.config)
        args.hf_deepspeed_config.trainer_config_process(args)
        args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)
    return device


def guard_compilation(on_cpu: bool) -> None:
    """Makes DeepSpeed compile its extensions in our folder and in one job at a time; the others wait.

    Raises UserError while it compiles if nvcc is needed and missing. The lock of torch is a file that a killed process
    leaves behind for ever; the holder of our lock may remove it.
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.builder import MissingCUDAException, OpBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    if on_cpu:  # it would compile, for a minute, an extension that only inference calls
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    kind = f"python{platform.python_version()}-torch{torch.__version__}-{platform.machine()}"
    own = cache_folder() / "extensions" / kind
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own)))
    folder.mkdir(parents=True, exist_ok=True)
    compile_or_load = OpBuilder.jit_load

    def guarded(self: OpBuilder, verbose: bool = True) -> Any:
        with guard("compiled extensions", folder):
            for left_behind in own.glob("**/lock"):
                left_behind.unlink()
            try:
                return compile_or_load(self, verbose=False)
            except MissingCUDAException as error:
                raise UserError(
                    f"DeepSpeed's {self.name} is compiled by nvcc, which is not here ({error}): install the toolkit "
                    "and set CUDA_HOME, or give the --deepspeed file no optimizer, or torch_adam in its params."
                ) from error

    OpBuilder.jit_load = guarded


def sizes(model: PreTrainedModel, args: TrainingArguments) -> tuple[int, int]:
    """(parameters, trained parameters) of the whole model; ZeRO-3 leaves only a shard of them in every process."""
    if args.engine.name != "DeepSpeed" or not args.engine.sharded:
        return model.num_parameters(), model.num_parameters(only_trainable=True)
    counted = [(vars(each).get("ds_numel", each.numel()), each.requires_grad) for each in model.parameters()]
    return sum(size for size, _ in counted), sum(size for size, trained in counted if trained)
