"""`capfilt inspect`: the review page, served on loopback.

What guards it: only the static files of a fixed list are served; every value of a request is a
bound SQL parameter; the Host header must name this machine (DNS rebinding); writes need a header
that no foreign page can send and an Origin that is ours; the page may run its own script and style
only (CSP); other addresses than loopback need a token. Texts are set as text, never as HTML.
"""

import contextlib
import getpass
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import threading
import webbrowser
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import numpy as np
import yaml
from pydantic import ValidationError

import capfilt
from capfilt.config import Filter
from capfilt.errors import CapfiltError, InputError, MissingExtraError, UsageError
from capfilt.inspect import filters, pictures, queries
from capfilt.inspect.labels import SAMPLING, VERDICTS, Label, check_reviewer, utc_now
from capfilt.inspect.search import KINDS, MISSING, Embedder, Embeddings, open_embeddings
from capfilt.inspect.thresholds import Thresholds

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

DEFAULT_PORT = 8765
COOKIE = "capfilt_token"
HEADER = "x-capfilt"
LARGEST_BODY = 64 << 20
LARGEST_UPLOAD = 20 << 20
FILTER_FOLDER = "filters"

STATIC = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/app.css": ("app.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
}

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}

Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        host: the address that the server listens on.
        token: what a request must bring; None asks for none (loopback only).
        origin: what browsers ask instead where a proxy stands before the server, as in
            `https://review.example.org`; None where there is none.
    """

    host: str = "127.0.0.1"
    token: str | None = None
    origin: str | None = None

    def allows_host(self, header: str) -> bool:
        """Whether a Host header names this machine; a foreign name is DNS rebinding."""
        name = host_name(header)
        if name in ("localhost", "127.0.0.1", "::1"):
            return True
        if self.origin is not None and header.lower() == _netloc(self.origin):
            return True
        if is_loopback(self.host):
            return False
        # an address can't be rebound, only a name can
        own = {self.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return name in own or _is_address(name)

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of that origin may write: it is the one that the request was sent to.

        A proxy may pass the Host header on, or write its own.
        """
        return _netloc(origin) == host.lower() or origin.lower() == self.origin

    def allows_token(self, given: str | None) -> bool:
        """Whether the token is the right one, in constant time."""
        if self.token is None:
            return True
        return given is not None and hmac.compare_digest(given.encode(), self.token.encode())


def host_name(header: str) -> str:
    """The host of a Host header in lower case, without port and brackets; empty if malformed."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]{1,5})?", header)
    return (match[1] or match[2]).lower() if match else ""


def _netloc(origin: str) -> str | None:
    """Host and port of an origin, in lower case; None where it is malformed or has none."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def checked_origin(given: str) -> str:
    """An origin as browsers send it: in lower case, without a slash at its end.

    Raises:
        UsageError: it is no such address.
    """
    origin = given.lower().rstrip("/")
    if not re.fullmatch(r"https?://[^/?#@]+", origin) or not host_name(_netloc(origin) or ""):
        raise UsageError(
            f"--origin {given!r}: expected scheme and host of the proxy, as in "
            "https://review.example.org"
        )
    return origin


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Guard:
    """ASGI middleware: Host, token, cross-site writes, size, and the headers of every answer."""

    app: Asgi
    access: Access

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Refuses what may not be asked; else passes on, with the security headers."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        headers = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, text, more = refusal
            body = b"" if status == 303 else queries.dumps({"error": text})
            await send_guarded(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [
                        (b"content-type", b"application/json"),
                        (b"cache-control", b"no-store"),
                        *more,
                    ],
                }
            )
            await send_guarded({"type": "http.response.body", "body": body})
            return
        await self.app(scope, receive, send_guarded)

    def _refusal(
        self, scope: Scope, headers: Sequence[tuple[str, str]]
    ) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        hosts = [value for name, value in headers if name == "host"]
        given = dict(headers)
        if len(hosts) != 1 or not self.access.allows_host(hosts[0]):
            return 421, "this server does not answer for that host name", []
        if self.access.token is not None:
            asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            in_url = dict(asked).get("token")
            if scope["path"] == "/" and scope["method"] == "GET" and in_url is not None:
                if not self.access.allows_token(in_url):
                    return 403, "the token is wrong: take the URL that inspect printed", []
                # out of the address bar and the history
                rest = urlencode([(name, value) for name, value in asked if name != "token"])
                cookie = f"{COOKIE}={in_url}; HttpOnly; SameSite=Lax; Path=/"
                if (self.access.origin or "").startswith("https://"):
                    cookie += "; Secure"
                location = "/" + (f"?{rest}" if rest else "")
                return (
                    303,
                    "",
                    [(b"location", location.encode()), (b"set-cookie", cookie.encode("latin-1"))],
                )
            bearer = given.get("authorization", "").removeprefix("Bearer ")
            if not self.access.allows_token(bearer or _cookie(given.get("cookie", ""))):
                return 403, "a token is needed: open the URL that inspect printed", []
        if scope["method"] not in ("GET", "HEAD"):
            if given.get(HEADER) != "1":
                return 403, f"writes need the header {HEADER}: 1", []
            origin = given.get("origin")
            if origin is not None and not self.access.allows_origin(origin, hosts[0]):
                return 403, "a page of another origin may not write here", []
            if given.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                return 403, "a page of another origin may not write here", []
        return None


