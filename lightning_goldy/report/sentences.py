"""The sentences that answer each question, one function of rows per analysis.

No sentence claims more than its interval does; every branch has a test.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from lightning_goldy.report.answers import (
    Bar,
    Finding,
    interval_of_mean,
    interval_of_share,
    interval_of_turned,
    paired_differences,
    register_answer,
    unequal_settings,
)
from lightning_goldy.report.figures import Row
from lightning_goldy.report.formatting import format_number, percent, percents_apart, points, remarks

# Fewer samples than this tell a share or a mean too roughly to be trusted.
_FEW_SAMPLES = 16
_FEW_EFFECTIVE = 2.0


@register_answer("change_attribution", "carries")
def answer_by_attribution(rows: Sequence[Row]) -> Finding | None:
    """Which share of the elements recovers the effect, beside as many at random, and where the effect sits."""
    row = rows[-1]
    result, graft = row["result"], row["result"].get("graft") or {}
    effect, metric = _metric(row, "effect"), result.get("metric", "loss")
    if effect is None:
        return None
    if effect == 0:
        return Finding(f"No parameter carries anything: the {metric} has not changed on the samples that score.")
    cause = f", for {result['cause']}" if result.get("cause") else ""
    missed = f"the parts miss the change by {percent(_metric(row, 'gap'))}{cause}"
    doubts = [*([] if result.get("complete", True) else [missed]), *filter(None, [result.get("weak")])]
    place = _largest_part(result, effect)
    points = [point for point in graft.get("points", ()) if point["method"] == "attribution"]
    points = [point for point in points if _is_number(point.get("recovered"))]
    share = _metric(row, "share_for_95")
    point = next((point for point in points if share is not None and point["share"] == share), None)
    point = point or max(points, key=lambda other: other["recovered"], default=None)
    if point is None:
        sentence = f"{place[0].upper()}{place[1:]}; how few elements recover the effect was not measured."
        return Finding(sentence, null="", doubts=(*doubts, "no sample was held out"))
    chance = _recovered(graft, "random", point["share"])
    sentence = f"{_told_of_graft(point, metric, enough=share is not None)}; {place}."
    doubts += _doubts_of_graft(graft, point, chance)
    null = "" if chance is None else f"as many elements at random recover {percent(chance)}"
    held_out = graft.get("n_held_out", 0)
    told = f"95 % interval {percent(point.get('low'))} to {percent(point.get('high'))} over {held_out} held-out samples"
    if point.get("low") is None or point.get("high") is None:
        told = "no interval: one held-out sample" if held_out < 2 else "no interval"
    bar = Bar(point["recovered"], point.get("low"), point.get("high"), chance)
    return Finding(sentence, told, null, (*doubts, *_marks(row)), bar, "effect")


def _told_of_graft(point: Mapping[str, Any], metric: str, *, enough: bool) -> str:
    """What a share of the elements recovers: a part, as much as all of them, more than that, or nothing."""
    recovered, ends = point["recovered"], _ends((point.get("low"), point.get("high")))
    # What did not reach the 95 % that are looked for must not read as if it had.
    rounded = "just below 95 %" if recovered < 0.95 and percent(recovered) == "95 %" else percent(recovered)
    elements, much = f"{percent(point['share'])} of the elements", f"{rounded} of the change in {metric}"
    where = "on samples that did not score"
    if recovered <= 0:
        return (
            f"No share of the elements that was tried recovers the change in {metric} {where}; {elements} make {much}"
        )
    if recovered > 1:
        alike = ends is None or ends[0] <= 1
        more = (
            "no more than all of them beyond noise" if alike else "more than all of them, as the others work against it"
        )
        return f"{elements} recover {much} {where}, {more}"
    return f"{elements} recover {much} {where}{'' if enough else ', the most of the shares tried'}"


def _doubts_of_graft(graft: Mapping[str, Any], point: Mapping[str, Any], chance: float | None) -> list[str]:
    doubts = []
    if graft.get("n_held_out", 0) < _FEW_SAMPLES:
        doubts.append(graft.get("weak") or f"only {graft.get('n_held_out', 0)} held-out samples")
    low, high = point.get("low"), point.get("high")
    if low is None or high is None:
        return [*doubts, "no interval"]
    if chance is not None and low <= chance:
        doubts.append("as many elements at random lie within the interval")
    if low <= 0:
        doubts.append("the interval includes 0")
    if high - low > 0.5:
        doubts.append("the interval is wider than half of the effect")
    return doubts


def _recovered(graft: Mapping[str, Any], method: str, share: float) -> float | None:
    points = (point for point in graft.get("points", ()) if point["method"] == method and point["share"] == share)
    return next((point["recovered"] for point in points), None)


def _largest_part(result: Mapping[str, Any], effect: float) -> str:
    """The kind of parameter that carries most of the effect, as far as its interval tells."""
    total = result.get("total") or effect
    kinds = [kind for kind in result.get("kinds") or [] if _is_number(kind["contribution"] / total)]
    if not kinds:
        return "no part of it is told apart"
    kind = max(kinds, key=lambda row: row["contribution"] / total)
    share, ends = kind["contribution"] / total, _ends_of_part(kind, total)
    span = f" [{percent(ends[0])}, {percent(ends[1])}]" if ends else ""
    much, named = f"{percent(share)}{span}", f"the {kind['group']} parameters"
    if kind.get("elements") == 1:
        return f"nothing but {named} was trained"
    size = f"{percent(kind.get('elements'))} of all"
    if share <= 0:
        return f"no kind of parameter carries it by itself; {named}, {size}, have {much} of it"
    if ends is not None and ends[0] <= 0:
        return f"where it sits is within noise; {named}, {size}, have {much} of it"
    if ends is not None and ends[1] - ends[0] > 1:
        return f"where it sits is open, for the interval is wider than the effect; {named}, {size}, have {much} of it"
    if share >= 1.005:
        # Of one sum, in which parts of opposite sign cancel; of all such samples only as far as the interval tells.
        told = f"{named}, {size}, make {much} of it, and the others take {percent(share - 1)} back: parts cancel"
        if ends is None:
            return f"{told}, as far as can be told without an interval"
        return told if ends[0] > 1 else f"{told}, perhaps by noise alone"
    told = f"{much} of it sits in {named}, {size}"
    as_large = ends is not None and _is_number(kind.get("elements")) and ends[0] <= kind["elements"]
    return f"{told}, no more than their number tells" if as_large else told


def _ends_of_part(kind: Mapping[str, Any], total: float) -> tuple[float, float] | None:
    ends = _ends((kind.get("share_low"), kind.get("share_high")))
    if ends is not None or _ends((kind.get("low"), kind.get("high"))) is None:
        return ends
    # Of rows that tell only the contribution's.
    low, high = sorted(kind[end] / total for end in ("low", "high"))
    return low, high


@register_answer("golden_snapshot", "carries")
def answer_by_norms(rows: Sequence[Row]) -> Finding | None:
    """How far the weights moved, and where most: not what carries the effect."""
    row = rows[-1]
    moved = _metric(row, "relative_change")
    if moved is None:
        return None
    if moved == 0:
        return Finding("No parameter has moved.", null="0 without training", course="relative_change")
    blocks = {
        name.partition("/")[2]: value
        for name in row["metrics"]
        if name.startswith("relative_change/") and (value := _metric(row, name)) is not None
    }
    most = max(blocks, key=lambda name: blocks[name], default="")
    where = f", {most} most ({_of_norm(blocks[most])})" if most else ""
    doubts = ("how far weights moved does not tell what carries the effect; ChangeAttribution does",)
    sentence = f"The weights moved by {_of_norm(moved)}{' of' if moved < 10 else ''} their norm{where}."
    return Finding(
        sentence, "exact, no sample", "0 without training", (*doubts, *_marks(row)), course="relative_change"
    )


@register_answer("taylor_diff", "kind")
def answer_by_expansion(rows: Sequence[Row]) -> Finding | None:
    """How much of the change in logits the first order leaves unexplained."""
    row = rows[-1]
    left, change = _metric(row, "nonlinearity"), _metric(row, "change")
    if change == 0 and left is None:
        return Finding("The loss has not changed, so there is no change to expand.")
    if row["result"].get("regime") == "unchanged" or (change == 0 and not left):
        return Finding("The weights have not moved, so there is no step to expand.", null="0 without training")
    if left is None:
        return None
    ends = _ends(row["result"].get("interval"))
    sentence = _kind_of_step(row["result"], left, ends)
    first = _metric(row, "first_order")
    if first is not None and change is not None:
        sentence += f", and predicts that the loss changes by {first:+.3g} nats where it changed by {change:+.3g}"
    count, samples = row["result"].get("n_targets"), row["result"].get("n_samples")
    told = f"over {count:,} target tokens; no interval" if count else "no interval"
    if ends:
        told = f"95 % interval {percent(ends[0])} to {percent(ends[1])} over {samples} samples"
    return Finding(
        f"{sentence}.",
        told,
        "0 % for a linear change, 100 % where the first order predicts nothing",
        (*_doubts_of_expansion(row, left, ends), *_marks(row)),
        Bar(left, *(ends or (None, None))),
        "nonlinearity",
    )


def _kind_of_step(result: Mapping[str, Any], left: float, ends: tuple[float, float] | None) -> str:
    """What share the first order leaves, and the regime where the whole interval is of one."""
    thresholds, unexplained = result.get("thresholds") or {}, f"{percent(left)} of the change in logits unexplained"
    if ends is not None and len(thresholds) == 2:
        names = ("a small step", "weakly nonlinear", "nonlinear")
        lowest, highest = (names[sum(end >= border for border in thresholds.values())] for end in ends)
        if lowest != highest:
            return f"It is between {lowest} and {highest}: the first order leaves {unexplained}"
    if (left if ends is None else ends[0]) >= 1:
        return "It is no small step: the first order explains nothing of the change in logits"
    if left > 1:
        unexplained += ", about as much as predicting no change leaves"
    if result.get("regime") == "lazy":
        return f"It is a small step: the first order explains all but {percent(left)} of the change in logits"
    return f"It is {result.get('regime') or 'curved'}: the first order leaves {unexplained}"


def _doubts_of_expansion(row: Row, left: float, ends: tuple[float, float] | None) -> list[str]:
    doubts, base = [], _metric(row, "base_loss")
    for order in (1, 2):
        predicted = _metric(row, f"loss/order{order}")
        if predicted is not None and predicted < 0 and base is not None:
            name = ("first", "second")[order - 1]
            doubts.append(f"the {name} order predicts a loss of {predicted:.3g} nats, which no loss can be")
    first, change = _metric(row, "first_order"), _metric(row, "change")
    if first is not None and change is not None and first * change < 0:
        doubts.append("the first order predicts a change of the loss of the other sign")
    count = row["result"].get("n_targets") or 0
    if count < _FEW_SAMPLES:
        doubts.append(f"only {count} target tokens")
    samples = row["result"].get("n_samples")
    if ends is None and left and samples:
        doubts.append("no interval")
    elif ends is not None:
        borders = (row["result"].get("thresholds") or {}).values()
        doubts += [f"the interval includes the border of {percent(x)}" for x in borders if ends[0] < x < ends[1]]
        doubts += ["the interval includes 100 %, where it predicts nothing"] if ends[0] < 1 < ends[1] else []
        doubts += [f"only {samples} samples"] if (samples or 0) < _FEW_SAMPLES else []
    return doubts


@register_answer("activation_differences", "kind")
def answer_by_streams(rows: Sequence[Row]) -> Finding | None:
    """How far the residual stream moved on unrelated text, beside another half of that text."""
    row = rows[-1]
    moved, null = _metric(row, "stream_change"), _metric(row, "stream_null")
    if row["result"].get("unchanged"):
        return Finding("Nothing has changed: the activations are those of the base to the last bit.")
    if moved is None:
        return None
    layer, result = _metric(row, "clearest_layer"), row["result"]
    after = "" if layer is None else f", after block {layer:.0f},"
    spans = dict(zip(result.get("layers", ()), result.get("norm_intervals") or (), strict=False))
    low, high = spans.get(layer) or (None, None)
    doubts = ["the interval includes 0"] if low is not None and low <= 0 else []
    if null is not None and moved <= null:
        doubts.append("another half of the text moves it as much")
    if row["result"].get("n_samples", 0) < _FEW_SAMPLES:
        doubts.append(f"only {row['result'].get('n_samples', 0)} samples")
    agreement = _metric(row, "half_agreement")
    verb = ", which is within the noise" if null is not None and moved <= null else ", which is readable"
    if not null:
        verb = ""
        doubts.append("no null was measured" if null is None else "both halves are the same text, so there is no null")
    elif moved > null and agreement is not None and agreement <= 0.5:
        verb = ", in no direction that two halves of the text agree on"
        doubts.append("two halves of the text disagree")
    sentence = f"On unrelated text the residual stream{after} moved by {percent(moved)} of its norm{verb}."
    told = "" if null is None else f"two halves of the text differ by {percent(null)}"
    interval = "" if agreement is None else f"two halves agree on its direction to a cosine of {agreement:.2f}"
    if low is not None:
        interval = f"95 % interval over texts {percent(low)} to {percent(high)}{interval and '; '}{interval}"
    return Finding(sentence, interval, told, (*doubts, *_marks(row)), Bar(moved, low, high, null), "stream_change")


@register_answer("attention_tracker", "kind")
def answer_by_attention(rows: Sequence[Row]) -> Finding | None:
    """How far attention drifted from the base's."""
    row = rows[-1]
    drift, most = _metric(row, "drift"), _metric(row, "drift_max")
    if drift is None:
        return None
    if drift == 0:
        return Finding("Attention has not moved from the base's.", course="drift")
    farthest = "" if most is None else f", the farthest head's by {most:.3g}"
    ends, samples = _ends(row["result"].get("drift_interval")), row["result"].get("n_samples", 0)
    doubts = [] if ends else ["no interval"]
    if samples < _FEW_SAMPLES:
        doubts.append(f"only {samples} samples")
    told = f"95 % interval {ends[0]:.3g} to {ends[1]:.3g} nats over {samples} samples" if ends else "no interval"
    sentence = f"Attention patterns drifted by {drift:.3g} from the base's on average{farthest} (Jensen-Shannon, nats)."
    return Finding(sentence, told, "0 without training", (*doubts, *_marks(row)), course="drift")


