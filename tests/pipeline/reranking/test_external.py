"""Re-ranking another system by the command: its vectors or its matrix, and what it may look at."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from jobs.cli import main
from pipeline.errors import InputError
from pipeline.reranking import external, fitting
from pipeline.reranking.leaprr.model import LeaPRR
from pipeline.reranking.leaprr.pairs import galleries
from pipeline.reranking.problem import SIDES
from pipeline.retrieval.scores import Items, MatrixScores, matrix_scores
from schemas.settings import LeaPRRSettings, Recipe, RerankSettings

torch.set_num_threads(1)
SIZES = {"test": 12, "val": 10, "train": 9}
IMAGES = sum(SIZES.values())
SMALL = ["--leaprr.pillars", "4", "--leaprr.neighbours", "3", "--leaprr.hidden", "8"]
SMALL += ["--leaprr.candidates_i2t", "6", "--leaprr.candidates_t2i", "6", "--leaprr.epochs", "1"]
SMALLER = LeaPRRSettings(pillars=4, neighbours=3, hidden=8, candidates_i2t=6, candidates_t2i=6)


def vectors(seed=0, hubs=1.5) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of images and of two texts each; some texts are near to every image."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(IMAGES, 6)) + 1
    texts = np.repeat(images, 2, axis=0) + rng.normal(size=(2 * IMAGES, 6))
    texts += hubs * rng.random((2 * IMAGES, 1))
    return tuple(v / np.linalg.norm(v, axis=1, keepdims=True) for v in (images, texts))


@pytest.fixture
def files(tmp_path):
    """Flags that name the files of a system: as vectors, as one matrix, as all three matrices."""
    images, texts = (v.astype(np.float32) for v in vectors())
    arrays = {"im": images, "tx": texts, "s": images @ texts.T}
    arrays |= {"ii": images @ images.T, "tt": texts @ texts.T}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    with open(tmp_path / "splits.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "split"])
        writer.writerows(splits().items())
    path = {name: str(tmp_path / f"{name}.npy") for name in arrays}
    ways = {
        "vectors": ["--images", path["im"], "--texts", path["tx"]],
        "matrix": ["--matrix", path["s"]],
        "matrices": ["--matrix", path["s"], "--image-matrix", path["ii"]],
    }
    ways["matrices"] += ["--text-matrix", path["tt"]]
    return {way: [*flags, "--splits", str(tmp_path / "splits.csv")] for way, flags in ways.items()}


def command(capsys, *flags) -> dict:
    main.main("rerank", [*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def splits() -> dict[str, str]:
    """{image id: split}, in the order of the rows."""
    words = [split for split, count in SIZES.items() for _ in range(count)]
    return dict(zip(map(str, range(IMAGES)), words, strict=True))


def system(seed=0) -> MatrixScores:
    images, texts = vectors(seed)
    ids = [str(n) for n in range(IMAGES)]
    owners = [i for i in ids for _ in range(2)]
    scores = torch.from_numpy(images @ texts.T).float()
    return matrix_scores(Items(ids, [str(n) for n in range(2 * IMAGES)], owners), scores)


def slow_hubness(claims: np.ndarray, beta: float) -> list[float]:
    """Log of the mean over the bank (rows) of exp(beta s), over beta, of every column."""
    return [math.log(np.mean([math.exp(beta * s) for s in column])) / beta for column in claims.T]


def test_inverted_softmax_of_a_matrix_is_that_of_a_slow_loop(files, tmp_path, capsys):
    flags = ["--rerank.method", "inverted_softmax", "--rerank.betas", "[7]", "--write", tmp_path]
    found = command(capsys, *files["matrix"], *flags)
    images, texts = vectors()
    scores, bank = images @ texts.T, 12 + 10
    i2t = scores - slow_hubness(scores[bank:], 7)
    t2i = (scores.T - slow_hubness(scores.T[2 * bank :], 7)).T
    for way, expected in (("i2t", i2t), ("t2i", t2i)):
        written = np.load(tmp_path / f"{way}.npy")
        assert written == pytest.approx(expected[:12, :24], abs=1e-5)
    ranks = [1 + int((t2i[:12, text] > t2i[text // 2, text]).sum()) for text in range(24)]
    metrics = found["inverted_softmax"]["metrics"]
    assert metrics["t2i_R_at_1"] == pytest.approx(100 * np.mean([rank == 1 for rank in ranks]))
    ranks = [1 + min((i2t[i, :24] > i2t[i, 2 * i + k]).sum() for k in (0, 1)) for i in range(12)]
    assert metrics["i2t_R_at_5"] == pytest.approx(100 * np.mean([rank <= 5 for rank in ranks]))
    assert found["inverted_softmax"]["best"] and not found["none"]["best"]
    assert found["inverted_softmax"]["protocol"]["images"] == 12


def test_a_matrix_with_those_of_its_sides_gives_what_its_vectors_give(files, capsys):
    flags = ["--rerank.method", "krnn,query_expansion,leaprr", *SMALL]
    tables = [command(capsys, *files[way], *flags) for way in ("vectors", "matrices")]
    for method in tables[0]:
        assert tables[0][method]["metrics"] == pytest.approx(tables[1][method]["metrics"])


def test_leaprr_is_trained_once_and_its_weights_go_to_other_systems(files, tmp_path, capsys):
    flags = ["--rerank.method", "inverted_softmax+leaprr", *SMALL]
    kept = ["--write", tmp_path / "kept"]
    first = command(capsys, *files["matrix"], *flags, *kept)
    folder = tmp_path / "kept" / "inverted_softmax+leaprr"
    written = (folder / "history.json").stat().st_mtime_ns
    again = command(capsys, *files["matrix"], *flags, *kept)
    assert (folder / "history.json").stat().st_mtime_ns == written
    name = "inverted_softmax+leaprr"
    assert first[name]["metrics"] == again[name]["metrics"]
    moved = command(capsys, *files["vectors"], *flags, "--rerank.weights", folder)
    assert moved["inverted_softmax+leaprr"]["best"]
    command(capsys, *files["vectors"], *flags, *kept)
    assert (folder / "history.json").stat().st_mtime_ns != written  # other scores: trained anew


def test_the_table_is_printed_with_pool_and_protocol(files, capsys):
    main.main("rerank", [*files["matrix"], "--rerank.method", "krnn"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "inductive; * best on val" in printed and "krnn *" in printed
    assert "12 images, 24 captions" in printed and "In brackets" in printed


@pytest.mark.parametrize("method", ["krnn", "query_expansion", "train_pairs", "leaprr"])
def test_inductive_scores_of_a_matrix_do_not_depend_on_other_queries(method):
    """Also where texts are compared by their profiles: those are of scores with the bank."""
    here, there = system(), system()
    there.i2t[:, 1:24] = there.i2t[:, 1:24].flip(1) * -1  # all texts but the first
    found = [scores(gallery, method, "t2i") for gallery in (here, there)]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert not torch.allclose(found[0][1:], found[1][1:], atol=1e-3)


def scores(gallery: MatrixScores, method: str, direction: str) -> torch.Tensor:
    known = external.read(gallery, splits(), Recipe(name="others"))
    torch.manual_seed(0)
    if method == "leaprr":
        steps, model = [{"method": method}], LeaPRR(SMALLER).eval()
    else:
        steps, model = fitting.chain([method], None, (5.0,))[0], None
    problem = known.problems["test"]
    rows = problem.gallery[SIDES[direction][0]]
    return fitting.Reranker(problem, steps, model).scores(direction, rows)


# ---- what is read ------------------------------------------------------------------------------


def test_without_splits_all_images_are_ranked_and_nothing_is_chosen(files, capsys):
    whole = files["matrix"][:2]
    with pytest.raises(SystemExit):
        command(capsys, *whole)
    assert "no images of the train split" in capsys.readouterr().err
    flags = ["--rerank.pool", "transductive", "--rerank.betas", "[1,5,9]"]
    found = command(capsys, *whole, *flags)
    assert found["inverted_softmax"]["protocol"]["images"] == IMAGES


def test_images_of_no_split_are_left_out_and_the_bank_is_cut():
    few = {id_: split for id_, split in splits().items() if int(id_) % 2 == 0}
    settings = Recipe(name="others", rerank=RerankSettings(bank_images=3))
    known = external.read(system(), few, settings)
    problem = known.problems["test"]
    assert known.gallery.items.image_ids == [str(n) for n in range(0, 12, 2)]
    assert problem.gallery["image"].tolist() == list(range(0, 12, 2))
    assert problem.bank["image"].tolist() == [22, 24, 26]
    assert problem.bank["text"].tolist() == [44, 45, 48, 49, 52, 53]
    assert (problem.owner["text"][problem.gallery["text"]] % 2 == 0).all()


def test_a_list_of_splits_is_read_in_any_case_and_as_spreadsheets_save_it(tmp_path, caplog):
    words = {"train": "Train", "val": "VAL", "test": "Test"}
    lines = [f"{id_} ; {words[split]}" for id_, split in splits().items()]
    (tmp_path / "s.csv").write_bytes("\r\n".join(["image_id;split", *lines, ";"]).encode("utf-16"))
    found = external.read(system(), external.read_splits(f"{tmp_path}/s.csv"), Recipe(name="o"))
    assert {name: len(p.gallery["image"]) for name, p in found.problems.items()} == SIZES
    assert not caplog.messages
    (tmp_path / "s.csv").write_text("image_id,split\n0,test\n1,train\n0,val\n")
    with pytest.raises(InputError, match="line 4 puts image '0' in val, an earlier line in test"):
        external.read_splits(f"{tmp_path}/s.csv")


def test_images_that_are_not_listed_and_listed_ones_that_are_not_here_are_told(caplog):
    listed = {f"{id_}.jpg" if int(id_) % 2 else id_: split for id_, split in splits().items()}
    external.read(system(), listed, Recipe(name="others"))
    assert "--splits: 15 of 31 listed ids are not here, the first '1.jpg'" in caplog.text
    assert "--splits: 15 of 31 images are in none of test, train, val, the first '1' (not" in (
        caplog.text
    )
    with pytest.raises(
        InputError, match="31 of 31 listed ids are not here, the first '0.jpg'; ids"
    ):
        listed = {f"{id_}.jpg": split for id_, split in splits().items()}
        external.read(system(), listed, Recipe(name="others"))
    caplog.clear()
    other = {id_: split.replace("val", "dev") for id_, split in splits().items()}
    external.read(system(), other, Recipe(name="others"))
    assert "10 of 31 images are in none of test, train, val, the first '12' (dev)" in caplog.text


def test_pairs_without_a_score_are_not_re_ranked():
    scores = system()
    scores.i2t[7, 3] = -torch.inf
    with pytest.raises(InputError, match="image 7 and text 3 .from 0. have the score -inf, which"):
        external.read(scores, splits(), Recipe(name="others"))


def test_train_is_dealt_into_galleries_and_banks_of_its_own():
    problem = external.read(system(), splits(), Recipe(name="others")).problems["train"]
    for part in galleries(problem, 5, seed=0):
        both = torch.cat([part.gallery["image"], part.bank["image"]])
        assert sorted(both.tolist()) == list(range(22, 31))
        both = torch.cat([part.gallery["text"], part.bank["text"]])
        assert sorted(both.tolist()) == list(range(44, 62))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--splits", "WRONG"], "image_id,split"),
        (["--evaluate.split", "dev"], "none of the 31 images is in dev"),
        (["--rerank.texts", "sentences"], "for a run folder"),
        (
            ["--rerank.method", "leaprr", "--leaprr.lists", "elsewhere"],
            "--splits names no such images",
        ),
        (["--rerank.method", "krn"], "krnn"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(files, tmp_path, capsys, flags, said):
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("image,part\n0,test\n")
    flags = [str(wrong) if flag == "WRONG" else flag for flag in flags]
    with pytest.raises(SystemExit) as ended:
        command(capsys, *files["matrix"], *flags)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--splits", "s.csv"], "--splits says more of --embeddings, --images, --matrix"),
        (["--write", "out"], "--write says more of"),
        (["--protocol", "own"], "--protocol says more of"),
        (["--text-matrix", "t.npy"], "--text-matrix says more of --matrix; give that with it"),
        (["--images", "i.npy"], "give both"),
        (["--texts", "t.npy", "--text-matrix", "t.npy"], "--text-matrix says more of --matrix"),
        (["--matrix", "m.npy", "--images", "i.npy"], "--images and --matrix are two systems"),
        (["--matrix", "m.npy", "--dry-run"], "--dry-run looks into a run folder"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused(capsys, flags, said):
    with pytest.raises(SystemExit) as ended:
        main.main("rerank", flags)
    assert ended.value.code == 2 and said in capsys.readouterr().err
