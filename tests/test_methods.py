"""What stands in front of a query: each method against what it says it does, written out."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tiny_models import wrap_tiny_model
from tokenizers.processors import TemplateProcessing

from mend_hf import Demonstration, MendConfig, get_mend_model, scoring
from mend_hf.data.metaicl import Example
from mend_hf.errors import ConfigError
from mend_hf.evaluation.asking import Questions, run_method
from mend_hf.evaluation.calibration import CONTENT_FREE_INPUTS, MAX_INPUTS, CalibratedReader
from mend_hf.evaluation.comparison import distil_with, read_with, share_weights
from mend_hf.evaluation.hybrids import mend_with_raw
from mend_hf.evaluation.methods import METHODS, pick_methods
from mend_hf.evaluation.readers import Reader
from mend_hf.evaluation.results import ResultKey

OPTIONS = ("positive", "negative")
QUERIES = ["moving and funny", "bad"]
SHOTS = [
    Demonstration("great film", "positive"),
    Demonstration("a bore", "negative"),
    Demonstration("good food", "positive"),
    Demonstration("bad food", "negative"),
]
FIRST_INPUTS = [shot.input for shot in (SHOTS * 3)[:MAX_INPUTS]]


def text_ids(model, demonstrations):
    [chunk] = model.prompt.encode_demonstrations(demonstrations).chunks
    return chunk.input_ids


def test_calibration_divides_by_the_mean_probability_under_inputs_without_content(monkeypatch):
    probabilities = {
        "N/A": (0.5, 0.1), "": (0.3, 0.2), "[MASK]": (0.1, 0.3), "good": (0.6, 0.3), "bad": (0.2, 0.4),
    }  # fmt: skip
    asked = []

    def score(self, queries, options, *, batch_size):
        asked.extend(queries)
        rows = zip(queries, options, strict=True)
        return [[math.log(probabilities[query][OPTIONS.index(option)]) for option in row] for query, row in rows]

    monkeypatch.setattr(Reader, "score_options", score)
    monkeypatch.setattr(scoring, "score_options", lambda _, *asked, batch_size: score(None, *asked[:2], batch_size=2))
    reader = CalibratedReader(None)
    scores = reader.score_options(["good", "bad"], [OPTIONS, OPTIONS[::-1]], batch_size=2)
    # positive: (0.5 + 0.3 + 0.1) / 3 = 0.3; negative: (0.1 + 0.2 + 0.3) / 3 = 0.2
    expected = [[0.6 / 0.3, 0.3 / 0.2], [0.4 / 0.2, 0.2 / 0.3]]
    assert [[math.exp(value) for value in row] for row in scores] == [pytest.approx(row) for row in expected]
    reader.score_options(["bad"], [OPTIONS], batch_size=2)
    assert asked == [*CONTENT_FREE_INPUTS, "good", "bad", "bad"]


@pytest.mark.parametrize(
    ("method", "calibration", "inputs"),
    [
        ("in-context", "calibrated", CONTENT_FREE_INPUTS),
        ("MEND", "calibrated", CONTENT_FREE_INPUTS),
        *((method, "batch-calibrated", FIRST_INPUTS) for method in ("zero-shot", "in-context", "MEND")),
    ],
)
def test_calibrated_scores_are_those_of_the_method_less_what_other_inputs_get(
    method, calibration, inputs, tiny_model, tokenizer
):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    plain, calibrated = (METHODS[name](model, SHOTS * 3) for name in (method, f"{method}, {calibration}"))
    options = [OPTIONS, ("good", "very bad", "funny")]
    bare, got = (reader.score_options(QUERIES, options, batch_size=2) for reader in (plain, calibrated))
    for choices, row, calibrated_row in zip(options, bare, got, strict=True):
        for option, score, calibrated_score in zip(choices, row, calibrated_row, strict=True):
            pair = [[option, "a"]]
            elsewhere = [plain.score_options([text], pair, batch_size=1)[0][0] for text in inputs]
            mean = sum(map(math.exp, elsewhere)) / len(inputs)
            assert calibrated_score == pytest.approx(score - math.log(mean), abs=1e-5)
    assert calibrated.generate(QUERIES, batch_size=2) == plain.generate(QUERIES, batch_size=2)


@pytest.mark.parametrize("method", ["zero-shot", "in-context", "MEND"])
def test_batch_calibration_leaves_options_alone_that_are_no_labels(method, tiny_model, tokenizer):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    plain, calibrated = (METHODS[name](model, SHOTS) for name in (method, f"{method}, batch-calibrated"))
    assert calibrated.for_labels(OPTIONS) is calibrated
    options = [OPTIONS, ("very bad", "funny")]
    expected = plain.score_options(QUERIES, options, batch_size=2)
    assert calibrated.for_labels(None).score_options(QUERIES, options, batch_size=2) == expected
    assert calibrated.score_options(QUERIES, options, batch_size=2) != expected


def test_an_evaluation_calibrates_by_inputs_where_queries_share_their_options_alone(tiny_model, tokenizer):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    examples = [Example("t", shot.input, shot.output, (shot.output, "funny")) for shot in SHOTS]
    key = ResultKey("t", "MEND, batch-calibrated", 13, 4)
    flops = {}
    for labels in (OPTIONS, None):
        questions = Questions(queries=examples, metric="accuracy", other_metrics=(), is_free_form=False, labels=labels)
        for name in ("MEND", "MEND, batch-calibrated"):
            result = run_method(model, METHODS[name], SHOTS, questions, key, batch_size=2)
            flops[name, labels] = result.flops_per_query
    assert flops["MEND, batch-calibrated", None] == flops["MEND", None]
    assert flops["MEND, batch-calibrated", OPTIONS] > 1.5 * flops["MEND", OPTIONS]


@pytest.fixture
def bos_tokenizer(tokenizer):
    """The tokenizer, putting a begin-of-text token in front of a text, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("name", "prefix_form"),
    [*itertools.product(["gpt2", "llama", "opt", "gemma3_text", "bloom"], ["kv", "embeds"]), ("mamba", "embeds")],
)
@pytest.mark.filterwarnings("ignore:A query of")
def test_raw_demonstrations_behind_a_prefix_are_one_pass_over_everything(name, prefix_form, tiny_model, bos_tokenizer):
    tokenizer = bos_tokenizer
    model = wrap_tiny_model(tiny_model(name), tokenizer, num_virtual_tokens=3, prefix_form=prefix_form)
    reader = mend_with_raw(2)(model, SHOTS)
    distilled = model.distill(SHOTS[:2])
    opening, *behind = text_ids(model, SHOTS[2:])
    assert opening == tokenizer.bos_token_id
    assert reader.num_slots == distilled.num_slots + len(behind)
    for query in QUERIES:
        ids = model.prompt.encode_query(query)
        with torch.no_grad():
            whole = model(torch.tensor([behind + ids]), demonstrations=distilled).logits[:, len(behind) :]
            got = model(torch.tensor([ids]), demonstrations=reader.prefix).logits
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)


