"""Serve many tasks from one model: demonstrations are posted once, queries name them by id.

    python examples/serve.py [--folder outputs/served] [--port 8000] [--from-hub] [--tiny]

The folder keeps what was distilled, so ids stay good after a restart. http://127.0.0.1:8000/docs shows all requests.
"""

from __future__ import annotations

import argparse
from typing import Annotated
from uuid import uuid4

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from model_options import add_model_options, load_model
from pydantic import BaseModel, Field
from streaming import stream_answer

from mend_hf import DemonstrationStore, DistilledDemonstrations, MendModel
from mend_hf.errors import MendError
from mend_hf.scoring import score_options


class Task(BaseModel, extra="forbid"):
    """Demonstrations as (input, output) pairs."""

    demonstrations: list[tuple[str, str]] = Field(examples=[[["great film", "positive"], ["a bore", "negative"]]])


class Queries(BaseModel, extra="forbid"):
    """Queries of one task; without options the answers are written, with options the likeliest is chosen."""

    id: str
    queries: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, examples=[["moving and funny"]])
    options: list[str] | None = Field(None, min_length=1, examples=[["positive", "negative"]])


def create_app(model: MendModel, store: DemonstrationStore) -> FastAPI:
    """Return the service. Every request runs in a thread of its own; all threads share the model and the store."""
    app = FastAPI(title="mend_hf")
    app.get("/", include_in_schema=False)(lambda: RedirectResponse("/docs"))
    app.add_exception_handler(MendError, lambda _, error: JSONResponse({"detail": str(error)}, status_code=422))

    def find(name: str) -> DistilledDemonstrations:
        if name in store:
            return store[name]
        raise HTTPException(404, f"Expected a posted id or a name in the folder, got {name!r}: POST /demonstrations.")

    @app.post("/demonstrations")
    def distill(task: Task) -> dict[str, str | int]:
        distilled, name = model.distill(task.demonstrations), uuid4().hex
        store.add(name, distilled)
        return {"id": name, "slots": distilled.num_slots, "tokens_read": distilled.provenance.num_tokens[0]}

    @app.post("/queries")
    def answer(asked: Queries) -> dict[str, list[str]]:
        distilled, options = find(asked.id), asked.options
        if options is None:
            return {"answers": model.answer(asked.queries, distilled)}
        rows = score_options(model, asked.queries, [options] * len(asked.queries), distilled.prefix)
        return {"answers": [options[scores.index(max(scores))] for scores in rows]}

    @app.get("/stream")
    def stream(id: str, query: Annotated[str, Field(min_length=1)]) -> StreamingResponse:
        return StreamingResponse(stream_answer(model, query, find(id)), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="outputs/served", help="where the distilled demonstrations are kept")
    parser.add_argument("--port", type=int, default=8000, help="on this machine")
    add_model_options(parser)
    args = parser.parse_args()
    uvicorn.Config("", port=args.port, log_level="error").bind_socket().close()  # is it free? Loading takes a while
    uvicorn.run(create_app(load_model(args), DemonstrationStore(args.folder)), port=args.port)
