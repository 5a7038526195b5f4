"""Reviews in every layout that people bring: each line of the table in docs/data.md, and what is refused."""

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr
from zipfile import ZipFile

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from pipeline.config.strict_config import load, validate
from pipeline.errors import UserError
from pipeline.tasks.visobert.config import DataPrepConfig, ReviewFormatConfig, VisobertConfig
from pipeline.tasks.visobert.reviews.alpha import compute_alpha
from pipeline.tasks.visobert.reviews.reviews import Reviews, read_reviews
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, UNKNOWN
from pipeline.tasks.visobert.reviews.splits import read_splits

P, N, U = range(3)
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)
ASPECTS = ("FOOD#QUALITY", "SERVICE#GENERAL")
ROWS = [
    ("Món ăn ngon, phục vụ tận tình", P, P),
    ('Đồ ăn "tạm", nhân viên lạnh nhạt & chậm', U, N),
    ("Ngon; rẻ", P, O),
    ("Quán ở đầu ngõ", O, O),
    ("Phục vụ tệ", O, N),
    ("Ăn được, phục vụ tốt", O, P),
]
COUNTS = (4, 2, 1)
ALPHA = (7 / (3 * 4), 7 / (3 * 2), 7 / (3 * 1))  # total / (3 * count)
WORD = {P: "Positive", N: "Negative", U: "Neutral", O: ""}


def labels_of(row: Sequence[Any], words: dict[int, Any]) -> list[tuple[str, Any]]:
    return [(aspect, words[code]) for aspect, code in zip(ASPECTS, row[1:], strict=True) if code != O]


def delimited(rows: Sequence[Sequence[Any]], delimiter: str = ",") -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return buffer.getvalue()


def wide(words: dict[int, Any], text: str = "text", delimiter: str = ",") -> str:
    rows = [(row[0], *(words[code] for code in row[1:])) for row in ROWS]
    return delimited([(text, *ASPECTS), *rows], delimiter)


def with_column(name: str, cells: Sequence[str]) -> str:
    rows = [(text, *(WORD[code] for code in codes), cell) for (text, *codes), cell in zip(ROWS, cells, strict=True)]
    return delimited([("text", *ASPECTS, name), *rows])


def braces(column: str) -> str:
    cells = ["".join(f"{{{aspect}#{word}}};" for aspect, word in labels_of(row, WORD)) for row in ROWS]
    return delimited([("index", "comment", column), *((n, row[0], cell) for n, (row, cell) in
                     enumerate(zip(ROWS, cells, strict=True)))])  # fmt: skip


def lines(records: Sequence[Any]) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def objects() -> list[Any]:
    return [{"text": row[0], "labels": dict(labels_of(row, WORD))} for row in ROWS]


def arrays() -> str:
    """The three kinds of array by turns; as JSON, and as a text that Python printed."""
    kinds: list[Callable[[str, str], Any]] = [
        lambda aspect, word: [aspect, word],
        lambda aspect, word: f"{aspect}#{word}",
        lambda aspect, word: {"aspect": aspect, "sentiment": word},
    ]
    records = []
    for number, row in enumerate(ROWS):
        cell: Any = [kinds[number % 3](*label) for label in labels_of(row, WORD)]
        records.append({"text": row[0], "labels": str(cell) if number % 2 else cell})
    return lines(records)


def spans() -> str:
    """As UIT-ViSD4SA: polarities in capitals, an aspect with several spans, and one with two sentiments."""
    records = [
        {"text": row[0], "labels": [[0, 3, f"{aspect}#{word.upper()}"] for aspect, word in labels_of(row, WORD)]}
        for row in ROWS
    ]
    records[0]["labels"] += [[9, 12, f"{ASPECTS[0]}#POSITIVE"]]
    two = [[0, 8, f"{ASPECTS[0]}#POSITIVE"], [9, 20, f"{ASPECTS[0]}#NEGATIVE"]]
    return lines([*records, {"text": "Phở ngon nhưng bún dở", "labels": two}])


def vlsp() -> str:
    blocks = []
    for number, row in enumerate(ROWS, 1):
        labels = ", ".join(f"{{{aspect}, {word.lower()}}}" for aspect, word in labels_of(row, WORD))
        blocks.append(f"#{number}\n{row[0]}\n{labels}".strip())
    return "\n\n".join(blocks) + "\n"


