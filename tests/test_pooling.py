from __future__ import annotations

import pytest
import torch

from mend_hf import DistilledDemonstrations, MendConfig, get_mend_model
from mend_hf.errors import ConfigError, DataError
from mend_hf.pooling import label_anchors, pool_anchors
from mend_hf.prefix import KeyValuePrefix

METHODS = ["label", "similarity"]
SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def numbered_prefix(labels, values=None):
    """One layer, one head; the key at a slot is its number from 1 on, the value is given or ten times that."""
    keys = torch.arange(1.0, len(labels) + 1)[None, None, :, None]
    states = 10 * keys if values is None else torch.tensor(values)[None, None]
    mask = torch.ones(1, len(labels), dtype=torch.bool)
    return KeyValuePrefix((keys,), (states,), mask, torch.tensor([50]), torch.tensor([labels]))


def test_equal_tokens_of_equal_answers_have_equal_labels():
    ids = torch.tensor([[3, 7, 20, 8, 4, 7, 21, 8, 5, 7, 20, 8]])
    is_anchor = torch.tensor([[0, 1, 1, 1] * 3]).bool()
    [labels] = label_anchors(ids, is_anchor).tolist()
    assert labels[1:4] == labels[9:12]
    assert len({*labels[1:4], *labels[5:8]}) == 6
    assert labels[0] == labels[4] == labels[8] == 0


def test_pooling_by_label_keeps_the_last_key_and_the_mean_value_of_neighbours():
    pooled = pool_anchors(numbered_prefix([0, 5, 6, 5, 6, 5, 6, 0]), 5, "label")
    # two slots remain for one label, and the first label gets it: 2 | 4, 6 and 3, 5, 7
    assert pooled.keys[0].flatten().tolist() == [1, 2, 6, 7, 8]
    assert pooled.values[0].flatten().tolist() == pytest.approx([10, 20, 50, 50, 80])
    assert pooled.labels.tolist() == [[0, 5, 5, 6, 0]]
    assert pooled.next_positions.tolist() == [50]


def test_pooling_by_similarity_merges_the_slots_whose_values_are_alike():
    east, north = [1.0, 0.0], [0.0, 1.0]
    pooled = pool_anchors(numbered_prefix([0, 5, 6, 7, 8], [[9.0, 9.0], east, east, north, north]), 3, "similarity")
    assert pooled.keys[0].flatten().tolist() == [1, 3, 5]
    assert pooled.values[0][0, 0].tolist() == [[9.0, 9.0], east, north]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [2, 3, 5, 8])
def test_the_budget_is_used_up_and_never_exceeded(method, budget):
    prefix = numbered_prefix([0, *[5] * 9])
    assert pool_anchors(prefix, budget, method).num_slots == budget
    assert pool_anchors(prefix, 10, method) is prefix


@pytest.mark.parametrize("method", METHODS)
def test_slots_with_equal_keys_and_values_answer_alike_but_for_their_lost_mass(method):
    """n equal slots weigh n in the softmax, their pooled slot 1: with log(n) added to its logit both agree."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(4), torch.randn(2, 4), torch.randn(2, 4)
    copies = [0, 1, 1, 1]
    states = (keys[copies][None, None],), (values[copies][None, None],)
    mask = torch.ones(1, 4, dtype=torch.bool)
    prefix = KeyValuePrefix(*states, mask, torch.tensor([4]), torch.tensor([[0, 5, 5, 5]]))
    pooled = pool_anchors(prefix, 2, method)
    expected = (prefix.keys[0][0, 0] @ query).softmax(0) @ prefix.values[0][0, 0]
    logits = pooled.keys[0][0, 0] @ query + torch.tensor([1.0, 3.0]).log()
    torch.testing.assert_close(logits.softmax(0) @ pooled.values[0][0, 0], expected)


@pytest.mark.parametrize(("method", "least"), [("label", 5), ("similarity", 4)])
def test_a_budget_that_cannot_hold_is_refused(method, least):
    prefix = numbered_prefix([0, 0, 0, 5, 6])
    with pytest.raises(DataError, match=f"at least {least}, .*raise it, lower num_virtual_tokens"):
        pool_anchors(prefix, least - 1, method)


@pytest.mark.parametrize(
    "settings", [{"max_slots": 3, "num_virtual_tokens": 3}, {"max_slots": 9, "prefix_form": "embeds"}]
)
def test_settings_that_cannot_pool_are_refused(settings):
    with pytest.raises(ConfigError, match="lower num_virtual_tokens"):
        MendConfig(**settings)


@pytest.mark.parametrize("method", METHODS)
class TestOfAModel:
    @pytest.fixture
    def model(self, tiny_model, tokenizer, method):
        torch.manual_seed(3)
        config = MendConfig(
            num_virtual_tokens=2,
            max_slots=26,
            anchor_pooling=method,
            overflow="concat",
            max_demonstrations_per_chunk=2,
        )
        return get_mend_model(tiny_model("llama"), config, tokenizer).eval()

    def test_many_demonstrations_fit_the_budget_and_answer(self, model):
        distilled = model.distill(SHOTS * 4)
        assert distilled.num_slots == 26
        assert distilled.chunks.mask.sum() > 40
        assert model(**model.tokenize("bad"), demonstrations=distilled).logits.isfinite().all()

    def test_a_batch_of_tasks_equals_each_alone(self, model):
        tasks = [SHOTS * 4, SHOTS[:1], SHOTS[::-1] * 3]
        together, query = model.distill(tasks), model.tokenize("moving and funny")
        for row, task in enumerate(tasks):
            alone = model(**query, demonstrations=task).logits
            torch.testing.assert_close(model(**query, demonstrations=together[row]).logits, alone, **CLOSE)

    def test_dropping_undoes_joining_because_chunks_are_kept(self, model, tmp_path):
        first = model.distill(SHOTS * 3)
        joined = first.join(model.distill(SHOTS[::-1]))
        joined.save_pretrained(tmp_path)
        loaded = DistilledDemonstrations.from_pretrained(tmp_path)
        assert loaded.num_slots == 26
        assert all(a.equal(b) for a, b in zip(loaded.prefix.keys, joined.prefix.keys, strict=True))
        again = loaded.drop(SHOTS[::-1])
        assert all(a.equal(b) for a, b in zip(again.prefix.values, first.prefix.values, strict=True))

    def test_gradients_reach_everything_that_is_trained(self, model):
        with torch.no_grad():
            for _, parameter in model.distiller.trained_tensors():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        query = model.tokenize("moving and funny")
        model.train()(**query, labels=query["input_ids"], demonstrations=SHOTS * 4).loss.backward()
        still = {n for n, p in model.distiller.trained_tensors() if p.grad is None or not p.grad.any()}
        assert still == {n for n in still if ".layers.2." in n and "k_proj" not in n and "v_proj" not in n}


def test_256_demonstrations_fit_64_slots(tiny_model, tokenizer):
    config = MendConfig(num_virtual_tokens=1, max_slots=64, overflow="concat", max_distiller_tokens=240)
    model = get_mend_model(tiny_model("llama"), config, tokenizer)
    distilled = model.distill(SHOTS * 64)
    assert (distilled.num_slots, distilled.provenance.num_demonstrations) == (64, [256])
