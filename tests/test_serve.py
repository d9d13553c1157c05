"""The service in `examples/serve.py`, asked over HTTP."""

from __future__ import annotations

import json
import runpy
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import model_options
import pytest
import uvicorn
from serve import create_app
from tiny_models import wrap_tiny_model

from mend_hf import DemonstrationStore, MendModel

SCRIPT = Path(__file__).parents[1] / "examples" / "serve.py"
FILMS = [["great film", "positive"], ["a bore", "negative"]]
FOOD = [["good food", "negative"], ["bad film", "positive"], ["funny", "negative"]]
QUERIES = ["moving and funny", "dull"]


@contextmanager
def serving(model: MendModel, folder: Path) -> Iterator[str]:
    """Run the service on a free port, and return its address."""
    config = uvicorn.Config(create_app(model, DemonstrationStore(folder)), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.started
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def model(tiny_model: Callable, tokenizer: object) -> MendModel:
    return wrap_tiny_model(tiny_model("gpt2"), tokenizer, seed=0, spread=0.1, num_virtual_tokens=3)


@pytest.fixture(scope="module")
def client(model: MendModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        serving(model, tmp_path_factory.mktemp("served")) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def post_task(client: httpx.Client, demonstrations: list[list[str]] = FILMS) -> str:
    return client.post("/demonstrations", json={"demonstrations": demonstrations}).raise_for_status().json()["id"]


def ask(client: httpx.Client, **asked: object) -> list[str]:
    return client.post("/queries", json={"queries": QUERIES} | asked).raise_for_status().json()["answers"]


def pairs(demonstrations: list[list[str]]) -> list[tuple[str, ...]]:
    return [tuple(pair) for pair in demonstrations]


def test_posted_demonstrations_get_an_id_and_say_what_they_cost(client, model):
    answer = client.post("/demonstrations", json={"demonstrations": FILMS}).json()
    distilled = model.distill(pairs(FILMS))
    assert answer["slots"] == distilled.num_slots
    assert [answer["tokens_read"]] == distilled.provenance.num_tokens


def test_answers_over_http_are_the_models_own(client, model):
    for task in (FILMS, FOOD):
        assert ask(client, id=post_task(client, task)) == model.answer(QUERIES, model.distill(pairs(task)))


def test_options_are_chosen_by_their_likelihood_behind_the_prefix(client, model):
    options, name = ["positive", "negative", "funny"], post_task(client)
    with model.use_demonstrations(pairs(FILMS)):
        encoded = [model.prompt.encode_answer(option) for option in options]
        losses = [[score(model, query, answer) for answer in encoded] for query in QUERIES]
    assert ask(client, id=name, options=options) == [options[row.index(min(row))] for row in losses]
    assert ask(client, id=name, options=["bore"]) == ["bore", "bore"]


def score(model: MendModel, query: str, answer: list[int]) -> float:
    """The mean loss of an answer's tokens, by one plain pass over query and answer."""
    query_ids = model.tokenize(query)["input_ids"]
    ids = query_ids.new_tensor([query_ids[0].tolist() + answer])
    labels = ids.clone()
    labels[:, : query_ids.shape[1]] = -100
    return model(input_ids=ids, labels=labels).loss.item()


def read_events(client: httpx.Client, **asked: str) -> tuple[list[str], str]:
    """Return the pieces and the whole answer of a stream."""
    with client.stream("GET", "/stream", params=asked) as response:
        response.raise_for_status()
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, last = "".join(response.iter_text()).strip().split("\n\n")
    name, data = last.split("\n")
    assert name == "event: answer"
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces], json.loads(data.removeprefix("data: "))


def test_a_stream_brings_the_answer_in_pieces_and_then_as_a_whole(client):
    name = post_task(client)
    pieces, answer = read_events(client, id=name, query=QUERIES[0])
    assert len(pieces) > 1
    assert all(pieces)
    assert "".join(pieces).strip().startswith(answer)
    assert answer == ask(client, id=name)[0] != ""


def test_several_clients_at_once_get_what_each_gets_alone(client):
    names = [post_task(client, task) for task in (FILMS, FOOD)]
    alone = [ask(client, id=name) for name in names]
    assert alone[0] != alone[1]
    start = threading.Barrier(4)

    def ask_together(number: int) -> list[str]:
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            start.wait(60)
            if number < 2:
                return [read_events(own, id=names[number], query=query)[1] for query in QUERIES]
            return ask(own, id=names[number - 2])

    with ThreadPoolExecutor(4) as clients:
        assert [*clients.map(ask_together, range(4))] == alone + alone


def test_ids_stay_good_after_a_restart(model, tmp_path):
    with serving(model, tmp_path) as address, httpx.Client(base_url=address, timeout=60) as client:
        name = post_task(client)
        before = ask(client, id=name)
    with serving(model, tmp_path) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert ask(client, id=name) == before


@pytest.mark.parametrize("name", ["0" * 32, "../secrets", ""])
def test_an_unknown_id_is_not_found(client, name):
    for response in (
        client.post("/queries", json={"id": name, "queries": QUERIES}),
        client.get("/stream", params={"id": name, "query": QUERIES[0]}),
    ):
        assert response.status_code == 404
        assert "a name in the folder" in response.json()["detail"]
        assert "POST /demonstrations" in response.json()["detail"]


def test_a_name_in_the_folder_is_an_id_too(model, tmp_path):
    films = model.distill(pairs(FILMS))
    DemonstrationStore(tmp_path).add("films", films)
    with serving(model, tmp_path) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert ask(client, id="films") == model.answer(QUERIES, films)


def test_what_cannot_be_distilled_is_refused_with_the_remedy(client):
    response = client.post("/demonstrations", json={"demonstrations": []})
    assert response.status_code == 422
    assert "give one or more" in response.json()["detail"]


def test_a_query_beyond_the_positions_is_refused_before_a_stream_begins(client):
    endless = " ".join(["funny"] * 600)  # cut to 256 tokens
    name = post_task(client, FILMS * 20)
    for response in (
        client.get("/stream", params={"id": name, "query": endless}),
        client.post("/queries", json={"id": name, "queries": [endless]}),
    ):
        assert response.status_code == 422
        assert "positions" in response.json()["detail"]


@pytest.mark.parametrize(
    "body", [{"demonstrations": [["one", "two", "three"]]}, {"demonstrations": [["one", 2]]}, {}, []]
)
def test_a_body_of_another_form_is_refused_with_its_place(client, body):
    response = client.post("/demonstrations", json=body)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][0] == "body"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("option", ["positive"], "extra_forbidden"),
        ("options", [], "too_short"),
        ("queries", [], "too_short"),
        ("queries", ["dull", ""], "string_too_short"),
    ],
)
def test_a_query_of_another_form_is_refused_with_its_field(client, field, value, problem):
    response = client.post("/queries", json={"id": post_task(client), "queries": QUERIES} | {field: value})
    assert response.status_code == 422
    (found,) = response.json()["detail"]
    assert (found["loc"][:2], found["type"]) == (["body", field], problem)


def test_demonstrations_with_an_unknown_field_are_refused(client):
    response = client.post("/demonstrations", json={"demonstrations": FILMS, "name": "films"})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "name"]


def test_an_empty_query_is_refused_before_a_stream_begins(client):
    response = client.get("/stream", params={"id": post_task(client), "query": ""})
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["query", "query"]


def test_the_root_leads_to_the_list_of_requests(client):
    response = client.get("/")
    assert response.status_code == 307
    assert response.headers["location"] == "/docs"
    assert client.get("/docs").status_code == 200


def test_the_script_is_short():
    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) < 80


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # uvicorn leaves the socket to the end of the process
def test_a_taken_port_is_found_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    def load(*_: object) -> MendModel:
        raise AssertionError("loaded")

    monkeypatch.setattr(model_options, "load_model", load)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["serve.py", "--folder", str(tmp_path), "--port", port])
        with pytest.raises(SystemExit):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "in use" in capsys.readouterr().err
