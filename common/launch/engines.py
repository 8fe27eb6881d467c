"""What spreads a training over processes: DDP, DeepSpeed's ZeRO, FSDP2: their files, their demands, their start.

Device and collective backend come from Accelerate. Only on CPUs, where it would run every process for itself, are they
said here.
"""

import json
import os
import platform
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from transformers import PreTrainedModel
from transformers.utils import is_torch_bf16_gpu_available

from common.errors import UserError
from common.locking import cache_folder, free_port, guard

if TYPE_CHECKING:
    from common.arguments import TrainingArguments


def read_config(flag: str, given: str | dict[str, Any] | None) -> dict[str, Any]:
    """What a flag gives as a JSON file or as JSON itself. Raises UserError where it is missing or broken."""
    if not isinstance(given, str):
        return dict(given or {})
    if not given.startswith("{") and not Path(given).is_file():
        raise UserError(f"--{flag}: no file {given}.")
    try:
        config = json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--{flag}: {given} is broken JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"--{flag}: {given} must hold an object, found {type(config).__name__}.")
    return config


def find(config: dict[str, Any], file: str, path: str) -> tuple[dict[str, Any], str]:
    """The section that a dotted name stands in, an empty one where there is none, and the name's last part."""
    *sections, name = path.split(".")
    for section in sections:
        config = config.get(section) or {}
        if not isinstance(config, dict):
            raise UserError(f"{file}: {section} must be an object with settings.")
    return config, name


def deepspeed_config(args: "TrainingArguments") -> dict[str, Any]:
    """A DeepSpeed file, checked against the flags, and completed where it says nothing.

    Raises UserError where it contradicts a flag, naming both.
    """
    config, file = read_config("deepspeed", args.deepspeed), args.deepspeed
    rows = f"--per_device_train_batch_size x --gradient_accumulation_steps x {args.processes} processes"
    agree: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("--per_device_train_batch_size", args.per_device_train_batch_size),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", args.gradient_accumulation_steps),
        "train_batch_size": (rows, args.rows_per_step),
        "gradient_clipping": ("--max_grad_norm", args.max_grad_norm),
        "fp16.enabled": ("--fp16", args.fp16),
        "bf16.enabled": ("--bf16", args.bf16),
        "optimizer.params.lr": ("--learning_rate", args.learning_rate),
        "optimizer.params.betas": ("--adam_beta1, --adam_beta2", [args.adam_beta1, args.adam_beta2]),
        "optimizer.params.eps": ("--adam_epsilon", args.adam_epsilon),
        "optimizer.params.weight_decay": ("--weight_decay", args.weight_decay),
        "scheduler.params.warmup_max_lr": ("--learning_rate", args.learning_rate),
    }
    for path, (flag, value) in agree.items():
        section, name = find(config, file, path)
        stored = section.get(name, "auto")
        if stored not in ("auto", value):
            raise UserError(
                f'{file} says {path} = {json.dumps(stored)}, but {flag} is {value}: change one, or write "auto" there.'
            )
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(name, "auto")
    for name in ("fp16", "bf16"):  # ZeRO-3 would take float32 where nothing is said
        config.setdefault(name, {}).setdefault("enabled", "auto")
    # Trainer's AdamW is in order; and what is saved are the gathered weights, not the shards.
    config["zero_allow_untested_optimizer"] = True
    zero = config.setdefault("zero_optimization", {})
    if zero.setdefault("stage", 0) == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return config


