"""How far memory reaches: the copy task and the text of long utterances, at 50 to 4000 steps."""

import statistics

from matplotlib.figure import Figure

from pipelines.study import memory
from pipelines.study.networks import GATE, SEEDS, STEPS, good_enough, scored_by_length, spread, trained
from pipelines.study.plan import SEPARATE, Decision, Experiment, Findings, Row, Setting, Table, pick, separate, verdict


def _settings(quick: bool) -> list[Setting]:
    """The copy task with lengths that grow, and speech."""
    lengths = (20, 50, 100, 200, 400) if quick else (20, 50, 100, 200, 400, 1000, 2000, 4000)
    climbs = [
        Setting(
            name=f"limit-copy-{seed}",
            run="memory",
            options={
                "task": "copy",
                "cell": "lstm",
                "start": "chrono",
                "lengths": lengths,
                "seed": seed,
                "units": 32 if quick else 64,
                "rates": (2e-2,) if quick else (2e-2, 6e-3),
                "updates": 1200 if quick else 6000,
                "carry": True,
                "score": STEPS,
            },
        )
        for seed in SEEDS
    ]
    return climbs + [setting for network in scored_by_length(quick) for setting in trained(network, quick)]


def _read(rows: list[Row]) -> Findings:
    climbs, spoken = pick(rows, task="copy"), [row for row in rows if "network" in row]
    recall = {n: [1 - row["errors"].get(str(n), 1.0) for row in climbs] for n in STEPS}
    typical = {n: statistics.median(values) for n, values in recall.items()}
    climbed = [memory.longest(row) for row in climbs]
    several = typical[1000] >= 0.9
    decisions = [
        Decision(
            statement="several hundred steps is the limit of an LSTM's memory",
            verdict=verdict(False if several else True if typical[400] >= 0.9 else None),
            rule="the copy task's recall is at least 90 % at 400 steps and less at 1000 (median over seeds); does not "
            "hold if it is at least 90 % at 1000",
            evidence=f"{_percent(typical)}; learned up to {', '.join(map(str, climbed))} steps (seed by seed), tried "
            "beyond without learning",
        ),
        Decision(
            statement="others say thousands",
            verdict=verdict(True if typical[4000] >= 0.9 else None if max(climbed) < 4000 else False),
            rule="the recall is at least 90 % at 4000 steps (median over seeds); not decided where learning did not "
            "come so far",
            evidence=_percent(typical),
        ),
    ]
    by_length = {n: [row["lengths"][str(n)]["wer"] for row in pick(spoken, network="lstm")] for n in STEPS}
    side = separate(by_length[4000], by_length[400])
    decisions.append(
        Decision(
            statement="an LSTM's text gets worse on utterances of thousands of steps",
            verdict=verdict(side > 0 if good_enough(spoken) and side else None if not good_enough(spoken) else False),
            rule=f"the WER at 4000 steps is higher than at 400: {SEPARATE}; else it does not hold; {GATE}",
            evidence=", ".join(f"{n} steps {spread(values)} %" for n, values in by_length.items()),
        )
    )
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i in range(len(climbs)):
        left.plot(STEPS, [100 * recall[n][i] for n in STEPS], "o-", color="C0", alpha=0.6)
    left.axhline(100 / memory.ALPHABET, color="C3", lw=0.8, ls=":")
    left.set_ylabel("copy task: symbols recalled, %")
    lines = []
    for network in dict.fromkeys(row["network"] for row in spoken):
        values = {n: [row["lengths"][str(n)]["wer"] for row in pick(spoken, network=network)] for n in STEPS}
        means, errors = ([100 * of(v) for v in values.values()] for of in (statistics.fmean, statistics.stdev))
        right.errorbar(STEPS, means, errors, marker="o", capsize=3, label=network)
        lines.append([f"WER of the {network}, %", *map(spread, values.values())])
    right.set_ylabel("WER, %")
    right.set_ylim(0, None)
    right.legend()
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(STEPS, [str(n) for n in STEPS])
        axes.minorticks_off()
        axes.set_xlabel("steps")
    lines = [["symbols recalled, %", *map(spread, recall.values())], *lines]
    table = Table(
        title="Recall and WER by length (mean ± standard deviation over three seeds)",
        head=("", *(f"{n} steps" for n in STEPS)),
        rows=lines,
    )
    return Findings(decisions=decisions, tables=[table], figure=figure)


def _percent(values: dict[int, float]) -> str:
    return "recall " + ", ".join(f"{100 * value:.0f} % at {n}" for n, value in values.items())


EXPERIMENT = Experiment(
    name="limit",
    claim="Several hundred steps is the limit; others say four hundred, others thousands",
    settings=_settings,
    read=_read,
    method="Copy task: an LSTM (chrono) learns at ever longer lengths, keeping its weights; what it learned last "
    "is tried at all four. Speech: test words joined to utterances of so many steps of 40 ms; training has up to "
    "four words.",
)
