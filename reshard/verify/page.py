"""A verification as one HTML page that needs nothing else: verdict, figures, the error of every part, memory of every rank."""

from html import escape
from math import isfinite, log10

from reshard.page import page as whole_page
from reshard.page import rows as table_of
from reshard.text import human
from reshard.verify.exact import STATED
from reshard.verify.report import Report


def page(report: Report) -> str:
    """The page's text."""
    kind = "ok" if report.passed else "bad"
    sequences, positions = report.ids
    where = f"{report.nproc} process{'es' * (report.nproc > 1)} on {report.device} ({report.backend})"
    facts = [
        ("checkpoint", f"<code>{escape(str(report.checkpoint))}</code>: {report.format} {report.mesh}"),
        ("original", f"<code>{escape(str(report.reference))}</code>, run by transformers"),
        ("model", f"{escape(report.architecture)}, {report.depth} layers"),
        ("run", f"{where}, {report.dtype}, {sequences} × {positions} tokens, {report.seconds:.1f} s, method {report.method}; {STATED}"),
        ("tolerance", f"{report.shards.figures.tolerance:.3g} on logits of up to {report.shards.figures.max_abs_logit:.4g}"),
    ]
    body = [
        f'<h1>reshard verify: <span class="{kind}">{escape(report.verdict())}</span></h1>',
        table_of([], [[f"<td>{name}</td>", f"<td>{value}</td>"] for name, value in facts]),
        "<h2>Logits against the original's</h2>",
        table_of(
            ["", "max |Δlogit|", "of max |logit|", "mean KL", "same top-1", ""],
            [_result_row(report, i) for i in range(1 + len(report.controls))],
        ),
    ]
    if report.settings:
        body += ["<h2>Settings that are not the original's</h2>", _list(map(str, report.settings))]
    if report.unexercised:
        body += ["<h2>Not exercised</h2>", _list(report.unexercised)]
    if report.shards.points:
        body += [
            "<h2>Error of every part, relative to its largest output</h2><p>Logarithmic; the dashed line is the tolerance.</p>",
            _errors(report),
        ]
    if report.ranks:
        body += ["<h2>Memory of every rank</h2>", _memory(report)]
    return whole_page("reshard verify", body)


def _list(lines) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _result_row(report: Report, index: int) -> list[str]:
    result = [report.shards, *report.controls][index]
    f = result.figures
    good = result.passed if index == 0 else not f.passed
    word = ("equal" if good else "different") if index == 0 else ("found" if good else "missed")
    name = ("planted: " if index else "") + result.name
    numbers = [f"{f.max_abs_diff:.2g}", f"{f.relative:.2g}", f"{f.mean_kl:.2g}", f"{f.top1_agreement:.0%}"]
    return [
        f"<td>{escape(name)}</td>",
        *(f'<td class="n">{number}</td>' for number in numbers),
        f'<td class="{"ok" if good else "bad"}">{word}</td>',
    ]


def _errors(report: Report) -> str:
    limit = report.shards.figures.tolerance / report.shards.figures.max_abs_logit
    low, high = log10(limit) - 4, max(log10(limit) + 2, 0.5)

    def at(value: float) -> float:
        return 100.0 if not isfinite(value) else max(0.5, min(100, 100 * (log10(max(value, 1e-30)) - low) / (high - low)))

    line = f'<span class="limit" style="left:{at(limit):.1f}%"></span>'
    rows = []
    for point in report.shards.points:
        bar = f'<span class="bar{" bad" if point.apart else ""}" style="width:{at(point.relative):.1f}%"></span>'
        rows.append(
            [
                f"<td><code>{escape(point.path)}</code></td>",
                f'<td class="n">{point.relative:.1e}</td>',
                f'<td class="w"><div class="scale">{bar}{line}</div></td>',
            ]
        )
    return table_of(["output of", "error", ""], rows)


def _memory(report: Report) -> str:
    most = max(r.peak for r in report.ranks) or 1
    rows = []
    for rank in report.ranks:
        bar = f'<span class="bar" style="width:{100 * rank.held / most:.1f}%"></span>'
        rows.append(
            [
                f"<td>rank {rank.rank}</td>",
                *(f'<td class="n">{human(size)}</td>' for size in (rank.stored, rank.held, rank.peak)),
                f'<td class="w">{bar}</td>',
            ]
        )
    return table_of(["", "stored", f"held in {report.dtype}", "peak of its process", "held, of the highest peak"], rows)
