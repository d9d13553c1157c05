"""Prompts for vLLM: what the bare base model takes in place of tokens, and the requests that carry it."""

from __future__ import annotations

import base64
import copy
import io
import json
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from test_chat import TEMPLATES, chat_tokenizer
from tiny import load_tiny
from tiny_models import build_tiny_model, ids_of, wrap_tiny_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from vllm_export import ask
from weights import NAME

from mend_hf import DistilledDemonstrations, MendConfig, MendModel, get_mend_model
from mend_hf.errors import CheckpointError, ConfigError, DataError, MendError, ShapeError, UnsupportedModelError
from mend_hf.integrations.vllm import make_completion_request, make_prompt_embeds

EXAMPLE = Path(__file__).parents[1] / "examples" / "vllm_export.py"
SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
QUERY = "moving and funny"
FAMILIES = ["gpt2", "llama", "qwen3", "gemma2", "gemma3_text", "mamba"]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
pytestmark = pytest.mark.filterwarnings("ignore:A query of")


def wrap(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> MendModel:
    return wrap_tiny_model(base, tokenizer, **{"num_virtual_tokens": 4, "prefix_form": "embeds"} | settings)


@pytest.fixture(params=FAMILIES)
def pair(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> tuple[MendModel, PreTrainedModel]:
    """A wrapped base model, and the same base model that nothing was ever done to."""
    return wrap(tiny_model(request.param), tokenizer), tiny_model(request.param)


@pytest.fixture(scope="module")
def llama(tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> MendModel:
    return wrap(tiny_model("llama"), tokenizer)


@pytest.fixture(scope="module")
def embeds(llama: MendModel) -> Tensor:
    return make_prompt_embeds(llama, SHOTS, QUERY)


def decode(text: str) -> Tensor:
    """What vLLM makes of `prompt_embeds`."""
    return torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True, map_location="cpu")


def test_the_bare_base_model_gives_the_same_logits_from_the_embeds(pair: tuple[MendModel, PreTrainedModel]) -> None:
    model, bare = pair
    distilled = model.distill(SHOTS)
    query = model.tokenize(QUERY)
    embeds = make_prompt_embeds(model, distilled, QUERY)
    assert embeds.shape == (4 + query["input_ids"].shape[1], 32)
    with torch.no_grad():
        expected = model(**query, demonstrations=distilled).logits[0]
        logits = bare(inputs_embeds=embeds[None]).logits[0, 4:]
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_the_bare_base_model_writes_the_same_tokens_from_the_embeds(pair: tuple[MendModel, PreTrainedModel]) -> None:
    model, bare = pair
    distilled = model.distill(SHOTS)
    query = model.tokenize(QUERY)
    expected = model.generate(**query, demonstrations=distilled, **GREEDY)[0, query["input_ids"].shape[1] :]
    embeds = make_prompt_embeds(model, distilled, QUERY)[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    assert bare.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)[0].tolist() == expected.tolist()


def test_the_scale_of_gemma_is_in_the_embeds(
    tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = wrap(tiny_model("gemma3_text"), tokenizer)
    [ids] = model.tokenize(QUERY)["input_ids"]
    rows = model.base_model.get_input_embeddings().weight[ids]
    torch.testing.assert_close(make_prompt_embeds(model, SHOTS, QUERY)[4:], rows * 32**0.5)


def test_a_chat_goes_on_behind_the_vectors_and_is_not_opened_again() -> None:
    tokenizer = chat_tokenizer(TEMPLATES["llama3"])
    base = build_tiny_model("llama", **ids_of(tokenizer))
    model = wrap(copy.deepcopy(base), tokenizer, prompt_format="chat")
    embeds = make_prompt_embeds(model, SHOTS, QUERY)
    ids = torch.tensor(model.prompt.encode_query(QUERY))
    assert len(model.prompt.encode_query(QUERY, is_alone=True)) > len(ids)
    torch.testing.assert_close(embeds[4:], base.get_input_embeddings()(ids))


def test_raw_and_distilled_demonstrations_give_the_same_embeds(llama: MendModel, embeds: Tensor) -> None:
    batch = llama.distill([[("bad", "negative")], SHOTS])
    torch.testing.assert_close(make_prompt_embeds(llama, batch[1], QUERY), embeds)


def test_saved_vectors_need_no_distiller_that_makes_vectors(
    tiny_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    llama: MendModel,
    embeds: Tensor,
    tmp_path: Path,
) -> None:
    llama.distill(SHOTS).save_pretrained(tmp_path)
    client = get_mend_model(tiny_model("llama"), MendConfig(), tokenizer)
    made = make_prompt_embeds(client, DistilledDemonstrations.from_pretrained(tmp_path), QUERY)
    assert client.mend_config.prefix_form == "kv"
    assert torch.equal(made, embeds)


def test_the_vectors_of_several_chunks_all_stand_in_front(llama: MendModel, embeds: Tensor) -> None:
    joined = llama.distill(SHOTS[:2]).join(llama.distill(SHOTS[2:]))
    made = make_prompt_embeds(llama, joined, QUERY)
    torch.testing.assert_close(made[:8], joined.vectors[0])
    torch.testing.assert_close(made[8:], embeds[4:])


def test_the_embeds_are_in_the_type_of_the_base_model(
    tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, llama: MendModel
) -> None:
    model = wrap(tiny_model("llama").to(torch.bfloat16), tokenizer)
    made = make_prompt_embeds(model, llama.distill(SHOTS), QUERY)
    assert (made.dtype, made.requires_grad) == (torch.bfloat16, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_request_carries_the_tensor_bit_for_bit(embeds: Tensor, dtype: torch.dtype) -> None:
    sent = decode(make_completion_request(embeds.to(dtype), "tiny")["prompt_embeds"])
    assert sent.dtype == dtype
    assert torch.equal(sent, embeds.to(dtype))


def test_a_slice_is_sent_without_what_it_was_cut_from(embeds: Tensor) -> None:
    many = embeds.expand(1000, *embeds.shape).contiguous()
    [one, other] = [make_completion_request(rows, "tiny")["prompt_embeds"] for rows in (many[7], embeds)]
    assert len(one) == len(other)


def test_the_request_has_the_fields_of_the_endpoint_and_survives_json(embeds: Tensor) -> None:
    request = make_completion_request(embeds, "tiny", max_tokens=5, stop="\n\n", temperature=0.5, seed=3)
    assert json.loads(json.dumps(request)) == request
    assert {key: value for key, value in request.items() if key != "prompt_embeds"} == {
        "model": "tiny",
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["\n\n"],
        "seed": 3,
    }
    assert set(make_completion_request(embeds, "tiny")) == {"model", "prompt_embeds", "max_tokens", "temperature"}


def test_keys_and_values_are_refused_raw_and_distilled(
    tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, llama: MendModel
) -> None:
    model = wrap(tiny_model("llama"), tokenizer, prefix_form="kv")
    for side, demonstrations in ((model, SHOTS), (llama, model.distill(SHOTS))):
        with pytest.raises(ConfigError, match='train a distiller with prefix_form="embeds"'):
            make_prompt_embeds(side, demonstrations, QUERY)


def test_several_tasks_and_several_queries_are_refused(llama: MendModel) -> None:
    with pytest.raises(DataError, match=r"got 2: pick one with \[row\]"):
        make_prompt_embeds(llama, [SHOTS, SHOTS], QUERY)
    with pytest.raises(DataError, match="got list: make one prompt a query"):
        make_prompt_embeds(llama, SHOTS, [QUERY, QUERY])  # type: ignore[arg-type]


def test_what_was_distilled_for_another_base_model_is_refused(
    tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, llama: MendModel
) -> None:
    other = wrap(tiny_model("qwen3"), tokenizer)
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        make_prompt_embeds(llama, other.distill(SHOTS), QUERY)


def test_an_encoder_decoder_is_refused(
    tiny_encoder_decoder: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = wrap(tiny_encoder_decoder("t5"), tokenizer)
    with pytest.raises(UnsupportedModelError, match="use a decoder-only model"):
        make_prompt_embeds(model, SHOTS, QUERY)


@pytest.mark.parametrize(
    ("change", "fields", "error", "remedy"),
    [
        (lambda embeds: embeds[None], {}, ShapeError, "one request for each prompt"),
        (lambda embeds: embeds[:0], {}, ShapeError, "one request for each prompt"),
        (lambda embeds: embeds.double(), {}, ShapeError, r"convert it with \.to"),
        (lambda embeds: embeds.long(), {}, ShapeError, r"convert it with \.to"),
        (lambda embeds: embeds, {"prompt": QUERY, "echo": True}, ConfigError, "got echo, prompt: leave them out"),
    ],
)
def test_what_the_server_would_refuse_is_refused_before(
    change: Callable[[Tensor], Tensor], fields: dict[str, Any], error: type[MendError], remedy: str, embeds: Tensor
) -> None:
    with pytest.raises(error, match=remedy):
        make_completion_request(change(embeds), "tiny", **fields)


@contextmanager
def serve(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Serve a bare base model as vLLM does, as far as a request for one greedy completion goes; gives the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            embeds = decode(request["prompt_embeds"])
            is_right = self.path == "/v1/completions" and request["temperature"] == 0
            if not is_right or embeds.shape[1:] != (base.config.hidden_size,) or embeds.dtype != base.dtype:
                self.send_error(400)
                return
            text = complete(base, tokenizer, embeds, request["max_tokens"], request.get("stop", []))
            body = json.dumps({"model": request["model"], "choices": [{"index": 0, "text": text}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Leave the terminal to pytest."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def complete(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embeds: Tensor, max_tokens: int, stop: list[str]
) -> str:
    mask = torch.ones(1, len(embeds), dtype=torch.long)
    [ids] = base.generate(
        inputs_embeds=embeds[None], attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for mark in stop:
        text = text.partition(mark)[0]
    return text


def run_example(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, "--tiny", "--output-dir", str(folder), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_server_of_the_bare_model_answers_as_the_wrapped_model_does(
    tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, llama: MendModel
) -> None:
    distilled, queries = llama.distill(SHOTS), [QUERY, "bad", "the film was good and the food was bad"]
    expected = llama.answer(queries, distilled, max_new_tokens=8)
    assert len({*expected, *llama.answer(queries, max_new_tokens=8)}) == 6
    prompts = [make_prompt_embeds(llama, distilled, query) for query in queries]
    separator = llama.mend_config.demonstration_separator
    with serve(tiny_model("llama"), tokenizer) as url:
        requests = [make_completion_request(prompt, "tiny", max_tokens=8, stop=separator) for prompt in prompts]
        assert [ask(url, request) for request in requests] == expected
        with pytest.raises(HTTPError, match="400"):
            ask(url, make_completion_request(prompts[0].half(), "tiny"))


def test_the_example_asks_a_server_and_writes_down_what_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tokenizer = load_tiny()
    with serve(base, tokenizer) as url:
        requests = run_example(monkeypatch, tmp_path, "--url", url, "--dtype", "float32")
        answers = [ask(url, request) for request in requests]
    printed = capsys.readouterr().out
    assert [f"\n  {answer}\n" in printed for answer in answers] == [True] * 4
    assert {request["model"] for request in requests} == {NAME}


def test_the_example_runs_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80
    requests = run_example(monkeypatch, tmp_path)
    assert [decode(request["prompt_embeds"]).dtype for request in requests] == [torch.bfloat16] * 4
