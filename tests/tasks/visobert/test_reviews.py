"""Reviews from files: by hand, the same content in every form, and everything that can be wrong with a file."""

import contextlib
import csv
import hashlib
import io
import json
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.tasks.visobert.config import ReviewFormatConfig
from pipeline.tasks.visobert.reviews.labels import BadLabel
from pipeline.tasks.visobert.reviews.reviews import Reviews, detection_only_aspects, read_reviews
from pipeline.tasks.visobert.reviews.sentiments import MENTIONED, NOT_MENTIONED, SENTIMENTS, UNKNOWN

P, N, U = (SENTIMENTS.index(name) for name in ("positive", "negative", "neutral"))
O, M, X = NOT_MENTIONED, MENTIONED, UNKNOWN  # noqa: E741 (nothing, mention, unknown: tables stay readable)

WIDE = """\
data,Battery,Camera,Others
"Pin trâu,
máy đẹp", POSITIVE ,,
NA,,negative,
Tạm,Neutral,Positive ,Neutral
"""
LABELLED = """\
index,comment,n_star,label
0,Pin trâu,5,{CAMERA#Positive};{ battery # NEGATIVE };{OTHERS};
1,null,3,
2,Tạm,1,{OTHERS};{CAMERA};{CAMERA#Neutral};{CAMERA#neutral}
"""


def written(folder: Path, text: str, name: str = "reviews.csv", encoding: str = "utf-8") -> Path:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def read(folder: Path, text: str, name: str = "reviews.csv", aspects: Any = None, **form: Any) -> Reviews:
    return read_reviews(written(folder, text, name), ReviewFormatConfig(**form), aspects)


def refused(folder: Path, text: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, text, **options)
    message = str(caught.value)
    assert message.startswith(str(folder)) or message.startswith("data.")
    return message.removeprefix(f"{folder}/")


# ---------------------------------------------------------------- by hand


def test_one_column_per_aspect(tmp_path: Path) -> None:
    reviews = read(tmp_path, WIDE)
    assert reviews.texts == ("Pin trâu,\nmáy đẹp", "NA", "Tạm")
    assert reviews.aspects == ("Battery", "Camera", "Others")
    assert reviews.labels.dtype == np.int8
    assert reviews.labels.tolist() == [[P, O, O], [O, N, O], [U, P, U]]
    assert reviews.digest == hashlib.sha256(WIDE.encode()).hexdigest()
    assert reviews.source == str(tmp_path / "reviews.csv")
    assert (reviews.dropped, reviews.notes, reviews.rows.tolist()) == ((), (), [1, 2, 3])
    assert reviews.labels_text(2) == "{Battery#Neutral};{Camera#Positive};{Others#Neutral}"


def test_all_labels_in_one_column(tmp_path: Path) -> None:
    reviews = read(tmp_path, LABELLED)
    assert reviews.texts == ("Pin trâu", "null", "Tạm")
    assert reviews.aspects == ("CAMERA", "OTHERS", "battery")  # sorted as text
    assert reviews.labels.tolist() == [[P, M, N], [O, O, O], [U, M, O]]
    assert reviews.labels_text(0) == "{CAMERA#Positive};{OTHERS};{battery#Negative}"
    assert detection_only_aspects(reviews, ()) == ("OTHERS",)


