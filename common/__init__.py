"""What all methods and all generations of models share."""

import logging
import warnings

# transformers imports PEFT and that bitsandbytes, which on some CPUs misses a kernel that few will ever use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Accelerate imports DeepSpeed wherever it is installed, which then reports that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# DeepSpeed and Accelerate call collective operations by the names that they had before torch 2.13.
warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*", category=FutureWarning)
