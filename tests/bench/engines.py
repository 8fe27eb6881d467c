"""Every engine with every method on two processes, compared with one process: losses, resuming, what was saved.

    python tests/bench/engines.py [--engines ZeRO-3 FSDP2] [--methods full]

For each pair: the largest difference of the losses of four steps to one process with the same rows a step; that of the
live model's logits to those of what was saved; the losses again after an interruption at step 2, in as many processes
and, where the engine can, in one; ROUGE-L of what was saved.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from engine_runs import ENGINES, METHODS, interrupt, losses, reload_difference, run, score_of, train
from rich.table import Table

from common.terminal import console


def difference(ours: list[float], theirs: list[float]) -> str:
    return f"{max(abs(a - b) for a, b in zip(ours, theirs, strict=True)):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    table = Table(title="two processes beside one: differences of the losses", title_justify="left")
    for column in ("method", "engine", "trained", "saved", "resumed", "resumed by one", "ROUGE-L, one", "ROUGE-L"):
        table.add_column(column)
    for method in args.methods:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            expected = train(method, "DDP", folder / "one", processes=1)
            score = score_of(method, folder / "one", folder / "one-scores")["predict_rouge-l"]
            for engine in args.engines:
                output = folder / engine
                row = [method, engine, difference(train(method, engine, output), expected)]
                row.append(f"{reload_difference(method, output):.1e}")
                row_score = score_of(method, output, folder / f"{engine}-scores")["predict_rouge-l"]
                interrupt(output)
                row.append(difference(train(method, engine, output), expected))
                interrupt(output)
                _, said = run(method, engine, output, processes=1)
                lines = [line for line in said.splitlines() if line.startswith("error: ")]
                row.append("refused" if lines else difference(losses(output), expected))
                table.add_row(*row, f"{score:.2f}", f"{row_score:.2f}")
                console().print("  ".join(row), *lines[:1])
    console().print(table)


if __name__ == "__main__":
    main()
