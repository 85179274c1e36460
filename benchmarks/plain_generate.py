"""The peer of serving: the plain `generate` of `transformers`, one request at a time, over HTTP."""

import sys
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import MixtralForCausalLM


class Body(BaseModel):
    """What the benchmark's clients send."""

    model: str
    prompt: list[int]
    max_tokens: int
    temperature: float
    deadline_s: float | None = None


def serve(folder: Path, port: int) -> None:
    """Serve the checkpoint in a folder on this port of loopback, until SIGTERM."""
    torch.set_num_threads(1)
    model: Any = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    app, turn = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/completions")
    def complete(body: Body) -> dict[str, Any]:
        with turn, torch.inference_mode():
            tokens = model.generate(
                input_ids=torch.tensor([body.prompt]),
                attention_mask=torch.ones(1, len(body.prompt), dtype=torch.long),
                max_new_tokens=body.max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        made = tokens[0, len(body.prompt) :].tolist()
        return {"choices": [{"tokens": made}], "usage": {"completion_tokens": len(made)}}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
