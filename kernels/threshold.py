"""The threshold of dynamic thresholding, exactly: s = max(1, quantile of |x_0|), by selection instead of a sort.

Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022), section 2.3,
https://arxiv.org/abs/2205.11487. The quantile is that of torch.quantile: the two neighbours of a fractional rank,
interpolated linearly in float32.

The bits of a non-negative float, read as an integer, keep its order. So the key of a value is the 31 bits of its
magnitude, and a selection finds the key of a rank digit by digit. Small images are held in registers by one program
each and searched bit by bit.

Large ones are split into parts, and every launch counts one digit, of 9, 10 and 11 bits, of the keys above that of 1:
s is 1 wherever the quantile is not above 1. The next launch goes on within the bin that holds the rank. The first
launch keeps the counts of each part; the others add theirs to counts that an image's parts share and that the first
has zeroed. The order of these additions does not matter, since they are of integers. A part that wants to know where a
rank lies reads the sums of rows of bins, and one row of bins.
"""

import struct

import torch

from . import launch
from .launch import tl, triton

# torch.quantile refuses tensors (before torch 2.13; since then rows) with more elements than this: of float32 values it
# has its ranks in float32, too. Beyond it they are float64 here.
_TORCH_LIMIT = 2**24
# Values that a program takes at a time: one pass of a loop over its part of an image.
TILE = 2048
# Every part reads some first counts of all parts of its image, which this many tiles pay for.
_SMALLEST_PART, _MAX_PARTS = 2, 128
_PROGRAMS_PER_MULTIPROCESSOR = 2
# Rows of bins of the first digit and their length; the sums of the rows come first, then the rows. Short rows, since
# every part reads one of every other part.
FIRST_ROWS, FIRST_COLUMNS = 64, 8
_FIRST = FIRST_ROWS + FIRST_ROWS * FIRST_COLUMNS
# What the parts of an image share: counts of the second digit, in 32 rows of 32 bins, of the third, in 64, and how far
# the smallest key beyond the bin of the last count is from the largest of all integers.
_SECOND, _THIRD = 32 + 32 * 32, 64 + 64 * 32
_SHARED = _SECOND + _THIRD + 1


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def is_rounded(n: int) -> bool:
    """Whether ranks among n float32 are float32, too."""
    return n <= _TORCH_LIMIT


def rank_of(q: float, n: int) -> tuple[int, int, float]:
    """Rank of the ``q``-quantile among n sorted float32: the whole part, the step to the next, and its weight.

    Of ``q`` it takes what float32 has, as torch.quantile does.
    """
    rank = _float32(q) * (n - 1)
    if is_rounded(n):
        rank = _float32(rank)
    below = int(rank)
    weight = _float32(rank - below)
    return below, int(weight > 0), weight


def _rank_in_float64(q: float, n: int) -> tuple[int, int, float]:
    """The same among float64."""
    rank = q * (n - 1)
    below = int(rank)
    return below, int(rank > below), rank - below


def quantile(x: torch.Tensor, q: float | torch.Tensor) -> torch.Tensor:
    """The ``q``-quantile of each row, interpolated linearly between neighbours, as torch.quantile has it.

    Args:
        x: Values, float32 or float64, shape (b, n).
        q: In [0, 1]: a number, or a tensor of shape (1,) on the device of ``x``, for whose value nothing waits there.

    Returns:
        Shape (b,). A row that holds a NaN has NaN.
    """
    if not x.shape[0]:
        return x.new_empty(0)
    if isinstance(q, torch.Tensor):
        # As the kernels do: the nearest in the range, and 0 for NaN.
        return _quantile_in_memory(x, q.to(x.dtype).nan_to_num(0.0).clamp(0, 1))
    if x.numel() <= _TORCH_LIMIT:
        return torch.quantile(x, q, dim=-1)
    return torch.where(x.isnan().any(dim=-1), torch.nan, _quantile(x, q))


def _quantile(x: torch.Tensor, q: float) -> torch.Tensor:
    below, step, weight = (_rank_in_float64 if x.dtype == torch.float64 else rank_of)(q, x.shape[-1])
    places = below, below + step
    if torch.are_deterministic_algorithms_enabled():
        # Torch refuses to select on CUDA then: to which of equal values an index points is left open.
        ordered = x.sort(dim=-1).values
        low, high = (ordered[:, place] for place in places)
    else:
        low, high = (torch.kthvalue(x, place + 1, dim=-1).values for place in places)
    return torch.lerp(low, high, weight)


