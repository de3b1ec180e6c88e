"""What a run comes to, for report, plots and README: ratios to every peer, open losses, the steps of an ablation."""

import math
from dataclasses import dataclass

from .reading import COMPETING, DIRECTIONS, Case, Question, Run


@dataclass(frozen=True)
class Loss:
    """A peer that is faster than ours as it runs by default, beyond the noise.

    Attributes:
        question: What both did.
        peer: The faster one.
        factor: How many times as fast as ours it is; above one.
        better: A variant of ours that the peer does not beat, if there is one.
    """

    question: Question
    peer: Case
    factor: float
    better: Case | None


def losses(run: Run) -> list[Loss]:
    """The open losses, the largest first."""
    found = []
    for question in run.questions(*COMPETING):
        ours, fastest = question.ours, question.fastest_of_ours
        for peer in question.peers if ours else ():
            if ours.loses_to(peer):
                better = None if fastest.loses_to(peer) else fastest
                found.append(Loss(question, peer, 1 / ours.factor(peer), better))
    return sorted(found, key=lambda loss: -loss.factor)


@dataclass(frozen=True)
class Ratios:
    """Peer's time over ours, for each shape of an operation: above one we are faster."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The geometric mean: that of the inverses is its inverse."""
        return math.exp(sum(map(math.log, self.values)) / len(self.values))


def kernel_ratios(run: Run) -> dict[tuple[str, str | None, str, bool], dict[str, Ratios]]:
    """Ratios to each peer for each operation, direction, dtype, and with or without CUDA graphs.

    An operation that no peer was timed with has no entry.
    """
    found: dict[tuple[str, str | None, str, bool], dict[str, list[float]]] = {}
    for question in run.questions("kernels"):
        ours, case = question.ours, question.first
        for peer in question.peers if ours else ():
            by_peer = found.setdefault((case.name, case.direction, case.dtype, case.graph), {})
            by_peer.setdefault(peer.variant, []).append(peer.seconds.median / ours.seconds.median)
    return {
        key: {peer: Ratios(tuple(values)) for peer, values in found[key].items()}
        for key in sorted(found, key=_in_words)
    }


def _in_words(key: tuple[str, str | None, str, bool]) -> tuple:
    """For sorting: forward before backward, with or without a direction."""
    name, direction, dtype, graph = key
    return name, DIRECTIONS.index(direction) if direction else -1, dtype, graph


def ablations(run: Run) -> list[list[Case]]:
    """The steps of every ablation in their order, which is not that of measuring them."""
    return [
        sorted(question.cases, key=lambda case: case.extra.get("step", 0)) for question in run.questions("ablation")
    ]


def in_order(names: list[str]) -> list[str]:
    """Each name once, where it first was."""
    return list(dict.fromkeys(names))
