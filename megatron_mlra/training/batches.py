"""Batches and datasets: Megatron's GPT datasets, checked before any memory is spent."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_mlra.command_line.parser import say
from megatron_mlra.data.contents import cache_folder, check_contents
from megatron_mlra.data.index import Index, count_tokens, read_index
from megatron_mlra.data.metadata import read_metadata, two_tokenizers
from megatron_mlra.data.prefixes import NO_DATA, check_files, is_number
from megatron_mlra.evaluation.held_out import end_of_document
from megatron_mlra.evaluation.token_stream import named_sets
from megatron_mlra.fault_tolerance import samples
from megatron_mlra.sharding.token_plan import PackedDocuments, plan_tokens
from megatron_mlra.training import validation
from megatron_mlra.training.datasets import CachedBuilder, CachedDataset, order_differs

BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def check_data(args: Namespace) -> None:
    """Refuse missing, damaged or mismatched datasets.

    Raises:
        ValueError: names the file and what to do.
    """
    if args.skip_train:
        return
    blend, per_split = _blends(args)
    if per_split is not None:
        _check_parts(args, *per_split[:2])
    named = prefixes(args)
    for prefix in named:
        _check_files(prefix, args, split=blend is not None and prefix in blend[0])
    known = {p: found for p in named if (found := read_metadata(p)) is not None}
    if args.tokenizer_type == "NullTokenizer":
        _check_one_end(known)
    for prefix, metadata in known.items():
        _check_tokens(prefix, metadata, args)


def check_data_contents(args: Namespace, say: Callable[[str], None]) -> None:
    """Refuse data that are not what the preprocessing wrote, and warn of two tokenizers.

    The check reads every byte of data that was not checked before, so one rank calls it for all.

    Args:
        say: called with lines that tell the user of a long check, and with the warning.

    Raises:
        ValueError: names the file.
    """
    named = prefixes(args)
    if line := two_tokenizers({prefix: read_metadata(prefix) or {} for prefix in named}):
        say(line)
    for prefix in named:
        check_contents(prefix, cache_folder(prefix, args.data_cache_path), say)


def _blends(args: Namespace) -> tuple[Any, Any]:
    """Megatron's blend (prefixes and weights) of data that are split, and those of the three parts;
    None where there are none, as with --mock-data.

    Raises:
        ValueError: files or words that name data cannot be read.
    """
    if args.mock_data:
        return None, None
    try:
        return get_blend_and_blend_per_split(args)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"data arguments: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"--per-split-data-args-path {args.per_split_data_args_path} is no JSON object of"
            ' "train", "valid" and "test", each a list of prefixes, or of weights and prefixes'
        ) from None
    except AssertionError:
        raise ValueError(_NOT_ALTERNATING) from None


def prefixes(args: Namespace) -> list[str]:
    """Prefixes of all data that a run reads, held-out sets too, each once.

    Raises:
        ValueError: the arguments name no data, or a weight that is not positive.
    """
    if args.skip_train:
        return []
    blend, per_split = _blends(args)
    blends = [b for b in (blend, *(per_split or ())) if b is not None]
    if not (blends or args.mock_data):
        raise ValueError(NO_DATA)
    for names, weights in blends:
        for prefix, weight in zip(names, weights or (), strict=False):
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"data {prefix} has weight {weight:g}; give a positive one, or leave the data"
                    " out"
                )
    found = [prefix for names, _ in blends for prefix in names]
    return list(dict.fromkeys([*found, *named_sets(args.held_out).values()]))


_NOT_ALTERNATING = (
    "data arguments: weights and prefixes do not alternate; use --data-path 0.3 data/a 0.7 data/b,"
    " or prefixes alone"
)


def _check_parts(args: Namespace, train: Any, valid: Any) -> None:
    """Refuse data by parts that have none to train on, or none for the evaluations."""
    file = args.per_split_data_args_path
    for part, there in (("train", train), ("valid", valid or not args.eval_iters)):
        if not there:
            missing = f"--per-split-data-args-path {file} has no {part!r}"
            missing = missing if file else f"--{part}-data-path is missing"
            without = ", or use --eval-iters 0" if part == "valid" else ""
            raise ValueError(f"{missing}; add it{without}")


def _check_files(prefix: str, args: Namespace, split: bool) -> None:
    if is_number(prefix) and not Path(prefix + ".idx").exists():
        raise ValueError(_NOT_ALTERNATING)
    check_files(prefix)
    index = read_index(prefix)
    if split:
        _check_split(prefix, index, args)


def _check_split(prefix: str, index: Index, args: Namespace) -> None:
    """Refuse a --split of which a part gets no tokens: Megatron would wait for them forever."""
    parts = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
    documents = len(index.lengths)
    for part, name in zip(parts, ("training", "validation", "test"), strict=True):
        if part is None:
            continue
        first, last = (round(share * documents) for share in part)
        if not index.tokens(first, last):
            raise ValueError(
                f"--split {args.split} leaves none of the {documents} documents of {prefix}, or"
                f" none with tokens, for {name}; use more documents (mlra preprocess --split-lines"
                " makes one of each line of a .txt file), another --split, or 1,0,0 with"
                " --eval-iters 0"
            )
    if parts[1] is None and args.eval_iters:
        raise ValueError(
            f"--split {args.split} leaves nothing for validation; use another, or --eval-iters 0"
        )


def _check_one_end(known: dict[str, dict[str, Any]]) -> None:
    """Refuse data that end documents with different ids: no id of the model fits both."""
    ends = {p: eod for p, found in known.items() if (eod := found.get("eod_id")) is not None}
    first = next(iter(ends), None)
    for prefix, eod_id in ends.items():
        if eod_id != ends[first]:
            raise ValueError(
                f"data {prefix} ends documents with id {eod_id}, data {first} with {ends[first]};"
                " all data of a run need one tokenizer: make one of them again by mlra preprocess,"
                " or leave it out"
            )


def _check_tokens(prefix: str, metadata: dict[str, Any], args: Namespace) -> None:
    """Refuse data whose vocabulary or end-of-document id does not fit the model's."""
    vocab_size, eod_id = metadata.get("vocab_size"), metadata.get("eod_id")
    model_vocab = samples.vocabulary(args)
    if vocab_size is not None and model_vocab is not None and vocab_size > model_vocab:
        raise ValueError(
            f"data {prefix} has a vocabulary of {vocab_size}, the model one of {model_vocab}; use"
            f" --vocab-size {vocab_size}"
        )
    if args.tokenizer_type != "NullTokenizer" or eod_id is None:
        return
    model_eod = end_of_document(args)
    if eod_id != model_eod:
        raise ValueError(
            f"data {prefix} ends documents with id {eod_id}, the model is told {model_eod}; use"
            f" --null-tokenizer-eod-id {eod_id}"
        )


