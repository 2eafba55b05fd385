"""Adapters saved by earlier code load to the outputs that they had then, and are saved again as they were.

`fixtures/write_saved_adapters.py` wrote the folders, with the code of commit 171d056.
"""

import hashlib
import json

import pytest
import torch
from fixtures.write_saved_adapters import ADAPTERS, FOLDER, base, output, untrained
from peft import PeftModel
from safetensors.torch import load_file

from bioadapt import list_primitives

CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a save writes of itself.
OF_THE_SAVE = {"bioadapt_version", "peft_version", "settings_fingerprint"}
# Fields and settings that the files lack because they came later, with the value that a file without them has.
LATER_FIELDS: dict[str, object] = {"feedforward_modules": None, "batch_first": None}
LATER_SETTINGS: dict[str, object] = {"zero_scale": 1.0, "per_forward": False, "resting": 0.5, "patch_gain": False}
# Sums in another order, on another processor, through two layers: relative to the largest number.
ROUNDING = 1e-6

pytestmark = [pytest.mark.rounding, pytest.mark.filterwarnings("error:.*trained over")]
# Files of that time whose Gaussian projection is drawn again know it by its last bits, which hang on vector kernels.
DRAWN_BY_ITS_BITS = ("competition", "weight_plasticity", "fly_lora", "neuro_lora")
DRAWN = hashlib.sha256(torch.randn(64, generator=torch.Generator().manual_seed(0)).numpy().tobytes()).hexdigest()
EACH = pytest.mark.parametrize("name", ADAPTERS)


def loaded(name: str) -> PeftModel:
    saved = ADAPTERS[name]
    if load_file(FOLDER / "hosts" / f"{saved.host}.safetensors").keys() != untrained(saved.host).state_dict().keys():
        pytest.skip(f"this version of transformers names the modules of {saved.host} otherwise")
    if name in DRAWN_BY_ITS_BITS and not DRAWN.startswith("e1275a785936ab2f"):
        with pytest.raises(ValueError, match="on the kind of processor that wrote it"):
            PeftModel.from_pretrained(base(saved), str(FOLDER / name))
        pytest.skip("another kind of processor wrote it, and it is refused by name")
    return PeftModel.from_pretrained(base(saved), str(FOLDER / name)).eval()


def recorded(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs and output."""
    given = load_file(FOLDER / name / "recorded.safetensors")
    return given, given.pop("output")


def earlier(configuration: dict) -> dict:
    """A configuration without what a save writes of itself, and without what came later and has its value."""
    found = {key: value for key, value in configuration.items() if key not in OF_THE_SAVE}
    found = {key: value for key, value in found.items() if key not in LATER_FIELDS or value != LATER_FIELDS[key]}
    if found["modules_to_save"]:  # PEFT adds its own names of heads once more at every save
        found["modules_to_save"] = sorted(set(found["modules_to_save"]))
    for entry in found["primitives"]:
        for key, value in LATER_SETTINGS.items():
            if entry.get(key) == value:
                del entry[key]
    return found


@EACH
@torch.no_grad()
def test_has_the_output_that_it_had(name):
    given, expected = recorded(name)
    found = output(loaded(name), given)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * expected.abs().max().item())
    without = output(base(ADAPTERS[name]).eval(), given)
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max(), "an adapter that does nothing proves nothing"


@EACH
def test_is_saved_as_it_was(name, tmp_path):
    loaded(name).save_pretrained(str(tmp_path))
    assert (tmp_path / WEIGHTS).read_bytes() == (FOLDER / name / WEIGHTS).read_bytes()
    then, now = (json.loads((folder / CONFIGURATION).read_text()) for folder in (FOLDER / name, tmp_path))
    assert earlier(now) == earlier(then)
    assert now.keys() - then.keys() <= LATER_FIELDS.keys() | OF_THE_SAVE


def test_every_primitive_of_that_time_is_in_one_of_them():
    held = {
        entry["name"]
        for name in ADAPTERS
        for entry in json.loads((FOLDER / name / CONFIGURATION).read_text())["primitives"]
    }
    assert len(held) == 66
    assert held <= set(list_primitives())
