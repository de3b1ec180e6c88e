"""Imagen: a text encoder and a cascade of U-Nets, trained one by one and sampled in a row.

Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022),
https://arxiv.org/abs/2205.11487.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import PIL.Image
import torch
import torch.nn.functional as F
from torch import nn

from .acceleration import Acceleration, checked_request, resolve
from .arguments import check_seed, check_tensor, finite_number, whole_number
from .captured_training import is_replayed, losses_of
from .diffusion_model import GaussianDiffusion
from .helpers import (
    cast_tuple,
    default,
    eval_decorator,
    exists,
    identity,
    maybe,
    module_device,
    normalize_neg_one_to_one,
    prob_mask_like,
    resize_image_to,
    unnormalize_zero_to_one,
    usable_device,
)
from .image_random import ImageRandom
from .kept import forget, forget_training
from .pictures import PIL_MODES, to_pil_images
from .plain import methods_of, overridden, takes
from .predictions import Task
from .resize import noise_for
from .samplers import Sampler, Update
from .sampling import sample_images
from .t5 import get_encoded_dim, t5_encode_text
from .Unet import Unet, dtype_of

_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.smooth_l1_loss}
_NORMALIZES = {identity: False, normalize_neg_one_to_one: True}
# As they were made: what users put in their place is called as the original package calls it.
_ENCODE_TEXT, _Q_SAMPLE = t5_encode_text, methods_of(GaussianDiffusion, "q_sample")
_GET_TIMES = methods_of(GaussianDiffusion, "_get_times")
# Methods of a U-Net that are told which images keep their text, and the argument's name.
_TOLD_OF_TEXT = {"forward": "keep_text", "_text_condition": "keep"}
_AS_MADE = methods_of(Unet, *_TOLD_OF_TEXT)
# Methods of a U-Net that take part in a step of training, and of which a replayed step would call none.
_IN_TRAINING = methods_of(
    Unet,
    "forward",
    "_check_inputs",
    "_generate_t_tokens",
    "_embed_times",
    "_text_condition",
    "_text_tokens",
    "_tokens_and_padding",
    "_pooled_text",
    "_block_conditions",
    "denoise",
    "resnet_blocks",
    "dtype",
)
# Methods that the original package calls, and that there are not here.
_ONLY_IN_ORIGINAL = (
    "_make_noise_schedulers",
    "_one_unet_in_gpu",
    "_p_mean_variance",
    "_p_sample",
    "_p_sample_loop",
    "_set_loss_fn",
)


def _one_for_each(name: str, value, number: int) -> tuple:
    values = cast_tuple(value) if isinstance(value, list | tuple) else (value,) * number
    if len(values) != number:
        raise ValueError(f"{name} must be one value or {number}, one for each U-Net; got {len(values)} in {value!r}")
    return values


def _checked_place(name: str, value: Any, number: int) -> int:
    """The number of a U-Net, counted from 1."""
    place = whole_number(name, value)
    if place not in range(1, number + 1):
        raise ValueError(f"{name} must lie in 1 to {number}, got {place}")
    return place


def _checked_share(name: str, value: Any) -> float:
    share = finite_number(name, value)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return share


def _takes_kept_text(unet: nn.Module) -> bool:
    """Whether a U-Net can be told which images keep their text; methods written for the original package draw it."""
    others = (name for name in overridden(unet, _AS_MADE) if hasattr(unet, name))
    # By its name: who takes any argument may hand it on to a method that was written for the original.
    return all(_TOLD_OF_TEXT[name] in inspect.signature(getattr(unet, name)).parameters for name in others)


def _is_plain_scheduler(scheduler: GaussianDiffusion) -> bool:
    return not overridden(scheduler, _Q_SAMPLE)


class Imagen(nn.Module):
    """A cascade of U-Nets that turns text into images.

    Args:
        unets: The U-Nets: first the base model, then the super-resolution models in ascending order. A U-Net that was
            made with another ``lowres_cond``, ``text_embed_dim``, ``channels`` or ``channels_out`` than it needs at its
            place is replaced by a new one, with a warning: see :attr:`unets` for those in use.
        text_encoder_name: Name of the text encoder, see :func:`.t5.t5_encode_text`.
        image_sizes: Side length in pixels of the images of each U-Net.
        text_embed_dim: Width of the text embeddings; taken from the text encoder if not given.
        channels: Number of channels of the images.
        timesteps: Number of diffusion steps, at least 20; one value or one for each U-Net.
        cond_drop_prob: Probability with which a training image's text is dropped, in [0, 1]; more than 0 is needed for
            classifier-free guidance.
        loss_type: Loss between predicted and true noise: 'l1', 'l2' or 'huber'.
        lowres_sample_noise_level: Noise added to the low-resolution images when sampling, as a share in [0, 1) of the
            diffusion process (noise conditioning augmentation, section 2.3 of the paper).
        auto_normalize_img: Whether images are given and returned in [0, 1]; otherwise in [-1, 1].
        dynamic_thresholding_percentile: Quantile of |x_0| at which dynamic thresholding sets in, in [0, 1].
        only_train_unet_number: If given, the only U-Net (counted from 1) that may be trained.
        lowres_max_noise_level: Most noise that is added to the low-resolution images in training, as a share in (0, 1]
            of the diffusion process. With less than 1 a super-resolution U-Net sees nothing but images in which
            something can be recognised: it learns far sooner to enlarge, and mends less of what is wrong in them.

    Raises:
        TypeError, ValueError: if an argument is of the wrong type, out of range, or does not fit the U-Nets.
    """

    def __init__(
        self,
        unets: Unet | list[Unet] | tuple[Unet, ...],
        *,
        text_encoder_name: str,
        image_sizes: int | list[int] | tuple[int, ...],
        text_embed_dim: int | None = None,
        channels: int = 3,
        timesteps: int | list[int] | tuple[int, ...] = 1000,
        cond_drop_prob: float = 0.1,
        loss_type: Literal["l1", "l2", "huber"] = "l2",
        lowres_sample_noise_level: float = 0.2,
        auto_normalize_img: bool = True,
        dynamic_thresholding_percentile: float = 0.9,
        only_train_unet_number: int | None = None,
        lowres_max_noise_level: float = 1.0,
    ):
        super().__init__()
        unets = cast_tuple(tuple(unets) if isinstance(unets, nn.ModuleList) else unets)
        if not unets or not all(isinstance(unet, Unet) for unet in unets):
            raise TypeError(f"unets must be one Unet or a list of them, got {[type(unet).__name__ for unet in unets]}")
        if len({id(unet) for unet in unets}) < len(unets):
            raise ValueError("unets holds the same U-Net twice; every stage needs one of its own")
        number = len(unets)
        image_sizes = tuple(image_sizes) if isinstance(image_sizes, Iterable) else (image_sizes,)
        if len(image_sizes) != number:
            raise ValueError(f"image_sizes must have {number} entries, one for each U-Net; got {image_sizes!r}")
        image_sizes = tuple(whole_number("image_sizes", size, least=1) for size in image_sizes)
        channels = whole_number("channels", channels, least=1)
        if loss_type not in _LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(_LOSSES)}; got {loss_type!r}")
        cond_drop_prob, dynamic_thresholding_percentile = (
            _checked_share(name, value)
            for name, value in (
                ("cond_drop_prob", cond_drop_prob),
                ("dynamic_thresholding_percentile", dynamic_thresholding_percentile),
            )
        )
        lowres_max_noise_level = finite_number("lowres_max_noise_level", lowres_max_noise_level)
        lowres_sample_noise_level = finite_number("lowres_sample_noise_level", lowres_sample_noise_level)
        if not 0 < lowres_max_noise_level <= 1:
            raise ValueError(f"lowres_max_noise_level must lie in (0, 1], got {lowres_max_noise_level}")
        self.lowres_max_noise_level = lowres_max_noise_level
        self._check_noise_level(lowres_sample_noise_level)
        if exists(only_train_unet_number):
            only_train_unet_number = _checked_place("only_train_unet_number", only_train_unet_number, number)

        self.loss_type = loss_type
        self.loss_fn: Callable = _LOSSES[loss_type]
        self.channels = channels
        self.sample_channels = (channels,) * number
        self.image_sizes = image_sizes
        timesteps = [whole_number("timesteps", steps) for steps in _one_for_each("timesteps", timesteps, number)]
        self.noise_schedulers = nn.ModuleList(GaussianDiffusion(timesteps=steps) for steps in timesteps)
        # One schedule for all low-resolution images; the longest resolves the noise levels best.
        self.lowres_noise_schedule = GaussianDiffusion(timesteps=max(timesteps))
        self.text_encoder_name = text_encoder_name
        self.text_embed_dim = default(text_embed_dim, lambda: get_encoded_dim(text_encoder_name))
        self.only_train_unet_number = only_train_unet_number
        self.unet_being_trained_index = -1
        self.lowres_sample_noise_level = lowres_sample_noise_level
        self.cond_drop_prob = cond_drop_prob
        self.can_classifier_guidance = cond_drop_prob > 0.0
        self.auto_normalize_img = auto_normalize_img
        self.normalize_img = normalize_neg_one_to_one if auto_normalize_img else identity
        self.unnormalize_img = unnormalize_zero_to_one if auto_normalize_img else identity
        self.input_image_range = (0.0 if auto_normalize_img else -1.0, 1.0)
        self.dynamic_thresholding_percentile = dynamic_thresholding_percentile

        # By a list, or the warning would point to torch, which would call for them.
        self.unets = nn.ModuleList(list(map(self._fit_to_place, unets, range(1, number + 1))))
        for unet, size in zip(self.unets, self.image_sizes, strict=True):
            unet.check_image_size(size, size)

        # What was asked for, not what it comes to: that depends on where the model is.
        self._acceleration: dict[str, Any] = {}
        self.register_buffer("_temp", torch.zeros(1), persistent=False)  # knows the device
        self.to(module_device(self.unets))
        self._warn_of_uncalled([name for name in _ONLY_IN_ORIGINAL if hasattr(type(self), name)], stacklevel=3)

    def _warn_of_uncalled(self, names: list[str], stacklevel: int) -> None:
        if names:
            warnings.warn(
                f"{' and '.join(names)} of this {type(self).__name__} is not called: minimagen 0.0.9 has methods of"
                " these names, this edition samples otherwise. Override predict_start_from_noise and q_posterior of"
                " its noise_schedulers, or forward of a U-Net, which are called",
                stacklevel=stacklevel,
            )

    def _fit_to_place(self, unet: Unet, number: int) -> Unet:
        wanted = {
            "lowres_cond": number > 1,
            "text_embed_dim": self.text_embed_dim,
            "channels": self.channels,
            "channels_out": self.channels,
        }
        fitted = unet._cast_model_parameters(**wanted)
        if fitted is not unet:
            changed = [
                f"{name}={value} instead of {getattr(unet, name)}"
                for name, value in wanted.items()
                if getattr(unet, name) != value
            ]
            warnings.warn(
                f"U-Net {number} was replaced by a new one with fresh weights, because its place in this Imagen needs"
                f" {', '.join(changed)}. The one in use is imagen.unets[{number - 1}]; make it with these settings to"
                " keep its weights",
                stacklevel=3,
            )
        return fitted

    def _check_noise_level(self, level: float) -> None:
        if not 0 <= level < 1:
            raise ValueError(f"lowres_sample_noise_level must lie in [0, 1), got {level}")
        if level > self.lowres_max_noise_level:
            raise ValueError(
                f"lowres_sample_noise_level is {level}, more than the U-Nets see in training:"
                f" lowres_max_noise_level is {self.lowres_max_noise_level}; choose one no larger"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickle of the original package's lacks what only we have, and after a training step keeps its U-Nets in a
        # list.
        unets = state.pop("unets", None)
        state = {"lowres_max_noise_level": 1.0, "_acceleration": {}, "unet_being_trained_index": -1, **state}
        super().__setstate__(state)
        if exists(unets):
            self.unets = nn.ModuleList(unets)

    @property
    def device(self) -> torch.device:
        """The device of this instance; move it with ``to``."""
        self._leave_meta()
        return self._temp.device

    def _leave_meta(self) -> None:
        """Follow weights that took the place of those on meta, as ``load_state_dict(assign=True)`` puts them.

        What is in no state dict has stayed there.
        """
        if not self._temp.is_meta:
            return
        device = next((x.device for x in self.unets.parameters() if not x.is_meta), None)
        if exists(device):
            with torch.inference_mode(False):
                for scheduler in (*self.noise_schedulers, self.lowres_noise_schedule):
                    scheduler.to_empty(device=device) if scheduler.betas.is_meta else scheduler.to(device)
                self._temp = torch.zeros(1, device=device)

    def accelerate(self, preset: str = "auto", **settings: Any) -> "Imagen":
        """Choose how this model is run; what it computes stays the same within rounding.

        Args:
            preset: 'auto', the fastest for the device; 'reference', plain torch throughout, to compare with.
            settings: Settings that differ from it, see :class:`.acceleration.Acceleration`; 'auto' for those to be
                chosen from the device.

        Returns:
            This instance.

        Raises:
            TypeError, ValueError: for an unknown setting or value, or one that this model's device cannot have.
        """
        request = checked_request(preset, **settings)
        for unet in self.unets:
            self._resolved(request, self.device, unet)
        self._acceleration = request
        for unet in self.unets:
            forget_training(unet)
        return self

    def _resolved(self, request: dict[str, Any], device: torch.device, unet: Unet) -> Acceleration:
        """What a request comes to for one of the U-Nets on a device."""
        # Besides those of the U-Net's way down there is the level of its middle.
        deepest = max(len(getattr(each, "downs", ())) for each in self.unets)
        return resolve(request, device, dtype_of(unet), deepest=deepest)

    @property
    def acceleration(self) -> Acceleration:
        """How this instance is run on the device where it is now, with the reasons; see :meth:`accelerate`."""
        return self._resolved(self._acceleration, self.device, self.unets[0])

    def _get_unet(self, unet_number: int | None) -> Unet:
        """The U-Net with this number, counted from 1."""
        number = len(self.unets)
        if not exists(unet_number) and number > 1:
            raise ValueError(f"unet_number must say which U-Net is meant, 1 to {number}")
        return self.unets[_checked_place("unet_number", default(unet_number, 1), number) - 1]

    def _reset_unets_all_one_device(self, device: torch.device | None = None) -> None:
        """Place all U-Nets on one device, that of this instance if none is given."""
        # Programs for the original put lists in their place, as it does itself: what is in one is in no state dict.
        unets: Any = self.unets
        if not isinstance(unets, nn.ModuleList):
            self.unets = nn.ModuleList(unets)
        device = default(device, self.device)
        for unet in self.unets:
            # To meta weights would be lost, and from there none can be brought.
            if "meta" not in (device.type, module_device(unet).type):
                self._move(unet, device)
        self.unet_being_trained_index = -1

    def state_dict(self, *args, **kwargs):
        """The state dict, after U-Nets that were moved elsewhere have been placed on this instance's device."""
        self._reset_unets_all_one_device()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        """Load a state dict, after U-Nets that were moved elsewhere have been placed on this instance's device."""
        self._reset_unets_all_one_device()
        result = super().load_state_dict(*args, **kwargs)
        self._leave_meta()
        return result

    def _text_condition(
        self,
        batch: int | None,
        device: torch.device,
        texts: list[str] | None,
        text_embeds: torch.Tensor | None,
        text_masks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text embeddings and mask on ``device``, from whichever was given."""
        if not exists(text_embeds):
            if not exists(texts):
                raise ValueError("texts or text_embeds must be given")
            texts = [texts] if isinstance(texts, str) else list(texts)
            if exists(batch) and len(texts) != batch:
                raise ValueError(f"texts must hold one caption for each of the {batch} images, got {len(texts)}")
            where = {"device": device} if t5_encode_text is _ENCODE_TEXT else {}
            text_embeds, text_masks = t5_encode_text(texts, name=self.text_encoder_name, **where)
        check_tensor("text_embeds", text_embeds)
        if exists(text_masks):
            check_tensor("text_masks", text_masks)
        if text_embeds.ndim != 3 or text_embeds.shape[-1] != self.text_embed_dim:
            raise ValueError(
                f"text_embeds must have shape (b, n, {self.text_embed_dim}) for the text encoder"
                f" {self.text_encoder_name!r}, got {tuple(text_embeds.shape)}"
            )
        batch = default(batch, len(text_embeds))
        if len(text_embeds) not in (1, batch):
            raise ValueError(
                f"text_embeds must hold one entry for each of the {batch} images, got {len(text_embeds)};"
                " a single one stands for all"
            )
        tokens = text_embeds.shape[1]
        if exists(text_masks) and text_masks.shape not in ((batch, tokens), (1, tokens)):
            raise ValueError(
                f"text_masks must have shape {(batch, tokens)} like text_embeds, or {(1, tokens)};"
                f" got {tuple(text_masks.shape)}"
            )
        text_embeds = text_embeds.to(device).expand(batch, -1, -1)
        return text_embeds, maybe(lambda mask: mask.to(device).expand(batch, -1))(text_masks)

    # Training

    def forward(
        self,
        images: torch.Tensor,
        texts: list[str] | None = None,
        text_embeds: torch.Tensor | None = None,
        text_masks: torch.Tensor | None = None,
        unet_number: int | None = None,
        *,
        seeds: Sequence[int] | None = None,
        min_snr_gamma: float | None = None,
        per_image: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Noise images and compare the noise that a U-Net predicts with the true one.

        Args:
            images: Floating point, in [0, 1] ([-1, 1] without ``auto_normalize_img``), shape (b, channels, h, w), each
                side at least the U-Net's image size, on this instance's device. They are resized to that size, each
                axis on its own.
            texts: Captions, one for each image.
            text_embeds: Text embeddings, shape (b, n, text_embed_dim), instead of captions; of batch size 1, the same
                for all images.
            text_masks: Which of their tokens are text, bool, shape (b, n) or (1, n); if not given, all, and zeros that
                follow them up to the 256th.
            unet_number: Which U-Net to train, counted from 1; needed if there is more than one.
            seeds: A whole number for each image, from which all that is random about it is drawn (see
                :mod:`.image_random`), the level of the low-resolution noise too; if not given, torch's global
                random numbers are used, and that level is one for the whole batch, as in the original package.
            min_snr_gamma: Weigh the loss of an image by min(SNR, gamma) / SNR, where SNR = alpha_bar / (1 - alpha_bar)
                at its timestep: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023),
                section 3.4, for predicted noise. 5 is usual. All images weigh the same, if not given.
            per_image: Whether to return the loss of each image and its timestep instead of the mean loss.

        Returns:
            The loss, a scalar; or with ``per_image`` the losses, shape (b,), and the timesteps, int64, shape (b,).

        Raises:
            TypeError, ValueError: if an argument is missing, out of range or of the wrong shape or type.
        """
        self._leave_meta()
        unet = self._get_unet(unet_number)
        unet_number = whole_number("unet_number", default(unet_number, 1))
        if exists(self.only_train_unet_number) and unet_number != self.only_train_unet_number:
            raise ValueError(
                f"unet_number is {unet_number}, but this Imagen was made with"
                f" only_train_unet_number={self.only_train_unet_number}"
            )
        self.unet_being_trained_index = unet_number - 1
        check_tensor("images", images)
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point, got {images.dtype}; convert them first, e.g. images / 255")
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must have shape (b, {self.channels}, h, w), got {tuple(images.shape)}")
        size = self.image_sizes[unet_number - 1]
        if min(images.shape[-2:]) < size:
            raise ValueError(
                f"images must be at least {size}x{size} pixels for U-Net {unet_number},"
                f" got {images.shape[-2]}x{images.shape[-1]}; enlarge them or choose smaller image_sizes"
            )
        batch, device = images.shape[0], images.device
        if device != self.device:
            raise ValueError(
                f"images must be on the device of this Imagen, {self.device}; they are on {device}: move them there,"
                " with images.to(imagen.device), or the model, with imagen.to"
            )
        if exists(seeds) and len(seeds) != batch:
            raise ValueError(f"seeds must hold one whole number for each of the {batch} images, got {len(seeds)}")
        # Infinity, which weighs all alike, is one too.
        if min_snr_gamma not in (None, math.inf) and not finite_number("min_snr_gamma", min_snr_gamma) > 0:
            raise ValueError(f"min_snr_gamma must be positive, for example 5, or None; got {min_snr_gamma!r}")
        own = ImageRandom(seeds, device) if exists(seeds) else None
        noise_scheduler = self.noise_schedulers[unet_number - 1]

        # Random numbers are drawn in the order of the original package, so that one seed gives one loss in both:
        # times, augmentation time, noise, augmentation noise, conditional dropout.
        if exists(own):
            times = own.times(noise_scheduler.num_timesteps)
        else:
            times = noise_scheduler._sample_random_times(batch, device=device)
        text_embeds, text_masks = self._text_condition(batch, device, texts, text_embeds, text_masks)

        lowres_cond_img = lowres_aug_times = None
        if unet_number > 1:
            lowres_cond_img = resize_image_to(
                images, self.image_sizes[unet_number - 2], clamp_range=self.input_image_range
            )
            lowres_cond_img = resize_image_to(lowres_cond_img, size, clamp_range=self.input_image_range)
            if exists(own):
                steps = self.lowres_noise_schedule._steps_up_to(self.lowres_max_noise_level)
                lowres_aug_times = own.lowres_times(steps)
            else:
                # One level for the whole batch, as in the original, which knows no limit.
                limit = {} if self.lowres_max_noise_level == 1 else {"max_noise_level": self.lowres_max_noise_level}
                lowres_aug_times = self.lowres_noise_schedule._sample_random_times(1, device=device, **limit)
                lowres_aug_times = lowres_aug_times.expand(batch)

        x_start = resize_image_to(images, size)
        noise = own.noise(x_start) if exists(own) else noise_for(x_start, resized=x_start is not images)
        more: dict[str, Any] = {}
        if exists(own):
            more["keep_text"] = own.keep(1 - self.cond_drop_prob)
        if per_image or exists(min_snr_gamma):
            more["per_image"] = True
        if exists(lowres_cond_img) and exists(own):
            more["lowres_noise"] = own.lowres_noise(x_start)
        elif exists(lowres_cond_img) and self._losses_take("lowres_noise"):
            more["lowres_noise"] = noise_for(lowres_cond_img, resized=lowres_cond_img is not images)
        if unknown := [name for name in ("noise", *more) if not self._losses_take(name)]:
            raise TypeError(
                f"_p_losses of this {type(self).__name__} was overridden and does not take {' and '.join(unknown)}:"
                " give it these arguments, which seeds, min_snr_gamma and per_image need"
            )
        losses = self._p_losses(
            unet,
            x_start,
            times,
            noise=noise,
            **more,
            noise_scheduler=noise_scheduler,
            lowres_cond_img=lowres_cond_img,
            lowres_aug_times=lowres_aug_times,
            text_embeds=text_embeds,
            text_mask=text_masks,
        )
        if exists(min_snr_gamma):
            losses = losses * noise_scheduler._min_snr_weights(times, min_snr_gamma)
        if per_image:
            return losses, times
        # What a loss of someone's own gives is handed on as it is, as in the original.
        return losses.mean() if exists(min_snr_gamma) else losses

    def _losses_take(self, name: str) -> bool:
        """Whether :meth:`_p_losses` takes an argument, as one that was written for the original package may not."""
        return not overridden(self, _P_LOSSES) or takes(self._p_losses, name)

    def _p_losses(
        self,
        unet: Unet,
        x_start: torch.Tensor,
        times: torch.Tensor,
        *,
        noise_scheduler: GaussianDiffusion,
        lowres_cond_img: torch.Tensor | None = None,
        lowres_aug_times: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        lowres_noise: torch.Tensor | None = None,
        keep_text: torch.Tensor | None = None,
        per_image: bool = False,
    ) -> torch.Tensor:
        """The loss of ``unet`` on un-noised images (b, c, s, s) at the given times (b,); (b,) of them if wished."""
        if torch.is_grad_enabled():
            # The memory is needed now, and the next sampling has other weights anyway.
            forget(unet)
        acceleration = self._resolved(self._acceleration, x_start.device, unet)
        # All that is random comes first, for the rest may be replayed.
        noise = default(noise, lambda: noise_for(x_start, resized=False))
        if exists(lowres_cond_img):
            lowres_aug_times = default(lowres_aug_times, times)
            lowres_noise = default(lowres_noise, lambda: noise_for(lowres_cond_img, resized=True))
        if exists(text_embeds):
            if not exists(keep_text) and _takes_kept_text(unet):
                keep_text = prob_mask_like(times.shape, 1 - self.cond_drop_prob, device=times.device)
            if acceleration.cuda_graphs == "on" and exists(text_mask) and isinstance(unet, Unet):
                # Or a step would be of another kind wherever the longest text of a batch is of another length.
                text_embeds, text_mask = unet.padded_text(text_embeds, text_mask)

        inputs = {
            "x_start": x_start,
            "times": times,
            "noise": noise,
            "lowres_cond_img": lowres_cond_img,
            "lowres_aug_times": lowres_aug_times,
            "lowres_noise": lowres_noise,
            "text_embeds": text_embeds,
            "text_mask": text_mask,
            "keep_text": keep_text,
        }
        # The loss is the one of now: a backward pass may compute the step again after another was set.
        losses = functools.partial(
            self._losses,
            loss_fn=self.loss_fn,
            noise_scheduler=noise_scheduler,
            acceleration=acceleration,
            per_image=per_image,
        )
        schedulers = noise_scheduler, self.lowres_noise_schedule
        # What users have put in the place of ours is called; and an attribute that cannot be is refused by the U-Net.
        functions_as_made = self.loss_fn in _LOSSES.values() and self.normalize_img in _NORMALIZES
        as_made = functions_as_made and all(map(_is_plain_scheduler, schedulers)) and not overridden(unet, _IN_TRAINING)
        if not is_replayed(acceleration) or not as_made or not 0 <= self.cond_drop_prob <= 1:
            return losses(unet, **inputs)
        schedules = (buffer for scheduler in schedulers for buffer in scheduler.buffers())
        what = self.loss_fn, self.normalize_img, per_image, tuple(each.data_ptr() for each in schedules)
        return losses_of(unet, losses, inputs, acceleration, what)

    def _losses(
        self,
        unet: Unet,
        *,
        loss_fn: Callable,
        noise_scheduler: GaussianDiffusion,
        acceleration: Acceleration,
        per_image: bool,
        x_start: torch.Tensor,
        times: torch.Tensor,
        noise: torch.Tensor,
        lowres_cond_img: torch.Tensor | None,
        lowres_aug_times: torch.Tensor | None,
        lowres_noise: torch.Tensor | None,
        text_embeds: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        keep_text: torch.Tensor | None,
    ) -> torch.Tensor:
        """What :meth:`_p_losses` returns, once all that is random is there."""
        layout = acceleration.layout
        keep = {"keep_text": keep_text} if exists(keep_text) else {}
        with acceleration.training(x_start.device, dtype_of(unet)):
            x_noisy = self._noised(noise_scheduler, x_start, times, noise, layout)
            if exists(lowres_cond_img):
                lowres_cond_img = self._noised(
                    self.lowres_noise_schedule, lowres_cond_img, lowres_aug_times, lowres_noise, layout
                )
            pred = unet(
                x_noisy,
                times,
                text_embeds=text_embeds,
                text_mask=text_mask,
                lowres_noise_times=lowres_aug_times,
                lowres_cond_img=lowres_cond_img,
                cond_drop_prob=self.cond_drop_prob,
                **keep,
            )
        wide = torch.promote_types(pred.dtype, torch.float32)
        pred, noise = pred.to(wide), noise.to(wide)
        if per_image:
            return loss_fn(pred, noise, reduction="none").flatten(1).mean(dim=1)
        return loss_fn(pred, noise)

    def _noised(
        self,
        scheduler: GaussianDiffusion,
        images: torch.Tensor,
        times: torch.Tensor,
        noise: torch.Tensor,
        layout: torch.memory_format | None = None,
    ) -> torch.Tensor:
        """Normalise images, then noise them."""
        if _is_plain_scheduler(scheduler) and self.normalize_img in _NORMALIZES:
            return scheduler.q_sample(
                images, times, noise, normalize=_NORMALIZES[self.normalize_img], memory_format=layout
            )
        noised = scheduler.q_sample(x_start=self.normalize_img(images), t=times, noise=noise)
        return noised.contiguous(memory_format=layout) if exists(layout) else noised

    # Sampling

    @torch.no_grad()
    @eval_decorator
    def sample(
        self,
        texts: list[str] | None = None,
        text_masks: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        cond_scale: float | list[float] | tuple[float, ...] = 1.0,
        lowres_sample_noise_level: float | None = None,
        return_pil_images: bool = False,
        device: torch.device | str | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        progress: bool = True,
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        stop_at_unet_number: int | None = None,
        start_image: torch.Tensor | None = None,
        match_original: bool = False,
        offload_idle_unets: bool = False,
        sampler: str | list[str] | tuple[str, ...] = "ddpm",
        steps: int | None | list[int | None] | tuple[int | None, ...] = None,
        eta: float | list[float] | tuple[float, ...] = 0.0,
        batch_size: int | None = None,
    ) -> torch.Tensor | list[PIL.Image.Image]:
        """Make images from text.

        Whatever ends the call, the model's modes, devices and gradients are left as they were. Until then nothing may
        change its weights, neither ``callback`` nor a training in another thread: part of what depends on them is
        computed once, before the first step, and part in each.

        Args:
            texts: Captions.
            text_masks: Which tokens of ``text_embeds`` are text, bool, shape (b, n) or (1, n); if not given, all, and
                zeros that follow them up to the 256th.
            text_embeds: Text embeddings, shape (b, n, text_embed_dim), instead of captions.
            cond_scale: Guidance weight, see :meth:`.Unet.forward_with_cond_scale`; one value or one for each U-Net.
            lowres_sample_noise_level: Overrides the instance's value, in [0, 1).
            return_pil_images: Whether to return PIL images.
            device: Where to sample, and where the images are returned; this instance's device if not given.
            generator: Source of the random numbers, on the device; the global one if not given.
            seed: Makes a generator: the same seed gives the same images, whatever ran before.
            progress: Whether to show one progress bar for each U-Net.
            callback: Called after every step with the number of the U-Net (from 1), the step (from 0) and the images so
                far, in the range in which they are returned, shape (b, c, s, s). An exception ends the sampling.
            stop_at_unet_number: The last U-Net to run; its images are returned.
            start_image: Images in the range in which they are returned, shape (b, c, h, w), that stand for the base
                model's: only the super-resolution U-Nets run. They are resized to the base model's size.
            match_original: Noise low-resolution images before normalising them, as the original package did when
                sampling (but not when training, which spoils the result): for reproducing its images.
            offload_idle_unets: Keep only the U-Net at work on the device and the others in main memory.
            sampler: 'ddpm', ancestral sampling; 'ddim' or 'dpmpp_2m', DPM-Solver++(2M), which need fewer steps, see
                :mod:`.samplers`. This and the next two: one value or one for each U-Net.
            steps: Number of steps; all timesteps if not given.
            eta: Share of ancestral sampling's noise that 'ddim' adds, in [0, 1].
            batch_size: Most images that go through a U-Net at a time; all if not given, or as many as the memory of a
                CUDA device suffices for. The images are the same but for rounding.

        Returns:
            Images, float32 in [0, 1] ([-1, 1] without ``auto_normalize_img``), shape (b, c, s, s); or PIL images.

        Raises:
            TypeError, ValueError: if an argument is missing, out of range or of the wrong shape or type.
        """
        # Past the decorators.
        self._warn_of_uncalled([name for name in _ONLY_IN_ORIGINAL if name in vars(self)], stacklevel=5)
        number = len(self.unets)
        cond_scales = [finite_number("cond_scale", scale) for scale in _one_for_each("cond_scale", cond_scale, number)]
        if not self.can_classifier_guidance and any(scale != 1 for scale in cond_scales):
            raise ValueError(
                f"cond_scale must be 1, got {cond_scale}: this Imagen was made with cond_drop_prob=0, so its U-Nets do"
                " not know images without text"
            )
        # An attribute, which may have been set since it was checked.
        percentile = _checked_share("dynamic_thresholding_percentile", self.dynamic_thresholding_percentile)
        values = (
            _one_for_each(name, value, number) for name, value in (("sampler", sampler), ("steps", steps), ("eta", eta))
        )
        samplers = [Sampler(*each) for each in zip(*values, strict=True)]
        if exists(batch_size):
            batch_size = whole_number("batch_size", batch_size, least=1, else_=" or None")
        level = finite_number(
            "lowres_sample_noise_level", default(lowres_sample_noise_level, self.lowres_sample_noise_level)
        )
        self._check_noise_level(level)
        last = _checked_place("stop_at_unet_number", default(stop_at_unet_number, number), number)
        if return_pil_images and self.channels not in PIL_MODES:
            raise ValueError(f"PIL images have 1 to 4 channels, these have {self.channels}")
        if exists(callback) and not callable(callback):
            raise TypeError(f"callback must be a function or None, got {callback!r}")
        device = usable_device(default(device, self.device))
        generator = self._checked_generator(generator, seed, device)
        first, img = self._checked_start(start_image, last, device)
        for unet_number in range(first, last + 1):
            samplers[unet_number - 1].check(self.noise_schedulers[unet_number - 1])
            where = module_device(self.unets[unet_number - 1])
            if (device.type == "meta") != (where.type == "meta"):
                raise ValueError(
                    f"device '{device}' cannot be used here: U-Net {unet_number} is on {where}, and tensors on meta"
                    " hold no values. Give another, or first load weights, with assign=True where they are on meta"
                )
        text_embeds, text_masks = self._text_condition(
            len(img) if exists(img) else None, device, texts, text_embeds, text_masks
        )
        batch = len(text_embeds)
        if not batch:
            raise ValueError("texts, or text_embeds, must hold at least one caption, got none")

        with self._placed_on(device, offload_idle_unets):
            for unet_number in range(first, last + 1):
                unet, size = self.unets[unet_number - 1], self.image_sizes[unet_number - 1]
                if offload_idle_unets:
                    self._bring_only(unet, device)
                lowres_cond_img = lowres_noise_times = None
                if unet.lowres_cond:
                    lowres_noise_times = self.lowres_noise_schedule._get_times(batch, level, device=device)
                    img, smaller = resize_image_to(img, size), img
                    noise = noise_for(img, img is not smaller, generator)
                    if match_original:
                        noised = self.lowres_noise_schedule.q_sample(x_start=img, t=lowres_noise_times, noise=noise)
                        lowres_cond_img = self.normalize_img(noised)
                    else:
                        lowres_cond_img = self._noised(self.lowres_noise_schedule, img, lowres_noise_times, noise)
                scheduler, cond_scale = self.noise_schedulers[unet_number - 1], cond_scales[unet_number - 1]
                task = Task(
                    unet=unet,
                    update=Update(
                        samplers[unet_number - 1],
                        scheduler,
                        percentile=percentile,
                        cond_scale=cond_scale,
                    ),
                    cond_scale=cond_scale,
                    text_embeds=text_embeds,
                    text_mask=text_masks,
                    lowres_cond_img=lowres_cond_img,
                    lowres_noise_times=lowres_noise_times,
                    batch_size=batch_size,
                    one_lowres_time=not (unet.lowres_cond and overridden(self.lowres_noise_schedule, _GET_TIMES)),
                )
                img = sample_images(
                    task,
                    torch.randn(
                        (batch, self.channels, size, size), generator=generator, device=device, dtype=torch.float32
                    ),
                    self._resolved(self._acceleration, device, unet),
                    generator=generator,
                    description=f"U-Net {unet_number} of {number}, {size}x{size}",
                    progress=progress,
                    after_step=self._reporter(callback, unet_number),
                )
                img = self._finished(img)

        if not return_pil_images:
            return img
        low, high = self.input_image_range
        return to_pil_images((img - low) / (high - low))

    def _finished(self, img: torch.Tensor) -> torch.Tensor:
        """Images in the range of the training."""
        return self.unnormalize_img(img.clamp(-1.0, 1.0))

    def _reporter(self, callback: Callable | None, unet_number: int) -> Callable[[int, torch.Tensor], None] | None:
        if not exists(callback):
            return None
        return lambda step, images: callback(unet_number, step, self._finished(images))

    @staticmethod
    def _checked_generator(
        generator: torch.Generator | None, seed: int | None, device: torch.device
    ) -> torch.Generator | None:
        if exists(seed):
            if exists(generator):
                raise ValueError("give either seed or generator, not both")
            seed = whole_number("seed", seed, else_=" or None")
            check_seed(seed, "seed")
            # On meta nothing is drawn, and torch has no generator.
            return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}: a number is a seed=")
        if exists(generator) and generator.device.type != device.type:
            raise ValueError(f"generator must be on the sampling device {device}, it is on {generator.device}")
        return generator

    def _checked_start(
        self, start_image: torch.Tensor | None, last: int, device: torch.device
    ) -> tuple[int, torch.Tensor | None]:
        """Number of the first U-Net to run and the images it starts from."""
        if not exists(start_image):
            return 1, None
        if last < 2:
            raise ValueError("start_image needs a super-resolution U-Net to run on it, but there is none to run")
        check_tensor("start_image", start_image)
        if not start_image.is_floating_point():
            raise TypeError(
                f"start_image must be floating point, got {start_image.dtype}; convert it, e.g. image / 255"
            )
        if start_image.ndim != 4 or start_image.shape[1] != self.channels:
            raise ValueError(f"start_image must have shape (b, {self.channels}, h, w), got {tuple(start_image.shape)}")
        # Or another layout would give other noise, see `noise_for`.
        start_image = start_image.to(device=device, dtype=torch.float32).contiguous()
        return 2, resize_image_to(start_image, self.image_sizes[0], clamp_range=self.input_image_range)

    @contextmanager
    def _placed_on(self, device: torch.device, offload_idle_unets: bool) -> Iterator[None]:
        """Have everything on ``device`` (or the U-Nets in main memory); put it back, also after an error."""
        home, unet_homes = self.device, [module_device(unet) for unet in self.unets]
        try:
            self._move_schedules(device)
            self._reset_unets_all_one_device(torch.device("cpu") if offload_idle_unets else device)
            yield
        finally:
            self._move_schedules(home)
            for unet, unet_home in zip(self.unets, unet_homes, strict=True):
                self._move(unet, unet_home)

    def _bring_only(self, unet: Unet, device: torch.device) -> None:
        for other in self.unets:
            if other is not unet:
                self._move(other, torch.device("cpu"))
        self._move(unet, device)

    def _move_schedules(self, device: torch.device) -> None:
        # As with the U-Nets, below: training saves their values for its backward pass.
        with torch.inference_mode(False):
            for scheduler in (*self.noise_schedulers, self.lowres_noise_schedule):
                scheduler.to(device)
            self._temp = self._temp.to(device)

    @staticmethod
    def _move(unet: Unet, device: torch.device) -> None:
        if module_device(unet) != device:
            # Or its weights could never be trained again, if someone samples in inference mode.
            with torch.inference_mode(False):
                unet.to(device)


_P_LOSSES = methods_of(Imagen, "_p_losses")
