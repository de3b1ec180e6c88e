"""Text encoders: T5 (Raffel et al., 2020) through transformers, the embedded `t5_tiny`, and encoders of your own.

Wherever an encoder's name is asked for (`t5_encode_text`, `get_encoded_dim`, `Imagen`, the command line), it may be

- one of the ten documented names, the keys of `T5_VERSIONS`;
- ``'t5_tiny'``, a small random T5 that is built on first use and needs no network (`minimagen_fast.tiny_t5`);
- a name registered with `register_text_encoder`;
- the path of a local folder that holds a T5 (configuration, tokenizer and weights, as ``save_pretrained`` writes them);
- the id of a T5 on the Hugging Face hub, such as ``'google/flan-t5-base'``.

Files that are in the Hugging Face cache already are used without asking the hub. Where a folder in the working
directory is called like a hub id (say ``t5-small``), that folder is taken, as everywhere in transformers.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F

from minimagen_fast.arguments import whole_number
from minimagen_fast.helpers import device_for_values
from minimagen_fast.tiny_t5 import TINY_T5_DIM, TINY_T5_NAME, embedded_t5_directory

MAX_LENGTH = 256

DEFAULT_T5_NAME = "t5_small"

# Checkpoint size in GB. An entry's tokenizer and model are filled in when it is first used; setting both back to None
# frees them.
T5_VERSIONS: dict[str, dict[str, Any]] = {
    "t5_small": {"tokenizer": None, "model": None, "handle": "t5-small", "dim": 512, "size": 0.24},
    "t5_base": {"tokenizer": None, "model": None, "handle": "t5-base", "dim": 768, "size": 0.89},
    "t5_large": {"tokenizer": None, "model": None, "handle": "t5-large", "dim": 1024, "size": 2.75},
    "t5_3b": {"tokenizer": None, "model": None, "handle": "t5-3b", "dim": 1024, "size": 10.6},
    "t5_11b": {"tokenizer": None, "model": None, "handle": "t5-11b", "dim": 1024, "size": 42.1},
    "small1.1": {"tokenizer": None, "model": None, "handle": "google/t5-v1_1-small", "dim": 512, "size": 0.3},
    "base1.1": {"tokenizer": None, "model": None, "handle": "google/t5-v1_1-base", "dim": 768, "size": 0.99},
    "large1.1": {"tokenizer": None, "model": None, "handle": "google/t5-v1_1-large", "dim": 1024, "size": 3.13},
    "xl1.1": {"tokenizer": None, "model": None, "handle": "google/t5-v1_1-xl", "dim": 2048, "size": 11.4},
    "xxl1.1": {"tokenizer": None, "model": None, "handle": "google/t5-v1_1-xxl", "dim": 4096, "size": 44.5},
}

TextEncoder = Callable[[list[str], int, torch.device], tuple[torch.Tensor, torch.Tensor]]

# Captions per forward pass of the model.
BATCH_SIZE = 32

HUB_TIMEOUT_SECONDS = 10

# Entries of every T5 that is not documented, by folder or hub id, in the form of `T5_VERSIONS`.
_OTHER_T5: dict[str, dict[str, Any]] = {}

# Models that were loaded here. Programs put others into the table, of which no file is known.
_models_of_files: WeakSet[torch.nn.Module] = WeakSet()

_REGISTERED: dict[str, tuple[TextEncoder, int]] = {}
_registrations: Counter[str] = Counter()

# Held while a T5 is loaded, moved and run: there is one of each per process, transformers' tokenizers cannot be used
# by two threads at once, and a model must not change its device under another thread's hands.
_lock = threading.RLock()

_CONFIGURATION_FILES = (
    "added_tokens.json",
    "config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def t5_encode_text(
    text: str | list[str] | tuple[str, ...],
    name: str = "t5_base",
    max_length: int = MAX_LENGTH,
    *,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes captions with a frozen text encoder.

    Args:
        text: Captions; one string stands for a list of one. Empty captions and any unicode are fine. Long lists are
            run through the model in batches.
        name: Name of the encoder (see the module's docstring). The documented ones: ``'t5_small'`` (0.24 GB, 512
            dimensions), ``'t5_base'`` (0.89 GB, 768), ``'t5_large'`` (2.75 GB, 1024), ``'t5_3b'`` (10.6 GB, 1024),
            ``'t5_11b'`` (42.1 GB, 1024), and the same from T5 version 1.1, ``'small1.1'``, ``'base1.1'``,
            ``'large1.1'``, ``'xl1.1'``, ``'xxl1.1'``.
        max_length: Tokens per caption at most, end mark included; longer captions are cut.
        device: Where to encode and where the results lie; the model stays there. By default CUDA where it is
            available, but the CPU in the workers of a `DataLoader`, which must not touch CUDA.
        batch_size: Captions per forward pass of a T5; 32 by default. A registered encoder gets all at once.

    Returns:
        Encodings, float32 of shape (b, n, dim), zero where masked; and their mask, bool of shape (b, n), True on
        tokens. n is the token count of the longest caption. Neither carries gradients.

    Raises:
        TypeError: If `text`, one of its entries, `name`, `max_length` or `batch_size` has the wrong type.
        ValueError: If `text` is an empty list, `max_length` or `batch_size` is less than 1, `name` is unknown,
            `device` cannot be used here or is ``meta``, or a registered encoder's answer is not what it should be.
        OSError: If the encoder's files are nowhere to be had, or are not a T5's.
    """
    captions = _as_captions(text)
    max_length = whole_number("max_length", max_length, least=1)
    batch_size = BATCH_SIZE if batch_size is None else whole_number("batch_size", batch_size, least=1, else_=" or None")
    _check_name(name)
    # Not on meta, from where the one model that there is could not come back.
    device = device_for_values(_default_device() if device is None else device)

    if name in _REGISTERED:
        return _encode_registered(name, captions, max_length, device)
    # Of the caller's default device nothing may follow: the tokenizer would put its tensors there.
    with _lock, torch.device("cpu"):
        return _encode_t5(_entry(name), captions, max_length, device, batch_size)


