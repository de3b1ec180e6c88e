"""The threshold of dynamic thresholding, exactly: s = max(1, quantile of |x_0|), by selection instead of a sort.

Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022), section 2.3,
https://arxiv.org/abs/2205.11487. The quantile is that of torch.quantile: the two neighbours of a fractional rank,
interpolated linearly in float32.

The bits of a non-negative float, read as an integer, keep its order. So the key of a value is the 31 bits of its
magnitude, and a selection finds the key of a rank digit by digit. Small images are held in registers by one program
each and searched bit by bit. Large ones are split into parts: every launch counts one digit of 10, 10 and 11 bits for
each part, and the next adds up the parts' counts and goes on within the bin that holds the rank. Keys above that of
infinity are NaNs. Values below 1 share a bin of the first digit, since s is 1 wherever the quantile is among them.
"""

import struct

import torch

from . import launch
from .launch import tl, triton

# torch.quantile refuses tensors (before torch 2.13; since then rows) with more elements than this: it has its ranks in
# float32. Beyond it they are float64 here.
_TORCH_LIMIT = 2**24
# Values that a program takes at a time: one pass of a loop over its part of an image.
TILE = 2048
# Of counts, in rows of 32 bins: the sums of the rows come first, then the rows.
_ROWS = (32, 32, 64)
_MAX_PARTS = 128


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def rank_of(q: float, n: int) -> tuple[int, int, float]:
    """Rank of the ``q``-quantile among n sorted values: the whole part, the step to the next, and its weight."""
    rank = _float32(_float32(q) * (n - 1)) if n <= _TORCH_LIMIT else q * (n - 1)
    below = int(rank)
    weight = _float32(rank - below)
    return below, int(weight > 0), weight


def quantile(x: torch.Tensor, q: float) -> torch.Tensor:
    """The ``q``-quantile of each row, interpolated linearly between neighbours, as torch.quantile has it.

    Args:
        x: Values, float32 or float64, shape (b, n).
        q: In [0, 1].

    Returns:
        Shape (b,). A row that holds a NaN has NaN.
    """
    if not x.shape[0]:
        return x.new_empty(0)
    if x.numel() <= _TORCH_LIMIT:
        return torch.quantile(x, q, dim=-1)
    below, step, weight = rank_of(q, x.shape[-1])
    low, high = (torch.kthvalue(x, place + 1, dim=-1).values for place in (below, below + step))
    return torch.where(x.isnan().any(dim=-1), torch.nan, torch.lerp(low, high, weight))


@triton.jit
def keys_of(x):
    """Integers in the order of |x|, which a cast of their bits takes back."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def clamp_scale(x, s):
    """x clamped to [-s, s], over s. NaN where s is."""
    return tl.div_rn(tl.minimum(tl.maximum(x, -s), s), s)


@triton.jit
def _interpolate(low_key, high_key, weight):
    """max(1, what lies at ``weight`` between two values), in the two formulas of torch.lerp."""
    low, high = low_key.to(tl.float32, bitcast=True), high_key.to(tl.float32, bitcast=True)
    s = tl.where(weight < 0.5, low + weight * (high - low), high - (high - low) * (1 - weight))
    # Not a maximum, which on some cards drops a NaN, as comes of two infinities.
    return tl.where(s < 1, 1.0, s)


@triton.jit
def threshold_of_keys(keys, inside, below, step, weight):
    """s of one image whose keys a program holds; ``inside`` says which of them are values."""
    # No rank reaches the padding.
    keys = tl.where(inside, keys, 0x7FFFFFFF)
    invalid = tl.max((inside & (keys > 0x7F800000)).to(tl.int32), 0)
    s = tl.where(invalid > 0, float("nan"), 1.0)
    # Mostly the quantile is below 1, where it does not matter.
    if (invalid == 0) & (tl.sum((keys <= 0x3F800000).to(tl.int32), 0) <= below + step):
        # The largest key with no more than `below` keys under it.
        found = 0
        for place in range(31):
            candidate = found | (1 << (30 - place))
            under = tl.sum((keys < candidate).to(tl.int32), 0)
            found = tl.where(under <= below, candidate, found)
        up_to = tl.sum((keys <= found).to(tl.int32), 0)
        following = tl.min(tl.where(keys > found, keys, 0x7FFFFFFF), 0)
        s = _interpolate(found, tl.where(up_to > below + step, found, following), weight)
    return s


@triton.jit
def count(digits, wanted, counts, BINS: tl.constexpr):
    """Add to the counts of digits those of a tile."""
    bins = tl.arange(0, BINS)
    first = tl.min(tl.where(wanted, digits, BINS), 0) >> 6
    last = tl.max(tl.where(wanted, digits, -1), 0) >> 6
    # Counting takes time and registers in proportion to the number of bins: 64 of them at a time, and none in vain.
    for window in range(first, last + 1):
        some = tl.histogram(digits & 63, 64, mask=wanted & (digits >> 6 == window))
        counts += tl.where(bins >> 6 == window, tl.gather(some, bins & 63, 0), 0)
    return counts


@triton.jit
def first_digits(keys):
    """First digits from that of the values below 1, so that mostly 64 bins hold all: up to 2^15.75."""
    return tl.maximum((keys >> 21) - 507, 0)


@triton.jit
def store_counts(counts_ptr, counts, ROWS: tl.constexpr):
    """Write one part's counts: the sums of its rows, and of the rows those that are not empty."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 32)
    counts = tl.reshape(counts, (ROWS, 32))
    sums = tl.sum(counts, 1)
    tl.store(counts_ptr + rows, sums)
    tl.store(counts_ptr + ROWS + rows[:, None] * 32 + columns[None, :], counts, mask=sums[:, None] > 0)


