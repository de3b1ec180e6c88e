"""Which implementation of an operation runs: one policy for all of them.

Choices: ``auto`` (the fastest that can do the job), ``reference`` (plain torch, the yardstick of every other one) and
``sdpa`` (torch.nn.functional.scaled_dot_product_attention). The environment variable ``MINIMAGEN_FAST_KERNELS`` sets
the choice at start, :func:`use_implementation` for a block of code, an operation's ``implementation`` argument for one
call.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

CHOICES = ("auto", "reference", "sdpa")
ENVIRONMENT_VARIABLE = "MINIMAGEN_FAST_KERNELS"


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}; got {name!r}")
    return name


_current = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "auto", f"the environment variable {ENVIRONMENT_VARIABLE}")


def implementation(override: str | None = None) -> str:
    """The choice in force: ``override`` if given, else that of the process.

    Raises:
        ValueError: if ``override`` is no known choice.
    """
    return _current if override is None else _checked(override, "implementation")


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Set the choice for a block of code, for all threads of the process.

    Raises:
        ValueError: if ``name`` is no known choice.
    """
    global _current
    before = _current
    _current = _checked(name, "implementation")
    try:
        yield
    finally:
        _current = before
