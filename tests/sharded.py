"""FSDP2 on two CPU processes: a script that the tests launch; leaves a sharded checkpoint in the folder given."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from inputs import tiny_model, tokens
from runs import end_group
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling_xlstm import XLSTMCache, XLSTMForCausalLM

STEPS, T = 3, 8


def train(model: XLSTMForCausalLM, ids: Tensor, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Carried segments by plain gradient descent on this rank's rows; the losses of the steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    cache, losses = XLSTMCache(model.config), []
    for segment in ids[rank::world].split(T, 1):
        loss = model(segment, labels=segment, past_key_values=cache).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        cache.detach_()
        losses.append(loss.detach())
    return losses


def setting() -> tuple[XLSTMForCausalLM, Tensor]:
    """The model and the rows of all ranks, the same in every process."""
    torch.manual_seed(0)
    return tiny_model(XLSTMForCausalLM, "large").train(), tokens(4, STEPS * T)


def main() -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, ids = setting()
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, ids, dist.get_rank(), dist.get_world_size())
    dcp.save(get_model_state_dict(model), checkpoint_id=sys.argv[1])
    end_group()


if __name__ == "__main__":
    main()