def semeval(tag: str, whole: bool = False) -> str:
    """As SemEval: with an opinion in conflict, in 2015 and 2016 with targets and a sentence that is out of scope."""
    units = []
    for row in [*ROWS, ("Lúc ngon lúc dở", "conflict", O)]:
        labels = labels_of(row, {code: word.lower() for code, word in WORD.items()} | {"conflict": "conflict"})
        each = "".join(f'<{tag} category="{aspect}" polarity="{word}"/>' for aspect, word in labels)
        text = f"<text>{row[0].replace('&', '&amp;')}</text>"
        if tag == "aspectCategory":
            terms = '<aspectTerms><aspectTerm term="x" polarity="negative" from="0" to="1"/></aspectTerms>'
            units.append(f"<sentence>{text}{terms}<aspectCategories>{each}</aspectCategories></sentence>")
        elif whole:
            sentence = f"<sentences><sentence>{text}</sentence></sentences>"
            units.append(f"<Review rid={quoteattr(row[0])}>{sentence}<Opinions>{each}</Opinions></Review>")
        else:
            each = f"<Opinions>{each}</Opinions>" if labels else ""
            targets = each.replace(" category", ' target="NULL" category')
            units.append(f"<sentence>{text}{targets}</sentence>")
    if tag == "aspectCategory":
        return f'<?xml version="1.0" encoding="UTF-8"?>\n<sentences>{"".join(units)}</sentences>'
    if whole:
        return f"<Reviews>{''.join(units)}</Reviews>"
    units.append('<sentence OutOfScope="TRUE"><text>Đã viết ở trên</text></sentence>')
    return f"<Reviews><Review><sentences>{''.join(units)}</sentences></Review></Reviews>"


def workbook(rows: Sequence[Sequence[Any]], *more: str, calculation: str = "") -> bytes:
    """A workbook as Excel writes it, by hand: one sheet with the rows, and empty ones with the names in `more`.

    `calculation`: the element of that name, for after the sheets.
    """

    def cell(value: Any) -> str:
        if isinstance(value, tuple):  # a formula, the kind of its value, and the value
            return f'<c t="{value[1]}"><f>{value[0]}</f><v>{value[2]}</v></c>'
        if isinstance(value, str):
            return (
                f'<c t="inlineStr"><is><t xml:space="preserve">{value.replace("&", "&amp;")}</t></is></c>'
                if value
                else "<c/>"
            )
        return f"<c><v>{value}</v></c>"

    names = ["Reviews", *more]
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    relations = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml"
    sheet_rows = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    sheets = "".join(f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in enumerate(names, 1))
    targets = "".join(f'<Relationship Id="r{n}" Type="{relations}/worksheet" Target="worksheets/sheet{n}.xml"/>'
                      for n in range(1, len(names) + 1))  # fmt: skip
    parts = "".join(f'<Override PartName="/xl/worksheets/sheet{n}.xml" ContentType="{kind}.worksheet+xml"/>'
                    for n in range(1, len(names) + 1))  # fmt: skip
    files = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types"><Default Extension="rels" ContentType='
        '"application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/xl/workbook.xml" '
        f'ContentType="{kind}.sheet.main+xml"/>{parts}</Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{relations}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{relations}"><sheets>{sheets}</sheets>'
        f"{calculation}</workbook>",
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{package}/relationships">{targets}</Relationships>',
    }
    for number in range(1, len(names) + 1):
        content = sheet_rows if number == 1 else ""
        files[f"xl/worksheets/sheet{number}.xml"] = (
            f'<worksheet xmlns="{main}"><sheetData>{content}</sheetData></worksheet>'
        )
    buffer = io.BytesIO()
    with ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def workbook_of_reviews() -> bytes:
    pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
    return workbook([("text", *ASPECTS), *((row[0], *(WORD[code] for code in row[1:])) for row in ROWS)])


def parquet() -> bytes:
    frame = pd.DataFrame(
        [(row[0], *(WORD[code] or None for code in row[1:])) for row in ROWS], columns=["text", *ASPECTS]
    )
    return frame.to_parquet()


