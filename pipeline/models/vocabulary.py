"""Captions to numbers: our own words, or a pretrained tokenizer's tokens."""

import re
from collections import Counter
from collections.abc import Iterable

import torch

PAD, UNKNOWN = "<pad>", "<unk>"
WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


class Vocabulary:
    """The words of the train captions, the most frequent first; id 0 pads, id 1 is any other word.

    >>> vocabulary = Vocabulary.of(["A dog.", "A cat"], min_count=1)
    >>> vocabulary.words
    ['<pad>', '<unk>', 'a', 'cat', 'dog']
    >>> words, lengths = vocabulary.encode(["A dog!", "the"], max_words=8)
    >>> words.tolist(), lengths.tolist()
    ([[2, 4], [1, 0]], [2, 1])
    """

    def __init__(self, words: list[str]):
        self.words = words
        self.ids = {word: i for i, word in enumerate(words)}

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, captions: Iterable[str], *, min_count: int) -> "Vocabulary":
        counts = Counter(word for caption in captions for word in WORD.findall(caption.lower()))
        kept = sorted((-n, word) for word, n in counts.items() if n >= min_count)
        return cls([PAD, UNKNOWN, *(word for _, word in kept)])

    def ids_of(self, caption: str, max_words: int) -> list[int]:
        """The word ids of a caption; one unknown word where it has none."""
        return [self.ids.get(word, 1) for word in WORD.findall(caption.lower())[:max_words]] or [1]

    def encode(self, captions: list[str], max_words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Word ids (B, L), padded with 0, and lengths (B,)."""
        return pad([self.ids_of(caption, max_words) for caption in captions])

    @property
    def state(self) -> list[str]:
        """What `vocabulary_of` makes it again from."""
        return self.words


class PretrainedTokens:
    """The tokens of a pretrained text model, with its marks at both ends."""

    def __init__(self, tokenizer: str, *, pad: int, length: int, padded: bool):
        from tokenizers import Tokenizer

        self.state: dict = {"tokenizer": tokenizer, "pad": pad, "length": length, "padded": padded}
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, captions: list[str], max_words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, L) and lengths (B,); all of full length for a model trained on such ones.

        At most as many tokens as the model has places for, whatever `max_words` says.
        """
        ids = [found.ids for found in self.tokenizer.encode_batch(captions)]
        if self.state["padded"]:
            ids = [row + [self.state["pad"]] * (self.state["length"] - len(row)) for row in ids]
        return pad(ids, self.state["pad"])


def vocabulary_of(state: list[str] | dict) -> Vocabulary | PretrainedTokens:
    """The vocabulary that had this `state`."""
    return Vocabulary(state) if isinstance(state, list) else PretrainedTokens(**state)


def pad(ids: list[list[int]], value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) ids padded with a value, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in ids])
    words = torch.full((len(ids), int(lengths.max())), value, dtype=torch.long)
    for row, row_ids in zip(words, ids, strict=True):
        row[: len(row_ids)] = torch.tensor(row_ids)
    return words, lengths
