"""``minimagen-fast export``: a trained cascade in a folder of its own, to be kept, handed on and loaded anywhere."""

import argparse
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import checkpoint
from .cascade_origins import description, open_folders, origins_of
from .diffusion_model import GaussianDiffusion
from .files import check_folder, file_digest, named_path, sync_folder
from .generate import build_imagen
from .Imagen import Imagen
from .model_card import KIND_WORDS, ExportedUnet, model_card, training_facts
from .training import (
    create_directory,
    get_minimagen_parser,
    get_model_size,
    save_training_info,
)
from .weights_files import EXPORTED, KINDS, TrainedFolder, Weights, fit

__all__ = ["add_export_arguments", "export_cascade", "run_export"]

FORMATS = ("safetensors", "pth")
PROGRESS = "training_progess.txt"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what to export, and where to."""
    add = parser.add_argument
    add(
        "DIRECTORIES",
        nargs="+",
        type=named_path,
        metavar="DIR",
        help="training directory; several if U-Nets were trained apart",
    )
    add("--OUT", required=True, type=named_path, help="folder to make; nothing may be in it")
    add("--FORMAT", choices=FORMATS, default=FORMATS[0], help="of the weights; pth is minimagen's (%(default)s)")
    add(
        "--WEIGHTS",
        choices=KINDS,
        default=KINDS[0],
        help="with the lowest validation loss, the latest, or averaged (%(default)s)",
    )
    add("--UNET", action="append", default=[], metavar="N=DIR", help="take U-Net N, from 1, from this directory")


def run_export(args: argparse.Namespace) -> int:
    """Export as the arguments say.

    Raises:
        ValueError, OSError: if an argument cannot be used, or the folder cannot be written.
    """
    chosen = dict(_choice(words) for words in args.UNET)
    if len(chosen) < len(args.UNET):
        raise ValueError(f"--UNET names a U-Net twice: {' '.join(args.UNET)}")
    exported = export_cascade(args.DIRECTORIES, args.OUT, format=args.FORMAT, weights=args.WEIGHTS, chosen=chosen)
    for unet in exported:
        print(f"U-Net {unet.number}: {unet.parameters:,} parameters, {KIND_WORDS[unet.kind]}, from {unet.source}")
    print(f'Exported to {args.OUT}. Try: minimagen-fast sample -d {shlex.quote(str(args.OUT))} -c "a caption"')
    return 0


def _choice(words: str) -> tuple[int, Path]:
    number, _, directory = words.partition("=")
    if not number.isdecimal() or not directory:
        raise ValueError(f"--UNET must be N=DIR, such as 2=training_2, got {words!r}")
    return int(number), Path(directory)


def export_cascade(
    directories: Sequence[Path],
    out: Path,
    *,
    format: str = "safetensors",
    weights: str = "best",
    chosen: Mapping[int, Path] | None = None,
) -> list[ExportedUnet]:
    """Writes a cascade whose U-Nets were trained in one or several directories into one folder.

    The folder has ``parameters/``, a model card ``README.md``, and ``unet_I.safetensors`` (I counts from 0) or, for
    `format` ``pth``, ``state_dicts/unet_I_state_TIMESTAMP.pth`` as minimagen has it; and what is known of each U-Net in
    ``export.json``, for an export of this export. It is written beside and takes its name when all of it is on the
    disk. The weights are to the bit those of the training.

    Args:
        directories: Training directories, or exported folders. Their descriptions of the cascade must agree.
        out: Folder to make. It may be there if it is empty.
        format: ``safetensors`` or ``pth``.
        weights: ``best``: those with the lowest validation loss, averaged where averages are kept; ``latest``: those
            of the latest save; ``ema``: the latest averages.
        chosen: Directories by number of the U-Net, from 1, for those that are not to come from where they were trained,
            or that were trained in several.

    Returns:
        What has been written, for each U-Net.

    Raises:
        FileExistsError: There is something in `out`.
        NotADirectoryError: There can be no folder, because a file is there.
        FileNotFoundError: Parameters are missing.
        ValueError: An argument is out of range; the descriptions differ; a U-Net was trained nowhere, or in two
            directories; or its weights cannot be read.
        OSError: The folder cannot be written.
    """
    check_folder("--OUT", Path(out))
    if format not in FORMATS:
        raise ValueError(f"format must be {' or '.join(FORMATS)}, got {format!r}")
    if weights not in KINDS:
        raise ValueError(f"weights must be {', '.join(KINDS[:-1])} or {KINDS[-1]}, got {weights!r}")
    chosen = {} if chosen is None else chosen
    folders = open_folders([*directories, *chosen.values()])
    unets_params, imagen_params = description(list(folders.values()))
    origins = origins_of(folders, chosen, len(unets_params))
    with torch.device("meta"):
        imagen = build_imagen(unets_params, imagen_params)
    timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")

    with _written_whole(out) as part:
        _save_description(part, timestamp, unets_params, imagen_params, imagen, origins[1])
        exported = []
        for number, folder in origins.items():
            if format == "pth":
                path = part / "state_dicts" / f"unet_{number - 1}_state_{timestamp}.pth"
            else:
                path = part / f"unet_{number - 1}.safetensors"
            found = folder.weights(number, weights)
            if found.kind != weights:
                warnings.warn(
                    f"{folder.directory} has no best weights of U-Net {number}: the latest, {found.path}, are exported",
                    stacklevel=2,
                )
            exported.append(_export_unet(imagen, number, folder, found, path, part))
        if format != "pth":
            for name in ("state_dicts", "tmp"):
                (part / name).rmdir()
            (part / PROGRESS).unlink()
        record = {unet.number: {"kind": unet.kind, "training": unet.training} for unet in exported}
        (part / EXPORTED).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        card = model_card(Path(os.path.abspath(out)).name, imagen, exported, imagen_params, pth=format == "pth")
        (part / "README.md").write_text(card, encoding="utf-8")
    return exported


@contextmanager
def _written_whole(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` at the end of the block, or goes if there is an error in it."""
    out = Path(os.path.realpath(out))  # what a link leads to can be replaced
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"--OUT {out} is not empty: name another folder, or delete this one")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed process of the same number has left
    try:
        part.mkdir()
        yield part
        for path in sorted(part.rglob("*")):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
            else:
                sync_folder(path)
        sync_folder(part)
        if out.is_dir():  # not every system renames over a folder; one that has been filled meanwhile stays
            out.rmdir()
        part.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _save_description(
    part: Path,
    timestamp: str,
    unets_params: Sequence[dict[str, Any]],
    imagen_params: dict[str, Any],
    imagen: Imagen,
    origin: TrainedFolder,
) -> None:
    """Makes a training directory without weights."""
    # With them a training of the same kind can be started. Paths are nobody else's business.
    documented = {action.dest for action in get_minimagen_parser()._actions} - {"PARAMETERS", "RESTART_DIRECTORY"}
    arguments: dict[str, Any] = {name: value for name, value in origin.arguments.items() if name in documented}
    training_dir = create_directory(part)
    save_training_info(arguments, timestamp, unets_params, imagen_params, get_model_size(imagen), training_dir)


