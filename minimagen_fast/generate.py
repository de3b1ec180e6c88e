"""Image generation: loading a trained Imagen, and sampling into files."""

import inspect
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from .arguments import check_tensor
from .files import check_folder
from .helpers import device_for_values
from .Imagen import Imagen
from .pictures import to_pil_images
from .t5 import get_encoded_dim
from .training import get_model_params
from .Unet import Unet
from .weights_files import TrainedFolder

__all__ = ["load_minimagen", "load_params", "sample_and_save"]


def load_params(directory: str | os.PathLike) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads the parameters of the U-Nets and of the Imagen from a training directory.

    Args:
        directory: Training directory, see :mod:`.training`.

    Returns:
        The parameters of each U-Net in their order, and those of the Imagen.

    Raises:
        FileNotFoundError: The directory has no folder ``parameters``, or a file is missing there.
        ValueError: A file is not valid JSON, or does not hold parameters.
    """
    return checked_params(Path(directory) / "parameters", needed=("image_sizes", "text_encoder_name"))


def checked_params(
    folder: Path, *, needed: Sequence[str] = ("image_sizes",)
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Reads a folder ``parameters``, of whatever origin.

    Args:
        folder: The folder.
        needed: What the parameters of the Imagen must have.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A file is not valid JSON, or does not hold parameters.
    """
    unets_params, imagen_params = get_model_params(folder)
    owners = [(f"U-Net {number}", params, ["dim"]) for number, params in enumerate(unets_params, start=1)]
    for owner, params, names in (*owners, ("the Imagen", imagen_params, needed)):
        if not isinstance(params, dict) or not set(names) <= set(params):
            raise ValueError(
                f"the parameters of {owner} in {folder} must be an object with {' and '.join(names)}, got"
                f" {str(params)[:100]}: restore the file, or save the parameters again"
            )
    return unets_params, imagen_params


def load_minimagen(directory: str | os.PathLike, *, device: torch.device | str | None = None) -> Imagen:
    """Loads a trained Imagen from a training directory or from a folder that ``minimagen-fast export`` has made.

    Each U-Net gets the exported weights or those in ``state_dicts`` (the last by name, that is by timestamp, if there
    are several) or, where there are none, with a warning, the latest, in ``tmp`` or in the newest checkpoint. Files of
    a U-Net with other names, such as ``unet_0_best.pt``, are taken where there is only one.

    Args:
        directory: Training directory, see :mod:`.training`, or exported folder.
        device: Where to put the Imagen; by default ``cuda:0`` if there is one, else the CPU.

    Returns:
        The Imagen, in evaluation mode.

    Raises:
        FileNotFoundError: Parameters are missing.
        TypeError, ValueError: The parameters are not those of an Imagen and its U-Nets; a U-Net has no weights, or
            weights that cannot be read or do not fit its parameters; or the device cannot be used.
        OSError: The configuration of the text encoder, if that is a hub id or a folder, is nowhere to be had.
    """
    directory = Path(directory)
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    device = device_for_values(device)
    imagen = build_imagen(*load_params(directory), described_in=directory / "parameters", draw_as_original=True)
    folder = TrainedFolder(directory)
    for index, unet in enumerate(imagen.unets):
        weights = folder.weights(index + 1)
        if weights.kind != "best":
            warnings.warn(
                f"{directory / 'state_dicts'} has no weights of U-Net {index + 1}: the latest, {weights.path}, are used"
                " instead of the best. If only other U-Nets were trained here, they are as the training began: put"
                " several trainings together with `minimagen-fast export`",
                stacklevel=2,
            )
        weights.load_into(unet)
    return imagen.to(device).eval()


