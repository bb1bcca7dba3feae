"""A server that speaks OpenAI's completions and can fail in every way: ``python stub_server.py PORT MODEL [FAULT]...``.

Its "model" is a hash: the same text has the same log probabilities in every process.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import socketserver
import sys
import threading
import time

PORT, MODEL, FAULTS = int(sys.argv[1]), sys.argv[2], dict(fault.partition("=")[::2] for fault in sys.argv[3:])
asked = 0
lock = threading.Lock()


def logprob(text: str, place: int) -> float:
    value = hashlib.sha256(f"{text[:place]}".encode()).digest()[0] / 64
    if "shifted" in FAULTS:
        value += float(FAULTS["shifted"])
    if "rare" in FAULTS and place % 40 == 7:  # a few tokens only, as two exchanged experts among many
        value += float(FAULTS["rare"])
    return -value


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/health":
            self.answer(503 if "unready" in FAULTS else 200, {})
        else:
            self.answer(200, {"data": [{"id": FAULTS.get("serves", MODEL)}]})

    def do_POST(self):
        global asked
        with lock:
            asked += 1
            number = asked
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if number > int(FAULTS.get("dies_after", 1 << 30)):
            os._exit(7)
        if number > int(FAULTS.get("fatal_after", 1 << 30)):
            print("torch.OutOfMemoryError: HIP out of memory. Tried to allocate 2 GiB", flush=True)
            time.sleep(60)
        if number > int(FAULTS.get("hangs_after", 1 << 30)):
            time.sleep(600)
        if "fails_every" in FAULTS and body.get("stream") and number % int(FAULTS["fails_every"]) == 0:
            self.answer(500, {"error": "no memory left for this request"})
        elif body.get("stream"):
            self.stream(body)
        else:
            self.complete(body)

    def complete(self, body):
        text, count = body["prompt"], body["max_tokens"]
        new = [chr(97 + (len(text) + place) % 26) for place in range(count)]
        tokens = [*(list(text) if body.get("echo") else []), *new]
        values = [logprob(text, place) for place in range(len(tokens))]
        if body.get("echo"):
            values[0] = None
        if "nan" in FAULTS and len(values) > 3:
            values[2] = float("nan")
        logprobs = None if "silent" in FAULTS else {"tokens": tokens, "token_logprobs": values}
        self.answer(200, {"choices": [{"text": "".join(new), "logprobs": logprobs}]})

    def stream(self, body):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        count = body["max_tokens"]
        for _ in range(count):
            time.sleep(float(FAULTS.get("step", 0.001)))
            self.wfile.write(b"data: " + json.dumps({"choices": [{"text": "a"}]}).encode() + b"\n\n")
        usage = {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}}
        self.wfile.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        self.close_connection = True


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64


if __name__ == "__main__":
    print("stub starts", flush=True)
    if "says" in FAULTS:
        print(FAULTS["says"], flush=True)
    if "dies" in FAULTS:
        sys.exit("ValueError: no such model")
    if "worker" in FAULTS:  # a worker with a session of its own, which SIGTERM does not end
        import signal
        import subprocess

        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        print(f"worker {worker.pid}", flush=True)
        if FAULTS["worker"] == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Server(("127.0.0.1", PORT), Handler).serve_forever()
