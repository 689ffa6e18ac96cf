"""Captions to numbers: our own words, or a pretrained tokenizer's tokens."""

import base64
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.models.words import words

if TYPE_CHECKING:
    import torch  # processes that make batches do without it

PAD, UNKNOWN = "<pad>", "<unk>"
MARKS = 4  # ids that a text may have beyond its bytes: marks at both ends, and a leading blank


class Known:
    """What a vocabulary says of the pieces of a text: words, or a tokenizer's tokens."""

    fill = 0  # the id that pads
    state: Any  # what `vocabulary_of` makes it again from

    def ids(self, captions: list[str], max_words: int | None) -> list[list[int]]:
        """The ids of every caption, at most `longest(max_words)` of them."""
        raise NotImplementedError

    def longest(self, max_words: int | None) -> int:
        """How many ids a caption has at most."""
        raise NotImplementedError

    def encode(
        self, captions: list[str], max_words: int | None
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Ids (B, L), padded with `fill`, and lengths (B,)."""
        return pad(self.ids(captions, max_words), self.fill)

    def cut(self, captions: list[str], max_words: int | None) -> int:
        """How many captions are longer than that, and lose their end."""
        room = self.longest(max_words)
        # What has no more bytes than there are places is not looked at: a piece has one at least.
        long = [caption for caption in captions if len(caption.encode()) + MARKS > room]
        return sum(self.too_long(long, room)) if long else 0

    def too_long(self, captions: list[str], room: int) -> list[bool]:
        """Of every caption whether it has more than `room` ids."""
        raise NotImplementedError

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """The pieces of a text in order, and of each whether it is known."""
        raise NotImplementedError

    def unknown(self, text: str) -> list[str]:
        """The pieces of a text that are not known, each once."""
        return list(dict.fromkeys(piece for piece, known in self.pieces(text) if not known))

    def unknown_share(self, texts: Iterable[str]) -> float:
        """Share of the pieces of all texts that are not known, in [0, 1]."""
        found = Counter(known for text in texts for _, known in self.pieces(text))
        return found[False] / max(1, found.total())


class Vocabulary(Known):
    """The words of the train captions, the most frequent first; id 0 pads, id 1 is any other word.

    >>> vocabulary = Vocabulary.of(["A dog.", "A cat"], min_count=1)
    >>> vocabulary.words
    ['<pad>', '<unk>', 'a', 'cat', 'dog']
    >>> ids, lengths = vocabulary.encode(["A dog!", "the"], max_words=8)
    >>> ids.tolist(), lengths.tolist()
    ([[2, 4], [1, 0]], [2, 1])
    >>> vocabulary.unknown("The dog"), vocabulary.unknown_share(["The dog", "a cat"])
    (['the'], 0.25)
    """

    def __init__(self, words: list[str]):
        self.words = self.state = words
        self.id_of = {word: i for i, word in enumerate(words)}

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, captions: Iterable[str], *, min_count: int) -> "Vocabulary":
        """That of some captions."""
        return cls.counted(count_words(captions), min_count=min_count)

    @classmethod
    def counted(cls, counts: Counter[str], *, min_count: int) -> "Vocabulary":
        """That of the captions in which `count_words` found each word so often."""
        kept = sorted((-n, word) for word, n in counts.items() if n >= min_count)
        return cls([PAD, UNKNOWN, *(word for _, word in kept)])

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        return [(word, word in self.id_of) for word in words(text)]

    def ids(self, captions: list[str], max_words: int | None) -> list[list[int]]:
        """The word ids of every caption; one unknown word where it has none."""
        get = self.id_of.get
        return [[get(word, 1) for word in words(text)[:max_words]] or [1] for text in captions]

    def longest(self, max_words: int | None) -> int:
        return max_words

    def too_long(self, captions: list[str], room: int) -> list[bool]:
        return [len(words(caption)) > room for caption in captions]


def count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word is in the captions, of which a thousand are held at a time."""
    counts: Counter[str] = Counter()
    captions = iter(captions)
    while some := list(itertools.islice(captions, 1024)):
        counts.update(words("\n".join(some)))  # no word, nor its case, goes across a line's end
    return counts


class PretrainedTokens(Known):
    """The tokens of a pretrained text model, with its marks at both ends.

    `tokenizer` is the JSON of a tokenizer of the tokenizers package.
    """

    def __init__(self, tokenizer: str, *, pad: int, length: int, padded: bool):
        from tokenizers import Tokenizer

        self.state = {"tokenizer": tokenizer, "pad": pad, "length": length, "padded": padded}
        self.fill = pad
        self.tokenizer: Any = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)
        model = json.loads(tokenizer)["model"]
        token = model.get("unk_token")
        self.unknown_id = self.tokenizer.token_to_id(token) if token else model.get("unk_id")

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def ids(self, captions: list[str], max_words: int | None) -> list[list[int]]:
        """The token ids of every caption; all of full length for a model trained on such ones.

        At most as many tokens as the model has places for, whatever `max_words` says.
        """
        ids = self.tokens(captions)
        if self.state["padded"]:
            ids = [row + [self.fill] * (self.state["length"] - len(row)) for row in ids]
        return ids

    def longest(self, max_words: int | None) -> int:
        return self.state["length"]

    def too_long(self, captions: list[str], room: int) -> list[bool]:
        return [bool(found.overflowing) for found in self.tokenizer.encode_batch(captions)]

    def tokens(self, captions: list[str]) -> list[list[int]]:
        """The token ids of every caption, cut to the model's length."""
        return [found.ids for found in self.tokenizer.encode_batch(captions)]

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        found = self.tokenizer.encode(text, add_special_tokens=False)
        places = zip(found.offsets, found.ids, strict=True)
        return [(text[start:end], id_ != self.unknown_id) for (start, end), id_ in places]


