"""The training loop: behind :func:`.training.MinimagenTrain` and ``minimagen-fast train``, on one process or many."""

import inspect
import math
import shlex
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .arguments import whole_number
from .ema import EMA
from .given_loader import GivenLoader, failures_of
from .helpers import evaluating, maybe
from .image_random import image_seeds
from .Imagen import Imagen
from .interrupts import TimeLimitExceeded, has_time_limit, time_limit, uninterrupted
from .loading import Loader
from .optimizers import fuse
from .parallel import TrainedUnet, full
from .progress import progress_bar, say
from .ranks import Ranks
from .settings import TrainingSettings
from .snapshots import Saved, Snapshots
from .stopping import StopRequest
from .training_state import Owners, Position, gather, must_agree, take_over
from .watching import Watch
from .weights_files import TrainedFolder

__all__ = ["Trainer", "TrainingDiverged", "TrainingStep"]

VALIDATION_SEED = 0
SECONDS_BETWEEN_SHOWN_LOSSES = 1.0  # reading a loss waits for the device, so not after every batch
_END: Any = object()
BATCH_KEYS = ("image", "encoding", "mask")


class TrainingDiverged(RuntimeError):
    """Too many gradients in a row were not finite. The state before them is saved."""


class _ValidationCut(Exception):
    """A stop was asked for while validating, on all ranks alike."""


@dataclass(frozen=True)
class TrainingStep:
    """What the `callback` of :func:`.training.MinimagenTrain` is told after a batch, once for each U-Net trained on it.

    Attributes:
        epoch: Index of the epoch, from 0.
        batch: Index of the batch within the epoch, from 0.
        unet_number: Number of the U-Net, from 1.
        loss: Its loss on this batch.
        seconds: Time since the training was started (or restarted).
    """

    epoch: int
    batch: int
    unet_number: int
    loss: float
    seconds: float


