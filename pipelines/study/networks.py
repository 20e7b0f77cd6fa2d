"""What the claims about speech share: the networks to train, their error rates, and how two of them compare."""

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.study.plan import SEPARATE, Decision, Row, Setting, Table, pick, separate, verdict

SEEDS = (1, 2, 3)
STEPS = (50, 400, 1000, 4000)  # lengths of the utterances and of the copy task
ENOUGH = 0.5  # no ranking among networks whose best has a higher WER; nor has one learned that hears its own data so
QUICK_RATES = {"rnn": 2e-3}  # the others: 4e-3
EQUAL_TIME = ("rnn", "gru", "transformer", "feed-forward")  # as many updates as take as long as the LSTM's
TRAINED = (
    "All networks have the same convolutions and the LSTM's number of weights; AdamW, SpecAugment, no choice is made "
    "on the test. "
)
GATE = (
    f"nothing is decided where the best mean WER is not below {ENOUGH:.0%}, nor against a network that has not learned "
    f"(mean WER of its training data not below {ENOUGH:.0%})"
)


def trained(network: str, quick: bool, data: str = "train") -> list[Setting]:
    """A network trained from each seed; the same settings for every claim that asks for it."""
    options = {
        "network": network,
        "data": data,
        "updates": 800 if quick else 6_000,
        "equal_time": data == "train" and network in EQUAL_TIME,
        "hidden": 64 if quick else 128,
        "lengths": STEPS if data == "train" and network in scored_by_length(quick) else (),
        "rates": (QUICK_RATES.get(network, 4e-3),) if quick else (4e-3, 2e-3, 1e-3),
    }
    return [
        Setting(name=f"speech-{network}-{data}-{seed}", run="speech", options={**options, "seed": seed}, speech=True)
        for seed in SEEDS
    ]


def scored_by_length(quick: bool) -> tuple[str, ...]:
    """The networks that are scored on long utterances."""
    return ("lstm",) if quick else ("lstm", "rnn", "transformer")


def wers(rows: Sequence[Row], network: str, data: str = "train") -> list[float]:
    """The test WER of each seed."""
    return [row["test"]["wer"] for row in pick(rows, network=network, data=data)]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    return f"{100 * statistics.fmean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def good_enough(rows: Sequence[Row]) -> bool:
    """Whether the best network's mean WER allows a ranking."""
    networks = {(row["network"], row["data"]) for row in rows}
    return min(statistics.fmean(wers(rows, *which)) for which in networks) < ENOUGH


def learned(rows: Sequence[Row], network: str, data: str = "train") -> bool:
    """Whether a network left the plateau where it writes nothing: what it does before says nothing of its kind."""
    return statistics.fmean(row["train_heard"]["wer"] for row in pick(rows, network=network, data=data)) < ENOUGH


def better(rows: Sequence[Row], statement: str, network: str, than: str, factor: float = 1.0) -> Decision:
    """Whether `network` has the lower WER: by `factor` at least."""
    a, b = wers(rows, network), wers(rows, than)
    side, times = separate(a, b), statistics.fmean(b) / max(statistics.fmean(a), 1e-9)
    answer = side < 0 and times >= factor
    if side == 0 or not good_enough(rows) or not (answer or learned(rows, network)):
        answer = None
    by = f", and the mean is {factor:g} times lower" if factor > 1 else ""
    return Decision(
        statement=statement,
        verdict=verdict(answer),
        rule=f"the WER is lower{by}: {SEPARATE}; {GATE}",
        evidence=f"WER {spread(a)} % ({network}) against {spread(b)} % ({than})",
    )


def wer_table(rows: Sequence[Row]) -> Table:
    """Every network once."""
    lines = []
    for network, data in dict.fromkeys((row["network"], row["data"]) for row in rows):
        same = pick(rows, network=network, data=data)
        lines.append(
            [
                network,
                data,
                f"{same[0]['weights'] / 1000:.0f}",
                f"{statistics.fmean(row['updates_done'] for row in same):,.0f}",
                f"{statistics.fmean(row['seconds'] for row in same):.0f}",
                *(spread([row[part]["wer"] for row in same]) for part in ("test", "train_heard")),
            ]
        )
    head = ("network", "data", "weights, k", "updates", "training, s", "WER test, %", "WER training, %")
    return Table(title="Error rates, mean ± standard deviation over three seeds; processor time", head=head, rows=lines)


def wer_figure(rows: Sequence[Row]) -> Figure:
    """A bar a network, a dot a seed."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    draw_wers(axes, rows)
    return figure


def draw_wers(axes: Axes, rows: Sequence[Row]) -> None:
    """Mean WER and the seeds on one axis."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    for i, network in enumerate(networks):
        values = [100 * wer for wer in wers(rows, network)]
        axes.bar(i, statistics.fmean(values), color="C0" if network == "lstm" else "C7")
        axes.plot([i] * len(values), values, "k.", ms=5)
    axes.axhline(100 * ENOUGH, color="C3", lw=0.8, ls=":")
    axes.set_xticks(range(len(networks)), networks)
    axes.set_ylabel("WER, %")
    axes.set_ylim(0, 1.1 * max(row["test"]["wer"] for row in rows) * 100 + 1)