class PretrainedPythonTokens(PretrainedTokens):
    """The tokens of a model whose tokenizer is not of the tokenizers package, as of SigLIP.

    `files` are those its tokenizer is made from, by name, in base64.
    """

    def __init__(self, files: dict[str, str], *, pad: int, length: int, padded: bool):
        from transformers import AutoTokenizer

        self.state = {"files": files, "pad": pad, "length": length, "padded": padded}
        self.fill = pad
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(base64.b64decode(data))
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(folder)
            except ImportError as error:
                raise ValueError(not_installed("the tokenizer of this model", error)) from error

    @staticmethod
    def files_of(tokenizer) -> dict[str, str]:
        """The files of a tokenizer of transformers, by name, in base64."""
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(path for path in Path(folder).iterdir() if path.is_file())
            return {path.name: base64.b64encode(path.read_bytes()).decode() for path in files}

    def __len__(self) -> int:
        return len(self.tokenizer)

    def tokens(self, captions: list[str]) -> list[list[int]]:
        limit = {"truncation": True, "max_length": self.state["length"]}
        return self.tokenizer(captions, **limit)["input_ids"]

    def too_long(self, captions: list[str], room: int) -> list[bool]:
        return [len(ids) > room for ids in self.tokenizer(captions)["input_ids"]]

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        tokens = self.tokenizer.tokenize(text)
        ids = self.tokenizer.convert_tokens_to_ids(tokens)
        unknown = self.tokenizer.unk_token_id
        return [(t.strip("▁"), id_ != unknown) for t, id_ in zip(tokens, ids, strict=True)]


def vocabulary_of(state: list[str] | dict) -> Vocabulary | PretrainedTokens:
    """The vocabulary that had this `state`."""
    if isinstance(state, list):
        return Vocabulary(state)
    return PretrainedPythonTokens(**state) if "files" in state else PretrainedTokens(**state)


def not_installed(what: str, error: Exception) -> str:
    """The sentence for a package that transformers finds missing, of an error it raised."""
    said = next(line for line in [*str(error).strip().splitlines(), repr(error)] if line)
    missing = "sentencepiece" in str(error).lower() or "protobuf" in str(error).lower()
    do = 'run: pip install "halftone-itr[sentencepiece]"' if missing else "install it"
    return f"{what} needs a package that is not installed ({said}); {do}"


def pad(ids: list[list[int]], value: int = 0) -> tuple["torch.Tensor", "torch.Tensor"]:
    """(B, L) ids padded with a value, and lengths (B,)."""
    import torch

    lengths = torch.tensor([len(row) for row in ids])
    words = torch.full((len(ids), int(lengths.max())), value, dtype=torch.long)
    for row, row_ids in zip(words, ids, strict=True):
        row[: len(row_ids)] = torch.tensor(row_ids)
    return words, lengths