@pytest.mark.parametrize("change", ["bom", "crlf", "both", "blank lines"])
def test_the_same_file_as_other_programs_write_it(tmp_path: Path, change: str) -> None:
    plain = read(tmp_path, WIDE.replace(",\nmáy", ", máy"))
    text = WIDE.replace(",\nmáy", ", máy")
    if change in ("bom", "both"):
        text = "\ufeff" + text
    if change in ("crlf", "both"):
        text = text.replace("\n", "\r\n")
    if change == "blank lines":
        text = text.replace("\n", "\n\n") + "\r\n"
    other = read(tmp_path, text, "other.csv")
    assert (other.texts, other.aspects, other.labels.tolist()) == (plain.texts, plain.aspects, plain.labels.tolist())
    assert (other.digest == plain.digest) == (change not in ("bom", "crlf", "both", "blank lines"))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_jsonl_and_parquet_hold_the_same(tmp_path: Path, line_end: str) -> None:
    expected = read(tmp_path, WIDE)
    frame = pd.read_csv(tmp_path / "reviews.csv", keep_default_na=False)
    records = [{key: value or None for key, value in row.items()} for row in frame.to_dict("records")]
    del records[0]["Camera"]  # a key that is not there is nothing
    lines = (2 * line_end).join(json.dumps(record, ensure_ascii=record["data"] == "NA") for record in records)
    # the order of columns is that of their first appearance
    jsonl = read(tmp_path, lines, "reviews.jsonl", aspects=expected.aspects)
    assert (jsonl.texts, jsonl.labels.tolist()) == (expected.texts, expected.labels.tolist())
    frame = frame.replace("", None).astype({"Camera": "category"})
    frame["Nothing"] = np.nan
    frame.index = pd.Index([7, 8, 9])
    frame.to_parquet(tmp_path / "reviews.parquet")
    parquet = read_reviews(tmp_path / "reviews.parquet", ReviewFormatConfig())
    assert parquet.texts == expected.texts
    assert parquet.aspects == (*expected.aspects, "Nothing")
    assert parquet.labels[:, :3].tolist() == expected.labels.tolist()
    assert [note.split(": ")[1] for note in parquet.notes] == [
        "a column without a name is left out", "no review mentions Nothing"
    ]  # fmt: skip


def test_texts_and_names_become_nfc(tmp_path: Path) -> None:
    text = unicodedata.normalize("NFD", "data,Độ bền\nmáy đẹp,Positive\n")
    assert text != unicodedata.normalize("NFC", text)
    reviews = read(tmp_path, text)
    assert reviews.texts == (unicodedata.normalize("NFC", "máy đẹp"),)
    assert reviews.aspects == (unicodedata.normalize("NFC", "Độ bền"),)
    assert read(tmp_path, text, aspects=reviews.aspects).labels.tolist() == [[P]]


def test_an_index_column_is_left_out(tmp_path: Path) -> None:
    frame = pd.DataFrame({"data": ["a", "b"], "Price": ["Positive", "Negative"]})
    frame.to_csv(tmp_path / "once.csv")
    pd.read_csv(tmp_path / "once.csv").to_csv(tmp_path / "twice.csv")  # now also `Unnamed: 0`
    twice = (tmp_path / "twice.csv").read_text()
    written(tmp_path, f"Unnamed: 0.1{twice}", "thrice.csv")  # as pandas reads and writes twice.csv
    assert (tmp_path / "thrice.csv").read_text().startswith("Unnamed: 0.1,Unnamed: 0,data,Price\n")
    for name in ("once.csv", "twice.csv", "thrice.csv"):
        reviews = read_reviews(tmp_path / name, ReviewFormatConfig())
        assert reviews.aspects == ("Price",)
        assert reviews.notes == (f"{tmp_path / name}: a column without a name is left out",)


# ---------------------------------------------------------------- which column is what


def test_the_text_column(tmp_path: Path) -> None:
    assert read(tmp_path, "Review,A\nx,Positive\n").texts == ("x",)
    assert read(tmp_path, "text,data\nx,Positive\n", text_column="text").aspects == ("data",)
    assert "no text column (data, text," in refused(tmp_path, "body,A\nx,Positive\n")
    message = refused(tmp_path, "body,A\nx,Positive\n", text_column="bodi")
    assert message == "reviews.csv: data.text_column: no column bodi; did you mean body?"


def test_several_text_or_label_columns_are_refused(tmp_path: Path) -> None:
    dates = "data,text,labels\n2024-05-01,Pin tốt,{PIN#Positive}\n"
    message = "reviews.csv: found columns data and text, allowed: one of them, or data.text_column names it"
    assert refused(tmp_path, dates) == message
    assert read(tmp_path, dates, text_column="text").texts == ("Pin tốt",)
    assert "found columns Text and text, allowed: one of them" in refused(tmp_path, "Text,A,text\nx,Positive,y\n")
    wide = "text,content,A\nx,Positive,Negative\n"
    assert "found columns text and content, allowed: one of them" in refused(tmp_path, wide)
    aspects = read_reviews(written(tmp_path, wide), form(aspects=("content", "A")))
    assert (aspects.texts, aspects.labels.tolist()) == (("x",), [[P, N]])
    two = "text,label,labels\nx,{A#Negative},{A#Positive}\n"
    message = "reviews.csv: found columns label and labels, allowed: one of them, or data.label_column names it"
    assert refused(tmp_path, two) == message
    assert read(tmp_path, two, label_column="labels").labels.tolist() == [[P]]
    assert read(tmp_path, two, text_column="label").texts == ("{A#Negative}",)
    marks = "text,comment\nx,{A#Neutral}\n"
    assert read(tmp_path, marks, label_column="comment").labels.tolist() == [[U]]


