"""A batch whose step is skipped leaves no trace in what local rules have learned, however it is skipped."""

import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertModel, Trainer, TrainerCallback, TrainingArguments

from bioadapt import BioConfig, BioTrainerCallback, list_primitives, primitive_info

LOCAL = [name for name in list_primitives() if primitive_info(name).learns]
SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)


def adapted(*primitives):
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SIZES))
    targets = ["0.output.dense", "0.attention.output.dense"]
    config = BioConfig(primitives=list(primitives), target_modules=targets, init_weights=False)
    return get_peft_model(model, config).train()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "nrn_" in name}


def assert_bit_equal(found, expected):
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def features(seed):
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed))


GOOD = [features(1), features(2)]
BAD = {"not finite": features(3) * torch.nan, "finite": features(3)}


def without_a_backward(model, optimizer, loss, skip):
    if not skip:
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def after_the_backward(model, optimizer, loss, skip):
    loss.backward()
    if not skip:
        optimizer.step()
    optimizer.zero_grad()


def gradients_emptied_between_forward_and_backward(model, optimizer, loss, skip):
    optimizer.zero_grad()
    loss.backward()
    if not skip:
        optimizer.step()


def gradients_set_to_zero(model, optimizer, loss, skip):
    loss.backward()
    if not skip:
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def trained(skipping, bad):
    model = adapted(*LOCAL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for x in [GOOD[0], *([] if bad is None else [bad]), GOOD[1]]:
        skipping(model, optimizer, model(inputs_embeds=x).last_hidden_state.pow(3).mean(), x is bad)
    return state(model)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    "skipping",
    [
        without_a_backward,
        after_the_backward,
        gradients_emptied_between_forward_and_backward,
        gradients_set_to_zero,
    ],
)
def test_a_skipped_batch_leaves_no_trace(skipping, kind):
    assert_bit_equal(trained(skipping, BAD[kind]), trained(skipping, None))


@pytest.mark.parametrize("fused", [None, True], ids=["plain", "fused"])
def test_a_step_that_the_scaler_skips_leaves_no_trace(fused):
    found = []
    for bad in (GOOD[1], None):
        # A power of two, so that halving it after the skipped step rounds nothing.
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

        model = adapted(*LOCAL)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        for x, skip in [(GOOD[0], False), *([] if bad is None else [(bad, True)]), (GOOD[1], False)]:
            loss = model(inputs_embeds=x).last_hidden_state.pow(3).mean()
            scaler.scale(loss * torch.inf if skip else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(state(model))
    assert_bit_equal(*found)


def test_statistics_that_are_not_finite_are_not_taken_even_if_the_step_is():
    model = adapted("homeostatic_scaling", "antihebbian_decorrelation")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "nrn_" in name}
    model(inputs_embeds=BAD["not finite"]).last_hidden_state.sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()  # as some loops mend gradients
    optimizer.step()
    assert_bit_equal({name: buffer for name, buffer in model.named_buffers()}, before)


def test_the_forwards_of_a_step_count_by_their_tokens():
    """Micro-batches of several lengths teach what one padded batch of all teaches."""
    names = ["homeostatic_scaling", "oja_subspace", "bcm_threshold", {"name": "fly_lora", "r": 8, "k": 3}]
    ids, short = torch.arange(3, 15).view(2, 6), 2
    mask = torch.ones_like(ids)
    mask[1, short:] = 0
    found = []
    for parts in ([(ids[:1], mask[:1]), (ids[1:, :short], mask[1:, :short])], [(ids, mask)]):
        model = adapted(*names)
        for part, real in parts:
            model(input_ids=part, attention_mask=real).last_hidden_state.sum().backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
        found.append(state(model))
    for name, expected in found[1].items():
        if "fly_lora.e" not in name:  # energies are sums, of which only ratios are used; errors are samples
            torch.testing.assert_close(found[0][name], expected, atol=1e-5, rtol=1e-4, msg=name)


class SkipsTheStep(TrainerCallback):
    """What the Trainer's scaler does where gradients overflow: the optimiser is asked, and does nothing."""

    def __init__(self, step):
        self.at = step

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        inner = optimizer.optimizer
        optimizer._is_overflow = state.global_step == self.at
        if optimizer._is_overflow:
            inner.step = lambda *args, **kwargs: inner.__dict__.pop("step") and None


@pytest.mark.parametrize("callback", [True, False])
def test_the_callback_does_not_commit_a_step_that_was_skipped(tmp_path, callback):
    class WithLoss(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, inputs_embeds):
            return {"loss": self.model(inputs_embeds=inputs_embeds).last_hidden_state.pow(3).mean()}

    found = []
    for skip in (1, None):
        model = adapted("homeostatic_scaling", "hebbian_trace")
        batches = [*GOOD[0], *(BAD["finite"] if skip else ()), *GOOD[1]]
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=0.0, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(WithLoss(model), args, train_dataset=[{"inputs_embeds": x} for x in batches])
        trainer._get_train_sampler = lambda rows: torch.utils.data.SequentialSampler(rows)
        trainer.add_callback(SkipsTheStep(skip))
        if callback:
            trainer.add_callback(BioTrainerCallback())
        trainer.train()
        found.append(state(model))
    assert_bit_equal(*found)
