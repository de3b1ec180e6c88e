"""Pictures of the same prompts while a training goes on, so that one sees what it has learned."""

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import checkpoint
from .files import replace_file
from .Imagen import Imagen
from .kept import forget
from .pictures import captioned_grid
from .ranks import Ranks

__all__ = ["sample_grid"]


def sample_grid(
    imagen: Imagen,
    prompts: Sequence[str],
    path: Path,
    *,
    unet_number: int,
    cond_scale: float = 1.0,
    seed: int = 0,
    steps: int | None = None,
    sampler: str = "ddpm",
    start_images: Tensor | None = None,
    text_embeds: Tensor | None = None,
    text_masks: Tensor | None = None,
    batch_size: int | None = None,
    ranks: Ranks | None = None,
    together: bool = False,
) -> bool:
    """Samples prompts with the weights that the Imagen has now, and writes the pictures above their prompts.

    The Imagen is left as it was: modes, gradients, random numbers, memory. For averaged weights, call it while they are
    in place (:meth:`.EMA.swapped`); for a U-Net that is trained under autocast and sharded, under that autocast.

    Args:
        imagen: The Imagen.
        prompts: The captions.
        path: The PNG file; an older one is replaced by all of the new one or stays. Its folder is made if needed.
        unet_number: Number of the last U-Net to run, from 1.
        cond_scale: Guidance weight of all U-Nets.
        seed: The same seed makes pictures that can be compared.
        steps: Number of steps of each U-Net; all of its timesteps if not given, or if it has fewer.
        sampler: See :meth:`.Imagen.sample`.
        start_images: Images, one for each prompt, floating point, in the range of the training, shape (b, c, h, w),
            which stand for what the U-Net before the last makes: they are resized to its size, and only the last one
            runs. For a super-resolution U-Net that is trained alone.
        text_embeds: Encodings of the prompts, shape (b, n, text_embed_dim); else they are encoded now, which loads the
            text encoder.
        text_masks: Their masks, bool, shape (b, n).
        batch_size: Most images that go through a U-Net at a time; all if not given.
        ranks: The ranks; all of them call this. Rank 0 samples and writes.
        together: Whether all ranks sample, as they must with a U-Net that is sharded; rank 0 writes.

    Returns:
        Whether this rank has written the file.

    Raises:
        ValueError: there is no prompt, or an argument does not fit.
        OSError: the file cannot be written.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to sample")
    if start_images is not None and unet_number < 2:
        raise ValueError("start_images needs a super-resolution U-Net to run on them, but unet_number is 1")
    if start_images is not None and len(start_images) != len(prompts):
        raise ValueError(f"start_images must be as many as prompts, {len(prompts)}; got {len(start_images)}")
    ranks = Ranks() if ranks is None else ranks
    if not (ranks.first or together):
        return False
    cascade = imagen if start_images is None else _pair_of(imagen, unet_number)
    last = unet_number if start_images is None else 2
    totals: list[Any] = [scheduler.num_timesteps for scheduler in cascade.noise_schedulers]
    try:
        with checkpoint.isolated_rng(seed, imagen.device):
            images = cascade.sample(
                texts=list(prompts) if text_embeds is None else None,
                text_embeds=text_embeds,
                text_masks=text_masks,
                cond_scale=cond_scale,
                seed=seed,
                steps=None if steps is None else [min(steps, total) for total in totals],
                sampler=sampler,
                start_image=start_images,
                stop_at_unet_number=last,
                batch_size=batch_size,
                return_pil_images=True,
                progress=False,
            )
    finally:
        # What sampling keeps for the next time, training has better uses for.
        for number in range(1, len(imagen.unets) + 1):
            forget(imagen._get_unet(number))
    if not ranks.first:
        return False
    png = io.BytesIO()
    captioned_grid(images, prompts).save(png, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, png.getvalue())
    return True


def _pair_of(imagen: Imagen, number: int) -> Imagen:
    """The same Imagen, of which only a U-Net and the one before it are there; they share everything."""
    pair = copy.copy(imagen)
    # nn.Module keeps its parts in dictionaries, which a copy would share.
    pair._modules, pair._buffers = dict(imagen._modules), dict(imagen._buffers)
    part = slice(number - 2, number)
    pair.unets = nn.ModuleList(imagen.unets[part])
    pair.noise_schedulers = nn.ModuleList(imagen.noise_schedulers[part])
    pair.image_sizes = imagen.image_sizes[part]
    return pair
