"""A server for the tests of launching: sglang's flags, readiness and information, no model.

`--stub` says what goes wrong: `die` at the start, `slow` (never ready), `die-again` and `slow-again` at each start but
the first (which leaves the file --marker), `port-once` (at the first start, as if the port had been taken), `foreign`
(the first answers as another server would). With --workers URL ... it answers as a router in front of them does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model-path", "--dtype", "--weight-version", "--host", "--random-seed", "--config", "--marker"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--stub", default="")
    parser.add_argument("--dp-size", type=int, default=1)
    parser.add_argument("--workers", nargs="*")
    args = parser.parse_args()
    key = json.loads(Path(args.config).read_text().partition(": ")[2]) if args.config else None
    print(f"server_args={args} api_key={key!r} environment={json.dumps(dict(os.environ))}")
    marked = args.marker is not None and Path(args.marker).exists()
    if args.marker is not None:
        Path(args.marker).touch()
    if args.stub == "die" or (args.stub == "die-again" and marked):
        raise RuntimeError("no memory left for the stub")
    if args.stub == "port-once" and not marked:
        sys.exit(f"ERROR: [Errno 98] error while attempting to bind on port {args.port}: address already in use")
    if args.stub == "slow-again" and marked:
        args.stub = "slow"
    if args.stub == "foreign" and not marked:
        args.weight_version = "another"
    ThreadingHTTPServer((args.host, args.port), _handler(args, key)).serve_forever()


def _handler(args: argparse.Namespace, key: str | None) -> type[BaseHTTPRequestHandler]:
    model = {"weight_version": args.weight_version, "is_generation": True}
    server = {"version": "0.5.23", "tp_size": 1, "dp_size": args.dp_size, "device": "cpu", "dtype": args.dtype}
    answers: dict[str, Any] = {"/health": None, "/model_info": model, "/server_info": server}
    if args.workers:
        answers["/workers"] = {"workers": [{"url": url, "is_healthy": True} for url in args.workers], "total": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = 200 if self.path in answers else 404
            if self.path == "/health" and args.stub == "slow":
                status = 503
            if self.path != "/health" and key is not None and self.headers["Authorization"] != f"Bearer {key}":
                status = 401
            body = json.dumps(answers[self.path]).encode() if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *values: object) -> None:
            """The log is what the test reads."""

    return Handler


if __name__ == "__main__":
    main()
