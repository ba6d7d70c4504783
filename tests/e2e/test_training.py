"""Runs of the entry to their end, and cut short: what they print, leave, and how they resume."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import psutil
import pytest

from megatron_mlra.benchmarks import losses_files
from megatron_mlra.fault_tolerance.integrity import check_complete
from megatron_mlra.fault_tolerance.saved_steps import latest_step
from support import ENV, ROOT, wandb_file
from support.runs import WHOLE, Run, scalars, wait_for


def at_step_4(source, folder):
    """A copy of a run's checkpoints as they were after step 4."""
    folder.mkdir()
    shutil.copytree(source / "iter_0000004", folder / "iter_0000004")
    (folder / "latest_checkpointed_iteration.txt").write_text("4")
    return folder


@pytest.fixture
def save(whole, tmp_path):
    """A folder with the checkpoint of step 4."""
    return at_step_4(whole.folder / "save", tmp_path / "save")


@pytest.fixture(scope="session")
def whole(tmp_path_factory, preset) -> Run:
    """The uninterrupted run by its own command line, in a process that imports all itself."""
    folder = tmp_path_factory.mktemp("whole-by-itself")
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "pretrain_mlra.py", "--config", preset),
            *("--save", folder / "save", *WHOLE),
        ],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=300,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)


@pytest.fixture(scope="session")
def parallel(tmp_path_factory, preset, warm_python, warm_mlra):
    """The same run on two ranks: tensor and sequence parallel, distributed optimizer."""
    folder = tmp_path_factory.mktemp("parallel")
    done = subprocess.run(
        [
            *(warm_python, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--no-python", warm_mlra, "pretrain"),
            *("--config", preset, "--save", folder / "save", *PARALLEL),
        ],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=300,
    )
    return Run(done.returncode, done.stdout, done.stderr, folder)


PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PARALLEL += ["--use-distributed-optimizer"]


def test_console(whole):
    loading = "loading PyTorch and Megatron-core: some 10 seconds, more on a busy machine\n"
    assert (whole.code, whole.err) == (0, loading)
    lines = whole.out.splitlines()
    assert lines[:5] == [
        "training MLRA-4: 111,104 parameters",
        "  length: 8 steps of 128 tokens (4 sequences of 32)",
        "  processes: 1",
        "  when it generates: 288 bytes of KV cache per token in bfloat16",
        "no GPU found: training on the CPU, for small models and trials",
    ]
    said = [re.sub(r"[\d.]+ \(perplexity.*|\(\d+\.\d s\)| \|.*", "", line) for line in lines[5:]]
    saved = f"to {whole.folder}/save "
    assert said == [
        "validation at step 0: lm loss ",
        *(f"step {step}/8" for step in (1, 2, 3, 4)),
        "validation at step 4: lm loss ",
        f"saved step 4 {saved}",
        *(f"step {step}/8" for step in (5, 6, 7, 8)),
        "validation at step 8: lm loss ",
        f"saved step 8 {saved}",
        "test at step 8: lm loss ",
    ]
    assert re.search(
        r"step 8/8 \| lm loss \d\.\d{4} \| grad norm \d\.\d+ \| lr 2\.00e-04 \| [\d,]+ tokens/s \|"
        r" \d\.\d GiB \| 0 s left$",
        whole.out,
        re.MULTILINE,
    )
    assert max(map(len, re.findall("^(?:step|  ).*", whole.out, re.MULTILINE))) <= 100


def test_a_narrow_terminal_gets_two_lines(entry, preset, tmp_path):
    run = entry.run(tmp_path, "--config", preset, "--exit-interval", 3, terminal=80)
    assert run.code == 0, run.err
    assert re.search(
        r"^\r?step 3/8 \| lm loss \d\.\d{4} \| grad norm \d\.\d+ \| lr \S+\n"
        r"  [\d,]+ tokens/s \| \d\.\d GiB \| \d+ s left$",
        run.out,
        re.MULTILINE,
    ), run.out


def test_logs(whole):
    log = (whole.folder / "save" / "megatron.log").read_text()
    assert "------------------------ arguments ------------------------" in log
    assert "Traceback" not in log
    assert sorted(whole.losses) == list(range(1, 9))
    validation = scalars(whole.folder, "lm loss validation")
    assert sorted(validation) == [0, 4, 8]
    assert validation[8] < validation[0]
    assert list(scalars(whole.folder, "lm loss test")) == [8]
    assert min(scalars(whole.folder, "tokens per second").values()) > 0
    memory = scalars(whole.folder, "peak memory GiB")
    assert sorted(memory) == list(range(1, 9)) and 0.1 < memory[1] <= memory[8] < 4
    left = scalars(whole.folder, "hours left")
    assert left[8] == 0 and 0 < left[2] < 0.1


def test_one_loss_in_the_line_the_log_and_the_curves(entry, preset, whole, tmp_path):
    flags = ["--log-interval", 3, "--eval-interval", 2, "--wandb-project", "mlra"]
    flags += ["--wandb-exp-name", "tiny", "--log-max-attention-logit"]
    run = entry.run(tmp_path, "--config", preset, *flags, env={"WANDB_MODE": "offline"})
    assert run.code == 0, run.err
    printed = {int(s): float(x) for s, x in re.findall(r"step (\d)/8 \| lm loss (\S+)", run.out)}
    means = {1: (1,), 3: (2, 3), 6: (4, 5, 6), 8: (7, 8)}
    assert printed == {
        step: pytest.approx(sum(whole.losses[s] for s in of) / len(of), abs=1e-4)
        for step, of in means.items()
    }
    log = (tmp_path / "runs/tiny/megatron.log").read_text()
    logged = re.findall(r"iteration +(\d)/ +8 .*? lm loss: (\S+)", log)
    in_log = {3: (printed[1] + 2 * printed[3]) / 3, 6: printed[6]}  # Megatron counts step 1 twice
    assert {int(s): float(x) for s, x in logged if s in "36"} == pytest.approx(in_log, abs=1e-4)
    curve = {step: pytest.approx(loss, abs=1e-4) for step, loss in printed.items()}
    assert run.losses == curve
    online = wandb_file.curves(tmp_path / "runs/tiny/wandb")
    assert online["lm loss"] == curve
    for name in ("tokens per second", "peak memory GiB", "hours left"):
        assert online[name] == pytest.approx(scalars(tmp_path, name)) and 8 in online[name]
    for name in ("lm loss validation", "lm loss test"):
        assert online[name] == pytest.approx(scalars(tmp_path, name))
    layers = [scalars(tmp_path, f"max_attention_logit/layer_{i}") for i in (1, 2)]
    largest = scalars(tmp_path, "max_attention_logit")
    assert sorted(largest) == [1, 3, 6, 8] and online["max_attention_logit"] == pytest.approx(
        largest
    )
    assert largest == {s: max(x, layers[1][s]) for s, x in layers[0].items()}
    said = {
        int(s): float(x) for s, x in re.findall(r"step (\d)/8 .*\s+max logit (\S+) \(", run.out)
    }
    assert said == pytest.approx(largest, rel=0.01)
    # Compared by the runs' own files: the folder with events, the log, what was printed.
    places = {"folder": whole.folder, "log": tmp_path / "runs/tiny/megatron.log"}
    places |= {"events": next(tmp_path.rglob("events.out*")), "out": tmp_path / "stdout-0.txt"}
    for name, place in places.items():
        read = losses_files.read(place)
        wanted = {"folder": whole.losses, "log": in_log}.get(name, printed)
        assert dict(zip(read.steps, read.losses, strict=True)) == pytest.approx(wanted, abs=1e-4)
        assert read.validation == pytest.approx(
            scalars(place if place.is_dir() else tmp_path, "lm loss validation")[8], abs=1e-4
        )
    # On the same samples, however often: the other run validated at steps 0, 4 and 8.
    there, here = (scalars(f, "lm loss validation") for f in (whole.folder, tmp_path))
    assert here[4] == there[4] and here[8] == there[8] and sorted(here) == [2, 4, 6, 8]


def test_logits_stay_at_a_threshold(entry, preset, tmp_path):
    flags = ("--pipeline-model-parallel-size", 2, "--init-method-std", 0.3, "--qk-clip")
    run = entry.run(tmp_path, "--config", preset, *flags, "--qk-clip-threshold", 2, ranks=2)
    assert run.code == 0, run.err
    for layer in (1, 2):
        largest = scalars(tmp_path, f"max_attention_logit/layer_{layer}")
        assert sorted(largest) == list(range(1, 9)) and largest[1] > 4
        # What follows the first clip has moved by a few steps of small rates.
        assert all(1 < largest[step] < 2.5 for step in range(2, 9)), largest
    assert re.search(r"step 1/8 .*\n  max logit \S+ \(layer \d\) \| \d heads? clipped\n", run.out)


def test_resumes_exactly(entry, preset, whole, save):
    resumed = entry.run(save.parent, "--config", preset, "--save", save, "--load", save)
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}
    # The clock starts behind the first step, wherever that is.
    assert "tokens/s" in re.search("step 6/8.*", resumed.out)[0]