def token_counts(text: list[str], name: str, max_length: int) -> list[int] | None:
    """Returns how many tokens each caption has, end mark included and at most `max_length`, without encoding it.

    None for a registered encoder, which tells its counts only with its encodings. The arguments and errors are those
    of `t5_encode_text`.
    """
    captions = _as_captions(text)
    _check_name(name)
    if name in _REGISTERED:
        return None
    with _lock, torch.device("cpu"):
        _, mask = _tokens(_loaded(_entry(name)), captions, max_length)
    return mask.sum(1).tolist()


def encoder_files(name: str) -> list[Path]:
    """Returns the files on this machine that decide an encoder's answers: configuration, tokenizer and weights.

    They are downloaded first where they are not here yet. There are none for a registered encoder, nor for a model that
    a program put into `T5_VERSIONS` itself. The errors are those of `t5_encode_text`.
    """
    _check_name(name)
    if name in _REGISTERED:
        return []
    with _lock:
        entry = _loaded(_entry(name))
    if entry["model"] not in _models_of_files:
        return []
    handle = entry["handle"]
    if os.path.isdir(handle):
        folder = Path(handle)
    else:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(handle, "config.json")
        if not isinstance(config, str):
            raise OSError(f"the configuration of {handle!r} has gone from the Hugging Face cache: load it again")
        folder = Path(config).parent
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    weights = [file for file in files if file.match("model*.safetensors")] or [
        file for file in files if file.match("pytorch_model*.bin")
    ]
    return [file for file in files if file.name in _CONFIGURATION_FILES] + weights


def get_encoded_dim(name: str) -> int:
    """Returns the number of dimensions of an encoder's token encodings.

    Needs no file for the documented names, ``'t5_tiny'`` and registered encoders; for a folder or a hub id it reads
    ``config.json``.

    Args:
        name: Name of the encoder (see the module's docstring).

    Raises:
        TypeError: If `name` is not a string.
        ValueError: If `name` is unknown.
        OSError: If the configuration of a folder or hub id is nowhere to be had, or not a T5's.
    """
    _check_name(name)
    if name in _REGISTERED:
        return _REGISTERED[name][1]
    if name == TINY_T5_NAME:
        return TINY_T5_DIM
    entry = _entry(name)
    return entry["dim"] if "dim" in entry else _from_files(entry, _read_config).d_model