@pytest.mark.parametrize("header", ["text,aspect,polarity", "id,Category,text,Sentiment,from", "text,aspect,label"])
def test_one_row_per_aspect_is_refused(tmp_path: Path, header: str) -> None:
    cells = {"text": "ngon", "id": "7", "from": "0"}
    names = header.split(",")
    rows = [[cells.get(name, pair[name.casefold() in ("polarity", "sentiment", "label")]) for name in names]
            for pair in (("food", "positive"), ("service", "negative"))]  # fmt: skip
    text = "\n".join(map(",".join, [names, *rows]))
    aspect, label = (name for name in names if name not in cells)
    message = (
        f"reviews.csv: found one row per aspect (columns {aspect} and {label}), allowed: one row per review, "
        "such as a column labels with {ASPECT#Polarity};{ASPECT#Polarity}"
    )
    for keys in ({}, {"on_bad_label": "drop"}):
        assert refused(tmp_path, text, **keys) == message
    for aspects in ((label,), ("food", "service")):
        with pytest.raises(UserError, match="found one row per aspect"):
            read_reviews(written(tmp_path, text), form(aspects=aspects))


def test_columns_called_category_or_sentiment(tmp_path: Path) -> None:
    """They may be aspects, or say something about the whole review, beside aspects."""
    both = read(tmp_path, "text,category,sentiment\nx,Positive,\ny,,Negative\n")
    assert (both.aspects, both.labels.tolist()) == (("category", "sentiment"), [[P, O], [O, N]])
    beside = "text,category,sentiment,PIN\nx,phone,positive,Negative\n"
    assert "column category: found 'phone'" in refused(tmp_path, beside)
    assert read_reviews(written(tmp_path, beside), form(aspects=("PIN",))).labels.tolist() == [[N]]
    assert read(tmp_path, "text,category,sentiment,labels\nx,phone,positive,{A#Negative}\n").labels.tolist() == [[N]]
    assert read(tmp_path, "text,category,label\nx,phone,{A#Negative}\n").labels.tolist() == [[N]]


def test_a_label_column_beside_columns_of_aspects(tmp_path: Path) -> None:
    text = "data,label,A,B\nx,{C#Positive},Negative,\n"
    assert read(tmp_path, text).aspects == ("C",)
    assert read(tmp_path, text, aspects=None, label_column="label").aspects == ("C",)
    wide = read_reviews(written(tmp_path, text), ReviewFormatConfig(aspects=("B", "A")))
    assert (wide.aspects, wide.labels.tolist()) == (("B", "A"), [[O, N]])
    named = "data,marks,A\nx,{C#Positive},Negative\n"
    assert read(tmp_path, named, label_column="marks").aspects == ("C",)
    assert "data.label_column: no column mark; did you mean marks?" in refused(tmp_path, named, label_column="mark")
    assert "cannot be both" in refused(tmp_path, named, label_column="data")


def form(**keys: Any) -> ReviewFormatConfig:
    return ReviewFormatConfig(**keys)


def test_data_aspects_choose(tmp_path: Path) -> None:
    file = written(tmp_path, "data,n_star,A,B\nx,5,Positive,\n")
    assert read_reviews(file, form(aspects=("A",))).labels.tolist() == [[P]]
    with pytest.raises(UserError, match=r"data\.aspects: no column Zoom; there are: n_star, A, B"):
        read_reviews(file, form(aspects=("Zoom",)))
    with pytest.raises(UserError, match="A appears twice"):
        read_reviews(file, form(aspects=("A", "A")))
    with pytest.raises(UserError, match="holds the texts"):
        read_reviews(file, form(aspects=("A", "data")))

    labelled = written(tmp_path, LABELLED, "labelled.csv")
    chosen = read_reviews(labelled, form(aspects=("OTHERS", "CAMERA")))
    assert (chosen.aspects, chosen.labels.tolist()) == (("OTHERS", "CAMERA"), [[M, P], [O, O], [M, U]])
    assert chosen.notes == (f"{labelled}: 1 labels of battery are left out: not in data.aspects",)
    with pytest.raises(UserError, match=r"data\.aspects: no aspect CAMARA; did you mean CAMERA\?"):
        read_reviews(labelled, form(aspects=("CAMARA",)))