def _cookie(header: str) -> str | None:
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return None


@dataclass
class Page:
    """The endpoints of one run.

    Attributes:
        run: the run, opened.
        reviewer: whose labels these are unless a request says another name.
        read_only: nothing is written.
        embeddings: for search by meaning; None where the run has none.
        embedder: the matcher, for queries that are not in the run; None leaves "more like this".
    """

    run: queries.Run
    reviewer: str
    read_only: bool = False
    embeddings: Embeddings | None = None
    embedder: Embedder | None = None
    _uploads: "OrderedDict[str, np.ndarray]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def summary(self, request: "Request") -> Any:
        """The run in numbers, and what this page can do."""
        return {
            **self.run.summary(),
            "reviewer": self._reviewer(request.query_params),
            "read_only": self.read_only,
            "search": {
                "available": self.embeddings is not None,
                "queries": self.embedder is not None,
                "why_not": None if self.embeddings is not None else MISSING,
            },
            "capfilt": capfilt.__version__,
        }

    def warm_up(self) -> None:
        """Counts what the first screen needs, while the browser starts."""
        with contextlib.suppress(Exception):  # a request will say what is wrong
            self.run.summary()
            self.run.histogram("itm")

    def pairs(self, request: "Request") -> Any:
        """A screen of pairs; see `filters.Query` for the filters."""
        params = request.query_params
        query = filters.parse_query(params)
        similar, is_picture = self._similar(params)
        if similar is not None and not params.get("order"):
            query = filters.parse_query({**params, "order": "similar"})
        page = self.run.page(
            query, self._thresholds(params), self._reviewer(params), similar, is_picture
        )
        return page.__dict__

    def pair(self, request: "Request") -> Any:
        """A pair with its provenance."""
        pair_id = request.path_params["pair_id"]
        found = self.run.pair(pair_id, self._reviewer(request.query_params))
        if found is None:
            raise _NotFound(f"there is no pair {pair_id[:200]!r} in this run")
        return found

    def image(self, request: "Request") -> "Response":
        """A picture of the run, small."""
        from starlette.responses import Response

        side = 768 if request.query_params.get("size") == "large" else pictures.THUMBNAIL_PX
        data = self.run.thumbnail(request.path_params["key"], side)
        if data is None:
            raise _NotFound("there is no such picture, or it can't be decoded")
        # `v` in the URL is the run's version: another content has another URL
        headers = {"cache-control": "private, max-age=86400"}
        return Response(data, media_type="image/jpeg", headers=headers)

    def histogram(self, request: "Request") -> Any:
        """Counts of a score per source."""
        return self.run.histogram(request.query_params.get("score", "itm"))

    def threshold(self, request: "Request") -> Any:
        """What other thresholds would do."""
        thresholds = self._thresholds(request.query_params)
        return {**self.run.try_thresholds(thresholds), "set": _overrides(self._filter(thresholds))}

    def export_labels(self, request: "Request") -> "Response":
        """All labels as JSONL."""
        from starlette.responses import StreamingResponse

        headers = {"content-disposition": 'attachment; filename="labels.jsonl"'}
        return StreamingResponse(
            self.run.labels.lines(), media_type="application/x-ndjson", headers=headers
        )

    def add_label(self, request: "Request", body: bytes) -> Any:
        """Stores a verdict, or takes the last one back."""
        self._may_write()
        values = _json(body)
        reviewer = self._reviewer(values)
        undone = None
        if values.get("undo"):
            undone = self.run.labels.undo(reviewer)
            pair_id = undone.pair_id if undone else None
        else:
            verdict, sampling = values.get("verdict"), values.get("sampling", "browse")
            if verdict not in VERDICTS:
                raise InputError(f"verdict is {verdict!r}, expected one of {', '.join(VERDICTS)}")
            if sampling not in SAMPLING:
                raise InputError(f"sampling is {sampling!r}, expected one of {', '.join(SAMPLING)}")
            pair_id = str(values.get("pair_id"))
            basis = self.run.label_basis(pair_id)
            if basis is None:
                raise _NotFound(f"there is no pair {pair_id[:200]!r} in this run")
            if self.run.scored_anew(pair_id):
                raise _Taken(
                    "the run was scored anew since this page was opened, so the label would be of "
                    "scores that are gone: stop `capfilt inspect` and start it again"
                )
            self.run.labels.append(
                Label(
                    **basis,
                    verdict=verdict,
                    reviewer=reviewer,
                    time=self.run.labels.time_for(reviewer, basis["uid"] or basis["pair_id"]),
                    sampling=sampling,
                )
            )
        self.run.refresh_labels()
        standing = None
        if pair_id is not None:
            found = self.run.pair(pair_id, reviewer)
            standing = found["verdict"] if found else None
        return {
            "pair_id": pair_id,
            "verdict": standing,
            "undone": undone.verdict if undone else None,
            "labels": self.run.label_counts(),
        }

    def import_labels(self, request: "Request", body: bytes) -> Any:
        """Appends labels from JSONL."""
        self._may_write()
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the labels are not UTF-8 ({error})") from None
        added, present = self.run.labels.import_lines(text)
        self.run.refresh_labels()
        return {"added": added, "present": present, "labels": self.run.label_counts()}

    def save_decision(self, request: "Request", body: bytes) -> Any:
        """Writes thresholds as a `filter:` section that `capfilt filter` applies."""
        self._may_write()
        values = _json(body)
        given = {name: str(values[name]) for name in filters.TRIED if values.get(name) is not None}
        thresholds = self._thresholds(given)
        if thresholds.as_run:
            raise InputError("there is nothing to save yet: the run's own rules are in force")
        section = self._filter(thresholds)
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", str(values.get("name", ""))).strip("-")[:64]
        if not stem:
            raise InputError("the decision needs a name: letters, digits, - and _")
        overrides = _overrides(section)
        command = "capfilt filter CONFIG " + " ".join(f"--set {each}" for each in overrides)
        text = (
            f"# saved by capfilt inspect on {utc_now()}; `CONFIG` is the run's YAML file:\n"
            f"#   {command}\n" + yaml.safe_dump({"filter": section}, sort_keys=False)
        )
        path = self.run.run.at(FILTER_FOLDER, f"{stem}.yaml")
        with self._lock:
            if self.run.run.exists(path):
                raise _Taken(f"{FILTER_FOLDER}/{stem}.yaml is there already; choose another name")
            self.run.run.write_text(path, text)
        return {"file": f"{FILTER_FOLDER}/{stem}.yaml", "set": overrides, "command": command}

    def upload(self, request: "Request", body: bytes) -> Any:
        """Takes a picture to search with; it stays in memory, and its URL dies with the server."""
        if self.embeddings is None or self.embedder is None:
            raise InputError("search by an own picture needs the matcher, which is not loaded")
        picture = pictures.shrink(body, 768, pictures.LARGEST_UPLOAD_PX)
        if picture is None:
            raise InputError(
                "that is not a picture that can be read (JPEG, PNG, WebP, GIF, BMP; at most "
                f"{pictures.LARGEST_UPLOAD_PX / 1e6:.0f} megapixels)"
            )
        vector = np.asarray(self.embedder.picture(picture), np.float32)
        name = secrets.token_urlsafe(9)
        with self._lock:
            self._uploads[name] = vector
            while len(self._uploads) > 50:
                self._uploads.popitem(last=False)
        return {"near_upload": name}

    def _similar(self, params: Mapping[str, str]) -> tuple[list[tuple[int, float]] | None, bool]:
        """The pairs nearest to what `near_text`, `near_upload` or `near` (an id) names."""
        asked = [name for name in ("near", "near_text", "near_upload") if params.get(name)]
        if not asked:
            return None, False
        if self.embeddings is None:
            raise InputError(MISSING)
        find = params.get("find", "image")
        if find not in KINDS:
            raise InputError(f"find is {find[:80]!r}, expected one of {', '.join(KINDS)}")
        without = None
        if params.get("near"):
            name = params["near"]
            kind = "text" if "/" in name else "image"
            vector = self.embeddings.vector(name, kind)
            if vector is None:
                raise InputError(f"{name[:200]!r} has no embedding in this run")
            without = name if kind == find else None
        elif params.get("near_upload"):
            with self._lock:
                vector = self._uploads.get(params["near_upload"])
            if vector is None:
                raise InputError("the uploaded picture is gone; upload it again")
        else:
            if self.embedder is None:
                raise InputError("search by a text of your own needs the matcher, not loaded here")
            vector = np.asarray(self.embedder.text(params["near_text"][:1000]), np.float32)
        best = self.embeddings.top(vector, find, 500, without)
        return self.run.numbers_of(find, best), find == "image"

    def _thresholds(self, params: Mapping[str, str]) -> Thresholds:
        return filters.parse_thresholds(params, self.run.thresholds())

    def _filter(self, thresholds: Thresholds) -> dict[str, Any]:
        # the run's own rules, where they are no thresholds, give way to what was tried
        off: dict[str, Any] = {
            name: False if name == "synthetic_only_where_web_dropped" else None
            for name in self.run.other_rules()
        }
        if "calibration" in off:
            off["rank_by"] = "itm"  # whatever it was, `probability` needs a calibration
        off |= dict.fromkeys(self.run.synthetic_thresholds())
        section = {"itm_threshold": thresholds.itm, "itc_threshold": thresholds.itc, **off}
        if thresholds.synthetic is not None:
            # off is not null there, which would take the web texts' threshold
            itm, itc = thresholds.synthetic
            section["synthetic_itm_threshold"] = 0.0 if itm is None else itm
            section["synthetic_itc_threshold"] = -1.0 if itc is None else itc
        try:
            Filter.model_validate(section)
        except ValidationError as error:
            problems = "; ".join(
                f"filter.{problem['loc'][0]}: {problem['msg']}" for problem in error.errors()
            )
            raise InputError(problems) from None
        return section

    def _reviewer(self, params: Mapping[str, Any]) -> str:
        given = params.get("reviewer")
        return check_reviewer(given) if given else self.reviewer

    def _may_write(self) -> None:
        if self.read_only:
            raise _Forbidden("inspect was started read-only: nothing is written")


