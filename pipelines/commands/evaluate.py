"""The command that measures recognition: evaluate."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from asr.errors import Problem
from pipelines.commands.options import (
    MANIFESTS,
    RECOGNIZE,
    BeamOption,
    DecodingOption,
    EngineOption,
    HotWordsOption,
    LmWeightOption,
    ModelOption,
    PrecisionOption,
    RulesOption,
    StreamingOption,
    ThreadsOption,
    WordScoreOption,
    app,
    complain,
    end,
    network_name,
    recognizer_options,
    tell,
)

_OTHERS = "Other measurements"


@app.command(rich_help_panel=RECOGNIZE)
def evaluate(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST", help=MANIFESTS)],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to a file as well.")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write an HTML page on which to study the errors.")
    ] = None,
    clips: Annotated[
        int, typer.Option(min=0, metavar="N", help="Put the N worst recordings into the page; others are linked.")
    ] = 0,
    show: Annotated[bool, typer.Option("--show", help="Show each reference and hypothesis.")] = False,
    endpoint: Annotated[
        bool, typer.Option("--endpoint", help="Cut rows where an utterance ends, as transcribe does.")
    ] = False,
    two_pass: Annotated[
        bool, typer.Option("--two-pass", help="--streaming --endpoint, and finished segments are read again offline.")
    ] = False,
    join: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="SECONDS", help="Join the rows of each speaker to so much audio, with pauses between them."
        ),
    ] = None,
    times: Annotated[
        bool, typer.Option("--times", help="How exact the times of words are.", rich_help_panel=_OTHERS)
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Accuracy against latency, live.", rich_help_panel=_OTHERS)
    ] = False,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="MODEL", help="--latency: another model beside it; repeatable.", rich_help_panel=_OTHERS),
    ] = None,
    conditions: Annotated[
        bool,
        typer.Option(
            "--conditions",
            help="Accuracy when it is quiet, noisy, in a room, on the telephone.",
            rich_help_panel=_OTHERS,
        ),
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Fit the confidences of words, with --times their times, and keep that in --model.",
            rich_help_panel=_OTHERS,
        ),
    ] = False,
    model: ModelOption = None,
    streaming: StreamingOption = False,
    decoding: DecodingOption = None,
    beam: BeamOption = None,
    lm_weight: LmWeightOption = None,
    word_score: WordScoreOption = None,
    hot_words: HotWordsOption = None,
    rule: RulesOption = None,
    engine: EngineOption = "onnx",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 1,
) -> None:
    """Count the errors on speech whose text is known: WER, CER, and the real-time factor.

    Both texts are normalised first: lower case, no punctuation. Each row is
    scored whole unless --endpoint; --streaming feeds it in blocks, as live audio
    comes. Rows that cannot be read are named, and their words count as deletions.
    The real-time factor is the time from file to text, loading the model aside.
    Of live text it is also told how many of the partial words were changed later.

    docs/accuracy.md explains the page and the other measurements.
    """
    if calibrate and model is None:
        raise typer.BadParameter("--calibrate: what is fitted is kept in a model's folder; name it with --model")
    if calibrate and (latency or two_pass):
        raise typer.BadParameter("--calibrate: of one network; not with --latency or --two-pass")
    if latency + times + conditions > 1:
        raise typer.BadParameter("--times, --latency and --conditions are measurements of their own: one at a time")
    if calibrate and conditions:
        raise typer.BadParameter("--calibrate: on speech as it was recorded, not with --conditions")
    others = {
        "show": show,
        "endpoint": endpoint,
        "two-pass": two_pass,
        "join": join,
        "report": report_file and not latency,
        "clips": clips,
    }
    if latency + times + conditions and (unused := [f"--{name}" for name, value in others.items() if value]):
        raise typer.BadParameter(f"{', '.join(unused)}: not with --times, --latency or --conditions")
    if clips and not report_file:
        raise typer.BadParameter("--clips: they are put into the page that --report writes")
    if rule and not (endpoint or two_pass or latency):
        raise typer.BadParameter("--rule: rows are cut only with --endpoint, --two-pass or --latency")
    if against and not latency:
        raise typer.BadParameter("--against: only with --latency")
    from pipelines.formats import check_writable

    for written in filter(None, (json_file, report_file)):
        check_writable(written)
    search = {"beam": beam, "lm_weight": lm_weight, "word_score": word_score, "hot_words": hot_words}
    if against and decoding is None:  # one for all of them
        from asr.runtime.folder import best_decoding

        decoding = "beam" if all(best_decoding(each) == "beam" for each in (model, *against)) else "greedy"
    options = recognizer_options(model, decoding, engine, precision, threads, rule, **search)
    options = replace(options, calibrated=not calibrate)
    network = network_name(model, streaming or two_pass or latency)
    about = f"{network} network of {model or 'the shipped model'}, {options.decoding} decoding"
    fit: Callable[[], dict[str, Any]] = dict
    if latency:
        figures, problems = _latency(manifests, options, [model, *(against or ())], report_file, about)
    elif conditions:
        figures, problems = _conditions(manifests, options, network)
    elif times:
        figures, problems, fit = _times(manifests, options, network)
    else:
        from pipelines.evaluate import evaluate as run
        from pipelines.evaluate import report, table

        outcomes: list[Any] = []

        def told(outcome: Any) -> None:
            outcomes.append(outcome)
            if show:
                print(f"{outcome.row.id}\n  reference:  {outcome.reference}\n  hypothesis: {outcome.hypothesis}")

        scores, problems = run(
            manifests,
            options,
            network=network,
            endpoint=endpoint or two_pass,
            two_pass=two_pass,
            join_seconds=join,
            on_utterance=told,
        )
        figures = report(scores)
        if scores:
            print(table(scores), end="")
        if hot_words:
            from pipelines.evaluate_hot_words import score_hot_words

            found = score_hot_words([(o.reference, o.hypothesis) for o in outcomes], hot_words)
            figures["hot_words"] = found.figures()
            print(found)
        fit = partial(_calibrate_confidence, outcomes, options, network)
        if report_file is not None and scores:
            from pipelines.evaluate_report import report_page

            _write(report_file, report_page(outcomes, scores, about, report_file.parent, clips))
    for problem in problems:
        complain(problem)
    try:
        if calibrate:
            figures |= fit()
    finally:  # hours of recognition are not lost where nothing can be fitted to them
        if json_file is not None:
            _write(json_file, json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    end(problems)


def _write(path: Path, text: str) -> None:
    from pipelines.formats import write_text

    write_text(path, text)


def _latency(
    manifests: Sequence[Path], options: Any, models: Sequence[Path | None], report_file: Path | None, about: str
) -> tuple[dict[str, Any], list[Problem]]:
    from pipelines.evaluate_latency import measure_latency
    from pipelines.evaluate_latency_page import latency_page, latency_table

    results, problems = measure_latency(manifests, options, models)
    print(latency_table(results), end="")
    if report_file is not None:
        _write(report_file, latency_page(results, about))
    return {"results": [result.figures() for result in results]}, problems


def _conditions(manifests: Sequence[Path], options: Any, network: str) -> tuple[dict[str, Any], list[Problem]]:
    from pipelines.conditions import conditions_table, evaluate_conditions
    from pipelines.evaluate import report

    scores, problems = evaluate_conditions(manifests, options, network)
    if any(scores.values()):
        print(conditions_table(scores), end="")
    return {name: report(of_condition) for name, of_condition in scores.items()}, problems


def _times(
    manifests: Sequence[Path], options: Any, network: str
) -> tuple[dict[str, Any], list[Problem], Callable[[], dict[str, Any]]]:
    from pipelines.evaluate_times import fit_times, word_times

    found, problems = word_times(manifests, options, network)
    figures = found.figures()
    for name in ("start", "end", "both"):
        if f"{name}_median" in figures:
            middle, late = (1000 * figures[f"{name}_{part}"] for part in ("median", "p95"))
            count = figures[f"{name}s"]
            print(f"{name:<6}{count:>6}   median error {middle:4.0f} ms   95th percentile {late:4.0f} ms")
    print(f"{found.recordings} recordings; of the others, other words were recognized at the border")
    if not found.recordings:
        tell("no times to compare: --times wants recordings of a word or a few, all of which are recognized")

    def fit() -> dict[str, Any]:
        fitted = fit_times(found)
        _keep(options, network, start_shift=fitted.start_shift, end_shift=fitted.end_shift, reach=fitted.reach)
        return {}

    return dict(figures), problems, fit


def _calibrate_confidence(outcomes: Sequence[Any], options: Any, network: str) -> dict[str, Any]:
    from dataclasses import asdict

    from pipelines.evaluate_confidence import fit_confidence

    weights, before, after = fit_confidence(outcomes)
    print(f"confidence on the other half of the speakers\n  as it was: {before}\n  fitted:    {after}")
    _keep(options, network, confidence=weights)
    return {"confidence": {"before": asdict(before), "fitted": asdict(after)}}


def _keep(options: Any, network: str, **fitted: Any) -> None:
    """Put what was fitted into the model, beside what was fitted before."""
    from asr.decoding.calibration import CALIBRATION_FILE, load_calibration, save_calibration
    from asr.runtime.folder import find_networks

    folder = find_networks(options.model)[network]
    save_calibration(folder, options.decoding, replace(load_calibration(folder, options.decoding), **fitted))
    tell(f"wrote {folder / CALIBRATION_FILE} ({options.decoding})")
