"""How a U-Net is trained by several processes: replicated, or sharded over them.

- ``ddp``: every rank holds everything; gradients are averaged while the backward pass runs (Li et al., "PyTorch
  Distributed", 2020).
- ``fsdp``: weights, gradients, averages and optimizer states are sharded over all ranks; the weights of a block are
  gathered when it runs (Rajbhandari et al., "ZeRO", 2019, stage 3; torch's ``fully_shard``).
- ``hybrid``: sharded within a machine, replicated between machines, whose links are slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .Imagen import Imagen
from .ranks import Ranks
from .Unet import Unet

__all__ = ["CHOICES", "TrainedUnet", "full", "shard"]

CHOICES = ("ddp", "fsdp", "hybrid")


def shard(unet: Unet, ranks: Ranks, device: torch.device, how: str, dtype: torch.dtype | None = None) -> None:
    """Shards a U-Net over the ranks, in place: its parameters become DTensors, its state dict keeps its names.

    Call it on every rank, with the same weights, before the optimizer is made.

    Args:
        unet: The U-Net, on `device`.
        ranks: The ranks; more than one process need not be there.
        device: Where this rank trains.
        how: ``fsdp`` or ``hybrid``.
        dtype: What the gathered weights are computed in; their own dtype, if not given. Gradients are reduced in
            float32 in any case.

    Raises:
        ValueError: ``hybrid`` where the ranks are not the same number on each of several machines.
    """
    assert how in ("fsdp", "hybrid")
    mesh = _mesh(ranks, device.type, how)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in _blocks(unet):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(unet, mesh=mesh, mp_policy=policy)


def _mesh(ranks: Ranks, device_type: str, how: str) -> DeviceMesh:
    if how == "fsdp":
        return init_device_mesh(device_type, (ranks.size,))
    machines, rest = divmod(ranks.size, ranks.local_size)
    if rest or machines < 2:
        raise ValueError(
            f"parallel='hybrid' needs the same number of ranks on each of several machines, got {ranks.size} ranks,"
            f" {ranks.local_size} of them on this one: choose 'fsdp' or 'ddp'"
        )
    # With groups of our own: those that torch would make wait half an hour for a rank that is lost.
    mesh = torch.arange(ranks.size).view(machines, ranks.local_size)
    timeout = timedelta(seconds=ranks.timeout)
    groups = [dist.new_subgroups_by_enumeration(members.tolist(), timeout=timeout)[0] for members in (mesh.T, mesh)]
    return DeviceMesh.from_group(groups, device_type, mesh=mesh, mesh_dim_names=("replicate", "shard"))


def _blocks(unet: Unet) -> list[nn.Module]:
    """What the U-Net runs block by block, without what has no parameters."""
    levels = [block for level in (*unet.downs, *unet.ups) for block in level]
    nested = [block for entry in levels for block in (entry if isinstance(entry, nn.ModuleList) else [entry])]
    candidates = [*nested, unet.mid_block1, unet.mid_attn, unet.mid_block2, unet.final_res_block]
    return [block for block in candidates if block is not None and any(True for _ in block.parameters())]


class _Loss(nn.Module):
    """The training loss of one U-Net as a module of that U-Net alone, which is what a wrapper must see."""

    def __init__(self, imagen: Imagen, number: int) -> None:
        super().__init__()
        self.unet = imagen.unets[number - 1]
        self._rest = (imagen,)  # in a tuple: the other U-Nets are not to be trained
        self._number = number

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._rest[0](*args, unet_number=self._number, **kwargs)


class TrainedUnet:
    """One U-Net of an Imagen in training, on one or several ranks.

    Args:
        imagen: The Imagen, on the device of this rank.
        number: Number of the U-Net, from 1.
        ranks: The ranks. If there are several, the U-Net is replicated, unless it has been sharded.

    Attributes:
        exchanges: Whether gradients that were only gathered have to be exchanged later; also of a U-Net that is sharded
            over one rank.
    """

    def __init__(self, imagen: Imagen, number: int, ranks: Ranks) -> None:
        self.number = number
        self.unet = imagen.unets[number - 1]
        self.sharded = isinstance(self.unet, FSDPModule)
        self._module: nn.Module = _Loss(imagen, number)
        self._replicated = ranks.size > 1 and not self.sharded
        self.exchanges = self._replicated or self.sharded
        if self._replicated:
            on_device = imagen.device.type == "cuda"
            self._module = DistributedDataParallel(
                self._module,
                device_ids=[imagen.device] if on_device else None,
                gradient_as_bucket_view=True,
            )

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """What the Imagen's forward gives for this U-Net, followed by the exchange of gradients in its backward."""
        return self._module(*args, **kwargs)

    @contextmanager
    def exchanging(self, wanted: bool) -> Iterator[None]:
        """Within the block gradients are averaged over the ranks, or, not `wanted`, only gathered for a later one."""
        if self._replicated and not wanted:
            assert isinstance(self._module, DistributedDataParallel)
            with self._module.no_sync():
                yield
            return
        if self.sharded:
            assert isinstance(self.unet, FSDPModule)
            self.unet.set_requires_gradient_sync(wanted)
        yield


def full(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all ranks must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value
