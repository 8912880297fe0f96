"""What the page says of each analysis: what it measures and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Description:
    """The words around an analysis on the report page.

    Args:
        title: Heading of its section.
        measures: A sentence that says what is measured.
        reading: A sentence that says how to read the numbers.
        metrics: Meaning of each metric; for names with a slash, of the part before the last slash.
    """

    title: str
    measures: str
    reading: str
    metrics: Mapping[str, str] = field(default_factory=dict)

    def meaning(self, metric: str) -> str:
        """Meaning of a metric, or nothing where none is known.

        Example:
            >>> Description("", "", "", {"change": "by block"}).meaning("change/h.0")
            'by block'
        """
        return self.metrics.get(metric) or self.metrics.get(metric.rpartition("/")[0], "")


_DESCRIPTIONS: dict[str, Description] = {}

# Of the sections on the page.
_ORDER = (
    "golden_snapshot",
    "golden_parameters",
    "reverse_golden_parameters",
    "basin_volume",
    "taylor_diff",
    "head_plasticity",
    "plasticity_sweep",
    "parameter_distribution",
    "attention_tracker",
    "knowledge_coupling",
    "ripple_effects",
    "coupling_drift",
    "explain_change",
    "continuations",
    "variant_losses",
)


def describe(analysis: str, description: Description) -> None:
    """Adds the description of an analysis; the page shows analyses of somebody else in the order of their descriptions.

    Args:
        analysis: The ``analysis`` field of its rows.
        description: The words.

    Raises:
        ValueError: It is described already.

    Example:
        >>> describe("golden_parameters", Description("Golden", "", ""))
        Traceback (most recent call last):
        ValueError: analysis 'golden_parameters' is described already: 'Golden parameters'
    """
    if analysis in _DESCRIPTIONS:
        raise ValueError(f"analysis {analysis!r} is described already: {_DESCRIPTIONS[analysis].title!r}")
    _DESCRIPTIONS[analysis] = description


def description_of(analysis: str) -> Description:
    """The description of an analysis; one that was never described gets its own name as the title.

    Example:
        >>> description_of("some_analysis").title
        'Some analysis'
    """
    from lightning_goldy.report import topics  # noqa: F401

    return _DESCRIPTIONS.get(analysis) or Description(analysis.replace("_", " ").capitalize(), "", "")


def position_of(analysis: str) -> int:
    """Place of an analysis on the page; those without a description come last.

    Example:
        >>> position_of("golden_snapshot") < position_of("golden_parameters") < position_of("some_analysis")
        True
    """
    order = [*_ORDER, *(name for name in _DESCRIPTIONS if name not in _ORDER)]
    return order.index(analysis) if analysis in order else len(order)


describe(
    "basin_volume",
    Description(
        title="Basin volume",
        measures=(
            "How robust the model is: the volume of the region around the weights in which its predictions on the "
            "probe stay within a Kullback-Leibler divergence of the cutoff, as a log-probability under the measure."
        ),
        reading=(
            "A larger log-volume is a wider basin: more of the parameter space says the same. Every number is a lower "
            "bound that a few directions dominate, so differences within the intervals mean nothing, and only volumes "
            "of one measure, sigma and cutoff compare. A large negative number is normal: it grows with the number of "
            "parameters, as bits per parameter does not."
        ),
        metrics={
            "log_volume": "log-mean-exp of the directions' estimates, nats; a lower bound in expectation",
            "lower_bound": "mean of the estimates, nats; by Jensen below the log-volume",
            "interval_low": "lower end of the 95 % bootstrap interval of the log-volume, nats",
            "interval_high": "upper end of that interval, nats",
            "bits_per_parameter": "bits per parameter that it takes to name a point of the region",
            "spread": "standard deviation of the estimates, nats; a narrow one is no proof of accuracy",
            "effective_sample_size": "how many directions the volume rests on",
            "scaling_exponent": "d log V / d log cutoff, from slopes along the directions; D/2 at a regular minimum",
            "scaling_exponent_fit": "the same, fitted over the cutoffs",
            "learning_coefficient_slope": (
                "d log V / d log cutoff between the two smallest cutoffs: like a local learning coefficient, half the "
                "effective dimension, where they are small"
            ),
            "tolerance": "what the tolerance of the radii may move an estimate by, nats",
            "unbounded": "directions along which the cutoff was never reached",
            "evaluations": "evaluations of the divergence, each one forward pass over the split",
            "sigma": "standard deviation of the Gaussian measure",
            "eps": "damping of the preconditioner",
        },
    ),
)
describe(
    "taylor_diff",
    Description(
        title="Taylor expansion around the base",
        measures=(
            "Whether the finetune is still a small step: what the derivatives at the base predict for the loss and the "
            "logits at the present weights, against what they are."
        ),
        reading=(
            "Where the first order predicts the change (a nonlinearity near 0) the finetune is lazy: gradients at the "
            "base tell all of it. Near 1 and above, the first order predicts nothing, and arguments that linearise the "
            "model around its base do not hold for this run."
        ),
        metrics={
            "base_loss": "loss at the base, nats",
            "loss": "mean loss of the model as it is, nats; by order, the one predicted",
            "change": "loss now minus loss at the base, nats",
            "residual": "actual minus predicted loss, nats",
            "relative_error": "distance of the logits from what stands for them over how far they moved; the predicted",
            "kl_divergence": "mean KL(model || what stands in for it), nats per target; the prediction",
            "top1_agreement": "share of the positions where both prefer the same token",
            "first_order": "g . Delta, nats",
            "second_order": "half the curvature along the step, nats",
            "second_to_first": "size of the second-order term over the first",
            "step_norm": "||Delta||",
            "gradient_norm": "||g|| at the base",
            "nonlinearity": "relative error of the first order, by which the regime is told",
        },
    ),
)
describe(
    "head_plasticity",
    Description(
        title="Head plasticity",
        measures=(
            "Which attention heads the finetune needs: the least important ones are closed along a schedule, the model "
            "trains on, and the most wanted of them open again."
        ),
        reading=(
            "The step up of the loss at a cut is what the heads were worth at that moment, the distance that is left "
            "when heads regrow is what the model could not do without them. Compare with the strategy `random` before "
            "you trust a score. Losses are of the probe, in evaluation mode."
        ),
        metrics={
            "loss": "mean loss of the model as it is, nats; over the probe's samples, with the present gates",
            "perplexity": "exponential of that loss",
            "active_heads": "open heads",
            "closed_share": "closed heads divided by all",
            "learning_rate_multiplier": "of the attention of the layer that was cut last; 1 = the run's own rate",
            "cycle": "cycles that are finished",
            "recovery_steps": "optimizer steps from the last cut until the loss was back within the margin",
            "cut": "of the probe around a cut",
            "regrow": "of the probe around a regrowth",
            "finish": "of the probe as the cycle began (before) and as it ended",
            "rolled_back": "1 when the cycle cost too much and was undone",
        },
    ),
)
describe(
    "plasticity_sweep",
    Description(
        title="Head plasticity: strategies compared",
        measures=(
            "The same finetune with every combination of strategy, pruning level and number of cycles, and once "
            "without pruning: how the losses at the end compare."
        ),
        reading=(
            "Differences below the range over the seeds mean nothing, and with one seed there is no range. A strategy "
            "that does not beat `random` has found nothing."
        ),
        metrics={
            "runs": "runs with pruning",
            "best_cost": "smallest mean rise of the loss over the run without pruning, nats",
            "worst_cost": "largest mean rise of the loss, nats",
        },
    ),
)
