"""Settings and recipes: what wins over what, what is refused, and what --help says."""

import json
import re

import pytest
import yaml

import pipeline
from jobs.cli import main, options, recipes, scopes
from jobs.cli.command import COMMANDS, Command, command_of
from pipeline.errors import InputError
from schemas.settings import SECTIONS, Recipe, SourceSettings
from tests.helpers.paths import ROOT

FOLDER = ROOT / "recipes"
RECIPES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
SETTINGS = [(section, *setting) for section in SECTIONS for setting in recipes.settings_of(section)]


def resolved(*argv) -> dict[str, Recipe]:
    """The settings of every model that a command line asks for."""
    given, overrides = options.parse("run", Command(scopes.nothing), list(argv))
    return dict(recipes.resolve(given.recipe or scopes.DEFAULT, overrides, given.name))


def only(*argv) -> Recipe:
    models = resolved(*argv)
    assert len(models) == 1
    return models.popitem()[1]


def refused(*argv) -> str:
    """The sentence of the error."""
    with pytest.raises(InputError) as error:
        resolved(*argv)
    return str(error.value)


@pytest.fixture
def recipe_file(tmp_path):
    """A function that writes a recipe and returns its name."""

    def write(text: str | dict | bytes) -> str:
        file = tmp_path / "mine.yaml"
        text = yaml.safe_dump(text, sort_keys=False) if isinstance(text, dict) else text
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(file)

    return write


# ---- recipes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_says_what_it_is(name):
    models = resolved("--recipe", name)
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert list(models) == list(written.get("variants", ["main"]))
    assert {recipe.name for recipe in models.values()} == {name}
    assert len(recipes.known()[name]) > 20


@pytest.mark.parametrize("name", RECIPES)
def test_resolved_settings_survive_a_trip_through_json(name):
    for recipe in resolved("--recipe", name).values():
        assert Recipe(**json.loads(recipe.model_dump_json())) == recipe


def test_an_unknown_recipe_is_answered_with_a_near_one():
    near = refused("--recipe", "drwan_tiny")
    assert near == "unknown recipe 'drwan_tiny'; did you mean 'drawn_tiny'?"
    assert "known: coco_clip, " in refused("--recipe", "zzzz")


def test_a_recipe_file_is_called_after_itself(recipe_file):
    assert only("--recipe", recipe_file("train: {lr: 0.1}")).name == "mine"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trian: {lr: 1}", "unknown setting 'trian'; did you mean 'train'?"),
        ("train: {learning: 1}", "unknown setting 'train.learning'"),
        ("train: {epoch: 1}", "unknown setting 'train.epoch'; did you mean 'epochs'?"),
        (
            "variants: {a: {train: {epoch: 1}}}",
            "unknown setting 'train.epoch'; did you mean 'epochs'?",
        ),
        ("train: {decode_threads: 4}", "train: decode_threads is no setting any more"),
        ("train: {epochs: many}", "train.epochs: Input should be a valid integer"),
        ("train:", "train: Input should be a valid dictionary"),
        ("train: {lr: {", "is not YAML"),
        ("- a\n- b", "holds no settings"),
        (
            "label: {map: round}",
            "Input should be 'half', 'clip', 'logistic' or 'isotonic' (found 'round')",
        ),
    ],
)
def test_a_recipe_that_is_wrong_is_told_what_and_where(recipe_file, text, sentence):
    file = recipe_file(text)
    found = refused("--recipe", file)
    assert sentence in found


def test_settings_kept_before_a_setting_went_are_read(tmp_path):
    kept = {"name": "old", "train": {"decode_threads": 4, "lr": 0.1}}
    (tmp_path / "settings-main.yaml").write_text(json.dumps(kept))
    ((name, recipe),) = recipes.saved(str(tmp_path), {}, None)
    assert (name, recipe.train.lr, recipe.train.decode_workers) == ("main", 0.1, 0)


@pytest.mark.parametrize(
    "text",
    [
        b"about: \xff\xfe",
        "1: 2",
        "train: {epochs: !!int many}",
        "variants: [a, b]",
        "variants: {a: 3}",
        "variants: {a: {train: {losses: 3}}}",
        "train: {losses: {triplet: }}",
    ],
)
def test_a_recipe_of_an_odd_shape_is_an_input_error_too(recipe_file, text):
    assert "mine.yaml" in refused("--recipe", recipe_file(text))


@pytest.mark.parametrize("text", ["train:", "train: [1]", "train: {losses: {info_nce: }}"])
def test_an_odd_shape_is_an_input_error_under_overrides_too(recipe_file, text):
    file = recipe_file(text)
    assert "train" in refused("--recipe", file, "--train.losses.info_nce.weight", "2")


def test_a_recipe_file_that_is_not_there_is_named(tmp_path):
    file = str(tmp_path / "gone.yaml")
    assert refused("--recipe", file).startswith(f"no recipe file {file}")


