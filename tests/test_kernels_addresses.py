"""Addresses beyond 32 bits, without the memory for them: what the last program of each launch would touch.

Launches on tensors of more than 2^31 elements are recorded on the meta device. Triton's interpreter then runs the last
program of each on addresses where nothing lies: loads give zeros, stores go nowhere, and both are looked at. An offset
that was computed in 32 bits leads outside of its tensor.
"""

from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from benchmarks.aot_builds import launches
from benchmarks.kernel_cases import (
    Make,
    attention,
    channel_norm,
    group_norm,
    merged_attention,
    posterior_mean,
    row_norm,
    sampling_step,
    start_from_noise,
    training_noising,
)
from minimagen_fast.kernels import launch

if not launch.INTERPRETED:
    pytest.skip("programs run alone in Triton's interpreter", allow_module_level=True)

NHWC, NCHW = torch.channels_last, torch.contiguous_format
BEYOND = 2**31
# So many multiprocessors that no program has much to do. Some kernels are only for as few as a true card has.
MANY = launch.Target((9, 0), 2**24, launch.H200.shared_memory)
# Bytes from one tensor to the next: further than a wrong offset leads.
APART = 2**44


class Memory:
    """Where tensors of the meta device are said to lie, and how far into them something was touched.

    Attributes:
        furthest: By the number of a tensor's memory, the last element that was touched.
    """

    def __init__(self):
        self.furthest = {}
        self._storages = {}

    def number(self, x):
        """That of the memory of a tensor, from 1."""
        storage = x.untyped_storage()
        self._storages.setdefault(storage._cdata, storage)
        return list(self._storages).index(storage._cdata) + 1

    def touch(self, pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        sizes = [storage.nbytes() for storage in self._storages.values()]
        numbers = (addresses + APART // 2) // APART
        for number in np.unique(numbers).tolist():
            offsets = addresses[numbers == number] - number * APART
            inside = 1 <= number <= len(sizes) and 0 <= offsets.min() and offsets.max() + size <= sizes[number - 1]
            assert inside, f"{offsets.min()} to {offsets.max()} in a tensor of {sizes[number - 1]} bytes"
            self.furthest[number] = max(self.furthest.get(number, 0), int(offsets.max()) // size)


class There:
    """A tensor as the interpreter is given it."""

    def __init__(self, x, memory):
        self.dtype = x.dtype
        self._address = memory.number(x) * APART + x.storage_offset() * x.element_size()

    def data_ptr(self):
        return self._address


def run_last_program(one, memory):
    builder = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    # A state of selecting the threshold in which nothing is looked up any more, which zeros have not.
    loaded = 2 if one.kernel.__name__ == "_update_kernel" else 0

    def touch_and_give(kind, pointers, mask):
        memory.touch(pointers, mask)
        return interpreter.TensorHandle(np.full(pointers.data.shape, loaded, interpreter._get_np_dtype(kind)), kind)

    replaced = {
        "create_masked_load": lambda _, at, mask, *rest: touch_and_give(at.get_element_ty(), at, mask),
        "create_masked_store": lambda _, at, value, mask, *rest: memory.touch(at, mask),
        "create_atomic_rmw": lambda _, way, at, value, mask, *rest: touch_and_give(value.dtype.scalar, at, mask),
        "set_grid_dim": lambda *_: set_dim(*one.grid, 1, 1),
        "set_grid_idx": lambda *_: set_index(one.grid[0] - 1, 0, 0),
    }
    copies = {"_init_args_hst": lambda self, *given: given, "_restore_args_dev": lambda *_: None}
    args = [There(x, memory) if isinstance(x, torch.Tensor) else x for x in one.args]
    with mock.patch.multiple(type(builder), **replaced), mock.patch.multiple(interpreter.GridExecutor, **copies):
        one.kernel[(1,)](*args, **one.constexprs)


def images(c, side):
    return BEYOND // (c * side * side) + 2, c, side, side


def sequences(n, width):
    return BEYOND // (n * width) + 2, n


BOTH, ANY = (NHWC, NCHW), (NCHW,)
CASES = [
    # In registers, in a loop, in several programs; of many images, of large ones, and of one.
    (group_norm(*images(128, 16), skip=128, scale=True), BOTH),
    (group_norm(*images(128, 64), skip=128, scale=True), BOTH),
    (group_norm(*images(128, 128), skip=128, scale=True), BOTH),
    (group_norm(*images(256, 16)), BOTH),
    (group_norm(*images(128, 64), x_bias=True), BOTH),
    (group_norm(9, 256, 1024, 1024, scale=True), BOTH),
    (group_norm(1, 256, 4096, 2100), BOTH),
    (channel_norm(*images(128, 16), residual=True), BOTH),
    (channel_norm(*images(4096, 16), gelu=True), BOTH),
    (channel_norm(1, 256, 4096, 2100), BOTH),
    (channel_norm(1, 4096, 1024, 513), ANY),
    (row_norm(*sequences(64, 256), 256, residual=True), ANY),
    (row_norm(BEYOND // 2**18, 40, 8192), ANY),
    (attention(*sequences(100, 512), 16, shared=False), ANY),
    (attention(*sequences(100, 512), 16, shared=True), ANY),
    (attention(BEYOND // 51200 + 2, 16, 100, shared=False), ANY),
    (attention(1, BEYOND // 512 + 100, 16, shared=True), ANY),
    (merged_attention(*sequences(100, 512), 16), ANY),
    *((training_noising(*images(3, 256), layout), ANY) for layout in BOTH),
    (start_from_noise(*images(3, 256)), ANY),
    (posterior_mean(*images(3, 256)), ANY),
    *((sampling_step(kind, *images(3, side)), ANY) for kind in ("ancestral", "dpm_solver_pp_2m") for side in (64, 512)),
]
RUNS = [(case, memory_format) for case, formats in CASES for memory_format in formats]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case, memory_format", RUNS, ids=lambda value: getattr(value, "name", None))
def test_the_end_of_large_tensors(case, memory_format, monkeypatch):
    monkeypatch.setattr(Make, "times", lambda self, batch: torch.empty(batch, dtype=torch.int64, device="meta"))
    ends = []
    on_a_true_card = case.operation == "group_norm_silu" and case.shape.partition("+")[0].endswith(("16x16", "x64x64"))
    card = launch.H200 if on_a_true_card else MANY
    for one in launches(case, torch.float16, memory_format, card):
        memory = Memory()
        large = {memory.number(x) for x in one.args if isinstance(x, torch.Tensor) and x.numel() > BEYOND}
        # The gradient of a key is a sum over all queries, which would take too long.
        if large and not (one.kernel.__name__ == "_backward_keys" and case.shape.startswith("b1-")):
            run_last_program(one, memory)
            # Not all of them: one may stand for another that is not needed, and the last group lie in the other.
            ends += [(memory.furthest[number], one.kernel.__name__) for number in large if number in memory.furthest]
    assert ends and min(ends)[0] > BEYOND, min(ends)
