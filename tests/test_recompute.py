from __future__ import annotations

import pytest
import torch

from mend_hf import MendCollator, MendConfig, MendTrainer, MendTrainingArguments, get_mend_model
from mend_hf.errors import ConfigError, UnsupportedModelError
from mend_hf.recompute import find_layers, recompute_layers

PAIRS = [("great film", "positive"), ("a bore", "negative"), ("good food", "positive"), ("bad food", "negative")]
ROWS = [
    {"demonstrations": PAIRS[: 1 + index], "query": query, "target": target}
    for index, (query, target) in enumerate(PAIRS)
]
FAMILIES = ("llama", "gpt2", "opt", "gemma3_text", "mistral")


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    def make_trainer(family="llama", config=None, **settings):
        torch.manual_seed(0)
        config = config or MendConfig(num_virtual_tokens=3, lora_r=2, lora_dropout=0.3, prefix_form="embeds")
        model = get_mend_model(tiny_model(family), config, tokenizer)
        defaults = {
            "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        args = MendTrainingArguments(**{**defaults, **settings})
        return MendTrainer(model=model, args=args, train_dataset=ROWS)

    return make_trainer


def run_step(model, batch):
    """Return the gradients of one step, and the bytes that were kept for it."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(1)
    columns = {name: column for name, column in batch.items() if "teacher" not in name}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**columns).loss
    loss.backward()
    return [parameter.grad for _, parameter in model.distiller.trained_tensors()], sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_and_less_is_kept(make_trainer, family, tokenizer):
    """With dropout: the second pass draws what the first one drew."""
    model = make_trainer(family).model.train()
    for _, parameter in model.distiller.trained_tensors():  # at birth the adapter adds nothing
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch = MendCollator(tokenizer, model.mend_config)(ROWS)
    expected, kept_before = run_step(model, batch)
    model.activation_checkpointing_enable()
    got, kept = run_step(model, batch)
    assert any(gradient.abs().sum() > 0 for gradient in expected)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert kept < kept_before / 2
    model.activation_checkpointing_enable(every_n_layers=2)
    assert kept < run_step(model, batch)[1] < kept_before
    model.activation_checkpointing_disable()
    assert run_step(model, batch)[1] == pytest.approx(kept_before, rel=0.01)


def test_a_training_has_the_same_losses(make_trainer):
    histories = []
    for enabled in (False, True):
        trainer = make_trainer(activation_checkpointing=enabled)
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


def test_layers_are_as_before_behind_the_block(tiny_model):
    model = tiny_model("llama")
    layers = find_layers(model)
    own = layers[0].forward
    layers[1].forward = hooked = lambda *args, **kwargs: None
    with recompute_layers(layers):
        assert "forward" in vars(layers[0])
    assert "forward" not in vars(layers[0])
    assert layers[0].forward == own
    assert layers[1].forward is hooked


def test_keys_and_values_are_refused(make_trainer):
    with pytest.raises(ConfigError, match="lower max_tokens_per_pass"):
        make_trainer(config=MendConfig(prefix_form="kv"), activation_checkpointing=True).train()


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="leave activation_checkpointing off"):
        find_layers(torch.nn.Linear(1, 1))


def test_offloading_is_refused(make_trainer):
    with pytest.raises(ConfigError, match="without offload"):
        make_trainer().model.activation_checkpointing_enable(offload=True)