def absolute_name(name: str) -> str:
    """The name of an encoder as it can be kept in files: where it is a folder's, the folder's absolute path."""
    if name in _REGISTERED or name in T5_VERSIONS or name == TINY_T5_NAME:
        return name
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if os.path.isdir(folder) else name


def register_text_encoder(name: str, encode: TextEncoder, dim: int) -> None:
    """Makes an encoder of your own available under a name, in this process.

    Registering a name again replaces its encoder.

    Args:
        name: Name that is then valid wherever an encoder's name is. Not one of the built-in names.
        encode: Called as ``encode(captions, max_length, device)`` with a list of strings, the most tokens allowed and
            a `torch.device`; gives the encodings, floating point of shape (b, n, dim) with 1 <= n <= max_length, and
            their mask, of shape (b, n), true on tokens. It gets all captions at once, without gradients, and must be
            ready to be called by several threads.
        dim: Dimensions of its encodings, at least 1.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `name` is empty or built in, or `dim` is less than 1.
    """
    _check_name(name)
    if name in T5_VERSIONS or name == TINY_T5_NAME:
        raise ValueError(f"name {name!r} is built in and cannot be registered: choose another one")
    if not callable(encode):
        raise TypeError(f"encode must be callable as encode(captions, max_length, device), not {encode!r}")
    _REGISTERED[name] = (encode, whole_number("dim", dim, least=1))
    _registrations[name] += 1


def registrations(name: str) -> int:
    """How often a name was registered: whoever keeps encodings has those of another encoder once it is more."""
    return _registrations[name]


# Arguments


def _as_captions(text: object) -> list[str]:
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, (list, tuple)):
        raise TypeError(f"text must be a string or a list of strings, not {type(text).__name__}")
    if not captions:
        raise ValueError("text must hold at least one caption; it is an empty list")
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"text must hold strings only; entry {index} is {caption!r} ({type(caption).__name__})")
    # Lone surrogates, as broken JSON escapes leave them, are no text: the tokenizers fail on them.
    return [caption.encode("utf-8", "replace").decode("utf-8") for caption in captions]


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be the name of a text encoder as a string, not {name!r}")
    if not name:
        raise ValueError(f"name must not be empty. {_valid_names()}")


def _valid_names() -> str:
    names = [*T5_VERSIONS, TINY_T5_NAME, *sorted(_REGISTERED)]
    return (
        f"Valid names are {', '.join(map(repr, names))}, the path of a local folder that holds a T5, "
        "or a Hugging Face id such as 'google/flan-t5-base'."
    )


def _default_device() -> torch.device:
    in_worker = torch.utils.data.get_worker_info() is not None
    return torch.device("cuda" if not in_worker and torch.cuda.is_available() else "cpu")


# Encoding


