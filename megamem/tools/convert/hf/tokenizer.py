"""The tokenizer of a run as the files that transformers reads.

transformers loads a tokenizer from tokenizer.json and tokenizer_config.json. Megatron's
HuggingFaceTokenizer has them already. The pieces of a SentencePiece model are put into one by the
tokenizers library. Other types of Megatron have no such form.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from megamem.config import ConfigurationError

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
"""What a tokenizer of transformers may consist of."""

SPACE = "\u2581"
"""What stands for a space in the pieces of SentencePiece."""

MANY = 1000
"""More spaces than a text begins with."""

NEVER = -1e9
"""The score of a piece that is not chosen where there is any other."""

# numbers in SentencePiece's own files
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def write_tokenizer(args: argparse.Namespace, folder: Path) -> tuple[dict[str, int], str | None]:
    """Write the tokenizer of a run into an exported folder.

    Args:
        args: Megatron's arguments of the run.
        folder: of the exported model.

    Returns:
        bos_token_id and eos_token_id, where the tokenizer has them, and a sentence if there is no
        tokenizer in the folder, else None.

    Raises:
        ConfigurationError: the tokenizer's file cannot be read.
    """
    kind, named = getattr(args, "tokenizer_type", None), getattr(args, "tokenizer_model", None)
    if kind == "HuggingFaceTokenizer" and named:
        return _copy(Path(named), named, folder)
    if kind == "SentencePieceTokenizer" and named:
        return _from_sentencepiece(Path(named), folder), None
    return {}, (
        f"the folder has no tokenizer, as --tokenizer-type {kind} has no form that transformers "
        "loads; give token ids to the model, or add the files of a tokenizer yourself."
    )


def _copy(source: Path, named: str, folder: Path) -> tuple[dict[str, int], str | None]:
    if not source.is_dir():
        return {}, (
            f"the folder has no tokenizer, as --tokenizer-model {named} is not a folder here; add "
            f'it with AutoTokenizer.from_pretrained("{named}").save_pretrained("{folder}").'
        )
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    found = _read_json(source / "config.json") | _read_json(source / "generation_config.json")
    ids: dict[str, int] = {
        name: found[name] for name in ("bos_token_id", "eos_token_id") if name in found
    }
    return ids, None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _from_sentencepiece(path: Path, folder: Path) -> dict[str, int]:
    try:
        import sentencepiece.sentencepiece_model_pb2 as protocol
        from tokenizers import AddedToken
    except ImportError as error:
        raise ConfigurationError(
            f"the tokenizer cannot be exported without the package {error.name}; install "
            "megamem[export], or give --no-tokenizer."
        ) from error
    if not path.is_file():
        raise ConfigurationError(
            f"--tokenizer-model {path} of the run does not exist here; give its file with "
            "--tokenizer-model, or give --no-tokenizer."
        )
    model: Any = vars(protocol)["ModelProto"]()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # of protobuf, which has several implementations
        raise ConfigurationError(
            f"--tokenizer-model {path} is not a SentencePiece model: {error}; give its file with "
            "--tokenizer-model, or give --no-tokenizer."
        ) from error
    tokenizer = _tokenizer(model)
    kinds = [piece.type for piece in model.pieces]
    words = [piece.piece for piece in model.pieces]
    control, own = _numbers(kinds, UNKNOWN, CONTROL), _numbers(kinds, USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(words[n], normalized=False) for n in control])
    tokenizer.add_tokens([AddedToken(words[n], normalized=False) for n in own])
    tokenizer.save(str(folder / "tokenizer.json"))
    spec = model.trainer_spec
    numbers = {"bos": spec.bos_id, "eos": spec.eos_id, "pad": spec.pad_id, "unk": spec.unk_id}
    there = {name: n for name, n in numbers.items() if 0 <= n < len(words)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": words[n] for name, n in there.items()},
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return {f"{name}_token_id": n for name, n in there.items() if name in ("bos", "eos", "pad")}


def _numbers(kinds: list[int], *wanted: int) -> list[int]:
    return [number for number, kind in enumerate(kinds) if kind in wanted]


def _tokenizer(model: Any) -> Any:
    """A tokenizer of the tokenizers library that gives the ids of a SentencePiece model."""
    from tokenizers import Tokenizer, models

    pieces, spec = model.pieces, model.trainer_spec
    fallback = any(piece.type == BYTE for piece in pieces)
    (unknown,) = _numbers([piece.type for piece in pieces], UNKNOWN)
    kind: Any
    if spec.model_type == BPE:
        kind = models.BPE(
            vocab={piece.piece: number for number, piece in enumerate(pieces)},
            merges=_merges(pieces),
            unk_token=pieces[unknown].piece,
            fuse_unk=True,
            byte_fallback=fallback,
        )
    elif spec.model_type == UNIGRAM:
        # SentencePiece takes the name of a control piece, as <s>, in a text for any other text
        names = (CONTROL, UNKNOWN)
        scored = [(p.piece, NEVER if p.type in names else p.score) for p in pieces]
        kind = models.Unigram(scored, unknown, fallback)
    else:
        raise ConfigurationError(
            "the tokenizer is a SentencePiece model of words or characters, which has no form that "
            "transformers loads; give --no-tokenizer."
        )
    tokenizer = Tokenizer(kind)
    _spaces(tokenizer, model.normalizer_spec)
    return tokenizer


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Pairs of pieces that make a third, the best third first.

    SentencePiece joins the two neighbours whose joint piece has the highest score.
    """
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    pairs = []
    for word, score in scores.items():
        for cut in range(1, len(word)):
            first, second = word[:cut], word[cut:]
            if first in scores and second in scores:
                pairs.append((-score, first, second))
    # sorting is stable: the pairs of one piece stay together, in the order of their cuts
    return [(first, second) for _, first, second in sorted(pairs, key=lambda pair: pair[0])]


def _spaces(tokenizer: Any, spec: Any) -> None:
    """What SentencePiece does with a text before it cuts it, and undoes after it joined pieces."""
    from tokenizers import Regex, decoders, normalizers

    steps: list[Any] = []
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        # an empty text stays empty
        steps.append(normalizers.Prepend(" "))
        back.append(decoders.Strip(" ", MANY if spec.remove_extra_whitespaces else 1, 0))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(back)
