"""What sampling keeps with a U-Net from one call to the next: its working copy, and captured steps.

It lives and dies with the U-Net. A copy of the U-Net, and what is read from a file, begin without it.
"""

import threading
from collections import OrderedDict
from typing import Any

import torch

from .Unet import Unet
from .working_copy import WorkingCopy, signature


class Kept:
    """What is kept with one U-Net.

    Attributes:
        graphs: Captured steps, by what they were captured for, the last used at the end.
        lock: Held by whom runs a captured step: its tensors serve one sampling at a time.
    """

    def __init__(self) -> None:
        self._copy: WorkingCopy | None = None
        self._signature: list[tuple] = []
        self.graphs: OrderedDict[tuple, Any] = OrderedDict()
        self.lock = threading.Lock()

    def working_copy(self, unet: Unet, dtype: torch.dtype, memory_format: torch.memory_format) -> Unet:
        """The U-Net with the values that its weights have now, in this dtype and layout: a copy, if it is in others."""
        if unet.dtype == dtype and memory_format == torch.contiguous_format:
            return unet
        if self._copy is not None and self._copy.fits(unet, dtype, memory_format):
            self._copy.refresh()
        else:
            self._copy = WorkingCopy(unet, dtype, memory_format)
        return self._copy.unet

    def forget_graphs_of_other_tensors(self, unet: Unet) -> None:
        """Drop what was captured, if tensors or parts of the U-Net (or of its working copy) are others since."""
        now = signature(unet)
        if now != self._signature:
            self.graphs.clear()
        self._signature = now


def kept_with(unet: Unet) -> Kept:
    """What is kept with a U-Net."""
    return vars(unet).setdefault("_kept", Kept())


def forget(unet: Unet) -> None:
    """Free what is kept with a U-Net."""
    vars(unet).pop("_kept", None)