def _quantile_in_memory(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    # A rank that is not waited for can be looked up in a sorted row, and not selected. Torch's own does the same, but
    # on CPUs, before torch 2.13, it looks at q first: such a step could not be recorded.
    rank = q.double() * (x.shape[-1] - 1)
    if x.dtype == torch.float32 and is_rounded(x.shape[-1]):
        rank = rank.float().double()
    below = rank.long()
    weight = (rank - below).to(x.dtype)
    ordered = x.sort(dim=-1).values
    low, high = (ordered.index_select(1, place)[:, 0] for place in (below, below + (weight > 0)))
    # NaN comes last.
    last = ordered[:, -1]
    return torch.where(last.isnan(), last, torch.lerp(low, high, weight))


@triton.jit
def setting(ptr, number, stored, BIT: tl.constexpr):
    """What lies in memory, where a CUDA graph reads it anew, if this bit of ``stored`` says so; else the number."""
    return tl.load(ptr, mask=(stored & BIT) != 0, other=number)


@triton.jit
def rank(q_ptr, q, stored, n, ROUNDED: tl.constexpr):
    """What :func:`rank_of` gives, for a quantile in memory, if bit 1 says so, or a number."""
    q = setting(q_ptr, q, stored, 1)
    # No rank may lie outside of an image, whatever is in memory, NaN too.
    q = tl.where(q > 0, tl.minimum(q, 1.0), 0.0)
    if ROUNDED:
        # A product that cannot be fused with the subtraction.
        exact = tl.fma(q, tl.zeros_like(q) + (n - 1), 0.0)
    else:
        exact = q.to(tl.float64) * (n - 1)
    below = exact.to(tl.int32)
    weight = (exact - below).to(tl.float32)
    return below, (weight > 0).to(tl.int32), weight


@triton.jit
def keys_of(x):
    """Integers in the order of |x|, which a cast of their bits takes back."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _of_bits(bits):
    """The float that they are."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def clamp_scale(x, s):
    """x clamped to [-s, s], over s. NaN where s is."""
    return tl.div_rn(tl.minimum(tl.maximum(x, -s), s), s)


@triton.jit
def _interpolate(low, high, weight):
    """max(1, what lies at ``weight`` between two values), in the two formulas of torch.lerp."""
    s = tl.where(weight < 0.5, low + weight * (high - low), high - (high - low) * (1 - weight))
    # Not a maximum, which on some cards drops a NaN, as comes of two infinities.
    return tl.where(s < 1, 1.0, s)


@triton.jit
def threshold_of(x, q_ptr, q, stored, n, ROUNDED: tl.constexpr, SIZE: tl.constexpr):
    """s of one image of n values that a program holds, infinity in the places beyond, which no rank reaches."""
    size = tl.abs(x)
    invalid = tl.max((x != x).to(tl.int32), 0)
    s = tl.where(invalid > 0, float("nan"), 1.0)
    up_to_1 = tl.sum((size <= 1).to(tl.int32), 0)
    # Asked for where it is needed, and again further down: in between the values themselves take all registers.
    below, step, _ = rank(q_ptr, q, stored, n, ROUNDED)
    # Mostly the quantile is below 1, where it does not matter.
    if (invalid == 0) & (up_to_1 <= below + step):
        # The bits of the largest value that all but `below` reach. No value reaches those beyond infinity, of a NaN.
        found = 0
        for place in range(31):
            candidate = found | (1 << (30 - place))
            reached = tl.sum((size >= _of_bits(candidate)).to(tl.int32), 0)
            found = tl.where(reached + below >= SIZE, candidate, found)
        value = _of_bits(found)
        up_to = tl.sum((size <= value).to(tl.int32), 0)
        following = tl.min(tl.where(size > value, size, float("inf")), 0)
        below, step, weight = rank(q_ptr, q, stored, n, ROUNDED)
        s = _interpolate(value, tl.where(up_to > below + step, value, following), weight)
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
def excess_of(keys):
    """Keys less that of 1 and 1 more: from 0 to 2^30 - 1 for values above 1, up to infinity; beyond for NaNs."""
    return keys - 0x3F800001


@triton.jit
def store_counts(counts_ptr, counts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write one part's counts: the sums of its rows, and of the rows those that are not empty."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    counts = tl.reshape(counts, (ROWS, COLUMNS))
    sums = tl.sum(counts, 1)
    tl.store(counts_ptr + rows, sums)
    tl.store(counts_ptr + ROWS + rows[:, None] * COLUMNS + columns[None, :], counts, mask=sums[:, None] > 0)


@triton.jit
def _add_counts(counts_ptr, counts, ROWS: tl.constexpr):
    """Add one part's counts to those of its image."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 32)
    counts = tl.reshape(counts, (ROWS, 32))
    sums = tl.sum(counts, 1)
    tl.atomic_add(counts_ptr + rows, sums, mask=sums > 0, sem="relaxed")
    tl.atomic_add(counts_ptr + ROWS + rows[:, None] * 32 + columns[None, :], counts, mask=counts > 0, sem="relaxed")


@triton.jit
def zero_shared(shared_ptr, image, part, parts, SHARED: tl.constexpr):
    """One part's share of clearing what the parts of its image share in the launches to come."""
    for first in range(part * 256, SHARED, parts * 256):
        offset = first + tl.arange(0, 256)
        tl.store(shared_ptr + image * SHARED + offset, tl.zeros((256,), tl.int32), mask=offset < SHARED)


@triton.jit
def _place(counts, index, rank):
    """The bin that holds a rank, the rank within it, and its count."""
    place = tl.sum((tl.cumsum(counts, 0) <= rank).to(tl.int32), 0)
    rank -= tl.sum(tl.where(index < place, counts, 0), 0)
    return place, rank, tl.sum(tl.where(index == place, counts, 0), 0)


@triton.jit
def _find_first(counts_ptr, largest, rank, n, parts, PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """From the counts of all parts: the bin of an image that holds a rank, and the rank within it.

    The rank is negative where it is among the values up to 1, and how far it is from those above.
    """
    part = tl.arange(0, PARTS)[:, None]
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    counts_ptr += part * (ROWS + ROWS * COLUMNS)
    # Of rows beyond the largest value there is nothing to read.
    wanted = (part < parts) & (rows <= (excess_of(largest) >> 21) // COLUMNS)[None, :]
    sums = tl.load(counts_ptr + rows[None, :], mask=wanted, other=0)
    totals = tl.sum(sums, 0)
    rank -= n - tl.sum(totals, 0)
    digit = 0
    if rank >= 0:
        row, rank, _ = _place(totals, rows, rank)
        filled = tl.sum(tl.where(rows[None, :] == row, sums, 0), 1)[:, None] > 0
        fine = tl.load(counts_ptr + ROWS + row * COLUMNS + columns[None, :], mask=filled, other=0)
        column, rank, _ = _place(tl.sum(fine, 0), columns, rank)
        digit = row * COLUMNS + column
    return digit, rank


@triton.jit
def _find(counts_ptr, rank, ROWS: tl.constexpr):
    """From the counts of an image: the bin that holds a rank, the rank within it, and the count of all bins."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 32)
    sums = tl.load(counts_ptr + rows)
    row, rank, _ = _place(sums, rows, rank)
    column, rank, _ = _place(tl.load(counts_ptr + ROWS + row * 32 + columns), columns, rank)
    return row * 32 + column, rank, tl.sum(sums, 0)


@triton.jit(do_not_specialize=["parts", "stored"])
def _narrow_kernel(
    start_ptr,
    counts_ptr,
    extremes_ptr,
    shared_ptr,
    state_before_ptr,
    state_ptr,
    n,
    parts,
    part_size,
    q_ptr,
    q,
    stored,
    LEVEL: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROUNDED: tl.constexpr,
    SECOND: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Count the second or third digit of the keys that share the digits before it with the wanted one."""
    image, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    shared_ptr += image * SHARED
    state_ptr += image * 4
    state_before_ptr += image * 4
    # What is settled (0 nothing, 1 that the two values lie on both sides of 1, 2 that s is 1, 3 that it is NaN), the
    # digits so far, and the rank within their bin.
    if LEVEL == 2:
        each = tl.arange(0, PARTS)
        extremes_ptr += (image * parts + each) * 2
        largest = tl.max(tl.load(extremes_ptr, mask=each < parts, other=0), 0)
        counts_ptr += image * parts * (ROWS + ROWS * COLUMNS)
        below, step, _ = rank(q_ptr, q, stored, n, ROUNDED)
        prefix, within = _find_first(counts_ptr, largest, below, n, parts, PARTS, ROWS, COLUMNS)
        settled = tl.where(within >= 0, 0, tl.where(within + step < 0, 2, 1))
        settled = tl.where(largest > 0x7F800000, 3, settled)
        # Below the first digit of whatever is above 1.
        prefix = tl.where(settled == 0, prefix, -1)
        if part == 0:
            tl.store(state_ptr + 3, tl.max(tl.load(extremes_ptr + 1, mask=each < parts, other=0), 0))
    else:
        settled = tl.load(state_before_ptr)
        prefix = tl.load(state_before_ptr + 1)
        within = tl.load(state_before_ptr + 2)
        digit = 1023
        if settled == 0:
            digit, within, _ = _find(shared_ptr, within, 32)
        prefix = (prefix << 10) | digit
        if part == 0:
            tl.store(state_ptr + 3, tl.load(state_before_ptr + 3))
    if part == 0:
        tl.store(state_ptr, settled)
        tl.store(state_ptr + 1, prefix)
        tl.store(state_ptr + 2, within)
    if settled < LEVEL - 1:
        DIGITS: tl.constexpr = 1024 if LEVEL == 2 else 2048
        counts = tl.zeros((DIGITS,), tl.int32)
        following = 0x7FFFFFFF
        begin = part * part_size
        for tile in range(begin, tl.minimum(begin + part_size, n), TILE):
            offset = tile + tl.arange(0, TILE)
            inside = offset < n
            excess = excess_of(keys_of(tl.load(start_ptr + image * n + offset, mask=inside, other=0.0)))
            before = excess >> (21 if LEVEL == 2 else 11)
            if LEVEL == 3:
                following = tl.minimum(following, tl.min(tl.where(before > prefix, excess, 0x7FFFFFFF), 0))
            digits = (excess >> 11) & 1023 if LEVEL == 2 else excess & 2047
            counts = count(digits, (excess >= 0) & (before == prefix), counts, DIGITS)
        if LEVEL == 2:
            _add_counts(shared_ptr, counts, 32)
        else:
            _add_counts(shared_ptr + SECOND, counts, 64)
            tl.atomic_max(shared_ptr + SHARED - 1, 0x7FFFFFFF - following, sem="relaxed")


@triton.jit
def threshold_of_counts(
    shared_ptr,
    state_ptr,
    image,
    q_ptr,
    q,
    stored,
    n,
    ROUNDED: tl.constexpr,
    SECOND: tl.constexpr,
    SHARED: tl.constexpr,
):
    """s of one image, from what the launches before have left."""
    shared_ptr += image * SHARED
    state_ptr += image * 4
    settled = tl.load(state_ptr)
    s = tl.where(settled == 3, float("nan"), 1.0)
    if settled < 2:
        _, step, weight = rank(q_ptr, q, stored, n, ROUNDED)
        low = tl.load(state_ptr + 3)
        high = 0x3F800001 + (0x7FFFFFFF - tl.load(shared_ptr + SHARED - 1))
        if settled == 0:
            prefix = (tl.load(state_ptr + 1) << 11) + 0x3F800001
            within = tl.load(state_ptr + 2)
            digit, _, total = _find(shared_ptr + SECOND, within, 64)
            low = prefix + digit
            if within + step < total:
                digit, _, _ = _find(shared_ptr + SECOND, within + step, 64)
                high = prefix + digit
        s = _interpolate(_of_bits(low), _of_bits(high), weight)
    return s


def split(b: int, n: int, target: launch.Target) -> tuple[int, int]:
    """Parts of each image, and values of each part: programs for the whole card, if the images are that large."""
    wanted = launch.ceil_div(target.multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR, max(b, 1))
    tiles = launch.ceil_div(n, TILE)
    each = max(launch.ceil_div(tiles, min(wanted, _MAX_PARTS)), _SMALLEST_PART)
    return launch.ceil_div(tiles, each), each * TILE


class Selection:
    """The memory in which the launches of a selection over large images hand on what they found.

    Attributes:
        parts: Parts of each image; every launch has one program for each.
        part_size: Values of a part.
        first: Counts of the first digit, for the first launch to write with :func:`store_counts`.
        extremes: Of each part the largest key and the largest up to that of 1, for the first launch to write.
        shared: What the parts of an image share, for the first launch to clear with :func:`zero_shared`.
        state: What the third launch found.
        constants: What :func:`threshold_of_counts` must know.
    """

    def __init__(self, start: torch.Tensor, quantile: tuple[torch.Tensor, float, int]):
        """``quantile`` is what :func:`rank` takes: where it may be in memory, a number, and whether it is."""
        b, self._n = start.shape[0], start.shape[1:].numel()
        self._start = start
        self.parts, self.part_size = split(b, self._n, launch.target(start.device))
        self._quantile = quantile
        self.constants = {"ROUNDED": is_rounded(self._n), "SECOND": _SECOND, "SHARED": _SHARED}
        self.first = start.new_empty((b, self.parts, _FIRST), dtype=torch.int32)
        self.extremes = start.new_empty((b, self.parts, 2), dtype=torch.int32)
        self.shared = start.new_empty((b, _SHARED), dtype=torch.int32)
        self._after_first, self.state = start.new_empty((2, b, 4), dtype=torch.int32)

    def narrow(self) -> None:
        """The second and third launch, after one that has written all but the state."""
        for level, before, after in ((2, self.state, self._after_first), (3, self._after_first, self.state)):
            launch.run(
                _narrow_kernel,
                (len(self._start) * self.parts,),
                self._start,
                self.first,
                self.extremes,
                self.shared,
                before,
                after,
                self._n,
                self.parts,
                self.part_size,
                *self._quantile,
                LEVEL=level,
                PARTS=max(launch.next_power_of_2(self.parts), 16) if level == 2 else 1,
                TILE=TILE,
                ROWS=FIRST_ROWS,
                COLUMNS=FIRST_COLUMNS,
                **self.constants,
                num_warps=8,
            )
