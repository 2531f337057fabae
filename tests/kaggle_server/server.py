"""The HTTP side: the requests that kaggle 2.2 sends where KAGGLE_API_ENVIRONMENT is LOCALHOST.

It calls http://localhost through the proxy in HTTP_PROXY, and this server is that proxy: no port 80, no root.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from kaggle_server.account import Account, RequestError, Version

PAGE = 20


class KaggleServer:
    """Serves an account on a port of 127.0.0.1 while its context lasts; leaving it ends all sessions."""

    def __init__(self, root: Path, **account: Any) -> None:
        self.account = Account(root, **account)
        self.requests: list[tuple[str, dict[str, Any]]] = []
        """(name, content) of every request."""
        server = self

        class Handler(_Handler):
            kaggle = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, home: Path | None = None) -> dict[str, str]:
        """The environment in which the kaggle CLI talks to this server and to nothing else."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("KAGGLE_") and name.lower() not in ("http_proxy", "no_proxy", "all_proxy")
        }
        home = home or self.account.root / "home"
        home.mkdir(parents=True, exist_ok=True)
        credentials = {"KAGGLE_USERNAME": self.account.user, "KAGGLE_KEY": self.account.key}
        proxy = {"HTTP_PROXY": self.address, "http_proxy": self.address}
        return {**kept, **proxy, **credentials, "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "HOME": str(home)}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        for version in self.account.running():
            version.session.kill()
            version.session.wait(600)


class _Handler(BaseHTTPRequestHandler):
    kaggle: KaggleServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        request = json.loads(self._body() or b"{}")
        service, _, method = self._path().removeprefix("/api/v1/").partition("/")
        self.kaggle.requests.append((method, request))
        try:
            self._authorize()
            self._answer(self._call(method, request, service))
        except RequestError as error:
            self._answer({"code": error.code, "message": str(error)}, error.code)

    def do_GET(self) -> None:
        kind, _, rest = self._path().lstrip("/").partition("/")
        try:
            if kind == "output":
                owner, slug, number, name = rest.split("/", 3)
                version = self.kaggle.account.version(f"{owner}/{slug}/{number}")
                self._send(200, version.session.outputs()[unquote(name)].read_bytes(), "application/octet-stream")
            elif rest.startswith("v1/kernels/logs/stream/"):
                self._authorize()
                self._stream(self.kaggle.account.version(rest.removeprefix("v1/kernels/logs/stream/")))
            else:
                raise RequestError(404, f"the stand-in has no {self.path}")
        except RequestError as error:
            self._answer({"code": error.code, "message": str(error)}, error.code)

    def do_PUT(self) -> None:
        try:
            self.kaggle.account.finish_upload(self._path().rpartition("/")[2], self._body())
            self._answer({})
        except RequestError as error:
            self._answer({"code": error.code, "message": str(error)}, error.code)

    def _call(self, method: str, request: dict[str, Any], service: str) -> dict[str, Any]:
        account = self.kaggle.account
        kernel = f"{request.get('userName')}/{request.get('kernelSlug')}"
        if label := request.get("versionLabel"):
            kernel += f"/{label.removeprefix('v')}"
        dataset = f"{request.get('ownerSlug')}/{request.get('datasetSlug') or request.get('slug')}"
        match method:
            case "SaveKernel":
                return account.save_kernel(request)
            case "GetAcceleratorQuotaStatistics":
                hours = account.quota_hours or [30.0]
                left = hours.pop(0) if len(hours) > 1 else hours[0]
                gpu = {"timeUsed": f"{int(3600 * (30 - left))}s", "totalTimeAllowed": "108000s"}
                return {"quotaRefreshTime": "2026-12-05T00:00:00Z", "gpuQuota": gpu}
            case "GetKernelSessionStatus":
                session = account.version(kernel).session
                return {"status": session.state, "failureMessage": session.message}
            case "ListKernelSessionOutput":
                return self._outputs(account.version(kernel), request)
            case "GetKernel":
                version = account.version(kernel)
                blob = {"source": version.request["text"], "language": "python", "kernelType": "notebook"}
                return {"metadata": {"ref": kernel}, "blob": {**blob, "slug": request["kernelSlug"]}}
            case "GetDatasetStatus":
                if dataset not in account.datasets:
                    raise RequestError(403, "Permission 'datasets.get' was denied")
                return {"status": "READY"}
            case "StartBlobUpload":
                token = account.start_upload(request["name"])
                return {"token": token, "createUrl": f"{self.kaggle.address}/upload/{token}"}
            case "CreateDataset":
                return account.save_dataset(dataset, request["title"], request["files"], new=True)
            case "CreateDatasetVersion":
                return account.save_dataset(dataset, "", request["body"]["files"], new=False)
        raise RequestError(404, f"the stand-in has no {service}/{method}")

    def _outputs(self, version: Version, request: dict[str, Any]) -> dict[str, Any]:
        names = list(version.session.outputs())
        kernel = f"{request['userName']}/{request['kernelSlug']}"
        start, size = int(request.get("pageToken") or 0), int(request.get("pageSize") or PAGE)
        files = [
            {"fileName": name, "url": f"{self.kaggle.address}/output/{kernel}/{version.number}/{quote(name)}"}
            for name in names[start : start + size]
        ]
        ended = version.session.state != "RUNNING"
        following = str(start + size) if start + size < len(names) else ""
        return {"files": files, "log": version.session.log_text() if ended else "", "nextPageToken": following}

    def _stream(self, version: Version) -> None:
        """The log: events as they come where it runs, all at once where it has ended."""
        session = version.session
        if session.state != "RUNNING":
            self._send(200, session.log_text().encode(), "application/json")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                with session.written:
                    session.written.wait_for(
                        lambda sent=sent: len(session.log) > sent or session.state != "RUNNING", 0.5
                    )
                    events, over = session.log[sent:], session.state != "RUNNING"
                for event in events:
                    self._chunk(f"data: {json.dumps(event)}\n\n")
                sent += len(events)
                if over and sent == len(session.log):
                    self._chunk("data: END_OF_LOG\n\n")
                    return self._chunk("")

    # HTTP
    def _path(self) -> str:
        return urlsplit(self.path).path  # a proxy is asked for the whole address

    def _authorize(self) -> None:
        account = self.kaggle.account
        expected = base64.b64encode(f"{account.user}:{account.key}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            raise RequestError(401, "Unauthenticated")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: dict[str, Any], code: int = 200) -> None:
        self._send(code, json.dumps(content).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()