# ---- what wins ---------------------------------------------------------------------------------

VARIANTS = {
    "train": {"lr": 0.1, "epochs": 3, "losses": {"info_nce": {"weight": 1.0}}},
    "variants": {
        "plain": {},
        "fast": {"train": {"lr": 0.2}},
        "listwise": {"train": {"losses": {"smooth_ndcg": {"tau": 0.05}}}, "label": {"map": "half"}},
    },
}


def test_a_variant_wins_over_the_recipe_and_the_command_line_over_both(recipe_file):
    file = recipe_file(VARIANTS)
    models = resolved("--recipe", file)
    assert {name: model.train.lr for name, model in models.items()} == {
        "plain": 0.1,
        "fast": 0.2,
        "listwise": 0.1,
    }
    models = resolved("--recipe", file, "--train.lr", "0.3")
    assert {model.train.lr for model in models.values()} == {0.3}


def test_a_variant_replaces_the_keys_it_names_and_keeps_the_others(recipe_file):
    models = resolved("--recipe", recipe_file(VARIANTS))
    assert models["fast"].train.epochs == models["listwise"].train.epochs == 3
    assert models["fast"].train.losses == {"info_nce": {"weight": 1.0}}
    assert models["listwise"].train.losses == {"smooth_ndcg": {"tau": 0.05}}
    assert [model.label.map for model in models.values()] == ["clip", "clip", "half"]


def test_one_variant_can_be_chosen_and_another_name_is_a_model_without_variants(recipe_file):
    file = recipe_file(VARIANTS)
    assert list(resolved("--recipe", file, "--name", "fast")) == ["fast"]
    mine = resolved("--recipe", file, "--name", "mine")
    assert list(mine) == ["mine"] and mine["mine"].train.lr == 0.1


def test_seeds_make_each_model_once_for_each():
    models = recipes.seeded(recipes.resolve("drawn_tiny", {}, "m"), "0,7")
    assert {name: recipe.train.seed for name, recipe in models} == {"m.seed0": 0, "m.seed7": 7}
    first = models[0][1].model_dump(exclude={"train"})
    assert first == models[1][1].model_dump(exclude={"train"})


@pytest.mark.parametrize("seeds", ["", "1", "1,1", "1;2", "0,-1", "a,b"])
def test_seeds_are_two_or_more_numbers(seeds):
    with pytest.raises(InputError, match="give 0,1,2"):
        recipes.seeded(recipes.resolve("drawn_tiny", {}, "m"), seeds)


def test_a_recipe_without_variants_makes_one_model():
    assert list(resolved("--recipe", "drawn_tiny")) == ["main"]


def test_a_setting_inside_a_setting_is_changed_alone(recipe_file):
    file = recipe_file("train: {losses: {triplet: {weight: 0.2, margin: 0.1}, info_nce: {}}}")
    for written in (["--train.losses.triplet.weight", "5"], ["--train.losses.triplet.weight=5"]):
        losses = only("--recipe", file, *written).train.losses
        assert losses == {"triplet": {"weight": 5, "margin": 0.1}, "info_nce": {}}


def test_a_setting_inside_a_setting_can_be_new(recipe_file):
    file = recipe_file("train: {losses: {triplet: {}}}")
    losses = only("--recipe", file, "--train.losses.smooth_ndcg.tau", "0.05").train.losses
    assert losses == {"triplet": {}, "smooth_ndcg": {"tau": 0.05}}


def test_a_setting_inside_a_setting_reaches_every_variant(recipe_file):
    models = resolved("--recipe", recipe_file(VARIANTS), "--train.losses.smooth_ndcg.weight", "7")
    assert models["plain"].train.losses["info_nce"] == {"weight": 1.0}
    assert models["listwise"].train.losses == {"smooth_ndcg": {"tau": 0.05, "weight": 7}}


