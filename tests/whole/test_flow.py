"""The whole flow, through the command line, on the real libraries."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs.cli.main import main
from pipeline.storage import parquet, store
from schemas.shard import SIDECAR
from tests.helpers.stages import TINY


@pytest.fixture
def run_copy(finished_run, tmp_path, tiny_encoder):
    """A finished run of one's own, and the command that makes it."""
    root = tmp_path / "runs" / "tiny"
    shutil.copytree(Path(finished_run).parent, tmp_path / "runs")
    return root, [*TINY, "--root", str(root), "--encoder", tiny_encoder]


def made(capsys, command, arguments) -> dict[str, int]:
    """How many pieces each stage made."""
    capsys.readouterr()
    main(command, [*arguments, "--json"])
    lines = capsys.readouterr().out.strip().splitlines()
    stages = json.loads(lines[-1])["models"]["main"]
    return {stage: result["made"] for stage, result in stages.items() if "made" in result}


def test_every_stage_left_its_index(finished_run):
    for folder in ("1-manifest", "2-shards", "3-embeddings/tiny", "4-relevance/tiny"):
        assert store.exists(f"{finished_run}/{folder}/index.json"), folder
    for folder in ("5-model", "6-rankings", "7-reranker", "8-reranked"):
        assert store.exists(f"{finished_run}/{folder}/main/index.json"), folder


def test_a_second_run_does_nothing(run_copy, capsys):
    root, arguments = run_copy
    before = {f: f.stat().st_mtime_ns for f in Path(root).rglob("*") if f.is_file()}
    capsys.readouterr()
    main("run", [*arguments, "--json"])
    said = capsys.readouterr()
    assert "nothing was computed" in said.err
    stages = json.loads(said.out.strip().splitlines()[-1])["models"]["main"]
    assert {result["made"] for result in stages.values() if "made" in result} == {0}
    after = {f: f.stat().st_mtime_ns for f in Path(root).rglob("*") if f.is_file()}
    assert after == before


def test_a_lost_piece_alone_is_made_again(run_copy, capsys):
    root, arguments = run_copy
    lost = Path(root) / "3-embeddings/tiny/train-000001.parquet"
    before = lost.read_bytes()
    lost.unlink()
    again = made(capsys, "run", arguments)
    assert again.pop("embed") == 1
    assert lost.read_bytes() == before
    # The same bytes came back, so nothing that depends on them changed.
    assert set(again.values()) == {0}


def test_another_label_setting_redoes_labels_onward_and_no_shard(run_copy, capsys):
    root, arguments = run_copy
    tars = {f: f.stat().st_mtime_ns for f in Path(root).glob("2-shards/*")}
    again = made(capsys, "run", [*arguments, "--label.map", "half"])
    assert {s for s, n in again.items() if n} >= {"label", "train", "evaluate", "rerank", "search"}
    assert again["ingest"] == again["shard"] == again["embed"] == 0
    assert {f: f.stat().st_mtime_ns for f in Path(root).glob("2-shards/*")} == tars


def test_another_temperature_of_a_loss_redoes_the_model_and_no_label(run_copy, capsys):
    _, arguments = run_copy
    again = made(capsys, "run", [*arguments, "--train.losses.smooth_ndcg.tau", "0.1"])
    assert again["label"] == again["embed"] == 0
    assert again["train"] == 1 and again["evaluate"] > 0


def test_another_number_of_workers_is_the_same_training(run_copy, capsys):
    _, arguments = run_copy
    assert made(capsys, "train", [*arguments, "--workers", "2"])["train"] == 0


def test_a_model_of_another_name_stands_beside_the_first(run_copy, capsys):
    root, arguments = run_copy
    main("train", [*arguments, "--name", "other", "--lr", "0.002"])
    assert {f.name for f in (Path(root) / "5-model").iterdir()} == {
        *("main", "other", "words.json"),
    }
    assert made(capsys, "train", arguments)["train"] == 0