def test_aspects_that_differ_in_case_are_reported(tmp_path: Path) -> None:
    reviews = read(tmp_path, "text,label\nx,{Camera#Positive};{CAMERA#Negative}\n")
    assert reviews.aspects == ("CAMERA", "Camera")
    assert reviews.notes == (f"{tmp_path / 'reviews.csv'}: CAMERA and Camera are read as two aspects",)


def test_other_files_share_the_training_aspects(tmp_path: Path) -> None:
    training = ("A", "B")
    swapped = read(tmp_path, "data,B,A,C\nx,Negative,Positive,\n", aspects=training)  # C says nothing
    assert (swapped.aspects, swapped.labels.tolist()) == (training, [[P, N]])
    message = refused(tmp_path, "data,A,Bb\nx,Positive,Negative\n", aspects=training)
    assert "no column B, an aspect of the training file; found column Bb, which is no aspect there" in message
    assert "found columns A" in refused(tmp_path, "data,A\nx,Positive\n", aspects=training)
    message = refused(tmp_path, "data,A,B,C\nx,,,Positive\n", aspects=training)
    assert "column C is no aspect of the training file, allowed: A, B" in message

    labelled = read(tmp_path, "data,label\nx,{B#Negative}\n", aspects=training)
    assert (labelled.aspects, labelled.labels.tolist()) == (training, [[O, N]])
    assert read(tmp_path, "data,label\nx,\n", aspects=training).labels.tolist() == [[O, O]]
    message = refused(tmp_path, "data,label\nx,\ny,{A#Negative};{CAMERAA}\n", aspects=("A", "CAMERA"))
    assert message == "reviews.csv: row 2, column label: no aspect CAMERAA; did you mean CAMERA? (training file)"


# ---------------------------------------------------------------- bad cells


def test_a_bad_label_is_placed_and_explained(tmp_path: Path) -> None:
    text = 'data,A,B\n"two\nlines",Positive,Negative\n\nx,Neutral,Posititve\ny,bad,Positive\n'
    assert refused(tmp_path, text) == (
        "reviews.csv: row 2, column B: found 'Posititve', allowed: Positive, Negative, Neutral or nothing; "
        "did you mean Positive?"
    )
    reviews = read(tmp_path, text, on_bad_label="drop")
    assert reviews.labels.tolist() == [[P, N], [U, X], [X, P]]
    assert reviews.dropped == (BadLabel(2, "B", "Posititve"), BadLabel(3, "A", "bad"))
    assert len(reviews) == 3


def test_a_column_that_is_no_aspect(tmp_path: Path) -> None:
    text = "data,n_star,A\nx,,Positive\ny,5,\n"
    for on_bad_label in ("error", "drop"):  # dropping it all would hide it
        message = refused(tmp_path, text, on_bad_label=on_bad_label)
        assert message.startswith("reviews.csv: row 2, column n_star: found '5', allowed: Positive, Negative, Neutral")
        assert message.endswith("; if n_star is no aspect, name the aspects with data.aspects")
    # who names it means it; and a sentiment that is only misspelt is one
    named = read_reviews(written(tmp_path, text), form(aspects=("n_star",), on_bad_label="drop"))
    assert named.labels.tolist() == [[O], [X]]
    assert read(tmp_path, "data,A\nx,Posititve\n", on_bad_label="drop").labels.tolist() == [[X]]


