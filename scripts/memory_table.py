"""Print the tables of docs/memory.md: what fits on one device, and on several that share it.

python scripts/memory_table.py [--device-gb 141] [--picture-share 0.3]
"""

from __future__ import annotations

import argparse

from tapo_train.learner.memory import (
    Plan,
    head_bytes,
    kept_bytes_per_token,
    longest_trajectory,
    state_bytes,
    working_bytes_per_token,
)
from tapo_train.learner.shape import QWEN3_VL_4B, QWEN3_VL_8B

SHAPES = {"Qwen3-VL-4B": QWEN3_VL_4B, "Qwen3-VL-8B": QWEN3_VL_8B}
PLANS = {
    "1 GPU, ZeRO-2": Plan(),
    "1 GPU, ZeRO-2, no checkpointing": Plan(gradient_checkpointing=False),
    "1 GPU, ZeRO-2, optimizer offloaded": Plan(offload_optimizer=True),
    "1 GPU, the same, frozen tower": Plan(offload_optimizer=True, freeze_vision=True),
    "8 GPUs, ZeRO-2": Plan(num_ranks=8),
    "8 GPUs, ZeRO-3": Plan(num_ranks=8, zero_stage=3),
}

SHARED = {"trained tower": {}, "frozen tower": {"freeze_vision": True}}
WAYS = (1, 2, 4, 8)
GPUS = 8


def shared_table(device_gb: float, picture_share: float) -> list[str]:
    """Longest trajectory with sequence parallelism, ZeRO-3 over all GPUs; a Markdown table."""
    heads = " | ".join(f"{ways} sharing" for ways in WAYS)
    lines = [f"| model | tower | {heads} |", "|---|---|" + "---|" * len(WAYS)]
    for name, shape in SHAPES.items():
        for how, options in SHARED.items():
            plans = [
                Plan(zero_stage=3, num_ranks=GPUS, sequence_parallel=ways, **options)
                for ways in WAYS
            ]
            cells = [
                longest_trajectory(
                    shape, plan, device_bytes=device_gb * 1e9, picture_share=picture_share
                )
                for plan in plans
            ]
            shown = " | ".join(f"{longest // 1000}k" for longest in cells)
            lines.append(f"| {name} | {how} | {shown} |")
    return lines


def table(device_gb: float, picture_share: float) -> list[str]:
    """Lines of a Markdown table."""
    lines = [
        "| model | plan | states GB | head GB | kB per token | longest trajectory |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in SHAPES.items():
        for how, plan in PLANS.items():
            longest = longest_trajectory(
                shape, plan, device_bytes=device_gb * 1e9, picture_share=picture_share
            )
            per_token = kept_bytes_per_token(shape, plan) + working_bytes_per_token(shape, plan)
            fits = f"{longest // 1000}k tokens" if longest else "does not fit"
            lines.append(
                f"| {name} | {how} | {state_bytes(shape, plan) / 1e9:.0f} | "
                f"{head_bytes(shape, plan) / 1e9:.1f} | "
                f"{per_token / 1e3:.0f} | {fits} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device-gb", type=float, default=141.0)
    parser.add_argument("--picture-share", type=float, default=0.3, help="of the tokens")
    arguments = parser.parse_args()
    size = arguments.device_gb, arguments.picture_share
    print("\n".join([*table(*size), "", *shared_table(*size)]))


if __name__ == "__main__":
    main()
