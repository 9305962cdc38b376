"""The tokenizer of a folder as the entries of a GGUF file.

Two kinds are known by what ``tokenizer.json`` says. Byte-level BPE (``gpt2``) has tokens, merges
and the name of the rule that splits a text first. BPE made of a SentencePiece model (``llama``) has
tokens and scores: llama.cpp joins the pair of the best score first, which is the merge of the
lowest rank.

Source: ``src/llama-vocab.cpp`` and ``conversion`` of ggml-org/llama.cpp, gguf 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curvprune.files import State
from curvprune.targets.gguf_names import Field, Scalar

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# How a text is split before bytes are merged: the regular expressions of tokenizer.json, and what
# llama.cpp calls them. The first letters tell contractions, words, digits one by one or by threes.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
# A word that is a token of its own is not merged; llama.cpp knows it of these by their name.
_WHOLE_WORDS = ("llama-bpe", "tekken")
LIKE = "give a GGUF of the same model, which has its tokenizer (like=, --like)"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def no_tokenizer() -> list[Field]:
    """A file for token ids alone; llama.cpp reads it, and no text."""
    return [Field(key="tokenizer.ggml.model", kind="STRING", value="none")]


def tokenizer_fields(folder: Path, vocabulary: int) -> list[Field]:
    """The entries for the tokenizer in a folder.

    Args:
        vocabulary: rows of the embedding; tokens that are missing up to there are named and never
            used.

    Raises ``ValueError`` with a way on for a tokenizer of another kind.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json; {LIKE}, save the model with tokenizer=, or write a "
            "file for token ids alone (tokenizer=False)"
        )
    source = _Source.read(folder)
    tokens, types = _tokens(source, vocabulary)
    # 1. The vocabulary of its kind.
    if source.byte_level:
        fields = [_text("model", "gpt2"), _text("pre", _split_rule(source))]
        fields += _vocabulary(tokens, types)
        fields.append(_array("merges", "STRING", [" ".join(pair) for pair in _merges(source)]))
    elif source.model.get("byte_fallback"):
        fields = [_text("model", "llama"), _text("pre", "default")]
        fields += _vocabulary(tokens, types)
        fields.insert(3, _array("scores", "FLOAT32", _scores(source, tokens)))
        fields.append(_flag("add_space_prefix", _adds_space(source)))
    else:
        raise ValueError(
            f"{source.file}: neither byte-level BPE nor BPE that falls back to bytes; {LIKE}"
        )
    # 2. Tokens with a meaning, and what is put around a text.
    return fields + _special(source, tokens) + _template(source)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What the files of a tokenizer say."""

    file: Path
    content: Any
    settings: Any
    model: Any

    @classmethod
    def read(cls, folder: Path) -> _Source:
        state, name = State(folder), "tokenizer_config.json"
        content = state.read_json("tokenizer.json")
        settings = state.read_json(name) if (folder / name).is_file() else {}
        file = folder / "tokenizer.json"
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise ValueError(f"{file}: its model has no vocabulary of BPE; {LIKE}")
        if model.get("type", "BPE") != "BPE":
            raise ValueError(f"{file}: its model is {model['type']}, not BPE; {LIKE}")
        return cls(file=file, content=content, settings=settings, model=model)

    @property
    def byte_level(self) -> bool:
        return "ByteLevel" in {part["type"] for part in self.parts("decoder")}

    def parts(self, key: str) -> list[Any]:
        """The steps of one of its stages."""
        stage = self.content.get(key)
        if stage is None:
            return []
        if stage["type"] != "Sequence":
            return [stage]
        for word in ("pretokenizers", "normalizers", "decoders", "processors"):
            if word in stage:
                return list(stage[word])
        return []

    @property
    def added(self) -> list[Any]:
        return list(self.content.get("added_tokens") or [])


def _text(key: str, value: str) -> Field:
    return Field(key=f"tokenizer.ggml.{key}", kind="STRING", value=value)


def _flag(key: str, value: bool) -> Field:
    return Field(key=f"tokenizer.ggml.{key}", kind="BOOL", value=value)


def _array(key: str, kind: str, values: list[Scalar]) -> Field:
    return Field(key=f"tokenizer.ggml.{key}", kind=kind, value=values, array=True)


def _vocabulary(tokens: list[str], types: list[int]) -> list[Field]:
    return [_array("tokens", "STRING", [*tokens]), _array("token_type", "INT32", [*types])]


def _tokens(source: _Source, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token and its type, by number."""
    named: dict[int, str] = {number: token for token, number in source.model["vocab"].items()}
    kinds: dict[int, int] = {}
    for number, token in named.items():
        if _BYTE.fullmatch(token) and not source.byte_level:
            kinds[number] = BYTE
    for one in source.added:
        named[one["id"]] = one["content"]
        kinds[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    unknown = source.model.get("unk_token")
    if unknown is not None and not source.byte_level:
        kinds[source.model["vocab"][unknown]] = UNKNOWN
    if named and max(named) >= vocabulary:
        raise ValueError(
            f"{source.file}: token {max(named)} ({named[max(named)]!r}) has no row in an embedding "
            f"of {vocabulary}; save the tokenizer that belongs to the model"
        )
    tokens, types = [], []
    for number in range(vocabulary):
        there = number in named
        tokens.append(named.get(number, f"[PAD{number}]"))
        types.append(kinds.get(number, NORMAL) if there else UNUSED)
    return tokens, types


def _merges(source: _Source) -> list[tuple[str, str]]:
    """Pairs of tokens, best first; older files have them as one text."""
    found = []
    for pair in source.model.get("merges") or []:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        found.append((left, right))
    if not found:
        raise ValueError(
            f"{source.file} has no merges, which llama.cpp asks of a BPE; {LIKE}, or write a file "
            "for token ids alone (tokenizer=False)"
        )
    return found


def _scores(source: _Source, tokens: list[str]) -> list[Scalar]:
    """Minus the rank of the first merge that makes a token; others are never made."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(source)):
        first.setdefault(left + right, rank)
    return [-float(first.get(token, len(first))) for token in tokens]


def _split_rule(source: _Source) -> str:
    """llama.cpp's name of how a text is split."""
    steps = source.parts("pre_tokenizer")
    kinds = [step["type"] for step in steps]
    name = None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        name = "gpt-2"
    elif kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        name = "smollm"
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex")
        name = _SPLITS.get(pattern) if steps[0].get("behavior") == "Isolated" else None
    prefix = any(step.get("add_prefix_space") for step in steps)
    whole = bool(source.model.get("ignore_merges"))
    if name is None or prefix or (name in _WHOLE_WORDS) != whole:
        raise ValueError(
            f"{source.file}: llama.cpp's name of its pre_tokenizer {kinds} is not known; {LIKE}"
        )
    return name


def _adds_space(source: _Source) -> bool:
    """Whether a text gets a space before its first word."""
    for step in source.parts("normalizer"):
        if step["type"] == "Prepend":
            return True
    for step in source.parts("pre_tokenizer"):
        if step["type"] == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _special(source: _Source, tokens: list[str]) -> list[Field]:
    """The tokens that begin, end, fill and stand for the unknown, and which a text gets."""
    words = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers = {}
    for word in words:
        said = source.settings.get(f"{word}_token")
        token = said.get("content") if isinstance(said, Mapping) else said
        if token is None:
            continue
        if token not in tokens:
            raise ValueError(f"{source.file}: {word}_token {token!r} is not in its vocabulary")
        numbers[word] = tokens.index(token)
    fields = []
    for word, number in numbers.items():
        key = f"tokenizer.ggml.{words[word]}_token_id"
        fields.append(Field(key=key, kind="UINT32", value=number))
    for word, place in (("bos", 0), ("eos", -1)):
        fields.append(_flag(f"add_{word}_token", _adds(source, word, place)))
    return fields


def _adds(source: _Source, word: str, place: int) -> bool:
    """Whether a text gets the token: as the settings say, or at that end of the template."""
    said = source.settings.get(f"add_{word}_token")
    if isinstance(said, bool):
        return said
    for step in source.parts("post_processor"):
        if step["type"] == "TemplateProcessing" and step["single"]:
            return "SpecialToken" in step["single"][place]
    return False


def _template(source: _Source) -> list[Field]:
    """The chat template, in a file of its own or among the settings."""
    file = source.file.with_name("chat_template.jinja")
    if file.is_file():
        text: object = State(file.parent).read_text(file.name)
    else:
        text = source.settings.get("chat_template")
    if not isinstance(text, str) or not text:
        return []
    return [Field(key="tokenizer.chat_template", kind="STRING", value=text)]