def _encode_t5(
    entry: dict[str, Any], captions: list[str], max_length: int, device: torch.device, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    model = _loaded(entry)["model"]
    # Of what users put into the table no more is asked than minimagen asks: that its model knows `to` where it must
    # move.
    if isinstance(model, torch.nn.Module) or device.type != "cpu":
        model = model.to(device)
    # In training mode, where users may have put it or left their own, dropout would make every answer another.
    model.eval()
    ids, mask = _tokens(entry, captions, max_length)
    encodings = []
    # Autocast off: the result must not depend on what surrounds the call, and T5 overflows in fp16.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(captions), batch_size):
            batch = slice(start, start + batch_size)
            # Up to the last token of any: tokenizers that users put into the table may pad on the left.
            width = 1 + max(mask[batch].any(0).nonzero().flatten().tolist(), default=0)
            batch_mask = mask[batch, :width].to(device)
            hidden = model(input_ids=ids[batch, :width].to(device), attention_mask=batch_mask.long()).last_hidden_state
            hidden = hidden.float().masked_fill(~batch_mask[..., None], 0.0)
            encodings.append(F.pad(hidden, (0, 0, 0, mask.shape[1] - batch_mask.shape[1])))
    return torch.cat(encodings), mask.to(device)


def _tokens(entry: dict[str, Any], captions: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Their ids, and which of them are tokens and not padding."""
    tokenizer = entry["tokenizer"]
    # Those that users put into the table may have the method of older versions of transformers alone.
    tokenize = tokenizer if callable(tokenizer) else tokenizer.batch_encode_plus
    tokens = tokenize(captions, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    return tokens.input_ids.cpu(), tokens.attention_mask.cpu().bool()


def _encode_registered(
    name: str, captions: list[str], max_length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    encode, dim = _REGISTERED[name]
    with torch.no_grad():
        answer = encode(captions, max_length, device)
    expected = f"the text encoder {name!r} must return (encodings, mask)"
    if not (isinstance(answer, tuple) and len(answer) == 2 and all(isinstance(part, torch.Tensor) for part in answer)):
        raise ValueError(f"{expected}, a tuple of two tensors; it returned {type(answer).__name__}")
    encodings, mask = answer
    shape = tuple(encodings.shape)
    right_shape = len(shape) == 3 and shape[0] == len(captions) and shape[2] == dim and 1 <= shape[1] <= max_length
    if not right_shape or not encodings.is_floating_point():
        raise ValueError(
            f"{expected}, with floating point encodings of shape ({len(captions)}, n, {dim}), 1 <= n <= {max_length}; "
            f"they are {encodings.dtype} of shape {shape}"
        )
    if tuple(mask.shape) != shape[:2]:
        raise ValueError(f"{expected}, with a mask of shape {shape[:2]}; it has shape {tuple(mask.shape)}")
    encodings, mask = encodings.detach().to(device, torch.float32), mask.to(device, torch.bool)
    return encodings.masked_fill(~mask[..., None], 0.0), mask


# Finding and loading


def _entry(name: str) -> dict[str, Any]:
    """The one entry, in the form of `T5_VERSIONS`, that holds tokenizer and model of the T5 called `name`."""
    if name in T5_VERSIONS:
        return T5_VERSIONS[name]
    folder = os.path.expanduser(name)
    if name == TINY_T5_NAME:
        handle = str(embedded_t5_directory())
    elif os.path.isdir(folder):
        handle = os.path.realpath(folder)
    else:
        for version in T5_VERSIONS.values():
            if version.get("handle") == name:
                return version
        if not _HUB_ID.fullmatch(name) and not _is_cached(name):
            raise ValueError(f"name {name!r} is no text encoder and no folder. {_valid_names()}")
        handle = name
    return _OTHER_T5.setdefault(handle, {"tokenizer": None, "model": None, "handle": handle})


def _loaded(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry, its tokenizer and model filled in."""
    if entry["tokenizer"] is None or entry["model"] is None:
        _load(entry)
    return entry


def _load(entry: dict[str, Any]) -> None:
    tokenizer, model = _from_files(entry, _read_model)
    dim = model.config.d_model
    if entry.get("dim", dim) != dim:
        raise OSError(
            f"the T5 found for {entry['handle']!r} has {dim} dimensions, not {entry['dim']} as due. Is it a folder of "
            f"that name in the working directory, {os.getcwd()}, that holds another model? Rename it, or pass its path "
            "as the name."
        )
    entry["tokenizer"], entry["model"] = tokenizer, model
    _models_of_files.add(model)


def _is_cached(handle: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(handle)
    except ValueError:
        return False
    return isinstance(try_to_load_from_cache(handle, "config.json"), str)


def _from_files(entry: dict[str, Any], read: Callable[[str, bool], Any]) -> Any:
    """Returns ``read(source, local_files_only)`` from the folder or the cache on this machine, or else from the hub.

    Whatever goes wrong in reading becomes one OSError that says where the files were looked for and what to do.
    """
    handle = entry["handle"]
    if os.path.isdir(handle):
        try:
            return read(handle, True)
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            remedy = (
                "It should hold a T5 as save_pretrained writes it: config.json, a tokenizer (spiece.model or "
                "tokenizer.json) and the weights (model.safetensors or pytorch_model.bin)."
            )
            if re.fullmatch(f"{TINY_T5_NAME}-[0-9a-f]+", Path(handle).name):
                remedy = "It holds the embedded text encoder, which is built anew where the folder is deleted."
            raise OSError(
                f"the folder {os.path.abspath(handle)} does not hold what is wanted: {error}\n{remedy}"
            ) from error
    try:
        return read(handle, True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        cache_error = error
    try:
        _reach_hub(handle)
        return read(handle, False)
    except (ImportError, MemoryError):
        raise
    except Exception as hub_error:
        raise OSError(_nowhere_message(entry, cache_error, hub_error)) from hub_error


def _reach_hub(handle: str) -> None:
    """Asks the hub for the headers of one file, once.

    Where there is no network this fails at once; transformers would retry every file for half a minute.
    """
    from huggingface_hub import get_session, hf_hub_url

    get_session().head(hf_hub_url(handle, "config.json"), timeout=HUB_TIMEOUT_SECONDS)


def _nowhere_message(entry: dict[str, Any], cache_error: Exception, hub_error: Exception) -> str:
    from huggingface_hub import constants

    handle = entry["handle"]
    names = [name for name, version in T5_VERSIONS.items() if version is entry]
    label = f"{names[0]!r} (Hugging Face id {handle!r})" if names else repr(handle)
    size = f", about {entry['size']} GB" if "size" in entry else ""
    in_cache = f"incomplete or of no use: {cache_error}" if _is_cached(handle) else "not there"
    return (
        f"the T5 text encoder {label} could not be loaded. Looked for\n"
        f"  the folder {os.path.abspath(handle)}: not there\n"
        f"  the Hugging Face cache {constants.HF_HUB_CACHE}: {in_cache}\n"
        f"  {constants.ENDPOINT}: {hub_error}\n"
        f"What to do: run once with a network, so that it is downloaded{size}; or set HF_HOME to a Hugging Face folder "
        f"that has it; or give the path of a folder that holds a T5 as the name. {TINY_T5_NAME!r} is an encoder that "
        "needs no download, but a trained Imagen understands only the encoder that it was trained with."
    )


def _read_config(source: str, local_files_only: bool) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
    if config.model_type not in ("t5", "mt5"):
        raise ValueError(f"its config.json describes a {config.model_type!r} model, not a T5")
    return config


def _read_model(source: str, local_files_only: bool) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, T5EncoderModel

    quiet = _quiet_transformers(hide_bars=local_files_only)
    # Some versions of transformers draw random weights before they read the real ones; and under a default device
    # other than the CPU they ask for another package.
    with quiet, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        config = _read_config(source, local_files_only)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_files_only, trust_remote_code=False)
        model, info = T5EncoderModel.from_pretrained(
            source, config=config, local_files_only=local_files_only, output_loading_info=True
        )
    # Where files are missing, transformers makes do with an empty vocabulary or random weights.
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:
        raise ValueError("its tokenizer has no vocabulary: spiece.model or tokenizer.json is missing")
    # Sentinels are in no caption, and some tokenizers have more of them than their model.
    ids = (number for token, number in tokenizer.get_vocab().items() if not token.startswith("<extra_id_"))
    known = model.get_input_embeddings().num_embeddings
    if (largest := max(ids)) >= known:
        raise ValueError(
            f"its tokenizer gives ids up to {largest}, its model knows those below {known}: they do not belong together"
        )
    if info["missing_keys"]:
        raise ValueError(f"its weights are incomplete: there is no {', '.join(sorted(info['missing_keys'])[:3])}")
    tokenizer.padding_side = "right"
    return tokenizer, model.float().eval().requires_grad_(False)


@contextmanager
def _quiet_transformers(hide_bars: bool) -> Iterator[None]:
    """Silences notes on unused decoder weights and, unless something may be downloaded, progress bars."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if hide_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def _after_fork_in_child() -> None:
    """Makes the encoders usable in a forked process, such as a worker of a `DataLoader`."""
    global _lock
    # The thread that held the lock, if any, does not exist here.
    _lock = threading.RLock()
    for entry in (*T5_VERSIONS.values(), *_OTHER_T5.values()):
        if entry["model"] is None:
            continue
        # Models that users made themselves need not know their device.
        if getattr(entry["model"], "device", torch.device("cpu")).type != "cpu":
            # An accelerator's memory cannot be used across a fork: read the files again.
            entry["model"] = None
        # The tokenizers give up parallelism in forked processes anyhow; this spares their warning about it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
