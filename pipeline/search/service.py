"""The search service: one page, its pictures, JSON for programs, health and metrics.

An ASGI application; what runs it, and on how many machines, is not its business.
"""

import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from importlib import resources

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pipeline.errors import InputError
from pipeline.labels import embed
from pipeline.reports import pictures, render
from pipeline.reports.pictures import Hit
from pipeline.search import index
from pipeline.search.index import Query, SearchIndex
from pipeline.search.page import preview
from schemas.settings import ServeSettings

IN_JSON = ("id", "image_id", "text", "score", "relevance", "picture")
SIDE = 320  # pixels of a picture's longer side
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; script-src 'self'; "
    "style-src 'unsafe-inline'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Answer = list[Hit] | InputError  # the hits of a query, or why there are none
Ask = Callable[[Query], Awaitable[Answer]]


class Asked(BaseModel):
    """What stands in a search's address."""

    model_config = ConfigDict(extra="forbid")
    q: str = Field("", max_length=2000)
    words: str = Field("", max_length=200)
    without: str = Field("", max_length=200)
    least: float = Field(-1.0, ge=-1, le=1)
    top: int = Field(24, ge=1, le=200)
    shades: bool = True


def app(gallery: SearchIndex, ask: Ask, *, replica: str = "0") -> Starlette:
    """The application; `ask` answers a query, alone or together with others that wait."""
    service = Service(gallery, ask, replica)
    routes = [
        Route("/", service.page, methods=["GET", "POST"]),
        Route("/search", service.json, methods=["GET", "POST"]),
        Route("/picture/{row:int}", service.picture),
        Route("/serve.js", service.script),
        Route("/healthz", service.health),
        Route("/metrics", service.metrics),
    ]
    hosts = allowed_hosts(gallery.recipe.serve)
    middleware = [
        Middleware(Watched, service=service),
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
    ]
    errors: dict = {HTTPException: service.refusal}
    return Starlette(routes=routes, middleware=middleware, exception_handlers=errors)


def allowed_hosts(settings: ServeSettings) -> list[str]:
    """Host names that requests may carry; on loopback a strange one is a web page's trick."""
    if settings.names:
        return list(settings.names)
    return list(LOOPBACK) if settings.host in ("127.0.0.1", "localhost", "::1") else ["*"]


