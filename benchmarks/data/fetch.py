"""Fetch the data that benchmarks read, or check what is there: `make data`, or

    python benchmarks/data/fetch.py --data data           # fetch what lacks from the hub, by the extra `eval`
    python benchmarks/data/fetch.py --data data --check   # check alone; no network

Each file is written in the form that the records were made with, and held against its
SHA-256 in docs/data.md. A file that is there is never replaced. It exits with 1 where a
file lacks or is another one. What lies in the repositories today may differ from what
was measured on, and the 300 documents of C4 are not those of the records.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from notall.files import write_whole

RECIPE = Path(__file__).parents[2] / "docs/data.md"
DOCUMENTS, MEGABYTE = 300, 1_000_000

Row = dict[str, Any]
Load = Callable[..., Iterable[Row]]


@dataclass(frozen=True)
class Source:
    """A file, or as many as a column has values, and the repository on the hub that
    holds its rows.
    """

    file: str
    repository: str
    config: str
    split: str
    columns: tuple[str, ...]
    is_ascii: bool = False
    is_text: bool = False
    most: int | None = None  # rows, or bytes of a text
    a_file_each: str = ""

    def contents(self, load: Load) -> Iterator[tuple[str, bytes]]:
        """The files by their names, as the repository has them today."""
        streamed = {"streaming": True} if self.most and not self.is_text else {}
        rows = load(self.repository, self.config, split=self.split, **streamed)
        if self.is_text:
            yield self.file, "".join(row["text"] for row in rows).encode()[: self.most]
            return
        kept = [
            {name: row[name] for name in self.columns}
            for row in itertools.islice(rows, self.most)
        ]
        groups: dict[str, list[Row]] = {}
        for row in kept:
            groups.setdefault(
                str(row[self.a_file_each]) if self.a_file_each else "", []
            ).append(row)
        for name, some in groups.items():
            lines = (json.dumps(row, ensure_ascii=self.is_ascii) + "\n" for row in some)
            yield self.file.replace("*", name), "".join(lines).encode()


ARC = "allenai/ai2_arc", "ARC-Challenge"
WIKI = "Salesforce/wikitext", "wikitext-2-raw-v1"
ENDINGS = (
    *(
        "ind",
        "activity_label",
        "ctx_a",
        "ctx_b",
        "ctx",
        "endings",
        "source_id",
        "split",
        "split_type",
        "label",
    ),
)
SENTENCE = ("sentence", "option1", "option2", "answer")
SUBJECT = ("question", "subject", "choices", "answer")
SOURCES = (
    Source("wikitext2/wiki.test.raw", *WIKI, "test", (), is_text=True),
    Source("wikitext2/wiki.train.first1MB.txt", *WIKI, "train", (), is_text=True, most=MEGABYTE),
    Source("c4/sample300.jsonl", "allenai/c4", "en", "validation", ("text",), most=DOCUMENTS),
    *(
        Source(f"gsm8k/{split}.jsonl", "openai/gsm8k", "main", split, ("question", "answer"), is_ascii=True)
        for split in ("test", "train")
    ),
    *(
        Source(f"arc_challenge/{split}.jsonl", *ARC, split, ("id", "question", "choices", "answerKey"))
        for split in ("train", "validation", "test")
    ),
    Source("hellaswag/validation.jsonl", "Rowan/hellaswag", "default", "validation", ENDINGS),
    Source(
        "truthfulqa/multiple_choice.jsonl", "truthfulqa/truthful_qa", "multiple_choice", "validation",
        ("question", "mc1_targets", "mc2_targets"),
    ),
    Source("winogrande/train_l.jsonl", "allenai/winogrande", "winogrande_l", "train", SENTENCE),
    Source("winogrande/validation.jsonl", "allenai/winogrande", "winogrande_l", "validation", SENTENCE),
    *(
        Source(f"mmlu/{split}/*.jsonl", "cais/mmlu", "all", split, SUBJECT, a_file_each="subject")
        for split in ("dev", "validation", "test")
    ),
)  # fmt: skip


def checksums() -> dict[str, str]:
    """The SHA-256 of each file, or of several one after the other by their names, as
    docs/data.md has them.
    """
    found = re.findall(
        r"^([0-9a-f]{64})  (\S+)$", RECIPE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: digest for digest, name in found}


def digest(data: Path, file: str) -> str | None:
    """That of what is there; None where nothing is."""
    paths = sorted(data.glob(file))
    return (
        sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
        if paths
        else None
    )


def state(data: Path, source: Source, load: Load | None) -> str:
    """Whether a file is there and the same, once it was fetched where it lacked."""
    how, expected = "there", checksums()[source.file]
    if digest(data, source.file) is None and load:
        for name, content in source.contents(load):
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(data / name, content)
        how = "fetched"
    found = digest(data, source.file)
    return (
        "lacks"
        if found is None
        else f"{how}, the same"
        if found == expected
        else f"{how}, another one"
    )


def main(arguments: list[str] | None = None, load: Load | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="fetch nothing")
    asked = parser.parse_args(arguments)
    states = []
    for source in SOURCES:
        try:
            found = state(asked.data, source, None if asked.check else load or hub())
        except (
            ImportError,
            OSError,
            ValueError,
            KeyError,
        ) as error:  # no network, or other rows than these
            found = (
                "lacks:"
                f" {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
        states.append(found)
        print(f"{source.file}: {found}", flush=True)
    return int(not all(one.endswith("the same") for one in states))


def hub() -> Load:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(
            "the hub's data are read by the extra `eval`: pip install -e '.[eval]'"
        ) from None
    return load_dataset


if __name__ == "__main__":
    sys.exit(main())
