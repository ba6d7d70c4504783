"""Which cases of a benchmark are begun, measured and failed, on disk."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mlra.benchmarks.training.measure import Result, SublayerResult
from megatron_mlra.command_line.parser import write_json


class Progress:
    """The cases of one launch.

    A case can kill its process. torchrun then starts all processes again, and they go on behind
    that case.
    """

    def __init__(self, folder: Path, kind: type[Result] | type[SublayerResult]) -> None:
        self.path = folder / "progress.json"
        self.begun: list[str] = []
        self.rows: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if restarted and self.path.is_file():
            known = json.loads(self.path.read_text())
            self.begun, self.failed = known["begun"], known["failed"]
            self.rows = {case: kind(**row) for case, row in known["rows"].items()}
            for case in set(self.begun) - self.rows.keys() - self.failed.keys():
                self.failed[case] = f"{case}: it ended its process"

    def begin(self, case: Any) -> None:
        """Note that a case begins."""
        self.begun.append(str(case))
        self._write()

    def measured(self, case: Any, row: Result | SublayerResult) -> None:
        """Note a case's result."""
        self.rows[str(case)] = row
        self._write()

    def fail(self, case: Any, error: Exception) -> None:
        """Note why a case failed, and say it."""
        self.failed[str(case)] = f"{case}: {' '.join(str(error).split())[:400]}"
        print(f"error: {self.failed[str(case)]}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        rows = {case: asdict(row) for case, row in self.rows.items()}
        known = {"begun": self.begun, "failed": self.failed, "rows": rows}
        write_json(self.path, known)
