from __future__ import annotations

import pytest
import torch

from mend_hf import MendConfig, get_mend_model
from mend_hf.caches import continue_inputs
from mend_hf.distiller import DemonstrationBatch
from mend_hf.errors import ShapeError
from mend_hf.prefix import (
    EmbeddingPrefix,
    KeyValuePrefix,
    gather_slots,
    join_chunks,
    make_cache,
    pack_right,
    positions_of,
    stack_rows,
)

FAMILIES = ["gpt2", "llama", "qwen3", "opt", "gpt_neox", "gemma3_text", "mistral"]
SLIDING = ["gemma3_text", "mistral"]
SHOTS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive")]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def literal_prefix(rows, next_positions):
    """Keys and values of one layer, one head, width 1: the number at every slot; 0 is no slot."""
    numbers = torch.tensor(rows, dtype=torch.float32)
    states = numbers[:, None, :, None]
    return KeyValuePrefix((states,), (-states,), numbers != 0, torch.tensor(next_positions))


def numbers_of(prefix):
    assert torch.equal(prefix.keys[0], -prefix.values[0])
    return (prefix.keys[0][:, 0, :, 0] * prefix.mask).int().tolist()


class TestOnLiteralNumbers:
    def test_kept_positions_are_packed_to_the_right_in_order(self):
        index, mask = pack_right(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]]).bool())
        assert mask.tolist() == [[True, True, True], [False, False, True]]
        assert index[0].tolist() == [0, 2, 3]
        assert index[1, -1].item() == 1

    def test_slots_are_gathered_head_by_head(self):
        states = torch.arange(12.0).reshape(1, 2, 3, 2)
        gathered = gather_slots(states, torch.tensor([[2, 0]]))
        assert gathered.tolist() == [[[[4, 5], [0, 1]], [[10, 11], [6, 7]]]]

    def test_positions_count_tokens_and_not_padding(self):
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
        assert positions_of(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]
        assert positions_of(mask, torch.tensor([10, 20])).tolist() == [[10, 10, 10, 11], [20, 21, 22, 22]]

    def test_joined_chunks_keep_one_sink_and_go_on_after_the_longest(self):
        joined = join_chunks([literal_prefix([[0, 1, 2]], [9]), literal_prefix([[1, 3]], [30])])
        assert numbers_of(joined) == [[1, 2, 3]]
        assert joined.next_positions.tolist() == [30]

    def test_a_row_without_slots_adds_nothing_to_a_join(self):
        joined = join_chunks([literal_prefix([[1, 2], [0, 0]], [5, 0]), literal_prefix([[1, 3], [1, 4]], [6, 7])])
        assert numbers_of(joined) == [[1, 2, 3], [0, 1, 4]]
        assert joined.next_positions.tolist() == [6, 7]

    def test_joined_vectors_follow_one_another(self):
        vectors = torch.arange(1.0, 5.0).reshape(1, 4, 1)
        joined = join_chunks(
            [
                EmbeddingPrefix(vectors[:, :2], torch.tensor([[False, True]])),
                EmbeddingPrefix(vectors[:, 2:], torch.tensor([[True, True]])),
            ]
        )
        assert joined.vectors[..., 0].tolist() == [[2, 3, 4]]

    def test_rows_of_different_lengths_are_stacked_with_unused_slots_on_the_left(self):
        stacked = stack_rows([literal_prefix([[1, 2, 3]], [3]), literal_prefix([[4]], [1])])
        assert numbers_of(stacked) == [[1, 2, 3], [0, 0, 4]]
        assert stacked.next_positions.tolist() == [3, 1]

    def test_selected_rows_drop_the_slots_that_none_of_them_uses(self):
        prefix = literal_prefix([[1, 2, 3], [0, 0, 4]], [3, 1])
        assert numbers_of(prefix.select([1, 1])) == [[4], [4]]
        assert numbers_of(prefix.select([1, 0])) == [[0, 0, 4], [1, 2, 3]]

    def test_a_query_goes_on_behind_the_prefix(self, tiny_model):
        prefix = literal_prefix([[1, 2, 3], [0, 0, 4]], [7, 5])
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        inputs = continue_inputs(prefix, mask, tiny_model("llama"))
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 1]]
        assert inputs["position_ids"].tolist() == [[7, 7, 8], [5, 6, 7]]

    def test_a_cache_is_filled_and_the_prefix_stays_as_it_was(self):
        prefix = literal_prefix([[1, 2]], [2])
        cache = make_cache(prefix)
        cache.update(torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1), 0)
        assert cache.get_seq_length() == 5
        assert numbers_of(prefix) == [[1, 2]]


