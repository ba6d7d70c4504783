"""Tools that a program calls: in a thread they set no signal handlers, and elsewhere none stays."""

from __future__ import annotations

import signal
import threading

from megatron_mlra.checkpoint.cli import main as convert
from megatron_mlra.checkpoint.research.folder import write_research
from megatron_mlra.command_line.signals import STOP_SIGNALS
from megatron_mlra.data.cli import main as preprocess
from support.random_checkpoint import RandomFolder, grouped


def test_a_tool_run_in_a_thread_sets_no_handlers(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some words\n")
    write_research(RandomFolder(grouped(2)), tmp_path / "official", progress=False)
    calls = (
        (preprocess, "--input", "text.txt", "--output-prefix", "made", "--tokenizer", "byte"),
        (convert, "import-official", "official", "out", "--quiet"),
        (convert, "reshard", "out", "again", "--quiet"),
        (convert, "inspect", "again"),
    )
    monkeypatch.chdir(tmp_path)
    real, handled, codes = signal.signal, [], []
    monkeypatch.setattr(signal, "signal", lambda *set_to: handled.append(set_to) or real(*set_to))
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    def run() -> None:
        codes.extend(main(list(argv)) for main, *argv in calls)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0] * len(calls) and handled == []
    run()
    assert handled
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