@pytest.mark.parametrize(
    ("cell", "labels", "bad", "hint"),
    [
        ("{A#Posititve};{B#Negative}", [X, N], ["{A#Posititve}"], "did you mean {A#Positive}?"),
        ("{A#Positive};{A#Negative}", [X, O], ["{A#Positive};{A#Negative}"], "allowed: one sentiment an aspect"),
        ("{A#};{B}", [X, M], ["{A#}"], "{ASPECT#Negative}"),
        ("{B#Neutral};A#Positive", [X, U], ["A#Positive"], "{ASPECT#Negative}"),  # which aspect is not known
        ("{A#Positive}{B#Neutral}", [X, X], ["{A#Positive}{B#Neutral}"], "joined by ;"),
        ("{};{B}", [X, M], ["{}"], "{ASPECT#Positive}"),
        ("Positive", [X, X], ["Positive"], "found 'Positive'"),
    ],
)
def test_bad_pieces_of_a_label_column(tmp_path: Path, cell: str, labels: list[int], bad: list[str], hint: str) -> None:
    text = f'data,label\nx,{{A#Positive}};{{B}};{{B}}\ny,"{cell}"\n'
    message = refused(tmp_path, text)
    assert message.startswith("reviews.csv: row 2, column label: found ")
    assert hint in message
    reviews = read(tmp_path, text, on_bad_label="drop")
    assert reviews.labels.tolist() == [[P, M], labels]
    assert reviews.dropped == tuple(BadLabel(2, "label", piece) for piece in bad)


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ('{"A": "Positive", "B": "negative "}', [P, N]),
        ("{'B': 'Neutral', 'A': None}", [O, U]),
        ('{"A": "", "B": null}', [O, O]),
        ("{}", [O, O]),
        ('{"A": "Positive", "A": "Negative"}', [X, O]),
        ('{"A": "Posititve", "B": "Neutral"}', [X, U]),
        ('{"aspect": "A", "polarity": "Positive"}', [X, X]),
        ('{"A": "Positive", "stars": 5}', [X, X]),
        ('{"A": "Positive", " ": "Positive"}', [X, X]),
        ('{"A": "Positive"', [X, X]),
        ("{**{'A': 'Positive'}}", [X, X]),
        ("{A#Positive}; { B # NEGATIVE };", [P, N]),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_object_of_labels(tmp_path: Path, cell: str, labels: list[int], suffix: str) -> None:
    """As JSON, as a dict that Python printed, or in a JSONL file as it is; of none of them half is taken."""
    rows = [("x", "{A#Positive};{B#Neutral}"), ("y", cell)]
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("data", "label"), *rows])
    text = buffer.getvalue()
    if suffix == "jsonl":
        with contextlib.suppress(ValueError):  # where json takes the last of two, nothing is left to find
            rows = [rows[0], ("y", json.loads(cell) if cell.count('"A"') < 2 else cell)]
        text = "\n".join(json.dumps(dict(zip(("data", "label"), row, strict=True))) for row in rows)
    if X in labels:
        message = refused(tmp_path, text, name=f"reviews.{suffix}")
        assert message.startswith(f"reviews.{suffix}: row 2, column label: found ")
        assert '{ASPECT}, joined by ;, or a JSON object {"ASPECT": "Positive"}' in message or "one sentiment" in message
    reviews = read(tmp_path, text, f"reviews.{suffix}", on_bad_label="drop")
    assert reviews.aspects == ("A", "B")
    assert reviews.labels.tolist() == [[P, U], labels]
    assert bool(reviews.dropped) == (X in labels)


FOREIGN = """
{"A" "Positive"}|{'A', 'Positive'}|{“A”}|{A:Positive}|{A: Positive}|{A：Positive}|{A, positive}|{A=Positive}
{A,Positive}|{A Positive}|{A_POSITIVE}|{A-Positive}|{A/Positive}|{A (Positive)}|{Positive}|{Positive:A}|{A:pos}
{A neg}|{A:1}|{A=0}|{A, B}|{A+}|{A +2}|{A -1}|{A -}|{A[+2]}|{A->good}|{A tích cực}|{A#Positive, B#Negative}
{A#Positive B#Negative}|{A#Positive#Negative}|{A:Positive#Negative}|{#Positive}|{A##Positive}
{A#Positive},{B#Negative}|[A, Positive]|A=Positive|A:Positive|A,Positive|A#Positive|A|["A", "Positive"]|["POS"]
[["Positive", "A"]]|[["A", "Positive", 1]]|[1, "A"]|[{"A": "Positive"}]|("A", "Positive")|A: Positive
"""