def test_a_run_folder_knows_its_own_settings(run_copy, capsys):
    root, _ = run_copy
    assert set(made(capsys, "run", ["--root", str(root)]).values()) == {0}
    main("search", ["a star", "--root", str(root), "--json"])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["main"]["hits"]) == 8
    with pytest.raises(SystemExit) as stopped:
        main("search", ["a star", "--root", str(root), "--name", "mian"])
    assert stopped.value.code == 2 and "did you mean 'main'?" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run_copy, capsys):
    root, arguments = run_copy
    (Path(root) / "3-embeddings/tiny/val-000000.parquet").unlink()
    before = {f: f.stat().st_mtime_ns for f in Path(root).rglob("*") if f.is_file()}
    main("run", [*arguments, "--dry-run"])
    assert "val-000000" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in Path(root).rglob("*") if f.is_file()} == before


def test_a_dry_run_on_nothing_names_the_first_stages_work(tmp_path, tiny_encoder, capsys):
    root = tmp_path / "fresh"
    main("run", [*TINY, "--root", str(root), "--encoder", tiny_encoder, "--dry-run"])
    assert "part-00000" in capsys.readouterr().err
    assert not root.exists()


def test_metrics_stand_with_their_protocol(finished_run):
    for stage in ("6-rankings", "8-reranked"):
        found = store.read_json(f"{finished_run}/{stage}/main/metrics.json")
        recalls = [v for k, v in found["metrics"].items() if "_R_at_" in k]
        assert np.isclose(sum(recalls), found["metrics"]["rsum"])
        assert 0 < found["metrics"]["i2t_ndcg_truth"] <= 1
        assert {"split", "images", "ties", "gain", "label_encoder", "rerank"} <= set(
            found["protocol"]
        )
    assert found["protocol"]["pool"] == "inductive"


def test_shards_open_in_webdataset(finished_run):
    import webdataset

    tars = sorted(Path(finished_run).glob("2-shards/*.tar"))
    data = webdataset.WebDataset([str(t) for t in tars], shardshuffle=False).decode("pil")
    samples = list(data)
    assert len(samples) == 96 + 16 + 32
    assert samples[0]["jpg"].size == (48, 48)
    assert samples[0]["txt"] == samples[0]["json"]["captions"][0]["text"]
    sidecar = parquet.read_table(str(tars[0].with_suffix(".parquet")))
    assert sidecar.schema.remove_metadata().equals(SIDECAR)


def test_search_answers_a_text_and_a_picture(finished_run, tmp_path, tiny_encoder, capsys):
    arguments = [*TINY, "--root", finished_run, "--encoder", tiny_encoder, "--json"]
    main("search", ["a red circle", *arguments])
    hits = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["main"]["hits"]
    scores = [hit["score"] for hit in hits]
    assert len(hits) == 8 and scores == sorted(scores, reverse=True)
    from pipeline.sources import drawn

    picture = tmp_path / "picture.jpg"
    picture.write_bytes(drawn.load("drawn:0/test/3/48"))
    main("search", ["--image", str(picture), *arguments])
    hits = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]["main"]["hits"]
    assert len(hits) == 8


def test_pages_are_self_contained(finished_run):
    for name in ("report.html", "search-main.html"):
        page = (Path(finished_run) / name).read_text()
        assert "data:image/jpeg;base64," in page
        for outside in ('src="http', 'href="http', "<script src", "<link", "url(http", "@import"):
            assert outside not in page, outside
        assert len(page) < 5_000_000


def test_info_lists_the_stages(finished_run, capsys):
    main("info", ["--root", finished_run, "--json"])
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {s["folder"].split("/")[0] for s in stages} == {
        *("1-manifest", "2-shards", "3-embeddings", "4-relevance", "5-model"),
        *("6-rankings", "7-reranker", "8-reranked"),
    }
    assert all(s["pieces"] > 0 and s["version"] for s in stages)
