"""How much is measured: in CI, on a CPU, on a GPU, or everything."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """What a run may take.

    Attributes:
        name: The word after ``--profile``.
        seconds: When this long after its start no further case is begun; those left out are listed as missing.
        case_seconds: About how long one case is timed, its warm-up aside.
        min_rounds: Fewest samples of a case, where they take no more than ten times as long; of others three.
        max_rounds: Most samples of a case.
        matrix_side: Side of the square matrices whose product gives the matrix rate.
        copy_mib: Size of the tensor whose copy gives the bandwidth, in MiB.
        rotate: Whether inputs are rotated past the cache. Without, times say little, but a run takes less of it.
    """

    name: str
    seconds: float
    case_seconds: float
    min_rounds: int
    max_rounds: int
    matrix_side: int
    copy_mib: int
    rotate: bool = True


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("smoke", 70, 0.02, 3, 10, 256, 16, rotate=False),
        Profile("cpu", 570, 1.0, 5, 30, 1024, 256),
        Profile("gpu", 450, 0.1, 10, 50, 8192, 2048),
        Profile("full", 4 * 3600, 0.5, 10, 100, 8192, 2048),
    )
}


def default_profile(cuda: bool) -> str:
    """The profile for a machine with or without a CUDA device."""
    return "gpu" if cuda else "cpu"
