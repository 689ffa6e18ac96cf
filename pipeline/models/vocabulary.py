"""Words and their numbers."""

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


def pad(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) ids padded with 0, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in ids])
    words = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, row_ids in zip(words, ids, strict=True):
        row[: len(row_ids)] = torch.tensor(row_ids)
    return words, lengths
