"""What the device can do at best. Measured before the first case of any run; here it is only shown and looked at."""

import math

from .ceilings import DTYPES


def test_ceilings(harness):
    measured = harness.context.ceilings
    rates = measured["flops_per_second"]
    assert {*DTYPES} <= {*rates}
    for name, value in {"copy": measured["copy_bytes_per_second"], **rates}.items():
        assert math.isfinite(value) and value > 0, name
    harness.last_summary = f"ceilings: copy {measured['copy_bytes_per_second'] / 1e9:.4g} GB/s, " + ", ".join(
        f"{name} {rate / 1e12:.4g} TFLOP/s" for name, rate in rates.items()
    )
