"""An answer piece by piece, as server-sent events: what `serve.py` sends while the model still writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from transformers import TextIteratorStreamer

from mend_hf import DistilledDemonstrations, MendModel


def stream_answer(model: MendModel, query: str, demonstrations: DistilledDemonstrations) -> Iterator[str]:
    """Return the pieces of an answer as events, and the whole answer as the last one, called `answer`.

    Waits for the first piece, so what is refused is refused before anything has been sent.

    Args:
        model: Writes in a thread of its own.
        query: What is asked.
        demonstrations: Of one task.

    Raises:
        MendError: What `model.answer` raises.
    """
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    writer = ThreadPoolExecutor(1)
    answers = writer.submit(model.answer, [query], demonstrations, streamer=streamer)
    writer.shutdown(wait=False)
    answers.add_done_callback(lambda _: streamer.end())  # also after an error, or the reader would wait for ever
    first = next(streamer, "")
    if answers.done():
        answers.result()

    def send() -> Iterator[str]:
        for piece in filter(None, chain([first], streamer)):  # a part of a word is an empty piece
            yield f"data: {json.dumps(piece)}\n\n"
        yield f"event: answer\ndata: {json.dumps(answers.result()[0])}\n\n"

    return send()
