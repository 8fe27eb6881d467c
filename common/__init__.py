"""The parts that all methods and all models share."""

import atexit
import gc
import logging
import os
import warnings

# The libraries make half a million objects that stay. By Python's own settings (700 new ones) the collector looks at
# them again and again while they are imported, and once more at the end: 1.2 and 1.3 CPU seconds of each process.
gc.set_threshold(50_000)
atexit.register(gc.freeze)
# bitsandbytes hands a function to torch.compile at import, which would load the compiler: a third of every start.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# cuDNN's attention plans 0.1 s and more for each new length: rows of varied lengths trained at a third of the speed.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
# Blocks that grow leave smaller gaps: 14.02 instead of 14.31 GB were reserved for 13.93. The second name is the older.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# oneDNN (models/products.py) keeps memory for each shape of the last 1,024 products, and rows of varied lengths have
# many shapes: 1 GB more after 200 lengths. The second cache is that of PyTorch's calls to it.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "8")
# bitsandbytes reports a missing CPU kernel at import, and LLM.int8() its fp16 in every layer and step.
for _module in ("autograd._functions", "backends.cpu.ops"):
    logging.getLogger(f"bitsandbytes.{_module}").setLevel(logging.ERROR)
# Accelerate imports DeepSpeed wherever it is installed, and DeepSpeed then reports a missing GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# The Trainer pins no memory on a CPU, and advises to do so.
logging.getLogger("transformers.trainer").addFilter(lambda record: "`non_blocking`" not in record.getMessage())
# transformers prints a table of missing and unknown weights, which we name in one sentence.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())
# ZeRO-3 waits for all processes without naming the device, which is this process's own.
warnings.filterwarnings("ignore", message=".*using the device under current context.*")
# DeepSpeed and Accelerate call collective operations by their names before torch 2.13.
warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning)
