"""Which implementation of attention is fastest on this card, by shape: regenerates ``kernels/attention_table.py``.

``python -m benchmarks.attention_order`` times the forward pass of every implementation that can do the job at the
shapes that the U-Nets meet, in bfloat16 and without a mask, prints a table, and with ``--write`` puts the order it
found into ``MEASURED``, which is asked for nothing else. It needs a CUDA device; elsewhere the table is not asked.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch

from minimagen_fast.kernels import attention_table
from minimagen_fast.kernels.attention_table import Key, Order, key_of

from .kernel_cases import HEADS, Case, attention
from .machine import ROOT, machine_info, software_info
from .measure import NotCapturable, Subject, Timer, settle
from .peers import refused_by_sdpa

TABLE = ROOT / "kernels" / "attention_table.py"
# Of those that are compared in the benchmarks the ones that the dispatch can choose; ``sdpa`` lets torch choose.
IMPLEMENTATIONS = ("triton", "sdpa_merge", "sdpa", "xformers")
# One image with guidance, and a batch that fills the card.
BATCHES = (2, 32)
# Pixels of the levels that attend, from 8x8 to 128x128; context tokens with and without low-resolution times.
PIXELS = (64, 256, 1024, 4096, 16384)
CONTEXT = 260
WIDTHS = (64,)
# More scores than this a step (of all heads and images) take too long to be worth a place in the table.
MOST_SCORES = 2**36
SAMPLES = 7

_MEASURED = re.compile(r"^(?:# Measured [^\n]*\n)?MEASURED: dict\[Key, Order\] = \{(?:\n.*?^)?\}\n", re.M | re.S)

# Median seconds of an implementation at a case; None if it cannot do it.
Clock = Callable[[Case, str], float | None]


def cases(pixels: Sequence[int] = PIXELS) -> Iterator[tuple[bool, int, int, int, list[Case]]]:
    """Sharing, width of a head, queries, keys, and the cases of these sizes for all batches."""
    for width in WIDTHS:
        for n in pixels:
            for shared, m in ((False, CONTEXT), (True, n)):
                batches = [b for b in BATCHES if b * HEADS * n * m <= MOST_SCORES]
                yield shared, width, n, m, [attention(b, n, m, shared=shared, d=width) for b in batches]


def measured(clock: Clock, pixels: Sequence[int] = PIXELS) -> dict[Key, dict[str, float]]:
    """For each key the time of each implementation, in multiples of the fastest's, averaged over the batches.

    An implementation that cannot do one of the batches is left out.
    """
    found: dict[Key, dict[str, float]] = {}
    for shared, width, n, m, sizes in cases(pixels):
        logs: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
        for case in sizes:
            seconds = {name: clock(case, name) for name in IMPLEMENTATIONS}
            possible = {name: each for name, each in seconds.items() if each is not None}
            for name, each in possible.items():
                logs[name].append(math.log(each / min(possible.values())))
        found[key_of(shared, width, n, m)] = {
            name: math.exp(sum(ratios) / len(ratios))
            for name, ratios in logs.items()
            if ratios and len(ratios) == len(sizes)
        }
    return found


def orders(found: Mapping[Key, Mapping[str, float]]) -> dict[Key, Order]:
    """The names, fastest first."""
    return {key: tuple(sorted(ratios, key=ratios.__getitem__)) for key, ratios in found.items() if ratios}


def rewritten(text: str, table: Mapping[Key, Order], source: str) -> str:
    """The module with another ``MEASURED``.

    Args:
        text: The module.
        table: What is to be in it.
        source: Where and with what it was measured, on one line.

    Raises:
        ValueError: if the module has not exactly one ``MEASURED``.
    """
    entries = "".join(f"    {key!r}: {order!r},\n".replace("'", '"') for key, order in sorted(table.items()))
    new = f"# {source}\nMEASURED: dict[Key, Order] = {{\n{entries}}}\n"
    text, number = _MEASURED.subn(lambda _: new, text)
    if number != 1:
        raise ValueError(f"the module has {number} tables MEASURED instead of one")
    return text


def report(found: Mapping[Key, Mapping[str, float]]) -> str:
    """Markdown: times in multiples of the fastest."""
    lines = [
        f"| keys | width | queries up to | keys up to | {' | '.join(IMPLEMENTATIONS)} |",
        f"|---|--:|--:|--:|{'--:|' * len(IMPLEMENTATIONS)}",
    ]
    for key, ratios in sorted(found.items()):
        cells = [f"{ratios[name]:.2f}x" if name in ratios else "–" for name in IMPLEMENTATIONS]
        kind = "shared" if key.shared else "of each head"
        lines.append(f"| {kind} | {key.width} | {key.queries} | {key.keys} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _seconds(case: Case, name: str) -> float | None:
    """On the current CUDA device; of the device alone where the calls can be captured."""
    device = torch.device("cuda")
    settle(device)
    try:
        # The default stream cannot be captured.
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream(device)):
            inputs = case.inputs(device, attention_table.DTYPE)
            timer = _timer(lambda _: case.run(inputs, name), device, f"{case.name}, {name}")
            return median(timer.sample() for _ in range(SAMPLES))
    # What an implementation cannot do it says with a ValueError, but for libraries.
    except (ValueError, RuntimeError) as error:
        if not isinstance(error, ValueError | torch.OutOfMemoryError) and not refused_by_sdpa(error):
            raise
        print(f"{case.name}, {name}: {error}", file=sys.stderr)
        return None


def _timer(call: Subject, device: torch.device, what: str) -> Timer:
    try:
        return Timer(call, device, graph=True)
    except NotCapturable as error:
        print(f"{what}: timed with the host's work, it cannot be captured as a CUDA graph: {error}", file=sys.stderr)
        return Timer(call, device)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 where there is no CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_order", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the orders into kernels/attention_table.py")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device, and elsewhere the table is not asked.", file=sys.stderr)
        return 2
    # Whatever is in force is not to be asked for its own order.
    attention_table.MEASURED.clear()
    found = measured(_seconds)
    print(report(found))
    if options.write:
        device, software = machine_info(torch.device("cuda"))["device"], software_info()
        source = f"Measured on {device}, torch {software['torch']}, triton {software['triton']}."
        TABLE.write_text(rewritten(TABLE.read_text(encoding="utf-8"), orders(found), source), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