def _export_unet(
    imagen: Imagen, number: int, folder: TrainedFolder, found: Weights, path: Path, part: Path
) -> ExportedUnet:
    """Writes the weights of one U-Net to `path`; `imagen` is without weights, and stays so."""
    state = found.read()
    unet, diffusion = imagen.unets[number - 1], imagen.noise_schedulers[number - 1]
    assert isinstance(diffusion, GaussianDiffusion)
    fit(unet, state, found.path, assign=True)
    _save_weights(state, path)
    unet.to("meta")
    # What was exported before is what it was then.
    before = folder.exported.get(number) if found.kind == "best" else None
    return ExportedUnet(
        number=number,
        image_size=imagen.image_sizes[number - 1],
        timesteps=diffusion.num_timesteps,
        parameters=sum(parameter.numel() for parameter in unet.parameters()),
        dtypes=tuple(sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})),
        kind=before["kind"] if before else found.kind,
        source=found.path,
        file=path.relative_to(part).as_posix(),
        bytes=path.stat().st_size,
        sha256=file_digest(path),
        training=before["training"] if before else training_facts(folder, number, len(imagen.unets)),
    )


def _save_weights(state: Mapping[str, Tensor], path: Path) -> None:
    try:
        if path.suffix == ".pth":
            checkpoint.save(dict(state), path)
            return
        path.touch()
        mode = path.stat().st_mode
        save_file({name: value.contiguous() for name, value in state.items()}, path, metadata={"format": "pt"})
        path.chmod(mode)  # which safetensors makes unreadable for others
    except (SafetensorError, RuntimeError) as error:
        # What both say when the disk is full.
        raise OSError(f"{path.name} could not be written to {path.parent.parent}: {error}") from error
