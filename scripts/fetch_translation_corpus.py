"""Assemble a corpus of French to English and German to English sentences and paragraphs.

    python scripts/fetch_translation_corpus.py --output corpora/translate [--debs FOLDER]

The text is LibreOffice's help, which translators keep paragraph by paragraph: the same page of two
languages holds the same element ids. It comes from the Debian packages in `PACKAGES`, which
apt-get downloads, or which lie in FOLDER as `.deb` files. It is MPL-2.0, so it is fetched and never
shipped.

    OUTPUT/train.jsonl          in a fixed shuffled order
    OUTPUT/dev.jsonl            whole pages are held out, so that no page is on two sides
    OUTPUT/test.jsonl
    OUTPUT/english.txt          the English of the first, a line each, for look-ups
    OUTPUT/manifest.json        versions, licence, counts and sha256

A line is {"text", "source", "target", "language", "path"}. `text` is the document that a model
trains on: `prompt_of(language, source)`, a space, and the English,

    fr: Cliquez sur OK.
    en: Click OK.

with single spaces only within the two sides, no trailing space in the prompt, no line end after the
English: there the document ends. What is kept, per language: pairs of 20 to 400 characters on both
sides that differ, each once, no code. A held-out pair whose English occurs in training, beside
either language, is dropped.

The corpus is built in a temporary folder next to OUTPUT and renamed when it is complete. Needs
Python 3.10 or newer, apt-get (unless --debs is given) and dpkg-deb, and nothing else. Exit codes:
0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MANIFEST_FORMAT = 1
LICENCE = "MPL-2.0"
HELP_FOLDER = Path("usr/share/libreoffice/help")

#: Language -> Debian package, and the folder of its pages below HELP_FOLDER.
PACKAGES = {
    "en": ("libreoffice-help-en-us", "en-US"),
    "fr": ("libreoffice-help-fr", "fr"),
    "de": ("libreoffice-help-de", "de"),
}
SOURCES = ("fr", "de")

#: Version -> language -> `digest` of its pages. Other versions work; their counts differ.
KNOWN = {
    "4:7.4.7-1+deb12u14": {
        "en": "020b019953be9b6626ee9849b500807950bb366dc27da14fea9eb245d2067de9",
        "fr": "dc34fd5d673918d57771e8de79cabc72807822788f598af58d2b21cffd6831ae",
        "de": "e80a6ee7d2087eddc68159528510ce45b5ea46648603401b548ebde860a77dfb",
    }
}

MIN_CHARS = 20
MAX_CHARS = 400
SPLIT_INTO = 50  # parts of the pages, of which HELD_OUT names those that do not train
HELD_OUT = {0: "dev", 1: "test"}
PARTS = ("train", "dev", "test")
SHUFFLE_SEED = 0

TEXT_TAGS = frozenset(["p", "h", "h1", "h2", "h3", "h4", "h5", "h6"])
PARAGRAPH_ID = "par"  # headings have ids too, but of another kind
CODE_CLASS = "code"
INVISIBLE = dict.fromkeys(
    map(ord, "\N{SOFT HYPHEN}\N{ZERO WIDTH SPACE}\N{ZERO WIDTH NO-BREAK SPACE}")
)


class CorpusError(Exception):
    """Something failed that the user can mend; the message is one line and says how."""


class UsageError(CorpusError):
    """The command line asks for something that cannot be done."""


@dataclass(frozen=True)
class Pair:
    """A paragraph in a language and in English; `path` is its page's, below the language folder."""

    source: str
    target: str
    language: str
    path: str

    @property
    def line(self) -> bytes:
        """The line of a JSON Lines file."""
        text = f"{prompt_of(self.language, self.source)} {self.target}"
        return json.dumps({"text": text, **asdict(self)}, ensure_ascii=False).encode() + b"\n"


def prompt_of(language: str, source: str) -> str:
    """Return what a model continues with a space and the English of `source`."""
    return f"{language}: {source}\nen:"


# --- where the text comes from ----------------------------------------------------------------


