"""Make a store of an exported comparison, so that it goes on from there on another machine.

    python benchmarks/restored.py benchmarks/results/confirmed-200-mrpc.json confirmed-200-mrpc.db
    childtuning compare --store confirmed-200-mrpc.db

Only finished runs are in an export: a run that was interrupted starts again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from childtuning.compare.files import Owner
from childtuning.compare.records import Recorded
from childtuning.compare.store import Store
from childtuning.errors import ConfigError


def main() -> None:
    """Read the export, write the store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, help="what `childtuning report STORE --format json` wrote")
    parser.add_argument("store", type=Path, help="the new store")
    given = parser.parse_args()
    if given.store.exists():
        parser.error(f"{str(given.store)!r} exists. Name a new file.")
    try:
        recorded = Recorded.from_dict(json.loads(given.export.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as fault:
        parser.error(f"{str(given.export)!r}: {fault}")
    finished = {run.id: run for run in recorded.records if run.state in ("done", "failed")}
    with Store.open(given.store, create=True) as store, Owner(store.locks) as owner:
        store.set_comparison(recorded.comparison, recorded.environment)
        store.plan(finished.values(), recorded.comparison)
        while (run := store.claim(owner)) is not None:
            store.finish(finished[run.id], owner)
        store.plan(recorded.records, recorded.comparison)
        for name, content in recorded.artifacts.items():
            store.set_artifact(name, content)
    print(f"{len(finished)} of {len(recorded.records)} runs are finished.")


if __name__ == "__main__":
    main()
