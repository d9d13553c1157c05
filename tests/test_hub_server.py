"""Pushing and pulling with the real client of the Hub over HTTP, against a small Hub on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command_line import run_mend
from hub_server import Hub, run_hub
from huggingface_hub import EvalResult, constants
from huggingface_hub.hf_api import api
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from mend_hf import (
    AutoMendModel,
    DemonstrationStore,
    DistilledDemonstrations,
    MendConfig,
    MendModel,
    MendTrainer,
    MendTrainingArguments,
    get_mend_model,
    register_auto_classes,
)
from mend_hf.cards import BEGIN, CardFacts
from mend_hf.errors import CheckpointError, DataError, HubError
from mend_hf.evaluation.results import RESULTS_NAME, TaskResult
from mend_hf.hub import push_distiller_folder
from mend_hf.pull import pull

ROOT = Path(__file__).parents[1]
SHOTS = [("great film", "positive"), ("a bore", "negative")]


@pytest.fixture
def base_name(hub: Hub, tiny_model, tokenizer) -> str:
    """A base model on the Hub, put there by transformers itself."""
    tiny_model("llama").push_to_hub("user/tiny")
    tokenizer.push_to_hub("user/tiny")
    return "user/tiny"


@pytest.fixture
def model(base_name: str) -> MendModel:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_name)
    return get_mend_model(base, MendConfig(num_virtual_tokens=3, lora_r=2)).eval()


def perturb(model: MendModel) -> None:
    """Move every trained tensor, as a training would."""
    with torch.no_grad():
        for _, parameter in model.distiller.trained_tensors():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def trained(model: MendModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: MendModel, second: MendModel) -> None:
    own, others = trained(first), trained(second)
    assert own.keys() == others.keys()
    assert all(own[name].equal(others[name]) for name in own)


def card_of(hub: Hub, name: str = "user/mend-x", path: str = "README.md") -> str:
    return hub[name].files()[path].decode()


# Push and pull


def test_what_is_pushed_comes_back_bit_for_bit(hub, model, base_name):
    perturb(model)
    model.push_to_hub("user/mend-x")
    assert set(hub["user/mend-x"].files()) == {
        "README.md",
        "config.json",
        "mend_config.json",
        "mend_model.safetensors",
    }
    assert len(hub["user/mend-x"].messages) == 2, "one commit beside the first"
    for loaded in (
        MendModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_name), "user/mend-x"),
        AutoMendModel.from_pretrained("user/mend-x"),
    ):
        assert_equal(loaded, model)
        query = model.tokenize("bad")
        assert loaded(**query, demonstrations=SHOTS).logits.equal(model(**query, demonstrations=SHOTS).logits)


def test_a_branch_a_tag_and_a_commit_keep_what_they_had(hub, model):
    first = trained(model)
    model.push_to_hub("user/mend-x")
    api.create_tag("user/mend-x", tag="v1")
    sha = hub["user/mend-x"].refs["main"]
    perturb(model)
    model.push_to_hub("user/mend-x", revision="better")
    base = model.unload()
    for revision in (None, "main", "v1", sha):
        loaded = MendModel.from_pretrained(base, "user/mend-x", revision=revision)
        assert all(first[name].equal(tensor) for name, tensor in trained(loaded).items())
        loaded.unload()
    assert_equal(MendModel.from_pretrained(base, "user/mend-x", revision="better"), model)


def test_several_distillers_share_a_repository_in_subfolders(hub, model):
    model.push_to_hub("user/mend-x", subfolder="small")
    perturb(model)
    model.push_to_hub("user/mend-x", subfolder="large", dtype=torch.bfloat16)
    assert "large/mend_model.safetensors" in hub["user/mend-x"].files()
    assert 'subfolder="large"' in card_of(hub, path="large/README.md")
    own = trained(model)
    base = model.unload()
    loaded = MendModel.from_pretrained(base, "user/mend-x", subfolder="large")
    assert all(tensor.equal(own[name].to(torch.bfloat16).float()) for name, tensor in trained(loaded).items())


def test_a_private_repository_asks_for_a_token(hub, model):
    model.push_to_hub("user/mend-x", private=True)
    assert hub["user/mend-x"].private
    with pytest.raises(CheckpointError, match="user/mend-x"):
        MendConfig.from_pretrained("user/mend-x", token=False)
    assert MendConfig.from_pretrained("user/mend-x", token="secret").num_virtual_tokens == 3


def test_a_pull_request_leaves_the_branch_alone(hub, model):
    model.push_to_hub("user/mend-x")
    before = hub["user/mend-x"].refs["main"]
    perturb(model)
    info = model.push_to_hub("user/mend-x", create_pr=True, token="other")
    assert info.pr_url.endswith("/discussions/1")
    assert hub["user/mend-x"].refs["main"] == before
    assert hub["user/mend-x"].refs["refs/pr/1"] != before


def test_what_was_loaded_once_is_there_without_a_network(hub, model, monkeypatch):
    model.push_to_hub("user/mend-x")
    AutoMendModel.from_pretrained("user/mend-x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    num_requests = len(hub.log)
    assert_equal(AutoMendModel.from_pretrained("user/mend-x"), model)
    assert len(hub.log) == num_requests


def test_files_that_did_not_change_are_downloaded_once(hub, model):
    model.push_to_hub("user/mend-x")
    for _ in range(2):
        AutoMendModel.from_pretrained("user/mend-x")
    path = "/user/mend-x/resolve"
    downloads = [entry for entry in hub.log if entry[0] == "GET" and entry[1].startswith(path) and "model" in entry[1]]
    assert len(downloads) == 1


# Demonstrations


def test_distilled_demonstrations_come_back_bit_for_bit_alone_and_as_one_of_many(hub, model):
    distilled = model.distill(SHOTS)
    distilled.push_to_hub("user/prompts-1")
    distilled.push_to_hub("user/prompts", name="films")
    model.distill([("so slow", "negative")]).push_to_hub("user/prompts", name="books")
    for loaded in (
        DistilledDemonstrations.from_pretrained("user/prompts-1"),
        DistilledDemonstrations.from_pretrained("user/prompts", name="films"),
    ):
        assert loaded.provenance == distilled.provenance
        for own, other in zip(
            distilled.prefix.keys + distilled.prefix.values, loaded.prefix.keys + loaded.prefix.values, strict=True
        ):
            assert own.equal(other)
    assert "`books`, `films`" in card_of(hub, "user/prompts")


def test_a_store_is_pushed_whole_and_pulled_whole(hub, model, tmp_path):
    store = DemonstrationStore(tmp_path / "store")
    with pytest.raises(DataError, match="add some"):
        store.push_to_hub("user/prompts")
    store.add("films", model.distill(SHOTS))
    store.add("books", model.distill([("so slow", "negative")]))
    store.push_to_hub("user/prompts")
    assert len(hub["user/prompts"].messages) == 2
    assert pull("user/prompts", tmp_path / "copy") == ["books", "films"]
    copy = DemonstrationStore(tmp_path / "copy")
    assert list(copy) == ["books", "films"]
    assert copy["films"].prefix.keys[0].equal(store["films"].prefix.keys[0])
    assert pull("user/prompts", tmp_path / "one", name="films") == ["films"]
    with pytest.raises(DataError, match="books, films"):
        pull("user/prompts", tmp_path / "one", name="music")


# Cards


def test_the_snippet_of_a_card_runs(hub, model):
    model.push_to_hub("user/mend-x")
    model.distill(SHOTS).push_to_hub("user/prompts", name="films")
    for name in ("user/mend-x", "user/prompts"):
        code = re.search(r"```python\n(.*?)```", card_of(hub, name), re.DOTALL).group(1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert printed.getvalue().startswith("[")


def test_the_snippet_of_demonstrations_keeps_their_prompt_format(hub, base_name):
    config = MendConfig(num_virtual_tokens=3, lora_r=2, prefix_form="embeds", input_prefix="Q: ", output_prefix="\nA:")
    get_mend_model(AutoModelForCausalLM.from_pretrained(base_name), config).eval().distill(SHOTS).push_to_hub(
        "user/prompts"
    )
    code = re.search(r"```python\n(.*?)```", card_of(hub, "user/prompts"), re.DOTALL).group(1)
    assert "input_prefix='Q: '" in code
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, {})


def test_a_card_has_what_the_hub_reads(hub, model):
    score = EvalResult("text-classification", "sst2", "sst2", "macro_f1", 0.75)
    facts = CardFacts(
        datasets=["user/data"], license="apache-2.0", language=["en"], eval_results=[score], results="| a |"
    )
    model.push_to_hub("user/mend-x", facts=facts, tags=["few-shot"])
    data = huggingface_hub.ModelCard(card_of(hub)).data
    assert (data.base_model, data.base_model_relation, data.license) == ("user/tiny", "adapter", "apache-2.0")
    assert {"base_model:adapter:user/tiny", "mend", "few-shot"} <= set(data.tags)
    assert (data.datasets, data.language) == (["user/data"], ["en"])
    assert (data.library_name, data.pipeline_tag) == ("mend_hf", "text-generation")
    assert [(entry.dataset_name, entry.metric_type, entry.metric_value) for entry in data.eval_results] == [
        ("sst2", "macro_f1", 0.75)
    ]
    assert "| a |" in card_of(hub)


def test_what_a_person_wrote_outside_the_block_stays(hub, model):
    model.push_to_hub("user/mend-x", facts=CardFacts(license="apache-2.0", datasets=["user/data"]))
    edited = (
        card_of(hub)
        .replace("license: apache-2.0", "license: mit # asked the lawyers")
        .replace(BEGIN, f"My words.\n\n{BEGIN}")
    )
    edited = edited.replace("| virtual tokens | 3 |", "| virtual tokens | 99 |") + "\nMore of mine.\n"
    api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="user/mend-x")
    model.push_to_hub("user/mend-x", facts=CardFacts(license="gpl-3.0"))
    card = card_of(hub)
    assert "license: mit # asked the lawyers" in card
    assert "My words." in card
    assert card.endswith("\nMore of mine.\n")
    assert "| virtual tokens | 3 |" in card, "inside the block the library writes"
    assert "user/data" in card[card.index(BEGIN) :], "what the metadata says is not forgotten"


def test_a_card_without_marks_is_a_persons_own(hub, model):
    api.create_repo("user/mend-x")
    own = "---\nlicense: mit\n---\n\n# All mine\n"
    api.upload_file(path_or_fileobj=own.encode(), path_in_repo="README.md", repo_id="user/mend-x")
    model.push_to_hub("user/mend-x")
    card = card_of(hub)
    assert card.endswith("# All mine\n")
    assert BEGIN not in card
    assert "base_model: user/tiny" in card
    assert "license: mit" in card


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", f"---\nlicense: mit\n---\n{BEGIN}\n"])
def test_a_card_that_cannot_be_read_is_never_replaced(hub, model, card):
    api.create_repo("user/mend-x")
    sha = hub["user/mend-x"].commit("main", {"README.md": card.encode()}, "by hand")
    with pytest.raises(CheckpointError, match="mend"):
        model.push_to_hub("user/mend-x")
    assert hub["user/mend-x"].refs["main"] == sha


def test_the_base_models_folder_is_no_name_for_the_hub(hub, model, tmp_path):
    model.base_model.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")
    own = get_mend_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), MendConfig(lora_r=0)).eval()
    own.push_to_hub("user/mend-y")
    assert huggingface_hub.ModelCard(card_of(hub, "user/mend-y")).data.base_model is None


# What goes wrong


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("user/mend-x", "wrong", "log in"),
        ("user/mend-x", "other", "token that may write"),
        ("user/a/b", "secret", "look at the name"),
    ],
)
def test_a_refused_push_says_what_to_do(hub, model, name, token, message):
    with pytest.raises(HubError, match=message):
        model.push_to_hub(name, token=token)
    assert name not in hub.repositories


def test_a_push_without_a_server_says_so(model, monkeypatch):
    with run_hub() as gone:
        url = gone.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.raises(HubError, match="network"):
        model.push_to_hub("user/mend-x")


def test_what_is_not_there_is_named(hub, model, tmp_path):
    model.push_to_hub("user/mend-x")
    with pytest.raises(CheckpointError, match="user/none"):
        MendConfig.from_pretrained("user/none")
    with pytest.raises(CheckpointError, match="v9"):
        MendConfig.from_pretrained("user/mend-x", revision="v9")
    with pytest.raises(HubError, match="user/none"):
        pull("user/none", tmp_path / "copy")
    with pytest.raises(CheckpointError, match="neither"):
        pull("user/tiny", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_gated_repository_says_so(hub, model):
    model.push_to_hub("user/mend-x")
    hub["user/mend-x"].gated = True
    with pytest.raises(CheckpointError, match="gated"):
        MendConfig.from_pretrained("user/mend-x", token="other")
    assert MendConfig.from_pretrained("user/mend-x").num_virtual_tokens == 3


def test_a_busy_server_is_asked_again(hub, model):
    model.push_to_hub("user/mend-x")
    hub.faults.server_errors = 1
    assert_equal(AutoMendModel.from_pretrained("user/mend-x"), model)


def test_a_download_that_was_cut_goes_on_where_it_stood(hub, model, monkeypatch):
    model.push_to_hub("user/mend-x")
    config = MendConfig.from_pretrained("user/mend-x")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.faults.cuts = 1
    base = model.unload()
    loaded = MendModel.from_pretrained(base, "user/mend-x", config=config)
    size = len(hub["user/mend-x"].files()["mend_model.safetensors"])
    assert hub.ranges == [f"bytes={size // 2 // 1024 * 1024}-"], "whole blocks are kept"
    assert_equal(loaded, model)


def test_a_slow_link_is_only_slow(hub, model):
    model.push_to_hub("user/mend-x")
    hub.faults.seconds_a_block = 0.02
    assert_equal(AutoMendModel.from_pretrained("user/mend-x"), model)


def test_whoever_commits_in_between_is_not_overwritten(hub, model):
    model.push_to_hub("user/mend-x")
    card = card_of(hub).replace(BEGIN, f"Written in between.\n\n{BEGIN}")
    hub.faults.edit = {"README.md": card.encode(), "notes.txt": b"mine"}
    hub.faults.conflicts = 1
    perturb(model)
    model.push_to_hub("user/mend-x")
    assert "Written in between." in card_of(hub)
    assert hub["user/mend-x"].files()["notes.txt"] == b"mine"
    assert_equal(AutoMendModel.from_pretrained("user/mend-x"), model)


def test_a_push_gives_up_where_others_commit_all_the_time(hub, model):
    model.push_to_hub("user/mend-x")
    perturb(model)
    hub.faults.conflicts = 100
    with pytest.raises(HubError, match="try again"):
        model.push_to_hub("user/mend-x")


def test_another_base_model_is_refused_before_the_weights_are_asked_for(hub, model, tiny_model, tokenizer):
    model.push_to_hub("user/mend-x")
    hub.log.clear()
    with pytest.raises(CheckpointError, match="another base model"):
        MendModel.from_pretrained(tiny_model("qwen3"), "user/mend-x", tokenizer)


@pytest.mark.parametrize("subfolder", ["../other", "/etc", "a/../../b"])
def test_a_subfolder_stays_inside_its_place(tmp_path, subfolder):
    with pytest.raises(CheckpointError, match="inside"):
        MendConfig.from_pretrained(tmp_path, subfolder=subfolder)
    with pytest.raises(CheckpointError, match="inside"):
        pull("user/mend-x", tmp_path / "copy", subfolder=subfolder)


# Folders


def test_a_folder_is_pushed_and_pulled_without_its_base_model(hub, model, tmp_path):
    perturb(model)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "training_log.json").write_text("{}")
    (tmp_path / "saved" / "training_args.bin").write_bytes(b"somebody's pickle")
    (tmp_path / "saved" / "config.json").unlink()  # as in folders of 0.1.0's first versions
    push_distiller_folder(tmp_path / "saved", "user/mend-x")
    assert "training_args.bin" not in hub["user/mend-x"].files()
    assert {"training_log.json", "config.json"} <= set(hub["user/mend-x"].files())
    assert pull("user/mend-x", tmp_path / "copy") == []
    base = model.unload()
    assert_equal(MendModel.from_pretrained(base, tmp_path / "copy"), model)


def test_a_damaged_folder_is_neither_pushed_nor_pulled(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "mend_model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 1
    weights.write_bytes(whole)
    with pytest.raises(CheckpointError, match="SHA-256"):
        push_distiller_folder(tmp_path / "saved", "user/mend-x")
    assert "user/mend-x" not in hub.repositories
    model.push_to_hub("user/mend-x")
    files = hub["user/mend-x"].files()
    hub["user/mend-x"].commit("main", files | {"mend_model.safetensors": bytes(whole)}, "damage")
    with pytest.raises(CheckpointError, match="SHA-256"):
        pull("user/mend-x", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# The Trainer


def make_trainer(model: MendModel, folder: Path, **settings: Any) -> MendTrainer:
    rows = [{"demonstrations": SHOTS, "query": "bad", "target": "negative"}] * 4
    args = MendTrainingArguments(
        output_dir=str(folder), push_to_hub=True, hub_model_id="user/mend-x", per_device_train_batch_size=1,
        max_steps=4, save_steps=2, use_cpu=True, report_to="none", logging_steps=1, hub_always_push=True, **settings,
    )  # fmt: skip
    return MendTrainer(model=model, args=args, train_dataset=rows)


@pytest.mark.parametrize(
    ("strategy", "num_commits", "folders"),
    [
        ("end", 1, set()),
        ("every_save", 3, set()),
        ("checkpoint", 5, {"last-checkpoint"}),
        ("all_checkpoints", 5, {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_the_trainer_pushes_the_distiller(hub, model, tmp_path, strategy, num_commits, folders):
    trainer = make_trainer(model, tmp_path / "run", hub_strategy=strategy)
    trainer.train()
    trainer.push_to_hub(license="apache-2.0", dataset="user/data", tags="few-shot")
    files = hub["user/mend-x"].files()
    top = {path for path in files if "/" not in path}
    assert top == {"README.md", "config.json", "mend_config.json", "mend_model.safetensors"}
    assert {path.split("/")[0] for path in files if "/" in path} == folders
    assert len(hub["user/mend-x"].messages) - 1 == num_commits
    assert_equal(AutoMendModel.from_pretrained("user/mend-x"), model)
    data = huggingface_hub.ModelCard(card_of(hub)).data
    assert (data.license, data.datasets) == ("apache-2.0", ["user/data"])
    assert "few-shot" in data.tags
    assert "| 1 | 4 | 1 |" in card_of(hub), "one stage of four steps of one row"


def test_the_card_lists_the_stages_in_order(hub, model, tmp_path):
    make_trainer(model, tmp_path / "stage1", hub_strategy="end").train()
    model.save_pretrained(tmp_path / "saved")
    loaded = MendModel.from_pretrained(model.unload(), tmp_path / "saved")
    trainer = make_trainer(loaded, tmp_path / "stage2", hub_strategy="end", learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    stages = MendConfig.from_pretrained("user/mend-x").training_stages
    assert [(stage["steps"], stage["learning_rate"]) for stage in stages] == [(4, 5e-5), (4, 1e-3)]


def test_a_push_that_fails_while_training_loses_no_work(hub, model, tmp_path):
    trainer = make_trainer(model, tmp_path / "run", hub_strategy="every_save")
    del hub.repositories["user/mend-x"]
    hub.TOKENS.pop("secret")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
            with pytest.raises(HubError, match="log in"):
                trainer.push_to_hub()
        assert any("did not reach the Hub" in str(warning.message) for warning in caught)
        assert (tmp_path / "run" / "checkpoint-4" / "mend_model.safetensors").is_file()
    finally:
        hub.TOKENS["secret"] = "user"


# transformers' own ways


@pytest.fixture
def registered() -> None:
    register_auto_classes()
    register_auto_classes()


def test_auto_classes_and_pipelines_load_distillers(hub, model, registered, caplog):
    model.push_to_hub("user/mend-x")
    loaded = AutoModelForCausalLM.from_pretrained("user/mend-x", dtype=torch.float32)
    assert isinstance(loaded, MendModel)
    assert_equal(loaded, model)
    tokenizer = AutoTokenizer.from_pretrained("user/mend-x")
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    generator = pipeline("text-generation", model="user/mend-x")
    assert isinstance(generator.model, MendModel)
    assert "not supported" not in caplog.text
    assert generator("great film", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("great film")


def test_an_auto_class_of_another_task_is_refused(hub, model, registered):
    model.push_to_hub("user/mend-x")
    with pytest.raises(CheckpointError, match="AutoModelForCausalLM"):
        AutoModelForSequenceClassification.from_pretrained("user/mend-x")


# The command line


def write_scores(folder: Path) -> None:
    folder.mkdir()
    cost = {"prefix_slots": 4, "prefix_bytes": 64, "milliseconds_per_query": 1.0, "prepare_milliseconds": 1.0}
    rows = [("MEND", 13, 0.6), ("MEND", 21, 0.8), ("zero-shot", 13, 0.5)]
    results = [
        TaskResult(
            method=method, task="sst2", seed=seed, num_demonstrations=16, metric="macro_f1", score=score,
            num_queries=10, **cost,
        )
        for method, seed, score in rows
    ]  # fmt: skip
    (folder / RESULTS_NAME).write_text("".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in results))


def test_a_distiller_is_pushed_with_its_scores_and_pulled(hub, model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "saved")
    write_scores(tmp_path / "scores")
    words = [
        "push",
        tmp_path / "saved",
        "user/mend-x",
        "--license",
        "mit",
        "--dataset",
        "user/data",
        "--language",
        "en",
    ]
    assert run_mend([*words, "--results", tmp_path / "scores"]) == 0
    assert f"{hub.url}/user/mend-x/commit/" in capsys.readouterr().out
    data = huggingface_hub.ModelCard(card_of(hub)).data
    assert (data.license, data.datasets, data.language) == ("mit", ["user/data"], ["en"])
    assert [(entry.dataset_name, entry.metric_type, entry.metric_value) for entry in data.eval_results] == [
        ("sst2", "f1", 0.7)
    ]
    assert "| MEND | 70.0 |" in card_of(hub)
    push_distiller_folder(tmp_path / "saved", "user/mend-x")
    assert "| sst2 | f1 | 0.7 |" in card_of(hub), "scores that are known stay"
    assert run_mend(["pull", "user/mend-x", "--output-dir", tmp_path / "copy"]) == 0
    assert_equal(MendModel.from_pretrained(model.unload(), tmp_path / "copy"), model)


def test_demonstrations_are_pushed_alone_and_as_a_library(hub, model, tmp_path):
    model.distill(SHOTS).save_pretrained(tmp_path / "library" / "films")
    assert run_mend(["push", tmp_path / "library" / "films", "user/prompts", "--name", "old-films"]) == 0
    assert run_mend(["push", tmp_path / "library", "user/prompts", "--private"]) == 0
    assert run_mend(["pull", "user/prompts", "--output-dir", tmp_path / "copy"]) == 0
    assert list(DemonstrationStore(tmp_path / "copy")) == ["films", "old-films"]


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        ("none", [], "mend_config.json"),
        ("saved", ["--name", "films"], "--subfolder"),
        ("prompts", ["--subfolder", "films"], "--name"),
        ("prompts", ["--results", "scores"], "scores of a distiller"),
        ("library", ["--name", "films"], "leave it out"),
        ("saved", ["--results", "saved"], "results.jsonl"),
        ("saved", ["--token", "wrong"], "log in"),
    ],
)
def test_a_push_with_something_wrong_says_so(hub, model, tmp_path, monkeypatch, capsys, folder, options, message):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("saved")
    model.distill(SHOTS).save_pretrained("prompts")
    model.distill(SHOTS).save_pretrained("library/films")
    write_scores(tmp_path / "scores")
    assert run_mend(["push", folder, "user/mend-x", *options]) == 2
    assert message in capsys.readouterr().err
    assert "user/mend-x" not in hub.repositories


def test_a_new_process_finds_the_hub_in_its_environment(hub, model, tmp_path):
    model.push_to_hub("user/mend-x")
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "secret", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "mend_hf.cli", "pull", "user/mend-x", "--output-dir", str(tmp_path / "copy")]
    subprocess.run(command, env=os.environ | own, check=True, capture_output=True, timeout=120)
    assert_equal(MendModel.from_pretrained(model.unload(), tmp_path / "copy"), model)


def test_commands_load_the_base_models_revision_that_a_distiller_names(hub, base_name, tmp_path, capsys):
    api.create_tag(base_name, tag="v1")
    config = MendConfig(num_virtual_tokens=3, lora_r=2, base_model_revision="v1")
    get_mend_model(AutoModelForCausalLM.from_pretrained(base_name), config).push_to_hub("user/mend-x")
    hub.log.clear()
    assert run_mend(["generate", "--distiller", "user/mend-x", "a bore", "--device", "cpu"]) == 0
    assert any("v1" in path.split("/") for _, path in hub.log)
    assert not any(path.startswith(f"/{base_name}/resolve/main/") for _, path in hub.log)


def test_the_example_pushes_and_pulls(hub, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["push_and_pull.py", "user/mend-x", "--tiny"])
    runpy.run_path(str(ROOT / "examples" / "push_and_pull.py"), run_name="__main__")
    assert set(hub.repositories) == {"user/mend-x", "user/mend-x-prompts"}
    assert "moving and funny: " in capsys.readouterr().out