def run_quietly(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder with its output captured."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def require(tool: str, fix: str) -> None:
    """Raise CorpusError if a program is not on the search path."""
    if shutil.which(tool) is None:
        raise CorpusError(f"{tool} was not found; fix: {fix}")


def last_line(text: str) -> str:
    """Return the last line that says something, for a message of one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"


def download(folder: Path) -> None:
    """Download the packages into `folder`, after fetching apt's package lists if need be."""
    require("apt-get", "download the packages on a Debian machine and name their folder by --debs")
    command = ["apt-get", "download", "-q", *(package for package, _ in PACKAGES.values())]
    if run_quietly(command, folder).returncode == 0:
        return
    say("apt-get does not know the packages yet: updating its lists")
    updated = run_quietly(["apt-get", "update", "-q"], folder)
    done = run_quietly(command, folder)
    if done.returncode != 0:
        reason = last_line(done.stderr if updated.returncode == 0 else updated.stderr)
        raise CorpusError(
            f"apt-get could not download the packages ({reason}); fix: check the network, run "
            "'sudo apt-get update', then this again, or name a folder with the .deb files by --debs"
        )


def find_deb(folder: Path, package: str) -> Path:
    """Return the one file of a package in `folder`; CorpusError if there is none, or several."""
    found = sorted(folder.glob(f"{package}_*.deb"))
    if len(found) != 1:
        raise CorpusError(
            f"{folder}: expected one file {package}_*.deb, found {len(found)}; "
            f"fix: leave exactly one there ('apt-get download {package}' gets it)"
        )
    return found[0]


def version_of(deb: Path) -> str:
    """Return the version of a package."""
    done = run_quietly(["dpkg-deb", "--field", str(deb), "Version"], deb.parent)
    if done.returncode != 0:
        raise CorpusError(f"{deb}: {last_line(done.stderr)}; fix: download the package again")
    return done.stdout.strip()


def unpack(deb: Path, folder: Path) -> None:
    """Extract a package into `folder`, which is made."""
    folder.mkdir(parents=True)
    done = run_quietly(["dpkg-deb", "--extract", str(deb), str(folder)], deb.parent)
    if done.returncode != 0:
        raise CorpusError(f"{deb}: {last_line(done.stderr)}; fix: download the package again")


def read_pages(root: Path, language: str) -> dict[str, bytes]:
    """Return path -> bytes of all pages of an extracted package; paths begin with `text/`."""
    package, name = PACKAGES[language]
    base = root / HELP_FOLDER / name
    paths = sorted((base / "text").rglob("*.html"))
    if not paths:
        raise CorpusError(
            f"{package}: it holds no pages in {HELP_FOLDER / name / 'text'}; "
            "fix: use a version of the package that has the help as HTML (7.4 has)"
        )
    return {path.relative_to(base).as_posix(): path.read_bytes() for path in paths}


def digest(files: Mapping[str, bytes]) -> str:
    """Return the sha256 over paths, lengths and contents, in path order."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(f"{path}\0{len(files[path])}\0".encode())
        total.update(files[path])
    return total.hexdigest()


@dataclass(frozen=True)
class Help:
    """The pages of all languages, of one version: language -> path -> bytes, and their sha256."""

    version: str
    pages: dict[str, dict[str, bytes]]
    sha256: dict[str, str]


def gather(debs: Path, scratch: Path) -> Help:
    """Unpack the packages, read their pages and check them where their version is known."""
    require("dpkg-deb", "install dpkg ('apt-get install dpkg', 'brew install dpkg')")
    files = {language: find_deb(debs, package) for language, (package, _) in PACKAGES.items()}
    versions = {language: version_of(deb) for language, deb in files.items()}
    if len(set(versions.values())) != 1:
        raise CorpusError(
            f"the packages are of several versions ({versions}), so their paragraphs differ; "
            "fix: download all of one version"
        )
    version = versions["en"]
    pages = {}
    for language, deb in files.items():
        unpack(deb, scratch / language)
        pages[language] = read_pages(scratch / language, language)
        say(f"{PACKAGES[language][0]} {version}: {len(pages[language])} pages")
    sha256 = {language: digest(pages[language]) for language in pages}
    known = KNOWN.get(version)
    if known is None:
        say(f"version {version} was not seen before; counts differ from those of {[*KNOWN]}")
    elif known != sha256:
        raise CorpusError(
            f"sha256 of the pages of version {version}: expected {known}, found {sha256}; "
            "fix: download the packages again"
        )
    return Help(version, pages, sha256)


# --- paragraphs of a page ---------------------------------------------------------------------


@dataclass
class Paragraph:
    """A paragraph that is being read.

    `hidden` says for each open span whether it hides its text. `switches` counts the places where
    the text depends on the reader's system, `defaults` their branches for any system.
    """

    key: str
    kind: str
    pieces: list[str] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)
    switches: int = 0
    defaults: int = 0

    def open_span(self, attributes: Mapping[str, str | None]) -> None:
        """Note a span; of the branches of a switch only the default one shows its text."""
        default = (attributes.get("id") or "").startswith("default")
        branch = "hidden" in attributes
        self.switches += (attributes.get("class") or "") == "switchinline"
        self.defaults += branch and default
        self.hidden.append(branch and not default)

    @property
    def text(self) -> str | None:
        """The text with single spaces; None where a switch leaves a hole, and for code."""
        if self.switches != self.defaults or CODE_CLASS in self.kind:
            return None
        # Non-breaking and thin spaces are spaces to `split`, and become plain ones.
        return " ".join("".join(self.pieces).translate(INVISIBLE).split())


class Page(HTMLParser):
    """Reads a page; `paragraphs` are those that have an id, in order, code and the like as None."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[tuple[str, str | None]] = []
        self._open: Paragraph | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open a paragraph, or note what is within one."""
        attributes = dict(attrs)
        if tag in TEXT_TAGS:
            self._end()
            key = attributes.get("id") or ""
            if key.startswith(PARAGRAPH_ID):
                self._open = Paragraph(key, attributes.get("class") or "")
        elif self._open is not None and tag == "span":
            self._open.open_span(attributes)
        elif self._open is not None and tag == "br":
            self._open.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        """Close a paragraph or a span."""
        if tag in TEXT_TAGS:
            self._end()
        elif tag == "span" and self._open is not None and self._open.hidden:
            self._open.hidden.pop()

    def handle_data(self, data: str) -> None:
        """Take text that shows."""
        if self._open is not None and not any(self._open.hidden):
            self._open.pieces.append(data)

    def _end(self) -> None:
        if self._open is not None:
            self.paragraphs.append((self._open.key, self._open.text))
        self._open = None


def read_paragraphs(page: bytes) -> dict[tuple[str, int, int], str | None]:
    """Return the paragraphs of a page by id, number among those of this id, and how many they are.

    A page embeds parts of others, so an id may occur several times. With the count in the key such
    paragraphs match only where both languages have as many.
    """
    reader = Page()
    reader.feed(page.decode("utf-8", errors="replace"))
    reader.close()
    counts = Counter(key for key, _ in reader.paragraphs)
    met: Counter[str] = Counter()
    keyed = {}
    for key, text in reader.paragraphs:
        keyed[key, met[key], counts[key]] = text
        met[key] += 1
    return keyed


# --- pairs, and their split -------------------------------------------------------------------


def wanted(source: str | None, target: str | None) -> bool:
    """Tell whether two sides are of fair length and differ; untranslated text is the same."""
    if source is None or target is None or source == target or "\ufffd" in source + target:
        return False
    return all(MIN_CHARS <= len(side) <= MAX_CHARS for side in (source, target))


def align(pages: Mapping[str, Mapping[str, bytes]]) -> Iterator[Pair]:
    """Yield the pairs of all languages in order of language, path and place in the page."""
    english = {path: read_paragraphs(page) for path, page in pages["en"].items()}
    for language in SOURCES:
        say(f"aligning {language} and en")
        for path in sorted(english.keys() & pages[language].keys()):
            others = read_paragraphs(pages[language][path])
            for key, target in english[path].items():
                source = others.get(key)
                if wanted(source, target):
                    yield Pair(str(source), str(target), language, path)


def part_of(path: str) -> str:
    """Return which part a page belongs to; it depends on its path alone."""
    return HELD_OUT.get(zlib.crc32(path.encode()) % SPLIT_INTO, "train")


def split(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Return the parts, without copies of a pair and without held-out English that trains."""
    parts: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for pair in pairs:
        parts[part_of(pair.path)].append(pair)
    trained = {pair.target for pair in parts["train"]}
    for part in HELD_OUT.values():
        parts[part] = [pair for pair in parts[part] if pair.target not in trained]
    seen: set[tuple[str, str, str]] = set()
    kept = {part: [pair for pair in parts[part] if is_new(pair, seen)] for part in PARTS}
    random.Random(SHUFFLE_SEED).shuffle(kept["train"])
    return kept


def is_new(pair: Pair, seen: set[tuple[str, str, str]]) -> bool:
    """Tell whether a pair was not seen before; `seen` gains it."""
    mark = (pair.language, pair.source, pair.target)
    new = mark not in seen
    seen.add(mark)
    return new


# --- building and writing ---------------------------------------------------------------------


def encode(pairs: Sequence[Pair]) -> bytes:
    """Return the bytes of a JSON Lines file."""
    return b"".join(pair.line for pair in pairs)


def describe(parts: Mapping[str, Sequence[Pair]], text: Help) -> dict[str, object]:
    """Return the manifest: every figure is of the files written, none depends on the clock."""
    return {
        "format": MANIFEST_FORMAT,
        "complete": True,
        "licence": LICENCE,
        "version": text.version,
        **{part: {**count(pairs), "file": file_of(pairs)} for part, pairs in parts.items()},
        "packages": {
            package: {
                "version": text.version,
                "pages": len(text.pages[language]),
                "sha256": text.sha256[language],
            }
            for language, (package, _) in PACKAGES.items()
        },
    }


def count(pairs: Sequence[Pair]) -> dict[str, dict[str, int]]:
    """Return, for each language, how many pairs there are and the UTF-8 bytes of both sides."""
    figures = {}
    for language in SOURCES:
        own = [pair for pair in pairs if pair.language == language]
        figures[language] = {
            "pairs": len(own),
            "source_bytes": sum(len(pair.source.encode()) for pair in own),
            "target_bytes": sum(len(pair.target.encode()) for pair in own),
        }
    return figures


def file_of(pairs: Sequence[Pair]) -> dict[str, object]:
    """Return the size and the sha256 of a part's file."""
    data = encode(pairs)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_english(folder: Path) -> None:
    """Write the English of the pairs to train on, each paragraph once, on a line of its own."""
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        texts = dict.fromkeys(json.loads(line)["target"] for line in lines)
    new = folder / "english.txt.new"
    new.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8", newline="\n")
    new.replace(folder / "english.txt")


def write(parts: Mapping[str, Sequence[Pair]], text: Help, folder: Path) -> None:
    """Write the file of each part and, last, the manifest."""
    folder.mkdir()
    for part, pairs in parts.items():
        (folder / f"{part}.jsonl").write_bytes(encode(pairs))
    write_english(folder)
    manifest = json.dumps(describe(parts, text), indent=2, ensure_ascii=False) + "\n"
    (folder / "manifest.json").write_text(manifest, encoding="utf-8")


def build(output: Path, debs: Path | None) -> None:
    """Build the corpus beside `output` and rename it into place; on any failure nothing remains."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        packages = debs or Path(scratch) / "packages"
        if debs is None:
            say("downloading " + ", ".join(package for package, _ in PACKAGES.values()))
            packages.mkdir()
            download(packages)
        text = gather(packages, Path(scratch) / "unpacked")
        parts = split(align(text.pages))
        folder = Path(scratch) / "corpus"
        write(parts, text, folder)
        if output.is_dir():
            output.rmdir()  # `is_complete` has seen that it is empty
        folder.rename(output)
    for part, pairs in parts.items():
        figures = ", ".join(f"{own['pairs']} {name}" for name, own in count(pairs).items())
        say(f"{part}: {figures} pairs, {len(encode(pairs)) / 1e6:.2f} MB")


def is_complete(output: Path) -> bool:
    """Tell whether `output` already holds this corpus; refuse a folder that holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
        same = manifest["format"] == MANIFEST_FORMAT and manifest["complete"] is True
        for part in PARTS:
            data = (output / f"{part}.jsonl").read_bytes()
            same = same and hashlib.sha256(data).hexdigest() == manifest[part]["file"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise UsageError(
            f"{output} exists and is not this corpus, complete; "
            "fix: remove it or name another folder"
        )
    return True


# --- command line -----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"error: {message}; see --help\n")


def say(message: str) -> None:
    """Write a progress line."""
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def stop(_signal: int, _frame: object) -> NoReturn:
    """Turn a termination request into an ordinary interrupt, so that clean-up runs."""
    raise KeyboardInterrupt


def parse(arguments: Sequence[str] | None) -> tuple[Path, Path | None]:
    """Return the output folder and the folder of packages, if one is given."""
    parser = Parser(description="Assemble a corpus of French and German text with its English.")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="where the corpus goes"
    )
    parser.add_argument(
        "--debs", type=Path, metavar="FOLDER", help="where the packages are, downloaded before"
    )
    options = parser.parse_args(arguments)
    if options.debs is not None and not options.debs.is_dir():
        parser.error(f"--debs {options.debs}: no such folder")
    return options.output.absolute(), options.debs and options.debs.absolute()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    output, debs = parse(arguments)
    signal.signal(signal.SIGTERM, stop)
    try:
        if is_complete(output):
            write_english(output)
            say(f"{output} is complete already; nothing to do")
        else:
            build(output, debs)
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except (CorpusError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing was left behind")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