def build_datasets(sample_counts: list[int], vp_stage: int | None = None):
    """Train, validation and test datasets (Megatron's provider interface).

    Args:
        sample_counts: samples that the run reads of the three, in this order.
        vp_stage: the virtual pipeline stage, None without such stages.

    Returns:
        three datasets; None for one that this rank does not read, that the run takes no sample of,
        or that --split leaves out.
    """
    args = get_args()
    blend, per_split = get_blend_and_blend_per_split(args)
    blend, per_split = _weighted(blend), per_split and [_weighted(part) for part in per_split]
    if sample_counts[1]:
        train, _, test = sample_counts
        # The order of samples depends on their number. The number of one evaluation's samples
        # does not depend on the length of the run.
        sample_counts = (train, validation.samples(args), test)
    config = GPTDatasetConfig(
        random_seed=args.seed if args.data_seed is None else args.data_seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=per_split,
        split=args.split if per_split is None else None,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )

    def is_built_here() -> bool:
        # With packed sequences every stage must know where documents end.
        return mpu.get_tensor_model_parallel_rank() == 0 and (
            args.dataloader_inter_document_masking
            or mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
            or mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        )

    dataset = samples.SourcedMockDataset if args.mock_data else CachedDataset
    built = CachedBuilder(dataset, sample_counts, is_built_here, config).build()
    if args.rank == 0 and args.consumed_train_samples:
        _say_other_order(built[0], args.planned_samples, sample_counts[0], args)
    # A blend of no samples (--eval-iters 0) is empty, and Megatron makes no loader of it.
    return [part if count else None for part, count in zip(built, sample_counts, strict=True)]