OWN = {P: "good", N: 0, U: "1.0", O: "None"}
# What the file of each line of the table holds, by the beginning of the line. None: no file.
FILES: dict[str, Callable[[], str | bytes] | None] = {
    "CSV, one column per aspect": lambda: wide(WORD),
    "`POS`, `NEG`, `NEU`": lambda: wide({P: "POS", N: "neg", U: "NEU ", O: ""}),
    "`Tích cực`": lambda: wide({P: "Tích cực", N: "tiêu cực", U: "Trung tính", O: ""}),
    "1 positive, -1 negative": lambda: wide({P: 1, N: -1, U: "0.0", O: ""}),
    "0 not mentioned, 1 positive": lambda: wide({P: 1, N: 2, U: 3, O: 0}, "Review"),
    "labels of your own": lambda: wide(OWN),
    "labels that tell nothing": lambda: wide(WORD) + "Lúc ngon lúc dở,conflict,\n",
    "some cells that are no labels": lambda: wide(WORD) + "Ngon,tốt lắm,\n",
    "columns that are no aspects": lambda: with_column("n_star", list("512345")),
    "an aspect whose sentiment": lambda: with_column("Others", ["Positive"] * 6),
    "the text in a column of another name": lambda: wide(WORD, "body"),
    "one label column": lambda: braces("label"),
    "a label column of another name": lambda: braces("marks"),
    "labels as a JSON object": lambda: lines(objects()),
    "labels as a JSON array": arrays,
    "labels of spans": spans,
    "text in the layout of VLSP 2018": vlsp,
    "XML of SemEval 2014": lambda: semeval("aspectCategory"),
    "XML of SemEval 2015 and 2016": lambda: semeval("Opinion"),
    "XML of SemEval 2016, with `Opinion` in whole": lambda: semeval("Opinion", whole=True),
    "a JSON array of objects": lambda: json.dumps(objects(), indent=1),
    "TSV": lambda: wide(WORD, delimiter="\t"),
    "CSV with semicolons": lambda: wide(WORD, delimiter=";"),
    "a text file with tabs": lambda: wide(WORD, delimiter="\t"),
    "compressed CSV": lambda: gzip.compress(wide(WORD).encode()),
    "Parquet": parquet,
    "Excel": workbook_of_reviews,
    "validation and test files": lambda: wide(WORD),
    "no data yet": None,
}


def table_lines(section: str) -> list[tuple[str, str]]:
    """The cells of the lines of a section's table in docs/data.md."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (part,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    _, _, *rows = [line for line in part.splitlines() if line.startswith("|")]
    return [(have, write) for have, write in (row.strip("| ").split(" | ") for row in rows)]


LINES = table_lines("Reviews")


def maker_of(have: str) -> Callable[[], str | bytes] | None:
    """The longest beginning counts."""
    return FILES[max((start for start in FILES if have.startswith(start)), key=len)]


def test_each_line_of_the_table_has_a_file_here() -> None:
    for have, _ in LINES:
        maker_of(have)
    assert len(LINES) == len(FILES)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0][:40])
def test_each_line_of_the_table(line: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reviews in every layout give the same counts and the same alpha."""
    monkeypatch.chdir(tmp_path)
    have, write = line
    tree = yaml.safe_load(write.strip("`"))
    config = validate(VisobertConfig, {**tree, "model": {"name": "embedded"}}, None)
    maker, data = maker_of(have), config.data
    if maker is None:
        splits, _ = read_splits({"train": None, "validation": None, "test": None}, data)
        assert [len(reviews) for reviews in splits.values()] == [320, 40, 40]  # 80%, 10%, 10% of 400
        return
    content = maker()
    files = {"train": data.train, "validation": data.validation, "test": data.test}
    for name in filter(None, files.values()):
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    splits, only = read_splits(files, data)
    for reviews in splits.values():
        alpha = compute_alpha(reviews, only, "auto")
        assert set(reviews.aspects) - set(only) == set(ASPECTS)
        assert (alpha.counts, alpha.labelled_cells) == (COUNTS, 7)
        assert alpha.vector == pytest.approx(ALPHA, rel=1e-12)
        assert reviews.texts[: len(ROWS)] == tuple(row[0] for row in ROWS)
    prep = {("path" if key == "train" else key): value for key, value in tree["data"].items()}
    again, _ = read_splits(files, validate(DataPrepConfig, {"data": prep}, None).data)
    assert again["train"].labels.tolist() == splits["train"].labels.tolist()
    packed = Path(f"{data.train}.gz")
    packed.write_bytes(gzip.compress(Path(data.train or "").read_bytes()))
    if not packed.name.endswith(".gz.gz"):
        assert read_reviews(packed, data).texts == splits["train"].texts


