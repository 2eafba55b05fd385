"""Every primitive as a function of its settings.

Written by scripts/stubs.py from the registry; not to be edited.
"""

from typing import Any, Literal

def acetylcholine_balance(
    *,
    groups: int = 16,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """Features move towards their own recent past as far as that has been predicting them well.

    Args:
        groups: number of channel groups that share a time constant; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def antihebbian_decorrelation(
    *,
    rank: int = 8,
    rate: float = 0.1,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Latents inhibit each other as much as they have been active together, until they no longer are.

    Args:
        rank: number m of latents; an integer from 1 to 256.
        rate: learning rate eta of the lateral synapses; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def apical_basal(
    *,
    rank: int = 8,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A unit bursts if its own drive of now and a prediction from the past are both above threshold.

    Args:
        rank: number r of traces of the past; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def astrocyte_gain(
    *,
    groups: int = 16,
    tau: float = 64.0,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """Activity summed over a territory and many tokens raises or lowers the gain of everything in it.

    Args:
        groups: number of domains; an integer from 1 to 4096.
        tau: time constant of the calcium at birth, in tokens; a number from 1.0 to 4096.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def attention_gain(
    *,
    rank: int = 4,
    exponent: float = 2.0,
    self_weight: float = 0.25,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A learned attention field multiplies each unit's drive, and the attended population normalizes it.

    Args:
        rank: number of latents r of the attention field; an integer from 1 to 256.
        exponent: power p of the drive; a number from 1.0 to 3.0.
        self_weight: share alpha of a unit's own drive in its pool; a number from 0.1 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def basal_ganglia_gate(
    *,
    stripes: int = 2,
    rank: int = 8,
    resting: float = 0.2,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Stripes of working memory take in the present where Go wins over NoGo, and hold what they have elsewhere.

    Args:
        stripes: number S of stripes with a gate of their own; an integer from 1 to 64.
        rank: number of latents r held by all stripes together; an integer from 1 to 256.
        resting: how far a gate is open while Go and NoGo are silent; a number from 0.0 to 0.9.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def bcm_threshold(
    *,
    rate: float = 0.05,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """Each channel has a threshold that follows its mean power; activity below it is reversed, above it amplified.

    Args:
        rate: learning rate eta of the threshold; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def bump_attractor(
    *,
    planes: int = 2,
    units: int = 8,
    zero_scale: float = 0.5,
) -> dict[str, Any]:
    """A vector in the plane is moved by what comes in, and a ring of cells shows its direction, not its length.

    Args:
        planes: number of rings; an integer from 1 to 64.
        units: number of cells on a ring; an integer from 2 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def ca1_comparator(
    *,
    rank: int = 8,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """The gain falls with the similarity between the present token and those before it.

    Args:
        rank: number of features r that are compared; an integer from 2 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def cerebellar_granule(
    *,
    cells: int = 256,
    claws: int = 4,
    rank: int = 8,
    zero_scale: float = 0.5,
) -> dict[str, Any]:
    """Many cells that each sample a few inputs, few of them active, and a read-out that learns from coarse errors.

    Args:
        cells: number of granule cells; an integer from 8 to 4096.
        claws: number of inputs that a granule cell samples; an integer from 1 to 32.
        rank: number of Purkinje cells r; an integer from 2 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def complementary_fast_weights(
    *,
    rank: int = 8,
    rate: float = 0.02,
    zero_scale: float = 2.0,
) -> dict[str, Any]:
    """Content is bound to a key within the sequence at once, and what recurs is kept in a slow store.

    Args:
        rank: number of features r of a key and of its content; an integer from 1 to 64.
        rate: learning rate eta of the slow store; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def contrast_adaptation(
    *,
    groups: int = 16,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """Each group of channels is divided by how much it has been varying.

    Args:
        groups: number of channel groups that share a variance; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def cortical_column(
    *,
    width: int = 8,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Channels are cut into columns, and one small recurrent circuit with shared weights runs in each of them.

    Args:
        width: number w of channels in a column; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def dale_small_world(
    *,
    neighbours: int = 4,
    rewiring: float = 0.1,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Units send to a few neighbours and a few far ones, and all that one of them sends has the same sign.

    Args:
        neighbours: number k of senders of each unit; an integer from 1 to 64.
        rewiring: share of the senders that are drawn anew; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def dentate_separation(
    *,
    rank: int = 8,
    blocks: int = 16,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """A latent is expanded onto many granule cells, of which only one in each block fires.

    Args:
        rank: number of latents r on either side of the granule cells; an integer from 1 to 256.
        blocks: number of blocks of 8 granule cells; an integer from 1 to 512.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def divisive_normalization(
    *,
    exponent: float = 2.0,
    self_weight: float = 0.25,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Each unit is divided by the pooled activity of the population: expansive when faint, saturating when strong.

    Args:
        exponent: power p of the drive; a number from 1.0 to 3.0.
        self_weight: share alpha of a unit's own drive in its pool; a number from 0.1 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def dopamine_rpe(
    *,
    auxiliary: float = 0.0,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A temporal-difference error, read from the features, raises or lowers all of them together.

    Args:
        auxiliary: weight of the squared error among the losses; a number from 0.0 to 10.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def efference_copy(
    *,
    rank: int = 16,
    rate: float = 0.5,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A local rule learns which features follow from the layer's previous input, and takes them away.

    Args:
        rank: number r of signals in the copy; an integer from 1 to 256.
        rate: learning rate eta of the negative image; a number from 0.0 to 2.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def excitation_inhibition_balance(
    *,
    groups: int = 8,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """In each group of units the positive and the negative half are scaled towards their geometric mean.

    Args:
        groups: most groups of channels; none is smaller than 32; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def fly_lora(
    *,
    r: int = 32,
    k: int = 8,
    alpha: float | None = None,
    rho: float | None = None,
    score: Literal["magnitude", "signed"] = "magnitude",
    projection: Literal["gaussian", "rademacher"] = "gaussian",
    rate: float = 0.001,
    per_forward: bool = False,
    dropout: float = 0.0,
    detach_input: bool = False,
    save_projection: bool = False,
    blocks: int = 1,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """A frozen sparse random projection; the k of its r units that answer most strongly write into the output.

    Args:
        r: number of units (experts of rank one); an integer from 1 to 4096.
        k: number of units that write at each token, at most r; an integer from 1 to 4096.
        alpha: size of the change, times 1/r; a number from 0.0 to 65536.0, or None for 2 r.
        rho: share of the inputs a unit reads; a number from 1e-06 to 1.0, or None for k / r.
        score: what units compete by: |y| or y; one of 'magnitude', 'signed'.
        projection: the entries of A; one of 'gaussian', 'rademacher'.
        rate: step of the excitability d that balances the load; a number from 0.0 to 1.0.
        per_forward: whether d moves in every training forward, not once per optimiser step; True or False.
        dropout: dropout of the layer's input, in training; a number from 0.0 to 0.9.
        detach_input: whether no gradient reaches the layer's input through the adapter; True or False.
        save_projection: whether A is saved, instead of being drawn again from the seed; True or False.
        blocks: number of adapters side by side, each with r units of its own; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def gain_field(
    *,
    rank: int = 8,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """The layer's input sets a bounded gain for each feature of its output.

    Args:
        rank: number of latents r that modulate; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def gap_junction(
    *,
    reach: int = 2,
    zero_scale: float = 64.0,
) -> dict[str, Any]:
    """Every unit moves towards its neighbours, who move towards it by the same amount.

    Args:
        reach: number k of neighbours on either side; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def grid_cell_code(
    *,
    scales: int = 4,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Features are steps on a plane; grids of several scales read where their sum has led.

    Args:
        scales: number of modules, each a lattice of its own scale; an integer from 1 to 32.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def hebbian_trace(
    *,
    rank: int = 8,
    rate: float = 0.02,
    zero_scale: float = 0.25,
) -> dict[str, Any]:
    """A low-rank path whose core is a running correlation of what goes in and what comes out.

    Args:
        rank: number of latents r on either side; an integer from 1 to 256.
        rate: learning rate eta of the trace; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def heterosynaptic_scaling(
    *,
    rank: int = 8,
    zero_scale: float = 2.0,
) -> dict[str, Any]:
    """A low-rank change of the weights that leaves the length of every neuron's weight vector as it was.

    Args:
        rank: rank r of the change; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def homeostatic_scaling(
    *,
    rate: float = 0.05,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """A slow gain per channel brings every channel to the mean rate of all.

    Args:
        rate: learning rate eta of the scale; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def hopfield_completion(
    *,
    rank: int = 8,
    patterns: int = 32,
    zero_scale: float = 0.5,
) -> dict[str, Any]:
    """A latent state falls into the nearest of a set of learned attractors.

    Args:
        rank: number of features r of a pattern; an integer from 1 to 256.
        patterns: number of stored patterns; an integer from 1 to 1024.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def intrinsic_plasticity(
    *,
    target: float = 0.2,
    rate: float = 0.02,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """A sigmoid whose gain and threshold adapt, so that each unit is mostly silent and rarely strong.

    Args:
        target: mean rate mu that each unit strives for; a number from 0.05 to 0.3.
        rate: learning rate eta of gain and threshold; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def k_winners_take_all(
    *,
    fraction: float = 0.25,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Only the k strongest units of a token pass, unchanged; all others are silenced.

    Args:
        fraction: share of the units that win; a number from 0.05 to 0.9.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def kv_lif(
    *,
    steps: int = 6,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """A spiking unit that the more it fires, and the higher its voltage, the harder it is to drive further.

    Args:
        steps: number K of micro-steps, so that there are K + 1 levels; an integer from 1 to 16.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def lateral_inhibition(
    *,
    rank: int = 4,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """Each unit is reduced by a weighted sum of its neighbours' activity, down to silence.

    Args:
        rank: number of inhibitory pools r; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def leaky_integrate_fire(
    *,
    steps: int = 4,
    beta: float = 0.0,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Each unit counts the spikes that a leaky membrane makes of its drive: none below rheobase, then in steps.

    Args:
        steps: number K of micro-steps, so that there are K + 1 levels; an integer from 1 to 16.
        beta: growth of the threshold per spike, in thresholds; a number from 0.0 to 10.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def leaky_integrator(
    *,
    rank: int = 8,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Latents are averaged over the past, each with a time constant of its own.

    Args:
        rank: number of integrators r; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def liquid_reservoir(
    *,
    units: int = 8,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """A frozen bank of damped oscillators, randomly mixed and saturating, from which a read-out is trained.

    Args:
        units: number m of complex units; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def logogen(
    *,
    prior: float = 0.1,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """A unit whose word has come more often than the unit fires is easier to excite from then on, and else harder.

    Args:
        prior: c: tokens of evidence before any, equal for all units; a number from 0.001 to 1000.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def metaplasticity(
    *,
    rank: int = 8,
    hardness: float = 2.0,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """A low-rank path with binary input synapses, whose hidden strengths resist what would weaken them.

    Args:
        rank: number r of latents; an integer from 1 to 256.
        hardness: how fast resistance m grows with a hidden strength; a number from 0.0 to 20.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def neuro_ada(
    *,
    k: int = 8,
    selection: Literal["magnitude", "gradient", "random", "reverse"] = "magnitude",
    row_fraction: float = 1.0,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Every output neuron may change its k strongest input synapses, and no others.

    Args:
        k: number of synapses per neuron, at most all of them; an integer from 1 to 4096.
        selection: which synapses: largest weight, largest gradient (see select_synapses), any, smallest weight; one
            of 'magnitude', 'gradient', 'random', 'reverse'.
        row_fraction: share of the neurons that adapt, at least one; a number from 1e-06 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def neuro_lora(
    *,
    r: int = 32,
    k: int = 8,
    alpha: float | None = None,
    rho: float | None = None,
    score: Literal["magnitude", "signed"] = "magnitude",
    projection: Literal["gaussian", "rademacher"] = "gaussian",
    rate: float = 0.001,
    per_forward: bool = False,
    dropout: float = 0.0,
    detach_input: bool = False,
    save_projection: bool = False,
    blocks: int = 1,
    gate_width: int = 8,
    gate_input: Literal["token", "projection"] = "token",
    orthogonality: float = 0.1,
    orth_space: Literal["columns", "delta"] = "columns",
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """FlyLoRA with a learned gain per unit and token, which acts before the units compete and in what they write.

    Args:
        r: number of units (experts of rank one); an integer from 1 to 4096.
        k: number of units that write at each token, at most r; an integer from 1 to 4096.
        alpha: size of the change, times 1/r; a number from 0.0 to 65536.0, or None for 2 r.
        rho: share of the inputs a unit reads; a number from 1e-06 to 1.0, or None for k / r.
        score: what units compete by: |y| or y; one of 'magnitude', 'signed'.
        projection: the entries of A; one of 'gaussian', 'rademacher'.
        rate: step of the excitability d that balances the load; a number from 0.0 to 1.0.
        per_forward: whether d moves in every training forward, not once per optimiser step; True or False.
        dropout: dropout of the layer's input, in training; a number from 0.0 to 0.9.
        detach_input: whether no gradient reaches the layer's input through the adapter; True or False.
        save_projection: whether A is saved, instead of being drawn again from the seed; True or False.
        blocks: number of adapters side by side, each with r units of its own; an integer from 1 to 64.
        gate_width: number of hidden units g of the gate; an integer from 1 to 1024.
        gate_input: the context h: the layer's input, or its projection; one of 'token', 'projection'.
        orthogonality: weight of the penalty on experts alike; a number from 0.0 to 10.0.
        orth_space: what is kept orthogonal: columns of B, or whole experts; one of 'columns', 'delta'.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def nmda_branches(
    *,
    branches: int = 16,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Input synapses sit on separate dendritic branches, each with a local spike of its own.

    Args:
        branches: number M of branches; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def noradrenaline_reset(
    *,
    rank: int = 8,
    zero_scale: float = 2.0,
) -> dict[str, Any]:
    """A slow memory of latents that a surprise clears, so that it starts again from what is new.

    Args:
        rank: number r of latents; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def oja_subspace(
    *,
    rank: int = 8,
    rate: float = 0.05,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """A local rule finds the principal components of the features; each gets one learned gain.

    Args:
        rank: number r of components; an integer from 1 to 256.
        rate: learning rate eta of the components; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def on_off_rectification(
    *,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Each feature is split at two thresholds into an ON and an OFF half with separate gains.

    Args:
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def oscillatory_gating(
    *,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Each channel opens and closes with the position in the document, whatever the content.

    Args:
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def phase_coding(
    *,
    rank: int = 4,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """What drives a latent moves its phase against a clock; its amplitude never changes.

    Args:
        rank: number of oscillators r; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def place_fields(
    *,
    fields: int = 16,
    dimensions: int = 3,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Features are read as a place on a map, and only the cells whose field lies there answer.

    Args:
        fields: number of place fields; an integer from 1 to 1024.
        dimensions: number of axes of the map; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def population_code(
    *,
    centres: int = 6,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Each unit's value is read by cells with overlapping preferences, whose weighted vote is added to it.

    Args:
        centres: number K of tuning curves per channel; an integer from 2 to 12.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def precision_weighted_error(
    *,
    groups: int = 16,
    tau: float = 8.0,
    tau_variance: float = 32.0,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """The deviation from each channel's own past is divided by how much its group has been deviating.

    Args:
        groups: number of channel groups that share a precision; an integer from 1 to 4096.
        tau: time constant of the mean at birth, in tokens; a number from 1.0 to 4096.0.
        tau_variance: time constant of the variance at birth; a number from 1.0 to 4096.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def predictive_coding(
    *,
    rank: int = 8,
    auxiliary: float = 0.0,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A latent trace of the past predicts the present token; what remains is the error.

    Args:
        rank: number of latent causes r; an integer from 1 to 256.
        auxiliary: weight of the squared error among the losses; a number from 0.0 to 10.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def quadratic_dendrite(
    *,
    rank: int = 6,
    mode: Literal["bilinear", "ndi"] = "bilinear",
    zero_scale: float = 0.25,
) -> dict[str, Any]:
    """Products of projections of the input, or of one projection with the output, are added to each unit.

    Args:
        rank: number r of projections, or of pairs of them; an integer from 1 to 256.
        mode: what is multiplied: the input, or the output; one of 'bilinear', 'ndi'.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def resonate_and_fire(
    *,
    rank: int = 8,
    zero_scale: float = 2.0,
) -> dict[str, Any]:
    """Damped oscillators ring at periods of their own, and what rises above a threshold is passed on.

    Args:
        rank: number of resonators r; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def san_scaling(
    *,
    beta: bool = False,
    mode: Literal["both", "nt", "sp"] = "both",
    propagate_detached: bool = False,
    wiring: Literal["residual", "official_vit"] | dict[str, str] = "residual",
    patch_gain: bool = True,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """One gain per neuron scales its output, and the synapses of the next adapted layer that read it.

    Args:
        beta: whether a trainable shift of the output is added, which does not propagate; True or False.
        mode: where the gain acts: on the output (nt), on what reads it (sp); one of 'both', 'nt', 'sp'.
        propagate_detached: whether a gain learns nothing from the layers that read it; True or False.
        wiring: which layer's gain a layer reads: a table by model type, or {posterior: anterior} as expressions;
            one of 'residual', 'official_vit', or a dict of strings.
        patch_gain: whether in the official wiring the first gain acts on its output in mode sp too; True or False.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def sequence_memory(
    *,
    span: int = 256,
    zero_scale: float = 64.0,
) -> dict[str, Any]:
    """What followed earlier tokens that were like the present one is recalled and added to it.

    Args:
        span: number of tokens for which a transition can be recalled; an integer from 2 to 8192.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def serotonin_horizon(
    *,
    rank: int = 4,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A bank of traces from fast to slow is read at the time constant that a slow level of the features points to.

    Args:
        rank: number r of latents that are remembered; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def short_term_depression(
    *,
    groups: int = 32,
    tau: float = 11.0,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """A synapse answers less and less while it is used, and recovers in silence.

    Args:
        groups: number of channel groups that share a resource; an integer from 1 to 4096.
        tau: recovery time constant at birth, in tokens; a number from 1.5 to 4096.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def short_term_facilitation(
    *,
    groups: int = 32,
    tau: float = 11.0,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """A synapse with little to release at first answers more and more while it is used, and forgets in silence.

    Args:
        groups: number of channel groups that share a resource; an integer from 1 to 4096.
        tau: recovery time constant at birth, in tokens; a number from 1.5 to 4096.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def shunting_inhibition(
    *,
    rank: int = 4,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """Each unit saturates with its own drive, and the layer's input divides it further.

    Args:
        rank: number r of inhibitory latents; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def sparse_coding(
    *,
    atoms: int = 8,
    steps: int = 6,
    rate: float = 0.4,
    zero_scale: float = 1.0,
) -> dict[str, Any]:
    """Atoms that resemble each other inhibit each other, so that the fewest that explain the input remain.

    Args:
        atoms: number m of atoms in the dictionary; an integer from 1 to 256.
        steps: number K of steps of the competition; an integer from 1 to 64.
        rate: size eta of a step; a number from 0.01 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def spike_frequency_adaptation(
    *,
    groups: int = 16,
    zero_scale: float = 16.0,
) -> dict[str, Any]:
    """Each channel answers fully to what is new and less to what lasts, and is silent, not reversed, afterwards.

    Args:
        groups: number of channel groups that share a time constant; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def stdp_trace(
    *,
    rank: int = 6,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """An antisymmetric memory of which latent followed which, read by the latents of the present.

    Args:
        rank: number r of latents whose order is learned; an integer from 2 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def surround_suppression(
    *,
    groups: int = 4,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """A difference of Gaussians over neighbouring positions: a narrow centre minus a broad surround.

    Args:
        groups: number H of channel groups with widths of their own; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def synaptic_consolidation(
    *,
    levels: int = 6,
    exchange: float = 0.25,
    zero_scale: float = 32.0,
) -> dict[str, Any]:
    """A gain per channel whose value flows, step by step, into a chain of hidden variables, each slower than the last.

    Args:
        levels: number m of variables in the chain, w among them; an integer from 2 to 16.
        exchange: rate g at which the two fastest exchange; a number from 0.0 to 0.5.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def synaptic_pruning(
    *,
    threshold: float = 0.2,
    zero_scale: float = 32.0,
) -> dict[str, Any]:
    """The layer's weak weights are set to zero, its strong ones shrunk and scaled, neuron by neuron.

    Args:
        threshold: threshold at birth, in means of |W| of its row; a number from 0.001 to 10.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def synaptic_tagging(
    *,
    rank: int = 8,
    threshold: float = 0.001,
    zero_scale: float = 2.0,
) -> dict[str, Any]:
    """Changes of the weights fade back to a late phase, which follows them only where tag and protein meet.

    Args:
        rank: number r of latents; an integer from 1 to 256.
        threshold: smallest update that tags, about the learning rate; a number from 0.0 to 1.0.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def thalamic_relay(
    *,
    groups: int = 16,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """Past silence switches a group of channels from relaying to answering strong inputs in bursts.

    Args:
        groups: number of channel groups that switch together; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def travelling_wave(
    *,
    rows: int = 2,
    sites: int = 8,
    zero_scale: float = 0.5,
) -> dict[str, Any]:
    """Each latent runs along a row of sites, so that where something is tells when it came.

    Args:
        rows: number C of rows of the sheet; an integer from 1 to 64.
        sites: number N of sites in a row; an integer from 2 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def trn_searchlight(
    *,
    groups: int = 8,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """Groups of channels compete, and what one of them gains in amplification the others lose.

    Args:
        groups: number G of sectors; an integer from 1 to 4096.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def vesicle_release(
    *,
    sites: int = 4,
    zero_scale: float = 4.0,
) -> dict[str, Any]:
    """Transmission is the outcome of a few unreliable release sites, whose mean is used at evaluation.

    Args:
        sites: number N of release sites; an integer from 1 to 64.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

def vip_disinhibition(
    *,
    groups: int = 8,
    zero_scale: float = 8.0,
) -> dict[str, Any]:
    """Local activity recruits subtractive and divisive inhibition; the layer's input can call off the subtractive.

    Args:
        groups: number G of channel groups with interneurons of their own; an integer from 1 to 256.
        zero_scale: factor on what is zero at birth: how fast it learns; a number from 0.001 to 1000.0.
    """

dendritic_branches = nmda_branches
dopamine_gain = dopamine_rpe
precision_weighted_prediction_error = precision_weighted_error
synaptic_scaling = homeostatic_scaling
