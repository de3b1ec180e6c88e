"""A plan as text for a terminal."""

from collections.abc import Callable, Sequence

from .plan import Plan
from .plan_setup import GIB

__all__ = ["plan_text"]

Row = tuple[str, Sequence[str]]
_LABEL, _COLUMN = 44, 12


def plan_text(plan: Plan) -> str:
    """A plan as text: for every strategy a column; what is assumed is marked so, and listed at the end."""
    return "\n".join(
        [_title(plan), "", *_counted(plan), "", *_memory(plan), "", *_step(plan), "", *_data(plan), "", *_sources(plan)]
    )


def _title(plan: Plan) -> str:
    setup = plan.setup
    where = f"{setup.gpus} x {plan.card.name}, " + ("1 node" if setup.nodes == 1 else f"{setup.nodes} nodes")
    batches = f"{setup.batch} images a GPU" + (f", {setup.accumulate} times" if setup.accumulate > 1 else "")
    return f"{setup.network.name}: {plan.parameters:,} parameters on {where}; {batches}: {setup.global_batch:,} a step"


def _counted(plan: Plan) -> list[str]:
    flops, levels = plan.flops, plan.setup.checkpoint_levels
    again = f", once more {flops.again / 1e12:.2f}" if levels else ""
    lines = [
        f"FLOPs of an image, 10^12: forward {flops.forward / 1e12:.2f}, backward {flops.backward / 1e12:.2f}{again}",
        f"kept for the backward pass: {plan.kept_per_image / 2**20:,.0f} MiB an image",
    ]
    # Sharded weights that come in bfloat16 need no copies.
    sharded_too = plan.setup.gather == 4 or plan.setup.gpus == 1
    if plan.copies and (sharded_too or "ddp" in plan.memory):
        lines[-1] += f", and {plan.copies / GIB:.2f} GiB of weights in {plan.setup.precision}"
        lines[-1] += "" if sharded_too else " with ddp"
    if levels:
        lines.append(f"levels computed twice: {', '.join(map(str, levels))}")
    return lines


def _table(plan: Plan, heading: str, rows: Sequence[tuple[str, Callable[[str], str]]]) -> list[str]:
    names = list(plan.memory)
    lines = [_line(heading, ["one GPU"] if plan.setup.gpus == 1 else names)]
    return lines + [_line(f"  {label}", [value(name) for name in names]) for label, value in rows]


def _line(label: str, values: Sequence[str]) -> str:
    return label.ljust(_LABEL) + "".join(value.rjust(_COLUMN) for value in values)


def _memory(plan: Plan) -> list[str]:
    def gib(attribute: str) -> Callable[[str], str]:
        return lambda name: f"{getattr(plan.memory[name], attribute) / GIB:.2f}"

    rows: list[tuple[str, Callable[[str], str]]] = [
        ("weights", gib("weights")),
        ("Adam's moments", gib("optimizer")),
        *([("averages (EMA)", gib("averages"))] if plan.setup.ema else []),
        ("gradients", gib("gradients")),
        ("forward and backward pass", gib("step")),
        ("gathered weights, buffers of the exchange", gib("exchange")),
        ("most in a step", gib("peak")),
        ("most while validating and saving", gib("saving")),
        (f"fits into {plan.available / GIB:.0f} GiB [assumed]", lambda name: "yes" if plan.fits(name) else "NO"),
        ("largest batch of a GPU", lambda name: f"{plan.largest[name]:,}"),
    ]
    return _table(plan, "Memory of a GPU, GiB", rows)


def _step(plan: Plan) -> list[str]:
    def milliseconds(attribute: str) -> Callable[[str], str]:
        return lambda name: f"{getattr(plan.times[name], attribute) * 1e3:,.1f}"

    rows: list[tuple[str, Callable[[str], str]]] = [
        (f"computing, ms [{'assumed' if plan.rate.assumed else 'measured'}]", milliseconds("compute"))
    ]
    if not plan.rate.optimizer_included:
        rows.append(("optimizer, ms [assumed]", milliseconds("optimizer")))
    if plan.setup.gpus > 1:
        rows += [
            ("sent by a GPU, GB", lambda name: f"{plan.times[name].sent / 1e9:.2f}"),
            ("of that to other nodes, GB", lambda name: f"{plan.times[name].sent_between / 1e9:.2f}"),
            ("exchange, ms [assumed]", milliseconds("exchange")),
            ("of that not hidden, ms [assumed]", milliseconds("waited")),
        ]
    rows += [
        ("step, ms", milliseconds("step")),
        ("images a second", lambda name: f"{plan.times[name].images_per_second:,.0f}"),
        ("scaling efficiency", lambda name: f"{plan.times[name].efficiency:.1%}"),
        (f"days for {plan.images:,} images", lambda name: f"{plan.days(name):.2f}"),
        ("MB a second to read on a node", lambda name: f"{plan.read_per_node(name) / 1e6:,.1f}"),
    ]
    return _table(plan, "An optimizer step", rows)


def _data(plan: Plan) -> list[str]:
    data = plan.data
    return [
        f"Data: {data.pictures:,} pictures with a caption each",
        _line("  pictures, TB [assumed]", [f"{data.pictures_bytes / 1e12:.3f}"]),
        _line("  captions, packed, float16, TB [assumed]", [f"{data.captions / 1e12:.3f}"]),
        _line(f"  the same, padded to {data.max_tokens}, float32, TB", [f"{data.padded_captions / 1e12:.3f}"]),
    ]


def _sources(plan: Plan) -> list[str]:
    assumed, card, data = plan.assumed, plan.card, plan.data
    guesses = [
        *([f"a GPU reaches {plan.rate.source}"] if plan.rate.assumed else []),
        f"{assumed.usable_memory:.0%} of {card.memory_gib:g} GiB can be filled",
    ]
    if not plan.rate.optimizer_included:
        guesses.append(f"the optimizer reaches {assumed.memory_efficiency:.0%} of {card.memory_gbps:,g} GB/s")
    if plan.setup.gpus > 1:
        guesses += [
            f"links reach {assumed.link_efficiency:.0%} of {card.link_gbps:,g} Gb/s within a node and"
            f" {card.node_link_gbps:,g} Gb/s between nodes, for each GPU",
            f"a step of a ring takes {assumed.node_latency * 1e6:g} us within a node, {assumed.latency * 1e6:g} us"
            " between nodes",
        ]
    guesses += [
        f"a picture has {data.bytes_per_picture:,.0f} bytes, a caption {data.tokens:g} tokens of {data.width} numbers",
    ]
    lines = ["Assumed, not measured:", *(f"  {guess}" for guess in guesses)]
    if not plan.rate.assumed:
        lines += ["Measured:", f"  {plan.rate.source}"]
    return [*lines, "Counted: parameters, FLOPs, memory, bytes sent. " + "; ".join(plan.notes).capitalize() + "."]