@triton.jit
def _place(counts, index, rank):
    """The bin that holds a rank, the rank within it, and its count."""
    place = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    rank -= tl.sum(tl.where(index < place, counts, 0), 0)
    return place, rank, tl.sum(tl.where(index == place, counts, 0), 0)


@triton.jit
def _find(counts_ptr, rank, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The bin of an image that holds a rank, the rank within it, its count, and the count of all bins."""
    parts = tl.arange(0, PARTS)[:, None] * (ROWS + ROWS * 32)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 32)
    sums = tl.load(counts_ptr + parts + rows[None, :])
    totals = tl.sum(sums, 0)
    row, rank, _ = _place(totals, rows, rank)
    filled = tl.sum(tl.where(rows[None, :] == row, sums, 0), 1) > 0
    fine = tl.load(counts_ptr + parts + ROWS + row * 32 + columns[None, :], mask=filled[:, None], other=0)
    column, rank, count = _place(tl.sum(fine, 0), columns, rank)
    return row * 32 + column, rank, count, tl.sum(totals, 0)


@triton.jit
def _narrow_kernel(
    start_ptr,
    counts_before_ptr,
    counts_ptr,
    extremes_ptr,
    state_before_ptr,
    state_ptr,
    n,
    part_size,
    below,
    step,
    LEVEL: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count the second or third digit of the keys that share the digits before it with the wanted one."""
    ROWS: tl.constexpr = 32 if LEVEL == 2 else 64
    image, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    counts_before_ptr += image * PARTS * (32 + 32 * 32)
    extremes_ptr += image * PARTS * 3
    # What is settled (0 nothing, 1 that the two values lie on both sides of 1, 2 that s is 1, 3 that it is NaN), the
    # digits so far, and the rank within their bin.
    if LEVEL == 2:
        largest = tl.max(tl.load(extremes_ptr + tl.arange(0, PARTS) * 3), 0)
        prefix, rank, number, _ = _find(counts_before_ptr, below, 32, PARTS)
        settled = tl.where(prefix > 0, 0, tl.where(rank + step < number, 2, 1))
        prefix += 507
        settled = tl.where(largest > 0x7F800000, 3, settled)
    else:
        settled = tl.load(state_before_ptr + image * 4)
        prefix = tl.load(state_before_ptr + image * 4 + 1)
        rank = tl.load(state_before_ptr + image * 4 + 2)
        digit = 1023
        if settled == 0:
            digit, rank, _, _ = _find(counts_before_ptr, rank, 32, PARTS)
        prefix = (prefix << 10) | digit
    if part == 0:
        tl.store(state_ptr + image * 4, settled)
        tl.store(state_ptr + image * 4 + 1, prefix)
        tl.store(state_ptr + image * 4 + 2, rank)
    if settled < LEVEL - 1:
        counts = tl.zeros((ROWS * 32,), tl.int32)
        following = 0x7FFFFFFF
        begin = part * part_size
        for tile in range(begin, tl.minimum(begin + part_size, n), TILE):
            offset = tile + tl.arange(0, TILE)
            inside = offset < n
            keys = keys_of(tl.load(start_ptr + image * n + offset, mask=inside, other=0.0))
            before = keys >> (21 if LEVEL == 2 else 11)
            wanted = inside & (before == prefix)
            if LEVEL == 3:
                following = tl.minimum(following, tl.min(tl.where(inside & (before > prefix), keys, 0x7FFFFFFF), 0))
            digits = (keys >> 11) & 1023 if LEVEL == 2 else keys & 2047
            counts = count(digits, wanted, counts, ROWS * 32)
        store_counts(counts_ptr + (image * PARTS + part) * (ROWS + ROWS * 32), counts, ROWS)
        if LEVEL == 3:
            tl.store(extremes_ptr + part * 3 + 2, following)


@triton.jit
def threshold_of_counts(counts_ptr, extremes_ptr, state_ptr, image, step, weight, PARTS: tl.constexpr):
    """s of one image, from what the launches before have left."""
    counts_ptr += image * PARTS * (64 + 64 * 32)
    settled = tl.load(state_ptr + image * 4)
    s = tl.where(settled == 3, float("nan"), 1.0)
    if settled < 2:
        extremes = (image * PARTS + tl.arange(0, PARTS)) * 3
        low = tl.max(tl.load(extremes_ptr + extremes + 1), 0)
        high = tl.min(tl.load(extremes_ptr + extremes + 2), 0)
        if settled == 0:
            prefix = tl.load(state_ptr + image * 4 + 1) << 11
            rank = tl.load(state_ptr + image * 4 + 2)
            digit, _, _, total = _find(counts_ptr, rank, 64, PARTS)
            low = prefix | digit
            if rank + step < total:
                digit, _, _, _ = _find(counts_ptr, rank + step, 64, PARTS)
                high = prefix | digit
        s = _interpolate(low, high, weight)
    return s


def split(b: int, n: int, target: launch.Target) -> tuple[int, int]:
    """Parts of each image, and values of each part: a program for every multiprocessor, if the images are that large.

    No more: every part reads something of every other one's counts.
    """
    wanted = launch.next_power_of_2(launch.ceil_div(target.multiprocessors, max(b, 1)))
    tiles = launch.ceil_div(n, TILE)
    parts = min(wanted, _MAX_PARTS, launch.next_power_of_2(tiles + 1) // 2)
    return parts, launch.ceil_div(tiles, parts) * TILE


class Selection:
    """The memory in which the launches of a selection over large images hand on what they found.

    Attributes:
        parts: Parts of each image; the first launch has one program for each.
        part_size: Values of a part.
        first: Counts of the first digit, for the first launch to write with :func:`store_counts`.
        last: Those of the last digit.
        extremes: Of each part the largest key and the largest below that of 1, both for the first launch to write, and
            the smallest beyond the bin of the last count.
        step: 1 if the next value is needed, too.
        weight: Its weight.
    """

    def __init__(self, start: torch.Tensor, q: float):
        b, self._n = start.shape[0], start.shape[1:].numel()
        self._start = start
        self.parts, self.part_size = split(b, self._n, launch.target(start.device))
        self._below, self.step, self.weight = rank_of(q, self._n)
        self.first, self._second, self.last = (
            start.new_empty((b, self.parts, rows + rows * 32), dtype=torch.int32) for rows in _ROWS
        )
        self.extremes = start.new_empty((b, self.parts, 3), dtype=torch.int32)
        self._after_first, self.state = start.new_empty((2, b, 4), dtype=torch.int32)

    def narrow(self) -> None:
        """The second and third launch, after one that has written ``start``, ``first`` and ``extremes``."""
        for level, counts_before, counts, before, after in (
            (2, self.first, self._second, self.state, self._after_first),
            (3, self._second, self.last, self._after_first, self.state),
        ):
            launch.run(
                _narrow_kernel,
                (len(self._start) * self.parts,),
                self._start,
                counts_before,
                counts,
                self.extremes,
                before,
                after,
                self._n,
                self.part_size,
                self._below,
                self.step,
                LEVEL=level,
                PARTS=self.parts,
                TILE=TILE,
                num_warps=8,
            )
