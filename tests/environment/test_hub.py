"""An adapter goes to a hub and comes back: with a hub on this machine, and a process that may reach it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.hub import local_hub

PUSH_AND_LOAD = """
import copy, sys, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel
from bioadapt import BioConfig

torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
base, ids = BertModel(BertConfig(**sizes)).eval(), torch.arange(6)[None]
config = BioConfig("lateral_inhibition", init_weights=False)
if sys.argv[1] == "over a LoRA":
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"]), "below")
    model.requires_grad_(True)  # so that it is trained along, and saved in a folder within the folder
    model = get_peft_model(model, config, "own")
elif sys.argv[1] == "of transformers":
    model = copy.deepcopy(base)
    model.add_adapter(config, "own")
else:
    model = get_peft_model(copy.deepcopy(base), config)
with torch.no_grad():
    expected = model.eval()(ids).last_hidden_state
model.push_to_hub("me/adapter", tags=["mine"])
if sys.argv[1] != "over a LoRA":
    again = PeftModel.from_pretrained(base, "me/adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).last_hidden_state, expected)
"""


@pytest.mark.parametrize("way", ["alone", "over a LoRA", "of transformers"])
def test_an_adapter_goes_to_the_hub_with_its_card_and_comes_back(way, tmp_path):
    written = b"---\nlicense: mit\n---\nMy own words.\n"
    with local_hub() as (address, files):
        if way == "of transformers":
            files["README.md"] = written
        settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": "secret"}
        command = [sys.executable, "-W", "ignore", "-c", PUSH_AND_LOAD, way]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    card = files["README.md"].decode()
    assert "mine" in card
    assert ("My own words." if way == "of transformers" else "lateral_inhibition") in card
    if way == "over a LoRA":
        assert {"own/adapter_model.safetensors", "own/trained_along/below/adapter_config.json"} <= files.keys()
    else:
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
