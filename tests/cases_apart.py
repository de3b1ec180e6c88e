"""A case for processes that import nothing else of the tests."""

import os

import torch

from benchmarks.prepared import Context, Prepared


def process_number(context: Context) -> Prepared:
    """A case that says which process it is in, and with how many threads."""
    return Prepared(
        lambda _: None,
        lambda result: None,
        sample=lambda: float(os.getpid()),
        rounds=2,
        memory=False,
        bytes=8,
        extra={"threads": torch.get_num_threads()},
        more=lambda samples: {"most": max(samples)},
    )