def _weighted(blend: Any) -> Any:
    """A blend (prefixes, weights) with the numbers of tokens for weights, if it has none.

    Megatron's own blend without weights ends behind one pass over its data, in the middle of a run,
    and takes no dataset that is shorter than a sequence.
    """
    if blend is None or blend[1] is not None or len(blend[0]) == 1:
        return blend
    return blend[0], [float(count_tokens(prefix)) for prefix in blend[0]]


def _say_other_order(train: Any, planned: int | None, now: int, args: Namespace) -> None:
    """Print a warning where a resumed run reads its data in another order than before.

    Args:
        planned, now: samples of the checkpoint's whole run, and of this one's.
    """
    if train is not None and planned and order_differs(train, planned, now):
        say(
            f"warning: the run was planned for {planned:,} samples and is for {now:,} now, more or"
            " fewer passes over its data, whose order changes with that: some of the"
            f" {args.consumed_train_samples:,} samples behind it come again; start a run with its"
            " whole length, and pause it by --exit-interval"
        )


build_datasets.is_distributed = True


def get_batch(iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, Any]:
    """This rank's share of the next micro-batch.

    A context-parallel rank holds s = sequence length / context-parallel size tokens of a sequence.

    Args:
        iterator: of micro-batches; read on tensor-parallel rank 0 alone, which broadcasts.
        vp_stage: the virtual pipeline stage, None without such stages.

    Returns:
        tokens, labels, position_ids `[b, s]` int64, loss_mask `[b, s]` float32, attention_mask None
        or `[b, 1, s, t]` bool (True: not attended to), and packed_seq_params, None unless sequences
        are packed. On stages between the first and the last, all but packed_seq_params are None.
        Packed sequences are joined to one row, `[1, b s]`.
    """
    args = get_args()
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    is_packed = args.dataloader_inter_document_masking
    if not (first or last or is_packed):
        return dict.fromkeys((*BATCH_KEYS, "packed_seq_params"))
    batch = dict.fromkeys(
        (*BATCH_KEYS, "cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size")
    )
    if mpu.get_tensor_model_parallel_rank() == 0:
        loaded = next(iterator)
        samples.note(loaded)
        samples.check(loaded)
        for key in batch:
            if loaded.get(key) is not None:
                batch[key] = loaded[key].cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=is_packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size
        if torch.is_grad_enabled()
        else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=last and bool(args.mtp_num_layers),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch = flatten_batch_for_packed_sequences(batch)
    packed = _packed_documents(batch, args.seq_length) if is_packed else None
    cp_group = mpu.get_context_parallel_group()
    if packed is None:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    elif cp_group.size() > 1:
        _cut_documents(batch, packed, cp_group)
    return {key: batch.get(key) for key in BATCH_KEYS} | {"packed_seq_params": packed}


def _packed_documents(batch: dict[str, Any], tokens_per_sample: int) -> PackedDocuments:
    """The ends of the documents of a flattened micro-batch."""
    lengths = batch["cu_seqlens"][0]
    longest = int(batch["max_seqlen"])
    return PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=tokens_per_sample,
        bounds=tuple(lengths.tolist()),
    )


def _cut_documents(
    batch: dict[str, Any], packed: PackedDocuments, cp_group: dist.ProcessGroup
) -> None:
    """Cut a flattened micro-batch, in place, to this rank's part of each document."""
    cp = cp_group.size()
    device = packed.cu_seqlens_q.device
    plan = plan_tokens(packed.bounds[-1] // cp, cp, cp_group.rank(), packed, device)
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        if batch.get(key) is not None:
            batch[key] = plan.cut(batch[key], dim=1)
