"""``minimagen-fast plan``: from command line arguments, or a training's settings, to a plan."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files import named_path
from .generate import checked_params
from .plan import Assumed, make_plan
from .plan_data import Data
from .plan_setup import CARDS, STRATEGIES, Card, Setup, read_json
from .plan_table import plan_text
from .plan_time import from_mfu, from_profile
from .plan_unet import Network
from .settings import PRECISIONS
from .t5 import get_encoded_dim
from .Unet import Base, BaseTest, Super, SuperTest

__all__ = ["add_plan_arguments", "run_plan"]

MFU = 0.4
UNETS: dict[str, tuple[dict[str, Any], int]] = {
    "Base": (Base.defaults, 64),
    "Super": ({**Super.defaults, "lowres_cond": True}, 256),
    "BaseTest": (BaseTest.defaults, 16),
    "SuperTest": ({**SuperTest.defaults, "lowres_cond": True}, 32),
}
# What the command line may leave to the settings of a training.
DEFAULTS: dict[str, Any] = {
    "gpus": 1,
    "accumulate": 1,
    "ema": False,
    "checkpoint_levels": (),
    "strategy": "all",
    "precision": None,
}


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = parser.add_argument_group("what is trained").add_argument
    add("--config", type=named_path, help="settings of a training: its directory, config.json or parameters folder")
    add("--unet", help=f"{', '.join(UNETS)}, or a JSON file with arguments of Unet; this or a --config is needed")
    add("--unet-number", type=int, help="which U-Net of the --config, from 1")
    add("--side", type=int, help="height and width of its images (Base 64, Super 256)")
    add("--t5", help="text encoder (t5_base)")
    add("--max-tokens", type=int, default=64, help="tokens after which captions are cut off (%(default)s)")
    add("--images", type=int, required=True, help="images that the training is to see, repetitions counted")
    add = parser.add_argument_group("how").add_argument
    add("--batch", type=int, help="images of a GPU in one forward pass (the --config's share)")
    add("--accumulate", type=int, help="batches whose gradients make one optimizer step (1)")
    add("--checkpoint-levels", help="levels of the U-Net to compute twice to save memory, such as 0,1")
    add("--ema", action="store_true", default=None, help="keep averages of the weights")
    add("--strategy", choices=(*STRATEGIES, "all"), help="(all)")
    add("--gather", choices=("bfloat16", "float32"), help="of sharded weights (what is computed in)")
    add = parser.add_argument_group("where").add_argument
    add("--gpus", type=int, help="number of GPUs (1)")
    add("--gpus-per-node", type=int, default=8, help="(%(default)s)")
    add("--card", default="h200", help=f"{', '.join(CARDS)}, or a JSON file that describes one (%(default)s)")
    add("--link-gbps", type=float, help="of a GPU to others of its node, 10^9 bits a second (the data sheet's)")
    add("--node-link-gbps", type=float, help="of a GPU to other nodes (the data sheet's)")
    add = parser.add_argument_group("how fast").add_argument
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--mfu", type=float, help=f"assumed share of the card's matrix rate ({MFU})")
    rate.add_argument("--profile", type=named_path, help="result file of the benchmark suite, for a measured rate")
    add("--profile-network", help="name of the network in the --profile, if it has another one there")
    add = parser.add_argument_group("what is assumed").add_argument
    for name, what in (
        ("usable-memory", "share of a card's memory that can be filled"),
        ("link-efficiency", "share of the links' rates that is reached"),
        ("memory-efficiency", "share of the memory's bandwidth that the optimizer reaches"),
    ):
        add(f"--{name}", type=float, default=getattr(Assumed, name.replace("-", "_")), help=f"{what} (%(default)s)")
    add("--captions", type=int, help="pictures of the data set, each with a caption (as many as --images)")
    add("--tokens-per-caption", type=float, default=20.0, help="on average (%(default)s)")
    add("--bytes-per-picture", type=float, default=50e3, help="of its file, on average (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes, seconds, images")


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of a training.

    Returns:
        The exit status, 0.

    Raises:
        ValueError, OSError: an argument, or a file that it names, cannot be used.
    """
    if args.images < 1:
        raise ValueError(f"--images must be at least 1, got {args.images}")
    if args.unet is not None and args.unet_number is not None:
        raise ValueError("--unet-number is of a U-Net in the --config: leave it out, or --unet")
    if args.profile_network is not None and args.profile is None:
        raise ValueError("--profile-network is of a network in the --profile: give that, too")
    settings = _settings_of(args)
    network = _network(args, settings)
    card = Card.named(args.card)
    for name in ("link_gbps", "node_link_gbps"):
        if getattr(args, name) is not None:
            card = replace(card, **{name: getattr(args, name)})
    # As `train` does where it is not told otherwise.
    precision = settings["precision"] or ("float32" if card.device == "cpu" else "bfloat16")
    setup = Setup(
        network=network,
        batch=_batch(args, settings),
        gpus=settings["gpus"],
        gpus_per_node=args.gpus_per_node,
        accumulate=settings["accumulate"],
        ema=settings["ema"],
        checkpoint_levels=settings["checkpoint_levels"],
        gather={"float32": 4, "bfloat16": 2}[args.gather or precision],
        precision=precision,
        device=card.device,
    )
    if args.profile is None:
        rate = from_mfu(setup, card, MFU if args.mfu is None else args.mfu)
    else:
        rate = from_profile(setup, card, args.profile, args.profile_network)
    plan = make_plan(
        setup,
        card,
        rate,
        images=args.images,
        data=Data(
            pictures=args.images if args.captions is None else args.captions,
            bytes_per_picture=args.bytes_per_picture,
            tokens=args.tokens_per_caption,
            width=setup.network.settings["text_embed_dim"],
            max_tokens=args.max_tokens,
        ),
        strategies=setup.strategies if settings["strategy"] == "all" else (settings["strategy"],),
        assumed=Assumed(args.usable_memory, args.link_efficiency, args.memory_efficiency),
    )
    print(json.dumps(plan.as_dict(), indent=2) if args.json else plan_text(plan))
    return 0


