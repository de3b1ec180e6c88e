"""The training loop behind :func:`.training.MinimagenTrain`."""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .ema import EMA
from .Imagen import Imagen
from .interrupts import TimeLimitExceeded, has_time_limit, time_limit, uninterrupted

__all__ = ["Trainer", "TrainingStep"]

VALIDATION_SEED = 0
SECONDS_BETWEEN_SHOWN_LOSSES = 1.0  # reading a loss waits for the device, so not after every batch
# Raise it when an older training_state.pth can no longer be continued from.
STATE_VERSION = 1


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


@dataclass(frozen=True)
class _Position:
    """Where a restarted run goes on: the point at which all gradients computed so far had gone into the weights.

    Attributes:
        epoch: Index of the epoch.
        batch: Number of its batches that are done.
        epoch_rng: Random states before the order of the epoch was drawn, see :func:`.checkpoint.capture_rng`.
        rng: Random states at this point.
        loss_sums: Sum of the losses of each trained U-Net in this epoch, shape (number of trained U-Nets,).
        loss_count: Number of batches in these sums.
    """

    epoch: int
    batch: int
    epoch_rng: dict[str, Any]
    rng: dict[str, Any]
    loss_sums: Tensor
    loss_count: int


def _counting_dataset(loader: Iterable | None) -> Any:
    """The data set of a loader, also behind a ``Subset``, if it counts the images it could not get in `failures`."""
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not hasattr(dataset, "failures"):
        dataset = getattr(dataset, "dataset", None)
    return dataset


def _length(loader: Iterable) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:  # a loader of an iterable data set has __len__ and yet no length
        return None


