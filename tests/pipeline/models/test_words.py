"""Words of all scripts: Latin text as ever, others by Unicode's boundaries."""

import re
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.labels.encoders import fitted
from pipeline.models.vocabulary import Vocabulary, count_words
from pipeline.models.words import WORD, long_terms, terms, words

# A sentence of two things that a caption may show, and its words.
SENTENCES = {
    "Chinese": ("一只狗在草地上。", [*"一只狗在草地上"]),
    "Japanese": ("犬が公園でコーヒー", [*"犬が公園で", "コーヒー"]),
    "Thai": ("หมาวิ่ง", ["ห", "ม", "า", "วิ่", "ง"]),
    "Hindi": ("कुत्ता पार्क में है।", ["कुत्ता", "पार्क", "में", "है"]),
    "Bengali": ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
    "Tamil": ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    "vowelled Arabic": ("الْكَلْبُ يَجْرِي", ["الْكَلْبُ", "يَجْرِي"]),
    "Persian": ("سگ می\u200cدود", ["سگ", "می\u200cدود"]),
    "vowelled Hebrew": ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
    "Burmese": ("မြန်မာ", ["မြ", "န်", "မာ"]),
    "Khmer": ("ខ្មែរ", ["ខ្", "មែ", "រ"]),
    "Lao": ("ດີ", ["ດີ"]),
    "Javanese": ("ꦧꦱ", ["ꦧ", "ꦱ"]),
    "Tibetan": ("བོད་སྐད་", ["བོད", "སྐད"]),
    "Korean": ("개가 달린다.", ["개가", "달린다"]),
    "Russian": ("Собака бежит!", ["собака", "бежит"]),
    "Greek": ("Ο σκύλος", ["ο", "σκύλος"]),
    "decomposed": ("un cafe\u0301", ["un", "caf\u00e9"]),
    "with a drawing form": ("葛\U000e0100と 1\ufe0f\u20e3", ["葛", "と", "1"]),
    "English": ("A man's dog_house, 3.5 m", ["a", "man's", "dog", "house", "3", "5", "m"]),
}
# Characters of European scripts in composed form; no marks, which were never in a word.
EUROPEAN = [
    chr(n)
    for n in [*range(0x20, 0x250), *range(0x370, 0x530), *range(0x1E00, 0x1F00)]
    if unicodedata.category(chr(n))[0] not in "MC"
    and unicodedata.normalize("NFC", chr(n)) == chr(n)
    and chr(n) != "İ"  # whose small letter is two characters, and was cut between them
]


@pytest.mark.parametrize("script", SENTENCES)
def test_a_sentence_has_words(script):
    sentence, expected = SENTENCES[script]
    assert words(sentence) == expected
    if script != "English":
        assert terms(sentence) == expected


@given(st.lists(st.sampled_from([*EUROPEAN, *"''__  aeiou"]), max_size=30))
def test_european_text_has_the_words_it_always_had(characters):
    """Vocabularies, tf-idf and filters of Latin, Greek and Cyrillic captions stay as they were."""
    text = "".join(characters)
    if not unicodedata.is_normalized("NFC", text):
        return
    assert words(text) == re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())
    assert terms(text) == re.findall(r"\w+", text.lower())
    assert long_terms(text) == re.findall(r"\b\w\w+\b", text.lower())


@pytest.mark.parametrize("script", [name for name in SENTENCES if name != "English"])
def test_another_sentence_of_the_same_words_is_known(script):
    """Not one word a sentence: a vocabulary and tf-idf of one know another."""
    sentence, expected = SENTENCES[script]
    turned = " ".join(reversed(expected))
    vocabulary = Vocabulary.of([sentence, sentence], min_count=2)
    assert vocabulary.unknown(turned) == []
    assert vocabulary.ids([turned], 64)[0] == vocabulary.ids([sentence], 64)[0][::-1]
    if long_terms(sentence):
        vectors = fitted.encode([sentence, turned, "zzz"], "tfidf", fitted.fit("tfidf", [sentence]))
        assert np.allclose(vectors @ vectors.T, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-6)


def test_syllables_are_no_letters():
    """scikit-learn leaves out words of one letter; a dog of one syllable is none."""
    assert long_terms("a 개 狗 ห и x") == ["개", "狗", "ห"]


def test_unknown_words_are_counted_and_named():
    vocabulary = Vocabulary.of(["two dogs", "two cats", "一只狗"], min_count=1)
    assert vocabulary.unknown("Two zebras, two dogs; zebras 一只猫") == ["zebras", "猫"]
    assert vocabulary.unknown_share(["two dogs", "two zebras"]) == 0.25
    assert vocabulary.unknown_share(["?", ""]) == 0


LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=30)


@given(st.lists(LINES | st.sampled_from([text for text, _ in SENTENCES.values()])))
def test_words_counted_together_are_those_of_each_text(texts):
    assert count_words(texts) == Counter(word for text in texts for word in words(text))


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_those_of_any_text(text):
    assert words(text) == WORD.findall(text.lower())
