"""One process of two that ends right after both have gathered tensors, and hardly lets other threads run before."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from runs import end_group

HELD: list[object] = []  # until the process has ended


def main() -> None:
    sys.setswitchinterval(100)  # seconds
    dist.init_process_group("gloo")
    HELD.append(dist.group.WORLD)
    for _ in range(20):
        dist.all_gather([torch.empty(1000) for _ in range(2)], torch.ones(1000))
    end_group()


if __name__ == "__main__":
    main()
