"""Two runs side by side: what moved beyond the noise."""

from collections.abc import Sequence
from dataclasses import dataclass

from .reading import Case, Run
from .report import table, time_of, versions
from .units import NOTHING, readable_bytes, readable_rate, readable_share, readable_time

DEFAULT_THRESHOLD = 0.05
FAILED = ("parity_failed", "error")


class NotComparable(Exception):
    """Two runs measured different things; the message says which."""


@dataclass(frozen=True)
class Change:
    """A case that moved.

    Attributes:
        before: Its record in the first run.
        after: Its record in the second.
        factor: The second's time, or memory, over the first's. None where one of them failed.
    """

    before: Case
    after: Case
    factor: float | None


@dataclass(frozen=True)
class Comparison:
    """What moved from one run to the other, regressions and improvements each with the largest change first.

    Attributes:
        slower: Cases that got slower beyond noise and threshold.
        faster: Cases that got faster.
        heavier: Cases whose peak memory grew by more than the threshold.
        lighter: Cases whose peak memory shrank.
        broken: Cases that were timed and then failed.
        mended: Cases that had failed and then were timed.
        gone: Ids of cases that were timed in the first run only, and did not fail in the second.
        new: Ids of cases that were timed in the second run only, and had not failed in the first.
        timed: How many cases were timed in both.
    """

    slower: tuple[Change, ...]
    faster: tuple[Change, ...]
    heavier: tuple[Change, ...]
    lighter: tuple[Change, ...]
    broken: tuple[Change, ...]
    mended: tuple[Change, ...]
    gone: tuple[str, ...]
    new: tuple[str, ...]
    timed: int

    @property
    def regressed(self) -> bool:
        return bool(self.slower or self.heavier or self.broken)


def check_comparable(first: Run, second: Run) -> None:
    """See that both ran the same profile on the same device with as many threads.

    Raises:
        NotComparable: if they did not.
    """
    different = [
        f"{what} {a!r} and {b!r}"
        for what, a, b in (
            ("profile", first.profile, second.profile),
            *((key, first.machine[key], second.machine[key]) for key in ("device", "type", "threads")),
        )
        if a != b
    ]
    if different:
        raise NotComparable(
            f"{first.path} and {second.path} cannot be compared: {'; '.join(different)}. Compare runs of one profile on"
            " one machine, or use --force to see the numbers all the same"
        )


def compare(first: Run, second: Run, threshold: float = DEFAULT_THRESHOLD) -> Comparison:
    """Compare two runs, case by case.

    A time moved if the quartiles of the two do not overlap and the medians differ by more than the threshold. Peak
    memory has no noise: there the threshold is all.

    Args:
        first: The earlier run.
        second: The later one.
        threshold: Least relative change that counts, 0.05 for 5%.

    Raises:
        ValueError: if the threshold is negative.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0; got {threshold}. 0.05 stands for 5%")
    before, after = ({case.id: case for case in run.cases} for run in (first, second))
    both = [(before[key], after[key]) for key in before if key in after]
    timed = [(a, b) for a, b in both if a.seconds and b.seconds]
    times = [Change(a, b, b.seconds.median / a.seconds.median) for a, b in timed if a.seconds.apart_from(b.seconds)]
    memory = [Change(a, b, b.peak_bytes / a.peak_bytes) for a, b in timed if a.peak_bytes and b.peak_bytes]

    def grown(changes: list[Change]) -> tuple[Change, ...]:
        return tuple(sorted((c for c in changes if c.factor > 1 + threshold), key=lambda c: -c.factor))

    def shrunk(changes: list[Change]) -> tuple[Change, ...]:
        return tuple(sorted((c for c in changes if c.factor < 1 / (1 + threshold)), key=lambda c: c.factor))

    def timed_only_in(one: dict[str, Case], other: dict[str, Case]) -> tuple[str, ...]:
        return tuple(
            case.id for case in one.values() if case.seconds and (case.id not in other or _left_out(other[case.id]))
        )

    return Comparison(
        slower=grown(times),
        faster=shrunk(times),
        heavier=grown(memory),
        lighter=shrunk(memory),
        broken=tuple(Change(a, b, None) for a, b in both if a.seconds and b.status in FAILED),
        mended=tuple(Change(a, b, None) for a, b in both if a.status in FAILED and b.seconds),
        gone=timed_only_in(before, after),
        new=timed_only_in(after, before),
        timed=len(timed),
    )


def _left_out(case: Case) -> bool:
    return case.status == "unavailable"


def comparison_text(first: Run, second: Run, found: Comparison, threshold: float) -> str:
    """The comparison as Markdown."""
    parts = [
        f"A: {first.path}, {versions(first)}\nB: {second.path}, {versions(second)}",
        *(f"{name} is a partial result." for name, run in (("A", first), ("B", second)) if not run.complete),
        _limits(first, second),
    ]
    for title, changes in (("Slower", found.slower), ("Faster", found.faster)):
        if changes:
            rows = [(c.before.id, time_of(c.before), time_of(c.after), _change(c)) for c in changes]
            parts.append(f"{title}:\n\n{table(('case', 'A', 'B', 'change'), rows)}")
    for title, changes in (("More memory", found.heavier), ("Less memory", found.lighter)):
        if changes:
            rows = [
                (c.before.id, readable_bytes(c.before.peak_bytes), readable_bytes(c.after.peak_bytes), _change(c))
                for c in changes
            ]
            parts.append(f"{title}:\n\n{table(('case', 'A', 'B', 'change'), rows)}")
    if found.broken:
        rows = [(c.before.id, time_of(c.before), c.after.status, c.after.reason) for c in found.broken]
        parts.append(f"Broken:\n\n{table(('case', 'A', 'B', 'reason'), rows)}")
    if found.mended:
        rows = [(c.before.id, c.before.status, time_of(c.after)) for c in found.mended]
        parts.append(f"Mended:\n\n{table(('case', 'A', 'B'), rows)}")
    parts += [_listed(f"Timed in {name} only", ids) for name, ids in (("A", found.gone), ("B", found.new)) if ids]
    parts.append(
        f"{found.timed} cases were timed in both; what moved by less than {readable_share(threshold)}, or within the"
        " quartiles, is not shown. " + ("There are regressions." if found.regressed else "No regression.")
    )
    return "\n\n".join(parts)


def _change(change: Change) -> str:
    return f"{change.factor - 1:+.1%}"


def _limits(first: Run, second: Run) -> str:
    """The machine's own rates in both runs: where they differ, so will much else."""
    pairs = [("copy", "B", *(run.ceilings["copy_bytes_per_second"] for run in (first, second)))]
    rates = [run.ceilings["flops_per_second"] for run in (first, second)]
    pairs += [(name, "FLOP", rates[0][name], rates[1][name]) for name in rates[0] if name in rates[1]]
    rows = [(name, readable_rate(a, what), readable_rate(b, what), f"{b / a - 1:+.1%}") for name, what, a, b in pairs]
    rows.append(("time taken", readable_time(first.seconds), readable_time(second.seconds), NOTHING))
    return "The machine itself, as measured in both runs:\n\n" + table(("", "A", "B", "change"), rows)


def _listed(title: str, ids: Sequence[str]) -> str:
    return "\n".join([f"{title}:", "", *(f"- {name}" for name in ids)])
