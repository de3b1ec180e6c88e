"""Result files with made-up numbers, for the tests of what reads them."""

import functools
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.results import Identity, Record, ResultFile

MACHINE = {"device": "Test CPU", "type": "cpu", "threads": 2, "cores": 2, "memory_gib": 7.8}
MACHINE |= {"driver": None, "clocks": None, "capability": None}
CARD = {"device": "Test GPU", "type": "cuda", "threads": 8, "cores": 8, "memory_gib": 141.0, "driver": "575.1"}
CARD |= {"clocks": {"sm_mhz": 1980.0, "memory_mhz": 3201.0}, "capability": [9, 0]}
SOFTWARE = {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1", "cuda": None, "minimagen_fast": "0.1.0"}
SOFTWARE |= {"commit": "abc1234", "dirty": False, "peers": {"minimagen": None, "xformers": "0.0.35"}}
CEILINGS = {"copy_bytes_per_second": 2e10, "flops_per_second": {"float32": 1e11, "bfloat16": 2e11}}
STARTED = datetime(2026, 11, 22, 12, 30, tzinfo=timezone.utc)
REFERENCE_PATH = "reference path of minimagen_fast, eager"
OPERATIONS = (
    "group_norm_silu",
    "layer_norm",
    "channel_layer_norm",
    "q_sample",
    "predict_start_from_noise",
    "q_posterior_mean",
    "ancestral_step",
    "ddim_step",
    "dpm_solver_pp_2m_step",
    "conv1x1_concat",
    "linear",
    "null_key_cross_attention",
    "upsample_conv3x3",
    "wide_conv2d",
)
ATTENTION_PEERS = ("sdpa:cudnn", "sdpa:flash", "sdpa:efficient", "sdpa_merge", "triton", "xformers")


def record(words: str, seconds: float, *, graph=False, noise=0.01, **more) -> Record:
    """A timed case from section/name/direction/shape/dtype/variant, - for no direction."""
    section, name, direction, shape, dtype, variant = words.split("/")
    identity = Identity(section, name, None if direction == "-" else direction, shape, dtype, variant, graph)
    samples = tuple(seconds * (1 + noise * step) for step in (-2, -1, 0, 1, 2))
    return Record(identity, samples=samples, **more)


def kernels(dtypes, graph=False, attention_peers=("sdpa",)):
    """Every operation at two sizes, with peers between half and eight times our time."""
    for number, name in enumerate(("null_key_attention", *OPERATIONS)):
        attention = name == "null_key_attention"
        peers = ("ours", "reference", "inductor", *(attention_peers if attention else ()))
        directions = ("forward",) if name.endswith("_step") else ("forward", "backward")
        for size in (1, 8):
            for direction in directions:
                for dtype in dtypes:
                    moved = 3_000_000 * size * (number + 1)
                    seconds = moved / CEILINGS["copy_bytes_per_second"] * (1.1 + 0.2 * number)
                    for place, peer in enumerate(peers):
                        slower = 1 if peer == "ours" else 0.6 * 1.35 ** (place + number % 4 + (size == 8))
                        yield record(
                            f"kernels/{name}/{direction}/b{size}-512x64x64/{dtype}/{peer}",
                            seconds * slower,
                            graph=graph,
                            bytes=moved,
                            flops=int(seconds * 2e10 * size * (1 + (dtype == "bfloat16"))) if attention else None,
                            floor_seconds=moved / CEILINGS["copy_bytes_per_second"],
                            peak_bytes=moved // 3,
                        )


def networks(scale=1.0):
    families = {"convolution": 0.8, "group norm": 0.15, "elementwise": 0.05}
    variants = (("original", 1.0), ("ours", 0.55), ("ours-bf16-channels_last", 0.3), ("original-compiled", 0.45))
    for name, shape, seconds in (
        ("laptop-base@64", "b2-3x64x64", 0.2),
        ("laptop-super@128", "b2-3x128x128", 0.35),
        ("Base@64", "b2-3x64x64", 1.9),
        ("Super@256", "b2-3x256x256", 2.6),
    ):
        for direction, factor in (("forward", 1), ("both", 3.2)):
            for variant, share in variants:
                median = seconds * factor * share * scale
                extra = {"computes_in": "float32", "mfu": 0.31, "first_call_seconds": 2.5}
                yield record(
                    f"denoiser/{name}/{direction}/{shape}/float32/{variant}",
                    median,
                    floor_seconds=0.2 * seconds * factor * scale,
                    floor_by_family={k: 0.2 * seconds * factor * scale * v for k, v in families.items()},
                    peak_bytes=int(3e8 * factor * share),
                    launches=412,
                    extra=extra | ({"original": REFERENCE_PATH} if "original" in variant else {}),
                )
    for batch, seconds in ((1, 0.4), (8, 2.6)):
        for variant, share in (*variants[:2], ("ours-bf16", 0.3), ("ours-compiled", 0.25), variants[3]):
            extra = {"computes_in": "float32", "guidance": 3.0, "mfu": 0.31}
            extra |= {"switched_on": "memory_format, condition_cache"} if variant.startswith("ours") else {}
            words = f"sampling-step/cpu-base@64/-/b{batch}-3x64x64/float32/{variant}"
            yield record(words, seconds * share * scale, floor_seconds=0.2 * seconds * scale, extra=extra)
    for variant, seconds in (("all-timesteps", 4.0), ("dpmpp_2m-20", 0.8)):
        extra = {"images_per_second": 4 / seconds, "guidance": 3.0, "switched_on": "condition_cache"}
        yield record(f"few-steps/quickstart/-/b4-16-32-100-50steps/float32/{variant}", seconds, extra=extra)
    for variant, share in variants[:3]:
        extra = {"images_per_second": 0.31 / share, "seconds_to_first_image": 3.2 * share, "guidance": 3.0}
        yield record(f"sampling/laptop/-/b1-64-128-20steps/float32/{variant}", 3.2 * share, extra=extra)
        extra = {"data_wait_share": 0.013, "step_seconds": {"p50": 0.5, "p90": 0.61, "p99": 0.7}}
        extra |= {"peak_bytes_per_image": 7 << 20, "saved_bytes_per_image": 6.5 * 2**20}
        yield record(
            f"training/laptop-base@64/both/b2-3x64x64/float32/{variant}", share, extra=extra, peak_bytes=7 << 28
        )
    steps = (("reference", 0.2), ("+kernels", 0.12), ("+channels_last", 0.125), ("+bfloat16", 0.07))
    for number, (variant, seconds) in reversed(list(enumerate(steps))):
        words = f"ablation/laptop-base@64/forward/b2-3x64x64/float32/{variant}"
        yield record(words, seconds, extra={"step": number}, floor_seconds=0.03)
    for variant, seconds in (("torch", 1.4), ("ours", 2.1)):
        yield record(f"startup/import/-/process/float32/{variant}", seconds)


def untimed(words: str, status: str, reason: str) -> Record:
    found = record(words, 1.0)
    found.samples, found.status, found.reason = (), status, reason
    return found


FAILURES = (
    untimed("kernels/q_sample/forward/b9/float32/inductor", "parity_failed", "0.3 away from the reference"),
    untimed("kernels/q_sample/backward/b9/float32/inductor", "error", "TypeError: <lambda> | takes none"),
    untimed("kernels/q_sample/forward/b9/float32/xformers", "unavailable", "needs a CUDA device"),
)


def write(path: Path, records, *, profile="cpu", complete=True, started=STARTED, machine=MACHINE, seconds=83.4) -> Path:
    """A result file, by what writes those of real runs."""
    header = {"profile": profile, "started": started.isoformat(timespec="seconds"), "machine": machine}
    file = ResultFile(path, header | {"software": SOFTWARE, "ceilings": CEILINGS})
    file.add_missing("peer minimagen", "not installed: pip install minimagen")
    for entry in records:
        file.add(entry, seconds / 2)
    file.finish(complete, seconds)
    return file.path


@functools.cache
def text_of(device: str) -> str:
    """A result file of a CPU (``cpu``), with failures, or of a card (``gpu``), with CUDA graphs."""
    records: list[Record] = [*networks(), *kernels(("float32",)), *FAILURES]
    options = {}
    if device == "gpu":
        dtypes = ("bfloat16", "float32")
        records = [*networks(0.01), *kernels(dtypes, True, ATTENTION_PEERS), *kernels(("bfloat16",))]
        options = {"profile": "gpu", "machine": CARD}
    with tempfile.TemporaryDirectory() as folder:
        return write(Path(folder) / "made.json", records, **options).read_text()


def make_file(folder: Path, device: str) -> Path:
    """Put such a file where a run would."""
    file = folder / f"test-{device}" / f"{device}-2026-11-22-abc1234.json"
    file.parent.mkdir()
    file.write_text(text_of(device))
    return file