class Trainer:
    """One training run.

    Args:
        settings: How to train.
        imagen: The Imagen, on the device to train on; sharded U-Nets are sharded already (see :mod:`.parallel`).
        optimizer: Optimizer of its parameters, or of part of them; see :func:`.optimizers.fuse` for what is made of it.
        train_loader: The training data.
        valid_loader: The validation data; None for none.
        directory: The training directory; the same on all ranks, which share the file system.
        timestamp: Name of the run in the names of its files.
        ranks: The processes that train together.
        lr_scheduler: Learning rate scheduler, stepped once after each optimizer step, without arguments.
        restart_directory: Training directory whose training is continued; may be `directory` itself.
        stop: What may ask the training to stop.
        watch: What is told of every step; one on each rank.
        sample: Samples pictures with the weights that the Imagen has, writes them to a file and says whether it did; on
            all ranks.
        callback: Called after each batch for each trained U-Net; it costs a synchronisation with the device.
        progress: Whether to show a progress bar for each epoch, and messages.

    Raises:
        ValueError: An argument does not fit the others, or the training cannot be continued with them.
    """

    def __init__(
        self,
        settings: TrainingSettings,
        imagen: Imagen,
        optimizer: torch.optim.Optimizer,
        train_loader: Loader,
        valid_loader: Loader | None,
        directory: Path,
        *,
        timestamp: str,
        ranks: Ranks | None = None,
        lr_scheduler: Any = None,
        restart_directory: Path | None = None,
        stop: StopRequest | None = None,
        watch: Watch | None = None,
        sample: Callable[[Path], bool] | None = None,
        callback: Callable[[TrainingStep], None] | None = None,
        progress: bool = True,
    ) -> None:
        self.started = time.monotonic()
        self.settings = settings
        self.imagen = imagen
        self.ranks = Ranks() if ranks is None else ranks
        self.numbers = self._checked_numbers()
        self.parameters = self._checked_parameters(optimizer)
        _check_scheduler(lr_scheduler)
        # Kept, for in every step it would take longer to find them than to drop their gradients.
        self.all_parameters = list(imagen.parameters())
        self.train_loader, self.valid_loader = train_loader, valid_loader
        self.batches_in_epoch = train_loader.batches_in_epoch
        if self.batches_in_epoch == 0:
            raise ValueError(
                "train_dataloader has no batch: the data set is empty, or it is smaller than the batch size and "
                "drop_last=True drops it"
            )
        if self.ranks.size > 1 and (isinstance(train_loader, GivenLoader) or settings.seed is None):
            raise ValueError(
                f"{self.ranks.size} ranks need a seed and loaders that share the data out: use `minimagen-fast train`,"
                " or loading.ShardedLoader"
            )
        self.generators = getattr(train_loader, "generators", [])
        self.callback = callback
        self.watch, self.sample = watch, sample
        self.progress = progress and self.ranks.first
        self.stop = StopRequest() if stop is None else stop
        if self.ranks.first:
            self.stop.watch(Path(directory))
        self.trained = [TrainedUnet(imagen, number, self.ranks) for number in self.numbers]
        averages = (
            {}
            if settings.ema_decay is None
            else {number: EMA(imagen.unets[number - 1], settings.ema_decay) for number in self.numbers}
        )
        self.owners = Owners(imagen, optimizer, lr_scheduler, averages)

        self.timestamp = str(timestamp)
        self.directory = Path(directory)
        for name in ("tmp", "state_dicts"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self.snapshots = Snapshots(
            self.directory / "checkpoints", self.ranks, keep_last=settings.keep_last, keep_every=settings.keep_every
        )

        self.best_losses = dict.fromkeys(self.numbers, float("inf"))
        self.measure = self._measure_here()  # of these losses
        self.skipped: Counter[str] = Counter()
        self.position = self._start_of(epoch=0, step=0)
        self.total_steps = self.total_steps_before = self._steps_in_all()
        self.loss_sums, self.loss_count = self.position.loss_sums, 0
        self.losses: Tensor | None = None  # of the last batch
        self.group = 0  # batches whose gradients wait for the next optimizer step
        self.exchanged = True  # whether these have been averaged over the ranks
        self.trained_shapes: set[torch.Size] = set()  # of the images of batches
        self.bad_run = torch.zeros((), dtype=torch.int64, device=imagen.device)
        self.bad_steps = torch.zeros_like(self.bad_run)
        self.recent: deque[Any] = deque(maxlen=2 * settings.max_bad_steps * settings.accumulate)
        if settings.batch_seconds and not self._has_time_limit():
            self._say("No timeout: batches can be given up only in the main thread, on one process, not on Windows.")
        if restart_directory is not None:
            self._restart_from(Path(restart_directory))
        elif others := [step for step in self.snapshots.steps() if step]:
            self._say(
                f"{self.snapshots.folder} holds checkpoints of another training, up to step {others[0]}. They stay; but"
                f" from the first one of this training on, RESTART_DIRECTORY {self.directory} continues this training."
            )
        # Last, for a state that is taken over brings its own settings along.
        self.skips_by_itself = fuse(optimizer)
        gather(self.owners)  # what no checkpoint can hold is refused now, not after the first hours

    def _checked_numbers(self) -> list[int]:
        available = len(self.imagen.unets)
        if self.settings.unet_numbers is None:
            only = self.imagen.only_train_unet_number
            return list(range(1, available + 1)) if only is None else [only]
        numbers = [whole_number("unet_numbers", number) for number in self.settings.unet_numbers]
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(1, available + 1)):
            raise ValueError(f"unet_numbers must be one or more different numbers from 1 to {available}, got {numbers}")
        return numbers

    def _checked_parameters(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters: list[nn.Parameter] = []
        for number in self.numbers:
            own = list(self.imagen.unets[number - 1].parameters())
            held = [parameter for parameter in own if id(parameter) in optimized]
            if not held:
                raise ValueError(
                    f"optimizer holds no parameter of imagen.unets[{number - 1}], so U-Net {number} would not learn: "
                    "build it from imagen.parameters() (Imagen replaces U-Nets that were made with other settings)"
                )
            if not any(parameter.requires_grad for parameter in held):
                raise ValueError(
                    f"all parameters of imagen.unets[{number - 1}] that optimizer holds have requires_grad=False, so "
                    f"U-Net {number} would not learn: leave it out of unet_numbers, or set requires_grad=True"
                )
            parameters += own
        of_unets = {id(parameter) for parameter in self.imagen.unets.parameters()}
        # What a class derived from Imagen learns besides them.
        besides = {
            name: parameter
            for name, parameter in self.imagen.named_parameters()
            if id(parameter) in optimized and id(parameter) not in of_unets and parameter.requires_grad
        }
        if besides and self.ranks.size > 1:
            raise ValueError(
                f"optimizer holds {next(iter(besides))} of imagen, which is part of no U-Net: its gradients would not"
                f" be exchanged between {self.ranks.size} ranks. Make it part of a U-Net, or train on one rank"
            )
        parameters += besides.values()
        # Each once, also where U-Nets share some.
        return list({id(parameter): parameter for parameter in parameters}.values())

    def _has_time_limit(self) -> bool:
        # One rank alone must not give up what the others wait for.
        return self.ranks.size == 1 and has_time_limit()

    def _steps_in_all(self) -> int | None:
        """Optimizer steps at the end of the training: those that are done, and those that its settings leave to do."""
        if self.batches_in_epoch is None:
            return None
        place, accumulate = self.position, self.settings.accumulate
        steps = place.step
        if place.epoch < self.settings.epochs:
            steps += math.ceil((self.batches_in_epoch - place.batch) / accumulate)
            steps += math.ceil(self.batches_in_epoch / accumulate) * (self.settings.epochs - place.epoch - 1)
        return steps

    def _length(self) -> dict[str, Any]:
        """What the number of steps follows from."""
        settings = self.settings
        return {"batches": self.batches_in_epoch, "accumulate": settings.accumulate, "epochs": settings.epochs}

    def _measure_here(self) -> dict[str, Any]:
        """What validation losses depend on besides the weights: those of another measure cannot be compared."""
        images = None if self.valid_loader is None else getattr(self.valid_loader, "samples", None)
        if not images:  # none, or nobody knows
            return {}
        return {"min_snr_gamma": self.settings.min_snr_gamma, "validation images": images}

    @property
    def steps_made(self) -> int:
        """Number of optimizer steps that changed weights, those of the training that is continued included."""
        return self.position.step - int(self.bad_steps)

    # The run

    def run(self) -> str:
        """Trains until the last epoch is done, the time is up or a stop is asked for.

        Whatever ends it, weights and state are saved; but an error on one of several ranks ends all of them, and what
        is left is the last checkpoint.

        Returns:
            Why it ended: ``done``, ``time`` or ``stopped``.
        """
        try:
            if self.watch is not None:
                self.watch.start(self.position.step, asdict(self.settings), steps=self.total_steps)
            ended = self._run()
            self.snapshots.finish()
            if self.watch is not None:
                self.watch.end()
            self._note(f"ended: {ended}")
            return ended
        except BaseException as error:
            # Saving needs all ranks; only of a divergence do all know.
            all_know = self.ranks.size == 1 or isinstance(error, TrainingDiverged)
            if all_know:
                self._save_on_error(error)
            try:
                self._note(f"{type(error).__name__}: {error}")
                if all_know and self.watch is not None:
                    self.watch.end()
            except Exception as failure:
                # Only said: the error that ended the training is the one to raise.
                warnings.warn(f"the end of the training by {error!r} could not be noted: {failure!r}", stacklevel=2)
            raise
        finally:
            if self.watch is not None:
                self.watch.close()

    def _run(self) -> str:
        epochs = self.settings.epochs
        why = None
        if self.position.epoch >= epochs:
            self._say(f"Nothing to train: {self.position.epoch} epochs are done, EPOCHS is {epochs}.")
        if self.position.epoch >= epochs or self.position.validation_due:
            why = self._checkpoint()
        while why is None and self.position.epoch < epochs:
            why = self._train_epoch()
        if why is None or (self.position.epoch >= epochs and not self.position.validation_due):
            return "done"
        what = "Time is up" if why == "time" else f"Stopped ({self.stop.why or 'on another rank'})"
        where = (
            f"in epoch {self.position.epoch + 1} of {epochs} after {self.position.batch} of its batches"
            if self.position.epoch < epochs
            else "before its last validation"
        )
        self._say(
            f"{what}: training ends {where}. To go on, pass --RESTART_DIRECTORY {shlex.quote(str(self.directory))}"
        )
        if why == "stopped" and self.ranks.first:
            self.stop.leave_word()
        return why

    def _reason_to_end(self) -> str | None:
        """Why the training is to end now, the same on all ranks."""
        limit = self.settings.max_seconds
        late = limit is not None and time.monotonic() - self.started >= limit
        lates, stops, failures = self.ranks.sum([late, self.stop.requested, self.snapshots.failed])
        if failures:
            self.snapshots.finish()  # which says what has failed
        return "stopped" if stops else "time" if lates else None

    def _train_epoch(self) -> str | None:
        """Trains the rest of an epoch; returns why it is to be the last one, if it is."""
        epoch, done = self.position.epoch, self.position.batch
        self._log(f"---------- Epoch {epoch + 1} of {self.settings.epochs} ----------")
        self.imagen.train()
        self._drop_gradients()
        batches = self._open_epoch()
        with progress_bar(
            desc=f"Epoch {epoch + 1}/{self.settings.epochs}",
            total=self.batches_in_epoch,
            initial=done,
            unit="batch",
            shown=self.progress,
        ) as bar:
            shown = float("-inf")
            for batch, images in self._agreed(batches):
                self._train_batch(batch, images, epoch, done)
                done += 1
                bar.update()
                due = time.monotonic() - shown >= SECONDS_BETWEEN_SHOWN_LOSSES
                if self.progress and due and self.losses is not None:
                    bar.set_postfix(self._shown(self.losses))
                    shown = time.monotonic()
                if done == self.batches_in_epoch:  # the end of the epoch is dealt with below
                    continue
                why = self._reason_to_end()
                if why or done % self.settings.checkpoint_interval == 0:
                    why = self._checkpoint(epoch, done, why)
                if why:
                    # Gradients of an unfinished group are left to a restart, which computes them again.
                    self._drop_gradients()
                    return why
            with uninterrupted():
                stepped = self.group > 0
                if stepped:
                    self._step(epoch, done)
                self.position = replace(self._start_of(epoch + 1, self.position.step), validation_due=True)
            if stepped:
                self._sample_if_due(self.position.step)
            if not self.loss_count:
                self._say(f"No batch of epoch {epoch + 1} could be used: check the data set.")
            return self._checkpoint(epoch, done, self._reason_to_end())

    def _agreed(self, batches: Iterator) -> Iterator[tuple[dict[str, Tensor] | None, int]]:
        """This rank's batches with the number of images of all ranks, until the first rank has no more."""
        while True:
            began = time.perf_counter()
            batch = next(batches, _END)
            if self.watch is not None and self.imagen.training and batch is not _END:
                self.watch.waited(time.perf_counter() - began)
            own = 0 if batch is _END or not batch else len(batch["image"])
            images, ended = self.ranks.sum([own, batch is _END])
            if ended:
                return
            yield batch, images

    def _open_epoch(self) -> Iterator:
        """The batches of the epoch that are not done yet."""
        start = self.position
        self.loss_sums, self.loss_count = start.loss_sums, start.loss_count
        if start.batch == 0:
            self.position = self._start_of(start.epoch, start.step)
            return iter(self.train_loader.epoch(start.epoch))
        checkpoint.restore_rng(start.epoch_rng, self.imagen.device, self.generators)
        batches = iter(self.train_loader.epoch(start.epoch, start.batch))
        checkpoint.restore_rng(start.rng, self.imagen.device, self.generators)
        return batches

    def _start_of(self, epoch: int, step: int) -> Position:
        """The start of an epoch, which begins with the random states of this moment."""
        rng = checkpoint.capture_rng(self.imagen.device, self.generators)
        sums = torch.zeros(len(self.numbers), device=self.imagen.device, dtype=torch.float32)
        return Position(epoch, batch=0, step=step, epoch_rng=rng, rng=rng, loss_sums=sums, loss_count=0)

    # One batch

    def _train_batch(self, batch: dict[str, Tensor] | None, images: int, epoch: int, index: int) -> None:
        if not images:
            self.skipped["batches without images"] += 1
            return
        ids = batch["id"] if batch and "id" in batch else f"epoch {epoch + 1}, batch {index + 1}"
        # Without a seed nothing follows from them: a loader of the user's own may call its images what it likes.
        self.recent.append(ids.tolist() if isinstance(ids, Tensor) else ids)
        last = self.group + 1 == self.settings.accumulate or index + 1 == self.batches_in_epoch
        try:
            with time_limit(self._limit_of(batch)):
                losses = self._backward(batch, images, epoch, exchange=last)
        except TimeLimitExceeded:
            self._drop_gradients()
            self.skipped["batches over the time limit"] += 1
            self._say(f"Epoch {epoch + 1}, batch {index + 1}: given up after {self.settings.batch_seconds} seconds.")
            return
        with uninterrupted():
            self.losses = losses
            self.loss_sums, self.loss_count = self.loss_sums + losses, self.loss_count + 1
            if batch:
                self.trained_shapes.add(batch["image"].shape)
            self.group += 1
            self.exchanged = last or not any(trained.exchanges for trained in self.trained)
            if self.group == self.settings.accumulate:
                self._step(epoch, index + 1)
            stepped = self.group == 0
        if stepped:
            self._sample_if_due(self.position.step)
        if self.callback is not None:
            seconds = time.monotonic() - self.started
            for number, loss in zip(self.numbers, self.ranks.sum_(losses.clone()).tolist(), strict=True):
                self.callback(TrainingStep(epoch, index, number, loss, seconds))

    def _limit_of(self, batch: dict[str, Tensor] | None) -> float | None:
        """Seconds after which a batch is given up; None for no limit."""
        if not self.settings.batch_seconds or not self._has_time_limit():
            return None
        # To compile the blocks may take minutes, with the first batch of a shape; cut short, it would begin anew.
        is_new = batch is not None and batch["image"].shape not in self.trained_shapes
        return None if is_new and self.imagen.acceleration.compile == "blocks" else self.settings.batch_seconds

    def _autocast(self) -> Any:
        if self.settings.precision is None:
            return nullcontext()
        return torch.autocast(self.imagen.device.type, getattr(torch, self.settings.precision))

    def _inputs(self, batch: dict[str, Tensor] | None, number: int, *what: int) -> tuple[tuple, dict[str, Any]]:
        """Arguments of the Imagen's forward for a batch, or for one empty image where this rank has none."""
        if not batch:
            side = max(self.imagen.image_sizes)
            batch = {
                "image": torch.zeros(1, self.imagen.channels, side, side),
                "encoding": torch.zeros(1, 1, self.imagen.text_embed_dim),
                "mask": torch.ones(1, 1, dtype=torch.bool),
                "id": torch.zeros(1, dtype=torch.int64),
            }
        # A loader of the user's own may give None for the mask.
        place = maybe(lambda value: value.to(self.imagen.device, non_blocking=True))
        image, encoding, mask = (place(batch[key]) for key in BATCH_KEYS)
        options: dict[str, Any] = {"text_embeds": encoding, "text_masks": mask}
        if self.settings.seed is not None:
            if "id" not in batch:
                raise ValueError(
                    f"with a seed, here {self.settings.seed}, batches need the numbers of their images as 'id', int64"
                    f" of shape (b,), from which their random numbers are drawn; got {', '.join(batch)}"
                )
            options["seeds"] = image_seeds(batch["id"].tolist(), self.settings.seed, number, *what)
        if self.settings.min_snr_gamma is not None:
            options["min_snr_gamma"] = self.settings.min_snr_gamma
        return (image,), options

    def _backward(self, batch: dict[str, Tensor] | None, images: int, epoch: int, *, exchange: bool) -> Tensor:
        """Adds the batch's gradients for every trained U-Net.

        Returns:
            This rank's contributions to the losses over the images of all ranks, float32, shape (trained U-Nets,).
        """
        # Gradients are averaged over ranks; weighed so, they are those of the mean over all images.
        share = len(batch["image"]) / images if batch else 0.0
        losses = []
        for trained in self.trained:
            inputs, options = self._inputs(batch, trained.number, epoch)
            with trained.exchanging(exchange):
                with self._autocast():
                    loss = trained.loss(*inputs, **options, **({"per_image": True} if self.watch is not None else {}))
                if self.watch is not None:
                    loss, times = loss
                    own = len(loss) if share else 0
                    self.watch.losses(trained.number, images, loss[:own], times[:own])
                if loss.ndim:  # per image, for the watch or by a loss of someone's own
                    loss = loss.mean()
                if self.ranks.size > 1 or not batch:
                    loss = loss * (share * self.ranks.size)
                loss.backward()
            losses.append(loss.detach().float() / self.ranks.size)
        return torch.stack(losses)

    def _step(self, epoch: int, batch: int) -> None:
        """The optimizer step after so many batches of the epoch."""
        if not self.exchanged:
            # A group that ended sooner than was known: an image that weighs nothing carries the gradients along.
            self._backward(None, 0, 0, exchange=True)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.group > 1:
            torch._foreach_div_(gradients, self.group)
        limit = self.settings.max_grad_norm
        if limit is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        else:
            norm = torch.nn.utils.get_total_norm(gradients)
        norm = full(norm)
        rates = [group["lr"] for group in self.owners.optimizer.param_groups]
        self._optimize(~torch.isfinite(norm))
        self._drop_gradients()
        for average in self.owners.averages.values():
            average.update()
        # Before anything that may raise: what is saved then must not have these batches still to do.
        start, step = self.position, self.position.step + 1
        rng = checkpoint.capture_rng(self.imagen.device, self.generators)
        due = batch % self.settings.checkpoint_interval == 0
        self.position = Position(epoch, batch, step, start.epoch_rng, rng, self.loss_sums, self.loss_count, due)
        if self.owners.lr_scheduler is not None:
            self.owners.lr_scheduler.step()
        if self.watch is not None:
            self.watch.step(step, epoch, batch, norm, rates, self.bad_steps)

    def _optimize(self, bad: Tensor) -> None:
        """Steps the optimizer unless the gradients are not finite."""
        optimizer, limit = self.owners.optimizer, self.settings.max_bad_steps
        self.bad_run = (self.bad_run + 1) * bad
        if self.skips_by_itself:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        elif not bad:  # waits for the device, see TrainingSettings.max_bad_steps
            optimizer.step()
        # Reading the count waits for the device: it is done so seldom that nothing waits for it often.
        if self.position.step % limit == limit - 1 and self.bad_run >= limit:
            ids = "; ".join(str(entry) for entry in self.recent)
            raise TrainingDiverged(
                f"the gradients of the last {int(self.bad_run)} optimizer steps were not finite, so these were left"
                f" out: lower the learning rate, or look into the images of these batches: {ids}"
            )
        self.bad_steps += bad  # not of a step that ends the training: what is saved is the state before it

    def _drop_gradients(self) -> None:
        for parameter in self.all_parameters:
            parameter.grad = None
        self.group = 0
        self.exchanged = True

    # Validation

    def _validate(self) -> list[float] | None:
        """Mean loss over the validation images for each trained U-Net; None if there is no image.

        Every time with the same order, times and noise, and the text never dropped, so that losses can be compared.

        Raises:
            _ValidationCut: A stop was asked for.
        """
        if self.valid_loader is None:
            return None
        device = self.imagen.device
        sums = torch.zeros(len(self.numbers), device=device, dtype=torch.float32)
        total = 0
        generators = getattr(self.valid_loader, "generators", [])
        with self._evaluating(), checkpoint.isolated_rng(VALIDATION_SEED, device, generators):
            batches = progress_bar(
                self.valid_loader.epoch(0), desc="Validation", unit="batch", leave=False, shown=self.progress
            )
            for batch, images in self._agreed(iter(batches)):
                if self.ranks.sum([self.stop.requested])[0]:
                    raise _ValidationCut
                if not images:
                    self.skipped["validation batches without images"] += 1
                    continue
                losses = []
                for number in self.numbers:
                    inputs, options = self._inputs(batch, number, 0, VALIDATION_SEED)
                    with self._autocast():
                        losses.append(self.imagen(*inputs, unet_number=number, **options).float().mean())
                sums += torch.stack(losses) * (len(batch["image"]) if batch else 0)
                total += images
        return (self.ranks.sum_(sums) / total).tolist() if total else None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        cond_drop_prob = self.imagen.cond_drop_prob
        try:
            self.imagen.cond_drop_prob = 0.0
            with evaluating(self.imagen), torch.no_grad():
                yield
        finally:
            self.imagen.cond_drop_prob = cond_drop_prob

    # Files

    def _checkpoint(self, epoch: int | None = None, done: int = 0, why: str | None = None) -> str | None:
        """Saves, validates and reports; `epoch` and `done` say where, as an index and a number of batches.

        On a stop, also on one that comes meanwhile, something waits to end the process: then the state alone is saved,
        and a validation that is due is left to a restart.

        Args:
            why: Why the training is to end, if it is.

        Returns:
            Why the training is to end, if it is now.
        """
        with nullcontext() if self.watch is None else self.watch.paused():
            losses = self._save_and_validate(epoch, done, why == "stopped")
        if losses is not None and self.watch is not None:
            self.watch.validation(self.position.step, dict(zip(self.numbers, losses, strict=True)))
        # Once more, though a reason is given: after a stop that comes while time is up a validation may be due.
        return self._reason_to_end()

    def _save_and_validate(self, epoch: int | None, done: int, in_haste: bool) -> list[float] | None:
        if epoch is not None:
            self._log(f"Epoch {epoch + 1}, batch {done}: checkpoint.")
            if self.loss_count:
                means = self.ranks.sum_(self.loss_sums / self.loss_count)
                self._log_losses("Mean training loss in this epoch", means.tolist())
            if self.losses is not None:
                self._log_losses("Training loss of the last batch", self.ranks.sum_(self.losses.clone()).tolist())
        losses = None
        if not in_haste:
            self.position = replace(self.position, validation_due=True)
            self._save_weights()
            try:
                losses = self._validate_and_keep_best()
                self.position = replace(self.position, validation_due=False)
            except _ValidationCut:
                in_haste = True
        self._save_state()
        if in_haste:
            self.snapshots.finish()
        if losses is not None:
            self._log_losses("Validation loss", losses)
            self._log_losses("Best validation loss", self.best_losses.values())
            self._tell("Validation loss " + self._listed(losses))
        self._log(f"Skipped: {self._skipped_so_far()}")
        return losses

    def _sample_if_due(self, step: int) -> None:
        interval = self.settings.sample_interval
        if self.sample is None or interval is None or step % interval:
            return
        path = self.directory / "samples" / f"step_{step:09d}.png"
        with nullcontext() if self.watch is None else self.watch.paused(), self._averaged(), self._autocast():
            written = self.sample(path)
        if written and self.watch is not None:
            self.watch.samples(step, path)

    def _validate_and_keep_best(self) -> list[float] | None:
        with self._averaged():
            losses = self._validate()
            if losses is None:
                self._say("No validation image: state_dicts/ gets the latest weights, unless it has validated ones.")
            if self.steps_made <= 0:  # weights that have learned nothing are not the best of anything
                return losses
            for index, number in enumerate(self.numbers):
                best = self.best_losses[number]
                if math.isinf(best) if losses is None else losses[index] < best:
                    self._save_unet(number, self._best_file(self.directory, number, self.timestamp))
                    self.best_losses[number] = best if losses is None else losses[index]
        return losses

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        with self._all_swapped(list(self.owners.averages.values())):
            yield

    @contextmanager
    def _all_swapped(self, averages: list[EMA]) -> Iterator[None]:
        if not averages:
            yield
            return
        with averages[0].swapped(), self._all_swapped(averages[1:]):
            yield

    @staticmethod
    def _best_file(directory: Path, number: int, timestamp: str) -> Path:
        return directory / "state_dicts" / f"unet_{number - 1}_state_{timestamp}.pth"

    def _save_unet(self, number: int, path: Path) -> None:
        """Writes the whole weights of a U-Net; on all ranks, of which the first writes."""
        weights = {name: full(value) for name, value in self.imagen.unets[number - 1].state_dict().items()}
        if self.ranks.first:
            checkpoint.save(weights, path)

    def _save_weights(self) -> None:
        for number in range(1, len(self.imagen.unets) + 1):
            self._save_unet(number, self.directory / "tmp" / f"unet_{number - 1}_tmp.pth")

    def _save_state(self) -> None:
        tensors, values = gather(self.owners)
        position = self.position
        values |= {
            "timestamp": self.timestamp,
            "unets": len(self.imagen.unets),
            "unet_numbers": self.numbers,
            "seed": self.settings.seed,
            "best_losses": self.best_losses,
            "measure": self.measure,
            "batches_in_epoch": self.batches_in_epoch,
            "layout": getattr(self.train_loader, "layout", {}),
            "length": self._length(),
            "total_steps": self.total_steps,
            "position": {
                "epoch": position.epoch,
                "batch": position.batch,
                "step": position.step,
                "loss_sums": self.ranks.sum_(position.loss_sums.clone()),
                "loss_count": position.loss_count,
                "validation_due": position.validation_due,
            },
            "bad_steps": self.bad_steps.item(),
            "skipped": dict(self.skipped),
        }
        self.snapshots.save(position.step, tensors, values, {"rng": position.rng, "epoch_rng": position.epoch_rng})

    def _save_on_error(self, error: BaseException) -> None:
        try:
            self._log(
                f"TRAINING ABORTED in epoch {self.position.epoch + 1} after {self.position.batch} of its batches by "
                f"{type(error).__name__}: {error}. Weights and state are saved to {self.directory}."
            )
            self._save_weights()
            self._save_state()
            self.snapshots.finish()
        except Exception as failure:
            # Only said: the error that ended the training is the one to raise.
            warnings.warn(
                f"training was ended by {error!r}, and then its state could not be saved to {self.directory}:"
                f" {failure!r}",
                stacklevel=2,
            )
        else:
            self._tell(
                f"Training was interrupted ({type(error).__name__}). Weights and state are in {self.directory}; to go"
                f" on, pass --RESTART_DIRECTORY {shlex.quote(str(self.directory))}"
            )

    def _restart_from(self, directory: Path) -> None:
        """Takes up the run whose state is in `directory`; nothing there is changed."""
        folder = directory / "checkpoints"
        try:
            in_place = folder.resolve() == self.snapshots.folder.resolve()
            saved = (self.snapshots if in_place else Snapshots(folder, self.ranks)).newest()
            if saved is None and not self._holds_weights(TrainedFolder(directory)):
                raise ValueError(f"there is no checkpoint in {folder}")
            if saved is not None:
                self._take_over(saved, directory)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"the training in RESTART_DIRECTORY {directory} cannot be continued: {reason}. Use the U-Nets, "
                "optimizer and arguments of that training, or begin another one elsewhere, with its weights if you like"
                " (load_minimagen)"
            ) from error
        if saved is None:
            warnings.warn(
                f"RESTART_DIRECTORY {directory} holds weights but no checkpoints (minimagen wrote none): "
                "training starts with the weights that imagen has now, a new optimizer state and epoch count",
                stacklevel=4,
            )
            return
        told = f"Continuing {directory} in epoch {self.position.epoch + 1} after {self.position.batch} of its batches."
        self._say(told)
        self._note(told)

    def _holds_weights(self, folder: TrainedFolder) -> bool:
        numbers = range(1, len(self.imagen.unets) + 1)
        return any(folder.best_file(number) is not None or folder.latest_file(number).is_file() for number in numbers)

    def _take_over(self, saved: Saved, directory: Path) -> None:
        values = saved.values
        must_agree("number of U-Nets", values["unets"], len(self.imagen.unets))
        must_agree("U-Nets trained", values["unet_numbers"], self.numbers)
        must_agree("seed", values["seed"], self.settings.seed)
        place = values["position"]
        batches = values["batches_in_epoch"], self.batches_in_epoch
        if place["batch"]:
            must_agree("batches in an epoch", *batches)
            self._check_layout(values.get("layout", {}))
        elif None not in batches and batches[0] != batches[1]:
            self._say(
                f"From here on an epoch has {batches[1]} batches, before it had {batches[0]}: with another split some"
                " of the validation images may have been trained on."
            )
        take_over(self.owners, saved, self.ranks)

        # On a rank that was not there before, and only there, the random states are new: images have seeds then.
        start = self._start_of(place["epoch"], place["step"])
        own = {"rng": start.rng, "epoch_rng": start.epoch_rng} if saved.own is None else saved.own
        sums = place["loss_sums"].to(self.imagen.device) if self.ranks.first else start.loss_sums
        self.position = Position(
            *(place["epoch"], place["batch"], place["step"], own["epoch_rng"], own["rng"], sums, place["loss_count"]),
            validation_due=place.get("validation_due", False),  # which earlier versions did not save
        )
        # Not reckoned anew where nothing has changed: batches that made no step would change it.
        same_length = values.get("length") == self._length()
        self.total_steps = values["total_steps"] if same_length else self._steps_in_all()
        self.total_steps_before = values.get("total_steps", self.total_steps_before)
        self.skipped.update(values["skipped"])
        self.bad_steps.fill_(values["bad_steps"])
        checkpoint.restore_rng(self.position.rng, self.imagen.device, self.generators)
        measure = values.get("measure", {})
        if changed := [name for name, here in self.measure.items() if measure.get(name, here) != here]:
            there, here = ({name: one[name] for name in changed} for one in (measure, self.measure))
            self._say(
                f"From here on validation is with {here}, before it was with {there}: its losses cannot be compared, so"
                " the best weights begin anew."
            )
            return
        self.measure = {**measure, **self.measure}
        for number, loss in values["best_losses"].items():
            self._take_over_best(number, loss, self._best_file(directory, number, values["timestamp"]))

    def _check_layout(self, before: Mapping[str, int]) -> None:
        """Refuses to go on within an epoch that is divided into other batches; says where only the order is another."""
        layout = getattr(self.train_loader, "layout", {})
        for name in before.keys() & layout.keys():
            if name == "batch size":
                must_agree("BATCH_SIZE within an epoch", before[name], layout[name])
            elif before[name] != layout[name]:
                self._say(
                    f"This epoch of a stream goes on with {layout[name]} {name}, before there were {before[name]}:"
                    " until it ends pictures may come twice or not at all."
                )

    def _take_over_best(self, number: int, loss: float, file: Path) -> None:
        """Copies the best weights so far: the new directory needs them even if validation never improves on them."""
        there = self.ranks.from_first(file.is_file())
        if not there:
            return
        self.best_losses[number] = loss
        if self.ranks.first:
            checkpoint.save(checkpoint.load(file), self._best_file(self.directory, number, self.timestamp))

    # What is said

    def _note(self, text: str) -> None:
        if self.watch is not None:
            self.watch.event(self.position.step, text)

    def _shown(self, losses: Tensor) -> dict[str, str]:
        """What the progress bar shows."""
        own = {"loss": f"{losses.mean().item() * self.ranks.size:.4f}"}
        return own if self.watch is None else {**own, **self.watch.shown()}

    def _log(self, text: str) -> None:
        if not self.ranks.first:
            return
        with open(self.directory / "training_progess.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _tell(self, text: str) -> None:
        if self.progress:
            say(text)

    def _say(self, text: str) -> None:
        self._log(text)
        self._tell(text)

    def _listed(self, losses: Any) -> str:
        return ", ".join(f"U-Net {number}: {loss:.4f}" for number, loss in zip(self.numbers, losses, strict=True))

    def _log_losses(self, what: str, losses: Any) -> None:
        self._log(f"{what}: {self._listed(losses)}")

    def _skipped_so_far(self) -> str:
        """In words; all ranks must call this."""
        counts = [f"{count} {what}" for what, count in self.skipped.items()]
        if bad := self.bad_steps.item():
            counts.append(f"{bad} optimizer steps whose gradients were not finite")
        return "; ".join(counts + failures_of(self.ranks, self.train_loader, self.valid_loader)) or "nothing"


def _check_scheduler(lr_scheduler: Any) -> None:
    if lr_scheduler is None:
        return
    needed = [
        parameter.name
        for parameter in inspect.signature(lr_scheduler.step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"lr_scheduler is a {type(lr_scheduler).__name__}, whose step needs {', '.join(needed)}: it is stepped "
            "without arguments after each optimizer step, so use one whose step needs none, such as LambdaLR"
        )
