# The environment in one layer, the sources in the next. See "Docker" in common/README.md.
#     docker build --tag chatglm-tuning .                                        for the CPU
#     docker build --build-arg TORCH_INDEX=cu130 --tag chatglm-tuning:cu130 .    for NVIDIA GPUs
FROM python:3.11-slim-bookworm

# DeepSpeed and Triton compile parts of themselves.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt requirements-web.txt requirements-export.txt ./
COPY common/launch/environment.py common/launch/
# The build of PyTorch: cpu, cu126, cu130, or the address of a mirror that ends in such a word.
ARG TORCH_INDEX=cpu
RUN PIP_NO_CACHE_DIR=1 \
    python3 common/launch/environment.py requirements.txt requirements-web.txt requirements-export.txt

# The user may write models, caches and outputs, and nothing else.
ENV HF_HOME=/cache/huggingface CHATGLM_CACHE=/cache/chatglm-tuning
RUN useradd --uid 1000 --create-home chatglm \
    && install -d -o chatglm -g chatglm /cache ptuning/output lora/output full/output
COPY . .
USER 1000
VOLUME ["/cache", "/app/ptuning/output", "/app/lora/output", "/app/full/output"]
CMD ["bash", "ptuning/train.sh"]