def test_overrides_do_not_leak_from_one_resolution_into_the_next():
    only("--recipe", "drawn_tiny", "--train.losses.smooth_ndcg.weight", "9", "--lr", "9")
    train = only("--recipe", "drawn_tiny").train
    assert train.losses["smooth_ndcg"]["weight"] == 5.0 and train.lr == 1e-3


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"),
    [
        (["--batch-size", "64"], "train", "batch_size", 64),
        (["--epochs", "3"], "train", "epochs", 3),
        (["--lr", "5e-4"], "train", "lr", 5e-4),
        (["--train.lr=5e-4"], "train", "lr", 5e-4),
        (["--precision", "amp_bf16"], "train", "precision", "amp_bf16"),
        (["--workers", "4"], "train", "workers", 4),
        (["--seed", "7"], "train", "seed", 7),
        (["--encoder", "some/model"], "embed", "encoder", "some/model"),
        (["--shard.failure_budget", "1e-1"], "shard", "failure_budget", 0.1),
        (["--rerank.betas", "[1, 2e1]"], "rerank", "betas", (1.0, 20.0)),
        (
            ["--search.queries", "['a dog', 'two: cats']"],
            "search",
            "queries",
            ("a dog", "two: cats"),
        ),
        (["--source.splits", "{val: test}"], "source", "splits", {"val": "test"}),
        (["--source.splits.val", "drop"], "source", "splits", {"val": "drop"}),
        (
            ["--source.kind", "csv", "--source.caption_column", "123"],
            *("source", "caption_column", "123"),
        ),
    ],
)
def test_a_flag_sets_its_setting(argv, section, name, value):
    found = getattr(getattr(only("--recipe", "drawn_tiny", *argv), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        ("2", 2),
        ("0.5", 0.5),
        ("true", True),
        ("hardest", "hardest"),
    ],
)
def test_a_value_inside_a_setting_has_the_type_it_looks_like(text, value):
    losses = only("--recipe", "drawn_tiny", "--train.losses.triplet.x", text).train.losses
    assert losses["triplet"]["x"] == value and type(losses["triplet"]["x"]) is type(value)