class Service:
    """The endpoints of one gallery."""

    def __init__(self, gallery: SearchIndex, ask: Ask, replica: str):
        self.gallery, self.ask = gallery, ask
        self.settings: ServeSettings = gallery.recipe.serve
        self.images = len(gallery.pictures.images)
        gallery.prepare()
        self.shades = shades_there(gallery)
        self.registry = CollectorRegistry()
        labels = {"replica": replica}
        self.requests = Counter(
            "halftone_requests", "Requests by path and status", ["path", "status", *labels],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "halftone_request_seconds", "Time until the answer is whole", ["path", *labels],
            registry=self.registry,
        )  # fmt: skip
        size = Gauge("halftone_images", "Images searched", [*labels], registry=self.registry)
        size.labels(**labels).set(self.images)
        self.labels = labels
        self._picture = functools.lru_cache(maxsize=4096)(self._read_picture)

    async def page(self, request: Request) -> Response:
        """The page, with the results of what was asked; a refusal is a sentence on it."""
        shown, error, status = None, None, 200
        try:
            query = await self._query(request)
            if query is not None:
                hits = self._linked(await self._found(query), request)
                shown = {"hits": hits, "text": query.text}
                shown["picture"] = preview(self.gallery, query.picture)
                shown["how"] = self.gallery.how([query])
                shown["told"] = await run_in_threadpool(self.gallery.told, query)
        except HTTPException as refused:
            error, status = refused.detail, refused.status_code
        recipe = self.gallery.recipe
        html = render.render(
            "serve.html.j2",
            version="serve",
            root=request.scope.get("root_path", ""),
            data=recipe.name,
            model=self.gallery.name,
            split=recipe.evaluate.split,
            images=self.images,
            pixels=recipe.model.image != "regions",
            examples=self.examples,
            asked=request.query_params,
            top=self.settings.top,
            shown=shown,
            error=error,
        )
        return HTMLResponse(html, status, HEADERS)

    async def json(self, request: Request) -> Response:
        """{"model", "search", "hits", "told"} for programs, and "recall" where that is not 1."""
        query = await self._query(request)
        if query is None:
            raise HTTPException(400, "the query is empty; give q, or POST a picture")
        hits = [asdict(hit) for hit in self._linked(await self._found(query), request)]
        shown = [{name: hit[name] for name in IN_JSON} for hit in hits]
        told = await run_in_threadpool(self.gallery.told, query)
        about = {"model": self.gallery.name, **self.gallery.about_query(query)}
        return JSONResponse({**about, "hits": shown, "told": told})

    async def picture(self, request: Request) -> Response:
        """The picture of a row, no larger than it is shown."""
        row = request.path_params["row"]
        if row >= self.images:
            raise HTTPException(404, f"no picture {row}; there are {self.images:,}")
        data = await run_in_threadpool(self._picture, row)
        if data is None:
            raise HTTPException(404, "the shards hold features, not pictures")
        cached = {"Cache-Control": "private, max-age=3600", **HEADERS}
        return Response(data, media_type="image/jpeg", headers=cached)

    async def script(self, request: Request) -> Response:
        text = resources.files("pipeline.reports").joinpath("templates/serve.js").read_text()
        return Response(text, media_type="text/javascript", headers=HEADERS)

    async def health(self, request: Request) -> Response:
        about = {"status": "ok", "data": self.gallery.recipe.name, "model": self.gallery.name}
        return JSONResponse({**about, "images": self.images})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(generate_latest(self.registry), media_type="text/plain")

    async def refusal(self, request: Request, refused: HTTPException) -> Response:
        headers = {**HEADERS, **(refused.headers or {})}
        return JSONResponse({"error": refused.detail}, refused.status_code, headers)

    async def _query(self, request: Request) -> Query | None:
        """What is asked for; None where nothing is."""
        try:
            asked = Asked(**{"top": self.settings.top, **request.query_params})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise HTTPException(400, f"{where}: {first['msg']}") from None
        picture = await _upload(request, self.settings) if request.method == "POST" else None
        if picture is None and not asked.q.strip():
            return None
        return Query(
            text=asked.q.strip(),
            picture=picture,
            shades=asked.shades and self.shades and picture is None,
            **asked.model_dump(include={"top", "words", "without", "least"}),
        )

    async def _found(self, query: Query) -> list[Hit]:
        answer = await self.ask(query)
        if isinstance(answer, InputError):
            raise HTTPException(422, str(answer))
        return answer

    def _linked(self, hits: list[Hit], request: Request) -> list[Hit]:
        pictures_ = f"{request.scope.get('root_path', '')}/picture"
        return [replace(hit, picture=f"{pictures_}/{hit.row}") for hit in hits]

    def _read_picture(self, row: int) -> bytes | None:
        (sample,) = self.gallery.pictures.samples([row])
        if sample.member.endswith(".npy"):
            return None
        return pictures.jpeg(pictures.small(sample.load(), SIDE), 85)

    @functools.cached_property
    def examples(self) -> list[str]:
        """A few captions of the gallery, to begin with."""
        return [query.text for query in index.default_queries(self.gallery)[:4]]


async def answered(gallery: SearchIndex, queries: Sequence[Query]) -> list[Answer]:
    """The answers to all queries; texts go through the models together."""
    return await run_in_threadpool(_answered, gallery, queries)


def _answered(gallery: SearchIndex, queries: Sequence[Query]) -> list[Answer]:
    texts = iter(gallery.find_all([query for query in queries if query.picture is None]))
    answers: list[Answer] = []
    for query in queries:
        try:
            answers.append(next(texts) if query.picture is None else gallery.find(query))
        except InputError as error:  # a picture that is none ends nobody else's search
            answers.append(error)
    return answers


def shades_there(gallery: SearchIndex) -> bool:
    """Whether the sentence encoder is there to give results their relevance to a text."""
    try:
        embed.encode(["is it there?"], gallery.recipe.embed, gallery.root)
    except InputError:
        return False
    return True


async def _upload(request: Request, settings: ServeSettings) -> bytes:
    """The picture in a request's body; refused as soon as it is seen to be too large."""
    kind = request.headers.get("content-type", "none").partition(";")[0].strip()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        said = f"Content-Type {kind} is no picture; send image/… or, as .npy, octet-stream"
        raise HTTPException(415, said)
    said = f"the picture is larger than {settings.max_upload:,} bytes; send a smaller one"
    too_large = HTTPException(413, said, {"Connection": "close"})
    announced = request.headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > settings.max_upload:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > settings.max_upload:
            raise too_large
    return bytes(data)


class Watched:
    """Middleware: counts requests and their time, by path as it is routed, and by status."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, status = time.perf_counter(), 500

        async def sent(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            # Of paths that nobody serves there are any number: they count as one.
            path = getattr(scope.get("endpoint"), "__name__", "other")
            service, labels = self.service, self.service.labels
            service.requests.labels(path=path, status=str(status), **labels).inc()
            service.seconds.labels(path=path, **labels).observe(time.perf_counter() - started)