def build_imagen(
    unets_params: list[dict[str, Any]],
    imagen_params: dict[str, Any],
    *,
    described_in: Path | None = None,
    draw_as_original: bool = False,
) -> Imagen:
    """Makes an Imagen, with fresh weights, from the parameters that a training directory keeps.

    Args:
        unets_params: The parameters of each U-Net, as :func:`load_params` returns them.
        imagen_params: The parameters of the Imagen.
        described_in: The folder ``parameters`` that they come from, for an error about their text encoder.
        draw_as_original: Whether to draw all the random numbers that the original package draws, which first makes
            each U-Net without regard to its place: what is drawn afterwards is then the same for a seed.

    Raises:
        TypeError, ValueError: The parameters do not fit together, or the text encoder's name is unknown.
        OSError: The text encoder's configuration is nowhere to be had.
    """
    # The settings that Imagen gives each U-Net for its place, given at once: it need not make them a second time.
    channels = imagen_params.get("channels", 3)
    width = text_width(imagen_params, described_in)
    fitted = {"text_embed_dim": width, "channels": channels, "channels_out": channels}
    placed = [{**params, **fitted, "lowres_cond": index > 0} for index, params in enumerate(unets_params)]
    drawn: list[Unet | None] = [None] * len(placed)
    if draw_as_original:
        # Of those that do not fit nothing is needed but that they were drawn: one at a time is in memory.
        for index, (params, wanted) in enumerate(zip(unets_params, placed, strict=True)):
            unet = Unet(**params)
            if all(getattr(unet, name) == wanted[name] for name in (*fitted, "lowres_cond")):
                drawn[index] = unet
            del unet
    unets = [Unet(**params) if unet is None else unet for unet, params in zip(drawn, placed, strict=True)]
    return Imagen(unets, **imagen_params)


def text_width(imagen_params: Mapping[str, Any], described_in: Path | None = None) -> int:
    """Dimensions of the text encodings that an Imagen with these parameters takes.

    Args:
        imagen_params: Its parameters.
        described_in: The folder ``parameters`` that they come from, for the error.

    Raises:
        ValueError: The text encoder's name is unknown here.
        OSError: Its configuration is nowhere to be had.
    """
    if imagen_params.get("text_embed_dim"):
        return imagen_params["text_embed_dim"]
    try:
        return get_encoded_dim(imagen_params["text_encoder_name"])
    except (ValueError, OSError) as error:
        if described_in is None:
            raise
        kind = ValueError if isinstance(error, ValueError) else OSError
        raise kind(
            f"the text encoder that {described_in} names cannot be had here: {error} If it is a folder that has moved,"
            f" or was named from another working directory, write its absolute path as text_encoder_name in"
            f" {described_in}/imagen_params_*.json"
        ) from error


