"""What a run replaces in Megatron and in torch: every function, in order, each with its reason.

Megatron's trainer has no hooks at these points, so a run sets attributes of Megatron's modules and
classes. This file is the whole list, and hook.py puts its rows in place. Each target has one row.
Where several parts of this project wrap one function, that row lists all of them, the innermost
first. Two replacements lie elsewhere, because tests and argument defaults use them without a run:
cpu_backend.py (CUDA devices read as the CPU) and `accumulate_weight_gradients_in_products` of
upstream_fixes.py.

The targets were read in megatron-core 0.19.2 and torch 2.11.0. With a new version of either, read
the targets again, then change `READ_IN`, which a test compares with the installed versions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from megatron_mlra.checkpoint.files import guarded_loads
from megatron_mlra.fault_tolerance import (
    checksums,
    failed_saves,
    heartbeat,
    helper_processes,
    resume,
    samples,
    saved_files,
    stopping,
)
from megatron_mlra.layers.multi_token import (
    multi_token_loss,
    multi_token_spec,
    next_tokens,
    tie_output_layer,
)
from megatron_mlra.training import curves, muon, progress, upstream_fixes, validation
from megatron_mlra.training.batch_schedule import count_from_checkpoint
from megatron_mlra.training.build_lock import BuildLock
from megatron_mlra.training.hook import Hook, Run, apply, instead
from megatron_mlra.training.new_layers import keep_new_layers

__all__ = ["BEFORE_CHECKS", "BEFORE_TRAINING", "Hook", "Run", "apply"]

READ_IN = {"megatron-core": "0.19.2", "torch": "2.11.0"}
"""The versions in which the targets were read."""

READER = "torch.distributed.checkpoint.FileSystemReader"
PLANNER = "torch.distributed.checkpoint.default_planner.DefaultLoadPlanner"
SAVING = "megatron.core.dist_checkpointing"
WRITER = f"{SAVING}.strategies.filesystem_async.FileSystemWriterAsync"
OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
TRAINER = "megatron.training.training"

BEFORE_CHECKS = (
    Hook(
        "megatron.core.datasets.utils.compile_helpers",
        "the wheel ships the index builder built, without the Makefile that Megatron would run",
        (upstream_fixes.use_prebuilt_dataset_helpers,),
    ),
    Hook(
        "megatron.training.checkpointing._get_checkpoint_format",
        "Megatron reads whichever format a folder looks like, by files that no check has seen",
        (instead(guarded_loads.checkpoint_format),),
    ),
    Hook(
        f"{READER}.read_metadata",
        "torch unpickles `.metadata`, which runs whatever code it names",
        (instead(guarded_loads.read_metadata),),
    ),
    Hook(
        f"{READER}._slice_file",
        "torch takes a tensor's size from an entry, and allocates it, before looking at the entry",
        (instead(guarded_loads.slice_file),),
    ),
    Hook(
        f"{PLANNER}.load_bytes",
        "torch unpickles entries that are no tensors, which runs whatever code they name",
        (instead(guarded_loads.load_bytes),),
    ),
)
"""Applied before arguments are validated, since the validation may read a checkpoint."""

TORCH_ADAMW = (
    Hook(
        f"{OPTIMIZER}.state_dict",
        "a resume with torch's AdamW asks for states before there are any",
        (upstream_fixes.state_dict_with_state,),
    ),
    Hook(
        f"{OPTIMIZER}._set_main_param_and_optimizer_states",
        "a resume with torch's AdamW misses `step` among the states it loads",
        (upstream_fixes.set_states_with_step,),
    ),
    Hook(
        f"{OPTIMIZER}.load_state_dict",
        "a resume with torch's AdamW shares one step tensor among all parameters; one at another"
        " rate finds no group",
        (upstream_fixes.load_with_own_steps, upstream_fixes.load_at_other_rates),
    ),
)
"""For torch's AdamW, which Megatron uses without Transformer Engine and without APEX."""