# ---------------------------------------------------------------- what is refused


def read(folder: Path, content: str | bytes, name: str = "a.csv", **form: Any) -> Reviews:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_reviews(folder / name, ReviewFormatConfig(**form))


def refused(folder: Path, content: str | bytes, name: str = "a.csv", **form: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, content, name, **form)
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ")
    return message.removeprefix(f"{folder / name}: ")


DECIDES = "; data.labels decides what it means: -1/0/1, 0-3 or a mapping"


@pytest.mark.parametrize("label", ["1", "-1", "3.0", "None", "nan"])
def test_a_label_that_means_something_else_everywhere(tmp_path: Path, label: str) -> None:
    assert refused(tmp_path, f"text,A\nx,Positive\ny,{label}\n") == (
        f"row 2, column A: found '{label}', allowed: Positive, Negative, Neutral or nothing{DECIDES}"
    )
    message = refused(tmp_path, f"text,label\nx,{{A#Positive}}\ny,{{A#{label}}}\n")
    assert message.startswith(f"row 2, column label: found '{{A#{label}}}', allowed: {{ASPECT#Positive}}, ")
    assert message.endswith(DECIDES)
    message = refused(tmp_path, f'{{"text": "y", "labels": [["A", "{label}"]]}}', "a.jsonl")
    assert message.endswith(DECIDES)


@pytest.mark.parametrize(
    ("labels", "label", "allowed"),
    [
        ("-1/0/1", "2", "1 (positive), -1 (negative), 0 (neutral) or nothing"),
        ("-1/0/1", "Positive", "1 (positive), -1 (negative), 0 (neutral) or nothing"),
        ("0-3", "-1", "1 (positive), 2 (negative), 3 (neutral), 0 (not mentioned) or nothing"),
        ("0-3", "4", "1 (positive), 2 (negative), 3 (neutral), 0 (not mentioned) or nothing"),
        ("POS/NEG/NEU", "Positive", "POS (positive), NEG (negative), NEU (neutral) or nothing"),
        ("english", "POS", "Positive, Negative, Neutral or nothing"),
        ("vietnamese", "xấu", "Tích cực (positive), Tiêu cực (negative), Trung tính, Trung lập (neutral) or nothing"),
        ({"positive": [1, "tốt"], "neutral": [""]}, "2", "1, tốt (positive)"),
    ],
)
def test_a_label_of_another_dialect(tmp_path: Path, labels: Any, label: str, allowed: str) -> None:
    message = refused(tmp_path, f"text,A\nx,{label}\n", labels=labels, aspects=("A",))
    assert message == f"row 1, column A: found {label!r}, allowed: {allowed}"
    dropped = read(tmp_path, f"text,A\nx,{label}\n", labels=labels, aspects=("A",), on_bad_label="drop")
    assert dropped.labels.tolist() == [[X]]


def test_the_nearest_word_is_suggested(tmp_path: Path) -> None:
    assert refused(tmp_path, "text,A\nx,Tích cựcc\n").endswith("; did you mean Tích cực?")
    assert refused(tmp_path, 'text,label\nx,"[[""A"", ""Posititve""]]"\n').endswith("; did you mean Positive?")


def test_numbers_of_stars_are_no_aspect(tmp_path: Path) -> None:
    """Some of them are labels of 0-3, and dropping the others would hide that."""
    text = "text,n_star,A\nx,3,1\ny,5,2\n"
    for on_bad_label in ("error", "drop"):
        message = refused(tmp_path, text, labels="0-3", on_bad_label=on_bad_label)
        assert message.startswith("row 2, column n_star: found '5', allowed: 1 (positive), ")
        assert message.endswith("; if n_star is no aspect, name the aspects with data.aspects")
    assert read(tmp_path, text, labels="0-3", aspects=("A",)).labels.tolist() == [[P], [N]]


