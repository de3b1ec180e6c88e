"""``minimagen-fast train``: from command line arguments to a training directory."""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from .caption_store import CaptionStore
from .data import ConceptualCaptions, FolderDataset, split_train_valid
from .generate import build_imagen
from .helpers import usable_device
from .Imagen import Imagen
from .shapes import ShapesDataset
from .training import (
    MinimagenTrain,
    create_directory,
    get_default_args,
    get_minimagen_dl_opts,
    get_minimagen_parser,
    get_model_params,
    get_model_size,
    load_restart_training_parameters,
    load_testing_parameters,
    save_training_info,
)
from .Unet import Base, BaseTest, Super, SuperTest, Unet

BUILT_IN, CONCEPTUAL = "built-in", "conceptual-captions"
BUILT_IN_PICTURES = 10_000
COND_DROP_PROB = 0.15


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the documented arguments of a training, and where the data is and where to train."""
    documented = get_minimagen_parser()
    for action in documented._actions:
        if action.dest != "help":
            parser._add_action(action)
    parser.add_argument(
        "--DATA",
        default=CONCEPTUAL,
        help=f"what to train on: {CONCEPTUAL} (%(default)s), {BUILT_IN} (shapes drawn on the spot), or a folder of"
        " captioned pictures",
    )
    parser.add_argument(
        "--CAPTIONS",
        default=None,
        help="folder of captions that `minimagen-fast encode-captions` has encoded: T5 is then not loaded",
    )
    parser.add_argument("--DEVICE", default=None, help="where to train, such as cpu or cuda:1 (cuda if there is one)")


def run_train(args: argparse.Namespace) -> int:
    """Train as the arguments say, in a new training directory in the working directory.

    Returns:
        The exit status, 0.

    Raises:
        ValueError, OSError, ImportError: if an argument or the data cannot be used.
        KeyboardInterrupt: after Ctrl-C; weights and state are saved by then, and it has been said where.
    """
    if args.RESTART_DIRECTORY is not None and args.PARAMETERS is not None:
        raise ValueError("give either --RESTART_DIRECTORY or --PARAMETERS, not both")
    if args.TESTING:
        load_testing_parameters(args)
        if args.DATA == BUILT_IN:
            args.T5_NAME = "t5_tiny"  # needs no files
    if args.RESTART_DIRECTORY is not None:
        load_restart_training_parameters(args)
    elif args.PARAMETERS is not None:
        load_restart_training_parameters(args, justparams=True)
    name = args.DEVICE or ("cuda:0" if torch.cuda.is_available() else "cpu")
    device = usable_device(name, "--DEVICE")

    train_data, valid_data = _datasets(args)
    imagen, unets_params, imagen_params = _model(args)
    imagen.to(device)
    timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    directory = Path(f"training_{timestamp}").absolute()
    training_dir = create_directory(directory)
    save_training_info(args, timestamp, unets_params, imagen_params, get_model_size(imagen), training_dir)
    sizes = " and ".join(f"{sum(p.numel() for p in unet.parameters()):,}" for unet in imagen.unets)
    print(
        f"Training U-Nets of {sizes} parameters at {' and '.join(map(str, imagen.image_sizes))} pixels on"
        f" {len(train_data)} pictures, on {device}.\nTraining directory: {directory}"
    )

    options = {**get_minimagen_dl_opts(device), "batch_size": args.BATCH_SIZE, "num_workers": args.NUM_WORKERS}
    # The last, smaller batch counts too where there is nothing to be compared between batches.
    valid_options = {**options, "shuffle": False, "drop_last": False}
    try:
        MinimagenTrain(
            timestamp,
            args,
            list(imagen.unets),
            imagen,
            DataLoader(train_data, **options),
            DataLoader(valid_data, **valid_options),
            training_dir,
            # All parameters in one launch, where there is a kernel for that.
            torch.optim.Adam(imagen.parameters(), lr=args.OPTIM_LR, fused=imagen.device.type in ("cuda", "cpu")),
        )
    except KeyboardInterrupt:
        print(
            f"\nSaved in {directory}. To go on: minimagen-fast train --RESTART_DIRECTORY {directory}"
            " and the same other arguments"
        )
        raise
    print(f'Done. Try: minimagen-fast sample -d {directory} -c "a caption"')
    return 0


def _datasets(args: argparse.Namespace) -> tuple[Subset, Subset]:
    captions = None if args.CAPTIONS is None else CaptionStore(args.CAPTIONS)
    if args.DATA == CONCEPTUAL:
        parts = ConceptualCaptions(args, smalldata=args.TESTING, captions=captions)
        assert isinstance(parts, tuple), "testset was not asked for"
        return parts
    dataset: Any
    if args.DATA == BUILT_IN:
        dataset = ShapesDataset(
            64 if args.TESTING else BUILT_IN_PICTURES,
            side_length=args.IMG_SIDE_LEN,
            encoder_name=args.T5_NAME,
            max_length=args.MAX_NUM_WORDS,
            captions=captions,
        )
    else:
        dataset = FolderDataset(
            args.DATA,
            side_length=args.IMG_SIDE_LEN,
            encoder_name=args.T5_NAME,
            max_length=args.MAX_NUM_WORDS,
            captions=captions,
        )
    return split_train_valid(dataset, args.TRAIN_VALID_FRAC, args.VALID_NUM)


def _model(args: argparse.Namespace) -> tuple[Imagen, list[dict[str, Any]], dict[str, Any]]:
    """The cascade, and the full parameters of its U-Nets and itself as a training directory keeps them."""
    if args.RESTART_DIRECTORY is not None:
        unets_params, imagen_params = get_model_params(Path(args.RESTART_DIRECTORY) / "parameters")
    elif args.PARAMETERS is not None:
        unets_params, imagen_params = get_model_params(args.PARAMETERS)
    else:
        classes = (BaseTest, SuperTest) if args.TESTING else (Base, Super)
        unets_params = [get_default_args(unet_class) for unet_class in classes]
        imagen_params = dict(image_sizes=(args.IMG_SIDE_LEN // 2, args.IMG_SIDE_LEN), cond_drop_prob=COND_DROP_PROB)
    if args.RESTART_DIRECTORY is None:
        # The command line has the last word on what the documented flags name.
        imagen_params = {**imagen_params, "timesteps": args.TIMESTEPS, "text_encoder_name": args.T5_NAME}
    unets_params = [
        {**get_default_args(Unet), **params, "lowres_cond": place > 0} for place, params in enumerate(unets_params)
    ]
    imagen_params = {**get_default_args(Imagen), **imagen_params}
    return build_imagen(unets_params, imagen_params), unets_params, imagen_params
