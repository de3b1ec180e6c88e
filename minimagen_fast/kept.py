"""What is kept with a U-Net from one call to the next: a working copy for sampling, captured steps for both.

It lives and dies with the U-Net. A copy of the U-Net, and what is read from a file, begin without it.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .working_copy import Signature, WorkingCopy

if TYPE_CHECKING:
    from .Unet import Unet


# Attributes of a U-Net.
KEPT = SAMPLING, TRAINING = "_kept", "_kept_by_training"


class InOrder:
    """The order of what writes to the same tensors from several streams of a device."""

    def __init__(self) -> None:
        self._last_use: torch.cuda.Event | None = None

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        """Have what a block of code launches wait for what an earlier one launched in another stream of the device."""
        if device.type != "cuda":
            yield
            return
        if self._last_use is not None:
            torch.cuda.current_stream(device).wait_event(self._last_use)
        try:
            yield
        finally:
            self._last_use = torch.cuda.current_stream(device).record_event()


class KeptGraphs:
    """Captured steps of one U-Net.

    Attributes:
        in_order: Use of the tensors that they read and write.
        graphs: By what they were captured for, the last used at the end.
        lock: Held by whom runs a captured step: its tensors serve one sampling, or one training, at a time.
    """

    def __init__(self) -> None:
        self.in_order = InOrder()
        self.graphs: OrderedDict[tuple, Any] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        # For modules in the place of a U-Net, which hand it on to their copies.
        return type(self), ()


class Kept(KeptGraphs):
    """What sampling keeps with one U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self._copy: WorkingCopy | None = None
        self._graphs_of: tuple = ()
        with _listing:
            _all_kept.add(self)

    def working_copy(self, unet: "Unet", dtype: torch.dtype, memory_format: torch.memory_format) -> "Unet":
        """The U-Net with the values that its weights have now, in this dtype and layout: a copy, if it is in others."""
        if unet.dtype == dtype and memory_format == torch.contiguous_format:
            self._copy = None
            return unet
        # Another thread may want another one meanwhile.
        copy = self._copy
        if copy is not None and copy.fits(unet, dtype, memory_format):
            copy.refresh()
        else:
            # First the old one goes, and the graphs that hold on to it: memory may not suffice for two.
            self._copy = copy = None
            self.forget_graphs()
            self._copy = copy = WorkingCopy(unet, dtype, memory_format)
        return copy.unet

    def forget_graphs_of_others(self, unet: "Unet") -> None:
        """Drop what was captured, unless of this U-Net or working copy, with the tensors and parts that it has now.

        To be called by whom holds the lock.
        """
        # Of a copy, which is remade when the U-Net changes, it is enough to know which it is: no graph outlives it.
        copy = self._copy
        is_copy = copy is not None and copy.unet is unet
        now = (weakref.ref(unet),) if is_copy else (weakref.ref(unet), Signature(unet))
        if now != self._graphs_of:
            self.graphs.clear()
        self._graphs_of = now

    def forget_graphs(self) -> bool:
        """Drop what was captured, unless it is in use: it holds memory that something else may need.

        Returns:
            Whether there was anything to drop.
        """
        if not self.lock.acquire(blocking=False):
            return False
        try:
            had_any = bool(self.graphs)
            self.graphs.clear()
            return had_any
        finally:
            self.lock.release()


# What there is, of all U-Nets; and the lock of whom adds to it or goes through it.
_all_kept: "weakref.WeakSet[Kept]" = weakref.WeakSet()
_listing = threading.Lock()


def forget_idle_graphs() -> bool:
    """Drop what was captured for samplings with any U-Net, unless it is in use, and say whether there was anything."""
    with _listing:
        everywhere = list(_all_kept)
    return any([kept.forget_graphs() for kept in everywhere])


def kept_with(unet: "Unet") -> Kept:
    """What sampling keeps with a U-Net."""
    return vars(unet).setdefault(SAMPLING, Kept())


def forget(unet: "Unet") -> None:
    """Free what sampling keeps with a U-Net."""
    vars(unet).pop(SAMPLING, None)


def forget_training(unet: "Unet") -> None:
    """Free what training keeps with a U-Net."""
    vars(unet).pop(TRAINING, None)


def forget_all(unet: "Unet") -> None:
    """Free what is kept with a U-Net."""
    forget(unet)
    forget_training(unet)
