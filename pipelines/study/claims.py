"""The claims about speech, each as the networks that it compares and what their error rates say."""

import statistics
from collections.abc import Callable

from matplotlib.figure import Figure

from pipelines.study import cost
from pipelines.study.networks import (
    ENOUGH,
    GATE,
    TRAINED,
    better,
    draw_wers,
    good_enough,
    learned,
    spread,
    trained,
    wer_figure,
    wer_table,
    wers,
)
from pipelines.study.plan import SEPARATE, Decision, Experiment, Findings, Row, Setting, Table, pick, separate, verdict
from pipelines.study.speech import SNRS

AT_A_TENTH = ("lstm", "gru")


def read_cost(rows: list[Row]) -> Findings:
    (timing,) = pick(rows, what="training")
    spoken = [row for row in rows if "network" in row]
    lstm, gru = wers(spoken, "lstm"), wers(spoken, "gru")
    near = statistics.fmean(gru) <= 1.1 * statistics.fmean(lstm)
    decision = Decision(
        statement="a GRU is nearly as good",
        verdict=verdict(near if good_enough(spoken) and (near or learned(spoken, "gru")) else None),
        rule=f"at equal weights and equal training time its mean WER is at most a tenth higher than the LSTM's; {GATE}",
        evidence=f"WER {spread(gru)} % against {spread(lstm)} %",
    )
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    times, memories, errors = figure.subplots(1, 3)
    cost.draw(times, memories, timing)
    draw_wers(errors, spoken)
    return Findings(
        decisions=[*cost.decide(timing), decision], tables=[cost.table(timing), wer_table(spoken)], figure=figure
    )


def read_structure(rows: list[Row]) -> Findings:
    statements = {
        "bilstm": "reading in both directions helps",
        "deep": "more layers help (four with residual paths against two)",
        "peephole": "peepholes help",
        "attention": "attention after the LSTM helps",
    }
    decisions = [better(rows, statement, network, "lstm") for network, statement in statements.items()]
    return Findings(decisions=decisions, tables=[wer_table(rows)], figure=wer_figure(rows))


def read_little_data(rows: list[Row]) -> Findings:
    gaps = {
        network: [row["test"]["wer"] - row["train_heard"]["wer"] for row in pick(rows, network=network, data="tenth")]
        for network in AT_A_TENTH
    }
    side = separate(gaps["gru"], gaps["lstm"])
    learnt = all(learned(rows, network, "tenth") for network in AT_A_TENTH)
    decision = Decision(
        statement="a GRU overfits more easily on little data",
        verdict=verdict(side > 0 if side and learnt else None),
        rule="at a tenth of the data its gap between the WER of the test and of the training data is greater: "
        f"{SEPARATE}; nothing is decided where a mean WER of the training data is not below {ENOUGH:.0%}",
        evidence=f"gap {spread(gaps['gru'])} points (GRU) against {spread(gaps['lstm'])} (LSTM)",
    )
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    kinds = [(network, data) for data in ("train", "tenth") for network in AT_A_TENTH]
    for i, (network, data) in enumerate(kinds):
        same = pick(rows, network=network, data=data)
        for part, shift, colour in (("train_heard", -0.2, "C0"), ("test", 0.2, "C1")):
            values = [100 * row[part]["wer"] for row in same]
            axes.bar(
                i + shift, statistics.fmean(values), width=0.38, color=colour, label=None if i else part.split("_")[0]
            )
            axes.plot([i + shift] * len(values), values, "k.", ms=5)
    axes.set_xticks(range(len(kinds)), [f"{n}, {'all' if d == 'train' else 'a tenth of'} the data" for n, d in kinds])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("WER, %")
    axes.legend()
    return Findings(decisions=[decision], tables=[wer_table(rows)], figure=figure)


def read_noise(rows: list[Row]) -> Findings:
    kept = {
        network: [
            (1 - row["noise"]["10"]["wer"]) / max(1 - row["test"]["wer"], 1e-9) for row in pick(rows, network=network)
        ]
        for network in ("lstm", "rnn", "feed-forward")
    }
    ready = good_enough(rows)
    half = None if not ready or min(kept["lstm"]) < 0.5 <= max(kept["lstm"]) else min(kept["lstm"]) >= 0.5
    decisions = [
        Decision(
            statement="LSTMs stand up to noise that they never heard",
            verdict=verdict(half),
            rule=f"at 10 dB at least half of the accuracy in quiet (1 - WER) is left, in every seed; {GATE}",
            evidence=f"{spread(kept['lstm'])} % is left at 10 dB",
        )
    ]
    for other in ("rnn", "feed-forward"):
        side = separate(kept["lstm"], kept[other])
        decisions.append(
            Decision(
                statement=f"better than a {'plain RNN' if other == 'rnn' else 'feed-forward network'}",
                verdict=verdict(side > 0 if side and ready and learned(rows, other) else None),
                rule=f"a greater share of the accuracy in quiet is left at 10 dB: {SEPARATE}; {GATE}",
                evidence=f"{spread(kept['lstm'])} % is left of the LSTM's, {spread(kept[other])} % of the other's",
            )
        )
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = []
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    ticks = ("quiet", *(f"{snr} dB" for snr in SNRS))
    for network in networks:
        same = pick(rows, network=network)
        levels = [[row["test"]["wer"] for row in same], *([row["noise"][str(s)]["wer"] for row in same] for s in SNRS)]
        lines.append([network, *map(spread, levels)])
        means, errors = ([100 * of(v) for v in levels] for of in (statistics.fmean, statistics.stdev))
        axes.errorbar(ticks, means, errors, marker="o", ms=4, capsize=3, label=network)
    axes.set_ylabel("WER, %")
    axes.set_ylim(0, None)
    axes.legend(fontsize=8)
    table = Table(
        title="WER in noise, %, mean ± standard deviation over three seeds", head=("network", *ticks), rows=lines
    )
    return Findings(decisions=decisions, tables=[table], figure=figure)


