"""Other parameters for a module, for a while, in the same memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def stand_ins(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """For a block of code a module has other parameters, with the same values and in the same memory.

    What autograd knows of the module's own is not met there: hooks, and the stream in which their gradients were last
    accumulated, which must not wait for a stream whose work is being captured.

    Returns:
        The parameters for the meantime, in the order of ``module.parameters()``.
    """
    places = [
        (part._parameters, name, own)
        for part in module.modules()
        for name, own in part._parameters.items()
        if own is not None
    ]
    others = {own: nn.Parameter(own.detach(), own.requires_grad) for _, _, own in places}
    try:
        for parameters, name, own in places:
            parameters[name] = others[own]
        yield list(others.values())
    finally:
        for parameters, name, own in places:
            parameters[name] = own