@register_answer("circuit_tracker", "kind")
def answer_by_circuit(rows: Sequence[Row]) -> Finding | None:
    """Whether the circuit of a behaviour is still the base's, and how faithful it is beside random circuits."""
    row = rows[-1]
    curve, overlap = row["result"].get("curve") or {}, _metric(row, "overlap")
    if not curve.get("values"):
        return None
    kept, size, whole = curve["values"][-1], curve["sizes"][-1], curve["n_edges"]
    wide, interval = ((curve.get(name) or [None])[-1] for name in ("wide_intervals", "intervals"))
    if absent := curve.get("absent"):
        return Finding("The model does not clearly show the behaviour whose circuit was looked for.", doubts=(absent,))
    ends = _ends(wide or interval)
    circuit = f"circuit of {size:,} of {whole:,} edges"
    if not _is_number(kept):
        return Finding(f"What a {circuit} keeps of the behaviour is undefined.", doubts=("the prompts do not show it",))
    sentence = f"A {circuit} {_kept(kept, ends)}"
    doubts = ["measured on prompts that chose its edges"] if curve.get("n_shared") else []
    doubts += ["the interval includes 0"] if ends and ends[0] <= 0 <= ends[1] else []
    doubts += ["the interval is wider than the behaviour"] if ends and ends[1] - ends[0] > 1 else []
    by_chance = _metric(row, "overlap_by_chance")
    if overlap is not None:
        sentence += f", and shares {percent(overlap)} of its edges with the base's"
        doubts += ["by chance it would share as many"] if by_chance is not None and overlap <= by_chance else []
    prompts = curve.get("n_pairs")
    doubts += [f"only {prompts} prompts"] if prompts is not None and prompts < _FEW_SAMPLES else []
    nulls = _circuit_nulls(curve)
    null = ", ".join(told for told, _, _ in nulls)
    doubts += _beaten_by(curve, nulls, kept, ends)
    if overlap is not None and by_chance is not None:
        null += f"{'; ' if null else ''}by chance they would share {percent(by_chance)}"
        noise = _metric(row, "overlap_noise")
        null += "" if noise is None else f", two seeds share {percent(noise)}"
        doubts += ["two seeds differ as much"] if noise is not None and overlap >= noise else []
    if ends is None:
        doubts = [*doubts, "no interval", *_marks(row)]
        return Finding(f"{sentence}.", "no interval over prompts", null, tuple(doubts), course="area")
    told = f"95 % interval {percent(ends[0])} to {percent(ends[1])} over {curve['n_pairs']} prompts"
    if "wide_intervals" in curve:
        told += " and the choice of the edges" if wide else ", with the edges as they were chosen"
    bar = Bar(kept, ends[0], ends[1], max((mean for mean, _ in _null_means(curve)), default=None))
    return Finding(f"{sentence}.", told, null, (*doubts, *_marks(row)), bar, "area")