def test_an_empty_label_may_have_a_meaning(tmp_path: Path) -> None:
    labels = {"positive": ["+"], "negative": ["-"], "neutral": [""], "not_mentioned": ["x"]}
    assert read(tmp_path, "text,A\nx,+\ny,-\nz,\nu,X\n", labels=labels).labels.tolist() == [[P], [N], [U], [O]]


def test_a_mention_without_a_sentiment(tmp_path: Path) -> None:
    labels = {"positive": [1], "negative": [0], "mentioned": ["?"]}
    assert read(tmp_path, "text,A,B\nx,1,?\ny,0,\n", labels=labels).labels.tolist() == [[P, M], [N, O]]
    assert read(tmp_path, "text,label\nx,{A#1};{B#?}\n", labels=labels).labels.tolist() == [[P, M]]


@pytest.mark.parametrize(
    ("yaml_text", "reason"),
    [
        ("labels: {positive: [1], neutral: [1.0]}", "'1.0' is both positive and neutral"),
        ("labels: {positive: [POS], negative: [' pos']}", "' pos' is both positive and negative"),
        ("labels: {good: [1]}", "no meaning good; there are: positive, negative, neutral, not_mentioned, mentioned"),
        ("labels: {}", "a list of labels for each meaning"),
        ("labels: {positive: 1}", "a list of labels for each meaning"),
        ("labels: {positive: []}", "a list of labels for each meaning"),
        ("labels: {positive: [yes]}", "write true, false, yes and no in quotes"),
        ("labels: 1-3", "one of: english, POS/NEG/NEU, vietnamese, -1/0/1, 0-3 or mapping"),
        ("delimiter: ab", "one character other than a quote or a line break, or tab"),
        ("delimiter: '\"'", "one character other than a quote or a line break, or tab"),
    ],
)
def test_bad_values_of_the_keys(tmp_path: Path, yaml_text: str, reason: str) -> None:
    (tmp_path / "c.yaml").write_text(f"data:\n  train: a.csv\n  {yaml_text}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load(VisobertConfig, tmp_path / "c.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}: data.{yaml_text.partition(':')[0]}: found ")
    assert reason in str(caught.value)


def test_labels_from_the_command_line() -> None:
    mapping = load(VisobertConfig, None, {"data.labels": "{positive: [1], negative: ['-1']}"})
    assert mapping.data.labels == {"positive": ("1",), "negative": ("-1",)}
    assert load(VisobertConfig, None, {"data.labels": "-1/0/1"}).data.labels == "-1/0/1"
    assert load(VisobertConfig, None, {"data.labels": "0-3", "data.delimiter": "tab"}).data.delimiter == "\t"
    assert load(VisobertConfig, None, {"data.delimiter": r"\t"}).data.delimiter == "\t"


def test_two_sentiments_of_one_aspect(tmp_path: Path) -> None:
    line = '{"text": "x", "labels": [[0, 1, "A#POSITIVE"], [2, 3, "A#NEGATIVE"], [4, 5, "B#NEUTRAL"]]}'
    assert refused(tmp_path, line, "a.jsonl") == (
        "row 1, column labels: found '{A#Positive};{A#Negative}', allowed: one sentiment an aspect; "
        "data.on_bad_label: drop leaves it out"
    )
    more = line + '\n{"text": "y", "labels": [[0, 1, "A#NEGATIVE"]]}'
    assert read(tmp_path, more, "a.jsonl", on_bad_label="drop").labels.tolist() == [[X, U], [N, O]]


