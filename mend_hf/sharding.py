"""Weights that several processes hold in parts (FSDP2): put together to be used and saved, cut up when loaded.

FSDP2 gathers a layer's weights for the backward pass when the gradient of the layer's output arrives. A prefix of keys
and values leaves a layer by the side, through the cache, and its gradient comes in there, unnoticed. So the weights
stay whole from the forward pass to the end of the backward pass; gradients, optimizer states and, between steps, the
weights are held in parts.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mend_hf.errors import ConfigError


def check_sharding(accelerator: Accelerator, nonfinite_loss: str) -> None:
    """Refuse ways of sharding in which a distiller cannot be trained.

    Raises:
        ConfigError: It is FSDP1, FSDP2 with options that do not go, or DeepSpeed's ZeRO-3.
    """
    fsdp, deepspeed = (getattr(accelerator.state, name, None) for name in ("fsdp_plugin", "deepspeed_plugin"))
    problems = []
    if fsdp is not None and fsdp.fsdp_version != 2:
        problems.append(f"fsdp_version: expected 2, got {fsdp.fsdp_version}")
    if fsdp is not None and fsdp.cpu_ram_efficient_loading:
        problems.append(
            "fsdp_cpu_ram_efficient_loading: expected false, because the state of a distiller leaves the base model "
            "out and other processes could not get it from the first, got true"
        )
    if fsdp is not None and nonfinite_loss == "skip":
        problems.append("nonfinite_loss: expected 'stop', because sharded processes cannot pass over one, got 'skip'")
    if deepspeed is not None:
        check_zero_stage(deepspeed.zero_stage)
    if problems:
        raise ConfigError("The settings of several processes do not go:\n" + "\n".join(f"- {p}" for p in problems))


def check_zero_stage(stage: int) -> None:
    """Refuse DeepSpeed's ZeRO-3, best before a base model is loaded in parts.

    Raises:
        ConfigError: It is on.
    """
    if stage == 3:
        raise ConfigError(
            "Expected zero_stage to be at most 2, got 3: ZeRO-3 gathers weights when a layer's output is used, and a "
            "prefix leaves a layer through the cache. Use FSDP2, which holds weights in parts too."
        )


def gather_whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor; every process has to take part where it is held in parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_whole(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same in every process, into one that may be held in parts."""
    if isinstance(into, DTensor):
        value = distribute_tensor(value.to(into.device, into.dtype), into.device_mesh, into.placements)
    into.copy_(value)


def stay_whole_in_a_step(model: nn.Module) -> None:
    """Let all parts of a model, once gathered, stay so until `cut_up`."""
    for module in _sharded_modules(model):
        module.set_reshard_after_forward(False)
        module.set_reshard_after_backward(False)


def cut_up(model: nn.Module) -> None:
    """Hold a model's weights in parts again: before an optimizer changes the parts, and before they are saved."""
    for module in _sharded_modules(model):
        # Modules that FSDP2 gathers together count as running until all have run: for a text the head does not.
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
        module.set_reshard_after_forward(False, recurse=False)


def fill_gradients(model: nn.Module) -> None:
    """Give zeros to what has no gradient: in the last layer all but keys and values, if these are the prefix.

    torch does not load the states of an optimizer that lack a parameter.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