MUON = (
    Hook(
        "megatron.core.optimizer._EMERGING_OPTIMIZERS",
        "Muon gets each weight's matrices; Megatron leaves weights of four axes to Adam",
        (lambda optimizers, run: muon.register(optimizers),),
    ),
    Hook(
        "megatron.core.optimizer.layer_wise_optimizer.is_managed_by_layer_wise_optimizer",
        "the buffers of the distributed optimizer are cut by the same rule",
        (instead(muon.is_for_muon),),
    ),
    Hook(
        "megatron.core.optimizer.is_managed_by_layer_wise_optimizer",
        "the rates of maximal-update parametrisation follow the same rule",
        (instead(muon.is_for_muon),),
    ),
    Hook(
        "megatron.core.tensor_parallel.layers._MODEL_PARALLEL_ATTRIBUTE_DEFAULTS",
        "the float32 copies of bf16 weights know the weights' matrices",
        (lambda attributes, run: muon.know_matrices(attributes),),
    ),
    Hook(
        "megatron.training.models.dist_utils._ddp_wrap",
        "Megatron lays out buffers for whole matrices only where it builds models the older way",
        (lambda wrap, run: muon.with_whole_matrices(wrap, run.args),),
    ),
    Hook(
        "megatron.training.models.dist_utils.DistributedOptimizer",
        "the layout is that of whole matrices then",
        (lambda optimizer, run: muon.layout_of(optimizer, run.args),),
    ),
    Hook(
        f"{TRAINER}.get_megatron_optimizer",
        "grouped queries are cut by heads too; --verbose-optimizer prints what goes where",
        (lambda build, run: muon.around_optimizer(build, run.args),),
    ),
)
"""For Muon. The targets of the first and the fourth row are tables, which are changed in place."""

_MTP = "megatron.core.transformer.multi_token_prediction"

MULTI_TOKEN = (
    Hook(
        "megatron.training.models.gpt.mtp_block_spec",
        "Megatron would build the layers of multi-token prediction with its own attention",
        (instead(lambda config, _, vp_stage=None: multi_token_spec(config.transformer, vp_stage)),),
    ),
    Hook(
        f"{_MTP}.roll_tensor",
        "Megatron's knows neither documents of any length nor this project's cut of them",
        (instead(next_tokens),),
    ),
    Hook(
        "megatron.core.models.gpt.gpt_model.process_mtp_loss",
        "Megatron averages over each context-parallel rank's tokens, however many have a label",
        (instead(multi_token_loss),),
    ),
    Hook(
        "megatron.core.models.gpt.gpt_model.GPTModel.setup_embeddings_and_output_layer",
        "of tied embeddings, Megatron gives the last pipeline stage an output layer of its own",
        (lambda set_up, run: tie_output_layer(set_up),),
    ),
    Hook(
        f"{_MTP}.MTPLossLoggingHelper.track_mtp_metrics",
        "the losses of multi-token prediction stand in the run's own lines too",
        (lambda track, run: run.progress.wrap_multi_token(track),),
    ),
    Hook(
        f"{SAVING}.load",
        "--finetune may begin with the weights of a run without such layers",
        (keep_new_layers,),
    ),
)
"""For multi-token prediction. Runs without it do not call these functions, or are not changed."""