def fsdp_config(args: "TrainingArguments") -> dict[str, Any]:
    """The settings of FSDP2. Raises UserError for FSDP1, and for checkpoints that would hold no model."""
    given = read_config("fsdp_config", args.fsdp_config)
    config = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    if int(config.setdefault("version", 2)) != 2:
        raise UserError("--fsdp_config: version 1 is gone from today's libraries; FSDP2 is version 2.")
    if config.setdefault("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
        raise UserError("--fsdp_config: state_dict_type must be FULL_STATE_DICT, or checkpoints would hold no model.")
    return config


def is_sharded(args: "TrainingArguments") -> bool:
    """Whether every process holds only its part of the weights: ZeRO stage 3, FSDP2."""
    return bool(args.fsdp) or bool(args.deepspeed) and args.deepspeed["zero_optimization"].get("stage") == 3


def offloads(args: "TrainingArguments") -> tuple[bool, bool]:
    """Whether the optimizer's states, and whether the weights, are to lie in the host's memory."""
    if args.fsdp:
        return bool(args.fsdp_config.get("cpu_offload")), bool(args.fsdp_config.get("cpu_offload"))
    zero = args.deepspeed["zero_optimization"] if args.deepspeed else {}
    optimizer, parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
    return optimizer.get("device") == "cpu", parameters.get("device") == "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; else bfloat16, or float16 where the device would emulate it."""
    if device.type == "cpu":
        return torch.float32
    module = torch.get_device_module(device)
    emulated = device.type == "cuda" and not module.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_torch_bf16_gpu_available() and not emulated else torch.float16


def choose_precision(args: "TrainingArguments") -> None:
    """Sets --bf16 and --fp16 as --precision says; under DeepSpeed also where nothing is said."""
    if args.deepspeed and not (args.precision or args.bf16 or args.fp16):
        args.precision = "auto"  # ZeRO-3 would take float32
    if args.precision:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        dtype = compute_dtype(torch.device("cpu") if args.use_cpu else device)
        args.bf16 = args.precision == "bf16" or args.precision == "auto" and dtype == torch.bfloat16
        args.fp16 = args.precision == "fp16" or args.precision == "auto" and dtype == torch.float16


def sizes(model: PreTrainedModel, args: "TrainingArguments") -> tuple[int, int]:
    """(parameters, trained parameters), of which ZeRO-3 leaves only a shard in every process."""
    if args.engine != "DeepSpeed" or not args.sharded:
        return model.num_parameters(), model.num_parameters(only_trainable=True)
    from deepspeed.runtime.zero.partition_parameters import is_zero_param

    counted = [
        (vars(parameter)["ds_numel"] if is_zero_param(parameter) else parameter.numel(), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    return sum(size for size, _ in counted), sum(size for size, trained in counted if trained)


def guard_compilation(on_cpu: bool) -> None:
    """DeepSpeed compiles what it needs when it needs it; here one job does, in our folder, and the others wait.

    torch's own lock there is a file, which a killed process leaves behind for ever; whoever holds ours may remove it.
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    if on_cpu:  # it would compile for a minute what only its inference calls
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
            return compile_or_load(self, verbose=False)

    OpBuilder.jit_load = guarded


def join(args: "TrainingArguments") -> None:
    """Joins the processes that a launcher started, before the Trainer would: on a CPU it would forget the backend."""
    if args.use_cpu and args.deepspeed and torch.accelerator.is_available():
        raise UserError(
            "--use_cpu: DeepSpeed takes the GPUs that it sees; hide them with CUDA_VISIBLE_DEVICES= instead."
        )
    args.use_cpu = on_cpu = args.use_cpu or not torch.accelerator.is_available()
    if (args.deepspeed or args.fsdp) and "LOCAL_RANK" not in os.environ:  # they want to be told that they are alone
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= alone | {"MASTER_PORT": str(free_port())}
    if "LOCAL_RANK" not in os.environ:
        return
    if args.fsdp and on_cpu and "ACCELERATE_TORCH_DEVICE" not in os.environ:
        raise UserError("--fsdp needs GPUs, and none is visible here; --deepspeed works on CPUs too.")
    timeout = timedelta(seconds=args.ddp_timeout)
    if args.deepspeed:
        guard_compilation(on_cpu)
        with patch_environment(ACCELERATE_USE_DEEPSPEED="true"):
            PartialState(backend="gloo" if on_cpu else args.ddp_backend, timeout=timeout)
    elif args.fsdp:  # which moves tensors on the CPU too, for saving and offloading
        with patch_environment(ACCELERATE_USE_FSDP="true", FSDP_STATE_DICT_TYPE="FULL_STATE_DICT"):
            PartialState(backend=args.ddp_backend, timeout=timeout)
    else:
        PartialState(cpu=on_cpu, backend=args.ddp_backend, timeout=timeout)
    args.accelerator_config = read_config("accelerator_config", args.accelerator_config) | {
        "use_configured_state": True
    }
