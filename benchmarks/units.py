"""Numbers for people: three significant digits at most, and the unit that fits."""

import math

TIME_UNITS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTE_UNITS = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
RATE_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
# A value is given in the largest unit of which there is at least so much: 999.6 ms are 1 s. Seconds and minutes go
# further, so that a run of 90 seconds is not one of 1.5 minutes.
ENOUGH, ENOUGH_TIME = 0.9995, {"h": 3.0, "min": 3.0}
NOTHING = "–"


def digits(value: float) -> str:
    """A number with at most three significant digits, zeros at the end left out: 12.3, 0.5, 1230."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    text = f"{round(value, decimals):.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _in_unit(value: float, units, enough=ENOUGH) -> str:
    for size, unit in units:
        if value >= size * (enough if isinstance(enough, float) else enough.get(unit, ENOUGH)):
            break
    return f"{digits(value / size)} {unit}"


def readable_time(seconds: float) -> str:
    """Seconds as ``12.3 µs``, ``90 s``, ``9.17 min``."""
    return _in_unit(seconds, TIME_UNITS, ENOUGH_TIME)


def readable_bytes(count: float) -> str:
    """A number of bytes as ``1.5 MiB``; binary units."""
    return _in_unit(count, BYTE_UNITS)


def readable_rate(per_second: float, what: str) -> str:
    """A rate as ``4.28 TB/s`` (``what`` is ``B``) or ``790 TFLOP/s`` (``FLOP``); decimal units."""
    return f"{_in_unit(per_second, RATE_UNITS)}{what}/s"


def readable_ratio(ratio: float) -> str:
    """A ratio as ``2.1x``; two digits where it is below ten."""
    decimals = 0 if ratio >= 9.95 else 1 if ratio >= 0.995 else 2
    return f"{ratio:.{decimals}f}x"


def readable_share(share: float) -> str:
    """A share of one as per cent, whole from ten on."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f}%"