_MOVED = {
    "exchanged": "the circuit with its heads exchanged",
    "shuffled": "the circuit with its edges shuffled within layers",
}


def _null_means(curve: Mapping[str, Any]) -> list[tuple[float, str]]:
    """What the nulls of a circuit keep on average, and in words who that is."""
    names = {"random": "random circuits", "joined": "random circuits", **_MOVED}
    means = [((curve.get(name) or [None])[-1], who) for name, who in names.items()]
    means += [(values[-1], f"the circuit of {task}") for task, values in (curve.get("others") or {}).items()]
    return [(mean, who) for mean, who in means if _is_number(mean)]


def _beaten_by(
    curve: Mapping[str, Any],
    nulls: Sequence[tuple[str, str, float]],
    kept: float,
    ends: tuple[float, float] | None,
) -> list[str]:
    """That a null keeps as much, or perhaps does: by the paired margin over the hardest, else by the most of any."""
    margin = _ends((curve.get("wide_margins") or [None])[-1])
    if margin is None:
        hardest = [(who, kept <= most, bool(ends and ends[0] <= most)) for _, who, most in nulls[:1]]
    else:
        mean, who = max(_null_means(curve))
        hardest = [(who, kept <= mean, margin[0] <= 0)]
    for who, as_much, reached in hardest:
        many = who == "random circuits"
        if as_much:
            return [f"{who} of its size keep as much" if many else f"{who} keeps as much"]
        if reached:
            return [f"its interval reaches what {who} keep{'' if many else 's'}"]
    return []


