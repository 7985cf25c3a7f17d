"""`python -m xentile cache build | inspect | verify | import`."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xentile.cache import importers, teacher, verify
from xentile.cache.errors import named
from xentile.cache.header import CacheHeader, tokenizer_hash
from xentile.cache.progress import progress
from xentile.cache.reader import TopKCache
from xentile.cache.writer import TopKCacheWriter

if TYPE_CHECKING:
    import argparse


def add_parser(commands: Any) -> None:
    """Add `cache` to the commands of `python -m xentile`."""
    cache = commands.add_parser("cache", help="a teacher's top-K entries on disk")
    actions = cache.add_subparsers(dest="action", required=True)
    for add in (_add_build, _add_inspect, _add_verify, _add_import):
        add(actions)


def run(args: argparse.Namespace) -> int:
    """Run one action; the exit status: 0, or 1 after a message on stderr."""
    try:
        status: int = args.run(args)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def _add_build(actions: Any) -> None:
    parser = actions.add_parser("build", help="run a teacher over files; run again, it goes on where it was")
    parser.add_argument("teacher", help="a causal language model of transformers: a name, a folder or a .gguf file")
    parser.add_argument("files", nargs="+", type=Path, help="texts in UTF-8, or .npy with token ids (L,) or (N, L)")
    _add_destination(parser)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0], help="to store log Z for (default: 1)")
    parser.add_argument("--context", type=int, default=512, help="tokens that the teacher reads at once (default: 512)")
    parser.add_argument("--batch-size", type=int, default=4, help="such pieces at once (default: 4)")
    parser.add_argument("--device", default="cpu", help="of the teacher (default: cpu)")
    parser.add_argument("--dtype", default="auto", help="of the teacher, such as bfloat16 (default: that of the file)")
    parser.add_argument("--rank", type=int, default=0, help="of this process among those that build (default: 0)")
    parser.add_argument("--world-size", type=int, default=1, help="how many processes build (default: 1)")
    parser.set_defaults(run=_build)


def _add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the folder of the cache")
    parser.add_argument("--k", type=int, default=64, help="entries of a token (default: 64)")


def _build(args: argparse.Namespace) -> int:
    if not 0 <= args.rank < args.world_size:
        raise ValueError(f"--rank must be in [0, {args.world_size}), got {args.rank}")
    if args.context < 1 or args.batch_size < 1:
        raise ValueError(f"--context and --batch-size must be at least 1, got {args.context} and {args.batch_size}")
    model = teacher.load_causal_lm(args.teacher, device=args.device, dtype=args.dtype)
    documents = teacher.read_tokens(args.files, model.tokenizer)
    header = CacheHeader(
        teacher=Path(args.teacher).name,
        vocab_size=model.vocab_size,
        k=args.k,
        temperatures=tuple(args.temperatures),
        tokenizer_hash=tokenizer_hash(model.tokenizer),
        has_token_ids=True,
    )
    samples = list(itertools.islice(teacher.windows(documents, args.context), args.rank, None, args.world_size))
    total = sum(len(sample.token_ids) for sample in samples)
    with TopKCacheWriter(args.out, header, rank=args.rank) as writer:
        done = teacher.extract(writer, samples, model.logits_of, batch_size=args.batch_size, total=total)
    print(f"{args.out}: {done:,} of {total:,} tokens of rank {args.rank} read now, the others were there already")
    return 0


def _add_inspect(actions: Any) -> None:
    parser = actions.add_parser("inspect", help="what a cache holds")
    parser.add_argument("cache", type=Path)
    parser.set_defaults(run=lambda args: print(describe(_opened(args.cache))) or 0)


def describe(cache: TopKCache) -> str:
    """The header and the sizes of a cache, for people."""
    header = cache.header
    tokens = sum(sum(entry.tokens) for entry in cache.shards)
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    lines = [
        f"teacher        {header.teacher}",
        f"vocabulary     {header.vocab_size:,}",
        f"k              {header.k}",
        f"temperatures   {', '.join(map(str, header.temperatures))}",
        f"tokenizer      {header.tokenizer_hash or 'not given'}",
        f"token ids      {'stored' if header.has_token_ids else 'not stored'}",
        f"samples        {len(cache):,}",
        f"tokens         {tokens:,}, {size / max(tokens, 1):.1f} bytes each",
    ]
    for rank in cache.ranks:
        state = "finished" if rank.closed else "not finished: being written, or its writer was killed"
        written = sum(sum(entry.tokens) for entry in rank.shards)
        lines.append(f"{rank.path.stem:<15}{len(rank.shards):,} shards, {written:,} tokens, {state}")
    return "\n".join(lines)


def _add_verify(actions: Any) -> None:
    parser = actions.add_parser("verify", help="read every byte, name what is damaged, see that rows and tokens fit")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--drop-damaged", action="store_true", help="forget damaged shards: build writes them again")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    cache = _opened(args.cache)
    damaged = verify.damages(cache)
    for _, error in damaged:
        print(error)
    for path in verify.unlisted(cache):
        print(f"{path} is in no index: its writer was killed, or still works; its samples don't count")
    if damaged:
        lost = [sample_id for entry, _ in damaged for sample_id in entry.samples]
        if args.drop_damaged:
            verify.drop(cache, [entry for entry, _ in damaged])
            print(f"dropped {named(lost)}")
        print(f"{len(damaged)} of {len(cache.shards)} shards are damaged")
        return 1
    shares = verify.hits_by_shift(cache)
    if shares is not None:
        print(f"among the entries of row i: token i + 1 in {shares[1]:.1%}, token i in {shares[0]:.1%}")
        if shares[1] < max(shares.values()):
            print("row i seems not to predict token i + 1: were rows or tokens shifted?")
            return 1
    print(f"{len(cache.shards)} shards, {len(cache):,} samples: every byte is as written")
    return 0


def _add_import(actions: Any) -> None:
    parser = actions.add_parser("import", help="log-probabilities that an inference server answered")
    parser.add_argument("source", choices=sorted(importers.FIELDS), help="which server")
    parser.add_argument("files", nargs="+", type=Path, help="its answers: .json, a list or one; or .jsonl, one a line")
    _add_destination(parser)
    parser.add_argument("--teacher", required=True, help="the name of the teacher")
    parser.add_argument("--vocab-size", type=int, required=True, help="the columns of its logits")
    parser.set_defaults(run=_import)


def _import(args: argparse.Namespace) -> int:
    records = [record for path in args.files for record in _records(path)]
    samples = list(importers.samples(records, args.source))
    has_token_ids = all(tokens is not None for _, _, tokens in samples)
    header = CacheHeader(args.teacher, args.vocab_size, args.k, has_token_ids=has_token_ids)
    skipped = 0
    with TopKCacheWriter(args.out, header) as writer, progress("import", "samples", len(samples)) as bar:
        for sample_id, answer, tokens in samples:
            if sample_id in writer:
                skipped += 1
            else:
                entries, token_ids = importers.sample(args.source, answer, args.k, tokens if has_token_ids else None)
                writer.add(sample_id, entries, token_ids)
            bar.update(1)
    print(f"{args.out}: {len(samples) - skipped:,} samples added, {skipped:,} were there already")
    return 0


def _records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON, but {error}") from error
    return content if isinstance(content, list) else [content]


def _opened(folder: Path) -> TopKCache:
    return TopKCache(folder, temperature=CacheHeader.read(folder).temperatures[0])
