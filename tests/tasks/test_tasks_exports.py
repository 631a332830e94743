"""Files as people export them are read, and what was understood is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tasks.exports import EXPORTS, Export

from childtuning.errors import DataError
from childtuning.tasks import task_from_files


@pytest.mark.parametrize("export", EXPORTS, ids=lambda export: export.name)
def test_exports(tmp_path: Path, export: Export) -> None:
    path = tmp_path / export.name
    path.write_bytes(export.content_fn())
    if export.kind is None:
        with pytest.raises(DataError) as caught:
            task_from_files(path)
        assert export.told[0] in str(caught.value) and "\n" not in str(caught.value)
        return
    task = task_from_files(path, **export.options)  # type: ignore[arg-type]
    assert task.kind == export.kind
    unexplained = [
        note for note in task.notes if not any(words in note for words in (*export.told, "no --eval"))
    ]
    assert not unexplained and all(any(words in note for note in task.notes) for words in export.told)
    assert len(task.train) and len(task.dev)