def test_5e_4_is_a_number_in_a_recipe_too(recipe_file):
    file = recipe_file("train: {lr: 5e-4, losses: {info_nce: {temperature: 5e-2}}}")
    assert only("--recipe", file).train.losses == {"info_nce": {"temperature": 5e-2}}
    assert only("--recipe", file).train.lr == 5e-4
    written = ["--train.losses", "{info_nce: {temperature: 5e-2}}"]
    assert only("--recipe", "drawn_tiny", *written).train.losses["info_nce"]["temperature"] == 5e-2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--batchsize", "3"], "unknown option --batchsize; did you mean '--batch-size'?"),
        (["--embed.encodr", "x"], "did you mean '--embed.encoder'?"),
        (["--trian.lr", "1"], "did you mean '--train.lr'?"),
        (["--train.lr.deep", "1"], "unknown option --train.lr.deep; did you mean '--train.lr'?"),
        (["--train.losses.triplet.weight"], "--train.losses.triplet.weight needs a value"),
        (["stray"], "unexpected 'stray'; settings are written --section.key value"),
        (["--epochs", "many"], "train.epochs: Input should be a valid integer"),
        (["--epochs=-1"], "train.epochs: Input should be greater than or equal to 0 (found '-1')"),
    ],
)
def test_a_command_line_that_is_wrong_is_told_what_and_where(argv, sentence):
    assert sentence in refused(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--train.losses", "{info_nce: {weight: 1"],
        ["--source.splits", "{a: {"],
        ["--train.losses.info_nce.weight.deeper", "5"],
        ["--seed", "-1"],
        ["--shard.seed", "-1"],
    ],
)
def test_a_value_that_cannot_be_is_an_input_error(argv):
    assert refused("--recipe", "drawn", *argv)


@pytest.mark.parametrize(
    ("argv", "numbers"),
    [
        (["--batch-size", "100", "--train.lanes", "8"], ("100", "8 lanes", "multiple of 8")),
        (["--batch-size", "96", "--train.lanes", "6", "--workers", "4"], ("6 lanes", "4 workers")),
    ],
)
def test_batch_lanes_and_workers_must_share_out_evenly(argv, numbers):
    sentence = refused("--recipe", "drawn_tiny", *argv)
    assert all(number in sentence for number in numbers)
    assert "choose" in sentence


def test_paths_are_made_absolute_because_workers_run_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    recipe = only(
        *("--recipe", "drawn_tiny", "--source.kind", "coco", "--source.path", "a.json"),
        *("--source.images", "s3://b/images"),
        *("--encoder", "encoder", "--leaprr.lists", "runs/other", "--train.resume", "latest"),
        *("--model.pretrained", "encoder", "--calibrate.encoders", "[encoder, tfidf]"),
    )
    assert recipe.source.path == str(tmp_path / "a.json")
    assert recipe.source.images == "s3://b/images"
    assert recipe.embed.encoder == recipe.model.pretrained == str(tmp_path / "encoder")
    assert recipe.calibrate.encoders == (str(tmp_path / "encoder"), "tfidf")
    assert recipe.leaprr.lists == str(tmp_path / "runs" / "other")
    assert recipe.train.resume == "latest" and recipe.rerank.weights is None
    assert only("--recipe", "drawn_tiny").leaprr.lists == "val"


def test_a_setting_that_the_kind_of_source_does_not_read_is_refused(tmp_path):
    tars = ("--recipe", "flickr8k", "--source.kind", "webdataset")
    said = refused(*tars, "--source.images", "pictures")
    assert "source.images is not read by the webdataset source; it is a setting of" in said
    assert "source.fetch_threads is not read by the folder" in refused(
        *("--recipe", "flickr8k", "--source.kind", "folder", "--source.fetch_threads", "4")
    )
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("source: {kind: folder, path: pictures, caption_column: text}\n")
    assert "source.caption_column is not read by the folder" in refused("--recipe", str(recipe))


def test_of_a_recipe_for_other_data_nothing_of_the_source_is_taken():
    flickr8k = ("--recipe", "flickr8k", "--name", "info_nce")
    other = only(*flickr8k, "--source.kind", "csv", "--source.holdout", "9").source
    assert (other.kind, other.splits, other.holdout) == ("csv", {}, 9)
    same = only(*flickr8k, "--source.kind", "karpathy").source
    assert (same.splits, same.holdout) == ({"val": "test"}, 500)


@pytest.mark.parametrize("name", sorted(recipes.known()))
def test_recipes_set_nothing_of_the_source_that_it_does_not_read(name):
    from pipeline import sources

    (_, recipe), *_ = recipes.resolve(name, {}, None)
    own = recipes._read(name).get("source", {})
    assert own.keys() <= sources.read_by(recipe.source.kind)


def test_every_setting_of_the_source_is_read_by_some_kind():
    from pipeline import sources

    read = set().union(*map(sources.read_by, sources.SOURCES))
    assert read == set(SourceSettings.model_fields)


def test_every_setting_that_is_a_path_is_made_absolute():
    """Those whose description says so: a URI, or a name or folder of a model."""
    word = re.compile(r"\bURI\b|name,? or a? ?folder|folder, pattern")
    named = {(section, name) for section, name, _, about in SETTINGS if word.search(about)}
    known = {(section, name) for section, names in recipes.PATHS.items() for name in names}
    assert named <= known


# ---- what a person reads -----------------------------------------------------------------------


@pytest.mark.parametrize(("section", "name", "default", "about"), SETTINGS)
def test_every_setting_has_a_description(section, name, default, about):
    assert len(about) > 10


def test_every_section_is_in_the_help_of_some_stage():
    shown = {section for name in COMMANDS if name != "run" for section in command_of(name).sections}
    assert shown == set(SECTIONS) == set(command_of("run").sections)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_shows_each_setting_of_the_stage_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(command, ["--help"])
    assert stop.value.code == 0
    page = re.sub(r"\s", "", capsys.readouterr().out)
    for section, name, default, about in SETTINGS:
        flag = f"--{section}.{name}"
        if section in command_of(command).sections:
            written = f"{about} (default {options.written(default)})"
            assert flag in page and re.sub(r"\s", "", written) in page, flag
        else:
            assert flag not in page, flag


@pytest.mark.parametrize(
    ("section", "name", "values"),
    [
        ("label", "map", "half|clip|logistic|isotonic"),
        ("label", "lists", "[i2t|t2i|i2i|t2t, …]"),
        ("train", "precision", "fp32|tf32|amp_bf16|amp_fp16"),
        *(("train", "lr", "X"), ("train", "flip", "true|false"), ("train", "epochs", "N")),
        *(("train", "resume", "TEXT"), ("train", "losses", "{…}")),
    ],
)
def test_help_says_what_a_setting_may_be(section, name, values):
    assert recipes.values_of(section, name) == values


def test_an_error_names_the_option_that_was_typed_and_else_the_file(recipe_file):
    typed = refused("--recipe", recipe_file("model: {dim: 8}"), "--train.precision", "bf16")
    assert typed.startswith("--train.precision: Input should be 'fp32'")
    file = recipe_file("train: {precision: bf16}")
    assert refused("--recipe", file, "--epochs", "2").startswith(f"{file}: train.precision: ")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(None, ["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"halftone {pipeline.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", pipeline.__version__)


def test_the_overview_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(None, [])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", page, re.M) for name in COMMANDS)


def test_the_recipes_are_listed_with_what_they_are(capsys):
    main.main("recipes", [])
    page = capsys.readouterr().out
    main.main("recipes", ["--json"])
    assert json.loads(capsys.readouterr().out) == recipes.known()
    assert all(name in page and about in page for name, about in recipes.known().items())


def test_a_tower_that_brings_its_size_takes_none_that_was_another_towers():
    over = {"model": {"image": "pretrained", "pretrained": "some/clip"}}
    [(_, recipe)] = recipes.resolve("drawn_tiny", over, None)
    assert (recipe.model.image_size, recipe.model.max_words) == (None, 64)
    over["model"] |= {"image_size": "96", "text": "pretrained"}
    [(_, recipe)] = recipes.resolve("drawn_tiny", over, None)
    assert (recipe.model.image_size, recipe.model.max_words) == (96, None)
    [(_, recipe)] = recipes.resolve("drawn_tiny", {}, None)
    assert (recipe.model.image_size, recipe.model.max_words) == (48, 64)
