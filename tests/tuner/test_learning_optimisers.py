"""Local rules follow the last optimiser that steps their parameters; reference adapters follow what they copy."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel

from bioadapt import BioConfig, list_primitives, primitive_info
from bioadapt.tuner.learning import learning_of

LOCAL = [name for name in list_primitives() if primitive_info(name).learns]
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)


def adapted(*primitives):
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES))
    config = BioConfig(primitives=list(primitives), target_modules=["0.output.dense"], init_weights=False)
    return get_peft_model(model, config).train()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "nrn_" in name}


def loss_of(model, seed):
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))
    return model(inputs_embeds=x).last_hidden_state.pow(3).mean()


def assert_bit_equal(found, expected):
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def with_one_optimiser(model, after_step=None):
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for seed in (1, 2, 3):
        loss_of(model, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_one_per_parameter_in_the_backward(model):
    def update(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    optimizers = {parameter: torch.optim.SGD([parameter], lr=1e-2) for parameter in trainable(model)}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    for seed in (1, 2, 3):
        loss_of(model, seed).backward()


def with_two_optimisers(model):
    parts = [[p for p in trainable(model) if (p.dim() == 1) is vector] for vector in (True, False)]
    optimizers = [torch.optim.SGD(part, lr=1e-2) for part in parts if part]
    for seed in (1, 2, 3):
        loss_of(model, seed).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def halve(optimizer):
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)


class Inherited(torch.optim.SGD):
    """Its step is that of its parent, and then some."""

    def step(self, closure=None):
        super().step()
        halve(self)


class Outer(torch.optim.Optimizer):
    """Steps another optimiser, as Lookahead and torch's ZeroRedundancyOptimizer do, and then moves on by itself."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()
        halve(self)


@pytest.mark.parametrize("training", [with_one_per_parameter_in_the_backward, with_two_optimisers])
def test_however_the_parameters_are_stepped_the_rules_learn_the_same(training):
    one, other = adapted(*LOCAL), adapted(*LOCAL)
    with_one_optimiser(one)
    training(other)
    assert_bit_equal(state(other), state(one))


def test_rules_wait_for_the_outer_of_two_nested_optimisers():
    found = []
    for nested in (True, False):
        model = adapted("metaplasticity", "hebbian_trace")
        inner = torch.optim.SGD(trainable(model), lr=1e-2)
        loss_of(model, 1).backward()
        if nested:
            Outer(inner).step()
        else:
            Inherited(trainable(model), lr=1e-2).step()
        found.append(state(model))
    assert_bit_equal(*found)
    before = adapted("metaplasticity", "hebbian_trace")
    hidden = next(name for name in found[0] if name.endswith("metaplasticity.hidden"))
    resisted = 2 * found[0][hidden] / state(before)[hidden]  # 1 if the rule had seen the inner step alone
    assert resisted.mean() > 1.1


def test_rules_of_which_an_optimiser_holds_a_part_learn_by_the_next_forward():
    model = adapted("hebbian_trace")
    trace = next(buffer for name, buffer in model.named_buffers() if name.endswith("trace"))
    before = trace.clone()
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name.endswith("plasticity")], lr=1e-2)
    loss_of(model, 1).backward()
    optimizer.step()
    assert torch.equal(trace, before)
    loss_of(model, 2)
    assert not torch.equal(trace, before)


@pytest.mark.compatible("Several processes", "DeepSpeed, rules that change parameters or read traces")
@pytest.mark.parametrize("mark", ["_hp_mapping", "ds_id"])
def test_parameters_of_deepspeed_are_refused_where_its_steps_cannot_be_followed(mark, record_property):
    """DeepSpeed itself is not at hand: its marks on the parameters stand for it."""
    model = adapted("hebbian_trace", "synaptic_tagging")
    for parameter in trainable(model):
        setattr(parameter, mark, None)
    with pytest.raises(ValueError, match=r"hebbian_trace.*BioTrainerCallback"):
        loss_of(model, 1)
    for learning in learning_of(model):
        for rule in learning.rules():
            rule.announced = True  # as the callback does
    with pytest.raises(ValueError, match=r"synaptic_tagging changes its parameter 'early'.*DeepSpeed") as refusal:
        loss_of(model, 1)
    record_property("refused only", str(refusal.value))


# -- reference adapters --


def copied_by_parameters(model):
    """What TRL's trainers do with a policy that is an adapter already."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def output(model, name):
    model.set_adapter(name)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(3, 15).view(2, 6)).last_hidden_state
    model.set_adapter("default")
    return found


@pytest.mark.parametrize("name", LOCAL)
def test_a_reference_starts_where_the_policy_is(name):
    model = adapted(name)
    with_one_optimiser(model)
    copied_by_parameters(model)
    policy, again = output(model, "default"), copy.deepcopy(model)
    for each in (model, again):
        assert torch.equal(output(each, "ref"), policy)
    with_one_optimiser(model.train())  # the reference stays
    assert torch.equal(output(model, "ref"), policy) and not torch.equal(output(model, "default"), policy)


def test_an_adapter_that_copies_nothing_begins_afresh():
    model = adapted("homeostatic_scaling")
    with_one_optimiser(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    first, second = (buffer for name, buffer in model.named_buffers() if name.endswith("scale"))
    assert not torch.equal(first, second)
