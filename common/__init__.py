"""What all methods and all generations of models share."""

import logging

# transformers imports PEFT and that bitsandbytes, which on some CPUs misses a kernel that few will ever use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Accelerate imports DeepSpeed wherever it is installed, which then reports that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
