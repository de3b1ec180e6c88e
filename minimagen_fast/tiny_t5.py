"""Embedded text encoder `t5_tiny`: a small random T5 that is made on the spot and needs no network.

It is a real T5 (Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
2020) in everything but training: its weights are random, drawn once from a fixed seed. Frozen random features keep
captions apart, which is all that a cascade needs to learn the built-in picture set; they know nothing of what words
mean. The tokenizer is a SentencePiece unigram model (Kudo, 2018) trained on the built-in captions, with byte fallback
for all else.

The folder it is saved to looks like any other T5 folder, and `minimagen_fast.t5` loads it like any other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel

TINY_T5_NAME = "t5_tiny"
TINY_T5_DIM = 64

# Everything below decides the weights or the tokens, so it is part of the name of the cache folder: see `_recipe`.
FORMAT = 1
SEED = 2022
NUM_LAYERS = 2
NUM_HEADS = 4
HEAD_DIM = 16
FEED_FORWARD_DIM = 128
# A U-Net takes the mean over 256 token places, of which a caption fills six: at a scale of 1 it hardly sees the words.
FINAL_NORM_SCALE = 8.0
MAX_PIECES = 400
EXTRA_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"

_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def embedded_t5_directory() -> Path:
    """Returns the folder of the embedded T5, building it first where it is not there yet (a few seconds, once).

    The folder is ``t5_tiny-<digest of the recipe>`` under ``$MINIMAGEN_FAST_CACHE``, else
    ``$XDG_CACHE_HOME/minimagen_fast``, else ``~/.cache/minimagen_fast``. Several processes may build it at once; a
    folder that is not whole is never returned. The global random state is left as it was.

    Raises:
        OSError: If the cache folder cannot be written.
    """
    captions = _captions()
    root = cache_root()
    directory = root / f"{TINY_T5_NAME}-{_recipe(captions)}"
    if _is_whole(directory):
        return directory
    try:
        root.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=root))
    except OSError as error:
        raise OSError(
            f"the embedded text encoder {TINY_T5_NAME!r} is built once in a cache folder, but {root} cannot be written "
            f"({error}). Set the environment variable MINIMAGEN_FAST_CACHE to a folder that can."
        ) from error
    try:
        _build(building, captions)
        if not _is_whole(directory):
            # File by file, each of them atomically: this also mends a folder that has lost some, and whoever else is
            # building at the same moment puts the very same files there.
            directory.mkdir(exist_ok=True)
            for name in _FILES:
                os.replace(building / name, directory / name)
    finally:
        shutil.rmtree(building)
    return directory


def cache_root() -> Path:
    """The cache folder, which need not be there.

    Raises:
        OSError: If it lies in a home folder, and there is none, as for users that are only a number.
    """
    own = os.environ.get("MINIMAGEN_FAST_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser()
        return (Path(shared) if shared else Path.home() / ".cache") / "minimagen_fast"
    except RuntimeError as error:
        raise OSError(
            f"the cache folder lies in a home folder, which is nowhere to be found ({error}). Set the environment "
            "variable MINIMAGEN_FAST_CACHE to a folder that can be written."
        ) from error


def _captions() -> list[str]:
    from minimagen_fast.shapes import all_captions

    return all_captions()


def _recipe(captions: list[str]) -> str:
    """Digest of what the files follow from: another recipe gets another folder, so a stale cache is never taken up."""
    recipe = {
        "format": FORMAT,
        "seed": SEED,
        "sizes": [TINY_T5_DIM, NUM_LAYERS, NUM_HEADS, HEAD_DIM, FEED_FORWARD_DIM, MAX_PIECES],
        "final_norm_scale": FINAL_NORM_SCALE,
        "extra_characters": EXTRA_CHARACTERS,
        "captions": captions,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]


def _is_whole(directory: Path) -> bool:
    return all((directory / name).is_file() and (directory / name).stat().st_size > 0 for name in _FILES)


def _build(directory: Path, captions: list[str]) -> None:
    tokenizer = _build_tokenizer(captions)
    tokenizer.save(str(directory / "tokenizer.json"))
    # Written by hand because the class name that `save_pretrained` writes is known to some versions of transformers
    # only.
    pad, eos, unk = _SPECIAL_TOKENS
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "eos_token": eos,
        "unk_token": unk,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")
    model = _build_model(tokenizer.get_vocab_size())
    model.config.save_pretrained(directory)
    # Not the model's own `save_pretrained`: that draws a progress bar.
    save_file(dict(model.named_parameters()), directory / "model.safetensors", metadata={"format": "pt"})


def _build_tokenizer(captions: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    scores = _train_pieces(captions)
    # Ids follow the alphabet and scores are rounded, so that the last bits of the training arithmetic change nothing.
    vocabulary = [(piece, 0.0) for piece in (*_SPECIAL_TOKENS, *byte_pieces)]
    vocabulary += [(piece, round(score, 2)) for piece, score in sorted(scores.items())]

    # The file is made here rather than by transformers' T5Tokenizer because that drops byte fallback (version 5).
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=_SPECIAL_TOKENS.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    eos = _SPECIAL_TOKENS.index("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", eos)])
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    return tokenizer


def _train_pieces(captions: list[str]) -> dict[str, float]:
    """Trains a SentencePiece unigram model and returns the log probability of each ordinary piece."""
    import sentencepiece

    words = sorted({word for caption in captions for word in caption.split()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # The trainer counts each distinct word once and only considers substrings that it has seen twice, so a
        # word can become one piece only if it also stands inside another: hence "redred" and the like.
        sentence_iterator=iter(captions + [word + word for word in words]),
        model_writer=model,
        model_type="unigram",
        vocab_size=MAX_PIECES,
        hard_vocab_limit=False,
        required_chars=EXTRA_CHARACTERS,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ordinary = range(len(_SPECIAL_TOKENS), trained.get_piece_size())
    return {trained.id_to_piece(index): trained.get_score(index) for index in ordinary}


def _build_model(vocab_size: int) -> T5EncoderModel:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab_size,
        d_model=TINY_T5_DIM,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        d_kv=HEAD_DIM,
        d_ff=FEED_FORWARD_DIM,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = T5EncoderModel(config).float().eval()
    _draw_weights(model)
    return model


@torch.no_grad()
def _draw_weights(model: T5EncoderModel) -> None:
    """Draws all weights with T5's standard deviations.

    Uniform rather than normal numbers: they come straight from the generator's bits, with no logarithm or cosine whose
    rounding depends on the machine, so the weights are the same everywhere.
    """
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("layer_norm.weight"):
            weight.fill_(FINAL_NORM_SCALE if "final_layer_norm" in name else 1.0)
            continue
        if name == "shared.weight":
            std = 1.0
        elif "relative_attention_bias" in name:
            std = TINY_T5_DIM**-0.5
        else:
            std = weight.shape[1] ** -0.5
            if name.endswith(".q.weight"):
                # T5 does not divide attention logits by sqrt(head_dim); its initialisation makes up for that here.
                std *= HEAD_DIM**-0.5
        uniform = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        weight.copy_((uniform * 2 - 1) * (3**0.5 * std))
