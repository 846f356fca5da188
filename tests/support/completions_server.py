"""A server of the tests' own with the part of an OpenAI-compatible endpoint that the client uses, and real adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from peft import PeftModel

from tests.support.tiny_llm import llama


@contextmanager
def serving(folder: Path, names: list[str], key: str | None = None) -> Iterator[str]:
    """The URL of a server of `tiny_llm.llama` with the adapters in sub-folders of these names; one thread at a time."""
    model = PeftModel.from_pretrained(llama(), folder / names[0], adapter_name=names[0]).eval()
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if key is not None and self.headers["Authorization"] != f"Bearer {key}":
                self.reply(401, {"error": "no such key"})
            elif self.path != "/v1/completions" or request["model"] not in names:
                self.reply(404, {"error": f"no model {request['model']}"})
            else:
                with lock:
                    self.reply(200, complete(model, request))

        def reply(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def complete(model: PeftModel, request: dict[str, Any]) -> dict[str, Any]:
    """One greedy token after each prompt, with the log-probabilities of all tokens if they are echoed."""
    model.set_adapter(request["model"])
    choices = []
    for index, prompt in enumerate(request["prompt"]):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        new = int(log_p[-1].argmax())
        of_prompt = log_p[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        tokens = [None, *of_prompt] if request["echo"] else []
        choices.append({"index": index, "text": "", "logprobs": {"token_logprobs": [*tokens, float(log_p[-1, new])]}})
    return {"object": "text_completion", "model": request["model"], "choices": choices[::-1]}  # in any order
