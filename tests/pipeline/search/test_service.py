"""The search service, asked over HTTP and in a browser, as it runs on Ray Serve."""

import concurrent.futures
import http.client
import io
import json
import socket

import numpy as np
import pytest
import requests
from PIL import Image
from playwright.sync_api import expect

from jobs.cli import recipes
from jobs.cli.main import main
from jobs.cluster import serving
from pipeline.errors import InputError
from pipeline.search import index, service
from pipeline.search.index import Query
from pipeline.storage import parquet, run_folder
from pipeline.storage.run_folder import RunFolder
from tests.helpers import browser as browsing


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def gallery(finished_run) -> index.SearchIndex:
    settings = {"serve": {"port": free_port(), "max_upload": 3_000_000}}
    ((name, recipe),) = recipes.saved(finished_run, settings, None)
    return index.SearchIndex(recipe, finished_run, name)


@pytest.fixture(scope="module")
def address(gallery) -> str:
    served = serving.start(gallery.recipe, gallery.root, gallery.name)
    assert served.url.endswith(str(gallery.recipe.serve.port)) and not served.told
    yield served.url
    serving.stop(gallery.recipe.serve.application)


@pytest.fixture(scope="module")
def known(finished_run) -> list[dict]:
    """Captions whose own image the ranking has first, alone."""
    folder = RunFolder(finished_run).folder("evaluate", "main")
    entries = run_folder.need_index(folder, "evaluate")["pieces"]
    rows = [
        r for e in entries for r in parquet.read_table(f"{folder}/{e['name']}.parquet").to_pylist()
    ]
    found = [r for r in rows if r["direction"] == "t2i" and r["rank"] == 1 and r["R_at_1"] == 1]
    assert found, "the tiny model is to get at least one caption right"
    return found


def picture_of(gallery, image_id: str) -> bytes:
    return gallery.pictures.sample(image_id).read()


def test_it_answers_as_the_gallery_does(gallery, address):
    for text in ("a red circle", "two boats & a <star>", "מזל"):
        got = requests.get(f"{address}/search", params={"q": text, "top": 5}).json()
        hits = gallery.find(Query(text, top=5, shades=True))
        assert got["model"] == "main"
        assert [h["id"] for h in got["hits"]] == [h.id for h in hits]
        assert got["told"] == gallery.told(Query(text))
        for field in ("score", "relevance"):
            expected = [getattr(h, field) for h in hits]
            assert [h[field] for h in got["hits"]] == pytest.approx(expected, abs=1e-4)


def test_its_pictures_are_those_of_the_shards(gallery, address):
    hit = requests.get(f"{address}/search", params={"q": "a boat"}).json()["hits"][0]
    answer = requests.get(address + hit["picture"])
    assert answer.headers["content-type"] == "image/jpeg"
    shown = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), int)
    kept = np.asarray(gallery.pictures.sample(hit["image_id"]).load().convert("RGB"), int)
    assert shown.shape == kept.shape and np.abs(shown - kept).mean() < 6


def test_a_picture_is_answered_with_captions(gallery, address):
    data = picture_of(gallery, gallery.items.image_ids[3])
    kind = {"Content-Type": "image/jpeg"}
    got = requests.post(f"{address}/search?top=4&without=red", data=data, headers=kind).json()
    hits = gallery.find(Query(picture=data, top=4, without="red"))
    assert [h["id"] for h in got["hits"]] == [h.id for h in hits]


def test_many_at_once_get_what_each_gets_alone(gallery, address):
    texts = [caption.text for caption in gallery.pictures.captions_at(range(48))]

    def ask(text: str) -> list[str]:
        answer = requests.get(f"{address}/search", params={"q": text, "top": 6})
        return [hit["id"] for hit in answer.json()["hits"]]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, texts))
    expected = [gallery.find(Query(text, top=6)) for text in texts]
    assert found == [[hit.id for hit in hits] for hits in expected]


