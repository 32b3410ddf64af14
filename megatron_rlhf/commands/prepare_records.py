"""`prepare` clean, rankings, pairs and blend: raw records and corpora to what training reads."""

import argparse
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_rlhf.commands.outputs import require_folder, require_new_corpus, require_new_file
from megatron_rlhf.config.data import written_out
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.data.formats.shape import Shape
from megatron_rlhf.data.preparation.blending import Corpus, blend, parse_weights
from megatron_rlhf.data.preparation.cleaning import REPORT, Cleaning, Rules
from megatron_rlhf.data.preparation.rankings import RankingCounts, pairs_from_ranking, rankings_from_pairs
from megatron_rlhf.data.preparation.report import write_report
from megatron_rlhf.data.pretraining import read_texts, write_documents
from megatron_rlhf.data.records import read_records
from megatron_rlhf.data.tokenizer import load_tokenizer
from megatron_rlhf.monitoring.files import write_lines


def clean(options: argparse.Namespace) -> None:
    """Filters, split and report; goes on where an earlier call was stopped."""
    folder = Path(options.output)
    require_folder(folder, folder)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer is not None else None
    if options.max_prompt_tokens is not None and tokenizer is None:
        raise UserError(f"--max-prompt-tokens {options.max_prompt_tokens} needs --tokenizer DIR")
    # Several comparisons or demonstrations of one prompt, and many of one user, say more than one.
    limit = 200 if options.kind == "prompts" else 0
    prefix, per_user = (limit if given is None else given for given in (options.prefix, options.max_per_user))
    rules = Rules(
        prefix_characters=prefix or None,
        near_duplicates=options.near_duplicates,
        max_per_user=per_user or None,
        max_characters=options.max_characters,
        max_tokens=options.max_prompt_tokens,
        personal=options.personal,
        region=options.region,
        shares=_shares(options.split),
        seed=options.seed,
    )
    shape, kind = shape_of(options), None if options.kind == "text" else options.kind
    about = {"kind": options.kind, "format": options.format, "columns": options.column, "chat": options.chat}
    if tokenizer is not None:
        about["tokenizer"] = tokenizer.fingerprint
    require_readable(options.input, lambda source: read_records(source, shape, kind=kind or "text"))
    cleaning = Cleaning(folder, options.input, rules, shape, kind or "text", about)
    if cleaning.counts.read:
        print(f"{folder}: goes on after {cleaning.counts.read:,} records")
    with bar(options.input) as progress:
        counts = cleaning.run(
            None if tokenizer is None else lambda text: len(tokenizer.encode(text, bos=True)), progress
        )
    write_report(folder, counts, cleaning.settings)
    kept = ", ".join(f"{count:,} {part}" for part, count in counts.parts.items()) or "0"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts.dropped.items()) or "none"
    print(f"{folder}: {counts.read:,} records read; kept: {kept}; dropped: {dropped} ({REPORT}, report.html)")


def rankings(options: argparse.Namespace) -> None:
    """Pairwise votes to rankings."""
    require_new_file(options.output)
    require_readable(options.input, lambda source: _records_of(source, options))
    counts = RankingCounts()
    with tempfile.TemporaryDirectory(dir=Path(options.output).parent) as folder, bar(options.input) as progress:
        database = sqlite3.connect(Path(folder) / "votes.sqlite", isolation_level=None)
        database.execute("PRAGMA synchronous=OFF")
        database.execute("BEGIN")
        _write(options.output, rankings_from_pairs(_records(options, progress), database, counts))
        database.close()
    print(
        f"{options.output}: {counts.votes:,} votes are {counts.rankings:,} rankings of three or more and {counts.pairs:,} pairs; "
        f"{counts.ties:,} without a majority, {len(counts.cycles):,} in a circle"
    )
    for cycle in counts.cycles[:20]:
        print(f"  circle: {cycle}")


def pairs(options: argparse.Namespace) -> None:
    """Rankings to pairwise votes."""
    require_new_file(options.output)
    require_readable(options.input, lambda source: _records_of(source, options))
    counts = RankingCounts()
    with bar(options.input) as progress:
        made = (pair for record in _records(options, progress) for pair in pairs_from_ranking(record, counts))
        _write(options.output, made)
    print(f"{options.output}: {counts.rankings:,} rankings are {counts.pairs:,} pairs; {counts.ties:,} ties left out")


def blend_corpora(options: argparse.Namespace) -> None:
    """Several corpora to one, tokenised."""
    require_new_corpus(options.output)
    sources = parse_weights(options.input)
    tokenizer = load_tokenizer(options.tokenizer)
    columns = columns_of(options.column)
    require_readable([source for source, _ in sources], partial(read_texts, columns=columns))
    taken: list[int] = []

    def documents(source: str) -> Iterable[Any]:
        return tokenizer.encode_documents(read_texts(source, columns=columns))

    corpora: list[Corpus] = [partial(documents, source) for source, _ in sources]
    stream = blend(corpora, [weight for _, weight in sources], options.tokens, taken)
    with tqdm(total=options.tokens, unit="token", unit_scale=True, mininterval=0.5) as shown:
        size = write_documents(_told(stream, shown.update), tokenizer, options.output)
    print(f"{options.output}.bin, .idx: {size.documents:,} documents, {size.tokens:,} tokens")
    for (source, _), tokens in zip(sources, taken, strict=True):
        print(f"  {source}: {tokens:,} tokens, {tokens / max(sum(taken), 1):.1%}")


def require_readable(sources: Iterable[str], read: Callable[[str], Iterator[Any]]) -> None:
    """Raise UserError where a source's first record cannot be read, before any of them takes its hours."""
    for source in sources:
        next(read(source), None)


def _told(documents: Iterable[Any], tell: Callable[[int], Any]) -> Iterator[Any]:
    for document in documents:
        tell(len(document))
        yield document


def bar(sources: Sequence[str]) -> "Bar":
    """A progress bar over the bytes of the files among the sources, with the time that is left."""
    return Bar(sum(Path(source).stat().st_size for source in sources if Path(source).is_file()))


class Bar:
    """Gives the function to call with bytes read."""

    def __init__(self, total: int):
        self._bar = tqdm(total=total or None, unit="B", unit_scale=True, mininterval=0.5)

    def __enter__(self) -> Callable[[int], Any]:
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def shape_of(options: argparse.Namespace) -> Shape:
    """What the options say of the records' shape."""
    return Shape.of(options.format, columns_of(options.column), options.chat)


def columns_of(assignments: Sequence[str]) -> dict[str, str]:
    """`NAME=TEMPLATE` each."""
    columns = {}
    for assignment in assignments:
        name, equals, template = assignment.partition("=")
        if not equals:
            raise UserError(f"--column {assignment!r}: write NAME=TEMPLATE, such as 'prompt={{question}}'")
        if name in columns:
            raise UserError(f"--column {assignment!r}: there is another template for {name}; give one")
        columns[name] = written_out(template)
    return columns


def _records(options: argparse.Namespace, progress: Callable[[int], Any]) -> Iterator[Any]:
    for source in options.input:
        yield from _records_of(source, options, progress)


def _records_of(
    source: str, options: argparse.Namespace, progress: Callable[[int], Any] | None = None
) -> Iterator[Any]:
    return read_records(source, shape_of(options), progress, "comparisons")


def _write(path: str, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines; the file appears under its name only when it is whole."""
    try:
        write_lines(Path(path), rows)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from error


def _shares(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if len(shares) not in (2, 3) or not all(0 < share < float("inf") for share in shares):
        raise UserError(f"--split {text}: give two or three shares, such as 0.9,0.05,0.05")
    return shares