def sample_and_save(
    captions: list,
    *,
    minimagen: Imagen | None = None,
    training_directory: str | os.PathLike | None = None,
    sample_args: dict = {},  # noqa: B006 (the documented default; it is only read)
    save_directory: str | os.PathLike | None = None,
    filetype: str = "png",
    device: torch.device | str | None = None,
) -> None:
    """Makes an image for each caption and saves them.

    The save directory gets ``generated_images/image_I.FILETYPE``, where I counts the captions from 0; ``captions.txt``
    with one caption a line (line breaks within a caption become spaces); and, if the Imagen came from a training
    directory, ``imagen_training_directory.txt`` with its path. Everything is checked before sampling starts.

    Args:
        captions: The captions.
        minimagen: The Imagen to use, or
        training_directory: the training directory to load it from: exactly one of these two.
        sample_args: Further arguments of :meth:`.Imagen.Imagen.sample`, but not `texts` or `return_pil_images`. Where
            `text_embeds` are among them, one for each caption, the captions are not encoded, but only written down.
        save_directory: Where to save; by default ``generated_images_`` and the date and time, in the working directory.
        filetype: Extension of the image files, such as "png" or "jpg"; any that PIL can write.
        device: Where to put the Imagen loaded from `training_directory`, see :func:`load_minimagen`.

    Raises:
        TypeError: `captions` is not a list of strings, or `sample_args` has an argument that there is not.
        ValueError: Another argument is out of range or does not fit the others.
        FileExistsError: In the save directory ``generated_images`` is there already and not empty, or one of the text
            files with other content.
        IsADirectoryError: A file's place there is taken by a directory.
        NotADirectoryError: A directory's place is taken by a file.
    """
    if not isinstance(captions, list | tuple):
        raise TypeError(
            f"captions must be a list of strings, got {type(captions).__name__}: put a single one in a list"
        )
    if wrong := [caption for caption in captions if not isinstance(caption, str)]:
        raise TypeError(f"captions must be a list of strings, but it holds {wrong[0]!r}")
    if not captions:
        raise ValueError("captions must hold at least one caption, got none")
    if (minimagen is None) == (training_directory is None):
        raise ValueError("give exactly one of minimagen and training_directory")
    if device is not None and training_directory is None:
        raise ValueError("device goes with training_directory; for minimagen, give it as sample_args={'device': ...}")
    if not isinstance(sample_args, Mapping):
        raise TypeError(f"sample_args must be a dictionary, got {type(sample_args).__name__}")
    if taken := {"texts", "return_pil_images"} & set(sample_args):
        raise ValueError(f"sample_args must not have {' and '.join(sorted(taken))}: captions and filetype decide these")
    _check_text(captions, sample_args.get("text_embeds"), sample_args.get("text_masks"))
    if save_directory is None:
        save_directory = datetime.now().strftime("generated_images_%Y%m%d_%H%M%S")
    root = Path(save_directory).absolute()
    folder = root / "generated_images"
    check_folder("save_directory", folder)
    texts = {"captions.txt": "".join(" ".join(re.split(r"[\r\n]+", caption)) + "\n" for caption in captions)}
    if training_directory is not None:
        texts["imagen_training_directory.txt"] = os.fspath(training_directory)
    if blocked := [root / name for name in texts if (root / name).is_dir()]:
        raise IsADirectoryError(f"{blocked[0]} is a directory, where a file is to be: choose another save_directory")
    if folder.exists() and os.listdir(folder):
        raise FileExistsError(f"{folder} is there already and not empty: choose another save_directory")
    # What was no UTF-8 where it comes from, such as the command line, has surrogates, which UTF-8 does not.
    contents = {root / name: text.encode("utf-8", "backslashreplace") for name, text in texts.items()}
    if others := [path for path, content in contents.items() if path.exists() and path.read_bytes() != content]:
        raise FileExistsError(f"{others[0]} is there already and holds something else: choose another save_directory")

    if training_directory is not None:
        minimagen = load_minimagen(training_directory, device=device)
    assert minimagen is not None
    _check_filetype(filetype, minimagen)
    inspect.signature(minimagen.sample).bind(texts=captions, return_pil_images=True, **sample_args)

    new = [path for path in (folder, root) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        images = minimagen.sample(texts=list(captions), return_pil_images=True, **sample_args)
    except BaseException:
        # Folders without pictures are of no use.
        for made in new:
            with suppress(OSError):
                made.rmdir()
        raise
    # First, since to make them took the time.
    for index, image in enumerate(images):
        image.save(folder / f"image_{index}.{filetype}")
    for path, content in contents.items():
        path.write_bytes(content)


def _check_text(captions: Sequence[str], text_embeds: Any, text_masks: Any) -> None:
    """Refuses text that does not belong to the captions."""
    if text_embeds is None and text_masks is not None:
        raise ValueError("sample_args has text_masks, which say what is text in text_embeds: give these, too")
    if text_embeds is not None:
        check_tensor("text_embeds", text_embeds)
        if text_embeds.shape[:1] != (len(captions),):
            raise ValueError(
                f"text_embeds in sample_args must hold one entry for each of the {len(captions)} captions, got the"
                f" shape {tuple(text_embeds.shape)}"
            )


def _check_filetype(filetype: str, minimagen: Imagen) -> None:
    """Saves a blank image of the Imagen's mode and size to memory, so that what PIL cannot write shows at once."""
    if not isinstance(filetype, str):
        raise TypeError(f"filetype must be a string such as 'png', got {filetype!r}")
    extensions = PIL.Image.registered_extensions()
    kind = extensions.get(f".{filetype.lower()}")
    if kind is None or kind not in PIL.Image.SAVE:
        raise ValueError(f"filetype must be an extension that PIL can write, such as 'png' or 'jpg', got {filetype!r}")
    # Of what is no Imagen, but stands for one, no more is asked than that it samples.
    size, channels = getattr(minimagen, "image_sizes", (1,))[-1], getattr(minimagen, "channels", 3)
    [blank] = to_pil_images(torch.zeros(1, channels, size, size))
    try:
        blank.save(BytesIO(), kind)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"filetype {filetype!r} cannot hold images of mode {blank.mode}: {error}") from error
