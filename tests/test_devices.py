"""No device is assumed: whatever accelerator torch finds is used, or the CPU."""

import re

from conftest import ROOT

HARD_CODED = re.compile(r"""\.cuda\(|\btorch\.cuda\b|["']cuda|["']nccl|\bCUDA_""")
ALLOWED = {
    # Of NVIDIA's alone one can ask whether it computes bfloat16 itself or emulates it.
    ("engines.py", 'emulated = device.type == "cuda" and not module.is_bf16_supported(including_emulation=False)'),
    # The variable that says which GPUs a process sees.
    ("launcher.py", 'visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")'),
    ("launcher.py", 'return os.environ | {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0]}'),
    (
        "finetune.py",
        'f"or with torchrun --nproc_per_node {args.n_gpu}, or choose one GPU with CUDA_VISIBLE_DEVICES=0."',
    ),
}


def test_no_line_names_a_kind_of_device():
    files = [file for folder in ("common", "lora", "ptuning", "full") for file in (ROOT / folder).rglob("*.py")]
    found = {
        (file.name, line.strip())
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if HARD_CODED.search(line)
    }
    assert found - ALLOWED == set()
    assert ALLOWED - found == set()  # what is gone need not be allowed


def test_what_is_looked_for_is_found():
    for line in ("x.cuda()", "torch.cuda.synchronize()", 'x.to("cuda")', "device='cuda:0'", 'backend="nccl"'):
        assert HARD_CODED.search(line)