@pytest.mark.parametrize("cell", FOREIGN.strip().replace("\n", "|").split("|"))
def test_labels_of_another_form_are_never_names(tmp_path: Path, cell: str) -> None:
    """Refused by row; where bad cells are dropped, nothing is known of that row, and no aspect is made of it."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("data", "label"), ("x", "{A#Positive};{B}"), ("y", cell)])
    message = refused(tmp_path, buffer.getvalue())
    assert message.startswith("reviews.csv: row 2, column label: found ")
    assert "allowed: {ASPECT#Positive}, {ASPECT#Negative}, {ASPECT#Neutral} or {ASPECT}" in message
    reviews = read(tmp_path, buffer.getvalue(), on_bad_label="drop")
    assert (reviews.aspects, reviews.labels.tolist()) == (("A", "B"), [[P, M], [X, X]])


@pytest.mark.parametrize(
    ("labels", "cell"),
    [("0-3", "{CAMERA 2}"), ("0-3", "{CAMERA 3.0}"), ("-1/0/1", "{CAMERA 1}"), ("0-3", '["CAMERA 2"]'),
     ({"positive": ["tốt"], "negative": ["2"], "neutral": ["3"]}, "{CAMERA tốt}")],
)  # fmt: skip
def test_a_label_after_a_space_is_no_part_of_a_name(tmp_path: Path, labels: Any, cell: str) -> None:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("data", "label"), ("x", "{CAMERA};{IPHONE 9}"), ("y", cell)])
    message = refused(tmp_path, buffer.getvalue(), labels=labels)
    assert message.startswith(f"reviews.csv: row 2, column label: found {cell!r}, allowed: {{ASPECT#")
    dropped = read(tmp_path, buffer.getvalue(), labels=labels, on_bad_label="drop")
    assert (dropped.aspects, dropped.labels.tolist()) == (("CAMERA", "IPHONE 9"), [[M, M], [X, X]])


def test_names_of_aspects(tmp_path: Path) -> None:
    """What is left to a name; the polarity is what follows the last #."""
    names = ("SER&ACC", "Độ bền", "COVID-19", "5G", "Shop's own", "Pin (sạc)", "a.b", "POS", "positively")
    cell = ";".join(f"{{{name}}}" for name in names)
    reviews = read(tmp_path, f"data,label\nx,{cell}\ny,{{ROOMS # DESIGN#neutral}};{{Giá: ship#Positive}}\n")
    assert reviews.aspects == tuple(sorted([*names, "ROOMS#DESIGN", "Giá: ship"]))
    assert detection_only_aspects(reviews, ()) == tuple(sorted(names))
    assert reviews.labels_text(1) == "{Giá: ship#Positive};{ROOMS#DESIGN#Neutral}"
    text = "data,label\nx,{ROOMS#DESIGN#Positive};{PIN#Positive}\ny,{ROOMS#DESIGN};{PIN}\n"
    assert "row 2, column label: found '{ROOMS#DESIGN}', allowed" in refused(tmp_path, text)
    assert read(tmp_path, text, on_bad_label="drop").labels.tolist() == [[P, P], [M, X]]  # sorted: PIN first


def test_a_long_text_is_taken_from_every_format(tmp_path: Path) -> None:
    """csv alone has a limit of 131,072 characters; the caller's stays as it was."""
    text, limit = "máy đẹp " * 40_000, csv.field_size_limit()
    for name, content in (("a.csv", f"data,A\n{text},Positive\n"),
                          ("a.jsonl", json.dumps({"data": text, "A": "Positive"}))):  # fmt: skip
        assert read(tmp_path, content, name).texts == (text,)
    assert csv.field_size_limit() == limit