def _circuit_nulls(curve: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What a circuit has to beat, the hardest first: in words, who keeps that, and the most of it."""
    nulls = []
    random, joined = ((curve.get(name) or [None])[-1] for name in ("band", "joined_band"))
    if random and _is_number(random[1]):
        told = f"random circuits of its size keep {percent(random[0])} to {percent(random[1])}"
        told += f", joined from end to end {percent(joined[0])} to {percent(joined[1])}" if joined else ""
        nulls.append((told, "random circuits", max(high for _, high in filter(None, (random, joined)))))
    for name, who in _MOVED.items():
        band = (curve.get(f"{name}_band") or [None])[-1]
        if band and _is_number(band[1]):
            nulls.append((f"{who} keeps {percent(band[0])} to {percent(band[1])}", who, band[1]))
    for task, values in (curve.get("others") or {}).items():
        if _is_number(values[-1]):
            who = f"the circuit of {task}"
            nulls.append((f"{who} keeps {percent(values[-1])}", who, values[-1]))
    return sorted(nulls, key=lambda null: -null[2])


def _kept(kept: float, ends: tuple[float, float] | None) -> str:
    """What a circuit keeps, as far as its interval tells."""
    much = f"keeps {percent(kept)} of the behaviour"
    if kept <= 0:
        return f"keeps nothing of the behaviour ({percent(kept)})"
    if kept <= 1:
        return much
    if ends is None or ends[0] <= 1:
        return f"{much}, no more than the whole model beyond noise"
    return f"{much}, more than the whole model, as the edges left out work against it"


@register_answer("basin_volume", "robust")
def answer_by_volume(rows: Sequence[Row]) -> Finding | None:
    """The volume of the basin, and whether it has grown or shrunk by paired directions."""
    row = rows[-1]
    volumes = row["result"].get("volumes") or []
    if not volumes or not _is_number(volumes[0].get("log_volume")):
        return None
    volume = volumes[0]
    split, metrics = volume.get("split", ""), row["metrics"]
    course = f"log_volume/{split}" if f"log_volume/{split}" in metrics else "log_volume"
    compared = _compared_volumes(rows, volume)
    bridges = row["result"].get("bridges") or ()
    bridge = next((one for one in bridges if one.get("split", "") == split and one.get("log_volume") is not None), None)
    if bridge is not None:
        size = f"{format_number(_whole(bridge['log_volume']))} nats"
        sentence = f"The region {_within(volume)} has a log volume of {size}"
        told = f"one standard error {format_number(bridge.get('error'))} nats"
    else:
        low = volume.get("lower_bound")
        low = low if _is_number(low) else volume["log_volume"]
        sentence = f"The region {_within(volume)} has a log volume of at least {format_number(_whole(low))} nats"
        told = "the bound, along straight rays, holds with 95 % confidence; the volume itself may lie far above"
    doubts = [f"the bridge is weak: {bridge['weak']}"] if bridge is not None and bridge.get("weak") else []
    doubts += _doubts_of_directions(volume, bounded=bridge is None, compared=compared is not None)
    if compared is not None:
        words, difference, doubt = compared
        words += _contrary(rows, volumes)
        sentence, told = f"{words}; {sentence[0].lower()}{sentence[1:]}", f"{difference}; {told}"
        doubts += doubt
    null = "0 between two checkpoints of equal basins" if compared is not None else "no checkpoint to compare with"
    if compared is None and bridge is None:
        doubts.append("one bound of one checkpoint compares with nothing")
    samples = row["result"].get("n_samples")
    doubts += [f"only {samples} samples"] if samples is not None and samples < _FEW_SAMPLES else []
    return Finding(f"{sentence}.", told, null, (*doubts, *_marks(row)), course=course)


def few_directions(volume: Mapping[str, Any]) -> str:
    """How many directions decide the volume of a row, where that is hardly more than one; else nothing.

    Example:
        >>> few_directions({"effective_sample_size": 1.0, "estimates": [-5.0, -90.0]})
        'an effective 1 of 2 directions'
    """
    effective = volume.get("effective_sample_size")
    if effective is None or not _is_number(effective) or effective >= _FEW_EFFECTIVE:
        return ""
    return f"an effective {effective:.2g} of {len(volume.get('estimates') or ())} directions"


def _doubts_of_directions(volume: Mapping[str, Any], *, bounded: bool, compared: bool) -> list[str]:
    few = few_directions(volume)
    if not few or not (bounded or compared):
        return []
    if not compared:
        return [f"it rests on {few}"]
    # The mean difference weighs all directions alike, where the volume is that of the widest.
    return [f"volumes rest on {few}, so the difference tells of the radii along them and not of the volume"]


def _within(volume: Mapping[str, Any]) -> str:
    return f"in which predictions stay within {volume['cutoff']:g} nats of the model's"


def _since_the_first(rows: Sequence[Row], last: Mapping[str, Any]) -> tuple[int, list[float]] | None:
    """The first row with the same directions, by its step, and the paired differences to it; None of fewer than two."""
    for row in rows[:-1]:
        for volume in row["result"].get("volumes") or []:
            if volume.get("split") == last.get("split") and not unequal_settings(volume, last):
                values = paired_differences(volume, last)
                return (row["step"], values) if len(values) > 1 else None
    return None


def _compared_volumes(rows: Sequence[Row], last: Mapping[str, Any]) -> tuple[str, str, list[str]] | None:
    """The paired difference to the first row that has the same directions, as words, interval and doubts."""
    if (found := _since_the_first(rows, last)) is None:
        return None
    step, values = found
    low, high = interval_of_mean(values)
    several = len({volume.get("split") for volume in rows[-1]["result"]["volumes"]}) > 1
    basin = f"the basin of {last['split']} samples" if several and last.get("split") else "the basin"
    if low <= 0 <= high:
        words = (
            f"{basin[0].upper()}{basin[1:]} has not changed beyond the spread of {len(values)} directions since step"
        )
        return f"{words} {step:,}", _between(low, high), ["the interval of the difference includes 0"]
    along = f"Along {len(values)} common directions {basin} {_moved(values)} since step {step:,}"
    return along, _between(low, high), []


def _moved(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{'widened' if mean > 0 else 'narrowed'} by {format_number(_whole(abs(mean)))} nats on average"


def _contrary(rows: Sequence[Row], volumes: Sequence[Mapping[str, Any]]) -> str:
    """That the basin of other samples went the other way, beyond noise in both."""
    pairs = [(volume, _since_the_first(rows, volume)) for volume in volumes]
    beyond = [
        (volume, found[1])
        for volume, found in pairs
        if found is not None and min(interval_of_mean(found[1])) * max(interval_of_mean(found[1])) > 0
    ]
    if not beyond or beyond[0][0] is not volumes[0]:
        return ""
    signs = {id(volume): statistics.fmean(values) > 0 for volume, values in beyond}
    others = [
        f"that of {volume['split']} ones {_moved(values)}"
        for volume, values in beyond[1:]
        if volume.get("split") != volumes[0].get("split")
        and volume.get("cutoff") == volumes[0].get("cutoff")
        and signs[id(volume)] != signs[id(volumes[0])]
    ]
    return f", yet {' and '.join(others)}" if others else ""


def _between(low: float, high: float) -> str:
    ends = (format_number(_whole(end)) for end in (low, high))
    return "95 % interval of the paired difference {} to {} nats".format(*ends)


@register_answer("coupling_drift", "touched")
def answer_by_facts(rows: Sequence[Row]) -> Finding | None:
    """How many of the untouched facts are still known, by the same facts at the base and now."""
    row = rows[-1]
    classes = row["result"].get("classes") or {}
    # What was edited or rehearsed was touched on purpose, and is no answer to what else was.
    name = "untouched" if "untouched" in classes else next((x for x in classes if x not in ("edited", "rehearsed")), "")
    before, after, change = (_metric(row, f"{what}/{name}") for what in ("exact_before", "exact", "measured_change"))
    count = int(classes.get(name, 0))
    if before is None or after is None or not count:
        return _answer_by_log_probability(row, name, change, count)
    low, high, paired = _change_of_share(row, name, after - before, count)
    noise = low <= 0 <= high
    now, then = percents_apart(after, before)
    words = f"{now} of the {name} facts are known, as before"
    if after != before:
        words = f"{now} of the {name} facts are known, up from {then}"
        if noise:
            words = f"{now} of the {name} facts are known, from {then}: no change beyond noise"
        elif after < before:
            words = f"only {now} of the {name} facts are still known, from {then}"
        if paired and not noise:
            ends = sorted((abs(low), abs(high)))
            more_or_fewer = f"{points(abs(after - before))} points {'more' if after > before else 'fewer'}"
            words += f": {more_or_fewer} [{points(ends[0])}, {points(ends[1])}]"
    yet = "yet " if change is not None and (after - before) * change < 0 and not noise else ""
    more, half = "", _half_of_facts(row, name, count)
    if change is not None and half is not None and abs(change) <= half:
        more = f"; their log probability has not moved beyond noise ({change:+.3g} nats)"
    elif change is not None:
        within = "" if half is None else f" [{change - half:+.3g}, {change + half:+.3g}]"
        more = f"; {yet}their log probability moved by {change:+.3g}{within} nats on average"
    told = f"95 % interval of the {paired or 'change'} {points(low)} to {points(high)} points over {count} facts"
    doubts = [] if paired else ["the facts are not paired, so the interval takes what was known before as exact"]
    return Finding(
        f"{words[0].upper()}{words[1:]}{more}.",
        told if paired else f"{told}, which are not paired",
        f"{then} before the finetune",
        (*doubts, *_doubts_of_facts(name, count, (before, after), noise=noise), *_marks(row)),
        Bar(after, max(0.0, before + low), min(1.0, before + high), before),
        f"exact/{name}",
    )


def _doubts_of_facts(name: str, count: int, shares: tuple[float, float], *, noise: bool) -> list[str]:
    before, after = shares
    doubts = [f"only {count} {name} facts"] if count < _FEW_SAMPLES else []
    known = round(before * count)
    if after <= before and known < _FEW_SAMPLES <= count:
        doubts.append(f"only {known} of them were known before")
    return [*doubts, "the interval of the change includes 0"] if after != before and noise else doubts


def _change_of_share(row: Row, name: str, change: float, count: int) -> tuple[float, float, str]:
    """The 95 % interval of the change of the share of facts known, and, where it is paired, what turned, in words."""
    turned = (row["result"].get("turned") or {}).get(name)
    if turned is None:
        # Of rows that do not tell which facts turned: that of the share now.
        before = row["metrics"][f"exact_before/{name}"]
        low, high = interval_of_share(before + change, count)
        return low - before, high - before, ""
    gained, lost = int(turned["gained"]), int(turned["lost"])
    return *interval_of_turned(gained, lost, count), f"paired change ({lost} lost, {gained} gained)"


def _half_of_facts(row: Row, name: str, count: int) -> float | None:
    """Half of Student's 95 % interval of the mean change of a class of facts, where the row has its error."""
    error: Any = (row["result"].get("errors") or {}).get(name)
    return float(stdtrit(count - 1, 0.975)) * error if _is_number(error) and count > 1 else None


def _answer_by_log_probability(row: Row, name: str, change: float | None, count: int) -> Finding | None:
    if change is None or not name:
        return None
    half = _half_of_facts(row, name, count)
    sentence = f"The log probability of the {name} facts moved by {change:+.3g} nats on average."
    doubts = [f"only {count} {name} facts"] if count < _FEW_SAMPLES else []
    if half is None:
        told = f"over {count} facts; no interval"
        return Finding(sentence, told, "0 without training", ("no interval", *doubts, *_marks(row)))
    if abs(change) <= half:
        sentence = f"The log probability of the {name} facts has not moved beyond noise ({change:+.3g} nats)."
        doubts.append("the interval includes 0")
    told = f"95 % interval {change - half:+.3g} to {change + half:+.3g} nats over {count} facts"
    return Finding(sentence, told, "0 without training", (*doubts, *_marks(row)))


@register_answer("activation_differences", "touched")
def answer_by_divergence(rows: Sequence[Row]) -> Finding | None:
    """How far the predictions on unrelated text moved."""
    row = rows[-1]
    divergence = _metric(row, "kl_from_base")
    if divergence is None:
        return None
    if divergence == 0:
        return Finding("Predictions on unrelated text have not moved.", null="0 without training")
    count = row["result"].get("n_samples", 0)
    sentence = f"On unrelated text the predictions moved by a KL divergence of {divergence:.3g} nats per token."
    ends = _ends(row["result"].get("kl_interval"))
    doubts = [] if ends else ["no interval"]
    if count < _FEW_SAMPLES:
        doubts.append(f"only {count} samples")
    told = f"over {count} samples; no interval"
    if ends:
        told = f"95 % interval {ends[0]:.3g} to {ends[1]:.3g} nats over {count} samples"
    return Finding(sentence, told, "0 without training", (*doubts, *_marks(row)), course="kl_from_base")


@register_answer("change_attribution", "touched")
def answer_by_harm(rows: Sequence[Row]) -> Finding | None:
    """What the finetune costs on other text."""
    row = rows[-1]
    graft = row["result"].get("graft") or {}
    whole = next((point for point in graft.get("points", ()) if point["method"] == "finetune"), None)
    if whole is None or not _is_number(whole.get("harm")):
        return None
    harm, ends = whole["harm"], _ends((whole.get("harm_low"), whole.get("harm_high")))
    noise = ends is not None and ends[0] <= 0 <= ends[1]
    verb = "has not changed beyond noise" if noise else f"{'rose' if harm > 0 else 'fell'} by {abs(harm):.3g} nats"
    if harm == 0:
        verb = "has not changed"
    doubts = ["the interval includes 0"] if noise else [] if ends else ["no interval"]
    if graft.get("n_collateral", 0) < _FEW_SAMPLES:
        doubts.append(graft.get("harm_weak") or f"only {graft.get('n_collateral', 0)} samples of other text")
    told = f"over {graft.get('n_collateral', 0)} samples"
    told = f"95 % interval {ends[0]:+.3g} to {ends[1]:+.3g} nats {told}" if ends else f"{told}; no interval"
    return Finding(f"The loss on other text {verb}.", told, "0 without training", (*doubts, *_marks(row)))


@register_answer("ripple_effects", "touched")
def answer_by_ripples(rows: Sequence[Row]) -> Finding | None:
    """Whether gradients predict what an edit does to other pieces."""
    row = rows[-1]
    names = ("first_order_spearman", "spearman", "pearson")
    name = next((name for name in names if _metric(row, name) is not None), "")
    correlation = _metric(row, name)
    if correlation is None:
        return None
    # The interval is of the first of these correlations, and of no other.
    interval = (row["result"].get("interval") or {}) if name == names[0] else {}
    ends, null = _ends(interval.get("spearman")), "0 for pairs that are shuffled"
    sentence = f"What an edit does to other facts follows their gradients with a correlation of {correlation:.2f}."
    if correlation < 0:
        sentence = f"What an edit does to other facts goes against their gradients: a correlation of {correlation:.2f}."
    if ends is None:
        return Finding(sentence, "no interval", null, ("no interval", *_marks(row)))
    doubts = []
    if ends[0] <= 0 <= ends[1]:
        sentence = f"What an edit does follows gradients no better than noise: a correlation of {correlation:.2f}."
        doubts.append("the interval includes 0")
    told = f"95 % interval {ends[0]:.2f} to {ends[1]:.2f} over {interval['over']}"
    return Finding(sentence, told, null, (*doubts, *_marks(row)))


@register_answer("plasticity_sweep", "needs")
def answer_by_sweep(rows: Sequence[Row]) -> Finding | None:
    """Whether a score of heads beats closing them at random, over seeds."""
    costs: dict[str, list[float]] = {}
    runs = rows[-1]["result"].get("runs") or []
    runs = [run for run in runs if _is_number(run.get("cost"))]
    level = max((run["level"] for run in runs), default=None)
    for run in runs:
        if run["level"] == level:
            costs.setdefault(run["strategy"], []).append(run["cost"])
    chance = costs.pop("random", [])
    if not costs:
        return None
    best = min(costs, key=lambda name: statistics.fmean(costs[name]))
    mean, low, high = statistics.fmean(costs[best]), *interval_of_mean(costs[best])
    cost = f"costs {mean:+.3g} nats" if mean >= 0 else f"lowers the loss by {-mean:.3g} nats"
    sentence = f"Closing {percent(level)} of the heads by {best} {cost}"
    null, doubts = "not compared with random heads", ["no random heads beside it"]
    if chance:
        null = f"random heads cost {statistics.fmean(chance):+.3g} nats"
        doubts = ["random heads were drawn once"] if len(chance) < 2 else []
        if max(chance) < min(costs[best]):
            doubts.append("random heads cost less")
            sentence += f", {mean - statistics.fmean(chance):.3g} more than random heads"
        elif min(chance) <= max(costs[best]):
            doubts.append("it is within the range of random heads")
            sentence += ", no less than random heads beyond the seeds' noise"
        else:
            sentence += f", {statistics.fmean(chance) - mean:.3g} less than random heads"
    if len(costs[best]) < 2:
        return Finding(f"{sentence}.", "one seed, no interval", null, (*doubts, "one seed"))
    doubts += ["the interval includes 0"] if low <= 0 <= high else []
    told = f"95 % interval {low:+.3g} to {high:+.3g} nats over {len(costs[best])} seeds"
    return Finding(f"{sentence}.", told, null, tuple(doubts))


@register_answer("head_plasticity", "needs")
def answer_by_cycle(rows: Sequence[Row]) -> Finding | None:
    """What closing heads cost at the last cut, and what was left when training had gone on."""
    row, metrics = rows[-1], rows[-1]["metrics"]
    heads = sum(row["result"].get("heads_per_layer") or ())
    opened = _metric(row, "active_heads")
    if not heads or opened is None:
        return None
    pairs = [
        (name, metrics.get(f"{name}/loss_before"), metrics.get(f"{name}/loss_after")) for name in ("finish", "cut")
    ]
    known = [pair for pair in pairs if pair[1] is not None and pair[2] is not None]
    latest = next((r for r in reversed(rows) if r["metrics"].get("cut/loss_after") is not None), None)
    if not known and latest is not None:
        known = [("cut", latest["metrics"].get("cut/loss_before"), latest["metrics"]["cut/loss_after"])]
    if not known:
        sentence = f"{opened:.0f} of {heads} heads are open; none has been closed yet."
        return Finding(sentence, doubts=("nothing was cut",), course="loss")
    kind, before, after = known[0]
    strategy = row["result"].get("strategy", "")
    what = "a whole cycle of closing and regrowing heads" if kind == "finish" else "the last cut of heads"
    sentence = (
        f"{what[0].upper()}{what[1:]} by {strategy} moved the loss by {after - before:+.3g} nats; "
        f"{opened:.0f} of {heads} heads are open"
    )
    doubts = ["no interval", "not compared with heads closed at random"]
    if strategy == "random":
        doubts = ["no interval", "heads closed at random are the null, not the answer"]
    return Finding(f"{sentence}.", "no interval", "compare with the strategy random", tuple(doubts), course="loss")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _metric(row: Row, name: str) -> float | None:
    value = row["metrics"].get(name)
    return float(value) if _is_number(value) else None


def _ends(interval: Sequence[float | None] | None) -> tuple[float, float] | None:
    """Both ends of a row's interval, where it has them."""
    low, high = interval or (None, None)
    return (float(low), float(high)) if _is_number(low) and _is_number(high) else None  # type: ignore[arg-type]


def _of_norm(moved: float) -> str:
    """How far weights moved beside their norm, in words before it.

    Example:
        >>> _of_norm(0.5), _of_norm(250.0)
        ('50 %', '250 times')
    """
    return percent(moved) if moved < 10 else f"{moved:,.3g} times"


def _whole(value: float) -> float:
    """Rounded to a whole number from 100 on, where no estimate tells more."""
    return float(round(value)) if abs(value) >= 100 else value


def _marks(row: Row) -> tuple[str, ...]:
    """What the row itself says must be known before its numbers are read, where it is a doubt."""
    notes = (row.get("result") or {}).get("notes", ())
    floors = [text for text in remarks(row) if "may be rounding" in text]
    return (*(str(note) for note in notes if "WEAK" in str(note)), *floors)
