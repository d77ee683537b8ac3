"""A hub on this machine: its repositories are directories OWNER/NAME of one place."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve_hub(place: Path, gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Within, serve the repositories of `place`. Yields the hub's address, and the paths of files that were fetched.

    Repositories in `gated` are refused, as the hub refuses one whose licence nobody accepted.
    """
    fetched = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            about, *parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            about, parts = (about, parts[1:]) if about == "api" else ("", [about, *parts])
            repository = place / "/".join(parts[:2])
            if not repository.is_dir():
                return self.answer(404, X_Error_Code="RepoNotFound")
            if "/".join(parts[:2]) in gated:
                return self.answer(403, X_Error_Code="GatedRepo")
            files = sorted(file for file in repository.rglob("*") if file.is_file())
            entries = [{"type": "file", "oid": "0" * 40, "size": file.stat().st_size,
                        "path": str(file.relative_to(repository))} for file in files]
            if about:
                siblings = [{"rfilename": entry["path"]} for entry in entries]
                model = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(entries if "tree" in parts else model).encode())
            file = repository / "/".join(parts[4:])                # OWNER/NAME/resolve/REVISION/FILE
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            if self.command == "GET":
                fetched.append("/".join(parts[4:]))
            body = file.read_bytes()
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
