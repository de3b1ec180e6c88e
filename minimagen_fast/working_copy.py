"""A copy of a U-Net in the precision and memory layout in which it is sampled.

Converting weights where they are used would read all of them again in every step. Converting them once would leave a
copy behind that no later change of the model reaches. So the copy stays, and takes over the model's values before
every sampling: the same tensors at the same addresses, to which compiled code and captured graphs may hold on.
"""

import copy
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .kernels.upsample_conv import summed_kernel
from .layers import Block, ChanLayerNorm, LayerNorm, UpsampleConv
from .plain import is_plain

if TYPE_CHECKING:
    from .Unet import Unet


class WorkingCopy:
    """The copy of one U-Net. Tensors that need no conversion it shares with the U-Net.

    Attributes:
        unet: The copy.
    """

    def __init__(self, unet: "Unet", dtype: torch.dtype, memory_format: torch.memory_format):
        self._signature = Signature(unet)
        self._wanted = dtype, memory_format
        exact = {id(value) for module in unet.modules() for value in _exact(module)}
        # Handed to deepcopy as already copied, so that no second set of the weights is ever made in between.
        memo: dict[int, object] = {}
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for source in _tensors(unet):
            wide = id(source) in exact or not source.is_floating_point()
            own = source.detach()
            converted = own.to(
                source.dtype if wide else dtype,
                memory_format=memory_format if source.ndim == 4 else torch.preserve_format,
            )
            if converted is own:
                memo[id(source)] = source
            else:
                self._pairs.append((converted, source))
                is_parameter = isinstance(source, nn.Parameter)
                memo[id(source)] = nn.Parameter(converted, requires_grad=False) if is_parameter else converted
        self.unet: Unet = copy.deepcopy(unet, memo)
        # What belongs to weights of enlargements is worked out once for all steps, too, and of the exact weights.
        self._summed: list[tuple[torch.Tensor, nn.Parameter]] = []
        for part, original in zip(self.unet.modules(), unet.modules(), strict=True):
            if isinstance(part, UpsampleConv) and part.is_one_operation():
                weight: Any = original[1].weight  # type: ignore[index]
                part.summed_kernel = summed_kernel(weight.detach()).to(dtype, memory_format=memory_format)
                self._summed.append((part.summed_kernel, weight))

    def fits(self, unet: "Unet", dtype: torch.dtype, memory_format: torch.memory_format) -> bool:
        """Whether a U-Net still has the tensors and parts of which this is a copy, and it is the one that is wanted."""
        return self._wanted == (dtype, memory_format) and self._signature == Signature(unet)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the values that the U-Net's tensors have now."""
        if self._pairs:
            targets, sources = zip(*self._pairs, strict=True)
            torch._foreach_copy_(targets, sources)
        for kernel, weight in self._summed:
            kernel.copy_(summed_kernel(weight))


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _exact(module: nn.Module) -> list[torch.Tensor]:
    """What a module hands to kernels that compute with it in float32: it is small, and stays as it is.

    A GroupNorm that is called by itself hands it to torch, which on CUDA takes parameters of the images' dtype alone.
    """
    if isinstance(module, Block):
        return _tensors(module.groupnorm) if is_plain(module, Block) and module.fuses_norm() else []
    return _tensors(module) if isinstance(module, LayerNorm | ChanLayerNorm) else []


class Signature:
    """Differs when a tensor is replaced, converted or moved, but not when its values change; and when a part does.

    Parts are compared by their class and their public attributes, such as the ``eps`` of a norm, but not by
    ``training``.
    """

    def __init__(self, module: nn.Module):
        self._values: list[object] = []
        # Held on to: another object may come to lie where one that is gone lay.
        self._objects: list[object] = []
        for part in module.modules():
            # But not to the module itself, with which this may be kept.
            if part is not module:
                self._objects.append(part)
            self._values.append(type(part))
            for name, value in vars(part).items():
                if name != "training" and not name.startswith("_"):
                    self._values.append(name)
                    simple = isinstance(value, bool | int | float | str | None)
                    (self._values if simple else self._objects).append(value)
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is not None:
                    self._objects.append(tensor)
                    self._values += (tensor.dtype, tensor.device, tensor.layout)
                    # Sparse ones have neither.
                    if tensor.layout == torch.strided:
                        self._values += (tensor.data_ptr(), tensor.stride())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Signature)
            and self._values == other._values
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )

    __hash__ = None  # type: ignore[assignment]