def test_raw_demonstrations_stand_behind_vectors_in_an_encoder(tiny_encoder_decoder, tokenizer):
    model = wrap_tiny_model(tiny_encoder_decoder("t5"), tokenizer, num_virtual_tokens=3)
    reader, distilled = mend_with_raw(1)(model, SHOTS), model.distill(SHOTS[:3])
    behind = text_ids(model, SHOTS[3:])
    ids, labels = model.prompt.encode_query("bad"), torch.tensor([model.prompt.encode_answer("negative")])
    with torch.no_grad():
        whole = model(torch.tensor([behind + ids]), labels=labels, demonstrations=distilled).logits
        got = model(torch.tensor([ids]), labels=labels, demonstrations=reader.prefix).logits
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)


def test_at_least_one_demonstration_is_distilled(tiny_model, tokenizer):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    for num_shots, num_distilled in ((1, 1), (2, 1), (3, 1), (4, 2)):
        slots = METHODS["MEND + 2 raw"](model, SHOTS[:num_shots]).num_slots
        raw = text_ids(model, SHOTS[num_distilled:num_shots]) if num_shots > num_distilled else []
        assert slots == model.distill(SHOTS[:num_distilled]).num_slots + len(raw)


def test_raw_demonstrations_go_on_behind_a_prefix_without_adapter_and_placeholders(tiny_model, tokenizer):
    model = get_mend_model(tiny_model("llama"), MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer).eval()
    readers = [METHODS[name](model, SHOTS) for name in ("MEND", "MEND + 2 raw")]
    anchors, hybrid = (reader.score_options(QUERIES, [OPTIONS] * 2, batch_size=2) for reader in readers)
    assert anchors != hybrid


def test_distillers_that_share_a_base_model_do_not_disturb_each_other(tiny_model, tokenizer):
    def wrap(base, seed):
        return wrap_tiny_model(base, tokenizer, seed=seed, num_virtual_tokens=3, lora_r=2)

    first_base = tiny_model("llama")
    second_base = share_weights(first_base)
    own, shared = dict(first_base.named_parameters()), dict(second_base.named_parameters())
    assert own.keys() == shared.keys()
    assert all(own[name] is shared[name] for name in own)
    first, second = wrap(first_base, 1), wrap(second_base, 2)
    for model, alone in ((first, wrap(tiny_model("llama"), 1)), (second, wrap(tiny_model("llama"), 2))):
        expected, got = alone.distill(SHOTS).prefix, distil_with(model)(first, SHOTS).prefix
        assert all(map(torch.equal, (*expected.keys, *expected.values), (*got.keys, *got.values)))
    scores = [
        method(first, SHOTS).score_options(QUERIES, [OPTIONS] * 2, batch_size=2)
        for method in (distil_with(first), distil_with(second), METHODS["in-context"], read_with(second))
    ]
    assert scores[0] == METHODS["MEND"](first, SHOTS).score_options(QUERIES, [OPTIONS] * 2, batch_size=2)
    assert scores[0] != scores[1]
    assert scores[2] == scores[3]


def test_another_model_reads_in_its_own_way(tiny_model, tokenizer):
    model = wrap_tiny_model(tiny_model("llama"), tokenizer, num_virtual_tokens=3)
    other = get_mend_model(tiny_model("gpt2"), MendConfig(num_virtual_tokens=0, lora_r=0), tokenizer).eval()
    expected, got = (
        method(one, SHOTS).score_options(QUERIES, [OPTIONS] * 2, batch_size=2)
        for method, one in ((METHODS["in-context"], other), (read_with(other), model))
    )
    assert expected == got


def test_a_method_of_nearly_the_name_is_named_first():
    with pytest.raises(ConfigError, match=r"got 'mend' \(did you mean 'MEND'\?\), not among 'zero-shot', "):
        pick_methods(["MEND", "mend"])
    with pytest.raises(ConfigError, match=r"'In context' \(did you mean 'in-context'\?\), 'magic', not among "):
        pick_methods(["In context", "magic"])
