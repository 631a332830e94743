"""childtuning inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from childtuning.cli import options as o
from childtuning.cli.printing import human_bytes, print_facts, print_json, print_table, score_text, tell
from childtuning.errors import DeltaError, ModelError

NAME = "inspect"


def run(
    run_dir: o.RunDir,
    verify: Annotated[bool, typer.Option("--verify", help="Compare with the base model, bitwise.")] = False,
    certificate: Annotated[
        Path | None,
        typer.Option(
            help="Write a certificate to this folder, for `verify`: what was trained, hashes of the rest."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show each parameter's share of the child.")
    ] = False,
    as_json: o.AsJson = False,
) -> None:
    """Show which entries a run trained, and verify that all others are unchanged.

    Example:

        childtuning inspect runs/rte --verify
    """
    from childtuning.runs import load

    opened = load(run_dir)
    delta = opened.delta
    shares = {name: part.num_trained / max(part.numel, 1) for name, part in delta.parts.items()}
    content: dict[str, Any] = {
        "run": str(run_dir),
        "method": opened.method,
        "base": opened.about["base_name"],
        "metrics": opened.metrics["metrics"],
        "density": opened.metrics["density"],
        "trained_parameters": delta.num_trained,
        "parameters_touched": sum(share > 0 for share in shares.values()),
        "parameters_frozen": sum(share == 0 for share in shares.values()),
        "delta_bytes": opened.metrics["delta_bytes"],
    }
    if layers:
        content["share_by_parameter"] = shares
    if verify:
        content["verified"] = opened.verify()
    if verify or certificate is not None:
        from childtuning.runs.certify import certify

        try:
            made = certify(opened)
            content["certificate"] = made.to_dict()
            if certificate is not None:
                made.save(certificate)
        except ModelError as fault:
            if certificate is not None:
                raise
            tell(f"there is no certificate: {fault}")
    if as_json:
        print_json(content)
    else:
        _print(content, shares if layers else {})
    if verify and content["verified"]["changed_outside"]:
        raise DeltaError(
            f"{content['verified']['changed_outside']} entries outside the delta differ from the base. Train again."
        )


def _print(content: dict[str, Any], shares: dict[str, float]) -> None:
    facts = {
        "method": content["method"],
        "base model": content["base"] or "not named",
        **{name: score_text(value) for name, value in content["metrics"].items()},
        "trained": f"{content['trained_parameters']:,} entries (density {content['density']:.4g})",
        "parameters": f"{content['parameters_touched']} touched, {content['parameters_frozen']} frozen",
        "delta": human_bytes(content["delta_bytes"]),
    }
    if "verified" in content:
        counts = content["verified"]
        inside = counts["entries_in_delta"]
        outside = counts["entries"] - inside
        facts["inside the delta"] = f"{counts['changed_inside']:,} of {inside:,} entries differ from the base"
        facts["outside the delta"] = (
            f"{counts['changed_outside']:,} of {outside:,} entries differ, bit by bit"
        )
        facts["not in the base"] = f"{counts['new_entries']:,} entries"
    if "certificate" in content:
        facts["certificate"] = content["certificate"]["root"]
    print_facts(facts)
    if shares:
        print_table(
            None, ("parameter", "trained"), [[name, f"{share:.2%}"] for name, share in shares.items()]
        )