def read_attention(rows: list[Row]) -> Findings:
    (stream,) = pick(rows, what="stream")
    spoken = [row for row in rows if "network" in row]
    minute, hour = str(cost.MINUTE), str(cost.HOUR)
    growth = {n: stream["frame"][n][hour] / stream["frame"][n][minute] for n in ("lstm", "transformer")}
    state = {n: stream["state"][n][hour] / stream["state"][n][minute] for n in ("lstm", "transformer")}
    decisions = [
        better(
            spoken, "attention has overtaken LSTMs: a small causal Transformer has the lower WER", "transformer", "lstm"
        ),
        Decision(
            statement="but on a stream a Transformer's cost and state grow, an LSTM's do not",
            verdict=verdict(
                growth["transformer"] > 2 and growth["lstm"] < 1.5 and state["lstm"] == 1 < state["transformer"]
            ),
            rule="from a minute to an hour a frame costs the Transformer over twice as much, the LSTM less than half "
            "as much again; the Transformer's state grows, the LSTM's does not",
            evidence=f"a frame costs {growth['transformer']:.1f} times as much (LSTM: {growth['lstm']:.2f}), the state "
            f"is {state['transformer']:.0f} times as large (LSTM: {state['lstm']:.0f})",
        ),
    ]
    figure = cost.stream_figure()
    error, frame = figure.subplots(1, 2)
    draw_wers(error, spoken)
    for name, times in stream["frame"].items():
        frame.plot(
            [cost.MINUTE / cost.FRAMES_PER_SECOND, cost.HOUR / cost.FRAMES_PER_SECOND],
            list(times.values()),
            "o-",
            label=name,
        )
    frame.set_xscale("log")
    frame.set_yscale("log")
    frame.set_xlabel("seconds into the stream")
    frame.set_ylabel("one frame, ms")
    frame.legend()
    return Findings(decisions=decisions, tables=[wer_table(spoken), cost.stream_table(stream)], figure=figure)


def read_feed_forward(rows: list[Row]) -> Findings:
    decision = better(
        rows, "LSTMs beat what came before by a factor: a feed-forward network on the same frames",
        "lstm", "feed-forward", factor=1.5,
    )  # fmt: skip
    return Findings(decisions=[decision], tables=[wer_table(rows)], figure=wer_figure(rows))


def _networks(*names: str, more: Callable[[bool], list[Setting]] = lambda quick: []) -> Callable[[bool], list[Setting]]:
    return lambda quick: [*more(quick), *(setting for name in names for setting in trained(name, quick))]


EXPERIMENTS = (
    Experiment(
        name="cost",
        claim="An LSTM costs two to three times an RNN; a GRU less, and is nearly as good",
        settings=_networks("lstm", "rnn", "gru", more=cost.settings),
        read=read_cost,
        method=TRAINED
        + "RNN and GRU train for as long as the LSTM (processor time of an update, timed in turn before).",
    ),
    Experiment(
        name="structure",
        claim="Bidirectional, deeper, peepholes, attention help",
        settings=_networks("lstm", "bilstm", "deep", "peephole", "attention"),
        read=read_structure,
        method=TRAINED + "Equal updates on the same batches; the time that took is in the table.",
    ),
    Experiment(
        name="little-data",
        claim="A GRU overfits more easily on little data",
        settings=lambda quick: [
            setting for data in ("train", "tenth") for name in AT_A_TENTH for setting in trained(name, quick, data)
        ],
        read=read_little_data,
        method=TRAINED
        + "Every tenth utterance, and as many updates; on all the data the GRU has the LSTM's training time.",
    ),
    Experiment(
        name="noise",
        claim="LSTMs stand up to noise",
        settings=_networks("lstm", "bilstm", "rnn", "gru", "transformer", "feed-forward"),
        read=read_noise,
        method=TRAINED
        + "Trained in quiet, with pauses of digital silence, which the noise fills: no network has heard that. "
        "Environmental noise (ESC-10; white and pink where it is absent) is mixed in.",
    ),
    Experiment(
        name="attention",
        claim="Attention has overtaken LSTMs",
        settings=_networks("lstm", "transformer", more=cost.stream_settings),
        read=read_attention,
        method=TRAINED
        + "The Transformer is causal, with ALiBi, and trains for as long as the LSTM. The cost of a frame is "
        "that of the LSTM layers and of the Transformer's, with its whole cache of keys and values.",
    ),
    Experiment(
        name="feed-forward",
        claim="LSTMs beat what came before by a factor",
        settings=_networks("lstm", "feed-forward"),
        read=read_feed_forward,
        method=TRAINED
        + "The feed-forward network has a window of 11 frames (440 ms), five of them ahead, which the LSTM "
        "does without; it trains for as long.",
    ),
)
