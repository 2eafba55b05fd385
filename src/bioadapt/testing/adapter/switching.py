"""Disabled, several at once, over a LoRA."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from ..compare import assert_equal_tensors, assert_identical, assert_same, copied, seeded
from .subject import Adapted, Inside, base_tensors, bio_tensors, on


class Switching(Inside):
    """What is switched off is gone, what is switched on adds up."""

    def test_disabled_is_the_base_bit_for_bit(self, adapted: Adapted) -> None:
        model, expected = adapted.woken(), adapted.output(adapted.host.model())
        with model.disable_adapter():
            assert_identical(adapted.output(model), expected, "the disabled adapter")
        assert not torch.equal(adapted.output(model), expected)

    def test_unload_returns_the_base(self, adapted: Adapted) -> None:
        base = adapted.host.model()
        names, tensors = [name for name, _ in base.named_modules()], base_tensors(base)
        returned = adapted.woken(base).unload()
        assert returned is base
        assert [name for name, _ in returned.named_modules()] == names
        assert_equal_tensors(copied(returned.state_dict().items()), tensors, "the unloaded model")
        assert_identical(adapted.output(returned), adapted.output(adapted.host.model()), "the unloaded model")

    @on("bert", "gpt2", "resnet")
    def test_two_active_adapters_add_up(self, adapted: Adapted) -> None:
        model = with_second(adapted)
        with model.disable_adapter():
            nothing = at_first_site(adapted, model)
        first, second, both = (changed_by(adapted, model, names) - nothing for names in (["default"], ["second"], ALL))
        assert not torch.allclose(first, second)
        assert_same(both, first + second, "both adapters")

    @on("bert", "gpt2", "resnet")
    def test_adapters_are_chosen_per_sample(self, adapted: Adapted) -> None:
        model, single = with_second(adapted), []
        for name in ALL:
            model.set_adapter(name)
            single.append(adapted.output(model))
        with model.disable_adapter():
            single.append(adapted.output(model))
        mixed = adapted.output(model, adapter_names=["second", "__base__", "default"])
        for sample, expected in enumerate((single[1], single[2], single[0])):
            assert_same(mixed[sample], expected[sample], f"the adapter of sample {sample}")


class Stacking(Inside):
    """Over a LoRA the bio adapter is a guest: the LoRA's output, files and tensors are what they were."""

    @on("bert", "gpt2", "resnet")
    def test_fresh_is_the_loras_output(self, adapted: Adapted) -> None:
        lora = over_lora(adapted)
        expected = adapted.output(lora)
        assert not torch.equal(expected, adapted.output(adapted.host.model()))
        assert_identical(adapted.output(adapted.fresh(lora)), expected, "a fresh adapter over a LoRA")

    @on("bert", "gpt2", "resnet")
    def test_disabled_and_unloaded_leave_the_lora(self, adapted: Adapted) -> None:
        lora = over_lora(adapted)
        expected, tensors = adapted.output(lora), copied(get_peft_model_state_dict(lora).items())
        model = adapted.woken(lora)
        assert not torch.equal(adapted.output(model), expected)
        with model.disable_adapter():
            assert_identical(adapted.output(model), expected, "disabled over a LoRA")
        assert_equal_tensors(get_peft_model_state_dict(lora), tensors, "the LoRA's checkpoint below an adapter")
        returned = model.unload()
        assert returned is lora
        assert_identical(adapted.output(returned), expected, "unloaded over a LoRA")
        assert_equal_tensors(get_peft_model_state_dict(returned), tensors, "the LoRA's checkpoint")

    @on("bert", "gpt2", "resnet")
    def test_checkpoint_does_not_depend_on_the_lora(self, adapted: Adapted) -> None:
        over, alone = adapted.woken(over_lora(adapted)), adapted.woken()
        assert get_peft_model_state_dict(over).keys() == get_peft_model_state_dict(alone).keys()
        assert bio_tensors(over).keys() == bio_tensors(alone).keys()


ALL = ["default", "second"]


def with_second(adapted: Adapted) -> PeftModel:
    """Two woken adapters."""
    model = adapted.woken()
    with seeded(14):
        model.add_adapter("second", adapted.config(init_weights=False, seed=1))
    return model.eval()


def at_first_site(adapted: Adapted, model: PeftModel) -> Tensor:
    """The output of the first adapted layer, which reads the same whatever adapters do."""
    found: list[Tensor] = []
    layer: nn.Module = model.base_model.model.get_submodule(model.targeted_module_names[0])
    hook = layer.register_forward_hook(lambda module, args, output: found.append(output))
    adapted.output(model)
    hook.remove()
    return found[0]


def over_lora(adapted: Adapted) -> PeftModel:
    """The host with a LoRA that does something, on the layers that the bio adapter takes by default."""
    targets = adapted.woken().targeted_module_names
    config = LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, fan_in_fan_out=adapted.host.name == "gpt2"
    )
    with seeded(15):
        return get_peft_model(adapted.host.model(), config).eval()


def changed_by(adapted: Adapted, model: PeftModel, names: list[str]) -> Tensor:
    model.base_model.set_adapter(names)
    return at_first_site(adapted, model)