def test_evaluating_first_changes_no_training(entry, preset, whole, tmp_path):
    plain = entry.run(tmp_path, "--config", preset, "--exit-interval", 4)
    assert (plain.code, plain.err) == (0, "")
    assert plain.losses == {step: whole.losses[step] for step in (1, 2, 3, 4)}
    assert "stopped after step 4; nothing is saved without --save" in plain.out
    assert (tmp_path / "runs" / preset.stem / "megatron.log").exists()


def test_verbose_prints_all_of_megatron(entry, preset, tmp_path):
    run = entry.run(tmp_path, "--config", preset, "--exit-interval", 1, "--verbose-megatron")
    assert run.code == 0
    assert "------------------------ arguments ------------------------" in run.out
    assert "Traceback" not in run.err


def test_parallel_run_resumes_exactly(entry, preset, parallel, tmp_path):
    assert parallel.code == 0, parallel.err
    layout = "each layer cut over 2 (TP2), head layout, sequence parallel"
    assert f"\n  processes: 2: {layout}\n" in parallel.out
    save = at_step_4(parallel.folder / "save", tmp_path / "save")
    resumed = entry.run(
        tmp_path, "--config", preset, "--save", save, "--load", save, *PARALLEL, ranks=2
    )
    assert resumed.code == 0, resumed.err
    assert resumed.losses == {step: parallel.losses[step] for step in (5, 6, 7, 8)}