def test_rows_without_a_text(tmp_path: Path) -> None:
    """Their labels are known; of those without a label either nothing is."""
    text = 'data,A,B\nx,Positive,\n"  \n",,Negative\ny,Negative,\n,,\n ,oops,\n,oops,Neutral\n'
    assert refused(tmp_path, text).startswith("reviews.csv: row 5, column A: found 'oops'")
    reviews = read(tmp_path, text, on_bad_label="drop")
    assert reviews.texts == ("x", "  \n", "y", "")
    assert reviews.labels.tolist() == [[P, O], [O, N], [N, O], [X, U]]
    assert reviews.rows.tolist() == [1, 2, 3, 6]
    assert (reviews.dropped, reviews.cells) == ((BadLabel(5, "A", "oops"), BadLabel(6, "A", "oops")), 6)
    assert [note.removeprefix(f"{tmp_path / 'reviews.csv'}: ") for note in reviews.notes] == [
        "2 labelled reviews have no text: data_prep counts them, training leaves them out",
        "2 rows without a text and a label are left out",
    ]
    whole = reviews.with_text()
    assert (whole.texts, whole.labels.tolist(), whole.rows.tolist()) == (("x", "y"), [[P, O], [N, O]], [1, 3])
    assert whole.with_text() is whole
    jsonl = read(tmp_path, '{"data": "x", "A": "Positive"}\n{"A": "Negative"}\n', "reviews.jsonl")
    assert (jsonl.texts, jsonl.labels.tolist()) == (("x", ""), [[P], [N]])
    for on_bad_label in ("error", "drop"):
        message = refused(tmp_path, "data,A\n,Positive\n ,Negative\n", on_bad_label=on_bad_label)
        assert message == "reviews.csv: column data: found no text in any of 2 rows"


# ---------------------------------------------------------------- bad files


def test_encodings(tmp_path: Path) -> None:
    def error_of(content: bytes) -> str:
        (tmp_path / "reviews.csv").write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_reviews(tmp_path / "reviews.csv", form())
        return str(caught.value).removeprefix(f"{tmp_path}/reviews.csv: ")

    assert error_of(WIDE.encode("utf-16")) == "found UTF-16, allowed: UTF-8 text"
    assert error_of(b"data,A\nx,Positive\n\xfeok,\n") == "not UTF-8 (invalid start byte at byte 18, line 3)"
    bom = "\ufeffdata,A\nx,Positive\n".encode() + "pin tr\u00e2u,\n".encode("cp1258")
    assert error_of(bom) == "not UTF-8 (invalid continuation byte at byte 27, line 3)"
    assert error_of("data,A\nx,Positive\n".encode("utf-16-le")) == "found UTF-16, allowed: UTF-8 text"


TEXT_AFTER_QUOTE = "found text after a closing quote, allowed: quotes within quotes are doubled"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("data,A\n", "no reviews, only a header"),
        ("data,A\nx,Positive\ny\n", "row 2: found 1 columns, allowed: 2"),
        ('data,A\n"x\ny",Positive\n\nz,Positive,\n', "row 2: found 3 columns, allowed: 2"),
        ('data,A\nx,Positive\n"y,Positive\n', "line 3: found a quote that is never closed"),
        ('data,A\n"x"y,Positive\n', f"line 2: {TEXT_AFTER_QUOTE}"),
        ('data,A\nx,Positive\n"5\\" rẻ",Positive\n', f"line 3: {TEXT_AFTER_QUOTE}"),
        ("data,A,A\nx,Positive,Positive\n", "column A appears twice"),
        ("data\nx\n", "no aspect: column data is the only one"),
        ("data,label\nx,\n", "column label: found no label in any of 1 rows"),
    ],
)
def test_damaged_csv(tmp_path: Path, text: str, message: str) -> None:
    assert refused(tmp_path, text) == f"reviews.csv: {message}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"data": "x", "A": "Positive"}\n\n{"data": "y"\n', "line 3: not JSON (Expecting ',' delimiter"),
        ('{"data": "x", "A": "Positive"}\n["y"]\n', "line 2: found a list, allowed: an object"),
        ('\n{"data": true, "A": "Positive"}\n', "row 1, column data: found 'true', allowed: text"),
        ('{"data": "x", "A": "Positive"}\n{"data": "y", "A": 1}\n', "row 2, column A: found '1', allowed: Positive"),
        ('{"data": "x", "A": ["Positive"]}\n', "row 1, column A: found '[\"Positive\"]', allowed: Positive"),
        ('{"data": "xx", "A": "Positive"}\n{"data": "a\\ud83d", "A": ""}\n', "row 2, column data: found half a char"),
        ('{"data": "x", "A": "Positive", "A": ""}\n', "line 1: not JSON (key 'A' appears twice)"),
    ],
)
def test_damaged_jsonl(tmp_path: Path, lines: str, message: str) -> None:
    assert refused(tmp_path, lines, name="reviews.jsonl").startswith(f"reviews.jsonl: {message}")