class TestKeepingEverySlotEqualsTheText:
    """No adapter, no placeholders, every token an anchor: what is kept is the text itself."""

    @pytest.fixture(params=FAMILIES)
    def base(self, request, tiny_model):
        return tiny_model(request.param)

    def distil_all(self, base, chunks, **settings):
        config = MendConfig(num_virtual_tokens=0, lora_r=0, prefix_form="kv", **settings)
        model = get_mend_model(base, config).eval()
        rows = torch.zeros(len(chunks), dtype=torch.long)
        return model, model.distiller(
            DemonstrationBatch.from_columns(chunks, None, torch.ones_like(chunks, dtype=torch.bool), rows)
        )

    def test_logits_and_tokens(self, base, tokenizer):
        text = torch.tensor(
            [tokenizer("great film positive a bore negative good food", add_special_tokens=False).input_ids]
        )
        query = torch.tensor([tokenizer("the film was", add_special_tokens=False).input_ids])
        model, prefix = self.distil_all(base, text)
        full = torch.cat([text, query], dim=1)
        with torch.no_grad():
            got = model(input_ids=query, demonstrations=prefix).logits
            torch.testing.assert_close(got, base(full).logits[:, text.shape[1] :], **CLOSE)
        for settings in ({}, {"num_beams": 3}):
            plain = base.generate(full, attention_mask=torch.ones_like(full), **GREEDY, **settings)
            tokens = model.generate(query, demonstrations=prefix, **GREEDY, **settings)
            assert tokens[0, query.shape[1] :].tolist() == plain[0, full.shape[1] :].tolist()

    def test_chunks_read_in_turn_equal_one_reading(self, base):
        """Over 24 tokens, twice the sliding window: the window is that of the text, not of the slots kept so far."""
        ids = torch.arange(10, 34)[None]
        with torch.no_grad():
            _, whole = self.distil_all(base, ids)
            _, in_turn = self.distil_all(base, ids.reshape(3, 8), overflow="recurrent")
        assert in_turn.next_positions.equal(whole.next_positions)
        for got, expected in zip((*in_turn.keys, *in_turn.values), (*whole.keys, *whole.values), strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)


class TestUnderASlidingWindow:
    QUERIES = ("the film was good", "the food was bad")
    TASKS = (SHOTS, SHOTS[:1])

    @pytest.fixture(params=SLIDING)
    def model(self, request, tiny_model, tokenizer):
        torch.manual_seed(7)
        return get_mend_model(tiny_model(request.param), MendConfig(num_virtual_tokens=3), tokenizer).eval()

    def test_queries_of_one_length_behind_prefixes_of_different_length_equal_each_alone(self, model):
        distilled, batch = model.distill(list(self.TASKS)), model.tokenize(self.QUERIES)
        assert batch["attention_mask"].all()
        with torch.no_grad():
            together = model(**batch, demonstrations=distilled).logits
        tokens = model.generate(**batch, demonstrations=distilled, **GREEDY, eos_token_id=None)
        for row, (query, task) in enumerate(zip(self.QUERIES, self.TASKS, strict=True)):
            own = model.tokenize(query)
            with torch.no_grad():
                alone = model(**own, demonstrations=model.distill(task)).logits[0]
            torch.testing.assert_close(together[row], alone, **CLOSE)
            expected = model.generate(**own, demonstrations=task, **GREEDY, eos_token_id=None)[0]
            assert tokens[row].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
@pytest.mark.parametrize("form", ["kv", "embeds"])
@pytest.mark.parametrize("method", ["distill", "read"])
def test_a_text_beyond_the_position_table_is_refused(tiny_model, tokenizer, name, form, method):
    model = get_mend_model(tiny_model(name), MendConfig(num_virtual_tokens=3, prefix_form=form), tokenizer)
    with (
        pytest.warns(UserWarning, match="cut away"),
        pytest.raises(ShapeError, match=r"at most 512 tokens .* got 90\d: lower max_distiller_tokens"),
    ):
        getattr(model, method)(SHOTS * 60)


def test_joined_vectors_beyond_the_position_table_are_refused(tiny_model, tokenizer):
    config = MendConfig(num_virtual_tokens=90, prefix_form="embeds", overflow="concat", max_distiller_tokens=24)
    model = get_mend_model(tiny_model("gpt2"), config, tokenizer)
    with pytest.raises(ShapeError, match="fewer demonstrations"):
        model(**model.tokenize("bad"), demonstrations=SHOTS * 5)


@pytest.mark.parametrize("form", ["kv", "embeds"])
@pytest.mark.parametrize("overflow", ["truncate", "concat", "recurrent"])
def test_a_base_model_in_half_precision_reads_and_answers(tiny_model, tokenizer, form, overflow):
    config = MendConfig(
        num_virtual_tokens=3, prefix_form=form, overflow=overflow, max_distiller_tokens=24, lora_dropout=0.0
    )
    model = get_mend_model(tiny_model("llama").bfloat16(), config, tokenizer).eval()
    distilled = model.distill(SHOTS[:1] * 3 if overflow != "truncate" else SHOTS[:1])
    query = model.tokenize("bad")
    assert model(**query, demonstrations=distilled).logits.dtype == torch.bfloat16
    assert model.generate(**query, demonstrations=distilled, **GREEDY).shape[0] == 1
