"""A server that answers as much of W&B's protocol as one run and its tags need; it can refuse, and fall silent."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server:
    """One at an address of its own, which refuses until `answer` is called."""

    def __init__(self) -> None:
        self.tags: list[str] = []
        self.asked: list[str] = []
        """The beginnings of what it was asked."""
        self.silent = threading.Event()
        """Set: it takes requests and never answers."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]

    @property
    def environment(self) -> dict[str, str]:
        """What sends W&B here."""
        return {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": f"http://127.0.0.1:{self.port}"}

    def listen(self) -> None:
        """Take requests from now on."""
        answered = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if answered.silent.is_set():
                    threading.Event().wait()
                self._send(answered.reply(json.loads(body)) if self.path.startswith("/graphql") else {})

            def _send(self, data: dict[str, Any]) -> None:
                text = json.dumps({"data": data}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """The data that answers a query."""
        query, values = request["query"], request.get("variables") or {}
        self.asked.append(" ".join(query.split())[:40])
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "UnVuOjE=", "uploadHeaders": [], "files": []}}
        if "psertBucket" in query:
            if values.get("tags") is not None:
                self.tags = values["tags"]
            return {"upsertBucket": {"bucket": self._run(values), "inserted": True}}
        if "run(name" in query:
            return {"project": {"id": "p", "internalId": "1", "run": self._run(values)}}
        return {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _run(self, values: dict[str, Any]) -> dict[str, Any]:
        owner = {"id": "p", "name": values.get("project"), "entity": {"id": "e", "name": "me"}}
        plain = dict.fromkeys(
            ["description", "group", "jobType", "commit", "notes", "sweepName", "historyLineCount", "historyKeys"]
        )
        times = dict.fromkeys(["createdAt", "heartbeatAt"], "2026-01-01T00:00:00")
        texts = {"config": "{}", "summaryMetrics": "{}", "systemMetrics": "{}", "state": "running", "displayName": "x"}
        named = {"id": "UnVuOjE=", "name": values.get("name"), "project": owner, "projectId": 1, "tags": self.tags}
        return {**plain, **times, **texts, **named, "readOnly": False, "user": {"name": "me", "username": "me"}}
