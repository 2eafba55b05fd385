"""Local rules and saving in several processes: replicas, shards, parts of an optimiser, and one process alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5Model

from bioadapt import BioConfig, build_primitive, list_primitives, primitive_info
from bioadapt.tuner.learning import penalties

# The three whose rules change parameters, one with a penalty on parameters, and one of each other sort.
PRIMITIVES = [
    "hebbian_trace", "synaptic_consolidation", "synaptic_tagging", "metaplasticity", "lateral_inhibition",
    {"name": "neuro_lora", "r": 8, "k": 3},
]  # fmt: skip
needs_fsdp2 = pytest.mark.skipif(torch.__version__ < (2, 9), reason="FSDP2 of this torch does not run on CPUs")
ROWS = torch.arange(3, 27).view(4, 6)


def bert(primitives=PRIMITIVES):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    model = BertModel(BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))
    targets = ["0.output.dense", "0.attention.output.dense"]
    config = BioConfig(primitives=primitives, target_modules=targets, init_weights=False)
    return get_peft_model(model, config).train()


def t5():
    torch.manual_seed(0)
    model = T5Model(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0))
    targets = ["o", "wo"]
    names = ["hebbian_trace", "homeostatic_scaling"]
    return get_peft_model(model, BioConfig(primitives=names, target_modules=targets, init_weights=False)).train()


# The mean square of what a model ends with is fixed by its last normalisation: the losses are mean cubes.


def trained(model, optimizer, rows, run=None, **given):
    for _ in range(2):
        optimizer.zero_grad()
        (run or model)(input_ids=rows, **given).last_hidden_state.pow(3).mean().backward()
        terms = penalties(model)
        if terms:
            sum(terms).backward()
        optimizer.step()
    found = get_peft_model_state_dict(model)
    return {key: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for key, tensor in found.items()}


def adamw(model, kind=torch.optim.AdamW, **given):
    return kind([p for p in model.parameters() if p.requires_grad], lr=1e-3, **given)


def replicas_of_two_stacks(rows):
    model = t5()
    run = nn.parallel.DistributedDataParallel(model)
    return trained(model, adamw(model), rows, run, decoder_input_ids=rows)


def parts_of_the_optimiser(rows):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = bert()
    run = nn.parallel.DistributedDataParallel(model)
    return trained(model, adamw(model, ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW), rows, run)


def shards(rows, **given):
    from torch.distributed.fsdp import fully_shard

    model = bert()
    fully_shard(model.base_model.model.encoder.layer[0], **given)
    fully_shard(model, **given)
    return trained(model, adamw(model), rows)


def shards_of_what_is_learned(rows):
    """Parameters stay gathered between forward and backward, as ZeRO-2 leaves them."""
    return shards(rows, reshard_after_forward=False)


def shards_in_half_precision(rows):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = bert()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.base_model.model.encoder.layer[0], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return trained(model, adamw(model, torch.optim.SGD), rows)


def one_process_alone(rows):
    if dist.get_rank():
        return {}
    model = bert()
    return trained(model, adamw(model), ROWS)


def flat_shards(rows):
    from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.bert.modeling_bert import BertLayer

    policy = ModuleWrapPolicy({BertLayer})
    cpu = dict(use_orig_params=True, device_id=torch.device("cpu"), auto_wrap_policy=policy)
    with pytest.raises(ValueError, match=r"synaptic_consolidation.*'efficacy'.*fully_shard"):
        model = bert(["synaptic_consolidation"])
        trained(model, adamw(model), rows, FullyShardedDataParallel(model, **cpu))
    with pytest.raises(ValueError, match=r"neuro_lora has a penalty.*fully_shard"):
        model = bert([{"name": "neuro_lora", "r": 8, "k": 3}])
        trained(model, adamw(model), rows, FullyShardedDataParallel(model, **cpu))
    model = bert(["hebbian_trace", "lateral_inhibition"])
    run = FullyShardedDataParallel(model, **cpu)
    trained(model, adamw(run), rows, run)
    with FullyShardedDataParallel.state_dict_type(
        run, StateDictType.FULL_STATE_DICT, FullStateDictConfig(rank0_only=False)
    ):
        whole = run.state_dict()
    return get_peft_model_state_dict(model, state_dict=whole)


def divided_layers(rows):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def host():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
        return parallelize_module(layers, init_device_mesh("cpu", (2,)), plan)

    for target, name in [("0", name) for name in list_primitives()] + [
        ("1", name) for name in list_primitives() if primitive_info(name).needs_input
    ]:
        with pytest.raises(ValueError, match=f"{name} cannot act on {target}: the (out|in)puts of Linear are divided"):
            get_peft_model(host(), BioConfig(primitives=[name], target_modules=[target]))
    config = BioConfig(primitives=["lateral_inhibition"], target_modules=["1"], init_weights=False)
    torch.manual_seed(1)
    whole = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    whole.load_state_dict({key: tensor.full_tensor() for key, tensor in host().state_dict().items()})
    x, outputs = torch.linspace(-1, 1, 24).view(3, 8), []
    for model in (host(), whole):
        torch.manual_seed(2)
        outputs.append(get_peft_model(model, config)(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1])
    return {}


CASES = [
    replicas_of_two_stacks, parts_of_the_optimiser, shards, shards_of_what_is_learned, shards_in_half_precision,
    one_process_alone, flat_shards,
    divided_layers,
]  # fmt: skip


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for case in CASES:
        try:
            found = case(ROWS[2 * rank : 2 * rank + 2])
        except BaseException as error:  # the other cases go on; pytest's own failures are no exceptions
            found = f"{type(error).__name__}: {error}"
        torch.save(found, f"{folder}/{case.__name__}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), nprocs=2)
    return lambda case: [torch.load(f"{folder}/{case.__name__}.{rank}") for rank in range(2)]


def assert_close(found, expected):
    assert not isinstance(found, str), found
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # Two means of two rows are rounded otherwise than one of four.
        torch.testing.assert_close(found[key].float(), tensor.float(), atol=2e-5, rtol=1e-3, msg=key)


@pytest.mark.compatible("Several processes", "DDP")
def test_replicas_of_two_stacks_agree_and_learn_as_one_process_does(found):
    model = t5()
    expected = trained(model, adamw(model), ROWS, decoder_input_ids=ROWS)
    first, second = found(replicas_of_two_stacks)
    assert_close(first, expected)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            parts_of_the_optimiser,
            marks=pytest.mark.compatible("Several processes", "ZeroRedundancyOptimizer (as ZeRO-1)"),
        ),
        pytest.param(
            shards_of_what_is_learned,
            marks=[needs_fsdp2, pytest.mark.compatible("Several processes", "FSDP2 without resharding (as ZeRO-2)")],
        ),
        pytest.param(shards, marks=[needs_fsdp2, pytest.mark.compatible("Several processes", "FSDP2 (as ZeRO-3)")]),
    ],
)
def test_what_is_divided_learns_and_saves_as_one_process_does(found, case):
    model = bert()
    expected = trained(model, adamw(model), ROWS)
    for saved in found(case):
        assert_close(saved, expected)


@needs_fsdp2
@pytest.mark.compatible("Several processes", "FSDP2 with mixed precision")
def test_what_is_divided_computes_in_half_precision_and_keeps_its_own(found):
    """The same as one process whose forwards read copies of all parameters in half precision."""
    model = bert()
    born = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}

    def run(**given):
        half = {key: parameter.bfloat16() for key, parameter in model.named_parameters()}
        return torch.func.functional_call(model, half, (), given)

    expected = trained(model, adamw(model, torch.optim.SGD), ROWS, run)
    first, second = found(shards_in_half_precision)
    assert not isinstance(first, str), first
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    for key, tensor in expected.items():
        assert first[key].dtype == tensor.dtype
        # What two forwards in bf16 round otherwise than one, of how far the tensor has moved; 1e-6 for those at rest.
        moved = (tensor - born[key]).float().norm()
        assert (first[key] - tensor).float().norm() <= 0.05 * moved + 1e-6, key


def test_one_process_that_trains_alone_waits_for_nobody(found):
    model = bert()
    assert_close(found(one_process_alone)[0], trained(model, adamw(model), ROWS))


@pytest.mark.compatible("Several processes", "FSDP1")
def test_flat_shards_save_as_one_process_does_or_are_refused(found):
    model = bert(["hebbian_trace", "lateral_inhibition"])
    expected = trained(model, adamw(model), ROWS)
    for saved in found(flat_shards):
        assert_close(saved, expected)


@pytest.mark.parametrize("name", list_primitives())
def test_every_parameter_can_be_sharded(name):
    """`fully_shard` takes contiguous ones alone."""
    parameters = build_primitive(name, 12, 16).named_parameters()
    assert [key for key, parameter in parameters if not parameter.is_contiguous()] == []


@pytest.mark.compatible("Several processes", "tensor parallelism")
def test_layers_that_are_divided_are_refused_by_name_or_compute_the_same(found):
    assert found(divided_layers) == [{}, {}]
