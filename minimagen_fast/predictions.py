"""The noise that a U-Net predicts in one step of a sampling, with and without text, for as many images as fit."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from .conditioning import Conditions, SharedConditions
from .kept import forget_idle_graphs
from .plain import methods_of, overridden
from .samplers import Update
from .Unet import Unet

_Result = TypeVar("_Result")
_GUIDANCE = methods_of(Unet, "forward_with_cond_scale")


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
        lowres_noise_times: Timestep to which they were noised, int64, shape (b,).
        batch_size: Most images that go through the U-Net at a time; all if not given.
        one_lowres_time: Whether that timestep is the same for all of them.
    """

    unet: Unet
    update: Update
    cond_scale: float
    text_embeds: torch.Tensor
    text_mask: torch.Tensor | None
    lowres_cond_img: torch.Tensor | None
    lowres_noise_times: torch.Tensor | None
    batch_size: int | None
    one_lowres_time: bool = True

    @property
    def guided_by_unet(self) -> bool:
        """Whether the U-Net has its own way of guidance: its predictions are then guided already."""
        return bool(overridden(self.unet, _GUIDANCE))

    @property
    def with_text(self) -> tuple[bool, ...]:
        """The predictions that a step needs, each with text or without."""
        if self.guided_by_unet:
            return (True,)
        return (True, False) if self.cond_scale not in (0, 1) else (self.cond_scale == 1,)

    @property
    def signature(self) -> tuple:
        """What, besides the images' shape and :attr:`update`, two must have in common to take the same steps."""
        lowres = None if self.lowres_cond_img is None else self.lowres_cond_img.shape
        return lowres, self.batch_size, self.with_text


class Prediction:
    """Predicts the noise in images, all at a time or, where the device's memory does not suffice, fewer.

    Args:
        task: What is sampled.
        layout: How images are to lie in memory.
        make_room: Called with this when the memory does not suffice: frees what others hold of it, and says whether
            that was anything.
    """

    def __init__(
        self,
        task: Task,
        layout: torch.memory_format,
        make_room: Callable[["Prediction"], bool] = lambda _: forget_idle_graphs(),
    ):
        self._task, self._layout, self._make_room = task, layout, make_room
        self._batch = len(task.text_embeds)
        # Its own: `load` writes to it. Beside images that lie otherwise, the U-Net would go on in contiguous memory.
        lowres = task.lowres_cond_img
        self._lowres = None if lowres is None else lowres.clone(memory_format=layout)

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

        def predict() -> torch.Tensor:
            self._prepare()
            return self._predict(x.contiguous(memory_format=self._layout), number)

        return self._as_memory_allows(predict)

    def _prepare(self) -> None:
        """Work out what the pieces need, if that was not done since they are what they are."""

    def _as_memory_allows(self, attempt: Callable[[], _Result]) -> _Result:
        """What comes of an attempt, for which the images are divided until the memory suffices."""
        device = self._task.update.times.device
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError:
                # What is computed while a graph is captured belongs to the graph: not the time to divide.
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise
                now = self._size, self._guides_at_once
                division = now if self._make_room(self) else self._smaller()
                if division is None:
                    raise
            # Out of the handler, which holds on to all that the failed attempt has allocated.
            if division != now:
                went_on = f"{division[0]}" if division[1] == now[1] else "its predictions with and without text apart"
                warnings.warn(
                    f"the memory of {device} does not suffice for {now[0]} images at a time; going on with {went_on}."
                    " To begin with fewer, give sample the argument batch_size",
                    stacklevel=2,
                )
                self._divide(*division)
            if device.type == "cuda":
                torch.cuda.empty_cache()

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

    def __init__(
        self,
        task: Task,
        unet: Unet,
        layout: torch.memory_format,
        dtype: torch.dtype,
        make_room: Callable[[Prediction], bool] = lambda _: forget_idle_graphs(),
    ):
        super().__init__(task, layout, make_room)
        self._unet, self._dtype = unet, dtype
        self._shared: SharedConditions | None = None
        self._divide(self._batch if task.batch_size is None else task.batch_size, guides_at_once=True)
        self._as_memory_allows(self._prepare)

    def _divide(self, size: int, guides_at_once: bool) -> None:
        super()._divide(size, guides_at_once)
        # Those of the larger pieces go before there are others.
        self._conditions: list[Conditions] = []

    def _prepare(self) -> None:
        task = self._task
        if self._shared is None:
            times, lowres_time = self._times
            self._shared = SharedConditions(task.unet, times, lowres_noise_time=lowres_time, dtype=self._dtype)
        if not self._conditions:
            pieces = [(*self._text_of(images), with_text) for images, with_text in self._pieces]
            self._conditions = [
                Conditions(
                    self._shared,
                    task.unet,
                    text_embeds=text_embeds,
                    text_mask=text_mask,
                    batch=len(text_embeds),
                    with_text=with_text,
                )
                for text_embeds, text_mask, with_text in pieces
            ]

    @property
    def _times(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        lowres_times = self._task.lowres_noise_times
        return self._task.update.times, None if lowres_times is None else lowres_times[:1]

    def _text_of(self, images: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = self._task.text_mask
        return self._task.text_embeds[images], None if mask is None else mask[images]

    def written(self) -> list[torch.Tensor]:
        """The tensors that a step writes to."""
        return [each.context for each in self._conditions]

    @property
    def nbytes(self) -> int:
        """How large what is held is: conditions, weights that were joined for them, and low-resolution images."""
        parts = (self, self._shared, *self._conditions)
        return sum(value.nbytes for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor))

    def rest(self) -> None:
        """Let go of the task and the U-Net, until :meth:`load`: this is kept with the U-Net, and must not hold it."""
        self._task = self._unet = None  # type: ignore[assignment]

    def load(self, task: Task, unet: Unet) -> None:
        """Go on with another task of the same signature: its conditions take the place of those that there are."""
        # From the task the conditions are worked out anew, should the memory not suffice for so many images any more.
        self._task, self._unet = task, unet
        if self._lowres is not None and task.lowres_cond_img is not None:
            self._lowres.copy_(task.lowres_cond_img)
        self._as_memory_allows(self._load_shared)
        self._as_memory_allows(self._load_pieces)

    def _load_shared(self) -> None:
        if self._shared is not None:
            self._shared.load(self._task.unet, *self._times)

    def _load_pieces(self) -> None:
        if not self._conditions:  # after a division
            self._prepare()
            return
        for own, (images, _) in zip(self._conditions, self._pieces, strict=True):
            own.load(self._task.unet, *self._text_of(images))

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
            "lowres_cond_img": self._lowres,
            "lowres_noise_times": task.lowres_noise_times,
            "text_embeds": task.text_embeds,
            "text_mask": task.text_mask,
        }
        given = {name: None if value is None else value[images] for name, value in by_image.items()}
        x = x[images]
        times = task.update.times.index_select(0, number).expand(len(x))
        if task.guided_by_unet:
            return self._unet.forward_with_cond_scale(x, times, **given, cond_scale=task.cond_scale)
        return self._unet(x, times, **given, cond_drop_prob=0.0 if has_text else 1.0)