class _NotFound(InputError):
    """No such thing in the run."""


class _Forbidden(InputError):
    """Not allowed here."""


class _Taken(InputError):
    """Something else is there by now."""


def _json(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the request is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError("the request is not a JSON object")
    return values


def _overrides(section: Mapping[str, Any]) -> list[str]:
    return [
        f"filter.{name}={'null' if value is None else repr(value)}"
        for name, value in section.items()
    ]


def create_app(page: Page, access: Access = Access()) -> "Starlette":
    """The ASGI app of one run.

    Args:
        page: its endpoints.
        access: who may ask.

    Raises:
        MissingExtraError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.middleware import Middleware
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError:
        raise MissingExtraError(
            'the review page needs duckdb, Starlette and uvicorn: pip install "capfilt[inspect]"'
        ) from None

    def answer(value: Any, status: int = 200) -> Response:
        if isinstance(value, Response):
            return value
        headers = {"cache-control": "no-store"}
        return Response(queries.dumps(value), status, headers, media_type="application/json")

    def guarded(call: Callable[..., Any]) -> Callable[..., Response]:
        def run(*args: Any) -> Response:
            try:
                return answer(call(*args))
            except _NotFound as error:
                return answer({"error": str(error)}, 404)
            except _Forbidden as error:
                return answer({"error": str(error)}, 403)
            except _Taken as error:
                return answer({"error": str(error)}, 409)
            except CapfiltError as error:
                return answer({"error": str(error)}, 400)
            except Exception:
                log.exception("a request failed")
                return answer({"error": "the server failed; its log says how"}, 500)

        return run

    def get(path: str, call: Callable[..., Any]) -> Route:
        run = guarded(call)

        async def endpoint(request: "Request") -> Response:
            return await run_in_threadpool(run, request)

        return Route(path, endpoint, methods=["GET"])

    def post(path: str, call: Callable[..., Any], largest: int = 1 << 20) -> Route:
        run = guarded(call)

        async def endpoint(request: "Request") -> Response:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > largest:
                    return answer({"error": f"more than {largest >> 20} MiB"}, 413)
            return await run_in_threadpool(run, request, bytes(body))

        return Route(path, endpoint, methods=["POST"])

    def static(path: str) -> Route:
        name, kind = STATIC[path]
        data = (resources.files("capfilt.inspect") / "static" / name).read_bytes()

        async def endpoint(request: "Request") -> Response:
            return Response(data, headers={"content-type": kind, "cache-control": "no-cache"})

        return Route(path, endpoint, methods=["GET"])

    return Starlette(
        routes=[
            *[static(path) for path in STATIC],
            get("/api/summary", page.summary),
            get("/api/pairs", page.pairs),
            get("/api/pair/{pair_id:path}", page.pair),
            get("/api/image/{key:path}", page.image),
            get("/api/histogram", page.histogram),
            get("/api/threshold", page.threshold),
            get("/api/labels", page.export_labels),
            post("/api/labels", page.add_label),
            post("/api/labels/import", page.import_labels, LARGEST_BODY),
            post("/api/decision", page.save_decision),
            post("/api/search/picture", page.upload, LARGEST_UPLOAD),
        ],
        middleware=[Middleware(Guard, access=access)],
    )


def open_page(
    run_dir: str,
    *,
    read_only: bool = False,
    reviewer: str | None = None,
    embedder: Embedder | None = None,
) -> Page:
    """Opens a run for the page.

    Raises:
        InputError: there is no run to review, or the reviewer's name is none.
        MissingExtraError: duckdb is not installed.
    """
    name = check_reviewer(reviewer if reviewer is not None else _login())
    run = queries.open_run(run_dir, may_write=not read_only)
    return Page(run, name, read_only, open_embeddings(run.run), embedder)


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # no name for the user id, as in containers
        return "reviewer"


def serve(
    run_dir: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    origin: str | None = None,
    read_only: bool = False,
    reviewer: str | None = None,
    open_browser: bool = True,
    embedder: Embedder | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves the review page of a run until it is interrupted.

    Args:
        run_dir: the run folder.
        host: address to listen on; another than loopback needs a token.
        port: to listen on; 0 is 8765, or a free one where that is taken.
        token: what a browser must bring once, in the URL.
        origin: scheme and host that browsers ask, where a proxy stands before this; needs a token.
        read_only: write nothing: no labels, no decisions, no index beside the run.
        reviewer: name for the labels; the login name by default.
        open_browser: open the page in the user's browser.
        embedder: the matcher, for search by own texts and pictures.
        on_ready: called with the URL as soon as the page answers.

    Raises:
        UsageError: the address needs a token, or can't be listened on.
        InputError: there is no run to review.
        MissingExtraError: the extra `[inspect]` is not installed.
    """
    try:
        import uvicorn
    except ImportError:
        raise MissingExtraError(
            'the review page needs duckdb, Starlette and uvicorn: pip install "capfilt[inspect]"'
        ) from None
    if not is_loopback(host) and not token:
        raise UsageError(
            f"--host {host} can be reached from other machines: give --token too "
            "(any secret; it goes into the URL once), or leave --host out"
        )
    if origin is not None:
        origin = checked_origin(origin)
        if not token:
            raise UsageError(
                f"--origin {origin} can be reached from other machines: give --token too "
                "(any secret; it goes into the URL once), or leave --origin out"
            )
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{8,200}", token):
        raise UsageError("--token: expected at least 8 letters, digits and . _ ~ -")
    page = open_page(run_dir, read_only=read_only, reviewer=reviewer, embedder=embedder)
    try:
        listener = _listen(host, port)
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        url = f"{origin or f'http://{shown}:{listener.getsockname()[1]}'}/"
        if token is not None:
            url += f"?token={token}"
        config = uvicorn.Config(
            create_app(page, Access(host, token, origin)),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=200,
        )
        threading.Thread(target=page.warm_up, daemon=True).start()
        if on_ready is not None:
            on_ready(url)
        if open_browser:
            threading.Timer(0.3, webbrowser.open, [url]).start()
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(config).run(sockets=[listener])
    finally:
        page.run.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in (port,) if port else (DEFAULT_PORT, 0):
        listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if number == 0 or port:
                raise UsageError(f"can't listen on {host}:{number} ({error})") from None
            continue
        return listener
    raise UsageError(f"can't listen on {host}")  # pragma: no cover
