"""Merge a LoRA adapter into its base model and write a full checkpoint in the original format.

python common/merge.py --lora_checkpoint FOLDER --output_dir FOLDER [--model_name_or_path BASE]
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.encoding import encode_chat
from common.errors import UserError, exit_on_user_error
from common.files import clear, written
from common.loading import find_trained, load_model, load_tokenizer
from common.manifest import flush
from common.methods.lora import adapter_config
from common.models.registry import ModelFolder, fetch_weights, open_model
from common.trained import find_training
from common.training.checkpoints import check_space, check_writable

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SAMPLE = "你好，请介绍一下你自己。"
TOLERANCE = 1e-3  # of float32 logits: adding up in another order changes the last digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora_checkpoint", required=True, help="folder of the adapter, or of several: the newest one")
    parser.add_argument("--model_name_or_path", help="the base; default: the one that the adapter names")
    parser.add_argument("--output_dir", type=Path, help="a new folder; default: merged, inside the adapter's folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the merged weights")
    parser.add_argument("--max_shard_size", default="2GB", help="size of the weight files")
    args = parser.parse_args()

    checkpoint = find_training(args.lora_checkpoint)
    adapter_config(checkpoint)
    base, adapter = find_trained(str(checkpoint), args.model_name_or_path)
    output_dir = args.output_dir or checkpoint / "merged"
    folder = fetch_weights(open_model(base))
    if folder.bits:
        raise UserError(
            f"{folder.path} holds quantized weights, into which nothing can be added: merge into the 16-bit base."
        )
    size = sum(file.stat().st_size for file in folder.weights)
    with new_folder(output_dir, size * (2 if args.dtype == "float32" else 1)) as partial:
        difference = merge(folder, adapter, DTYPES[args.dtype], args.max_shard_size, partial)
    print(f"merged {checkpoint} into {base} (logits within {difference:.1g}): {output_dir}")


@contextmanager
def new_folder(output_dir: Path, size: int) -> Iterator[Path]:
    """A folder that gets the name ``output_dir`` when all is written; what fails leaves nothing behind.

    ``size``: its bytes. Raises UserError if ``output_dir`` holds something, SaveError without room.
    """
    output_dir = output_dir.absolute()
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{output_dir} is a file: choose another --output_dir.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty: choose another --output_dir.")
    partial = output_dir.with_name(f"{output_dir.name}.partial")
    with written(partial, "make room, or choose another --output_dir"):
        clear(partial)  # of a program that was killed
        check_writable(partial)
        check_space(partial, size)
        yield partial
        for file in partial.iterdir():
            flush(file)
        os.replace(partial, output_dir)
    flush(output_dir.parent)


def merge(folder: ModelFolder, adapter: dict[str, Any], dtype: torch.dtype, shard_size: str, output_dir: Path) -> float:
    """Writes the merged model and its tokenizer. Returns the largest difference between both models' logits.

    Raises UserError if that is too large.
    """
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, torch.float32, **adapter)
    sample = torch.tensor([encode_chat(tokenizer, SAMPLE)])
    with torch.no_grad():
        adapted = model(sample).logits
        model = model.merge_and_unload(safe_merge=True)
        difference = (model(sample).logits - adapted).abs().max().item()
    if difference > TOLERANCE:
        raise UserError(f"the merged model's logits differ from the adapter's by {difference:.2g}: nothing was saved.")
    # With the names, the buffers and the float32 norms of the original checkpoints.
    original = model.original_state_dict(dtype) if model.config.model_type == "chatglm" else None
    model.to(dtype).save_pretrained(output_dir, state_dict=original, max_shard_size=shard_size)
    tokenizer.save_pretrained(str(output_dir))
    return difference


if __name__ == "__main__":
    with exit_on_user_error():
        main()
