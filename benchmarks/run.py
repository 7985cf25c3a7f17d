"""Runs benchmark cases: `python -m benchmarks.run --cases issue2`.

For each case: the correctness gate against float64; interleaved times of all providers beside the roofs of this
device; peak memory. Rows are appended to benchmarks/results/<device>.jsonl, and printed. Providers that are missing
are listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import results, targets
from benchmarks.cases import WITH_GRADIENT, quick, select
from benchmarks.measure import QUICK, Plan, Row, measure, release
from benchmarks.provenance import provenance, slug
from benchmarks.providers import named

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.cases import Case
    from benchmarks.provider import Provider


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Runs benchmark cases.")
    parser.add_argument(
        "--suite",
        choices=("losses", "percentiles"),
        default="losses",
        help="percentiles: benchmarks.quantile, which has its own cases and takes --device, --threads, --quick, --list",
    )
    parser.add_argument(
        "--cases",
        default="issue2,issue4",
        metavar="TAGS",
        help="issue2 (the cross-entropy), issue4 (distillation), headline, cpu, ci, gpu, all (default: %(default)s)",
    )
    parser.add_argument("--filter", default="*", metavar="PATTERN", help="cases whose name contains or matches this")
    parser.add_argument("--providers", default="", metavar="A,B", help="only these providers (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on CPU")
    parser.add_argument("--seconds", type=float, default=Plan.seconds, help="of timing a case (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few tokens, few rounds, nothing stored")
    parser.add_argument("--output", type=Path, help="rows go here (default: results/<device>.jsonl)")
    parser.add_argument("--base", metavar="REF", help="instead, time this checkout against another commit")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def line(row: Row) -> str:
    """One provider's result, or why there is none."""
    if row["status"] != "measured":
        return f"  {row['provider']:<30} {row['status']}: {row['reason']}"
    seconds, over, own = row["seconds"], row["speedup_over"], row["provider"]
    best = min((peer for peer in over if peer != own), key=lambda p: float(over[p]["median"]), default=None)
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / row['logits_bytes']:.2f}"
    eager = f"{over['torch.eager']['median']:.2f}" if "torch.eager" in over else "-"
    by = ", ".join(
        f"x{cost['median']:.2f} the time of {name}" for name, cost in row["cost_over"].items() if name != own
    )
    error = row["errors"]["gradient" if row["operation"] in WITH_GRADIENT else "loss"]
    return (
        f"  {row['provider']:<30}"
        f" {1e3 * seconds['median']:9.2f} [{1e3 * seconds['p20']:.2f}, {1e3 * seconds['p80']:.2f}] ms"
        f"  {row['bytes_per_second'] / 1e9:7.2f} GB/s  {100 * row['of_roof']['median']:5.1f} %"
        f"  x{eager:>6}  x{over[best]['median'] if best else 1.0:>6.2f}  {peak:>5}  {error:.1e}{by and '  '}{by}"
    )


def header(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["status"] == "measured"]
    shown = ""
    if measured:
        shown = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in measured[0]["roofs"].items())
        shown = f"  ({measured[0]['seconds']['rounds']} rounds; roofs in GB/s: {shown})"
    columns = "median [p20, p80], bytes, of roof, over eager, over best other, peak in (N, V) tensors, error"
    return f"{rows[0]['case']}{shown}\n  {columns}"


def measured_and_stored(
    case: Case, providers: Sequence[Provider], record: dict[str, Any], plan: Plan, output: Path | None
) -> list[Row]:
    """The rows of a case, printed, and appended to `output`."""
    rows = [record | row for row in measure(case, providers, record["kind"], plan)]
    release()
    print(header(rows), *map(line, rows), sep="\n", flush=True)
    if output is not None:
        results.append(output, rows)
    return rows


def run(options: argparse.Namespace, cases: Sequence[Case], providers: Sequence[Provider]) -> int:
    """Every case, then the targets of the issues that were run; 1 if the gate refused one of ours."""
    record = provenance(options.device)
    output = options.output or (None if options.quick else results.RESULTS / f"{slug(record['device'])}.jsonl")
    print(*(f"{key}: {value}" for key, value in record.items()), sep="; ", flush=True)
    start = time.monotonic()
    plan = QUICK if options.quick else Plan(seconds=options.seconds)
    rows: list[Row] = []
    # Memory that an allocator has kept mapped would also serve the cases after it.
    cases = sorted(cases, key=lambda case: case.allocator != "default")
    for case in map(quick, cases) if options.quick else cases:
        rows += measured_and_stored(case, providers, record, plan, output)
    for issue in options.cases.split(","):
        if issue in targets.TARGETS and not options.quick:
            print("\n" + targets.report(issue, rows))
    print(
        f"\n{len(cases)} cases in {time.monotonic() - start:.0f} s;",
        f"rows in {output}" if output else "nothing stored",
    )
    refused = [row for row in rows if row["status"] == "refused" and row["ours"]]
    for row in refused:
        print(f"{row['case']}: {row['provider']} was refused: {row['reason']}", file=sys.stderr)
    return 1 if refused else 0


def percentiles(options: argparse.Namespace) -> int:
    """The other suite, whose cases and rows are of another kind."""
    from benchmarks import quantile  # imports xentile, which a peer's benchmark does without

    if options.list:
        print(*(f"{c.case}{c.peer and ' against '}{c.peer}" for c in quantile.COMPARISONS), sep="\n")
        return 0
    return quantile.main(["--device", options.device, "--quick" if options.quick else "--store"])


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.suite == "percentiles":
        return percentiles(options)
    try:
        cases, providers = select(options.cases, options.filter), named([p for p in options.providers.split(",") if p])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not cases:
        print(f"no case with tag {options.cases} matches {options.filter}", file=sys.stderr)
        return 2
    if options.base:
        from benchmarks.compare import BaseError, compare  # builds another commit: only when asked

        try:
            return compare(options.base, cases, options.quick, options.threads)
        except BaseError as error:
            print(f"--base {options.base} {error}", file=sys.stderr)
            return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU that torch can see, there is none", file=sys.stderr)
        return 2
    return run(options, cases, providers)


if __name__ == "__main__":
    raise SystemExit(main())