def test_health_and_metrics(address):
    health = requests.get(f"{address}/healthz")
    assert health.status_code == 200 and health.json()["status"] == "ok"
    requests.get(f"{address}/search", params={"q": "", "top": 5})
    requests.get(f"{address}/nobody/{'x' * 40}")
    text = requests.get(f"{address}/metrics").text
    for line in ("halftone_images{", "halftone_request_seconds_bucket{", 'status="400"'):
        assert line in text, line
    assert 'path="other"' in text and "xxxx" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/picture/../../etc/passwd",
        "/picture/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/picture/..%5c..%5cwindows",
        "/picture//etc/passwd",
        "/picture/-1",
        "/picture/99999999999999999999",
        "/picture/3%00.jpg",
        "/serve.js/../../../settings-main.yaml",
        "/settings-main.yaml",
        "/2-shards/index.json",
    ],
)
def test_path_tricks_lead_nowhere(address, path):
    """Sent as they stand: libraries tidy such paths up."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"))
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 404 and "error" in json.loads(answer.read())


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/search", 400, "query is empty"),
        ("/search?q=x&top=0", 400, "top: "),
        ("/search?q=x&top=many", 400, "top: "),
        ("/search?q=x&least=7", 400, "least: "),
        ("/search?q=x&colour=red", 400, "colour: "),
        (f"/search?q={'x' * 2001}", 400, "q: "),
    ],
)
def test_bad_queries_are_refused(address, path, status, words):
    answer = requests.get(address + path)
    assert answer.status_code == status and words in answer.json()["error"]
    page = requests.get(address + path.replace("/search", "/"))
    if path != "/search":
        assert page.status_code == status and words in page.text


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"nonsense", "image/jpeg", 422, "not an image"),
        (b"", "image/png", 422, "not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "image/jpeg", 422, "Pillow"),
        (b"\x93NUMPY\x01\x00" + bytes(20), "application/octet-stream", 422, "features"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run", "image/x-eps", 422, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 422, "not an image"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "is no picture"),
        (b"<html>", "text/html", 415, "is no picture"),
        (bytes(3_000_001), "image/jpeg", 413, "larger than 3,000,000 bytes"),
    ],
)
def test_bad_uploads_are_refused(address, body, kind, status, words):
    answer = requests.post(f"{address}/search", data=body, headers={"Content-Type": kind})
    assert answer.status_code == status and words in answer.json()["error"]
    assert requests.get(f"{address}/healthz").ok


def test_torn_pictures_and_bombs_are_refused(gallery, address):
    torn = picture_of(gallery, gallery.items.image_ids[0])[:-200]
    for body, words in ((torn, "does not decode"), (bomb(), "too many pixels")):
        kind = {"Content-Type": "image/jpeg"}
        answer = requests.post(f"{address}/search", data=body, headers=kind)
        assert answer.status_code == 422 and words in answer.json()["error"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_gigabyte_is_refused_long_before_it_was_read(address, announced):
    """With its length announced, and in chunks that never say how many there will be."""
    host, port = address.removeprefix("http://").split(":")
    head = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n"
    length = b"Content-Length: 1073741824\r\n\r\n"
    block = bytes(2**20)
    part = block if announced else b"100000\r\n" + block + b"\r\n"
    sent, answer = 0, b""
    with socket.create_connection((host, int(port)), timeout=20) as line:
        line.sendall(head + (length if announced else b"Transfer-Encoding: chunked\r\n\r\n"))
        line.settimeout(0.05)
        while sent < 1024 and not answer:
            try:
                line.settimeout(10)
                line.sendall(part)
                sent += 1
                line.settimeout(0.01)
                answer = line.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
    assert b" 413 " in answer.split(b"\r\n")[0] and sent < 500
    assert requests.get(f"{address}/healthz").ok


def test_strange_hosts_are_refused_on_loopback(address):
    answer = requests.get(f"{address}/search?q=x", headers={"Host": "evil.example"})
    assert answer.status_code == 400


def test_other_hosts_and_names_are_a_setting(gallery):
    settings = gallery.recipe.serve
    assert service.allowed_hosts(settings) == list(service.LOOPBACK)
    assert service.allowed_hosts(settings.model_copy(update={"host": "0.0.0.0"})) == ["*"]
    named = settings.model_copy(update={"host": "0.0.0.0", "names": ("search.example",)})
    assert service.allowed_hosts(named) == ["search.example"]


def test_it_listens_on_loopback_alone(address):
    import psutil

    port = int(address.rsplit(":", 1)[1])
    listening = {
        c.laddr.ip
        for c in psutil.net_connections("tcp")
        if c.laddr.port == port and c.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


def test_a_port_that_is_taken_is_a_sentence(gallery):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        update = {"port": taken.getsockname()[1]}
        recipe = gallery.recipe.model_copy(
            update={"serve": gallery.recipe.serve.model_copy(update=update)}
        )
        with pytest.raises(InputError, match="cannot listen on 127.0.0.1.*give another"):
            serving.start(recipe, gallery.root, gallery.name)


@pytest.fixture(scope="module")
def browser():
    with browsing.chromium() as opened:
        yield opened


@pytest.fixture(params=browsing.SCREENS)
def tab(request, browser, address):
    with browsing.tab(browser, request.param, address) as page:
        yield page


def test_a_typed_query_shows_the_right_scene_first(tab, gallery, known):
    row = known[0]
    written = gallery.pictures.sample(row["image_id"]).captions
    (text,) = (c["text"] for c in written if c["caption_id"] == row["query_id"])
    tab.fill("input[name=q]", text)
    tab.press("input[name=q]", "Enter")
    first = tab.locator(".found figure").first
    first.wait_for()
    assert tab.locator("#results h2").inner_text() == f"“{text}”"
    assert first.get_attribute("data-image") == row["candidate_id"][0]
    assert first.get_attribute("data-image") == row["query_id"].split("#")[0]
    first.locator("img").evaluate("image => image.decode()")
    data = tab.request.get(tab.url.split("/?")[0] + first.locator("img").get_attribute("src"))
    shown = np.asarray(Image.open(io.BytesIO(data.body())).convert("RGB"), int)
    scene = gallery.pictures.sample(row["candidate_id"][0]).load()
    assert np.abs(shown - np.asarray(scene.convert("RGB"), int)).mean() < 6
    assert tab.locator(".found .dot").count() == tab.locator(".found figure").count() > 1
    tab.reload()  # the address holds the query
    assert tab.locator(".found figure").first.get_attribute("data-image") == row["candidate_id"][0]


def test_filters_examples_and_going_back_work_in_the_page(tab, gallery):
    tab.locator(".examples a").first.click()
    tab.locator(".found figure").first.wait_for()
    example = tab.input_value("input[name=q]")
    tab.fill("input[name=without]", "red")
    with tab.expect_response(lambda r: "without=red" in r.url):
        tab.click("button")
    expect(tab.locator("[aria-busy=true]")).to_have_count(0, timeout=60_000)
    shown = tab.locator(".found figure").evaluate_all("all => all.map(f => f.dataset.image)")
    expected = gallery.find(Query(example, top=gallery.recipe.serve.top, without="red"))
    assert shown == [hit.image_id for hit in expected] and shown
    tab.go_back()
    expect(tab.locator("input[name=without]")).to_have_value("", timeout=60_000)


def test_a_query_of_markup_is_text(tab):
    tab.fill("input[name=q]", "<img src=x onerror=\"document.title='owned'\">")
    tab.press("input[name=q]", "Enter")
    tab.locator("#results h2").wait_for()
    assert "<img src=x" in tab.locator("#results h2").inner_text()
    assert tab.locator("#results img[src=x]").count() == 0 and tab.title() != "owned"


def test_a_picture_given_to_the_page_finds_captions(tab, gallery):
    data = picture_of(gallery, gallery.items.image_ids[2])
    tab.set_input_files("#file", {"name": "a.jpg", "mimeType": "image/jpeg", "buffer": data})
    tab.locator(".asked img").wait_for()
    first = tab.locator(".found figure").first
    (hit,) = gallery.find(Query(picture=data, top=1))
    assert first.get_attribute("data-image") == hit.image_id
    assert hit.text in first.inner_text()


def test_a_dry_run_starts_nothing(finished_run, capfd):
    main("serve", ["--root", finished_run, "--dry-run"])
    assert "would serve model main at 127.0.0.1:8100" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        main("serve", ["--root", finished_run, "--dry-run", "--evaluate.split", "nosuch"])
    assert "'nosuch' is not in " in capfd.readouterr().err