def test_paths_that_are_no_review_files(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    written(tmp_path, "x", "reviews.xls")
    written(tmp_path, "PAR1 and so on", "cut.parquet")
    for name, message in {
        "absent.csv": "No such file or directory",
        "folder.csv": "found a folder, allowed: a file (.csv, .tsv, .json, .jsonl, .parquet, .xlsx, .xml, .txt, each",
        "reviews.xls": "found .xls, allowed: .csv, .tsv, .json, .jsonl, .parquet, .xlsx, .xml, .txt, each also as .gz",
        "cut.parquet": "not a readable Parquet file (",
    }.items():
        with pytest.raises(UserError) as caught:
            read_reviews(tmp_path / name, form())
        assert str(caught.value).startswith(f"{tmp_path / name}: {message}")


# ---------------------------------------------------------------- detection only


def test_detection_only_aspects(tmp_path: Path) -> None:
    text = "data,label\nx,{A#Positive};{B}\ny,{A};{B};{C#Negative};{D#Posititve}\nz,{D}\n"
    reviews = read(tmp_path, text, on_bad_label="drop")
    assert reviews.labels.tolist() == [[P, M, O, O], [M, M, N, X], [O, O, O, M]]
    assert detection_only_aspects(reviews, ()) == ("B", "D")
    assert detection_only_aspects(reviews, ["A"]) == ("A", "B", "D")
    with pytest.raises(UserError, match=r"data\.detection_only: no aspect E; there are: A, B, C, D"):
        detection_only_aspects(reviews, ["E"])
    bare = reviews.without_polarity(("A", "D"))
    assert bare.labels.tolist() == [[M, M, O, O], [M, M, N, X], [O, O, O, M]]
    assert reviews.labels[0, 0] == P
    assert bare.labels.dtype == np.int8


def test_an_aspect_that_nobody_mentions_is_not_detection_only(tmp_path: Path) -> None:
    reviews = read(tmp_path, "data,A,B\nx,Positive,\n")
    assert detection_only_aspects(reviews, ()) == ()
    assert detection_only_aspects(reviews, ("B",)) == ("B",)
    assert reviews.notes == (f"{tmp_path / 'reviews.csv'}: no review mentions B",)


# ---------------------------------------------------------------- properties

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
CELLS = {"positive": P, " Positive": P, "NEGATIVE\t": N, "nEutral": U, "": O, " ": O}


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(ANY_TEXT, st.sampled_from(list(CELLS)), st.sampled_from(list(CELLS))), min_size=1))
def test_any_text_comes_back_from_every_form(rows: list[tuple[str, str, str]]) -> None:
    expected = [[CELLS[first], CELLS[second]] for _, first, second in rows]
    texts = tuple(unicodedata.normalize("NFC", text) for text, _, _ in rows)
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("data", "A", "B"), *rows])
    lines = "\n".join(json.dumps(dict(zip(("data", "A", "B"), row, strict=True)), ensure_ascii=False) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        pd.DataFrame(rows, columns=["data", "A", "B"]).to_parquet(Path(folder) / "reviews.parquet")
        written(Path(folder), buffer.getvalue(), "reviews.csv")
        written(Path(folder), lines, "reviews.jsonl")
        for suffix in ("csv", "jsonl", "parquet"):
            reviews = read_reviews(Path(folder) / f"reviews.{suffix}", form(), ("A", "B"))
            assert (reviews.texts, reviews.labels.tolist()) == (texts, expected), suffix


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.lists(st.sampled_from([O, P, N, U, M]), min_size=3, max_size=3), min_size=1))
def test_written_labels_read_back(rows: list[list[int]]) -> None:
    aspects = ("A", "B b", "C&Đ")
    original = Reviews("here", "0", ("x",) * len(rows), np.array(rows, dtype=np.int8), aspects, np.arange(len(rows)))
    cells = [original.labels_text(position) for position in range(len(rows))]
    with tempfile.TemporaryDirectory() as folder:
        file = written(Path(folder), "data,label\n" + "".join(f'x,"{cell};"\n' for cell in cells))
        assert read_reviews(file, form(), aspects).labels.tolist() == rows
