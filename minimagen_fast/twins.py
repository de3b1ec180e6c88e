"""Copies of a U-Net that lie in its memory."""

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .Unet import Unet


def twin_of(unet: "Unet", parameters: Iterable[torch.Tensor] | None = None) -> "Unet":
    """The same U-Net with other parameters, which have the same values; the buffers are its own.

    Args:
        unet: The U-Net.
        parameters: What it has for parameters, in their order; if not given, new ones in the memory of the old. What
            autograd knows of the U-Net's own is not met there: hooks, and the stream of a CUDA device in which their
            gradients were last accumulated.

    Raises:
        RuntimeError: if someone gave it an attribute that cannot be copied, such as an open file.
    """
    if parameters is None:
        parameters = [nn.Parameter(own.detach(), own.requires_grad) for own in unet.parameters()]
    memo: dict[int, object] = {id(value): value for value in unet.buffers()}
    memo |= {id(own): other for own, other in zip(unet.parameters(), parameters, strict=True)}
    try:
        return copy.deepcopy(unet, memo)
    except Exception as error:  # Theirs may raise anything.
        raise RuntimeError(f"the U-Net has an attribute that cannot be copied ({error})") from error
