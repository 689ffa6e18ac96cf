"""A text's words: one segmentation for vocabularies, fitted encoders and search filters.

A word is a run of letters and digits with their marks (vowel signs, accents), as Unicode has them;
in Unicode's composed form and lower case. Scripts that put no blanks between words (Chinese,
Japanese kana but katakana, Thai, Lao, Khmer, Burmese …) have a word a character: where their words
begin takes a dictionary of each language.
"""

import re
import unicodedata

import regex

# Line breaking classes: SA needs a dictionary; AK and AS are aksaras, as of Javanese and Balinese.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Yi}\p{Line_Break=SA}\p{Line_Break=AK}\p{Line_Break=AS}"
# Variation selectors say how a character is drawn, and end a word without being in it.
MARK = r"[\p{Mn}\p{Mc}--\p{Variation_Selector}]"


def _pattern(letters: str, join: str = "") -> regex.Pattern:
    """Words of these letters, which `join` may join once."""
    letter = rf"[[{letters}]--[{UNSPACED}]]"
    run = rf"{letter}(?:{letter}|{MARK}|[\u200C\u200D](?={letter}))*"
    joined = f"(?:{join}{run})?" if join else ""
    return regex.compile(rf"[[{letters}]&&[{UNSPACED}]]{MARK}*|{run}{joined}", regex.V1)


WORD = _pattern(r"\p{L}\p{N}", "'")
ASCII_WORD = re.compile("[a-z0-9]+(?:'[a-z0-9]+)?")  # what WORD finds in lower case ASCII
TERM = _pattern(r"\p{L}\p{N}_")
SYLLABIC = regex.compile(rf"[{UNSPACED}\p{{Hangul}}]", regex.V1)


def words(text: str) -> list[str]:
    """The words of a text, `man's` one of them.

    >>> words("A man's dog_house"), words("一只狗 café")
    (['a', "man's", 'dog', 'house'], ['一', '只', '狗', 'café'])
    """
    if text.isascii():  # most texts, and four times as fast
        return ASCII_WORD.findall(text.lower())
    return WORD.findall(_plain(text))


def terms(text: str) -> list[str]:
    """The words of a text as search looks for them: `man's` is `man` and `s`.

    >>> terms("A man's dog_house"), terms("วิ่ง")
    (['a', 'man', 's', 'dog_house'], ['วิ่', 'ง'])
    """
    return TERM.findall(_plain(text))


def long_terms(text: str) -> list[str]:
    """The terms of a text without those of one letter, as scikit-learn has them.

    A syllable is no letter.

    >>> long_terms("A man's dog"), long_terms("개 狗")
    (['man', 'dog'], ['개', '狗'])
    """
    return [term for term in terms(text) if len(term) > 1 or SYLLABIC.match(term)]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()