# An entity that stands for 10^9 characters, and one that would be read from a file.
NESTED = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 9))
BOMB = f'<!DOCTYPE x [<!ENTITY e0 "aaaaaaaaaa">{NESTED}]><x><sentence><text>&e8;</text></sentence></x>'
EXTERNAL = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><x><sentence><text>&a;</text></sentence></x>'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "Phòng sạch\n", "line 1: found 'Phòng sạch', allowed: the layout of VLSP 2018"),
        ("a.txt", "#1\nx\n{A, positive}, {B negative}\n", "line 3: found '{A, positive}, {B negative}', allowed: "),
        ("a.txt", "#1\nx\n{A, positive}\n{B, negative}\n", "line 4: found '{B, negative}' after a review's labels, "),
        ("a.txt", "#1\nx\n{A, positive}\nno number\n", "line 4: found 'no number' after a review's labels, "),
        ("a.txt", "#1\nx\n{A, positive\n#2\ny\n{A, positive}\n", "line 3: found '{A, positive', allowed: "),
        ("a.txt", "#1\nx\n{A, positiv}\n", "row 1, column labels: found '[\"A\", \"positiv\"]', allowed: {ASPECT"),
        ("a.xml", "<sentences><sentence>", "not XML (no element found"),
        ("a.xml", "<html><p/></html>", "found <html> without sentences, allowed: the XML of SemEval 2014"),
        ("a.xml", '<sentences><sentence><text>x</text><aspectTerms><aspectTerm term="x" polarity="positive"/>'
         "</aspectTerms></sentence></sentences>", "found aspectTerm elements only, allowed: the XML of SemEval 2014"),
        ("a.xml", BOMB, "not XML (limit on input amplification"),
        ("a.xml", EXTERNAL, "not XML (undefined entity &a;"),
        ("a.xml", '<x><sentence><text>x</text><Opinion category="A" polarity="conflict"/></sentence></x>',
         "row 1, column labels: found '[\"A\", \"conflict\"]', allowed: {ASPECT#Positive}"),
        ("a.csv", "text;A\nx;Positive\n", "found one column, 'text;A'; data.delimiter names what separates columns"),
        ("a.csv", 'text;A\n"x, y";Positive\n', "found one column, 'text;A'; data.delimiter names what"),
        ("a.csv", "text\tA\nx, y\tPositive\n", "found one column, 'text\\tA'; data.delimiter names what"),
        ("a.csv", gzip.compress(b"text,A\nx,Positive\n", mtime=0), "found gzip; call it .csv.gz, allowed: UTF-8 text"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "found gzip; call it .jsonl.gz, allowed: UTF-8 text"),
        ("a.csv", b"PAR1\x15\x04\x15", "found Parquet; call it .parquet, allowed: UTF-8 text"),
        ("a.tsv", b"PK\3\4\xff xl/workbook.xml", "found an Excel file; call it .xlsx, allowed: UTF-8 text"),
        ("a.csv", b"PK\3\4\xff", "found a ZIP archive; unpack it, allowed: UTF-8 text"),
        ("a.jsonl", '{"text": "x", "A": "Positive"}'.encode("utf-16"), "found UTF-16, allowed: UTF-8 text"),
        ("a.tsv", 'text\tA\n"x" y\tPositive\n', "line 2: found text after a closing quote, allowed: quotes within"),
        ("a.csv.gz", "text,A\nx,Positive\n", "not a readable gzip file (Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text,A\nx,Positive\n", mtime=0)[:-9], "not a readable gzip file ("),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "the file is empty"),
        ("a.zip.gz", "x", "found .gz, allowed: .csv, .tsv, "),
        ("a.json", '[{"text": "x", "A": "Positive"}, 5]', "row 2: found a int, allowed: an object of columns"),
        ("a.json", '[{"text": "x", "A": "Positive"}', "array: not JSON (Expecting ',' delimiter"),
    ],
)  # fmt: skip
def test_damaged_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    assert refused(tmp_path, content, name).startswith(message)


def test_decimals_and_bytes_of_parquet(tmp_path: Path) -> None:
    labels = pa.array([Decimal(1), Decimal(2), None, Decimal(0)], pa.decimal128(9, 7))
    texts = pa.array([b"Pin", "Giá".encode(), b"x", b"y"], pa.large_binary())
    pq.write_table(pa.table({"text": texts, "A": labels}), tmp_path / "a.parquet")
    reviews = read_reviews(tmp_path / "a.parquet", ReviewFormatConfig(labels="0-3"))
    assert reviews.texts == ("Pin", "Giá", "x", "y")
    assert reviews.labels.tolist() == [[P], [N], [O], [O]]
    pq.write_table(pa.table({"text": pa.array([b"Pin", b"Gi\xe1"]), "A": ["Positive"] * 2}), tmp_path / "a.parquet")
    assert refused(tmp_path, (tmp_path / "a.parquet").read_bytes(), "a.parquet") == (
        "row 2, column text: found b'Gi\\xe1', allowed: UTF-8 text"
    )


