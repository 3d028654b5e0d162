"""What training OpenVLA-7B keeps on a card whatever the batch, from the shapes of the official checkpoint.

    python -m tests.bench.memory_7b [--rank 32] [--language-model]

Activations, the CUDA context (0.5 GiB and more) and what the allocator holds are not in it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SHAPES = Path(__file__).parent.parent / "data/state_dict_keys_7b.json"
GIB = 2**30


def bytes_of_base(shapes: dict[str, list[int]], quantization: str = "none") -> int:
    """bfloat16; with nf4, the language model's layers as vla_rl.model.quantization packs them.

    Half a byte a weight, one byte a block of 64, four bytes each 256 blocks; the tables and offsets (1 kB a layer) too.
    """
    total = 0
    for name, shape in shapes.items():
        count = size(shape)
        if quantization == "nf4" and name.startswith("language_model.model.layers.") and len(shape) == 2:
            blocks = -(-count // 64)
            total += count // 2 + blocks + 4 * -(-blocks // 256) + 4 * 256 + 4 * 16 + 4
        else:
            total += 2 * count
    return total


def count_of_adapters(shapes: dict[str, list[int]], rank: int, language_model_only: bool = False) -> int:
    """Numbers in A [rank, in] and B [out, rank] of each adapted layer (vla_rl.model.prismatic, adaptable_linears).

    Of the vision towers the last blocks are not used, nor is SigLIP's pooling.
    """
    blocks = {"featurizer": 0, "fused_featurizer": 0}
    for name in shapes:
        if ".blocks." in name:
            tower, number = name.split(".")[1], int(name.split(".blocks.")[1].split(".")[0])
            blocks[tower] = max(blocks[tower], number)
    unused = tuple(f"vision_backbone.{tower}.blocks.{last}." for tower, last in blocks.items())
    linears = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and not name.startswith(unused)
        and "attn_pool" not in name
        and "embed" not in name
        and "lm_head" not in name
        and (name.startswith("language_model.") or not language_model_only)
    ]
    return sum(rank * (rows + columns) for rows, columns in linears)


def size(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--language-model", action="store_true", help="adapters there only")
    args = parser.parse_args()
    shapes = json.loads(SHAPES.read_text())["openvla"]
    adapters = 4 * count_of_adapters(shapes, args.rank, args.language_model)
    print("| base | weights | adapters | gradients | AdamW | together |\n|---|---|---|---|---|---|")
    for quantization in ("none", "nf4"):
        base = bytes_of_base(shapes, quantization)
        parts = [base, adapters, adapters, 2 * adapters, base + 4 * adapters]
        name = "bfloat16" if quantization == "none" else quantization
        print(f"| {name} | {' | '.join(f'{part / GIB:.2f} GiB' for part in parts)} |")


if __name__ == "__main__":
    main()