def test_parallel_checkpoint_resumes_on_one_rank(entry, preset, parallel, tmp_path):
    load = at_step_4(parallel.folder / "save", tmp_path / "load")
    resumed = entry.run(tmp_path, "--config", preset, "--load", load, "--use-distributed-optimizer")
    assert resumed.code == 0, resumed.err
    assert sorted(resumed.losses) == [5, 6, 7, 8]
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(parallel.losses[step], abs=1e-4)


def test_nan_ends_the_run_and_harms_no_checkpoint(entry, preset, whole, save):
    before = {path: path.read_bytes() for path in save.rglob("*") if path.is_file()}
    command = ["--config", preset, "--save", save, "--load", save]
    run = entry.run(save.parent, *command, nan_at=6)
    assert run.code == 1
    error, log = run.err.splitlines()
    # Step 6's first micro-batch: 5 steps of 4 samples come before.
    assert re.fullmatch(
        r"error: step 6: the loss is nan on data-parallel rank 0, samples 20 \(document \d+ from"
        r" token \d+\), 21 \(document \d+ from token \d+\); lower --lr, or look at the batch",
        error,
    )
    assert log == f"  full log: {save}/megatron.log"
    assert "Traceback" in (save / "megatron.log").read_text()
    assert before == {path: path.read_bytes() for path in before}
    # What was trained before is not lost from the curve.
    assert run.losses == {5: whole.losses[5]}
    resumed = entry.run(save.parent, *command)
    assert (resumed.code, resumed.err) == (0, "")


@pytest.mark.parametrize(
    ("layout", "ranks", "said"),
    [
        ([], 1, [r"20 (document \d+ from token \d+), 21 (document .*), 22 (.*), 23 (document .*)"]),
        # The second of two tensor-parallel ranks loads nothing, and knows the numbers.
        (["--tensor-model-parallel-size", 2], 2, [r"20 (document .*), 23 (.*)", "20, 21, 22, 23"]),
        # Two replicas: each names its own half.
        ([], 2, [r"20 (document .*), 21 (document .*)", r"22 (document .*), 23 (document .*)"]),
    ],
    ids=["alone", "TP2", "DP2"],
)
def test_a_gradient_that_is_nan_under_a_finite_loss(entry, preset, tmp_path, layout, ranks, said):
    flags = ["--save", tmp_path / "save", "--save-interval", 50, *layout]
    # The first rank to leave must not take the others with it.
    place, other = "megatron_mlra.training.console:fail", str(tmp_path / "stderr-1.txt")
    asleep = [{"ranks": [0], "place": place, "seconds": 120, "until": other}] * (ranks > 1)
    job = {"ranks": ranks, "nan_gradient_at": 6, "asleep": asleep}
    run = entry.run(tmp_path, "--config", preset, *flags, **job)
    assert run.code == 1
    for rank, samples in enumerate(said):
        where = f" (rank {rank})" if ranks > 1 else ""
        replica = rank if not layout else 0
        samples = re.sub(r"[()]", r"\\\g<0>", samples)
        assert re.search(
            rf"^error{re.escape(where)}: step 6: found NaN in local grad norm for bucket #0 in"
            rf" backward pass before data-parallel communication collective: nan, on data-parallel"
            rf" rank {replica}, one of samples {samples}; lower --lr, or look at the batch$",
            run.err,
            re.MULTILINE,
        ), run.err
    log = (tmp_path / "save/megatron.log").read_text()
    assert "all samples of this rank in step 6: [[20, " in log


def test_absurd_learning_rate_ends_the_run(entry, preset, tmp_path):
    run = entry.run(tmp_path, "--config", preset, "--lr", 1e30, "--lr-warmup-iters", 0)
    assert run.code == 1
    error, _ = run.err.splitlines()
    assert re.fullmatch(r"error: step \d: .*(nan|inf).*; lower --lr, or look at the batch", error)


