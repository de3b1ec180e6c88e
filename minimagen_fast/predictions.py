"""The noise that a U-Net predicts in one step of a sampling, with and without text, for as many images as fit."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .conditioning import Conditions
from .samplers import Update
from .Unet import Unet


@dataclass(frozen=True)
class Task:
    """What one U-Net is to sample.

    Attributes:
        unet: The U-Net.
        update: The way from one image to the next.
        cond_scale: Guidance weight; 0 and 1 need one prediction a step, others two.
        text_embeds: Text embeddings, shape (b, n, text_embed_dim).
        text_mask: Which tokens are text, bool, shape (b, n).
        lowres_cond_img: Low-resolution images, noised, shape (b, c, h, w), for a U-Net that wants them.
        lowres_noise_times: Timestep to which they were noised, the same for all, int64, shape (b,).
        batch_size: Most images that go through the U-Net at a time; all if not given.
    """

    unet: Unet
    update: Update
    cond_scale: float
    text_embeds: torch.Tensor
    text_mask: torch.Tensor | None
    lowres_cond_img: torch.Tensor | None
    lowres_noise_times: torch.Tensor | None
    batch_size: int | None

    @property
    def with_text(self) -> tuple[bool, ...]:
        """The predictions that a step needs, each with text or without."""
        return (True, False) if self.cond_scale not in (0, 1) else (self.cond_scale == 1,)


class Prediction:
    """Predicts the noise in images, all at a time or, where the device's memory does not suffice, fewer.

    Attributes:
        make_room: Called when the memory does not suffice: frees what others hold of it, and says whether that was
            anything.
    """

    def __init__(self, task: Task, layout: torch.memory_format):
        self._task, self._layout = task, layout
        self._batch = len(task.text_embeds)
        self.make_room: Callable[[], bool] = lambda: False

    def _divide(self, size: int, guides_at_once: bool) -> None:
        """Go on with no more than ``size`` images at a time, with and without text at once or one after the other."""
        self._size, self._guides_at_once = min(size, self._batch), guides_at_once
        with_text = self._task.with_text
        texts = [with_text] if guides_at_once else [(has_text,) for has_text in with_text]
        starts = range(0, self._batch, max(self._size, 1))
        self._pieces = [(slice(start, start + self._size), text) for start in starts for text in texts]

    def _smaller(self) -> tuple[int, bool] | None:
        """The next smaller division; None if there is none."""
        if self._size > 1:
            return -(-self._size // 2), self._guides_at_once
        if self._guides_at_once and len(self._task.with_text) > 1:
            return self._size, False
        return None

    def __call__(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """The predictions for the groups of ``with_text``, one after the other: shape (groups * b, c, h, w)."""
        while True:
            try:
                return self._predict(x.contiguous(memory_format=self._layout), number)
            except torch.OutOfMemoryError:
                # What is computed while a graph is captured belongs to the graph: not the time to divide.
                if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise
                now = self._size, self._guides_at_once
                division = now if self.make_room() else self._smaller()
                if division is None:
                    raise
            # Out of the handler, which holds on to all that the failed attempt has allocated.
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
            if division != now:
                went_on = f"{division[0]}" if division[1] == now[1] else "its predictions with and without text apart"
                warnings.warn(
                    f"the memory of {x.device} does not suffice for {now[0]} images at a time; going on with"
                    f" {went_on}. To begin with fewer, give sample the argument batch_size",
                    stacklevel=2,
                )
                self._divide(*division)

    def _predict(self, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        preds: dict[bool, list[torch.Tensor]] = {has_text: [] for has_text in self._task.with_text}
        for index, (_, with_text) in enumerate(self._pieces):
            pred = self._predict_piece(index, x, number)
            if len(self._pieces) == 1:
                return pred
            # Of each piece the images with text come first; so they do of all.
            for has_text, part in zip(with_text, pred.chunk(len(with_text)), strict=True):
                preds[has_text].append(part)
        return torch.cat([part for has_text in self._task.with_text for part in preds[has_text]])

    def _predict_piece(self, index: int, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class CachedPrediction(Prediction):
    """Predicts noise under conditions that are worked out once."""

    def __init__(self, task: Task, unet: Unet, layout: torch.memory_format, dtype: torch.dtype):
        super().__init__(task, layout)
        self._unet, self._dtype = unet, dtype
        # Its own: `load` writes to it.
        self._lowres = None if task.lowres_cond_img is None else task.lowres_cond_img.clone()
        self._divide(self._batch if task.batch_size is None else task.batch_size, guides_at_once=True)

    def _divide(self, size: int, guides_at_once: bool) -> None:
        super()._divide(size, guides_at_once)
        self._conditions = [self._conditions_of(*piece) for piece in self._pieces]

    def _conditions_of(self, images: slice, with_text: tuple[bool, ...]) -> Conditions:
        task = self._task
        text_embeds = task.text_embeds[images]
        return Conditions(
            task.unet,
            task.update.times,
            lowres_noise_time=None if task.lowres_noise_times is None else task.lowres_noise_times[:1],
            text_embeds=text_embeds,
            text_mask=None if task.text_mask is None else task.text_mask[images],
            batch=len(text_embeds),
            with_text=with_text,
            dtype=self._dtype,
        )

    @property
    def signature(self) -> tuple:
        """What must be the same for :meth:`load`."""
        task = self._task
        lowres = None if self._lowres is None else self._lowres.shape
        return self._dtype, lowres, task.batch_size, task.with_text

    def load(self, other: "CachedPrediction") -> None:
        """Take over another's conditions, in place."""
        if self._lowres is not None and other._lowres is not None:
            self._lowres.copy_(other._lowres)
        # From which the conditions are worked out anew, should the memory not suffice for so many images any more.
        self._task = other._task
        # This one may have found out that the memory does not suffice for all at a time.
        if self._pieces != other._pieces:
            other._divide(self._size, self._guides_at_once)
        for own, new in zip(self._conditions, other._conditions, strict=True):
            own.load(new)

    def _predict_piece(self, index: int, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        images, _ = self._pieces[index]
        lowres = None if self._lowres is None else self._lowres[images]
        return self._unet.denoise(x[images], lowres, self._conditions[index].at(number))


class PlainPrediction(Prediction):
    """Predicts noise by whole calls of the U-Net, with text and, where guidance needs it, without."""

    def __init__(self, task: Task, unet: Unet, layout: torch.memory_format):
        super().__init__(task, layout)
        self._unet = unet
        self._divide(self._batch if task.batch_size is None else task.batch_size, guides_at_once=False)

    def _predict_piece(self, index: int, x: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        task, (images, (has_text,)) = self._task, self._pieces[index]
        by_image = {
            "lowres_cond_img": task.lowres_cond_img,
            "lowres_noise_times": task.lowres_noise_times,
            "text_embeds": task.text_embeds,
            "text_mask": task.text_mask,
        }
        given = {name: None if value is None else value[images] for name, value in by_image.items()}
        x = x[images]
        times = task.update.times.index_select(0, number).expand(len(x))
        return self._unet(x, times, **given, cond_drop_prob=0.0 if has_text else 1.0)