def in_each_format(folder: Path, texts: Sequence[Any], labels: Sequence[Any]) -> list[Path]:
    """The same two columns as CSV, JSON Lines and Parquet."""
    frame = pd.DataFrame({"data": texts, "A": labels})
    frame.to_csv(folder / "a.csv", index=False)
    frame.to_json(folder / "a.jsonl", orient="records", lines=True, force_ascii=False)
    frame.to_parquet(folder / "a.parquet")
    return [folder / f"a.{suffix}" for suffix in ("csv", "jsonl", "parquet")]


def test_numbers_as_texts_and_labels(tmp_path: Path) -> None:
    for texts, shown in (([5, 10], ("5", "10")), ([0.5, 2.5], ("0.5", "2.5"))):
        for file in in_each_format(tmp_path, texts, [1.0, -1.0]):
            read = read_reviews(file, ReviewFormatConfig(labels="-1/0/1"))
            assert (read.texts, read.labels[:, 0].tolist()) == (shown, [P, N]), file.name
    (tmp_path / "a.csv").write_text("data,A\nx,1e0\ny,-1.0E+00\n")
    assert read_reviews(tmp_path / "a.csv", ReviewFormatConfig(labels="-1/0/1")).labels[:, 0].tolist() == [P, N]


@pytest.mark.parametrize(("row", "column"), [(["b\0c", "Positive"], "data"), (["b", "Posi\0tive"], "A")])
def test_no_format_may_hold_nul(tmp_path: Path, row: list[str], column: str) -> None:
    for file in in_each_format(tmp_path, ["a", row[0]], ["Negative", row[1]]):
        with pytest.raises(UserError, match=f"{file.name}: row 2, column {column}: found NUL; remove it"):
            read_reviews(file, ReviewFormatConfig())


@pytest.mark.parametrize(
    "cell",
    ['[["A\\u0000B", "Positive"]]', '["A\\u0000B#Positive"]', '{"A\\u0000B": "Positive"}', '["A\\ud83d#Positive"]'],
)
def test_no_aspect_may_hold_nul_or_half_a_character(tmp_path: Path, cell: str) -> None:
    """Escaped in JSON, in a cell of CSV and as a value of JSON Lines."""
    (tmp_path / "a.csv").write_text(delimited([("text", "labels"), ("x", cell)]), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "labels": {cell}}}', encoding="utf-8")
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(UserError, match=f"{name}: row 1, column labels: found "):
            read_reviews(tmp_path / name, ReviewFormatConfig())


@pytest.mark.parametrize("span", ["8, 0", "3, 3", "-1, 3", "0, NaN"])
def test_spans_that_are_none(tmp_path: Path, span: str) -> None:
    line = f'{{"text": "Pin tốt", "labels": [[{span}, "A#POSITIVE"], [0, 3, "B#NEGATIVE"]]}}'
    assert refused(tmp_path, line, "a.jsonl") == (
        f"row 1, column labels: found '[{span}, \"A#POSITIVE\"]', "
        'allowed: [start, end, "ASPECT#Positive"] with 0 <= start < end'
    )
    reviews = read(tmp_path, f'{line}\n{{"text": "x", "labels": ["A#Neutral"]}}', "a.jsonl", on_bad_label="drop")
    assert reviews.labels.tolist() == [[X, N], [U, O]]


def test_a_delimiter_of_a_file_without_one_is_reported(tmp_path: Path) -> None:
    reviews = read(tmp_path, lines(objects()), "a.jsonl", delimiter=";")
    assert reviews.notes == (f"{tmp_path / 'a.jsonl'}: data.delimiter has no effect on .jsonl",)
    assert not read(tmp_path, wide(WORD, delimiter=";"), delimiter=";").notes


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    assert read(tmp_path, lines(objects()), "a.json").labels.tolist() == [list(row[1:]) for row in ROWS]