def test_full_disk_keeps_the_earlier_checkpoint(entry, preset, whole, save):
    command = ["--config", preset, "--save", save, "--load", save, "--save-interval", 2]
    run = entry.run(save.parent, *command, file_bytes=200_000)
    assert run.code == 1
    error, _ = run.err.splitlines()
    assert error == (
        f"error: the checkpoint of step 6 could not be saved to {save}: [Errno 27] File too large;"
        " that of step 4 is intact"
    )
    assert latest_step(save) == 4
    check_complete(save / "iter_0000004")
    shutil.rmtree(save / "tensorboard")
    resumed = entry.run(save.parent, *command)
    assert (resumed.code, resumed.err) == (0, "")
    assert resumed.losses == {step: whole.losses[step] for step in (5, 6, 7, 8)}
    check_complete(save / "iter_0000006")


@pytest.mark.parametrize(
    ("ranks", "stop"),
    [(0, signal.SIGTERM), (2, signal.SIGINT), (0, signal.SIGHUP)],
    ids=["SIGTERM", "Ctrl-C", "SIGHUP"],
)
def test_a_stop_signal_saves_and_the_run_continues(entry, preset, tmp_path, ranks, stop):
    save = tmp_path / "save"
    command = ["--config", preset, "--save", save, "--load", save, "--train-iters", 5000]
    command += ["--save-interval", 5000, "--eval-interval", 5000]
    command += [*PARALLEL, "--async-save"] if ranks else []
    pids = entry.start(tmp_path, *command, ranks=ranks)
    wait_for(tmp_path / f"stdout-{max(ranks - 1, 0)}.txt", "step 4/5,000")
    # As schedulers and terminals do: to every process of the job, those that serve its saves too.
    ranks_of_the_job = [psutil.Process(pid) for pid in pids]
    helpers = [child for rank in ranks_of_the_job for child in rank.children(recursive=True)]
    assert helpers
    for process in (*helpers, *ranks_of_the_job):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that served a moment
            process.send_signal(stop)
    run = entry.wait(tmp_path, pids)
    assert run.code == 0, run.err
    note = "note: stopping in order; the step under way is ended, and saved where there is --save"
    note += ", and no other begins (a second Ctrl-C ends the run at once)"
    assert run.err.count(note) == run.err.count("\n") == (stop == signal.SIGINT), run.err
    step = latest_step(save)
    said = (
        f"stopped after step {step:,} by {stop.name}, which is saved; continue with --load {save}"
    )
    assert f"{said} --save {save}" in run.out
    check_complete(save / f"iter_{step:07d}")
    resumed = entry.run(tmp_path, *command, "--exit-interval", 1, "--log-interval", 1, ranks=ranks)
    assert resumed.code == 0, resumed.err
    assert f"continuing after step {step:,} of {save}\n" in resumed.out
    assert f"step {step + 1:,}/5,000" in resumed.out


def test_a_second_interrupt_ends_a_save_at_once(entry, preset, whole, tmp_path):
    save = tmp_path / "save"
    command = ["--config", preset, "--save", save, "--load", save]
    # The main thread does not come back: rank 0 never sees all of its checkpoint.
    looking = "megatron_mlra.fault_tolerance.saved_files:missing"
    asleep = [{"ranks": [0], "place": looking, "seconds": 3600, "step": 8}]
    pids = entry.start(tmp_path, *command, asleep=asleep)
    wait_for(tmp_path / "stdout-0.txt", "saved step 4 to")
    wait_for(save / "iter_0000008" / ".metadata", "", 120)
    os.kill(pids[0], signal.SIGINT)
    wait_for(tmp_path / "stderr-0.txt", "note: stopping in order;")
    os.kill(pids[0], signal.SIGINT)
    run = entry.wait(tmp_path, pids)
    note, error = run.err.splitlines()
    assert run.code == 130 and note.startswith("note: stopping in order; ")
    assert error == (
        "error: ended at once by a second Ctrl-C at step 8; step 4 is saved; continue with --load"
        f" {save} --save {save}"
    )
    resumed = entry.run(tmp_path, *command)
    assert (resumed.code, resumed.err) == (0, ""), resumed.err
    assert f"continuing after step 4 of {save}\n" in resumed.out
    assert resumed.losses == whole.losses


def test_a_run_in_a_thread_leaves_the_programs_signals_alone(entry, preset, tmp_path):
    """Ray Train, for one, calls the training function in a thread."""
    run = entry.run(
        tmp_path, "--config", preset, "--train-iters", "3", "--save", "save", in_thread=True
    )
    assert run.code == 0, run.err
    assert "saved step 3" in run.out
