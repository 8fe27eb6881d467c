"""Train both shipped demos by every method and print the table of the README.

    python tests/bench/demo_table.py

Runs `bash METHOD/train.sh` as a user does, into a folder that is deleted afterwards; about two minutes each.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"demo": "ChatGLM-6B demo", "demo3": "ChatGLM3-6B demo"}
METHODS = {"ptuning": "P-Tuning v2", "lora": "LoRA", "full": "all weights"}
SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def train(method: str, model: str, folder: Path) -> tuple[dict, dict]:
    """(training results, scores of base and tuned model)."""
    environment = os.environ | {"MODEL": model, "OUTPUT_DIR": str(folder), "EVAL_STEPS": "0"}
    print(f"MODEL={model} bash {method}/train.sh", file=sys.stderr, flush=True)
    subprocess.run(["bash", str(ROOT / method / "train.sh")], env=environment, check=True, stdout=subprocess.DEVNULL)
    results = [json.loads((folder / f"{name}_results.json").read_text()) for name in ("train", "predict")]
    return results[0], results[1]


def row(name: str, scores: dict, kind: str, trainable: int, minutes: str) -> str:
    cells = [f"{scores[f'predict_{kind}{score}']:.2f}" for score in SCORES]
    return " | ".join(["| " + name, *cells, f"{trainable:,}", minutes]) + " |"


def main() -> None:
    print("| | ROUGE-1 | ROUGE-2 | ROUGE-L | BLEU-4 | trainable parameters | minutes |\n|---|" + "---:|" * 6)
    for model, model_name in MODELS.items():
        for method, method_name in METHODS.items():
            with tempfile.TemporaryDirectory() as folder:
                training, scores = train(method, model, Path(folder))
            if method == "ptuning":
                print(row(f"{model_name}, as it is", scores, "base_", 0, ""))
            minutes = f"{training['train_runtime'] / 60:.1f}"
            print(
                row(f"{model_name}, {method_name}", scores, "", training["trainable_parameters"], minutes), flush=True
            )


if __name__ == "__main__":
    main()