def test_sentences_out_of_scope_are_reported(tmp_path: Path) -> None:
    reviews = read(tmp_path, semeval("Opinion"), "a.xml", on_bad_label="drop")
    assert reviews.notes == (f"{tmp_path / 'a.xml'}: 1 sentences are out of scope and left out",)
    assert len(reviews) == len(ROWS) + 1
    assert [(label.row, label.value) for label in reviews.dropped] == [(7, '["FOOD#QUALITY", "conflict"]')]


def test_a_review_of_several_sentences_is_one_text(tmp_path: Path) -> None:
    sentences = "<sentences><sentence><text>Ngon.</text></sentence><sentence><text>Rẻ.</text></sentence></sentences>"
    opinions = '<Opinions><Opinion category="A" polarity="positive"/></Opinions>'
    reviews = read(tmp_path, f"<Reviews><Review>{sentences}{opinions}</Review></Reviews>", "a.xml")
    assert (reviews.texts, reviews.labels.tolist()) == (("Ngon. Rẻ.",), [[P]])


def test_a_workbook_without_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)  # as if it were not installed
    message = refused(tmp_path, workbook([("text", "A"), ("x", "Positive")]), "a.xlsx")
    assert message == ".xlsx needs openpyxl; install it with `pip install --editable '.[xlsx]'`, or use CSV"


def test_workbooks(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
    rows: list[tuple[Any, ...]] = [("text", "A", "B"), ("x", 1, 0), (), ("y", 2), ("z", 3, 1.0, "")]
    reviews = read(tmp_path, workbook(rows, "Notes"), "a.xlsx", labels="0-3")
    assert (reviews.texts, reviews.labels.tolist()) == (("x", "y", "z"), [[P, O], [N, O], [U, P]])
    assert reviews.notes == (f"{tmp_path / 'a.xlsx'}: only sheet Reviews is read, not Notes",)
    assert refused(tmp_path, workbook([]), "a.xlsx") == "the file is empty"
    cut, other = workbook(rows)[:-40], bytearray(workbook(rows))
    other[8] = other[other.rindex(b"PK\1\2") + 10] = 99  # a compression that there is not
    for content in (b"PK and so on", gzip.compress(b"x", mtime=0), cut, bytes(other)):
        assert refused(tmp_path, content, "a.xlsx").startswith("not a readable workbook (")


def test_escaped_characters_of_workbooks(tmp_path: Path) -> None:
    """ECMA-376, part 1, 22.9.2.19 (ST_Xstring): _xHHHH_ stands for a character, _x005F_ for the _ of a text."""
    pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
    rows = [("text", "A_x0020_B"), ("đẹp_x000D_\nlắm", "Positive"), ("_x005F_x000D_", ""), ("a_x1_", "")]
    reviews = read(tmp_path, workbook(rows), "a.xlsx")
    assert (reviews.texts, reviews.aspects) == (("đẹp\r\nlắm", "_x000D_", "a_x1_"), ("A B",))


NO_VALUE = "found a formula without a value, allowed: text, or a workbook saved by a program that computes formulas"


def test_formulas_of_workbooks(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
    computed: list[tuple[Any, ...]] = [("text", "A"), (("B3", "str", "ngon"), ("2-1", "n", 1)),
                                       ("x", ('IF(TRUE,"",1)', "str", "")), ("y", ("1-1", "n", 0))]  # fmt: skip
    reviews = read(tmp_path, workbook(computed), "a.xlsx", labels="-1/0/1")
    assert (reviews.texts, reviews.labels.tolist()) == (("ngon", "x", "y"), [[P], [O], [U]])
    for rows, cell in (
        ([("text", "A"), ("ngon", "Positive"), ("=)) ngon", "Positive")], "A3"),
        ([("text", "A"), ("ngon", "Positive"), ("rẻ", "=B2")], "B3"),
    ):
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(tmp_path / "b.xlsx")  # without values of formulas
        assert refused(tmp_path, (tmp_path / "b.xlsx").read_bytes(), "b.xlsx") == f"cell {cell}: {NO_VALUE}"
    # XlsxWriter writes 0 as the value of every formula
    zero = [("text", "A"), ((")) ngon", "n", 0), "Positive")]
    content = workbook(zero, calculation='<calcPr calcId="124519" fullCalcOnLoad="1"/>')
    assert refused(tmp_path, content, "a.xlsx") == f"cell A2: {NO_VALUE}"
