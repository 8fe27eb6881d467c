"""The parts that all methods and all models share."""

import logging
import os
import warnings

# bitsandbytes hands a function to torch.compile at import, which would load the compiler: a third of every start.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# bitsandbytes reports a missing CPU kernel at import, and LLM.int8() its fp16 in every layer and step.
for _module in ("autograd._functions", "backends.cpu.ops"):
    logging.getLogger(f"bitsandbytes.{_module}").setLevel(logging.ERROR)
# Accelerate imports DeepSpeed wherever it is installed, and DeepSpeed then reports a missing GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# transformers prints a table of missing and unknown weights, which we name in one sentence.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
# ZeRO-3 waits for all processes without naming the device, which is this process's own.
warnings.filterwarnings("ignore", message=".*using the device under current context.*")
# DeepSpeed and Accelerate call collective operations by their names before torch 2.13.
warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning)