def _at_least_one(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


class Trainer:
    """One training run. The arguments are those of :func:`.training.MinimagenTrain`, with `args` as a dictionary."""

    def __init__(
        self,
        timestamp: str,
        args: dict[str, Any],
        unets: Sequence,
        imagen: Imagen,
        train_dataloader: Iterable,
        valid_dataloader: Iterable | None,
        training_dir: Callable[..., AbstractContextManager],
        optimizer: torch.optim.Optimizer,
        timeout: float | None,
        *,
        unet_numbers: Sequence[int] | None,
        lr_scheduler: Any,
        ema_decay: float | None,
        autocast_dtype: torch.dtype | None,
        max_grad_norm: float | None,
        max_seconds: float | None,
        callback: Callable[[TrainingStep], None] | None,
        progress: bool,
    ) -> None:
        self.started = time.monotonic()
        if missing := [name for name in ("EPOCHS", "ACCUM_ITER", "CHCKPT_NUM") if args.get(name) is None]:
            raise ValueError(f"args lacks {', '.join(missing)}: parse it with get_minimagen_parser()")
        if isinstance(args["EPOCHS"], bool) or not isinstance(args["EPOCHS"], int) or args["EPOCHS"] < 0:
            raise ValueError(f"EPOCHS must be a whole number of at least 0, got {args['EPOCHS']!r}")
        self.epochs = args["EPOCHS"]
        self.accumulated_batches = _at_least_one("ACCUM_ITER", args["ACCUM_ITER"])
        self.checkpoint_interval = _at_least_one("CHCKPT_NUM", args["CHCKPT_NUM"])
        for name, value in (("max_grad_norm", max_grad_norm), ("max_seconds", max_seconds)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive or None, got {value!r}")
        if timeout is not None and timeout < 0:
            raise ValueError(f"timeout must be a number of seconds, or 0 or None for no limit, got {timeout!r}")
        if autocast_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"autocast_dtype must be None or torch.bfloat16, got {autocast_dtype!r}: float16 needs loss scaling, "
                "which this loop does not do"
            )
        self.timestamp = str(timestamp)
        self.imagen = imagen
        self.numbers = self._checked_numbers(unet_numbers, len(unets))
        self.parameters = self._checked_parameters(optimizer)
        self.train_dataloader = train_dataloader
        self.valid_dataloader = valid_dataloader
        self.batches_in_epoch = _length(train_dataloader)
        if self.batches_in_epoch == 0:
            raise ValueError(
                "train_dataloader has no batch: the data set is empty, or it is smaller than the batch size and "
                "drop_last=True drops it"
            )
        self.generators = checkpoint.loader_generators(train_dataloader)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.averages = (
            {} if ema_decay is None else {number: EMA(imagen.unets[number - 1], ema_decay) for number in self.numbers}
        )
        self.timeout = timeout
        self.autocast_dtype = autocast_dtype
        self.max_grad_norm = max_grad_norm
        self.max_seconds = max_seconds
        self.callback = callback
        self.progress = progress

        with training_dir():
            self.directory = Path.cwd()
        for name in ("tmp", "state_dicts"):
            (self.directory / name).mkdir(exist_ok=True)

        self.best_losses = dict.fromkeys(self.numbers, float("inf"))
        self.skipped: Counter[str] = Counter()
        self.position = self._start_of(epoch=0)
        self.loss_sums, self.loss_count = self.position.loss_sums, 0
        self.losses: Tensor | None = None  # of the last batch
        self.group = 0  # batches whose gradients wait for the next optimizer step
        if timeout and not has_time_limit():
            self._say("No timeout: batches can be given up only in the main thread, and not on Windows.")
        if args.get("RESTART_DIRECTORY") is not None:
            self._restart_from(Path(args["RESTART_DIRECTORY"]))

    def _checked_numbers(self, unet_numbers: Sequence[int] | None, given: int) -> list[int]:
        available = len(self.imagen.unets)
        if unet_numbers is None:
            if given > available:
                raise ValueError(
                    f"unets has {given} U-Nets, but imagen has {available}: pass those that it was made of"
                )
            only = self.imagen.only_train_unet_number
            return list(range(1, given + 1)) if only is None else [only]
        numbers = list(unet_numbers)
        if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(1, available + 1)):
            raise ValueError(f"unet_numbers must be one or more different numbers from 1 to {available}, got {numbers}")
        return numbers

    def _checked_parameters(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        parameters: list[nn.Parameter] = []
        for number in self.numbers:
            own = list(self.imagen.unets[number - 1].parameters())
            if not any(id(parameter) in optimized for parameter in own):
                raise ValueError(
                    f"optimizer holds no parameter of imagen.unets[{number - 1}], so U-Net {number} would not learn: "
                    "build it from imagen.parameters() (Imagen replaces U-Nets that were made with other settings)"
                )
            parameters += own
        return parameters

    # The run

    def run(self) -> None:
        """Trains until the last epoch is done or the time is up; whatever ends it, weights and state are saved."""
        try:
            if self.position.epoch >= self.epochs:
                self._say(f"Nothing to train: {self.position.epoch} epochs are done, EPOCHS is {self.epochs}.")
                self._checkpoint()
            while self.position.epoch < self.epochs:
                self._train_epoch()
                if self._time_is_up() and self.position.epoch < self.epochs:
                    self._say(
                        f"Time is up: training ends in epoch {self.position.epoch + 1} of {self.epochs} after "
                        f"{self.position.batch} of its batches. To go on, pass --RESTART_DIRECTORY {self.directory}"
                    )
                    break
        except BaseException as error:
            self._save_on_error(error)
            raise

    def _time_is_up(self) -> bool:
        return self.max_seconds is not None and time.monotonic() - self.started >= self.max_seconds

    def _train_epoch(self) -> None:
        epoch, done = self.position.epoch, self.position.batch
        self._log(f"---------- Epoch {epoch + 1} of {self.epochs} ----------")
        self.imagen.train()
        self._drop_gradients()
        batches = self._open_epoch()
        with tqdm(
            desc=f"Epoch {epoch + 1}/{self.epochs}",
            total=self.batches_in_epoch,
            initial=done,
            unit="batch",
            disable=not self.progress,
        ) as bar:
            shown = float("-inf")
            for batch in batches:
                self._train_batch(batch, epoch, done)
                done += 1
                bar.update()
                due = time.monotonic() - shown >= SECONDS_BETWEEN_SHOWN_LOSSES
                if self.progress and due and self.losses is not None:
                    bar.set_postfix(loss=f"{self.losses.mean().item():.4f}")
                    shown = time.monotonic()
                if done == self.batches_in_epoch:  # the end of the epoch is dealt with below
                    continue
                if self._time_is_up():
                    # Gradients of an unfinished group are left to a restart, which computes them again.
                    self._drop_gradients()
                    break
                if done % self.checkpoint_interval == 0:
                    self._checkpoint(epoch, done)
            else:
                with uninterrupted():
                    if self.group:
                        self._step()
                    self.position = self._start_of(epoch + 1)
                if not self.loss_count:
                    self._say(f"No batch of epoch {epoch + 1} could be used: check the data set.")
        self._checkpoint(epoch, done)

    def _open_epoch(self) -> Iterator:
        """The batches of the epoch that are not done yet."""
        start = self.position
        self.loss_sums, self.loss_count = start.loss_sums, start.loss_count
        if start.batch == 0:
            self.position = self._start_of(start.epoch)
            return iter(self.train_dataloader)
        checkpoint.restore_rng(start.epoch_rng, self.imagen.device, self.generators)
        batches = checkpoint.iterate_from(self.train_dataloader, start.batch)
        checkpoint.restore_rng(start.rng, self.imagen.device, self.generators)
        return batches

    def _start_of(self, epoch: int) -> _Position:
        """The start of an epoch, which begins with the random states of this moment."""
        rng = checkpoint.capture_rng(self.imagen.device, self.generators)
        sums = torch.zeros(len(self.numbers), device=self.imagen.device)
        return _Position(epoch, batch=0, epoch_rng=rng, rng=rng, loss_sums=sums, loss_count=0)

    # One batch

    def _train_batch(self, batch: dict[str, Tensor] | None, epoch: int, index: int) -> None:
        if not batch:
            self.skipped["batches without images"] += 1
            return
        try:
            with time_limit(self.timeout):
                losses = self._backward(batch)
        except TimeLimitExceeded:
            self._drop_gradients()
            self.skipped["batches over the time limit"] += 1
            self._say(f"Epoch {epoch + 1}, batch {index + 1}: given up after {self.timeout} seconds.")
            return
        with uninterrupted():
            self.losses = losses
            self.loss_sums, self.loss_count = self.loss_sums + losses, self.loss_count + 1
            self.group += 1
            if self.group == self.accumulated_batches:
                self._step()
                rng = checkpoint.capture_rng(self.imagen.device, self.generators)
                self.position = _Position(
                    epoch, index + 1, self.position.epoch_rng, rng, self.loss_sums, self.loss_count
                )
        if self.callback is not None:
            seconds = time.monotonic() - self.started
            for number, loss in zip(self.numbers, losses.tolist(), strict=True):
                self.callback(TrainingStep(epoch, index, number, loss, seconds))

    def _forward(self, batch: dict[str, Tensor], number: int) -> Tensor:
        device = self.imagen.device
        autocast = nullcontext() if self.autocast_dtype is None else torch.autocast(device.type, self.autocast_dtype)
        with autocast:
            return self.imagen(
                batch["image"], text_embeds=batch["encoding"], text_masks=batch["mask"], unet_number=number
            )

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name].to(self.imagen.device, non_blocking=True) for name in ("image", "encoding", "mask")}

    def _backward(self, batch: dict[str, Tensor]) -> Tensor:
        """Adds the batch's gradients for every trained U-Net; returns the losses, float32, shape (trained U-Nets,)."""
        batch = self._on_device(batch)
        losses = []
        for number in self.numbers:
            loss = self._forward(batch, number)
            loss.backward()
            losses.append(loss.detach().float())
        return torch.stack(losses)

    def _step(self) -> None:
        if self.group > 1:
            gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            torch._foreach_div_(gradients, self.group)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self._drop_gradients()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        for average in self.averages.values():
            average.update()

    def _drop_gradients(self) -> None:
        self.imagen.zero_grad(set_to_none=True)
        self.group = 0

    # Validation

    def _validate(self) -> list[float] | None:
        """Mean loss over the validation images for each trained U-Net; None if there is no image.

        Every time with the same order, times and noise, and the text never dropped, so that losses can be compared.
        """
        device = self.imagen.device
        loader = () if self.valid_dataloader is None else self.valid_dataloader
        sums = torch.zeros(len(self.numbers), device=device)
        images = 0
        with self._evaluating(), checkpoint.isolated_rng(VALIDATION_SEED, device, checkpoint.loader_generators(loader)):
            for batch in tqdm(loader, desc="Validation", unit="batch", leave=False, disable=not self.progress):
                if not batch:
                    self.skipped["validation batches without images"] += 1
                    continue
                batch = self._on_device(batch)
                losses = torch.stack([self._forward(batch, number).float() for number in self.numbers])
                sums += losses * len(batch["image"])
                images += len(batch["image"])
        return (sums / images).tolist() if images else None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = [(module, module.training) for module in self.imagen.modules()]
        cond_drop_prob = self.imagen.cond_drop_prob
        try:
            self.imagen.eval()
            self.imagen.cond_drop_prob = 0.0
            with torch.no_grad():
                yield
        finally:
            self.imagen.cond_drop_prob = cond_drop_prob
            for module, mode in modes:
                module.training = mode

    # Files

    def _checkpoint(self, epoch: int | None = None, done: int = 0) -> None:
        """Saves, validates and reports; `epoch` and `done` say where, as an index and a number of batches."""
        if epoch is not None:
            self._log(f"Epoch {epoch + 1}, batch {done}: checkpoint.")
            if self.loss_count:
                self._log_losses("Mean training loss in this epoch", (self.loss_sums / self.loss_count).tolist())
            if self.losses is not None:
                self._log_losses("Training loss of the last batch", self.losses.tolist())
        self._save_weights()
        with ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.swapped())
            losses = self._validate()
            if losses is None:
                self._say("No validation image: state_dicts/ gets the latest weights, unless it has validated ones.")
            for index, number in enumerate(self.numbers):
                best = self.best_losses[number]
                if math.isinf(best) if losses is None else losses[index] < best:
                    checkpoint.save(self._unet_state(number), self._best_file(self.directory, number, self.timestamp))
                    self.best_losses[number] = best if losses is None else losses[index]
        self._save_state()
        if losses is not None:
            self._log_losses("Validation loss", losses)
            self._log_losses("Best validation loss", self.best_losses.values())
            self._tell("Validation loss " + self._listed(losses))
        self._log(f"Skipped: {self._skipped_so_far()}")

    @staticmethod
    def _best_file(directory: Path, number: int, timestamp: str) -> Path:
        return directory / "state_dicts" / f"unet_{number - 1}_state_{timestamp}.pth"

    def _unet_state(self, number: int) -> dict[str, Tensor]:
        return self.imagen.unets[number - 1].state_dict()

    def _save_weights(self) -> None:
        for number in range(1, len(self.imagen.unets) + 1):
            checkpoint.save(self._unet_state(number), self.directory / "tmp" / f"unet_{number - 1}_tmp.pth")

    def _save_state(self) -> None:
        # The weights are in here too: one file is replaced at once, several are not, and these must belong together.
        state = {
            "version": STATE_VERSION,
            "timestamp": self.timestamp,
            "unets": [self._unet_state(number) for number in range(1, len(self.imagen.unets) + 1)],
            "unet_numbers": self.numbers,
            "optimizer": self._kind_and_state(self.optimizer),
            "lr_scheduler": None if self.lr_scheduler is None else self._kind_and_state(self.lr_scheduler),
            "averages": {number: average.state_dict() for number, average in self.averages.items()},
            "best_losses": self.best_losses,
            "batches_in_epoch": self.batches_in_epoch,
            "position": vars(self.position),
            "skipped": dict(self.skipped),
        }
        checkpoint.save(state, self.directory / "tmp" / "training_state.pth")

    @staticmethod
    def _kind_and_state(owner: Any) -> dict[str, Any]:
        return {"kind": type(owner).__name__, "state": owner.state_dict()}

    def _save_on_error(self, error: BaseException) -> None:
        folder = self.directory / "tmp"
        try:
            self._log(
                f"TRAINING ABORTED in epoch {self.position.epoch + 1} after {self.position.batch} of its batches by "
                f"{type(error).__name__}: {error}. Weights and state are saved to {folder}."
            )
            self._save_weights()
            self._save_state()
        except Exception as failure:
            # Only said: the error that ended the training is the one to raise.
            warnings.warn(
                f"training was ended by {error!r}, and then its state could not be saved to {folder}: {failure!r}",
                stacklevel=2,
            )
        else:
            self._tell(
                f"Training was interrupted ({type(error).__name__}). Weights and state are in {folder}; to go on, pass "
                f"--RESTART_DIRECTORY {self.directory}"
            )

    def _restart_from(self, directory: Path) -> None:
        """Takes up the run whose state is in `directory`; nothing there is changed."""
        path = directory / "tmp" / "training_state.pth"
        if not path.is_file() and list((directory / "tmp").glob("unet_*_tmp.pth")):
            warnings.warn(
                f"RESTART_DIRECTORY {directory} holds weights but no tmp/training_state.pth (minimagen wrote none): "
                "training starts with the weights that imagen has now, a new optimizer state and epoch count",
                stacklevel=4,
            )
            return
        try:
            self._take_over(checkpoint.load(path), directory)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"the training in RESTART_DIRECTORY {directory} cannot be continued: {reason}. Use the U-Nets, "
                "optimizer and arguments of that training, or leave it out and start from its weights (load_minimagen)"
            ) from error
        self._say(
            f"Continuing {directory} in epoch {self.position.epoch + 1} after {self.position.batch} of its batches."
        )

    def _take_over(self, state: dict[str, Any], directory: Path) -> None:
        def must_agree(what: str, saved: Any, here: Any) -> None:
            if saved != here:
                raise ValueError(f"{what}: {saved} in that training, {here} in this one")

        must_agree("version of its state", state["version"], STATE_VERSION)
        position = _Position(
            **{**state["position"], "loss_sums": state["position"]["loss_sums"].to(self.imagen.device)}
        )
        must_agree("number of U-Nets", len(state["unets"]), len(self.imagen.unets))
        must_agree("U-Nets trained", state["unet_numbers"], self.numbers)
        must_agree("averages kept (ema_decay)", bool(state["averages"]), bool(self.averages))
        for name, owner in (("optimizer", self.optimizer), ("lr_scheduler", self.lr_scheduler)):
            kind = None if state[name] is None else state[name]["kind"]
            must_agree(name, kind, None if owner is None else type(owner).__name__)
        if position.batch:
            must_agree("batches in an epoch", state["batches_in_epoch"], self.batches_in_epoch)

        for unet, weights in zip(self.imagen.unets, state["unets"], strict=True):
            unet.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"]["state"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"]["state"])
        for number, average in self.averages.items():
            average.load_state_dict(state["averages"][number])
        self.skipped.update(state["skipped"])
        self.position = position
        checkpoint.restore_rng(position.rng, self.imagen.device, self.generators)
        for number, loss in state["best_losses"].items():
            self._take_over_best(number, loss, self._best_file(directory, number, state["timestamp"]))

    def _take_over_best(self, number: int, loss: float, file: Path) -> None:
        """Copies the best weights so far: the new directory needs them even if validation never improves on them."""
        if file.is_file():
            self.best_losses[number] = loss
            checkpoint.save(checkpoint.load(file), self._best_file(self.directory, number, self.timestamp))

    # What is said

    def _log(self, text: str) -> None:
        with open(self.directory / "training_progess.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _tell(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)

    def _say(self, text: str) -> None:
        self._log(text)
        self._tell(text)

    def _listed(self, losses: Iterable[float]) -> str:
        return ", ".join(f"U-Net {number}: {loss:.4f}" for number, loss in zip(self.numbers, losses, strict=True))

    def _log_losses(self, what: str, losses: Iterable[float]) -> None:
        self._log(f"{what}: {self._listed(losses)}")

    def _skipped_so_far(self) -> str:
        counts = [f"{count} {what}" for what, count in self.skipped.items()]
        datasets = [_counting_dataset(loader) for loader in (self.train_dataloader, self.valid_dataloader)]
        # Training and validation are often parts of one data set, which has one count.
        for dataset in {id(dataset): dataset for dataset in datasets if dataset is not None}.values():
            if dataset.failures:
                counts.append(f"images of {type(dataset).__name__}: {dataset.failures}")
        return "; ".join(counts) or "nothing"
