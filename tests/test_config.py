from __future__ import annotations

import dataclasses
import json

import pytest

from mend_hf import MendConfig, __version__
from mend_hf.errors import CheckpointError, ConfigError


def test_every_field_has_a_default_and_says_what_it_does():
    assert all(field.metadata["help"] for field in dataclasses.fields(MendConfig))
    assert MendConfig().num_virtual_tokens == 100


def test_saving_and_loading_gives_the_same_settings(tmp_path):
    config = MendConfig(num_virtual_tokens=7, prefix_form="embeds", lora_target_modules=("q_proj", "v_proj"))
    config.save_pretrained(tmp_path)
    loaded = MendConfig.from_pretrained(tmp_path)
    assert loaded == dataclasses.replace(config, mend_version=__version__)


def test_all_impossible_values_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        MendConfig(num_virtual_tokens=-1, overflow="drop", lora_dropout=1.5, lora_r="many", input_prefix=None)
    for name in ("num_virtual_tokens", "overflow", "lora_dropout", "lora_r", "input_prefix"):
        assert f"- {name}: expected" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"prefix_form": "kv", "distiller_name_or_path": "gpt2", "num_virtual_tokens": 0}, "virtual tokens alone"),
        ({"prefix_form": "kv", "distiller_name_or_path": "gpt2", "max_slots": 200}, "no anchors that could be pooled"),
        ({"projection_rank": -1}, "projection_rank: expected at least 0"),
        ({"overflow": "recurrent", "distiller_name_or_path": "gpt2"}, 'use "concat"'),
        ({"prefix_form": "embeds", "num_virtual_tokens": 0}, "needs at least 1"),
        ({"lora_r": True}, "lora_r: expected int"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, remedy):
    with pytest.raises(ConfigError, match=remedy):
        MendConfig(**settings)


def test_an_unknown_key_is_dropped_with_a_warning(tmp_path):
    MendConfig().save_pretrained(tmp_path)
    path = tmp_path / "mend_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"flux": 3, "mend_version": "9.0"}))
    with pytest.warns(UserWarning, match=r"flux.*9\.0.*Upgrade mend_hf"):
        assert MendConfig.from_pretrained(tmp_path).num_virtual_tokens == 100


@pytest.mark.parametrize(("text", "message"), [("{", "damaged"), ("[]", "JSON object")])
def test_a_damaged_file_is_refused(tmp_path, text, message):
    (tmp_path / "mend_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        MendConfig.from_pretrained(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"mend_config\.json"):
        MendConfig.from_pretrained(tmp_path)


def test_saving_into_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="give another path"):
        MendConfig().save_pretrained(tmp_path / "taken")
