"""A chat server on loopback that speaks OpenAI's API, answers by a function of the question, and fails on demand."""

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NOTE = "\n\nAn earlier answer"  # starts what a client adds to a prompt that it asks again


class ChatServer:
    """`answer(question)` gives the text of an answer; `fault(question, number)` what goes wrong at the number-th
    request for the same question, counted from 0, or None.

    A question is a dict: `prompt`, as first asked; `images`, bytes; `key`, a whole number made of both; `body`.
    Faults: a status (int), `(status, headers)`, `"slow"`, `"no json"` (body), `"cut body"`, `"wrong shape"`,
    `"at the limit"`, `{"content": content}` in place of the answer, or a function that is called with the request's
    handler and answers itself.
    """

    def __init__(self, answer, fault=lambda question, number: None):
        self.answer, self.fault = answer, fault
        self.questions, self.headers, self.times_asked = [], [], Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text").partition(NOTE)[0]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
        digest = hashlib.sha256(text.encode() + b"".join(images)).digest()
        question = {"prompt": text, "images": images, "key": int.from_bytes(digest[:6], "big"), "body": body}
        with self._lock:
            number = self.times_asked[question["key"]]
            self.times_asked[question["key"]] += 1
            self.questions.append(question)
            self.headers.append({**handler.headers, "path": handler.path})
        fault = self.fault(question, number)
        if callable(fault):
            handler.close_connection = True
            fault(handler)
            return
        status, headers, reason = 200, {}, "stop"
        if isinstance(fault, dict):
            content = fault["content"]
        else:
            content = self.answer(question)
        if fault == "slow":
            self.closing.wait(30)
            return
        if isinstance(fault, (int, tuple)):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            data = json.dumps({"error": {"message": f"status {status} on demand"}}).encode()
        else:
            if fault == "at the limit":
                content, reason = content[: len(content) // 2], "length"
            choices = [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": reason}]
            data = json.dumps({"choices": [] if fault == "wrong shape" else choices}).encode()
        if fault == "no json":
            data = data[: len(data) // 2]
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data) + 100 * (fault == "cut body")))
        handler.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
        if fault == "cut body":
            handler.close_connection = True


@contextmanager
def serving(answer, fault=lambda question, number: None):
    """A running [`ChatServer`] with its `url`, up to and with `/v1`."""
    chat = ChatServer(answer, fault)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            try:
                chat.handle(self)
            except (BrokenPipeError, ConnectionResetError):
                pass  # a client that did not wait

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        chat.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