def _settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """How it is trained: the command line first, then the settings of a training, then the defaults."""
    levels = None if args.checkpoint_levels is None else _levels(args.checkpoint_levels)
    given = {name: getattr(args, name) for name in ("gpus", "accumulate", "ema", "strategy")}
    given["checkpoint_levels"] = levels
    config = {} if args.config is None else _config(args.config)
    values = {
        **DEFAULTS,
        **{name: value for name, value in _from_config(config).items() if value is not None},
        **{name: value for name, value in given.items() if value is not None},
        "config": config,
    }
    if values["strategy"] in STRATEGIES and values["gpus"] == 1:
        values["strategy"] = "all"  # on one GPU they are all the same
    return values


def _batch(args: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    """Images of a GPU; the settings of a training have those of all."""
    if args.batch is not None:
        return args.batch
    total, gpus = settings.get("batch_size"), settings["gpus"]
    if total is None:
        raise ValueError("--batch is needed: the images of a GPU in one forward pass")
    if gpus < 1 or total % gpus:
        raise ValueError(
            f"the batch size of {args.config}, {total}, cannot be shared out to {gpus} GPUs: give --batch, the images"
            " of a GPU, or another --gpus"
        )
    return total // gpus


def _levels(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--checkpoint-levels must be numbers from 0 with commas between, got {text!r}")
    return tuple(int(word) for word in words)


def _config(path: Path) -> dict[str, Any]:
    """The settings in a file, in a training directory, or those of the models alone in a parameters folder."""
    if not path.is_dir():
        return read_json(path)
    if (path / "config.json").is_file():
        return read_json(path / "config.json")
    inside = path / "parameters"
    unets, imagen = checked_params(inside if inside.is_dir() else path)
    return {"unets": unets, "imagen": imagen}


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("batch_size", "ranks", "accumulate", "unet_number"):
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} in the --config must be a whole number of at least 1, got {value!r}: correct it")
    levels = config.get("checkpoint_levels")
    if levels is not None and not isinstance(levels, list):
        raise ValueError(f"checkpoint_levels in the --config must be a list of numbers, got {levels!r}: correct it")
    if config.get("parallel") not in (None, *STRATEGIES):
        raise ValueError(
            f"parallel in the --config must be {' or '.join(STRATEGIES)}, got {config['parallel']!r}: correct it"
        )
    if config.get("precision") not in (None, *PRECISIONS):
        raise ValueError(
            f"precision in the --config must be null or {' or '.join(PRECISIONS)}, got {config['precision']!r}:"
            " correct it"
        )
    return {
        "precision": config.get("precision"),
        "batch_size": config.get("batch_size"),
        "gpus": config.get("ranks"),
        "accumulate": config.get("accumulate"),
        "ema": None if "ema_decay" not in config else config["ema_decay"] is not None,
        "checkpoint_levels": None if levels is None else tuple(levels),
        "strategy": config.get("parallel"),
    }


def _network(args: argparse.Namespace, settings: Mapping[str, Any]) -> Network:
    """The U-Net that the arguments name."""
    config = settings["config"]
    if args.unet is None and args.config is None:
        raise ValueError(f"--unet is needed: {', '.join(UNETS)}, or a JSON file with arguments of Unet; or a --config")
    if args.unet is None:
        name, values, side, encoder = _unet_of(config, args)
    elif args.unet in UNETS:
        (values, side), name, encoder = UNETS[args.unet], args.unet, None
    elif args.unet.endswith(".json"):
        values, side, name, encoder = read_json(Path(args.unet)), None, Path(args.unet).stem, None
    else:
        raise ValueError(f"--unet must be {', '.join(UNETS)}, or a JSON file with arguments of Unet; got {args.unet!r}")
    side = side if args.side is None else args.side
    if side is None:
        raise ValueError("--side is needed: height and width of the images of the U-Net in --unet")
    if args.t5 is not None or "text_embed_dim" not in values:
        values = {**values, "text_embed_dim": get_encoded_dim(args.t5 or encoder or "t5_base")}
    if not 1 <= args.max_tokens <= 256:
        raise ValueError(f"--max-tokens must lie in 1 to 256, got {args.max_tokens}")
    network = Network(f"{name}@{side}", values, side, args.max_tokens)
    network.check(settings["checkpoint_levels"])
    return network


def _unet_of(config: Mapping[str, Any], args: argparse.Namespace) -> tuple[str, dict[str, Any], int, str | None]:
    """Name, arguments, image size and text encoder of a U-Net in the settings of a training."""
    try:
        unets, imagen = config["unets"], config["imagen"]
        sizes = imagen["image_sizes"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"--config {args.config} lacks unets, imagen or its image_sizes: give --unet") from error
    sizes = sizes if isinstance(sizes, list) else [sizes]
    fine = isinstance(unets, list) and len(unets) == len(sizes) > 0 and all(isinstance(one, dict) for one in unets)
    if not fine or not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"--config {args.config} must have the arguments of each U-Net in unets, and a number for each in"
            f" image_sizes, got {sizes!r}: correct it, or give --unet"
        )
    number = args.unet_number or config.get("unet_number") or (1 if len(unets) == 1 else None)
    if number is None or not 1 <= number <= len(unets):
        raise ValueError(
            f"--unet-number must say which U-Net of {args.config} is meant, 1 to {len(unets)}; got {number}"
        )
    values = {**unets[number - 1], "lowres_cond": number > 1}
    encoder = imagen.get("text_encoder_name")
    # What a cascade makes of its U-Nets, see Imagen.
    width = imagen.get("text_embed_dim") or (get_encoded_dim(encoder) if encoder else None)
    if width is not None:
        values["text_embed_dim"] = width
    return f"unet-{number}", values, sizes[number - 1], encoder