BEFORE_TRAINING = (
    Hook(
        "torch.utils.cpp_extension.FileBaton",
        "a process killed in building an extension leaves a lock that all later runs wait for",
        (instead(BuildLock),),
    ),
    *TORCH_ADAMW,
    *MUON,
    *MULTI_TOKEN,
    Hook(
        "megatron.core.optimizer.optimizer.MegatronOptimizer._filter_and_reorder_param_groups",
        "a resume at another rate finds no group: Megatron tells groups apart by their rates",
        (upstream_fixes.pair_at_other_rates,),
    ),
    Hook(
        f"{OPTIMIZER}.optimizer_state_keys",
        "with Lion, Adam's second moments of embeddings and norms are not saved",
        (upstream_fixes.moments_of_the_optimizer,),
    ),
    Hook(
        "megatron.core.optimizer.optimizer.Float16OptimizerWithFloat16Params.sharded_state_dict",
        "a resume asks for moments that fp16, which skips steps, has not made yet",
        (upstream_fixes.load_without_moments,),
    ),
    Hook(
        "megatron.core.optimizer.optimizer.MegatronOptimizer.__init__",
        "a resume with SGD calls a function that Megatron does not give",
        (upstream_fixes.start_with_momentum,),
    ),
    Hook(
        "megatron.core.optimizer_param_scheduler.OptimizerParamScheduler.load_state_dict",
        "the first step of a resume with the checkpoint's schedule had the run's weight decay",
        (upstream_fixes.step_with_loaded_schedule,),
    ),
    # Saving a checkpoint.
    Hook(
        f"{WRITER}.write_preloaded_data",
        "of a file that cannot be written Megatron reports only the type of the error",
        (upstream_fixes.raise_failed_writes,),
    ),
    Hook(
        f"{WRITER}.write_preloaded_data_multithread",
        "each writer hashes its own file; Megatron has one rank hash all while the others wait",
        (instead(checksums.write_and_hash),),
    ),
    Hook(
        f"{WRITER}.preload_tensors",
        "Megatron copies no tensor that is on the CPU: an asynchronous save would hold later steps",
        (instead(checksums.preload_tensors),),
    ),
    Hook(
        f"{SAVING}.serialization.save_integrity_manifest",
        "the manifest is made of the writers' own hashes",
        (instead(checksums.write_manifest),),
    ),
    Hook(
        f"{SAVING}.serialization.verify_integrity_manifest",
        "all ranks have checked the files, each a share, before Megatron loads (resume.py)",
        (instead(lambda _: None),),
    ),
    Hook(
        f"{SAVING}.strategies.state_dict_saver.save_state_dict_async_finalize",
        "a save counts only once rank 0 sees every rank's files, and owns the folder",
        (lambda finalize, run: saved_files.look_behind(finalize, run.hosts, _successor(run)),),
    ),
    Hook(
        f"{SAVING}.strategies.async_utils.PersistentAsyncCaller.async_loop",
        "an asynchronous writer ends with its rank, and holds the lock of `--save`",
        (lambda loop, run: helper_processes.tied(loop, run.lock.path if run.lock else None),),
    ),
    Hook(
        f"{SAVING}.strategies.async_utils.PersistentAsyncCaller._get_process",
        "a writer must not see the stop signals; on a CPU it must be a fork, to know these hooks;"
        " one is started with the run, and another where a save comes behind the loop; one that is"
        " killed must not be waited for",
        (
            lambda start, run: (lambda rank, *_: start(rank, "fork")) if run.on_cpu else start,
            lambda start, run: helper_processes.unseen(start, stopping.heeded()),
            lambda start, run: failed_saves.watched(start),
        ),
    ),
    Hook(
        f"{SAVING}.strategies.filesystem_async._results_queue",
        "started at the first save, its process would keep a killed rank's GPU memory taken",
        (lambda _, run: helper_processes.results_queue(stopping.heeded()),),
    ),
    # Starting.
    Hook(
        "megatron.training.dist_signal_handler.DistributedSignalHandler.__enter__",
        "Python lets the main thread alone set handlers; a library's user may train in another",
        (lambda enter, run: stopping.enter_where_possible(enter),),
    ),
    Hook(
        "megatron.training.dist_signal_handler.DistributedSignalHandler.signals_received",
        "the last line of a stopped run names the rank that was asked",
        (lambda ask, run: stopping.remember_told(ask),),
    ),
    Hook(
        f"{TRAINER}.set_jit_fusion_options",
        "on a CPU there is nothing to warm up, and the random numbers spent on it would make"
        " initial weights depend on the micro-batch",
        (lambda warm_up, run: (lambda **_: None) if run.on_cpu else warm_up,),
    ),
    Hook(
        f"{TRAINER}.initialize_megatron",
        "Megatron refuses to train without a GPU; ranks watch each other from here on; a stop that"
        " came before the ranks met is heeded ahead of building and loading the model",
        (
            lambda start, run: (
                functools.partial(start, allow_no_cuda=True) if run.on_cpu else start
            ),
            lambda start, run: run.watch.start_after(start) if run.watch else start,
            lambda start, run: progress.stop_after(start),
        ),
    ),
    Hook(
        f"{TRAINER}.load_checkpoint",
        "the step to load is the newest whose files are what was saved; a length in samples is"
        " counted on from it",
        (
            lambda load, run: resume.choose_step(load, run.args),
            lambda load, run: count_from_checkpoint(load, run.args),
        ),
    ),
    Hook(
        f"{TRAINER}.build_pretraining_data_loader",
        "each evaluation takes the next samples, so that two of one run are of other text;"
        " loaders draw from dropout's generator on a CPU; their processes outlive a rank killed as"
        " they start",
        (
            lambda build, run: helper_processes.tied_loaders(build),
            lambda build, run: validation.draws_apart(build),
            lambda build, run: validation.same_samples(build, run.args),
        ),
    ),
    # Training.
    Hook(
        f"{TRAINER}.train",
        "lines at its start and end, validation before the first step, held-out sets behind the"
        " last where no save follows; its end may take any time",
        (
            lambda train, run: run.held_out.wrap_train(train),
            lambda train, run: run.progress.wrap_train(train),
            lambda train, run: heartbeat.mark_end(train) if run.watch else train,
        ),
    ),
    Hook(
        f"{TRAINER}.train_step",
        "the error for a NaN gradient names the samples; the heartbeat tells where a step is; cores"
        " report logits in the steps whose logits are asked for",
        (
            lambda step, run: run.progress.logits.wrap_step(step),
            lambda step, run: samples.name_bad(step),
            lambda step, run: heartbeat.mark_step(step, run.args) if run.watch else step,
        ),
    ),
    Hook(
        f"{TRAINER}.clip_qk",
        "Megatron's QK-clip knows neither branches nor layouts, its log no layers",
        (lambda clip, run: run.progress.logits.wrap_clip(clip),),
    ),
    Hook(
        f"{TRAINER}.training_log",
        "one readable line per logged step",
        (lambda log, run: run.progress.wrap_log(log),),
    ),
    Hook(
        f"{TRAINER}.get_tensorboard_writer",
        "Megatron's curve of the loss is each step's own, its log and the line have the mean",
        (lambda get, run: curves.without_losses(get),),
    ),
    Hook(
        f"{TRAINER}.get_wandb_writer",
        "as the writer before",
        (lambda get, run: curves.without_losses(get),),
    ),
    Hook(
        f"{TRAINER}.num_floating_point_operations",
        "Megatron's formula knows no branches",
        (lambda _, run: run.progress.flops,),
    ),
    Hook(
        f"{TRAINER}.report_theoretical_memory",
        "Megatron's formula knows no latent heads; mlra plan has one that does",
        (instead(lambda *_, **__: None),),
    ),
    Hook(
        f"{TRAINER}.evaluate",
        "a line per validation, and time that does not count as training",
        (lambda evaluate, run: run.progress.wrap_evaluate(evaluate),),
    ),
    Hook(
        f"{TRAINER}.evaluate_and_print_results",
        "Megatron writes the test loss into the validation curve",
        (lambda evaluate, run: run.progress.wrap_results(evaluate),),
    ),
    Hook(
        f"{TRAINER}.save_checkpoint_and_time",
        "held-out sets behind the save of the last step",
        (lambda save, run: run.held_out.wrap_save(save),),
    ),
    Hook(
        f"{TRAINER}.save_checkpoint",
        "a line per save, old saves pruned, a failed save named; it may take any time",
        (
            lambda save, run: run.progress.wrap_save(save),
            lambda save, run: heartbeat.saving()(save) if run.watch else save,
        ),
    ),
    Hook(
        f"{TRAINER}.maybe_finalize_async_save",
        "an asynchronous save that failed is named by its step; it may take any time",
        (
            lambda end, run: run.progress.wrap_finalize(end),
            lambda end, run: heartbeat.saving()(end) if run.watch else end,
        ),
    ),
)
"""Applied once all ranks have met, before Megatron trains."""


def _successor(run: Run) -> Callable[[], object]:
    return run.lock.successor if run.lock else lambda: None
